"""The frozen linear in products of x's own dtype, forward and backward, without autograd.

`linear.py` chooses between this and products of 8-bit codes (`linear_8bit.py`), which shares this
file's helpers and its gradients of A and B. Layouts: `lora_linear.py`.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.dispatch.backend import check
from fluxfast_kernels.gemm import dense as gemm
from fluxfast_kernels.gemm import grads as gemm_grads
from fluxfast_kernels.quant.frozen import dense_weight, storage_of, weight_shape


def lora_slices(
    parts: Sequence[int], rank: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]:
    """Per part: its (start, end) rows of y, of B, and of A."""
    row = 0
    for start, end, index in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        yield (start, end), (row, row + end - start), (index * rank, (index + 1) * rank)
        row += end - start


# ---------------------------------------------------------------- forward and backward


def dense_forward(
    xs: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    parts: Sequence[int],
    scale: float,
    split: int = 0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """-> [y [B, T, N]] or, with a split, [y[..., :split], y[..., split:]], each contiguous.

    xs: inputs side by side, each [B, T, K_i]. gate [B, 1, N] and residual [B, T, N] go together.
    """
    K, dtype, shape = sum(x.shape[-1] for x in xs), xs[0].dtype, xs[0].shape[:-1]
    N = weight_shape(weight, K)[0]
    check(bias is None or bias.shape == (N,), "bias", f"[{N}]", bias is not None and bias.shape)
    bias = None if bias is None else bias.to(dtype)
    down = None
    if backend.launches(xs[0]):
        xs = [batched(x) for x in xs]
        down = gemm_grads.lora_down(xs, lora_a) if lora_a is not None else None
        weight, fused = _resident(weight, "lora_gemm", xs, N, K)
        if fused:
            residual = None if residual is None else batched(residual)
            given = (bias, down, lora_b, parts, scale, split, gate, residual)
            return [like(shape, y) for y in gemm.lora_gemm(xs, weight, *given)]
    flat = [rows_of(x) for x in xs]
    W = dense_weight(weight, K, dtype)
    if lora_a is not None and down is None:
        down = times_transposed(flat, lora_a.to(dtype), None)

    def multiply(low: int, high: int) -> Tensor:
        return times_transposed(flat, W[low:high], None if bias is None else bias[low:high])

    return with_update(multiply, shape, N, down, lora_b, parts, scale, split, gate, residual)


def with_update(
    multiply: Callable[[int, int], Tensor],
    shape: torch.Size,
    N: int,
    down: Tensor | None,
    lora_b: Tensor | None,
    parts: Sequence[int],
    scale: float,
    split: int,
    gate: Tensor | None,
    residual: Tensor | None,
) -> list[Tensor]:
    """multiply(low, high) -> columns low to high of x Wᵀ + b, [M, high - low]; with the update
    added, cut at `split`, with gate and residual."""
    cuts = [0, split, N] if split else [0, N]
    ys = []
    for low, high in zip(cuts, cuts[1:], strict=False):
        y = multiply(low, high)
        if down is not None:
            up = lora_b.to(y.dtype) * scale
            for (start, end), (b_start, _), (a_start, a_end) in lora_slices(parts, up.shape[1]):
                first, last = max(start, low), min(end, high)
                if first < last:
                    rows = up[b_start + first - start : b_start + last - start]
                    y[:, first - low : last - low].addmm_(down[:, a_start:a_end], rows.T)
        ys.append(like(shape, y))
    if residual is not None:
        torch.addcmul(residual, gate, ys[0], out=ys[0])
    return ys


def dense_backward(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    weight: Sequence[Tensor],
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    parts: Sequence[int],
    scale: float,
    need_dx: bool,
) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None]:
    """-> ([dx_i [B, T, K_i]] or None, dA and dB in fp32 or None). dys, xs as in `linear_forward`.

    No weight ([]): the gradients of the update alone.
    """
    dtype, shapes = xs[0].dtype, [x.shape for x in xs]
    widths = [shape[-1] for shape in shapes]
    launched = backend.launches(xs[0])
    if launched:
        xs, dys = [batched(x) for x in xs], [batched(dy) for dy in dys]
    flat, grads = [rows_of(x) for x in xs], [rows_of(dy) for dy in dys]
    d_down = da = db = None
    if lora_a is not None:
        update = launched_update if launched else plain_update
        da, db, d_down = update(xs, dys, flat, grads, lora_a, lora_b, parts, scale)
    if not need_dx:
        return None, da, db
    if weight and launched:
        N = sum(dy.shape[-1] for dy in dys)
        weight, fused = _resident(weight, "lora_gemm_dx", dys, sum(widths), N)
        if fused:
            dxs = gemm.lora_gemm_dx(dys, weight, d_down, lora_a, widths)
            return [dx.view(shape) for dx, shape in zip(dxs, shapes, strict=True)], da, db
    pairs = []
    if weight:
        W = dense_weight(weight, sum(widths), dtype)
        products = zip(grads, column_ranges(grads), strict=True)
        pairs = [(dy, W[first:last]) for dy, (first, last) in products]
    if d_down is not None:
        pairs.append((d_down, lora_a.to(dtype)))
    dxs = []
    for shape, (low, high) in zip(shapes, column_ranges(flat), strict=True):
        (left, right), *more = pairs
        dx = left @ right[:, low:high]
        for left, right in more:
            dx.addmm_(left, right[:, low:high])
        dxs.append(dx.view(shape))
    return dxs, da, db


def launched_update(
    xs, dys, flat, grads, lora_a, lora_b, parts, scale, rows=None, channel=None
):  # fmt: skip
    """-> dA, dB, and s·Σ dY_part·B_part [M, P·R] in the compute dtype. rows: 8-bit rows of
    dY·channel to fill on the way."""
    rank = lora_b.shape[1]
    down = gemm_grads.lora_down(xs, lora_a)
    indices = lora_a.shape[0] // rank
    given = {"rows": rows, "channel": channel}
    d_down = gemm_grads.lora_d_down(dys, lora_b, parts, scale, indices, **given)
    db = gemm_grads.lora_db(dys, down, parts, scale, rank)
    return gemm_grads.lora_da(xs, d_down), db, d_down


def plain_update(xs, dys, flat, grads, lora_a, lora_b, parts, scale):
    dtype, rank = flat[0].dtype, lora_b.shape[1]
    down = times_transposed(flat, lora_a.to(dtype), None)
    d_down, up, db = torch.zeros_like(down), lora_b.to(dtype), torch.empty_like(lora_b)
    for dy, (low, high) in zip(grads, column_ranges(grads), strict=True):
        for (start, end), (b_start, _), (a_start, a_end) in lora_slices(parts, rank):
            first, last = max(start, low), min(end, high)
            if first < last:
                rows = slice(b_start + first - start, b_start + last - start)
                dy_part = dy[:, first - low : last - low]
                db[rows] = dy_part.T @ down[:, a_start:a_end]
                d_down[:, a_start:a_end].addmm_(dy_part, up[rows])
    d_down *= scale
    da = torch.empty_like(lora_a)
    for x, (low, high) in zip(flat, column_ranges(flat), strict=True):
        da[:, low:high] = d_down.T @ x
    return da, db.mul_(scale), d_down


def _resident(
    weight: Sequence[Tensor], op: str, xs: Sequence[Tensor], N: int, K: int
) -> tuple[list[Tensor], bool]:
    """What dispatch decides for a product of N outputs over K: the weight as it goes in (NF4 as it
    is, or dense in the compute dtype), and whether our kernel does it (else torch's matmul)."""
    M, dtype = xs[0].shape[0] * xs[0].shape[1], xs[0].dtype
    arch = dispatch.arch_of(xs[0].device)
    nf4 = storage_of(weight) == "nf4"
    if nf4 and dispatch.choose(op, arch, dtype, "nf4", M, N, K).kind == "fused":
        return list(weight), True
    width = K if op == "lora_gemm" else N
    dense = [dense_weight(weight, width, dtype)]
    return dense, dispatch.choose(op, arch, dtype, "dense", M, N, K).kind == "fused"


def batched(x: Tensor) -> Tensor:
    """[..., C] as the launchers take it: [B, T, C]."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def like(shape: torch.Size, y: Tensor) -> Tensor:
    return y.view(*shape, y.shape[-1])


def rows_of(x: Tensor) -> Tensor:
    """[..., C] as [M, C]. A copy only where a batch of slices cannot be seen as one matrix."""
    return x.reshape(-1, x.shape[-1])


def column_ranges(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + tensor.shape[1])
    return list(zip(ends, ends[1:], strict=False))


def times_transposed(xs: Sequence[Tensor], W: Tensor, bias: Tensor | None) -> Tensor:
    """[x_0, x_1, ...] Wᵀ + bias -> [M, N], the inputs side by side but never joined."""
    y = None
    for x, (low, high) in zip(xs, column_ranges(xs), strict=True):
        if y is None:
            y = F.linear(x, W[:, low:high], bias)
        else:
            y.addmm_(x, W[:, low:high].T)
    return y
