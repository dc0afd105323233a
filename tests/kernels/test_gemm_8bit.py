"""The 8-bit product against exact sums: int64 or fp64 of the given values and scales."""

from dataclasses import replace

import pytest
import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.gemm.eight_bit import MOST, gemm_8bit, gemm_8bit_dx
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate
from fluxfast_kernels.quant import frozen
from fluxfast_kernels.quant.frozen import QuantizedWeight
from fluxfast_kernels.quant.nf4 import nf4_quantize
from fluxfast_kernels.quant.rows import DTYPE, QuantizedRows
from gemm_cases import Case, Linear
from numerics import KINDS, assert_refused, assert_same_bits, relative_error, skip_without_fp8

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

CASES = {
    "whole": Case(),
    "odd everywhere": Case(K=97, N=51, T=3, rank=1, cut=32, split=13),
    "two inputs, two outputs, parts that straddle tiles, each with its A": Case(
        K=164, cut=36, N=200, split=72, rank=4, T=35, parts=(0, 70, 1, 100, 200, 0)
    ),
    "one A twice, the rest without": Case(rank=40, N=150, T=5, parts=(8, 64, 0, 64, 100, 0)),
    "rank 128": Case(rank=128, T=3),
    "gate and residual over two inputs": Case(gate=True, bias=False, T=40, K=64, cut=17, N=40),
    "gate, residual, bias, two outputs": Case(gate=True, T=3, N=70, split=64),
    "bias alone": Case(lora=False, T=1, K=65),
    "the product alone": Case(lora=False, bias=False, N=130, T=3),
    "nf4": Case(storage="nf4", K=192, T=5, parts=(0, 100, 1, 100, 144, 0)),
    "nf4, two inputs and outputs": Case(
        storage="nf4", K=192, cut=128, T=20, N=130, split=65, gate=True
    ),
}
# all in fp32, which hides least; in other dtypes and e4m3 those whose names say the most
DRAWN = [(name, "int8", torch.float32) for name in CASES] + [
    (name, kind, dtype)
    for name in CASES
    if "two" in name or "odd" in name
    for kind, dtype in (("int8", torch.bfloat16), ("int8", torch.float16), ("fp8", torch.float32))
]


class EightBit(Linear):
    """With random values and scales, which are multiplied, and the low-rank intermediates."""

    def __init__(self, case: Case, kind: str, dtype: torch.dtype, device: str):
        super().__init__(case, dtype, device)
        self.kind, self.down, self.d_down = kind, None, None
        self.rows = [self.random_rows(width) for width in self.inputs]
        self.d_rows = [self.random_rows(width) for width in self.outputs]
        if case.storage == "nf4":
            stored = nf4_quantize(self.normal(case.N, case.K).cpu())
            parts = [part.to(device) for part in stored.tensors().values()]
            self.weight = frozen.nf4_with_scales(parts, case.N, case.K, kind)
            self.values = frozen.nf4_to_8bit_reference(self.weight.values, kind).values
        else:
            self.values = self.random_values(case.N, case.K)
            self.weight = QuantizedWeight(self.values, self.positive(case.N))
        if self.update is not None:
            shape, size = (case.B * case.T, self.update.lora_a.shape[0]), case.K**0.5 * 0.02
            self.down, self.d_down = (self.normal(*shape).mul(size).to(dtype) for _ in range(2))

    def positive(self, *shape):
        return (torch.rand(*shape, generator=self.generator) * 0.02 + 1e-3).to(self.device)

    def random_values(self, *shape):
        if self.kind == "int8":
            values = torch.randint(-127, 128, shape, generator=self.generator, dtype=torch.int8)
        else:
            values = torch.randn(*shape, generator=self.generator).mul(100).to(DTYPE["fp8"])
        return values.to(self.device)

    def random_rows(self, width):
        shape = (self.case.B, self.case.T)
        return QuantizedRows(self.random_values(*shape, width), self.positive(*shape))

    def in_8_bits(self):
        return QuantizedWeight(self.values, self.weight.scale)


