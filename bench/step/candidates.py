"""Who takes the step: each candidate by name, how it is built, and the bare step over it.

`ModelStep` is forward, backward and optimizer, the same code for fluxfast and its peers;
`bench/step/trainer.py` holds what `fluxfast train` runs. Both have the same methods.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.step.gate import loss_of, saved_bytes
from bench.step.peers import BaseWeights, Batch, Candidate, build_diffusers, build_fluxfast, normal
from bench.step.settings import EMA_DECAY, LEARNING_RATE, SEED, SETTINGS, Cycle, Settings
from fluxfast.memory.planner.step_spec import StepSpec, lora_of

BASELINE = "diffusers-nf4"
WORDS = {"bfloat16": "bf16", "float32": "fp32"}  # torch's name -> fluxfast's


@dataclass(frozen=True)
class Kind:
    """who: "diffusers", "fluxfast", or "trainer" (fluxfast's step as `fluxfast train` runs it).
    storage: of the base, "dense" is the compute dtype. products: "" is the compute dtype, or
    "int8", "fp8"."""

    who: str
    storage: str
    products: str = ""
    checkpointing: bool = False
    compiled: bool = False


MODES = {  # of fluxfast: name -> storage, products
    "nf4": ("nf4", ""),
    "dense": ("dense", ""),
    "nf4-int8": ("nf4", "int8"),
    "nf4-fp8": ("nf4", "fp8"),
    "int8-int8": ("int8", "int8"),
    "fp8-fp8": ("fp8", "fp8"),
}
CANDIDATES = {  # in the order in which they run: what others are held to comes first
    BASELINE: Kind("diffusers", "nf4"),
    "diffusers-nf4-checkpoint": Kind("diffusers", "nf4", checkpointing=True),
    "diffusers-dense-compile": Kind("diffusers", "dense", compiled=True),
    **{f"fluxfast-{mode}": Kind("fluxfast", *how) for mode, how in MODES.items()},
    **{f"fluxfast-{mode}-trainer": Kind("trainer", *how) for mode, how in MODES.items()},
}
DEFAULTS = {
    "cpu": ["diffusers-nf4", "diffusers-nf4-checkpoint", "fluxfast-nf4", "fluxfast-nf4-int8"],
    "cuda": list(CANDIDATES),
}
# 8-bit storage is made of the dense weights, so that is what its results are held to
REFERENCES = {"int8": "dense", "fp8": "dense"}


def work_of(kind: Kind, settings: Settings) -> StepSpec:
    """What the cost model and the memory plan call a candidate's work."""
    activations = WORDS[settings.dtype]
    storage = activations if kind.storage == "dense" else kind.storage
    lora = lora_of(settings.spec, settings.rank, settings.targets)
    return StepSpec(settings.spec, storage, kind.products or activations, activations, lora)


def build_model(kind: Kind, settings: Settings) -> Candidate:
    if SETTINGS[settings.setting].optimizer == "adamw8bit":
        import bitsandbytes  # noqa: F401  (named here if it is missing, before any weight is made)
    weights = BaseWeights(settings.spec, SEED, settings.device)
    shared = (weights, kind.storage, settings.compute, settings.rank, settings.targets)
    if kind.who == "diffusers":
        return build_diffusers(*shared, kind.checkpointing, kind.compiled)
    return build_fluxfast(*shared, kind.products)


def reset_adapters(candidate: Candidate) -> None:
    """Give the LoRA the values that all candidates share, none zero: then no gradient is zero."""
    for module, (a, b) in candidate.adapters.items():
        for side, adapter, std in (("A", a, a.parameter.shape[1] ** -0.5), ("B", b, 0.02)):
            values = adapter.parameter.detach()[adapter.rows]
            adapter.fill(std * normal(SEED, f"{module}.{side}", values.shape, values.device))


class ModelStep:
    """Forward, backward and the setting's optimizer over a model with a LoRA."""

    def __init__(self, candidate: Candidate, settings: Settings):
        self.candidate, self.setting = candidate, SETTINGS[settings.setting]
        self.parameters = candidate.parameters()
        self.optimizer = _optimizer(self.setting.optimizer, self.parameters)
        self.average = [p.detach().clone() for p in self.parameters] if self.setting.ema else []
        self.batches: list[Batch] = []

    def begin(self, cycle: Cycle, batches: list[Batch]) -> None:
        """batches: one of each of the cycle's sizes."""
        self.batches = batches

    def backward(self, batch: Batch) -> Tensor:
        """Forward and backward alone -> the loss, detached; the gradients are in the adapters."""
        loss = loss_of(self.candidate, batch)
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        """Let go of the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """All steps of the cycle."""
        for batch in self.batches:
            self.backward(batch)
            if self.setting.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.setting.max_grad_norm)
            self.optimizer.step()
            self.clear()
            if self.average:
                torch._foreach_lerp_(
                    self.average, [p.detach() for p in self.parameters], 1 - EMA_DECAY
                )

    def saved_bytes(self) -> int | None:
        """What autograd keeps of one step; None of several."""
        if len(self.batches) > 1:
            return None
        return saved_bytes(self.candidate, self.batches[0])

    def peak_memory(self) -> tuple[int, str] | None:
        """Where a step's own high-water mark does not tell: see `TrainerStep`."""
        return None

    def details(self) -> dict[str, object]:
        return {}

    def end(self) -> None:
        """Let go of what a cycle took."""
        self.clear()
        self.batches = []


def _optimizer(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=LEARNING_RATE)
