"""Flash attention in Triton, forward and backward: no mask, no dropout, any T.

    S = q kᵀ / √C, P = softmax(S), o = P v, lse = log Σ exp(S) per query
    dv = Pᵀ do, dS = P ∘ (do vᵀ − delta), delta = Σ_c do ∘ o, dq = dS k / √C, dk = dSᵀ q / √C

Layouts: q, k, v, o and their gradients are logically [B, H, T, C], stored [B, T, H, C] (batch,
head and token strides free, the last one 1); lse and delta fp32 [B, H, T], contiguous. C is 32, 64
or 128; fp32, bf16 or fp16. Products are accumulated in fp32; P and dS are rounded to the inputs'
dtype before they are multiplied again, fp32 inputs are multiplied as IEEE fp32.

One loop, masked where T is not a multiple of its step: with the last, masked step peeled off as a
second path, ptxas spilled 1 KB a thread for dk and dv at C=128 on sm_89 (0 as it is).

Deterministic: no atomics. `_dq_kernel` owns a block of queries and writes delta beside dq;
`_dkdv_kernel` owns a block of keys and reads it.

Bytes moved, e bytes an element: forward 4·B·T·H·C·e + 4·B·H·T; backward 12·B·T·H·C·e + 16·B·H·T,
where keys and values (forward, dq) or queries and do (dk, dv) that every program of a head reads
count once. FLOP: forward 4·B·H·T²·C, backward 14·B·H·T²·C (P is rebuilt in both kernels).

Sources: FlashAttention-2 (arXiv 2307.08691); Triton's tutorial 06 for the loop over transposed
scores. Tiles are rows of `dispatch/configs/attention.json`.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from fluxfast_kernels.dispatch.backend import check, check_dtype, tl, triton
from fluxfast_kernels.dispatch.dispatch import ARCHITECTURES, arch_of

WIDTHS = (32, 64, 128)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Tile:
    """block_m queries by block_n keys a step; qk_norm_rope: block_m heads of tokens a program."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@cache
def table() -> dict[str, list[dict]]:
    """`dispatch/configs/attention.json`: {"backends": rows, "tiles": rows}; the first match counts.

    A row's arch, dtype ("half" or "fp32"), c and kernel list what it is for (null or absent: any);
    t_min and t_max, if there, are the shortest and the longest T.
    """
    return json.loads(
        (files("fluxfast_kernels.dispatch") / "configs" / "attention.json").read_text()
    )


def first_row(kind: str, T: int = 0, **wanted) -> dict:
    """The first row of `kind` whose lists hold every wanted value and whose limits hold T."""
    for row in table()[kind]:
        matches = (row.get(key) is None or value in row[key] for key, value in wanted.items())
        if row.get("t_min", T) <= T <= row.get("t_max", T) and all(matches):
            return row
    raise ValueError(f"configs/attention.json has no {kind} row for {wanted}")


@cache
def tile(kernel: str, arch: int, dtype: torch.dtype, C: int) -> Tile:
    """kernel: "forward", "dq", "dkdv" or "qk_norm_rope"; arch 0 is the interpreter."""
    kind = "fp32" if dtype == torch.float32 else "half"
    row = first_row("tiles", kernel=kernel, arch=arch, dtype=kind, c=C)
    return Tile(**{name: row[name] for name in Tile.__dataclass_fields__})


def shipped_to(kernel: str, dtype: torch.dtype, C: int) -> dict[Tile, tuple[int, ...]]:
    """Every tile that the rows give `kernel` -> the cards where they do."""
    found: dict[Tile, tuple[int, ...]] = {}
    for arch in ARCHITECTURES:
        chosen = tile(kernel, arch, dtype, C)
        found[chosen] = (*found.get(chosen, ()), arch)
    return found


@triton.jit
def _tile_at(base, rows, columns, stride, left, MASKED: tl.constexpr):
    """base[rows, columns], zero past `left` rows. Give `columns` first to load the transpose."""
    if MASKED:
        return tl.load(base + rows * stride + columns, mask=rows < left, other=0.0)
    return tl.load(base + rows * stride + columns)


