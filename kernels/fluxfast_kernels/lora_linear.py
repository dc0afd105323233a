"""A frozen linear layer with a trainable low-rank update on some of its rows.

    y = x Wᵀ + b;   y[..., rows of part p] += s · (x A_pᵀ) B_pᵀ;   out = residual + gate · y

Layouts: x [B, T, K], or several inputs side by side whose widths add up to K; the last stride is 1,
the others are free, so that one stream's tokens of a joint tensor go in as they lie. y [B, T, N].
weight is a list: [W [N, K]] in fp32, bf16 or fp16, or NF4's [packed, absmax] and, where absmax is
itself quantised, [packed, absmax, nested_absmax, offset] (see `nf4.py`). lora_a fp32 [P·R, K]
stacks one A per part; lora_b fp32 [N', R] has the parts' rows one after the other; parts is flat
(start, end, which A): never a block-diagonal matrix, and one A for all parts is P = 1.

Saved for backward: x (as given), A and B. The dense weight and x Aᵀ are made again.

Bytes, in elements of the compute dtype unless said: reads x, W (0.5625 bytes a weight in NF4, which
above the dispatch threshold is decoded into a scratch of N·K that the product reads back) and
residual, writes y. FLOP: 2·M·N·K + 2·M·R·(P·K + N'), M = B·T; backward the same for dx, and
twice the low-rank part for dA and dB.

Refused with ValueError: shapes that do not fit, an update given by halves, parts out of range, and
a gate that wants a gradient (its gradient needs y, which is not kept: use `gate_residual`).
Source: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314).
"""

from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxfast_kernels import backend, dispatch, gemm, gemm_grads
from fluxfast_kernels.backend import check
from fluxfast_kernels.nf4 import BLOCK, NF4Tensor, check_nf4, nf4_decode

# ---------------------------------------------------------------- the frozen weight


