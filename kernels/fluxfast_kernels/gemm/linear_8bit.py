"""The frozen linear as 8-bit matmuls, y and dx, without autograd.

    y  = s_x · s_w · (X8 · W8ᵀ) + b + s·(x Aᵀ)·Bᵀ        X8, s_x: x's rows;  W8, s_w: the weight's
    dx = s_g · (G8 · W8) + (s·dy·B)·A                     G8, s_g: the rows of dy · s_w

int8 sums are exact (15 360 · 127² < 2³¹), e4m3 sums fp32 over steps of block_k; what follows is
fp32 and rounded once. One copy of W8 serves both directions: its scales run along the contraction
of dx, so they are folded into dy before that is quantized. The update is computed from x and dy as
they are, in their dtype. With a rotation (`hadamard.py`) W8 and X8 are of W·H and x·H, and dx is
rotated back at the end, A with it.

Saved for backward: as without, x or what it is recomputed from; it is quantized again.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.gemm import grads
from fluxfast_kernels.gemm.eight_bit import gemm_8bit, gemm_8bit_dx, op_name
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate
from fluxfast_kernels.gemm.linear_dense import (
    batched,
    batched_residual,
    bias_of,
    column_ranges,
    flat_rows,
    times_transposed,
    update_gradients,
    with_update,
)
from fluxfast_kernels.quant.frozen import (
    FrozenWeight,
    QuantizedWeight,
    nf4_with_scales,
    storage_of,
    weight_in_8bit,
    weight_shape,
)
from fluxfast_kernels.quant.hadamard import hadamard_reference, hadamard_rotate
from fluxfast_kernels.quant.rows import (
    DTYPE,
    QuantizedRows,
    empty_rows,
    launch_quantize,
    multiply_8bit,
    quantize_rows,
    quantize_rows_reference,
)


def forward(
    xs: Sequence[Tensor],
    weight: FrozenWeight,
    update: LoRAUpdate | None,
    epilogue: Epilogue,
    rows: Sequence[QuantizedRows | None],
) -> list[Tensor]:
    """As `linear.linear_forward`."""
    K, dtype, shape = sum(x.shape[-1] for x in xs), xs[0].dtype, xs[0].shape[:-1]
    N, _ = weight_shape(weight.tensors, K)
    bias = bias_of(weight, N, dtype)
    if backend.launches(xs[0]):
        return _launched_forward(xs, weight._replace(bias=bias), update, epilogue, rows)
    flat, kind = [flat_rows(x) for x in xs], weight.matmul
    w = weight_in_8bit(weight.tensors, K, kind)
    y = None
    for x, given, (low, high) in zip(flat, rows, column_ranges(flat), strict=True):
        row = given.flat() if given else quantize_rows_reference(x, kind, rotation=weight.rotation)
        part = multiply_8bit(row.values, w.values[:, low:high].T)
        part.mul_(w.scale).mul_(row.scale[:, None])  # in this order 1e38 does not overflow
        y = part if y is None else y.add_(part)
    assert y is not None
    if weight.bias is not None:
        y.add_(weight.bias)
    if update is not None:
        down = times_transposed(flat, update.lora_a.to(dtype)).float()
        up = (update.lora_b * update.scale).to(dtype).float()
        for columns, b_rows, a_rows in update.slices():
            y[:, columns].addmm_(down[:, a_rows], up[b_rows].T)
    y = y.view(*shape, N)
    if epilogue.residual is not None:
        y = torch.addcmul(epilogue.residual.float(), cast(Tensor, epilogue.gate).float(), y)
    # an op's results share no memory
    return [piece.to(dtype).contiguous() for piece in y.split(epilogue.widths(N), -1)]


def backward(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    weight: FrozenWeight,
    update: LoRAUpdate | None,
    need_dx: bool,
    gate: Tensor | None,
) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None]:
    """As `linear.linear_backward`."""
    if backend.launches(xs[0]):
        return _launched_backward(dys, xs, weight, update, need_dx, gate)
    dtype, shapes = xs[0].dtype, [x.shape for x in xs]
    dys = dys if gate is None else [dys[0] * gate]
    da, db, d_down = update_gradients(xs, dys, update)
    if not need_dx:
        return None, da, db
    K, kind = sum(shape[-1] for shape in shapes), weight.matmul
    w = weight_in_8bit(weight.tensors, K, kind)
    dx, flat = None, [flat_rows(dy) for dy in dys]
    for dy, (low, high) in zip(flat, column_ranges(flat), strict=True):
        row = quantize_rows_reference(dy, kind, w.scale[low:high].contiguous())
        part = multiply_8bit(row.values, w.values[low:high]).mul_(row.scale[:, None])
        dx = part if dx is None else dx.add_(part)
    assert dx is not None
    if weight.rotation:
        dx = hadamard_reference(dx, weight.rotation)
    if update is not None:
        dx.addmm_(cast(Tensor, d_down).float(), update.lora_a.to(dtype).float())
    return _cut(dx.to(dtype), shapes), da, db


def _cut(dx: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Returns dx [M, K] as one contiguous tensor per input: an op's results share no memory."""
    pieces = dx.split([shape[-1] for shape in shapes], 1)
    return [piece.contiguous().view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


# ---------------------------------------------------------------- by the launchers


def _launched_forward(
    xs: Sequence[Tensor],
    weight: FrozenWeight,
    update: LoRAUpdate | None,
    epilogue: Epilogue,
    rows: Sequence[QuantizedRows | None],
) -> list[Tensor]:
    K, dtype, shape = sum(x.shape[-1] for x in xs), xs[0].dtype, xs[0].shape[:-1]
    tensors, bias, kind, rotation = weight
    N, _ = weight_shape(tensors, K)
    xs = [batched(x) for x in xs]
    # inputs that came without rows get them on the way of the update, which reads them whole
    fresh = [empty_rows(x, kind) if row is None else None for x, row in zip(xs, rows, strict=True)]
    down = None
    if update is not None:
        wanted = fresh if any(fresh) else None
        down = grads.lora_down(xs, update.lora_a, rows=wanted, rotation=rotation)
    else:
        for x, row in zip(xs, fresh, strict=True):
            if row is not None:
                launch_quantize(x, row, rotation=rotation)
    ready = [cast(QuantizedRows, row or made) for row, made in zip(rows, fresh, strict=True)]
    M, arch = xs[0].shape[0] * xs[0].shape[1], dispatch.arch_of(xs[0].device)
    op = op_name("gemm_8bit", xs)
    if storage_of(tensors) == "nf4" and _as_stored(op, arch, kind, "nf4", M, N, K):
        w = nf4_with_scales(tensors, N, K, kind)
    else:
        w = weight_in_8bit(tensors, K, kind)
        pieces = [*(x.shape[2] for x in xs), *epilogue.widths(N)]
        ours = _as_stored(op, arch, kind, "dense", M, N, K)
        if not ours and _torch_can(kind, dtype, pieces):

            def multiply(low: int, high: int) -> Tensor:
                b = None if bias is None else bias[low:high]
                return _scaled_mm(ready, w.values[low:high], w.scale[low:high], b, dtype)

            return with_update(multiply, shape, N, down, update, epilogue)
    ys = gemm_8bit(ready, w, dtype, bias, down, update, batched_residual(epilogue))
    return [y.view(*shape, y.shape[-1]) for y in ys]


def _launched_backward(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    weight: FrozenWeight,
    update: LoRAUpdate | None,
    need_dx: bool,
    gate: Tensor | None,
) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None]:
    dtype, shapes, (_, _, kind, rotation) = xs[0].dtype, [x.shape for x in xs], weight
    widths, N = [shape[-1] for shape in shapes], sum(dy.shape[-1] for dy in dys)
    K, dys = sum(widths), [batched(dy) for dy in dys]
    if not need_dx:
        dys = dys if gate is None else [dys[0] * gate]
        return None, *update_gradients(xs, dys, update)[:2]
    w = _weight_towards_x(weight, dys, N, K)
    if gate is not None:
        row, dy = quantize_rows(dys[0], kind, w.scale, gate=gate.reshape(dys[0].shape[0], 1, N))
        rows, dys = [row], [dy]
        da, db, d_down = update_gradients(xs, dys, update)
    else:
        rows = [empty_rows(dy, kind) for dy in dys]
        da, db, d_down = update_gradients(xs, dys, update, rows, w.scale)
        if update is None:
            channels = w.scale.split([dy.shape[2] for dy in dys])
            for dy, row, channel in zip(dys, rows, channels, strict=True):
                launch_quantize(dy, row, channel)
    lora_a = None if update is None else update.lora_a
    M, arch = dys[0].shape[0] * dys[0].shape[1], dispatch.arch_of(xs[0].device)
    by_torch = w.transposed and not _as_stored("gemm_8bit", arch, kind, "dense", M, K, N)
    if by_torch and _torch_can(kind, dtype, [K, *(dy.shape[2] for dy in dys)]):
        ones = torch.ones(K, dtype=torch.float32, device=w.scale.device)
        dx = _scaled_mm(rows, w.values, ones, None, dtype)
        dx = hadamard_rotate(dx, rotation, out=dx) if rotation else dx
        if lora_a is not None:
            dx.addmm_(cast(Tensor, d_down).to(dtype), lora_a.to(dtype))
        return _cut(dx, shapes), da, db
    # a rotated layer's dx is rotated back, its update with it, before it is rounded
    rounded = torch.float32 if rotation else dtype
    lora_a = hadamard_rotate(lora_a, rotation) if rotation and lora_a is not None else lora_a
    dxs = gemm_8bit_dx(rows, w, d_down, lora_a, widths, rounded, update_dtype=dtype)
    if rotation:
        outs = [torch.empty(dx.shape, dtype=dtype, device=dx.device) for dx in dxs]
        dxs = [hadamard_rotate(dx, rotation, out) for dx, out in zip(dxs, outs, strict=True)]
    return [dx.view(shape) for dx, shape in zip(dxs, shapes, strict=True)], da, db


