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

from bench.timing import Result
from bench.tune.calls import HALF, Heads, LinearTensors, disagreement
from bench.tune.problems import MATMUL_DTYPE, Problem
from bench.tune.sweep import Job, Target
from bench.tune.write import Table

WAYS = ("fused", "decode")
BACKENDS = ("flash", "cudnn", "triton")
# M of a hand-over; the last ones are images of 512, 768 and 1024 px
HAND_OVER_ROWS = (16, 32, 64, 128, 256, 512, 1024, 1536, 2816, 4608)


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
def shipping(arch: int, own: Table) -> Iterator[None]:
    """Dispatch reads `own` in place of the card's file."""
    rows = dispatch.ordered([own, dispatch.tables(arch)[-1]])
    dispatch.choose.cache_clear()
    try:
        with patch.object(dispatch, "rows", lambda _: rows):
            yield
    finally:
        dispatch.choose.cache_clear()


def op_of(t: LinearTensors, pass_name: str) -> list[Tensor]:
    """The op over a linear's tensors: forward, or dx with the gradients of the update."""
    if pass_name == "product":
        return linear_forward(t.xs, t.weight, t.update, t.epilogue)
    return linear_backward(t.dys, t.xs, t.weight, t.update, True)[0]


class HandOverJob(Job):
    """Both ways at rising M. measured(): the card's rows as they would now be written."""

    def __init__(self, pair: Problem, target: Target, measured: Callable[[], Table]):
        identity = {"kind": "hand over", **pair.kernel._asdict(), "n": pair.N, "k": pair.K}
        super().__init__(identity, pair.share, WAYS[0], target)
        self.pair, self.measured = pair, measured

    def time(self, failed: set[str]) -> list[Result]:
        """A result for each way and M."""
        with shipping(self.target.arch, self.measured()):
            return [result for M in HAND_OVER_ROWS for result in self.at(M, failed)]

    def at(self, M: int, failed: set[str]) -> list[Result]:
        """A result for each way at M rows."""
        (kernel, pair), target = (self.pair.kernel, self.pair), self.target
        t = LinearTensors(replace(pair, M=M), target.spec, target.rank, target.device)
        if kernel.storage == "dense" and t.matmul:  # stored in 8 bits
            tensors = frozen.quantize_8bit(t.weight.tensors[0], t.matmul)
            t.weight = t.weight._replace(tensors=list(tensors))
        question = (kernel.op, target.arch, MATMUL_DTYPE[kernel.dtype], kernel.storage)
        choice = dispatch.choose(*question, M, pair.N, pair.K)

        def run(kind: str) -> list[Tensor]:
            with answering(kernel.op, kernel.storage, kind):
                return op_of(t, pair.pass_name)

        truth = [y.float() for y in run("decode")]
        runs = {f"{kind} at {M}": partial(run, kind) for kind in WAYS}
        runs = {name: work for name, work in runs.items() if name not in failed}
        shipped = f"{choice.kind} at {M}"
        results = self.compare(
            runs, lambda name: disagreement(runs[name](), truth), target.rounds, shipped
        )
        asked = {"m": M, "linear": pair.linear, "what": pair.pass_name, "tile": None}
        fields = asked | {"source": choice.kind_source}
        for name, result in results.items():
            result.details = fields | {"way": name.split()[0], "shipped": name == shipped}
        return list(results.values())


class BackendJob(Job):
    """Attention forward and backward on each backend, at T tokens."""

    def __init__(self, T: int, target: Target):
        self.T, self.C = T, target.spec.head_dim
        default, self.source = choose_backend(target.arch, HALF, self.C, T)
        identity = {"kind": "attention", "dtype": "half", "m": T, "k": self.C}
        super().__init__(identity, 1.0, default, target)  # a few comparisons: before all else

    def time(self, failed: set[str]) -> list[Result]:
        """A result for each backend."""
        heads = self.target.spec.num_heads
        tensors = Heads(self.T, heads, self.C, self.target.device)
        truth = tensors.reference()

        def run(backend: str) -> list[Tensor]:
            o, lse = attention_forward(*tensors.qkv, backend)
            return [o, lse, *attention_backward(tensors.do, *tensors.qkv, o, lse, backend)]

        names = [name for name in dict.fromkeys((self.default, *BACKENDS)) if name not in failed]
        runs = {name: partial(run, name) for name in names}
        results = self.compare(
            runs, lambda name: disagreement(run(name), truth), self.target.rounds, self.default
        )
        fields = {"n": heads, "source": self.source, "tile": None}
        for name, result in results.items():
            result.details = fields | {"way": name, "shipped": name == self.default}
        return list(results.values())
