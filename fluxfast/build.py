"""What a run trains with: the frozen model and its LoRA, from files; `assemble` does the rest."""

import logging
from collections import Counter

import torch

from fluxfast.assemble import assemble
from fluxfast.checkpoint import checkpoints
from fluxfast.config import Config
from fluxfast.data.loader import Loader
from fluxfast.formats.lora import init_lora, load_assistant, lora_of, read_lora
from fluxfast.formats.lora_write import to_state
from fluxfast.hub import fetch_lora
from fluxfast.load import ResolvedModel, load_resolved
from fluxfast.memory.plan import Plan
from fluxfast.model.flux import Flux
from fluxfast.model.lora import inject_lora, lora_layers
from fluxfast.model.precision import linears, multiplies_in_8_bits
from fluxfast.ranks import ALONE, Ranks
from fluxfast.step import Training
from fluxfast.terminal import spinner

log = logging.getLogger(__name__)


def check_loras(config: Config, fresh: bool) -> None:
    """Raise FluxfastError where a LoRA file that the run needs cannot be read: said before pictures
    are encoded. fresh: the run starts at step 0, from `lora.init_from` where there is one.
    """
    if config.model.assistant_lora:
        read_lora(fetch_lora(config.model.assistant_lora))
    if config.lora.init_from and fresh:
        read_lora(config.lora.init_from)


def build(
    config: Config,
    resolved: ResolvedModel,
    loader: Loader,
    device: torch.device,
    plan: Plan | None = None,
    ranks: Ranks = ALONE,
) -> Training:
    """The frozen model with its LoRA, and everything that trains it as planned."""
    assistant = config.model.assistant_lora and fetch_lora(config.model.assistant_lora)
    with spinner("loading the transformer"):
        model = load_resolved(
            resolved,
            device,
            double_quant=config.model.double_quant,
        )
    lora = config.lora
    parameters = inject_lora(
        model,
        lora.rank,
        lora.alpha,
        lora.targets,
        include=lora.include,
        exclude=lora.exclude,
        share_a=lora.share_a,
        dropout=lora.dropout,
        seed=config.seed,
    )
    if lora.init_from and not checkpoints(config.run_dir):
        init_lora(model, lora.init_from)
        log.info(f"starting from {lora.init_from}")
    if "xlabs" in config.save.formats:  # it cannot hold everything: say so now
        to_state(lora_of(model), "xlabs")
    if assistant:
        load_assistant(model, assistant)
        log.info(f"{config.model.assistant_lora} assists in training, not in previews and files")
    if lora.dropout:
        log.warning("note: LoRA dropout takes the path that is not fused: slower, more memory")
    model.train()
    trained = sum(p.numel() for p in parameters)
    log.info(
        f"{len(lora_layers(model))} layers carry a LoRA of rank {lora.rank}: "
        f"{trained / 1e6:.2f} M parameters; {model.img_in.weight.device}, {_precision(model)}",
    )
    return assemble(config, model, parameters, loader, device, plan, ranks)


def _precision(model: Flux) -> str:
    """Such as: base in nf4, int8 products, activations in bf16, 3 layers rotated, 2 in bf16."""
    layers = {name: model.get_submodule(name) for name in linears(model.spec)}
    blocks = [layer for name, layer in layers.items() if multiplies_in_8_bits(name)]
    coded = [layer for layer in blocks if layer.products]
    stored = Counter(layer.storage() for layer in coded or blocks).most_common(1)[0][0]
    dtype = "fp32" if model.compute_dtype == torch.float32 else "bf16"
    if not coded:
        return f"base in {stored}, computed in {dtype}"
    line = f"base in {stored}, {coded[0].products} products, activations in {dtype}"
    rotated = sum(layer.rotation > 0 for layer in layers.values())
    line += f", {rotated} {'layer' if rotated == 1 else 'layers'} rotated" if rotated else ""
    dense = [layer for layer in blocks if not layer.products]
    return line + (f", {len(dense)} in {dense[0].storage()}" if dense else "")
