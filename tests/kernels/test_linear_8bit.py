"""Which of several ways an 8-bit product takes: our kernel over the weight as it is stored or from
a scratch, or torch's own fp8 product."""

import pytest
import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.gemm import linear_8bit
from fused_linears import BF16, FP16, IN_8_BITS, Case, Problem, check_against_truth
from numerics import assert_same_bits, skip_without_fp8


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
        return op == "gemm_8bit" and storage == "dense"

    monkeypatch.setattr(linear_8bit, "_as_stored", choose)
    scratched = problem.gradients()
    assert {"gemm_8bit", "gemm_8bit_dx" + "_pair" * bool(case.split)} <= set(asked)
    if case.matmul == "fp8":
        return check_against_truth(problem, scratched)
    assert_same_bits(scratched, expected)


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
    skip_without_fp8(case.matmul, device)
    problem, seen = Problem(case, device), []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **b: seen.append(0) or scaled_mm(*a, **b))
    monkeypatch.setattr(dispatch, "arch_of", lambda device: 90)
    by_torch = lambda op, arch, kind, *_: op == "gemm_8bit" and kind == "int8"  # noqa: E731
    monkeypatch.setattr(linear_8bit, "_as_stored", by_torch)
    forward_calls = []

    def call(leaves):
        ys = problem.call(leaves)
        forward_calls.append(len(seen))
        return ys

    results = problem.gradients(call)
    assert (forward_calls[0], len(seen) - forward_calls[0]) == calls
    check_against_truth(problem, results)