def _weight_towards_x(
    weight: FrozenWeight, dys: Sequence[Tensor], N: int, K: int
) -> QuantizedWeight:
    """Returns the weight as `gemm_8bit_dx` takes it."""
    M, arch = dys[0].shape[0] * dys[0].shape[1], dispatch.arch_of(dys[0].device)
    op = op_name("gemm_8bit_dx", dys)
    storage, kind = storage_of(weight.tensors), weight.matmul
    as_stored = _as_stored(op, arch, kind, "nf4" if storage == "nf4" else "dense", M, K, N)
    if storage == "nf4" and as_stored:
        return nf4_with_scales(weight.tensors, N, K, kind)
    transposed = storage != "dense" and not as_stored
    return weight_in_8bit(weight.tensors, K, kind, transposed)


def _as_stored(op: str, arch: int, kind: str, storage: str, M: int, N: int, K: int) -> bool:
    """Returns whether our kernel takes the weight as it is stored."""
    return dispatch.choose(op, arch, DTYPE[kind], storage, M, N, K).fused


def _torch_can(kind: str, dtype: torch.dtype, widths: Sequence[int]) -> bool:
    """Returns whether `torch._scaled_mm` has this matmul: e4m3 with row scales to bf16, each
    operand's width a multiple of 16."""
    return kind == "fp8" and dtype == torch.bfloat16 and not any(width % 16 for width in widths)


