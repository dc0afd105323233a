"""What a step allocates on a card that is not here, to the byte, beside what the planner predicts.

    python -m bench.twin.dry_run            one full size, and nano
    python -m bench.twin.dry_run --all      every policy, precision, rank, batch, preset and dropout

The project's own forward and backward run on meta tensors through the launchers (`driver.py`), so
that every allocation is made as on the card and no memory is taken. `Allocator` is a model of
torch's caching allocator. Exits with 1 where a prediction, frozen weights included, is off by more
than BOUND.
"""

import bisect
import gc
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.quant.rows import DTYPE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bench import terminal
from bench.twin.driver import OPS
from bench.twin.launches import Case, run_step
from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.cards import card as known_card
from fluxfast.memory.planner.choose import Chooser
from fluxfast.memory.planner.step_spec import StepSpec, lora_of, shape_of
from fluxfast.model.activations import EXACT, POLICIES
from fluxfast.model.modulation import MODULATION_ROWS
from fluxfast.model.names import linear_shape
from fluxfast.model.spec import DEV, NANO, FluxSpec

GIB, MIB = 2**30, 2**20
BOUND = 0.02  # of the bytes


@dataclass
class _Block:
    """Part of a segment."""

    segment: int
    offset: int
    size: int
    small: bool
    free: bool = True
    before: "_Block | None" = None
    after: "_Block | None" = None


