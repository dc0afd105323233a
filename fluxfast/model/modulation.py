"""Computes modulation for several batches at once.

Modulation depends only on timestep, pooled text and guidance, which are functions of the batch
number: where it is frozen, it can be computed ahead.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# rows of the modulation's products: 16 is the least that fills a tensor core's tile
MODULATION_ROWS = 16


def timestep_embedding(t: Tensor, width: int = 256) -> Tensor:
    """Returns fp32 [B, width] of t [B] in 0..1: cosines, then sines of 1000·t at geometric
    frequencies from 1 to 1e-4.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = (1000.0 * t.float())[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def padded(x: Tensor) -> Tensor:
    """Returns x [n, ...] with rows of zeros appended, to a multiple of MODULATION_ROWS."""
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % MODULATION_ROWS))


class ModulationCache:
    """Modulation rows by batch number, counted from 0 over the whole run.

    A batch that is not cached is computed together with those after it, MODULATION_ROWS rows in
    all, by the same products as in `Flux.forward`. modulation: `Flux.modulation`; conditions: batch
    number -> timesteps [B] on the device, pooled text [B, 768] on the CPU; stop: number of batches.
    """

    def __init__(
        self,
        modulation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        conditions: Callable[[int], tuple[Tensor, Tensor]],
        guidance: float | None,
        batch_size: int,
        stop: int,
    ):
        self.modulation, self.conditions, self.guidance = modulation, conditions, guidance
        self.batch_size, self.stop = batch_size, stop
        self._rows: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, number: int) -> Tensor:
        """Returns the modulation of batch `number`, [B, columns]."""
        if number in self._rows:
            return self._rows[number]
        count = max(1, MODULATION_ROWS // self.batch_size)
        numbers = range(number, max(number + 1, min(number + count, self.stop)))
        timesteps, pooled = zip(*map(self.conditions, numbers), strict=True)
        t, y = torch.cat(timesteps), torch.cat(pooled)
        if t.device.type == "cuda":
            y = y.pin_memory()  # or the copy would wait for the GPU
        y = y.to(t.device, non_blocking=True)
        guidance = None if self.guidance is None else torch.full_like(t, self.guidance)
        rows = self.modulation(t, y, guidance)
        self._rows = dict(zip(numbers, rows.split([len(each) for each in timesteps]), strict=True))
        return self._rows[number]
