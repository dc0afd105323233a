"""Carries a memory plan out while a model trains: each bucket's policies, activation offload, what
lives on the host, and the retreat to cheaper policies where memory runs out all the same.
"""

import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TypeVar

import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.quant.rows import DTYPE
from torch import Tensor

from fluxfast.errors import FluxfastError
from fluxfast.memory.copies import CpuCopies, CudaCopies
from fluxfast.memory.cuda_graphs import Graphs, GraphsTooLarge, Inputs, is_out_of_memory, why_not
from fluxfast.memory.host import OptimizerOnHost, WeightsOnHost
from fluxfast.memory.offload import Offload
from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.choose import Chooser
from fluxfast.memory.planner.plan import GIB, MARGIN, STEP_COPIES, Plan, cheaper_policies
from fluxfast.model.flux import Flux

log = logging.getLogger(__name__)

CURE = (
    "a lower data.resolution, train.batch_size: 1 with gradient_accumulation, or a lower "
    "memory.limit_gib, so that more is planned for"
)


class MemoryExhausted(FluxfastError):
    """Memory ran out, and no policy is cheaper. What was trained up to here is whole."""


def lift_limit(device: torch.device) -> None:
    """Ends the limit that a plan set on this process's memory: it holds for everything after."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def memory_reason(error: BaseException | str) -> str:
    """Returns the first sentences of such an error, without torch's advice on fragmentation."""
    first = (str(error) or "out of memory").splitlines()[0]
    return first.partition(" Of the allocated memory")[0].strip()


T = TypeVar("T")


