"""NF4 against bitsandbytes' CPU backend: the same bytes, not nearly the same."""

import bitsandbytes.functional as bnb
import pytest
import torch
from fluxfast_kernels import NF4Tensor, nf4_dequantize, nf4_quantize
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.quant.nf4 import dynamic_map, nf4_dequantize_reference
from numerics import randn

SHAPES = [(64, 64), (96, 192), (3, 64), (130, 320), (257, 128)]
KINDS = {
    "random": lambda random: random,
    "small": lambda random: random * 0.02,
    "zero": torch.zeros_like,
    "constant": lambda random: torch.full_like(random, -0.3),
    "one zero block": lambda random: torch.cat([torch.zeros_like(random[:1]), random[1:]]),
    "denormal": lambda random: random * 1e-40,
    "huge": lambda random: random * 1e37,
    "outliers": lambda random: torch.where(random > 2.5, random * 40, random),
    "midpoints": lambda random: torch.linspace(-1, 1, random.numel()).view(random.shape),
}


def weights(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    return KINDS[kind](randn(*shape, seed=sum(shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nested", [False, True])
def test_bytes_equal(kind, nested, dtype):
    for shape in SHAPES:
        weight = weights(kind, shape).to(dtype)
        if not weight.isfinite().all():
            weight = weights("random", shape).to(dtype)
        ours = nf4_quantize(weight, nested=nested)
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        assert torch.equal(ours.packed, packed)
        assert ours.absmax.dtype == state.absmax.dtype
        assert torch.equal(ours.absmax, state.absmax)
        if nested:
            assert torch.equal(ours.nested_absmax, state.state2.absmax)
            assert torch.equal(ours.offset, state.offset)
        for out in DTYPES:
            state.dtype = out
            theirs = bnb.dequantize_4bit(packed, state)
            assert torch.equal(nf4_dequantize(ours, out), theirs.view(shape)) or (
                not theirs.isfinite().all()
            ), (kind, shape, out)


def test_dynamic_map():
    assert torch.equal(dynamic_map(torch.device("cpu")), bnb.create_dynamic_map())


def test_rows_stack_exactly():
    a, b = weights("random", (64, 128)), weights("small", (32, 128))
    both = nf4_quantize(torch.cat([a, b]))
    assert torch.equal(both.packed, torch.cat([nf4_quantize(a).packed, nf4_quantize(b).packed]))


@pytest.mark.parametrize("bad", [torch.zeros(4, 63), torch.zeros(64), torch.zeros(2, 64).double()])
def test_refuses(bad):
    with pytest.raises(ValueError, match="weight must be"):
        nf4_quantize(bad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantizes_into_given_memory(dtype):
    quantized = nf4_quantize(weights("random", (96, 192)))
    out = torch.full((96 * 192 + 5,), torch.nan, dtype=dtype)
    assert torch.equal(nf4_dequantize(quantized, dtype, out), nf4_dequantize(quantized, dtype))
    assert out[-5:].isnan().all()
    for bad in (out[:100], out.double(), torch.empty(96, 400, dtype=dtype)[:, ::2]):
        with pytest.raises(ValueError, match="^out must be"):
            nf4_dequantize(quantized, dtype, bad)
    with pytest.raises(ValueError, match="^dtype must be"):
        nf4_dequantize(quantized, torch.int8)


def test_nested_matrices_stack_with_an_offset_per_block():
    """Each part of a fused weight was quantized alone and keeps its own offset."""
    parts = [nf4_quantize(weights(kind, (64, 256)), nested=True) for kind in ("random", "small")]
    both = NF4Tensor(
        torch.cat([part.packed for part in parts]),
        torch.cat([part.absmax for part in parts]),
        (128, 256),
        torch.cat([part.nested_absmax for part in parts]),
        torch.cat([part.offset.expand(len(part.nested_absmax)) for part in parts]),
    )
    expected = torch.cat([nf4_dequantize(part) for part in parts])
    assert torch.equal(nf4_dequantize(both), expected)
    assert torch.equal(nf4_dequantize_reference(both), expected)
