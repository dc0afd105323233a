"""The three fused linears in 8-bit products: results and every gradient against fp64, by the
launchers and in plain torch."""

import pytest
import torch
from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.gemm import linear_8bit
from fluxfast_kernels.ops.gelu import (
    _gelu_lora_linear,
    _gelu_lora_linear_backward,
    gelu_lora_linear_reference,
    gelu_rows,
)
from fluxfast_kernels.ops.lora_linear import _lora_linear, _lora_linear_backward, flatten
from linears_8bit import Case, Drawn, norm
from numerics import assert_as_exact, bits, relative_error, skip_without_fp8


def case(op, **options):
    name = " ".join([op, *(str(v) for v in options.values())]).replace("torch.", "")
    return pytest.param(Case(op, **options), id=name)


BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    case("linear"),
    case("linear", storage="int8", gate=True, rotation=64),
    case("linear", storage="nf4", gate=True, dtype=BF16),
    case("linear", storage="nested", rotation=32, dtype=FP16, parts=(0, 144, 0)),
    case("linear", kind="fp8", storage="fp8", parts=(), gate=True),
    case("linear", kind="fp8", storage="nf4", rotation=128, dtype=BF16, parts=(0, 70, 0)),
    case("linear", storage="int8", parts=(), bias=False, dtype=FP16, rotation=16),
    case("norm", storage="int8", split=80),
    case("norm", storage="int8", split=48, dtype=BF16, rotation=128),
    case("norm", storage="nested", dtype=FP16, parts=(0, 72, 0, 72, 144, 0)),
    case("norm", kind="fp8", storage="fp8", rotation=16, dtype=BF16, parts=()),
    case("norm", storage="nf4", rotation=64, parts=(), split=16),
    case("gelu", storage="int8", gate=True, head=48),
    case("gelu", storage="int8", head=64, gate=True, dtype=BF16, rotation=64),
    case("gelu", storage="nf4", dtype=FP16, rotation=32, parts=()),
    case("gelu", storage="nested", head=64, parts=(), gate=True, rotation=64),
    case("gelu", kind="fp8", storage="fp8", head=64, dtype=BF16, rotation=32),
]


def check_against_truth(drawn: Drawn, found: dict) -> None:
    """At most twice the error of the same reference run in the dtype, whose sums are fp64
    and whose roundings are more (each of bias, update, gate and residual rounds).

    In fp32 with a rotation four times: dx is rotated back in fp32, which rounds once a stage, seven
    times for 64 columns; the reference's in fp64. e4m3 on a GPU, judged in 16 bits alone, four
    times: tensor cores keep 13 bits of a sum and cut it 128 / 32 times, 4 · 2^-13 of its largest
    beside 2^-9 of one rounding in bf16 and 2^-12 in fp16."""
    case = drawn.case
    times = 4.0 if case.rotation and case.dtype == torch.float32 else 2.0
    times = 4.0 if case.kind == "fp8" and drawn.device == "cuda" else times
    with backend.cpu_launches(False):
        truth = drawn.gradients(drawn.reference, torch.float64)
        eager = drawn.gradients(drawn.reference, case.dtype)
    for name, value in found.items():
        # A's and B's gradients come in fp32 from products of the dtype: judged as that
        assert_as_exact(name, value.to(case.dtype), eager[name], truth[name], times)


@pytest.mark.grid(2)
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_eager(path, device, case):
    skip_without_fp8(case.kind, device)
    if device == "cuda" and case.kind == "fp8" and case.dtype == torch.float32:
        pytest.skip("tensor cores sum e4m3 below fp32's precision: judged in bf16")
    drawn = Drawn(case, device)
    check_against_truth(drawn, drawn.gradients(drawn.call))


@pytest.mark.grid(1)
@pytest.mark.parametrize("case", CASES)
def test_what_dispatch_chooses_changes_nothing(monkeypatch, device, case):
    """NF4 in the product's own tiles or through the scratch, the weight as stored or transposed:
    the same integers, so the same bits; e4m3's sums alone may run in another order."""
    skip_without_fp8(case.kind, device)
    drawn = Drawn(case, device)
    kept = drawn.gradients(drawn.call)
    asked = []

    def choose(op, arch, kind, storage, M, N, K):
        asked.append(op)
        return op == "gemm_8bit" and storage == "dense"

    monkeypatch.setattr(linear_8bit, "_as_stored", choose)
    scratched = drawn.gradients(drawn.call)
    assert {"gemm_8bit", "gemm_8bit_dx" + "_pair" * bool(case.split)} <= set(asked)
    if case.kind == "fp8":
        return check_against_truth(drawn, scratched)
    for name, value in scratched.items():
        assert torch.equal(bits(value), bits(kept[name])), name


