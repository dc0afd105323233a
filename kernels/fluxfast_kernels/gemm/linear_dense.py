"""The frozen linear as matmuls in x's own dtype, forward and backward, without autograd.

`linear.py` chooses between this and 8-bit matmuls (`linear_8bit.py`), which share this file's
helpers and its gradients of A and B. Layouts: `ops/lora_linear.py`.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.dispatch.backend import check
from fluxfast_kernels.gemm import grads
from fluxfast_kernels.gemm.dense import lora_gemm, lora_gemm_dx
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate
from fluxfast_kernels.quant.frozen import FrozenWeight, dequantize, storage_of, weight_shape
from fluxfast_kernels.quant.rows import QuantizedRows

# ---------------------------------------------------------------- forward and backward


def forward(
    xs: Sequence[Tensor], weight: FrozenWeight, update: LoRAUpdate | None, epilogue: Epilogue
) -> list[Tensor]:
    """As `linear.linear_forward`."""
    K, dtype, shape = sum(x.shape[-1] for x in xs), xs[0].dtype, xs[0].shape[:-1]
    N, _ = weight_shape(weight.tensors, K)
    bias, tensors, down = bias_of(weight, N, dtype), weight.tensors, None
    if backend.launches(xs[0]):
        xs = [batched(x) for x in xs]
        down = grads.lora_down(xs, update.lora_a) if update is not None else None
        tensors, fused = _resident(tensors, "lora_gemm", xs, N, K)
        if fused:
            ys = lora_gemm(
                xs, FrozenWeight(tensors, bias), down, update, batched_residual(epilogue)
            )
            return [y.view(*shape, y.shape[-1]) for y in ys]
    flat = [flat_rows(x) for x in xs]
    W = dequantize(tensors, K, dtype)
    if update is not None and down is None:
        down = times_transposed(flat, update.lora_a.to(dtype))

    def multiply(low: int, high: int) -> Tensor:
        return times_transposed(flat, W[low:high], None if bias is None else bias[low:high])

    return with_update(multiply, shape, N, down, update, epilogue)


def with_update(
    multiply: Callable[[int, int], Tensor],
    shape: torch.Size,
    N: int,
    down: Tensor | None,
    update: LoRAUpdate | None,
    epilogue: Epilogue,
) -> list[Tensor]:
    """Returns y with the update added, cut at the split, with gate and residual.

    multiply(low, high): columns low to high of x Wᵀ + b, [M, high - low]; shape: y's without N.
    """
    ys, low = [], 0
    for width in epilogue.widths(N):
        y = multiply(low, low + width)
        if down is not None and update is not None:
            up = update.lora_b.to(y.dtype) * update.scale
            for columns, b_rows, a_rows in update.slices(low, low + width):
                y[:, columns].addmm_(down[:, a_rows], up[b_rows].T)
        ys.append(y.view(*shape, width))
        low += width
    if epilogue.residual is not None:
        torch.addcmul(epilogue.residual, cast(Tensor, epilogue.gate), ys[0], out=ys[0])
    return ys


def backward(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    weight: FrozenWeight | None,
    update: LoRAUpdate | None,
    need_dx: bool,
) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None]:
    """As `linear.linear_backward`, without a gate."""
    dtype, shapes = xs[0].dtype, [x.shape for x in xs]
    widths, N = [shape[-1] for shape in shapes], sum(dy.shape[-1] for dy in dys)
    da, db, d_down = update_gradients(xs, dys, update)
    if not need_dx:
        return None, da, db
    tensors = None if weight is None else weight.tensors
    if tensors is not None and backend.launches(xs[0]):
        dys = [batched(dy) for dy in dys]
        tensors, fused = _resident(tensors, "lora_gemm_dx", dys, sum(widths), N)
        if fused:
            lora_a = None if update is None else update.lora_a
            dxs = lora_gemm_dx(dys, FrozenWeight(tensors), d_down, lora_a, widths)
            return [dx.view(shape) for dx, shape in zip(dxs, shapes, strict=True)], da, db
    pairs = []
    if tensors is not None:
        W = dequantize(tensors, sum(widths), dtype)
        blocks = W.split([dy.shape[-1] for dy in dys])
        pairs = list(zip([flat_rows(dy) for dy in dys], blocks, strict=True))
    if update is not None:
        pairs.append((cast(Tensor, d_down), update.lora_a.to(dtype)))
    dxs, low = [], 0
    for shape, width in zip(shapes, widths, strict=True):
        (left, right), *more = pairs
        dx = left @ right[:, low : low + width]
        for left, right in more:
            dx.addmm_(left, right[:, low : low + width])
        dxs.append(dx.view(shape))
        low += width
    return dxs, da, db


def update_gradients(
    xs: Sequence[Tensor],
    dys: Sequence[Tensor],
    update: LoRAUpdate | None,
    rows: Sequence[QuantizedRows] | None = None,
    channel: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns dA, dB, and s·Σ dY_part·B_part [M, P·R] in the compute dtype; None each without an
    update. rows: 8-bit rows of dY·channel to fill in the same pass, by the launchers alone.
    """
    if update is None:
        return None, None, None
    if not backend.launches(xs[0]):
        return _plain_update_gradients(xs, dys, update)
    xs, dys = [batched(x) for x in xs], [batched(dy) for dy in dys]
    down = grads.lora_down(xs, update.lora_a)
    d_down = grads.lora_d_down(dys, update, rows=rows, channel=channel)
    db = grads.lora_db(dys, down, update)
    return grads.lora_da(xs, d_down), db, d_down


