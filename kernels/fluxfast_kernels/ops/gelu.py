"""GELU-tanh and the LoRA linear behind it: x = [head, gelu(u)], y = x Wᵀ + b + s·(x Aᵀ) Bᵀ.

    z        = √(2/π)·(u + 0.044715·u³)
    gelu(u)  = u·σ(2z)                                       (½(1 + tanh z) = σ(2z))
    gelu'(u) = σ + u·σ(1 − σ)·2√(2/π)·(1 + 3·0.044715·u²)    with σ = σ(2z)

The formula of `torch.nn.functional.gelu(approximate="tanh")`, in fp32 on values of fp32, bf16 or
fp16. The sigmoid form keeps the relative precision that 1 + tanh z loses at negative u.

Layouts: u [B, T, F], head [B, T, K0] and outputs may have any batch and row stride (last stride 1):
gelu(u) can be written into a column range of a wider buffer. The linear reads its inputs side by
side, so [head, gelu(u)] is never concatenated.

Saved for backward: u, head, gate, A, B; neither gelu(u), which is computed again, nor y. With
saved_bits=8, u is saved as int8 codes plus two fp32 per row (see below) in the pass that makes
gelu(u): 1 byte an element in place of 2. The forward result is the same for both.

8-bit codes: per row affine, u ≈ low + (code + 128)·step, with low = max(min u, −3.5), step =
(max u − low) / 255. What lies below −3.5 is saved as −3.5: gelu' is within 0.003 and gelu within
0.001 of zero there, and the codes go to where the derivative varies. Relative error (norm over
norm, 64 rows of 12 288 drawn values rounded to bf16, CPU) of gelu'(u) / gelu(u):

    u drawn from                    symmetric        affine         affine from −3.5 (this)
    N(0, 1)                         0.72 / 0.96 %    0.69 / 0.92 %    0.66 / 0.87 %
    N(−1, 1)                        1.31 / 1.57      1.04 / 1.25      0.86 / 1.03
    N(−1.5, 2)                      1.52 / 1.43      1.28 / 1.20      0.83 / 0.76
    N(−1, 1), 12 a row at −20       5.34 / 6.42      3.05 / 3.67      0.86 / 1.03
    N(−1, 1), 12 a row at +20       5.32 / 2.45      3.30 / 1.52      3.11 / 1.43
    Laplace(−0.5, 1)                2.09 / 1.60      1.93 / 1.48      1.28 / 0.98

Bytes moved per row in a 2-byte dtype, beside the linear's own: forward 4F (8 bits: 5F; the second
read of a row is counted as a cache hit); backward 4F to rebuild gelu(u), which is left out without
LoRA, and 6F for du (8 bits: 3F and 5F). About 10 FLOP an element forward, 20 backward.

Refused with ValueError: other dtypes, a last stride other than 1, shapes that do not fit, a gate
without a residual or the reverse, a gate that requires a gradient. Weight and bias are frozen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import check, check_dtype
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.ops.gelu_triton import (
    LOWEST,
    launch_gelu,
    launch_gelu_backward,
    launch_gelu_rows,
)
from fluxfast_kernels.ops.lora_linear import (
    check_gate,
    check_products,
    check_update,
    lora_linear_reference,
)
from fluxfast_kernels.quant.frozen import weight_shape
from fluxfast_kernels.quant.rows import Rows, empty_rows


def gelu_forward(
    u: Tensor,
    row_scale: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """gelu(u) [B, T, F], into `out` where given. With row_scale fp32 [B, T, 2], u is int8 codes and
    `dtype` that of a fresh result. Not differentiable: see `gelu_lora_linear`."""
    if out is None:
        if row_scale is None and not backend.launches(u):
            return torch.ops.aten.gelu(u, approximate="tanh")
        out = torch.empty(u.shape, dtype=dtype or u.dtype, device=u.device)
    check(out.shape == u.shape and out.stride(-1) == 1, "out", f"{tuple(u.shape)}", _layout(out))
    if not backend.launches(u):
        return gelu_forward_reference(u, row_scale, out)
    launch_gelu(u, row_scale, out)
    return out


def gelu_rows(
    u: Tensor,
    saved_bits: int = 16,
    products: str = "",
    rotation: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Rows | None]:
    """u [B, T, F] -> gelu(u); int8 codes of u [B, T, F] and row_scale fp32 [B, T, 2] = (step, low),
    both empty unless saved_bits is 8; gelu(u)'s rows for 8-bit products where a kernel wrote them.
    """
    codes = _no_codes(u)
    if not backend.launches(u):
        codes = codes if saved_bits == 16 else gelu_quantize_reference(u)
        return gelu_forward(u, out=out), *codes, None
    if saved_bits == 16 and not products:
        return gelu_forward(u, out=out), *codes, None
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device) if out is None else out
    if saved_bits == 8:
        codes = (
            torch.empty(u.shape, dtype=torch.int8, device=u.device),
            u.new_empty(*u.shape[:2], 2, dtype=torch.float32),
        )
    rows = empty_rows(u, products) if products else None
    launch_gelu_rows(u, out, codes if saved_bits == 8 else None, rows, rotation)
    return out, *codes, rows


def gelu_backward(u: Tensor, row_scale: Tensor | None, dx: Tensor, out: Tensor) -> Tensor:
    """gelu'(u)·dx into `out` [B, T, F], which may be dx itself. u as for `gelu_forward`."""
    if not backend.launches(u):
        return gelu_backward_reference(u, row_scale, dx, out)
    launch_gelu_backward(u, row_scale, dx, out)
    return out


