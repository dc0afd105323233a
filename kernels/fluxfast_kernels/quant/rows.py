"""Rows in 8 bits: what a product of 8-bit codes takes in place of activations or gradients.

    v     = x [· gate, rounded to x's dtype] [· channel] [rotated, see hadamard.py]
    amax  = max |v| over the row's columns, at least 1e-30
    code  = round(v · (top / amax));   scale = amax · (1 / top);   v ≈ code · scale

kind "int8": top 127, round to nearest even, symmetric. kind "fp8": e4m3, top 448. One scale a row
(token). `channel` is fp32 [K]: backward folds the weight's own scales into dy with it, so that one
copy of the weight's codes serves both directions. All in fp32; the same bits everywhere (fp8 under
Triton's interpreter: within one unit in the last place).

NaN or infinity in a row makes its scale NaN, and with it every result that the row takes part in;
its codes are then unspecified. A row of zeros has zero codes.

The producers of a product's input write the codes in the pass that makes it (`norm_modulate.py`,
`gelu.py`); an input that another op made is quantized by the pass of its LoRA
(`grads.py`), dy by the gate's pass (this file) or its LoRA's. `quantize_rows` alone is for a
layer without any of these, and for weights.

Bytes a value: reads x once from memory (a row's second sweep comes from the cache), writes 1, with
a gate 2 more for the gated dy in a 2-byte dtype. FLOP: about 4 a value.

Refused with ValueError: other kinds, shapes, dtypes; a last stride other than 1.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import check, check_dtype, tl, triton
from fluxfast_kernels.quant import native
from fluxfast_kernels.quant.hadamard import check_rotation, hadamard_reference, rotated

TOP = {"int8": 127.0, "fp8": 448.0}
DTYPE = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LEAST = 1e-30  # the least amax: its reciprocal times 448 is finite

_LEAST = tl.constexpr(LEAST)
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it rounds to whole numbers
_INFINITY_BITS = tl.constexpr(0x7F800000)


@dataclass
class Rows:
    """codes int8 or float8_e4m3fn [..., K], contiguous; scale fp32 [...]."""

    codes: Tensor
    scale: Tensor

    def flat(self) -> "Rows":
        """[M, K] and [M]."""
        return Rows(self.codes.view(-1, self.codes.shape[-1]), self.scale.view(-1))


# ---------------------------------------------------------------- what kernels share


@triton.jit
def magnitude(v):
    """|v| fp32 as integers, which order like it, NaN above infinity: a maximum keeps a NaN."""
    return tl.abs(v).to(tl.int32, bitcast=True)


@triton.jit
def scale_and_inverse(bits, TOP: tl.constexpr):
    """The largest `magnitude` of a row -> its scale (NaN where that is not finite), top / amax."""
    amax = bits.to(tl.float32, bitcast=True)
    finite = bits < _INFINITY_BITS
    amax = tl.where(finite, tl.maximum(amax, _LEAST), 1.0)
    scale = tl.where(finite, amax * (1.0 / TOP), float("nan"))
    return scale, tl.div_rn(tl.full(amax.shape, TOP, tl.float32), amax)


@triton.jit
def encoded(scaled, TOP: tl.constexpr, dtype: tl.constexpr):
    """fp32 within ±TOP -> codes. The clamp also keeps product and sum apart: fused, they would
    round otherwise than on a CPU."""
    scaled = tl.minimum(tl.maximum(scaled, -TOP), TOP)
    if dtype == tl.int8:
        whole = (scaled + _TO_INTEGER) - _TO_INTEGER
        return whole.to(tl.int32).to(tl.int8)
    return scaled.to(dtype)


# ---------------------------------------------------------------- kernel and launcher

BLOCK = 1024


@triton.jit
def _row_tile(X, GATE, CHANNEL, DY, at, dy_at, cols, mask, ROTATION: tl.constexpr):
    """-> v of some columns [1, BLOCK]; dy is stored where it is given."""
    v = tl.load(X + at + cols, mask, other=0.0)
    if GATE is not None:
        gate = tl.load(GATE + cols, mask, other=0.0)
        v = (v.to(tl.float32) * gate.to(tl.float32)).to(X.dtype.element_ty)
    if DY is not None:
        tl.store(DY + dy_at + cols, v, mask)
    v = v.to(tl.float32)
    if CHANNEL is not None:
        v *= tl.load(CHANNEL + cols, mask, other=0.0)
    if ROTATION:
        v = rotated(v, ROTATION)
    return v


@triton.jit
def _quantize_kernel(
    X, GATE, CHANNEL, DY, CODES, SCALE, T, K, x_batch, x_row, gate_batch,
    TOP: tl.constexpr, ROTATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its amax (and dy), then its codes."""
    row = tl.program_id(0)
    batch, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    at = batch * x_batch + token * x_row
    out = row.to(tl.int64) * K
    if GATE is not None:
        GATE += batch * gate_batch
    most = tl.zeros((1, BLOCK), tl.int32)
    for block in range(0, tl.cdiv(K, BLOCK)):
        cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        v = _row_tile(X, GATE, CHANNEL, DY, at, out, cols, cols < K, ROTATION)
        most = tl.maximum(most, magnitude(v))
    scale, inverse = scale_and_inverse(tl.max(most, axis=1), TOP)
    tl.store(SCALE + row + tl.arange(0, 1), scale)
    for block in range(0, tl.cdiv(K, BLOCK)):
        cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        v = _row_tile(X, GATE, CHANNEL, None, at, out, cols, cols < K, ROTATION)
        codes = encoded(v * inverse[:, None], TOP, CODES.dtype.element_ty)
        tl.store(CODES + out + cols, codes, cols < K)


