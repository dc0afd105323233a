"""Every launch of a training step at FLUX.1-dev's widths, as a card would see it.

A step here: noise, target, embedders, modulation, blocks, last layer and loss, forward and
backward, on meta tensors. Without the optimizer, and without graphs, which launch the same.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import fluxfast_kernels as fk
import torch
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.quant.hadamard import LARGEST
from fluxfast_kernels.quant.rows import TOP, QuantizedRows
from torch.utils._python_dispatch import TorchDispatchMode

from bench.twin.driver import Launch, card
from fluxfast.model.flux import Flux
from fluxfast.model.frozen_linear import Weight
from fluxfast.model.init import fill
from fluxfast.model.lora import inject_lora
from fluxfast.model.names import linear_shape
from fluxfast.model.precision import IN_8_BITS, layer_precisions
from fluxfast.model.spec import DEV, NANO, FluxSpec, rope_axes
from fluxfast.objective import Batch, Inputs, noise_batch, sample_losses
from fluxfast.optim import FlatParameters

FP8_ARCH = 89  # the oldest compute capability that multiplies fp8

# Blocks whose launches are those of a whole model. Before the first double block nothing needs a
# gradient, so keep stands twice; int8 also saves what gelu_int8 does; recompute_mlp and checkpoint
# launch a forward again; offload launches what keep does.
BLOCKS = ("keep", "keep", "int8")
WHOLE = ("keep",) * DEV.depth, ("keep",) * DEV.depth_single_blocks
WIDTHS = {  # a head's width: a model
    32: NANO,
    64: replace(DEV, num_heads=48, axes_dim=rope_axes(64)),
    128: DEV,
}


@dataclass(frozen=True)
class Case:
    """A configuration of the grid.

    storage: as the setting; also "nf4-nested", NF4 with double_quant. matmul: the setting
    `compute`; also "int8-rotated" and "fp8-rotated", with every layer rotated, and "fp16", which
    the ops take and the trainer does not. size: of the pictures, "width x height" in pixels. batch:
    more than one comes with masks. head_dim: of the model, see `WIDTHS`. attention: the backend;
    "auto": the card's.
    """

    arch: int = 89
    storage: str = "nf4"
    matmul: str = "int8"
    rank: int = 16
    targets: str = "attn+mlp"
    size: str = "1024x1024"
    batch: int = 1
    dropout: bool = False
    head_dim: int = 128
    attention: str = "auto"

    def __str__(self) -> str:
        line = f"sm_{self.arch} {self.storage}+{self.matmul} rank {self.rank} {self.targets}"
        return f"{line} {self.size} batch {self.batch}{' dropout' * self.dropout}"

    @property
    def model(self) -> tuple:
        """Arguments of `_model` but the spec."""
        return self.storage, self.matmul, self.rank, self.targets, self.dropout


@lru_cache(maxsize=1)
def _model(
    storage: str, matmul: str, rank: int, targets: str, dropout: bool, spec: FluxSpec
) -> Flux:
    """Returns a model on meta tensors with its LoRA and its gradients; arguments as `Case`'s."""
    storage, nested = storage.removesuffix("-nested"), storage.endswith("-nested")
    matmul, rotated = matmul.removesuffix("-rotated"), matmul.endswith("-rotated")
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(matmul, torch.bfloat16)
    choices = {"*_blocks.*attn*": "rotate", "*_mlp.*": "rotate", "*.linear?": "rotate"}

    precisions = layer_precisions(spec, storage, matmul, choices if rotated else None)

    def read(name: str) -> Weight:
        module, _, kind = name.rpartition(".")
        if kind == "scale":
            return torch.empty(spec.head_dim, dtype=dtype, device="meta")
        shape = linear_shape(module, spec)
        if kind == "bias":
            return torch.empty(shape[0], dtype=dtype, device="meta")
        return _weight(shape, "" if rotated else precisions[module].storage, nested, dtype)

    model = Flux(spec, dtype)
    fill(model, read, precisions, nested=nested, device="meta")
    for layer in map(model.linear, precisions if matmul == "fp16" else ()):
        if layer.weight is not None:
            layer.weight = layer.weight.half()
    # seed None: A stays unset, as all here
    lora = inject_lora(model, rank, targets=targets, dropout=0.1 * dropout, seed=None)
    FlatParameters(lora)
    return model.train()


