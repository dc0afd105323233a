"""Carries a plan out while a model trains: each bucket's policies, the offload engine, what lives
on the host, and the step back to cheaper policies where memory runs out all the same.
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from fluxfast_kernels.dispatch import backend
from torch import Tensor

from fluxfast.errors import FluxfastError
from fluxfast.memory.copies import Copies, CpuCopies, CudaCopies
from fluxfast.memory.cuda_graphs import Graphs, Inputs, why_not
from fluxfast.memory.host import OptimizerOnHost, WeightsOnHost
from fluxfast.memory.offload import Offload
from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.plan import MARGIN, Plan, cheaper, cheaper_policies
from fluxfast.memory.planner.step_spec import StepSpec
from fluxfast.model.flux import Flux

log = logging.getLogger(__name__)

CURE = (
    "a lower data.resolution, train.batch_size: 1 with gradient_accumulation, or a lower "
    "memory.limit_gib, so that more is planned for"
)


class MemoryExhausted(FluxfastError):
    """Memory ran out, and no policy is cheaper. What was trained up to here is whole."""


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own error; cuBLAS and Triton raise plain RuntimeErrors."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


T = TypeVar("T")


class _Bound:
    """The offload engine as one bucket's forward passes see it."""

    def __init__(self, engine: Offload, key: Hashable):
        self._engine, self._key = engine, key

    def begin(self) -> None:
        self._engine.begin(self._key)

    def __getattr__(self, name: str):
        return getattr(self._engine, name)