def sums(rows: list[QuantizedRows], weights, widths: list[int]):
    """Σ scale · value · weight in fp64, the same of magnitudes, and Σ |scaled sum| per input."""
    total = exact = ends = 0
    for row, weight in zip(rows, weights.split(widths), strict=True):
        part = row.values.double() @ weight * row.scale.double()[..., None]
        total, ends = total + part, ends + part.abs()
        exact = exact + row.values.double().abs() @ weight.abs() * row.scale.double()[..., None]
    return total, exact, ends


def sum_error(kind: str, width: int, device: str, magnitudes, ends):
    """By how much a sum may be off. int8: not at all, its conversion to fp32 rounds. e4m3:
    every one of `width` fp32 additions rounds; tensor cores (sm_89, sm_90) keep 13 bits behind the
    leading one and cut the rest off, once in 32 products of a step of 64; steps add up in fp32."""
    if kind == "int8":
        return ends * 2**-24
    if device == "cpu":
        return magnitudes * (width * 2**-24)
    return magnitudes * (4 * 2**-13 + (width / 64 + 1) * 2**-24)


def bound(linear: EightBit, truth, sum_off, magnitude):
    """sum_off, then R + 8 fp32 roundings (scales, the rank's sum, bias, gate, residual) of at most
    `magnitude`, then one of the result: with the last two together at most a unit in the last
    place. A GPU's 16-bit products also cut off below fp32: 4 times."""
    roundings = (linear.case.rank * linear.case.lora + 8) * (1 if linear.device == "cpu" else 4)
    tiny = 2.0**-25 if linear.dtype == torch.float16 else 0.0
    return sum_off + roundings * 2**-24 * magnitude + HALF_ULP[linear.dtype] * truth.abs() + tiny


def forward_truth(linear: EightBit):
    """y in fp64, and how far from it a result may be."""
    w = linear.weight.scale.double()
    y, magnitudes, ends = sums(linear.rows, linear.values.double().T, linear.inputs)
    off = sum_error(linear.kind, linear.case.K, linear.device, magnitudes, ends) * w
    y, ends = y * w, ends * w
    magnitude = ends.clone()
    if linear.down is not None:
        up = (linear.update.lora_b * linear.update.scale).to(linear.dtype).double()
        down = linear.down.double().view(linear.case.B, linear.case.T, -1)
        for columns, rows, ranks in linear.update.slices():
            y[..., columns] += down[..., ranks] @ up[rows].T
            magnitude[..., columns] += down[..., ranks].abs() @ up[rows].abs().T
    if linear.bias is not None:
        y, magnitude = y + linear.bias.double(), magnitude + linear.bias.double().abs()
    if linear.case.gate:
        gate, residual = linear.epilogue.gate.double(), linear.epilogue.residual.double()
        y, off = residual + gate * y, off * gate.abs()
        magnitude = residual.abs() + gate.abs() * magnitude
    return y, bound(linear, y, off, magnitude)


def dx_truth(linear: EightBit):
    """As `forward_truth`, of dx."""
    dx, magnitudes, ends = sums(linear.d_rows, linear.values.double(), linear.outputs)
    off = sum_error(linear.kind, linear.case.N, linear.device, magnitudes, ends)
    magnitude = ends.clone()
    if linear.d_down is not None:
        a, d_down = linear.update.lora_a.to(linear.dtype).double(), linear.d_down.double()
        dx += (d_down @ a).view(dx.shape)
        magnitude += (d_down.abs() @ a.abs()).view(dx.shape)
    return dx, bound(linear, dx, off, magnitude)


def forward(linear: EightBit, tile=None, weight=None):
    outs, check = linear.poisoned_outputs(linear.outputs)
    after = (linear.bias, linear.down, linear.update, linear.epilogue, outs, tile)
    ys = gemm_8bit(linear.rows, weight or linear.weight, linear.dtype, *after)
    assert all(y.data_ptr() == out.data_ptr() for y, out in zip(ys, outs, strict=True))
    y = torch.cat(outs, -1)
    check()
    return y


