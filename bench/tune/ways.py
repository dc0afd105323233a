"""Times the ways of an op: up to how many rows NF4 or 8-bit weights are multiplied as they are
stored, and attention's backends.

The ops themselves are run, forward or towards x with their update, once as dispatch's "fused" and
once as its "decode", with the tiles that the rows measured so far would ship.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.attention import choose_backend
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.ops.attention import attention_backward, attention_forward
from fluxfast_kernels.quant import frozen
from torch import Tensor

from bench.tune.calls import HALF, Heads, Tensors, disagreement, tensors_of
from bench.tune.problems import HAND_OVER_ROWS, PRODUCT_DTYPE, HandOver
from bench.tune.sweep import Alive, Job, Precompile, Target, Timed

WAYS = ("fused", "decode")
BACKENDS = ("flash", "cudnn", "triton")


@contextmanager
def answering(op: str, storage: str, kind: str) -> Iterator[None]:
    """Dispatch answers `kind` where it is asked about this op and storage."""
    choose = dispatch.choose

    def answer(asked: str, arch, dtype, of: str, *shape) -> dispatch.Choice:
        choice = choose(asked, arch, dtype, of, *shape)
        return replace(choice, kind=kind) if (asked, of) == (op, storage) else choice

    with patch.object(dispatch, "choose", answer):
        yield


@contextmanager
def shipping(arch: int, own: dict[str, list[dict]]) -> Iterator[None]:
    """Dispatch reads `own` in place of the card's file."""
    rows = dispatch.ordered([own, dispatch.tables(arch)[-1]])
    dispatch.choose.cache_clear()
    try:
        with patch.object(dispatch, "rows", lambda _: rows):
            yield
    finally:
        dispatch.choose.cache_clear()


def op_of(t: Tensors, what: str) -> Callable[[], list[Tensor]]:
    """The op over a linear's tensors: forward, or dx with the gradients of the update."""
    linear = t.frozen_weight, t.update
    if what == "product":
        return lambda: linear_forward(t.xs, *linear, t.epilogue)
    return lambda: linear_backward(t.dys, t.xs, *linear, True)[0]


class HandOverJob(Job):
    """Both ways at rising M. measured: the card's rows as they would now be written."""

    def __init__(
        self,
        pair: HandOver,
        target: Target,
        measured: Callable[[], dict[str, list[dict]]],
        rows: tuple[int, ...] = HAND_OVER_ROWS,
    ):
        super().__init__(pair.share, WAYS[0], target)
        self.pair, self.measured, self.rows = pair, measured, rows

    @property
    def identity(self) -> dict[str, object]:
        pair = self.pair
        return {"kind": "hand over", **pair.kernel._asdict(), "n": pair.N, "k": pair.K}

    def time(self, failed: set[str], precompile: Precompile, alive: Alive) -> Timed:
        """A row a way and M."""
        del precompile
        with shipping(self.target.arch, self.measured()):
            return [pair for M in self.rows for pair in self._at(M, failed, alive)]

    def _at(self, M: int, failed: set[str], alive: Alive) -> Timed:
        (kernel, pair), target = (self.pair.kernel, self.pair), self.target
        t = tensors_of(pair, M, target.spec, target.rank, target.device)
        if kernel.storage == "dense" and kernel.dtype != "half":  # stored in 8 bits
            t.weight = list(frozen.quantize_8bit(t.weight[0], kernel.dtype))
        run = op_of(t, pair.what)
        question = (kernel.op, target.arch, PRODUCT_DTYPE[kernel.dtype], kernel.storage)
        choice = dispatch.choose(*question, M, pair.N, pair.K)

        def way(kind: str) -> list[Tensor]:
            with answering(kernel.op, kernel.storage, kind):
                return run()

        def gate(kind: str) -> str | None:
            return self.gated(f"{kind} at {M}", alive, lambda: disagreement(way(kind), truth))

        truth = [y.float() for y in way("decode")]
        works = {k: partial(way, k) for k in WAYS if f"{k} at {M}" not in failed}
        results = self.compare(works, target.rounds, gate, choice.kind)
        more = {"m": M, "linear": pair.linear, "what": pair.what, "source": choice.kind_source}
        timed = []
        for kind, result in results.items():
            result.name = f"{kind} at {M}"
            fields = {"way": kind, "shipped": kind == choice.kind, "tile": None}
            timed.append((result, more | fields))
        return timed


class BackendJob(Job):
    """Attention forward and backward on each backend, at T tokens."""

    def __init__(self, T: int, target: Target):
        self.T, self.C = T, target.spec.head_dim
        default, self.source = choose_backend(target.arch, HALF, self.C, T)
        super().__init__(1.0, default, target)  # a few comparisons: before all else

    @property
    def identity(self) -> dict[str, object]:
        return {"kind": "attention", "dtype": "half", "m": self.T, "k": self.C}

    def time(self, failed: set[str], precompile: Precompile, alive: Alive) -> Timed:
        """A row a backend."""
        del precompile
        heads = self.target.spec.num_heads
        given = Heads(self.T, heads, self.C, self.target.device)
        truth = sum(given.truth(), [])

        def work(backend: str) -> list[Tensor]:
            o, lse = attention_forward(*given.qkv, backend)
            return [o, lse, *attention_backward(given.do, *given.qkv, o, lse, backend)]

        def gate(backend: str) -> str | None:
            return self.gated(backend, alive, lambda: disagreement(work(backend), truth))

        names = [name for name in dict.fromkeys((self.default, *BACKENDS)) if name not in failed]
        works = {name: partial(work, name) for name in names}
        results = self.compare(works, self.target.rounds, gate, self.default)
        more = {"n": heads, "source": self.source, "tile": None}
        return [
            (r, more | {"way": name, "shipped": name == self.default})
            for name, r in results.items()
        ]
