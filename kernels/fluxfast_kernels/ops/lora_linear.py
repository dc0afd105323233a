"""A frozen linear layer with a trainable low-rank update on some of its rows.

    y = x Wᵀ + b;   y[..., rows of part p] += s · (x A_pᵀ) B_pᵀ;   out = residual + gate · y

Layouts: x [B, T, K], or several inputs side by side whose widths add up to K; the last stride is 1,
the others are free, so that one stream's tokens of a joint tensor go in as they lie. y [B, T, N].
The weight is a `FrozenWeight`: a list [W [N, K]] in fp32, bf16 or fp16, [quantized, scale] in 8
bits, or NF4's [packed, absmax] and, where absmax is itself quantized, [packed, absmax,
nested_absmax, offset] (see `quant/frozen.py`), its bias, and how it is multiplied: in x's dtype or,
over any form of weight, in int8 or fp8, forward and towards x (see `gemm/linear_8bit.py`), perhaps
rotated (see `quant/hadamard.py`). The update, a `LoRAUpdate`, stays in x's dtype: lora_a fp32
[P·R, K] stacks one A per part; lora_b fp32 [N', R] has the parts' rows one after the other; parts
is flat (start, end, which A): never a block-diagonal matrix, and one A for all parts is P = 1.

Saved for backward: x (as given), A and B. The dense weight and x Aᵀ are recomputed.

Bytes, in elements of the compute dtype unless said: reads x, W (0.5625 bytes a weight in NF4, which
above the dispatch threshold is dequantized into a scratch of N·K that the matmul reads back) and
residual, writes y. FLOP: 2·M·N·K + 2·M·R·(P·K + N'), M = B·T; backward the same for dx, and
twice the low-rank part for dA and dB.

Refused with ValueError: shapes that do not fit, parts out of range, a gate without a residual or
the reverse, a gate that wants a gradient (its gradient needs y, which is not saved: use
`gate_residual`), int8 matmuls of an fp8 weight and the reverse, fp8 on a card that has none (below
sm_89).
Source: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.dispatch.backend import check, refuse
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.gemm.linear_8bit import matmul_8bit_reference
from fluxfast_kernels.quant.frozen import FrozenWeight, dequantize, storage_of, weight_shape
from fluxfast_kernels.quant.hadamard import check_rotation
from fluxfast_kernels.quant.rows import TOP

# ---------------------------------------------------------------- weight, update and torch.library

# torch.library knows no NamedTuple: this is how every op takes a weight and an update
LINEAR = (
    "Tensor[] weight, Tensor? bias, str matmul, SymInt rotation, "
    "Tensor? lora_a, Tensor? lora_b, SymInt[] parts, float lora_scale"
)
_LENGTH = 8


def flatten(weight: FrozenWeight, update: LoRAUpdate | None) -> tuple:
    """Returns the eight arguments of LINEAR."""
    a, b, parts, scale = (None, None, (), 1.0) if update is None else update
    return list(weight.tensors), *weight[1:], a, b, list(parts), scale


def unflatten(flat: Sequence) -> tuple[FrozenWeight, LoRAUpdate | None, tuple]:
    """Inverse of `flatten`; also returns what follows the eight arguments."""
    tensors, bias, matmul, rotation, a, b, parts, scale = flat[:_LENGTH]
    update = None if a is None else LoRAUpdate(a, b, parts, scale)
    return FrozenWeight(tensors, bias, matmul, rotation), update, tuple(flat[_LENGTH:])


def save_linear(ctx, flat: Sequence, *tensors: Tensor | None) -> None:
    """Saves `tensors`, A and B for backward; the frozen weight is kept outside autograd."""
    weight, update, _ = unflatten(flat)
    lora = (None, None) if update is None else update[:2]
    ctx.save_for_backward(*tensors, *lora)
    ctx.weight, ctx.lora = weight._replace(bias=None), None if update is None else update[2:]


def saved_linear(ctx) -> tuple[tuple, list[Any]]:
    """Returns LINEAR's arguments and the other tensors that `save_linear` saved."""
    *tensors, a, b = ctx.saved_tensors
    update = None if ctx.lora is None else LoRAUpdate(a, b, *ctx.lora)
    return flatten(ctx.weight, update), tensors


def linear_gradients(ctx, da: Tensor | None = None, db: Tensor | None = None) -> tuple:
    """Returns the gradients of LINEAR's arguments: a None per tensor of a list. Autograd takes an
    empty list of numbers for a list of no tensors."""
    parts = None if ctx.lora else []
    return [None] * len(ctx.weight.tensors), None, None, None, da, db, parts, None


