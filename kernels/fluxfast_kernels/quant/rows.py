"""Activations and gradients quantized to 8 bits, one scale a row, for 8-bit matmuls.

    v     = x [· gate, rounded to x's dtype] [· channel] [rotated, see hadamard.py]
    amax  = max |v| over the row's columns, at least 1e-30
    value = round(v · (top / amax));   scale = amax · (1 / top);   v ≈ value · scale

kind "int8": top 127, round to nearest even, symmetric. kind "fp8": e4m3, top 448. One scale a row
(token). `channel` is fp32 [K]: backward folds the weight's own scales into dy with it, so that one
8-bit copy of the weight serves both directions. All in fp32; the same bits everywhere (fp8 under
Triton's interpreter: within one unit in the last place).

NaN or infinity in a row makes its scale NaN, and with it every result that the row takes part in;
its values are then unspecified. A row of zeros has zero values.

The ops that make a matmul's input quantize it in the pass that makes it (`norm_modulate.py`,
`gelu.py`); an input that another op made is quantized by the pass of its LoRA (`grads.py`), dy by
the gate's pass (this file) or its LoRA's. `quantize_rows` alone is for a layer without any of
these, and for weights.

Bytes a value: reads x once from memory (a row's second sweep comes from the cache), writes 1, with
a gate 2 more for the gated dy in a 2-byte dtype. FLOP: about 4 a value.

Refused with ValueError: other kinds, shapes, dtypes; a last stride other than 1.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import check, check_dtype, kernel, matrix, refuse, tl, triton
from fluxfast_kernels.quant import native
from fluxfast_kernels.quant.hadamard import check_rotation, hadamard_reference, rotated

TOP = {"int8": 127.0, "fp8": 448.0}
DTYPE = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LEAST = 1e-30  # the least amax: its reciprocal times 448 is finite

_LEAST = tl.constexpr(LEAST)
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it rounds to whole numbers
_INFINITY_BITS = tl.constexpr(0x7F800000)


@dataclass
class QuantizedRows:
    """values int8 or float8_e4m3fn [..., K], contiguous; scale fp32 [...]."""

    values: Tensor
    scale: Tensor

    @property
    def kind(self) -> str:
        """ "int8" or "fp8"."""
        return "int8" if self.values.dtype == torch.int8 else "fp8"

    def flat(self) -> "QuantizedRows":
        """[M, K] and [M]."""
        return QuantizedRows(self.values.view(-1, self.values.shape[-1]), self.scale.view(-1))

    def dequantize(self) -> Tensor:
        """fp32 [..., K]."""
        return self.values.float() * self.scale[..., None]


# ---------------------------------------------------------------- what kernels share


class RowsPointer(NamedTuple):
    """Contiguous quantized rows as a kernel takes them."""

    ptr: Tensor
    scale_ptr: Tensor


def rows_pointer(rows: QuantizedRows | None) -> RowsPointer | None:
    """A kernel's argument for rows; None for None."""
    return None if rows is None else RowsPointer(rows.values, rows.scale)


@triton.jit
def magnitude(v):
    """|v| fp32 as integers, which order like it, NaN above infinity: a maximum keeps a NaN."""
    return tl.abs(v).to(tl.int32, bitcast=True)


@triton.jit
def scale_and_inverse(bits, TOP: tl.constexpr):
    """The scale (NaN where not finite) and top / amax of the largest `magnitude` of a row."""
    amax = bits.to(tl.float32, bitcast=True)
    finite = bits < _INFINITY_BITS
    amax = tl.where(finite, tl.maximum(amax, _LEAST), 1.0)
    scale = tl.where(finite, amax * (1.0 / TOP), float("nan"))
    return scale, tl.div_rn(tl.full(amax.shape, TOP, tl.float32), amax)


@triton.jit
def quantize(scaled, TOP: tl.constexpr, dtype: tl.constexpr):
    """Rounds fp32 values to 8 bits within ±TOP. The clamp also keeps the multiplication and the sum
    from being fused, which would round otherwise than on a CPU."""
    scaled = tl.minimum(tl.maximum(scaled, -TOP), TOP)
    if dtype == tl.int8:
        whole = (scaled + _TO_INTEGER) - _TO_INTEGER
        return whole.to(tl.int32).to(tl.int8)
    return scaled.to(dtype)