@torch.library.custom_op("fluxfast::gelu_lora_linear", mutates_args=())
def _gelu_lora_linear(
    u: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    parts: list[int],
    lora_scale: float,
    head: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    saved_bits: int,
    products: str,
    rotation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, codes of u, row_scale; the last two empty with saved_bits=16."""
    x, codes, row_scale, rows = gelu_rows(u, saved_bits, products, rotation)
    (y,) = linear_forward(
        [x] if head is None else [head, x], weight, bias, lora_a, lora_b, parts, lora_scale,
        gate=gate, residual=residual, products=products, rotation=rotation,
        rows=[rows] if head is None else [None, rows],
    )  # fmt: skip
    return y, codes, row_scale


@_gelu_lora_linear.register_fake
def _(
    u, weight, bias, lora_a, lora_b, parts, lora_scale, head, gate, residual, saved_bits,
    products, rotation,
):  # fmt: skip
    B, T, K = u.shape
    N, _ = weight_shape(weight, K + (0 if head is None else head.shape[2]))
    y = u.new_empty(B, T, N)
    if saved_bits == 16:
        return y, *_no_codes(u)
    codes = u.new_empty(u.shape, dtype=torch.int8)
    return y, codes, u.new_empty(B, T, 2, dtype=torch.float32)


@torch.library.custom_op("fluxfast::gelu_lora_linear_backward", mutates_args=())
def _gelu_lora_linear_backward(
    d_out: Tensor,
    u: Tensor,
    row_scale: Tensor | None,
    weight: list[Tensor],
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    parts: list[int],
    lora_scale: float,
    head: Tensor | None,
    gate: Tensor | None,
    need_dx: bool,
    products: str,
    rotation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> du, d_head, da, db; empty where there is none. u: int8 codes where row_scale is given."""
    if lora_a is not None:
        x = gelu_forward(u, row_scale, dtype=d_out.dtype)
    else:  # only the LoRA gradients read x; without them its shape and dtype are enough
        x = u if row_scale is None else torch.empty_like(u, dtype=d_out.dtype)
    xs = [x] if head is None else [head, x]
    dxs, da, db = linear_backward(
        [backend.last_stride_1(d_out)], xs, weight, lora_a, lora_b, parts, lora_scale, need_dx,
        gate, products, rotation,
    )  # fmt: skip
    del x, xs
    du = None if dxs is None else gelu_backward(u, row_scale, dxs[-1], dxs[-1])
    d_head = None if dxs is None or head is None else dxs[0]
    found = (du, d_head, da, db)
    return tuple(d_out.new_empty(0) if tensor is None else tensor for tensor in found)


@_gelu_lora_linear_backward.register_fake
def _(
    d_out, u, row_scale, weight, lora_a, lora_b, parts, lora_scale, head, gate, need_dx,
    products, rotation,
):  # fmt: skip
    du = d_out.new_empty(u.shape if need_dx else 0)
    d_head = d_out.new_empty(head.shape if need_dx and head is not None else 0)
    da, db = (d_out.new_empty(0) if m is None else torch.empty_like(m) for m in (lora_a, lora_b))
    return du, d_head, da, db


def _setup_context(ctx, inputs, output):
    u, weight, _, lora_a, lora_b, parts, lora_scale, head, gate, _, saved_bits, *how = inputs
    _, codes, row_scale = output
    ctx.mark_non_differentiable(codes, row_scale)
    ctx.set_materialize_grads(False)
    saved = (u, None) if saved_bits == 16 else (codes, row_scale)
    ctx.save_for_backward(*saved, lora_a, lora_b, head, gate)
    ctx.weight, ctx.parts, ctx.lora_scale, ctx.how = weight, parts, lora_scale, how


def _backward(ctx, d_out, *_):
    u, row_scale, lora_a, lora_b, head, gate = ctx.saved_tensors
    need = dict(zip(_INPUTS, ctx.needs_input_grad, strict=True))
    # one None per tensor of a list; to autograd an empty list of numbers is one of no tensors
    found = {"weight": [None] * len(ctx.weight), "parts": None if ctx.parts else []}
    if d_out is not None:
        du, d_head, da, db = _gelu_lora_linear_backward(
            d_out, u, row_scale, ctx.weight, lora_a, lora_b, ctx.parts, ctx.lora_scale, head, gate,
            need["u"] or need["head"], *ctx.how,
        )  # fmt: skip
        gradients = {"u": du, "head": d_head, "lora_a": da, "lora_b": db, "residual": d_out}
        found |= {name: gradient for name, gradient in gradients.items() if need[name]}
    return tuple(found.get(name) for name in _INPUTS)


_INPUTS = ("u", "weight", "bias", "lora_a", "lora_b", "parts", "lora_scale", "head", "gate",
           "residual", "saved_bits", "products", "rotation")  # fmt: skip
_gelu_lora_linear.register_autograd(_backward, setup_context=_setup_context)


def gelu_lora_linear(
    u: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    parts: Sequence[int] = (),
    lora_scale: float = 1.0,
    head: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    saved_bits: int = 16,
    products: str = "",
    rotation: int = 0,
) -> Tensor:
    """[head, gelu(u)] through a frozen linear with LoRA -> y [B, T, N] in u's dtype, contiguous.

    u [B, T, F], head [B, T, K0]: fp32, bf16 or fp16. weight, bias, lora_a, lora_b, parts, products,
    rotation: as `lora_linear` takes them, K = K0 + F; 8-bit products give head and gelu(u) a scale
    a row each. With gate [B, 1, N] and residual [B, T, N] the result is residual + gate·y.
    saved_bits: 16 saves u as it is, 8 in codes of 8 bits. Gradients: u, head, residual, lora_a,
    lora_b. Raises ValueError, naming the argument, for what does not fit.
    """
    check_dtype("u", u)
    check(u.ndim == 3 and u.stride(2) == 1, "u", "[B, T, F] with last stride 1", _layout(u))
    B, T, K = u.shape
    if head is not None:
        fits = head.ndim == 3 and head.shape[:2] == (B, T) and head.stride(2) == 1
        check(fits, "head", f"[{B}, {T}, K0] with last stride 1", _layout(head))
        check_dtype("head", head, (u.dtype,))
        K += head.shape[2]
    N, _ = weight_shape(weight, K)
    check_update(lora_a, lora_b, parts, N, K)
    check_gate(gate, residual, u, N)
    for name, tensor in (("gate", gate), ("residual", residual)):
        if tensor is not None:
            check_dtype(name, tensor, (u.dtype,))
    check(saved_bits in (8, 16), "saved_bits", "8 or 16", saved_bits)
    check_products(products, rotation, weight, u, [u.shape[2], K - u.shape[2]])
    trained = (u, head, lora_a, lora_b)
    trains = any(tensor is not None and tensor.requires_grad for tensor in trained)
    return _gelu_lora_linear(
        u, weight, bias, lora_a, lora_b, list(parts), lora_scale, head, gate, residual,
        saved_bits if trains and torch.is_grad_enabled() else 16,  # codes are for backward alone
        products, rotation,
    )[0]  # fmt: skip


def _layout(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"


def _no_codes(u: Tensor) -> tuple[Tensor, Tensor]:
    return u.new_empty(0, dtype=torch.int8), u.new_empty(0, dtype=torch.float32)


def gelu_forward_reference(u: Tensor, row_scale: Tensor | None, out: Tensor) -> Tensor:
    if row_scale is None:
        return out.copy_(torch.ops.aten.gelu(u, approximate="tanh"))
    return out.copy_(torch.ops.aten.gelu_(_decode(u, row_scale), approximate="tanh"))


def gelu_quantize_reference(u: Tensor) -> tuple[Tensor, Tensor]:
    """u [B, T, F] -> int8 codes [B, T, F], row_scale fp32 [B, T, 2] = (step, low)."""
    low = u.amin(-1, keepdim=True).float().clamp_(min=LOWEST)
    step = torch.maximum(u.amax(-1, keepdim=True).float(), low).sub_(low).div_(255)
    inverse = torch.where(step > 0, 1 / step, 0)
    codes = (u - low).mul_(inverse).add_(0.5).floor_().clamp_(0, 255).sub_(128)
    return codes.to(torch.int8), torch.cat([step, low], -1)


def gelu_backward_reference(u, row_scale, dx: Tensor, out: Tensor) -> Tensor:
    if row_scale is None:
        return torch.ops.aten.gelu_backward.grad_input(dx, u, approximate="tanh", grad_input=out)
    u = _decode(u, row_scale)
    return out.copy_(torch.ops.aten.gelu_backward(dx.float(), u, approximate="tanh"))


def _decode(codes: Tensor, row_scale: Tensor) -> Tensor:
    step, low = row_scale.split(1, -1)
    return codes.float().add_(128).mul_(step).add_(low)


def gelu_lora_linear_reference(
    u, weight, bias, lora_a, lora_b, parts, lora_scale, head=None, gate=None, residual=None, **how
) -> Tensor:
    """`gelu_lora_linear` with saved_bits=16 in ordinary, differentiable torch operations."""
    x = torch.nn.functional.gelu(u, approximate="tanh")
    xs = [x] if head is None else [head, x]
    given = (weight, bias, lora_a, lora_b, parts, lora_scale, gate, residual)
    return lora_linear_reference(xs, *given, **how)
