"""8-bit matmuls of the fused linears: values that are not finite, zero, tiny or huge, outliers, odd
widths, and the ways that dispatch chooses between. (Their accuracy: test_fused_linears.py.)"""

from copy import copy

import pytest
import torch
from fluxfast_kernels import FrozenWeight, LoRAUpdate
from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.gemm import linear_8bit
from fluxfast_kernels.gemm.linear import linear_backward
from fluxfast_kernels.ops.gelu import gelu_lora_linear
from fluxfast_kernels.ops.lora_linear import lora_linear
from fluxfast_kernels.quant import frozen
from fused_linears import (
    BF16,
    FP16,
    IN_8_BITS,
    Case,
    K,
    N,
    Problem,
    T,
    check_against_truth,
    norm,
)
from numerics import (
    KINDS,
    assert_refused,
    assert_same_bits,
    randn,
    relative_error,
    skip_without_fp8,
)


def quantized(kind, device, *shape, **options):
    return [part.to(device) for part in frozen.quantize_8bit(randn(*shape, **options), kind)]


# ---------------------------------------------------------------- not finite

NOT_FINITE = [
    Case("linear", "int8", "int8", gate=True),
    Case("linear", "int8", "int8", rotation=64, parts=(), gate=True),
    Case("linear", "fp8", "nf4"),
    Case("linear", "int8", "nf4", rotation=32, parts=(0, 50, 0)),
    Case("norm", "int8", "int8", split=80),
    Case("norm", "fp8", "fp8", rotation=32, parts=()),
    Case("gelu", "int8", "int8", head=48, gate=True),
    Case("gelu", "fp8", "nf4", head=64, parts=()),
    Case("gelu", "int8", "int8", rotation=128, parts=(), saved_bits=8),
]
BAD = {1: torch.nan, 2: torch.inf, 3: -torch.inf}  # by token


@pytest.mark.grid(4)
@pytest.mark.parametrize("case", NOT_FINITE)
def test_nan_or_infinity_in_a_token_fills_its_result_and_no_other(path, device, case):
    skip_without_fp8(case.matmul, device)
    problem = Problem(case, device)
    with torch.no_grad():
        clean = torch.cat(problem.call(problem.leaves), -1)
        for name in problem.leaves.keys() & {"x", "h", "u", "head"}:
            x = problem.leaves[name].clone()
            for token, bad in BAD.items():
                x[1, token, 7 * token] = bad
            y = torch.cat(problem.call(problem.leaves | {name: x}), -1)
            assert y[1, 1:4].isnan().all(), name
            y[1, 1:4] = clean[1, 1:4]
            assert torch.equal(y, clean), name


@pytest.mark.grid(1)
@pytest.mark.parametrize("case", NOT_FINITE)
def test_nan_or_infinity_in_a_gradient_fills_its_tokens_dx_and_no_other(path, device, case):
    """In columns with an update and without one (50 to 64 and beyond)."""
    skip_without_fp8(case.matmul, device)
    problem = Problem(case, device)
    clean = problem.gradients()
    for columns in ((3, 40, 47), (52, 60, 63)):
        dy = torch.cat(problem.dys, -1)
        for (token, bad), column in zip(BAD.items(), columns, strict=True):
            dy[1, token, column] = bad
        wrong = copy(problem)
        wrong.dys = problem.cut(dy)
        results = wrong.gradients()
        for name in problem.leaves.keys() & {"x", "h", "u", "head"}:
            dx = results[name].clone()
            assert dx[1, 1:4].isnan().all(), name
            dx[1, 1:4] = clean[name][1, 1:4]
            assert torch.equal(dx, clean[name]), name


