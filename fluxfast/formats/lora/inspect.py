"""What a LoRA file is, for `fluxfast inspect`: from names and shapes, and the alphas; no factor is
read.
"""

from collections import Counter, defaultdict

from fluxfast.formats.lora.names import Place, foreign_kind, form_of, parse
from fluxfast.formats.lora.read import other_lora
from fluxfast.formats.opened import Files

_TOWERS = {"clip": "CLIP-L", "t5": "T5"}
_NAMED = 4  # keys or linears named of a list


def is_adapter(keys: list[str]) -> bool:
    """Whether the keys are of LoRA's relatives that are no plain LoRA (LoKr, LoHa, DoRA, …)."""
    return any(foreign_kind(key) for key in keys)


def describe_lora(files: Files) -> list[tuple[str, str]]:
    """Rows of (what, value): format, model, layers, rank, alpha, and keys missing or extra."""
    keys = list(files.entries)
    if foreign := next(filter(None, map(foreign_kind, keys)), None):
        return [
            ("format", f"{files.containers[0].kind}, {foreign}"),
            ("model", f"{foreign}: not a plain LoRA, which alone can be read here"),
        ]
    placed = {key: found for key in keys if (found := parse(key))}
    unknown = sorted(set(keys) - placed.keys())
    if other := other_lora(unknown):
        return [
            ("format", files.containers[0].kind),
            ("model", f"LoRA of {other}: not of FLUX.1"),
        ]
    if not placed:
        return [
            ("format", files.containers[0].kind),
            ("model", "LoRA of another model than FLUX.1"),
            ("extra", listed(unknown)),
        ]
    form = form_of([place for _, place in placed.values()], {role for role, _ in placed.values()})
    roles: dict[tuple[str, tuple[int, ...]], dict[str, str]] = defaultdict(dict)
    for key, (role, place) in placed.items():
        roles[place.module, place.parts][role] = key
    return [
        ("format", f"{files.containers[0].kind}, {form}"),
        ("model", f"LoRA of FLUX.1: {_linears([place for _, place in placed.values()])}"),
        ("rank", _ranks(files, roles)),
        ("alpha", _alphas(files, roles)),
        ("missing", listed(_halves(roles))),
        ("extra", listed(unknown)),
    ]


def listed(keys: list[str]) -> str:
    """How many there are, and the first few."""
    if not keys:
        return "none"
    more = ", …" if len(keys) > _NAMED else ""
    return f"{len(keys)}: {', '.join(keys[:_NAMED])}{more}"


def _linears(places: list[Place]) -> str:
    """Which blocks, with which of their linears; what else it changes."""
    blocks: dict[str, set[int]] = defaultdict(set)
    tails: dict[str, dict[str, None]] = defaultdict(dict)
    others: Counter[str] = Counter()
    for module in sorted({place.module for place in places}):
        tower, slash, _ = module.partition("/")
        group, _, rest = module.partition(".")
        if slash:
            others[_TOWERS[tower]] += 1
        elif group.endswith("_blocks"):
            index, _, tail = rest.partition(".")
            blocks[group].add(int(index))
            tails[group][tail] = None
        else:
            others["outside the blocks"] += 1
    said = [
        f"{len(blocks[group])} {kind} block{'s' * (len(blocks[group]) > 1)} "
        f"({', '.join(tails[group])})"
        for group, kind in (("double_blocks", "double"), ("single_blocks", "single"))
        if blocks[group]
    ]
    said += [f"{count} {where}" for where, count in others.items()]
    return "; ".join(said)


def _ranks(files: Files, roles: dict) -> str:
    """As they stand in the file: the rows of every A, or down, matrix."""
    shapes = [files.entries[keys["down"]].shape for keys in roles.values() if "down" in keys]
    return _counted(Counter(shape[0] for shape in shapes if shape))


def _alphas(files: Files, roles: dict) -> str:
    found: Counter[str] = Counter()
    for keys in roles.values():
        if "alpha" in keys and files.entries[keys["alpha"]].count == 1:
            found[f"{files.read(keys['alpha']).float().item():g}"] += 1
    return _counted(found) or "none: scale 1"


def _counted(found: Counter) -> str:
    most = found.most_common(6)
    return ", ".join(f"{value} ({count})" for value, count in most)


def _halves(roles: dict) -> list[str]:
    """Factors without their partner."""
    pairs = (keys for keys in roles.values() if len({"down", "up"} & keys.keys()) == 1)
    return sorted(keys.get("down") or keys["up"] for keys in pairs)
