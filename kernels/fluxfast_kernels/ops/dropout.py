"""LoRA dropout:  out = m · x, or onto a gradient  out += m · x;   m = 0 or 1/(1 − p)

m is a pure function of (key, global sample index, position in the sample), so that backward draws
it again and nothing is saved: 32 bits of Philox 4x32-10 for each element, word e % 4 of the counter
(e // 4, 0, index's low word, index's high word) for element e of a sample. It is 0 where the 23
high bits, as a number in (0, 1), are less than p; else 1/(1 − p), rounded to x's dtype.

Layouts: x and out [B, ..., K] in one dtype (fp32, bf16 or fp16), of last stride 1 and at most three
dimensions; the other strides are free. indices int64 [B] on x's device: what they hold is read when
the kernel runs, so that a CUDA graph draws the masks of its current batch. K is a multiple of 4.

Bytes, in elements: reads and writes B·T·K, onto a gradient reads it too. About 25 integer
instructions an element.

Refused with ValueError: other shapes, dtypes and strides.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11); the constants are
Random123's, and Triton's.
"""

import math
from functools import cache

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import check, kernel, matrix, tl, triton

BLOCK = 2048  # elements of a row that a program draws, 16 for each of its threads

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


# ---------------------------------------------------------------- kernel


@kernel
def _dropout_kernel(
    x,
    out,
    indices_ptr,
    key,
    threshold,
    scale,
    T,
    K,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B·T, ⌈K/BLOCK⌉)."""
    row = tl.program_id(0)
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)
    quad = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    index = tl.load(indices_ptr + b)
    counter = (t * (K // 4) + quad).to(tl.uint32)
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    words = tl.philox(key.to(tl.int64), counter, counter * 0, counter * 0 + low, counter * 0 + high)
    even, odd = tl.interleave(words[0], words[2]), tl.interleave(words[1], words[3])
    kept = (tl.interleave(even, odd) >> 9).to(tl.int32) >= threshold
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    x_ptrs = x.ptr + b * x.batch_stride + t * x.token_stride + k
    out_ptrs = out.ptr + b * out.batch_stride + t * out.token_stride + k
    y = tl.load(x_ptrs, inside, other=0.0).to(tl.float32) * tl.where(kept, scale, 0.0)
    if ADD:
        y += tl.load(out_ptrs, inside, other=0.0).to(tl.float32)
    tl.store(out_ptrs, y.to(out.ptr.dtype.element_ty), inside)


# ---------------------------------------------------------------- launcher


def launch(x: Tensor, indices: Tensor, key: int, p: float, add: bool, out: Tensor) -> None:
    """Overwrites out, or adds to it."""
    x, out = (each[:, None] if each.ndim == 2 else each for each in (x, out))
    B, T, K = x.shape
    check(K % 4 == 0, "x", "[B, ..., K] with K a multiple of 4", K)
    grid = (B * T, triton.cdiv(K, BLOCK))
    arguments = (matrix(x), matrix(out), indices, key, *_constants(p, x.dtype), T, K)
    _dropout_kernel[grid](*arguments, ADD=add, BLOCK=BLOCK, num_warps=4)


@cache
def _constants(p: float, dtype: torch.dtype) -> tuple[int, float]:
    """Returns the least of the 23 bits with u = (bits + 0.5)/2²³ ≥ p, exact in fp32, and 1/(1 − p)
    in `dtype`."""
    threshold = math.ceil(torch.tensor(p, dtype=torch.float32).item() * 2**23 - 0.5)
    return threshold, (torch.ones((), dtype=dtype) / (1 - p)).item()


# ---------------------------------------------------------------- the op


@torch.library.custom_op("fluxfast::dropout", mutates_args=("out",))
def _dropout(x: Tensor, indices: Tensor, key: int, p: float, add: bool, out: Tensor) -> None:
    if backend.launches(x):
        launch(x, indices, key, p, add, out)
    elif add:
        out.addcmul_(x, _mask(x, indices, key, p))
    else:
        torch.mul(x, _mask(x, indices, key, p), out=out)


@_dropout.register_fake
def _(x, indices, key, p, add, out):
    return None


def dropout(x: Tensor, indices: Tensor, key: int, p: float, add_to: Tensor | None = None) -> Tensor:
    """Returns m · x [B, ..., K], contiguous; or adds it to `add_to`, in place, and returns that.

    x in one of fp32, bf16 and fp16; indices int64 [B]; key: 64 bits, signed; p in [0, 1). Has no
    gradient of its own: that of x is `dropout` of the output's. Raises ValueError naming the
    argument.
    """
    backend.check_dtype("x", x)
    check(x.ndim in (2, 3), "x", "[B, K] or [B, T, K]", tuple(x.shape))
    given = f"{indices.dtype} {tuple(indices.shape)} on {indices.device}"
    fits = indices.dtype == torch.int64 and indices.shape == x.shape[:1]
    check(fits and indices.device == x.device, "indices", f"int64 {[len(x)]} on {x.device}", given)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if add_to is None else add_to
    check(out.shape == x.shape, "add_to", f"of x's shape {tuple(x.shape)}", tuple(out.shape))
    backend.check_alike({"x": x, "add_to": out}, x)
    _dropout(x, indices, key, p, add_to is not None, out)
    return out


# ---------------------------------------------------------------- in plain torch


def random_words(key: int, indices: Tensor, count: int) -> Tensor:
    """Returns int64 [len(indices), count] of 32 random bits each, on the device of `indices`."""
    blocks = (count + 3) // 4
    position = torch.arange(blocks, device=indices.device, dtype=torch.int64)[None, :]
    index = indices.to(torch.int64)[:, None]
    zero = torch.zeros_like(position + index)
    counter = position + zero, zero, (index & _MASK) + zero, ((index >> 32) & _MASK) + zero
    words = philox(counter, (key & _MASK, (key >> 32) & _MASK))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Returns Philox 4x32-10 of a counter. Both are four int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64; the shift is arithmetic, the mask removes its sign bits
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return [c0, c1, c2, c3]


def _mask(x: Tensor, indices: Tensor, key: int, p: float) -> Tensor:
    words = random_words(key, indices, math.prod(x.shape[1:]))
    u = ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return (u >= p).view(x.shape).to(x.dtype) / (1 - p)


def dropout_reference(
    x: Tensor, indices: Tensor, key: int, p: float, add_to: Tensor | None = None
) -> Tensor:
    """`dropout` in plain torch, out of place and differentiable in x."""
    mask = _mask(x, indices, key, p)
    return x * mask if add_to is None else torch.addcmul(add_to, x, mask)
