"""QK-RMSNorm, rotary embedding and joint attention, from the streams' qkv to the joint output.

    x̂ = x / √(mean_C x² + 1e-6) · scale          for q and k, per token and head
    y[2i], y[2i+1] = x̂[2i]·cos_i − x̂[2i+1]·sin_i, x̂[2i]·sin_i + x̂[2i+1]·cos_i
    o = softmax(q kᵀ / √C) v                     over all streams' tokens, in their order

Layouts: qkv is one tensor (single block) or two (double block, text first), each [B, T_i, 3·H·C]
with q, k and v side by side, last stride 1, other strides free. q, k and v are written straight
into one joint [B, T, H, C] buffer each, T = Σ T_i: no `cat`. Of a single stream v is a view of
qkv. cos and sin are fp32 [B or 1, T, 1, C/2]. o is [B, T, H·C]. Norm and rotation are computed in
fp32 and rounded once (eager rounds in between).

`qk_norm_rope_attention` saves qkv as it came, o and lse (fp32 [B, H, T]); scales, cos and sin stay
with the graph as they are. Backward recomputes q and k (and a joint v), runs attention's backward,
then un-rotates dq and dk and takes them through the norm. No gradient for scales, cos and sin.

Bytes moved by norm and rotation, e bytes an element and n = B·T·H·C: forward 4·n·e for one stream,
6·n·e for two; backward 8·n·e. FLOP about 12·n forward, 30·n backward; attention's are in
`attention.py`.

Refused (ValueError): other numbers of streams, widths that are not 3·heads·C, an odd C (kernels:
one that is not a power of two from 16 to 256), different dtypes, a last stride other than 1, cos or
sin of another shape or dtype.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast_kernels.dispatch.attention import AttentionTile, choose_tile
from fluxfast_kernels.dispatch.backend import (
    Matrix,
    check_dtype,
    kernel,
    launches,
    matrix,
    refuse,
    tl,
    triton,
)
from fluxfast_kernels.dispatch.dispatch import arch_of
from fluxfast_kernels.ops.attention import (
    QKV,
    attention_backward,
    attention_forward,
    attention_reference,
    heads,
)

EPSILON = 1e-6
WIDTHS = (16, 32, 64, 128, 256)


class Streams(NamedTuple):
    """The op's inputs, see `qk_norm_rope_attention`."""

    qkv: list[Tensor]
    scales: list[Tensor]
    cos: Tensor
    sin: Tensor
    heads: int

    @property
    def joint_shape(self) -> tuple[int, int, int, int]:
        """[B, T, H, C]"""
        B, _, width = self.qkv[0].shape
        return B, sum(x.shape[1] for x in self.qkv), self.heads, width // (3 * self.heads)

    def each(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, slice]]:
        """Yields each stream's qkv [B, T_i, 3·H·C], scales of q and k [C], cos and sin of its
        positions, and the slice of its tokens among the joint ones."""
        end = 0
        for i, x in enumerate(self.qkv):
            start, end = end, end + x.shape[1]
            at = slice(start, end)
            q_scale, k_scale = self.scales[2 * i : 2 * i + 2]
            yield x, q_scale, k_scale, self.cos[:, at], self.sin[:, at], at


# ---------------------------------------------------------------- kernels


