"""The best plan for a request, or an error that names what is missing and what would fit."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from fluxfast.distributed import local_rank, world_size
from fluxfast.errors import ConfigError
from fluxfast.memory.planner.cards import Card, card, closest
from fluxfast.memory.planner.plan import CONTEXT, GIB, MARGIN, Plan, Request, best_plan, usable
from fluxfast.memory.planner.step_spec import Shape
from fluxfast.util.platform import available_memory, is_wsl

_STAND_IN = "H100 SXM 80 GB"  # for a CPU: it has products of every kind

SIDES = (1024, 768, 512, 256)  # pixels
CARDS_GIB = (12, 16, 24, 32, 48, 80)
BOUNDLESS = 2**60  # bytes
WSL_PINS = GIB // 2  # microsoft/WSL#14078: 0.5 to 1 GiB in all, whatever the machine has


class DoesNotFit(ConfigError):
    """No plan stays within the limits."""


def make_plan(request: Request, card: Card, limit: int, host: int | None = None) -> Plan:
    """Returns the fastest plan of at most `limit` allocated bytes, and of `host` pinned ones.

    Raises DoesNotFit where there is none, naming the nearest settings that would fit, and
    ConfigError for settings that contradict each other.
    """
    plan = best_plan(request, card, limit, host)
    if plan is not None:
        return plan
    cures = _cures(request, card, limit, host)
    hint = "what fits: " + "; or ".join(cures) if cures else "no single setting makes it fit"
    raise DoesNotFit(_misfit(request, card, limit, host), hint=hint)


def plan_on(
    device: torch.device, request: Request, limit_gib: float | None = None, host: int | None = None
) -> Plan | None:
    """Returns the plan of a run on the device with what is free there now; None on a CPU without a
    limit. limit_gib: CUDA's own memory included; host: the most pinned bytes, by default
    `host_memory`. Raises as `make_plan` does.
    """
    host = host_memory() if host is None else host
    if device.type != "cuda":
        if limit_gib is None:
            return None
        # a limit to try plans with; a card's speed only ranks the choices
        return make_plan(request, card(_STAND_IN), int(limit_gib * GIB), host)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    try:
        known = card(properties.name)
    except ConfigError:
        known = closest((properties.major, properties.minor), total / GIB)
    room = free - int(MARGIN * total)
    if limit_gib is not None:
        room = min(int(limit_gib * GIB) - CONTEXT, room)
    if room <= 0:
        raise ConfigError(
            f"{free / GIB:.2f} GiB of the GPU are free, too little to plan with",
            hint="close what else uses the GPU"
            + (", or raise memory.limit_gib" if limit_gib is not None else ""),
        )
    return make_plan(request, known, room, host)


def host_memory() -> int:
    """Returns the bytes that this process may pin: half of what is free or can be freed, on WSL2
    what the driver allows there; shared with those that train on the machine's other GPUs.
    """
    available = available_memory() // 2
    return (min(available, WSL_PINS) if is_wsl() else available) // local_rank()[1]


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"


def _misfit(request: Request, card: Card, limit: int, host: int | None) -> str:
    """Returns what is missing where."""
    if host is not None and (plan := best_plan(request, card, limit, None)):
        return (
            f"this does not fit: it would need {_gib(plan.host)} of pinned host memory, of which "
            f"{_gib(host)} may be taken"
        )
    allowed = f"{_gib(limit)} may be used on the {card.name}"
    plan = best_plan(request, card, BOUNDLESS, None)
    assert plan is not None  # without a limit one fits
    for phase in ("encoding pictures", "loading"):
        if plan.phases.get(phase, 0) > limit:
            return f"this does not fit: {phase} needs {_gib(plan.phases[phase])}, {allowed}"
    if best_plan(replace(request, preview_pixels=0), card, limit, host):
        return f"previews of this size do not fit beside the model: {allowed}"
    return f"this does not fit: it needs at least {_gib(_least(request, card, limit))}, {allowed}"


def _least(request: Request, card: Card, limit: int) -> float:
    """Returns the least limit that some plan stays within, to 1 %."""
    low, high = float(limit), float(limit) * 2 + GIB
    while best_plan(request, card, high, None) is None:
        low, high = high, 2 * high
    while high > 1.01 * low:
        middle = (low + high) / 2
        fits = best_plan(request, card, middle, None)
        low, high = (low, middle) if fits else (middle, high)
    return high


def _cures(request: Request, card: Card, limit: int, host: int | None) -> list[str]:
    """Returns up to two settings that would fit, the mildest first, and the least card."""
    settings: dict[str, str] = {}  # by kind
    for kind, setting, changes in _changes(request):
        if len(settings) == 2 or kind in settings:
            continue
        if best_plan(replace(request, **changes), card, limit, host):
            settings[kind] = setting
    cures = list(settings.values())
    for gib in CARDS_GIB:
        if usable(gib) > limit and best_plan(request, card, usable(gib), host):
            return [*cures, f"a card of {gib} GiB"]
    return cures


def _changes(request: Request) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (kind, setting, what it changes in the request): of each kind the first that fits is
    named."""
    names = ["policy", "optimizer_state"] + ["modulation"] * (not request.modulation_trained)
    decided = {name: "auto" for name in names if getattr(request, name) != "auto"}
    for name in decided:
        yield "memory", f"memory.{name}: auto", {name: "auto"}
    if len(decided) > 1:
        yield "memory", "memory: auto", decided
    if request.saved_8bit == "none":
        yield "saved_8bit", "memory.saved_8bit: u", {"saved_8bit": "u"}
    if request.preview_pixels > 1024**2:
        setting = "sample.width: 1024, sample.height: 1024"
        yield "previews", setting, {"preview_pixels": 1024**2}
    if request.step.storage != "nf4":
        yield "storage", "model.storage: nf4", {"step": replace(request.step, storage="nf4")}
    if request.optimizer == "prodigy":
        yield "optimizer", "train.optimizer: adamw8bit", {"optimizer": "adamw8bit"}
    # a request's batch is one process's share; the setting counts that of all
    batch, count = max(shape.batch for shape in request.shapes.values()), world_size()
    for size in (batch // 2**n for n in range(1, batch.bit_length())):
        setting = f"train.batch_size: {size * count} with gradient_accumulation"
        yield "batch", setting, {"shapes": _shapes(request, size, SIDES[0] * 64)}
    for size in dict.fromkeys((batch, 1)):
        for side in SIDES:
            shapes = _shapes(request, size, side)
            if shapes != request.shapes:
                beside = f" and train.batch_size: {size * count}" if size != batch else ""
                yield "resolution", f"data.resolution: {side}{beside}", {"shapes": shapes}


def _shapes(request: Request, batch: int, side: int) -> dict[str, Shape]:
    """Returns the request's shapes with batches and pictures of at most this size."""
    tokens = (side // 16) ** 2
    return {
        label: Shape(min(shape.batch, batch), min(shape.image_tokens, tokens), shape.text_tokens)
        for label, shape in request.shapes.items()
    }
