"""A frozen linear with its update, forward and backward, without autograd: what the ops call.

Products are of x's dtype (products "") or of 8-bit codes ("int8", "fp8"); see `linear_dense.py` and
`linear_8bit.py`. Layouts: `lora_linear.py`.
"""

from collections.abc import Sequence
from functools import wraps

import torch
from torch import Tensor

from fluxfast_kernels.gemm import linear_8bit, linear_dense
from fluxfast_kernels.quant.rows import Rows


def _without_autocast(function):
    """Products stay in x's dtype: inside an op autocast would round some of them and not others."""

    @wraps(function)
    def run(tensors: Sequence[Tensor], *arguments, **named):
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(tensors, *arguments, **named)

    return run


@_without_autocast
def linear_forward(
    xs: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    parts: Sequence[int],
    scale: float,
    split: int = 0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    products: str = "",
    rotation: int = 0,
    rows: Sequence[Rows | None] | None = None,
) -> list[Tensor]:
    """-> [y [B, T, N]] or, with a split, [y[..., :split], y[..., split:]], each contiguous.

    xs: inputs side by side, each [B, T, K_i]. gate [B, 1, N] and residual [B, T, N] go together.
    rows: the inputs' 8-bit rows, where what made them wrote these too.
    """
    given = (xs, weight, bias, lora_a, lora_b, parts, scale, split, gate, residual)
    if products:
        rows = [None] * len(xs) if rows is None else rows
        return linear_8bit.forward(*given, products, rotation, rows)
    return linear_dense.dense_forward(*given)


@_without_autocast
def linear_backward(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    weight: Sequence[Tensor],
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    parts: Sequence[int],
    scale: float,
    need_dx: bool,
    gate: Tensor | None = None,
    products: str = "",
    rotation: int = 0,
) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None]:
    """-> ([dx_i [B, T, K_i]] or None, dA and dB in fp32 or None). dys, xs as in `linear_forward`.

    gate [B, 1, N]: dys is one tensor, the gradient of gate · y. No weight ([]): the gradients of
    the update alone.
    """
    given = (xs, weight, lora_a, lora_b, parts, scale, need_dx)
    if products and weight:
        return linear_8bit.backward(dys, *given, gate, products, rotation)
    dys = dys if gate is None else [dys[0] * gate]
    return linear_dense.dense_backward(dys, *given)