def _scaled_mm(
    rows: Sequence[QuantizedRows],
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Returns rows · weightᵀ [M, N], a `torch._scaled_mm` an input; weight [N, K], scale [N]."""
    y, first = None, 0
    for row in rows:
        row = row.flat()
        columns = weight[:, first : first + row.values.shape[1]].T
        scales = (row.scale[:, None], scale[None], bias if y is None else None)
        part = torch._scaled_mm(row.values, columns, *scales, out_dtype=dtype, use_fast_accum=False)
        y, first = part if y is None else y.add_(part), first + row.values.shape[1]
    assert y is not None
    return y


# ---------------------------------------------------------------- reference


class _Matmul8bit(torch.autograd.Function):
    """Sums in fp64, so exact for int8: the truth that tests compare with."""

    @staticmethod
    def forward(ctx, weight, kind, rotation, split, *xs):
        K = sum(x.shape[-1] for x in xs)
        w = weight_in_8bit(weight, K, kind)
        ctx.values, ctx.scale, ctx.kind, ctx.rotation = w.values.clone(), w.scale, kind, rotation
        ctx.widths, N = [x.shape[-1] for x in xs], len(w.values)
        ctx.outputs = [split, N - split] if split else [N]
        y = 0
        for x, columns in zip(xs, ctx.values.double().split(ctx.widths, 1), strict=True):
            row = quantize_rows_reference(x, kind, rotation=rotation)
            y = y + row.values.double() @ columns.T * row.scale[..., None]
        return (y * w.scale).to(xs[0].dtype)

    @staticmethod
    def backward(ctx, dy):
        dx = cast(Any, 0)
        pieces = (dy.split(ctx.outputs, -1), ctx.values.double().split(ctx.outputs))
        for piece, values, channel in zip(*pieces, ctx.scale.split(ctx.outputs), strict=True):
            row = quantize_rows_reference(piece, ctx.kind, channel)
            dx = dx + row.values.double() @ values * row.scale[..., None]
        dx = hadamard_reference(dx, ctx.rotation) if ctx.rotation else dx
        return None, None, None, None, *dx.to(dy.dtype).split(ctx.widths, -1)


def matmul_8bit_reference(xs: Sequence[Tensor], weight: FrozenWeight, split: int = 0) -> Tensor:
    """Returns [x_0, x_1, …] Wᵀ [..., N] in 8 bits, without bias or update, differentiable in xs:
    the gradients of its columns before and after a split have a scale a row each."""
    return _Matmul8bit.apply(list(weight.tensors), weight.matmul, weight.rotation, split, *xs)
