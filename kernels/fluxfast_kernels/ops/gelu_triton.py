"""The kernels of `gelu.py`: gelu, its gradient, and whole rows of gelu with codes.

Formulas, layouts, codes and bytes: `gelu.py`. Everything is fp32 between load and store.
"""

from torch import Tensor

from fluxfast_kernels.dispatch.backend import tl, triton
from fluxfast_kernels.quant.hadamard import rotated
from fluxfast_kernels.quant.rows import (
    Rows,
    encoded,
    magnitude,
    scale_and_inverse,
    top_of,
)

BLOCK = 1024  # columns per program: 16 bytes a thread in a 2-byte dtype with 4 warps
ROW_BLOCK = 2048
LOWEST = -3.5  # the 8-bit codes begin here at the lowest; chosen by the table above

# a tensor goes first beside these: constexpr * tensor fails in the interpreter
_LOWEST = tl.constexpr(LOWEST)
_TWO_K = tl.constexpr(1.5957691216057308)  # 2·√(2/π)
_CUBIC = tl.constexpr(0.044715)
_CUBIC_SLOPE = tl.constexpr(3 * 0.044715)


@triton.jit
def _sigmoid(u):
    """σ and σ(1 − σ) at 2z. From exp(−|2z|): nothing overflows and 1 − σ keeps its digits near 0,
    which u³ multiplies."""
    z = (u + u * u * u * _CUBIC) * _TWO_K
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(z > 0, larger, smaller), larger * smaller


@triton.jit
def _load_u(U, ROW_SCALE, offset, cols, mask, row, CODES: tl.constexpr):
    """A block of u in fp32; of its 8-bit codes where CODES."""
    u = tl.load(U + offset + cols, mask=mask, other=0).to(tl.float32)
    if CODES:
        step = tl.load(ROW_SCALE + 2 * row)
        low = tl.load(ROW_SCALE + 2 * row + 1)
        u = low + (u + 128.0) * step
    return u


@triton.jit
def _gelu_kernel(
    U, ROW_SCALE, X, T, F, u_batch, u_row, x_batch, x_row,
    CODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    batch, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    u = _load_u(U, ROW_SCALE, batch * u_batch + token * u_row, cols, mask, row, CODES)
    s, _ = _sigmoid(u)
    x_offset = batch * x_batch + token * x_row
    tl.store(X + x_offset + cols, (u * s).to(X.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_rows_kernel(
    U, X, CODE, ROW_SCALE, X_CODE, X_SCALE, T, F, u_batch, u_row, x_batch, x_row,
    TOP: tl.constexpr, ROTATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of X = gelu(U), with codes of U for backward, with codes of X for a product."""
    row = tl.program_id(0)
    batch, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    u_row_start = U + batch * u_batch + token * u_row
    x_row_start = X + batch * x_batch + token * x_row
    code_first = row.to(tl.int64) * F

    lowest = tl.full([1, BLOCK], float("inf"), tl.float32)
    highest = tl.full([1, BLOCK], float("-inf"), tl.float32)
    most = tl.zeros([1, BLOCK], tl.int32)
    for block in range(0, tl.cdiv(F, BLOCK)):
        cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = cols < F
        u = tl.load(u_row_start + cols, mask=mask, other=0).to(tl.float32)
        if CODE is not None:
            lowest = tl.minimum(lowest, tl.where(mask, u, float("inf")))
            highest = tl.maximum(highest, tl.where(mask, u, float("-inf")))
        if X_CODE is not None:
            s, _ = _sigmoid(u)
            x = (u * s).to(X.dtype.element_ty).to(tl.float32)
            most = tl.maximum(most, magnitude(rotated(x, ROTATION) if ROTATION else x))
    if CODE is not None:
        low = tl.maximum(tl.min(lowest, axis=1), _LOWEST)
        step = (tl.maximum(tl.max(highest, axis=1), low) - low) / 255.0
        code_inverse = tl.where(step > 0, 1.0 / tl.where(step > 0, step, 1.0), 0.0)
        tl.store(ROW_SCALE + 2 * row + tl.arange(0, 1), step)
        tl.store(ROW_SCALE + 2 * row + 1 + tl.arange(0, 1), low)
    if X_CODE is not None:
        scale, inverse = scale_and_inverse(tl.max(most, axis=1), TOP)
        tl.store(X_SCALE + row + tl.arange(0, 1), scale)

    for block in range(0, tl.cdiv(F, BLOCK)):
        cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = cols < F
        u = tl.load(u_row_start + cols, mask=mask, other=0).to(tl.float32)
        s, _ = _sigmoid(u)
        x = (u * s).to(X.dtype.element_ty)
        tl.store(x_row_start + cols, x, mask=mask)
        if CODE is not None:
            code = tl.floor((u - low[:, None]) * code_inverse[:, None] + 0.5)
            code = tl.minimum(tl.maximum(code, 0.0), 255.0) - 128.0
            tl.store(CODE + code_first + cols, code.to(tl.int32).to(tl.int8), mask=mask)
        if X_CODE is not None:
            v = x.to(tl.float32)
            v = rotated(v, ROTATION) if ROTATION else v
            codes = encoded(v * inverse[:, None], TOP, X_CODE.dtype.element_ty)
            tl.store(X_CODE + code_first + cols, codes, mask=mask)


@triton.jit
def _gelu_backward_kernel(
    U, ROW_SCALE, DX, DU, T, F, u_batch, u_row, dx_batch, dx_row, du_batch, du_row,
    CODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    batch, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    u = _load_u(U, ROW_SCALE, batch * u_batch + token * u_row, cols, mask, row, CODES)
    dx = tl.load(DX + batch * dx_batch + token * dx_row + cols, mask=mask, other=0).to(tl.float32)
    s, product = _sigmoid(u)
    slope = s + u * product * (1.0 + u * u * _CUBIC_SLOPE) * _TWO_K
    du_offset = batch * du_batch + token * du_row
    tl.store(DU + du_offset + cols, (slope * dx).to(DU.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launchers


def launch_gelu(u: Tensor, row_scale: Tensor | None, out: Tensor) -> None:
    """Overwrites out [B, T, F]; u is codes where row_scale is given."""
    B, T, F = u.shape
    _gelu_kernel[B * T, triton.cdiv(F, BLOCK)](
        u, row_scale, out, T, F, *u.stride()[:2], *out.stride()[:2],
        CODES=row_scale is not None, BLOCK=BLOCK,
    )  # fmt: skip


def launch_gelu_rows(
    u: Tensor, out: Tensor, codes: tuple[Tensor, Tensor] | None, rows: Rows | None, rotation: int
) -> None:
    """Overwrites out [B, T, F], codes (int8 of u, fp32 [B, T, 2]) and rows of out, where given."""
    B, T, F = u.shape
    _gelu_rows_kernel[(B * T,)](
        u, out, *(codes or (None, None)), *((rows.codes, rows.scale) if rows else (None, None)),
        T, F, *u.stride()[:2], *out.stride()[:2],
        TOP=top_of(rows), ROTATION=rotation, BLOCK=ROW_BLOCK, num_warps=8,
    )  # fmt: skip


def launch_gelu_backward(u: Tensor, row_scale: Tensor | None, dx: Tensor, out: Tensor) -> None:
    """Overwrites out [B, T, F], which may be dx."""
    B, T, F = u.shape
    _gelu_backward_kernel[B * T, triton.cdiv(F, BLOCK)](
        u, row_scale, dx, out, T, F, *u.stride()[:2], *dx.stride()[:2], *out.stride()[:2],
        CODES=row_scale is not None, BLOCK=BLOCK,
    )  # fmt: skip