class MemoryRuntime:
    """What a training run asks before each batch.

    plan: None on a CPU, where every block keeps what it saves; its predictions stay those of the
    policies at the start. policies: bucket -> policy per block, for runs without a plan too.
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
        self._crowded = False  # whether a look has run out of memory beside the graphs
        self.graphs: Graphs | None = None
        self._examples: Callable[[], Mapping[Hashable, Inputs]] = dict
        self._label: str | None = None  # of the pass in progress
        self.expected = 0.0  # seconds predicted for the passes since `take_expected`
        self._copies = CudaCopies(device) if device.type == "cuda" else CpuCopies()
        self._engine: Offload | None = None
        model.offload = None  # an earlier run's, whose memory this one needs
        self._optimizer: OptimizerOnHost | None = None
        if plan is None:
            return
        if plan.modulation == "host":
            layers = model.modulation_linears()
            on_host = WeightsOnHost(layers, self._copies)
            for layer in layers:
                layer.weight_provider = on_host.fetch
        offloaded = {label: bucket.choice.offloaded for label, bucket in plan.buckets.items()}
        if any(offloaded.values()):
            self._engine = model.offload = Offload(self._copies, offloaded)
        if device.type == "cuda":
            # scratch as large as it will ever be: one that grows leaves its smaller ones behind
            for kind, count in saved_bytes.scratch_counts(plan.request.step).items():
                if count:
                    backend.scratch(count, DTYPE.get(kind, model.compute_dtype), device)
            # past the plan an error, which this run knows how to handle, not a driver that spills;
            # until `lift_limit`
            total = torch.cuda.get_device_properties(device).total_memory
            share = (plan.limit + MARGIN * total / 2) / total
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)

    def make_graphs(
        self,
        run_pass: Callable[[Inputs], Tensor],
        gradients: Tensor,
        examples: Callable[[], Mapping[Hashable, Inputs]],
        *,
        wanted: bool,
    ) -> Graphs:
        """Returns graphs of `run_pass` (see `Graphs`), none of them captured yet. examples: makes
        inputs of every shape, by their keys. wanted: the setting `memory.graphs`.
        """
        offloads = self._engine is not None
        reason = why_not(self.device, offload=offloads, wanted=wanted)
        if reason is None and self.plan is not None and not self.plan.request.graphs:
            reason = "the plan is faster without them, or has no room for them"
        self.graphs, self._examples = Graphs(run_pass, gradients, reason), examples
        return self.graphs

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Keeps the optimizer's state on the host between steps, where the plan says so."""
        if self.plan is not None and self.plan.optimizer_state == "host":
            self._optimizer = OptimizerOnHost(optimizer, self._copies)

    def stepping(self) -> AbstractContextManager:
        """Returns what the optimizer's step, and loading or saving its state, run inside."""
        return nullcontext() if self._optimizer is None else self._optimizer.resident()

    def expect(self, label: str) -> None:
        """Counts a pass of this bucket as begun."""
        self._label = label
        self.expected += 1.0 if self.plan is None else self.plan.buckets[label].seconds

    def take_expected(self) -> tuple[float, bool]:
        """Returns the seconds predicted since the last call (without a plan a count of passes), and
        whether policies became cheaper since.
        """
        expected, self.expected = self.expected, 0.0
        changed, self._changed = self._changed, False
        return expected, changed

    def use(self, label: str) -> None:
        """Sets the model up for a pass of this bucket."""
        self._label = label
        self.model.policies = list(self.policies[label])
        if self._engine is not None:
            self._engine.select(label)

    def retry(self, fn: Callable[[], T]) -> T:
        """Returns fn(), which is called again where memory runs out in it: graphs dropped, a bucket
        under cheaper policies, graphs captured anew where there were any. The bucket is the current
        one; with graphs the one that needs the most, as their pool is as large.

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
                missing = error.nbytes if isinstance(error, GraphsTooLarge) else 0
            if self._engine is not None:
                self._engine.abandon()
            captured = self._drop_graphs()
            if missing:
                self._make_room(missing)
            else:
                self._make_cheaper(self._largest(self._label), message)
            if captured:
                self.capture()

    def capture(self) -> None:
        """Captures one graph per example, where there are graphs; under cheaper policies where
        memory is too small for them.
        """
        if self.graphs is not None and self.graphs.reason is None:
            self.retry(partial(self._capture, self.graphs))

    def _capture(self, graphs: Graphs) -> None:
        """Captures, then allocates what an optimizer step takes and frees it, for the step to find:
        there a lack of memory would end the run.
        """
        # memory can run out before any pass has begun; `_largest` takes the bucket then
        self._label = next(iter(self.policies))
        graphs.capture(self._examples())
        copies = 0 if self.plan is None else STEP_COPIES.get(self.plan.request.optimizer, 0)
        try:
            with self.stepping():
                _ = [torch.empty_like(graphs.gradients) for _ in range(copies)]
        except RuntimeError:
            graphs.drop()
            raise

    @contextmanager
    def looking(self, again: bool) -> Iterator[None]:
        """Validation and previews run inside, each in `attempt`. again: graphs that had to be
        dropped for one are captured anew after.
        """
        captured = self.graphs is not None and self.graphs.captured
        if self._crowded:
            self._drop_graphs()
        yield
        if captured and self.graphs is not None and not self.graphs.captured and again:
            self.capture()

    def attempt(self, fn: Callable[[], T]) -> T:
        """Returns fn(), which runs beside the graphs; where memory runs out, once more without
        them, as do all looks after it.
        """
        try:
            return fn()
        except RuntimeError as error:
            if self._crowded or not is_out_of_memory(error):
                raise
        self._crowded = True
        self._drop_graphs()
        return fn()

    def _drop_graphs(self) -> bool:
        """Frees what can be freed. Returns whether there were any."""
        captured = self.graphs is not None and self.graphs.captured
        if self.graphs is not None:
            self.graphs.drop()
        gc.collect()  # what an error's frames held in cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return captured

    def _largest(self, label: str) -> str:
        """Returns the bucket of the most bytes that can be cheaper, where there are graphs; else
        `label`.
        """
        if self.plan is None or self.graphs is None or self.graphs.reason is not None:
            return label
        sizes = {
            x: self._bytes(x, now) for x, now in self.policies.items() if cheaper_policies(now)
        }
        return max(sizes, key=sizes.__getitem__, default=label)

    def _bytes(self, label: str, policies: tuple[str, ...]) -> int:
        """Returns the bytes predicted for a pass of this bucket, what is there always apart."""
        assert self.plan is not None
        shape = self.plan.buckets[label].shape
        return Chooser(self.plan.request.step, shape, self.plan.card, False).fixed(policies).bytes

    def _make_room(self, nbytes: int) -> None:
        """Gives buckets cheaper policies, until the graphs' pool is predicted to be so much
        smaller; where it cannot be, the run goes on without graphs.
        """
        assert self.graphs is not None
        policies = dict(self.policies)
        sizes = {label: self._bytes(label, now) for label, now in policies.items()}
        goal = max(sizes.values()) - nbytes
        while max(sizes.values()) > goal:
            label = max(sizes, key=sizes.__getitem__)
            cheaper = cheaper_policies(policies[label])
            if cheaper is None:
                self.graphs.run_eagerly("what the driver takes for them does not fit")
                return
            policies[label], sizes[label] = cheaper, self._bytes(label, cheaper)
        self.policies, self._changed = policies, True
        self.graphs.cool()
        log.warning(
            f"note: the driver takes {nbytes / GIB:.2f} GiB more for CUDA graphs than are free: "
            "the largest buckets use cheaper policies from now on"
        )

    def _make_cheaper(self, label: str, message: str) -> None:
        """Gives the bucket policies a notch cheaper in memory, exact ones alone; where none is,
        leaves them once in a run. Raises MemoryExhausted after that.
        """
        before = self.policies[label]
        policies = cheaper_policies(before)
        if policies is None:
            if label in self._tried_again:
                reason = memory_reason(message)
                raise MemoryExhausted(f"the GPU's memory is full: {reason}", hint=CURE)
            self._tried_again.add(label)
            log.warning(
                f"note: out of memory at {label}: no policy is cheaper, the step is tried once more"
            )
            return
        self.policies[label] = policies
        if self.graphs is not None:
            self.graphs.cool()
        self._changed = True
        changed = [new for old, new in zip(before, policies, strict=True) if old != new]
        log.warning(
            f"note: out of memory at {label}: {len(changed)} more blocks use {changed[0]} from now "
            "on, and the step is tried again"
        )
