"""Matmul kernels of the frozen linear with its LoRA in the accumulator: y and dx.

    lora_gemm      Y[M, N]  = X·Wᵀ + b + s·down·Upᵀ             (optionally residual + gate·Y)
    lora_gemm_dx   dX[M, K] = dY·W + d_down·A

M = B·T rows. X, Y, dY, dX and residual are [B, T, width] with the last stride 1 and any other
strides; X and dY may be two tensors side by side, Y and dX may go to two tensors. W is dense
[N, K] or NF4, dequantized tile by tile into registers (in fp32, rounded once to the compute dtype,
as `nf4_dequantize` does). `down` = X·Aᵀ and `d_down` = s·Σ dY_part·B_part come in as [M, P·R], from
`grads.py`. Both formulas are one kernel: for dx the weight tile is not transposed and A takes the
place of Up.

Operands are of the compute dtype (x's: bf16, fp16 or fp32), sums fp32; s·Up is formed in fp32 and
rounded once. Nothing is saved here: the ops above say what they save.

Bytes moved, at least: X, Y and W once (NF4: 0.5 + 4/64 byte a weight, nested 0.5 + 1/64), down and
Up; FLOP: 2·M·N·(K + R). Dequantizing costs a shared-memory look-up (`tl.gather`) and about four
other instructions a weight and tile of rows; a tree of 15 selects cost 35, and look-ups by pointer
became 4-byte asynchronous copies (counted in sm_89 code, Triton 3.7.1).

Refused (ValueError): a last stride other than 1, NF4 with K not a multiple of 64 or with an x whose
width is not, tensors of another shape, dtype or device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.backend import check, kernel, matrix, refuse, tl, triton
from fluxfast_kernels.gemm.checks import (
    check_devices,
    check_gated,
    check_reach,
    check_side_by_side,
    check_weight,
    dx_update_of,
    outputs,
    update_of,
)
from fluxfast_kernels.gemm.epilogue import (
    NOTHING,
    After,
    Epilogue,
    LoRAUpdate,
    after_of,
    finish,
    outputs_of,
    rows_at,
    spec_of,
    tile_at,
)
from fluxfast_kernels.quant.frozen import FrozenWeight
from fluxfast_kernels.quant.nf4 import BLOCK, code_table, dynamic_map


class Weight(NamedTuple):
    """A frozen weight as a kernel takes it, each None where there is none.

    ptr: rows of values, `row_stride` apart, or NF4's bytes of a row of `row_stride` weights; code
    and absmax_map: NF4's tables, fp32 [16] and [256]. Of 8-bit matmuls: scale [N] of the rows and,
    with NF4, the inverse [N] that quantizes them.
    """

    ptr: Tensor
    row_stride: int
    absmax_ptr: Tensor | None = None
    nested_ptr: Tensor | None = None
    offset_ptr: Tensor | None = None
    code: Tensor | None = None
    absmax_map: Tensor | None = None
    scale_ptr: Tensor | None = None
    inverse_ptr: Tensor | None = None


@triton.jit
def weight_tile(w, rows, first, n_rows, n_columns, COLUMNS: tl.constexpr, SPEC: tl.constexpr):
    """W[rows, first:first + COLUMNS]; NF4 in fp32, dense as it is stored."""
    if w.absmax_ptr is None:
        columns = first + tl.arange(0, COLUMNS)[None, :]
        at = w.ptr + rows[:, None] * w.row_stride + columns
        if SPEC.masked:
            tile = tl.load(at, (rows < n_rows)[:, None] & (columns < n_columns), other=0.0)
        else:
            tile = tl.load(at)
    else:
        tile = nf4_tile(w, rows, first, n_rows, n_columns, COLUMNS, SPEC)
    return tile


@triton.jit
def nf4_tile(w, rows, first, n_rows, n_columns, COLUMNS: tl.constexpr, SPEC: tl.constexpr):
    """`weight_tile` of NF4, in fp32."""
    count: tl.constexpr = rows.shape[0]
    groups: tl.constexpr = (COLUMNS + 63) // 64
    line = rows[:, None]  # 32 bits: the launcher refuses 2^31 weights and more
    half = first // 2 + tl.arange(0, COLUMNS // 2)[None, :]
    group = first // 64 + tl.arange(0, groups)[None, :]
    group_at = line * (w.row_stride // 64) + group
    inside = (rows < n_rows)[:, None]
    group_inside = inside & (group * 64 < n_columns)
    byte_at = w.ptr + line * (w.row_stride // 2) + half
    if SPEC.masked:
        byte = tl.load(byte_at, inside & (half * 2 < n_columns), other=0)
        scale = tl.load(w.absmax_ptr + group_at, group_inside, other=0)
    else:
        byte = tl.load(byte_at)
        scale = tl.load(w.absmax_ptr + group_at)
    if w.nested_ptr is not None:
        outer = group_at // 256
        shift_at = outer if SPEC.offsets else outer * 0
        if SPEC.masked:
            factor = tl.load(w.nested_ptr + outer, group_inside, other=0.0)
            shift = tl.load(w.offset_ptr + shift_at, group_inside, other=0.0)
        else:
            factor = tl.load(w.nested_ptr + outer)
            shift = tl.load(w.offset_ptr + shift_at)
        steps = tl.gather(w.absmax_map, tl.reshape(scale.to(tl.int32), (count * groups,)), 0)
        scale = tl.reshape(steps, (count, groups)) * factor + shift
    byte = byte.to(tl.int32)
    nibble = tl.reshape(tl.interleave(byte >> 4, byte & 15), (count * COLUMNS,))
    values = tl.reshape(tl.gather(w.code, nibble, 0), (count, COLUMNS))
    if groups == 1:
        values *= scale
    else:
        values = tl.reshape(values, (count, groups, 64)) * scale[:, :, None]
        values = tl.reshape(values, (count, COLUMNS))
    return values


@triton.jit
def _product(total, x_ptr, x_rows, count, before, w, n_first, N, SPEC: tl.constexpr):
    """total + X·op(W) over one input, whose `count` columns follow `before` others."""
    BLOCK_N: tl.constexpr = SPEC.tile.block_n
    BLOCK_K: tl.constexpr = SPEC.tile.block_k
    for i in range(0, tl.cdiv(count, BLOCK_K)):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        if SPEC.masked:
            x = tl.load(x_ptr + x_rows[:, None] + k[None, :], (k < count)[None, :], other=0.0)
        else:
            x = tl.load(x_ptr + x_rows[:, None] + k[None, :])
        if SPEC.transposed:
            n = tl.minimum(n_first + tl.arange(0, BLOCK_N), N - 1)
            tile = weight_tile(w, n, before + i * BLOCK_K, N, before + count, BLOCK_K, SPEC)
            tile = tl.trans(tile.to(x.dtype))
        else:
            tile = weight_tile(w, before + k, n_first, before + count, N, BLOCK_N, SPEC)
            tile = tile.to(x.dtype)
        total = tl.dot(x, tile, total, input_precision="ieee")
    return total


@kernel
def _gemm_kernel(x0, x1, w, after, out, M, N, T, K0, K1, SPEC: tl.constexpr):
    BLOCK_M: tl.constexpr = SPEC.tile.block_m
    BLOCK_N: tl.constexpr = SPEC.tile.block_n
    m_first, n_first = tile_at(M, N, SPEC)
    # rows past the end repeat the last one: they are never stored
    m = tl.minimum(m_first + tl.arange(0, BLOCK_M), M - 1)
    # tables as tensors, which `tl.gather` reads from shared memory; not in a function: Triton 3.6
    # returns no None, which others of the weight's fields are
    code, absmax_map = w.code, w.absmax_map
    if code is not None:
        code = tl.load(code + tl.arange(0, 16))
    if absmax_map is not None:
        absmax_map = tl.load(absmax_map + tl.arange(0, 256))
    nf4 = w.absmax_ptr, w.nested_ptr, w.offset_ptr, code, absmax_map
    w = Weight(w.ptr, w.row_stride, *nf4, w.scale_ptr, w.inverse_ptr)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, rows = rows_at(x0, m_first, m, T)
    total = _product(total, first, rows, K0, 0, w, n_first, N, SPEC)
    if x1 is not None:
        first, rows = rows_at(x1, m_first, m, T)
        total = _product(total, first, rows, K1, K0, w, n_first, N, SPEC)
    finish(total, after, out, m, m_first, n_first, M, N, T, x0.ptr.dtype.element_ty, SPEC)


def launch(
    kernel: Any,
    op: str,
    dtype: torch.dtype,
    xs: Sequence[Tensor],
    operands: Sequence,
    w: Weight,
    ys: list[Tensor],
    after: After,
    tile: dispatch.Tile | None,
    **compiled,
) -> list[Tensor]:
    """Launches a matmul kernel over xs, given as the kernel's `operands`; overwrites and returns
    ys. op, dtype: for dispatch, where tile is None; compiled: the other fields of the `Spec`."""
    (B, T), device = xs[0].shape[:2], xs[0].device
    widths, out = [x.shape[2] for x in xs], outputs_of(ys)
    M, N, K = B * T, sum(y.shape[2] for y in ys), sum(widths)
    check_devices(device, (w, after, out))
    if M == 0:
        return ys
    if tile is None:
        storage = "dense" if w.absmax_ptr is None else "nf4"
        tile = dispatch.choose(op, dispatch.arch_of(device), dtype, storage, M, N, K).tile
    check_reach([*map(matrix, xs), out.first, out.second, after.residual], T, tile.block_m)
    offsets = w.offset_ptr is not None and w.offset_ptr.numel() > 1
    spec = spec_of(tile, widths, N, offsets=offsets, **compiled)
    grid = (triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)
    (x0, x1), (K0, K1) = [*operands, None][:2], [*widths, 0][:2]
    kernel[grid](x0, x1, w, after, out, M, N, T, K0, K1, SPEC=spec, **tile.options)
    return ys


def _weight(tensors: Sequence[Tensor], columns: int) -> Weight:
    first, absmax, nested, offset = [*tensors, None, None, None][:4]
    if absmax is None:
        return Weight(first, first.stride(0))
    table = None if nested is None else dynamic_map(first.device)
    return Weight(first, columns, absmax, nested, offset, code_table(first.device), table)


def lora_gemm(
    xs: list[Tensor],
    weight: FrozenWeight,
    down: Tensor | None = None,
    update: LoRAUpdate | None = None,
    epilogue: Epilogue = NOTHING,
    out: list[Tensor] | None = None,
    tile: dispatch.Tile | None = None,
) -> list[Tensor]:
    """Returns X·Wᵀ + b + s·down·Upᵀ, or residual + gate·that. One launch.

    xs: one or two [B, T, K_i]; weight: dense or NF4 [N, K], its bias [N] or None; down: [B·T, P·R]
    (x's dtype or fp32, last stride 1), with an update, whose lora_b is contiguous; epilogue: its
    gate may be [B, N]; out: tensors to overwrite; tile: in place of dispatch's. The result is [y
    [B, T, N]] or, with a split, [y0 [B, T, split], y1].
    """
    B, T, widths = check_side_by_side("xs", xs)
    K, (tensors, bias, *_) = sum(widths), weight
    N = tensors[0].shape[0] if len(tensors) == 1 else 2 * tensors[0].numel() // K
    if check_weight(tensors, N, K) == "nf4" and not all(w % BLOCK == 0 for w in widths):
        refuse("xs", f"{BLOCK} columns times a whole", widths)
    check_gated(bias, epilogue, (B, T, N))
    dtype = xs[0].dtype
    ys = outputs(out, xs[0], epilogue.widths(N), dtype)
    added, parts = update_of(down, update, B * T, N)
    after = after_of(added, bias, epilogue)
    rank, w = update.rank if update else 0, _weight(tensors, K)
    spec = {"rank": rank, "parts": parts, "transposed": True}
    operands = [*map(matrix, xs)]
    return launch(_gemm_kernel, "lora_gemm", dtype, xs, operands, w, ys, after, tile, **spec)


def lora_gemm_dx(
    dys: list[Tensor],
    weight: FrozenWeight,
    d_down: Tensor | None,
    lora_a: Tensor | None,
    widths: list[int],
    out: list[Tensor] | None = None,
    tile: dispatch.Tile | None = None,
) -> list[Tensor]:
    """Returns dY·W + d_down·A. One launch.

    dys: one or two [B, T, N_i], sum N; weight: as `lora_gemm`'s; d_down: [B·T, P·R] (dy's dtype or
    fp32, scale included) and lora_a: [P·R, K] contiguous, or both None; widths: columns of each
    result, sum K. The result is one [B, T, width] per width, in dy's dtype.
    """
    B, T, dy_widths = check_side_by_side("dys", dys)
    N, K = sum(dy_widths), sum(widths)
    check(len(widths) in (1, 2) and min(widths) > 0, "widths", "one or two widths", widths)
    check_weight(weight.tensors, N, K)
    dtype = dys[0].dtype
    dxs = outputs(out, dys[0], list(widths), dtype)
    added, rank = dx_update_of(d_down, lora_a, B * T, K)
    w, operands, after = _weight(weight.tensors, K), [*map(matrix, dys)], After(added)
    spec = {"rank": rank, "transposed": False}
    return launch(_gemm_kernel, "lora_gemm_dx", dtype, dys, operands, w, dxs, after, tile, **spec)
