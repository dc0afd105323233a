"""Flow matching: which timestep, which noise, what is to be predicted and how it is weighted.

    x_t = (1 − t)·x + t·n,   target = n − x,   t = 1 is pure noise

Every draw is a pure function of (seed, global sample index). Imports torch and fluxfast_kernels
only.
Shape legend: B batch, C latent channels, h, w latent rows and columns, T = h/2 · w/2 image tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import fluxfast_kernels as fk
import torch
from torch import Tensor

from fluxfast import draws


def flux_shift(t: Tensor, tokens: int) -> Tensor:
    """FLUX's resolution-dependent shift of t towards noise: mu runs from 0.5 at 256 tokens to 1.15
    at 4096.

    Source: BFL `flux/sampling.py`, time_shift and get_lin_function.
    """
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1))


def draw_timesteps(
    seed: int,
    indices: list[int],
    tokens: int,
    kind: str = "sigmoid",
    bias: str = "balanced",
    device="cpu",
) -> Tensor:
    """t [B] in (0, 1), fp32, one uniform draw per global sample index through an inverse
    distribution.

    kind: `sigmoid` (logit-normal, no shift), `uniform`, `linear` (uniform, to be used with its
    weight), or `flux_shift`. bias: `content` favours noise (1 − u³), `style` clean pictures (u³),
    `balanced` neither.
    """
    u = draws.uniform(seed, "timestep", indices, device=device).view(-1)
    quantile = {"balanced": u, "content": 1 - u**3, "style": u**3}[bias]
    quantile = quantile.clamp(1e-6, 1 - 1e-6)
    if kind == "sigmoid":
        return torch.sigmoid(torch.special.ndtri(quantile))
    if kind == "flux_shift":
        return flux_shift(quantile, tokens)
    assert kind in ("uniform", "linear"), kind
    return quantile


def _bell(i: Tensor) -> Tensor:
    return torch.exp(-2 * ((i - 500) / 1000) ** 2)


def timestep_weight(t: Tensor, kind: str) -> Tensor:
    """Loss weight [B]: 1, or for `linear` a bell over t with weight 0 at both ends and mean 1.

    exp(−2((i − 500)/1000)²) at i = 1000·t, less its minimum, over its mean, as in
    ai-toolkit.
    """
    if kind != "linear":
        return torch.ones_like(t)
    table = _bell(torch.linspace(1000, 1, 1000, device=t.device))
    low = table.min()
    return (_bell(1000 * t) - low).clamp(min=0) / (table - low).mean()


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, T, 4C]: 2 x 2 patches become tokens, channels outermost, as FLUX packs
    them.
    """
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """[B, T, 4C] -> [B, C, h, w], the inverse of `pack`."""
    b, _, width = tokens.shape
    patches = tokens.view(b, h // 2, w // 2, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, width // 4, h, w)


def image_ids(h: int, w: int, device="cpu") -> Tensor:
    """RoPE positions of the image tokens, fp32 [1, T, 3]: (0, row, column)."""
    axes = torch.arange(h // 2, device=device), torch.arange(w // 2, device=device)
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1)
    return ids.view(1, -1, 3).float()


def text_ids(length: int, device="cpu") -> Tensor:
    """RoPE positions of the text tokens, all zero: fp32 [1, L, 3]."""
    return torch.zeros(1, length, 3, device=device)


@dataclass
class NoisyBatch:
    """What one prediction needs and is judged by. Tokens are packed: [B, T, 4C] fp32."""

    noisy: Tensor
    target: Tensor
    timesteps: Tensor  # [B]
    weight: Tensor  # [B]
    mask: Tensor | None  # [B, T, 4C]
    img_ids: Tensor
    txt_ids: Tensor


def noise_batch(
    mean: Tensor,
    std: Tensor,
    mask: Tensor | None,
    text_length: int,
    indices: list[int],
    seed: int,
    kind: str = "sigmoid",
    bias: str = "balanced",
    *,
    stream: str = "",
    timesteps: Tensor | None = None,
) -> NoisyBatch:
    """Draw the VAE's own noise, the timesteps and the flow's noise for these samples.

    mean, std [B, C, h, w] of the encoded pictures, normalised; mask [B, h, w] or None.
    stream goes before the names of the draws; timesteps [B] are taken instead of drawn ones.
    """
    shape, device = tuple(mean.shape[1:]), mean.device
    latents = pack(mean + std * draws.normal(seed, f"{stream}vae", indices, shape, device))
    noise = pack(draws.normal(seed, f"{stream}noise", indices, shape, device))
    t = timesteps
    if t is None:
        t = draw_timesteps(seed, indices, latents.shape[1], kind, bias, device)
    if mask is not None:
        mask = pack(mask[:, None].expand_as(mean).contiguous())
    mix = t[:, None, None]
    return NoisyBatch(
        noisy=(1 - mix) * latents + mix * noise,
        target=noise - latents,
        timesteps=t,
        weight=timestep_weight(t, kind),
        mask=mask,
        img_ids=image_ids(*shape[1:], device),
        txt_ids=text_ids(text_length, device),
    )


def predict(
    model: Callable[..., Tensor],
    noisy: NoisyBatch,
    t5: Tensor,
    pooled: Tensor,
    guidance: float,
    modulation: Tensor | None = None,
) -> Tensor:
    """The model's velocity [B, T, 4C] for a noised batch.

    t5 [B, L, 4096], pooled [B, 768]; guidance: one number for the whole batch; modulation: what
    `Flux.modulation` made of these, where it was formed ahead.
    """
    return model(
        noisy.noisy,
        noisy.img_ids,
        t5,
        noisy.txt_ids,
        noisy.timesteps,
        pooled,
        torch.full_like(noisy.timesteps, guidance),
        modulation,
    )


def flow_loss(prediction: Tensor, batch: NoisyBatch) -> Tensor:
    """Per-sample loss [B], fp32: weight · mean of mask · (prediction − target)², the mask's mean
    brought to 1.

    So a mask moves the loss to where it is white without making the picture count for less.
    """
    return fk.flow_loss(prediction, batch.target, batch.weight, batch.mask)
