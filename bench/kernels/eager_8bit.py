"""A linear's 8-bit product out of torch's own operations: what a trainer without fused
kernels would write, and what `fluxfast_kernels` is timed against.

Rows of x, or of dy times W's scales, are quantized in a few passes, multiplied by torch's int8 or
fp8 product and scaled in one more. The maths are those of `linear_8bit.py`: each input has a scale
a row of its own, and so has the gradient of each output.
"""

from collections.abc import Sequence

import torch
from fluxfast_kernels.quant.rows import QuantizedRows, quantize_reference
from torch import Tensor


def product_8bit(
    xs: Sequence[Tensor], weight: Tensor, scale: Tensor, kind: str, split: int = 0
) -> Tensor:
    """[x_0, x_1, …] Wᵀ [B, T, N] in xs' dtype; xs [B, T, K_i], W in 8 bits [N, K] and scale fp32
    [N]. kind: "int8" or "fp8". split: columns of the first of two outputs, 0 for one."""
    return _Product.apply(weight, scale, kind, split, *xs)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, scale, kind, split, *xs):
        ctx.save_for_backward(weight, scale)
        ctx.kind, ctx.widths = kind, [x.shape[-1] for x in xs]
        ctx.outputs = [split, len(weight) - split] if split else [len(weight)]
        y = None
        for x, columns in zip(xs, weight.split(ctx.widths, 1), strict=True):
            part = _multiply(_rows(x, kind), columns.T, scale)
            y = part if y is None else y + part
        return y.view(*xs[0].shape[:-1], -1).to(xs[0].dtype)

    @staticmethod
    def backward(ctx, dy):
        weight, scale = ctx.saved_tensors
        transposed = weight.T.contiguous()  # 8-bit products take their right operand by columns
        pieces = (dy.split(ctx.outputs, -1), scale.split(ctx.outputs))
        pieces += (transposed.split(ctx.outputs, 1),)
        dx, ones = None, scale.new_ones(weight.shape[1])
        for piece, channel, columns in zip(*pieces, strict=True):
            part = _multiply(_rows(piece * channel, ctx.kind), columns.T, ones)
            dx = part if dx is None else dx + part
        dx = dx.view(*dy.shape[:-1], -1).to(dy.dtype)
        return None, None, None, None, *dx.split(ctx.widths, -1)


def _rows(x: Tensor, kind: str) -> QuantizedRows:
    v = x.flatten(0, -2).float()
    return quantize_reference(v, v.abs().amax(-1), kind)


def _multiply(rows: QuantizedRows, right: Tensor, scale: Tensor) -> Tensor:
    """[M, K] rows · right [K, N] · scale fp32 [N]; right's columns lie one after the other."""
    if rows.kind == "int8":
        return torch._int_mm(rows.values, right) * rows.scale[:, None] * scale
    scales = (rows.scale[:, None], scale[None])
    dtype = torch.bfloat16
    return torch._scaled_mm(rows.values, right, *scales, out_dtype=dtype, use_fast_accum=False)
