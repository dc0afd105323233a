"""The frozen linear in products of 8-bit codes, LoRA in the same accumulator, forward and to x.

    gemm_8bit      Y[M, N]  = s_x·s_w·(X8·W8ᵀ) + b + s·down·Upᵀ     (optionally residual + gate·Y)
    gemm_8bit_dx   dX[M, K] = s_g·(G8·W8) + d_down·A                G8, s_g: the rows of dY·s_w

X8 and G8: one or two tensors of codes side by side, [B, T, width] contiguous, int8 or e4m3, each
with one fp32 scale a row; W8 [N, K] codes with one fp32 scale a row, of the same kind. int8 sums
are exact in int32 (at most 2³¹ / 127² = 133 144 columns), e4m3 sums fp32. Two inputs have scales of
their own: each sum is scaled as it ends. The rest is `epilogue.py`'s: fp32, one rounding.

W may be NF4, decoded to codes tile by tile from the row scales of `frozen.nf4_scales`: for few
rows, where reading it is what takes the time.

Towards x the contraction runs along N, across W8's rows. An 8-bit operand cannot be transposed on
its way from shared memory to the tensor cores (ldmatrix transposes 16-bit pairs): its tile is read
byte by byte and permuted. Given W8 as [K, N] (`transposed`), the forward's code runs instead. What
each costs: `bench/dx_layouts.py`, and its verdict in `bench/LOG.md`.

Bytes moved, at least: X8, W8 once (NF4: 0.5625 a weight), Y in its dtype, down and Up; FLOP:
2·M·N·(K + R). Nothing is saved here.

Refused (ValueError): other layouts, kinds that differ, K or N above the exact sum's, NF4 with K or
an input's width not a multiple of 64.
"""

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.backend import check, tl, triton
from fluxfast_kernels.gemm.checks import (
    check_down,
    check_gated,
    check_parts,
    check_reach,
    outputs,
)
from fluxfast_kernels.gemm.dense import weight_tile
from fluxfast_kernels.gemm.epilogue import finish, rank_block, rows_at, tile_at
from fluxfast_kernels.quant.nf4 import BLOCK, code_table, nf4_absmax
from fluxfast_kernels.quant.rows import DTYPE, TOP, Rows, encoded

MOST = (2**31 - 1) // 127**2  # columns whose int8 products add up exactly