@pytest.mark.grid(3)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_gelus_own_reference(path, device, kind):
    """It forms gelu(u) itself: in bf16 nearly every 8-bit value is the kernel's."""
    skip_without_fp8(kind, device)
    drawn = Drawn(Case("gelu", kind, kind, dtype=BF16, head=64, gate=True), device)

    def reference(leaves):
        dtype = leaves["u"].dtype
        linear = drawn.frozen(drawn.bias.to(dtype)), drawn.update(leaves)
        gated = (leaves["head"], drawn.gate.to(dtype), leaves["residual"])
        return (gelu_lora_linear_reference(leaves["u"], *linear, *gated),)

    found = drawn.gradients(drawn.call)
    with backend.cpu_launches(False):
        truth, eager = (drawn.gradients(reference, dtype) for dtype in (torch.float64, BF16))
    for name, value in found.items():
        assert_as_exact(name, value.to(BF16), eager[name], truth[name])


def test_u_saved_in_8_bits_beside_8_bit_products(path, device):
    """The result is that of u; the gradients are those of the dequantized u."""
    options = {"storage": "int8", "dtype": BF16, "head": 64, "gate": True}
    drawn = Drawn(Case("gelu", **options, saved_bits=8), device)
    exact = Drawn(Case("gelu", **options), device)
    found, expected = drawn.gradients(drawn.call), exact.gradients(exact.call)
    assert torch.equal(found["y0"], expected["y0"])
    assert torch.equal(found["head"], expected["head"])  # dx does not read u
    for name in ("u", "lora_a", "lora_b"):  # measured: 0.6, 0.3, 0.3 %
        assert 0 < relative_error(found[name], expected[name]) < 0.01, name


OPS = {
    "linear": Case("linear", gate=True, storage="nf4"),
    "norm": Case("norm", split=80, storage="int8", rotation=32),
    "gelu": Case("gelu", head=64, gate=True, storage="int8"),
}


@pytest.mark.grid(1)
@pytest.mark.parametrize("op", OPS)
def test_another_run_and_one_under_autocast_give_the_same_bits(path, device, op):
    drawn = Drawn(OPS[op], device)
    first, second = (drawn.gradients(drawn.call) for _ in range(2))
    with torch.autocast(device, BF16):
        third = drawn.gradients(drawn.call)
    for name, value in first.items():
        assert second[name].dtype == third[name].dtype == value.dtype
        assert torch.equal(bits(second[name]), bits(value)), name
        assert torch.equal(bits(third[name]), bits(value)), name


def test_compiles_as_one_graph(device):
    drawn = [Drawn(case, device) for case in OPS.values()]

    def every(leaves):
        return tuple(y for d, given in zip(drawn, leaves, strict=True) for y in d.call(given))

    def run(function):
        leaves = [{n: v.detach().requires_grad_() for n, v in d.leaves.items()} for d in drawn]
        ys = function(leaves)
        dys = [dy for d in drawn for dy in d.dys]
        flat = [leaf for each in leaves for leaf in each.values()]
        return [*ys, *torch.autograd.grad(ys, flat, dys)]

    with backend.cpu_launches(False):  # what an op does inside is not the graph's
        found = run(torch.compile(every, fullgraph=True, backend="aot_eager"))
        assert all(torch.equal(a, b) for a, b in zip(found, run(every), strict=True))


