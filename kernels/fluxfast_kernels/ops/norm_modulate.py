"""LayerNorm with the modulation that follows it, alone or as the prologue of a linear layer.

    n = (h − mean(h)) · rstd,   rstd = 1 / sqrt(var(h) + 1e-6)      (no affine, biased variance)
    x = n · (1 + scale) + shift;      y = x Wᵀ + b + s · (x Aᵀ) Bᵀ  (`lora_linear.py`)

    g = dx · (1 + scale);   dh = rstd · (g − mean(g) − n · mean(g · n))
    dshift = Σ_T dx;   dscale = Σ_T dx · n

Layouts: h [B, T, D], shift and scale [B, 1, D], one dtype (fp32, bf16 or fp16). The last stride is
1, the others are free: shift and scale may be chunks of the modulation's output, h one stream's
tokens of a joint tensor. mean and rstd are fp32 [B, T]; sums are fp32, the variance is taken
about the mean. weight, update: see `lora_linear.py`. A row is held in registers, so its mean and
its variance about that mean take one read of it; all is fp32 between load and store.

`norm_modulate_lora_linear` writes x to a temporary and multiplies that. A matmul of M rows and N
columns reads its x once per column of tiles (N = 9216 in tiles of 128: 72 times); normalizing
inside it would repeat this file's work as often and take the matmul from cuBLAS. x is not saved
but recomputed in backward: one more read of h and write of x there, for 2·D bytes a token less
saved in bf16.

Saved for backward: h, mean, rstd, scale, and with an update shift, A and B.

Bytes, in elements: x reads B·T·D and writes B·T·D, recomputed likewise; dh reads h and dx and
writes B·T·D (in the fused op over dx itself). dshift and dscale are formed only when asked for, in
that same pass and without atomics: one fp32 partial sum per chunk of tokens, then the sum of the
chunks, so that two runs agree bit for bit. FLOP: 8 an element; recomputed 4; backward 10, with
dshift and dscale 13. The linear's own are in `lora_linear.py`.

Refused with ValueError: other shapes, mixed dtypes, a last stride other than 1, D above 16 384 (a
row is held in registers), and what `lora_linear` refuses.
Source: adaptive layer norm (DiT, arXiv 2212.09748), as FLUX's blocks use it.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import check, kernel, last_stride_1, matrix, tl, triton
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.ops.lora_linear import (
    LINEAR,
    check_linear,
    fake_update_gradients,
    flatten,
    linear_gradients,
    lora_linear_reference,
    or_empty,
    save_linear,
    saved_linear,
    unflatten,
)
from fluxfast_kernels.quant.frozen import FrozenWeight, weight_shape
from fluxfast_kernels.quant.hadamard import rotated
from fluxfast_kernels.quant.rows import (
    TOP,
    QuantizedRows,
    empty_rows,
    magnitude,
    quantize,
    rows_pointer,
    scale_and_inverse,
)

EPS = 1e-6
MAX_WIDTH = 16384
STEPS = 8  # tiles a program sums for dshift and dscale: 16 rows at D = 3072


class Spec(NamedTuple):
    """What a kernel is compiled for: a program's tokens and columns (a power of two that holds D).

    recompute: mean and rstd are read, not formed and written. Of 8-bit rows: top, rotation.
    """

    D: int
    tokens: int
    columns: int
    recompute: bool = False
    top: float = TOP["int8"]
    rotation: int = 0


# ---------------------------------------------------------------- forward kernel

_EPS = tl.constexpr(EPS)


@kernel
def _norm_modulate_kernel(h, shift, scale, x_ptr, mean_ptr, rstd_ptr, rows, T, SPEC: tl.constexpr):
    """h, shift, scale: `Matrix`; x, contiguous, and where given its 8-bit rows are written."""
    D: tl.constexpr = SPEC.D
    t = tl.program_id(0).to(tl.int64) * SPEC.tokens + tl.arange(0, SPEC.tokens)
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, SPEC.columns)[None, :]
    column, real = d < D, t < T
    inside = real[:, None] & column
    h_at = h.ptr + b * h.batch_stride + t[:, None] * h.token_stride + d
    value = tl.load(h_at, inside, other=0.0).to(tl.float32)
    added = tl.load(shift.ptr + b * shift.batch_stride + d, column, other=0.0).to(tl.float32)
    factor = tl.load(scale.ptr + b * scale.batch_stride + d, column, other=0.0).to(tl.float32)
    if SPEC.recompute:
        mean = tl.load(mean_ptr + b * T + t, real, other=0.0)
        rstd = tl.load(rstd_ptr + b * T + t, real, other=0.0)
    else:
        mean = tl.sum(value, axis=1) / D
        centered = tl.where(inside, value - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / D + _EPS)
        tl.store(mean_ptr + b * T + t, mean, real)
        tl.store(rstd_ptr + b * T + t, rstd, real)
    x = (value - mean[:, None]) * rstd[:, None] * (1.0 + factor) + added
    x = x.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + (b * T + t[:, None]) * D + d, x, inside)
    if rows is not None:
        v = tl.where(inside, x.to(tl.float32), 0.0)
        if SPEC.rotation:
            v = rotated(v, SPEC.rotation)
        row_scale, inverse = scale_and_inverse(tl.max(magnitude(v), axis=1), SPEC.top)
        tl.store(rows.scale_ptr + b * T + t, row_scale, real)
        values = quantize(v * inverse[:, None], SPEC.top, rows.ptr.dtype.element_ty)
        tl.store(rows.ptr + (b * T + t[:, None]) * D + d, values, inside)


# ---------------------------------------------------------------- backward kernel


@kernel
def _norm_modulate_backward_kernel(
    dx, h, scale, mean_ptr, rstd_ptr, dh_ptr, sums_ptr, T, SPEC: tl.constexpr, STEPS: tl.constexpr
):
    """STEPS tiles, one after the other: dh of each, and their share of dshift and dscale, where dh
    and sums are given.

    dh may be dx: a tile is read before it is written.
    """
    D: tl.constexpr = SPEC.D
    COLUMNS: tl.constexpr = SPEC.columns
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    column = (d < D)[None, :]
    if dh_ptr is not None:
        scale_at = scale.ptr + b * scale.batch_stride + d[None, :]
        factor = 1.0 + tl.load(scale_at, column, other=0.0).to(tl.float32)
    if sums_ptr is not None:
        d_shift = tl.zeros((COLUMNS,), tl.float32)
        d_scale = tl.zeros((COLUMNS,), tl.float32)
    for step in range(0, STEPS):
        t = (chunk.to(tl.int64) * STEPS + step) * SPEC.tokens + tl.arange(0, SPEC.tokens)
        real = t < T
        inside = real[:, None] & column
        dx_at = dx.ptr + b * dx.batch_stride + t[:, None] * dx.token_stride + d[None, :]
        h_at = h.ptr + b * h.batch_stride + t[:, None] * h.token_stride + d[None, :]
        gradient = tl.load(dx_at, inside, other=0.0).to(tl.float32)
        value = tl.load(h_at, inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + b * T + t, real, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + b * T + t, real, other=0.0)[:, None]
        n = (value - mean) * rstd  # not zero past column D, but dx is, and so is every sum
        if sums_ptr is not None:
            d_shift += tl.sum(gradient, axis=0)
            d_scale += tl.sum(gradient * n, axis=0)
        if dh_ptr is not None:
            g = gradient * factor
            mean_g = (tl.sum(g, axis=1) / D)[:, None]
            mean_gn = (tl.sum(g * n, axis=1) / D)[:, None]
            dh = (rstd * (g - mean_g - n * mean_gn)).to(dh_ptr.dtype.element_ty)
            tl.store(dh_ptr + (b * T + t[:, None]) * D + d[None, :], dh, inside)
    if sums_ptr is not None:
        sums_at = sums_ptr + (b * tl.num_programs(0) + chunk) * 2 * D + d
        tl.store(sums_at, d_shift, d < D)
        tl.store(sums_at + D, d_scale, d < D)


# ---------------------------------------------------------------- launchers


def tile(D: int, rotation: int = 0) -> tuple[int, int, int]:
    """Returns tokens, columns and warps of a program: whole rows, two at FLUX's 3072, which share
    their modulation. One where they are rotated: two spill (sm_90, Triton 3.7.1)."""
    columns = triton.next_power_of_2(D)
    tokens = max(1, min(16, (4096 if rotation else 8192) // columns))
    return tokens, columns, max(4, min(16, tokens * columns // 1024))


def launch_norm_modulate(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    recompute: bool,
    rows: QuantizedRows | None = None,
    rotation: int = 0,
) -> None:
    """Overwrites x [B, T, D], contiguous, mean and rstd [B, T], unless it recomputes, and x's rows
    where they are given."""
    B, T, D = h.shape
    tokens, columns, num_warps = tile(D, rotation)
    top = TOP["int8" if rows is None else rows.kind]
    spec = Spec(D, tokens, columns, recompute, top, rotation)
    modulation = (matrix(shift), matrix(scale))
    _norm_modulate_kernel[(triton.cdiv(T, tokens), B)](
        matrix(h), *modulation, x, mean, rstd, rows_pointer(rows), T, SPEC=spec, num_warps=num_warps
    )


def launch_norm_modulate_backward(
    dx: Tensor,
    h: Tensor,
    scale: Tensor,
    statistics: tuple[Tensor, Tensor],
    dh: Tensor | None,
    d_modulation: tuple[Tensor, Tensor] | None,
) -> None:
    """Overwrites dh [B, T, D] (it may be dx, where that is contiguous) and (dshift, dscale), each
    [B, 1, D], where they are given."""
    B, T, D = h.shape
    tokens, columns, num_warps = tile(D)
    steps = 1 if d_modulation is None else STEPS
    chunks = triton.cdiv(T, tokens * steps)
    sums = None
    if d_modulation is not None:
        sums = torch.empty(B, chunks, 2, D, dtype=torch.float32, device=h.device)
    operands = (matrix(dx), matrix(h), matrix(scale), *statistics, dh, sums)
    spec = Spec(D, tokens, columns)
    _norm_modulate_backward_kernel[(chunks, B)](
        *operands, T, SPEC=spec, STEPS=steps, num_warps=num_warps
    )
    if d_modulation is not None and sums is not None:
        for out, total in zip(d_modulation, sums.sum(1).unbind(1), strict=True):
            out.copy_(total[:, None])


# ---------------------------------------------------------------- forward and backward, no autograd


def norm_modulate_forward(
    h: Tensor, shift: Tensor, scale: Tensor, matmul: str = "", rotation: int = 0
) -> tuple[Tensor, Tensor, Tensor, QuantizedRows | None]:
    """Returns x [B, T, D] contiguous, mean and rstd fp32 [B, T], and x's 8-bit rows, where the
    kernel wrote them."""
    B, _, D = h.shape
    if backend.launches(h):
        x, (mean, rstd) = h.new_empty(h.shape), _statistics(h)
        rows = empty_rows(h, matmul) if matmul else None
        launch_norm_modulate(h, shift, scale, x, mean, rstd, False, rows, rotation)
        return x, mean, rstd, rows
    # the modulation as LayerNorm's affine, which may be fp32 beside a bf16 h: one pass per sample,
    # rounded once, and fp32 mean and rstd
    samples = [
        torch.native_layer_norm(one, [D], a, b, EPS)
        for one, a, b in zip(h, 1 + scale[:, 0].float(), shift[:, 0].float(), strict=True)
    ]
    x, mean, rstd = (
        each[0][None] if B == 1 else torch.stack(each) for each in zip(*samples, strict=True)
    )
    return x, mean[..., 0], rstd[..., 0], None


def norm_modulate_recompute(
    h: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Returns x, recomputed from what was saved."""
    if not backend.launches(h):
        return norm_modulate_forward(h, shift, scale)[0]  # forming mean and rstd costs no pass
    x = h.new_empty(h.shape)
    launch_norm_modulate(h, shift, scale, x, mean, rstd, recompute=True)
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
    """Returns dh [B, T, D], dshift and dscale [B, 1, D], without elements where not needed.

    in_place: dh may overwrite dx, which is contiguous then and not used elsewhere.
    """
    B, T, D = h.shape
    dh, dshift, dscale = h.new_empty(0), h.new_empty(0), h.new_empty(0)
    if need_d_modulation:
        dshift, dscale = h.new_empty(B, 1, D), h.new_empty(B, 1, D)
    if backend.launches(h):
        if need_dh:
            dh = dx if in_place else h.new_empty(B, T, D)
        sums = (dshift, dscale) if need_d_modulation else None
        launch_norm_modulate_backward(dx, h, scale, (mean, rstd), dh if need_dh else None, sums)
        return dh, dshift, dscale
    if need_d_modulation:
        torch.sum(dx, 1, keepdim=True, out=dshift)
        # LayerNorm's own sum of dx · n runs in h's dtype: over 1000 rows of bf16 it errs by 4e-2,
        # this by 3e-3
        for b in range(B):
            n = torch.native_layer_norm(h[b], [D], None, None, EPS)[0]
            torch.sum(n.mul_(dx[b]), 0, keepdim=True, out=dscale[b])
    if need_dh:
        samples = [
            torch.ops.aten.native_layer_norm_backward(
                dx[b], h[b], [D], mean[b, :, None], rstd[b, :, None], a, a, [True, False, False]
            )[0]
            for b, a in enumerate(1 + scale[:, 0].float())
        ]
        dh = samples[0][None] if B == 1 else torch.stack(samples)
    return dh, dshift, dscale


