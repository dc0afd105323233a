"""The frozen linear with its LoRA in the accumulator, forward and towards x.

    lora_gemm      Y[M, N]  = X·Wᵀ + b + s·down·Upᵀ             (optionally residual + gate·Y)
    lora_gemm_dx   dX[M, K] = dY·W + d_down·A

M = B·T rows. X, Y, dY, dX and residual are [B, T, width] with the last stride 1 and any other
strides; X and dY may be two tensors side by side, Y and dX may go to two tensors. W is dense
[N, K] or NF4, decoded tile by tile into registers (fp32 product, rounded once to the compute dtype,
as `nf4_decode` does). `down` = X·Aᵀ and `d_down` = s·Σ dY_part·B_part come in as [M, P·R], from
`grads.py`. Both formulas are one kernel: towards x the weight tile is not transposed and A
takes the place of Up.

Products are of the compute dtype (x's: bf16, fp16 or fp32), sums fp32; s·Up is formed in fp32
and rounded once. Nothing is saved here: the ops above say what they save.

Bytes moved, at least: X, Y and W once (NF4: 0.5 + 4/64 byte a weight, nested 0.5 + 1/64), down and
Up; FLOP: 2·M·N·(K + R). Decoding costs a shared-memory look-up (`tl.gather`) and about four other
instructions a weight and tile of rows; a tree of 15 selects cost 35, and look-ups by pointer became
4-byte asynchronous copies (counted in sm_89 code, Triton 3.7.1).

Refused (ValueError): a last stride other than 1, NF4 with K not a multiple of 64 or with an x whose
width is not, tensors of another shape, dtype or device.
"""

from torch import Tensor

from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.backend import check, tl, triton
from fluxfast_kernels.gemm.checks import (
    check_down,
    check_gated,
    check_parts,
    check_reach,
    check_side_by_side,
    check_weight,
    outputs,
)
from fluxfast_kernels.gemm.epilogue import finish, rank_block, rows_at, tile_at
from fluxfast_kernels.quant.nf4 import BLOCK, code_table, dynamic_map


