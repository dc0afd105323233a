"""A frozen weight: NF4 dequantized, and every form in 8 bits, as stored and transposed."""

import pytest
import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.quant import frozen
from fluxfast_kernels.quant.nf4 import (
    NF4Tensor,
    launch_dequantize,
    nf4_absmax,
    nf4_dequantize,
    nf4_dequantize_reference,
    nf4_quantize,
)
from fluxfast_kernels.quant.rows import TOP, QuantizedRows, quantize_reference, quantize_rows
from numerics import GUARD, KINDS, assert_same_bits, bits, guarded, opcheck, randn, skip_without_fp8


def stored(N: int, K: int, form: str, device: str) -> list[torch.Tensor]:
    W = randn(N, K, seed=N) * torch.logspace(-3, 3, N)[:, None]
    W[0] = 0.0
    if form in ("dense", "bf16"):
        return [W.to(device, torch.bfloat16 if form == "bf16" else torch.float32)]
    if form in KINDS:
        return [part.to(device) for part in frozen.quantize_8bit(W, form)]
    return [part.to(device) for part in nf4_quantize(W, form == "nested").tensors().values()]


@pytest.mark.grid(7)
@pytest.mark.parametrize("form", ["nf4", "nested"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 64), (70, 192), (5, 704)])  # 64 rows a tile, 512 a program
def test_nf4_in_8_bits(device, shape, kind, form):
    skip_without_fp8(kind, device)
    N, K = shape
    weight = frozen.as_nf4(stored(N, K, form, device), N, K)
    amax = nf4_absmax(weight).view(N, -1).abs().amax(1)
    expected = quantize_reference(nf4_dequantize_reference(weight), amax, kind)
    for transposed in (False, True):
        rows, check = guarded((K, N) if transposed else (N, K), kind, device)
        scale = torch.full((N + GUARD,), torch.nan, device=device)
        frozen.launch_nf4_to_8bit(weight, QuantizedRows(rows.values, scale), transposed)
        check()
        assert scale[N:].isnan().all() and torch.equal(scale[:N], expected.scale)
        values = rows.values.T if transposed else rows.values
        assert_same_bits([values.contiguous()], [expected.values])
    in_nf4 = frozen.nf4_with_scales(list(weight.tensors().values()), N, K, kind)
    inverse = torch.full_like(amax, TOP[kind]) / amax.clamp(min=1e-30)
    assert_same_bits([in_nf4.scale, in_nf4.inverse], [expected.scale, inverse])
    if device == "cpu":
        with backend.cpu_launches(False):
            plain = frozen.nf4_to_8bit_reference(weight, kind)
        assert_same_bits([plain.values, plain.scale], [expected.values, expected.scale])


@pytest.mark.parametrize("kind", KINDS)
def test_nf4_whose_absmax_is_not_finite(path, device, kind):
    skip_without_fp8(kind, device)
    packed, absmax = stored(5, 128, "nf4", device)
    absmax[2], absmax[7] = torch.nan, -torch.inf
    for weight in (
        frozen.weight_in_8bit([packed, absmax], 128, kind),
        frozen.nf4_with_scales([packed, absmax], 5, 128, kind),
    ):
        assert weight.scale.isnan().tolist() == [False, True, False, True, False]


@pytest.mark.grid(4)
@pytest.mark.parametrize("form", ["dense", "bf16", "int8", "fp8", "nf4", "nested"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_in_8_bits(path, device, kind, form):
    """As a plain quantization of the dense weight, and transposed the same."""
    skip_without_fp8("fp8" if "fp8" in (kind, form) else kind, device)
    N, K = 67, 192
    weight = stored(N, K, form, device)
    straight = frozen.weight_in_8bit(weight, K, kind)
    values = straight.values.clone()
    if form == kind:
        expected = QuantizedRows(*weight)
    else:
        dense = frozen.dequantize(weight, K, torch.float32).clone()
        amax = dense.abs().amax(1)
        if form in ("nf4", "nested"):
            amax = nf4_absmax(NF4Tensor(*weight[:2], (N, K), *weight[2:])).view(N, -1).abs().amax(1)
        expected = quantize_reference(dense, amax, kind)
    assert_same_bits([values, straight.scale], [expected.values, expected.scale])
    turned = frozen.weight_in_8bit(weight, K, kind, transposed=True)
    assert turned.transposed and not straight.transposed
    assert turned.values.shape == (K, N) and turned.values.is_contiguous()
    assert torch.equal(bits(turned.values).T, bits(values))
    assert torch.equal(turned.scale, expected.scale)


@pytest.mark.parametrize("shape", [(1, 3), (67, 65), (64, 64), (5, 200), (130, 63)])
def test_the_transposed_copy(device, shape):
    """Tiles of 64 x 64, whole and cut off."""
    N, K = shape
    values = torch.arange(N * K, device=device).view(N, K).to(torch.int8)
    rows, check = guarded((K, N), "int8", device)
    frozen.launch_transpose(values, rows.values)
    check()
    assert torch.equal(rows.values, values.T)


def test_a_result_carries_no_gradient():
    W = randn(4, 64).requires_grad_()
    for kind in KINDS:
        for rotation in (0, 16):
            values, scale = frozen.quantize_8bit(W, kind, rotation)
            rows, _ = quantize_rows(W[None], kind, rotation=rotation)
            assert not (values.requires_grad or scale.requires_grad or rows.scale.requires_grad)


# ---------------------------------------------------------------- NF4 dequantized


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
    opcheck(lambda: [nf4_dequantize(weight, torch.bfloat16)])