def weight_shape(weight: Sequence[Tensor], K: int) -> tuple[int, int]:
    """[N, K] of a weight whose input width is K. Raises ValueError where they do not fit."""
    if len(weight) == 1:
        check(weight[0].ndim == 2, "weight", "[N, K]", tuple(weight[0].shape))
        check(weight[0].shape[1] == K, "weight", f"[N, {K}] for this x", tuple(weight[0].shape))
        return tuple(weight[0].shape)
    check(len(weight) in (2, 4), "weight", "a list of 1, 2 or 4 tensors", len(weight))
    count = 2 * weight[0].numel()
    fits = K % BLOCK == 0 and count % K == 0
    check(fits, "weight", f"NF4 of [N, {K}], {K} a multiple of {BLOCK}", f"{count} values")
    packed, absmax, *nested = weight
    check_nf4(NF4Tensor(packed, absmax, (count // K, K), *nested))
    return count // K, K


def dense_weight(weight: Sequence[Tensor], K: int, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`, decoded into the scratch where it is quantised: read it before the next
    decode."""
    if len(weight) == 1:
        return weight[0].to(dtype)
    packed, absmax, *nested = weight
    shape = weight_shape(weight, K)
    out = backend.scratch(shape[0] * K, dtype, packed.device)
    return nf4_decode(NF4Tensor(packed, absmax, shape, *nested), dtype, out)


def lora_slices(
    parts: Sequence[int], rank: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]:
    """Per part: its (start, end) rows of y, of B, and of A."""
    row = 0
    for start, end, index in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        yield (start, end), (row, row + end - start), (index * rank, (index + 1) * rank)
        row += end - start


# ---------------------------------------------------------------- forward and backward, no autograd


def _without_autocast(function):
    """Products stay in x's dtype: inside an op autocast would round some of them and not others."""

    @wraps(function)
    def run(tensors: Sequence[Tensor], *arguments, **named):
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(tensors, *arguments, **named)

    return run


@_without_autocast
def linear_forward(
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
        xs = [_batched(x) for x in xs]
        down = gemm_grads.lora_down(xs, lora_a) if lora_a is not None else None
        weight, fused = _resident(weight, "lora_gemm", xs, N, K)
        if fused:
            residual = None if residual is None else _batched(residual)
            given = (bias, down, lora_b, parts, scale, split, gate, residual)
            return [_like(shape, y) for y in gemm.lora_gemm(xs, weight, *given)]
    flat = [_rows(x) for x in xs]
    W = dense_weight(weight, K, dtype)
    if lora_a is not None and down is None:
        down = _times_transposed(flat, lora_a.to(dtype), None)
    cuts = [0, split, N] if split else [0, N]
    ys = []
    for low, high in zip(cuts, cuts[1:], strict=False):
        y = _times_transposed(flat, W[low:high], None if bias is None else bias[low:high])
        if down is not None:
            up = lora_b.to(dtype) * scale
            for (start, end), (b_start, _), (a_start, a_end) in lora_slices(parts, up.shape[1]):
                first, last = max(start, low), min(end, high)
                if first < last:
                    rows = up[b_start + first - start : b_start + last - start]
                    y[:, first - low : last - low].addmm_(down[:, a_start:a_end], rows.T)
        ys.append(_like(shape, y))
    if residual is not None:
        torch.addcmul(residual, gate, ys[0], out=ys[0])
    return ys


@_without_autocast
def linear_backward(
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
        xs, dys = [_batched(x) for x in xs], [_batched(dy) for dy in dys]
    flat, grads = [_rows(x) for x in xs], [_rows(dy) for dy in dys]
    d_down = da = db = None
    if lora_a is not None:
        update = _launched_update if launched else _plain_update
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
        products = zip(grads, _column_ranges(grads), strict=True)
        pairs = [(dy, W[first:last]) for dy, (first, last) in products]
    if d_down is not None:
        pairs.append((d_down, lora_a.to(dtype)))
    dxs = []
    for shape, (low, high) in zip(shapes, _column_ranges(flat), strict=True):
        (left, right), *more = pairs
        dx = left @ right[:, low:high]
        for left, right in more:
            dx.addmm_(left, right[:, low:high])
        dxs.append(dx.view(shape))
    return dxs, da, db


def _launched_update(xs, dys, flat, grads, lora_a, lora_b, parts, scale):
    """-> dA, dB, and s·Σ dY_part·B_part [M, P·R] in the compute dtype."""
    rank = lora_b.shape[1]
    down = gemm_grads.lora_down(xs, lora_a)
    d_down = gemm_grads.lora_d_down(dys, lora_b, parts, scale, lora_a.shape[0] // rank)
    db = gemm_grads.lora_db(dys, down, parts, scale, rank)
    return gemm_grads.lora_da(xs, d_down), db, d_down


def _plain_update(xs, dys, flat, grads, lora_a, lora_b, parts, scale):
    dtype, rank = flat[0].dtype, lora_b.shape[1]
    down = _times_transposed(flat, lora_a.to(dtype), None)
    d_down, up, db = torch.zeros_like(down), lora_b.to(dtype), torch.empty_like(lora_b)
    for dy, (low, high) in zip(grads, _column_ranges(grads), strict=True):
        for (start, end), (b_start, _), (a_start, a_end) in lora_slices(parts, rank):
            first, last = max(start, low), min(end, high)
            if first < last:
                rows = slice(b_start + first - start, b_start + last - start)
                dy_part = dy[:, first - low : last - low]
                db[rows] = dy_part.T @ down[:, a_start:a_end]
                d_down[:, a_start:a_end].addmm_(dy_part, up[rows])
    d_down *= scale
    da = torch.empty_like(lora_a)
    for x, (low, high) in zip(flat, _column_ranges(flat), strict=True):
        da[:, low:high] = d_down.T @ x
    return da, db.mul_(scale), d_down


def _resident(
    weight: Sequence[Tensor], op: str, xs: Sequence[Tensor], N: int, K: int
) -> tuple[list[Tensor], bool]:
    """What dispatch decides for a product of N outputs over K: the weight as it goes in (NF4 as it
    is, or dense in the compute dtype), and whether our kernel does it (else torch's matmul)."""
    M, dtype = xs[0].shape[0] * xs[0].shape[1], xs[0].dtype
    arch = dispatch.arch_of(xs[0].device)
    nf4 = len(weight) > 1
    if nf4 and dispatch.choose(op, arch, dtype, "nf4", M, N, K).kind == "fused":
        return list(weight), True
    width = K if op == "lora_gemm" else N
    dense = [dense_weight(weight, width, dtype)]
    return dense, dispatch.choose(op, arch, dtype, "dense", M, N, K).kind == "fused"


def _batched(x: Tensor) -> Tensor:
    """[..., C] as the launchers take it: [B, T, C]."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def _like(shape: torch.Size, y: Tensor) -> Tensor:
    return y.view(*shape, y.shape[-1])


def _rows(x: Tensor) -> Tensor:
    """[..., C] as [M, C]. A copy only where a batch of slices cannot be seen as one matrix."""
    return x.reshape(-1, x.shape[-1])


def _column_ranges(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + tensor.shape[1])
    return list(zip(ends, ends[1:], strict=False))


def _times_transposed(xs: Sequence[Tensor], W: Tensor, bias: Tensor | None) -> Tensor:
    """[x_0, x_1, ...] Wᵀ + bias -> [M, N], the inputs side by side but never joined."""
    y = None
    for x, (low, high) in zip(xs, _column_ranges(xs), strict=True):
        if y is None:
            y = F.linear(x, W[:, low:high], bias)
        else:
            y.addmm_(x, W[:, low:high].T)
    return y


# ---------------------------------------------------------------- the op


@torch.library.custom_op("fluxfast::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Optional[Tensor],  # noqa: UP045  (custom_op reads Optional on Python 3.10)
    lora_a: Optional[Tensor],  # noqa: UP045
    lora_b: Optional[Tensor],  # noqa: UP045
    parts: Sequence[int],
    scale: float,
    gate: Optional[Tensor],  # noqa: UP045
    residual: Optional[Tensor],  # noqa: UP045
) -> Tensor:
    (y,) = linear_forward(
        [x], weight, bias, lora_a, lora_b, parts, scale, gate=gate, residual=residual
    )
    return y


@_lora_linear.register_fake
def _(x, weight, bias, lora_a, lora_b, parts, scale, gate, residual):
    return x.new_empty(*x.shape[:-1], weight_shape(weight, x.shape[-1])[0])


@torch.library.custom_op("fluxfast::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    dout: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    lora_a: Optional[Tensor],  # noqa: UP045
    lora_b: Optional[Tensor],  # noqa: UP045
    parts: Sequence[int],
    scale: float,
    gate: Optional[Tensor],  # noqa: UP045
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy = dout if gate is None else dout * gate
    dxs, da, db = linear_backward([dy], [x], weight, lora_a, lora_b, parts, scale, need_dx)
    return (
        dxs[0] if dxs else dout.new_empty(0),
        da if da is not None else dout.new_empty(0, dtype=torch.float32),
        db if db is not None else dout.new_empty(0, dtype=torch.float32),
    )


@_lora_linear_backward.register_fake
def _(dout, x, weight, lora_a, lora_b, parts, scale, gate, need_dx):
    return (
        x.new_empty(x.shape) if need_dx else dout.new_empty(0),
        torch.empty_like(lora_a) if lora_a is not None else dout.new_empty(0, dtype=torch.float32),
        torch.empty_like(lora_b) if lora_b is not None else dout.new_empty(0, dtype=torch.float32),
    )


def _keep(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, parts, scale, gate, _ = inputs
    ctx.save_for_backward(x, lora_a, lora_b, gate)
    ctx.weight, ctx.parts, ctx.scale = weight, parts, scale


def _differentiate(ctx, dout: Tensor):
    x, lora_a, lora_b, gate = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx, da, db = _lora_linear_backward(
        backend.last_stride_1(dout),
        x,
        ctx.weight,
        lora_a,
        lora_b,
        ctx.parts,
        ctx.scale,
        gate,
        needs[0],
    )
    return (
        dx if needs[0] else None,
        [None] * len(ctx.weight),
        None,
        da if needs[3] else None,
        db if needs[4] else None,
        None if ctx.parts else [],  # to torch an empty list is one of tensors
        None,
        None,
        dout if needs[8] else None,
    )


_lora_linear.register_autograd(_differentiate, setup_context=_keep)


def lora_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    parts: Sequence[int] = (),
    scale: float = 1.0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype (fp32, bf16 or fp16); see the file's head.

    Gradients for x, lora_a, lora_b and residual; the weight and the bias are frozen. Raises
    ValueError naming the argument.
    """
    backend.check_dtype("x", x)
    N, K = weight_shape(weight, x.shape[-1])
    check_update(lora_a, lora_b, parts, N, K)
    check_gate(gate, residual, x, N)
    return _lora_linear(x, weight, bias, lora_a, lora_b, list(parts), scale, gate, residual)


def check_update(
    lora_a: Tensor | None, lora_b: Tensor | None, parts: Sequence[int], N: int, K: int
) -> None:
    """Raise ValueError unless A, B and their parts fit each other and a [N, K] weight."""
    if lora_a is None and lora_b is None and not parts:
        return
    check(lora_a is not None, "lora_a", "given with lora_b", None)
    check(lora_b is not None, "lora_b", "given with lora_a", None)
    check(len(parts) % 3 == 0 and len(parts) > 0, "parts", "triples (start, end, A)", len(parts))
    check(min(parts[2::3]) >= 0, "parts", "with an index of A from 0", list(parts))
    last = 0
    for start, end in zip(parts[::3], parts[1::3], strict=True):
        fits = last <= start < end <= N
        check(fits, "parts", f"ascending row ranges within 0..{N}", (start, end))
        last = end
    rows = sum(parts[1::3]) - sum(parts[::3])
    check(lora_b.shape[0] == rows, "lora_b", f"[{rows}, R]", tuple(lora_b.shape))
    rank = lora_b.shape[1]
    stacked = 1 + max(parts[2::3])
    fits = tuple(lora_a.shape) == (stacked * rank, K)
    check(fits, "lora_a", f"[{stacked}·{rank}, {K}]", tuple(lora_a.shape))


def check_gate(gate: Tensor | None, residual: Tensor | None, x: Tensor, N: int) -> None:
    """Raise ValueError unless gate [B, 1, N] and residual [B, T, N] are both there or neither."""
    if gate is None and residual is None:
        return
    check(gate is not None, "gate", "given with residual", None)
    check(residual is not None, "residual", "given with gate", None)
    check(residual.shape == (*x.shape[:-1], N), "residual", f"[B, T, {N}]", tuple(residual.shape))
    fits = gate.shape == ((x.shape[0], 1, N) if x.ndim == 3 else gate.shape[:-1] + (N,))
    check(fits, "gate", f"[B, 1, {N}]", tuple(gate.shape))
    check(gate.dtype == x.dtype, "gate", f"of x's dtype, {x.dtype}", gate.dtype)
    check(residual.dtype == x.dtype, "residual", f"of x's dtype, {x.dtype}", residual.dtype)
    wants = gate.requires_grad and torch.is_grad_enabled()
    check(not wants, "gate", "frozen here: its gradient needs y, see gate_residual", "one to train")


# ---------------------------------------------------------------- reference


def lora_linear_reference(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    parts: Sequence[int] = (),
    scale: float = 1.0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The same in ordinary torch operations, differentiable in everything, in x's dtype."""
    K = x.shape[-1]
    W = weight[0] if len(weight) == 1 else dense_weight(weight, K, torch.float32).clone()
    y = F.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if lora_a is not None:
        pieces, at = [], 0
        for (start, end), (b_start, b_end), (a_start, a_end) in lora_slices(parts, lora_b.shape[1]):
            down = x @ lora_a[a_start:a_end].to(x.dtype).T
            update = scale * (down @ lora_b[b_start:b_end].to(x.dtype).T)
            pieces += [y[..., at:start], y[..., start:end] + update]
            at = end
        y = torch.cat([*pieces, y[..., at:]], dim=-1)
    return y if residual is None else residual + gate * y
