"""What a run trains with: the frozen model with its LoRA, the optimizer, the moving average, memory
as planned, and modulation computed ahead.

`assemble` runs with torch and triton alone: the configuration and the loader are imported for types
only, and what reads files is imported inside `build`.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fluxfast.distributed import SINGLE_PROCESS, Ranks
from fluxfast.memory.planner.plan import Plan
from fluxfast.memory.planner.step_spec import Shape
from fluxfast.memory.runtime import MemoryRuntime
from fluxfast.model.flux import Flux
from fluxfast.model.lora import inject_lora, lora_layers
from fluxfast.model.modulation import ModulationCache
from fluxfast.model.precision import linears, multiplies_in_8_bits
from fluxfast.objective import draw_timesteps
from fluxfast.optim import Ema, FlatParameters, build_optimizer
from fluxfast.step import Training

if TYPE_CHECKING:
    from fluxfast.config.schema import Config
    from fluxfast.data.loader import Loader
    from fluxfast.formats.base.load import ResolvedModel

log = logging.getLogger(__name__)


def build(
    config: Config,
    resolved: ResolvedModel,
    loader: Loader,
    device: torch.device,
    plan: Plan | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Training:
    """Load the frozen model, inject its LoRA, and assemble everything that trains it as planned."""
    from fluxfast.formats.base.load import load_resolved
    from fluxfast.formats.lora.apply import init_lora, load_assistant
    from fluxfast.run.checkpoint import checkpoints
    from fluxfast.util.hub import fetch_lora
    from fluxfast.util.terminal import spinner

    assistant = config.model.assistant_lora and fetch_lora(config.model.assistant_lora)
    with spinner("loading the transformer"):
        model = load_resolved(
            resolved,
            device,
            double_quant=config.model.double_quant,
            on_host=() if plan is None else plan.weights_on_host,
        )
    lora = config.lora
    parameters = inject_lora(model, **lora.model_dump(exclude={"init_from"}), seed=config.seed)
    if lora.init_from and not checkpoints(config.run_dir):
        init_lora(model, lora.init_from)
        log.info(f"starting from {lora.init_from}")
    if assistant:
        load_assistant(model, assistant)
        log.info(f"{config.model.assistant_lora} assists in training, not in previews and files")
    if lora.dropout:
        log.warning("note: LoRA dropout takes the path that is not fused: slower, more memory")
    model.train()
    trained = sum(p.numel() for p in parameters)
    log.info(
        f"{len(lora_layers(model))} layers carry a LoRA of rank {lora.rank}: "
        f"{trained / 1e6:.2f} M parameters; {model.img_in.device}, "
        f"{_precision(model)}"
    )
    return assemble(config, model, parameters, loader, device, plan, ranks)


def _precision(model: Flux) -> str:
    """Returns such as: base in nf4, int8 products, activations in bf16, 3 layers rotated."""
    layers = {name: model.linear(name) for name in linears(model.spec)}
    blocks = [layer for name, layer in layers.items() if multiplies_in_8_bits(name)]
    in_8_bits = [layer for layer in blocks if layer.matmul]
    stored = Counter(layer.storage() for layer in in_8_bits or blocks).most_common(1)[0][0]
    dtype = "fp32" if model.compute_dtype == torch.float32 else "bf16"
    if not in_8_bits:
        return f"base in {stored}, computed in {dtype}"
    line = f"base in {stored}, {in_8_bits[0].matmul} products, activations in {dtype}"
    rotated = sum(layer.rotation > 0 for layer in layers.values())
    line += f", {rotated} {'layer' if rotated == 1 else 'layers'} rotated" if rotated else ""
    dense = [layer for layer in blocks if not layer.matmul]
    return line + (f", {len(dense)} in {dense[0].storage()}" if dense else "")


def _bucket_labels(loader: Loader) -> dict[tuple[int, int], str]:
    """Returns (samples of a batch, image tokens of each) -> name of its buckets, the smallest one's
    size.
    """
    labels: dict[tuple[int, int], str] = {}
    for (width, height), count in loader.buckets:
        rows, columns = loader.latent_sizes[width, height]
        name = f"{width}x{height}"
        name = f"{count} of {name}" if name in labels.values() else name
        labels.setdefault((count, (rows // 2) * (columns // 2)), name)
    return labels


def bucket_shapes(loader: Loader) -> dict[str, Shape]:
    """Returns bucket name -> shape of this process's share of a batch."""
    return {
        label: Shape(count, tokens, loader.text_length)
        for (count, tokens), label in _bucket_labels(loader).items()
    }


def assemble(
    config: Config,
    model: Flux,
    parameters: list[nn.Parameter],
    loader: Loader,
    device: torch.device,
    plan: Plan | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Training:
    """Returns a model with everything that trains it. parameters: as `inject_lora` returns them."""
    labels = _bucket_labels(loader)
    memory = MemoryRuntime(model, plan, _policies(config, model, labels, plan), device)
    flat = FlatParameters(parameters, config.train)
    run = Training(
        config,
        device,
        model,
        flat,
        optimizer=build_optimizer(config.train, flat),
        ema=Ema(flat, config.train.ema.decay) if config.train.ema.enabled else None,
        memory=memory,
        labels=labels,
        loader=loader,
        modulation_cache=_modulation_cache(config, model, loader, device, plan),
        ranks=ranks,
    )
    memory.attach(run.optimizer)
    run.graphs = memory.make_graphs(
        run.gradient_pass,
        flat.gradients,
        run.examples,
        wanted=config.memory.graphs,
    )
    return run


def _policies(
    config: Config, model: Flux, labels: dict[tuple[int, int], str], plan: Plan | None
) -> dict[str, tuple[str, ...]]:
    """Returns bucket -> policy per block: the plan's, else the configured one for all."""
    if plan is not None:
        return {label: bucket.choice.policies for label, bucket in plan.buckets.items()}
    policy = "keep" if config.memory.policy == "auto" else config.memory.policy
    return {label: (policy,) * len(model.policies) for label in labels.values()}


def _modulation_cache(
    config: Config, model: Flux, loader: Loader, device: torch.device, plan: Plan | None
) -> ModulationCache | None:
    """Returns what computes modulation ahead, None where a step computes its own."""
    modulation = config.memory.modulation if plan is None else plan.modulation
    trained = plan is None and any(layer.trains() for layer in model.modulation_linears())
    if trained or modulation == "in_place":
        return None
    train = config.train

    def conditions(number: int) -> tuple[Tensor, Tensor]:
        indices, tokens, pooled = loader.peek(number)
        settings = config.seed, indices, tokens, train.timesteps, train.timestep_bias, device
        return draw_timesteps(*settings), pooled

    stop = train.steps * train.gradient_accumulation
    largest = max(count for _, count in loader.buckets)
    return ModulationCache(model.modulation, conditions, train.guidance, largest, stop)
