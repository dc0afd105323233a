"""Builds the problem of each case of `cases.py`; here are the ops that are no linears.

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

from bench import timing
from bench.kernels import linears
from bench.kernels.cases import LINEARS, Case, Settings
from bench.kernels.problem import (
    COMPILED,
    DEQUANTIZE_4BIT,
    EAGER,
    LIGER,
    OURS,
    SDPA,
    Function,
    Problem,
    RandomInputs,
)

ROTATION = 256


def build(case: Case, settings: Settings) -> Problem:
    """Generates the inputs on the device; candidates are those of `settings.candidates` that there
    are for this op, in that order."""
    problem = _BUILDERS[case.op](case, settings)
    candidates = problem.candidates
    if COMPILED in settings.candidates:
        candidates[COMPILED] = torch.compile(candidates[EAGER], dynamic=False)
    problem.candidates = {n: candidates[n] for n in settings.candidates if n in candidates}
    return problem


def _qk_norm_rope_attention(case: Case, settings: Settings) -> Problem:
    """Of a single block. Eager is as Black Forest Labs' modules have it."""
    random, D, C = RandomInputs(case, settings), settings.spec.hidden_size, settings.spec.head_dim
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

    angles = 3 * random.normal("angles", 1, settings.tokens(case), 1, C // 2, dtype=torch.float32)
    inputs = {
        "qkv": random.tokens("qkv", 3 * D),
        "q_scale": 1 + random.normal("q_scale", C, std=0.1),
        "k_scale": 1 + random.normal("k_scale", C, std=0.1),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    return Problem(
        inputs,
        {OURS: ours, EAGER: eager},
        eager,
        [random.tokens("do", D)],
        ("qkv",),
        ("q_scale", "k_scale", "cos", "sin"),
        wide=settings.matmul_truth,
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, C], its neighbors turned by the angles, in fp32 at least."""
    even, odd = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return pairs.flatten(-2).to(x.dtype)


def _attention(case: Case, settings: Settings) -> Problem:
    """Eager keeps the scores in memory."""
    random, D = RandomInputs(case, settings), settings.spec.hidden_size

    def eager(q, k, v):
        return F.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def heads(name: str) -> Tensor:
        """[B, H, T, C], stored [B, T, H, C]"""
        tokens = random.tokens(name, D)
        return tokens.unflatten(-1, (settings.spec.num_heads, -1)).transpose(1, 2)

    return Problem(
        {name: heads(name) for name in ("q", "k", "v")},
        {OURS: fk.attention, EAGER: eager, SDPA: sdpa},
        eager,
        [heads("do")],
        ("q", "k", "v"),
        wide=settings.matmul_truth,
    )


def _norm_modulate(case: Case, settings: Settings) -> Problem:
    random, D = RandomInputs(case, settings), settings.spec.hidden_size
    shift, scale, _ = random.modulation(3)
    reference = fk.norm_modulate_reference
    return Problem(
        {"h": random.tokens("h", D), "shift": shift, "scale": scale},
        {OURS: fk.norm_modulate, EAGER: reference, LIGER: timing.attempt(_liger, D, shift)},
        reference,
        [random.tokens("dx", D)],
        ("h",),
    )


def _liger(width: int, like: Tensor) -> Function:
    """Its LayerNorm, and the modulation after it: its affine is the same for all samples."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    ones, zeros = like.new_ones(width), like.new_zeros(width)
    norm = LigerLayerNormFunction.apply
    return lambda h, shift, scale: norm(h, ones, zeros, EPS) * (1 + scale) + shift


def _gate_residual(case: Case, settings: Settings) -> Problem:
    random, D = RandomInputs(case, settings), settings.spec.hidden_size
    inputs = {
        "h": random.tokens("h", D),
        "gate": random.modulation(3)[2],
        "y": random.tokens("y", D),
    }
    reference = fk.gate_residual_reference
    candidates = {OURS: fk.gate_residual, EAGER: reference}
    return Problem(inputs, candidates, reference, [random.tokens("dout", D)], tuple(inputs))


def _flow_mix(case: Case, settings: Settings) -> Problem:
    random, width = RandomInputs(case, settings), settings.spec.in_channels
    names = ("mean", "std", "vae_noise", "noise")
    inputs = {name: random.tokens(name, width, torch.float32) for name in names}
    inputs["t"] = random.normal("t", case.batch, dtype=torch.float32).sigmoid()

    def eager(mean, std, vae_noise, noise, t):
        return fk.flow_mix_reference(mean, std, vae_noise, noise, t, mean.dtype)

    return Problem(inputs, {OURS: fk.flow_mix, EAGER: eager}, eager, [])


def _flow_loss(case: Case, settings: Settings) -> Problem:
    random, width = RandomInputs(case, settings), settings.spec.in_channels
    inputs = {
        "prediction": random.tokens("prediction", width),
        "target": random.tokens("target", width, torch.float32),
        "weight": random.normal("weight", case.batch, dtype=torch.float32).exp(),
    }
    dys = [random.normal("d_loss", case.batch, dtype=torch.float32)]
    reference = fk.flow_loss_reference
    candidates = {OURS: fk.flow_loss, EAGER: reference}
    return Problem(inputs, candidates, reference, dys, ("prediction",))


def _quantize_rows(case: Case, settings: Settings) -> Problem:
    """Judged by the values that the 8 bits stand for."""
    random, kind = RandomInputs(case, settings), case.matmul

    def eager(x: Tensor) -> QuantizedRows:
        v = x.float()
        return quantize_reference(v, v.abs().amax(-1), kind)

    return Problem(
        {"x": random.tokens("x", settings.spec.hidden_size)},
        {OURS: lambda x: fk.quantize_rows(x, kind)[0], EAGER: eager},
        eager,
        [],
        outputs=lambda rows: [rows.dequantize()],
    )


def _hadamard_rotate(case: Case, settings: Settings) -> Problem:
    """Eager multiplies by the matrix: one product in place of eight stages."""
    width = settings.spec.hidden_size
    block = min(ROTATION, width)
    matrix = fk.hadamard_reference(torch.eye(block, device=settings.device), block)
    matrix = matrix.to(settings.compute)

    def eager(x: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, block)) @ matrix.to(x.dtype)).flatten(-2)

    def reference(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return fk.hadamard_reference(x.to(wide), block).to(x.dtype)

    inputs = {"x": RandomInputs(case, settings).tokens("x", width)}
    candidates = {OURS: lambda x: fk.hadamard_rotate(x, block), EAGER: eager}
    return Problem(inputs, candidates, reference, [])


def _dropout(case: Case, settings: Settings) -> Problem:
    def ours(x: Tensor, op: Function = fk.dropout) -> Tensor:
        # one index for all: the gate takes samples one by one
        return op(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), 1, 0.1)

    def eager(x: Tensor) -> Tensor:
        return ours(x, fk.dropout_reference)

    inputs = {"x": RandomInputs(case, settings).tokens("x", settings.spec.hidden_size)}
    return Problem(inputs, {OURS: ours, EAGER: eager}, eager, [])