def or_empty(tensor: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the tensor, or one without elements for None, which an op cannot return."""
    return like.new_empty(0, dtype=dtype) if tensor is None else tensor


def fake_update_gradients(like: Tensor, flat: Sequence) -> tuple[Tensor, ...]:
    """Returns empty dA and dB in fp32, as a backward op returns them."""
    _, update, _ = unflatten(flat)
    shapes = (0, 0) if update is None else (update.lora_a.shape, update.lora_b.shape)
    return tuple(like.new_empty(shape, dtype=torch.float32) for shape in shapes)


# ---------------------------------------------------------------- the op

_SCHEMA = f"(Tensor x, {LINEAR}, Tensor? gate, Tensor? residual) -> Tensor"


@torch.library.custom_op("fluxfast::lora_linear", mutates_args=(), schema=_SCHEMA)
def _lora_linear(x: Tensor, *flat) -> Tensor:
    weight, update, gated = unflatten(flat)
    return linear_forward([x], weight, update, Epilogue(*gated))[0]


@_lora_linear.register_fake
def _(x, weight, *_):
    return x.new_empty(*x.shape[:-1], weight_shape(weight, x.shape[-1])[0])


_BACKWARD_SCHEMA = (
    f"(Tensor dout, Tensor x, {LINEAR}, Tensor? gate, bool need_dx) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("fluxfast::lora_linear_backward", mutates_args=(), schema=_BACKWARD_SCHEMA)
def _lora_linear_backward(dout: Tensor, x: Tensor, *flat) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dA and dB, each without elements where there is none."""
    weight, update, (gate, need_dx) = unflatten(flat)
    dxs, da, db = linear_backward([dout], [x], weight, update, need_dx, gate)
    dx = or_empty(None if dxs is None else dxs[0], dout)
    return dx, or_empty(da, dout, torch.float32), or_empty(db, dout, torch.float32)


@_lora_linear_backward.register_fake
def _(dout, x, *flat):
    return x.new_empty(x.shape if flat[-1] else 0), *fake_update_gradients(dout, flat)


def _setup_context(ctx, inputs, output) -> None:
    x, *flat = inputs
    save_linear(ctx, flat, x, flat[_LENGTH])


def _backward(ctx, dout: Tensor):
    flat, (x, gate) = saved_linear(ctx)
    needs_x, *_, needs_a, needs_b, _, _, _, needs_residual = ctx.needs_input_grad
    arguments = (backend.last_stride_1(dout), x, *flat, gate, needs_x)
    dx, da, db = _lora_linear_backward(*arguments)
    lora = linear_gradients(ctx, da if needs_a else None, db if needs_b else None)
    return dx if needs_x else None, *lora, None, dout if needs_residual else None


_lora_linear.register_autograd(_backward, setup_context=_setup_context)


def lora_linear(
    x: Tensor,
    weight: FrozenWeight,
    update: LoRAUpdate | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y [..., N] of x [..., K], in x's dtype (fp32, bf16 or fp16); see the file's head. With gate
    [B, 1, N] and residual [B, T, N] the result is residual + gate · y.

    Gradients for x, lora_a, lora_b and residual; the weight and the bias are frozen. Raises
    ValueError naming the argument.
    """
    backend.check_dtype("x", x)
    N = check_linear(x, [x.shape[-1]], weight, update)
    check_gate(gate, residual, x, N)
    return _lora_linear(x, *flatten(weight, update), gate, residual)


def check_linear(
    x: Tensor, widths: Sequence[int], weight: FrozenWeight, update: LoRAUpdate | None
) -> int:
    """Returns N. Raises ValueError unless weight, bias and update fit inputs of these widths side
    by side, and x's device has the matmul."""
    kind = type(weight).__name__
    check(isinstance(weight, FrozenWeight), "weight", "a FrozenWeight: FrozenWeight([W])", kind)
    N, K = weight_shape(weight.tensors, sum(widths))
    if weight.bias is not None and weight.bias.shape != (N,):
        refuse("bias", f"[{N}]", tuple(weight.bias.shape))
    _check_update(update, N, K)
    _check_matmul(weight, x, widths)
    return N


def _check_matmul(weight: FrozenWeight, x: Tensor, widths: Sequence[int]) -> None:
    """Raise ValueError unless x's device has this matmul and the weight's storage fits it."""
    matmul, rotation = weight.matmul, weight.rotation
    if matmul not in ("", *TOP):
        refuse("matmul", "'', 'int8' or 'fp8'", repr(matmul))
    check(bool(matmul) or not rotation, "rotation", "0 without an 8-bit matmul", rotation)
    check_rotation(rotation, *widths)
    if matmul:
        other = "fp8" if matmul == "int8" else "int8"
        fits = storage_of(weight.tensors) != other
        if not fits:
            refuse("matmul", f"{other} or '' for a weight stored in {other}", matmul)
    if matmul == "fp8":
        arch = dispatch.arch_of(x.device)
        fits = not arch or arch >= 89
        if not fits:
            refuse("matmul", "int8 or '' on a card before sm_89", f"fp8 on sm_{arch}")


def _check_update(update: LoRAUpdate | None, N: int, K: int) -> None:
    """Raise ValueError unless A, B and their parts fit each other and a [N, K] weight."""
    if update is None:
        return
    one = "one LoRAUpdate (several are one of all their ranks side by side)"
    if not isinstance(update, LoRAUpdate):
        refuse("update", one, type(update).__name__)
    lora_a, lora_b, parts, _ = update
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        check(factor is not None, name, "given with the other factor", None)
        if factor.ndim != 2:
            refuse(name, "a matrix", tuple(factor.shape))
        backend.check_dtype(name, factor, (torch.float32,))
    fits = len(parts) > 0 and len(parts) % 3 == 0
    check(fits, "parts", "flat triples: start, end, index of A, start, …", parts)
    if min(parts[2::3]) < 0:
        refuse("parts", "with an index of A from 0", list(parts))
    last = 0
    for start, end in zip(parts[::3], parts[1::3], strict=True):
        fits = last <= start < end <= N
        if not fits:
            refuse("parts", f"ascending row ranges within 0..{N}", (start, end))
        last = end
    rows = sum(parts[1::3]) - sum(parts[::3])
    if lora_b.shape[0] != rows:
        refuse("lora_b", f"[{rows}, R]", tuple(lora_b.shape))
    stacked = 1 + max(parts[2::3])
    fits = tuple(lora_a.shape) == (stacked * update.rank, K)
    if not fits:
        refuse("lora_a", f"[{stacked}·{update.rank}, {K}]", tuple(lora_a.shape))


def check_gate(gate: Tensor | None, residual: Tensor | None, x: Tensor, N: int) -> None:
    """Raise ValueError unless gate [B, 1, N] and residual [B, T, N] are both there or neither."""
    if gate is None and residual is None:
        return
    check(gate is not None, "gate", "given with residual", None)
    check(residual is not None, "residual", "given with gate", None)
    assert gate is not None and residual is not None
    if residual.shape != (*x.shape[:-1], N):
        refuse("residual", f"[B, T, {N}]", tuple(residual.shape))
    fits = gate.shape == ((x.shape[0], 1, N) if x.ndim == 3 else gate.shape[:-1] + (N,))
    if not fits:
        refuse("gate", f"[B, 1, {N}]", tuple(gate.shape))
    if gate.dtype != x.dtype:
        refuse("gate", f"of x's dtype, {x.dtype}", gate.dtype)
    if residual.dtype != x.dtype:
        refuse("residual", f"of x's dtype, {x.dtype}", residual.dtype)
    wants = gate.requires_grad and torch.is_grad_enabled()
    check(not wants, "gate", "frozen here: its gradient needs y, see gate_residual", "one to train")


# ---------------------------------------------------------------- reference


def lora_linear_reference(
    x: Tensor | Sequence[Tensor],
    weight: FrozenWeight,
    update: LoRAUpdate | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    split: int = 0,
) -> Tensor:
    """`lora_linear` in plain torch, differentiable in everything, in x's dtype. 8-bit matmuls
    differentiate as the op does: dx is an 8-bit matmul too. x: one input or several side by side;
    split: where an op returns y in two, whose gradients are quantized with scales of their own."""
    xs = [x] if isinstance(x, Tensor) else list(x)
    x = torch.cat(xs, -1)
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    if weight.matmul:
        y = matmul_8bit_reference(xs, weight, split)
        y = y if bias is None else y + bias
    else:
        (first, *rest), K = weight.tensors, x.shape[-1]
        W = dequantize(weight.tensors, K, torch.float32).clone() if rest else first
        y = F.linear(x, W.to(x.dtype), bias)
    if update is not None:
        pieces, at = [], 0
        for columns, b_rows, a_rows in update.slices():
            down = x @ update.lora_a[a_rows].to(x.dtype).T
            added = update.scale * (down @ update.lora_b[b_rows].to(x.dtype).T)
            pieces += [y[..., at : columns.start], y[..., columns] + added]
            at = columns.stop
        y = torch.cat([*pieces, y[..., at:]], dim=-1)
    return y if residual is None else residual + cast(Tensor, gate) * y
