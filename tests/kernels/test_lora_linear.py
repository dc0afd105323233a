"""lora_linear: forward and every gradient against fp64, in plain torch and by the launchers."""

import pytest
import torch
from fluxfast_kernels import FrozenWeight, LoRAUpdate
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.gemm.epilogue import Epilogue
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.ops.lora_linear import (
    _lora_linear,
    flatten,
    lora_linear,
    lora_linear_reference,
)
from fluxfast_kernels.quant.nf4 import nf4_dequantize, nf4_quantize
from numerics import assert_as_exact, linear_arguments

B, T, K, N, R = 2, 21, 128, 192, 4
PARTS = [0, 64, 0, 96, 192, 1]  # rows 64 to 96 have no update
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int, std: float = 1.0) -> torch.Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(dtype, device: str, storage: str = "dense", rank: int = R, parts=PARTS) -> dict:
    """What both the op and the truth take; every value is exact in `dtype`."""
    W = normal(N, K, seed=1, std=K**-0.5)
    weight = [W.to(dtype)]
    if storage != "dense":
        weight = list(nf4_quantize(W, nested=storage == "nested").tensors().values())
    stacked = 1 + max(parts[2::3])
    rows = sum(parts[1::3]) - sum(parts[::3])
    values = {
        "x": normal(B, T, K, seed=0).to(dtype),
        "weight": weight,
        "bias": normal(N, seed=2).to(dtype),
        "lora_a": normal(stacked * rank, K, seed=3, std=K**-0.5).to(dtype).float(),
        "lora_b": normal(rows, rank, seed=4, std=0.3).to(dtype).float(),
        "gate": normal(B, 1, N, seed=5).to(dtype),
        "residual": normal(B, T, N, seed=6).to(dtype),
    }
    moved = {n: v.to(device) for n, v in values.items() if n != "weight"}
    return moved | {"weight": [w.to(device) for w in weight], "parts": parts, "scale": 0.5}


def in_dtype(given: dict, dtype: torch.dtype) -> dict:
    """The same for `lora_linear_reference`, computed in `dtype`."""
    weight = given["weight"]
    if len(weight) > 1:
        from fluxfast_kernels.quant.nf4 import NF4Tensor

        packed, absmax, *nested = weight
        weight = [nf4_dequantize(NF4Tensor(packed, absmax, (N, K), *nested), given["x"].dtype)]
    changed = {
        name: v.detach().to(dtype) if isinstance(v, torch.Tensor) else v
        for name, v in given.items()
    }
    return changed | {"weight": [weight[0].to(dtype)]}


def gradients(function, given: dict, wanted: tuple[str, ...], dout: torch.Tensor) -> dict:
    given = dict(given)
    for name in wanted:
        given[name] = given[name].detach().clone().requires_grad_()
    y = function(**linear_arguments(given))
    found = torch.autograd.grad(y, [given[name] for name in wanted], dout.to(y.dtype))
    return {"y": y.detach()} | dict(zip(wanted, found, strict=True))


