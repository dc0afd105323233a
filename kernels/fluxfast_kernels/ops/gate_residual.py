"""The end of a residual branch:  out = h + gate · y

Layouts: h, y [B, T, D] and gate [B, 1, D], one dtype (fp32, bf16 or fp16). The last stride is 1,
the others are free: gate may be a chunk of the modulation's output, h or y one stream's tokens of a
joint tensor. out is contiguous.

    dh = dout;   dy = gate · dout;   dgate = Σ_T dout · y

Saved for backward: gate where y needs a gradient, y only where gate does. dgate is summed in fp32
without atomics, one partial sum per chunk of tokens and then the chunks, so that two runs agree
bit for bit.

Bytes, in elements: forward reads 2·B·T·D and writes B·T·D. Backward reads B·T·D and writes B·T·D;
with dgate it reads y too and writes and reads one fp32 row per chunk. FLOP: 2 an element; backward
1, with dgate 3.

Refused with ValueError: other shapes, mixed dtypes, a last stride other than 1.
Source: adaptive layer norm with gates (DiT, arXiv 2212.09748), as FLUX's blocks use it.
"""

from typing import Optional

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import check, kernel, matrix, tl, triton

TILE = 4096  # elements a program holds at once
# tiles a program sums for dgate: 32 rows at D >= 1024, 4 bytes of sums per 128 read in bf16
STEPS = 8


# ---------------------------------------------------------------- kernels


