"""The C++ library gives the bytes that plain PyTorch gives, on every instruction set and number of
threads; it may be missing."""

from contextlib import contextmanager

import pytest
import torch
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.quant import native
from fluxfast_kernels.quant.nf4 import (
    CODE,
    NF4Tensor,
    _quantize_blocks,
    dynamic_map,
    nf4_absmax,
    nf4_dequantize,
    nf4_dequantize_reference,
    nf4_quantize,
)
from fluxfast_kernels.quant.rows import QuantizedRows, quantize_reference
from numerics import assert_same_bits, randn

built = pytest.mark.skipif(native.isa() is None, reason="csrc/ was not built: no C++ compiler")
SHAPES = [(1, 64), (3, 64), (257, 64), (130, 320)]  # blocks: 1, 3, 257, 650


def isas() -> list[str]:
    best = native.isa()
    return [] if best is None else list(native.ISAS[: native.ISAS.index(best) + 1])


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- NF4


def weights(shape: tuple[int, int], kind: str = "mixed") -> torch.Tensor:
    W = randn(*shape, seed=shape[0])
    if kind == "mixed":  # zeros, denormals, huge and constant blocks among the others
        W[0] = 0.0
        W[-1] *= 1e30
        W[shape[0] // 2] = 1e-40
        W[shape[0] // 3] = -0.7
    return W


@built
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", ["random", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_bytes(dtype, shape, kind, count):
    W = weights(shape, kind).to(dtype)
    if not W.isfinite().all():
        W = W.nan_to_num(posinf=6e4, neginf=-6e4)
    packed, absmax = _quantize_blocks(W)
    plain, nested = NF4Tensor(packed, absmax, shape), nf4_quantize(W, nested=True)
    table = dynamic_map(torch.device("cpu"))
    with threads(count):
        for isa in isas():
            assert_same_bits(native.nf4_quantize(W.contiguous(), isa), (packed.view(-1), absmax))
            for weight in (plain, nested):
                out = torch.full(shape, torch.nan, dtype=dtype)
                arguments = (weight.absmax, weight.nested_absmax, weight.offset, table)
                native.nf4_dequantize(weight.packed, *arguments, out, isa)
                assert_same_bits([out], [nf4_dequantize_reference(weight, dtype)])


@built
def test_a_nan_stays_one():
    W = weights((4, 64), "random")
    W[1, 5] = torch.nan
    for isa in isas():
        packed, absmax = native.nf4_quantize(W, isa)
        assert absmax[1].isnan() and absmax[[0, 2, 3]].isfinite().all(), isa
        out = torch.zeros(4, 64)
        native.nf4_dequantize(packed, absmax, None, None, None, out, isa)
        assert out[1].isnan().all() and out[0].isfinite().all(), isa


def test_a_transposed_weight_is_quantized_like_its_copy():
    W = weights((64, 128), "random").T
    assert torch.equal(nf4_quantize(W).packed, nf4_quantize(W.contiguous()).packed)


# ---------------------------------------------------------------- int8 rows

WIDTHS = [1, 3, 17, 63, 64, 65, 192, 1000]


def expected_rows(x: torch.Tensor, channel: torch.Tensor | None = None) -> QuantizedRows:
    v = x.float() if channel is None else x.float() * channel
    return quantize_reference(v, v.abs().amax(1), "int8")


def assert_same_rows(rows, expected: QuantizedRows, of=slice(None)) -> None:
    """Values and scale are those of the expected rows `of`."""
    assert_same_bits(rows, (expected.values[of], expected.scale[of]))


def rows(width: int, dtype: torch.dtype) -> torch.Tensor:
    """25 rows: random of many sizes, and one of each kind that needs care."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(25, width, generator=generator)
    x[8:] *= 10.0 ** torch.randint(-8, 5, (17, 1), generator=generator)
    x[0] = 0.0
    x[1] = 1e-40  # a denormal in fp32, in bf16 too
    x[2] *= 1e-30  # around the least amax
    x[3] = x[3].clamp(-1, 1) * min(3e38, torch.finfo(dtype).max)
    x[4] = torch.arange(width) % 254 - 126.5  # ties, with an amax of 127
    x[4, 0] = 127.0
    x[9:13] = x[4] / 127 * torch.rand(4, 1, generator=generator)  # and within a rounding of them
    x[5, width // 2] = torch.nan
    x[6, -1] = torch.inf
    x[7, 0] = -torch.inf
    return x.to(dtype)


@built
@pytest.mark.parametrize("with_channel", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_the_formulas(width, dtype, with_channel):
    x, channel = rows(width, dtype), None
    if with_channel:
        channel = torch.rand(width, generator=torch.Generator().manual_seed(0)) * 4 - 2
        channel[0] = 1.0
    expected = expected_rows(x, channel)
    # 3e38 times a channel overflows in places: that row may be infinite too
    assert expected.scale[5:8].isnan().all() and expected.scale[8:].isfinite().all()
    wide = torch.full((25, width + 5), torch.nan, dtype=dtype)
    wide[:, 2 : width + 2] = x
    for isa in isas():
        assert_same_rows(native.rows_int8(x, channel, isa), expected)
        assert_same_rows(native.rows_int8(wide[:, 2 : width + 2], channel, isa), expected)
        for of in (slice(None, None, 3), [1], [4], [20]):
            assert_same_rows(native.rows_int8(x[of], channel, isa), expected, of)
        expanded = x[20:21].expand(3, width)
        assert_same_rows(native.rows_int8(expanded, channel, isa), expected, [20] * 3)


@built
def test_a_channel_that_overflows_or_brings_a_denormal_back():
    x = torch.full((2, 20), 1e-40)
    x[1] = 3e38
    channel = torch.full((20,), 1e20)
    for isa in isas():
        values, scale = native.rows_int8(x, channel, isa)
        assert_same_rows((values, scale), expected_rows(x, channel))
        assert (values[0] == 127).all() and scale[1].isnan(), isa


def nf4(shape: tuple[int, int], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[1])
    count = shape[0] * shape[1]
    packed = torch.randint(0, 256, (count // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(count // 64, generator=generator) + 0.01
    if kind == "sizes":  # very different ones in a row, negative too
        absmax *= 10.0 ** torch.randint(-45, 38, absmax.shape, generator=generator)
        absmax[::7] *= -1
    if kind == "constant":
        packed[:] = 0xFF
        absmax[::2] = 0.0
        absmax[: shape[1] // 64] = 0.0  # the first row is zero
    if kind == "ties":  # within a rounding of them, for one of the code values
        code = torch.tensor(CODE)[torch.randint(8, 16, absmax.shape, generator=generator)]
        half = torch.rand(absmax.shape, generator=generator).mul(127 * code).floor() + 0.5
        absmax = absmax.view(shape[0], -1)[:, :1].repeat(1, shape[1] // 64).view(-1)
        absmax[1:] *= half[1:] / (127 * code[1:])
    if kind == "not finite":
        absmax.view(shape[0], -1)[1, -1] = torch.nan
        absmax.view(shape[0], -1)[2, 0] = -torch.inf
    return packed, absmax


@built
@pytest.mark.parametrize("kind", ["random", "ties", "sizes", "constant", "not finite"])
@pytest.mark.parametrize("shape", [(5, 64), (7, 192), (3, 1024), (130, 320)])
def test_nf4_is_the_dequantized_rows(shape, kind):
    packed, absmax = nf4(shape, kind)
    dense = torch.empty(shape)
    native.nf4_dequantize(packed, absmax, None, None, None, dense, "portable")
    expected = quantize_reference(dense, absmax.view(shape[0], -1).abs().amax(1), "int8")
    assert expected.scale.isnan().sum() == (2 if kind == "not finite" else 0)
    for isa in isas():
        assert_same_rows(native.nf4_int8(packed, absmax, *shape, with_isa=isa), expected)
        out = torch.full((dense.numel() + 9,), 99, dtype=torch.int8)
        values, scale = native.nf4_int8(packed, absmax, *shape, out, isa)
        assert_same_rows((values, scale), expected)
        assert values.data_ptr() == out.data_ptr() and (out[dense.numel() :] == 99).all(), isa


@built
def test_the_number_of_threads_does_not_matter():
    x = randn(301, 1001, dtype=torch.bfloat16)
    packed, absmax = nf4((1001, 1024), "sizes")
    for isa in isas():
        for call in (
            lambda isa=isa: native.rows_int8(x, None, isa),
            lambda isa=isa: native.nf4_int8(packed, absmax, 1001, 1024, None, isa),
        ):
            with threads(1):
                expected = call()
            with threads(2):
                assert_same_bits(call(), expected)


@built
def test_refusals():
    x, (packed, absmax) = torch.zeros(2, 64), nf4((2, 64), "random")
    lacking = "avx512" if native.isa() != "avx512" else "sse9"
    for call in (
        lambda: native.rows_int8(x, None, lacking),
        lambda: native.nf4_int8(packed, absmax, 2, 64, with_isa=lacking),
        lambda: native.nf4_quantize(x, lacking),
    ):
        with pytest.raises(ValueError, match="with_isa must be"):
            call()
    for arguments in (
        *((wrong,) for wrong in (x.double(), x.T, x[0])),
        *((x, wrong) for wrong in (torch.ones(63), torch.ones(64).double(), torch.ones(128)[::2])),
    ):
        with pytest.raises(AssertionError):
            native.rows_int8(*arguments)
    for out in (torch.zeros(127, dtype=torch.int8), torch.zeros(128)):
        with pytest.raises(AssertionError):
            native.nf4_int8(packed, absmax, 2, 64, out)


# ---------------------------------------------------------------- the process around it


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(default):
    W = weights((130, 320), "random")

    def results() -> list[torch.Tensor]:
        dynamic_map.cache_clear()
        nested = nf4_quantize(W, nested=True)
        rows = [*native.rows_int8(W), *native.nf4_int8(*plain, *W.shape)] if native.isa() else []
        return [*nested.tensors().values(), nf4_dequantize(nested), *rows]

    plain = list(nf4_quantize(W).tensors().values())
    expected = results()
    torch.set_default_dtype(default)
    try:
        assert_same_bits(results(), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        dynamic_map.cache_clear()


def test_without_the_library_the_bytes_are_the_same(monkeypatch):
    W = weights((130, 320), "mixed")
    with_it = nf4_quantize(W, nested=True)
    dense = nf4_dequantize(with_it, torch.bfloat16)
    monkeypatch.setattr(native, "_library", lambda: None)
    assert native.isa() is None
    without = nf4_quantize(W, nested=True)
    assert_same_bits(without.tensors(), with_it.tensors())
    assert_same_bits([nf4_dequantize(without, torch.bfloat16)], [dense])
    assert_same_bits([nf4_absmax(without)], [nf4_absmax(with_it)])


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_broken_library_is_ignored(content, tmp_path, monkeypatch):
    path = tmp_path / "native.so"
    path.write_bytes(content)
    monkeypatch.setattr(native, "LIBRARY", path)
    native._library.cache_clear()
    try:
        assert native.isa() is None
    finally:
        monkeypatch.undo()
        native._library.cache_clear()
