"""The nano model's autoencoder, trained to give back drawings of every color."""

from pathlib import Path

import torch
import torch.nn.functional as F
from draw import draw, draw_any, random_scene
from torch import Tensor
from training import Plan, train

PICTURES = 6000
BATCH = 16
KL_WEIGHT = 1e-3  # per latent value: 0.13 to 0.27 of noise beside latents of deviation 1
PLAN = Plan(steps=3000, lr=2e-3, warmup=50, decay=0.6)


def to_tensor(images: list) -> Tensor:
    """PIL pictures of one size -> uint8 [B, 3, H, W]."""
    import numpy as np

    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def pictures(seed: int, count: int) -> Tensor:
    """The first `count` drawings of a seed, uint8 [count, 3, 64, 64]."""
    return to_tensor([draw(random_scene(seed, index)) for index in range(count)]).contiguous()


def any_pictures(seed: int, count: int) -> Tensor:
    """As `pictures`, with more shapes than one and any color."""
    return to_tensor([draw_any(seed, index) for index in range(count)]).contiguous()


def train_vae(work: Path, plan: Plan = PLAN):
    """-> AutoencoderKL in `work/vae.safetensors`, its latents brought to mean 0 and deviation 1."""
    from make_nano import make_vae

    torch.manual_seed(plan.seed)
    vae = make_vae()
    data = torch.cat([pictures(plan.seed, PICTURES // 4), any_pictures(plan.seed, PICTURES)])
    seen = {}

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data), (BATCH,), generator=generator)
        images = data[rows].float() / 127.5 - 1
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        variance = posterior.logvar.exp()
        kl = 0.5 * (posterior.mean.square() + variance - 1 - posterior.logvar).mean()
        mse, seen["std"] = F.mse_loss(decoded, images), posterior.std.mean().item()
        seen["mse"] = mse.item()
        return mse + F.l1_loss(decoded, images) + KL_WEIGHT * kl

    vae = train("vae", work, vae, plan, loss_of, lambda: f"mse {seen['mse']:.4f}")
    return normalize(vae, data[:256])


@torch.no_grad()
def encode(vae, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 pictures -> mean and deviation of their latents, each [B, 16, 8, 8] at 64 pixels."""
    means, stds = [], []
    for part in images.split(64):
        posterior = vae.encode(part.float() / 127.5 - 1).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def normalize(vae, images: Tensor):
    """Bring every latent channel to a deviation of 1 by rescaling the encoder's last and the
    decoder's first layer, so that no scaling factor is needed. (Not to a mean of 0: the decoder
    pads with zeros, so that a shift would change its borders; the KL term keeps means small.)
    """
    mean, std = encode(vae, images)
    second_moment = mean.var(dim=(0, 2, 3)) + std.square().mean(dim=(0, 2, 3))
    gain = second_moment.rsqrt()
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    channels = len(gain)
    last.weight[:channels] *= gain[:, None, None, None]
    last.bias[:channels] *= gain
    last.bias[channels:] += 2 * gain.log()
    first.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    return vae