# ---------------------------------------------------------------- kernel and launcher

BLOCK = 1024


@triton.jit
def _row_tile(x_ptr, gate_ptr, channel_ptr, dy_ptr, cols, mask, ROTATION: tl.constexpr):
    """v of some columns [1, BLOCK]; dy is stored where it is given."""
    v = tl.load(x_ptr + cols, mask, other=0.0)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + cols, mask, other=0.0)
        v = (v.to(tl.float32) * gate.to(tl.float32)).to(x_ptr.dtype.element_ty)
    if dy_ptr is not None:
        tl.store(dy_ptr + cols, v, mask)
    v = v.to(tl.float32)
    if channel_ptr is not None:
        v *= tl.load(channel_ptr + cols, mask, other=0.0)
    if ROTATION:
        v = rotated(v, ROTATION)
    return v


@kernel
def _quantize_kernel(
    x,
    gate,
    channel_ptr,
    dy_ptr,
    values_ptr,
    scale_ptr,
    T,
    K,
    TOP: tl.constexpr,
    ROTATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its amax (and dy), then its values. x, gate: `Matrix`, gate's rows being batches."""
    row = tl.program_id(0)
    batch, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    x_ptr = x.ptr + batch * x.batch_stride + token * x.token_stride
    out = row.to(tl.int64) * K
    gate_ptr = None
    if gate is not None:
        gate_ptr = gate.ptr + batch * gate.batch_stride
    if dy_ptr is not None:
        dy_ptr += out
    most = tl.zeros((1, BLOCK), tl.int32)
    for block in range(0, tl.cdiv(K, BLOCK)):
        cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        v = _row_tile(x_ptr, gate_ptr, channel_ptr, dy_ptr, cols, cols < K, ROTATION)
        most = tl.maximum(most, magnitude(v))
    scale, inverse = scale_and_inverse(tl.max(most, axis=1), TOP)
    tl.store(scale_ptr + row + tl.arange(0, 1), scale)
    for block in range(0, tl.cdiv(K, BLOCK)):
        cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        v = _row_tile(x_ptr, gate_ptr, channel_ptr, None, cols, cols < K, ROTATION)
        values = quantize(v * inverse[:, None], TOP, values_ptr.dtype.element_ty)
        tl.store(values_ptr + out + cols, values, cols < K)


def launch_quantize(
    x: Tensor,
    rows: QuantizedRows,
    channel: Tensor | None = None,
    rotation: int = 0,
    gate: Tensor | None = None,
    dy: Tensor | None = None,
) -> None:
    """Overwrites rows and, with a gate, dy. x [B, T, K]; the others contiguous, gate [B, 1, K]."""
    B, T, K = x.shape
    if not (x.stride(2) == 1 or K == 1):
        refuse("x", "of last stride 1", x.stride())
    block = min(BLOCK, triton.next_power_of_2(K))
    tensors = (matrix(x), matrix(gate), channel, dy, rows.values, rows.scale)
    constants = {"TOP": TOP[rows.kind], "ROTATION": rotation, "BLOCK": block}
    if B * T:
        _quantize_kernel[(B * T,)](*tensors, T, K, **constants, num_warps=warps(block))


def warps(block: int) -> int:
    """Returns the warps of a program of `block` values: rows as short as a head's need one."""
    return 4 if block > 256 else 1


# ---------------------------------------------------------------- public


def empty_rows(x: Tensor, kind: str) -> QuantizedRows:
    """Returns unset rows for an x [..., K]."""
    values = torch.empty(x.shape, dtype=DTYPE[kind], device=x.device)
    return QuantizedRows(values, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device))


