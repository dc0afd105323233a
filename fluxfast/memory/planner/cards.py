"""GPUs that the cost model knows: peaks, bandwidth, and the share of them that real kernels reach.

`cards.json` holds data-sheet peaks and assumed shares, each with its source. `measured.json`, where
`python -m bench.calibrate` has written one, holds per card and matmul kind how much longer a whole
step took than predicted. A step's time says nothing of single ops, so that factor stretches whole
predictions (`cost.total_seconds`) and leaves the shares as they are.
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fluxfast.errors import ConfigError

MEASURED = Path(__file__).with_name("measured.json")
# what CUDA shows of a card's nominal memory: 11.76 of 12, 23.64 of 24, 31.36 of 32 GiB in torch's
# messages on Linux; of an L40S's 48, which has ECC, 44.42 (stepfun-ai/Step-Video-T2V#8)
VISIBLE = 0.98


@dataclass(frozen=True)
class Efficiency:
    """A share of a peak (0..1) or, as a measured factor, measured over predicted step time.

    source: "data sheet: ...", "assumed: why" or "measured: commit, device".
    """

    value: float
    source: str


@dataclass(frozen=True)
class Card:
    """One GPU model.

    vram_gib: nominal; visible: the share of it that CUDA shows. capability: (major, minor). peaks:
    FLOP/s of dense products with sums in fp32 (int32 for int8) by "bf16", "fp8", "int8" and "fp32"
    (no tensor cores); 0 where it has none. bandwidth: bytes/s of its memory. pcie: bytes/s of
    copies with pinned memory, one way. launch_s: seconds a kernel launch. efficiency: by op kind;
    "element" is a share of the bandwidth, "copy" of pcie, "attention_forward", "attention_backward"
    and the kinds of products of a peak. sources: of the other figures. factors: matmul kind -> what
    a predicted step is multiplied by, empty until measured.
    """

    name: str
    vram_gib: float
    capability: tuple[int, int]
    peaks: Mapping[str, float]
    bandwidth: float
    pcie: float
    launch_s: float
    efficiency: Mapping[str, Efficiency]
    sources: Mapping[str, str]
    factors: Mapping[str, Efficiency] = field(default_factory=dict)
    visible: float = VISIBLE


def _shipped() -> tuple[Card, ...]:
    """Plain JSON, not pydantic's: `bench.step` plans where there is torch and triton alone."""
    cards = []
    table = json.loads(Path(__file__).with_name("cards.json").read_text(encoding="utf-8"))
    for name, row in table.items():
        row["capability"] = tuple(row["capability"])
        row["efficiency"] = {kind: Efficiency(**pair) for kind, pair in row["efficiency"].items()}
        cards.append(Card(name, **row))
    return tuple(cards)


CARDS = _shipped()  # without measured factors


def _model(name: str) -> tuple[str, int | None]:
    """Returns (model, GB that the name states): ("4060ti", 16) of "GeForce RTX 4060 Ti 16 GB".

    What is left beside the model ("Laptop GPU", "PCIe", "D") is another chip or another memory and
    stays in it.
    """
    name = name.lower()
    memory = re.search(r"\b(\d+) ?gi?b\b", name)
    name = re.sub(r"\b\d+ ?gi?b\b|nvidia|geforce|\brtx|\bsxm\d?\b|\bhbm\d?e?\b", " ", name)
    return re.sub(r"[^a-z0-9]", "", name), int(memory[1]) if memory else None


def card(name: str, measured: Path = MEASURED) -> Card:
    """Returns the card of that name, with its measured factors where there are any.

    name: as people write it ("4090", "rtx4090", "4060ti") or as torch.cuda.get_device_name gives it
    ("NVIDIA H100 80GB HBM3"). A name says nothing of memory where one model is sold with two (RTX
    4060 Ti, RTX 3060): ask the device. Raises ConfigError for one that is not in the table, as a
    laptop's or a PCIe version: `closest` finds it a stand-in.
    """
    model, memory = _model(name)
    models = {_model(known.name)[0]: known for known in CARDS}
    known = models.get(model)
    if known and memory in (None, known.vram_gib):
        return _with_factors(known, measured)
    nearest = difflib.get_close_matches(model, models, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"card {name!r} is not in the table ({', '.join(known.name for known in CARDS)})",
        hint=f"the nearest is {models[nearest].name!r}",
    )


def closest(capability: tuple[int, int], vram_gib: float, measured: Path = MEASURED) -> Card:
    """Returns a stand-in for a GPU that is not in the table: of the same compute capability, else
    of the same major version, else of the next older one.

    Of several, the one with the nearest memory; of two that are as near, the slower. Raises
    ConfigError before 8.0, which has no bf16 products.
    """
    if capability < (8, 0):
        raise ConfigError(
            f"compute capability {capability[0]}.{capability[1]} has no bf16 products: 8.0 and "
            "above are known"
        )
    major, _ = max(c.capability for c in CARDS if c.capability <= capability)

    def distance(c: Card) -> tuple:
        memory = abs(c.vram_gib - vram_gib)
        return c.capability != capability, c.capability[0] != major, memory, c.peaks["bf16"]

    return _with_factors(min(CARDS, key=distance), measured)


def _with_factors(known: Card, measured: Path) -> Card:
    if not measured.is_file():
        return known
    try:
        rows = json.loads(measured.read_text(encoding="utf-8")).get(known.name, {})
        factors = {
            kind: Efficiency(float(row["factor"]), row["source"]) for kind, row in rows.items()
        }
        if any(not factor.value > 0 for factor in factors.values()):
            raise ValueError("a factor that is not above 0")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{measured}: not as bench/calibrate.py writes it",
            hint="write it again with bench/calibrate.py, or delete it",
        ) from None
    return replace(known, factors=factors)