def towards_x(linear: EightBit, tile=None, way="as stored", dtype=None):
    """dx by one of three: the weight as it is stored (NF4 too), in 8 bits, in 8 bits transposed."""
    outs, check = linear.poisoned_outputs(linear.inputs, dtype)
    weight = linear.weight if way == "as stored" else linear.in_8_bits()
    if way == "transposed":
        weight = weight._replace(values=linear.values.T.contiguous(), transposed=True)
    lora_a = None if linear.update is None else linear.update.lora_a
    update = (linear.d_down, lora_a, linear.inputs)
    gemm_8bit_dx(linear.d_rows, weight, *update, dtype or linear.dtype, linear.dtype, outs, tile)
    dx = torch.cat(outs, -1)
    check()
    return dx


def assert_within(result, truth, allowed):
    over = ((result.double() - truth).abs() / allowed.clamp(min=1e-300)).max()
    assert over <= 1, f"{float(over):.2f} times what the roundings allow"


@pytest.mark.grid(1)
@pytest.mark.parametrize(("name", "kind", "dtype"), DRAWN)
def test_both_products_are_the_exact_sums_rounded(device, name, kind, dtype):
    skip_without_fp8(kind, device)
    linear = EightBit(CASES[name], kind, dtype, device)
    y, truth = forward(linear), dx_truth(linear)
    assert_within(y, *forward_truth(linear))
    assert_same_bits([forward(linear)], [y])
    dxs = [towards_x(linear, way=way) for way in ("as stored", "8 bits", "transposed")]
    for dx in dxs:
        assert_within(dx, *truth)
        if kind == "int8":  # the sums of e4m3 may run in another order
            assert_same_bits([dx], dxs[:1])
    if linear.case.storage == "nf4":
        converted = forward(linear, weight=linear.in_8_bits())
        if kind == "int8":
            assert_same_bits([converted], [y])
        assert_within(converted, *forward_truth(linear))


def test_dx_may_stay_in_fp32_over_a_16_bit_update(device):
    """As a rotated layer asks for it: A and d_down multiply in bf16, the sum is not rounded."""
    linear = EightBit(CASES["odd everywhere"], "int8", torch.bfloat16, device)
    truth, _ = dx_truth(linear)
    dx = towards_x(linear, dtype=torch.float32)
    assert dx.dtype == torch.float32 and relative_error(dx, truth) < 1e-6


def test_15360_columns_of_the_largest_values(device):
    """247 741 440: far above 2^24, below 2^31. The sum is exact, its conversion rounds once."""
    assert MOST * 127**2 < 2**31 <= (MOST + 1) * 127**2
    left = torch.full((4, 15360), 127, dtype=torch.int8)
    left[1] = -127
    left[2, 7], left[3, ::5] = 126, 3
    left, right = left.to(device), left[:3].clone().to(device)
    exact = (left.double() @ right.double().T).float()
    assert exact.abs().max() == 247741440
    rows = [QuantizedRows(left[None], torch.ones(1, 4, device=device))]
    tile, ones = dispatch.Tile(16, 16, 512, 1, 4, 2), torch.ones(3, device=device)
    (y,) = gemm_8bit(rows, QuantizedWeight(right, ones), torch.float32, tile=tile)
    assert torch.equal(y[0], exact)
    for values, transposed in ((right.T.contiguous(), False), (right, True)):
        weight = QuantizedWeight(values, ones, transposed=transposed)
        (dx,) = gemm_8bit_dx(rows, weight, None, None, [3], torch.float32, tile=tile)
        assert torch.equal(dx[0], exact)


