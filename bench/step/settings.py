"""What a run of bench.step asks of every candidate alike: model, LoRA, optimizer, pictures."""

from dataclasses import dataclass, replace

import torch

from bench.step.peers import Batch, normal
from fluxfast.model.spec import DEV, FluxSpec, rope_axes

CPU_SPEC = replace(DEV, depth=1, depth_single_blocks=2)
TINY_SPEC = replace(
    CPU_SPEC,
    vec_in_dim=64,
    context_in_dim=128,
    hidden_size=128,
    num_heads=4,
    axes_dim=rope_axes(32),
)
SEED = 0
LEARNING_RATE = 1e-4
EMA_DECAY = 0.99


@dataclass(frozen=True)
class Setting:
    """optimizer: "adamw" (torch's fused one) or "adamw8bit" (bitsandbytes'). max_grad_norm: None is
    no clipping; the trainer clips at 1.0 in any setting, since that is what it does."""

    optimizer: str
    ema: bool
    max_grad_norm: float | None


# stock: ai-toolkit's file for 24 GB, whose LoRA takes the modulation in as well
SETTINGS = {"plain": Setting("adamw", False, None), "stock": Setting("adamw8bit", True, 1.0)}
STOCK_TARGETS = "all"


@dataclass(frozen=True)
class Cycle:
    """Steps that are timed together: one at each of these sizes. pixels: sides."""

    pixels: tuple[int, ...]
    batch: int

    def __str__(self) -> str:
        sizes = "/".join(map(str, self.pixels))
        return f"{sizes} px{' mixed' * self.mixed}, batch {self.batch}"

    @property
    def mixed(self) -> bool:
        return len(self.pixels) > 1


@dataclass(frozen=True)
class Settings:
    """What every candidate of a run has in common.

    cycles: one after the other. apart: a process per candidate. setting: of SETTINGS. targets: a
    preset of `inject_lora`. cap_gib: of the GPU's memory that torch may allocate; None is all.
    """

    spec: FluxSpec
    device: str
    compute: torch.dtype
    cycles: list[Cycle]
    text_tokens: int
    rank: int
    rounds: int
    warmup: int
    apart: bool
    setting: str = "plain"
    targets: str = "attn+mlp"
    cap_gib: float | None = None

    @property
    def dtype(self) -> str:
        """The compute dtype as a row says it: bfloat16 or float32."""
        return str(self.compute).removeprefix("torch.")


def image_tokens(pixels: int) -> int:
    return (pixels // 16) ** 2


def make_batch(settings: Settings, pixels: int, batch: int) -> Batch:
    """Random latents and prompts; x_t = (1 - t) latent + t noise, whose velocity is the target.

    Times are powers of two and the guidance is 1, exact in bf16: diffusers rounds 1000·t to the
    compute dtype, fluxfast does not have to, and the gate should not see that.
    """
    spec, device, compute = settings.spec, settings.device, settings.compute
    T, L, side = image_tokens(pixels), settings.text_tokens, pixels // 16
    latent, noise = (normal(SEED, n, (batch, T, 64), device) for n in ("latent", "noise"))
    t = 0.5 ** torch.arange(1, batch + 1, device=device)
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1] = torch.arange(side, device=device)[:, None]
    ids[..., 2] = torch.arange(side, device=device)[None, :]
    mixed = (1 - t[:, None, None]) * latent + t[:, None, None] * noise
    return Batch(
        img=mixed.to(compute),
        img_ids=ids.view(1, T, 3).expand(batch, T, 3),
        txt=normal(SEED, "txt", (batch, L, spec.context_in_dim), device).to(compute),
        txt_ids=torch.zeros(batch, L, 3, device=device),
        timesteps=t,
        y=normal(SEED, "y", (batch, spec.vec_in_dim), device).to(compute),
        guidance=torch.ones(batch, device=device),
        target=noise - latent,
    )
