"""What is timed is what the model asks for: the problems of a step, and one launch of each."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.ops import attention, qk_norm_rope
from fluxfast_kernels.quant.rows import quantize_rows
from tuning import LINEAR1, LINEAR2, PROJ, QKV, RANK, TINY, M, launchers  # noqa: F401  (a fixture)

from bench.tune.calls import Call, LinearTensors, build
from bench.tune.problems import Problem, hand_overs, problems
from bench.tune.space import KERNELS, Kernel, space
from bench.tune.ways import answering
from fluxfast.memory.planner.cards import card
from fluxfast.model.spec import DEV

pytestmark = pytest.mark.usefixtures("launchers")


def problem(name: str, linear: str = "", pass_name: str = "", rows: int = M) -> Problem:
    return Problem(Kernel(*name.split(".")), rows, 2, 32, linear, pass_name, 0.0)


# every launcher, with one and two inputs, outputs, parts, with and without gate and rows
LAUNCHES = [
    problem("lora_gemm.dense.half", LINEAR1, "product"),
    problem("lora_gemm.nf4.half", LINEAR2, "product"),
    problem("lora_gemm_dx.dense.half", LINEAR1, "dx"),
    problem("lora_gemm_dx.nf4.half", LINEAR2, "dx"),
    problem("gemm_8bit.dense.int8", LINEAR2, "product"),
    problem("gemm_8bit.dense.fp8", PROJ, "product"),
    problem("gemm_8bit.nf4.int8", PROJ, "product"),
    problem("gemm_8bit_dx.dense.int8", LINEAR2, "dx"),
    problem("gemm_8bit_dx.nf4.int8", QKV, "dx"),
    problem("gemm_8bit_dx_pair.dense.int8", LINEAR1, "dx"),
    problem("lora_skinny.dense.half", LINEAR2, "down"),
    problem("lora_skinny.dense.half", LINEAR1, "d_down"),
    problem("lora_skinny_8bit.dense.half", LINEAR2, "down"),
    problem("lora_skinny_8bit.dense.half", LINEAR1, "d_down"),
    problem("lora_grads.dense.half", LINEAR2, "dA"),
    problem("lora_grads.dense.half", LINEAR1, "dB"),
    *(problem(f"{name}.dense.half") for name in (*attention.KERNELS, "qk_norm_rope")),
]


def error(call: Call, kernel: Kernel, monkeypatch) -> str | None:
    """What is wrong with the first tile of the kernel's space, where no other may be asked for."""

    def asked(*question):
        raise AssertionError(f"a tile was asked for: {question}")

    reference = call.reference()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "choose", asked)
        patch.setattr(attention, "choose_tile", asked)
        patch.setattr(qk_norm_rope, "choose_tile", asked)
        return call.error(space(kernel, 89)[0], reference)


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    "asked", LAUNCHES, ids=lambda p: f"{p.kernel}-{p.linear[15:]}-{p.pass_name}"
)
def test_a_launch_takes_the_tile_and_agrees_with_its_reference(asked, monkeypatch):
    assert error(build(asked, TINY, RANK, "cpu"), asked.kernel, monkeypatch) is None


@pytest.mark.slow
def test_a_weight_is_transposed_where_dispatch_hands_over(monkeypatch):
    asked, seen = problem("gemm_8bit_dx.dense.int8", PROJ, "dx"), []
    eight_bit = build.__globals__["eight_bit"]
    launch = eight_bit.gemm_8bit_dx

    def recorded(rows, weight, *rest, **named):
        seen.append(weight.transposed)
        return launch(rows, weight, *rest, **named)

    monkeypatch.setattr(eight_bit, "gemm_8bit_dx", recorded)
    for kind in ("fused", "decode"):
        with answering("gemm_8bit_dx", "dense", kind):
            call = build(asked, TINY, RANK, "cpu")
        assert error(call, asked.kernel, monkeypatch) is None
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda y, truth: y.copy_(truth), None),
        (lambda y, truth: y.copy_(truth * 1.005), None),
        (lambda y, truth: y.copy_(truth * 1.01), "of its norm"),
        (lambda y, truth: y.copy_(truth)[0, 0].add_(0.3), "of its largest value"),
        (lambda y, truth: y[:-1].copy_(truth[:-1]), "errs by inf"),  # a row is left as it was
    ],
)
def test_wrong_results_are_refused(run, message):
    truth = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    y = truth.clone()
    found = Call(lambda tile: run(y, truth), [y], lambda: [truth]).error(None, [truth])
    assert found is None if message is None else message in found


