"""Rows in 8 bits: every kernel that writes them gives the formula's bits, whatever the row."""

import pytest
import torch
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.gemm import grads as gemm_grads
from fluxfast_kernels.gemm.epilogue import LoRAUpdate
from fluxfast_kernels.ops import gelu, norm_modulate
from fluxfast_kernels.quant import frozen
from fluxfast_kernels.quant import rows as rows_8bit
from fluxfast_kernels.quant.hadamard import hadamard_reference
from fluxfast_kernels.quant.rows import (
    TOP,
    multiply_8bit,
    quantize_reference,
    quantize_rows,
)
from numerics import (
    KINDS,
    UNSET,
    assert_refused,
    assert_rows,
    assert_same_bits,
    bits,
    guarded,
    randn,
    skip_without_fp8,
)

# B, T, K, rotation: K odd, below and above a block of columns; T above and below a tile of rows
SHAPES = [(2, 5, 3, 0), (1, 5, 17, 0), (2, 17, 65, 0), (2, 2, 200, 0), (2, 2, 200, 8)]
SHAPES += [(1, 2, 384, 128), (1, 1, 2304, 256)]
KINDS_OF = [*(("int8", dtype) for dtype in DTYPES), ("fp8", torch.bfloat16)]


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    """Rows that an op allocates are cut out of larger memory, which must stay as it was."""
    checks = []

    def empty_rows(x, kind):
        rows, check = guarded(x.shape, kind, x.device)
        checks.append(check)
        return rows

    for module in (rows_8bit, gelu, norm_modulate):
        monkeypatch.setattr(module, "empty_rows", empty_rows)
    yield
    for check in checks:
        check()


