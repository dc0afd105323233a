"""int8 rows in C++: the bits of the formula in plain PyTorch, on every instruction set."""

import pytest
import torch
from fluxfast_kernels.quant import native
from fluxfast_kernels.quant.nf4 import CODE
from test_native import TYPES, built, isas

WIDTHS = [1, 3, 17, 63, 64, 65, 192, 1000]


def encode(v: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    floor = amax.clamp(min=1e-30)
    # `127.0 / floor` would be reciprocal() * 127 (torch 2.13): rounded twice, other bits in 1 of 4
    inverse = torch.full_like(floor, 127.0) / floor
    scaled = torch.where(amax.isfinite()[:, None], v * inverse[:, None], 0.0)
    codes = scaled.round().clamp(-127, 127).to(torch.int8)
    return codes, torch.where(amax.isfinite(), floor * (1.0 / 127.0), torch.nan)


def expected_rows(x: torch.Tensor, channel: torch.Tensor | None):
    v = x.float() if channel is None else x.float() * channel
    return encode(v, v.abs().amax(1))


def same(found, expected) -> bool:
    codes, scale = (torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return codes and (
        scale or torch.equal(found[1].view(torch.int32), expected[1].view(torch.int32))
    )


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
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_the_formulas(width, dtype, with_channel):
    x, channel = rows(width, dtype), None
    if with_channel:
        channel = torch.rand(width, generator=torch.Generator().manual_seed(0)) * 4 - 2
        channel[0] = 1.0
    expected = expected_rows(x, channel)
    # 3e38 times a channel overflows in places: that row may be infinite too
    assert expected[1][5:8].isnan().all() and expected[1][8:].isfinite().all()
    wide = torch.full((25, width + 5), torch.nan, dtype=dtype)
    wide[:, 2 : width + 2] = x
    for isa in isas():
        assert same(native.rows_int8(x, channel, isa), expected), isa
        assert same(native.rows_int8(wide[:, 2 : width + 2], channel, isa), expected), isa
        found = native.rows_int8(x[::3], channel, isa)
        assert same(found, (expected[0][::3], expected[1][::3])), isa
        for row in (1, 4, 20):
            found = native.rows_int8(x[row : row + 1], channel, isa)
            assert same(found, (expected[0][row : row + 1], expected[1][row : row + 1])), (isa, row)
        found = native.rows_int8(x[20:21].expand(3, width), channel, isa)
        assert same(found, (expected[0][[20] * 3], expected[1][[20] * 3])), isa


@built
@pytest.mark.parametrize("dtype", TYPES)
def test_a_tie_rounds_to_even(dtype):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 62.5, 63.5, *[-62.5] * 9]])
    even = [127, 0, 2, 2, 0, -2, -2, 62, 64, *[-62] * 9]
    for isa in isas():
        codes, scale = native.rows_int8(x.to(dtype), None, isa)
        assert codes[0].tolist() == even and scale.item() == 1.0, isa


@built
def test_special_rows():
    x = torch.zeros(4, 70)
    x[1, 69], x[2, 3], x[3] = torch.nan, torch.inf, 1.0
    for isa in isas():
        codes, scale = native.rows_int8(x, None, isa)
        assert scale[0] == torch.tensor(1e-30) * (1.0 / 127.0) and scale[1:3].isnan().all(), isa
        assert not codes[:3].any() and (codes[3] == 127).all(), isa


@built
def test_a_channel_that_overflows_or_brings_a_denormal_back():
    x = torch.full((2, 20), 1e-40)
    x[1] = 3e38
    channel = torch.full((20,), 1e20)
    for isa in isas():
        codes, scale = native.rows_int8(x, channel, isa)
        assert same((codes, scale), expected_rows(x, channel)), isa
        assert (codes[0] == 127).all() and scale[1].isnan(), isa


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
    if kind == "ties":  # within a rounding of them, for one of the codes
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
def test_nf4_is_the_decoded_rows(shape, kind):
    packed, absmax = nf4(shape, kind)
    dense = torch.empty(shape)
    native.nf4_dequantize(packed, absmax, None, None, None, dense, "portable")
    expected = encode(dense, absmax.view(shape[0], -1).abs().amax(1))
    assert expected[1].isnan().sum() == (2 if kind == "not finite" else 0)
    for isa in isas():
        assert same(native.nf4_int8(packed, absmax, *shape, with_isa=isa), expected), isa
        out = torch.full((dense.numel() + 9,), 99, dtype=torch.int8)
        found = native.nf4_int8(packed, absmax, *shape, out, isa)
        assert same(found, expected) and found[0].data_ptr() == out.data_ptr(), isa
        assert (out[dense.numel() :] == 99).all(), isa


@built
def test_the_number_of_threads_does_not_matter():
    x = torch.randn(301, 1001, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, absmax = nf4((1001, 1024), "sizes")
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[threads] = [
                (
                    native.rows_int8(x, None, isa),
                    native.nf4_int8(packed, absmax, 1001, 1024, None, isa),
                )
                for isa in isas()
            ]
    finally:
        torch.set_num_threads(before)
    expected = expected_rows(x, None), found[1][0][1]
    for threads in (1, 2):
        for pair in found[threads]:
            assert same(pair[0], expected[0]) and same(pair[1], expected[1]), threads


@built
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(default):
    x, (packed, absmax) = rows(65, torch.float32), nf4((2, 64), "random")
    expected = native.rows_int8(x), native.nf4_int8(packed, absmax, 2, 64)
    torch.set_default_dtype(default)
    try:
        found = native.rows_int8(x), native.nf4_int8(packed, absmax, 2, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(found[0], expected[0]) and same(found[1], expected[1])


@built
def test_refusals():
    x, (packed, absmax) = torch.zeros(2, 64), nf4((2, 64), "random")
    with pytest.raises(ValueError, match="with_isa must be"):
        native.rows_int8(x, None, "sse9")
    with pytest.raises(ValueError, match="with_isa must be"):
        native.nf4_int8(packed, absmax, 2, 64, with_isa="sse9")
    for wrong in (x.double(), x.T, x[0]):
        with pytest.raises(AssertionError):
            native.rows_int8(wrong)
    for channel in (torch.ones(63), torch.ones(64).double(), torch.ones(128)[::2]):
        with pytest.raises(AssertionError):
            native.rows_int8(x, channel)
    for out in (torch.zeros(127, dtype=torch.int8), torch.zeros(128)):
        with pytest.raises(AssertionError):
            native.nf4_int8(packed, absmax, 2, 64, out)
    with pytest.raises(AssertionError):
        native.nf4_int8(packed, absmax, 4, 32)


def test_no_rows():
    if native.isa():
        codes, scale = native.rows_int8(torch.zeros(0, 7))
        assert codes.shape == (0, 7) and scale.shape == (0,)
