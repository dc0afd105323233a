"""The frozen modulation of coming samples, formed for several batches at once.

Timesteps and captions of a batch are functions of its number, so they are known before its turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxfast.model.flux import MODULATION_ROWS, Flux
from fluxfast.objective import draw_timesteps


class Ahead:
    """Modulation rows by batch number, counted from 0 over the whole run.

    Where a batch's rows are not there, they are formed together with those of the batches after it,
    MODULATION_ROWS rows in all, in the very pass that `Flux.forward` would make for one batch.
    """

    def __init__(self, model: Flux, loader: Any, config: Any, device: torch.device):
        self.model, self.loader, self.config, self.device = model, loader, config, device
        self.stop = config.train.steps * config.train.gradient_accumulation
        self._rows: dict[int, Tensor] = {}

    def __call__(self, number: int) -> Tensor:
        """-> [B, modulation_width], of batch `number`."""
        if number not in self._rows:
            self._fill(number)
        return self._rows[number]

    @torch.no_grad()
    def _fill(self, first: int) -> None:
        train = self.config.train
        count = max(1, MODULATION_ROWS // len(self.loader.places))
        numbers = range(first, max(first + 1, min(first + count, self.stop)))
        timesteps, pooled = [], []
        for number in numbers:
            indices, tokens, states = self.loader.peek(number)
            timesteps.append(
                draw_timesteps(
                    self.config.seed,
                    indices,
                    tokens,
                    train.timesteps,
                    train.timestep_bias,
                    self.device,
                )
            )
            pooled.append(states)
        t = torch.cat(timesteps)
        y = torch.cat(pooled)
        if self.device.type == "cuda":
            y = y.pin_memory()  # or the copy would wait for the GPU
        y = y.to(self.device, non_blocking=True)
        made = self.model.modulation(t, y, torch.full_like(t, train.guidance))
        self._rows = dict(zip(numbers, made.split(len(self.loader.places)), strict=True))
