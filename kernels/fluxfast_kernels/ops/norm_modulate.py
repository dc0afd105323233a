"""LayerNorm with the modulation that follows it, alone or as the prologue of a linear layer.

    n = (h − mean(h)) · rstd,   rstd = 1 / sqrt(var(h) + 1e-6)      (no affine, biased variance)
    x = n · (1 + scale) + shift;      y = x Wᵀ + b + s · (x Aᵀ) Bᵀ  (`lora_linear.py`)

    g = dx · (1 + scale);   dh = rstd · (g − mean(g) − n · mean(g · n))
    dshift = Σ_T dx;   dscale = Σ_T dx · n

Layouts: h [B, T, D], shift and scale [B, 1, D], one dtype (fp32, bf16 or fp16). The last stride is
1, the others are free: shift and scale may be chunks of the modulation's output, h one stream's
tokens of a joint tensor. mean and rstd are fp32 [B, T]; sums are fp32, the variance is taken
about the mean. weight, lora_a, lora_b, parts: see `lora_linear.py`.

`norm_modulate_lora_linear` writes x to a temporary and multiplies that. A product of M rows and N
columns reads its x once per column of tiles (N = 9216 in tiles of 128: 72 times); normalizing
inside it would repeat this file's work as often and take the product from cuBLAS. x is not saved
but made again in backward: one more read of h and write of x there, for 2·D bytes a token less
held in bf16.

Saved for backward: h, mean, rstd, scale, and with an update shift, A and B.

Bytes, in elements: x reads B·T·D and writes B·T·D, made again likewise; dh reads h and dx and
writes B·T·D (in the fused op over dx itself). dshift and dscale are formed only when asked for, in
that same pass and without atomics: one fp32 partial sum per chunk of tokens, then the sum of the
chunks, so that two runs agree bit for bit. FLOP: 8 an element; made again 4; backward 10, with
dshift and dscale 13. The linear's own are in `lora_linear.py`.

Refused with ValueError: other shapes, mixed dtypes, a last stride other than 1, D above 16 384 (a
row is held in registers), and what `lora_linear` refuses.
Source: adaptive layer norm (DiT, arXiv 2212.09748), as FLUX's blocks use it.
"""

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import check, last_stride_1
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.ops.lora_linear import check_products, check_update, lora_linear_reference
from fluxfast_kernels.ops.norm_modulate_triton import (
    EPS,
    launch_norm_modulate,
    launch_norm_modulate_backward,
)
from fluxfast_kernels.quant.frozen import weight_shape
from fluxfast_kernels.quant.rows import Rows, empty_rows

MAX_WIDTH = 16384

# ---------------------------------------------------------------- forward and backward, no autograd


def norm_modulate_forward(
    h: Tensor, shift: Tensor, scale: Tensor, products: str = "", rotation: int = 0
) -> tuple[Tensor, Tensor, Tensor, Rows | None]:
    """-> (x [B, T, D] contiguous, mean and rstd fp32 [B, T], x's 8-bit rows where the kernel wrote
    them for such products)."""
    B, T, D = h.shape
    if backend.launches(h):
        x = h.new_empty(B, T, D)
        mean, rstd = _statistics(h)
        rows = empty_rows(x, products) if products else None
        launch_norm_modulate(h, shift, scale, x, mean, rstd, False, rows, rotation)
        return x, mean, rstd, rows
    # the modulation as LayerNorm's affine, which may be fp32 beside a bf16 h: one pass per sample,
    # rounded once, and fp32 mean and rstd
    made = [
        torch.native_layer_norm(one, [D], a, b, EPS)
        for one, a, b in zip(h, 1 + scale[:, 0].float(), shift[:, 0].float(), strict=True)
    ]
    x, mean, rstd = (
        each[0][None] if B == 1 else torch.stack(each) for each in zip(*made, strict=True)
    )
    return x, mean[..., 0], rstd[..., 0], None