def _plain_update_gradients(xs, dys, update: LoRAUpdate) -> tuple[Tensor, Tensor, Tensor]:
    xs, dys = [flat_rows(x) for x in xs], [flat_rows(dy) for dy in dys]
    dtype, (lora_a, lora_b, _, scale) = xs[0].dtype, update
    down = times_transposed(xs, lora_a.to(dtype))
    d_down, up, db = torch.zeros_like(down), lora_b.to(dtype), torch.empty_like(lora_b)
    for dy, (low, high) in zip(dys, column_ranges(dys), strict=True):
        for columns, b_rows, a_rows in update.slices(low, high):
            db[b_rows] = dy[:, columns].T @ down[:, a_rows]
            d_down[:, a_rows].addmm_(dy[:, columns], up[b_rows])
    d_down *= scale
    da = torch.empty_like(lora_a)
    for x, (low, high) in zip(xs, column_ranges(xs), strict=True):
        da[:, low:high] = d_down.T @ x
    return da, db.mul_(scale), d_down


# ---------------------------------------------------------------- helpers


def _resident(
    weight: Sequence[Tensor], op: str, xs: Sequence[Tensor], N: int, K: int
) -> tuple[list[Tensor], bool]:
    """Returns the weight as the matmul of N outputs over K takes it (NF4 as it is, or dense in the
    compute dtype), and whether dispatch chose our kernel (else torch's matmul)."""
    M, dtype = xs[0].shape[0] * xs[0].shape[1], xs[0].dtype
    arch = dispatch.arch_of(xs[0].device)
    nf4 = storage_of(weight) == "nf4"
    if nf4 and dispatch.choose(op, arch, dtype, "nf4", M, N, K).fused:
        return list(weight), True
    dense = [dequantize(weight, K if op == "lora_gemm" else N, dtype)]
    return dense, dispatch.choose(op, arch, dtype, "dense", M, N, K).fused


def bias_of(weight: FrozenWeight, N: int, dtype: torch.dtype) -> Tensor | None:
    """Returns the bias in `dtype`. Raises ValueError unless it is [N]."""
    if weight.bias is None:
        return None
    check(weight.bias.shape == (N,), "bias", f"[{N}]", tuple(weight.bias.shape))
    return weight.bias.to(dtype)


def batched(x: Tensor) -> Tensor:
    """Returns x [..., C] as the launchers take it: [B, T, C]."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def batched_residual(epilogue: Epilogue) -> Epilogue:
    """Returns the epilogue as the launchers take it."""
    residual = epilogue.residual
    return epilogue if residual is None else epilogue._replace(residual=batched(residual))


def flat_rows(x: Tensor) -> Tensor:
    """Returns x [..., C] as [M, C], a copy only where a batch of slices is not one matrix."""
    return x.reshape(-1, x.shape[-1])


def column_ranges(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Returns the (first, end) columns of tensors side by side."""
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + tensor.shape[-1])
    return list(zip(ends, ends[1:], strict=False))


def times_transposed(xs: Sequence[Tensor], W: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns [x_0, x_1, ...] Wᵀ + bias [M, N] of inputs side by side, which are never joined."""
    y = None
    for x, (low, high) in zip(xs, column_ranges(xs), strict=True):
        if y is None:
            y = F.linear(x, W[:, low:high], bias)
        else:
            y.addmm_(x, W[:, low:high].T)
    assert y is not None
    return y
