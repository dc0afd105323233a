"""A frozen weight's codes of 8 bits: of every form it is kept in, as kept and transposed."""

import pytest
import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.quant import frozen
from fluxfast_kernels.quant.nf4 import NF4Tensor, nf4_absmax, nf4_decode_reference, nf4_quantize
from fluxfast_kernels.quant.rows import TOP, Rows, encode_reference, quantize_rows
from numerics import GUARD, bits, guarded, skip_without_fp8

KINDS = ("int8", "fp8")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(N: int, K: int, form: str, device: str) -> list[torch.Tensor]:
    W = draw(N, K, seed=N) * torch.logspace(-3, 3, N)[:, None]
    W[0] = 0.0
    if form in ("dense", "bf16"):
        return [W.to(device, torch.bfloat16 if form == "bf16" else torch.float32)]
    if form in KINDS:
        return [part.to(device) for part in frozen.quantize_8bit(W, form)]
    return [part.to(device) for part in nf4_quantize(W, form == "nested").tensors().values()]


@pytest.mark.parametrize("form", ["nf4", "nested"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 64), (70, 192), (5, 704)])  # 64 rows a tile, 512 a program
def test_codes_of_nf4(device, shape, kind, form):
    skip_without_fp8(kind, device)
    N, K = shape
    weight = frozen.as_nf4(stored(N, K, form, device), N, K)
    amax = nf4_absmax(weight).view(N, -1).abs().amax(1)
    expected = encode_reference(nf4_decode_reference(weight), amax, kind)
    for transposed in (False, True):
        rows, check = guarded((K, N) if transposed else (N, K), kind, device)
        scale = torch.full((N + GUARD,), torch.nan, device=device)
        frozen.launch_nf4_codes(weight, rows.codes, scale, transposed)
        check()
        assert scale[N:].isnan().all() and torch.equal(scale[:N], expected.scale)
        codes = rows.codes.T if transposed else rows.codes
        assert torch.equal(bits(codes.contiguous()), bits(expected.codes))
    found, inverse = frozen.nf4_scales(list(weight.tensors().values()), N, K, kind)
    assert torch.equal(found, expected.scale)
    assert torch.equal(inverse, torch.full_like(amax, TOP[kind]) / amax.clamp(min=1e-30))
    if device == "cpu":
        with backend.cpu_launches(False):
            plain = frozen.nf4_codes_reference(weight, kind)
        assert torch.equal(bits(plain.codes), bits(expected.codes))
        assert torch.equal(plain.scale, expected.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_nf4_whose_absmax_is_not_finite(path, device, kind):
    skip_without_fp8(kind, device)
    packed, absmax = stored(5, 128, "nf4", device)
    absmax[2], absmax[7] = torch.nan, -torch.inf
    _, scale = frozen.weight_codes([packed, absmax], 128, kind)
    assert scale.isnan().tolist() == [False, True, False, True, False]
    scale, _ = frozen.nf4_scales([packed, absmax], 5, 128, kind)
    assert scale.isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("form", ["dense", "bf16", "int8", "fp8", "nf4", "nested"])
@pytest.mark.parametrize("kind", KINDS)
def test_weight_codes_of_every_form(path, device, kind, form):
    """As a plain quantization of the dense weight, and transposed the same."""
    skip_without_fp8(kind if form != "fp8" else "fp8", device)
    N, K = 67, 192
    weight = stored(N, K, form, device)
    codes, scale = (part.clone() for part in frozen.weight_codes(weight, K, kind))
    if form == kind:
        expected = Rows(*weight)
    else:
        dense = frozen.dense_weight(weight, K, torch.float32).clone()
        amax = dense.abs().amax(1)
        if form in ("nf4", "nested"):
            amax = nf4_absmax(NF4Tensor(*weight[:2], (N, K), *weight[2:])).view(N, -1).abs().amax(1)
        expected = encode_reference(dense, amax, kind)
    assert torch.equal(bits(codes), bits(expected.codes)) and torch.equal(scale, expected.scale)
    turned, scale = frozen.weight_codes(weight, K, kind, transposed=True)
    assert turned.shape == (K, N) and turned.is_contiguous() and torch.equal(scale, expected.scale)
    assert torch.equal(bits(turned).T, bits(codes))


@pytest.mark.parametrize("shape", [(1, 3), (67, 65), (64, 64), (5, 200), (130, 63)])
def test_the_transposed_copy(device, shape):
    """Tiles of 64 x 64, whole and cut off."""
    N, K = shape
    codes = torch.arange(N * K, device=device).view(N, K).to(torch.int8)
    rows, check = guarded((K, N), "int8", device)
    frozen.launch_transpose(codes, rows.codes)
    check()
    assert torch.equal(rows.codes, codes.T)


def test_a_result_carries_no_gradient():
    W = draw(4, 64).requires_grad_()
    for kind in KINDS:
        for rotation in (0, 16):
            codes, scale = frozen.quantize_8bit(W, kind, rotation)
            rows, _ = quantize_rows(W[None], kind, rotation=rotation)
            assert not (codes.requires_grad or scale.requires_grad or rows.scale.requires_grad)
