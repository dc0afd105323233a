"""From a configuration to memory plans: a run's, and those that `fluxfast plan` compares."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fluxfast.config.schema import Config, ModelConfig, SampleConfig
from fluxfast.data.buckets import STEP
from fluxfast.errors import ConfigError
from fluxfast.formats.base.load import ResolvedModel, choose_precision
from fluxfast.formats.base.reader import open_base
from fluxfast.formats.lora.read import ranks_of
from fluxfast.memory.planner.cards import Card, card
from fluxfast.memory.planner.plan import CONTEXT, GIB, Plan, Request, usable
from fluxfast.memory.planner.report import Row
from fluxfast.memory.planner.step_spec import Shape, StepSpec, lora_of
from fluxfast.memory.planner.suggest import DoesNotFit, make_plan, plan_on
from fluxfast.model.names import diffusers_parts, linear_shape
from fluxfast.model.precision import DTYPES, layer_precisions, linears
from fluxfast.model.spec import DEV, SCHNELL, FluxSpec
from fluxfast.util.files import expanded
from fluxfast.util.hub import fetch_lora

# memory in GiB -> the card that stands for it where none is named
PRESETS = {12: "RTX 3060 12 GB", 16: "RTX 4060 Ti 16 GB", 24: "RTX 4090", 80: "H100 SXM 80 GB"}


def _request(
    config: Config,
    model: ResolvedModel,
    shapes: Mapping[str, Shape],
    find: Callable[[str], Path],
) -> Request:
    """Returns what the planner needs to know. shapes: as in `plan_run`; find: returns the file of
    a LoRA, which counts if it is there.
    """

    def factors(*loras: str) -> int:
        files = [find(lora) for lora in loras]
        return sum(assistant_bytes(file, spec) for file in files if file.exists())

    lora, memory, spec = config.lora, config.memory, model.spec
    trained = lora_of(spec, lora.rank, lora.targets, lora.include, lora.exclude, lora.share_a)
    dropout = lora.dropout > 0
    precision = model.storage, model.matmul, model.activations
    return Request(
        StepSpec(spec, *precision, trained, dropout, config.model.layers),
        shapes,
        optimizer=config.train.optimizer,
        ema=config.train.ema.enabled,
        double_quant=config.model.double_quant,
        saved_8bit=memory.saved_8bit,
        policy=memory.policy,
        modulation=memory.modulation,
        optimizer_state=memory.optimizer_state,
        graphs=memory.graphs,
        preview_pixels=_preview_pixels(config.sample),
        preview_loras=max(
            (factors(*(lora.file for lora in each.loras)) for each in config.sample.all_drawn()),
            default=0,
        ),
        encodes=spec.context_in_dim == DEV.context_in_dim,
        accumulation=config.train.gradient_accumulation,
        assistant=factors(config.model.assistant_lora) if config.model.assistant_lora else 0,
    )


def _preview_pixels(sample: SampleConfig) -> int:
    """Returns the pixels of the largest preview, 0 where there is none."""
    shared = [(sample.width, sample.height)] if sample.prompts else []
    own = [(s.width or sample.width, s.height or sample.height) for s in sample.samples]
    return max((width * height for width, height in [*shared, *own]), default=0)


def assistant_bytes(path: Path, spec: FluxSpec) -> int:
    """Returns the most bytes that the LoRA file's factors take in fp32, an A for every part.

    Raises ConfigError for a file that cannot be read.
    """
    names = set(linears(spec))
    values = 0
    for name, rank in ranks_of(path).items():
        if name in names:
            rows, columns = linear_shape(name, spec)
            values += rank * (len(diffusers_parts(name)) * columns + rows)
    return 4 * values


# ---------------------------------------------------------------- for a run


def plan_run(
    config: Config,
    model: ResolvedModel,
    shapes: Mapping[str, Shape],
    device: torch.device,
    host: int | None = None,
) -> Plan | None:
    """Returns the plan of a run on the device, its encoders freed; None on a CPU without
    memory.limit_gib.

    shapes: label -> batch shape, of every bucket; host: as for `plan_on`. Raises ConfigError where
    nothing fits.
    """
    limit = config.memory.limit_gib
    if device.type != "cuda" and limit is None:
        return None
    request = _request(config, model, shapes, fetch_lora)
    return plan_on(device, replace(request, encodes=False), limit, host)


# ---------------------------------------------------------------- `fluxfast plan`


def plan_rows(config: Config, vram_gib: float | None, gpu: str | None) -> list[Row]:
    """Returns plans of a configuration on the cards asked for: one per picture size and, of several
    sizes, one for all of them together.

    A LoRA beside the trained one counts only if it is on this disk. Raises ConfigError for an
    unknown card, or a model on this disk that cannot be read.
    """
    cards = _cards(vram_gib, gpu)
    spec, stored = _spec_and_storage(config.model)
    text = config.model.max_sequence_length or spec.text_length
    shapes = {}
    for side in sorted({side for data in config.data for side in data.resolution}):
        # the largest picture that a bucket of this resolution may hold, whatever its aspect
        cells = max(1, side * side // STEP**2)
        entries = zip(config.data, config.batch_sizes, strict=True)
        batch = max(size for data, size in entries if side in data.resolution)
        shapes[f"{side} px"] = Shape(batch, cells * (STEP // 16) ** 2, text)
    sets = {label: {label: shape} for label, shape in shapes.items()}
    if len(shapes) > 1:
        sets["mixed"] = shapes
    rows = []
    for known, gib in cards:
        vram = min(gib, config.memory.limit_gib or math.inf)
        for label, chosen in sets.items():
            plan, reason = None, ""
            try:
                model = _resolved(config.model, spec, stored, known, vram)
                room = usable(gib, known.visible)
                if config.memory.limit_gib:
                    room = min(room, int(config.memory.limit_gib * GIB) - CONTEXT)
                plan = make_plan(_request(config, model, chosen, expanded), known, room)
            except DoesNotFit as error:
                reason = f"{error.message.removeprefix('this does not fit: ')}; {error.hint}"
            except ConfigError as error:
                if len(cards) == 1:
                    raise
                reason = error.message
            rows.append(Row(known, vram, label, plan, reason))
    return rows


def _cards(vram_gib: float | None, gpu: str | None) -> list[tuple[Card, float]]:
    if gpu is not None:
        known = card(gpu)
        return [(known, vram_gib or known.vram_gib)]
    if vram_gib is not None:
        usual = PRESETS | {32: "RTX 5090", 48: "L40S"}
        nearest = min(usual, key=lambda gib: abs(gib - vram_gib))
        return [(card(usual[nearest]), vram_gib)]
    return [(card(name), gib) for gib, name in PRESETS.items()]


def _resolved(
    model: ModelConfig, spec: FluxSpec, stored: str | None, known: Card, vram_gib: float
) -> ResolvedModel:
    """Returns the model as it would run on a card; its file need not be on this disk."""
    storage, matmul = choose_precision(
        model.storage, model.compute, known.capability, vram_gib, True, stored
    )
    activations = matmul if matmul in DTYPES else "bf16"
    precisions = layer_precisions(spec, storage, matmul, model.layers)
    return ResolvedModel(expanded(model.path), spec, storage, matmul, activations, precisions)


def _spec_and_storage(model: ModelConfig) -> tuple[FluxSpec, str | None]:
    """Returns the model's sizes and the storage that its file is quantized for. For a model that is
    not on this disk the sizes are those of FLUX.1-schnell or dev, by its name.
    """
    if not expanded(model.path).exists():
        return SCHNELL if "schnell" in model.path.lower() else DEV, None
    with open_base(expanded(model.path)) as checkpoint:
        return checkpoint.spec, checkpoint.storage
