"""The frozen linear in products of 8-bit codes, forward and towards x, without autograd.

    y  = s_x · s_w · (X8 · W8ᵀ) + b + s·(x Aᵀ)·Bᵀ        X8, s_x: x's rows;  W8, s_w: the weight's
    dx = s_g · (G8 · W8) + (s·dy·B)·A                     G8, s_g: the rows of dy · s_w

Sums of int8 products are exact (15 360 · 127² < 2³¹), those of fp8 fp32; everything after them is
fp32, rounded once. One copy of W8 serves both directions: its scales run along the contraction of
dx, so they are folded into dy before that is quantized. The update is computed from x and dy as
they are, in their dtype. With a rotation (`hadamard.py`) W8 and X8 are of W·H and x·H, and dx is
rotated back at the end, A with it.

Saved for backward: as without, x or what it is rebuilt from; codes are made again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.dispatch.backend import check
from fluxfast_kernels.gemm import grads as gemm_grads
from fluxfast_kernels.gemm.eight_bit import gemm_8bit, gemm_8bit_dx
from fluxfast_kernels.gemm.linear_dense import (
    batched,
    column_ranges,
    launched_update,
    like,
    lora_slices,
    plain_update,
    rows_of,
    times_transposed,
    with_update,
)
from fluxfast_kernels.quant.frozen import as_nf4, nf4_scales, storage_of, weight_codes, weight_shape
from fluxfast_kernels.quant.hadamard import hadamard_reference, hadamard_rotate
from fluxfast_kernels.quant.rows import (
    DTYPE,
    Rows,
    empty_rows,
    launch_quantize,
    multiply_codes,
    quantize_rows,
    quantize_rows_reference,
)


def forward(
    xs: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    parts: Sequence[int],
    scale: float,
    split: int,
    gate: Tensor | None,
    residual: Tensor | None,
    kind: str,
    rotation: int,
    rows: Sequence[Rows | None],
) -> list[Tensor]:
    """As `linear.linear_forward`."""
    K, dtype, shape = sum(x.shape[-1] for x in xs), xs[0].dtype, xs[0].shape[:-1]
    N, _ = weight_shape(weight, K)
    check(bias is None or bias.shape == (N,), "bias", f"[{N}]", bias is not None and bias.shape)
    if backend.launches(xs[0]):
        update = (lora_a, lora_b, parts, scale)
        return _launched_forward(
            xs, weight, bias, update, split, gate, residual, kind, rotation, list(rows)
        )
    flat = [rows_of(x) for x in xs]
    codes, w_scale = weight_codes(weight, K, kind)
    y = None
    for x, given, (low, high) in zip(flat, rows, column_ranges(flat), strict=True):
        row = given.flat() if given else quantize_rows_reference(x, kind, rotation=rotation)
        part = multiply_codes(row.codes, codes[:, low:high].T)
        part.mul_(w_scale).mul_(row.scale[:, None])  # in this order 1e38 does not overflow
        y = part if y is None else y.add_(part)
    if bias is not None:
        y.add_(bias)
    if lora_a is not None:
        down = times_transposed(flat, lora_a.to(dtype), None).float()
        up = (lora_b * scale).to(dtype).float()
        for (start, end), (b_start, b_end), (a_start, a_end) in lora_slices(parts, up.shape[1]):
            y[:, start:end].addmm_(down[:, a_start:a_end], up[b_start:b_end].T)
    y = like(shape, y)
    if residual is not None:
        y = torch.addcmul(residual.float(), gate.float(), y)
    cuts = [0, split, N] if split else [0, N]
    pieces = [y[..., low:high] for low, high in zip(cuts, cuts[1:], strict=False)]
    return [piece.to(dtype).contiguous() for piece in pieces]  # an op's results share no memory


def backward(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    weight: Sequence[Tensor],
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    parts: Sequence[int],
    scale: float,
    need_dx: bool,
    gate: Tensor | None,
    kind: str,
    rotation: int,
) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None]:
    """As `linear.linear_backward`."""
    if backend.launches(xs[0]):
        update = (lora_a, lora_b, parts, scale)
        return _launched_backward(dys, xs, weight, update, need_dx, gate, kind, rotation)
    dtype, shapes = xs[0].dtype, [x.shape for x in xs]
    dys = dys if gate is None else [dys[0] * gate]
    flat, grads = [rows_of(x) for x in xs], [rows_of(dy) for dy in dys]
    d_down = da = db = None
    if lora_a is not None:
        da, db, d_down = plain_update(xs, dys, flat, grads, lora_a, lora_b, parts, scale)
    if not need_dx:
        return None, da, db
    K = sum(x.shape[1] for x in flat)
    codes, w_scale = weight_codes(weight, K, kind)
    dx = None
    for dy, (low, high) in zip(grads, column_ranges(grads), strict=True):
        row = quantize_rows_reference(dy, kind, w_scale[low:high].contiguous())
        part = multiply_codes(row.codes, codes[low:high]).mul_(row.scale[:, None])
        dx = part if dx is None else dx.add_(part)
    if rotation:
        dx = hadamard_reference(dx, rotation)
    if d_down is not None:
        dx.addmm_(d_down.float(), lora_a.to(dtype).float())
    return _cut(dx.to(dtype), shapes), da, db


def _cut(dx: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """dx [M, K] -> one tensor per input, contiguous: an op's results share no memory."""
    pieces = dx.split([shape[-1] for shape in shapes], 1)
    return [piece.contiguous().view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


# ---------------------------------------------------------------- by the launchers


def _launched_forward(xs, weight, bias, update, split, gate, residual, kind, rotation, rows):
    K, dtype, shape = sum(x.shape[-1] for x in xs), xs[0].dtype, xs[0].shape[:-1]
    N, _ = weight_shape(weight, K)
    lora_a, lora_b, parts, scale = update
    bias = None if bias is None else bias.to(dtype)
    xs = [batched(x) for x in xs]
    # inputs that came without rows get them on the way of the update, which reads them whole
    fresh = [empty_rows(x, kind) if row is None else None for x, row in zip(xs, rows, strict=True)]
    down = None
    if lora_a is not None:
        wanted = fresh if any(fresh) else None
        down = gemm_grads.lora_down(xs, lora_a, rows=wanted, rotation=rotation)
    for index, row in enumerate(fresh):
        if row is not None:
            if lora_a is None:
                launch_quantize(xs[index], row, None, None, None, rotation)
            rows[index] = row
    M, arch = xs[0].shape[0] * xs[0].shape[1], dispatch.arch_of(xs[0].device)
    inverse = None
    if storage_of(weight) == "nf4" and _choose("gemm_8bit", arch, kind, "nf4", M, N, K):
        w_scale, inverse = nf4_scales(weight, N, K, kind)
        codes = as_nf4(weight, N, K)
    else:
        codes, w_scale = weight_codes(weight, K, kind)
        pieces = [*(x.shape[2] for x in xs), split, N - split]
        ours = _choose("gemm_8bit", arch, kind, "dense", M, N, K)
        if not ours and _torch_can(kind, dtype, pieces):

            def multiply(low: int, high: int) -> Tensor:
                b = None if bias is None else bias[low:high]
                return _scaled_mm(rows, codes[low:high], w_scale[low:high], b, dtype)

            given = (parts, scale, split, gate, residual)
            return with_update(multiply, shape, N, down, lora_b, *given)
    residual = None if residual is None else batched(residual)
    after = (bias, down, lora_b, parts, scale, dtype, split, gate, residual, inverse)
    ys = gemm_8bit(rows, codes, w_scale, *after)
    return [like(shape, y) for y in ys]


def _launched_backward(dys, xs, weight, update, need_dx, gate, kind, rotation):
    dtype, shapes = xs[0].dtype, [x.shape for x in xs]
    widths = [shape[-1] for shape in shapes]
    lora_a, lora_b, parts, scale = update
    K, N = sum(widths), sum(dy.shape[-1] for dy in dys)
    xs, dys = [batched(x) for x in xs], [batched(dy) for dy in dys]
    codes = w_scale = inverse = rows = None
    if need_dx:
        codes, w_scale, inverse, transposed = _weight_towards_x(weight, dys, N, K, kind)
    if gate is not None and need_dx:
        row, dy = quantize_rows(dys[0], kind, w_scale, gate=gate.reshape(dys[0].shape[0], 1, N))
        rows, dys = [row], [dy]
    elif gate is not None:
        dys = [dys[0] * gate]
    elif need_dx:
        rows = [empty_rows(dy, kind) for dy in dys]
    d_down = da = db = None
    if lora_a is not None:
        wanted = rows if gate is None else None
        da, db, d_down = launched_update(
            xs, dys, None, None, lora_a, lora_b, parts, scale, wanted, w_scale
        )
    elif rows is not None and gate is None:
        channels = w_scale.split([dy.shape[2] for dy in dys])
        for dy, row, channel in zip(dys, rows, channels, strict=True):
            launch_quantize(dy, row, None, channel, None, 0)
    if not need_dx:
        return None, da, db
    M, arch = dys[0].shape[0] * dys[0].shape[1], dispatch.arch_of(xs[0].device)
    by_torch = transposed and not _choose("gemm_8bit", arch, kind, "dense", M, K, N)
    if by_torch and _torch_can(kind, dtype, [K, *(dy.shape[2] for dy in dys)]):
        ones = torch.ones(K, dtype=torch.float32, device=codes.device)
        dx = _scaled_mm(rows, codes, ones, None, dtype)
        dx = hadamard_rotate(dx, rotation, out=dx) if rotation else dx
        if d_down is not None:
            dx.addmm_(d_down.to(dtype), lora_a.to(dtype))
        return _cut(dx, shapes), da, db
    # a rotated layer's dx is rotated back, its update with it, before it is rounded
    given = {"dtype": torch.float32 if rotation else dtype, "product": dtype}
    a = hadamard_rotate(lora_a, rotation) if rotation and lora_a is not None else lora_a
    dxs = gemm_8bit_dx(
        rows, codes, d_down, a, widths, **given, transposed=transposed, inverse=inverse
    )
    if rotation:
        outs = [torch.empty(dx.shape, dtype=dtype, device=dx.device) for dx in dxs]
        dxs = [hadamard_rotate(dx, rotation, out) for dx, out in zip(dxs, outs, strict=True)]
    return [dx.view(shape) for dx, shape in zip(dxs, shapes, strict=True)], da, db


def _weight_towards_x(weight, dys, N: int, K: int, kind: str):
    """-> the weight as `gemm_8bit_dx` takes it, its scales [N], their inverse for NF4, and whether
    it is transposed."""
    M, arch = dys[0].shape[0] * dys[0].shape[1], dispatch.arch_of(dys[0].device)
    op = "gemm_8bit_dx" + "_pair" * (len(dys) == 2)
    storage = storage_of(weight)
    kept = _choose(op, arch, kind, "nf4" if storage == "nf4" else "dense", M, K, N)
    if storage == "nf4" and kept:
        return as_nf4(weight, N, K), *nf4_scales(weight, N, K, kind), False
    transposed = storage != "dense" and not kept
    codes, w_scale = weight_codes(weight, K, kind, transposed)
    return codes, w_scale, None, transposed


def _choose(op: str, arch: int, kind: str, storage: str, M: int, N: int, K: int) -> bool:
    """Whether our kernel takes the weight as it is kept."""
    return dispatch.choose(op, arch, DTYPE[kind], storage, M, N, K).kind == "fused"


def _torch_can(kind: str, dtype: torch.dtype, widths: Sequence[int]) -> bool:
    """Of e4m3 codes; rowwise scales give bf16 only, and the widths of each of its operands are
    multiples of 16."""
    return kind == "fp8" and dtype == torch.bfloat16 and not any(width % 16 for width in widths)


def _scaled_mm(rows: Sequence[Rows], codes: Tensor, scale: Tensor, bias, dtype) -> Tensor:
    """Rows · codesᵀ [M, N] by torch's fp8 product, one an input; codes [N, K], scale [N]."""
    y, first = None, 0
    for row in rows:
        row = row.flat()
        columns = codes[:, first : first + row.codes.shape[1]]
        more = torch._scaled_mm(
            row.codes, columns.T, row.scale[:, None], scale[None], bias if y is None else None,
            out_dtype=dtype, use_fast_accum=False,
        )  # fmt: skip
        y, first = more if y is None else y.add_(more), first + row.codes.shape[1]
    return y


# ---------------------------------------------------------------- reference


class _Product(torch.autograd.Function):
    """Sums in fp64, so exact for int8: the truth that tests compare with."""

    @staticmethod
    def forward(ctx, weight, kind, rotation, split, *xs):
        K = sum(x.shape[-1] for x in xs)
        codes, w_scale = (tensor.clone() for tensor in weight_codes(weight, K, kind))
        ctx.codes, ctx.w_scale, ctx.kind, ctx.rotation = codes, w_scale, kind, rotation
        ctx.widths = [x.shape[-1] for x in xs]
        ctx.outputs = [split, len(codes) - split] if split else [len(codes)]
        y = 0
        for x, columns in zip(xs, codes.double().split(ctx.widths, 1), strict=True):
            row = quantize_rows_reference(x, kind, rotation=rotation)
            y = y + row.codes.double() @ columns.T * row.scale[..., None]
        return (y * w_scale).to(xs[0].dtype)

    @staticmethod
    def backward(ctx, dy):
        dx = 0
        pieces = (dy.split(ctx.outputs, -1), ctx.codes.double().split(ctx.outputs))
        for piece, codes, channel in zip(*pieces, ctx.w_scale.split(ctx.outputs), strict=True):
            row = quantize_rows_reference(piece, ctx.kind, channel)
            dx = dx + row.codes.double() @ codes * row.scale[..., None]
        dx = hadamard_reference(dx, ctx.rotation) if ctx.rotation else dx
        return None, None, None, None, *dx.to(dy.dtype).split(ctx.widths, -1)


def product_reference(
    xs: Sequence[Tensor], weight: Sequence[Tensor], kind: str, rotation: int = 0, split: int = 0
) -> Tensor:
    """[x_0, x_1, …] Wᵀ [..., N] of 8-bit codes, without bias or update, differentiable in xs: the
    gradients of its columns before and after a split have a scale a row each."""
    return _Product.apply(list(weight), kind, rotation, split, *xs)
