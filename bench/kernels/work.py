"""Builds each case of `bench/kernels/cases.py`; who does the work of the ops that are no linears.

A library is imported where its candidate is built: a missing one becomes that candidate's error.
"""

import fluxfast_kernels as fk
import torch
import torch.nn.functional as F
from fluxfast_kernels.ops.norm_modulate import EPS
from fluxfast_kernels.ops.qk_norm_rope import EPSILON
from fluxfast_kernels.quant.nf4 import nf4_dequantize_reference
from fluxfast_kernels.quant.rows import QuantizedRows, quantize_reference
from torch import Tensor

from bench.kernels import linears as kernel_linears
from bench.kernels.cases import Case, Settings
from bench.kernels.problem import (
    COMPILED,
    DEQUANTIZE_4BIT,
    EAGER,
    LIGER,
    OURS,
    SDPA,
    Draws,
    Function,
    Problem,
    half,
    library,
)

ROTATION = 256


def build(case: Case, settings: Settings) -> Problem:
    """Draw the inputs on the device; candidates are those of `settings.candidates` that there are
    for this op, in that order."""
    problem = _BUILDERS[case.op](case, settings)
    found = problem.candidates
    if COMPILED in settings.candidates:
        found[COMPILED] = torch.compile(found[EAGER], dynamic=False)
    problem.candidates = {name: found[name] for name in settings.candidates if name in found}
    return problem