@pytest.mark.grid(2)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    """Schemas, fake tensors and autograd of the ops and their backward ops, in plain torch."""
    with backend.cpu_launches(False):
        drawn = Drawn(OPS[op], "cpu")
        leaves = {n: v.detach().requires_grad_() for n, v in drawn.leaves.items()}
        linear = flatten(drawn.frozen(drawn.bias), drawn.update(leaves))
        plain = flatten(drawn.frozen(None), drawn.update(drawn.leaves))
        if op == "linear":
            gated = (drawn.gate, leaves["residual"])
            forward = _lora_linear, (leaves["x"], *linear, *gated)
            given = (drawn.dys[0], leaves["x"].detach(), *plain, drawn.gate, True)
            backward = _lora_linear_backward, given
        elif op == "norm":
            first = (leaves["h"], leaves["shift"], leaves["scale"])
            forward = norm._norm_modulate_lora_linear, (*first, *linear, drawn.case.split)
            first = [v.detach() for v in first]
            _, mean, rstd, _ = norm.norm_modulate_forward(*first)
            given = (drawn.dys, *first, mean, rstd, *plain, True, True)
            backward = norm._norm_modulate_lora_linear_backward, given
        else:
            u, head = leaves["u"], leaves["head"]
            gated = (head, drawn.gate, leaves["residual"], 8)
            forward = _gelu_lora_linear, (u, *linear, *gated)
            _, u8, row_scale, _ = gelu_rows(u.detach(), 8)
            given = (u8, row_scale, *plain, head.detach(), drawn.gate, True)
            backward = _gelu_lora_linear_backward, (drawn.dys[0], *given)
        for operator, arguments in (forward, backward):
            torch.library.opcheck(operator, arguments)


# ---------------------------------------------------------------- torch's fp8 product


def scaled_mm(a, b, scale_a, scale_b, bias=None, out_dtype=None, use_fast_accum=None):
    """`torch._scaled_mm` with a scale a row and a column, as its documentation and checks have it
    (aten/src/ATen/native/cuda/Blas.cpp): layouts, multiples of 16, bf16 results."""
    (M, contraction), N = a.shape, b.shape[1]
    assert a.dtype == b.dtype == torch.float8_e4m3fn and b.shape[0] == contraction
    assert a.stride(1) == 1 and b.stride(0) == 1, "row-major times column-major"
    assert contraction % 16 == 0 and N % 16 == 0 and b.stride(1) % 16 == 0
    assert scale_a.shape == (M, 1) and scale_b.shape == (1, N)
    assert all(s.dtype == torch.float32 and s.is_contiguous() for s in (scale_a, scale_b))
    assert out_dtype == torch.bfloat16 and use_fast_accum is False
    assert bias is None or bias.dtype == torch.bfloat16 and bias.shape == (N,)
    if a.is_cuda:
        return torch_scaled_mm(a, b, scale_a, scale_b, bias, None, out_dtype)
    y = (a.float() @ b.float()) * scale_a * scale_b
    return (y if bias is None else y + bias.float()).to(out_dtype)


torch_scaled_mm = torch._scaled_mm


@pytest.mark.grid(2)
@pytest.mark.parametrize(
    ("case", "calls"),
    [
        (Case("linear", "fp8", "fp8", dtype=BF16), (1, 1)),
        (Case("linear", "fp8", "nf4", dtype=BF16, gate=True, rotation=64), (1, 1)),
        (Case("norm", "fp8", "fp8", dtype=BF16, split=80, rotation=16), (2, 2)),
        (Case("gelu", "fp8", "fp8", dtype=BF16, head=64, gate=True), (2, 1)),
        # a piece that is no multiple of 16, a dtype that it cannot write: our own kernel
        (Case("norm", "fp8", "fp8", dtype=BF16, split=72), (0, 0)),
        (Case("gelu", "fp8", "fp8", dtype=BF16, head=40), (0, 1)),
        (Case("linear", "fp8", "fp8", dtype=FP16), (0, 0)),
        (Case("linear", "int8", "int8", dtype=BF16), (0, 0)),
    ],
)
def test_torchs_fp8_product_takes_its_place(monkeypatch, device, case, calls):
    """On sm_90 above the thresholds: forward a call a piece of x and of y, towards x one a piece of
    dy. (fp8 there is bf16 alone; each call rounds, where our kernel rounds once: still twice.)"""
    skip_without_fp8(case.kind, device)
    drawn, seen = Drawn(case, device), []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **b: seen.append(0) or scaled_mm(*a, **b))
    monkeypatch.setattr(dispatch, "arch_of", lambda device: 90)
    by_torch = lambda op, arch, kind, *_: op == "gemm_8bit" and kind == "int8"  # noqa: E731
    monkeypatch.setattr(linear_8bit, "_as_stored", by_torch)
    leaves = {n: v.detach().requires_grad_() for n, v in drawn.leaves.items()}
    ys = drawn.call(leaves)
    forward = len(seen)
    found = torch.autograd.grad(ys, list(leaves.values()), drawn.dys)
    assert (forward, len(seen) - forward) == calls
    outputs = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    check_against_truth(drawn, outputs | dict(zip(leaves, found, strict=True)))
