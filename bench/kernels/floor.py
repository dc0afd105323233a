"""The roof of the machine at hand, measured by the run that is held to it: a large copy and, in
each dtype that it multiplies, a large product.

    floor_ms = max(bytes / copy rate, FLOP / product rate)

A copy reads and writes every byte. Products are square, 8-bit ones with int32 (int8) or fp32 (fp8)
sums, by torch's own kernels. Rates are medians of `timing.compare`, as the times held to them are.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench import timing

KINDS = ("fp32", "bf16", "int8", "fp8")
SIZES = {  # device -> (bytes of a copy's source, side of a product's matrices)
    "cuda": (512 << 20, 8192),
    "cpu": (256 << 20, 2048),
}
TINY_SIZES = (1 << 20, 64)
ROUNDS, WARMUP = 7, 3


class Roof(NamedTuple):
    """copy_gb_per_s: bytes read and written; None if it could not be measured. matmul_tflop_per_s:
    by kind of product (KINDS), without those that torch does not multiply here."""

    copy_gb_per_s: float | None
    matmul_tflop_per_s: dict[str, float]


def measure_roof(device: str, kinds: Iterable[str], tiny: bool) -> Roof:
    """Times the copy and the products of `kinds`. tiny: sizes that only check the bench."""
    size, side = TINY_SIZES if tiny else SIZES[torch.device(device).type]
    work = {"copy": timing.attempt(_copy, size, device)}
    work |= {kind: timing.attempt(_product, kind, side, device) for kind in kinds}
    results = timing.compare(work, ROUNDS, WARMUP, device=device, cold=True)
    seconds = {name: r.median_ms / 1e3 for name, r in results.items() if r.median_ms}
    copy = seconds.pop("copy", None)
    rates = {kind: 2 * side**3 / time / 1e12 for kind, time in seconds.items()}
    return Roof(2 * size / copy / 1e9 if copy else None, rates)


def floor_ms(roof: Roof, kind: str, moved: float, flop: float) -> float | None:
    """Returns the least time for `moved` bytes and `flop` of products of a kind; None without
    either rate.

    All FLOP count at the product's rate: those of element-wise passes are too few to matter.
    """
    rate = roof.matmul_tflop_per_s.get(kind)
    if not rate or not roof.copy_gb_per_s:
        return None
    return 1e3 * max(moved / (roof.copy_gb_per_s * 1e9), flop / (rate * 1e12))


def _copy(size: int, device: str) -> Callable[[], Tensor]:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def _product(kind: str, side: int, device: str) -> Callable[[], Tensor]:
    """a · bᵀ: rows times rows is the layout that every 8-bit product takes."""
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    if kind == "int8":
        a, b = ((30 * each).clamp(-127, 127).to(torch.int8) for each in (a, b))
        return partial(torch._int_mm, a, b.T)
    if kind == "fp8":
        a, b = (each.to(torch.float8_e4m3fn) for each in (a, b))
        one = torch.ones((), device=device)
        return partial(
            torch._scaled_mm, a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=False
        )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    return partial(torch.matmul, a.to(dtype), b.to(dtype).T)