@pytest.mark.grid(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weights_row_that_is_not_finite_fills_its_column(path, device, kind):
    skip_without_fp8(kind, device)
    x, W = randn(2, T, K, device=device), randn(20, K, seed=1, device=device)
    clean = lora_linear(x, FrozenWeight([W], matmul=kind))
    W[5, 9], W[19, 0] = torch.nan, torch.inf
    for weight in ([W], list(frozen.quantize_8bit(W, kind))):
        y = lora_linear(x, FrozenWeight(weight, matmul=kind))
        assert y[..., [5, 19]].isnan().all()
        y[..., [5, 19]] = clean[..., [5, 19]]
        assert torch.equal(y, clean)


# ---------------------------------------------------------------- zero, tiny and huge


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_give_exactly_the_bias(path, device, kind):
    skip_without_fp8(kind, device)
    for case in (
        Case("linear", kind, "nf4"),
        Case("linear", kind, "nf4", bias=False, rotation=64),
        Case("gelu", kind, "nf4", head=64),
        Case("norm", kind, kind, bias=False, parts=()),
    ):
        problem = Problem(case, device)
        for name, leaf in problem.leaves.items():
            if name in ("x", "u", "head"):
                leaf[0, 2:4] = 0.0
            if name in ("shift", "scale"):  # norm has no row of zeros: LayerNorm(h) · 0 + 0
                leaf[0] = -1.0 if name == "scale" else 0.0
        for dy in problem.dys:
            dy[1, 1] = 0.0
        results = problem.gradients()
        bias = torch.zeros(N, device=device) if problem.bias is None else problem.bias
        assert torch.equal(results["y0"][0, 2:4], bias.expand(2, N))
        for name in results.keys() & {"x", "h", "u", "head"}:
            assert not results[name][1, 1].any(), name


@pytest.mark.grid(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_times_a_power_of_two_gives_its_result_times_that(path, device, kind):
    """Bit for bit, for values from 2^-90 (a gradient: 2^-76) to 8e37 (rotated: 1e36, since the
    sums that a rotation forms are up to its width times as large)."""
    skip_without_fp8(kind, device)
    x, dy = randn(1, 4, K, device=device), randn(1, 4, N, seed=2, device=device)
    x, dy = (v / v.abs().amax(-1, keepdim=True) for v in (x, dy))
    weight = quantized(kind, device, N, K, std=K**-0.5)
    factor = torch.tensor([2.0**126, 2.0**100, 2.0**-60, 2.0**-90], device=device)[:, None]
    for rotation in (0, 32):
        frozen_weight = FrozenWeight(weight, None, kind, rotation)
        plain, scaled = (lora_linear(v, frozen_weight) for v in (x, x * factor))
        assert scaled.isfinite().all() and torch.equal(scaled, plain * factor)
        factor[0] = 2.0**120
    factor[3] = 2.0**-76
    given = ([x], FrozenWeight(weight, matmul=kind), None, True)
    plain, scaled = (linear_backward([v], *given)[0][0] for v in (dy, dy * factor))
    assert scaled.isfinite().all() and torch.equal(scaled, plain * factor)


# ---------------------------------------------------------------- odd widths, no rows


@pytest.mark.grid(5)
@pytest.mark.parametrize(("inner", "outer"), [(1, 5), (5, 1), (67, 33)])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_widths(path, device, kind, inner, outer):
    """Both products, the update and the weight in 8 bits; K = 1 is where torch's own product of
    int8 reads beyond its operand."""
    skip_without_fp8(kind, device)
    x, W = randn(2, 3, inner, device=device), randn(outer, inner, seed=1, device=device)
    a, b = randn(2, inner, seed=2, device=device), randn(outer, 2, seed=3, device=device)
    x, a, b = (leaf.requires_grad_() for leaf in (x, a, b))
    update = LoRAUpdate(a, b, [0, outer, 0])
    y = lora_linear(x, FrozenWeight([W], matmul=kind), update)
    dy = randn(2, 3, outer, seed=4, device=device)
    results = [y.detach(), *torch.autograd.grad(y, (x, a, b), dy)]
    y = x.double() @ (W.double() + b.double() @ a.double()).T
    expected = [y, *torch.autograd.grad(y, (x, a, b), dy.double())]
    for each, truth in zip(results, expected, strict=True):
        assert relative_error(each, truth) < (0.02 if kind == "int8" else 0.06)


@pytest.mark.parametrize("matmul", ["", "int8"])
def test_no_rows(path, device, matmul):
    x = torch.zeros(2, 0, K, device=device).requires_grad_()
    a, b = (randn(*s, device=device).requires_grad_() for s in ((4, K), (N, 4)))
    weight = quantized("int8", device, N, K) if matmul else [randn(N, K, device=device)]
    for rotation in (0, 32) if matmul else (0,):
        update = LoRAUpdate(a, b, [0, N, 0])
        y = lora_linear(x, FrozenWeight(weight, None, matmul, rotation), update)
        assert y.shape == (2, 0, N)
        dx, da, db = torch.autograd.grad(y.sum(), (x, a, b))
        assert dx.shape == x.shape and not da.any() and not db.any()


def test_a_matrix_of_tokens_with_a_gate(path, device):
    """x [M, K]: as one sample of M tokens."""
    x = randn(5, K, device=device)
    weight = quantized("int8", device, N, K, seed=1)
    gate, residual = randn(1, N, seed=2, device=device), randn(5, N, seed=3, device=device)
    results = []
    for leaf in (x, x[None]):
        leaf = leaf.clone().requires_grad_()
        gated = gate.view(leaf.shape[:-2] + (1, N)), residual.view(leaf.shape[:-1] + (N,))
        y = lora_linear(leaf, FrozenWeight(weight, matmul="int8"), None, *gated)
        results.append((y.detach(), torch.autograd.grad(y, leaf, y.detach())[0]))
    flat, batched = results
    assert_same_bits(flat, [x[0] for x in batched])


# ---------------------------------------------------------------- outliers


@pytest.mark.parametrize("outliers", [False, True])
def test_a_rotation_takes_the_outliers_error_away(outliers):
    """int8 against fp64 over 3072 columns, as FLUX has; with 8 channels 40 times as large or none.
    In plain torch: the launchers give the same values."""
    x, W = randn(128, 3072), randn(256, 3072, seed=1)
    if outliers:
        x[:, torch.randperm(3072, generator=torch.Generator().manual_seed(2))[:8]] *= 40
    truth, error = x.double() @ W.double().T, {}
    with backend.cpu_launches(False):
        for rotation in (0, 256):
            weight = list(frozen.quantize_8bit(W, "int8", rotation))
            y = lora_linear(x, FrozenWeight(weight, None, "int8", rotation))
            error[rotation] = relative_error(y, truth)
    if outliers:
        assert error[0] > 0.04 and error[256] < 0.02, error
    else:
        assert error[0] < 0.018 and error[256] < 0.018, error


# ---------------------------------------------------------------- ways


@pytest.mark.grid(1)
@pytest.mark.parametrize("case", IN_8_BITS)
def test_what_dispatch_chooses_changes_nothing(monkeypatch, device, case):
    """NF4 in the product's own tiles or through the scratch, the weight as stored or transposed:
    the same integers, so the same bits; e4m3's sums alone may run in another order."""
    skip_without_fp8(case.matmul, device)
    problem = Problem(case, device)
    expected = problem.gradients()
    asked = []

    def choose(op, arch, kind, storage, M, N, K):
        asked.append(op)
        return "dx" not in op and storage == "dense"

    monkeypatch.setattr(linear_8bit, "_as_stored", choose)
    scratched = problem.gradients()
    pairs = "_pair" * bool(case.head), "_pair" * bool(case.split)
    assert {"gemm_8bit" + pairs[0], "gemm_8bit_dx" + pairs[1]} <= set(asked)
    if case.matmul == "fp8":
        return check_against_truth(problem, scratched)
    assert_same_bits(scratched, expected)


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
    skip_without_fp8(case.matmul, device)
    problem, seen = Problem(case, device), []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **b: seen.append(0) or scaled_mm(*a, **b))
    monkeypatch.setattr(dispatch, "arch_of", lambda device: 90)
    by_torch = lambda op, arch, kind, *_: "dx" not in op and kind == "int8"  # noqa: E731
    monkeypatch.setattr(linear_8bit, "_as_stored", by_torch)
    forward_calls = []

    def call(leaves):
        ys = problem.call(leaves)
        forward_calls.append(len(seen))
        return ys

    results = problem.gradients(call)
    assert (forward_calls[0], len(seen) - forward_calls[0]) == calls
    check_against_truth(problem, results)


# ---------------------------------------------------------------- refusals


def test_a_launch_refuses_a_dense_weight_of_other_strides(device):
    """Which its kernel would read as if they were not there."""
    W = randn(40, 96, device=device).T.contiguous().T
    with pytest.raises(ValueError, match="^weight must be of last stride 1"):
        lora_linear(randn(2, 3, 96, device=device), FrozenWeight([W], matmul="int8"))


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 120])
def test_fp8_is_refused_before_sm_89(monkeypatch, arch):
    x, W, ones = randn(2, 3, 96), randn(40, 96, seed=1), torch.ones(2, 1, 96)
    fp8 = FrozenWeight([W], matmul="fp8")
    monkeypatch.setattr(dispatch, "arch_of", lambda device: arch)
    with backend.cpu_launches(False):
        for call in (
            lambda: lora_linear(x, fp8),
            lambda: gelu_lora_linear(x, fp8),
            lambda: norm.norm_modulate_lora_linear(x, ones, ones, fp8),
        ):
            if arch >= 89:
                assert call().isfinite().all()
            else:
                assert_refused({"matmul": [call]}, f"^{{}} must be .* sm_{arch}")
        assert lora_linear(x, FrozenWeight([W], matmul="int8")).isfinite().all()