@kernel
def _forward_kernel(
    h,
    gate_ptr,
    y,
    out_ptr,
    gate_stride,
    T,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    b = tl.program_id(2).to(tl.int64)
    inside = (t < T) & (d < D)
    gate = tl.load(gate_ptr + b * gate_stride + d, d < D, other=0.0).to(tl.float32)
    h_ptrs = h.ptr + b * h.batch_stride + t * h.token_stride + d
    y_ptrs = y.ptr + b * y.batch_stride + t * y.token_stride + d
    out = tl.load(h_ptrs, inside, other=0.0).to(tl.float32)
    out += gate * tl.load(y_ptrs, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + (b * T + t) * D + d, out.to(out_ptr.dtype.element_ty), inside)


@kernel
def _backward_kernel(
    dout,
    gate_ptr,
    y,
    dy_ptr,
    partial_ptr,
    gate_stride,
    T,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS tiles, one after the other: dy of each from gate_ptr, and from y their share of
    dgate, in partial [B, chunks, D]. What is not wanted is None."""
    chunk = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2).to(tl.int64)
    if dy_ptr is not None:
        gate = tl.load(gate_ptr + b * gate_stride + d, d < D, other=0.0).to(tl.float32)[None, :]
    if partial_ptr is not None:
        total = tl.zeros((BLOCK,), tl.float32)
    # unrolled: of a loop of one tile ptxas spills 16 bytes (bf16 on sm_89, fp16 on sm_120)
    for step in tl.range(0, STEPS, loop_unroll_factor=4):
        row = (chunk.to(tl.int64) * STEPS + step) * ROWS
        t = row + tl.arange(0, ROWS)[:, None]
        inside = (t < T) & (d < D)[None, :]
        dout_ptrs = dout.ptr + b * dout.batch_stride + t * dout.token_stride + d[None, :]
        dout_tile = tl.load(dout_ptrs, inside, other=0.0).to(tl.float32)
        if dy_ptr is not None:
            dy = (gate * dout_tile).to(dy_ptr.dtype.element_ty)
            tl.store(dy_ptr + (b * T + t) * D + d[None, :], dy, inside)
        if partial_ptr is not None:
            y_ptrs = y.ptr + b * y.batch_stride + t * y.token_stride + d[None, :]
            y_tile = tl.load(y_ptrs, inside, other=0.0).to(tl.float32)
            total += tl.sum(dout_tile * y_tile, axis=0)
    if partial_ptr is not None:
        tl.store(partial_ptr + (b * tl.num_programs(0) + chunk) * D + d, total, d < D)


# ---------------------------------------------------------------- launchers


def tile(D: int) -> tuple[int, int]:
    """Returns rows and columns of a program's tile. 1024 divides FLUX's 3072."""
    block = min(1024, triton.next_power_of_2(D))
    return TILE // block, block


def launch_forward(h: Tensor, gate: Tensor, y: Tensor, out: Tensor) -> None:
    """Overwrites out [B, T, D], contiguous."""
    B, T, D = h.shape
    rows, block = tile(D)
    grid = (triton.cdiv(T, rows), triton.cdiv(D, block), B)
    shape = {"D": D, "ROWS": rows, "BLOCK": block}
    _forward_kernel[grid](matrix(h), gate, matrix(y), out, gate.stride(0), T, **shape, num_warps=4)


def launch_backward(
    dout: Tensor, gate: Tensor | None, y: Tensor | None, dy: Tensor | None, dgate: Tensor | None
) -> None:
    """Overwrites dy [B, T, D] (from gate) and dgate [B, 1, D] (from y), where these are not
    None."""
    B, T, D = dout.shape
    rows, block = tile(D)
    steps = 1 if dgate is None else STEPS
    chunks = triton.cdiv(T, rows * steps)
    partial = None
    if dgate is not None:
        partial = torch.empty(B, chunks, D, dtype=torch.float32, device=dout.device)
    _backward_kernel[(chunks, triton.cdiv(D, block), B)](
        matrix(dout),
        gate,
        matrix(y),
        dy,
        partial,
        None if gate is None else gate.stride(0),
        T,
        D=D,
        ROWS=rows,
        BLOCK=block,
        STEPS=steps,
        num_warps=4,
    )
    if dgate is not None and partial is not None:
        dgate.copy_(partial.sum(1, keepdim=True))


# ---------------------------------------------------------------- the op


@torch.library.custom_op("fluxfast::gate_residual", mutates_args=())
def _gate_residual(h: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    if not backend.launches(h):
        return torch.addcmul(h, gate, y).contiguous()  # one pass, rounded once
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    launch_forward(h, gate, y, out)
    return out


@_gate_residual.register_fake
def _(h, gate, y):
    return h.new_empty(h.shape)


@torch.library.custom_op("fluxfast::gate_residual_backward", mutates_args=())
def _gate_residual_backward(
    dout: Tensor,
    gate: Optional[Tensor],  # noqa: UP045  (custom_op reads Optional on Python 3.10)
    y: Optional[Tensor],  # noqa: UP045
) -> tuple[Tensor, Tensor]:
    """Returns dy, if gate is not None, and dgate, if y is not None; else without elements."""
    dout = backend.last_stride_1(dout)
    dy, dgate = _empty_gradients(dout, gate, y)
    if backend.launches(dout):
        wanted = (None if gate is None else dy, None if y is None else dgate)
        launch_backward(dout, gate, y, *wanted)
        return dy, dgate
    if gate is not None:
        torch.mul(dout, gate, out=dy)
    if y is not None:
        dgate.copy_((dout.float() * y).sum(1, keepdim=True))
    return dy, dgate


def _empty_gradients(dout, gate, y) -> tuple[Tensor, Tensor]:
    dy = dout.new_empty(dout.shape if gate is not None else 0)
    return dy, dout.new_empty((dout.shape[0], 1, dout.shape[2]) if y is not None else 0)


_gate_residual_backward.register_fake(_empty_gradients)


def _setup_context(ctx, inputs, output) -> None:
    _, gate, y = inputs
    _, needs_gate, needs_y = ctx.needs_input_grad[:3]
    ctx.save_for_backward(gate if needs_y else None, y if needs_gate else None)


def _backward(ctx, dout: Tensor):
    gate, y = ctx.saved_tensors
    if gate is None and y is None:
        return dout, None, None
    dy, dgate = _gate_residual_backward(dout, gate, y)
    return dout, dgate if y is not None else None, dy if gate is not None else None


_gate_residual.register_autograd(_backward, setup_context=_setup_context)


def gate_residual(h: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Returns h + gate · y [B, T, D], contiguous, in h's dtype.

    h, y [B, T, D], gate [B, 1, D], in one of fp32, bf16 and fp16; any batch and token strides.
    Gradients for all three. Raises ValueError naming the argument.
    """
    backend.check_dtype("h", h)
    check(h.ndim == 3, "h", "[B, T, D]", tuple(h.shape))
    check(y.shape == h.shape, "y", f"of h's shape {tuple(h.shape)}", tuple(y.shape))
    shape = (h.shape[0], 1, h.shape[2])
    check(tuple(gate.shape) == shape, "gate", f"[B, 1, D] = {shape}", tuple(gate.shape))
    backend.check_alike({"h": h, "gate": gate, "y": y}, h)
    return _gate_residual(h, gate, y)


def gate_residual_reference(h: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """`gate_residual` in plain torch, differentiable in everything."""
    return h + gate * y
