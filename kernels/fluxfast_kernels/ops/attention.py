"""Attention without a mask, its forward and its backward called explicitly.

    S = q kᵀ / √C, P = softmax(S), o = P v, lse = log Σ exp(S) per query
    dv = Pᵀ do, dS = P ∘ (do vᵀ − delta), delta = Σ_c do ∘ o, dq = dS k / √C, dk = dSᵀ q / √C

Layouts: q, k, v and their gradients logically [B, H, T, C], stored [B, T, H, C]; any batch, head
and token strides are read, the last stride is 1. o is always stored [B, T, H, C] without gaps, so
o.transpose(1, 2).flatten(2) is a view. lse is fp32 [B, H, T], contiguous (fp64 for fp64 inputs).

Saved by `attention`: q, k, v, o and lse. (`qk_norm_rope_attention` saves less.)

Backends, chosen by the rows of `dispatch/configs/attention.json` on a GPU:
    triton     the kernels below; C 32, 64 or 128; deterministic; also under the interpreter
    flash      aten's FlashAttention, bf16 and fp16 on CUDA; its backward adds dq by atomics unless
               torch.use_deterministic_algorithms(True)
    cudnn      aten's cuDNN attention, bf16 and fp16, Hopper and Blackwell
    efficient  aten's memory-efficient attention, fp32 on CUDA
    cpu        aten's flash attention for CPU, any floating dtype

The Triton kernels accumulate in fp32; P and dS are rounded to the inputs' dtype before they are
multiplied again, fp32 inputs are multiplied as IEEE fp32. No atomics: `_dq_kernel` owns a
block of queries and writes delta beside dq, `_dkdv_kernel` owns a block of keys and reads it. One
loop, masked where T is not a multiple of its step: with the last, masked step peeled off as a
second path, ptxas spilled 1 KB a thread for dk and dv at C=128 on sm_89 (0 as it is).

Bytes moved, e bytes an element: forward 4·B·T·H·C·e + 4·B·H·T; backward 12·B·T·H·C·e + 16·B·H·T,
where keys and values (forward, dq) or queries and do (dk, dv) that every program of a head reads
count once. FLOP: forward 4·B·H·T²·C, backward 10·B·H·T²·C (14 in Triton: both kernels recompute P).

Copies that are made, and no others: o or a gradient where a backend gives another storage than
[B, T, H, C]; lse on "cpu" (stored [B, T, H] there) and "efficient" (padded to 32 queries there);
do where its last stride is not 1, and on "cudnn" where it is not stored like o (its cached plan
does not see do's strides).

Refused (ValueError): other ranks or shapes, different dtypes, a last stride other than 1, an
unknown backend.

Sources: FlashAttention-2 (arXiv 2307.08691); Triton's tutorial 06 for the loop over transposed
scores.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast_kernels.dispatch.attention import AttentionTile, choose_backend, choose_tile
from fluxfast_kernels.dispatch.backend import (
    check,
    check_dtype,
    kernel,
    launches,
    refuse,
    tl,
    triton,
)
from fluxfast_kernels.dispatch.dispatch import arch_of

aten = torch.ops.aten
BACKENDS = ("triton", "flash", "cudnn", "efficient", "cpu")
HALF = (torch.bfloat16, torch.float16)
WIDTHS = (32, 64, 128)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class QKV(NamedTuple):
    """q, k and v, or their gradients, each [B, H, T, C]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Heads(NamedTuple):
    """A [B, H, T, C] tensor of last stride 1 as a kernel takes it: pointer and three strides."""

    ptr: Tensor
    batch_stride: int
    head_stride: int
    token_stride: int


def heads(x: Tensor) -> Heads:
    """Returns x [B, H, T, C] as a kernel takes it."""
    return Heads(x, *x.stride()[:3])


# ---------------------------------------------------------------- forward kernel