def _qk_norm_rope_attention(case: Case, settings: Settings) -> Problem:
    """Of a single block. Eager is as Black Forest Labs' modules have it."""
    draw, D, C = Draws(case, settings), settings.spec.hidden_size, settings.spec.head_dim
    heads = settings.spec.num_heads

    def ours(qkv, q_scale, k_scale, cos, sin):
        return fk.qk_norm_rope_attention([qkv], [q_scale, k_scale], cos, sin, heads)

    def eager(qkv, q_scale, k_scale, cos, sin):
        q, k, v = qkv.unflatten(-1, (3, heads, C)).unbind(2)
        q, k = (
            _rotated(F.rms_norm(x, (C,), scale, EPSILON), cos, sin)
            for x, scale in ((q, q_scale), (k, k_scale))
        )
        o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return o.transpose(1, 2).flatten(2)

    angles = 3 * draw("angles", 1, settings.tokens(case), 1, C // 2, dtype=torch.float32)
    inputs = {
        "qkv": draw.tokens("qkv", 3 * D),
        "q_scale": 1 + draw("q_scale", C, std=0.1),
        "k_scale": 1 + draw("k_scale", C, std=0.1),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    return Problem(
        inputs,
        {OURS: ours, EAGER: eager},
        eager,
        [draw.tokens("do", D)],
        ("qkv",),
        ("q_scale", "k_scale", "cos", "sin"),
        wide=torch.float32 if half(settings) else torch.float64,
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, C], its neighbors turned by the angles, in fp32 at least."""
    even, odd = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return pairs.flatten(-2).to(x.dtype)


def _attention(case: Case, settings: Settings) -> Problem:
    """Eager keeps the scores in memory."""
    draw, D, heads = Draws(case, settings), settings.spec.hidden_size, settings.spec.num_heads

    def eager(q, k, v):
        return F.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v

    def of_heads(name: str) -> Tensor:
        """[B, H, T, C], stored [B, T, H, C]"""
        return draw.tokens(name, D).unflatten(-1, (heads, -1)).transpose(1, 2)

    return Problem(
        {name: of_heads(name) for name in ("q", "k", "v")},
        {OURS: fk.attention, EAGER: eager, SDPA: _sdpa},
        eager,
        [of_heads("do")],
        ("q", "k", "v"),
        wide=torch.float32 if half(settings) else torch.float64,
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _norm_modulate(case: Case, settings: Settings) -> Problem:
    draw, D = Draws(case, settings), settings.spec.hidden_size
    shift, scale, _ = draw.modulation(3)
    reference = fk.norm_modulate_reference
    return Problem(
        {"h": draw.tokens("h", D), "shift": shift, "scale": scale},
        {OURS: fk.norm_modulate, EAGER: reference, LIGER: library(_liger, D, shift)},
        reference,
        [draw.tokens("dx", D)],
        ("h",),
    )


def _liger(width: int, like: Tensor) -> Function:
    """Its LayerNorm, and the modulation after it: its affine is the same for all samples."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    ones, zeros = like.new_ones(width), like.new_zeros(width)

    def run(h, shift, scale):
        return LigerLayerNormFunction.apply(h, ones, zeros, EPS) * (1 + scale) + shift

    return run


def _gate_residual(case: Case, settings: Settings) -> Problem:
    draw, D = Draws(case, settings), settings.spec.hidden_size
    return Problem(
        {
            "h": draw.tokens("h", D),
            "gate": draw.modulation(3)[2],
            "y": draw.tokens("y", D),
        },
        {OURS: fk.gate_residual, EAGER: fk.gate_residual_reference},
        fk.gate_residual_reference,
        [draw.tokens("dout", D)],
        ("h", "gate", "y"),
    )


def _flow_mix(case: Case, settings: Settings) -> Problem:
    draw, width = Draws(case, settings), settings.spec.in_channels
    names = ("mean", "std", "vae_noise", "noise")
    inputs = {name: draw.tokens(name, width, torch.float32) for name in names}
    inputs["t"] = draw("t", case.batch, dtype=torch.float32).sigmoid()

    def eager(mean, std, vae_noise, noise, t):
        return fk.flow_mix_reference(mean, std, vae_noise, noise, t, mean.dtype)

    return Problem(inputs, {OURS: fk.flow_mix, EAGER: eager}, eager, [])


def _flow_loss(case: Case, settings: Settings) -> Problem:
    draw, width = Draws(case, settings), settings.spec.in_channels
    inputs = {
        "prediction": draw.tokens("prediction", width),
        "target": draw.tokens("target", width, torch.float32),
        "weight": draw("weight", case.batch, dtype=torch.float32).exp(),
    }
    return Problem(
        inputs,
        {OURS: fk.flow_loss, EAGER: fk.flow_loss_reference},
        fk.flow_loss_reference,
        [draw("d_loss", case.batch, dtype=torch.float32)],
        ("prediction",),
    )


def _quantize_rows(case: Case, settings: Settings) -> Problem:
    """Judged by the values that the 8 bits stand for."""
    draw, kind = Draws(case, settings), case.products

    def eager(x: Tensor) -> QuantizedRows:
        v = x.float()
        return quantize_reference(v, v.abs().amax(-1), kind)

    return Problem(
        {"x": draw.tokens("x", settings.spec.hidden_size)},
        {OURS: lambda x: fk.quantize_rows(x, kind)[0], EAGER: eager},
        eager,
        [],
        outputs=lambda rows: [rows.dequantize()],
    )


def _hadamard_rotate(case: Case, settings: Settings) -> Problem:
    """Eager multiplies by the matrix: one product in place of eight stages."""
    draw, width = Draws(case, settings), settings.spec.hidden_size
    block = min(ROTATION, width)
    matrix = fk.hadamard_reference(torch.eye(block, device=settings.device), block)
    matrix = matrix.to(settings.compute)

    def eager(x: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, block)) @ matrix.to(x.dtype)).flatten(-2)

    def reference(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return fk.hadamard_reference(x.to(wide), block).to(x.dtype)

    return Problem(
        {"x": draw.tokens("x", width)},
        {OURS: lambda x: fk.hadamard_rotate(x, block), EAGER: eager},
        reference,
        [],
    )


def _nf4_dequantize(case: Case, settings: Settings) -> Problem:
    """Into memory that it has had before, as a training step does."""
    shape, dtype = (settings.spec.mlp_hidden, settings.spec.hidden_size), settings.compute
    weight = fk.nf4_quantize(Draws(case, settings)("weight", *shape, std=shape[1] ** -0.5))
    out = torch.empty(shape, dtype=dtype, device=settings.device)

    def reference(absmax: Tensor) -> Tensor:
        kind = dtype if absmax.dtype == torch.float32 else absmax.dtype
        return nf4_dequantize_reference(fk.NF4Tensor(weight.packed, absmax, shape), kind)

    candidates = {
        OURS: lambda absmax: fk.nf4_dequantize(weight, dtype, out),
        EAGER: lambda absmax: nf4_dequantize_reference(weight, dtype),
        DEQUANTIZE_4BIT: library(_dequantize_4bit, weight, dtype),
    }
    return Problem({"absmax": weight.absmax}, candidates, reference, [], shared=("absmax",))


def _dequantize_4bit(weight: fk.NF4Tensor, dtype: torch.dtype) -> Function:
    from bitsandbytes.functional import dequantize_4bit

    packed, state = kernel_linears.quant_state(weight, dtype)
    return lambda absmax: dequantize_4bit(packed, state)


_BUILDERS = {
    "lora_linear": kernel_linears.lora_linear,
    "norm_modulate_lora_linear": kernel_linears.norm_modulate_lora_linear,
    "gelu_lora_linear": kernel_linears.gelu_lora_linear,
    "qk_norm_rope_attention": _qk_norm_rope_attention,
    "attention": _attention,
    "norm_modulate": _norm_modulate,
    "gate_residual": _gate_residual,
    "flow_mix": _flow_mix,
    "flow_loss": _flow_loss,
    "quantize_rows": _quantize_rows,
    "hadamard_rotate": _hadamard_rotate,
    "nf4_dequantize": _nf4_dequantize,
}