def norm_modulate_rebuild(
    h: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """x again, from what was saved."""
    if not backend.launches(h):
        return norm_modulate_forward(h, shift, scale)[0]  # forming mean and rstd costs no pass
    x = h.new_empty(h.shape)
    launch_norm_modulate(h, shift, scale, x, mean, rstd, rebuild=True)
    return x


def norm_modulate_backward(
    dx: Tensor,
    h: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    need_dh: bool,
    need_d_modulation: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (dh [B, T, D], dshift, dscale [B, 1, D]), without elements where not needed.

    in_place: dh may take dx's memory (dx is contiguous then and nobody else's).
    """
    B, T, D = h.shape
    dh, dshift, dscale = h.new_empty(0), h.new_empty(0), h.new_empty(0)
    if need_d_modulation:
        dshift, dscale = h.new_empty(B, 1, D), h.new_empty(B, 1, D)
    if backend.launches(h):
        if need_dh:
            dh = dx if in_place else h.new_empty(B, T, D)
        sums = (dshift, dscale) if need_d_modulation else None
        launch_norm_modulate_backward(dx, h, scale, mean, rstd, dh if need_dh else None, sums)
        return dh, dshift, dscale
    if need_d_modulation:
        torch.sum(dx, 1, keepdim=True, out=dshift)
        # LayerNorm's own sum of dx · n runs in h's dtype: over 1000 rows of bf16 it errs by 4e-2,
        # this by 3e-3
        for b in range(B):
            n = torch.native_layer_norm(h[b], [D], None, None, EPS)[0]
            torch.sum(n.mul_(dx[b]), 0, keepdim=True, out=dscale[b])
    if need_dh:
        made = [
            torch.ops.aten.native_layer_norm_backward(
                dx[b], h[b], [D], mean[b, :, None], rstd[b, :, None], a, a, [True, False, False]
            )[0]
            for b, a in enumerate(1 + scale[:, 0].float())
        ]
        dh = made[0][None] if B == 1 else torch.stack(made)
    return dh, dshift, dscale


# ---------------------------------------------------------------- the op: LayerNorm and modulation


@torch.library.custom_op("fluxfast::norm_modulate", mutates_args=())
def _norm_modulate(h: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return norm_modulate_forward(h, shift, scale)[:3]


@_norm_modulate.register_fake
def _(h, shift, scale):
    return h.new_empty(h.shape), *_statistics(h)


def _statistics(h: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(h.new_empty(h.shape[:2], dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("fluxfast::norm_modulate_backward", mutates_args=())
def _norm_modulate_backward(
    dx: Tensor,
    h: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    need_dh: bool,
    need_d_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = last_stride_1(dx)
    return norm_modulate_backward(dx, h, scale, mean, rstd, need_dh, need_d_modulation)


@_norm_modulate_backward.register_fake
def _(dx, h, scale, mean, rstd, need_dh, need_d_modulation):
    return _fake_gradients(h, need_dh, need_d_modulation)


def _fake_gradients(h: Tensor, need_dh: bool, need_d_modulation: bool) -> tuple[Tensor, ...]:
    B, _, D = h.shape
    shape = (B, 1, D) if need_d_modulation else (0,)
    return h.new_empty(h.shape if need_dh else 0), h.new_empty(shape), h.new_empty(shape)


def _keep(ctx, inputs, output) -> None:
    h, _, scale = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, scale, mean, rstd)


def _differentiate(ctx, dx: Tensor | None, *_):
    needs_h, needs_shift, needs_scale = ctx.needs_input_grad
    if dx is None:
        return None, None, None
    dh, dshift, dscale = _norm_modulate_backward(
        dx, *ctx.saved_tensors, needs_h, needs_shift or needs_scale
    )
    return (
        dh if needs_h else None,
        dshift if needs_shift else None,
        dscale if needs_scale else None,
    )


_norm_modulate.register_autograd(_differentiate, setup_context=_keep)


def norm_modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(h) · (1 + scale) + shift -> [B, T, D], contiguous, in h's dtype.

    h [B, T, D], shift and scale [B, 1, D], in one of fp32, bf16 and fp16; any batch and token
    strides. Gradients for all three. Raises ValueError naming the argument.
    """
    _check(h, shift, scale)
    return _norm_modulate(h, shift, scale)[0]


def _check(h: Tensor, shift: Tensor, scale: Tensor) -> None:
    backend.check_dtype("h", h)
    check(h.ndim == 3, "h", "[B, T, D]", tuple(h.shape))
    check(h.shape[2] <= MAX_WIDTH, "h", f"at most {MAX_WIDTH} wide", h.shape[2])
    shape = (h.shape[0], 1, h.shape[2])
    for name, tensor in (("shift", shift), ("scale", scale)):
        check(tuple(tensor.shape) == shape, name, f"[B, 1, D] = {shape}", tuple(tensor.shape))
    for name, tensor in (("h", h), ("shift", shift), ("scale", scale)):
        check(tensor.stride(-1) == 1, name, "of last stride 1", tensor.stride())
        check(tensor.dtype == h.dtype, name, f"{h.dtype} as h is", tensor.dtype)
        check(tensor.device == h.device, name, f"on {h.device} as h is", tensor.device)


# ---------------------------------------------------------------- the op: with the linear layer


@torch.library.custom_op("fluxfast::norm_modulate_lora_linear", mutates_args=())
def _norm_modulate_lora_linear(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Sequence[Tensor],
    bias: Optional[Tensor],  # noqa: UP045  (custom_op reads Optional on Python 3.10)
    lora_a: Optional[Tensor],  # noqa: UP045
    lora_b: Optional[Tensor],  # noqa: UP045
    parts: Sequence[int],
    lora_scale: float,
    split: int,
    products: str,
    rotation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (y0, y1 (of no columns without a split), mean, rstd)."""
    x, mean, rstd, rows = norm_modulate_forward(h, shift, scale, products, rotation)
    ys = linear_forward(
        [x], weight, bias, lora_a, lora_b, parts, lora_scale, split=split,
        products=products, rotation=rotation, rows=[rows],
    )  # fmt: skip
    return ys[0], ys[1] if split else h.new_empty(*h.shape[:2], 0), mean, rstd


@_norm_modulate_lora_linear.register_fake
def _(
    h, shift, scale, weight, bias, lora_a, lora_b, parts, lora_scale, split, products, rotation
):  # fmt: skip
    N, _ = weight_shape(weight, h.shape[2])
    widths = (split, N - split) if split else (N, 0)
    return *(h.new_empty(*h.shape[:2], width) for width in widths), *_statistics(h)


@torch.library.custom_op("fluxfast::norm_modulate_lora_linear_backward", mutates_args=())
def _norm_modulate_lora_linear_backward(
    dys: Sequence[Tensor],
    h: Tensor,
    shift: Optional[Tensor],  # noqa: UP045
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Sequence[Tensor],
    lora_a: Optional[Tensor],  # noqa: UP045
    lora_b: Optional[Tensor],  # noqa: UP045
    parts: Sequence[int],
    lora_scale: float,
    need_dh: bool,
    need_d_modulation: bool,
    products: str,
    rotation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> (dh, dshift, dscale, dA, dB), without elements where not needed or not there.

    shift is needed with an update alone: without one, x's shape is all that is asked of it.
    """
    x = h if lora_a is None else norm_modulate_rebuild(h, shift, scale, mean, rstd)
    need_dx = need_dh or need_d_modulation
    dxs, da, db = linear_backward(
        [last_stride_1(dy) for dy in dys], [x], weight, lora_a, lora_b, parts, lora_scale, need_dx,
        None, products, rotation,
    )  # fmt: skip
    del x
    gradients = [h.new_empty(0) for _ in range(3)]
    if need_dx:
        gradients = norm_modulate_backward(
            dxs[0], h, scale, mean, rstd, need_dh, need_d_modulation, in_place=True
        )
    missing = [h.new_empty(0, dtype=torch.float32) for _ in range(2)]
    return *gradients, *((da, db) if lora_a is not None else missing)


@_norm_modulate_lora_linear_backward.register_fake
def _(
    dys, h, shift, scale, mean, rstd, weight, lora_a, lora_b, parts, lora_scale, need_dh,
    need_d_mod, products, rotation,
):  # fmt: skip
    updates = (
        h.new_empty(0 if each is None else each.shape, dtype=torch.float32)
        for each in (lora_a, lora_b)
    )
    return *_fake_gradients(h, need_dh, need_d_mod), *updates


def _keep_with_linear(ctx, inputs, output) -> None:
    h, shift, scale, weight, _, lora_a, lora_b, parts, lora_scale, split, *how = inputs
    y0, y1, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    shift = shift if lora_a is not None else None
    ctx.save_for_backward(h, shift, scale, mean, rstd, lora_a, lora_b)
    ctx.weight, ctx.parts, ctx.lora_scale, ctx.how = weight, parts, lora_scale, how
    ctx.widths = (y0.shape[2], y1.shape[2]) if split else (y0.shape[2],)


def _differentiate_with_linear(ctx, dy0: Tensor | None, dy1: Tensor | None, *_):
    h, shift, scale, mean, rstd, lora_a, lora_b = ctx.saved_tensors
    needs_h, needs_shift, needs_scale, _, _, needs_a, needs_b = ctx.needs_input_grad[:7]
    frozen = [None] * len(ctx.weight), None
    rest = (
        None if ctx.parts else [],
        None,
        None,
        None,
        None,
    )  # an empty list has no gradient to be None
    if dy0 is None and dy1 is None:
        return None, None, None, *frozen, None, None, *rest
    dys = [
        h.new_zeros(*h.shape[:2], width) if dy is None else dy
        for dy, width in zip((dy0, dy1), ctx.widths, strict=False)
    ]
    dh, dshift, dscale, da, db = _norm_modulate_lora_linear_backward(
        dys, h, shift, scale, mean, rstd, ctx.weight, lora_a, lora_b, ctx.parts, ctx.lora_scale,
        needs_h, needs_shift or needs_scale, *ctx.how,
    )  # fmt: skip
    return (
        dh if needs_h else None,
        dshift if needs_shift else None,
        dscale if needs_scale else None,
        *frozen,
        da if needs_a else None,
        db if needs_b else None,
        *rest,
    )


_norm_modulate_lora_linear.register_autograd(
    _differentiate_with_linear, setup_context=_keep_with_linear
)


def norm_modulate_lora_linear(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    parts: Sequence[int] = (),
    lora_scale: float = 1.0,
    split: int = 0,
    products: str = "",
    rotation: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """The linear layer of LayerNorm(h) · (1 + scale) + shift; see the file's head.

    -> y [B, T, N] in h's dtype or, with a split, (y[..., :split], y[..., split:]), each contiguous.
    Gradients for h, shift, scale, lora_a and lora_b; the weight and the bias are frozen. Raises
    ValueError naming the argument.
    """
    _check(h, shift, scale)
    N, K = weight_shape(weight, h.shape[2])
    check_update(lora_a, lora_b, parts, N, K)
    check(0 <= split < N, "split", f"in 0..{N - 1}", split)
    check_products(products, rotation, weight, h, [K])
    y0, y1, *_ = _norm_modulate_lora_linear(
        h, shift, scale, list(weight), bias, lora_a, lora_b, list(parts), lora_scale, split,
        products, rotation,
    )  # fmt: skip
    return (y0, y1) if split else y0


# ---------------------------------------------------------------- references


def norm_modulate_reference(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The same in ordinary torch operations, differentiable in everything."""
    return F.layer_norm(h, [h.shape[-1]], eps=EPS) * (1 + scale) + shift


def norm_modulate_lora_linear_reference(
    h: Tensor, shift: Tensor, scale: Tensor, *linear, split: int = 0, **more
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in ordinary torch operations; `linear`, `more`: as `lora_linear_reference`'s."""
    x = norm_modulate_reference(h, shift, scale)
    y = lora_linear_reference(x, *linear, split=split, **more)
    return tuple(y.tensor_split([split], dim=-1)) if split else y