# ---------------------------------------------------------------- problems


def test_the_problems_of_a_step():
    found = problems(DEV, card("RTX 4090"), 89, [(1024, 1)], 16)
    assert [p.share for p in found] == sorted((p.share for p in found), reverse=True)
    assert {p.kernel for p in found} <= set(KERNELS)
    first = found[0]
    assert str(first.kernel) == "lora_gemm.dense.half"
    assert (first.M, first.N, first.K) == (4608, 21504, 3072)
    by_kernel = {str(p.kernel): {q.M for q in found if q.kernel == p.kernel} for p in found}
    assert by_kernel["gemm_8bit.dense.int8"] == {512, 4096, 4608}
    assert by_kernel["lora_gemm.nf4.half"] == {16}  # modulation, computed ahead; more is decoded
    assert by_kernel["gemm_8bit_dx_pair.dense.int8"] == {4608}  # linear1's two outputs
    # a bf16 step's products and attention: more than nine tenths of it, where attention is torch's
    half = [p for p in found if p.kernel.dtype == "half" and "8bit" not in p.kernel.op]
    assert 0.6 < sum(p.share for p in half) < 1.0
    of_attention = [p for p in found if p.kernel.op in attention.KERNELS]
    assert len(of_attention) == 3 and all(p.share == 0.0 for p in of_attention)


def test_a_card_without_fp8_has_no_such_problems():
    found = problems(DEV, card("A100"), 80, [(512, 1)], 16)
    assert {p.kernel.dtype for p in found} == {"half", "int8"}


def test_hand_overs_follow_their_tiles():
    found = problems(DEV, card("RTX 4090"), 89, [(1024, 1)], 16)
    pairs = hand_overs(found)
    assert {p.kernel.storage for p in pairs} == {"dense", "nf4"}
    assert ("gemm_8bit", "dense", "int8") not in {p.kernel for p in pairs}  # has no second way

    def key(p: Problem) -> tuple:
        return p.kernel.op, p.kernel.dtype, p.N, p.K

    for pair in pairs:
        same = [p for p in found if key(p) == key(pair)]
        blocks = [p.share for p in same if "mod" not in p.linear or "mod" in pair.linear]
        assert pair.share == min(blocks)


@pytest.mark.slow
def test_dispatch_is_asked_what_the_problems_say(monkeypatch):
    """And no more, by four linears, forward and backward, as the model's blocks call them."""
    linears = (QKV, PROJ, LINEAR1, LINEAR2)
    found = problems(TINY, card("RTX 4090"), 89, [(64, 1)], RANK)
    asked, choose = set(), dispatch.choose

    def recorded(op, arch, dtype, storage, *shape):
        kind = "int8" if dtype == torch.int8 else "half"
        asked.add((Kernel(op, storage, kind), *shape))
        return replace(choose(op, arch, dtype, storage, *shape), kind="fused")

    monkeypatch.setattr(dispatch, "choose", recorded)
    for linear, matmul in product(linears, ("half", "int8")):
        of = problem(f"any.nf4.{matmul}", linear, rows=16 if "img" in linear else M)
        t = LinearTensors(of, TINY, RANK, "cpu")
        rows = [quantize_rows(x, matmul)[0] for x in t.xs] if t.matmul else [None]
        if linear in (PROJ, LINEAR2):
            rows[0] = None  # nobody quantized the attention's output
        linear_forward(t.xs, t.weight, t.update, t.epilogue, rows)
        gate = t.epilogue.gate if t.matmul else None
        linear_backward(t.dys, t.xs, t.weight, t.update, True, gate)
    expected = {(p.kernel, p.M, p.N, p.K): p for p in found if p.kernel.dtype != "fp8"}
    assert asked <= set(expected), asked - set(expected)
    assert {key for key, p in expected.items() if p.linear in linears} <= asked
