"""Every launch of a training step at FLUX.1-dev's widths, as a card would see it.

A step here: noise, target, embedders, modulation, blocks, last layer and loss, forward and
backward, on meta tensors. Without the optimizer, and without graphs, which launch the same.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.twin.driver import Launch, card
from fluxfast.model.flux import Flux
from fluxfast.model.init import fill
from fluxfast.model.lora import inject_lora
from fluxfast.model.names import linear_shape
from fluxfast.model.precision import layer_precisions
from fluxfast.model.spec import DEV, FluxSpec
from fluxfast.objective import Batch, noise_batch, sample_losses
from fluxfast.optim import FlatParameters

# Blocks whose launches are those of a whole model. Before the first double block nothing needs a
# gradient, so keep stands twice; int8 also saves what gelu_int8 does; recompute_mlp and checkpoint
# launch a forward again; offload launches what keep does.
BLOCKS = ("keep", "keep", "int8")
WHOLE = ("keep",) * DEV.depth, ("keep",) * DEV.depth_single_blocks


@dataclass(frozen=True)
class Case:
    """A configuration of the grid.

    storage: as the setting; also "nf4-nested", NF4 with double_quant. matmul: the setting
    `compute`; also "int8-rotated" and "fp8-rotated", with every layer rotated. size: of the
    pictures, "width x height" in pixels. batch: more than one comes with masks.
    """

    arch: int = 89
    storage: str = "nf4"
    matmul: str = "int8"
    rank: int = 16
    targets: str = "attn+mlp"
    size: str = "1024x1024"
    batch: int = 1
    dropout: bool = False

    def __str__(self) -> str:
        line = f"sm_{self.arch} {self.storage}+{self.matmul} rank {self.rank} {self.targets}"
        return f"{line} {self.size} batch {self.batch}{' dropout' * self.dropout}"


@lru_cache(maxsize=1)
def _model(
    storage: str, matmul: str, rank: int, targets: str, dropout: bool, spec: FluxSpec
) -> Flux:
    """Returns a model on meta tensors with its LoRA and its gradients; arguments as `Case`'s."""
    storage, nested = storage.removesuffix("-nested"), storage.endswith("-nested")
    matmul, rotated = matmul.removesuffix("-rotated"), matmul.endswith("-rotated")
    dtype = torch.float32 if matmul == "fp32" else torch.bfloat16
    choices = {"*_blocks.*attn*": "rotate", "*_mlp.*": "rotate", "*.linear?": "rotate"}

    def read(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        shape = (spec.head_dim,) if kind == "scale" else linear_shape(module, spec)
        return torch.empty(shape[:1] if kind == "bias" else shape, dtype=dtype, device="meta")

    model = Flux(spec, dtype)
    precisions = layer_precisions(spec, storage, matmul, choices if rotated else None)
    fill(model, read, precisions, nested=nested, device="meta")
    # seed None: A stays unset, as all here
    lora = inject_lora(model, rank, targets=targets, dropout=0.1 * dropout, seed=None)
    FlatParameters(lora)
    return model.train()


def step_launches(
    case: Case, doubles: tuple[str, ...] = BLOCKS, singles: tuple[str, ...] = BLOCKS
) -> list[Launch]:
    """Returns the launches of a step over double and single blocks of these memory policies."""
    return run_step(case, doubles, singles, DEV)


def run_step(
    case: Case,
    doubles: tuple[str, ...],
    singles: tuple[str, ...],
    spec: FluxSpec,
    watch: TorchDispatchMode | None = None,
) -> list[Launch]:
    """Runs a step over as many blocks of `spec`'s widths. Returns its launches. watch: is active in
    forward and backward, after their inputs are made."""
    spec = replace(spec, depth=len(doubles), depth_single_blocks=len(singles))
    with card(case.arch) as launches:
        kind = case.storage, case.matmul, case.rank, case.targets, case.dropout
        model = _model(*kind, spec)
        model.policies = [*doubles, *singles]
        launches.clear()
        inputs = noise_batch(_batch(case, spec), 0, device="meta")
        if not any(layer.trains() for layer in model.modulation_linears()):
            guidance = torch.ones_like(inputs.timesteps)
            with torch.no_grad():
                ahead = model.modulation(inputs.timesteps, inputs.pooled, guidance)
            inputs = inputs._replace(modulation=ahead)
        model.dropout_clock.indices = inputs.indices
        with watch or nullcontext():
            sample_losses(model, inputs, guidance=1.0).mean().backward()
        return list(launches)


def _batch(case: Case, spec: FluxSpec) -> Batch:
    width, height = map(int, case.size.split("x"))
    latents = (case.batch, spec.in_channels // 4, height // 8, width // 8)
    mean, std = (torch.empty(latents, device="meta") for _ in range(2))
    mask = mean[:, 0].clone() if case.batch > 1 else None
    text = (case.batch, spec.text_length, spec.context_in_dim)
    t5 = torch.empty(text, dtype=torch.bfloat16, device="meta")
    pooled = torch.empty(case.batch, spec.vec_in_dim, dtype=torch.bfloat16, device="meta")
    return Batch(mean, std, mask, t5, pooled, list(range(case.batch)))
