"""The tables of cards: predictions of `fluxfast plan` for FLUX.1-dev with the defaults, and for
ai-toolkit's stock file. Nothing in them is measured.
"""

from collections import defaultdict

from bench import ROOT
from bench.terminal import markdown
from fluxfast.config.schema import Config, build_config, load_config
from fluxfast.memory.planner.plan import CONTEXT, GIB
from fluxfast.memory.planner.report import Row, describe
from fluxfast.tools.plan import plan_rows

DEFAULTS = "defaults"
NOTE = (
    "Predicted, not measured: bytes counted from what the ops save, speeds from data sheets and "
    "assumed shares of them; batch 1, 512 text tokens."
)
STOCK = ROOT / "examples" / "ai-toolkit" / "flux_dev_24gb.yaml"


def configuration(setting: str, overrides: list[str] = ()) -> Config:
    """FLUX.1-dev at 512, 768 and 1024 px. setting: "plain" is the defaults, "stock" is ai-toolkit's
    file for 24 GB. overrides: as `--set` takes them."""
    if setting == "stock":
        return load_config(STOCK, overrides)
    data = [{"folder": ".", "resolution": [512, 768, 1024]}]
    raw = {"model": {"path": "black-forest-labs/FLUX.1-dev"}, "data": data}
    return build_config(raw, overrides)


def rows() -> list[tuple[str, Row]]:
    """(setting, row): the defaults on every preset, the stock file on 24 GB."""
    plain = [(DEFAULTS, row) for row in plan_rows(configuration("plain"), None, None)]
    stock = plan_rows(configuration("stock"), 24, None)
    stock = [("ai-toolkit's stock file", row) for row in stock]
    return [pair for pair in [*plain, *stock] if pair[1].label != "mixed"] + stock[-1:]


def figures(row: Row) -> tuple[str, str, str]:
    """(GiB, seconds a step, policy) of a row; the reason where it does not fit."""
    if row.plan is None:
        return "does not fit", "", row.reason
    plan = row.plan
    return f"{(plan.peak + CONTEXT) / GIB:.1f}", f"{plan.mean_seconds:.2f}", describe(plan)


def block(planned: list[tuple[str, Row]]) -> str:
    """The table of every card and image size."""
    lines = [[row.card.name, setting, row.label, *figures(row)] for setting, row in planned]
    table = markdown(["card", "trained", "picture", "needs GiB", "s/it", "how"], lines)
    return f"{table}\n\n{NOTE}"


def short(planned: list[tuple[str, Row]]) -> str:
    """The README's table: one line a card, with the defaults."""
    cards: dict[str, dict[str, Row]] = defaultdict(dict)
    for setting, row in planned:
        if setting == DEFAULTS:
            cards[row.card.name][row.label] = row
    lines, sizes = [], []
    for card, by_size in cards.items():
        sizes = list(by_size)
        times = [figures(row)[1] or "does not fit" for row in by_size.values()]
        needs, _, how = figures(by_size[sizes[-1]])
        lines.append([card, *times, f"{needs} GiB: {how}"])
    head = ["card", *(f"{size}, s/it" for size in sizes), f"at {sizes[-1]}"]
    return f"{markdown(head, lines)}\n\n{NOTE}"