class Allocator:
    """torch's caching allocator: one stream, no expandable segments; best fit, split, merge.

    Source: c10/cuda/CUDACachingAllocator.cpp. reserved: bytes of segments, never given back here.
    """

    def __init__(self):
        self.reserved, self._segments = 0, 0
        self._pools: dict[bool, list[tuple[int, int, int, _Block]]] = {True: [], False: []}

    def take(self, count: int) -> _Block:
        size = max(512, -(-count // 512) * 512)
        small = size <= MIB
        pool = self._pools[small]
        at = bisect.bisect_left(pool, (size, -1, -1))
        if at < len(pool):
            block = pool.pop(at)[3]
        else:
            whole = 2 * MIB if small else 20 * MIB
            if size >= 10 * MIB:
                whole = -(-size // (2 * MIB)) * 2 * MIB
            block = _Block(self._segments, 0, whole, small)
            self._segments, self.reserved = self._segments + 1, self.reserved + whole
        left = block.size - size
        if left >= (512 if small else MIB + 1):
            rest = _Block(block.segment, block.offset + size, left, small, True, block, block.after)
            if block.after:
                block.after.before = rest
            block.after, block.size = rest, size
            self._insert(rest)
        block.free = False
        return block

    def release(self, block: _Block) -> None:
        block.free = True
        if (first := block.before) and first.free:
            self._remove(first)
            block = self._merged(first, block)
        if (last := block.after) and last.free:
            self._remove(last)
            block = self._merged(block, last)
        self._insert(block)

    def _merged(self, first: _Block, second: _Block) -> _Block:
        first.size, first.after, first.free = first.size + second.size, second.after, True
        if second.after:
            second.after.before = first
        return first

    def _key(self, block: _Block) -> tuple:
        return block.size, block.segment, block.offset, block

    def _insert(self, block: _Block) -> None:
        bisect.insort(self._pools[block.small], self._key(block), key=lambda entry: entry[:3])

    def _remove(self, block: _Block) -> None:
        pool = self._pools[block.small]
        del pool[bisect.bisect_left(pool, self._key(block)[:3], key=lambda entry: entry[:3])]


@dataclass
class Memory(TorchDispatchMode):
    """Counts the storages that are born inside. peak: bytes alive at the most."""

    peak: int = 0
    allocator: Allocator = field(default_factory=Allocator)

    def __post_init__(self):
        super().__init__()
        self.alive, self._known = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fluxfast":
            with self:  # its launchers allocate
                return OPS[func.name()]._init_fn(*args, **kwargs)
        before = {_storage(x)._cdata for x in tree_iter((args, kwargs)) if _is_tensor(x)}
        out = func(*args, **kwargs)
        if "flash_attention_backward" in func.name():
            self._workspace(args[1])
        for tensor in tree_iter(out):
            if _is_tensor(tensor) and _storage(tensor)._cdata not in before:
                self._born(_storage(tensor))
        return out

    def _workspace(self, q: torch.Tensor) -> None:
        """FlashAttention 2 sums dq and a row's dot products in fp32, rows rounded up to 128."""
        B, H, T, C = q.shape
        rows = B * H * -(-T // 128) * 128
        blocks = [self.allocator.take(4 * rows * each) for each in (C, 1)]
        self.peak = max(self.peak, self.alive + 4 * rows * (C + 1))
        for block in blocks:
            self.allocator.release(block)

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self._known or not count:
            return
        block = self.allocator.take(count)

        def gone(_) -> None:
            self._known.pop(key)
            self.alive -= count
            self.allocator.release(block)

        self._known[key] = weakref.ref(storage, gone)
        self.alive += count
        self.peak = max(self.peak, self.alive)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


@dataclass(frozen=True)
class Usage:
    """Bytes of a step's passes: at the most alive, in segments, as the planner predicts; of the
    frozen weights beside them; launches of Triton's and aten's."""

    case: Case
    policy: str
    peak: int
    reserved: int
    predicted: int
    weights: int
    launches: int

    @property
    def error(self) -> float:
        """Of the bytes on the card."""
        return (self.predicted - self.peak) / (self.peak + self.weights)

    def __str__(self) -> str:
        sizes = f"{self.peak / GIB:.3f} GiB, in segments {self.reserved / GIB:.3f}"
        planned = f"planned {self.predicted / GIB:.3f} ({self.error:+.2%})"
        return f"{self.case} {self.policy}: {sizes}, {planned}; {self.launches} launches"


def usage(case: Case, policy: str, spec: FluxSpec = DEV) -> Usage:
    """Returns what a step under one policy for all blocks takes."""
    step = step_of(case, spec)
    width, height = map(int, case.size.split("x"))
    shape = shape_of(width, height, case.batch, spec.text_length)
    for kind, count in saved_bytes.scratch_counts(step).items():
        dtype = DTYPE.get(kind, torch.float32 if step.width == 4 else torch.bfloat16)
        backend.scratch(count, dtype, torch.device("meta"))  # as a run does before its first pass
    gc.collect()
    memory = Memory()
    doubles, singles = (policy,) * spec.depth, (policy,) * spec.depth_single_blocks
    launches = run_step(case, doubles, singles, spec, memory)
    predicted = (
        Chooser(step, shape, known_card("RTX 4090"), False).fixed([*doubles, *singles]).bytes
    )
    modulation = saved_bytes.modulation_names(step)
    if not any(map(step.trains, modulation)):  # given to the passes, so not allocated in them
        rows = -(-case.batch // MODULATION_ROWS) * MODULATION_ROWS
        predicted -= step.width * rows * sum(linear_shape(name, spec)[0] for name in modulation)
    weights = sum(saved_bytes.weights(step).values())
    sizes = memory.peak, memory.allocator.reserved, predicted, weights
    return Usage(case, policy, *sizes, len(launches))


def step_of(case: Case, spec: FluxSpec) -> StepSpec:
    """Returns the planner's description of a case."""
    activations = "fp32" if case.matmul == "fp32" else "bf16"
    lora = lora_of(spec, case.rank, case.targets)
    storage = case.storage.removesuffix("-nested")
    return StepSpec(spec, storage, case.matmul, activations, lora, case.dropout)


def cases(everything: bool) -> Iterator[tuple[Case, str, FluxSpec]]:
    """Yields (case, policy, spec)."""
    yield Case(size="256x256", storage="bf16", matmul="bf16"), "keep", NANO
    yield Case(), "keep", DEV
    if not everything:
        return
    for policy in sorted(set(POLICIES) - {"keep", "offload"}):  # staging buffers are no pass's
        yield Case(), policy, DEV
    for change in (
        {"batch": 4, "size": "512x512"},
        {"rank": 64},
        {"rank": 128},
        {"targets": "all"},
        {"targets": "attn"},
        {"matmul": "bf16"},
        {"storage": "int8"},
        {"storage": "fp8", "matmul": "fp8"},
        {"size": "1008x528"},
    ):
        yield replace(Case(), **change), "keep", DEV
    for policy in EXACT:
        if policy != "offload":
            yield Case(dropout=True), policy, DEV
    for policy in ("gelu_int8", "recompute_mlp", "checkpoint"):
        yield Case(matmul="bf16"), policy, DEV
        yield Case(size="768x768", batch=2), policy, DEV


def main(arguments: list[str] | None = None) -> int:
    parser = terminal.parser(__doc__)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # a process that interprets launches nothing
    wrong = 0
    for case, policy, spec in cases(options.all):
        line = usage(case, policy, spec)
        wrong += abs(line.error) > BOUND
        print(line, flush=True)
    print(f"{wrong} predictions off by more than {BOUND:.0%}")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