def launch_quantize(
    x: Tensor,
    rows: Rows,
    gate: Tensor | None,
    channel: Tensor | None,
    dy: Tensor | None,
    rotation: int,
) -> None:
    """Overwrites rows and, with a gate, dy. x [B, T, K]; the others contiguous, gate [B, 1, K]."""
    B, T, K = x.shape
    check(x.stride(2) == 1 or K == 1, "x", "of last stride 1", x.stride())
    block = min(BLOCK, triton.next_power_of_2(K))
    if B * T:
        _quantize_kernel[(B * T,)](
            x, gate, channel, dy, rows.codes, rows.scale, T, K, *x.stride()[:2],
            0 if gate is None else gate.stride(0),
            TOP=top_of(rows), ROTATION=rotation, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip


def warps(block: int) -> int:
    """Of a program that holds so many values: rows as short as a head's need one."""
    return 4 if block > 256 else 1


def top_of(rows: Rows | None) -> float:
    """The largest code of the rows' kind."""
    return TOP["int8" if rows is None or rows.codes.dtype == torch.int8 else "fp8"]


# ---------------------------------------------------------------- public


def empty_rows(x: Tensor, kind: str) -> Rows:
    """Unset rows for an x [..., K]."""
    codes = torch.empty(x.shape, dtype=DTYPE[kind], device=x.device)
    return Rows(codes, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device))


@torch.no_grad()
def quantize_rows(
    x: Tensor,
    kind: str,
    channel: Tensor | None = None,
    rotation: int = 0,
    gate: Tensor | None = None,
) -> tuple[Rows, Tensor]:
    """x [B, T, K] fp32, bf16 or fp16 -> its rows in 8 bits, and x (with a gate [B, 1, K]: gate·x,
    new and contiguous), which is what the rows stand for. See the file's head. Not differentiable.
    """
    check(kind in TOP, "kind", "int8 or fp8", kind)
    check_dtype("x", x)
    fits = x.ndim == 3 and x.shape[2] > 0 and (x.stride(2) == 1 or x.shape[2] == 1)
    check(fits, "x", "[B, T, K] of last stride 1", (tuple(x.shape), x.stride()))
    check_rotation(rotation, x.shape[-1])
    if channel is not None:
        fits = channel.shape == (x.shape[-1],) and channel.dtype == torch.float32
        check(fits and channel.is_contiguous(), "channel", f"contiguous fp32 [{x.shape[-1]}]",
              (channel.dtype, tuple(channel.shape), channel.stride()))  # fmt: skip
    if gate is not None:
        fits = gate.shape == (x.shape[0], 1, x.shape[-1]) and gate.stride(-1) == 1
        check(fits and gate.dtype == x.dtype, "gate", f"{x.dtype} [{x.shape[0]}, 1, {x.shape[-1]}]",
              (gate.dtype, tuple(gate.shape), gate.stride()))  # fmt: skip
    if backend.launches(x):
        rows = empty_rows(x, kind)
        dy = None if gate is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        launch_quantize(x, rows, gate, channel, dy, rotation)
        return rows, x if gate is None else dy
    x = x if gate is None else x * gate
    return quantize_rows_reference(x, kind, channel, rotation), x


@torch.no_grad()
def quantize_rows_reference(
    x: Tensor, kind: str, channel: Tensor | None = None, rotation: int = 0
) -> Rows:
    """x [..., K] -> Rows, in ordinary torch operations or, for int8 on a CPU, in C++."""
    by_cpp = kind == "int8" and not rotation and x.device.type == "cpu" and native.isa()
    if by_cpp and x.dtype in native.TYPES and x.numel():
        flat = x.reshape(-1, x.shape[-1])
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        codes, scale = native.rows_int8(flat, channel)
        return Rows(codes.view(x.shape), scale.view(x.shape[:-1]))
    v = x.float() if channel is None else x.float() * channel
    v = hadamard_reference(v, rotation) if rotation else v
    return encode_reference(v, v.abs().amax(-1), kind)


def encode_reference(v: Tensor, amax: Tensor, kind: str) -> Rows:
    """fp32 [..., K] and the largest magnitude of each row -> Rows."""
    scale, inverse = scale_and_inverse_reference(amax, kind)
    # NaN stays out of the codes: its conversion to an integer is undefined
    scaled = (v * inverse[..., None]).nan_to_num_(0.0).clamp_(-TOP[kind], TOP[kind])
    codes = (scaled.round_() if kind == "int8" else scaled).to(DTYPE[kind])
    return Rows(codes, scale)


def scale_and_inverse_reference(amax: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The largest magnitudes, fp32 -> scales (NaN where these are not finite), top / amax."""
    floor, top = amax.clamp(min=LEAST), TOP[kind]
    scale = torch.where(amax.isfinite(), floor * (1.0 / top), torch.nan)
    # number / tensor would be the rounded reciprocal times the number
    return scale, torch.full_like(floor, top) / floor


# ---------------------------------------------------------------- products of codes on a CPU


@cache
def _int_mm_is_exact() -> bool:
    """oneDNN's int8 product saturates sums of two on CPUs without VNNI; and not every torch has
    `_int_mm` there."""
    largest = torch.full((64, 512), 127, dtype=torch.int8)
    try:
        return all(
            bool((torch._int_mm(a, b.T) == 512 * int(a[0, 0]) * int(b[0, 0])).all())
            for a in (largest, -largest)
            for b in (largest, -largest)
        )
    except (RuntimeError, AttributeError):
        return False


def multiply_codes(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] · right [K, N] of codes -> fp32 [M, N]. int8: the exact sum, rounded once."""
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