@triton.jit
def _load_pairs(x_ptrs, mask):
    """fp32 even and odd elements of the tile at x_ptrs [rows, C], each [rows, C/2]."""
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _store_pairs(x_ptrs, even, odd, mask):
    x = tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])
    tl.store(x_ptrs, x.to(x_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _load_scale(scale_ptr, C: tl.constexpr):
    i = tl.arange(0, C // 2)
    even = tl.load(scale_ptr + 2 * i).to(tl.float32)
    return even[None, :], tl.load(scale_ptr + 2 * i + 1).to(tl.float32)[None, :]


@triton.jit
def _norm_rotate(x_ptrs, y_ptrs, scale_ptr, cos, sin, mask, C: tl.constexpr, EPSILON: tl.constexpr):
    even, odd = _load_pairs(x_ptrs, mask)
    scale_even, scale_odd = _load_scale(scale_ptr, C)
    rstd = tl.rsqrt(tl.sum(even * even + odd * odd, 1) / C + EPSILON)[:, None]
    even, odd = even * rstd * scale_even, odd * rstd * scale_odd
    _store_pairs(y_ptrs, even * cos - odd * sin, even * sin + odd * cos, mask)


@triton.jit
def _unrotate_norm(
    dy_ptrs, x_ptrs, dx_ptrs, scale_ptr, cos, sin, mask, C: tl.constexpr, EPSILON: tl.constexpr
):
    """dx = rstd · (g − x̂ · mean(g · x̂)), x̂ = x · rstd, g = scale · un-rotated dy."""
    even, odd = _load_pairs(x_ptrs, mask)
    scale_even, scale_odd = _load_scale(scale_ptr, C)
    rstd = tl.rsqrt(tl.sum(even * even + odd * odd, 1) / C + EPSILON)[:, None]
    even, odd = even * rstd, odd * rstd
    d_even, d_odd = _load_pairs(dy_ptrs, mask)
    g_even = (d_even * cos + d_odd * sin) * scale_even
    g_odd = (d_odd * cos - d_even * sin) * scale_odd
    mean = (tl.sum(g_even * even + g_odd * odd, 1) / C)[:, None]
    _store_pairs(dx_ptrs, rstd * (g_even - even * mean), rstd * (g_odd - odd * mean), mask)


@triton.jit
def _rows(T, H, ROWS: tl.constexpr):
    """Token and head (int64) of this program's rows, and which of them exist."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return (row // H).to(tl.int64), (row % H).to(tl.int64), row < T * H


@triton.jit
def _load_rope(cos, sin_ptr, token, inside, C: tl.constexpr):
    i = tl.arange(0, C // 2)
    b = tl.program_id(1).to(tl.int64)
    at = b * cos.batch_stride + token[:, None] * cos.token_stride + i[None, :]
    mask = inside[:, None]
    return tl.load(cos.ptr + at, mask=mask, other=0.0), tl.load(sin_ptr + at, mask=mask, other=0.0)


@kernel
def _forward_kernel(
    qkv,
    q_scale_ptr,
    k_scale_ptr,
    cos,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    T,
    H,
    joint_batch,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    EPSILON: tl.constexpr,
    COPY_V: tl.constexpr,
):
    """Grid (⌈T·H/ROWS⌉, B) of one stream; cos, sin, q, k and v begin at its first token."""
    token, head, inside = _rows(T, H, ROWS)
    cos_t, sin_t = _load_rope(cos, sin_ptr, token, inside, C)
    b, c = tl.program_id(1).to(tl.int64), tl.arange(0, C)[None, :]
    row = (token * qkv.token_stride + head * C)[:, None]
    x_ptrs = qkv.ptr + b * qkv.batch_stride + row + c
    joint = b * joint_batch + ((token * H + head) * C)[:, None] + c
    mask = inside[:, None]
    _norm_rotate(x_ptrs, q_ptr + joint, q_scale_ptr, cos_t, sin_t, mask, C, EPSILON)
    _norm_rotate(x_ptrs + H * C, k_ptr + joint, k_scale_ptr, cos_t, sin_t, mask, C, EPSILON)
    if COPY_V:
        tl.store(v_ptr + joint, tl.load(x_ptrs + 2 * H * C, mask=mask), mask=mask)


@kernel
def _backward_kernel(
    dq,
    dk,
    dv,
    qkv,
    q_scale_ptr,
    k_scale_ptr,
    cos,
    sin_ptr,
    dqkv_ptr,
    T,
    H,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Grid (⌈T·H/ROWS⌉, B) of one stream; dqkv [B, T, 3·H·C] has no gaps."""
    token, head, inside = _rows(T, H, ROWS)
    cos_t, sin_t = _load_rope(cos, sin_ptr, token, inside, C)
    b, c = tl.program_id(1).to(tl.int64), tl.arange(0, C)[None, :]
    row = (token * qkv.token_stride + head * C)[:, None]
    x_ptrs = qkv.ptr + b * qkv.batch_stride + row + c
    dx_ptrs = dqkv_ptr + (((b * T + token) * 3 * H + head) * C)[:, None] + c
    mask = inside[:, None]
    dy_ptrs = _head_ptrs(dq, b, token, head) + c
    _unrotate_norm(dy_ptrs, x_ptrs, dx_ptrs, q_scale_ptr, cos_t, sin_t, mask, C, EPSILON)
    dy_ptrs = _head_ptrs(dk, b, token, head) + c
    x_ptrs, dx_ptrs = x_ptrs + H * C, dx_ptrs + H * C
    _unrotate_norm(dy_ptrs, x_ptrs, dx_ptrs, k_scale_ptr, cos_t, sin_t, mask, C, EPSILON)
    dy_ptrs = _head_ptrs(dv, b, token, head) + c
    tl.store(dx_ptrs + H * C, tl.load(dy_ptrs, mask=mask), mask=mask)


@triton.jit
def _head_ptrs(x, b, token, head):
    return x.ptr + b * x.batch_stride + (token * x.token_stride + head * x.head_stride)[:, None]


# ---------------------------------------------------------------- launchers


def _meta(streams: Streams, tile: AttentionTile | None) -> dict[str, Any]:
    x, C = streams.qkv[0], streams.joint_shape[3]
    tile = tile or choose_tile("qk_norm_rope", arch_of(x.device), x.dtype, C)
    return {"C": C, "ROWS": tile.block_m, "EPSILON": EPSILON, "num_warps": tile.num_warps}


def _grid(x: Tensor, heads: int, rows: int) -> tuple[int, int]:
    return triton.cdiv(x.shape[1] * heads, rows), x.shape[0]


def _rope(cos: Tensor) -> Matrix:
    return Matrix(cos, cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))


def launch_forward(
    streams: Streams, q: Tensor, k: Tensor, v: Tensor | None, tile: AttentionTile | None = None
) -> None:
    """Writes q, k [B, T, H, C] (no gaps) and, unless it is None, v alike. tile: another than the
    table's."""
    meta = _meta(streams, tile)
    for x, q_scale, k_scale, cos, sin, at in streams.each():
        _forward_kernel[_grid(x, streams.heads, meta["ROWS"])](
            matrix(x),
            q_scale,
            k_scale,
            _rope(cos),
            sin,
            q[:, at],
            k[:, at],
            q if v is None else v[:, at],
            x.shape[1],
            streams.heads,
            q.stride(0),
            COPY_V=v is not None,
            **meta,
        )


def launch_backward(
    grads: QKV, streams: Streams, dqkv: list[Tensor], tile: AttentionTile | None = None
) -> None:
    """grads: dq, dk, dv [B, T, H, C]. Writes dqkv, like qkv, without gaps."""
    meta = _meta(streams, tile)
    for dx, (x, q_scale, k_scale, cos, sin, at) in zip(dqkv, streams.each(), strict=True):
        _backward_kernel[_grid(x, streams.heads, meta["ROWS"])](
            *(heads(grad[:, at].transpose(1, 2)) for grad in grads),
            matrix(x),
            q_scale,
            k_scale,
            _rope(cos),
            sin,
            dx,
            x.shape[1],
            streams.heads,
            **meta,
        )


# ---------------------------------------------------------------- norm and rotation, no autograd


def qk_norm_rope_forward(streams: Streams) -> QKV:
    """Returns q and k, normalized and rotated, and v, each [B, T, H, C]; a single stream's v is a
    view of qkv."""
    _check(streams)
    if not launches(streams.qkv[0]):
        return qk_norm_rope_reference(*streams)
    _check_launch(streams)
    q, k, v = joint = _empty_joint(streams)
    launch_forward(streams, q, k, v if len(streams.qkv) > 1 else None)
    return joint


def qk_norm_rope_backward(grads: QKV, streams: Streams) -> list[Tensor]:
    """grads: dq, dk, dv [B, T, H, C], last stride 1. Returns dqkv of each stream, without gaps."""
    _check(streams)
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        if grad.stride(3) != 1:
            refuse(f"{name}'s last stride", "1", grad.stride(3))
    if not launches(streams.qkv[0]):
        return qk_norm_rope_backward_reference(grads, streams)
    _check_launch(streams)
    dqkv = [x.new_empty(x.shape) for x in streams.qkv]
    launch_backward(grads, streams, dqkv)
    return dqkv


def _empty_joint(streams: Streams) -> QKV:
    """Returns empty q, k and v [B, T, H, C]; a single stream's v is the view of it."""
    qkv, _, _, _, heads = streams
    q, k = (qkv[0].new_empty(streams.joint_shape) for _ in range(2))
    return QKV(q, k, _split(qkv[0], heads).v if len(qkv) == 1 else torch.empty_like(q))


def _split(x: Tensor, heads: int) -> QKV:
    """Returns the views q, k and v of x [B, T, 3·H·C], each [B, T, H, C]."""
    return QKV(*x.unflatten(-1, (3, heads, -1)).unbind(2))


def _check(streams: Streams) -> None:
    qkv, scales, cos, sin, heads = streams
    if len(qkv) not in (1, 2):
        refuse("qkv", "one or two streams", len(qkv))
    first = qkv[0]
    for x in qkv:
        if x.dim() != 3:
            refuse("qkv", "[B, T, 3·H·C]", tuple(x.shape))
        same = x.shape[0] == first.shape[0] and x.shape[2] == first.shape[2]
        if not same:
            refuse("qkv", f"of one batch size and width, {tuple(first.shape)}", tuple(x.shape))
        if x.dtype != first.dtype:
            refuse("qkv", f"of one dtype, {first.dtype}", x.dtype)
        if x.stride(2) != 1:
            refuse("qkv's last stride", "1", x.stride(2))
    if sum(x.shape[1] for x in qkv) <= 0:
        refuse("qkv", "of at least one token", tuple(first.shape))
    C, rest = divmod(first.shape[2], 3 * heads)
    if not (rest == 0 and C % 2 == 0):
        refuse("qkv's width", f"3 · {heads} heads · an even C", first.shape[2])
    if len(scales) != 2 * len(qkv):
        refuse("scales", "a q and a k scale per stream", len(scales))
    for scale in scales:
        if scale.shape != (C,):
            refuse("scales", f"[{C}] each", tuple(scale.shape))
        if scale.stride(0) != 1:
            refuse("scales' stride", "1", scale.stride(0))
    B, T = streams.joint_shape[:2]
    for name, table in (("cos", cos), ("sin", sin)):
        shapes = ((1, T, 1, C // 2), (B, T, 1, C // 2))
        if tuple(table.shape) not in shapes:
            refuse(name, f"one of {shapes}", tuple(table.shape))
        check_dtype(name, table, (torch.float32,))
        if table.stride(3) != 1:
            refuse(f"{name}'s last stride", "1", table.stride(3))
    if cos.stride() != sin.stride():
        refuse("sin's strides", f"cos's {cos.stride()}", sin.stride())


def _check_launch(streams: Streams) -> None:
    C = streams.joint_shape[3]
    check_dtype("qkv", streams.qkv[0])
    if C not in WIDTHS:
        refuse("the head width", f"one of {WIDTHS}", C)


# ---------------------------------------------------------------- the op


@torch.library.custom_op("fluxfast::qk_norm_rope_attention", mutates_args=())
def _op(
    qkv: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    joint = qk_norm_rope_forward(Streams(qkv, scales, cos, sin, heads))
    q, k, v = (x.transpose(1, 2) for x in joint)
    o, lse = attention_forward(q, k, v)
    return o.transpose(1, 2).flatten(2), lse


@_op.register_fake
def _(qkv, scales, cos, sin, heads):
    B, _, width = qkv[0].shape
    T = sum(x.shape[1] for x in qkv)
    lse_dtype = torch.promote_types(qkv[0].dtype, torch.float32)
    return qkv[0].new_empty(B, T, width // 3), qkv[0].new_empty(B, heads, T, dtype=lse_dtype)


@torch.library.custom_op("fluxfast::qk_norm_rope_attention_backward", mutates_args=())
def _backward_op(
    do: Tensor,
    qkv: list[Tensor],
    scales: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    heads: int,
    o: Tensor,
    lse: Tensor,
) -> list[Tensor]:
    if do.shape != o.shape:
        refuse("do", f"like o {tuple(o.shape)}", tuple(do.shape))
    streams = Streams(qkv, scales, cos, sin, heads)
    q, k, v = (x.transpose(1, 2) for x in qk_norm_rope_forward(streams))
    do, o = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (do, o))
    grads = attention_backward(do, q, k, v, o, lse)
    return qk_norm_rope_backward(QKV(*(grad.transpose(1, 2) for grad in grads)), streams)


@_backward_op.register_fake
def _(do, qkv, scales, cos, sin, heads, o, lse):
    return [x.new_empty(x.shape) for x in qkv]


def _setup_context(ctx, inputs, output) -> None:
    qkv, *ctx.rest = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for lse's gradient


def _backward(ctx, do, _):
    *qkv, o, lse = ctx.saved_tensors
    if do is None:
        return [None] * len(qkv), [None] * len(ctx.rest[0]), None, None, None
    dqkv = _backward_op(do, qkv, *ctx.rest, o, lse)
    return dqkv, [None] * len(ctx.rest[0]), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def qk_norm_rope_attention(
    qkv: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """FLUX's attention over one or two streams, differentiable once with respect to qkv.

    qkv: one or two [B, T_i, 3·H·C] (text first), last stride 1, fp32, bf16 or fp16; scales:
    [q_scale, k_scale] per stream, one list, each [C]; cos, sin fp32 [B or 1, ΣT_i, 1, C/2];
    heads: H. Returns o [B, ΣT_i, H·C]. Raises ValueError for a wrong shape, dtype or stride.
    Source: Black Forest Labs' flux/math.py and flux/modules/layers.py.
    """
    _check(Streams(qkv, scales, cos, sin, heads))
    return _op(qkv, scales, cos, sin, heads)[0]


# ---------------------------------------------------------------- references


def _normed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x / rms and 1 / rms of x [B, T, H, C], new tensors in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_()
    rstd = mean.div_(x.shape[-1]).add_(EPSILON).rsqrt_()
    return torch.mul(x, rstd), rstd


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs of x in place: (x[2i] + i·x[2i+1]) · (cos + i·sin)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    pairs.mul_(torch.complex(cos.to(x.dtype), sin.to(x.dtype)))
    return x


def qk_norm_rope_reference(
    qkv: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> QKV:
    """`qk_norm_rope_forward` in plain torch, any floating dtype, rounded once, without autograd."""
    streams = Streams(qkv, scales, cos, sin, heads)
    joint = _empty_joint(streams)
    for x, q_scale, k_scale, cos_at, sin_at, at in streams.each():
        q, k, v = _split(x, heads)
        joint.q[:, at] = _rotate_(_normed(q)[0].mul_(q_scale), cos_at, sin_at)
        joint.k[:, at] = _rotate_(_normed(k)[0].mul_(k_scale), cos_at, sin_at)
        if len(qkv) > 1:
            joint.v[:, at] = v
    return joint


def qk_norm_rope_backward_reference(grads: QKV, streams: Streams) -> list[Tensor]:
    """`qk_norm_rope_backward` in plain torch, any floating dtype, rounded once."""
    dqkv = [x.new_empty(x.shape) for x in streams.qkv]
    for dx, (x, q_scale, k_scale, cos, sin, at) in zip(dqkv, streams.each(), strict=True):
        q, k, _ = _split(x, streams.heads)
        dq, dk, dv = _split(dx, streams.heads)
        for part, d_part, grad, scale in ((q, dq, grads.q, q_scale), (k, dk, grads.k, k_scale)):
            normed, rstd = _normed(part)
            g = grad[:, at].to(normed.dtype, copy=True)
            _rotate_(g, cos, -sin).mul_(scale)
            mean = torch.linalg.vecdot(g, normed)[..., None].div_(normed.shape[-1])
            d_part.copy_(g.addcmul_(normed, mean, value=-1).mul_(rstd))
        dv.copy_(grads.v[:, at])
    return dqkv


def qk_norm_rope_attention_reference(
    qkv: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """The op's forward in plain torch with the scores in memory, without autograd."""
    q, k, v = (x.transpose(1, 2) for x in qk_norm_rope_reference(qkv, scales, cos, sin, heads))
    return attention_reference(q, k, v)[0].transpose(1, 2).flatten(2)
