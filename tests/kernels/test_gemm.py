"""The linear's kernels and their gradients against fp64, in every compute dtype."""

from dataclasses import dataclass

import pytest
import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.gemm.dense import lora_gemm, lora_gemm_dx
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate
from fluxfast_kernels.gemm.grads import lora_d_down, lora_da, lora_db, lora_down
from fluxfast_kernels.quant.frozen import FrozenWeight
from fluxfast_kernels.quant.nf4 import nf4_dequantize, nf4_quantize
from numerics import assert_as_exact, poisoned


@dataclass(frozen=True)
class Case:
    """A linear: x [B, T, K] (a slice of T + 3 tokens), cut at `cut`, y cut at `split`."""

    K: int = 96
    N: int = 144
    B: int = 2
    T: int = 37
    rank: int = 16
    parts: tuple[int, ...] = ()
    cut: int = 0
    split: int = 0
    storage: str = "dense"
    gate: bool = False
    lora: bool = True
    bias: bool = True


CASES = {
    "whole": Case(),
    "rank 1, parts that straddle tiles": Case(rank=1, parts=(0, 70, 1, 100, 144, 0), N=200),
    "rank 4, one A twice": Case(rank=4, parts=(0, 64, 0, 64, 128, 1, 128, 150, 0), N=150),
    "rank 128": Case(rank=128, T=9),
    "two inputs, two outputs": Case(K=100, cut=36, N=200, split=72, parts=(0, 100, 0, 100, 200, 1)),
    "gate and residual": Case(gate=True, bias=False, T=130, K=32, N=40),
    "no LoRA": Case(lora=False, T=1),
    "nf4": Case(storage="nf4", K=192, parts=(0, 100, 1, 100, 144, 0)),
    "nf4 nested, all at once": Case(
        storage="nested", K=192, cut=128, split=33, gate=True, rank=4, parts=(16, 144, 0), T=20
    ),
    "nf4 nested, stacked": Case(storage="stacked", K=256, N=256, T=5),
    "K = 15360": Case(K=15360, N=17, B=1, T=3),
}
# under the interpreter the longest K takes seconds: its gradients in one dtype
BACKWARD = [(n, d) for n in CASES for d in DTYPES if n != "K = 15360" or d == torch.bfloat16]
STORED = [case for case in CASES.values() if case.storage != "dense"]


@dataclass
class Linear:
    """A drawn case: what the kernels take, and the dense fp32 or rounded weight."""

    case: Case
    xs: list[torch.Tensor]
    dys: list[torch.Tensor]
    weight: list[torch.Tensor]
    dense: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    parts: list[int]
    gate: torch.Tensor | None
    residual: torch.Tensor | None
    scale: float = 0.75

    @property
    def update(self) -> LoRAUpdate | None:
        return self.a if self.a is None else LoRAUpdate(self.a, self.b, self.parts, self.scale)

    @property
    def frozen(self) -> FrozenWeight:
        return FrozenWeight(self.weight, self.bias)


def cut(tensor, at):
    return [tensor[..., :at], tensor[..., at:]] if at else [tensor]


def draw(case: Case, dtype: torch.dtype, device: str) -> Linear:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, of=torch.float32):
        return torch.randn(*shape, generator=generator).to(device, of)

    K, N, B, T = case.K, case.N, case.B, case.T
    x = normal(B, T + 3, K, of=dtype)[:, 3:]
    w = normal(N, K) / K**0.5
    if case.storage == "dense":
        weight = [w.to(dtype)]
        dense = weight[0]
    elif case.storage == "stacked":  # rows of two files, each with its own offset
        halves = [nf4_quantize(half, nested=True) for half in w.chunk(2)]
        names = ("packed", "absmax", "nested_absmax")
        weight = [torch.cat([getattr(half, name) for half in halves]) for name in names]
        counts = [half.nested_absmax.numel() for half in halves]
        offsets = zip(halves, counts, strict=True)
        weight.append(torch.cat([half.offset.expand(count) for half, count in offsets]))
        dense = torch.cat([nf4_dequantize(half) for half in halves])
    else:
        stored = nf4_quantize(w, nested=case.storage == "nested")
        weight, dense = list(stored.tensors().values()), nf4_dequantize(stored)
    parts = list(case.parts or (0, N, 0))
    rows = sum(end - start for start, end in zip(parts[::3], parts[1::3], strict=True))
    index = max(parts[2::3]) + 1
    return Linear(
        case,
        cut(x, case.cut),
        cut(normal(B, T, N, of=dtype), case.split),
        weight,
        dense,
        normal(N, of=dtype) if case.bias else None,
        normal(index * case.rank, K) / K**0.5 if case.lora else None,
        normal(rows, case.rank) if case.lora else None,
        parts,
        normal(B, 1, N, of=dtype) if case.gate else None,
        normal(B, T + 2, N, of=dtype)[:, 2:] if case.gate else None,
    )


def slices(linear):
    row, rank = 0, linear.case.rank
    for start, end, index in zip(*(linear.parts[i::3] for i in range(3)), strict=True):
        b_rows = slice(row, row + end - start)
        yield slice(start, end), b_rows, slice(index * rank, (index + 1) * rank)
        row += end - start


