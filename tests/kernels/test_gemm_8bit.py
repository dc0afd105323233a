"""The 8-bit product against exact sums: int64 or fp64 of the given values and scales."""

from dataclasses import dataclass, replace

import pytest
import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.gemm.eight_bit import MOST, gemm_8bit, gemm_8bit_dx
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate
from fluxfast_kernels.quant import frozen
from fluxfast_kernels.quant.frozen import QuantizedWeight
from fluxfast_kernels.quant.nf4 import nf4_quantize
from fluxfast_kernels.quant.rows import DTYPE, QuantizedRows
from numerics import bits, skip_without_fp8

KINDS = ("int8", "fp8")
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Case:
    """A linear K -> N over [B, T] tokens, its input cut at `cut`, its output at `split`."""

    K: int = 96
    N: int = 144
    B: int = 2
    T: int = 37
    rank: int = 16
    parts: tuple[int, ...] = ()
    cut: int = 0
    split: int = 0
    nf4: bool = False
    gate: bool = False
    lora: bool = True
    bias: bool = True


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
    "nf4": Case(nf4=True, K=192, T=5, parts=(0, 100, 1, 100, 144, 0)),
    "nf4, two inputs and outputs": Case(nf4=True, K=192, cut=128, T=20, N=130, split=65, gate=True),
}
# all in fp32, which hides least; in other dtypes and e4m3 those whose names say the most
DRAWN = [(name, "int8", torch.float32) for name in CASES] + [
    (name, kind, dtype)
    for name in CASES
    if "two" in name or "odd" in name
    for kind, dtype in (("int8", torch.bfloat16), ("int8", torch.float16), ("fp8", torch.float32))
]


