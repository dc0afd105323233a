"""The kernels of `norm_modulate.py`: LayerNorm and modulation of whole rows, and their gradients.

    n = (h − mean(h)) · rstd;   x = n · (1 + scale) + shift
    g = dx · (1 + scale);   dh = rstd · (g − mean(g) − n · mean(g · n))
    dshift = Σ_T dx;   dscale = Σ_T dx · n

A row is held in registers, so its mean and its variance about that mean take one read of it.
Everything is fp32 between load and store. Layouts, bytes and FLOP: `norm_modulate.py`.
"""

import torch
from torch import Tensor

from fluxfast_kernels.dispatch.backend import tl, triton
from fluxfast_kernels.quant.hadamard import rotated
from fluxfast_kernels.quant.rows import (
    Rows,
    encoded,
    magnitude,
    scale_and_inverse,
    top_of,
)

EPS = 1e-6
STEPS = 8  # tiles a program sums for dshift and dscale: 16 rows at D = 3072


@triton.jit
def _norm_modulate_kernel(
    H, SHIFT, SCALE, X, MEAN, RSTD, h_batch, h_token, shift_batch, scale_batch, T,
    CODES, ROW_SCALE,
    D: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    REBUILD: tl.constexpr, TOP: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    """REBUILD: mean and rstd are read; otherwise they are formed and written. CODES, ROW_SCALE: x's
    rows in 8 bits, where given."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK)[None, :]
    column, real = d < D, t < T
    inside = real[:, None] & column
    h_at = H + b * h_batch + t[:, None] * h_token + d
    h = tl.load(h_at, inside, other=0.0).to(tl.float32)
    shift = tl.load(SHIFT + b * shift_batch + d, column, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + b * scale_batch + d, column, other=0.0).to(tl.float32)
    if REBUILD:
        mean = tl.load(MEAN + b * T + t, real, other=0.0)
        rstd = tl.load(RSTD + b * T + t, real, other=0.0)
    else:
        mean = tl.sum(h, axis=1) / D
        centered = tl.where(inside, h - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / D + EPS)
        tl.store(MEAN + b * T + t, mean, real)
        tl.store(RSTD + b * T + t, rstd, real)
    x = (h - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift
    x = x.to(X.dtype.element_ty)
    tl.store(X + (b * T + t[:, None]) * D + d, x, inside)
    if CODES is not None:
        v = tl.where(inside, x.to(tl.float32), 0.0)
        if ROTATION:
            v = rotated(v, ROTATION)
        row_scale, inverse = scale_and_inverse(tl.max(magnitude(v), axis=1), TOP)
        tl.store(ROW_SCALE + b * T + t, row_scale, real)
        codes = encoded(v * inverse[:, None], TOP, CODES.dtype.element_ty)
        tl.store(CODES + (b * T + t[:, None]) * D + d, codes, inside)


@triton.jit
def _norm_modulate_backward_kernel(
    DX, H, SCALE, MEAN, RSTD, DH, PARTIAL, dx_batch, dx_token, h_batch, h_token, scale_batch, T,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    HAS_DH: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """STEPS tiles, one after the other: dh of each, and their share of dshift and dscale.

    DH may be DX: a tile is read before it is written.
    """
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK)
    column = (d < D)[None, :]
    if HAS_DH:
        scale_at = SCALE + b * scale_batch + d[None, :]
        factor = 1.0 + tl.load(scale_at, column, other=0.0).to(tl.float32)
    if HAS_SUMS:
        d_shift = tl.zeros((BLOCK,), tl.float32)
        d_scale = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, STEPS):
        t = (chunk.to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        real = t < T
        inside = real[:, None] & column
        dx_at = DX + b * dx_batch + t[:, None] * dx_token + d[None, :]
        h_at = H + b * h_batch + t[:, None] * h_token + d[None, :]
        dx = tl.load(dx_at, inside, other=0.0).to(tl.float32)
        h = tl.load(h_at, inside, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + b * T + t, real, other=0.0)[:, None]
        rstd = tl.load(RSTD + b * T + t, real, other=0.0)[:, None]
        n = (h - mean) * rstd  # not zero past column D, but dx is, and so is every sum
        if HAS_SUMS:
            d_shift += tl.sum(dx, axis=0)
            d_scale += tl.sum(dx * n, axis=0)
        if HAS_DH:
            g = dx * factor
            mean_g = (tl.sum(g, axis=1) / D)[:, None]
            mean_gn = (tl.sum(g * n, axis=1) / D)[:, None]
            dh = (rstd * (g - mean_g - n * mean_gn)).to(DH.dtype.element_ty)
            tl.store(DH + (b * T + t[:, None]) * D + d[None, :], dh, inside)
    if HAS_SUMS:
        partial = PARTIAL + (b * tl.num_programs(0) + chunk) * 2 * D + d
        tl.store(partial, d_shift, d < D)
        tl.store(partial + D, d_scale, d < D)


# ---------------------------------------------------------------- launchers


def tile(D: int, rotation: int = 0) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program: whole rows, two at FLUX's 3072, which share their
    modulation. One where they are rotated: two spill (sm_90, Triton 3.7.1)."""
    block = triton.next_power_of_2(D)
    rows = max(1, min(16, (4096 if rotation else 8192) // block))
    return rows, block, max(4, min(16, rows * block // 1024))


def launch_norm_modulate(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rebuild: bool,
    rows: Rows | None = None,
    rotation: int = 0,
) -> None:
    """Overwrites x [B, T, D], contiguous, unless it is a rebuild mean and rstd [B, T], and x's rows
    where they are given."""
    B, T, D = h.shape
    tile_rows, block, warps = tile(D, rotation)
    _norm_modulate_kernel[(triton.cdiv(T, tile_rows), B)](
        h, shift, scale, x, mean, rstd, *h.stride()[:2], shift.stride(0), scale.stride(0), T,
        *((rows.codes, rows.scale) if rows else (None, None)),
        D=D, EPS=EPS, ROWS=tile_rows, BLOCK=block, REBUILD=rebuild, TOP=top_of(rows),
        ROTATION=rotation, num_warps=warps,
    )  # fmt: skip


def launch_norm_modulate_backward(
    dx: Tensor,
    h: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dh: Tensor | None,
    d_modulation: tuple[Tensor, Tensor] | None,
) -> None:
    """Overwrites dh [B, T, D] (it may be dx, where that is contiguous) and (dshift, dscale), each
    [B, 1, D], where they are given."""
    B, T, D = h.shape
    rows, block, warps = tile(D)
    steps = 1 if d_modulation is None else STEPS
    chunks = triton.cdiv(T, rows * steps)
    partial = None
    if d_modulation is not None:
        partial = torch.empty(B, chunks, 2, D, dtype=torch.float32, device=h.device)
    _norm_modulate_backward_kernel[(chunks, B)](
        dx, h, scale, mean, rstd, dh, partial,
        *dx.stride()[:2], *h.stride()[:2], scale.stride(0), T,
        D=D, ROWS=rows, BLOCK=block, STEPS=steps,
        HAS_DH=dh is not None, HAS_SUMS=d_modulation is not None, num_warps=warps,
    )  # fmt: skip
    if d_modulation is not None:
        for out, total in zip(d_modulation, partial.sum(1).unbind(1), strict=True):
            out.copy_(total[:, None])
