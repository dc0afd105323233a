"""From a configuration to a memory plan, and what is printed of one."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fluxfast.config.schema import Config, ModelConfig
from fluxfast.data.buckets import STEP
from fluxfast.errors import ConfigError
from fluxfast.formats.base.load import ResolvedModel, choose_precision, stored_as
from fluxfast.formats.base.reader import open_base
from fluxfast.formats.lora.read import ranks_of
from fluxfast.formats.lora.update import part_count
from fluxfast.memory.planner.cards import Card, card
from fluxfast.memory.planner.plan import CONTEXT, GIB, Plan, Request, usable
from fluxfast.memory.planner.step_spec import Shape, Work, lora_of
from fluxfast.memory.planner.suggest import DoesNotFit, make_plan, plan_on
from fluxfast.model.names import linear_shape
from fluxfast.model.precision import DTYPES, layer_precisions, linears
from fluxfast.model.spec import DEV, SCHNELL, FluxSpec
from fluxfast.util.hub import fetch_lora

# memory in GiB -> the card that stands for it where none is named
PRESETS = {12: "RTX 3060 12 GB", 16: "RTX 4060 Ti 16 GB", 24: "RTX 4090", 80: "H100 SXM 80 GB"}


def request_of(
    config: Config,
    model: ResolvedModel,
    shapes: Mapping[str, Shape],
    graphs: bool = True,
    assistant: Path | None = None,
) -> Request:
    """assistant: a LoRA file."""
    lora, memory, spec = config.lora, config.memory, model.spec
    trained = lora_of(spec, lora.rank, lora.targets, lora.include, lora.exclude, lora.share_a)
    dropout, layers = lora.dropout > 0, config.model.layers
    precision = model.storage, model.matmul, model.activations
    work = Work(spec, *precision, trained, dropout, layers)
    return Request(
        work,
        shapes,
        optimizer=config.train.optimizer,
        ema=config.train.ema.enabled,
        double_quant=config.model.double_quant,
        saved_8bit=memory.saved_8bit,
        policy=memory.policy,
        modulation=memory.modulation,
        optimizer_state=memory.optimizer_state,
        graphs=memory.graphs and not dropout,
        preview_pixels=config.sample.width * config.sample.height * bool(config.sample.prompts),
        encodes=spec.context_in_dim == DEV.context_in_dim,
        accumulation=config.train.gradient_accumulation,
        assistant=assistant_bytes(assistant, spec) if assistant else 0,
    )


def assistant_bytes(path: Path, spec: FluxSpec) -> int:
    """What the factors of the LoRA file take in fp32 at the most, an A for every part.

    Raises ConfigError for a file that cannot be read.
    """
    names = set(linears(spec))
    values = 0
    for name, rank in ranks_of(path).items():
        if name in names:
            rows, columns = linear_shape(name, spec)
            values += rank * (part_count(name) * columns + rows)
    return 4 * values


# ---------------------------------------------------------------- for a run


def plan_run(
    config: Config, model: ResolvedModel, shapes: Mapping[str, Shape], device: torch.device
) -> Plan | None:
    """The plan of a run on the device, its encoders gone; None on a CPU without memory.limit_gib.

    shapes: label -> batch shape, of every bucket. Raises ConfigError where nothing fits.
    """
    limit = config.memory.limit_gib
    if device.type != "cuda" and limit is None:
        return None
    cuda = device.type == "cuda"
    lora = config.model.assistant_lora
    file = fetch_lora(lora) if lora else None
    request = request_of(config, model, shapes, graphs=cuda, assistant=file)
    return plan_on(device, replace(request, encodes=False), limit)


def run_lines(plan: Plan, on_gpu: bool) -> list[str]:
    """What `train` says of its plan before it starts."""
    where = {"in_place": "formed in place", "ahead": "formed ahead", "host": "ahead, from the host"}
    lines = [
        f"plan for the {plan.card.name}: {plan.peak / GIB:.3g} of {plan.limit / GIB:.3g} GiB "
        f"(predicted), modulation {where[plan.modulation]}"
        + (", optimizer state on the host" if plan.optimizer_state == "host" else "")
    ]
    if not on_gpu:
        lines[0] += "; the device is a CPU, times are those of that card"
    for label, bucket in plan.buckets.items():
        host = f", {bucket.choice.host / GIB:.1f} GiB on the host" if bucket.choice.host else ""
        lines.append(
            f"  {label}: {summary(bucket.choice.policies)}; {bucket.bytes / GIB:.3g} GiB{host}, "
            f"{plan.seconds(label):.3g} s/it (predicted)"
        )
    return lines


def summary(policies: tuple[str, ...]) -> str:
    """Such as: 53 blocks keep, 4 gelu_int8."""
    counts = Counter(policies).most_common()
    first = f"{counts[0][1]} block{'s' * (counts[0][1] != 1)} {counts[0][0]}"
    return ", ".join([first, *(f"{count} {policy}" for policy, count in counts[1:])])


# ---------------------------------------------------------------- `fluxfast plan`


@dataclass(frozen=True)
class Row:
    """One line of the table: a plan, or why there is none."""

    card: Card
    vram_gib: float
    label: str
    plan: Plan | None
    reason: str = ""

    def seconds(self) -> float:
        """Of an optimizer step, the mean over the plan's picture sizes."""
        plan = self.plan
        assert plan is not None
        return sum(plan.seconds(label) for label in plan.buckets) / len(plan.buckets)


