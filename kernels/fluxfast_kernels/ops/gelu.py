"""GELU-tanh and the LoRA linear behind it: x = [head, gelu(u)], y = x Wᵀ + b + s·(x Aᵀ) Bᵀ.

    z        = √(2/π)·(u + 0.044715·u³)
    gelu(u)  = u·σ(2z)                                       (½(1 + tanh z) = σ(2z))
    gelu'(u) = σ + u·σ(1 − σ)·2√(2/π)·(1 + 3·0.044715·u²)    with σ = σ(2z)

The formula of `torch.nn.functional.gelu(approximate="tanh")`, in fp32 on values of fp32, bf16 or
fp16. The sigmoid form keeps the relative precision that 1 + tanh z loses at negative u.

Layouts: u [B, T, F], head [B, T, K0] and outputs may have any batch and row stride (last stride 1):
gelu(u) can be written into a column range of a wider buffer. The linear reads its inputs side by
side, so [head, gelu(u)] is never concatenated.

Saved for backward: u, head, gate, A, B; neither gelu(u), which is recomputed, nor y. With
saved_bits=8, u is saved in int8 plus two fp32 per row (see below) in the pass that makes gelu(u):
1 byte an element in place of 2. The forward result is the same for both.

u in 8 bits: per row affine, u ≈ low + (int8 + 128)·step, with low = max(min u, −3.5), step =
(max u − low) / 255. What lies below −3.5 is saved as −3.5: gelu' is within 0.003 and gelu within
0.001 of zero there, and the 255 steps go to where the derivative varies. Relative error (norm over
norm, 64 rows of 12 288 random values rounded to bf16, CPU) of gelu'(u) / gelu(u):

    distribution of u               symmetric        affine         affine from −3.5 (this)
    N(0, 1)                         0.72 / 0.96 %    0.69 / 0.92 %    0.66 / 0.87 %
    N(−1, 1)                        1.31 / 1.57      1.04 / 1.25      0.86 / 1.03
    N(−1.5, 2)                      1.52 / 1.43      1.28 / 1.20      0.83 / 0.76
    N(−1, 1), 12 a row at −20       5.34 / 6.42      3.05 / 3.67      0.86 / 1.03
    N(−1, 1), 12 a row at +20       5.32 / 2.45      3.30 / 1.52      3.11 / 1.43
    Laplace(−0.5, 1)                2.09 / 1.60      1.93 / 1.48      1.28 / 0.98

Bytes moved per row in a 2-byte dtype, beside the linear's own: forward 4F (8 bits: 5F; the second
read of a row is counted as a cache hit); backward 4F to recompute gelu(u), which is left out
without LoRA, and 6F for du (8 bits: 3F and 5F). About 10 FLOP an element forward, 20 backward.

Refused with ValueError: other dtypes, a last stride other than 1, shapes that do not fit, a gate
without a residual or the reverse, a gate that requires a gradient. Weight and bias are frozen.
"""

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import check, check_dtype, kernel, layout, matrix, tl, triton
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.ops.lora_linear import (
    LINEAR,
    check_gate,
    check_linear,
    fake_update_gradients,
    flatten,
    linear_gradients,
    lora_linear_reference,
    or_empty,
    save_linear,
    saved_linear,
    unflatten,
)
from fluxfast_kernels.quant.frozen import FrozenWeight, weight_shape
from fluxfast_kernels.quant.hadamard import rotated
from fluxfast_kernels.quant.rows import (
    TOP,
    QuantizedRows,
    RowsPointer,
    empty_rows,
    magnitude,
    quantize,
    rows_pointer,
    scale_and_inverse,
)

BLOCK = 1024  # columns per program: 16 bytes a thread in a 2-byte dtype with 4 warps
ROW_BLOCK = 2048
LOWEST = -3.5  # u in 8 bits begins here at the lowest; chosen by the table above

# a tensor goes first beside these: constexpr * tensor fails in the interpreter
_LOWEST = tl.constexpr(LOWEST)
_TWO_K = tl.constexpr(1.5957691216057308)  # 2·√(2/π)
_CUBIC = tl.constexpr(0.044715)
_CUBIC_SLOPE = tl.constexpr(3 * 0.044715)

