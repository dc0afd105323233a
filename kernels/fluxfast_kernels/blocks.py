"""FLUX.1's two transformer blocks made of the fused ops, for trainers with blocks of their own.

Each stream x of a double block, text and image, with the modulation's six parts:

    attn = attention(QK-norm and RoPE of [txt_attn.qkv, img_attn.qkv](LN(x) (1 + scale1) + shift1))
    x += gate1 · attn.proj(attn);   x += gate2 · mlp.2(GELU(mlp.0(LN(x) (1 + scale2) + shift2)))

A single block, on the joined stream and with three parts:

    qkv, u = linear1(LN(x) (1 + scale) + shift);   x += gate · linear2([attention(qkv), GELU(u)])

Layouts: streams [B, T, D]; modulations [B, 1, 6·D] or [B, 1, 3·D], shift, scale and gate one after
the other; rope: cos and sin fp32 [B or 1, T, 1, C/2], text first. Linears have Black Forest Labs'
names, each with (FrozenWeight, LoRAUpdate or None); qkv's and linear1's rows are q, k, v (and mlp),
and a LoRA of its own for each of these is one LoRAUpdate with several parts. Matmuls, norms and
attention run in the modulation's dtype, the stream keeps its own: where that is wider, gate and
residual are added unfused. Saved for backward: what the ops save.

Refused with ValueError: linears of other names, modulations of another shape, and what the ops
refuse.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fluxfast_kernels.dispatch.backend import check
from fluxfast_kernels.gemm.epilogue import LoRAUpdate
from fluxfast_kernels.ops.gate_residual import gate_residual
from fluxfast_kernels.ops.gelu import gelu_lora_linear
from fluxfast_kernels.ops.lora_linear import lora_linear
from fluxfast_kernels.ops.norm_modulate import norm_modulate_lora_linear
from fluxfast_kernels.ops.qk_norm_rope import qk_norm_rope_attention
from fluxfast_kernels.quant.frozen import FrozenWeight

Linear = tuple[FrozenWeight, LoRAUpdate | None]
Rope = tuple[Tensor, Tensor]

STREAM = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
DOUBLE = tuple(f"{stream}_{layer}" for stream in ("img", "txt") for layer in STREAM)
SINGLE = ("linear1", "linear2")


def flux_double_block(
    img: Tensor,
    txt: Tensor,
    img_mod: Tensor,
    txt_mod: Tensor,
    rope: Rope,
    linears: Mapping[str, Linear],
    scales: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns img and txt after a double block; see the file's head.

    linears: img_attn.qkv, img_attn.proj, img_mlp.0, img_mlp.2 and the same of txt. scales: of the
    norms of txt's q and k and img's q and k, each [C]. Gradients for the streams, the modulations
    and the LoRAs. Raises ValueError naming the argument.
    """
    _check_linears(linears, DOUBLE)
    img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = _parts(
        "img", img, img_mod, 6
    )
    txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = _parts(
        "txt", txt, txt_mod, 6
    )
    with torch.autocast(img.device.type, enabled=False):
        txt_qkv = _norm_linear(txt, txt_shift1, txt_scale1, linears["txt_attn.qkv"])
        img_qkv = _norm_linear(img, img_shift1, img_scale1, linears["img_attn.qkv"])
        attn = _attention([txt_qkv, img_qkv], scales, rope)
        txt_attn, img_attn = attn.split([txt.shape[1], img.shape[1]], dim=1)
        img = _add(img, img_gate1, lora_linear, img_attn, linears["img_attn.proj"])
        txt = _add(txt, txt_gate1, lora_linear, txt_attn, linears["txt_attn.proj"])

        img_u = _norm_linear(img, img_shift2, img_scale2, linears["img_mlp.0"])
        img = _add(img, img_gate2, gelu_lora_linear, img_u, linears["img_mlp.2"])
        txt_u = _norm_linear(txt, txt_shift2, txt_scale2, linears["txt_mlp.0"])
        txt = _add(txt, txt_gate2, gelu_lora_linear, txt_u, linears["txt_mlp.2"])
        return img, txt


def flux_single_block(
    x: Tensor, mod: Tensor, rope: Rope, linears: Mapping[str, Linear], scales: Sequence[Tensor]
) -> Tensor:
    """Returns the joined stream x [B, T, D], text first, after a single block; see the file's head.

    linears: linear1 and linear2. scales: of the norms of q and k, each [C]. Gradients and errors as
    of `flux_double_block`.
    """
    _check_linears(linears, SINGLE)
    shift, scale, gate = _parts("x", x, mod, 3)
    with torch.autocast(x.device.type, enabled=False):
        qkv, u = _norm_linear(x, shift, scale, linears["linear1"], split=3 * x.shape[2])
        attn = _attention([qkv], scales, rope)
        return _add(x, gate, gelu_lora_linear, u, linears["linear2"], head=attn)


def _check_linears(linears: Mapping[str, Linear], names: tuple[str, ...]) -> None:
    check(set(linears) == set(names), "linears", f"of {', '.join(names)}", ", ".join(linears))
    for name, linear in linears.items():
        fits = isinstance(linear, tuple) and len(linear) == 2
        needed = "(FrozenWeight, LoRAUpdate or None)"
        check(fits, f"linears[{name!r}]", needed, type(linear).__name__)


def _parts(name: str, x: Tensor, mod: Tensor, count: int) -> tuple[Tensor, ...]:
    check(x.ndim == 3, name, "[B, T, D]", tuple(x.shape))
    shape = (x.shape[0], 1, count * x.shape[2])
    check(tuple(mod.shape) == shape, f"{name}'s modulation", f"{shape}", tuple(mod.shape))
    return mod.chunk(count, dim=-1)


def _norm_linear(h: Tensor, shift: Tensor, scale: Tensor, linear: Linear, split: int = 0) -> Any:
    return norm_modulate_lora_linear(h.to(shift.dtype), shift, scale, *linear, split)


def _attention(qkv: list[Tensor], scales: Sequence[Tensor], rope: Rope) -> Tensor:
    heads = qkv[0].shape[2] // (3 * scales[0].shape[0])
    return qk_norm_rope_attention(qkv, list(scales), *rope, heads)


def _add(h: Tensor, gate: Tensor, op: Callable, x: Tensor, linear: Linear, **more) -> Tensor:
    """h + gate · (the linear of x)."""
    call = partial(op, x, *linear, **more)
    if h.dtype != gate.dtype:
        return torch.addcmul(h, gate.to(h.dtype), call().to(h.dtype))
    if gate.requires_grad and torch.is_grad_enabled():
        return gate_residual(h, gate, call())
    return call(gate=gate, residual=h)