def plain_forward(linear, dtype):
    """Torch's own, in `dtype`: y."""
    x = torch.cat(linear.xs, -1).to(dtype)
    bias = None if linear.bias is None else linear.bias.to(dtype)
    y = torch.nn.functional.linear(x, linear.dense.to(dtype), bias)
    if linear.a is not None:
        down = x @ linear.a.to(dtype).T
        for rows, b_rows, columns in slices(linear):
            y[..., rows] += linear.scale * (down[..., columns] @ linear.b[b_rows].to(dtype).T)
    if linear.gate is not None:
        y = linear.residual.to(dtype) + linear.gate.to(dtype) * y
    return y


def plain_backward(linear, dtype):
    """Torch's own, in `dtype`: {"dx", "da", "db", "down", "d_down"}."""
    x = torch.cat(linear.xs, -1).to(dtype)
    dy = torch.cat(linear.dys, -1).to(dtype)
    dx = dy @ linear.dense.to(dtype)
    if linear.a is None:
        return {"dx": dx}
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    a, b = linear.a.to(dtype), linear.b.to(dtype)
    down = x @ a.T
    d_down, db = torch.zeros_like(down), torch.empty_like(b)
    for rows, b_rows, columns in slices(linear):
        d_down[:, columns] += linear.scale * (dy[:, rows] @ b[b_rows])
        db[b_rows] = linear.scale * (dy[:, rows].T @ down[:, columns])
    dx = dx + (d_down @ a).view(dx.shape)
    return {"dx": dx, "da": d_down.T @ x, "db": db, "down": down, "d_down": d_down}


def forward(linear, tile=None):
    """y by the kernels, into outputs full of NaN."""
    case, like = linear.case, {"dtype": linear.xs[0].dtype, "device": linear.xs[0].device}
    down = None
    if linear.a is not None:
        down = lora_down(linear.xs, linear.a, poisoned(case.B * case.T, linear.a.shape[0], **like))
    widths = [case.split, case.N - case.split] if case.split else [case.N]
    out = [poisoned(case.B, case.T, width, **like) for width in widths]
    epilogue = Epilogue(linear.gate, linear.residual, case.split)
    lora_gemm(linear.xs, linear.frozen, down, linear.update, epilogue, out, tile)
    return torch.cat(out, -1)


def backward(linear, tile=None):
    """As `plain_backward`, by the kernels, into outputs full of NaN."""
    case, like = linear.case, {"dtype": linear.xs[0].dtype, "device": linear.xs[0].device}
    widths = [x.shape[-1] for x in linear.xs]
    dxs = [poisoned(case.B, case.T, width, **like) for width in widths]
    if linear.a is None:
        lora_gemm_dx(linear.dys, linear.frozen, None, None, widths, dxs, tile)
        return {"dx": torch.cat(dxs, -1)}
    down = lora_down(linear.xs, linear.a)
    d_down = poisoned(*down.shape, **like)
    lora_d_down(linear.dys, linear.update, d_down)
    lora_gemm_dx(linear.dys, linear.frozen, d_down, linear.a, widths, dxs, tile)
    like["dtype"] = torch.float32
    da, db = poisoned(*linear.a.shape, **like), poisoned(*linear.b.shape, **like)
    lora_da(linear.xs, d_down, da)
    lora_db(linear.dys, down, linear.update, db)
    return {"dx": torch.cat(dxs, -1), "da": da, "db": db, "down": down, "d_down": d_down}


def check_backward(linear, found):
    dtype = linear.xs[0].dtype
    eager, truth = plain_backward(linear, dtype), plain_backward(linear, torch.float64)
    for name, value in found.items():
        # da and db come in fp32 from products of `dtype`: judged as that
        assert_as_exact(name, value.to(dtype), eager[name], truth[name])


