"""make_plan: the best plan there is, or in words what is missing and which settings would fit."""

from collections.abc import Iterator
from dataclasses import replace

from fluxfast.errors import ConfigError
from fluxfast.memory.cards import Card
from fluxfast.memory.plan import GIB, Plan, Request, best_plan, usable

SIDES = (1024, 768, 512, 256)  # pixels
CARDS_GIB = (12, 16, 24, 32, 48, 80)
BOUNDLESS = 2**60  # bytes


class DoesNotFit(ConfigError):
    """No plan keeps the limits."""


def make_plan(request: Request, card: Card, limit: int, host: int | None = None) -> Plan:
    """The fastest plan of at most `limit` allocated bytes, and of `host` pinned ones.

    Raises DoesNotFit where there is none, naming the nearest settings that would fit, and
    ConfigError for settings that contradict each other.
    """
    plan = best_plan(request, card, limit, host)
    if plan is not None:
        return plan
    found = _cures(request, card, limit, host)
    hint = "what fits: " + "; or ".join(found) if found else "no single setting makes it fit"
    raise DoesNotFit(_misfit(request, card, limit, host), hint=hint)


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"


def _misfit(request: Request, card: Card, limit: int, host: int | None) -> str:
    """What is missing where."""
    if host is not None and (plan := best_plan(request, card, limit, None)):
        return (
            f"this does not fit: it would need {_gib(plan.host)} of pinned host memory, of which "
            f"{_gib(host)} may be taken"
        )
    may = f"{_gib(limit)} may be used on the {card.name}"
    plan = best_plan(request, card, BOUNDLESS, None)
    for phase in ("encoding captions", "encoding pictures", "loading"):
        if plan.phases.get(phase, 0) > limit:
            return f"this does not fit: {phase} needs {_gib(plan.phases[phase])}, {may}"
    if best_plan(replace(request, preview_pixels=0), card, limit, host) is not None:
        return f"previews of this size do not fit beside the model: {may}"
    return f"this does not fit: it needs at least {_gib(_least(request, card, limit))}, {may}"


def _least(request: Request, card: Card, limit: int) -> float:
    """The least limit that some plan keeps, to 1 %."""
    low, high = float(limit), float(limit) * 2 + GIB
    while best_plan(request, card, high, None) is None:
        low, high = high, 2 * high
    while high > 1.01 * low:
        middle = (low + high) / 2
        fits = best_plan(request, card, middle, None) is not None
        low, high = (low, middle) if fits else (middle, high)
    return high


def _cures(request: Request, card: Card, limit: int, host: int | None) -> list[str]:
    """Up to two settings that would fit, the mildest first, and the least card that would."""
    found: list[str] = []
    kinds: set[str] = set()
    for kind, words, changed in _changes(request):
        if len(found) == 2 or kind in kinds:
            continue
        if best_plan(changed, card, limit, host) is not None:
            kinds.add(kind)
            found.append(words)
    for gib in CARDS_GIB:
        if usable(gib) > limit and best_plan(request, card, usable(gib), host) is not None:
            return [*found, f"a card of {gib} GiB"]
    return found


def _changes(request: Request) -> Iterator[tuple[str, str, Request]]:
    """(kind, words, what they make of the request): of each kind the first that fits is named."""
    free = {"policy": "auto", "optimizer_state": "auto"}
    free |= {} if request.modulation_trained else {"modulation": "auto"}
    decided = {name: value for name, value in free.items() if getattr(request, name) != value}
    for name, value in decided.items():
        yield "memory", f"memory.{name}: {value}", replace(request, **{name: value})
    if len(decided) > 1:
        yield "memory", "memory: auto", replace(request, **decided)
    if request.saved_8bit == "none":
        yield "saved_8bit", "memory.saved_8bit: u", replace(request, saved_8bit="u")
    if request.preview_pixels > 1024**2:
        smaller = replace(request, preview_pixels=1024**2)
        yield "previews", "sample.width: 1024, sample.height: 1024", smaller
    if request.work.storage != "nf4":
        smaller = replace(request, work=replace(request.work, storage="nf4"))
        yield "storage", "model.storage: nf4", smaller
    if request.optimizer == "prodigy":
        yield "optimizer", "train.optimizer: adamw8bit", replace(request, optimizer="adamw8bit")
    batch = max(shape.batch for shape in request.shapes.values())
    sizes = [batch // 2**n for n in range(1, batch.bit_length()) if batch // 2**n]
    for size in sizes:
        words = f"train.batch_size: {size} with gradient_accumulation"
        yield "batch", words, _shaped(request, size, SIDES[0] * 64)
    for size in dict.fromkeys((batch, 1)):
        for side in SIDES:
            changed = _shaped(request, size, side)
            if changed.shapes != request.shapes:
                beside = f" and train.batch_size: {size}" if size != batch else ""
                yield "resolution", f"data.resolution: {side}{beside}", changed


def _shaped(request: Request, batch: int, side: int) -> Request:
    """With batches and pictures of at most this size."""
    tokens = (side // 16) ** 2
    shapes = {
        label: replace(
            shape, batch=min(shape.batch, batch), image_tokens=min(shape.image_tokens, tokens)
        )
        for label, shape in request.shapes.items()
    }
    return replace(request, shapes=shapes)
