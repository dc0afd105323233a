"""Describes a LoRA file for `fluxfast inspect` by names, shapes and alphas; no factor is read."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from fluxfast.formats.lora.names import foreign_kind, form_of, parse
from fluxfast.formats.lora.read import other_lora
from fluxfast.formats.opened import Files

_OTHERS = {"clip": "CLIP-L", "t5": "T5", "embedding": "vectors of trigger words"}
_LISTED = 4  # keys named of a list


def describe_lora(files: Files) -> list[tuple[str, str]]:
    """Returns (title, value) of format, model, layers, rank, alpha, and keys missing or extra."""
    names, container = list(files.entries), files.containers[0].kind
    if foreign := next(filter(None, map(foreign_kind, names)), None):
        return [
            ("format", f"{container}, {foreign}"),
            ("model", f"{foreign}: not a plain LoRA, which alone can be read here"),
        ]
    keys = {name: key for name in names if (key := parse(name))}
    unknown = sorted(set(names) - keys.keys())
    if other := other_lora(unknown):
        return [("format", container), ("model", f"LoRA of {other}: not of FLUX.1")]
    if not keys:
        return [
            ("format", container),
            ("model", "LoRA of another model than FLUX.1"),
            ("extra", listed(unknown)),
        ]
    # per linear and parts: role -> the key's name
    linears: dict[tuple[str, tuple[int, ...]], dict[str, str]] = defaultdict(dict)
    for name, key in keys.items():
        linears[key.module, key.parts][key.role] = name
    halves = [roles for roles in linears.values() if len({"down", "up"} & roles.keys()) == 1]
    shapes = [files.entries[roles["down"]].shape for roles in linears.values() if "down" in roles]
    return [
        ("format", f"{container}, {form_of(keys.values())}"),
        ("model", f"LoRA of FLUX.1: {_layers({key.module for key in keys.values()})}"),
        # the rows of every A, or down, matrix as stored
        ("rank", _counted(shape[0] for shape in shapes if shape)),
        ("alpha", _counted(_alphas(files, linears)) or "none: scale 1"),
        ("missing", listed(sorted(roles.get("down") or roles["up"] for roles in halves))),
        ("extra", listed(unknown)),
    ]


def listed(keys: list[str]) -> str:
    """Returns the number of keys, and the first few of them."""
    more = ", …" if len(keys) > _LISTED else ""
    return f"{len(keys)}: {', '.join(keys[:_LISTED])}{more}" if keys else "none"


def _layers(modules: set[str]) -> str:
    """Returns the number of blocks, the names of their linears, and what else the LoRA changes."""
    layers = []
    for kind in ("double", "single"):
        linears = [m.split(".", 2) for m in modules if m.startswith(f"{kind}_blocks.")]
        if linears:
            count, tails = len({index for _, index, _ in linears}), {tail for *_, tail in linears}
            blocks = "block" if count == 1 else "blocks"
            layers.append(f"{count} {kind} {blocks} ({', '.join(sorted(tails))})")
    others = Counter(
        _OTHERS.get(module.partition("/")[0], "outside the blocks")
        for module in sorted(modules)
        if "_blocks." not in module
    )
    return "; ".join([*layers, *(f"{count} {name}" for name, count in others.items())])


def _alphas(files: Files, linears: dict[tuple, dict[str, str]]) -> Iterable[str]:
    for roles in linears.values():
        if "alpha" in roles and files.entries[roles["alpha"]].count == 1:
            yield f"{files.read(roles['alpha']).float().item():g}"


def _counted(values: Iterable) -> str:
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(6))
