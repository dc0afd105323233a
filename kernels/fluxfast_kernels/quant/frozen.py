"""The forms of a frozen weight [N, K]: the list of tensors that a fused linear takes.

    [W]                                 dense, fp32, bf16 or fp16
    [codes, scale]                      8 bits: int8 or float8_e4m3fn [N, K], fp32 [N]
    [packed, absmax]                    NF4, see nf4.py; nested: + [nested_absmax, offset]

and what a product takes: the weight dense in its dtype, or in 8-bit codes with one scale a row,

    codes[n, k] = round(W[n, k] · top / amax_n);   scale[n] = amax_n / top

(`quant/rows.py` has the arithmetic; for NF4 amax_n is the largest absmax of the row's blocks). What
is not kept in that form is decoded into the device's scratch, good until the next such call. For
dx the contraction runs along N, and no 8-bit operand can be transposed on its way to the tensor
cores of sm_80 to sm_120: `transposed` writes the scratch as [K, N].

Bytes a weight: NF4 to codes reads 0.5625 and writes 1; transposing codes reads 1 and writes 1;
codes from dense read it once and write 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import check, tl, triton
from fluxfast_kernels.quant import native
from fluxfast_kernels.quant.hadamard import check_rotation, hadamard_reference
from fluxfast_kernels.quant.nf4 import (
    BLOCK,
    NF4Tensor,
    check_nf4,
    code_table,
    nf4_absmax,
    nf4_decode,
    nf4_decode_reference,
)
from fluxfast_kernels.quant.rows import (
    DTYPE,
    TOP,
    Rows,
    encode_reference,
    encoded,
    launch_quantize,
    quantize_rows_reference,
    scale_and_inverse,
    scale_and_inverse_reference,
    top_of,
)


def storage_of(weight: Sequence[Tensor]) -> str:
    """ "dense", "int8", "fp8" or "nf4"."""
    if len(weight) == 1:
        return "dense"
    return next((kind for kind, dtype in DTYPE.items() if weight[0].dtype == dtype), "nf4")


def weight_shape(weight: Sequence[Tensor], K: int) -> tuple[int, int]:
    """[N, K] of a weight whose input width is K. Raises ValueError where they do not fit."""
    check(len(weight) in (1, 2, 4), "weight", "a list of 1, 2 or 4 tensors", len(weight))
    storage = storage_of(weight)
    if storage != "nf4":
        first = weight[0]
        check(first.ndim == 2, "weight", "[N, K]", tuple(first.shape))
        check(first.shape[1] == K, "weight", f"[N, {K}] for this x", tuple(first.shape))
        if storage == "dense":  # codes that came without their scales are not
            fits = first.dtype in (*backend.DTYPES, torch.float64)
            check(fits, "weight", "float32, bfloat16 or float16", first.dtype)
        else:
            check(first.is_contiguous(), "weight (codes)", "contiguous", first.stride())
            fits = weight[1].shape == first.shape[:1] and weight[1].dtype == torch.float32
            fits &= len(weight) == 2 and weight[1].is_contiguous()
            check(fits, "weight (scale)", f"contiguous fp32 [{first.shape[0]}]",
                  (weight[1].dtype, tuple(weight[1].shape), weight[1].stride()))  # fmt: skip
        return tuple(first.shape)
    count = 2 * weight[0].numel()
    fits = K % BLOCK == 0 and count % K == 0
    check(fits, "weight", f"NF4 of [N, {K}], {K} a multiple of {BLOCK}", f"{count} values")
    check_nf4(as_nf4(weight, count // K, K))
    return count // K, K


def as_nf4(weight: Sequence[Tensor], N: int, K: int) -> NF4Tensor:
    """NF4's list as an NF4Tensor."""
    packed, absmax, *nested = weight
    return NF4Tensor(packed, absmax, (N, K), *nested)


