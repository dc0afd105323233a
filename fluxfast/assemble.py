"""Around a model and its LoRA everything that trains them: the optimiser, the average, memory as
planned, the modulation of coming samples.

Runs with torch and triton alone: of the configuration and the loader only the types are named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fluxfast.ahead import Ahead
from fluxfast.errors import ConfigError
from fluxfast.memory.plan import Plan
from fluxfast.memory.runtime import MemoryRuntime
from fluxfast.memory.work import Shape
from fluxfast.model.flux import Flux
from fluxfast.optim import Ema, build_optimizer, flat_gradients
from fluxfast.ranks import ALONE, Ranks
from fluxfast.step import Training

if TYPE_CHECKING:
    from fluxfast.config import Config
    from fluxfast.data.loader import Loader


def bucket_labels(loader: Loader) -> dict[int, str]:
    """Image tokens of a sample -> the name of the buckets of so many: the first one's size."""
    labels: dict[int, str] = {}
    for (width, height), (rows, columns) in sorted(loader.latent_sizes.items()):
        labels.setdefault((rows // 2) * (columns // 2), f"{width}x{height}")
    return labels


def bucket_shapes(loader: Loader) -> dict[str, Shape]:
    """Label -> shape of what this process takes of a batch."""
    labels = bucket_labels(loader)
    return {
        label: Shape(len(loader.places), tokens, loader.text_length)
        for tokens, label in labels.items()
    }


def assemble(
    config: Config,
    model: Flux,
    parameters: list[nn.Parameter],
    loader: Loader,
    device: torch.device,
    plan: Plan | None = None,
    ranks: Ranks = ALONE,
) -> Training:
    """parameters: the LoRA's, as `inject_lora` gives them."""
    ema = Ema(parameters, config.train.ema.decay) if config.train.ema.enabled else None
    optimizer = build_optimizer(config.train, parameters)
    labels, policies = bucket_labels(loader), _policies(config, model, loader, plan)
    memory = MemoryRuntime(model, plan, policies, device)
    memory.attach(optimizer)
    gradients = flat_gradients(parameters)
    run = Training(
        config, device, model, parameters, gradients, optimizer, ema, memory,
        labels, loader, ranks=ranks,
    )  # fmt: skip
    run.graphs = memory.make_graphs(
        run.gradient_pass, gradients, run.examples,
        lora_dropout=config.lora.dropout > 0, wanted=config.memory.graphs,
    )  # fmt: skip
    if _forms_ahead(config, model, plan):
        run.ahead = Ahead(model, loader, config, device)
    return run


def _policies(
    config: Config, model: Flux, loader: Loader, plan: Plan | None
) -> dict[str, tuple[str, ...]]:
    """Bucket -> policy per block: the plan's, else the configured one for all."""
    if plan is not None:
        return {label: bucket.choice.policies for label, bucket in plan.buckets.items()}
    memory = config.memory
    if (
        memory.policy == "offload"
        or memory.modulation == "host"
        or memory.optimizer_state == "host"
    ):
        raise ConfigError(
            "memory: what goes to the host is planned, and on a CPU there is no plan",
            hint="set memory.limit_gib to try one",
        )
    word = "keep" if memory.policy == "auto" else memory.policy
    return {label: (word,) * len(model.policies) for label in bucket_labels(loader).values()}


def _forms_ahead(config: Config, model: Flux, plan: Plan | None) -> bool:
    if plan is not None:
        return plan.modulation != "in_place"
    trained = any(layer.trains() for layer in model.modulation_linears())
    if trained and config.memory.modulation == "ahead":
        raise ConfigError(
            "memory.modulation: ahead needs frozen modulation, and lora.targets: all trains it"
        )
    return not trained and config.memory.modulation != "in_place"
