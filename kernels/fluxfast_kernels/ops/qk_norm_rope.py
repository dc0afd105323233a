"""QK-RMSNorm, rotary embedding and joint attention, from the streams' qkv to the joint output.

    x̂ = x / √(mean_C x² + 1e-6) · scale          for q and k, per token and head
    y[2i], y[2i+1] = x̂[2i]·cos_i − x̂[2i+1]·sin_i, x̂[2i]·sin_i + x̂[2i+1]·cos_i
    o = softmax(q kᵀ / √C) v                     over all streams' tokens, in their order

Layouts: qkv is one tensor (single block) or two (double block, text first), each [B, T_i, 3·H·C]
with q, k and v side by side, last stride 1, other strides free. q, k and v are written straight to
their place in one joint [B, T, H, C] buffer, T = Σ T_i: no `cat`. Of a single stream v is a view of
qkv. cos and sin are fp32 [B or 1, T, 1, C/2]. o is [B, T, H·C]. Norm and rotation are computed in
fp32 and rounded once (eager rounds in between).

`qk_norm_rope_attention` saves qkv as it came, o and lse (fp32 [B, H, T]); scales, cos and sin stay
with the graph as they are. Backward rebuilds q and k (and a joint v), runs attention's backward,
then un-rotates dq and dk and takes them through the norm. No gradient for scales, cos and sin.

Bytes moved by norm and rotation, e bytes an element and n = B·T·H·C: forward 4·n·e for one stream,
6·n·e for two; backward 8·n·e. FLOP about 12·n forward, 30·n backward; attention's are in
`attention.py`.

Refused (ValueError): other numbers of streams, widths that are not 3·heads·C, an odd C (kernels:
one that is not a power of two from 16 to 256), different dtypes, a last stride other than 1, cos or
sin of another shape or dtype.
"""

import torch
from torch import Tensor

from fluxfast_kernels.dispatch.backend import check, check_dtype, launches, tl, triton
from fluxfast_kernels.dispatch.dispatch import arch_of
from fluxfast_kernels.ops import attention_triton
from fluxfast_kernels.ops.attention import (
    attention_backward,
    attention_forward,
    attention_reference,
)

EPSILON = 1e-6
WIDTHS = (16, 32, 64, 128, 256)


