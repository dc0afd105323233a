"""What `make twin` runs, and what must come of it. A scenario's key is its content: one that is
changed runs again.
"""

import json
from dataclasses import asdict, dataclass

GIB = 2**30
# name, compute capability, MiB that CUDA sees of the card
CARDS = {
    "3060": ("NVIDIA GeForce RTX 3060", (8, 6), 12040),
    "4060ti": ("NVIDIA GeForce RTX 4060 Ti", (8, 9), 16376),
    "4090": ("NVIDIA GeForce RTX 4090", (8, 9), 24207),
    "5090": ("NVIDIA GeForce RTX 5090", (12, 0), 32607),
    "l40s": ("NVIDIA L40S", (8, 9), 45467),
    "a100": ("NVIDIA A100-SXM4-80GB", (8, 0), 81154),
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 81089),
}
CONTEXT_MIB = 450  # of CUDA itself: assumed
# synchronizations a step at most; adafactor's and schedulefree's are none
SYNCS = {"adamw8bit": 2, "prodigy": 2}


@dataclass(frozen=True)
class Scenario:
    """sizes: (pixels of a side, or "WxH", with "m" where it has a mask) of each picture. desktop:
    MiB that others take of the card; node_bytes: of the card's memory that a graph takes a node.
    fail: where memory is refused once, see `child.observe`. exits: exit codes that are right.
    leaner: whether policies may become cheaper than planned. quick: one of the eight of the tests.
    """

    name: str
    card: str
    sizes: tuple[str, ...]
    settings: tuple[str, ...] = ()
    desktop: int = 0
    node_bytes: int = 10240
    pin_mib: int = 0
    devices: int = 1
    fail: str = ""
    exits: tuple[int, ...] = (0,)
    leaner: bool = False
    quick: bool = False

    @property
    def key(self) -> str:
        content = {k: v for k, v in asdict(self).items() if k not in ("name", "quick")}
        return json.dumps(content, sort_keys=True)

    @property
    def environment(self) -> dict[str, str]:
        """Returns the environment variables that describe the card to fakecudart.c."""
        name, (major, minor), total = CARDS[self.card]
        values = {
            "NAME": name, "MAJOR": major, "MINOR": minor, "TOTAL_MIB": total,
            "USED_MIB": CONTEXT_MIB + self.desktop, "NODE_BYTES": self.node_bytes,
            "DEVICES": self.devices,
        }  # fmt: skip
        if self.pin_mib:
            values["PIN_MIB"] = self.pin_mib
        return {f"FAKE_{key}": str(value) for key, value in values.items()}

    @property
    def pictures(self) -> list[tuple[int, int, bool]]:
        """Returns (width, height, whether it has a mask) of each."""
        found = []
        for size in self.sizes:
            width, _, height = size.rstrip("m").partition("x")
            found.append((int(width), int(height or width), size.endswith("m")))
        return found

    @property
    def optimizer(self) -> str:
        return next((s.split("=")[1] for s in self.settings if "optimizer=" in s), "adamw")

    def wrong(self, row: dict) -> list[str]:
        """Returns in what a run's row differs from its plan."""
        faults = []
        if row["exit"] not in self.exits:
            faults.append(f"exit {row['exit']}: {row['error']}")
        if self.fail and not row["refused"]:
            faults.append(f"{self.fail} asked for no memory that could be refused")
        if (
            row["exit"]
            and row["error"]
            and row["error"].split(":")[0].endswith(("Error", "Exception"))
        ):
            faults.append(f"not an error of its own: {row['error']}")
        if row["exit"] or row.get("policies") is None:
            return faults
        if not self.leaner and row["policies"] != row["planned"]:
            faults.append(f"policies {row['policies']}, planned {row['planned']}")
        if row["elsewhere_gib"]:
            faults.append(f"{row['elsewhere_gib']} GiB reserved on another card")
        _, _, total = CARDS[self.card]
        room = row["limit_gib"] + total / 1024 / 32  # what the run may reserve
        if row["reserved_gib"] > room + 0.01:
            faults.append(f"{row['reserved_gib']} GiB reserved of {room:.2f}")
        most = max(step["syncs"] for step in row["steps"][1:])
        if most > SYNCS.get(self.optimizer, 0) and row["graphed"]:
            faults.append(f"{most} synchronizations a step")
        kinds = len({(w * h, masked) for w, h, masked in self.pictures})
        if row["graphed"] and row["no_graphs"] is None and row["graphs"] < kinds:
            faults.append(f"{row['graphs']} graphs of {kinds} shapes")
        return faults


def scenarios() -> list[Scenario]:
    made = []
    for card in CARDS:  # every row of the plan tables: each size alone
        for size in ("512", "768", "1024"):
            quick = (card, size) in (("3060", "512"), ("h100", "1024"))
            made.append(Scenario(f"{card} {size} px", card, (size,), quick=quick))
    three = ("512", "768", "1024")
    for desktop in (0, 614, 1536):
        made.append(
            Scenario(f"4090 three sizes, {desktop} MiB desktop", "4090", three, desktop=desktop)
        )
    stock = ("train.optimizer=adamw8bit", "train.ema.enabled=true")
    made.append(Scenario("stock file: adamw8bit with EMA", "4090", three, stock, 614, quick=True))
    nodes = {"node_bytes": 65536}
    made.append(Scenario("graphs of 64 KiB a node", "4090", three, desktop=614, **nodes))
    made.append(Scenario("pictures with and without masks", "4090", ("1024", "1024m"), quick=True))
    for optimizer in ("prodigy", "schedulefree", "adafactor"):
        settings = (f"train.optimizer={optimizer}",)
        made.append(Scenario(optimizer, "4090", ("768",), settings, quick=optimizer == "prodigy"))
    made.append(Scenario("dropout", "4090", ("1024",), ("lora.dropout=0.1",)))
    made.append(Scenario("offload", "4060ti", ("512",), ("memory.policy=offload",)))
    made.append(Scenario("modulation on the host", "4090", ("512",), ("memory.modulation=host",)))
    host = ("memory.optimizer_state=host",)
    made.append(Scenario("optimizer state on the host", "4090", ("512",), host))
    refused = {"pin_mib": 512, "leaner": True, "quick": True}
    made.append(Scenario("a refused pin", "3060", ("512",), **refused))
    made.append(Scenario("cuda:1", "4090", ("512",), ("device=cuda:1",), devices=2, quick=True))
    for place, exits in (
        ("encoding", (1,)), ("loading", (1,)), ("capture", (0,)), ("pass", (0,)),
        ("optimizer", (1,)), ("preview", (0,)),
    ):  # fmt: skip
        # a replayed graph and fused AdamW allocate nothing
        other = {"pass": "memory.graphs=false", "optimizer": "train.optimizer=schedulefree"}
        settings = (other[place],) if place in other else ()
        options = {"fail": place, "exits": exits, "leaner": True, "quick": place == "capture"}
        made.append(Scenario(f"memory refused: {place}", "4090", ("512",), settings, **options))
    return made