# ---------------------------------------------------------------- forward kernels


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
def _load_u(u, row_scale_ptr, batch, token, row, cols, mask):
    """A block of u in fp32, from its 8 bits where row_scale is given."""
    at = u.ptr + (batch * u.batch_stride + token * u.token_stride) + cols
    value = tl.load(at, mask=mask, other=0).to(tl.float32)
    if row_scale_ptr is not None:
        step = tl.load(row_scale_ptr + 2 * row)
        low = tl.load(row_scale_ptr + 2 * row + 1)
        value = low + (value + 128.0) * step
    return value


@kernel
def _gelu_kernel(u, row_scale_ptr, x, T, F, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    batch, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    value = _load_u(u, row_scale_ptr, batch, token, row, cols, mask)
    s, _ = _sigmoid(value)
    x_at = x.ptr + (batch * x.batch_stride + token * x.token_stride) + cols
    tl.store(x_at, (value * s).to(x.ptr.dtype.element_ty), mask=mask)


@kernel
def _gelu_rows_kernel(
    u, x, saved, rows, T, F, TOP: tl.constexpr, ROTATION: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of x = gelu(u), with u in 8 bits for backward (`saved`), with x in 8 bits for a
    matmul (`rows`)."""
    row = tl.program_id(0)
    batch, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    u_row = u.ptr + batch * u.batch_stride + token * u.token_stride
    x_row = x.ptr + batch * x.batch_stride + token * x.token_stride
    out_first = row.to(tl.int64) * F

    lowest = tl.full([1, BLOCK], float("inf"), tl.float32)
    highest = tl.full([1, BLOCK], float("-inf"), tl.float32)
    most = tl.zeros([1, BLOCK], tl.int32)
    for block in range(0, tl.cdiv(F, BLOCK)):
        cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = cols < F
        value = tl.load(u_row + cols, mask=mask, other=0).to(tl.float32)
        if saved is not None:
            lowest = tl.minimum(lowest, tl.where(mask, value, float("inf")))
            highest = tl.maximum(highest, tl.where(mask, value, float("-inf")))
        if rows is not None:
            s, _ = _sigmoid(value)
            out = (value * s).to(x.ptr.dtype.element_ty).to(tl.float32)
            most = tl.maximum(most, magnitude(rotated(out, ROTATION) if ROTATION else out))
    if saved is not None:
        low = tl.maximum(tl.min(lowest, axis=1), _LOWEST)
        step = (tl.maximum(tl.max(highest, axis=1), low) - low) / 255.0
        step_inverse = tl.where(step > 0, 1.0 / tl.where(step > 0, step, 1.0), 0.0)
        tl.store(saved.scale_ptr + 2 * row + tl.arange(0, 1), step)
        tl.store(saved.scale_ptr + 2 * row + 1 + tl.arange(0, 1), low)
    if rows is not None:
        scale, inverse = scale_and_inverse(tl.max(most, axis=1), TOP)
        tl.store(rows.scale_ptr + row + tl.arange(0, 1), scale)

    for block in range(0, tl.cdiv(F, BLOCK)):
        cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = cols < F
        value = tl.load(u_row + cols, mask=mask, other=0).to(tl.float32)
        s, _ = _sigmoid(value)
        out = (value * s).to(x.ptr.dtype.element_ty)
        tl.store(x_row + cols, out, mask=mask)
        if saved is not None:
            number = tl.floor((value - low[:, None]) * step_inverse[:, None] + 0.5)
            number = tl.minimum(tl.maximum(number, 0.0), 255.0) - 128.0
            tl.store(saved.ptr + out_first + cols, number.to(tl.int32).to(tl.int8), mask=mask)
        if rows is not None:
            v = out.to(tl.float32)
            v = rotated(v, ROTATION) if ROTATION else v
            values = quantize(v * inverse[:, None], TOP, rows.ptr.dtype.element_ty)
            tl.store(rows.ptr + out_first + cols, values, mask=mask)


# ---------------------------------------------------------------- backward kernel


@kernel
def _gelu_backward_kernel(u, row_scale_ptr, dx, du, T, F, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    batch, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    value = _load_u(u, row_scale_ptr, batch, token, row, cols, mask)
    dx_at = dx.ptr + batch * dx.batch_stride + token * dx.token_stride + cols
    gradient = tl.load(dx_at, mask=mask, other=0).to(tl.float32)
    s, product = _sigmoid(value)
    slope = s + value * product * (1.0 + value * value * _CUBIC_SLOPE) * _TWO_K
    du_at = du.ptr + (batch * du.batch_stride + token * du.token_stride) + cols
    tl.store(du_at, (slope * gradient).to(du.ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launchers


def gelu_forward(
    u: Tensor,
    row_scale: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns gelu(u) [B, T, F], in `out` where given. With row_scale fp32 [B, T, 2], u is int8 and
    `dtype` that of a fresh result. Not differentiable: see `gelu_lora_linear`."""
    if out is None:
        if row_scale is None and not backend.launches(u):
            return torch.ops.aten.gelu(u, approximate="tanh")
        out = torch.empty(u.shape, dtype=dtype or u.dtype, device=u.device)
    check(out.shape == u.shape and out.stride(-1) == 1, "out", f"{tuple(u.shape)}", layout(out))
    if not backend.launches(u):
        return gelu_forward_reference(u, row_scale, out)
    B, T, F = u.shape
    grid = (B * T, triton.cdiv(F, BLOCK))
    _gelu_kernel[grid](matrix(u), row_scale, matrix(out), T, F, BLOCK=BLOCK)
    return out


def gelu_rows(
    u: Tensor,
    saved_bits: int = 16,
    matmul: str = "",
    rotation: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, QuantizedRows | None]:
    """Returns gelu(u) of u [B, T, F]; u in int8 [B, T, F] and row_scale fp32 [B, T, 2] = (step,
    low), both empty unless saved_bits is 8; gelu(u)'s 8-bit rows, where a kernel wrote them."""
    u8, row_scale = _not_saved(u)
    if not backend.launches(u) or (saved_bits == 16 and not matmul):
        if saved_bits == 8:
            u8, row_scale = gelu_quantize_reference(u)
        return gelu_forward(u, out=out), u8, row_scale, None
    B, T, F = u.shape
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device) if out is None else out
    saved = None
    if saved_bits == 8:
        u8 = torch.empty(u.shape, dtype=torch.int8, device=u.device)
        row_scale = u.new_empty(B, T, 2, dtype=torch.float32)
        saved = RowsPointer(u8, row_scale)
    rows = empty_rows(u, matmul) if matmul else None
    constants = {"TOP": TOP[matmul or "int8"], "ROTATION": rotation, "BLOCK": ROW_BLOCK}
    operands = (matrix(u), matrix(out), saved, rows_pointer(rows))
    _gelu_rows_kernel[(B * T,)](*operands, T, F, **constants, num_warps=8)
    return out, u8, row_scale, rows


def gelu_backward(u: Tensor, row_scale: Tensor | None, dx: Tensor, out: Tensor) -> Tensor:
    """Returns gelu'(u)·dx in `out` [B, T, F], which may be dx itself. u: as for `gelu_forward`."""
    if not backend.launches(u):
        return gelu_backward_reference(u, row_scale, dx, out)
    B, T, F = u.shape
    grid = (B * T, triton.cdiv(F, BLOCK))
    _gelu_backward_kernel[grid](matrix(u), row_scale, matrix(dx), matrix(out), T, F, BLOCK=BLOCK)
    return out


# ---------------------------------------------------------------- the op

_SCHEMA = (
    f"(Tensor u, {LINEAR}, Tensor? head, Tensor? gate, Tensor? residual, SymInt saved_bits)"
    " -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("fluxfast::gelu_lora_linear", mutates_args=(), schema=_SCHEMA)
def _gelu_lora_linear(u: Tensor, *flat) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, u in int8, row_scale; the last two empty with saved_bits=16."""
    weight, update, (head, gate, residual, saved_bits) = unflatten(flat)
    x, u8, row_scale, rows = gelu_rows(u, saved_bits, weight.matmul, weight.rotation)
    xs, given = ([x], [rows]) if head is None else ([head, x], [None, rows])
    (y,) = linear_forward(xs, weight, update, Epilogue(gate, residual), given)
    return y, u8, row_scale


@_gelu_lora_linear.register_fake
def _(u, *flat):
    weight, _, (head, _, _, saved_bits) = unflatten(flat)
    B, T, K = u.shape
    N, _ = weight_shape(weight.tensors, K + (0 if head is None else head.shape[2]))
    y = u.new_empty(B, T, N)
    if saved_bits == 16:
        return y, *_not_saved(u)
    u8 = u.new_empty(u.shape, dtype=torch.int8)
    return y, u8, u.new_empty(B, T, 2, dtype=torch.float32)


_BACKWARD_SCHEMA = (
    f"(Tensor d_out, Tensor u, Tensor? row_scale, {LINEAR}, Tensor? head, Tensor? gate, "
    "bool need_dx) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op(
    "fluxfast::gelu_lora_linear_backward", mutates_args=(), schema=_BACKWARD_SCHEMA
)
def _gelu_lora_linear_backward(
    d_out: Tensor, u: Tensor, row_scale: Tensor | None, *flat
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns du, d_head, dA, dB; empty where there is none. u: int8 where row_scale is given."""
    weight, update, (head, gate, need_dx) = unflatten(flat)
    if update is not None:
        x = gelu_forward(u, row_scale, dtype=d_out.dtype)
    else:  # only the LoRA gradients read x; without them its shape and dtype are enough
        x = u if row_scale is None else torch.empty_like(u, dtype=d_out.dtype)
    xs = [x] if head is None else [head, x]
    dxs, da, db = linear_backward([d_out], xs, weight, update, need_dx, gate)
    del x, xs
    du = None if dxs is None else gelu_backward(u, row_scale, dxs[-1], dxs[-1])
    d_head = None if dxs is None or head is None else dxs[0]
    da, db = (or_empty(each, d_out, torch.float32) for each in (da, db))
    return or_empty(du, d_out), or_empty(d_head, d_out), da, db


@_gelu_lora_linear_backward.register_fake
def _(d_out, u, row_scale, *flat):
    _, _, (head, _, need_dx) = unflatten(flat)
    du = d_out.new_empty(u.shape if need_dx else 0)
    d_head = d_out.new_empty(head.shape if need_dx and head is not None else 0)
    return du, d_head, *fake_update_gradients(d_out, flat)


def _setup_context(ctx, inputs, output) -> None:
    u, *flat = inputs
    _, u8, row_scale = output
    ctx.mark_non_differentiable(u8, row_scale)
    ctx.set_materialize_grads(False)
    _, _, (head, gate, _, saved_bits) = unflatten(flat)
    saved = (u, None) if saved_bits == 16 else (u8, row_scale)
    save_linear(ctx, flat, *saved, head, gate)


def _backward(ctx, d_out: Tensor | None, *_):
    needs_u, *_, needs_a, needs_b, _, _, needs_head, _, needs_residual, _ = ctx.needs_input_grad
    if d_out is None:
        return None, *linear_gradients(ctx), None, None, None, None
    flat, (u, row_scale, head, gate) = saved_linear(ctx)
    arguments = (backend.last_stride_1(d_out), u, row_scale, *flat, head, gate)
    du, d_head, da, db = _gelu_lora_linear_backward(*arguments, needs_u or needs_head)
    lora = linear_gradients(ctx, da if needs_a else None, db if needs_b else None)
    d_residual = d_out if needs_residual else None
    return du if needs_u else None, *lora, d_head if needs_head else None, None, d_residual, None


_gelu_lora_linear.register_autograd(_backward, setup_context=_setup_context)


def gelu_lora_linear(
    u: Tensor,
    weight: FrozenWeight,
    update: LoRAUpdate | None = None,
    head: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    saved_bits: int = 16,
) -> Tensor:
    """Returns y [B, T, N], contiguous, in u's dtype: the linear of [head, gelu(u)] with LoRA.

    u [B, T, F], head [B, T, K0]: fp32, bf16 or fp16. weight, update: as `lora_linear` takes them,
    K = K0 + F; 8-bit matmuls give head and gelu(u) a scale a row each. With gate [B, 1, N] and
    residual [B, T, N] the result is residual + gate·y. saved_bits: 16 saves u as it is, 8 in int8.
    Gradients: u, head, residual, lora_a, lora_b. Raises ValueError, naming the argument, for what
    does not fit.
    """
    check_dtype("u", u)
    check(u.ndim == 3 and u.stride(2) == 1, "u", "[B, T, F] with last stride 1", layout(u))
    B, T, F = u.shape
    if head is not None:
        fits = head.ndim == 3 and head.shape[:2] == (B, T) and head.stride(2) == 1
        check(fits, "head", f"[{B}, {T}, K0] with last stride 1", layout(head))
        check_dtype("head", head, (u.dtype,))
    N = check_linear(u, [F, 0 if head is None else head.shape[2]], weight, update)
    check_gate(gate, residual, u, N)
    check(saved_bits in (8, 16), "saved_bits", "8 or 16", saved_bits)
    trained = (u, head, *(update[:2] if update else ()))
    trains = any(tensor is not None and tensor.requires_grad for tensor in trained)
    bits = saved_bits if trains and torch.is_grad_enabled() else 16  # 8 are for backward alone
    return _gelu_lora_linear(u, *flatten(weight, update), head, gate, residual, bits)[0]


def _not_saved(u: Tensor) -> tuple[Tensor, Tensor]:
    return u.new_empty(0, dtype=torch.int8), u.new_empty(0, dtype=torch.float32)


# ---------------------------------------------------------------- references


def gelu_forward_reference(u: Tensor, row_scale: Tensor | None, out: Tensor) -> Tensor:
    """Returns gelu(u) in `out`."""
    if row_scale is None:
        return out.copy_(torch.ops.aten.gelu(u, approximate="tanh"))
    return out.copy_(torch.ops.aten.gelu_(_dequantize(u, row_scale), approximate="tanh"))


def gelu_quantize_reference(u: Tensor) -> tuple[Tensor, Tensor]:
    """Returns u [B, T, F] as int8 [B, T, F] and row_scale fp32 [B, T, 2] = (step, low)."""
    low = u.amin(-1, keepdim=True).float().clamp_(min=LOWEST)
    step = torch.maximum(u.amax(-1, keepdim=True).float(), low).sub_(low).div_(255)
    inverse = torch.where(step > 0, 1 / step, 0)
    values = (u - low).mul_(inverse).add_(0.5).floor_().clamp_(0, 255).sub_(128)
    return values.to(torch.int8), torch.cat([step, low], -1)


def gelu_backward_reference(u: Tensor, row_scale: Tensor | None, dx: Tensor, out: Tensor) -> Tensor:
    """Returns gelu'(u)·dx in `out`, which may be dx."""
    if row_scale is None:
        return torch.ops.aten.gelu_backward.grad_input(dx, u, approximate="tanh", grad_input=out)
    u = _dequantize(u, row_scale)
    return out.copy_(torch.ops.aten.gelu_backward(dx.float(), u, approximate="tanh"))


def _dequantize(u8: Tensor, row_scale: Tensor) -> Tensor:
    step, low = row_scale.split(1, -1)
    return u8.float().add_(128).mul_(step).add_(low)


def gelu_lora_linear_reference(
    u: Tensor,
    weight: FrozenWeight,
    update: LoRAUpdate | None = None,
    head: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`gelu_lora_linear` with saved_bits=16 in plain torch, differentiable in everything."""
    x = torch.nn.functional.gelu(u, approximate="tanh")
    xs = [x] if head is None else [head, x]
    return lora_linear_reference(xs, weight, update, gate, residual)
