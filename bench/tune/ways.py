"""Which way an op takes, timed: the rows up to which NF4 or codes are multiplied as they are kept,
and attention's backends.

The ops themselves are run, forward or towards x with their update, once as dispatch's "fused" and
once as its "decode", with the tiles that the rows measured so far would ship.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.attention import choose_backend
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.ops.attention import (
    attention_backward,
    attention_forward,
)
from fluxfast_kernels.quant import frozen
from torch import Tensor

from bench import timing
from bench.tune.calls import HALF, Heads, Tensors, disagreement, tensors_of
from bench.tune.problems import HAND_OVER_ROWS, PRODUCT_DTYPE, HandOver
from bench.tune.sweep import STOPPED, WARMUP, Precompile, Timed, replayed
from fluxfast.model.spec import FluxSpec

WAYS = ("fused", "decode")
BACKENDS = ("flash", "cudnn", "triton")


@contextmanager
def answering(op: str, storage: str, kind: str) -> Iterator[None]:
    """Dispatch answers `kind` where it is asked about this op and storage."""
    choose = dispatch.choose

    def answer(asked: str, arch, dtype, of: str, *shape) -> dispatch.Choice:
        choice = choose(asked, arch, dtype, of, *shape)
        return replace(choice, kind=kind) if (asked, of) == (op, storage) else choice

    dispatch.choose = answer
    try:
        yield
    finally:
        dispatch.choose = choose


@contextmanager
def shipping(arch: int, own: dict[str, list[dict]]) -> Iterator[None]:
    """Dispatch reads `own` in place of the card's file."""
    rows, default = dispatch.rows, dispatch.tables(arch)[-1]
    dispatch.rows = lambda _: dispatch.ordered([own, default])
    dispatch.choose.cache_clear()
    try:
        yield
    finally:
        dispatch.rows = rows
        dispatch.choose.cache_clear()


def op_of(t: Tensors, what: str) -> Callable[[], list[Tensor]]:
    """The op over a linear's tensors: forward, or dx with the gradients of the update."""
    products = "" if t.dtype == "half" else t.dtype
    update = (t.lora_a, t.lora_b, t.parts, 1.0)
    if what == "product":
        split = t.outputs[0] if len(t.outputs) == 2 else 0
        given = (t.xs, t.weight, t.bias, *update, split, t.gate, t.residual, products)
        return lambda: linear_forward(*given)
    return lambda: linear_backward(t.dys, t.xs, t.weight, *update, True, None, products)[0]


class HandOverJob:
    """Both ways at rising M."""

    def __init__(
        self, pair: HandOver, spec: FluxSpec, rank: int, device: str, arch: int, rounds: int,
        measured: Callable[[], dict[str, list[dict]]], rows: tuple[int, ...] = HAND_OVER_ROWS,
    ):  # fmt: skip
        """measured: the card's rows as they would now be written."""
        self.pair, self.spec, self.rank, self.device, self.arch = pair, spec, rank, device, arch
        self.rounds, self.measured, self.rows = rounds, measured, rows
        self.share, self.default = pair.share, WAYS[0]
        self.trying = self.default

    @property
    def identity(self) -> dict[str, object]:
        return {"kind": "hand over", **self.pair.kernel._asdict(), "n": self.pair.N,
                "k": self.pair.K}  # fmt: skip

    def time(self, failed: set[str], precompile: Precompile, alive: Callable[[], bool]) -> Timed:
        """A row a way and M, but for ways that failed before."""
        del precompile
        with shipping(self.arch, self.measured()):
            return [pair for M in self.rows for pair in self._at(M, failed, alive)]

    def _at(self, M: int, failed: set[str], alive: Callable[[], bool]) -> Timed:
        kernel, pair = self.pair.kernel, self.pair
        t = tensors_of(pair, M, self.spec, self.rank, self.device)
        if kernel.storage == "dense" and kernel.dtype != "half":  # kept as codes
            t.weight = list(frozen.quantize_8bit(t.weight[0], kernel.dtype))
        run = op_of(t, pair.what)
        question = (kernel.op, self.arch, PRODUCT_DTYPE[kernel.dtype], kernel.storage)
        choice = dispatch.choose(*question, M, pair.N, pair.K)

        def way(kind: str) -> Callable[[], list[Tensor]]:
            def work() -> list[Tensor]:
                with answering(kernel.op, kernel.storage, kind):
                    return run()

            return work

        def gate(kind: str) -> str | None:
            if not alive():
                return STOPPED
            self.trying = f"{kind} at {M}"
            return disagreement(way(kind)(), truth)

        truth = [y.float() for y in way("decode")()]
        works = {k: replayed(way(k), self.device) for k in WAYS if f"{k} at {M}" not in failed}
        results = timing.compare(works, self.rounds, WARMUP, gate, choice.kind, self.device)
        for kind, result in results.items():
            result.name = f"{kind} at {M}"
        more = {"m": M, "linear": pair.linear, "what": pair.what, "source": choice.kind_source}
        return [
            (r, more | {"way": kind, "shipped": kind == choice.kind, "tile": None})
            for kind, r in results.items()
        ]


class BackendJob:
    """Attention forward and backward on each backend."""

    def __init__(self, T: int, heads: int, C: int, device: str, arch: int, rounds: int):
        self.T, self.heads, self.C, self.device, self.rounds = T, heads, C, device, rounds
        self.default, self.source = choose_backend(arch, HALF, C, T)
        self.share, self.trying = 1.0, self.default  # a few comparisons: before all else

    @property
    def identity(self) -> dict[str, object]:
        return {"kind": "attention", "dtype": "half", "m": self.T, "k": self.C}

    def time(self, failed: set[str], precompile: Precompile, alive: Callable[[], bool]) -> Timed:
        """A row a backend."""
        del precompile
        heads = Heads(self.T, self.heads, self.C, self.device)
        truth = sum(heads.truth(), [])

        def work(backend: str) -> list[Tensor]:
            o, lse = attention_forward(*heads.qkv, backend)
            return [o, lse, *attention_backward(heads.do, *heads.qkv, o, lse, backend)]

        def gate(backend: str) -> str | None:
            if not alive():
                return STOPPED
            self.trying = backend
            return disagreement(work(backend), truth)

        names = [name for name in dict.fromkeys((self.default, *BACKENDS)) if name not in failed]
        works = {name: replayed(lambda name=name: work(name), self.device) for name in names}
        results = timing.compare(works, self.rounds, WARMUP, gate, self.default, self.device)
        more = {"n": self.heads, "source": self.source, "tile": None}
        return [
            (r, more | {"way": name, "shipped": name == self.default})
            for name, r in results.items()
        ]