@pytest.mark.grid(3)
@pytest.mark.parametrize("storage", ["dense", "nf4", "nested"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_as_exact_as_eager(path, device, dtype, storage, gated):
    given = arguments(dtype, device, storage)
    if not gated:
        given |= {"gate": None, "residual": None}
    wanted = ("x", "lora_a", "lora_b") + (("residual",) if gated else ())
    dout = normal(B, T, N, seed=7).to(device, dtype)
    found = gradients(lora_linear, given, wanted, dout)
    truth = gradients(lora_linear_reference, in_dtype(given, torch.float64), wanted, dout)
    eager = gradients(lora_linear_reference, in_dtype(given, dtype), wanted, dout)
    for name in found:
        assert_as_exact(name, found[name], eager[name], truth[name])


@pytest.mark.grid(1)
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_any_rank_and_shared_a(path, device, rank):
    shared = [0, 64, 0, 64, 192, 0]
    given = arguments(torch.float32, device, "nf4", rank, shared) | {"gate": None, "residual": None}
    dout = normal(B, T, N, seed=7).to(device)
    wanted = ("x", "lora_a", "lora_b")
    found = gradients(lora_linear, given, wanted, dout)
    truth = gradients(lora_linear_reference, in_dtype(given, torch.float64), wanted, dout)
    eager = gradients(lora_linear_reference, in_dtype(given, torch.float32), wanted, dout)
    for name in found:
        assert_as_exact(name, found[name], eager[name], truth[name])


def test_one_stream_of_a_joint_tensor(path, device):
    given = arguments(torch.float32, device) | {"gate": None, "residual": None}
    joint = torch.full((B, 2 * T, K), float("nan"), device=device)
    joint[:, T:] = given["x"]
    given = linear_arguments(given)
    y = lora_linear(**given)
    assert torch.equal(lora_linear(**given | {"x": joint[:, T:]}), y)


def test_inputs_side_by_side_and_split_outputs(path, device):
    given = linear_arguments(arguments(torch.float32, device))
    x, linear = given["x"], (given["weight"], given["update"])
    halves = [x[..., :64].contiguous(), x[..., 64:]]
    (y,) = linear_forward([x], *linear)
    low, high = linear_forward(halves, *linear, Epilogue(split=80))
    assert low.is_contiguous() and high.is_contiguous()
    torch.testing.assert_close(torch.cat([low, high], -1), y, rtol=1e-5, atol=1e-5)
    dy = normal(B, T, N, seed=7).to(device)
    dxs, da, db = linear_backward([dy], [x], *linear, True)
    pieces = [dy[..., :80].contiguous(), dy[..., 80:].contiguous()]
    dxs2, da2, db2 = linear_backward(pieces, halves, *linear, True)
    for found, expected in ((torch.cat(dxs2, -1), dxs[0]), (da2, da), (db2, db)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_without_an_update(path, device):
    given = arguments(torch.float32, device)
    x = given["x"].clone().requires_grad_()
    y = lora_linear(x, FrozenWeight(given["weight"], given["bias"]))
    expected = torch.nn.functional.linear(x, given["weight"][0], given["bias"])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (expected_dx,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-5, atol=1e-5)


def test_twice_the_same_bytes(path, device):
    given = arguments(torch.bfloat16, device, "nf4") | {"gate": None, "residual": None}
    dout = normal(B, T, N, seed=7).to(device, torch.bfloat16)
    wanted = ("x", "lora_a", "lora_b")
    first, second = (gradients(lora_linear, given, wanted, dout) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradcheck():
    with backend.cpu_launches(False):
        given = in_dtype(arguments(torch.float64, "cpu"), torch.float64)
        wanted = [given[name][..., :2, :].clone() for name in ("x", "residual")]
        leaves = [*wanted, given["lora_a"].clone(), given["lora_b"].clone()]

        def run(x, residual, a, b):
            weight = FrozenWeight(given["weight"], given["bias"])
            flat = flatten(weight, LoRAUpdate(a, b, PARTS, 0.5))
            return _lora_linear(x, *flat, given["gate"], residual)

        inputs = [leaf.requires_grad_() for leaf in leaves]
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.slow
def test_opcheck(device):
    given = arguments(torch.float32, device, "nf4")
    given |= {n: given[n].clone().requires_grad_() for n in ("x", "lora_a", "lora_b")}
    given = linear_arguments(given)
    flat = flatten(given["weight"], given["update"])
    torch.library.opcheck(_lora_linear, (given["x"], *flat, given["gate"], given["residual"]))


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_nf4_statistics_that_were_cast_are_refused(part):
    """As `.to(torch.bfloat16)` of a whole module would do."""
    given = arguments(torch.float32, "cpu", "nested")
    given["weight"][part] = given["weight"][part].bfloat16()
    with pytest.raises(
        ValueError, match=r"^weight \((packed|absmax|nested_absmax|offset)\) must be"
    ):
        lora_linear(**linear_arguments(given))


def test_autocast_leaves_the_dtype_alone(path, device):
    given = arguments(torch.float32, device) | {"gate": None, "residual": None}
    wanted = ("x", "lora_a", "lora_b")
    dout = normal(B, T, N, seed=7).to(device)
    expected = gradients(lora_linear, given, wanted, dout)
    with torch.autocast(device, torch.bfloat16):
        found = gradients(lora_linear, given, wanted, dout)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_compiles_whole(device):
    given = linear_arguments(arguments(torch.float32, device, "nf4"))
    with backend.cpu_launches(False):
        compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**given), lora_linear(**given))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"x": torch.zeros(B, T, 96)}, "weight"),
        ({"x": torch.zeros(B, T, K, dtype=torch.int32)}, "x"),
        ({"weight": [torch.zeros(N, K)] * 3}, "weight"),
        (
            {"weight": [torch.zeros(N * K // 2, 1, dtype=torch.uint8), torch.zeros(5)]},
            r"weight \(absmax\)",
        ),
        ({"lora_b": None}, "lora_b"),
        ({"lora_a": torch.zeros(3, K)}, "lora_a"),
        ({"lora_b": torch.zeros(7, R)}, "lora_b"),
        ({"parts": [0, 64]}, "parts"),
        ({"parts": [0, 500, 0]}, "parts"),
        ({"parts": [96, 192, 0, 0, 64, 1]}, "parts"),
        ({"parts": [0, 64, 0, 96, 192, -1]}, "parts"),
        ({"residual": None}, "residual"),
        ({"residual": torch.zeros(B, T, N, dtype=torch.bfloat16)}, "residual"),
        ({"gate": torch.zeros(1, 1, N)}, "gate"),
        ({"gate": torch.zeros(B, 1, N, dtype=torch.bfloat16)}, "gate"),
        ({"bias": torch.zeros(2 * N)}, "bias"),
        ({"gate": None}, "gate"),
        ({"residual": torch.zeros(B, 3, N)}, "residual"),
        ({"gate": torch.zeros(B, 1, N, requires_grad=True)}, "gate"),
    ],
)
def test_wrong_arguments_are_named(change, names):
    with pytest.raises(ValueError, match=f"^{names} must be"):
        lora_linear(**linear_arguments(arguments(torch.float32, "cpu") | change))
