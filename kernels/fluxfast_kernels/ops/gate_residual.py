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
from fluxfast_kernels.dispatch.backend import check, tl, triton

TILE = 4096  # elements a program holds at once
STEPS = (
    8  # tiles a program sums for dgate: 32 rows at D >= 1024: 4 bytes of sums per 128 read in bf16
)


@triton.jit
def _gate_residual_kernel(
    H, GATE, Y, OUT, h_batch, h_token, gate_batch, y_batch, y_token, T,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    b = tl.program_id(2).to(tl.int64)
    inside = (t < T) & (d < D)
    gate = tl.load(GATE + b * gate_batch + d, d < D, other=0.0).to(tl.float32)
    h = tl.load(H + b * h_batch + t * h_token + d, inside, other=0.0).to(tl.float32)
    y = tl.load(Y + b * y_batch + t * y_token + d, inside, other=0.0).to(tl.float32)
    out = (h + gate * y).to(OUT.dtype.element_ty)
    tl.store(OUT + (b * T + t) * D + d, out, inside)


@triton.jit
def _gate_residual_backward_kernel(
    DOUT, GATE, Y, DY, PARTIAL, dout_batch, dout_token, gate_batch, y_batch, y_token, T,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_DGATE: tl.constexpr,
):  # fmt: skip
    """STEPS tiles, one after the other: dy of each, and their share of dgate."""
    chunk = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2).to(tl.int64)
    if HAS_DY:
        gate = tl.load(GATE + b * gate_batch + d, d < D, other=0.0).to(tl.float32)[None, :]
    if HAS_DGATE:
        total = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, STEPS):
        row = (chunk.to(tl.int64) * STEPS + step) * ROWS
        t = row + tl.arange(0, ROWS)[:, None]
        inside = (t < T) & (d < D)[None, :]
        dout_at = DOUT + b * dout_batch + t * dout_token + d[None, :]
        dout = tl.load(dout_at, inside, other=0.0).to(tl.float32)
        if HAS_DY:
            dy = (gate * dout).to(DY.dtype.element_ty)
            tl.store(DY + (b * T + t) * D + d[None, :], dy, inside)
        if HAS_DGATE:
            y_at = Y + b * y_batch + t * y_token + d[None, :]
            y = tl.load(y_at, inside, other=0.0).to(tl.float32)
            total += tl.sum(dout * y, axis=0)
    if HAS_DGATE:
        tl.store(PARTIAL + (b * tl.num_programs(0) + chunk) * D + d, total, d < D)


# ---------------------------------------------------------------- launchers


def tile(D: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile. 1024 columns cut FLUX's 3072 without a remainder."""
    block = min(1024, triton.next_power_of_2(D))
    return TILE // block, block


def launch_gate_residual(h: Tensor, gate: Tensor, y: Tensor, out: Tensor) -> None:
    """out [B, T, D], contiguous, is overwritten."""
    B, T, D = h.shape
    rows, block = tile(D)
    _gate_residual_kernel[(triton.cdiv(T, rows), triton.cdiv(D, block), B)](
        h, gate, y, out, *h.stride()[:2], gate.stride(0), *y.stride()[:2], T,
        D=D, ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip


def launch_gate_residual_backward(
    dout: Tensor, gate: Tensor | None, y: Tensor | None, dy: Tensor | None, dgate: Tensor | None
) -> None:
    """Overwrites dy [B, T, D] (from gate) and dgate [B, 1, D] (from y), each where it is given."""
    B, T, D = dout.shape
    rows, block = tile(D)
    steps = 1 if dgate is None else STEPS
    chunks = triton.cdiv(T, rows * steps)
    partial = None
    if dgate is not None:
        partial = torch.empty(B, chunks, D, dtype=torch.float32, device=dout.device)
    _gate_residual_backward_kernel[(chunks, triton.cdiv(D, block), B)](
        dout, gate, y, dy, partial, *dout.stride()[:2],
        gate.stride(0) if gate is not None else 0,
        *(y.stride()[:2] if y is not None else (0, 0)), T,
        D=D, ROWS=rows, BLOCK=block, STEPS=steps,
        HAS_DY=dy is not None, HAS_DGATE=dgate is not None, num_warps=4,
    )  # fmt: skip
    if dgate is not None:
        dgate.copy_(partial.sum(1, keepdim=True))


# ---------------------------------------------------------------- the op


@torch.library.custom_op("fluxfast::gate_residual", mutates_args=())
def _gate_residual(h: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    if not backend.launches(h):
        return torch.addcmul(h, gate, y).contiguous()  # one pass, rounded once
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    launch_gate_residual(h, gate, y, out)
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
    """-> (dy, dgate): dy where gate is given, dgate where y is; otherwise without elements."""
    dout = backend.last_stride_1(dout)
    dy = dout.new_empty(dout.shape if gate is not None else 0)
    dgate = dout.new_empty(_gate_shape(dout) if y is not None else 0)
    if backend.launches(dout):
        kept = (dy if gate is not None else None, dgate if y is not None else None)
        launch_gate_residual_backward(dout, gate, y, *kept)
        return dy, dgate
    if gate is not None:
        torch.mul(dout, gate, out=dy)
    if y is not None:
        dgate.copy_((dout.float() * y).sum(1, keepdim=True))
    return dy, dgate


@_gate_residual_backward.register_fake
def _(dout, gate, y):
    dy = dout.new_empty(dout.shape if gate is not None else 0)
    return dy, dout.new_empty(_gate_shape(dout) if y is not None else 0)


def _gate_shape(h: Tensor) -> tuple[int, int, int]:
    return (h.shape[0], 1, h.shape[2])


def _keep(ctx, inputs, output) -> None:
    _, gate, y = inputs
    _, needs_gate, needs_y = ctx.needs_input_grad[:3]
    ctx.save_for_backward(gate if needs_y else None, y if needs_gate else None)


def _differentiate(ctx, dout: Tensor):
    gate, y = ctx.saved_tensors
    if gate is None and y is None:
        return dout, None, None
    dy, dgate = _gate_residual_backward(dout, gate, y)
    return dout, dgate if y is not None else None, dy if gate is not None else None


_gate_residual.register_autograd(_differentiate, setup_context=_keep)


def gate_residual(h: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """h + gate · y -> [B, T, D], contiguous, in h's dtype.

    h, y [B, T, D], gate [B, 1, D], in one of fp32, bf16 and fp16; any batch and token strides.
    Gradients for all three. Raises ValueError naming the argument.
    """
    backend.check_dtype("h", h)
    check(h.ndim == 3, "h", "[B, T, D]", tuple(h.shape))
    check(y.shape == h.shape, "y", f"of h's shape {tuple(h.shape)}", tuple(y.shape))
    shape = _gate_shape(h)
    check(tuple(gate.shape) == shape, "gate", f"[B, 1, D] = {shape}", tuple(gate.shape))
    for name, tensor in (("h", h), ("gate", gate), ("y", y)):
        check(tensor.stride(-1) == 1, name, "of last stride 1", tensor.stride())
        check(tensor.dtype == h.dtype, name, f"{h.dtype} as h is", tensor.dtype)
        check(tensor.device == h.device, name, f"on {h.device} as h is", tensor.device)
    return _gate_residual(h, gate, y)


# ---------------------------------------------------------------- reference


def gate_residual_reference(h: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """The same in ordinary torch operations, differentiable in everything."""
    return h + gate * y
