"""LoRA's skinny matmuls, deterministic, over inputs that lie in one or two tensors.

    down   [M, P·R] = X·Aᵀ                                    lora_down
    d_down [M, P·R] = s·Σ over parts of dY_part·B_part        lora_d_down
    dA     [P·R, K] = d_downᵀ·X                               lora_da    (fp32)
    dB     [N', R]  = s·dY_partᵀ·down_part                    lora_db    (fp32)

M = B·T. X and dY: one or two [B, T, width] side by side, last stride 1, other strides free.
Two kernels: `_skinny_kernel` (M stays) and `_grads_kernel` (M is summed over; where few columns
leave the card idle, M is cut in fixed ranges whose fp32 sums a second, ordered sum adds). Both walk
segments: runs of columns of one tensor that belong to one A. No atomics: two runs give equal bits.

The first two also write the 8-bit rows (`quant/rows.py`) of X, or of dY times a channel's factor:
they read all of it in any case, so that quantizing another op's output is no pass of its own.

Operands are of the compute dtype (x's), sums fp32; A, B, down and d_down are rounded to the
compute dtype as they are loaded. Nothing is saved here.

Bytes moved: X or dY once per 128 rank columns, the skinny operand once per tile (it stays in L2).
FLOP: 2·M·K·P·R or 2·M·N'·R each.

Refused (ValueError): other shapes, dtypes, a last stride other than 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.backend import check_dtype, kernel, matrix, refuse, tl, triton
from fluxfast_kernels.gemm.checks import check_parts, check_side_by_side
from fluxfast_kernels.gemm.epilogue import LoRAUpdate, Part
from fluxfast_kernels.quant.hadamard import rotated
from fluxfast_kernels.quant.rows import (
    TOP,
    QuantizedRows,
    magnitude,
    quantize,
    rows_pointer,
    scale_and_inverse,
)

BLOCK_Q = 128  # columns that are quantized at once; a rotation's block where that is larger


class Segment(NamedTuple):
    """Columns start to end of tensor 0 or 1 belong to A number `index`, and to rows of the skinny
    operand (or of the gradient) from `row` on."""

    tensor: int
    start: int
    end: int
    index: int
    row: int


class Strided(NamedTuple):
    """A skinny operand or result: strides of its long dimension and of the rank."""

    ptr: Tensor
    stride: int
    rank_stride: int


class SkinnySpec(NamedTuple):
    """slots: 1, or all blocks of ranks where a program makes them all; block_q: see BLOCK_Q."""

    tile: dispatch.Tile
    rank: int
    segments: tuple[Segment, ...]
    slots: int
    top: float
    rotation: int
    block_q: int


class GradsSpec(NamedTuple):
    """segments: of one tensor; a segment's `tensor` is the number of its first tile. evenly: its
    rows are one distance apart, batches too."""

    tile: dispatch.Tile
    rank: int
    segments: tuple[Segment, ...]
    evenly: bool


@kernel
def _skinny_kernel(
    x0, x1, w, out, rows0, rows1, channel_ptr, M, T, K0, K1, scale, SPEC: tl.constexpr
):
    """out[m, index·rank + r] = scale·Σ x[m, c]·w[c, r] over the segments of one index.

    1 slot: a program makes one block of one index's ranks. Else it makes all of them, and the 8-bit
    rows of x0 and x1, where these are given, in blocks of block_q columns.
    """
    SLOTS: tl.constexpr = SPEC.slots
    m = tl.program_id(0) * SPEC.tile.block_m + tl.arange(0, SPEC.tile.block_m)
    row = tl.minimum(m, M - 1)
    batch = (row // T).to(tl.int64)
    token = (row % T).to(tl.int64)
    if rows0 is not None:
        at = x0.ptr + (batch * x0.batch_stride + token * x0.token_stride)[:, None]
        _quantize(at, rows0, channel_ptr, m, M, K0, SPEC)
    if rows1 is not None:
        at = x1.ptr + (batch * x1.batch_stride + token * x1.token_stride)[:, None]
        beyond = channel_ptr if channel_ptr is None else channel_ptr + K0
        _quantize(at, rows1, beyond, m, M, K1, SPEC)
    for slot in tl.static_range(SLOTS):
        block = slot if SLOTS > 1 else tl.program_id(1)
        _skinny_block(x0, x1, w, out, M, scale, m, batch, token, block, SPEC)


@triton.jit
def _quantize(x_at, rows, channel_ptr, m, M, K, SPEC: tl.constexpr):
    """Rows of `quant/rows.py`; the second sweep reads them from the cache, as the matmul does."""
    BLOCK_M: tl.constexpr = SPEC.tile.block_m
    BLOCK_Q: tl.constexpr = SPEC.block_q
    most = tl.zeros((BLOCK_M, BLOCK_Q), tl.int32)
    for i in range(0, tl.cdiv(K, BLOCK_Q)):
        v = _row_block(x_at, channel_ptr, i * BLOCK_Q, K, SPEC)
        most = tl.maximum(most, magnitude(v))
    scale, inverse = scale_and_inverse(tl.max(most, axis=1), SPEC.top)
    tl.store(rows.scale_ptr + m, scale, m < M)
    values_at = rows.ptr + m.to(tl.int64)[:, None] * K
    for i in range(0, tl.cdiv(K, BLOCK_Q)):
        v = _row_block(x_at, channel_ptr, i * BLOCK_Q, K, SPEC)
        values = quantize(v * inverse[:, None], SPEC.top, rows.ptr.dtype.element_ty)
        c = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
        tl.store(values_at + c[None, :], values, (m < M)[:, None] & (c < K)[None, :])


@triton.jit
def _row_block(x_at, channel_ptr, first, K, SPEC: tl.constexpr):
    c = first + tl.arange(0, SPEC.block_q)
    v = tl.load(x_at + c[None, :], (c < K)[None, :], other=0.0).to(tl.float32)
    if channel_ptr is not None:
        # as a vector: loaded as a row of a matrix, x would go through shared memory to its layout
        v *= tl.load(channel_ptr + c, c < K, other=0.0)[None, :]
    if SPEC.rotation:
        v = rotated(v, SPEC.rotation)
    return v


@triton.jit
def _skinny_block(x0, x1, w, out, M, scale, m, batch, token, slot, SPEC: tl.constexpr):
    """block_n columns of `out`: the ranks that `slot` stands for."""
    BLOCK_M: tl.constexpr = SPEC.tile.block_m
    BLOCK_N: tl.constexpr = SPEC.tile.block_n
    BLOCK_K: tl.constexpr = SPEC.tile.block_k
    rank_blocks: tl.constexpr = (SPEC.rank + BLOCK_N - 1) // BLOCK_N
    index = slot // rank_blocks
    r = slot % rank_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    real = (r < SPEC.rank)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(len(SPEC.segments)):
        if index == SPEC.segments[i].index:
            start: tl.constexpr = SPEC.segments[i].start
            count: tl.constexpr = SPEC.segments[i].end - start
            if SPEC.segments[i].tensor == 0:
                x_row = x0.ptr + (batch * x0.batch_stride + token * x0.token_stride)[:, None]
            else:
                x_row = x1.ptr + (batch * x1.batch_stride + token * x1.token_stride)[:, None]
            c = tl.arange(0, BLOCK_K)
            x_at = x_row + (start + c)[None, :]
            w_at = w.ptr + (SPEC.segments[i].row + c)[:, None] * w.stride
            w_at += r[None, :] * w.rank_stride
            for k in range(0, tl.cdiv(count, BLOCK_K)):
                if count % BLOCK_K == 0:
                    x_tile = tl.load(x_at)
                    w_tile = tl.load(w_at, real, other=0.0)
                else:
                    inside = c < count - k * BLOCK_K
                    x_tile = tl.load(x_at, inside[None, :], other=0.0)
                    w_tile = tl.load(w_at, real & inside[:, None], other=0.0)
                x_at += BLOCK_K
                w_at += BLOCK_K * w.stride
                w_tile = w_tile.to(x_tile.dtype)
                total = tl.dot(x_tile, w_tile, total, input_precision="ieee")
    out_at = out.ptr + m.to(tl.int64)[:, None] * out.stride + (index * SPEC.rank + r)[None, :]
    total = (total * scale).to(out.ptr.dtype.element_ty)
    tl.store(out_at, total, (m < M)[:, None] & real)


@kernel
def _grads_kernel(x, skinny, out, split_stride, M, T, scale, split_tiles, SPEC: tl.constexpr):
    """out[split, c, r] = scale·Σ x[m, c]·skinny[m, index·rank + r] over a split's rows m."""
    BLOCK_N: tl.constexpr = SPEC.tile.block_n
    BLOCK_K: tl.constexpr = SPEC.tile.block_k
    tile = tl.program_id(0)
    first, start, end = SPEC.segments[0].tensor, SPEC.segments[0].start, SPEC.segments[0].end
    index, to = SPEC.segments[0].index, SPEC.segments[0].row
    for i in tl.static_range(1, len(SPEC.segments)):
        here = tile >= SPEC.segments[i].tensor
        first = tl.where(here, SPEC.segments[i].tensor, first)
        start = tl.where(here, SPEC.segments[i].start, start)
        end = tl.where(here, SPEC.segments[i].end, end)
        index = tl.where(here, SPEC.segments[i].index, index)
        to = tl.where(here, SPEC.segments[i].row, to)
    c = start + (tile - first) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = r < SPEC.rank
    # x is the right operand: as the left one it would be transposed in registers, not by ldmatrix
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    first_tile = tl.program_id(2) * split_tiles
    for i in range(0, split_tiles):
        m = (first_tile + i) * SPEC.tile.block_m + tl.arange(0, SPEC.tile.block_m)
        if SPEC.evenly:
            row = m.to(tl.int64) * x.token_stride
        else:
            row = (m // T).to(tl.int64) * x.batch_stride + (m % T).to(tl.int64) * x.token_stride
        in_m = (m < M)[:, None]
        x_tile = tl.load(x.ptr + row[:, None] + c[None, :], in_m & (c < end)[None, :], other=0.0)
        at = skinny.ptr + m.to(tl.int64)[:, None] * skinny.stride
        at += (index * SPEC.rank + r)[None, :]
        s_tile = tl.load(at, in_m & real[None, :], other=0.0).to(x_tile.dtype)
        total = tl.dot(tl.trans(s_tile), x_tile, total, input_precision="ieee")
    at = (to + c - start).to(tl.int64)[None, :] * out.stride
    at += r.to(tl.int64)[:, None] * out.rank_stride
    out_at = out.ptr + tl.program_id(2).to(tl.int64) * split_stride + at
    tl.store(out_at, total * scale, (c < end)[None, :] & real[:, None])


# ---------------------------------------------------------------- launchers


def _segments(parts: Sequence[Part], widths: list[int]) -> list[Segment]:
    """Returns the parts cut where a tensor ends, their columns counted within the tensor."""
    segments, before = [], 0
    for tensor, width in enumerate(widths):
        for start, end, index, row in parts:
            low, high = max(start, before), min(end, before + width)
            if low < high:
                at = (low - before, high - before)
                segments.append(Segment(tensor, *at, index, row + low - start))
        before += width
    return segments


def fitted(tile: dispatch.Tile, rank: int) -> dispatch.Tile:
    """Returns the tile with the least power of two that holds the rank as block_n, from 16 (the
    least `tl.dot` takes) to the tile's own."""
    return replace(tile, block_n=min(max(16, triton.next_power_of_2(rank)), tile.block_n))


def _tile_of(
    op: str, xs: list[Tensor], M: int, rank: int, K: int, tile: dispatch.Tile | None
) -> dispatch.Tile:
    if tile is None:
        arch = dispatch.arch_of(xs[0].device)
        tile = dispatch.choose(op, arch, xs[0].dtype, "dense", M, rank, K).tile
    return fitted(tile, rank)


def _skinny(
    xs: list[Tensor],
    w: Strided,
    parts: Sequence[Part],
    rank: int,
    indices: int,
    scale: float,
    out: Tensor | None,
    tile: dispatch.Tile | None,
    rows: Sequence[QuantizedRows | None] | None,
    channel: Tensor | None = None,
    rotation: int = 0,
) -> Tensor:
    """Returns `out` [B·T, indices·rank]. rows: per input its 8-bit rows to fill, or None."""
    B, T, widths = check_side_by_side("xs", xs)
    M, device = B * T, xs[0].device
    if out is None:
        out = xs[0].new_empty(M, indices * rank)
    check_dtype("out", out)
    fits = out.shape == (M, indices * rank) and out.is_contiguous()
    if not fits:
        refuse("out", f"contiguous [{M}, {indices * rank}]", tuple(out.shape))
    devices = [w.ptr.device, out.device]
    if devices != [device] * 2:
        refuse("every tensor", f"on {device}", devices)
    if M == 0:
        return out
    given = [row for row in rows or () if row is not None]
    rows0, rows1 = [*map(rows_pointer, rows or ()), None, None][:2]
    op = "lora_skinny_8bit" if given else "lora_skinny"
    tile = _tile_of(op, xs, M, rank, sum(widths), tile)
    blocks = indices * triton.cdiv(rank, tile.block_n)
    slots, top = (blocks, TOP[given[0].kind]) if given else (1, TOP["int8"])
    segments = tuple(_segments(parts, widths))
    spec = SkinnySpec(tile, rank, segments, slots, top, rotation, max(BLOCK_Q, rotation))
    x0, x1 = [*map(matrix, xs), None][:2]
    result = Strided(out, out.stride(0), 1)
    sizes = (M, T, *[*widths, 0][:2])
    _skinny_kernel[(triton.cdiv(M, tile.block_m), blocks // slots)](
        x0, x1, w, result, rows0, rows1, channel, *sizes, float(scale), SPEC=spec, **tile.options
    )
    return out


def _grads(
    xs: list[Tensor],
    skinny: Tensor,
    parts: Sequence[Part],
    rank: int,
    scale: float,
    out: Tensor,
    strides: tuple[int, int],
    tile: dispatch.Tile | None,
) -> Tensor:
    """Overwrites and returns `out`. strides: its own, of a column of x or dy and of a rank."""
    B, T, widths = check_side_by_side("xs", xs)
    M = B * T
    check_dtype("out", out, (torch.float32,))
    if not out.is_contiguous():
        refuse("out", "contiguous", out.stride())
    if out.device != xs[0].device:
        refuse("out", f"on {xs[0].device}", out.device)
    fits = skinny.ndim == 2 and skinny.shape[0] == M and skinny.stride(1) == 1
    fits = fits and skinny.device == out.device
    if not fits:
        refuse("down or d_down", f"[{M}, P·R]", tuple(skinny.shape))
    if M == 0:
        return out.zero_()
    tile = _tile_of("lora_grads", xs, M, rank, sum(widths), tile)
    rank_blocks, steps = triton.cdiv(rank, tile.block_n), triton.cdiv(M, tile.block_m)
    columns = sum(triton.cdiv(part.end - part.start, tile.block_k) for part in parts)
    splits = max(1, min(tile.group_m // (columns * rank_blocks), steps // 4))
    split_tiles = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, split_tiles)
    sums = out[None] if splits == 1 else out.new_empty(splits, *out.shape)
    segments = _segments(parts, widths)
    for tensor, x in enumerate(xs):
        own, tiles = [], 0
        for segment in segments:
            if segment.tensor == tensor:
                own.append(segment._replace(tensor=tiles))
                tiles += triton.cdiv(segment.end - segment.start, tile.block_k)
        if own:
            evenly = B == 1 or x.stride(0) == T * x.stride(1)
            spec = GradsSpec(tile, rank, tuple(own), evenly)
            operands = (matrix(x), Strided(skinny, skinny.stride(0), 1), Strided(sums, *strides))
            sizes = (out.numel(), M, T, float(scale), split_tiles)
            _grads_kernel[tiles, rank_blocks, splits](*operands, *sizes, SPEC=spec, **tile.options)
    return out if splits == 1 else torch.sum(sums, 0, out=out)


def lora_down(
    xs: list[Tensor],
    lora_a: Tensor,
    out: Tensor | None = None,
    tile: dispatch.Tile | None = None,
    rows: Sequence[QuantizedRows | None] | None = None,
    rotation: int = 0,
) -> Tensor:
    """Returns X·Aᵀ [B·T, P·R] in x's dtype (or out's). One launch.

    xs: one or two [B, T, K_i]; lora_a: [P·R, K] contiguous, any compute dtype; out: [B·T, P·R] to
    overwrite; rows: per input its 8-bit rows to fill, rotated, or None.
    """
    K = sum(x.shape[-1] for x in xs)
    fits = lora_a.ndim == 2 and lora_a.shape[1] == K and lora_a.is_contiguous()
    if not fits:
        refuse("lora_a", f"contiguous [P·R, {K}]", tuple(lora_a.shape))
    rank, w, parts = lora_a.shape[0], Strided(lora_a, 1, K), [Part(0, K, 0, 0)]
    return _skinny(xs, w, parts, rank, 1, 1.0, out, tile, rows, rotation=rotation)


def lora_d_down(
    dys: list[Tensor],
    update: LoRAUpdate,
    out: Tensor | None = None,
    tile: dispatch.Tile | None = None,
    rows: Sequence[QuantizedRows | None] | None = None,
    channel: Tensor | None = None,
) -> Tensor:
    """Returns s·Σ dY_part·B_part [B·T, P·R], per index of A, in dy's dtype (or out's); zero where
    no part names an index. One launch.

    dys: one or two [B, T, N_i]; out: [B·T, P·R] to overwrite; rows: per dY the 8-bit rows of
    dY·channel (fp32 [N]) to fill, or None.
    """
    lora_b, rank = update.lora_b, update.lora_b.shape[-1]
    parts = check_parts(update.parts, sum(dy.shape[-1] for dy in dys), lora_b)
    indices = update.lora_a.shape[0] // rank
    fits = max(part.index for part in parts) < indices
    if not fits:
        refuse("parts", f"with an index below {indices}", update.parts)
    if not lora_b.is_contiguous():
        refuse("lora_b", "contiguous", lora_b.stride())
    w = Strided(lora_b, rank, 1)
    return _skinny(dys, w, parts, rank, indices, update.scale, out, tile, rows, channel)


def lora_da(
    xs: list[Tensor], d_down: Tensor, out: Tensor | None = None, tile: dispatch.Tile | None = None
) -> Tensor:
    """Returns d_downᵀ·X, fp32 [P·R, K]. d_down: [B·T, P·R] with the scale in it."""
    K, rank = sum(x.shape[-1] for x in xs), d_down.shape[1]
    if out is None:
        out = xs[0].new_empty(rank, K, dtype=torch.float32)
    if out.shape != (rank, K):
        refuse("out", f"[{rank}, {K}]", tuple(out.shape))
    return _grads(xs, d_down, [Part(0, K, 0, 0)], rank, 1.0, out, (1, K), tile)


def lora_db(
    dys: list[Tensor],
    down: Tensor,
    update: LoRAUpdate,
    out: Tensor | None = None,
    tile: dispatch.Tile | None = None,
) -> Tensor:
    """Returns s·dY_partᵀ·down_part, part after part, fp32 [N', R]. down: [B·T, P·R]."""
    lora_b, rank = update.lora_b, update.rank
    parts = check_parts(update.parts, sum(dy.shape[-1] for dy in dys), lora_b)
    if out is None:
        out = lora_b.new_empty(lora_b.shape, dtype=torch.float32)
    if out.shape != lora_b.shape:
        refuse("out", f"{list(lora_b.shape)}", tuple(out.shape))
    most = max(part.index for part in parts)
    fits = down.shape[1] >= rank * (most + 1)
    if not fits:
        refuse("down", f"[{down.shape[0]}, P·{rank}]", tuple(down.shape))
    return _grads(dys, down, parts, rank, update.scale, out, (rank, 1), tile)
