"""Random numbers as pure functions: Philox 4x32-10 over (seed, stream, index).

Nothing in fluxfast draws from a global generator. Every draw names its stream (such as "noise")
and the global sample index it belongs to, so a resumed, retried or re-ordered run draws the same
numbers on every device, and resuming needs one integer.

The bits are the same on CPU and GPU; `normal` goes through fp32 log and cos, which may differ in
the last bit.
"""

import hashlib
import math
import secrets

import torch
from fluxfast_kernels.ops.dropout import random_words
from torch import Tensor


def settle_seed(seed: int, begun: int | None = None) -> int:
    """Returns the seed; for -1 the one that a run began with, or without one a random seed."""
    if seed != -1:
        return seed
    return secrets.randbelow(2**32) if begun is None else begun


def key(seed: int, stream: str) -> int:
    """Returns Philox's key of a stream: 64 bits, signed."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def as_indices(index: int | list[int] | Tensor, device: torch.device | str) -> Tensor:
    """Returns int64 [len(index)] on the device; an int is a list of one."""
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
    words = random_words(key(seed, stream), as_indices(index, device), math.prod(shape))
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
    return int(random_words(key(seed, stream), as_indices(index, "cpu"), 1)[0, 0]) * high >> 32


def permutation(seed: int, stream: str, index: int, n: int) -> list[int]:
    """Returns a permutation of range(n)."""
    words = random_words(key(seed, stream), as_indices(index, "cpu"), n)[0]
    return torch.argsort(words, stable=True).tolist()
