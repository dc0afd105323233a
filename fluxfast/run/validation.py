"""Validation on held-out pictures, against the base model, which tells when to stop.

Every picture is measured at the same noise and the same timesteps each time, so two measurements
differ by the weights alone. Reported are the mean loss and its paired difference from the base
model's with a 95 % confidence interval over pictures; below zero means that the LoRA helps.
"""

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from fluxfast.data.store import LATENTS, TEXT, Sample, read_tensors
from fluxfast.model.flux import Flux
from fluxfast.model.lora import set_lora_strength
from fluxfast.objective import Batch, noise_batch, sample_losses
from fluxfast.util.files import read_rows, write_atomic


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Validation:
    """One measurement. loss, base_loss: means over `pictures` held-out pictures; low, high: 95 %
    interval of the paired difference loss − base_loss (None for one picture).
    """

    step: int
    loss: float
    base_loss: float
    difference: float
    low: float | None
    high: float | None
    pictures: int


class Validator:
    """Measures a model on held-out samples, each at `timesteps` fixed timesteps."""

    def __init__(self, samples: list[Sample], seed: int, timesteps: int, guidance: float | None):
        self.samples, self.seed, self.guidance = samples, seed, guidance
        # the middles of equal shares of a logit-normal: the spread that training mostly sees
        middles = (torch.arange(timesteps) + 0.5) / timesteps
        self.timesteps = torch.sigmoid(torch.special.ndtri(middles))
        self._base: Tensor | None = None

    def measure(self, model: Flux, device: torch.device, step: int) -> Validation:
        """Measure the model with its LoRA, and at the first call without it."""
        if self._base is None:
            set_lora_strength(model, 0.0)
            try:
                self._base = self._losses(model, device)
            finally:
                set_lora_strength(model, 1.0)
        losses = self._losses(model, device)
        differences = losses - self._base
        low, high = interval(differences.tolist())
        loss, base, difference = (x.mean().item() for x in (losses, self._base, differences))
        return Validation(step, loss, base, difference, low, high, len(losses))

    @torch.no_grad()
    def _losses(self, model: Flux, device: torch.device) -> Tensor:
        """Returns each picture's mean loss over timesteps and resolutions, fp64 [pictures]."""
        training = model.training
        model.eval()
        per_picture: dict[str, list[float]] = {}
        try:
            for index, sample in enumerate(self.samples):
                latents = read_tensors(sample.latents, LATENTS)
                tensors = {**latents, **read_tensors(sample.texts[0], TEXT)}
                encoded: dict[str, Any] = {
                    name: tensors[name][None].to(device) if name in tensors else None
                    for name in (*LATENTS, "mask", *TEXT)
                }
                for position, t in enumerate(self.timesteps):
                    batch = Batch(**encoded, indices=[index * len(self.timesteps) + position])
                    inputs = noise_batch(
                        batch, self.seed, device=device, stream="validation/", timesteps=t[None]
                    )
                    loss = sample_losses(model, inputs, self.guidance)
                    # sync: validation reads its result
                    per_picture.setdefault(sample.name, []).append(loss.item())
        finally:
            model.train(training)
        means = [statistics.fmean(losses) for losses in per_picture.values()]
        return torch.tensor(means, dtype=torch.float64)


# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom
_T975 = (
    (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    + (2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860)
    + (2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)
)


def interval(values: list[float]) -> tuple[float | None, float | None]:
    """Returns Student's 95 % confidence interval of the mean; (None, None) below two values."""
    freedom = len(values) - 1
    if freedom < 1:
        return None, None
    # beyond the table the first terms of the expansion in 1/freedom: off by less than 1e-4
    t = _T975[freedom - 1] if freedom <= 30 else 1.95996 + 2.3722 / freedom + 2.8225 / freedom**2
    mean = statistics.fmean(values)
    half = t * statistics.stdev(values, mean) / math.sqrt(len(values))
    return mean - half, mean + half


def read_validations(path: Path) -> list[Validation]:
    """Returns the measurements in validation.jsonl, in order; logs how many lines are none."""
    return read_rows(path, lambda row: Validation(**row))


def write_validations(path: Path, rows: list[Validation]) -> None:
    write_atomic(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode())


def best(rows: list[Validation]) -> Validation | None:
    """Returns the measurement with the lowest loss, the earliest of equals; NaN comes last. Only
    those on as many pictures as the newest: others do not compare.
    """
    rows = [row for row in rows if row.pictures == rows[-1].pictures]
    return min(rows, key=lambda row: (math.isnan(row.loss), row.loss, row.step), default=None)
