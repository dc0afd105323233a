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
    quantize_rows_reference,
)
from numerics import UNSET, assert_rows, bits, guarded, skip_without_fp8

KINDS = ("int8", "fp8")
# B, T, K, rotation: K odd, below and above a block of columns; T above and below a tile of rows
SHAPES = [
    (2, 5, 3, 0), (1, 5, 17, 0), (2, 17, 65, 0), (2, 2, 200, 0), (2, 2, 200, 8), (1, 2, 384, 128),
    (1, 1, 2304, 256),
]  # fmt: skip
KINDS_OF = [("int8", torch.float32), ("int8", torch.bfloat16), ("int8", torch.float16),
            ("fp8", torch.bfloat16)]  # fmt: skip


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    """Rows that an op allocates are cut out of larger memory, which must stay as it was."""
    made = []

    def empty_rows(x, kind):
        rows, check = guarded(x.shape, kind, x.device)
        made.append(check)
        return rows

    for module in (rows_8bit, gelu, norm_modulate):
        monkeypatch.setattr(module, "empty_rows", empty_rows)
    yield
    for check in made:
        check()


def draw(*shape, seed=0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def tokens(B, T, K, dtype, device, seed=0):
    """[B, T, K] in the wider rows of a longer tensor: rows of very different sizes, one of zeros,
    one that is denormal in fp32 and bf16, and one near the largest fp16."""
    x = draw(B, T + 3, K + 5, seed=seed)
    sizes = torch.randint(-4, 3, (B, T + 3, 1), generator=torch.Generator().manual_seed(seed))
    x *= 10.0**sizes
    x[0, 2] = 0.0
    if T > 2:
        x[-1, 3], x[-1, 4] = 1e-40, x[-1, 4].sign() * 6e4
    return x.to(device, dtype)[:, 2 : T + 2, 1 : K + 1]


def assert_same(found, expected):
    """Bit for bit, NaN beside NaN. (A GPU's compiler may fuse other products and sums where rows
    are written too: within two units of the dtype there.)"""
    unit = 0.0 if found.device.type == "cpu" else 2 * torch.finfo(expected.dtype).eps
    kept = expected[expected.isfinite()].abs()
    atol = unit * float(kept.max()) if kept.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=unit, atol=atol, equal_nan=True)


def assert_same_sums(found, expected):
    """fp32 sums of the same products: some CPUs' BLAS adds them in an order that depends on the
    block's shape. Errors of 32 units of the largest sum are allowed; other types are exact.
    """
    if found.dtype != torch.float32:
        return assert_same(found, expected)
    finite = expected[expected.isfinite()].abs()
    atol = 32 * torch.finfo(torch.float32).eps * (float(finite.max()) if finite.numel() else 0.0)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=atol, equal_nan=True)


# ---------------------------------------------------------------- what writes rows
# (x, kind, rotation) -> [(rows, what they must be the rows of)]


def by_quantize(x, kind, rotation):
    rows, same = quantize_rows(x, kind, rotation=rotation)
    assert same is x
    return [(rows, x)]


def by_quantize_of_a_channel(x, kind, rotation):
    channel = draw(x.shape[-1], seed=1, device=x.device)
    rows, _ = quantize_rows(x, kind, channel, rotation)
    return [(rows, x.float() * channel)]


def by_gate(x, kind, rotation):
    gate = draw(len(x), 1, 3 * x.shape[-1], seed=2, device=x.device, dtype=x.dtype).chunk(3, -1)[1]
    channel = draw(x.shape[-1], seed=1, device=x.device)
    rows, dy = quantize_rows(x, kind, channel, rotation, gate)
    assert dy.is_contiguous() and torch.equal(bits(dy), bits(x * gate))
    return [(rows, dy.float() * channel)]


