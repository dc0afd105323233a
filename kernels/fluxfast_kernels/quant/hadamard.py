"""The Hadamard rotation that spreads a channel's outliers over its neighbors before quantization.

    x' = x·H,   H = blockdiag(H_b, …, H_b),   H_b = [[H_{b/2}, H_{b/2}], [H_{b/2}, −H_{b/2}]] / √2

over blocks of b columns, b a power of two up to 256 that divides the width. H is symmetric and its
own inverse, so x Wᵀ = (x H)(W H)ᵀ: a weight is rotated once, when it is quantized, its input each
time it is quantized; dx = (dy W H) H.

Computed as log2(b) stages of sums and differences in fp32, in the same order everywhere, so that
kernel and reference give the same bits. FLOP: log2(b) + 1 a value. Bytes, where it is a pass of its
own (dx of a rotated layer): reads and writes x.

Refused with ValueError: a width that is not a multiple of b, b not a power of two from 2 to 256.
Source: QuaRot (arXiv 2404.00456), whose online Hadamard this is, in blocks.
"""

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import check, kernel, tl, triton

LARGEST = 256
BLOCK = 1024  # columns a program


@triton.jit
def rotated(v, ROTATION: tl.constexpr):
    """v·H of v [rows, columns] fp32, columns a multiple of ROTATION."""
    rows: tl.constexpr = v.shape[0]
    columns: tl.constexpr = v.shape[1]
    for stage in tl.static_range(8):
        if (1 << stage) < ROTATION:
            pairs = tl.reshape(v, (rows, columns // (2 << stage), 2, 1 << stage))
            left, right = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            both = tl.permute(tl.join(left + right, left - right), (0, 1, 3, 2))
            v = tl.reshape(both, (rows, columns))
    return v * (ROTATION**-0.5)


@kernel
def _rotate_kernel(x_ptr, y_ptr, width, ROTATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row + columns, inside, other=0.0).to(tl.float32)
    y = tl.reshape(rotated(tl.reshape(x, (1, BLOCK)), ROTATION), (BLOCK,))
    tl.store(y_ptr + row + columns, y.to(y_ptr.dtype.element_ty), inside)


def largest_rotation(*widths: int) -> int:
    """Returns the largest power of two up to 256 that divides every width; 1 where one is odd."""
    rotation = LARGEST
    while any(width % rotation for width in widths):
        rotation //= 2
    return rotation


def check_rotation(rotation: int, *widths: int) -> None:
    """Raise ValueError unless `rotation` is 0 (none) or a block that divides every width."""
    fits = rotation in (0, 2, 4, 8, 16, 32, 64, 128, 256)
    check(fits, "rotation", f"0 or a power of two from 2 to {LARGEST}", rotation)
    whole = not rotation or all(width % rotation == 0 for width in widths)
    check(whole, "rotation", f"a divisor of the input's width {list(widths)}", rotation)


def hadamard_rotate(x: Tensor, rotation: int, out: Tensor | None = None) -> Tensor:
    """Returns x·H [..., K] in x's dtype (formed in fp32), in `out` where given: it may be x itself.

    On a GPU x is contiguous. rotation: columns a block. Raises ValueError naming the argument.
    """
    backend.check_dtype("x", x)
    check(rotation > 0, "rotation", "a power of two", rotation)
    check_rotation(rotation, x.shape[-1])
    out = torch.empty_like(x) if out is None else out
    check(out.shape == x.shape, "out", f"{tuple(x.shape)} as x is", tuple(out.shape))
    if not backend.launches(x):
        return out.copy_(hadamard_reference(x.float(), rotation))
    check(x.is_contiguous() and out.is_contiguous(), "x", "contiguous", x.stride())
    K = x.shape[-1]
    if x.numel():
        grid = (x.numel() // K, triton.cdiv(K, BLOCK))
        _rotate_kernel[grid](x, out, K, ROTATION=rotation, BLOCK=BLOCK)
    return out


def hadamard_reference(x: Tensor, rotation: int) -> Tensor:
    """`hadamard_rotate` in plain torch, in x's dtype."""
    shape, half = x.shape, 1
    while half < rotation:
        pairs = x.reshape(-1, 2, half)
        left, right = pairs[:, 0], pairs[:, 1]
        x = torch.stack([left + right, left - right], 1)
        half *= 2
    return x.reshape(shape) * rotation**-0.5
