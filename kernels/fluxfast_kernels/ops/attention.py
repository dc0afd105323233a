"""Attention without a mask, its forward and its backward called explicitly.

    o = softmax(q kᵀ / √C) v, lse = log Σ exp(q kᵀ / √C) per query

Layouts: q, k, v and their gradients logically [B, H, T, C], stored [B, T, H, C]; any batch, head
and token strides are read, the last stride is 1. o is always stored [B, T, H, C] without gaps, so
o.transpose(1, 2).flatten(2) is a view. lse is fp32 [B, H, T], contiguous (fp64 for fp64 inputs).

Saved by `attention`: q, k, v, o and lse. (`qk_norm_rope_attention` saves less.) FLOP 4·B·H·T²·C
forward and 10·B·H·T²·C backward (14 where Triton runs it).

Backends, chosen by the rows of `dispatch/configs/attention.json` on a GPU:
    triton     `attention_triton.py`; C 32, 64 or 128; deterministic; also under the interpreter
    flash      aten's FlashAttention, bf16 and fp16 on CUDA; its backward adds dq by atomics unless
               torch.use_deterministic_algorithms(True)
    cudnn      aten's cuDNN attention, bf16 and fp16, Hopper and Blackwell
    efficient  aten's memory-efficient attention, fp32 on CUDA
    cpu        aten's flash attention for CPU, any floating dtype

Copies that are made, and no others: o or a gradient where a backend gives another storage than
[B, T, H, C]; lse on "cpu" (stored [B, T, H] there) and "efficient" (padded to 32 queries there);
do where its last stride is not 1, and on "cudnn" where it is not stored like o (its cached plan is
not told do's strides).

Refused (ValueError): other ranks or shapes, different dtypes, a last stride other than 1, an
unknown backend.
"""

from functools import cache

import torch
from torch import Tensor

from fluxfast_kernels.dispatch.backend import check, check_dtype, launches
from fluxfast_kernels.dispatch.dispatch import arch_of
from fluxfast_kernels.ops import attention_triton

aten = torch.ops.aten
BACKENDS = ("triton", "flash", "cudnn", "efficient", "cpu")
HALF = (torch.bfloat16, torch.float16)


@cache
def choose_backend(arch: int, dtype: torch.dtype, C: int, T: int) -> tuple[str, str]:
    """-> backend, source: the backend on a GPU of compute capability `arch` (89 for 8.9), and where
    that row comes from."""
    kind = "fp32" if dtype == torch.float32 else "half"
    row = attention_triton.first_row("backends", T, arch=arch, dtype=kind, c=C)
    return row["backend"], row["source"]


def _resolve(backend: str, q: Tensor) -> str:
    if backend != "auto":
        check(backend in BACKENDS, "backend", f"auto or one of {', '.join(BACKENDS)}", backend)
        return backend
    if not q.is_cuda:
        return "triton" if launches(q) else "cpu"
    return choose_backend(arch_of(q.device), q.dtype, q.shape[3], q.shape[2])[0]


def stored(x: Tensor) -> Tensor:
    """x [B, H, T, C], itself if it is stored [B, T, H, C] without gaps, else a copy that is."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(x: Tensor) -> Tensor:
    """A fresh tensor of x's logical shape [B, H, T, C], stored [B, T, H, C]."""
    B, H, T, C = x.shape
    return x.new_empty(B, T, H, C).transpose(1, 2)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(
        q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )


# cuDNN's lse has a fourth dimension of 1 in some torch releases. Its backward wants what its
# forward gave, so the forward notes it.
_cudnn_lse_dims = 4


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """q, k, v [B, H, T, C] -> o [B, H, T, C] stored [B, T, H, C], lse [B, H, T]. No autograd."""
    global _cudnn_lse_dims
    _check_qkv(q, k, v)
    backend = _resolve(backend, q)
    if backend == "triton":
        o, lse = _empty(q), _empty_lse(q)
        attention_triton.launch_forward(q, k, v, o, lse)
    elif backend == "flash":
        check_dtype("q", q, HALF)
        o, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    elif backend == "cudnn":
        check_dtype("q", q, HALF)
        o, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        _cudnn_lse_dims = lse.dim()
        lse = lse.view(q.shape[:3])
    elif backend == "efficient":
        o, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
        lse = lse[:, :, : q.shape[2]]
    else:
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return stored(o), lse.contiguous()


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """do, q, k, v, o [B, H, T, C], lse [B, H, T] -> dq, dk, dv like q, stored
    [B, T, H, C]. No autograd.
    """
    _check_qkv(q, k, v)
    check(do.shape == q.shape and do.dtype == q.dtype, "do", f"like q {tuple(q.shape)}", do.shape)
    backend = _resolve(backend, q)
    T = q.shape[2]
    if do.stride(3) != 1 or (backend == "cudnn" and do.stride() != o.stride()):
        do = stored(do)
    # no dropout: the generator's state is passed on and never read
    unused = torch.empty(2, dtype=torch.uint64, device=q.device) if q.is_cuda else None
    if backend == "triton":
        grads = _empty(q), _empty(q), _empty(q)
        delta = torch.empty_like(lse)
        attention_triton.launch_backward(do, q, k, v, o, lse, *grads, delta)
        return grads
    if backend == "flash":
        grads = aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, lse, None, None, T, T, 0.0, False, unused, unused
        )
    elif backend == "cudnn":
        if _cudnn_lse_dims == 4:
            lse = lse.unsqueeze(-1)
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, o, lse, unused, unused, None, None, None, T, T, 0.0, False
        )
    elif backend == "efficient":
        padded = torch.nn.functional.pad(lse, (0, -T % 32), value=float("inf"))
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_efficient_attention_backward(
            do, q, k, v, None, o, padded, unused, unused, 0.0, [True, True, True, False]
        )[:3]
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, False
        )
    return tuple(stored(grad) for grad in grads)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    check(q.dim() == 4 and q.shape[2] > 0, "q", "[B, H, T, C], T above 0", tuple(q.shape))
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(x.shape == q.shape, name, f"shaped like q {tuple(q.shape)}", tuple(x.shape))
        check(x.dtype == q.dtype, name, f"q's dtype {q.dtype}", x.dtype)
        check(x.stride(3) == 1, f"{name}'s last stride", "1", x.stride(3))


@torch.library.custom_op("fluxfast::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return attention_forward(q, k, v, backend)


@_attention.register_fake
def _(q, k, v, backend):
    return _empty(q), _empty_lse(q)


@torch.library.custom_op("fluxfast::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(do, q, k, v, o, lse, backend)


@_attention_backward.register_fake
def _(do, q, k, v, o, lse, backend):
    return _empty(q), _empty(q), _empty(q)


def _save(ctx, inputs, output):
    *qkv, ctx.backend = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _grads(ctx, do, _):
    return *_attention_backward(do, *ctx.saved_tensors, ctx.backend), None


_attention.register_autograd(_grads, setup_context=_save)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q kᵀ / √C) v, differentiable once.

    q, k, v [B, H, T, C], the last stride 1 (best stored [B, T, H, C]), fp32, bf16 or fp16 -> o like
    q, stored [B, T, H, C]. backend: "auto" or one of BACKENDS. Raises ValueError for a wrong shape,
    dtype or stride.
    """
    _check_qkv(q, k, v)
    return _attention(q, k, v, backend)[0]


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse in plain torch: the formula in fp32 (fp64 for fp64), with the scores in memory."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
    lse = torch.logsumexp(scores, -1)
    return stored((torch.exp(scores - lse[..., None]) @ v.to(wide)).to(q.dtype)), lse
