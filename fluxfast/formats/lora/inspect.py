"""What a LoRA file is, for `fluxfast inspect`: from names and shapes, and the alphas; no factor is
read.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

from fluxfast.formats.lora.names import foreign_kind, form_of, parse
from fluxfast.formats.lora.read import other_lora
from fluxfast.formats.opened import Files

_ENCODERS = {"clip": "CLIP-L", "t5": "T5"}
_LISTED = 4  # keys named of a list


def describe_lora(files: Files) -> list[tuple[str, str]]:
    """Rows of (title, value): format, model, layers, rank, alpha, and keys missing or extra."""
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
        # as they stand in the file: the rows of every A, or down, matrix
        ("rank", _counted(shape[0] for shape in shapes if shape)),
        ("alpha", _counted(_alphas(files, linears)) or "none: scale 1"),
        ("missing", listed(sorted(roles.get("down") or roles["up"] for roles in halves))),
        ("extra", listed(unknown)),
    ]


def listed(keys: list[str]) -> str:
    """How many there are, and the first few."""
    more = ", …" if len(keys) > _LISTED else ""
    return f"{len(keys)}: {', '.join(keys[:_LISTED])}{more}" if keys else "none"


def _layers(modules: set[str]) -> str:
    """Which blocks, with which of their linears; what else it changes."""
    blocks: dict[str, set[int]] = defaultdict(set)
    tails: dict[str, dict[str, None]] = defaultdict(dict)
    others: Counter[str] = Counter()
    for module in sorted(modules):
        encoder, slash, _ = module.partition("/")
        group, _, rest = module.partition(".")
        if slash:
            others[_ENCODERS[encoder]] += 1
        elif group.endswith("_blocks"):
            index, _, tail = rest.partition(".")
            blocks[group].add(int(index))
            tails[group][tail] = None
        else:
            others["outside the blocks"] += 1
    layers = [
        f"{len(blocks[group])} {kind} block{'s' * (len(blocks[group]) > 1)} "
        f"({', '.join(tails[group])})"
        for group, kind in (("double_blocks", "double"), ("single_blocks", "single"))
        if blocks[group]
    ]
    return "; ".join([*layers, *(f"{count} {name}" for name, count in others.items())])


def _alphas(files: Files, linears: dict[tuple, dict[str, str]]) -> Iterable[str]:
    for roles in linears.values():
        if "alpha" in roles and files.entries[roles["alpha"]].count == 1:
            yield f"{files.read(roles['alpha']).float().item():g}"


def _counted(values: Iterable) -> str:
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(6))