class MemoryRuntime:
    """What a training run asks before each batch.

    plan: None on a CPU, where every block keeps what it saves. policies: bucket -> policy per
    block, for runs without a plan too.
    """

    def __init__(
        self,
        model: Flux,
        plan: Plan | None,
        policies: Mapping[str, tuple[str, ...]],
        device: torch.device,
    ):
        self.model, self.plan, self.policies = model, plan, dict(policies)
        self.device = device
        self._changed = False  # whether policies became cheaper since `take_expected`
        self._tried_again: set[str] = set()
        self.graphs: Graphs | None = None
        self._examples: Callable[[], Mapping[Hashable, Inputs]] = dict
        self._label: str | None = None  # of the pass that is being taken
        self.expected = 0.0  # seconds predicted for the passes since `take_expected`
        self._copies: Copies | None = None
        self._engine: Offload | None = None
        self._weights: WeightsOnHost | None = None
        self._optimizer: OptimizerOnHost | None = None
        if plan is not None:
            if plan.modulation == "host":
                self._weights = WeightsOnHost(model.modulation_linears(), self.copies)
                for layer in model.modulation_linears():
                    layer.weight_provider = self._weights.fetch
            if device.type == "cuda":
                _reserve_scratch(plan.request.step, model.compute_dtype, device)
                # past the plan an error, which this run knows how to take, not a driver that spills
                total = torch.cuda.get_device_properties(device).total_memory
                share = (plan.limit + MARGIN * total / 2) / total
                torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        for label in self.policies:
            self._prepare(label)

    @property
    def copies(self) -> Copies:
        """By streams on a GPU; in place on a CPU."""
        if self._copies is None:
            cuda = self.device.type == "cuda"
            self._copies = CudaCopies(self.device) if cuda else CpuCopies()
        return self._copies

    @property
    def offloads(self) -> bool:
        return any("offload" in policies for policies in self.policies.values())

    def make_graphs(
        self,
        work: Callable[[Inputs], Tensor],
        gradients: Tensor,
        examples: Callable[[], Mapping[Hashable, Inputs]],
        *,
        lora_dropout: bool,
        wanted: bool,
    ) -> Graphs:
        """Graphs of `work` (see `Graphs`), none of them captured yet. examples: makes inputs of
        every shape, by their keys. wanted: the setting `memory.graphs`.
        """
        reason = why_not(self.device, lora_dropout=lora_dropout, offload=self.offloads)
        if reason is None and not wanted:
            reason = "memory.graphs is false"
        self.graphs, self._examples = Graphs(work, gradients, reason), examples
        return self.graphs

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the optimizer's state on the host between steps, where the plan says so."""
        if self.plan is not None and self.plan.optimizer_state == "host":
            self._optimizer = OptimizerOnHost(optimizer, self.copies)

    def stepping(self) -> AbstractContextManager:
        """What the optimizer's step, and loading or saving its state, run inside."""
        return nullcontext() if self._optimizer is None else self._optimizer.resident()

    def expect(self, label: str) -> None:
        """A pass of this bucket is being taken."""
        self._label = label
        self.expected += 1.0 if self.plan is None else self.plan.buckets[label].seconds

    def take_expected(self) -> tuple[float, bool]:
        """What was predicted since the last call, in seconds (without a plan a count of passes),
        and whether policies became cheaper since.
        """
        expected, self.expected = self.expected, 0.0
        changed, self._changed = self._changed, False
        return expected, changed

    def use(self, label: str) -> None:
        """The next pass is one of this bucket's."""
        self._label = label
        policies = self.policies[label]
        self.model.policies = list(policies)
        offloads = "offload" in policies
        bound: Any = None
        if offloads and self._engine is not None:
            bound = _Bound(self._engine, (label, policies))
        self.model.offload = bound

    def retry(self, fn: Callable[[], T]) -> T:
        """Returns fn(), which is called again where memory runs out in it: graphs dropped, the
        bucket in hand under cheaper policies, graphs captured anew where there were any.

        Raises MemoryExhausted where no policy is cheaper.
        """
        while True:
            self._label = None
            try:
                return fn()
            except RuntimeError as error:
                if not is_out_of_memory(error) or self._label is None:
                    raise
                # the message alone: the error holds the frames, these the tensors
                message = str(error)
            captured = self._drop_graphs()
            self._make_cheaper(self._label, message)
            if captured:
                self.capture()

    def capture(self) -> None:
        """One graph per example, where there are graphs; with cheaper policies where memory does
        not do for them.
        """
        graphs = self.graphs
        if graphs is not None and graphs.reason is None:
            graphs.drop()
            self.retry(lambda: graphs.capture(self._examples()))

    @contextmanager
    def without_graphs(self, again: bool) -> Iterator[None]:
        """Their memory is free inside. again: they are captured anew after."""
        captured = self._drop_graphs()
        yield
        if captured and again:
            self.capture()

    def _drop_graphs(self) -> bool:
        """Returns whether there were any."""
        captured = self.graphs is not None and self.graphs.captured
        if self.graphs is not None:
            self.graphs.drop()
        return captured

    def _make_cheaper(self, label: str, message: str) -> None:
        """Policies a notch cheaper in memory for the bucket, exact ones alone; where none is, once
        in a run leave them as they are. Raises MemoryExhausted after that.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        first = message.splitlines()[0] if message else "out of memory"
        before = self.policies[label]
        if self.plan is not None:
            plan = cheaper(self.plan, label)
            policies = None if plan is None else plan.buckets[label].choice.policies
            self.plan = plan or self.plan
        else:
            policies = cheaper_policies(before)
        if policies is None:
            if label in self._tried_again:
                raise MemoryExhausted(f"the GPU's memory is full: {first}", hint=CURE)
            self._tried_again.add(label)
            log.warning(
                f"note: out of memory at {label}: the step is taken again once, nothing is cheaper"
            )
            if self._engine is not None:
                self._engine.abandon()
            return
        self.policies[label] = policies
        self._changed = True
        if self._engine is not None:
            self._engine.abandon()
        self._prepare(label)
        changed = sum(a != b for a, b in zip(before, policies, strict=True))
        word = next(b for a, b in zip(before, policies, strict=True) if a != b)
        log.warning(
            f"note: out of memory at {label}: {changed} more blocks go over to {word} from now on, "
            "and the step is taken again"
        )

    def _prepare(self, label: str) -> None:
        policies = self.policies[label]
        if "offload" not in policies:
            return
        if self.plan is None:
            raise FluxfastError(
                "memory.policy: offload needs a plan", hint="set memory.limit_gib on a CPU"
            )
        if self._engine is None:
            self._engine = Offload(self.copies)
        step, shape = self.plan.request.step, self.plan.buckets[label].shape
        sizes = {
            index: saved_bytes.block_saved(step, block, shape, "offload").host
            for index, (block, policy) in enumerate(
                zip(saved_bytes.blocks_of(step), policies, strict=True)
            )
            if policy == "offload"
        }
        self._engine.prepare((label, policies), sizes)


def _reserve_scratch(step: StepSpec, dtype: torch.dtype, device: torch.device) -> None:
    """As large as it will ever be, at once: one that grows leaves its smaller ones behind."""
    for kind, count in saved_bytes.scratch_counts(step).items():
        if count:
            backend.scratch(count, dtype if kind == "dense" else _CODES[kind], device)


_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
