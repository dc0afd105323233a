"""Random numbers as pure functions: Philox 4x32-10 over (seed, stream, index).

Nothing in fluxfast draws from a global generator. Every draw names its stream (such as "noise")
and the global sample index it belongs to, so a resumed, retried or re-ordered run draws the same
numbers on every device, and resuming needs one integer.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11); the constants are
Random123's. The bits are the same on CPU and GPU; `normal` goes through fp32 log and cos, which may
differ in the last bit.
"""

import hashlib
import math
import secrets

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def settle_seed(seed: int, begun: int | None = None) -> int:
    """Returns the seed; for -1 the one that a run began with, or without one a random seed."""
    if seed != -1:
        return seed
    return secrets.randbelow(2**32) if begun is None else begun


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


def bits(seed: int, stream: str, indices: Tensor, count: int) -> Tensor:
    """Returns int64 [len(indices), count] of 32 random bits each, on the device of `indices`."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    blocks = (count + 3) // 4
    position = torch.arange(blocks, device=indices.device, dtype=torch.int64)[None, :]
    index = indices.to(torch.int64)[:, None]
    zero = torch.zeros_like(position + index)
    counter = position + zero, zero, (index & _MASK) + zero, ((index >> 32) & _MASK) + zero
    words = philox(counter, key)
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def _indices(index: int | list[int] | Tensor, device) -> Tensor:
    index = [index] if isinstance(index, int) else index
    first = index[0] if isinstance(index, list) and index else 0
    if isinstance(index, list) and index == list(range(first, first + len(index))):
        # a batch's indices, made on the device: a copy from the host would wait for the GPU
        return torch.arange(first, first + len(index), dtype=torch.int64, device=device)
    return torch.as_tensor(index, dtype=torch.int64, device=device)


def uniform(
    seed: int, stream: str, index, shape: tuple[int, ...] = (), device: torch.device | str = "cpu"
) -> Tensor:
    """Returns fp32 [len(index), *shape] in (0, 1), never 0 or 1. An int index is a list of one."""
    words = bits(seed, stream, _indices(index, device), math.prod(shape))
    # 23 bits and a half: exact in fp32 and never 0 or 1
    values = ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return values.view(-1, *shape)


def normal(
    seed: int, stream: str, index, shape: tuple[int, ...] = (), device: torch.device | str = "cpu"
) -> Tensor:
    """Returns standard normal fp32 [len(index), *shape], by Box-Muller."""
    count = math.prod(shape)
    half = (count + 1) // 2
    u = uniform(seed, stream, index, (2 * half,), device)
    radius = torch.sqrt(-2.0 * torch.log(u[:, :half]))
    angle = (2.0 * math.pi) * u[:, half:]
    values = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return values[:, :count].reshape(-1, *shape)


def integer(seed: int, stream: str, index: int, high: int) -> int:
    """Returns one integer in [0, high)."""
    return int(bits(seed, stream, _indices(index, "cpu"), 1)[0, 0]) * high >> 32


def permutation(seed: int, stream: str, index: int, n: int) -> list[int]:
    """Returns a permutation of range(n)."""
    words = bits(seed, stream, _indices(index, "cpu"), n)[0]
    return torch.argsort(words, stable=True).tolist()
