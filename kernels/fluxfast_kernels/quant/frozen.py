"""The forms of a frozen weight [N, K]: the list of tensors that a fused linear takes.

    [W]                                 dense, fp32, bf16 or fp16
    [quantized, scale]                  8 bits: int8 or float8_e4m3fn [N, K], fp32 [N]
    [packed, absmax]                    NF4, see nf4.py; nested: + [nested_absmax, offset]; packed
                                        is [N, K/2] here, a view of bitsandbytes' [N·K/2, 1]

and what a matmul takes: the weight dense in its dtype, or in 8 bits with one scale a row,

    quantized[n, k] = round(W[n, k] · top / amax_n);   scale[n] = amax_n / top

(`rows.py` has the arithmetic; for NF4 amax_n is the largest absmax of the row's blocks). A weight
stored in another form is converted into the device's scratch, which the next such call overwrites.
For dx the contraction runs along N, and the tensor cores of sm_80 to sm_120 take no transposed
8-bit operand: `transposed` writes the scratch as [K, N].

Bytes a weight: NF4 to 8 bits reads 0.5625 and writes 1; transposing 8 bits reads 1 and writes 1;
8 bits from dense read it once and write 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import check, kernel, refuse, tl, triton
from fluxfast_kernels.quant import native
from fluxfast_kernels.quant.hadamard import check_rotation, hadamard_reference
from fluxfast_kernels.quant.nf4 import (
    BLOCK,
    NF4Tensor,
    check_nf4,
    code_table,
    nf4_absmax,
    nf4_dequantize,
    nf4_dequantize_reference,
)
from fluxfast_kernels.quant.rows import (
    DTYPE,
    TOP,
    QuantizedRows,
    launch_quantize,
    quantize,
    quantize_reference,
    quantize_rows_reference,
    scale_and_inverse,
    scale_and_inverse_reference,
)


class FrozenWeight(NamedTuple):
    """A frozen [N, K] weight, as every fused linear takes it.

    tensors: one of the forms above; bias: [N] or None. matmul: "" multiplies in x's dtype, "int8"
    and "fp8" in 8 bits, for y and dx, whatever the form. rotation: columns per block of the
    Hadamard rotation that the weight is stored in (W·H, see hadamard.py), 0 for none; only with an
    8-bit matmul.
    """

    tensors: Sequence[Tensor]
    bias: Tensor | None = None
    matmul: str = ""
    rotation: int = 0


class QuantizedWeight(NamedTuple):
    """A weight as an 8-bit matmul takes it: values int8 or float8_e4m3fn [N, K] ([K, N] where
    transposed) and scale fp32 [N]; or NF4 with the inverse fp32 [N] that its tiles are quantized
    by."""

    values: Any  # Tensor, or NF4Tensor where `inverse` is given
    scale: Tensor
    inverse: Tensor | None = None
    transposed: bool = False


def storage_of(weight: Sequence[Tensor]) -> str:
    """ "dense", "int8", "fp8" or "nf4"."""
    if len(weight) == 1:
        return "dense"
    return next((kind for kind, dtype in DTYPE.items() if weight[0].dtype == dtype), "nf4")


def weight_shape(weight: Sequence[Tensor], K: int) -> tuple[int, int]:
    """Returns (N, K) of a weight whose input is K wide. Raises ValueError where they do not fit."""
    kind = type(weight).__name__
    check(isinstance(weight, list | tuple), "weight", "a list of tensors: FrozenWeight([W])", kind)
    if len(weight) not in (1, 2, 4):
        refuse("weight", "a list of 1, 2 or 4 tensors", len(weight))
    storage, first = storage_of(weight), weight[0]
    if first.ndim != 2:
        refuse("weight", "[N, K]", tuple(first.shape))
    if storage == "nf4":
        N, half = first.shape
        if not (K % BLOCK == 0 and 2 * half == K):
            needed = f"NF4 of [N, {K}], packed [N, {K // 2}]"
            refuse("weight", needed, f"packed {tuple(first.shape)}")
        check_nf4(as_nf4(weight, N, K))
        return N, K
    if first.shape[1] != K:
        refuse("weight", f"[N, {K}] for this x", tuple(first.shape))
    if storage == "dense":  # quantized values that came without their scales are not
        fits = first.dtype in (*backend.DTYPES, torch.float64)
        check(fits, "weight", "float32, bfloat16 or float16", first.dtype)
    else:
        if not first.is_contiguous():
            refuse("weight (quantized)", "contiguous", first.stride())
        scale = weight[1]
        fits = scale.shape == first.shape[:1] and scale.dtype == torch.float32
        fits &= len(weight) == 2 and scale.is_contiguous()
        got = (scale.dtype, tuple(scale.shape), scale.stride())
        if not fits:
            refuse("weight (scale)", f"contiguous fp32 [{first.shape[0]}]", got)
    return first.shape[0], first.shape[1]


def as_nf4(weight: Sequence[Tensor], N: int, K: int) -> NF4Tensor:
    """Returns NF4's list as an NF4Tensor."""
    packed, absmax, *nested = weight
    return NF4Tensor(packed, absmax, (N, K), *nested)