# ---------------------------------------------------------------- the op: LayerNorm and modulation


@torch.library.custom_op("fluxfast::norm_modulate", mutates_args=())
def _norm_modulate(h: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return norm_modulate_forward(h, shift, scale)[:3]


@_norm_modulate.register_fake
def _(h, shift, scale):
    return h.new_empty(h.shape), *_statistics(h)


def _statistics(h: Tensor) -> tuple[Tensor, ...]:
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


def _setup_context(ctx, inputs, output) -> None:
    h, _, scale = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, scale, mean, rstd)


def _backward(ctx, dx: Tensor | None, *_):
    needs = ctx.needs_input_grad
    if dx is None:
        return None, None, None
    gradients = _norm_modulate_backward(dx, *ctx.saved_tensors, needs[0], needs[1] or needs[2])
    return tuple(d if need else None for d, need in zip(gradients, needs, strict=True))


_norm_modulate.register_autograd(_backward, setup_context=_setup_context)


def norm_modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns LayerNorm(h) · (1 + scale) + shift [B, T, D], contiguous, in h's dtype.

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
    backend.check_alike({"h": h, "shift": shift, "scale": scale}, h)


# ---------------------------------------------------------------- the op: with the linear layer

_SCHEMA = (
    f"(Tensor h, Tensor shift, Tensor scale, {LINEAR}, SymInt split)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("fluxfast::norm_modulate_lora_linear", mutates_args=(), schema=_SCHEMA)
def _norm_modulate_lora_linear(
    h: Tensor, shift: Tensor, scale: Tensor, *flat
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y0, y1 (of no columns without a split), mean, rstd."""
    weight, update, (split,) = unflatten(flat)
    x, mean, rstd, rows = norm_modulate_forward(h, shift, scale, weight.matmul, weight.rotation)
    ys = linear_forward([x], weight, update, Epilogue(split=split), [rows])
    return ys[0], ys[1] if split else h.new_empty(*h.shape[:2], 0), mean, rstd


@_norm_modulate_lora_linear.register_fake
def _(h, shift, scale, weight, *flat):
    N, split = weight_shape(weight, h.shape[2])[0], flat[-1]
    widths = (split, N - split) if split else (N, 0)
    return *(h.new_empty(*h.shape[:2], width) for width in widths), *_statistics(h)


_BACKWARD_SCHEMA = (
    "(Tensor[] dys, Tensor h, Tensor? shift, Tensor scale, Tensor mean, Tensor rstd, "
    f"{LINEAR}, bool need_dh, bool need_d_modulation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op(
    "fluxfast::norm_modulate_lora_linear_backward", mutates_args=(), schema=_BACKWARD_SCHEMA
)
def _norm_modulate_lora_linear_backward(
    dys: Sequence[Tensor],
    h: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *flat,
) -> tuple[Tensor, ...]:
    """Returns dh, dshift, dscale, dA, dB, without elements where not needed or not there.

    shift is needed with an update alone: without one, only x's shape is used.
    """
    weight, update, (need_dh, need_d_modulation) = unflatten(flat)
    x = h if update is None else norm_modulate_recompute(h, cast(Tensor, shift), scale, mean, rstd)
    need_dx = need_dh or need_d_modulation
    dys = [last_stride_1(dy) for dy in dys]
    dxs, da, db = linear_backward(dys, [x], weight, update, need_dx)
    del x
    gradients = [h.new_empty(0) for _ in range(3)]
    if dxs is not None:
        needs = (need_dh, need_d_modulation)
        gradients = norm_modulate_backward(dxs[0], h, scale, mean, rstd, *needs, in_place=True)
    return *gradients, *(or_empty(each, h, torch.float32) for each in (da, db))


@_norm_modulate_lora_linear_backward.register_fake
def _(dys, h, shift, scale, mean, rstd, *flat):
    return *_fake_gradients(h, *flat[-2:]), *fake_update_gradients(h, flat)


def _setup_context_of_linear(ctx, inputs, output) -> None:
    h, shift, scale, *flat = inputs
    y0, y1, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    _, update, (split,) = unflatten(flat)
    save_linear(ctx, flat, h, None if update is None else shift, scale, mean, rstd)
    ctx.widths = (y0.shape[2], y1.shape[2]) if split else (y0.shape[2],)


def _backward_of_linear(ctx, dy0: Tensor | None, dy1: Tensor | None, *_):
    needs_h, needs_shift, needs_scale, *_, needs_a, needs_b, _, _, _ = ctx.needs_input_grad
    if dy0 is None and dy1 is None:
        return None, None, None, *linear_gradients(ctx), None
    flat, (h, *saved) = saved_linear(ctx)
    dys = [
        h.new_zeros(*h.shape[:2], width) if dy is None else dy
        for dy, width in zip((dy0, dy1), ctx.widths, strict=False)
    ]
    needs = (needs_h, needs_shift, needs_scale)
    *gradients, da, db = _norm_modulate_lora_linear_backward(
        dys, h, *saved, *flat, needs_h, needs_shift or needs_scale
    )
    inputs = (d if need else None for d, need in zip(gradients, needs, strict=True))
    lora = linear_gradients(ctx, da if needs_a else None, db if needs_b else None)
    return *inputs, *lora, None


_norm_modulate_lora_linear.register_autograd(
    _backward_of_linear, setup_context=_setup_context_of_linear
)


def norm_modulate_lora_linear(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: FrozenWeight,
    update: LoRAUpdate | None = None,
    split: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the linear layer of LayerNorm(h) · (1 + scale) + shift; see the file's head.

    y is [B, T, N] in h's dtype or, with a split, (y[..., :split], y[..., split:]), each contiguous.
    Gradients for h, shift, scale, lora_a and lora_b; the weight and the bias are
    frozen. Raises ValueError naming the argument.
    """
    _check(h, shift, scale)
    N = check_linear(h, [h.shape[2]], weight, update)
    check(0 <= split < N, "split", f"in 0..{N - 1}", split)
    y0, y1, *_ = _norm_modulate_lora_linear(h, shift, scale, *flatten(weight, update), split)
    return (y0, y1) if split else y0


# ---------------------------------------------------------------- references


def norm_modulate_reference(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`norm_modulate` in plain torch, differentiable in everything."""
    return F.layer_norm(h, [h.shape[-1]], eps=EPS) * (1 + scale) + shift


def norm_modulate_lora_linear_reference(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: FrozenWeight,
    update: LoRAUpdate | None = None,
    split: int = 0,
) -> Tensor | tuple[Tensor, ...]:
    """`norm_modulate_lora_linear` in plain torch, differentiable in everything."""
    x = norm_modulate_reference(h, shift, scale)
    y = lora_linear_reference(x, weight, update, split=split)
    return tuple(y.tensor_split([split], dim=-1)) if split else y
