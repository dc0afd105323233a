"""Dequantizing by Triton gives the bytes of the plain-PyTorch one."""

import pytest
import torch
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.quant.nf4 import (
    NF4Tensor,
    _nf4_dequantize,
    launch_dequantize,
    nf4_dequantize,
    nf4_dequantize_reference,
    nf4_quantize,
)
from numerics import assert_same_bits, randn


def quantized(shape: tuple[int, int], nested: bool, device: str) -> NF4Tensor:
    W = randn(*shape, seed=shape[0])
    W[0], W[-1], W[shape[0] // 2] = 0.0, 1e4 * W[-1], 1e-38
    parts = nf4_quantize(W, nested).tensors()
    return NF4Tensor(**{name: part.to(device) for name, part in parts.items()}, shape=shape)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(3, 64), (65, 64), (33, 320)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bytes(device, dtype, shape, nested):
    weight = quantized(shape, nested, device)
    assert_same_bits([nf4_dequantize(weight, dtype)], [nf4_dequantize_reference(weight, dtype)])


def test_writes_every_value_and_no_other(device):
    weight = quantized((65, 64), False, device)
    out = torch.full((65 * 64 + 64,), torch.nan, device=device)
    launch_dequantize(weight.packed.view(-1), weight.absmax, out)
    assert out[: 65 * 64].isfinite().all() and out[65 * 64 :].isnan().all()


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck(device, nested):
    weight = quantized((5, 128), nested, device)
    parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    torch.library.opcheck(_nf4_dequantize, (*parts, 5, 128, torch.bfloat16))