def tokens(B, T, K, dtype, device, seed=0):
    """[B, T, K] in the wider rows of a longer tensor: rows of very different sizes, one of zeros,
    one that is denormal in fp32 and bf16, one near the largest fp16, and some with NaN or infinity.
    """
    sizes = torch.randint(-4, 3, (B, T + 3, 1), generator=torch.Generator().manual_seed(seed))
    x = randn(B, T + 3, K + 5, seed=seed) * 10.0**sizes
    x[0, 2] = 0.0
    if T > 2:
        x[-1, 3], x[-1, 4] = 1e-40, x[-1, 4].sign() * 6e4
        x[-1, 5, 1], x[-1, 6, K] = torch.nan, torch.inf
    elif T == 2:
        x[-1, 3, K // 2] = -torch.inf
    return x.to(device, dtype)[:, 2 : T + 2, 1 : K + 1]


def random_channel(K, device, seed=1):
    return randn(K, seed=seed, device=device)


def assert_same(result, expected):
    """Bit for bit, NaN beside NaN. (A GPU's compiler may fuse other products and sums where rows
    are written too: within two units of the dtype there.)"""
    unit = 0.0 if result.device.type == "cpu" else 2 * torch.finfo(expected.dtype).eps
    finite = expected[expected.isfinite()].abs()
    atol = unit * float(finite.max()) if finite.numel() else 0.0
    torch.testing.assert_close(result, expected, rtol=unit, atol=atol, equal_nan=True)


def assert_same_sums(result, expected):
    """fp32 sums of the same products: some CPUs' BLAS adds them in an order that depends on the
    block's shape. Errors of 32 units of the largest sum are allowed; other types are exact.
    """
    if result.dtype != torch.float32:
        return assert_same(result, expected)
    finite = expected[expected.isfinite()].abs()
    atol = 32 * torch.finfo(torch.float32).eps * (float(finite.max()) if finite.numel() else 0.0)
    torch.testing.assert_close(result, expected, rtol=0.0, atol=atol, equal_nan=True)


# ---------------------------------------------------------------- what writes rows
# (x, kind, rotation) -> [(rows, what they must be the rows of)]


def by_quantize(x, kind, rotation):
    rows, same = quantize_rows(x, kind, rotation=rotation)
    assert same is x
    return [(rows, x)]


def by_quantize_of_a_channel(x, kind, rotation):
    channel = random_channel(x.shape[-1], x.device)
    rows, _ = quantize_rows(x, kind, channel, rotation)
    return [(rows, x.float() * channel)]


def by_gate(x, kind, rotation):
    modulation = randn(len(x), 1, 3 * x.shape[-1], seed=2, device=x.device, dtype=x.dtype)
    gate = modulation.chunk(3, -1)[1]
    channel = random_channel(x.shape[-1], x.device)
    rows, dy = quantize_rows(x, kind, channel, rotation, gate)
    assert dy.is_contiguous()
    torch.testing.assert_close(dy, x * gate, rtol=0, atol=0, equal_nan=True)
    return [(rows, dy.float() * channel)]


def by_norm_modulate(x, kind, rotation):
    """Of rows far from zero: what lies past their end is (0 - mean) · rstd, if it is not masked."""
    x = x + 4 * x.abs().amax(-1, keepdim=True).nan_to_num(0.0, 0.0)
    shift, scale = randn(2, len(x), 1, x.shape[-1], seed=3, device=x.device, dtype=x.dtype)
    out, mean, rstd, rows = norm_modulate.norm_modulate_forward(x, shift, scale, kind, rotation)
    again = norm_modulate.norm_modulate_recompute(x, shift, scale, mean, rstd)
    assert_same_bits([again], [out])
    return [(rows, out)]


def by_gelu(x, kind, rotation):
    wide = torch.full((*x.shape[:2], x.shape[2] + 9), torch.nan, dtype=x.dtype, device=x.device)
    out, u8, _, rows = gelu.gelu_rows(x, 16, kind, rotation, wide[..., 7:-2])
    assert u8.numel() == 0 and wide[..., :7].isnan().all() and wide[..., -2:].isnan().all()
    return [(rows, out)]


def by_gelu_that_saves_8_bits(x, kind, rotation):
    out, u8, row_scale, rows = gelu.gelu_rows(x, 8, kind, rotation)
    plain, plain_u8, plain_scale, _ = gelu.gelu_rows(x, 8)
    assert_same(out, plain)
    assert_same(row_scale, plain_scale)
    assert (u8.int() - plain_u8).abs().max() <= (0 if x.device.type == "cpu" else 1)
    return [(rows, out)]


def by_down(x, kind, rotation):
    """Of the first input of two, then of the second, then of both."""
    other = tokens(*x.shape[:2], max(rotation, 40), x.dtype, x.device, seed=5)
    a = randn(40, x.shape[2] + other.shape[2], seed=6, device=x.device)
    written, plain = [], gemm_grads.lora_down([x, other], a)
    for xs, wanted in (([x, other], (0,)), ([other, x], (1,)), ([x, other], (0, 1))):
        rows, checks = zip(*(guarded(v.shape, kind, x.device) for v in xs), strict=True)
        given = [row if i in wanted else None for i, row in enumerate(rows)]
        weight = a if xs[0] is x else a.roll(other.shape[2], 1)
        down = gemm_grads.lora_down(xs, weight, rows=given, rotation=rotation)
        if xs[0] is x:
            assert_same_sums(down, plain)
        for check in checks:
            check()
        assert all((bits(rows[i].values) == UNSET).all() for i in range(len(xs)) if i not in wanted)
        written += [(rows[i], xs[i]) for i in wanted]
    return written


def by_d_down(x, kind, rotation):
    """Of dY · channel of both gradients, with three A, one of which nothing feeds."""
    first = tokens(*x.shape[:2], 30, x.dtype, x.device, seed=5)
    N = 30 + x.shape[2]
    channel = random_channel(N, x.device)
    b, parts = randn(N - 1, 20, seed=6, device=x.device), [0, 29, 2, 30, N, 0]
    rows, checks = zip(*(guarded(v.shape, kind, x.device) for v in (first, x)), strict=True)
    update = LoRAUpdate(x.new_empty(3 * 20, 1), b, parts, 0.5)
    d_down = gemm_grads.lora_d_down([first, x], update, rows=list(rows), channel=channel)
    assert_same_sums(d_down, gemm_grads.lora_d_down([first, x], update))
    for check in checks:
        check()
    return [(rows[0], first.float() * channel[:30]), (rows[1], x.float() * channel[30:])]


PRODUCERS = [by_quantize, by_quantize_of_a_channel, by_gate, by_norm_modulate, by_gelu]
PRODUCERS += [by_gelu_that_saves_8_bits, by_down, by_d_down]


@pytest.mark.grid(3)
@pytest.mark.parametrize(("kind", "dtype"), KINDS_OF)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_rows_are_the_formulas(device, producer, kind, dtype):
    """NaN or infinity in a row makes its scale NaN and touches no other row."""
    skip_without_fp8(kind, device)
    for B, T, K, rotation in SHAPES:
        rotation = rotation if producer is not by_d_down else 0  # which is never rotated
        for rows, v in producer(tokens(B, T, K, dtype, device), kind, rotation):
            v = hadamard_reference(v.float(), rotation) if rotation else v.float()
            assert_rows(f"{producer.__name__} {(B, T, K, rotation)}", rows, v, kind)


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize(
    ("kind", "values", "rounded"),
    [
        ("int8", [127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5], [127, 0, 2, 2, 0, -2, -126]),
        # neighbors: 1 and 1.125, 1.125 and 1.25, 416 and 448, and below 2^-6 steps of 2^-9
        (
            "fp8",
            [448, 1.0625, 1.1875, -1.0625, 432, 2**-10, 3 * 2**-10],
            [448, 1, 1.25, -1, 448, 0, 2**-8],
        ),
    ],
)
def test_ties_go_to_the_even_value(path, device, kind, values, rounded):
    skip_without_fp8(kind, device)
    x = torch.tensor(values, device=device)[None, None]
    for row in (quantize_rows(x, kind)[0], quantize_reference(x, x.abs().amax(-1), kind)):
        assert row.values.float()[0, 0].tolist() == rounded and row.scale.item() == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_values_times_scale_are_within_half_a_step(path, device, kind):
    """In fp64: scale · top is the largest magnitude, which becomes ±top; the rest is rounded."""
    skip_without_fp8(kind, device)
    x = randn(2, 9, 300, device=device) * 10.0 ** torch.arange(-20, 25, 5, device=device)[:, None]
    rows, _ = quantize_rows(x, kind)
    top, scale = TOP[kind], rows.scale.double()[..., None]
    values, truth = rows.values.double(), x.double()
    amax = truth.abs().amax(-1, keepdim=True)
    assert ((scale * top / amax - 1).abs() <= 2**-23).all()
    assert torch.equal(values.abs().amax(-1), torch.full((2, 9), top, device=device).double())
    away = (values * scale - truth).abs()
    if kind == "int8":
        assert (away <= scale * (0.5 + 1e-4)).all()  # 127 · 2^-22 of a step, by fp32's roundings
    else:  # three bits behind the leading one; below 2^-6 steps of 2^-9
        assert (away <= torch.maximum(truth.abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_very_small_and_very_large_rows(path, device, kind):
    """At least 1e-30 counts as the largest: below, values shrink; at 2e-30 they do not."""
    skip_without_fp8(kind, device)
    sizes = torch.tensor([0.0, 1e-40, 1e-32, 0.5e-30, 2e-30, 1e-29, 3e38], device=device)
    x = sizes[None, :, None] * torch.tensor([1.0, -1.0, 0.0], device=device)
    rows, _ = quantize_rows(x, kind)
    top = TOP[kind]
    floor = sizes.double().clamp(min=1e-30)
    torch.testing.assert_close(rows.scale[0].double(), floor / top, rtol=2**-22, atol=0)
    largest = rows.values.float()[0].abs().amax(-1).tolist()
    half = round(top / 2) if kind == "int8" else 224.0
    assert largest[:2] == [0.0, 0.0] and largest[3:] == [half, top, top, top]
    assert largest[2] == (1.0 if kind == "int8" else 4.5)  # of 1.27 and 4.48
    assert (rows.values.float()[0, :, 2] == 0).all()


# ---------------------------------------------------------------- 8-bit matmuls on a CPU


@pytest.mark.parametrize("by_int_mm", [True, False])
def test_int8_products_are_exact(monkeypatch, by_int_mm):
    """Against int64; with 15 360 columns of 127 the sum is above 2^24 and rounded once."""
    if not by_int_mm:
        monkeypatch.setattr(rows_8bit, "_int_mm_is_exact", lambda: False)
    generator = torch.Generator().manual_seed(0)

    def whole(*shape):
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    for M, K, N in [(1, 1, 1), (5, 1, 3), (2, 3, 1), (3, 17, 5), (33, 65, 17), (7, 2049, 9)]:
        left, wide = whole(M, K), whole(N, K + 7)
        for right in (whole(N, K).T, whole(K, N), wide[:, 5 : K + 5].T):
            exact = left.long() @ right.long()
            assert torch.equal(multiply_8bit(left, right), exact.float()), (M, K, N)
    for signs in ((1, 1), (1, -1), (-1, -1)):
        left, right = (torch.full((2, 15360), 127 * s, dtype=torch.int8) for s in signs)
        right[1, :5] = 3
        exact = left.long() @ right.T.long()
        assert torch.equal(multiply_8bit(left, right.T), exact.float())


# ---------------------------------------------------------------- refusals


def test_refusals(path):
    x, wide = randn(2, 3, 96), randn(2, 3, 192)
    refused = {
        "kind": [lambda: quantize_rows(x, "int4"), lambda: frozen.quantize_8bit(x[0], "e4m3")],
        "x": [
            lambda: quantize_rows(x[0], "int8"),
            lambda: quantize_rows(x[0, :, :1], "int8"),
            lambda: quantize_rows(wide[..., ::2], "int8"),
            lambda: quantize_rows(x[..., :0], "int8"),
            lambda: quantize_rows(x.int(), "int8"),
        ],
        "rotation": [
            lambda: quantize_rows(x, "int8", rotation=48),
            lambda: quantize_rows(x, "int8", rotation=64),
            lambda: frozen.quantize_8bit(x[0], "int8", 512),
        ],
        "channel": [
            lambda: quantize_rows(x, "int8", x[0, 0, 1:]),
            lambda: quantize_rows(x, "int8", x[0, 0].half()),
            lambda: quantize_rows(x, "int8", wide[0, 0, ::2]),
        ],
        "gate": [
            lambda: quantize_rows(x, "int8", gate=x[:, :1, 1:]),
            lambda: quantize_rows(x, "int8", gate=x[:, 0]),
            lambda: quantize_rows(x, "int8", gate=x[:, :1].half()),
            lambda: quantize_rows(x, "int8", gate=wide[:, :1, ::2]),
        ],
        "weight": [lambda: frozen.quantize_8bit(x, "int8")],
    }
    assert_refused(refused)


def test_no_rows(path, device):
    rows, dy = quantize_rows(randn(2, 0, 8, device=device), "int8")
    assert rows.values.shape == dy.shape == (2, 0, 8) and rows.scale.shape == (2, 0)