@triton.jit
def _forward_step(
    acc, top, total, q, k, v, left, scale, stride_k, stride_v,
    C: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys. top, total: running maximum and sum of exp2, scores in units of log 2."""
    n, c = tl.arange(0, BLOCK_N), tl.arange(0, C)
    k_t = _tile_at(k, n[None, :], c[:, None], stride_k, left, MASKED)
    s = tl.dot(q, k_t, input_precision=PRECISION) * scale
    if MASKED:
        s = tl.where(n[None, :] < left, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc *= shrink[:, None]
    v_n = _tile_at(v, n[:, None], c[None, :], stride_v, left, MASKED)
    acc = tl.dot(p.to(v_n.dtype), v_n, acc, input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def _forward_kernel(
    q, k, v, o, lse, scale, H, T,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (⌈T/BLOCK_M⌉, B·H): a block of queries against every key."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    start = tl.program_id(0) * BLOCK_M
    m, c = tl.arange(0, BLOCK_M), tl.arange(0, C)
    q += b * q_b + h * q_h + start.to(tl.int64) * q_t
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    o += b * o_b + h * o_h + start.to(tl.int64) * o_t
    inside = m < T - start

    q_m = _tile_at(q, m[:, None], c[None, :], q_t, T - start, True)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    scale *= LOG2_E
    for i in range(0, tl.cdiv(T, BLOCK_N)):
        acc, top, total = _forward_step(
            acc,
            top,
            total,
            q_m,
            k,
            v,
            T - i * BLOCK_N,
            scale,
            k_t,
            v_t,
            C,
            BLOCK_N,
            TAIL,
            PRECISION,
        )
        k += BLOCK_N * k_t
        v += BLOCK_N * v_t
    acc /= total[:, None]
    tl.store(o + m[:, None] * o_t + c[None, :], acc.to(o.dtype.element_ty), mask=inside[:, None])
    at = tl.program_id(1).to(tl.int64) * T + start + m
    tl.store(lse + at, (top + tl.log2(total)) * LN_2, mask=inside)


@triton.jit
def _dq_step(
    dq, q, do, lse, delta, k, v, left, scale, stride_k, stride_v,
    C: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys. lse and scale in units of log 2."""
    n, c = tl.arange(0, BLOCK_N), tl.arange(0, C)
    k_n = _tile_at(k, n[:, None], c[None, :], stride_k, left, MASKED)
    v_n = _tile_at(v, n[:, None], c[None, :], stride_v, left, MASKED)
    s = tl.dot(q, tl.trans(k_n), input_precision=PRECISION)
    p = tl.exp2(s * scale - lse[:, None])
    if MASKED:  # past the last key p may be infinite
        p = tl.where(n[None, :] < left, p, 0.0)
    dp = tl.dot(do, tl.trans(v_n), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k_n.dtype), k_n, dq, input_precision=PRECISION)


