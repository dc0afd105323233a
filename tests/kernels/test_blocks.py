"""FLUX's blocks from tensors: as Black Forest Labs' blocks, restated in plain torch.

fp32: results within 1e-5 and gradients within 5e-5 of each tensor's largest value, as of a patched
model. bf16 modulations over an fp32 stream: at most twice plain torch's error in the same dtypes.
"""

import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fluxfast_kernels as fk
import pytest
import torch
import torch.nn.functional as F
from fluxfast_kernels.blocks import DOUBLE, SINGLE
from fluxfast_kernels.dispatch import backend
from numerics import randn, relative_error

B, TXT, IMG, D, C, MLP, R = 2, 5, 12, 128, 32, 256, 4
FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = {  # of the linears, their parts with a LoRA of their own
    "attn.qkv": ((3 * D, D), (0, D, 0, D, 2 * D, 1, 2 * D, 3 * D, 2)),
    "attn.proj": ((D, D), (0, D, 0)),
    "mlp.0": ((MLP, D), (0, MLP, 0)),
    "mlp.2": ((D, MLP), (0, D, 0)),
    "linear1": ((3 * D + MLP, D), (0, 3 * D, 0)),  # as kohya: one A; none for the MLP
    "linear2": ((D, D + MLP), (0, D, 0)),
}


@dataclass
class Problem:
    """A block's arguments; `leaves` require gradients."""

    leaves: dict[str, torch.Tensor]
    linears: dict[str, Any]
    scales: list[torch.Tensor]
    rope: tuple[torch.Tensor, torch.Tensor]

    def named(self, *names):
        return [self.leaves[name] for name in names]