@triton.jit
def _row_ptr(x, row, H):
    """Address of a row of this program's head."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    return x.ptr + (b * x.batch_stride + h * x.head_stride + row * x.token_stride)


@triton.jit
def _load_rows(x_ptr, rows, columns, stride, rows_left, MASKED: tl.constexpr):
    """x[rows, columns], zero from row `rows_left` on. rows [1, R] and columns [C, 1] load the
    transpose."""
    if MASKED:
        return tl.load(x_ptr + rows * stride + columns, mask=rows < rows_left, other=0.0)
    return tl.load(x_ptr + rows * stride + columns)


@kernel
def _forward_kernel(
    q,
    k,
    v,
    o,
    lse_ptr,
    scale,
    H,
    T,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (⌈T/BLOCK_M⌉, B·H): a block of queries against every key. Scores in units of log 2."""
    start = tl.program_id(0) * BLOCK_M
    m, n, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, C)
    q_ptr, k_ptr, v_ptr = _row_ptr(q, start.to(tl.int64), H), _row_ptr(k, 0, H), _row_ptr(v, 0, H)
    o_ptr = _row_ptr(o, start.to(tl.int64), H)
    inside = m < T - start

    q_m = _load_rows(q_ptr, m[:, None], c[None, :], q.token_stride, T - start, True)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    scale *= LOG2_E
    for i in range(0, tl.cdiv(T, BLOCK_N)):
        left = T - i * BLOCK_N
        k_t = _load_rows(k_ptr, n[None, :], c[:, None], k.token_stride, left, TAIL)
        s = tl.dot(q_m, k_t, input_precision=PRECISION) * scale
        if TAIL:
            s = tl.where(n[None, :] < left, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc *= shrink[:, None]
        v_n = _load_rows(v_ptr, n[:, None], c[None, :], v.token_stride, left, TAIL)
        acc = tl.dot(p.to(v_n.dtype), v_n, acc, input_precision=PRECISION)
        row_max = new_max
        k_ptr += BLOCK_N * k.token_stride
        v_ptr += BLOCK_N * v.token_stride
    acc = (acc / row_sum[:, None]).to(o.ptr.dtype.element_ty)
    tl.store(o_ptr + m[:, None] * o.token_stride + c[None, :], acc, mask=inside[:, None])
    at = tl.program_id(1).to(tl.int64) * T + start + m
    tl.store(lse_ptr + at, (row_max + tl.log2(row_sum)) * LN_2, mask=inside)


# ---------------------------------------------------------------- backward kernels


@kernel
def _dq_kernel(
    q,
    k,
    v,
    o,
    do,
    dq,
    lse_ptr,
    delta_ptr,
    scale,
    H,
    T,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (⌈T/BLOCK_M⌉, B·H): dq and delta of a block of queries."""
    start = tl.program_id(0) * BLOCK_M
    first, left = start.to(tl.int64), T - start
    m, n, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, C)
    rows, columns = m[:, None], c[None, :]
    at = tl.program_id(1).to(tl.int64) * T + start + m

    k_ptr, v_ptr = _row_ptr(k, 0, H), _row_ptr(v, 0, H)
    q_m = _load_rows(_row_ptr(q, first, H), rows, columns, q.token_stride, left, True)
    o_m = _load_rows(_row_ptr(o, first, H), rows, columns, o.token_stride, left, True)
    do_m = _load_rows(_row_ptr(do, first, H), rows, columns, do.token_stride, left, True)
    delta = tl.sum(o_m.to(tl.float32) * do_m.to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, mask=m < left)
    lse = tl.load(lse_ptr + at, mask=m < left, other=0.0) * LOG2_E

    acc = tl.zeros([BLOCK_M, C], tl.float32)
    for i in range(0, tl.cdiv(T, BLOCK_N)):
        keys_left = T - i * BLOCK_N
        k_n = _load_rows(k_ptr, n[:, None], columns, k.token_stride, keys_left, TAIL)
        v_n = _load_rows(v_ptr, n[:, None], columns, v.token_stride, keys_left, TAIL)
        s = tl.dot(q_m, tl.trans(k_n), input_precision=PRECISION)
        p = tl.exp2(s * (scale * LOG2_E) - lse[:, None])
        if TAIL:  # past the last key p may be infinite
            p = tl.where(n[None, :] < keys_left, p, 0.0)
        dp = tl.dot(do_m, tl.trans(v_n), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k_n.dtype), k_n, acc, input_precision=PRECISION)
        k_ptr += BLOCK_N * k.token_stride
        v_ptr += BLOCK_N * v.token_stride
    acc = (acc * scale).to(dq.ptr.dtype.element_ty)
    dq_ptrs = _row_ptr(dq, first, H) + rows * dq.token_stride + columns
    tl.store(dq_ptrs, acc, mask=rows < left)


@kernel
def _dkdv_kernel(
    q,
    k,
    v,
    do,
    dk,
    dv,
    lse_ptr,
    delta_ptr,
    scale,
    H,
    T,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (⌈T/BLOCK_N⌉, B·H): dk and dv of a block of keys, scores transposed. Past the last
    query do, delta and ds are 0."""
    start = tl.program_id(0) * BLOCK_N
    first, left = start.to(tl.int64), T - start
    rows, columns = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, C)[None, :]
    m = tl.arange(0, BLOCK_M)
    k_n = _load_rows(_row_ptr(k, first, H), rows, columns, k.token_stride, left, True)
    v_n = _load_rows(_row_ptr(v, first, H), rows, columns, v.token_stride, left, True)
    q_ptr, do_ptr = _row_ptr(q, 0, H), _row_ptr(do, 0, H)
    lse_ptr += tl.program_id(1).to(tl.int64) * T
    delta_ptr += tl.program_id(1).to(tl.int64) * T

    dk_n = tl.zeros([BLOCK_N, C], tl.float32)
    dv_n = tl.zeros([BLOCK_N, C], tl.float32)
    for i in range(0, tl.cdiv(T, BLOCK_M)):
        queries_left = T - i * BLOCK_M
        q_m = _load_rows(q_ptr, m[:, None], columns, q.token_stride, queries_left, TAIL)
        lse = _load_rows(lse_ptr, m, 0, 1, queries_left, TAIL) * LOG2_E
        s_t = tl.dot(k_n, tl.trans(q_m), input_precision=PRECISION)
        p_t = tl.exp2(s_t * (scale * LOG2_E) - lse[None, :])
        do_m = _load_rows(do_ptr, m[:, None], columns, do.token_stride, queries_left, TAIL)
        dv_n = tl.dot(p_t.to(do_m.dtype), do_m, dv_n, input_precision=PRECISION)
        dp_t = tl.dot(v_n, tl.trans(do_m), input_precision=PRECISION)
        ds_t = p_t * (dp_t - _load_rows(delta_ptr, m, 0, 1, queries_left, TAIL)[None, :])
        dk_n = tl.dot(ds_t.to(q_m.dtype), q_m, dk_n, input_precision=PRECISION)
        q_ptr += BLOCK_M * q.token_stride
        do_ptr += BLOCK_M * do.token_stride
        lse_ptr += BLOCK_M
        delta_ptr += BLOCK_M
    dk_ptrs = _row_ptr(dk, first, H) + rows * dk.token_stride + columns
    tl.store(dk_ptrs, (dk_n * scale).to(dk.ptr.dtype.element_ty), mask=rows < left)
    dv_ptrs = _row_ptr(dv, first, H) + rows * dv.token_stride + columns
    tl.store(dv_ptrs, dv_n.to(dv.ptr.dtype.element_ty), mask=rows < left)


KERNELS = {"forward": _forward_kernel, "dq": _dq_kernel, "dkdv": _dkdv_kernel}

# ---------------------------------------------------------------- launchers


def _launch(
    kernel: str, q: Tensor, arguments: tuple[Heads | Tensor, ...], tile: AttentionTile | None
) -> None:
    """Launches one of KERNELS. arguments: its first, in order."""
    B, H, T, C = q.shape
    check_dtype("q", q)
    if C not in WIDTHS:
        refuse("q's head width", f"one of {WIDTHS} (Triton)", C)
    check(B * H < 65536, "q's B·H", "below 65536", B * H)
    tile = tile or choose_tile(kernel, arch_of(q.device), q.dtype, C)
    block, step = tile.block_m, tile.block_n
    if kernel == "dkdv":
        block, step = step, block
    KERNELS[kernel][(triton.cdiv(T, block), B * H)](
        *arguments,
        C**-0.5,
        H,
        T,
        C=C,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        TAIL=T % step != 0,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def launch_forward(qkv: QKV, o: Tensor, lse: Tensor, tile: AttentionTile | None = None) -> None:
    """Writes o [B, H, T, C] (last stride 1) and lse [B, H, T] (contiguous). tile: another than the
    table's."""
    _launch("forward", qkv.q, (*map(heads, (*qkv, o)), lse), tile)


def launch_dq(
    do: Tensor,
    qkv: QKV,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,
    delta: Tensor,
    tile: AttentionTile | None = None,
) -> None:
    """Writes dq (last stride 1) and delta [B, H, T] (contiguous)."""
    _launch("dq", qkv.q, (*map(heads, (*qkv, o, do, dq)), lse, delta), tile)


def launch_dkdv(
    do: Tensor,
    qkv: QKV,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    tile: AttentionTile | None = None,
) -> None:
    """Reads delta, writes dk and dv (last stride 1)."""
    _launch("dkdv", qkv.q, (*map(heads, (*qkv, do, dk, dv)), lse, delta), tile)


def launch_backward(
    do: Tensor, qkv: QKV, o: Tensor, lse: Tensor, grads: QKV, delta: Tensor
) -> None:
    """Writes grads (last stride 1) and delta [B, H, T] (contiguous)."""
    launch_dq(do, qkv, o, lse, grads.q, delta)
    launch_dkdv(do, qkv, lse, delta, grads.k, grads.v)


# ---------------------------------------------------------------- by backend, without autograd


def _resolve(backend: str, q: Tensor) -> str:
    if backend != "auto":
        if backend not in BACKENDS:
            refuse("backend", f"auto or one of {', '.join(BACKENDS)}", backend)
        return backend
    if not q.is_cuda:
        return "triton" if launches(q) else "cpu"
    return choose_backend(arch_of(q.device), q.dtype, q.shape[3], q.shape[2])[0]


def stored(x: Tensor) -> Tensor:
    """Returns x [B, H, T, C], copied unless it is stored [B, T, H, C] without gaps."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(x: Tensor) -> Tensor:
    """Returns a new tensor of x's logical shape [B, H, T, C], stored [B, T, H, C]."""
    B, H, T, C = x.shape
    return x.new_empty(B, T, H, C).transpose(1, 2)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


# cuDNN's lse has a fourth dimension of 1 in some torch releases; its backward takes the shape that
# its forward returned
_cudnn_lse_dims = 4


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Returns o [B, H, T, C], stored [B, T, H, C], and lse [B, H, T] of q, k, v [B, H, T, C],
    without autograd."""
    global _cudnn_lse_dims
    _check_qkv(q, k, v)
    backend = _resolve(backend, q)
    if backend == "triton":
        o, lse = _empty(q), _empty_lse(q)
        launch_forward(QKV(q, k, v), o, lse)
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
) -> QKV:
    """Returns dq, dk, dv like q, stored [B, T, H, C]. do, q, k, v, o: [B, H, T, C]; lse: [B, H,
    T]."""
    _check_qkv(q, k, v)
    if not (do.shape == q.shape and do.dtype == q.dtype):
        refuse("do", f"like q {tuple(q.shape)}", do.shape)
    backend = _resolve(backend, q)
    T = q.shape[2]
    if do.stride(3) != 1 or (backend == "cudnn" and do.stride() != o.stride()):
        do = stored(do)
    # no dropout: the generator's state is passed on and never read
    unused = torch.empty(2, dtype=torch.uint64, device=q.device) if q.is_cuda else None
    if backend == "triton":
        grads = QKV(_empty(q), _empty(q), _empty(q))
        launch_backward(do, QKV(q, k, v), o, lse, grads, torch.empty_like(lse))
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
    return QKV(*(stored(grad) for grad in grads))


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (q.dim() == 4 and q.shape[2] > 0):
        refuse("q", "[B, H, T, C], T above 0", tuple(q.shape))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape != q.shape:
            refuse(name, f"shaped like q {tuple(q.shape)}", tuple(x.shape))
        if x.dtype != q.dtype:
            refuse(name, f"q's dtype {q.dtype}", x.dtype)
        if x.stride(3) != 1:
            refuse(f"{name}'s last stride", "1", x.stride(3))


# ---------------------------------------------------------------- the op


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


def _setup_context(ctx, inputs, output) -> None:
    *qkv, ctx.backend = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for lse's gradient


def _backward(ctx, do, _):
    if do is None:
        return None, None, None, None
    return *_attention_backward(do, *ctx.saved_tensors, ctx.backend), None


_attention.register_autograd(_backward, setup_context=_setup_context)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Returns softmax(q kᵀ / √C) v, differentiable once.

    q, k, v [B, H, T, C], the last stride 1 (best stored [B, T, H, C]), fp32, bf16 or fp16. o is
    like q, stored [B, T, H, C]. backend: "auto" or one of BACKENDS. Raises ValueError for a wrong
    shape, dtype or stride.
    """
    _check_qkv(q, k, v)
    return _attention(q, k, v, backend)[0]


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns o and lse in plain torch: in fp32 (fp64 for fp64), with the scores in memory."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
    lse = torch.logsumexp(scores, -1)
    return stored((torch.exp(scores - lse[..., None]) @ v.to(wide)).to(q.dtype)), lse