@triton.jit
def _dq_kernel(
    q, k, v, o, do, lse, dq, delta, scale, H, T,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    do_b, do_h, do_t, dq_b, dq_h, dq_t,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (⌈T/BLOCK_M⌉, B·H): dq and delta of a block of queries."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    start = tl.program_id(0) * BLOCK_M
    first = start.to(tl.int64)
    m, c = tl.arange(0, BLOCK_M), tl.arange(0, C)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    left = T - start
    at = tl.program_id(1).to(tl.int64) * T + start + m

    rows, columns = m[:, None], c[None, :]
    q_m = _tile_at(q + b * q_b + h * q_h + first * q_t, rows, columns, q_t, left, True)
    o_m = _tile_at(o + b * o_b + h * o_h + first * o_t, rows, columns, o_t, left, True)
    do_m = _tile_at(do + b * do_b + h * do_h + first * do_t, rows, columns, do_t, left, True)
    delta_m = tl.sum(o_m.to(tl.float32) * do_m.to(tl.float32), 1)
    tl.store(delta + at, delta_m, mask=m < left)
    lse_m = tl.load(lse + at, mask=m < left, other=0.0) * LOG2_E

    acc = tl.zeros([BLOCK_M, C], tl.float32)
    for i in range(0, tl.cdiv(T, BLOCK_N)):
        acc = _dq_step(
            acc, q_m, do_m, lse_m, delta_m, k, v, T - i * BLOCK_N, scale * LOG2_E, k_t, v_t,
            C, BLOCK_N, TAIL, PRECISION,
        )  # fmt: skip
        k += BLOCK_N * k_t
        v += BLOCK_N * v_t
    dq += b * dq_b + h * dq_h + first * dq_t
    acc = (acc * scale).to(dq.dtype.element_ty)
    tl.store(dq + rows * dq_t + columns, acc, mask=rows < left)


@triton.jit
def _dkdv_step(
    dk, dv, k, v, q, do, lse, delta, left, scale, stride_q, stride_do,
    C: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries, scores transposed. Past the last query do, delta and ds are 0."""
    m, c = tl.arange(0, BLOCK_M), tl.arange(0, C)
    q_m = _tile_at(q, m[:, None], c[None, :], stride_q, left, MASKED)
    lse_m = _tile_at(lse, m, 0, 1, left, MASKED) * LOG2_E
    s_t = tl.dot(k, tl.trans(q_m), input_precision=PRECISION)
    p_t = tl.exp2(s_t * scale - lse_m[None, :])
    do_m = _tile_at(do, m[:, None], c[None, :], stride_do, left, MASKED)
    dv = tl.dot(p_t.to(do_m.dtype), do_m, dv, input_precision=PRECISION)
    dp_t = tl.dot(v, tl.trans(do_m), input_precision=PRECISION)
    ds_t = p_t * (dp_t - _tile_at(delta, m, 0, 1, left, MASKED)[None, :])
    dk = tl.dot(ds_t.to(q_m.dtype), q_m, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, scale, H, T,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (⌈T/BLOCK_N⌉, B·H): dk and dv of a block of keys."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N
    first, left = start.to(tl.int64), T - start
    rows, columns = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, C)[None, :]
    k_n = _tile_at(k + b * k_b + h * k_h + first * k_t, rows, columns, k_t, left, True)
    v_n = _tile_at(v + b * v_b + h * v_h + first * v_t, rows, columns, v_t, left, True)
    q += b * q_b + h * q_h
    do += b * do_b + h * do_h
    lse += tl.program_id(1).to(tl.int64) * T
    delta += tl.program_id(1).to(tl.int64) * T

    dk_n = tl.zeros([BLOCK_N, C], tl.float32)
    dv_n = tl.zeros([BLOCK_N, C], tl.float32)
    for i in range(0, tl.cdiv(T, BLOCK_M)):
        dk_n, dv_n = _dkdv_step(
            dk_n, dv_n, k_n, v_n, q, do, lse, delta, T - i * BLOCK_M, scale * LOG2_E, q_t, do_t,
            C, BLOCK_M, TAIL, PRECISION,
        )  # fmt: skip
        q += BLOCK_M * q_t
        do += BLOCK_M * do_t
        lse += BLOCK_M
        delta += BLOCK_M
    dk += b * dk_b + h * dk_h + first * dk_t
    dv += b * dv_b + h * dv_h + first * dv_t
    dk_n = (dk_n * scale).to(dk.dtype.element_ty)
    tl.store(dk + rows * dk_t + columns, dk_n, mask=rows < left)
    tl.store(dv + rows * dv_t + columns, dv_n.to(dv.dtype.element_ty), mask=rows < left)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _constants(kernel: str, q: Tensor, given: Tile | None) -> dict[str, object]:
    chosen = given or tile(kernel, arch_of(q.device), q.dtype, q.shape[3])
    step = chosen.block_m if kernel == "dkdv" else chosen.block_n
    return {
        "C": q.shape[3],
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "TAIL": q.shape[2] % step != 0,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }


def _check_heads(q: Tensor) -> None:
    check_dtype("q", q)
    check(q.shape[3] in WIDTHS, "q's head width", f"one of {WIDTHS} (Triton)", q.shape[3])
    check(q.shape[0] * q.shape[1] < 65536, "q's B·H", "below 65536", q.shape[0] * q.shape[1])


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, given: Tile | None = None
) -> None:
    """Writes o [B, H, T, C] (last stride 1) and lse [B, H, T] (contiguous). given: a tile other
    than the table's."""
    _check_heads(q)
    B, H, T, C = q.shape
    meta = _constants("forward", q, given)
    _forward_kernel[(triton.cdiv(T, meta["BLOCK_M"]), B * H)](
        q, k, v, o, lse, C**-0.5, H, T, *_strides(q, k, v, o), **meta
    )


def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, delta: Tensor,
) -> None:  # fmt: skip
    """Writes dq, dk, dv [B, H, T, C] (last stride 1) and delta [B, H, T] (contiguous)."""
    launch_dq(do, q, k, v, o, lse, dq, delta)
    launch_dkdv(do, q, k, v, lse, delta, dk, dv)


def launch_dq(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    dq: Tensor, delta: Tensor, given: Tile | None = None,
) -> None:  # fmt: skip
    """Writes dq and delta."""
    _check_heads(q)
    B, H, T, C = q.shape
    meta = _constants("dq", q, given)
    _dq_kernel[(triton.cdiv(T, meta["BLOCK_M"]), B * H)](
        q, k, v, o, do, lse, dq, delta, C**-0.5, H, T, *_strides(q, k, v, o, do, dq), **meta
    )


def launch_dkdv(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
    dk: Tensor, dv: Tensor, given: Tile | None = None,
) -> None:  # fmt: skip
    """Reads delta, writes dk and dv."""
    _check_heads(q)
    B, H, T, C = q.shape
    meta = _constants("dkdv", q, given)
    _dkdv_kernel[(triton.cdiv(T, meta["BLOCK_N"]), B * H)](
        q, k, v, do, lse, delta, dk, dv, C**-0.5, H, T, *_strides(q, k, v, do, dk, dv), **meta
    )


KERNELS = {"forward": _forward_kernel, "dq": _dq_kernel, "dkdv": _dkdv_kernel}