@cache
def _weight(shape: tuple[int, int], storage: str, nested: bool, dtype: torch.dtype) -> Weight:
    """Returns a weight on meta tensors, in its storage already if that is quantized: to quantize
    one for every layer takes longer than a step."""
    weight = torch.empty(shape, dtype=dtype, device="meta")
    if storage == "nf4":
        return fk.nf4_quantize(weight, nested)
    if storage in IN_8_BITS:
        return QuantizedRows(*fk.quantize_8bit(weight, storage))
    return weight


def step_launches(
    case: Case, doubles: tuple[str, ...] = BLOCKS, singles: tuple[str, ...] = BLOCKS
) -> list[Launch]:
    """Returns the launches of a step over double and single blocks of these memory policies."""
    return run_step(case, doubles, singles, WIDTHS[case.head_dim])


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
    with card(case.arch, case.attention) as launches:
        model = _model(*case.model, spec)
        model.policies = [*doubles, *singles]
        launches.clear()
        inputs, noised = _inputs(case.arch, case.size, case.batch, spec)
        launches[:] = noised
        if not any(layer.trains() for layer in model.modulation_linears()):
            guidance = torch.ones_like(inputs.timesteps)
            with torch.no_grad():
                ahead = model.modulation(inputs.timesteps, inputs.pooled, guidance)
            inputs = inputs._replace(modulation=ahead)
        model.dropout_clock.indices = inputs.indices
        with watch or nullcontext():
            sample_losses(model, inputs, guidance=1.0).mean().backward()
        return list(launches)


@cache
def launches_apart(arch: int) -> list[Launch]:
    """Returns the launches of ops that a step need not call, in every dtype: those of weights that
    are loaded or merged, and `quantize_rows` with each of its options."""
    kinds = [kind for kind in TOP if kind != "fp8" or arch >= FP8_ARCH]
    with card(arch) as launches:
        for dtype in DTYPES:
            weight = torch.empty(3072, 3072, dtype=dtype, device="meta")
            fk.hadamard_rotate(weight, LARGEST)
            nested = fk.nf4_quantize(weight, nested=True)
            stacked = replace(nested, offset=nested.nested_absmax)  # of several matrices
            for nf4 in (fk.nf4_quantize(weight), nested, stacked):
                fk.nf4_dequantize(nf4, dtype)
            x, gate, channel = weight[None], weight[None, :1], torch.empty(3072, device="meta")
            for kind in kinds:
                fk.quantize_rows(x, kind)
                fk.quantize_rows(x[..., :128], kind)
                fk.quantize_rows(x, kind, rotation=LARGEST)
                fk.quantize_rows(x, kind, gate=gate)
                fk.quantize_rows(x, kind, channel, gate=gate)
        return list(launches)


@lru_cache(maxsize=16)
def _inputs(arch: int, size: str, batch: int, spec: FluxSpec) -> tuple[Inputs, list[Launch]]:
    """Returns a step's inputs on meta tensors, and the launches that make them."""
    width, height = map(int, size.split("x"))
    latents = (batch, spec.in_channels // 4, height // 8, width // 8)
    mean, std = (torch.empty(latents, device="meta") for _ in range(2))
    mask = mean[:, 0].clone() if batch > 1 else None
    text = (batch, spec.text_length, spec.context_in_dim)
    t5 = torch.empty(text, dtype=torch.bfloat16, device="meta")
    pooled = torch.empty(batch, spec.vec_in_dim, dtype=torch.bfloat16, device="meta")
    with card(arch) as launches:
        encoded = Batch(mean, std, mask, t5, pooled, list(range(batch)))
        return noise_batch(encoded, 0, device="meta"), list(launches)
