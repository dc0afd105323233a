"""The nano model's transformer: flow matching on the drawings' latents and captions."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from draw import SIZE, all_captions, random_caption, random_scene
from safetensors.torch import load_file, save_file
from text_stage import TEXT_LENGTH
from torch import Tensor
from training import Plan, train
from vae_stage import encode, pictures

from fluxfast.model.spec import NANO, rope_axes
from fluxfast.objective import flux_shift, image_ids, pack, text_ids, unpack

SPEC = replace(NANO, hidden_size=160, num_heads=5, axes_dim=rope_axes(32), text_length=TEXT_LENGTH)
PICTURES = 12_000
BATCH = 64
DROPOUT = 0.1  # of captions: the empty one takes their place
T_SHIFT = 0.3  # mean of t's logit, towards noise, where shape and place are decided
GUIDANCE = (1.0, 4.0)  # drawn at random, so that it has no effect
PLAN = Plan(steps=3000, lr=1.2e-3, warmup=100, decay=0.5, weight_decay=0.01, ema=0.998, seed=3)
CELLS = SIZE // 8  # latent rows and columns


class Velocity(torch.nn.Module):
    """diffusers' transformer with the positions of one picture size and text length."""

    def __init__(self, transformer, text_length: int = TEXT_LENGTH):
        super().__init__()
        self.transformer = transformer
        self.positions = {
            "img_ids": image_ids(CELLS, CELLS)[0],
            "txt_ids": text_ids(text_length)[0],
        }

    def forward(self, x: Tensor, t: Tensor, states: Tensor, pooled: Tensor, guidance: Tensor):
        return self.transformer(
            x,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=t,
            guidance=guidance,
            return_dict=False,
            **self.positions,
        )[0]


def start_at_zero(transformer) -> None:
    """Zero the modulations and the last layer: every block starts as the identity (adaLN-zero,
    Peebles and Xie, arXiv 2212.09748)."""
    for name, module in transformer.named_modules():
        if name == "proj_out" or name.endswith(
            ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
        ):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def latents(work: Path, vae, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the drawings' latents, kept in a file of `work`."""
    path = work / "latents.safetensors"
    if not path.is_file():
        mean, std = encode(vae, pictures(seed, PICTURES))
        save_file({"mean": mean.contiguous(), "std": std.contiguous()}, path)
    kept = load_file(path)
    return kept["mean"], kept["std"]


def train_transformer(work: Path, transformer, vae, embed, plan: Plan = PLAN, compiled=False):
    """Train `transformer` in place. `embed(captions)` gives (T5 states, pooled)."""
    mean, std = latents(work, vae, plan.seed)
    captions = ["", *all_captions()]
    states, pooled = embed(captions)
    number = {caption: i for i, caption in enumerate(captions)}
    scenes = [random_scene(plan.seed, index) for index in range(PICTURES)]
    velocity = Velocity(transformer)
    if compiled:
        velocity = torch.compile(velocity)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(PICTURES, (BATCH,), generator=generator)
        said = [random_caption(scenes[row], step, row) for row in rows.tolist()]
        kept = torch.rand(BATCH, generator=generator) >= DROPOUT
        said = torch.tensor([number[caption] for caption in said]) * kept

        shape = (BATCH, *mean.shape[1:])
        clean = pack(mean[rows] + std[rows] * torch.randn(shape, generator=generator))
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.sigmoid(T_SHIFT + torch.randn(BATCH, generator=generator))
        low, high = GUIDANCE
        guidance = low + (high - low) * torch.rand(BATCH, generator=generator)

        mix = t[:, None, None]
        noisy = (1 - mix) * clean + mix * noise
        predicted = velocity(noisy, t, states[said], pooled[said], guidance)
        return F.mse_loss(predicted, noise - clean)

    return train("transformer", work, transformer, plan, loss_of)


@torch.no_grad()
def sample(transformer, states: Tensor, pooled: Tensor, seed: int = 0, steps: int = 20) -> Tensor:
    """Euler's method along FLUX's own time steps -> normalized latents [B, 16, 8, 8]."""
    velocity = Velocity(transformer)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(states), (CELLS // 2) ** 2, SPEC.in_channels, generator=generator)
    times = flux_shift(torch.linspace(1, 1 / steps, steps), (CELLS // 2) ** 2).tolist() + [0.0]
    ones = torch.ones(len(states))
    for t, after in zip(times, times[1:], strict=False):
        x = x + (after - t) * velocity(x, t * ones, states, pooled, 2.5 * ones)
    return unpack(x, CELLS, CELLS)
