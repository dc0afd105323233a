"""A frozen linear layer with a trainable low-rank update on some of its rows.

    y = x Wᵀ + b;   y[..., rows of part p] += s · (x A_pᵀ) B_pᵀ;   out = residual + gate · y

Layouts: x [B, T, K], or several inputs side by side whose widths add up to K; the last stride is 1,
the others are free, so that one stream's tokens of a joint tensor go in as they lie. y [B, T, N].
weight is a list: [W [N, K]] in fp32, bf16 or fp16, [codes, scale] in 8 bits, or NF4's [packed,
absmax] and, where absmax is itself quantized, [packed, absmax, nested_absmax, offset] (see
`frozen.py`). lora_a fp32 [P·R, K]
stacks one A per part; lora_b fp32 [N', R] has the parts' rows one after the other; parts is flat
(start, end, which A): never a block-diagonal matrix, and one A for all parts is P = 1.

products: "" multiplies in x's dtype, "int8" and "fp8" in 8-bit codes, forward and towards x, over
any form of weight (see `linear_8bit.py`); the update stays in x's dtype. rotation: the weight is
that of the rotated input, W·H (see `hadamard.py`); 0 for none, and only with 8-bit products.

Saved for backward: x (as given), A and B. The dense weight and x Aᵀ are made again.

Bytes, in elements of the compute dtype unless said: reads x, W (0.5625 bytes a weight in NF4, which
above the dispatch threshold is decoded into a scratch of N·K that the product reads back) and
residual, writes y. FLOP: 2·M·N·K + 2·M·R·(P·K + N'), M = B·T; backward the same for dx, and
twice the low-rank part for dA and dB.

Refused with ValueError: shapes that do not fit, an update given by halves, parts out of range, and
a gate that wants a gradient (its gradient needs y, which is not kept: use `gate_residual`), int8
products of an fp8 weight and the reverse, fp8 on a card that has none (below sm_89).
Source: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314).
"""

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.dispatch.backend import check
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.gemm.linear_8bit import product_reference
from fluxfast_kernels.gemm.linear_dense import lora_slices
from fluxfast_kernels.quant.frozen import dense_weight, storage_of, weight_shape
from fluxfast_kernels.quant.hadamard import check_rotation
from fluxfast_kernels.quant.rows import TOP

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
    products: str,
    rotation: int,
) -> Tensor:
    (y,) = linear_forward(
        [x], weight, bias, lora_a, lora_b, parts, scale, gate=gate, residual=residual,
        products=products, rotation=rotation,
    )  # fmt: skip
    return y


@_lora_linear.register_fake
def _(x, weight, bias, lora_a, lora_b, parts, scale, gate, residual, products, rotation):
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
    products: str,
    rotation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dxs, da, db = linear_backward(
        [dout], [x], weight, lora_a, lora_b, parts, scale, need_dx, gate, products, rotation
    )
    return (
        dxs[0] if dxs else dout.new_empty(0),
        da if da is not None else dout.new_empty(0, dtype=torch.float32),
        db if db is not None else dout.new_empty(0, dtype=torch.float32),
    )


@_lora_linear_backward.register_fake
def _(dout, x, weight, lora_a, lora_b, parts, scale, gate, need_dx, products, rotation):
    return (
        x.new_empty(x.shape) if need_dx else dout.new_empty(0),
        torch.empty_like(lora_a) if lora_a is not None else dout.new_empty(0, dtype=torch.float32),
        torch.empty_like(lora_b) if lora_b is not None else dout.new_empty(0, dtype=torch.float32),
    )


def _keep(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, parts, scale, gate, _, products, rotation = inputs
    ctx.save_for_backward(x, lora_a, lora_b, gate)
    ctx.weight, ctx.parts, ctx.scale, ctx.how = weight, parts, scale, (products, rotation)


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
        *ctx.how,
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
        None,
        None,
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
    products: str = "",
    rotation: int = 0,
) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype (fp32, bf16 or fp16); see the file's head.

    Gradients for x, lora_a, lora_b and residual; the weight and the bias are frozen. Raises
    ValueError naming the argument.
    """
    backend.check_dtype("x", x)
    N, K = weight_shape(weight, x.shape[-1])
    check_update(lora_a, lora_b, parts, N, K)
    check_gate(gate, residual, x, N)
    check_products(products, rotation, weight, x, [K])
    return _lora_linear(
        x, weight, bias, lora_a, lora_b, list(parts), scale, gate, residual, products, rotation
    )


def check_products(
    products: str, rotation: int, weight: Sequence[Tensor], x: Tensor, widths: Sequence[int]
) -> None:
    """Raise ValueError unless x's device multiplies so, and the weight is kept fitly. widths: of
    the inputs side by side."""
    check(products in ("", *TOP), "products", "'', 'int8' or 'fp8'", repr(products))
    check(products or not rotation, "rotation", "0 without 8-bit products", rotation)
    check_rotation(rotation, *widths)
    if products:
        other = "fp8" if products == "int8" else "int8"
        fits = storage_of(weight) != other
        check(fits, "products", f"{other} or '' for a weight kept in {other}", products)
    if products == "fp8":
        arch = dispatch.arch_of(x.device)
        fits = not arch or arch >= 89
        check(fits, "products", "int8 or '' on a card before sm_89", f"fp8 on sm_{arch}")


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
    x: Tensor | Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    parts: Sequence[int] = (),
    scale: float = 1.0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    products: str = "",
    rotation: int = 0,
    split: int = 0,
) -> Tensor:
    """The same in ordinary torch operations, differentiable in everything, in x's dtype. 8-bit
    products differentiate as the op does: dx is a product of codes too. x: one input or several
    side by side; split: where an op gives y in two, whose gradients' codes have scales of their
    own."""
    xs = [x] if isinstance(x, Tensor) else list(x)
    x = torch.cat(xs, -1)
    K = x.shape[-1]
    if products:
        y = product_reference(xs, weight, products, rotation, split)
        y = y if bias is None else y + bias.to(x.dtype)
    else:
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
