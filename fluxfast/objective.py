"""Flow matching: timesteps, noise, the target and the weighted loss.

    x_t = (1 − t)·x + t·n,   target = n − x,   t = 1 is pure noise

Every random number is a pure function of (seed, global sample index).
Shape legend: B batch, C latent channels, h, w latent rows and columns, T = h/2 · w/2 image tokens.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import fluxfast_kernels as fk
import torch
from torch import Tensor

from fluxfast import rng


def flux_shift(t: Tensor, tokens: int) -> Tensor:
    """Returns t shifted towards noise by resolution: mu is 0.5 at 256 tokens, 1.15 at 4096.

    Source: BFL `flux/sampling.py`, time_shift and get_lin_function.
    """
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1))


def draw_timesteps(
    seed: int,
    indices: list[int] | Tensor,
    tokens: int,
    kind: str = "sigmoid",
    bias: str = "balanced",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Returns t [B] in (0, 1), fp32: a quantile function of a uniform number per sample index.

    kind: `sigmoid` (logit-normal, no shift), `uniform`, `flux_shift`, or `linear`, `linear2` and
    `weighted` (uniform, to be used with their weights). bias: `content` favors noise (1 − u³),
    `style` clean pictures (u³), `balanced` neither.
    """
    u = rng.uniform(seed, "timestep", indices, device=device).view(-1)
    quantile = {"balanced": u, "content": 1 - u**3, "style": u**3}[bias].clamp(1e-6, 1 - 1e-6)
    if kind == "sigmoid":
        return torch.sigmoid(torch.special.ndtri(quantile))
    if kind == "flux_shift":
        return flux_shift(quantile, tokens)
    assert kind in ("uniform", "linear", "linear2", "weighted"), kind
    return quantile


def _bell(i: Tensor) -> Tensor:
    return torch.exp(-2 * ((i - 500) / 1000) ** 2)


@cache
def _weighted(device: torch.device) -> Tensor:
    """Returns the weights of `weighted` at t = 0.001, 0.002, … 1."""
    table = Path(__file__).with_name("timestep_weights.json").read_text(encoding="utf-8")
    return torch.tensor(json.loads(table)["weights"], device=device)


def timestep_weight(t: Tensor, kind: str) -> Tensor:
    """Returns the loss weight [B], 1 but for three kinds, which are as in ai-toolkit.

    linear: a bell, exp(−2((i − 500)/1000)²) at i = 1000·t, less its minimum, over its mean.
    linear2: likewise, held at its top below t = 0.5. weighted: a table that rises towards noise, of
    mean 1.
    """
    if kind == "weighted":
        return _weighted(t.device)[(1000 * t).round().long().clamp(1, 1000) - 1]
    if kind not in ("linear", "linear2"):
        return torch.ones_like(t)
    table = _bell(torch.linspace(1000, 1, 1000, device=t.device))
    low = table.min()
    i = 1000 * t if kind == "linear" else (1000 * t).clamp(min=500)
    return (_bell(i) - low).clamp(min=0) / (table - low).mean()


def pack(latents: Tensor) -> Tensor:
    """Returns latents [B, C, h, w] as tokens [B, T, 4C] of 2 x 2 patches, channels outermost."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Returns tokens [B, T, 4C] as latents [B, C, h, w], the inverse of `pack`."""
    b, _, width = tokens.shape
    patches = tokens.view(b, h // 2, w // 2, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, width // 4, h, w)


def image_ids(h: int, w: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns RoPE positions of the image tokens, fp32 [1, T, 3]: (0, row, column)."""
    axes = (torch.arange(size, device=device) for size in (1, h // 2, w // 2))
    return torch.cartesian_prod(*axes).view(1, -1, 3).float()


def text_ids(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns RoPE positions of the text tokens, fp32 [1, L, 3]: zeros."""
    return torch.zeros(1, length, 3, device=device)


@dataclass
class Batch:
    """Encoded samples of one size. indices: global sample indices, for every random number."""

    mean: Tensor  # [B, C, h, w] fp32, normalized
    std: Tensor  # likewise
    mask: Tensor | None  # [B, h, w] fp32 loss weights
    t5: Tensor  # [B, L, 4096] in the encoders' dtype
    pooled: Tensor  # [B, 768]
    indices: list[int]
    names: list[str] = field(default_factory=list)  # of the pictures


class Inputs(NamedTuple):
    """What the forward pass and the loss take: tensors alone, so that a graph can read them."""

    noisy: Tensor  # [B, T, 4C] fp32
    target: Tensor  # likewise
    timesteps: Tensor  # [B]
    weight: Tensor  # [B]
    mask: Tensor | None  # [B, T, 4C]
    img_ids: Tensor
    txt_ids: Tensor
    t5: Tensor
    pooled: Tensor
    modulation: Tensor | None  # `Flux.modulation` of these, where it was computed ahead
    indices: Tensor | None = None  # int64 [B], global sample indices, for LoRA dropout


def noise_batch(
    batch: Batch,
    seed: int,
    kind: str = "sigmoid",
    bias: str = "balanced",
    *,
    device: torch.device | str = "cpu",
    stream: str = "",
    timesteps: Tensor | None = None,
    modulation: Tensor | None = None,
) -> Inputs:
    """Returns the batch on the device with the VAE's noise, timesteps and the flow's noise. Does
    not synchronize where the batch is in page-locked memory.

    stream prefixes the names of the random streams; timesteps [B] replace drawn ones.
    """
    host = batch.mean, batch.std, batch.t5, batch.pooled
    mean, std, t5, pooled = (tensor.to(device, non_blocking=True) for tensor in host)
    indices = rng.as_indices(batch.indices, device)
    shape, (h, w) = tuple(mean.shape[1:]), mean.shape[2:]
    vae_noise = rng.normal(seed, f"{stream}vae", indices, shape, device)
    noise = rng.normal(seed, f"{stream}noise", indices, shape, device)
    if timesteps is None:
        timesteps = draw_timesteps(seed, indices, (h // 2) * (w // 2), kind, bias, device)
    t, mask = timesteps.to(device), batch.mask
    noisy, target = fk.flow_mix(pack(mean), pack(std), pack(vae_noise), pack(noise), t)
    if mask is not None:
        mask = mask.to(device, non_blocking=True)[:, None]
        mask = pack(mask.expand_as(mean).contiguous())
    ids = image_ids(h, w, device), text_ids(t5.shape[1], device)
    weight = timestep_weight(t, kind)
    return Inputs(noisy, target, t, weight, mask, *ids, t5, pooled, modulation, indices)


def sample_losses(model: Callable[..., Tensor], inputs: Inputs, guidance: float | None) -> Tensor:
    """Returns losses [B], fp32: weight · mean of mask · (velocity − target)², with the mask scaled
    to mean 1, so that a masked picture does not count for less. guidance: fed to the model's
    embedding, which None leaves out.
    """
    text = inputs.t5, inputs.txt_ids, inputs.timesteps, inputs.pooled
    modulation = inputs.modulation
    if guidance is None and modulation is None:
        modulation = cast(Any, model).modulation(inputs.timesteps, inputs.pooled, None)
    scale = None if guidance is None else torch.full_like(inputs.timesteps, guidance)
    velocity = model(inputs.noisy, inputs.img_ids, *text, scale, modulation)
    return fk.flow_loss(velocity, inputs.target, inputs.weight, inputs.mask)