@pytest.mark.parametrize("cut", [0, 96])
def test_e4m3_products_add_up_in_fp32_after_every_step(monkeypatch, cut):
    """The tensor cores' own sum, which keeps 14 bits, begins at zero in each step."""
    from triton.runtime.interpreter import InterpreterBuilder

    dot, begins = InterpreterBuilder.create_dot, []

    def record(self, a, b, total, *options):
        if a.dtype.scalar.is_fp8():
            begins.append(bool((total.data == 0).all()))
        return dot(self, a, b, total, *options)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", record)
    linear = EightBit(Case(K=192, cut=cut, T=5, lora=False), "fp8", torch.bfloat16, "cpu")
    gemm_8bit(linear.rows, linear.in_8_bits(), torch.bfloat16)
    assert len(begins) > 2 and all(begins)


def test_small_sums_are_whole_numbers(device):
    """Scales of 1 and sums below 2^24: fp32 has no rounding to hide behind, in any tile."""
    case = Case(K=130, N=70, T=34, cut=65, split=33, lora=False, bias=False)
    linear = EightBit(case, "int8", torch.float32, device)
    for row in (*linear.rows, *linear.d_rows):
        row.scale.fill_(1.0)
    linear.weight.scale.fill_(1.0)
    y, dx = forward_truth(linear)[0].float(), dx_truth(linear)[0].float()
    for tile in dispatch.shipped_to("gemm_8bit", "dense", "int8"):
        assert torch.equal(forward(linear, tile), y), tile
    for tile in dispatch.shipped_to("gemm_8bit_dx_pair", "dense", "int8"):
        assert torch.equal(towards_x(linear, tile), dx), tile
        assert torch.equal(towards_x(linear, tile, "transposed"), dx), tile


