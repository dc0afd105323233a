"""GELU-tanh: the element-wise kernels and u in 8 bits (test_fused_linears.py has the op)."""

import pytest
import torch
import torch.nn.functional as F
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.ops import gelu
from numerics import (
    assert_all_as_exact,
    assert_as_exact,
    assert_same_bits,
    poisoned,
    randn,
    relative_error,
)

B, T, WIDTH = 2, 5, 1100  # two blocks, the second one partly filled


def strided(b, t, c, **options):
    """[b, t, c] as tokens 1..t of a longer sequence, in wider rows."""
    return randn(b, t + 3, c + 8, **options)[:, 1 : 1 + t, :c]


def gelu_and_gradient(u, dx):
    u = u.detach().to(dx.dtype).requires_grad_()
    x = F.gelu(u, approximate="tanh")
    return x.detach(), torch.autograd.grad(x, u, dx)[0]


@pytest.mark.parametrize("saved_bits", [16, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_kernels(device, dtype, saved_bits):
    """What is recomputed from 8 bits is as exact as eager on the dequantized u."""
    u = strided(B, T, WIDTH, device=device, dtype=dtype, std=3, mean=-1)
    dx = strided(B, T, WIDTH, device=device, dtype=dtype, seed=1)
    stored, row_scale, exact = u, None, u
    if saved_bits == 8:
        _, stored, row_scale, _ = gelu.gelu_rows(u, 8)
        exact = gelu._dequantize(stored, row_scale)
    wide = poisoned(B, T, WIDTH + 40, dtype=dtype, device=device)
    x = gelu.gelu_forward(stored, row_scale, out=wide[..., 32 : 32 + WIDTH])
    assert wide[..., :32].isnan().all() and wide[..., 32 + WIDTH :].isnan().all()
    assert_same_bits([gelu.gelu_forward(stored, row_scale, dtype=dtype)], [x])
    out = poisoned(B, T, WIDTH, dtype=dtype, device=device)
    results = x, gelu.gelu_backward(stored, row_scale, dx, out)
    truth = gelu_and_gradient(exact, dx.double())
    assert_all_as_exact("gelu du", results, gelu_and_gradient(exact, dx), truth)
    in_place = dx.clone()
    assert_same_bits([gelu.gelu_backward(stored, row_scale, in_place, in_place)], results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_at_large_and_zero_u(device, dtype):
    values = [-6e4, -88.0, -11.0, -1e-7, 0.0, 1e-7, 11.0, 88.0, 6e4]
    u = torch.tensor(values, device=device).to(dtype).view(1, 1, -1)
    x = gelu.gelu_forward(u)
    du = gelu.gelu_backward(u, None, torch.ones_like(u), torch.empty_like(u))
    expected = gelu_and_gradient(u, torch.ones_like(u, dtype=torch.float64))
    unit = torch.finfo(dtype).eps
    for result, truth in zip((x, du), expected, strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=unit, atol=unit**2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(device, dtype):
    u = strided(B, T, 2100, device=device, dtype=dtype, mean=-1).clone()  # two blocks of 2048
    u[0, 0], u[0, 1], u[0, 2, ::2] = 0.75, -9, -30  # constant, all below the range, half of it
    wide = poisoned(B, T, 2100 + 8, dtype=dtype, device=device)
    x, u8, row_scale, _ = gelu.gelu_rows(u, 8, out=wide[..., 8:])
    truth = F.gelu(u.double(), approximate="tanh")
    assert_as_exact("gelu", x, F.gelu(u, approximate="tanh"), truth)
    assert u8.dtype == torch.int8 and row_scale.shape == (B, T, 2)
    dequantized, clipped = gelu._dequantize(u8, row_scale), u.float().clamp(min=gelu.LOWEST)
    half_step = row_scale[..., :1] / 2
    assert ((dequantized - clipped).abs() <= half_step * 1.001 + 1e-6).all()
    assert torch.equal(dequantized[0, 0], torch.full_like(dequantized[0, 0], 0.75))

    expected, expected_scale = gelu.gelu_quantize_reference(u)
    torch.testing.assert_close(row_scale, expected_scale, rtol=1e-6, atol=1e-7)
    away = (u8.int() - expected.int()).abs()  # a tie may fall to either side
    assert away.max() <= 1 and (away > 0).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("mean", "std", "outlier", "gelu_error", "slope_error"),
    [
        (0.0, 1.0, 0.0, 0.0087, 0.0066),
        (-1.0, 1.0, 0.0, 0.0103, 0.0086),
        (-1.5, 2.0, 0.0, 0.0076, 0.0083),
        (-1.0, 1.0, -20.0, 0.0103, 0.0086),
        (-1.0, 1.0, 20.0, 0.0143, 0.0311),
    ],
)
def test_error_of_8_bits_is_as_documented(mean, std, outlier, gelu_error, slope_error):
    """The docstring's table, within a tenth, on fewer rows. (Wide rows: the reference.)"""
    u = randn(1, 8, 12288, dtype=torch.bfloat16, mean=mean, std=std)
    if outlier:
        u[..., ::1024] = outlier
    rounded = gelu._dequantize(*gelu.gelu_quantize_reference(u))
    ones = torch.ones_like(u, dtype=torch.float64)
    pairs = zip(gelu_and_gradient(rounded, ones), gelu_and_gradient(u, ones), strict=True)
    errors = [relative_error(result, truth) for result, truth in pairs]
    assert errors == pytest.approx([gelu_error, slope_error], rel=0.1)
