"""Selects the linears that a LoRA trains, and adds it to a model."""

import difflib
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from fluxfast import rng
from fluxfast.errors import ConfigError
from fluxfast.model.flux import Flux
from fluxfast.model.lora_dropout import LoRADropout
from fluxfast.model.lora_linear import LoRALinear, LowRankUpdate, Parts
from fluxfast.model.names import block_linears, diffusers_parts, part_rows
from fluxfast.model.precision import linears

PRESETS = {
    "attn": ("attn",),
    "attn+mlp": ("attn", "mlp"),
    "all": ("attn", "mlp", "modulation"),
}


@dataclass(frozen=True)
class Target:
    """A trainable part of a linear: its BFL module, diffusers module and rows."""

    module: str
    diffusers: str
    rows: tuple[int, int]


def _kind(diffusers: str) -> str:
    """Returns the kind of a part, which the presets select by."""
    name = diffusers.split(".", 2)[2]
    if name.startswith("norm"):
        return "modulation"
    return "attn" if name.startswith("attn.") else "mlp"


def _matches(pattern: str, target: Target) -> bool:
    names = (target.module, target.diffusers, f"transformer.{target.diffusers}")
    if any(sign in pattern for sign in "*?["):
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)
    return any(pattern in name for name in names)


def select_targets(
    spec, targets: str = "attn+mlp", include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Target]:
    """Returns the parts to train, in model order.

    targets: `attn` (q, k, v and the double blocks' output projections), `attn+mlp`, or `all` (the
    blocks' modulation linears too: 494 of diffusers' modules for FLUX.1-dev). A single block's
    `linear2` mixes attention and MLP and counts as MLP. include keeps only parts that match one of
    its patterns; exclude drops parts, and wins. A pattern with *, ? or [ is a glob over the whole
    name, any other a substring of it; both are tried on BFL and diffusers names. Raises ConfigError
    for a pattern that matches no part of the preset.
    """
    kinds = PRESETS[targets]
    chosen = [
        Target(module, diffusers, rows)
        for module in block_linears(spec)
        for diffusers, rows in zip(diffusers_parts(module), part_rows(module, spec), strict=True)
        if _kind(diffusers) in kinds
    ]
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(_matches(pattern, target) for target in chosen):
                names = {name for t in chosen for name in (t.module, t.diffusers)}
                close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
                raise ConfigError(
                    f"lora.{key}: {pattern!r} matches no module of the preset {targets!r}",
                    hint=f"names look like {(close or sorted(names))[0]!r}; "
                    "modulation linears need targets: all",
                )
    if include:
        chosen = [t for t in chosen if any(_matches(p, t) for p in include)]
    chosen = [t for t in chosen if not any(_matches(p, t) for p in exclude)]
    if not chosen:
        raise ConfigError("lora: include and exclude leave no module to train")
    return chosen


def inject_lora(
    model: Flux,
    rank: int = 16,
    alpha: float | None = None,
    targets: str = "attn+mlp",
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    share_a: bool = False,
    dropout: float = 0.0,
    seed: int | None = 0,
) -> list[nn.Parameter]:
    """Adds LoRA to `model` in place. Returns its parameters, fp32: A, then B of each module, in
    model order.

    scale = alpha / rank (alpha defaults to rank). Each part (q, k, v, mlp) of a fused linear has an
    A of its own unless share_a (kohya's form). A is a function of (seed, module); B is zero, so the
    output is unchanged. seed None leaves A unset: a LoRA to try things on.
    """
    alpha = float(rank if alpha is None else alpha)
    model.dropout_clock.seed = seed or 0
    parameters = []
    selected = select_targets(model.spec, targets, include, exclude)
    for module, parts in groupby(selected, lambda target: target.module):
        layer, rows = model.linear(module), [part.rows for part in parts]
        parts = [rows] if share_a else [[pair] for pair in rows]
        update = fresh_update(layer, rank, alpha, parts, seed=seed, stream=module)
        update.dropout = LoRADropout(dropout, module, model.dropout_clock) if dropout else None
        layer.add_update(update)
        parameters += update.parameters()
    return parameters


def fresh_update(
    layer: LoRALinear,
    rank: int,
    alpha: float,
    parts: Parts,
    *,
    seed: int | None = 0,
    stream: str = "lora",
) -> LowRankUpdate:
    """Returns a trainable update of `layer`, fp32 on its device: A uniform in ±1/sqrt(K) (as peft
    and kohya initialize it) or, for seed None, unset; B zero.
    """
    device = layer.device
    shape = (len(parts) * rank, layer.in_features)
    a = torch.empty(shape, device=device)
    if seed is not None:
        uniform = rng.uniform(seed, f"{stream}.lora_A", 0, shape, device)[0]
        a = (2 * uniform - 1) / math.sqrt(layer.in_features)
    rows = sum(end - start for ranges in parts for start, end in ranges)
    b = torch.zeros(rows, rank, device=device)
    return LowRankUpdate(a, b, parts, alpha / rank, trainable=True)


def lora_layers(model: Flux) -> dict[str, LoRALinear]:
    """Returns BFL name -> layer of the layers that carry a LoRA, in model order."""
    layers = {name: model.linear(name) for name in linears(model.spec)}
    return {name: layer for name, layer in layers.items() if layer.lora is not None}


def set_assisted(model: Flux, assisted: bool) -> None:
    """Switches frozen updates on (in training) or off (in previews and validation)."""
    for name in linears(model.spec):
        for update in model.linear(name).updates:
            if not update.trainable:
                update.strength = float(assisted)


def set_lora_strength(model: Flux, strength: float) -> None:
    """Scales every trainable update: 0 gives the base model, 1 the trained LoRA."""
    for layer in lora_layers(model).values():
        layer.lora.strength = strength