@pytest.mark.grid(1)
@pytest.mark.parametrize("storage", dispatch.STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_shipped_tile(device, kind, storage):
    skip_without_fp8(kind, device)
    case = Case(K=128, N=150, T=33, cut=64, split=50, rank=4, storage=storage)
    linear = EightBit(case, kind, torch.bfloat16, device)
    y, dx = forward_truth(linear), dx_truth(linear)
    for tile in dispatch.shipped_to("gemm_8bit", storage, kind):
        assert_within(forward(linear, tile), *y)
    for tile in dispatch.shipped_to("gemm_8bit_dx_pair", storage, kind):
        assert_within(towards_x(linear, tile), *dx)
    alone = EightBit(replace(case, cut=0, split=0), kind, torch.bfloat16, device)
    dx = dx_truth(alone)
    for tile in dispatch.shipped_to("gemm_8bit_dx", storage, kind):
        assert_within(towards_x(alone, tile), *dx)


def test_values_that_are_nan_stay_in_their_row_and_column(device):
    """e4m3 has NaN, as a row's values are where its scale is. What follows a row's end must be kept
    out of both operands: 0 · NaN is NaN."""
    skip_without_fp8("fp8", device)
    linear = EightBit(CASES["odd everywhere"], "fp8", torch.float32, device)
    y, dx = forward(linear), towards_x(linear)
    for row in (*linear.rows, *linear.d_rows):
        row.values[1, 1] = torch.nan
    dx[1, 1] = torch.nan
    for way in ("as stored", "transposed"):
        torch.testing.assert_close(towards_x(linear, way=way), dx, equal_nan=True)
    linear.values[7] = torch.nan
    y[1, 1] = y[..., 7] = torch.nan
    torch.testing.assert_close(forward(linear), y, equal_nan=True)


def test_refusals(device):
    linear = EightBit(Case(gate=True, T=5), "int8", torch.float32, device)
    square = Case(storage="nf4", K=192, N=192, T=5, lora=False)
    nf4 = EightBit(square, "int8", torch.float32, device)
    (row,), w, scale, bias = linear.rows, linear.values, linear.weight.scale, linear.bias
    (d_row,), (a, b, parts, _), down = linear.d_rows, linear.update, linear.down
    gate, residual, _ = linear.epilogue
    fp8 = QuantizedRows(row.values.float().to(DTYPE["fp8"]), row.scale)
    long = torch.zeros(1, 1, MOST + 1, dtype=torch.int8, device=device)
    long = QuantizedRows(long, long[..., 0].float())

    def with_values(values, of=row):
        return (QuantizedRows(values, of.scale),)

    def with_scale(scale):
        return (QuantizedRows(row.values, scale),)

    def y(rows=(row,), weight=w, scale=scale, bias=bias, down=down, b=b, out=None, **more):
        update = None if b is None else LoRAUpdate(a, b, more.pop("parts", parts))
        weight = QuantizedWeight(weight, scale, more.pop("inverse", None))
        epilogue = Epilogue(**({"gate": gate, "residual": residual} | more))
        return gemm_8bit(list(rows), weight, torch.float32, bias, down, update, epilogue, out)

    def dx(rows=(d_row,), weight=w, down=down, a=a, widths=(96,), **more):
        weight = QuantizedWeight(weight, scale, **more)
        return gemm_8bit_dx(list(rows), weight, down, a, list(widths), torch.float32)

    (whole,), plain = nf4.rows, {"gate": None, "residual": None}
    cut = [with_values(x.contiguous(), whole)[0] for x in whole.values.split([100, 92], -1)]
    transposed_nf4 = {"transposed": True, "inverse": nf4.weight.inverse}
    refused = {
        "rows": [
            lambda: y(rows=(row, row, row)),
            lambda: y(rows=(row, row)),
            lambda: y(rows=with_values(row.values.int())),
            lambda: y(rows=(QuantizedRows(row.values[0], row.scale[0]),)),
            lambda: y(rows=with_values(row.values.mT.contiguous().mT)),
            lambda: y(rows=with_values(row.values[..., :95])),
            lambda: y(rows=(row, fp8)),
            lambda: y(rows=with_scale(row.scale.double())),
            lambda: y(rows=with_scale(row.scale[:, 1:])),
            lambda: y(rows=with_scale(row.scale.mT.contiguous().mT)),
            lambda: y((long,), long.values[0], long.scale[0], None, None, None, **plain),
            lambda: dx((long,), long.values[0].T.contiguous(), None, None, (1,)),
            lambda: y(cut, *nf4.weight[:2], inverse=nf4.weight.inverse, **plain),
        ],
        "weight": [
            lambda: y(rows=(fp8,)),
            lambda: y(weight=w.T.contiguous().T),
            lambda: y(weight=w.float()),
            lambda: dx(weight=w[1:]),
            lambda: dx(weight=w, transposed=True),
        ],
        r"weight \(scale\)": [
            lambda: y(scale=scale[1:]),
            lambda: y(scale=scale.half()),
            lambda: y(scale=scale.repeat(2)[::2]),
        ],
        "inverse": [lambda: y(nf4.rows, *nf4.weight[:2])],
        "bias": [lambda: y(bias=bias[1:])],
        "down": [lambda: y(down=None), lambda: y(down=down[:, 1:]), lambda: y(down=down[1:])],
        "lora_b": [lambda: y(b=b[1:])],
        "parts": [lambda: y(parts=[0, 145, 0])],
        "split": [lambda: y(split=144)],
        "gate": [lambda: y(gate=bias)],
        "residual": [lambda: y(residual=residual[:, 1:])],
        "out": [lambda: y(out=[residual[..., 1:]]), lambda: y(out=[residual.half()])],
        "widths": [lambda: dx(widths=(32, 32, 32)), lambda: dx(widths=(96, 0))],
        "d_down": [lambda: dx(down=None), lambda: dx(down=down[1:])],
        "lora_a": [lambda: dx(a=a[:, 1:]), lambda: dx(a=a.T.contiguous().T)],
        "transposed": [
            lambda: dx(nf4.d_rows, nf4.weight.values, None, None, (192,), **transposed_nf4)
        ],
    }
    assert_refused(refused, "^{}")
