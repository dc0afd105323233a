"""8-bit matmul kernels of the frozen linear with its LoRA in the accumulator: y and dx.

    gemm_8bit      Y[M, N]  = s_x·s_w·(X8·W8ᵀ) + b + s·down·Upᵀ     (optionally residual + gate·Y)
    gemm_8bit_dx   dX[M, K] = s_g·(G8·W8) + d_down·A                G8, s_g: the rows of dY·s_w

X8 and G8: one or two quantized tensors side by side, [B, T, width] contiguous, int8 or e4m3, each
with one fp32 scale a row; W8 [N, K] of the same kind with one fp32 scale a row. int8 sums are exact
in int32 (at most 2³¹ / 127² = 133 144 columns); e4m3 sums are the tensor cores' own (14 bits) over
block_k columns and fp32 over these. Two inputs have scales of their
own: each sum is scaled as it ends. The rest is `epilogue.py`'s: fp32, one rounding.

W may be NF4, quantized to 8 bits tile by tile from the row scales of `frozen.nf4_with_scales`: for
few rows, where reading it is what takes the time.

For dx the contraction runs along N, across W8's rows. An 8-bit operand cannot be transposed between
shared memory and the tensor cores (ldmatrix transposes 16-bit pairs): its tile is read byte by byte
and permuted. Given W8 as [K, N] (`transposed`), the forward's code runs instead. What each costs:
`bench/dx_layouts.py`, and its verdict in `bench/LOG.md`.

Bytes moved, at least: X8, W8 once (NF4: 0.5625 a weight), Y in its dtype, down and Up; FLOP:
2·M·N·(K + R). Nothing is saved here.

Refused (ValueError): other layouts, kinds that differ, K or N above the exact sum's, NF4 with K or
an input's width not a multiple of 64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.backend import Matrix, check, kernel, refuse, tl, triton
from fluxfast_kernels.gemm.checks import check_gated, dx_update_of, outputs, update_of
from fluxfast_kernels.gemm.dense import Weight, launch, weight_tile
from fluxfast_kernels.gemm.epilogue import (
    NOTHING,
    TRITON_DTYPE,
    After,
    Epilogue,
    LoRAUpdate,
    after_of,
    finish,
    rows_at,
    tile_at,
)
from fluxfast_kernels.quant.frozen import QuantizedWeight
from fluxfast_kernels.quant.nf4 import BLOCK, NF4Tensor, code_table, nf4_absmax
from fluxfast_kernels.quant.rows import DTYPE, TOP, QuantizedRows, quantize, rows_pointer

MOST = (2**31 - 1) // 127**2  # columns whose int8 products add up exactly


@triton.jit
def _weight_tile(
    w,
    rows,
    first,
    n_rows,
    n_columns,
    dtype: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPEC: tl.constexpr,
):
    """W8[rows, first:first + COLUMNS]."""
    tile = weight_tile(w, rows, first, n_rows, n_columns, COLUMNS, SPEC)
    if w.inverse_ptr is not None:
        factor = tl.load(w.inverse_ptr + tl.minimum(rows, n_rows - 1))
        tile = quantize(tile * factor[:, None], SPEC.top, dtype)
    return tile


@triton.jit
def _product(x_ptr, x_rows, count, before, w, n_first, N, SPEC: tl.constexpr):
    """X8·op(W8) in fp32 over one input, whose `count` columns follow `before` others."""
    BLOCK_M: tl.constexpr = SPEC.tile.block_m
    BLOCK_N: tl.constexpr = SPEC.tile.block_n
    BLOCK_K: tl.constexpr = SPEC.tile.block_k
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), SPEC.sum)
    for i in range(0, tl.cdiv(count, BLOCK_K)):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        if SPEC.masked:
            x = tl.load(x_ptr + x_rows[:, None] + k[None, :], (k < count)[None, :], other=0.0)
        else:
            x = tl.load(x_ptr + x_rows[:, None] + k[None, :])
        if SPEC.transposed:
            n = tl.minimum(n_first + tl.arange(0, BLOCK_N), N - 1)
            first = before + i * BLOCK_K
            tile = tl.trans(_weight_tile(w, n, first, N, before + count, dtype, BLOCK_K, SPEC))
        else:
            tile = _weight_tile(w, before + k, n_first, before + count, N, dtype, BLOCK_N, SPEC)
        if dtype == tl.int8:
            total = tl.dot(x, tile, total, out_dtype=SPEC.sum)
        else:  # added in fp32: tensor cores keep 14 bits of a sum of e4m3 products. (With a limit
            # of 0 Triton would fold the addition into the dot; hardware obeys one on sm_90 alone.)
            total += tl.dot(x, tile, out_dtype=SPEC.sum, max_num_imprecise_acc=BLOCK_K)
    return total.to(tl.float32)


@kernel
def _gemm_8bit_kernel(x0, x1, w, after, out, M, N, T, K0, K1, SPEC: tl.constexpr):
    m_first, n_first = tile_at(M, N, SPEC)
    # rows past the end repeat the last one: they are never stored
    m = tl.minimum(m_first + tl.arange(0, SPEC.tile.block_m), M - 1)
    # as in `dense._gemm_kernel`
    code, absmax_map = w.code, w.absmax_map
    if code is not None:
        code = tl.load(code + tl.arange(0, 16))
    if absmax_map is not None:
        absmax_map = tl.load(absmax_map + tl.arange(0, 256))
    nf4 = w.absmax_ptr, w.nested_ptr, w.offset_ptr, code, absmax_map
    w = Weight(w.ptr, w.row_stride, *nf4, w.scale_ptr, w.inverse_ptr)
    first, rows = rows_at(Matrix(x0.ptr, T * K0, K0), m_first, m, T)
    total = _product(first, rows, K0, 0, w, n_first, N, SPEC)
    # the weight's scale first: times that of a row of 1e38 the integer sum would overflow
    if w.scale_ptr is not None:
        n = n_first + tl.arange(0, SPEC.tile.block_n)
        by_column = tl.load(w.scale_ptr + n, n < N, other=0.0)[None, :]
        total *= by_column
    total *= tl.load(x0.scale_ptr + m)[:, None]
    if x1 is not None:
        first, rows = rows_at(Matrix(x1.ptr, T * K1, K1), m_first, m, T)
        more = _product(first, rows, K1, K0, w, n_first, N, SPEC)
        if w.scale_ptr is not None:
            more *= by_column
        total += more * tl.load(x1.scale_ptr + m)[:, None]
    finish(total, after, out, m, m_first, n_first, M, N, T, SPEC.update_dtype, SPEC)


def _launch(
    op: str,
    rows: list[QuantizedRows],
    w: Weight,
    ys: list[Tensor],
    after: After,
    tile: dispatch.Tile | None,
    update_dtype: torch.dtype,
    **compiled,
) -> list[Tensor]:
    """Both formulas, see `dense.launch`: Y = X8·W8ᵀ where transposed, else X8·W8."""
    kind = rows[0].kind
    compiled |= {"sum": tl.int32 if kind == "int8" else tl.float32, "top": TOP[kind]}
    compiled["update_dtype"] = TRITON_DTYPE[update_dtype]
    xs, operands = [row.values for row in rows], [*map(rows_pointer, rows)]
    given = (op, DTYPE[kind], xs, operands, w, ys, after, tile)
    return launch(_gemm_8bit_kernel, *given, **compiled)


def op_name(op: str, inputs: Sequence) -> str:
    """Returns the name that dispatch has for an op of one or of two inputs."""
    return op + "_pair" * (len(inputs) == 2)


def _check_rows(rows: list[QuantizedRows]) -> tuple[int, list[int]]:
    """Returns B·T and the widths of one or two rows side by side. Raises ValueError."""
    if len(rows) not in (1, 2):
        refuse("rows", "one or two", len(rows))
    first = rows[0].values
    check(first.dtype in DTYPE.values(), "rows", "int8 or float8_e4m3fn", first.dtype)
    for row in rows:
        values, scale = row.values, row.scale
        fits = values.ndim == 3 and values.shape[:2] == first.shape[:2]
        fits = fits and values.is_contiguous() and values.dtype == first.dtype
        if not fits:
            got = (tuple(values.shape), values.dtype)
            refuse("rows", "contiguous [B, T, width], alike in B, T and dtype", got)
        fits = scale.shape == first.shape[:2] and scale.dtype == torch.float32
        if not fits or not scale.is_contiguous():
            refuse("rows (scale)", "fp32 [B, T]", (tuple(scale.shape), scale.dtype))
    widths = [row.values.shape[2] for row in rows]
    if rows[0].kind == "int8" and sum(widths) > MOST:
        refuse("rows", f"of at most {MOST} columns", widths)
    return first.shape[0] * first.shape[1], widths


def _weight(weight: QuantizedWeight, kind: str, N: int, K: int, forward: bool) -> Weight:
    """Returns the weight as a kernel takes it, with its scale for y, where that is applied to the
    sums. Raises ValueError unless it is [N, K] (transposed: [K, N]) of that kind, or NF4."""
    values, scale, inverse, transposed = weight
    shape = (K, N) if transposed else (N, K)
    check(N * K < 2**31, "weight", "of fewer than 2^31 values", shape)
    if values.shape != shape:
        refuse("weight", str(list(shape)), tuple(values.shape))
    if isinstance(values, NF4Tensor):
        check(inverse is not None, "inverse", "given with an NF4 weight", None)
        check(not transposed, "transposed", "False with an NF4 weight", transposed)
        absmax, code = nf4_absmax(values), code_table(values.packed.device)
        w = Weight(values.packed, K, absmax, code=code, inverse_ptr=inverse)
    else:
        fits = values.is_contiguous() and values.dtype == DTYPE[kind]
        if not fits:
            refuse("weight", f"contiguous {kind}", (values.dtype, values.stride()))
        w = Weight(values, shape[1])
    if not forward:
        return w
    fits = scale.shape == (N,) and scale.dtype == torch.float32 and scale.is_contiguous()
    if not fits:
        refuse("weight (scale)", f"fp32 [{N}]", (scale.dtype, tuple(scale.shape)))
    return w._replace(scale_ptr=scale)


def gemm_8bit(
    rows: list[QuantizedRows],
    weight: QuantizedWeight,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    update: LoRAUpdate | None = None,
    epilogue: Epilogue = NOTHING,
    out: list[Tensor] | None = None,
    tile: dispatch.Tile | None = None,
) -> list[Tensor]:
    """Returns s_x·s_w·(X8·W8ᵀ) + b + s·down·Upᵀ, or residual + gate·that. One launch.

    rows: one or two of [B, T, K_i]; weight: [N, K], not transposed; dtype: of the result and of the
    update's matmul; bias [N] or None; down, update, epilogue, out, tile and the result: as
    `dense.lora_gemm` has them.
    """
    M, widths = _check_rows(rows)
    N, K = weight.values.shape
    if sum(widths) != K:
        refuse("rows", f"{K} columns in all", widths)
    w = _weight(weight, rows[0].kind, N, K, True)
    whole = w.absmax_ptr is None or all(width % BLOCK == 0 for width in widths)
    if not whole:
        refuse("rows", f"{BLOCK} columns times a whole for NF4", widths)
    check_gated(bias, epilogue, (*rows[0].values.shape[:2], N))
    ys = outputs(out, rows[0].values, epilogue.widths(N), dtype)
    added, parts = update_of(down, update, M, N)
    after, rank = after_of(added, bias, epilogue), update.rank if update else 0
    spec = {"rank": rank, "parts": parts, "transposed": True}
    return _launch(op_name("gemm_8bit", rows), rows, w, ys, after, tile, dtype, **spec)


def gemm_8bit_dx(
    rows: list[QuantizedRows],
    weight: QuantizedWeight,
    d_down: Tensor | None,
    lora_a: Tensor | None,
    widths: list[int],
    dtype: torch.dtype,
    update_dtype: torch.dtype | None = None,
    out: list[Tensor] | None = None,
    tile: dispatch.Tile | None = None,
) -> list[Tensor]:
    """Returns s_g·(G8·W8) + d_down·A. One launch.

    rows: one or two of [B, T, N_i], those of dY·s_w; weight: [N, K], perhaps transposed; d_down:
    [B·T, P·R] (scale included) and lora_a: [P·R, K] contiguous, or both None; widths: columns of
    each result, sum K; dtype: of the results; update_dtype: that the update multiplies in (default:
    dtype). The result is one [B, T, width] per width.
    """
    M, dy_widths = _check_rows(rows)
    N, K = sum(dy_widths), sum(widths)
    check(len(widths) in (1, 2) and min(widths) > 0, "widths", "one or two widths", widths)
    w = _weight(weight, rows[0].kind, N, K, False)
    dxs = outputs(out, rows[0].values, list(widths), dtype)
    added, rank = dx_update_of(d_down, lora_a, M, K)
    op, spec = op_name("gemm_8bit_dx", rows), {"transposed": weight.transposed}
    how = (After(added), tile, update_dtype or dtype)
    return _launch(op, rows, w, dxs, *how, rank=rank, **spec)
