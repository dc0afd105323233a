"""What `dense.py` and `eight_bit.py` share: where a tile lies, and what follows the product.

    Y = total + s·down·Upᵀ + bias;   residual + gate·Y where these are given

with total fp32 in registers; the rank-R product runs in the compute dtype into the same sum. One
rounding to the output's dtype at the end. Layouts: `dense.py`.
"""

from fluxfast_kernels.dispatch.backend import tl, triton


def rank_block(rank: int) -> int:
    """Columns of the rank that one product takes: 16 (the least `tl.dot` takes) or 32."""
    return 16 if rank <= 16 else 32


@triton.jit
def tile_at(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """-> first row and first column of this program's tile. GROUP_M rows of tiles share their
    columns of W in L2."""
    program = tl.program_id(0)
    m_tiles = tl.cdiv(M, BLOCK_M)
    in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_tile = program // in_group * GROUP_M
    group_rows = tl.minimum(m_tiles - first_tile, GROUP_M)
    m_first = (first_tile + program % in_group % group_rows) * BLOCK_M
    return m_first, program % in_group // group_rows * BLOCK_N


@triton.jit
def rows_at(x, m_first, m, T, stride_b, stride_t):
    """-> (address of row m_first, 32-bit distances of the rows m from it); row m is token m % T of
    batch m // T. (64 bits a row in the main loop cost the registers that 4 warps do not have.)"""
    batch, token = m_first // T, m_first % T
    distance = (m // T - batch) * stride_b + (m % T - token) * stride_t
    return x + batch.to(tl.int64) * stride_b + token.to(tl.int64) * stride_t, distance.to(tl.int32)


@triton.jit
def _rank_product(
    total, down, up, m, n, n_from, n_to, down_row, down_first, up_n, up_r, up_first, scale, dtype,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """total + down[m, down_first:][RANK]·(scale·up)ᵀ for the columns n_from <= n < n_to."""
    inside = ((n >= n_from) & (n < n_to))[None, :]
    up_rows = (n - n_from + up_first) * up_n
    # a loop, neither unrolled nor pipelined: unrolled, rank 128 spills
    for i in tl.range(0, (RANK + BLOCK_R - 1) // BLOCK_R, num_stages=1):
        r = i * BLOCK_R + tl.arange(0, BLOCK_R)
        real = r < RANK
        down_at = down + m.to(tl.int64)[:, None] * down_row + (down_first + r)[None, :]
        down_tile = tl.load(down_at, real[None, :], other=0.0).to(dtype)
        up_at = up + up_rows[None, :] + (r * up_r)[:, None]
        up_tile = tl.load(up_at, real[:, None] & inside, other=0.0).to(tl.float32) * scale
        total = tl.dot(down_tile, up_tile.to(dtype), total, input_precision="ieee")
    return total


@triton.jit
def finish(
    total, bias, down, up, gate, residual, y0, y1, m, m_first, n_first, M, N, T, split, scale,
    down_row, up_n, up_r, gate_b, residual_b, residual_t, y0_b, y0_t, y1_b, y1_t,
    dtype: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    PART_COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the update, bias, gate and residual to `total` and stores it. dtype: of the update's
    product."""
    n = n_first + tl.arange(0, BLOCK_N)
    if RANK > 0:
        if PART_COUNT == 0:
            total = _rank_product(
                total, down, up, m, n, 0, N, down_row, 0, up_n, up_r, 0, scale, dtype, RANK, BLOCK_R
            )
        for i in tl.static_range(PART_COUNT):
            start, end = PARTS[4 * i], PARTS[4 * i + 1]
            if (n_first < end) & (n_first + BLOCK_N > start):
                total = _rank_product(
                    total, down, up, m, n, start, end, down_row, PARTS[4 * i + 2] * RANK,
                    up_n, up_r, PARTS[4 * i + 3], scale, dtype, RANK, BLOCK_R,
                )  # fmt: skip

    in_n = n < N
    if bias is not None:
        total += tl.load(bias + n, in_n, other=0.0).to(tl.float32)[None, :]
    inside = (m_first + tl.arange(0, BLOCK_M) < M)[:, None] & in_n[None, :]
    if gate is not None:
        gate_first, rows = rows_at(gate, m_first, m, T, gate_b, 0)
        gate_tile = tl.load(gate_first + rows[:, None] + n[None, :], inside, other=0.0)
        total *= gate_tile.to(tl.float32)
    if residual is not None:
        residual_first, rows = rows_at(residual, m_first, m, T, residual_b, residual_t)
        residual_tile = tl.load(residual_first + rows[:, None] + n[None, :], inside, other=0.0)
        total += residual_tile.to(tl.float32)
    y_tile = total.to(y0.dtype.element_ty)
    y0_first, rows = rows_at(y0, m_first, m, T, y0_b, y0_t)
    if y1 is None:
        tl.store(y0_first + rows[:, None] + n[None, :], y_tile, inside)
    else:
        y1_first, y1_rows = rows_at(y1, m_first, m, T, y1_b, y1_t)
        if n_first < split:
            at = y0_first + rows[:, None] + n[None, :]
            tl.store(at, y_tile, inside & (n < split)[None, :])
        if n_first + BLOCK_N > split:
            at = y1_first + y1_rows[:, None] + (n - split)[None, :]
            tl.store(at, y_tile, inside & (n >= split)[None, :])
