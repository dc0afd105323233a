"""The linear's kernels and their gradients against fp64, in every compute dtype."""

from functools import partial

import pytest
import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.gemm.dense import lora_gemm, lora_gemm_dx
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate
from fluxfast_kernels.gemm.grads import lora_d_down, lora_da, lora_db, lora_down
from fluxfast_kernels.ops.lora_linear import lora_linear_reference
from fluxfast_kernels.quant.frozen import FrozenWeight
from fluxfast_kernels.quant.nf4 import nf4_dequantize, nf4_quantize
from gemm_cases import Case, Linear
from numerics import assert_as_exact, assert_refused, assert_same_bits, poisoned

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


class Dense(Linear):
    """With inputs, gradients, and the weight as it is stored and dense (fp32 where that is NF4)."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str):
        super().__init__(case, dtype, device)
        B, T, K, N = case.B, case.T, case.K, case.N
        self.xs = self.normal(B, T + 3, K).to(dtype)[:, 3:].split(self.inputs, -1)
        self.dys = self.normal(B, T, N).to(dtype).split(self.outputs, -1)
        W = self.normal(N, K) / K**0.5
        if case.storage == "dense":
            self.weight = [W.to(dtype)]
            self.dense = self.weight[0]
            return
        # stacked: rows of two files, each with its own offset
        files = W.chunk(2) if case.storage == "stacked" else [W]
        stored = [nf4_quantize(part, nested=case.storage != "nf4") for part in files]
        self.dense = torch.cat([nf4_dequantize(each) for each in stored])
        self.weight = list(stored[0].tensors().values())
        if case.storage == "stacked":
            names = ("packed", "absmax", "nested_absmax")
            self.weight = [torch.cat([each.tensors()[name] for each in stored]) for name in names]
            offsets = [each.offset.expand(each.nested_absmax.numel()) for each in stored]
            self.weight.append(torch.cat(offsets))

    @property
    def frozen(self):
        return FrozenWeight(self.weight, self.bias)


def expected(linear, dtype):
    """y, dx, dA and dB by torch and its autograd, in `dtype`; dys are not those of gate · y."""
    (gate, residual, _), xs, update = linear.epilogue, linear.xs, linear.update
    lora = [] if update is None else [update.lora_a, update.lora_b]
    leaves = [x.detach().to(dtype).requires_grad_() for x in (*xs, *lora)]
    if update is not None:
        update = LoRAUpdate(*leaves[-2:], *update[2:])
    y = lora_linear_reference(leaves[: len(xs)], linear.frozen, update)
    gradients = torch.autograd.grad(y, leaves, torch.cat(linear.dys, -1).to(dtype))
    y = y.detach() if gate is None else residual.to(dtype) + gate.to(dtype) * y.detach()
    dx = torch.cat(gradients[: len(xs)], -1)
    return {"y": y, "dx": dx} | dict(zip(("da", "db"), gradients[len(xs) :], strict=False))


def forward(linear, tile=None):
    """{"y"} by the kernels, into outputs full of NaN."""
    case, down = linear.case, None
    if linear.update is not None:
        rows, ranks = case.B * case.T, linear.update.lora_a.shape[0]
        down = poisoned(rows, ranks, dtype=linear.dtype, device=linear.device)
        lora_down(linear.xs, linear.update.lora_a, down)
    outs, check = linear.poisoned_outputs(linear.outputs)
    lora_gemm(linear.xs, linear.frozen, down, linear.update, linear.epilogue, outs, tile)
    y = torch.cat(outs, -1)
    check()
    return {"y": y}


def backward(linear, tile=None):
    """{"dx", "da", "db"} by the kernels, into outputs full of NaN."""
    (outs, check), update = linear.poisoned_outputs(linear.inputs), linear.update
    fp32, d_down, lora = {"dtype": torch.float32, "device": linear.device}, None, {}
    if update is not None:
        down = lora_down(linear.xs, update.lora_a)
        d_down = lora_d_down(linear.dys, update, torch.full_like(down, torch.nan))
        lora["da"] = lora_da(linear.xs, d_down, poisoned(*update.lora_a.shape, **fp32))
        lora["db"] = lora_db(linear.dys, down, update, poisoned(*update.lora_b.shape, **fp32))
    lora_a = None if update is None else update.lora_a
    lora_gemm_dx(linear.dys, linear.frozen, d_down, lora_a, linear.inputs, outs, tile)
    dx = torch.cat(outs, -1)
    check()
    return {"dx": dx} | lora


def check(linear, *calls):
    eager, truth = expected(linear, linear.dtype), expected(linear, torch.float64)
    for call in calls:
        for name, value in call(linear).items():
            # da and db come in fp32 from products of the dtype: judged as that
            assert_as_exact(name, value.to(linear.dtype), eager[name], truth[name])


@pytest.mark.grid(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_forward(device, name, dtype):
    check(Dense(CASES[name], dtype, device), forward)


@pytest.mark.grid(1)
@pytest.mark.parametrize(("name", "dtype"), BACKWARD)
def test_backward(device, name, dtype):
    check(Dense(CASES[name], dtype, device), backward)


@pytest.mark.slow
@pytest.mark.parametrize("case", STORED, ids=lambda case: case.storage)
def test_the_weight_is_dequantized_bit_for_bit(device, case):
    """Times the unit matrix, both ways, in fp32: the dequantized weight and nothing else."""
    linear = Dense(case, torch.float32, device)
    unit = torch.eye(case.K, device=device)[None]
    (y,) = lora_gemm([unit], FrozenWeight(linear.weight))
    assert torch.equal(y[0].T, linear.dense)
    unit = torch.eye(case.N, device=device)[None]
    (dx,) = lora_gemm_dx([unit], linear.frozen, None, None, [case.K])
    assert torch.equal(dx[0], linear.dense)


@pytest.mark.grid(1)
@pytest.mark.parametrize("storage", dispatch.STORAGES)
def test_every_shipped_tile(device, storage):
    linear = Dense(Case(K=128, N=150, T=33, storage=storage), torch.bfloat16, device)
    tiles = {op: dispatch.shipped_to(op, storage, "half") for op in ("lora_gemm", "lora_gemm_dx")}
    check(linear, *(partial(forward, tile=tile) for tile in tiles["lora_gemm"]))
    check(linear, *(partial(backward, tile=tile) for tile in tiles["lora_gemm_dx"]))


def test_sums_over_cut_rows(device):
    """More rows than one program takes: ranges of M, added in order."""
    linear = Dense(Case(K=64, N=64, B=2, T=300, rank=4), torch.bfloat16, device)
    d_down = lora_d_down(linear.dys, linear.update)
    once = dispatch.Tile(64, 16, 64, 1, 4, 2)
    cut = dispatch.Tile(16, 16, 64, 256, 4, 2)
    check(linear, *(lambda _, t=t: {"da": lora_da(linear.xs, d_down, tile=t)} for t in (once, cut)))
    assert_same_bits(*([lora_da(linear.xs, d_down, tile=cut)] for _ in range(2)))


def test_an_index_no_part_names_gets_zeros(device):
    linear = Dense(Case(), torch.float32, device)
    three = linear.update._replace(lora_a=linear.update.lora_a.repeat(3, 1))
    d_down = lora_d_down(linear.dys, three)
    assert not d_down[:, 16:].any() and d_down[:, :16].any()


@pytest.mark.slow
def test_two_runs_are_equal(device):
    linear = Dense(CASES["nf4 nested, all at once"], torch.bfloat16, device)
    for call in (forward, backward):
        assert_same_bits(call(linear), call(linear))


def test_refusals(device):
    linear, stored = (Dense(case, torch.float32, device) for case in (Case(), CASES["nf4"]))
    (x,), (w,), bias, (a, b, parts, _) = linear.xs, linear.weight, linear.bias, linear.update
    down, nf4, x192 = lora_down([x], a), stored.weight, stored.xs[0]

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
        "d_down": [lambda: dx(down=down[:, 1:]), lambda: lora_da([x], down[1:])],
        "widths": [lambda: dx(widths=(32, 32, 32))],
    }
    assert_refused(refused, "{}")
