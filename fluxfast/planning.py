"""From a configuration to a memory plan, and what is printed of one."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fluxfast.config import Config, ModelConfig
from fluxfast.data.buckets import STEP
from fluxfast.errors import ConfigError
from fluxfast.formats.base import open_base
from fluxfast.load import choose_precision, resolve_precision
from fluxfast.memory.cards import Card, card, closest
from fluxfast.memory.plan import CONTEXT, GIB, MARGIN, Plan, Request, make_plan, usable
from fluxfast.memory.work import Shape, Work, lora_of, shape_of
from fluxfast.model.precision import DTYPES, activation_dtype
from fluxfast.model.spec import DEV, FluxSpec

# memory in GiB -> the card that stands for it where none is named
PRESETS = {12: "RTX 3060 12 GB", 16: "RTX 4060 Ti 16 GB", 24: "RTX 4090", 80: "H100 SXM 80 GB"}


def request_of(
    config: Config,
    spec: FluxSpec,
    precision: tuple[str, str, str],
    shapes: Mapping[str, Shape],
    graphs: bool = True,
) -> Request:
    """precision: storage, compute, activations, without `auto`."""
    lora, memory = config.lora, config.memory
    storage, compute, activations = precision
    trained = lora_of(spec, lora.rank, lora.targets, lora.include, lora.exclude, lora.share_a)
    dropout, layers = lora.dropout > 0, config.model.layers
    work = Work(spec, storage, compute, activations, trained, dropout, layers)
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
    )


# ---------------------------------------------------------------- for a run


def plan_run(
    config: Config, base: Path, shapes: Mapping[str, Shape], device: torch.device
) -> Plan | None:
    """The plan of a run on the device, its encoders gone; None on a CPU without memory.limit_gib.

    shapes: label -> batch shape, of every bucket. Raises ConfigError where nothing fits.
    """
    limit = config.memory.limit_gib
    if device.type != "cuda" and limit is None:
        return None
    storage, compute = resolve_precision(config.model.storage, config.model.compute, device)
    dtype = activation_dtype(compute, "auto", device)
    activations = next(word for word, known in DTYPES.items() if known == dtype)
    with open_base(base) as checkpoint:
        spec = checkpoint.spec
    precision = storage, compute, activations
    cuda = device.type == "cuda"
    request = replace(request_of(config, spec, precision, shapes, graphs=cuda), encodes=False)
    if not cuda:  # a limit to try plans with; the card's speed only ranks the choices
        known = card("RTX 4090")
        if compute == "fp8":
            known = card("H100 SXM 80 GB")
        return make_plan(request, known, int(limit * GIB), host_memory())
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    try:
        known = card(properties.name)
    except ConfigError:
        known = closest((properties.major, properties.minor), total / GIB)
    room = free - int(MARGIN * total)
    if limit is not None:
        room = min(int(limit * GIB) - CONTEXT, free)
    return make_plan(request, known, room, host_memory())


def host_memory() -> int:
    """Bytes that may be pinned: half of what is free."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 16 * GIB


def run_lines(plan: Plan) -> list[str]:
    """What `train` says of its plan before it starts."""
    where = {"in_place": "formed in place", "ahead": "formed ahead", "host": "ahead, from the host"}
    lines = [
        f"plan for the {plan.card.name}: {plan.peak / GIB:.1f} of {plan.limit / GIB:.1f} GiB "
        f"(predicted), modulation {where[plan.modulation]}"
        + (", optimiser state on the host" if plan.optimizer_state == "host" else "")
    ]
    for label, bucket in plan.buckets.items():
        host = f", {bucket.choice.host / GIB:.1f} GiB on the host" if bucket.choice.host else ""
        lines.append(
            f"  {label}: {summary(bucket.choice.policies)}; {bucket.bytes / GIB:.1f} GiB{host}, "
            f"{plan.seconds(label):.3g} s/it (predicted)"
        )
    return lines


def summary(policies: tuple[str, ...]) -> str:
    """Such as: 53 blocks keep, 4 u8."""
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
        """Of an optimiser step, the mean over the plan's picture sizes."""
        plan = self.plan
        return sum(plan.seconds(label) for label in plan.buckets) / len(plan.buckets)


def plan_rows(config: Config, vram_gib: float | None, gpu: str | None) -> list[Row]:
    """Plans of a configuration on the cards asked for, its pictures taken as squares.

    Every picture size has a plan of its own; more than one have one of them together, too. Raises
    ConfigError for an unknown card, or a model on this disk that cannot be read.
    """
    cards = _cards(vram_gib, gpu)
    spec = _spec(config.model)
    sides = sorted({side for data in config.data for side in data.resolution})
    batch = config.train.batch_size
    text = config.model.max_sequence_length or spec.text_length
    shapes = {f"{side} px": _square(side, batch, text) for side in sides}
    sets = [{label: shape} for label, shape in shapes.items()]
    sets += [shapes] if len(shapes) > 1 else []
    rows = []
    for known, vram in cards:
        for chosen in sets:
            label = next(iter(chosen)) if len(chosen) == 1 else "mixed"
            try:
                precision = _precision(config.model, known, vram)
                plan = make_plan(request_of(config, spec, precision, chosen), known, usable(vram))
                rows.append(Row(known, vram, label, plan))
            except ConfigError as error:
                reason = error.hint or error.message
                rows.append(Row(known, vram, label, None, reason))
    return rows


def _cards(vram_gib: float | None, gpu: str | None) -> list[tuple[Card, float]]:
    if gpu is not None:
        known = card(gpu)
        return [(known, vram_gib or known.vram_gib)]
    if vram_gib is not None:
        nearest = min(PRESETS, key=lambda gib: abs(gib - vram_gib))
        return [(card(PRESETS[nearest]), vram_gib)]
    return [(card(name), gib) for gib, name in PRESETS.items()]


def _precision(model: ModelConfig, known: Card, vram_gib: float) -> tuple[str, str, str]:
    storage, compute = choose_precision(
        model.storage, model.compute, known.capability, vram_gib, True
    )
    return storage, compute, compute if compute in DTYPES else "bf16"


def _spec(model: ModelConfig) -> FluxSpec:
    """The model's own where it is on this disk; FLUX.1-dev for a Hub id."""
    if not Path(model.path).exists():
        return DEV
    with open_base(Path(model.path)) as checkpoint:
        return checkpoint.spec


def _square(side: int, batch: int, text: int) -> Shape:
    """Of the largest square that the buckets make of this resolution."""
    side = max(STEP, side // STEP * STEP)
    return shape_of(side, side, batch, text)


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
    return [*table, "", "All figures are predicted; speeds from " + "; ".join(notes) + "."]


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
    words = [f"{work.storage} base, {work.compute} products"]
    if len(plan.buckets) == 1:
        (bucket,) = plan.buckets.values()
        words.append(summary(bucket.choice.policies))
    else:
        largest = max(plan.buckets, key=lambda label: plan.buckets[label].shape.tokens)
        words.append(f"{largest}: {summary(plan.buckets[largest].choice.policies)}")
    words += ["modulation from the host"] if plan.modulation == "host" else []
    words += ["optimiser state on the host"] if plan.optimizer_state == "host" else []
    return "; ".join(words)


def _basis(known: Card) -> str:
    if known.factors:
        return f"measured steps ({known.name})"
    return "data sheets and assumed shares of them"