def dequantize(weight: Sequence[Tensor], K: int, dtype: torch.dtype) -> Tensor:
    """Returns W [N, K] in `dtype`; where it is stored quantized, in the scratch, which the next
    such call overwrites."""
    if len(weight) == 1:
        return weight[0].to(dtype)
    N, _ = weight_shape(weight, K)
    if dtype == torch.float64:  # for references: of the same fp32 values
        return dequantize(weight, K, torch.float32).double()
    out = backend.scratch(N * K, dtype, weight[0].device)
    if storage_of(weight) == "nf4":
        return nf4_dequantize(as_nf4(weight, N, K), dtype, out)
    values, scale = weight
    values = values if values.dtype == torch.int8 else values.float()
    return torch.mul(values, scale[:, None], out=out.view(N, K))


# ---------------------------------------------------------------- quantizing, once


def quantize_8bit(weight: Tensor, kind: str, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """Returns W [N, K] fp32, bf16 or fp16 as (int8 or float8_e4m3fn [N, K], scale fp32 [N]).

    kind: "int8" or "fp8"; rotation: of W·H instead, see hadamard.py. Made on the weight's device.
    Raises ValueError naming the argument.
    """
    check(kind in TOP, "kind", "int8 or fp8", kind)
    backend.check_dtype("weight", weight)
    if weight.ndim != 2:
        refuse("weight", "[N, K]", tuple(weight.shape))
    check_rotation(rotation, weight.shape[1])
    rows = quantize_rows_reference(weight, kind, rotation=rotation)
    return rows.values, rows.scale


def rotate_weight(weight: Tensor, rotation: int) -> Tensor:
    """Returns W·H [N, K] in fp32, for a layer whose input is rotated."""
    check_rotation(rotation, weight.shape[1])
    return hadamard_reference(weight.float(), rotation) if rotation else weight


# ---------------------------------------------------------------- NF4 to 8 bits

ROWS, COLUMNS, SPAN = 64, 64, 512  # a tile; columns a program


@triton.jit
def _store_tile(out_ptr, tile, n, k, N, K, TRANSPOSED: tl.constexpr):
    inside = (n < N)[:, None] & (k < K)[None, :]
    if TRANSPOSED:
        at = out_ptr + k.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, tl.trans(tile), tl.trans(inside))
    else:
        tl.store(out_ptr + n.to(tl.int64)[:, None] * K + k[None, :], tile, inside)


