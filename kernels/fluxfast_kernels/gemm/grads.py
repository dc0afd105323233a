"""The skinny products of LoRA, deterministic, over inputs that lie in one or two tensors.

    down   [M, P·R] = X·Aᵀ                                    lora_down
    d_down [M, P·R] = s·Σ over parts of dY_part·B_part        lora_d_down
    dA     [P·R, K] = d_downᵀ·X                               lora_da    (fp32)
    dB     [N', R]  = s·dY_partᵀ·down_part                    lora_db    (fp32)

M = B·T. X and dY: one or two [B, T, width] side by side, last stride 1, other strides free.
Two kernels: `_skinny_kernel` (M stays) and `_grads_kernel` (M is summed over; where few columns
leave the card idle, M is cut in fixed ranges whose fp32 sums a second, ordered sum adds). Both walk
segments: runs of columns of one tensor that belong to one A. No atomics: two runs give equal bits.

The first two also write the 8-bit rows (`quant/rows.py`) of X, or of dY times a channel's factor,
on their way: they read all of it in any case, so that quantizing what another op made is no pass of
its own.

Products are of the compute dtype (x's), sums fp32; A, B, down and d_down are rounded to the
compute dtype as they are loaded. Nothing is saved here.

Bytes moved: X or dY once per 128 rank columns, the skinny operand once per tile (it stays in L2).
FLOP: 2·M·K·P·R or 2·M·N'·R each.

Refused (ValueError): other shapes, dtypes, a last stride other than 1.
"""

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.backend import check, check_dtype, tl, triton
from fluxfast_kernels.gemm.checks import check_parts, check_side_by_side
from fluxfast_kernels.quant.hadamard import rotated
from fluxfast_kernels.quant.rows import (
    Rows,
    encoded,
    magnitude,
    scale_and_inverse,
    top_of,
)

BLOCK_Q = 128  # columns that are quantized at once; a rotation's block where that is larger