def _nf4_dequantize(case: Case, settings: Settings) -> Problem:
    """Into memory that is reused, as in a training step."""
    shape, dtype = (settings.spec.mlp_hidden, settings.spec.hidden_size), settings.compute
    dense = RandomInputs(case, settings).normal("weight", *shape, std=shape[1] ** -0.5)
    weight = fk.nf4_quantize(dense)
    out = torch.empty(shape, dtype=dtype, device=settings.device)

    def reference(absmax: Tensor) -> Tensor:
        kind = dtype if absmax.dtype == torch.float32 else absmax.dtype
        return nf4_dequantize_reference(fk.NF4Tensor(weight.packed, absmax, shape), kind)

    def bitsandbytes() -> Function:
        from bitsandbytes.functional import dequantize_4bit

        packed, state = linears.quant_state(weight, dtype)
        return lambda absmax: dequantize_4bit(packed, state)

    candidates = {
        OURS: lambda absmax: fk.nf4_dequantize(weight, dtype, out),
        EAGER: lambda absmax: nf4_dequantize_reference(weight, dtype),
        DEQUANTIZE_4BIT: timing.attempt(bitsandbytes),
    }
    return Problem({"absmax": weight.absmax}, candidates, reference, [], shared=("absmax",))


_BUILDERS = {
    **dict.fromkeys(LINEARS, linears.linear),
    "qk_norm_rope_attention": _qk_norm_rope_attention,
    "attention": _attention,
    "norm_modulate": _norm_modulate,
    "gate_residual": _gate_residual,
    "flow_mix": _flow_mix,
    "flow_loss": _flow_loss,
    "quantize_rows": _quantize_rows,
    "hadamard_rotate": _hadamard_rotate,
    "dropout": _dropout,
    "nf4_dequantize": _nf4_dequantize,
}
