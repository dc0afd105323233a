"""What is timed is what the model asks for: the problems of a step, and one launch of each."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.ops import attention, qk_norm_rope
from fluxfast_kernels.quant import rows as rows_8bit
from tuning import LINEAR1, LINEAR2, PROJ, QKV, RANK, TINY, M

from bench.tune.calls import Call, Tensors, build
from bench.tune.problems import Problem, hand_overs, problems
from bench.tune.space import KERNELS, Kernel, space
from bench.tune.ways import answering
from fluxfast.memory.planner.cards import card
from fluxfast.model.spec import DEV


def problem(name: str, linear: str = "", what: str = "") -> Problem:
    return Problem(Kernel(*name.split(".")), M, 2, 32, linear, what, 0.0)


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


@pytest.fixture
def launchers():
    with backend.cpu_launches(True):
        yield


def wrong(call: Call, kernel: Kernel, monkeypatch) -> str | None:
    """Of the first tile of the kernel's space, where nothing else may be asked for a tile."""

    def asked(*question):
        raise AssertionError(f"a tile was asked for: {question}")

    reference = call.reference()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "choose", asked)
        patch.setattr(attention, "choose_tile", asked)
        patch.setattr(qk_norm_rope, "choose_tile", asked)
        return call.wrong(space(kernel, 89)[0], reference)


@pytest.mark.grid(1)
@pytest.mark.parametrize("asked", LAUNCHES, ids=lambda p: f"{p.kernel}-{p.linear[15:]}-{p.what}")
def test_a_launch_takes_the_tile_and_gives_what_it_must(asked, launchers, monkeypatch):
    assert wrong(build(asked, TINY, RANK, "cpu"), asked.kernel, monkeypatch) is None


def test_a_weight_is_transposed_where_dispatch_hands_over(launchers, monkeypatch):
    asked, seen = problem("gemm_8bit_dx.dense.int8", PROJ, "dx"), []
    launch = build.__globals__["gemm_8bit"].gemm_8bit_dx

    def seen_launch(rows, weight, *rest, **named):
        seen.append(weight.transposed)
        return launch(rows, weight, *rest, **named)

    monkeypatch.setattr(build.__globals__["gemm_8bit"], "gemm_8bit_dx", seen_launch)
    for kind in ("fused", "decode"):
        with answering("gemm_8bit_dx", "dense", kind):
            call = build(asked, TINY, RANK, "cpu")
        assert wrong(call, asked.kernel, monkeypatch) is None
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda y, truth: y.copy_(truth), None),
        (lambda y, truth: y.copy_(truth * 1.005), None),
        (lambda y, truth: y.copy_(truth * 1.01), "of its norm"),
        (lambda y, truth: y.copy_(truth)[0, 0].add_(0.3), "a value of result 0"),
        (lambda y, truth: y[:-1].copy_(truth[:-1]), "not finite"),  # a row is left as it was
    ],
)
def test_wrong_results_are_refused(run, said):
    truth = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    y = truth.clone()
    found = Call(lambda tile: run(y, truth), [y], lambda: [truth]).wrong(None, [truth])
    assert found is None if said is None else said in found


# ---------------------------------------------------------------- problems


def test_the_problems_of_a_step():
    found = problems(DEV, card("RTX 4090"), 89, [(1024, 1)], 16)
    assert [p.share for p in found] == sorted((p.share for p in found), reverse=True)
    assert {p.kernel for p in found} <= set(KERNELS)
    first = found[0]
    assert (str(first.kernel), first.M, first.N, first.K) == (
        "lora_gemm.dense.half",
        4608,
        21504,
        3072,
    )
    by_kernel = {str(p.kernel): {q.M for q in found if q.kernel == p.kernel} for p in found}
    assert by_kernel["gemm_8bit.dense.int8"] == {512, 4096, 4608}
    assert by_kernel["lora_gemm.nf4.half"] == {16}  # modulation, formed ahead; more is decoded
    assert by_kernel["gemm_8bit_dx_pair.dense.int8"] == {4608}  # linear1's two outputs
    # a bf16 step's products and attention: more than nine tenths of it, where attention is torch's
    half = [p for p in found if p.kernel.dtype == "half" and "8bit" not in p.kernel.op]
    assert 0.6 < sum(p.share for p in half) < 1.0
    assert all(p.share == 0.0 for p in found if p.kernel.op in attention.KERNELS)


def test_a_card_without_fp8_has_no_such_problems():
    found = problems(DEV, card("A100"), 80, [(512, 1)], 16)
    assert {p.kernel.dtype for p in found} == {"half", "int8"}


def test_hand_overs_follow_their_tiles():
    found = problems(DEV, card("RTX 4090"), 89, [(1024, 1)], 16)
    pairs = hand_overs(found)
    assert {p.kernel.storage for p in pairs} == {"dense", "nf4"}
    assert ("gemm_8bit", "dense", "int8") not in {p.kernel for p in pairs}  # has no second way
    for pair in pairs:
        same = [
            p.share
            for p in found
            if (p.kernel.op, p.kernel.dtype, p.N, p.K)
            == (pair.kernel.op, pair.kernel.dtype, pair.N, pair.K)
            and ("mod" not in p.linear or "mod" in pair.linear)
        ]
        assert pair.share == min(same)


@pytest.mark.slow
def test_dispatch_is_asked_what_the_problems_say(launchers, monkeypatch):
    """And no more, by four linears, forward and backward, as the model's blocks call them."""
    linears = (QKV, PROJ, LINEAR1, LINEAR2)
    found = problems(TINY, card("RTX 4090"), 89, [(64, 1)], RANK)
    asked, choose = set(), dispatch.choose

    def recorded(op, arch, dtype, storage, *shape):
        kind = "int8" if dtype == torch.int8 else "half"
        asked.add((Kernel(op, storage, kind), *shape))
        return replace(choose(op, arch, dtype, storage, *shape), kind="fused")

    monkeypatch.setattr(dispatch, "choose", recorded)
    for linear, products in product(linears, ("", "int8")):
        rows = 16 if "img" in linear else M
        t = Tensors(linear, rows, "nf4", products or "half", TINY, RANK, "cpu")
        made = [rows_8bit.quantize_rows(x, products)[0] for x in t.xs] if products else [None]
        if linear in (PROJ, LINEAR2):
            made[0] = None  # nobody quantized the attention's output
        gate = t.gate if products else None
        linear_forward(t.xs, t.frozen_weight, t.update, t.epilogue, made)
        linear_backward(t.dys, t.xs, t.frozen_weight, t.update, True, gate)
    told = {(p.kernel, p.M, p.N, p.K): p for p in found if p.kernel.dtype != "fp8"}
    assert asked <= set(told), asked - set(told)
    assert {key for key, p in told.items() if p.linear in linears} <= asked