@triton.jit
def _skinny_kernel(
    x0, x1, w, out, codes0, codes1, scale0, scale1, channel, M, T, K0, K1, scale,
    x0_b, x0_t, x1_b, x1_t, w_c, w_r, out_row,
    RANK: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT_COUNT: tl.constexpr,
    SLOTS: tl.constexpr, TOP: tl.constexpr, ROTATION: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[m, index·RANK + r] = scale·Σ x[m, c]·w[c, r] over the segments of one index.

    SLOTS 1: a program makes one block of one index's ranks. Else it makes all SLOTS of them, and
    codes and scales of its rows of x0 and x1, where these are given, in blocks of BLOCK_Q columns.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(m, M - 1)
    batch = (row // T).to(tl.int64)
    token = (row % T).to(tl.int64)
    if codes0 is not None:
        at = x0 + (batch * x0_b + token * x0_t)[:, None]
        _quantize(at, codes0, scale0, channel, m, M, K0, TOP, ROTATION, BLOCK_M, BLOCK_Q)
    if codes1 is not None:
        at = x1 + (batch * x1_b + token * x1_t)[:, None]
        beyond = channel if channel is None else channel + K0
        _quantize(at, codes1, scale1, beyond, m, M, K1, TOP, ROTATION, BLOCK_M, BLOCK_Q)
    for slot in tl.static_range(SLOTS):
        _skinny_block(
            x0, x1, w, out, M, scale, m, batch, token, slot if SLOTS > 1 else tl.program_id(1),
            x0_b, x0_t, x1_b, x1_t, w_c, w_r, out_row,
            RANK, SEGMENTS, SEGMENT_COUNT, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _quantize(
    x_at, codes, row_scale, channel, m, M, K,
    TOP: tl.constexpr, ROTATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Rows of `quant/rows.py`; the second sweep reads them from the cache, as the product does."""
    most = tl.zeros((BLOCK_M, BLOCK_Q), tl.int32)
    for i in range(0, tl.cdiv(K, BLOCK_Q)):
        v = _row_block(x_at, channel, i * BLOCK_Q, K, ROTATION, BLOCK_Q)
        most = tl.maximum(most, magnitude(v))
    scale, inverse = scale_and_inverse(tl.max(most, axis=1), TOP)
    tl.store(row_scale + m, scale, m < M)
    codes_at = codes + m.to(tl.int64)[:, None] * K
    for i in range(0, tl.cdiv(K, BLOCK_Q)):
        v = _row_block(x_at, channel, i * BLOCK_Q, K, ROTATION, BLOCK_Q)
        code = encoded(v * inverse[:, None], TOP, codes.dtype.element_ty)
        c = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
        tl.store(codes_at + c[None, :], code, (m < M)[:, None] & (c < K)[None, :])


@triton.jit
def _row_block(x_at, channel, first, K, ROTATION: tl.constexpr, BLOCK_Q: tl.constexpr):
    c = first + tl.arange(0, BLOCK_Q)[None, :]
    v = tl.load(x_at + c, c < K, other=0.0).to(tl.float32)
    if channel is not None:
        v *= tl.load(channel + c, c < K, other=0.0)
    if ROTATION:
        v = rotated(v, ROTATION)
    return v


@triton.jit
def _skinny_block(
    x0, x1, w, out, M, scale, m, batch, token, slot, x0_b, x0_t, x1_b, x1_t, w_c, w_r, out_row,
    RANK: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT_COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of `out`: the ranks that `slot` stands for."""
    rank_blocks: tl.constexpr = (RANK + BLOCK_N - 1) // BLOCK_N
    index = slot // rank_blocks
    r = slot % rank_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    real = (r < RANK)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(SEGMENT_COUNT):
        if index == SEGMENTS[5 * i + 3]:
            if SEGMENTS[5 * i] == 0:
                x_at = x0 + (batch * x0_b + token * x0_t)[:, None] + SEGMENTS[5 * i + 1]
            else:
                x_at = x1 + (batch * x1_b + token * x1_t)[:, None] + SEGMENTS[5 * i + 1]
            count: tl.constexpr = SEGMENTS[5 * i + 2] - SEGMENTS[5 * i + 1]
            for k in range(0, tl.cdiv(count, BLOCK_K)):
                c = k * BLOCK_K + tl.arange(0, BLOCK_K)
                w_at = w + (SEGMENTS[5 * i + 4] + c)[:, None] * w_c + r[None, :] * w_r
                if count % BLOCK_K == 0:
                    x_tile = tl.load(x_at + c[None, :])
                    w_tile = tl.load(w_at, real, other=0.0)
                else:
                    x_tile = tl.load(x_at + c[None, :], (c < count)[None, :], other=0.0)
                    w_tile = tl.load(w_at, real & (c < count)[:, None], other=0.0)
                w_tile = w_tile.to(x_tile.dtype)
                total = tl.dot(x_tile, w_tile, total, input_precision="ieee")
    out_at = out + m.to(tl.int64)[:, None] * out_row + (index * RANK + r)[None, :]
    total = (total * scale).to(out.dtype.element_ty)
    tl.store(out_at, total, (m < M)[:, None] & real)


@triton.jit
def _grads_kernel(
    x, skinny, out, M, T, scale, x_b, x_t, skinny_row, out_c, out_r, out_split, tiles_a_split,
    RANK: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT_COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, c, r] = scale·Σ x[m, c]·skinny[m, index·RANK + r] over the split's rows m.

    A segment here: first tile, first column, last column + 1, index, first row of out."""
    tile = tl.program_id(0)
    first, start, end, index, to = SEGMENTS[0], SEGMENTS[1], SEGMENTS[2], SEGMENTS[3], SEGMENTS[4]
    for i in tl.static_range(1, SEGMENT_COUNT):
        here = tile >= SEGMENTS[5 * i]
        first = tl.where(here, SEGMENTS[5 * i], first)
        start = tl.where(here, SEGMENTS[5 * i + 1], start)
        end = tl.where(here, SEGMENTS[5 * i + 2], end)
        index = tl.where(here, SEGMENTS[5 * i + 3], index)
        to = tl.where(here, SEGMENTS[5 * i + 4], to)
    c = start + (tile - first) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = r < RANK
    # x is the right operand: as the left one it would be transposed in registers, not by ldmatrix
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    first_tile = tl.program_id(2) * tiles_a_split
    for i in range(0, tiles_a_split):
        m = (first_tile + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        row = (m // T).to(tl.int64) * x_b + (m % T).to(tl.int64) * x_t
        in_m = (m < M)[:, None]
        x_tile = tl.load(x + row[:, None] + c[None, :], in_m & (c < end)[None, :], other=0.0)
        at = skinny + m.to(tl.int64)[:, None] * skinny_row + (index * RANK + r)[None, :]
        s_tile = tl.load(at, in_m & real[None, :], other=0.0).to(x_tile.dtype)
        total = tl.dot(tl.trans(s_tile), x_tile, total, input_precision="ieee")
    at = (to + c - start).to(tl.int64)[None, :] * out_c + r.to(tl.int64)[:, None] * out_r
    out_at = out + tl.program_id(2).to(tl.int64) * out_split + at
    tl.store(out_at, total * scale, (c < end)[None, :] & real[:, None])


def _segments(parts, widths: list[int]) -> list[tuple[int, int, int, int, int]]:
    """Parts (start, end, index, row) cut where a tensor ends: (tensor, start, end, index, row),
    columns counted within the tensor."""
    found, before = [], 0
    for tensor, width in enumerate(widths):
        for start, end, index, row in parts:
            low, high = max(start, before), min(end, before + width)
            if low < high:
                found.append((tensor, low - before, high - before, index, row + low - start))
        before += width
    return found


def _power_of_two(count: int, most: int) -> int:
    """The least power of two that holds `count`, from 16 (what `tl.dot` takes) to `most`."""
    return min(max(16, triton.next_power_of_2(count)), most)


def _tile(op: str, xs: list[Tensor], M: int, N: int, K: int, tile: dispatch.Tile | None):
    if tile is not None:
        return tile
    return dispatch.choose(op, dispatch.arch_of(xs[0].device), xs[0].dtype, "dense", M, N, K).tile


def _skinny(
    xs, w, w_strides, parts, rank, indices, scale, out, tile, rows=None, channel=None, rotation=0
) -> Tensor:
    """rows: per input the Rows to fill, or None."""
    B, T, widths = check_side_by_side("xs", xs)
    M, device = B * T, xs[0].device
    if out is None:
        out = xs[0].new_empty(M, indices * rank)
    check_dtype("out", out)
    fits = out.shape == (M, indices * rank) and out.is_contiguous()
    check(fits, "out", f"contiguous [{M}, {indices * rank}]", tuple(out.shape))
    check(w.device == device and out.device == device, "every tensor", f"on {device}",
          [w.device, out.device])  # fmt: skip
    if M == 0:
        return out
    rows = [*(rows or [None] * len(xs)), None][:2]
    given = [row for row in rows if row is not None]
    tile = _tile("lora_skinny_8bit" if given else "lora_skinny", xs, M, rank, sum(widths), tile)
    block_n = _power_of_two(rank, tile.block_n)
    segments = _segments(parts, widths)
    x1 = xs[1] if len(xs) == 2 else None
    blocks = indices * triton.cdiv(rank, block_n)
    slots = blocks if given else 1
    _skinny_kernel[(triton.cdiv(M, tile.block_m), blocks // slots)](
        xs[0], x1, w, out, *(None if row is None else row.codes for row in rows),
        *(None if row is None else row.scale for row in rows), channel,
        M, T, widths[0], widths[1] if x1 is not None else 0, float(scale), *xs[0].stride()[:2],
        *(x1.stride()[:2] if x1 is not None else (0, 0)), *w_strides, out.stride(0),
        RANK=rank, SEGMENTS=sum(segments, ()), SEGMENT_COUNT=len(segments), SLOTS=slots,
        TOP=top_of(given[0] if given else None), ROTATION=rotation,
        BLOCK_Q=max(BLOCK_Q, rotation),
        BLOCK_M=tile.block_m, BLOCK_N=block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _grads(xs, skinny, parts, rank, scale, out, strides, tile) -> Tensor:
    """`out` [rows, columns] with `strides` (column of x or dy, column of the rank)."""
    B, T, widths = check_side_by_side("xs", xs)
    M = B * T
    check_dtype("out", out, (torch.float32,))
    check(out.is_contiguous(), "out", "contiguous", out.stride())
    check(out.device == xs[0].device, "out", f"on {xs[0].device}", out.device)
    fits = skinny.ndim == 2 and skinny.shape[0] == M and skinny.stride(1) == 1
    check(
        fits and skinny.device == out.device, "down or d_down", f"[{M}, P·R]", tuple(skinny.shape)
    )
    if M == 0:
        return out.zero_()
    tile = _tile("lora_grads", xs, M, rank, sum(widths), tile)
    block_n = _power_of_two(rank, tile.block_n)
    rank_blocks, steps = triton.cdiv(rank, block_n), triton.cdiv(M, tile.block_m)
    columns = sum(triton.cdiv(end - start, tile.block_k) for start, end, _, _ in parts)
    splits = max(1, min(tile.group_m // (columns * rank_blocks), steps // 4))
    a_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, a_split)
    sums = out[None] if splits == 1 else out.new_empty(splits, *out.shape)
    segments = _segments(parts, widths)
    for tensor, x in enumerate(xs):
        own, tiles = [], 0
        for of, start, end, index, row in segments:
            if of == tensor:
                own.append((tiles, start, end, index, row))
                tiles += triton.cdiv(end - start, tile.block_k)
        if own:
            _grads_kernel[(tiles, rank_blocks, splits)](
                x, skinny, sums, M, T, float(scale), *x.stride()[:2], skinny.stride(0), *strides,
                out.numel(), a_split, RANK=rank, SEGMENTS=sum(own, ()), SEGMENT_COUNT=len(own),
                BLOCK_M=tile.block_m, BLOCK_N=block_n, BLOCK_K=tile.block_k,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
    return out if splits == 1 else torch.sum(sums, 0, out=out)


def lora_down(
    xs: list[Tensor],
    lora_a: Tensor,
    out: Tensor | None = None,
    tile: dispatch.Tile | None = None,
    rows: list[Rows | None] | None = None,
    rotation: int = 0,
) -> Tensor:
    """X·Aᵀ. xs: one or two [B, T, K_i]; lora_a: [P·R, K] contiguous, any compute dtype; out:
    [B·T, P·R] to write into; rows: per input its 8-bit Rows to fill, rotated, or None.
    -> [B·T, P·R] in x's dtype (or out's). One launch."""
    K = sum(x.shape[-1] for x in xs)
    fits = lora_a.ndim == 2 and lora_a.shape[1] == K and lora_a.is_contiguous()
    check(fits, "lora_a", f"contiguous [P·R, {K}]", tuple(lora_a.shape))
    rank = lora_a.shape[0]
    given = (out, tile, rows, None, rotation)
    return _skinny(xs, lora_a, (1, K), [(0, K, 0, 0)], rank, 1, 1.0, *given)


def lora_d_down(
    dys: list[Tensor],
    lora_b: Tensor,
    parts: list[int],
    scale: float,
    indices: int,
    out: Tensor | None = None,
    tile: dispatch.Tile | None = None,
    rows: list[Rows | None] | None = None,
    channel: Tensor | None = None,
) -> Tensor:
    """s·Σ dY_part·B_part, per index of A. dys: one or two [B, T, N_i]; lora_b: [N', R] contiguous;
    indices: P; out: [B·T, P·R]; rows: per dY the 8-bit Rows of dY·channel (fp32 [N]) to fill, or
    None. -> [B·T, P·R] in dy's dtype (or out's); zero where no part names an index. One launch."""
    triples = check_parts(parts, sum(dy.shape[-1] for dy in dys), lora_b)
    check(max(t[2] for t in triples) < indices, "parts", f"with an index below {indices}", parts)
    check(lora_b.is_contiguous(), "lora_b", "contiguous", lora_b.stride())
    rank = lora_b.shape[1]
    given = (out, tile, rows, channel)
    return _skinny(dys, lora_b, (rank, 1), triples, rank, indices, scale, *given)


def lora_da(
    xs: list[Tensor], d_down: Tensor, out: Tensor | None = None, tile: dispatch.Tile | None = None
) -> Tensor:
    """d_downᵀ·X. d_down: [B·T, P·R] with the scale in it. -> fp32 [P·R, K]."""
    K, rank = sum(x.shape[-1] for x in xs), d_down.shape[1]
    if out is None:
        out = xs[0].new_empty(rank, K, dtype=torch.float32)
    check(out.shape == (rank, K), "out", f"[{rank}, {K}]", tuple(out.shape))
    return _grads(xs, d_down, [(0, K, 0, 0)], rank, 1.0, out, (1, K), tile)


def lora_db(
    dys: list[Tensor],
    down: Tensor,
    parts: list[int],
    scale: float,
    rank: int,
    out: Tensor | None = None,
    tile: dispatch.Tile | None = None,
) -> Tensor:
    """s·dY_partᵀ·down_part, part after part. down: [B·T, P·R]; rank: R. -> fp32 [N', R]."""
    rows = sum(end - start for start, end in zip(parts[::3], parts[1::3], strict=True))
    if out is None:
        out = dys[0].new_empty(rows, rank, dtype=torch.float32)
    triples = check_parts(parts, sum(dy.shape[-1] for dy in dys), out)
    most = max(t[2] for t in triples)
    check(out.shape[1] == rank, "out", f"[{rows}, {rank}]", tuple(out.shape))
    check(down.shape[1] >= rank * (most + 1), "down", f"[{down.shape[0]}, P·{rank}]",
          tuple(down.shape))  # fmt: skip
    return _grads(dys, down, triples, rank, scale, out, (rank, 1), tile)