@triton.jit
def _codes_tile(
    w, absmax, code, inverse, w_row, rows, first, n_rows, n_columns, dtype: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """W8[rows, first:first + COLUMNS]."""
    tile = weight_tile(
        w, absmax, None, None, code, None, w_row, rows, first, n_rows, n_columns,
        COLUMNS, MASKED, False,
    )  # fmt: skip
    if absmax is not None:
        factor = tl.load(inverse + tl.minimum(rows, n_rows - 1))
        tile = encoded(tile * factor[:, None], TOP, dtype)
    return tile


@triton.jit
def _product(
    x, x_rows, count, before, w, absmax, code, inverse, w_row, n_first, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr, MASKED: tl.constexpr, TOP: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """X8·op(W8) over one input, whose `count` columns follow `before` others -> fp32."""
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for i in range(0, tl.cdiv(count, BLOCK_K)):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        if MASKED:
            x_tile = tl.load(x + x_rows[:, None] + k[None, :], (k < count)[None, :], other=0.0)
        else:
            x_tile = tl.load(x + x_rows[:, None] + k[None, :])
        if TRANSPOSED:
            n = tl.minimum(n_first + tl.arange(0, BLOCK_N), N - 1)
            w_tile = tl.trans(_codes_tile(
                w, absmax, code, inverse, w_row, n, before + i * BLOCK_K, N, before + count,
                dtype, BLOCK_K, MASKED, TOP,
            ))  # fmt: skip
        else:
            w_tile = _codes_tile(
                w, absmax, code, inverse, w_row, before + k, n_first, before + count, N,
                dtype, BLOCK_N, MASKED, TOP,
            )  # fmt: skip
        if dtype == tl.int8:
            total = tl.dot(x_tile, w_tile, total, out_dtype=SUM)
        else:  # sm_90 adds e4m3 products in 14 bits: no further than one tile
            total = tl.dot(x_tile, w_tile, total, out_dtype=SUM, max_num_imprecise_acc=BLOCK_K)
    return total.to(tl.float32)


@triton.jit
def _gemm_8bit_kernel(
    x0, x1, s0, s1, w, w_scale, absmax, code, inverse, bias, down, up, gate, residual, y0, y1,
    M, N, T, K0, K1, split, scale,
    w_row, down_row, up_n, up_r, gate_b, residual_b, residual_t, y0_b, y0_t, y1_b, y1_t,
    TRANSPOSED: tl.constexpr, MASKED: tl.constexpr, TOP: tl.constexpr, SUM: tl.constexpr,
    PRODUCT: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    PART_COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """PRODUCT: the dtype that the update multiplies in."""
    m_first, n_first = tile_at(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # rows past the end repeat the last one: they are never stored
    m = tl.minimum(m_first + tl.arange(0, BLOCK_M), M - 1)
    if code is not None:
        code = tl.load(code + tl.arange(0, 16))
    first, rows = rows_at(x0, m_first, m, T, T * K0, K0)
    total = _product(
        first, rows, K0, 0, w, absmax, code, inverse, w_row, n_first, N,
        BLOCK_M, BLOCK_N, BLOCK_K, TRANSPOSED, MASKED, TOP, SUM,
    )  # fmt: skip
    # the weight's scale first: times that of a row of 1e38 the sum of codes would overflow
    if w_scale is not None:
        n = n_first + tl.arange(0, BLOCK_N)
        by_column = tl.load(w_scale + n, n < N, other=0.0)[None, :]
        total *= by_column
    total *= tl.load(s0 + m)[:, None]
    if x1 is not None:
        first, rows = rows_at(x1, m_first, m, T, T * K1, K1)
        more = _product(
            first, rows, K1, K0, w, absmax, code, inverse, w_row, n_first, N,
            BLOCK_M, BLOCK_N, BLOCK_K, TRANSPOSED, MASKED, TOP, SUM,
        )  # fmt: skip
        if w_scale is not None:
            more *= by_column
        total += more * tl.load(s1 + m)[:, None]
    finish(
        total, bias, down, up, gate, residual, y0, y1, m, m_first, n_first, M, N, T, split, scale,
        down_row, up_n, up_r, gate_b, residual_b, residual_t, y0_b, y0_t, y1_b, y1_t,
        PRODUCT, RANK, BLOCK_R, PARTS, PART_COUNT, BLOCK_M, BLOCK_N,
    )  # fmt: skip


_TRITON_DTYPE = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16
}  # fmt: skip


def _launch(
    op, kind, rows, w, w_scale, nf4, w_row, ys, N, K, product, tile, transposed,
    rank=0, bias=None, down=None, up=None, up_strides=(0, 0), parts=(), scale=1.0, gate=None,
    residual=None,
):  # fmt: skip
    """Both formulas. N and K are the output's and the contraction's width here; w: codes, or
    NF4's bytes with nf4 = (absmax, inverse)."""
    (B, T), device = rows[0].codes.shape[:2], rows[0].codes.device
    widths = [row.codes.shape[2] for row in rows]
    M = B * T
    for tensor in [w, w_scale, *ys, bias, down, up, gate, residual]:
        check(tensor is None or tensor.device == device, "every tensor", f"on {device}",
              None if tensor is None else tensor.device)  # fmt: skip
    if M == 0:
        return ys
    if tile is None:
        storage = "nf4" if nf4 else "dense"
        arch = dispatch.arch_of(device)
        op += "_pair" if op == "gemm_8bit_dx" and len(rows) == 2 else ""
        tile = dispatch.choose(op, arch, DTYPE[kind], storage, M, N, K).tile
    for tensor in [*(row.codes for row in rows), *ys, residual]:
        check_reach(tensor, T, tile.block_m)
    x0, x1 = [*rows, None][:2]
    y0, y1 = [*ys, None][:2]
    absmax, inverse = nf4 or (None, None)
    if len(parts) == 1 and parts[0] == (0, N, 0, 0):
        parts = ()  # all columns, one A: no branch
    masked = any(width % tile.block_k for width in widths)
    masked |= not transposed and N % tile.block_n != 0
    strides = [
        w_row, 0 if down is None else down.stride(0), *up_strides,
        0 if gate is None else gate.stride(0),
        *(residual.stride()[:2] if residual is not None else (0, 0)),
        *y0.stride()[:2], *(y1.stride()[:2] if y1 is not None else (0, 0)),
    ]  # fmt: skip
    grid = (triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)
    _gemm_8bit_kernel[grid](
        x0.codes, None if x1 is None else x1.codes, x0.scale, None if x1 is None else x1.scale,
        w, w_scale, absmax, code_table(device) if nf4 else None, inverse,
        bias, down, up, gate, residual, y0, y1,
        M, N, T, widths[0], widths[1] if x1 is not None else 0, y0.shape[2], float(scale), *strides,
        TRANSPOSED=transposed, MASKED=masked, TOP=TOP[kind],
        SUM=tl.int32 if kind == "int8" else tl.float32, PRODUCT=_TRITON_DTYPE[product],
        RANK=rank, BLOCK_R=rank_block(rank), PARTS=sum(parts, ()), PART_COUNT=len(parts),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return ys


def _check_rows(name: str, rows: list[Rows]) -> tuple[int, int, list[int], str]:
    """-> (B, T, widths, kind) of one or two Rows that belong together."""
    check(len(rows) in (1, 2), name, "one or two", len(rows))
    first = rows[0].codes
    kind = next((kind for kind, dtype in DTYPE.items() if dtype == first.dtype), None)
    check(kind is not None, name, "int8 or float8_e4m3fn", first.dtype)
    for row in rows:
        fits = row.codes.ndim == 3 and row.codes.shape[:2] == first.shape[:2]
        fits &= row.codes.is_contiguous() and row.codes.dtype == first.dtype
        check(fits, name, "contiguous [B, T, width], alike in B, T and dtype",
              (tuple(row.codes.shape), row.codes.dtype))  # fmt: skip
        fits = row.scale.shape == first.shape[:2] and row.scale.dtype == torch.float32
        check(fits and row.scale.is_contiguous(), f"{name} (scale)", "fp32 [B, T]",
              (tuple(row.scale.shape), row.scale.dtype))  # fmt: skip
    return *first.shape[:2], [row.codes.shape[2] for row in rows], kind


def _check_weight(weight, kind: str, rows: int, columns: int, inverse) -> tuple | None:
    """-> NF4's (absmax, inverse), or None for codes. Raises ValueError where they do not fit."""
    check(rows * columns < 2**31, "weight", "of fewer than 2^31 values", (rows, columns))
    if not isinstance(weight, Tensor):
        check(inverse is not None, "inverse", "given with an NF4 weight", None)
        check(weight.shape == (rows, columns), "weight", f"[{rows}, {columns}]", weight.shape)
        return nf4_absmax(weight), inverse
    fits = weight.shape == (rows, columns) and weight.is_contiguous()
    check(fits and weight.dtype == DTYPE[kind], "weight", f"contiguous {kind} [{rows}, {columns}]",
          (weight.dtype, tuple(weight.shape)))  # fmt: skip
    return None


def gemm_8bit(
    rows: list[Rows],
    weight,
    w_scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    lora_b: Tensor | None,
    parts: list[int],
    scale: float,
    dtype: torch.dtype,
    split: int = 0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    inverse: Tensor | None = None,
    out: list[Tensor] | None = None,
    tile: dispatch.Tile | None = None,
) -> list[Tensor]:
    """s_x·s_w·(X8·W8ᵀ) + b + s·down·Upᵀ, or residual + gate·that. One launch.

    rows: one or two Rows [B, T, K_i]; weight: codes [N, K], or an NF4Tensor with `inverse` fp32 [N]
    (`frozen.nf4_scales`); w_scale fp32 [N]; dtype: of the result and of the update's product. bias,
    down, lora_b, parts, scale, split, gate, residual, out, tile: as `gemm.lora_gemm` takes them.
    -> [y [B, T, N]] or [y0 [B, T, split], y1].
    """
    B, T, widths, kind = _check_rows("rows", rows)
    N, K = weight.shape
    check(sum(widths) == K, "rows", f"{K} columns in all", widths)
    check(kind != "int8" or K <= MOST, "rows", f"of at most {MOST} columns", K)
    nf4 = _check_weight(weight, kind, N, K, inverse)
    fits = w_scale.shape == (N,) and w_scale.dtype == torch.float32 and w_scale.is_contiguous()
    check(fits, "w_scale", f"fp32 [{N}]", (w_scale.dtype, tuple(w_scale.shape)))
    whole = nf4 is None or all(width % BLOCK == 0 for width in widths)
    check(whole, "rows", f"{BLOCK} columns times a whole for NF4", widths)
    check(0 <= split < N, "split", f"within 0..{N}", split)
    like = torch.empty(0, dtype=dtype, device=rows[0].codes.device)
    ys = outputs("out", out, B, T, [split, N - split] if split else [N], like)
    triples, up_strides = (), (0, 0)
    check((down is None) == (lora_b is None), "down", "given with lora_b", down is not None)
    if down is not None:
        triples = check_parts(parts, N, lora_b)
        check_down(down, B * T, lora_b.shape[1] * (max(t[2] for t in triples) + 1))
        check(lora_b.is_contiguous(), "lora_b", "contiguous", lora_b.stride())
        up_strides = lora_b.stride()
    check_gated(bias, gate, residual, B, T, N)
    w = weight if nf4 is None else weight.packed
    rank = 0 if lora_b is None else lora_b.shape[1]
    return _launch(
        "gemm_8bit", kind, rows, w, w_scale, nf4, K, ys, N, K, dtype, tile, True, rank, bias, down,
        lora_b, up_strides, triples, scale, gate, residual,
    )  # fmt: skip


def gemm_8bit_dx(
    rows: list[Rows],
    weight,
    d_down: Tensor | None,
    lora_a: Tensor | None,
    widths: list[int],
    dtype: torch.dtype,
    product: torch.dtype | None = None,
    transposed: bool = False,
    inverse: Tensor | None = None,
    out: list[Tensor] | None = None,
    tile: dispatch.Tile | None = None,
) -> list[Tensor]:
    """s_g·(G8·W8) + d_down·A. One launch.

    rows: one or two Rows [B, T, N_i] of dY·s_w; weight: codes [N, K], transposed: [K, N], or an
    NF4Tensor [N, K] with `inverse` fp32 [N]; d_down: [B·T, P·R] (scale included) and lora_a: [P·R,
    K] contiguous, or both None; widths: columns of each result, sum K; dtype: of the results;
    product: that the update multiplies in (default: dtype). -> one [B, T, width] per width.
    """
    B, T, dy_widths, kind = _check_rows("rows", rows)
    N, K = sum(dy_widths), sum(widths)
    check(kind != "int8" or N <= MOST, "rows", f"of at most {MOST} columns", N)
    check(len(widths) in (1, 2) and min(widths) > 0, "widths", "one or two widths", widths)
    nf4 = _check_weight(weight, kind, *((K, N) if transposed else (N, K)), inverse)
    check(nf4 is None or not transposed, "transposed", "False with an NF4 weight", transposed)
    like = torch.empty(0, dtype=dtype, device=rows[0].codes.device)
    dxs = outputs("out", out, B, T, list(widths), like)
    check((d_down is None) == (lora_a is None), "d_down", "given with lora_a", d_down is not None)
    rank, up_strides = 0, (0, 0)
    if d_down is not None:
        check(lora_a.ndim == 2 and lora_a.shape[1] == K and lora_a.is_contiguous(), "lora_a",
              f"contiguous [P·R, {K}]", tuple(lora_a.shape))  # fmt: skip
        rank, up_strides = lora_a.shape[0], (1, K)
        check_down(d_down, B * T, rank, "d_down")
    w = weight if nf4 is None else weight.packed
    return _launch(
        "gemm_8bit_dx", kind, rows, w, None, nf4, N if transposed else K, dxs, K, N,
        product or dtype, tile, transposed, rank, None, d_down, lora_a, up_strides,
    )  # fmt: skip