def dense_weight(weight: Sequence[Tensor], K: int, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`, decoded into the scratch where it is quantized: read it before the next
    decode."""
    if len(weight) == 1:
        return weight[0].to(dtype)
    N, _ = weight_shape(weight, K)
    if dtype == torch.float64:  # for references: of the same fp32 values
        return dense_weight(weight, K, torch.float32).double()
    out = backend.scratch(N * K, dtype, weight[0].device)
    if storage_of(weight) == "nf4":
        return nf4_decode(as_nf4(weight, N, K), dtype, out)
    codes, scale = weight
    codes = codes if codes.dtype == torch.int8 else codes.float()
    return torch.mul(codes, scale[:, None], out=out.view(N, K))


# ---------------------------------------------------------------- quantizing, once


def quantize_8bit(weight: Tensor, kind: str, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """W [N, K] fp32, bf16 or fp16 -> codes [N, K] (int8 or float8_e4m3fn), scale fp32 [N].

    kind: "int8" or "fp8"; rotation: of W·H instead, see hadamard.py. Made on the weight's device.
    Raises ValueError naming the argument.
    """
    check(kind in TOP, "kind", "int8 or fp8", kind)
    backend.check_dtype("weight", weight)
    check(weight.ndim == 2, "weight", "[N, K]", tuple(weight.shape))
    check_rotation(rotation, weight.shape[1])
    rows = quantize_rows_reference(weight, kind, rotation=rotation)
    return rows.codes, rows.scale


def rotate_weight(weight: Tensor, rotation: int) -> Tensor:
    """W·H [N, K] in fp32, for a layer whose input is rotated."""
    check_rotation(rotation, weight.shape[1])
    return hadamard_reference(weight.float(), rotation) if rotation else weight


# ---------------------------------------------------------------- NF4 to codes: kernel and launcher

ROWS, COLUMNS, SPAN = 64, 64, 512  # a tile; columns a program


@triton.jit
def _store_tile(out, codes, n, k, N, K, TRANSPOSED: tl.constexpr):
    inside = (n < N)[:, None] & (k < K)[None, :]
    if TRANSPOSED:
        at = out + k.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, tl.trans(codes), tl.trans(inside))
    else:
        tl.store(out + n.to(tl.int64)[:, None] * K + k[None, :], codes, inside)


@triton.jit
def _nf4_codes_kernel(
    packed, absmax, code, out, scale, N, K, GROUPS: tl.constexpr, TOP: tl.constexpr,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """ROWS rows and SPAN columns. GROUPS: a power of two that holds a row's blocks of 64."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = (n < N)[:, None]
    groups = K // 64
    line = n.to(tl.int64)[:, None] * groups
    group = tl.arange(0, GROUPS)[None, :]
    all_absmax = tl.load(absmax + line + group, real & (group < groups), other=0.0)
    bits = tl.max(tl.abs(all_absmax).to(tl.int32, bitcast=True), axis=1)
    row_scale, inverse = scale_and_inverse(bits, TOP)
    tl.store(scale + n, row_scale, n < N)
    table = tl.load(code + tl.arange(0, 16))
    first = tl.program_id(1) * (SPAN // 64)
    for g in range(first, tl.minimum(first + SPAN // 64, groups)):
        at = packed + (line + g) * 32 + tl.arange(0, 32)[None, :]
        byte = tl.load(at, real, other=0).to(tl.int32)
        nibble = tl.reshape(tl.interleave(byte >> 4, byte & 15), (ROWS * 64,))
        values = tl.reshape(tl.gather(table, nibble, 0), (ROWS, 64))
        block = tl.load(absmax + n.to(tl.int64) * groups + g, n < N, other=0.0)
        values = values * block[:, None] * inverse[:, None]
        codes = encoded(values, TOP, out.dtype.element_ty)
        _store_tile(out, codes, n, g * 64 + tl.arange(0, 64), N, K, TRANSPOSED)


@triton.jit
def _transpose_kernel(codes, out, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (k < K)[None, :]
    tile = tl.load(codes + n.to(tl.int64)[:, None] * K + k[None, :], inside, other=0)
    _store_tile(out, tile, n, k, N, K, True)


def launch_nf4_codes(weight: NF4Tensor, out: Tensor, scale: Tensor, transposed: bool) -> None:
    """Overwrites out [N, K] (or [K, N]) and scale [N]."""
    N, K = weight.shape
    grid = (triton.cdiv(N, ROWS), triton.cdiv(K, SPAN))
    _nf4_codes_kernel[grid](
        weight.packed, nf4_absmax(weight), code_table(out.device), out, scale, N, K,
        GROUPS=triton.next_power_of_2(K // BLOCK), TOP=top_of(Rows(out, scale)),
        TRANSPOSED=transposed, ROWS=ROWS, SPAN=SPAN,
    )  # fmt: skip


def launch_transpose(codes: Tensor, out: Tensor) -> None:
    """codes [N, K] of one byte -> out [K, N]."""
    N, K = codes.shape
    grid = (triton.cdiv(N, ROWS), triton.cdiv(K, COLUMNS))
    codes, out = codes.view(torch.uint8), out.view(torch.uint8)
    _transpose_kernel[grid](codes, out, N, K, ROWS=ROWS, COLUMNS=COLUMNS)


# ---------------------------------------------------------------- a weight's codes


def weight_codes(
    weight: Sequence[Tensor], K: int, kind: str, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """-> codes [N, K] (transposed: [K, N], contiguous) and scale fp32 [N], of any form.

    Codes that are not kept so are in the scratch: read them before the next call.
    """
    N, _ = weight_shape(weight, K)
    storage, device = storage_of(weight), weight[0].device
    launched = backend.launches(weight[0])
    if storage == kind and not transposed:
        return weight[0], weight[1]
    out = backend.scratch(N * K, DTYPE[kind], device)
    out = out.view(K, N) if transposed else out.view(N, K)
    if storage == kind:
        if launched:
            launch_transpose(weight[0], out)
        else:
            out.copy_(weight[0].T)
        return out, weight[1]
    if storage == "nf4" and launched:
        scale = torch.empty(N, dtype=torch.float32, device=device)
        launch_nf4_codes(as_nf4(weight, N, K), out, scale, transposed)
        return out, scale
    if storage == "nf4":
        rows = nf4_codes_reference(as_nf4(weight, N, K), kind, None if transposed else out)
    elif launched and not transposed:
        rows = Rows(out, torch.empty(N, dtype=torch.float32, device=device))
        dense = dense_weight(weight, K, torch.float32) if storage != "dense" else weight[0]
        check(dense.stride(1) == 1 or K == 1, "weight", "of last stride 1", dense.stride())
        launch_quantize(dense[None], rows, None, None, None, 0)
    else:
        dense = dense_weight(weight, K, torch.float32) if storage != "dense" else weight[0]
        rows = quantize_rows_reference(dense, kind)
    if transposed:
        return out.copy_(rows.codes.T), rows.scale
    return rows.codes, rows.scale


def nf4_scales(weight: Sequence[Tensor], N: int, K: int, kind: str) -> tuple[Tensor, Tensor]:
    """scale and inverse scale fp32 [N] of `weight_codes` of an NF4 weight, without its codes."""
    amax = nf4_absmax(as_nf4(weight, N, K)).view(N, -1).abs().amax(1)
    return scale_and_inverse_reference(amax, kind)


def nf4_codes_reference(weight: NF4Tensor, kind: str, out: Tensor | None = None) -> Rows:
    """Codes of an NF4 weight in torch or, for int8 on a CPU, in C++ (into `out` where given)."""
    N, K = weight.shape
    absmax = nf4_absmax(weight)
    if kind == "int8" and absmax.device.type == "cpu" and native.isa():
        out = None if out is None else out.view(-1)
        return Rows(*native.nf4_int8(weight.packed.view(-1), absmax, N, K, out))
    amax = absmax.view(N, -1).abs().amax(1)
    return encode_reference(nf4_decode_reference(weight, torch.float32), amax, kind)