@torch.no_grad()
def quantize_rows(
    x: Tensor,
    kind: str,
    channel: Tensor | None = None,
    rotation: int = 0,
    gate: Tensor | None = None,
) -> tuple[QuantizedRows, Tensor]:
    """Quantizes x [B, T, K] fp32, bf16 or fp16, or with a gate [B, 1, K] gate·x; see the file's
    head. Returns the rows and x or gate·x (new, contiguous). Not differentiable.
    """
    check(kind in TOP, "kind", "int8 or fp8", kind)
    check_dtype("x", x)
    fits = x.ndim == 3 and x.shape[2] > 0 and (x.stride(2) == 1 or x.shape[2] == 1)
    if not fits:
        refuse("x", "[B, T, K] of last stride 1", (tuple(x.shape), x.stride()))
    B, _, K = x.shape
    check_rotation(rotation, K)
    if channel is not None:
        fits = channel.shape == (K,) and channel.dtype == torch.float32 and channel.is_contiguous()
        got = (channel.dtype, tuple(channel.shape), channel.stride())
        if not fits:
            refuse("channel", f"contiguous fp32 [{K}]", got)
    if gate is not None:
        fits = gate.shape == (B, 1, K) and gate.stride(-1) == 1 and gate.dtype == x.dtype
        got = (gate.dtype, tuple(gate.shape), gate.stride())
        if not fits:
            refuse("gate", f"{x.dtype} [{B}, 1, {K}]", got)
    if backend.launches(x):
        rows = empty_rows(x, kind)
        dy = None if gate is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        launch_quantize(x, rows, channel, rotation, gate, dy)
        return rows, x if dy is None else dy
    x = x if gate is None else x * gate
    return quantize_rows_reference(x, kind, channel, rotation), x


@torch.no_grad()
def quantize_rows_reference(
    x: Tensor, kind: str, channel: Tensor | None = None, rotation: int = 0
) -> QuantizedRows:
    """Quantizes x [..., K] in plain torch or, for int8 on a CPU, in C++."""
    by_cpp = kind == "int8" and not rotation and x.device.type == "cpu" and native.isa()
    if by_cpp and x.dtype in native.TYPES and x.numel():
        flat = x.reshape(-1, x.shape[-1])
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        values, scale = native.rows_int8(flat, channel)
        return QuantizedRows(values.view(x.shape), scale.view(x.shape[:-1]))
    v = x.float() if channel is None else x.float() * channel
    v = hadamard_reference(v, rotation) if rotation else v
    return quantize_reference(v, v.abs().amax(-1), kind)


def quantize_reference(v: Tensor, amax: Tensor, kind: str) -> QuantizedRows:
    """Quantizes v fp32 [..., K] by the largest magnitude of each row."""
    scale, inverse = scale_and_inverse_reference(amax, kind)
    # NaN stays out of the values: its conversion to an integer is undefined
    scaled = (v * inverse[..., None]).nan_to_num_(0.0).clamp_(-TOP[kind], TOP[kind])
    values = (scaled.round_() if kind == "int8" else scaled).to(DTYPE[kind])
    return QuantizedRows(values, scale)


def scale_and_inverse_reference(amax: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Returns the scales (NaN where not finite) and top / amax of largest magnitudes, in fp32."""
    floor, top = amax.clamp(min=LEAST), TOP[kind]
    scale = torch.where(amax.isfinite(), floor * (1.0 / top), torch.nan)
    # number / tensor would be the rounded reciprocal times the number
    return scale, torch.full_like(floor, top) / floor


# ---------------------------------------------------------------- 8-bit matmuls on a CPU


@cache
def _int_mm_is_exact() -> bool:
    """oneDNN's int8 matmul saturates sums of two on CPUs without VNNI; and not every torch has
    `_int_mm` on a CPU."""
    largest = torch.full((64, 512), 127, dtype=torch.int8)
    try:
        return all(
            bool((torch._int_mm(a, b.T) == 512 * int(a[0, 0]) * int(b[0, 0])).all())
            for a in (largest, -largest)
            for b in (largest, -largest)
        )
    except (RuntimeError, AttributeError):
        return False


def multiply_8bit(left: Tensor, right: Tensor) -> Tensor:
    """Returns left [M, K] · right [K, N] of 8-bit values in fp32. int8: the exact sum, rounded."""
    if left.dtype != torch.int8:
        return left.float() @ right.float()
    # of one column it reads beyond a transposed right operand (torch 2.13: both strides are 1)
    if left.device.type == "cpu" and left.shape[1] > 1 and _int_mm_is_exact():
        return torch._int_mm(left, right).float()
    total = torch.zeros(left.shape[0], right.shape[1], dtype=torch.int32, device=left.device)
    for k in range(0, left.shape[1], 1024):  # 1024 · 127² is below 2^24: exact in fp32
        part = left[:, k : k + 1024].float() @ right[k : k + 1024].float()
        total += part.to(torch.int32)
    return total.float()