def plan_rows(config: Config, vram_gib: float | None, gpu: str | None) -> list[Row]:
    """Plans of a configuration on the cards asked for.

    Every picture size has a plan of its own; more than one have one of them together, too. An
    assistant LoRA counts where it is on this disk. Raises
    ConfigError for an unknown card, or a model on this disk that cannot be read.
    """
    limit = config.memory.limit_gib or math.inf
    cards = [(known, min(gib, limit)) for known, gib in _cards(vram_gib, gpu)]
    spec, stored = _model(config.model)
    assistant = config.model.assistant_lora and Path(config.model.assistant_lora)
    assistant = assistant if assistant and assistant.exists() else None
    sides = sorted({side for data in config.data for side in data.resolution})
    batch = config.train.batch_size
    text = config.model.max_sequence_length or spec.text_length
    shapes = {f"{side} px": _largest(side, batch, text) for side in sides}
    sets = [{label: shape} for label, shape in shapes.items()]
    sets += [shapes] if len(shapes) > 1 else []
    rows = []
    for known, vram in cards:
        for chosen in sets:
            label = next(iter(chosen)) if len(chosen) == 1 else "mixed"
            try:
                model = _resolved(config.model, spec, stored, known, vram)
                request = request_of(config, model, chosen, assistant=assistant)
                rows.append(Row(known, vram, label, make_plan(request, known, usable(vram))))
            except DoesNotFit as error:
                reason = f"{error.message.removeprefix('this does not fit: ')}; {error.hint}"
                rows.append(Row(known, vram, label, None, reason))
            except ConfigError as error:
                if len(cards) == 1:
                    raise
                rows.append(Row(known, vram, label, None, error.message))
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
    """The model as a card would have it; the file need not be here."""
    storage = stored_as(model.storage, model.compute, stored)
    storage, matmul = choose_precision(storage, model.compute, known.capability, vram_gib, True)
    activations = matmul if matmul in DTYPES else "bf16"
    precisions = layer_precisions(spec, storage, matmul, model.layers)
    return ResolvedModel(Path(model.path), spec, storage, matmul, activations, precisions)


def _model(model: ModelConfig) -> tuple[FluxSpec, str | None]:
    """-> sizes, and the storage that the file is quantized for; of what is not on this disk those
    of FLUX.1-schnell or dev, by its name."""
    if not Path(model.path).exists():
        return SCHNELL if "schnell" in model.path.lower() else DEV, None
    with open_base(Path(model.path)) as checkpoint:
        return checkpoint.spec, checkpoint.storage


def _largest(side: int, batch: int, text: int) -> Shape:
    """Of the largest picture that a bucket of this resolution may hold, whatever its aspect."""
    cells = max(1, side * side // STEP**2)
    return Shape(batch, cells * (STEP // 16) ** 2, text)


def table(rows: list[Row]) -> list[str]:
    """Aligned columns. GiB: allocated at the most, and CONTEXT for CUDA itself."""
    head = ["card", "GiB", "picture", "needs GiB", "host GiB", "s/it", "it/s", "blocks"]
    lines = [head]
    for row in rows:
        start = [row.card.name, f"{row.vram_gib:g}", row.label]
        if row.plan is None:
            lines.append([*start, "does not fit", "", "", "", row.reason])
            continue
        plan = row.plan
        seconds = row.seconds()
        host = f"{plan.host / GIB:.1f}" if plan.host else "-"
        figures = [f"{(plan.peak + CONTEXT) / GIB:.2f}", host, f"{seconds:.3f}"]
        lines.append([*start, *figures, f"{1 / seconds:.2f}", what(plan)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = [
        "  ".join(
            cell.rjust(width) if 3 <= index < 7 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    notes = sorted({_basis(row.card) for row in rows})
    pinned = " Host GiB are pinned: `train` takes half of what is free at most."
    note = "All figures are predicted; speeds from " + "; ".join(notes) + "."
    return [*table, "", note + (pinned if any(row.plan and row.plan.host for row in rows) else "")]


def breakdown(rows: list[Row]) -> list[str]:
    """Where the GiB of the last plan go; nothing where more than one card is asked about."""
    plans = [row.plan for row in rows if row.plan is not None]
    if not plans or len({row.card.name for row in rows}) > 1:
        return []
    plan = plans[-1]
    on_card = {name: size for name, size in plan.static.items() if size and name != "host"}
    lines = ["", f"Where it goes ({', '.join(plan.buckets)}), GiB:"]
    lines += [f"  {size / GIB:6.2f}  {name}" for name, size in on_card.items()]
    for label, bucket in plan.buckets.items():
        activations = bucket.bytes - sum(on_card.values())
        lines.append(f"  {activations / GIB:6.2f}  activations and passes, {label}")
    lines.append(f"  {CONTEXT / GIB:6.2f}  CUDA itself (assumed)")
    lines += ["At the most, by phase, without CUDA itself:"]
    lines += [f"  {size / GIB:6.2f}  {phase}" for phase, size in plan.phases.items()]
    return lines


def what(plan: Plan) -> str:
    """How a plan goes about it; of several sizes, the largest."""
    work = plan.request.work
    words = [f"{work.storage} base, {work.matmul} matmuls"]
    if len(plan.buckets) == 1:
        (bucket,) = plan.buckets.values()
        words.append(summary(bucket.choice.policies))
    else:
        largest = max(plan.buckets, key=lambda label: plan.buckets[label].shape.tokens)
        words.append(f"{largest}: {summary(plan.buckets[largest].choice.policies)}")
    words += ["modulation from the host"] if plan.modulation == "host" else []
    words += ["optimizer state on the host"] if plan.optimizer_state == "host" else []
    return "; ".join(words)


def _basis(known: Card) -> str:
    if known.factors:
        return f"measured steps ({known.name})"
    return "data sheets and assumed shares of them"