@triton.jit
def weight_tile(
    w, absmax, nested, offset, code, table, w_row, rows, first, n_rows, n_columns,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """W[rows, first:first + COLUMNS]; NF4 in fp32, dense as it is stored."""
    if absmax is None:
        columns = first + tl.arange(0, COLUMNS)[None, :]
        at = w + rows[:, None] * w_row + columns
        if MASKED:
            tile = tl.load(at, (rows < n_rows)[:, None] & (columns < n_columns), other=0.0)
        else:
            tile = tl.load(at)
    else:
        tile = nf4_tile(
            w, absmax, nested, offset, code, table, w_row, rows, first, n_rows, n_columns,
            COLUMNS, MASKED, OFFSETS,
        )  # fmt: skip
    return tile


@triton.jit
def nf4_tile(
    w, absmax, nested, offset, code, table, w_row, rows, first, n_rows, n_columns,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """The same of NF4, fp32."""
    count: tl.constexpr = rows.shape[0]
    groups: tl.constexpr = (COLUMNS + 63) // 64
    line = rows[:, None]  # 32 bits: the launcher refuses 2^31 weights and more
    half = first // 2 + tl.arange(0, COLUMNS // 2)[None, :]
    group = first // 64 + tl.arange(0, groups)[None, :]
    group_at = line * (w_row // 64) + group
    inside = (rows < n_rows)[:, None]
    group_inside = inside & (group * 64 < n_columns)
    if MASKED:
        byte = tl.load(w + line * (w_row // 2) + half, inside & (half * 2 < n_columns), other=0)
        scale = tl.load(absmax + group_at, group_inside, other=0)
    else:
        byte = tl.load(w + line * (w_row // 2) + half)
        scale = tl.load(absmax + group_at)
    if nested is not None:
        outer = group_at // 256
        shift_at = outer if OFFSETS else outer * 0
        if MASKED:
            factor = tl.load(nested + outer, group_inside, other=0.0)
            shift = tl.load(offset + shift_at, group_inside, other=0.0)
        else:
            factor = tl.load(nested + outer)
            shift = tl.load(offset + shift_at)
        steps = tl.gather(table, tl.reshape(scale.to(tl.int32), (count * groups,)), 0)
        scale = tl.reshape(steps, (count, groups)) * factor + shift
    byte = byte.to(tl.int32)
    nibble = tl.reshape(tl.interleave(byte >> 4, byte & 15), (count * COLUMNS,))
    values = tl.reshape(tl.gather(code, nibble, 0), (count, COLUMNS))
    if groups == 1:
        values *= scale
    else:
        values = tl.reshape(values, (count, groups, 64)) * scale[:, :, None]
        values = tl.reshape(values, (count, COLUMNS))
    return values


@triton.jit
def _product(
    total, x, x_rows, count, before, w, absmax, nested, offset, code, table, w_row, n_first, N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr,
    MASKED: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """total + X·op(W) over one input, whose `count` columns follow `before` others."""
    for i in range(0, tl.cdiv(count, BLOCK_K)):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        if MASKED:
            x_tile = tl.load(x + x_rows[:, None] + k[None, :], (k < count)[None, :], other=0.0)
        else:
            x_tile = tl.load(x + x_rows[:, None] + k[None, :])
        if TRANSPOSED:
            n = tl.minimum(n_first + tl.arange(0, BLOCK_N), N - 1)
            w_tile = weight_tile(
                w, absmax, nested, offset, code, table, w_row, n, before + i * BLOCK_K,
                N, before + count, BLOCK_K, MASKED, OFFSETS,
            )  # fmt: skip
            w_tile = tl.trans(w_tile.to(x_tile.dtype))
        else:
            w_tile = weight_tile(
                w, absmax, nested, offset, code, table, w_row, before + k, n_first,
                before + count, N, BLOCK_N, MASKED, OFFSETS,
            ).to(x_tile.dtype)  # fmt: skip
        total = tl.dot(x_tile, w_tile, total, input_precision="ieee")
    return total


@triton.jit
def _gemm_kernel(
    x0, x1, w, absmax, nested, offset, code, table, bias, down, up, gate, residual, y0, y1,
    M, N, T, K0, K1, split, scale,
    x0_b, x0_t, x1_b, x1_t, w_row, down_row, up_n, up_r, gate_b, residual_b, residual_t,
    y0_b, y0_t, y1_b, y1_t,
    TRANSPOSED: tl.constexpr, MASKED: tl.constexpr, OFFSETS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr, PART_COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    m_first, n_first = tile_at(M, N, BLOCK_M, BLOCK_N, GROUP_M)

    # rows past the end repeat the last one: they are never stored
    m = tl.minimum(m_first + tl.arange(0, BLOCK_M), M - 1)
    # the two look-up tables, kept as tensors (`tl.gather` reads them from shared memory)
    if code is not None:
        code = tl.load(code + tl.arange(0, 16))
    if table is not None:
        table = tl.load(table + tl.arange(0, 256))
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x0_first, rows = rows_at(x0, m_first, m, T, x0_b, x0_t)
    total = _product(
        total, x0_first, rows, K0, 0, w, absmax, nested, offset, code, table, w_row,
        n_first, N, K0 + K1, BLOCK_N, BLOCK_K, TRANSPOSED, MASKED, OFFSETS,
    )  # fmt: skip
    if x1 is not None:
        x1_first, rows = rows_at(x1, m_first, m, T, x1_b, x1_t)
        total = _product(
            total, x1_first, rows, K1, K0, w, absmax, nested, offset, code, table, w_row,
            n_first, N, K0 + K1, BLOCK_N, BLOCK_K, TRANSPOSED, MASKED, OFFSETS,
        )  # fmt: skip

    finish(
        total, bias, down, up, gate, residual, y0, y1, m, m_first, n_first, M, N, T, split, scale,
        down_row, up_n, up_r, gate_b, residual_b, residual_t, y0_b, y0_t, y1_b, y1_t,
        x0.dtype.element_ty, RANK, BLOCK_R, PARTS, PART_COUNT, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def _launch(
    op, xs, weight, ys, N, K, tile, transposed, bias=None, down=None, up=None, up_strides=(0, 0),
    parts=(), scale=1.0, gate=None, residual=None,
):  # fmt: skip
    """Both formulas. N and K are the output's and the contraction's width here."""
    B, T, widths = check_side_by_side("xs", xs)
    M, device = B * T, xs[0].device
    dense = len(weight) == 1
    for tensor in [*weight, *ys, bias, down, up, gate, residual]:
        check(tensor is None or tensor.device == device, "every tensor", f"on {device}",
              None if tensor is None else tensor.device)  # fmt: skip
    if M == 0:
        return ys
    if tile is None:
        arch, storage = dispatch.arch_of(device), "dense" if dense else "nf4"
        tile = dispatch.choose(op, arch, xs[0].dtype, storage, M, N, K).tile
    for tensor in [*xs, *ys, residual]:
        check_reach(tensor, T, tile.block_m)
    x0, x1 = xs if len(xs) == 2 else (xs[0], None)
    y0, y1 = ys if len(ys) == 2 else (ys[0], None)
    packed, absmax, nested, offset = [*weight, None, None, None][:4]
    rank = 0 if down is None else up.shape[1 if transposed else 0]
    if len(parts) == 1 and parts[0] == (0, N, 0, 0):
        parts = ()  # all columns, one A: no branch
    masked = any(width % tile.block_k for width in widths)
    masked |= not transposed and N % tile.block_n != 0
    strides = [
        *(x0.stride()[:2]), *(x1.stride()[:2] if x1 is not None else (0, 0)),
        weight[0].stride(0) if dense else (K if transposed else N),
        0 if down is None else down.stride(0), *up_strides,
        0 if gate is None else gate.stride(0),
        *(residual.stride()[:2] if residual is not None else (0, 0)),
        *y0.stride()[:2], *(y1.stride()[:2] if y1 is not None else (0, 0)),
    ]  # fmt: skip
    grid = (triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)
    _gemm_kernel[grid](
        x0, x1, packed, absmax, nested, offset,
        None if dense else code_table(device), None if nested is None else dynamic_map(device),
        bias, down, up, gate, residual, y0, y1,
        M, N, T, widths[0], widths[1] if x1 is not None else 0, y0.shape[2], float(scale), *strides,
        TRANSPOSED=transposed, MASKED=masked, OFFSETS=offset is not None and offset.numel() > 1,
        RANK=rank, BLOCK_R=rank_block(rank), PARTS=sum(parts, ()), PART_COUNT=len(parts),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return ys


def lora_gemm(
    xs: list[Tensor],
    weight: list[Tensor],
    bias: Tensor | None,
    down: Tensor | None,
    lora_b: Tensor | None,
    parts: list[int],
    scale: float,
    split: int = 0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out: list[Tensor] | None = None,
    tile: dispatch.Tile | None = None,
) -> list[Tensor]:
    """X·Wᵀ + b + s·down·Upᵀ, or residual + gate·that. One launch.

    xs: one or two [B, T, K_i]; weight: [dense [N, K]] or the NF4 lists; bias: [N] or None;
    down: [B·T, P·R] (x's dtype or fp32, last stride 1) and lora_b: [N', R] contiguous, or both
    None; parts: flat (start, end, index of A) triples; split: 0, or the width of the first of
    two outputs; gate: [B, 1, N] or [B, N]; residual: [B, T, N]; out: what to write
    into; tile: a configuration other than dispatch's. -> [y [B, T, N]] or [y0 [B, T, split], y1].
    """
    B, T, widths = check_side_by_side("xs", xs)
    K = sum(widths)
    N = weight[0].shape[0] if len(weight) == 1 else 2 * weight[0].numel() // K
    if check_weight(weight, N, K) == "nf4":
        check(all(w % BLOCK == 0 for w in widths), "xs", f"{BLOCK} columns times a whole", widths)
    check(0 <= split < N, "split", f"within 0..{N}", split)
    ys = outputs("out", out, B, T, [split, N - split] if split else [N], xs[0])
    check_gated(bias, gate, residual, B, T, N)
    check((down is None) == (lora_b is None), "down", "given with lora_b", down is not None)
    triples, up_strides = (), (0, 0)
    if down is not None:
        triples = check_parts(parts, N, lora_b)
        check_down(down, B * T, lora_b.shape[1] * (max(t[2] for t in triples) + 1))
        check(lora_b.is_contiguous(), "lora_b", "contiguous", lora_b.stride())
        up_strides = lora_b.stride()
    return _launch(
        "lora_gemm", xs, weight, ys, N, K, tile, True, bias, down, lora_b, up_strides, triples,
        scale, gate, residual,
    )  # fmt: skip


def lora_gemm_dx(
    dys: list[Tensor],
    weight: list[Tensor],
    d_down: Tensor | None,
    lora_a: Tensor | None,
    widths: list[int],
    out: list[Tensor] | None = None,
    tile: dispatch.Tile | None = None,
) -> list[Tensor]:
    """dY·W + d_down·A. One launch.

    dys: one or two [B, T, N_i], sum N; weight: as `lora_gemm`'s; d_down: [B·T, P·R] (dy's dtype or
    fp32, scale included) and lora_a: [P·R, K] contiguous, or both None; widths: columns of each
    result, sum K. -> one [B, T, width] per width, in dy's dtype.
    """
    B, T, dy_widths = check_side_by_side("dys", dys)
    N, K = sum(dy_widths), sum(widths)
    check(len(widths) in (1, 2) and min(widths) > 0, "widths", "one or two widths", widths)
    check_weight(weight, N, K)
    dxs = outputs("out", out, B, T, list(widths), dys[0])
    check((d_down is None) == (lora_a is None), "d_down", "given with lora_a", d_down is not None)
    up, up_strides = None, (0, 0)
    if d_down is not None:
        check(lora_a.ndim == 2 and lora_a.shape[1] == K and lora_a.is_contiguous(), "lora_a",
              f"contiguous [P·R, {K}]", tuple(lora_a.shape))  # fmt: skip
        check_down(d_down, B * T, lora_a.shape[0], "d_down")
        up, up_strides = lora_a, (1, K)
    return _launch(
        "lora_gemm_dx", dys, weight, dxs, K, N, tile, False, None, d_down, up, up_strides
    )