@pytest.mark.grid(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_forward(device, name, dtype):
    linear = draw(CASES[name], dtype, device)
    eager, truth = plain_forward(linear, dtype), plain_forward(linear, torch.float64)
    assert_as_exact("y", forward(linear), eager, truth)


@pytest.mark.grid(1)
@pytest.mark.parametrize(("name", "dtype"), BACKWARD)
def test_backward(device, name, dtype):
    linear = draw(CASES[name], dtype, device)
    check_backward(linear, backward(linear))


@pytest.mark.slow
@pytest.mark.parametrize("case", STORED, ids=lambda case: case.storage)
def test_the_weight_is_dequantized_bit_for_bit(device, case):
    """Times the unit matrix, both ways, in fp32: the dequantized weight and nothing else."""
    linear = draw(case, torch.float32, device)
    unit = torch.eye(case.K, device=device)[None]
    (y,) = lora_gemm([unit], FrozenWeight(linear.weight))
    assert torch.equal(y[0].T, linear.dense)
    unit = torch.eye(case.N, device=device)[None]
    (dx,) = lora_gemm_dx([unit], linear.frozen, None, None, [case.K])
    assert torch.equal(dx[0], linear.dense)


@pytest.mark.parametrize("storage", dispatch.STORAGES)
def test_every_shipped_tile(device, storage):
    linear = draw(Case(K=128, N=150, T=33, storage=storage), torch.bfloat16, device)
    eager, truth = (plain_forward(linear, dtype) for dtype in (torch.bfloat16, torch.float64))
    for tile in dispatch.shipped("lora_gemm", storage, "half"):
        assert_as_exact(str(tile), forward(linear, tile), eager, truth)
    for tile in dispatch.shipped("lora_gemm_dx", storage, "half"):
        check_backward(linear, backward(linear, tile))


def test_sums_over_cut_rows(device):
    """More rows than one program takes: ranges of M, added in order."""
    linear = draw(Case(K=64, N=64, B=2, T=300, rank=4), torch.bfloat16, device)
    d_down = lora_d_down(linear.dys, linear.update)
    once = dispatch.Tile(64, 16, 64, 1, 4, 2)
    cut = dispatch.Tile(16, 16, 64, 256, 4, 2)
    whole, pieces = (lora_da(linear.xs, d_down, tile=tile) for tile in (once, cut))
    truth = plain_backward(linear, torch.float64)["da"]
    eager = plain_backward(linear, torch.bfloat16)["da"]
    for found in (whole, pieces):
        assert_as_exact("da", found.bfloat16(), eager, truth)
    assert torch.equal(pieces, lora_da(linear.xs, d_down, tile=cut))


def test_an_index_no_part_names_gets_zeros(device):
    linear = draw(Case(), torch.float32, device)
    three = linear.update._replace(lora_a=linear.a.repeat(3, 1))
    found = lora_d_down(linear.dys, three)
    assert not found[:, 16:].any() and found[:, :16].any()


def test_no_rows(device):
    linear = draw(Case(), torch.float32, device)
    xs, dys = [linear.xs[0][:, :0]], [linear.dys[0][:, :0]]
    down = lora_down(xs, linear.a)
    (y,) = lora_gemm(xs, linear.frozen, down, linear.update)
    assert y.shape == (2, 0, 144)
    assert not lora_da(xs, down).any() and not lora_db(dys, down, linear.update).any()


def test_two_runs_are_equal(device):
    linear = draw(CASES["nf4 nested, all at once"], torch.bfloat16, device)
    assert torch.equal(forward(linear), forward(linear))
    first, second = backward(linear), backward(linear)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_refusals(device):
    linear = draw(Case(), torch.float32, device)
    x, (w,), bias, a, b = linear.xs[0], linear.weight, linear.bias, linear.a, linear.b
    down, parts = lora_down([x], a), linear.parts
    stored = draw(CASES["nf4"], torch.float32, device)
    nf4, x192 = stored.weight, stored.xs[0]

    def y(xs=None, weight=None, bias=bias, down=down, b=b, parts=parts, out=None, **after):
        update = None if b is None else LoRAUpdate(a, b, parts)
        frozen = FrozenWeight(weight or [w], bias)
        return lora_gemm(xs or [x], frozen, down, update, Epilogue(**after), out)

    def dx(weight=None, down=down, a=a, widths=(96,)):
        return lora_gemm_dx(linear.dys, FrozenWeight(weight or [w]), down, a, list(widths))

    refused = {
        "xs": [
            lambda: y(xs=[x.double()]),
            lambda: y(xs=[x, x, x]),
            lambda: y(xs=[x[0]]),
            lambda: y(xs=[x.mT.contiguous().mT]),
            lambda: y(xs=[x[..., :48], x[:1, :, 48:]]),
            lambda: y(xs=[x192[..., :100], x192[..., 100:]], weight=nf4, down=None, b=None),
        ],
        "weight": [
            lambda: y(weight=[w[:, :64]]),
            lambda: y(weight=[w, w, w]),
            lambda: y(weight=[w.mT.contiguous().mT]),
            lambda: y(xs=[x192], weight=[nf4[0], nf4[1][1:]]),
            lambda: y(xs=[x192], weight=[nf4[0], nf4[1].byte()]),
            lambda: dx(weight=nf4, down=None, a=None),
        ],
        "bias": [lambda: y(bias=bias[1:])],
        "down": [lambda: y(down=None), lambda: y(down=down[:, :8]), lambda: y(down=down[1:])],
        "parts": [lambda: y(parts=[0, 145, 0]), lambda: y(parts=[]), lambda: y(parts=[0, 144])],
        "lora_b": [lambda: y(b=b[1:]), lambda: y(parts=[0, 100, 0])],
        "split": [lambda: y(split=144)],
        "gate": [lambda: y(gate=bias)],
        "residual": [lambda: y(residual=x)],
        "out": [lambda: y(out=[x]), lambda: y(out=[linear.dys[0].half()])],
        "lora_a": [lambda: lora_down([x], a[:, 1:]), lambda: lora_down([x[..., 1:]], a)],
        "d_down": [
            lambda: dx(down=down[:, 1:]),
            lambda: lora_da([x], down[1:]),
        ],
        "widths": [lambda: dx(widths=(32, 32, 32))],
    }
    for name, calls in refused.items():
        for call in calls:
            with pytest.raises(ValueError, match=name):
                call()