def problem(names, storage="dense", dtype=FP32, batched_rope=False) -> Problem:
    """dtype: of modulations and weights. Every value is exact in bf16."""
    seeds = iter(range(1000))

    def normal(*shape, std=1.0, of=FP32):
        return randn(*shape, seed=next(seeds), std=std).bfloat16().to(of)

    count, linears = (6 if names == DOUBLE else 3), {}
    leaves = {"img": normal(B, IMG, D), "txt": normal(B, TXT, D)}
    leaves |= {f"{x}_mod": normal(B, 1, count * D, std=0.5, of=dtype) for x in ("img", "txt")}
    if names == SINGLE:
        leaves = {"x": torch.cat([leaves["txt"], leaves["img"]], 1), "mod": leaves["img_mod"]}
    for name in names:
        (N, K), parts = SHAPES[name.removeprefix("img_").removeprefix("txt_")]
        leaves[f"{name} A"] = normal(R * (1 + max(parts[2::3])), K, std=K**-0.5)
        leaves[f"{name} B"] = normal(sum(parts[1::3]) - sum(parts[::3]), R, std=0.3)
        W = normal(N, K, std=K**-0.5)
        stored = [W.to(dtype)] if storage == "dense" else fk.nf4_quantize(W).tensors().values()
        weight = fk.FrozenWeight(list(stored), normal(N, std=0.1, of=dtype))
        lora = fk.LoRAUpdate(leaves[f"{name} A"], leaves[f"{name} B"], parts, 0.5)
        linears[name] = (weight, lora)
    scales = [1 + normal(C, std=0.1, of=dtype) for _ in range(4 if names == DOUBLE else 2)]
    angles = normal(B if batched_rope else 1, TXT + IMG, 1, C // 2, std=3)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    return Problem(leaves, linears, scales, (angles.cos(), angles.sin()))


# ---------------------------------------------------------------- Black Forest Labs' blocks


def linear(p: Problem, name: str, x):
    weight, update = p.linears[name]
    return fk.lora_linear_reference(x, weight, update)


def attention(p: Problem, qkvs, scales):
    """[B, T, D] of the streams' qkv."""
    streams = []
    for qkv, (q_scale, k_scale) in zip(
        qkvs, zip(scales[::2], scales[1::2], strict=True), strict=True
    ):
        q, k, v = qkv.unflatten(-1, (3, -1, C)).unbind(2)
        streams.append([F.rms_norm(q, [C], q_scale, 1e-6), F.rms_norm(k, [C], k_scale, 1e-6), v])
    q, k, v = (torch.cat(parts, 1) for parts in zip(*streams, strict=True))

    def rotated(x):
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = p.rope
        return (
            torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
            .flatten(-2)
            .to(x.dtype)
        )

    q, k, v = (x.transpose(1, 2) for x in (rotated(q), rotated(k), v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def normed(x, shift, scale):
    return (F.layer_norm(x, [D], eps=1e-6) * (1 + scale) + shift).to(shift.dtype)


def plain_double(p: Problem):
    streams, parts = dict(zip(("txt", "img"), p.named("txt", "img"), strict=True)), {}
    for name in streams:
        parts[name] = p.leaves[f"{name}_mod"].chunk(6, -1)
    inputs = [linear(p, f"{x}_attn.qkv", normed(streams[x], *parts[x][:2])) for x in streams]
    attn = dict(zip(streams, attention(p, inputs, p.scales).split([TXT, IMG], 1), strict=True))
    for name, (_, _, gate1, shift, scale, gate2) in parts.items():
        x = streams[name] + gate1 * linear(p, f"{name}_attn.proj", attn[name])
        u = F.gelu(linear(p, f"{name}_mlp.0", normed(x, shift, scale)), approximate="tanh")
        streams[name] = x + gate2 * linear(p, f"{name}_mlp.2", u)
    return streams["img"], streams["txt"]


def plain_single(p: Problem):
    x, mod = p.named("x", "mod")
    shift, scale, gate = mod.chunk(3, -1)
    qkv, u = linear(p, "linear1", normed(x, shift, scale)).tensor_split([3 * D], -1)
    both = [attention(p, [qkv], p.scales), F.gelu(u, approximate="tanh")]
    return (x + gate * linear(p, "linear2", torch.cat(both, -1)),)


def fused(p: Problem, names):
    more = p.rope, p.linears, p.scales
    if names == SINGLE:
        return (fk.flux_single_block(*p.named("x", "mod"), *more),)
    return fk.flux_double_block(*p.named("img", "txt", "img_mod", "txt_mod"), *more)


def results(p: Problem, outs) -> dict[str, torch.Tensor]:
    loss = sum((out * randn(*out.shape, seed=77 + i)).sum() for i, out in enumerate(outs))
    gradients = torch.autograd.grad(loss, list(p.leaves.values()))
    outs = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    return outs | dict(zip(p.leaves, gradients, strict=True))


BLOCKS = [(DOUBLE, plain_double), (SINGLE, plain_single)]


LAUNCHED = pytest.param("nf4", marks=pytest.mark.slow, id="launched")


@pytest.fixture(autouse=True)
def references(request, launchers):
    """What each op launches has tests of its own."""
    with nullcontext() if request.node.get_closest_marker("slow") else backend.cpu_launches(False):
        yield


@pytest.mark.parametrize("storage", ["dense", "nf4", LAUNCHED])
@pytest.mark.parametrize(("names", "plain"), BLOCKS, ids=["double", "single"])
def test_as_black_forest_labs(names, plain, storage):
    """Streams, modulations and every LoRA get their gradients; rope of each sample or of all."""
    p = problem(names, storage, batched_rope=storage == "nf4")
    truth, got = results(p, plain(p)), results(p, fused(p, names))
    for name, value in truth.items():
        error = float((got[name] - value).abs().max() / value.abs().max())
        assert error <= (1e-5 if "output" in name else 5e-5), (name, error)


@pytest.mark.parametrize(("names", "plain"), BLOCKS, ids=["double", "single"])
def test_a_stream_wider_than_what_is_computed_in(names, plain):
    exact, p = problem(names), problem(names, dtype=BF16)
    truth, eager, got = (
        results(exact, plain(exact)),
        results(p, plain(p)),
        results(p, fused(p, names)),
    )
    for name, value in truth.items():
        assert got[name].dtype == p.leaves.get(name, value).dtype
        allowed = 2 * max(relative_error(eager[name], value), 2.0**-10)
        assert relative_error(got[name], value) <= allowed, name


def test_wrong_arguments_are_named():
    p = problem(SINGLE)
    x, mod = p.named("x", "mod")
    linears, weight = p.linears, p.linears["linear1"][0]
    for name, arguments in {
        "linears": (x, mod, p.rope, {"linear1": linears["linear1"]}, p.scales),
        r"linears\['linear1'\]": (x, mod, p.rope, linears | {"linear1": weight}, p.scales),
        "x's modulation": (x, mod[:, 0], p.rope, linears, p.scales),
        "x": (x[0], mod, p.rope, linears, p.scales),
        "cos": (x, mod, (p.rope[0][:, :3], p.rope[1]), linears, p.scales),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            fk.flux_single_block(*arguments)


def test_the_readmes_recipe():
    """Black Forest Labs' single block with kohya's LoRA modules, as kernels/README.md has it."""
    text = (Path(__file__).parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(
        r"^```python\n([^`]*def single_block_forward.*?)^```$", text, re.M | re.S
    )
    names: dict[str, Any] = {}
    exec(recipe, names)
    p, vec = problem(SINGLE), randn(B, D, seed=99)
    block, loras = SimpleNamespace(), {}
    for name, (weight, update) in p.linears.items():
        layer = SimpleNamespace(weight=weight.tensors[0], bias=weight.bias)
        layer.out_features = layer.weight.shape[0]
        setattr(block, name, layer)
        a, b = update.lora_a, randn(layer.out_features, R, seed=len(name)).requires_grad_()
        factors = {"lora_down": a, "lora_up": b}
        modules = {x: SimpleNamespace(weight=w, out_features=len(w)) for x, w in factors.items()}
        loras[name] = SimpleNamespace(**modules, multiplier=0.5, alpha=torch.tensor(2.0))
        p.linears[name] = (weight, fk.LoRAUpdate(a, b, (0, layer.out_features, 0), 0.25))
    query, key = (SimpleNamespace(scale=scale) for scale in p.scales)
    block.norm = SimpleNamespace(query_norm=query, key_norm=key)
    lin = torch.nn.Linear(D, 3 * D)
    block.modulation = SimpleNamespace(lin=lin)
    p.leaves["mod"] = lin(F.silu(vec))[:, None]
    (truth,) = plain_single(p)
    got = names["single_block_forward"](block, loras, p.leaves["x"], vec, *p.rope)
    assert (got - truth).abs().max() <= 1e-5 * truth.abs().max()