@triton.jit
def _pairs(at, mask):
    """-> fp32 even and odd elements of the tile at `at` [rows, C], each [rows, C/2]."""
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _store_pairs(at, even, odd, mask):
    x = tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])
    tl.store(at, x.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _scale_pairs(scale, C: tl.constexpr):
    i = tl.arange(0, C // 2)
    even = tl.load(scale + 2 * i).to(tl.float32)
    return even[None, :], tl.load(scale + 2 * i + 1).to(tl.float32)[None, :]


@triton.jit
def _norm_rotate(source, target, scale, cos, sin, mask, C: tl.constexpr, EPSILON: tl.constexpr):
    even, odd = _pairs(source, mask)
    scale_even, scale_odd = _scale_pairs(scale, C)
    rstd = tl.rsqrt(tl.sum(even * even + odd * odd, 1) / C + EPSILON)[:, None]
    even, odd = even * rstd * scale_even, odd * rstd * scale_odd
    _store_pairs(target, even * cos - odd * sin, even * sin + odd * cos, mask)


@triton.jit
def _unrotate_norm(
    grad, source, target, scale, cos, sin, mask, C: tl.constexpr, EPSILON: tl.constexpr
):
    """dx = rstd · (g − x̂ · mean(g · x̂)), x̂ = x · rstd, g = scale · un-rotated grad."""
    even, odd = _pairs(source, mask)
    scale_even, scale_odd = _scale_pairs(scale, C)
    rstd = tl.rsqrt(tl.sum(even * even + odd * odd, 1) / C + EPSILON)[:, None]
    even, odd = even * rstd, odd * rstd
    d_even, d_odd = _pairs(grad, mask)
    g_even = (d_even * cos + d_odd * sin) * scale_even
    g_odd = (d_odd * cos - d_even * sin) * scale_odd
    mean = (tl.sum(g_even * even + g_odd * odd, 1) / C)[:, None]
    _store_pairs(target, rstd * (g_even - even * mean), rstd * (g_odd - odd * mean), mask)


@triton.jit
def _rows(T, H, ROWS: tl.constexpr):
    """-> token and head (int64) of this program's rows, and which of them exist."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return (row // H).to(tl.int64), (row % H).to(tl.int64), row < T * H


@triton.jit
def _rope(cos, sin, batch_stride, token_stride, token, inside, C: tl.constexpr):
    i = tl.arange(0, C // 2)
    at = tl.program_id(1).to(tl.int64) * batch_stride + token[:, None] * token_stride + i[None, :]
    mask = inside[:, None]
    return tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0)


@triton.jit
def _forward_kernel(
    qkv, q_scale, k_scale, cos, sin, q, k, v, T, H,
    qkv_b, qkv_t, rope_b, rope_t, joint_b,
    C: tl.constexpr, ROWS: tl.constexpr, EPSILON: tl.constexpr, COPY_V: tl.constexpr,
):  # fmt: skip
    """Grid (⌈T·H/ROWS⌉, B) of one stream; cos, sin, q, k and v begin at its first token."""
    token, head, inside = _rows(T, H, ROWS)
    cos_t, sin_t = _rope(cos, sin, rope_b, rope_t, token, inside, C)
    b, c = tl.program_id(1).to(tl.int64), tl.arange(0, C)[None, :]
    source = qkv + b * qkv_b + (token * qkv_t + head * C)[:, None] + c
    place = b * joint_b + ((token * H + head) * C)[:, None] + c
    mask = inside[:, None]
    _norm_rotate(source, q + place, q_scale, cos_t, sin_t, mask, C, EPSILON)
    _norm_rotate(source + H * C, k + place, k_scale, cos_t, sin_t, mask, C, EPSILON)
    if COPY_V:
        tl.store(v + place, tl.load(source + 2 * H * C, mask=mask), mask=mask)


@triton.jit
def _backward_kernel(
    dq, dk, dv, qkv, q_scale, k_scale, cos, sin, dqkv, T, H,
    dq_b, dq_t, dq_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h, qkv_b, qkv_t, rope_b, rope_t,
    C: tl.constexpr, ROWS: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Grid (⌈T·H/ROWS⌉, B) of one stream; dqkv [B, T, 3·H·C] has no gaps."""
    token, head, inside = _rows(T, H, ROWS)
    cos_t, sin_t = _rope(cos, sin, rope_b, rope_t, token, inside, C)
    b, c = tl.program_id(1).to(tl.int64), tl.arange(0, C)[None, :]
    source = qkv + b * qkv_b + (token * qkv_t + head * C)[:, None] + c
    target = dqkv + (((b * T + token) * 3 * H + head) * C)[:, None] + c
    mask = inside[:, None]
    grad = dq + b * dq_b + (token * dq_t + head * dq_h)[:, None] + c
    _unrotate_norm(grad, source, target, q_scale, cos_t, sin_t, mask, C, EPSILON)
    grad = dk + b * dk_b + (token * dk_t + head * dk_h)[:, None] + c
    source, target = source + H * C, target + H * C
    _unrotate_norm(grad, source, target, k_scale, cos_t, sin_t, mask, C, EPSILON)
    grad = dv + b * dv_b + (token * dv_t + head * dv_h)[:, None] + c
    tl.store(target + H * C, tl.load(grad, mask=mask), mask=mask)


def _rope_strides(cos: Tensor) -> tuple[int, int]:
    return cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)


def _grid(x: Tensor, heads: int, rows: int) -> tuple[int, int]:
    return triton.cdiv(x.shape[1] * heads, rows), x.shape[0]


def _constants(x: Tensor, C: int, given: attention_triton.Tile | None) -> dict[str, object]:
    chosen = given or attention_triton.tile("qk_norm_rope", arch_of(x.device), x.dtype, C)
    return {"C": C, "ROWS": chosen.block_m, "EPSILON": EPSILON, "num_warps": chosen.num_warps}


def _tokens(qkv: list[Tensor]):
    """-> (stream, slice of the joint tokens) for every stream."""
    end = 0
    for x in qkv:
        start, end = end, end + x.shape[1]
        yield x, slice(start, end)


def launch_forward(
    qkv: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, heads: int,
    q: Tensor, k: Tensor, v: Tensor | None, given: attention_triton.Tile | None = None,
) -> None:  # fmt: skip
    """Writes q, k [B, T, H, C] (no gaps) and, unless it is None, v alike. given: a tile other than
    the table's."""
    meta = _constants(q, q.shape[3], given)
    for i, (x, at) in enumerate(_tokens(qkv)):
        _forward_kernel[_grid(x, heads, meta["ROWS"])](
            x, scales[2 * i], scales[2 * i + 1], cos[:, at], sin[:, at],
            q[:, at], k[:, at], q if v is None else v[:, at], x.shape[1], heads,
            *x.stride()[:2], *_rope_strides(cos), q.stride(0),
            COPY_V=v is not None, **meta,
        )  # fmt: skip


def launch_backward(
    grads: tuple[Tensor, Tensor, Tensor], qkv: list[Tensor], scales: list[Tensor],
    cos: Tensor, sin: Tensor, heads: int, dqkv: list[Tensor],
    given: attention_triton.Tile | None = None,
) -> None:  # fmt: skip
    """grads: dq, dk, dv [B, T, H, C]. Writes dqkv, like qkv, without gaps."""
    meta = _constants(qkv[0], grads[0].shape[3], given)
    for i, (x, at) in enumerate(_tokens(qkv)):
        _backward_kernel[_grid(x, heads, meta["ROWS"])](
            *(grad[:, at] for grad in grads), x, scales[2 * i], scales[2 * i + 1],
            cos[:, at], sin[:, at], dqkv[i], x.shape[1], heads,
            *(stride for grad in grads for stride in grad.stride()[:3]),
            *x.stride()[:2], *_rope_strides(cos), **meta,
        )  # fmt: skip


def qk_norm_rope_forward(
    qkv: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> q and k normalised and rotated, and v, each [B, T, H, C]; one stream's v is a view of it.
    No autograd.
    """
    _check(qkv, scales, cos, sin, heads)
    if not launches(qkv[0]):
        return qk_norm_rope_reference(qkv, scales, cos, sin, heads)
    _check_launch(qkv, heads)
    q, k, v = _joint(qkv, heads)
    launch_forward(qkv, scales, cos, sin, heads, q, k, v if len(qkv) > 1 else None)
    return q, k, v


def qk_norm_rope_backward(
    grads: tuple[Tensor, Tensor, Tensor], qkv: list[Tensor], scales: list[Tensor],
    cos: Tensor, sin: Tensor, heads: int,
) -> list[Tensor]:  # fmt: skip
    """grads: dq, dk, dv [B, T, H, C], last stride 1 -> fresh dqkv per stream, without gaps."""
    _check(qkv, scales, cos, sin, heads)
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        check(grad.stride(3) == 1, f"{name}'s last stride", "1", grad.stride(3))
    if not launches(qkv[0]):
        return qk_norm_rope_backward_reference(grads, qkv, scales, cos, sin, heads)
    _check_launch(qkv, heads)
    dqkv = [x.new_empty(x.shape) for x in qkv]
    launch_backward(grads, qkv, scales, cos, sin, heads, dqkv)
    return dqkv


def _joint(qkv: list[Tensor], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty q, k and v [B, T, H, C]; one stream's v is its view and needs no filling."""
    B, T, C = qkv[0].shape[0], sum(x.shape[1] for x in qkv), qkv[0].shape[2] // (3 * heads)
    q, k = (qkv[0].new_empty(B, T, heads, C) for _ in range(2))
    return q, k, _parts(qkv[0], heads)[2] if len(qkv) == 1 else torch.empty_like(q)


def _parts(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """x [B, T, 3·H·C] -> views q, k and v, each [B, T, H, C]."""
    return x.unflatten(-1, (3, heads, -1)).unbind(2)


def _check(qkv: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, heads: int) -> None:
    check(len(qkv) in (1, 2), "qkv", "one or two streams", len(qkv))
    first = qkv[0]
    for x in qkv:
        check(x.dim() == 3, "qkv", "[B, T, 3·H·C]", tuple(x.shape))
        same = x.shape[0] == first.shape[0] and x.shape[2] == first.shape[2]
        check(same, "qkv", f"of one batch size and width, {tuple(first.shape)}", tuple(x.shape))
        check(x.dtype == first.dtype, "qkv", f"of one dtype, {first.dtype}", x.dtype)
        check(x.stride(2) == 1, "qkv's last stride", "1", x.stride(2))
    check(sum(x.shape[1] for x in qkv) > 0, "qkv", "of at least one token", tuple(first.shape))
    C, rest = divmod(first.shape[2], 3 * heads)
    check(rest == 0 and C % 2 == 0, "qkv's width", f"3 · {heads} heads · an even C", first.shape[2])
    check(len(scales) == 2 * len(qkv), "scales", "a q and a k scale per stream", len(scales))
    for scale in scales:
        check(scale.shape == (C,), "scales", f"[{C}] each", tuple(scale.shape))
        check(scale.stride(0) == 1, "scales' stride", "1", scale.stride(0))
    B, T = first.shape[0], sum(x.shape[1] for x in qkv)
    for name, table in (("cos", cos), ("sin", sin)):
        shapes = ((1, T, 1, C // 2), (B, T, 1, C // 2))
        check(tuple(table.shape) in shapes, name, f"one of {shapes}", tuple(table.shape))
        check_dtype(name, table, (torch.float32,))
        check(table.stride(3) == 1, f"{name}'s last stride", "1", table.stride(3))
    check(cos.stride() == sin.stride(), "sin's strides", f"cos's {cos.stride()}", sin.stride())


def _check_launch(qkv: list[Tensor], heads: int) -> None:
    C = qkv[0].shape[2] // (3 * heads)
    check_dtype("qkv", qkv[0])
    check(C in WIDTHS, "the head width", f"one of {WIDTHS}", C)


@torch.library.custom_op("fluxfast::qk_norm_rope_attention", mutates_args=())
def _op(
    qkv: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    q, k, v = qk_norm_rope_forward(qkv, scales, cos, sin, heads)
    o, lse = attention_forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return o.transpose(1, 2).flatten(2), lse


@_op.register_fake
def _(qkv, scales, cos, sin, heads):
    B, _, width = qkv[0].shape
    T = sum(x.shape[1] for x in qkv)
    kind = torch.float64 if qkv[0].dtype == torch.float64 else torch.float32
    return qkv[0].new_empty(B, T, width // 3), qkv[0].new_empty(B, heads, T, dtype=kind)


@torch.library.custom_op("fluxfast::qk_norm_rope_attention_backward", mutates_args=())
def _backward_op(
    do: Tensor, qkv: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, heads: int,
    o: Tensor, lse: Tensor,
) -> list[Tensor]:  # fmt: skip
    check(do.shape == o.shape, "do", f"like o {tuple(o.shape)}", tuple(do.shape))
    q, k, v = (x.transpose(1, 2) for x in qk_norm_rope_forward(qkv, scales, cos, sin, heads))
    do, o = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (do, o))
    grads = attention_backward(do, q, k, v, o, lse)
    grads = tuple(grad.transpose(1, 2) for grad in grads)
    return qk_norm_rope_backward(grads, qkv, scales, cos, sin, heads)


@_backward_op.register_fake
def _(do, qkv, scales, cos, sin, heads, o, lse):
    return [x.new_empty(x.shape) for x in qkv]


def _save(ctx, inputs, output):
    qkv, ctx.scales, ctx.cos, ctx.sin, ctx.heads = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _grads(ctx, do, _):
    *qkv, o, lse = ctx.saved_tensors
    dqkv = _backward_op(do, qkv, ctx.scales, ctx.cos, ctx.sin, ctx.heads, o, lse)
    return dqkv, [None] * len(ctx.scales), None, None, None


_op.register_autograd(_grads, setup_context=_save)


def qk_norm_rope_attention(
    qkv: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """FLUX's attention over one or two streams, differentiable once with respect to qkv.

    qkv: one or two [B, T_i, 3·H·C] (text first), last stride 1, fp32, bf16 or fp16; scales:
    [q_scale, k_scale] per stream, one list, each [C]; cos, sin fp32 [B or 1, ΣT_i, 1, C/2];
    heads: H. -> o [B, ΣT_i, H·C]. Raises ValueError for a wrong shape, dtype or stride.
    Source: Black Forest Labs' flux/math.py and flux/modules/layers.py.
    """
    _check(qkv, scales, cos, sin, heads)
    return _op(qkv, scales, cos, sin, heads)[0]


def _normed(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, T, H, C] -> x / rms and 1 / rms, fp32 (fp64 for fp64), fresh."""
    kind = torch.promote_types(x.dtype, torch.float32)
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=kind).square_()
    rstd = mean.div_(x.shape[-1]).add_(EPSILON).rsqrt_()
    return torch.mul(x, rstd), rstd


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs of x in place: (x[2i] + i·x[2i+1]) · (cos + i·sin)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    pairs.mul_(torch.complex(cos.to(x.dtype), sin.to(x.dtype)))
    return x


def qk_norm_rope_reference(
    qkv: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope_forward` in plain torch, any floating dtype, rounded once. No autograd."""
    q, k, v = _joint(qkv, heads)
    for i, (x, at) in enumerate(_tokens(qkv)):
        parts = _parts(x, heads)
        for part, joint, scale in zip(parts[:2], (q, k), scales[2 * i : 2 * i + 2], strict=True):
            joint[:, at] = _rotate_(_normed(part)[0].mul_(scale), cos[:, at], sin[:, at])
        if len(qkv) > 1:
            v[:, at] = parts[2]
    return q, k, v


def qk_norm_rope_backward_reference(
    grads: tuple[Tensor, Tensor, Tensor], qkv: list[Tensor], scales: list[Tensor],
    cos: Tensor, sin: Tensor, heads: int,
) -> list[Tensor]:  # fmt: skip
    """`qk_norm_rope_backward` in plain torch, any floating dtype, rounded once."""
    dqkv = [x.new_empty(x.shape) for x in qkv]
    for i, (x, at) in enumerate(_tokens(qkv)):
        targets = _parts(dqkv[i], heads)
        for part, target, grad, scale in zip(
            _parts(x, heads)[:2], targets[:2], grads[:2], scales[2 * i : 2 * i + 2], strict=True
        ):
            normed, rstd = _normed(part)
            g = grad[:, at].to(normed.dtype, copy=True)
            _rotate_(g, cos[:, at], -sin[:, at]).mul_(scale)
            mean = torch.linalg.vecdot(g, normed)[..., None].div_(normed.shape[-1])
            target.copy_(g.addcmul_(normed, mean, value=-1).mul_(rstd))
        targets[2].copy_(grads[2][:, at])
    return dqkv


def qk_norm_rope_attention_reference(
    qkv: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """The op's forward in plain torch with the scores in memory. No autograd."""
    q, k, v = (x.transpose(1, 2) for x in qk_norm_rope_reference(qkv, scales, cos, sin, heads))
    return attention_reference(q, k, v)[0].transpose(1, 2).flatten(2)