class Linear:
    """A random case: values, scales, and what they are multiplied with."""

    def __init__(self, case: Case, kind: str, dtype: torch.dtype, device: str):
        self.case, self.kind, self.dtype, self.device = case, kind, dtype, device
        self.generator = torch.Generator().manual_seed(0)
        K, N, B, T, rank = case.K, case.N, case.B, case.T, case.rank
        self.inputs = [case.cut, K - case.cut] if case.cut else [K]
        self.outputs = [case.split, N - case.split] if case.split else [N]
        self.rows = [self.draw_rows(width) for width in self.inputs]
        self.d_rows = [self.draw_rows(width) for width in self.outputs]
        if case.nf4:
            stored = nf4_quantize(self.normal(N, K).cpu())
            parts = [part.to(device) for part in stored.tensors().values()]
            self.weight = frozen.nf4_with_scales(parts, N, K, kind)
            self.values = frozen.nf4_to_8bit_reference(self.weight.values, kind).values
        else:
            self.values = self.draw_values(N, K)
            self.weight = QuantizedWeight(self.values, self.positive(N))
        self.parts = list(case.parts or (0, N, 0))
        parts = list(zip(self.parts[::3], self.parts[1::3], self.parts[2::3], strict=True))
        indices, fed = 1 + max(self.parts[2::3]), sum(end - start for start, end, _ in parts)
        self.scale = 0.7
        self.down = self.a = self.b = self.bias = self.gate = self.residual = None
        if case.lora:
            size = K**0.5 * 0.02
            self.down = self.normal(B * T, indices * rank).mul(size).to(dtype)
            self.a, self.b = self.normal(indices * rank, K), self.normal(fed, rank)
        if case.bias:
            self.bias = self.normal(N).to(dtype)
        if case.gate:
            self.gate = self.normal(B, 1, 3 * N).to(dtype).chunk(3, -1)[1]
            self.residual = self.normal(B, T + 2, N + 3).to(dtype)[:, 2:, 3:]
        self.slices, row = [], 0
        for start, end, index in parts:
            columns = slice(index * rank, (index + 1) * rank)
            self.slices.append((slice(start, end), slice(row, row + end - start), columns))
            row += end - start

    @property
    def update(self):
        return self.b if self.b is None else LoRAUpdate(self.a, self.b, self.parts, self.scale)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def positive(self, *shape):
        return (torch.rand(*shape, generator=self.generator) * 0.02 + 1e-3).to(self.device)

    def draw_values(self, *shape):
        if self.kind == "int8":
            values = torch.randint(-127, 128, shape, generator=self.generator, dtype=torch.int8)
        else:
            values = torch.randn(*shape, generator=self.generator).mul(100).to(DTYPE["fp8"])
        return values.to(self.device)

    def draw_rows(self, width):
        shape = (self.case.B, self.case.T)
        return QuantizedRows(self.draw_values(*shape, width), self.positive(*shape))


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
    leading one and cut the rest off, once in 32 products."""
    if kind == "int8":
        return ends * 2**-24
    if device == "cpu":
        return magnitudes * (width * 2**-24)
    return magnitudes * ((width / 32 + 2) * 2**-13)


def bound(linear: Linear, truth, sum_off, magnitude):
    """sum_off, then R + 8 fp32 roundings (scales, the rank's sum, bias, gate, residual) of at most
    `magnitude`, then one of the result: with the last two together at most a unit in the last
    place. A GPU's 16-bit products also cut off below fp32: 4 times."""
    roundings = (linear.case.rank * linear.case.lora + 8) * (1 if linear.device == "cpu" else 4)
    tiny = 2.0**-25 if linear.dtype == torch.float16 else 0.0
    return sum_off + roundings * 2**-24 * magnitude + HALF_ULP[linear.dtype] * truth.abs() + tiny


def forward_truth(linear: Linear):
    """-> y fp64, and how far from it a result may be."""
    w = linear.weight.scale.double()
    y, magnitudes, ends = sums(linear.rows, linear.values.double().T, linear.inputs)
    off = sum_error(linear.kind, linear.case.K, linear.device, magnitudes, ends) * w
    y, ends = y * w, ends * w
    magnitude = ends.clone()
    if linear.down is not None:
        up = (linear.b * linear.scale).to(linear.dtype).double()
        down = linear.down.double().view(linear.case.B, linear.case.T, -1)
        for columns, rows, ranks in linear.slices:
            y[..., columns] += down[..., ranks] @ up[rows].T
            magnitude[..., columns] += down[..., ranks].abs() @ up[rows].abs().T
    if linear.bias is not None:
        y, magnitude = y + linear.bias.double(), magnitude + linear.bias.double().abs()
    if linear.gate is not None:
        gate, residual = linear.gate.double(), linear.residual.double()
        y, off = residual + gate * y, off * gate.abs()
        magnitude = residual.abs() + gate.abs() * magnitude
    return y, bound(linear, y, off, magnitude)


def dx_truth(linear: Linear, d_down):
    dx, magnitudes, ends = sums(linear.d_rows, linear.values.double(), linear.outputs)
    off = sum_error(linear.kind, linear.case.N, linear.device, magnitudes, ends)
    magnitude = ends.clone()
    if d_down is not None:
        a = linear.a.to(linear.dtype).double()
        shape = (linear.case.B, linear.case.T, -1)
        dx += (d_down.double() @ a).view(shape)
        magnitude += (d_down.double().abs() @ a.abs()).view(shape)
    return dx, bound(linear, dx, off, magnitude)


def poisoned_outputs(linear: Linear, widths, dtype=None):
    """Column and token ranges of NaN, and a check that what is around them stays NaN."""
    B, T, dtype = linear.case.B, linear.case.T, dtype or linear.dtype
    wide = [
        torch.full((B, T + 2, n + 7), torch.nan, dtype=dtype, device=linear.device) for n in widths
    ]
    outs = [each[:, 1:-1, 3:-4] for each in wide]

    def check():
        for each, out in zip(wide, outs, strict=True):
            out.zero_()
            assert int(each.isnan().sum()) == each.numel() - out.numel()

    return outs, check


def forward(linear: Linear, tile=None, weight=None):
    outs, check = poisoned_outputs(linear, linear.outputs)
    epilogue = Epilogue(linear.gate, linear.residual, linear.case.split)
    after = (linear.bias, linear.down, linear.update, epilogue, outs, tile)
    made = gemm_8bit(linear.rows, weight or linear.weight, linear.dtype, *after)
    assert all(y.data_ptr() == out.data_ptr() for y, out in zip(made, outs, strict=True))
    y = torch.cat(outs, -1)
    check()
    return y


def in_8_bits(linear: Linear):
    return QuantizedWeight(linear.values, linear.weight.scale)


def towards_x(linear: Linear, tile=None, way="as stored", dtype=None):
    """dx by one of three: the weight as it is stored (NF4 too), in 8 bits, in 8 bits transposed."""
    outs, check = poisoned_outputs(linear, linear.inputs, dtype)
    weight = linear.weight if way == "as stored" else in_8_bits(linear)
    if way == "transposed":
        weight = weight._replace(values=linear.values.T.contiguous(), transposed=True)
    update = (d_down(linear), linear.a, linear.inputs)
    gemm_8bit_dx(linear.d_rows, weight, *update, dtype or linear.dtype, linear.dtype, outs, tile)
    dx = torch.cat(outs, -1)
    check()
    return dx


def d_down(linear: Linear):
    return None if linear.down is None else linear.down.flip(0).contiguous()


def assert_within(found, truth, allowed):
    over = ((found.double() - truth).abs() / allowed.clamp(min=1e-300)).max()
    assert over <= 1, f"{float(over):.2f} times what the roundings allow"


@pytest.mark.grid(1)
@pytest.mark.parametrize(("name", "kind", "dtype"), DRAWN)
def test_both_products_are_the_exact_sums_rounded(device, name, kind, dtype):
    skip_without_fp8(kind, device)
    linear = Linear(CASES[name], kind, dtype, device)
    assert_within(forward(linear), *forward_truth(linear))
    truth = dx_truth(linear, d_down(linear))
    found = {way: towards_x(linear, way=way) for way in ("as stored", "8 bits", "transposed")}
    for dx in found.values():
        assert_within(dx, *truth)
    if kind == "int8":  # the sums of e4m3 may run in another order
        assert torch.equal(bits(found["8 bits"]), bits(found["transposed"]))
        assert torch.equal(bits(found["8 bits"]), bits(found["as stored"]))
    if linear.case.nf4:
        converted = forward(linear, weight=in_8_bits(linear))
        if kind == "int8":
            assert torch.equal(bits(converted), bits(forward(linear)))
        assert_within(converted, *forward_truth(linear))


def test_dx_may_stay_in_fp32_over_a_16_bit_update(device):
    """As a rotated layer asks for it: A and d_down multiply in bf16, the sum is not rounded."""
    linear = Linear(CASES["odd everywhere"], "int8", torch.bfloat16, device)
    truth, _ = dx_truth(linear, d_down(linear))
    found = towards_x(linear, dtype=torch.float32)
    assert found.dtype == torch.float32
    assert float((found - truth).norm() / truth.norm()) < 1e-6


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


def test_small_sums_are_whole_numbers(device):
    """Scales of 1 and sums below 2^24: fp32 has no rounding to hide behind, in any tile."""
    case = Case(K=130, N=70, T=34, cut=65, split=33, lora=False, bias=False)
    linear = Linear(case, "int8", torch.float32, device)
    for row in (*linear.rows, *linear.d_rows):
        row.scale.fill_(1.0)
    linear.weight.scale.fill_(1.0)
    y, dx = forward_truth(linear)[0].float(), dx_truth(linear, None)[0].float()
    for tile in dispatch.shipped("gemm_8bit", "dense", "int8"):
        assert torch.equal(forward(linear, tile), y), tile
    for tile in dispatch.shipped("gemm_8bit_dx_pair", "dense", "int8"):
        assert torch.equal(towards_x(linear, tile), dx), tile
        assert torch.equal(towards_x(linear, tile, "transposed"), dx), tile


@pytest.mark.grid(1)
@pytest.mark.parametrize("storage", dispatch.STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_shipped_tile(device, kind, storage):
    skip_without_fp8(kind, device)
    case = Case(K=128, N=150, T=33, cut=64, split=50, rank=4, nf4=storage == "nf4")
    linear = Linear(case, kind, torch.bfloat16, device)
    y, dx = forward_truth(linear), dx_truth(linear, d_down(linear))
    for tile in dispatch.shipped("gemm_8bit", storage, kind):
        assert_within(forward(linear, tile), *y)
    for tile in dispatch.shipped("gemm_8bit_dx_pair", storage, kind):
        assert_within(towards_x(linear, tile), *dx)
    alone = Linear(replace(case, cut=0, split=0), kind, torch.bfloat16, device)
    dx = dx_truth(alone, d_down(alone))
    for tile in dispatch.shipped("gemm_8bit_dx", storage, kind):
        assert_within(towards_x(alone, tile), *dx)


def test_values_that_are_nan_stay_in_their_row_and_column(device):
    """e4m3 has NaN, as a row's values are where its scale is. What follows a row's end must be kept
    out of both operands: 0 · NaN is NaN."""
    skip_without_fp8("fp8", device)
    linear = Linear(CASES["odd everywhere"], "fp8", torch.float32, device)
    y, dx = forward(linear), towards_x(linear)
    for row in (*linear.rows, *linear.d_rows):
        row.values[1, 1] = torch.nan
    dx[1, 1] = torch.nan
    for way in ("as stored", "transposed"):
        torch.testing.assert_close(towards_x(linear, way=way), dx, equal_nan=True)
    linear.values[7] = torch.nan
    y[1, 1] = y[..., 7] = torch.nan
    torch.testing.assert_close(forward(linear), y, equal_nan=True)


def test_two_runs_are_equal(device):
    linear = Linear(CASES["nf4, two inputs and outputs"], "int8", torch.bfloat16, device)
    assert torch.equal(forward(linear), forward(linear))
    assert torch.equal(towards_x(linear), towards_x(linear))


def test_no_rows(device):
    linear = Linear(Case(T=0), "int8", torch.float32, device)
    assert forward(linear).shape == (2, 0, 144) and towards_x(linear).shape == (2, 0, 96)


def test_refusals(device):
    linear = Linear(Case(gate=True, T=5), "int8", torch.float32, device)
    square = Case(nf4=True, K=192, N=192, T=5, lora=False)
    nf4 = Linear(square, "int8", torch.float32, device)
    (row,), w, scale, bias = linear.rows, linear.values, linear.weight.scale, linear.bias
    (d_row,), a, down = linear.d_rows, linear.a, linear.down
    fp8 = QuantizedRows(row.values.float().to(DTYPE["fp8"]), row.scale)
    long = torch.zeros(1, 1, MOST + 1, dtype=torch.int8, device=device)
    long = QuantizedRows(long, long[..., 0].float())

    def y(rows=(row,), weight=w, scale=scale, bias=bias, down=down, b=linear.b, out=None, **more):
        update = None if b is None else LoRAUpdate(a, b, more.pop("parts", linear.parts))
        weight = QuantizedWeight(weight, scale, more.pop("inverse", None))
        gated = {"gate": linear.gate, "residual": linear.residual} | more
        given = (weight, torch.float32, bias, down, update, Epilogue(**gated), out)
        return gemm_8bit(list(rows), *given)

    def dx(rows=(d_row,), weight=w, down=down, a=a, widths=(96,), **more):
        weight = QuantizedWeight(weight, scale, **more)
        return gemm_8bit_dx(list(rows), weight, down, a, list(widths), torch.float32)

    cut = QuantizedRows(nf4.rows[0].values[..., :100].contiguous(), nf4.rows[0].scale)
    rest = QuantizedRows(nf4.rows[0].values[..., 100:].contiguous(), nf4.rows[0].scale)
    plain = {"gate": None, "residual": None}
    transposed_nf4 = {"transposed": True, "inverse": nf4.weight.inverse}
    refused = {
        "rows": [
            lambda: y(rows=(row, row, row)),
            lambda: y(rows=(row, row)),
            lambda: y(rows=(QuantizedRows(row.values.int(), row.scale),)),
            lambda: y(rows=(QuantizedRows(row.values[0], row.scale[0]),)),
            lambda: y(rows=(QuantizedRows(row.values.mT.contiguous().mT, row.scale),)),
            lambda: y(rows=(QuantizedRows(row.values[..., :95], row.scale),)),
            lambda: y(rows=(row, fp8)),
            lambda: y(rows=(QuantizedRows(row.values, row.scale.double()),)),
            lambda: y(rows=(QuantizedRows(row.values, row.scale[:, 1:]),)),
            lambda: y(rows=(QuantizedRows(row.values, row.scale.mT.contiguous().mT),)),
            lambda: y((long,), long.values[0], long.scale[0], None, None, None, **plain),
            lambda: dx((long,), long.values[0].T.contiguous(), None, None, (1,)),
            lambda: y((cut, rest), *nf4.weight[:2], inverse=nf4.weight.inverse, **plain),
        ],
        "weight": [
            lambda: y(rows=(fp8,)),
            lambda: y(weight=w.T.contiguous().T),
            lambda: y(weight=w.float()),
            lambda: dx(weight=w[1:]),
            lambda: dx(weight=w, transposed=True),
        ],
        "weight (scale)": [
            lambda: y(scale=scale[1:]),
            lambda: y(scale=scale.half()),
            lambda: y(scale=scale.repeat(2)[::2]),
        ],
        "inverse": [lambda: y(nf4.rows, *nf4.weight[:2])],
        "bias": [lambda: y(bias=bias[1:])],
        "down": [lambda: y(down=None), lambda: y(down=down[:, 1:]), lambda: y(down=down[1:])],
        "lora_b": [lambda: y(b=linear.b[1:])],
        "parts": [lambda: y(parts=[0, 145, 0])],
        "split": [lambda: y(split=144)],
        "gate": [lambda: y(gate=bias)],
        "residual": [lambda: y(residual=linear.residual[:, 1:])],
        "out": [lambda: y(out=[linear.residual[..., 1:]]), lambda: y(out=[linear.residual.half()])],
        "widths": [lambda: dx(widths=(32, 32, 32)), lambda: dx(widths=(96, 0))],
        "d_down": [lambda: dx(down=None), lambda: dx(down=down[1:])],
        "lora_a": [lambda: dx(a=a[:, 1:]), lambda: dx(a=a.T.contiguous().T)],
        "transposed": [
            lambda: dx(nf4.d_rows, nf4.weight.values, None, None, (192,), **transposed_nf4)
        ],
    }
    for name, calls in refused.items():
        for index, call in enumerate(calls):
            with pytest.raises(ValueError) as raised:
                call()
            assert str(raised.value).startswith(name), (name, index, str(raised.value))