def by_norm_modulate(x, kind, rotation):
    """Of rows far from zero: what lies past their end is (0 - mean) · rstd, if it is not masked."""
    x = x + 4 * x.abs().amax(-1, keepdim=True).nan_to_num(0.0, 0.0)
    shift, scale = draw(2, len(x), 1, x.shape[-1], seed=3, device=x.device, dtype=x.dtype)
    out, mean, rstd, rows = norm_modulate.norm_modulate_forward(x, shift, scale, kind, rotation)
    assert torch.equal(
        bits(out), bits(norm_modulate.norm_modulate_recompute(x, shift, scale, mean, rstd))
    )
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
    a = draw(40, x.shape[2] + other.shape[2], seed=6, device=x.device)
    made = []
    plain = gemm_grads.lora_down([x, other], a)
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
        made += [(rows[i], xs[i]) for i in wanted]
    return made


def by_d_down(x, kind, rotation):
    """Of dY · channel of both gradients, with three A, one of which nothing feeds."""
    first = tokens(*x.shape[:2], 30, x.dtype, x.device, seed=5)
    N = 30 + x.shape[2]
    channel = draw(N, seed=7, device=x.device)
    b, parts = draw(N - 1, 20, seed=6, device=x.device), [0, 29, 2, 30, N, 0]
    rows, checks = zip(*(guarded(v.shape, kind, x.device) for v in (first, x)), strict=True)
    given = {"rows": list(rows), "channel": channel}
    update = LoRAUpdate(x.new_empty(3 * 20, 1), b, parts, 0.5)
    d_down = gemm_grads.lora_d_down([first, x], update, **given)
    plain = gemm_grads.lora_d_down([first, x], update)
    assert_same_sums(d_down, plain)
    for check in checks:
        check()
    return [(rows[0], first.float() * channel[:30]), (rows[1], x.float() * channel[30:])]


PRODUCERS = [
    by_quantize, by_quantize_of_a_channel, by_gate, by_norm_modulate, by_gelu,
    by_gelu_that_saves_8_bits, by_down, by_d_down,
]  # fmt: skip


@pytest.mark.grid(1)
@pytest.mark.parametrize(("kind", "dtype"), KINDS_OF)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_rows_are_the_formulas(device, producer, kind, dtype):
    skip_without_fp8(kind, device)
    for B, T, K, rotation in SHAPES:
        rotation = rotation if producer is not by_d_down else 0  # which is never rotated
        for rows, v in producer(tokens(B, T, K, dtype, device), kind, rotation):
            v = hadamard_reference(v.float(), rotation) if rotation else v.float()
            assert_rows(f"{producer.__name__} {(B, T, K, rotation)}", rows, v, kind)


@pytest.mark.grid(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_nan_or_infinity_makes_its_rows_scale_nan_and_no_other(device, producer, kind):
    skip_without_fp8(kind, device)
    for K, rotation in ((65, 0), (256, 256)):
        rotation = rotation if producer is not by_d_down else 0
        x = draw(2, 3, K, device=device)
        clean = producer(x, kind, rotation)
        for token, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
            x[1, token, 31 * token] = bad
        seen = 0
        for (rows, v), (expected, _) in zip(producer(x, kind, rotation), clean, strict=True):
            other = v.isfinite().all(-1)
            assert other[0].all() and other[1].all() == other[1].any()  # all three, or not of x
            seen += not other[1].any()
            assert rows.scale[~other].isnan().all()
            assert torch.equal(rows.scale[other], expected.scale[other])
            assert torch.equal(bits(rows.values)[other], bits(expected.values)[other])
        assert seen


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
    x = draw(2, 9, 300, device=device) * 10.0 ** torch.arange(-20, 25, 5, device=device)[:, None]
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpp_and_torch_agree_in_every_bit(dtype):
    for B, T, K, _ in SHAPES:
        x, channel = tokens(B, T, K, dtype, "cpu"), draw(K, seed=1)
        for given in (None, channel, torch.full((K,), 1e-20), torch.full((K,), 1e20)):
            v = x.float() if given is None else x.float() * given
            assert_rows("int8", quantize_rows_reference(x, "int8", given), v, "int8")


# ---------------------------------------------------------------- 8-bit products on a CPU


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
    x, wide = draw(2, 3, 96), draw(2, 3, 192)
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
    for name, calls in refused.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"^{name} must be"):
                call()


def test_no_rows(path, device):
    rows, dy = quantize_rows(draw(2, 0, 8, device=device), "int8")
    assert rows.values.shape == dy.shape == (2, 0, 8) and rows.scale.shape == (2, 0)
