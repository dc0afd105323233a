"""What a run of `bench.step` measures: candidates by name, and what all of them share."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fluxfast.memory.planner.step_spec import StepSpec, lora_of
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
DTYPE_NAMES = {"bfloat16": "bf16", "float32": "fp32"}  # torch's names -> fluxfast's


class Setting(NamedTuple):
    """optimizer: "adamw" (torch's fused one) or "adamw8bit" (bitsandbytes'). max_grad_norm: None
    does not clip; the trainer clips at 1.0 in any setting."""

    optimizer: str
    ema: bool
    max_grad_norm: float | None


# stock: ai-toolkit's file for 24 GB, whose LoRA includes the modulation
SETTINGS = {"plain": Setting("adamw", False, None), "stock": Setting("adamw8bit", True, 1.0)}
STOCK_TARGETS = "all"


class Kind(NamedTuple):
    """library: "diffusers", "fluxfast", or "trainer" (fluxfast's step as `fluxfast train` runs it).
    storage: of the base weights, "dense" is the compute dtype. matmul: "" is the compute dtype, or
    "int8", "fp8"."""

    library: str
    storage: str
    matmul: str = ""
    checkpointing: bool = False
    compiled: bool = False


MODES = {  # of fluxfast: storage, matmul
    "nf4": ("nf4", ""),
    "dense": ("dense", ""),
    "nf4-int8": ("nf4", "int8"),
    "nf4-fp8": ("nf4", "fp8"),
    "int8-int8": ("int8", "int8"),
    "fp8-fp8": ("fp8", "fp8"),
}
BASELINE = "diffusers-nf4"
CANDIDATES = {  # in the order in which they run: references come first
    BASELINE: Kind("diffusers", "nf4"),
    "diffusers-nf4-checkpoint": Kind("diffusers", "nf4", checkpointing=True),
    "diffusers-dense-compile": Kind("diffusers", "dense", compiled=True),
    **{f"fluxfast-{name}": Kind("fluxfast", *mode) for name, mode in MODES.items()},
    **{f"fluxfast-{name}-trainer": Kind("trainer", *mode) for name, mode in MODES.items()},
}
DEFAULTS = {
    "cpu": ["diffusers-nf4", "diffusers-nf4-checkpoint", "fluxfast-nf4", "fluxfast-nf4-int8"],
    "cuda": list(CANDIDATES),
}


@dataclass(frozen=True)
class Cycle:
    """Steps that are timed together, one at each of these image sides."""

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

    apart: a process per candidate. setting: a key of SETTINGS. targets: a preset of `inject_lora`.
    cap_gib: the GPU memory that torch may allocate; None is all.
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
        """The compute dtype as rows name it: bfloat16 or float32."""
        return str(self.compute).removeprefix("torch.")


def image_tokens(pixels: int) -> int:
    return (pixels // 16) ** 2


def step_spec(kind: Kind, settings: Settings) -> StepSpec:
    """Returns a candidate's step as the cost model and the memory planner take it."""
    dtype = DTYPE_NAMES[settings.dtype]
    storage = dtype if kind.storage == "dense" else kind.storage
    lora = lora_of(settings.spec, settings.rank, settings.targets)
    return StepSpec(settings.spec, storage, kind.matmul or dtype, dtype, lora)