@kernel
def _nf4_to_8bit_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    out_ptr,
    scale_ptr,
    N,
    K,
    GROUPS: tl.constexpr,
    TOP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """ROWS rows and SPAN columns. GROUPS: a power of two that holds a row's blocks of 64."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = (n < N)[:, None]
    groups = K // 64
    line = n.to(tl.int64)[:, None] * groups
    group = tl.arange(0, GROUPS)[None, :]
    all_absmax = tl.load(absmax_ptr + line + group, real & (group < groups), other=0.0)
    bits = tl.max(tl.abs(all_absmax).to(tl.int32, bitcast=True), axis=1)
    row_scale, inverse = scale_and_inverse(bits, TOP)
    tl.store(scale_ptr + n, row_scale, n < N)
    table = tl.load(code_ptr + tl.arange(0, 16))
    first = tl.program_id(1) * (SPAN // 64)
    for g in range(first, tl.minimum(first + SPAN // 64, groups)):
        at = packed_ptr + (line + g) * 32 + tl.arange(0, 32)[None, :]
        byte = tl.load(at, real, other=0).to(tl.int32)
        nibble = tl.reshape(tl.interleave(byte >> 4, byte & 15), (ROWS * 64,))
        values = tl.reshape(tl.gather(table, nibble, 0), (ROWS, 64))
        block = tl.load(absmax_ptr + n.to(tl.int64) * groups + g, n < N, other=0.0)
        values = values * block[:, None] * inverse[:, None]
        tile = quantize(values, TOP, out_ptr.dtype.element_ty)
        _store_tile(out_ptr, tile, n, g * 64 + tl.arange(0, 64), N, K, TRANSPOSED)


@kernel
def _transpose_kernel(in_ptr, out_ptr, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (k < K)[None, :]
    tile = tl.load(in_ptr + n.to(tl.int64)[:, None] * K + k[None, :], inside, other=0)
    _store_tile(out_ptr, tile, n, k, N, K, True)


def launch_nf4_to_8bit(weight: NF4Tensor, out: QuantizedRows, transposed: bool) -> None:
    """Overwrites out: values [N, K] (or [K, N]) and scale [N]."""
    N, K = weight.shape
    blocks = {"GROUPS": triton.next_power_of_2(K // BLOCK), "ROWS": ROWS, "SPAN": SPAN}
    tensors = (weight.packed, nf4_absmax(weight), code_table(out.scale.device))
    grid = (triton.cdiv(N, ROWS), triton.cdiv(K, SPAN))
    _nf4_to_8bit_kernel[grid](
        *tensors, out.values, out.scale, N, K, TOP=TOP[out.kind], TRANSPOSED=transposed, **blocks
    )


def launch_transpose(values: Tensor, out: Tensor) -> None:
    """values [N, K] of one byte to out [K, N]."""
    N, K = values.shape
    grid = (triton.cdiv(N, ROWS), triton.cdiv(K, COLUMNS))
    values, out = values.view(torch.uint8), out.view(torch.uint8)
    _transpose_kernel[grid](values, out, N, K, ROWS=ROWS, COLUMNS=COLUMNS)


# ---------------------------------------------------------------- a weight in 8 bits


def weight_in_8bit(
    weight: Sequence[Tensor], K: int, kind: str, transposed: bool = False
) -> QuantizedWeight:
    """Returns a weight of any form as values [N, K] (transposed: [K, N]), contiguous, and scale.

    Values that are not stored so are in the scratch, which the next such call overwrites.
    """
    N, _ = weight_shape(weight, K)
    storage, first = storage_of(weight), weight[0]
    launched = backend.launches(first)
    if storage == kind and not transposed:
        return QuantizedWeight(first, weight[1])
    out = backend.scratch(N * K, DTYPE[kind], first.device)
    out = out.view(K, N) if transposed else out.view(N, K)
    if storage == kind:
        if launched:
            launch_transpose(first, out)
        else:
            out.copy_(first.T)
        return QuantizedWeight(out, weight[1], transposed=transposed)
    rows = QuantizedRows(out, torch.empty(N, dtype=torch.float32, device=first.device))
    if storage == "nf4" and launched:
        launch_nf4_to_8bit(as_nf4(weight, N, K), rows, transposed)
        return QuantizedWeight(out, rows.scale, transposed=transposed)
    if storage == "nf4":
        rows = nf4_to_8bit_reference(as_nf4(weight, N, K), kind, None if transposed else out)
    else:
        dense = first if storage == "dense" else dequantize(weight, K, torch.float32)
        if launched and not transposed:
            if not (dense.stride(1) == 1 or K == 1):
                refuse("weight", "of last stride 1", dense.stride())
            launch_quantize(dense[None], rows)
        else:
            rows = quantize_rows_reference(dense, kind)
    values = out.copy_(rows.values.T) if transposed else rows.values
    return QuantizedWeight(values, rows.scale, transposed=transposed)


def nf4_with_scales(weight: Sequence[Tensor], N: int, K: int, kind: str) -> QuantizedWeight:
    """Returns an NF4 weight, still in NF4, with the scales that `weight_in_8bit` gives it."""
    nf4 = as_nf4(weight, N, K)
    amax = nf4_absmax(nf4).view(N, -1).abs().amax(1)
    return QuantizedWeight(nf4, *scale_and_inverse_reference(amax, kind))


def nf4_to_8bit_reference(weight: NF4Tensor, kind: str, out: Tensor | None = None) -> QuantizedRows:
    """Returns an NF4 weight in 8 bits by torch or, for int8 on a CPU, in C++ (into `out`)."""
    N, K = weight.shape
    absmax = nf4_absmax(weight)
    if kind == "int8" and absmax.device.type == "cpu" and native.isa():
        out = None if out is None else out.view(-1)
        return QuantizedRows(*native.nf4_int8(weight.packed.view(-1), absmax, N, K, out))
    amax = absmax.view(N, -1).abs().amax(1)
    return quantize_reference(nf4_dequantize_reference(weight, torch.float32), amax, kind)
