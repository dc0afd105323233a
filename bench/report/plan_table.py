"""The tables of cards: what `fluxfast plan` predicts for FLUX.1-dev with the defaults, and for
ai-toolkit's stock file. Nothing in them is measured.
"""

from bench import ROOT
from bench.terminal import markdown
from fluxfast.config.schema import Config, build_config, load_config
from fluxfast.memory.planner.plan import CONTEXT, GIB
from fluxfast.memory.planner.report import Row, describe
from fluxfast.tools.plan import plan_rows

BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"
CARDS_BEGIN, CARDS_END = "<!-- cards: begin -->", "<!-- cards: end -->"
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
    """(what is trained, row): the defaults on every preset, the stock file on 24 GB."""
    plain = [(DEFAULTS, row) for row in plan_rows(configuration("plain"), None, None)]
    stock = plan_rows(configuration("stock"), 24, None)
    stock = [("ai-toolkit's stock file", row) for row in stock]
    return [pair for pair in [*plain, *stock] if pair[1].label != "mixed"] + stock[-1:]


def figures(row: Row) -> tuple[str, str, str]:
    """(GiB, seconds a step, how) of a row; why not, where it does not fit."""
    if row.plan is None:
        return "does not fit", "", row.reason
    plan = row.plan
    return f"{(plan.peak + CONTEXT) / GIB:.1f}", f"{plan.mean_seconds:.2f}", describe(plan)


def block(found: list[tuple[str, Row]]) -> str:
    """Every card and picture size."""
    lines = [[row.card.name, trained, row.label, *figures(row)] for trained, row in found]
    table = markdown(["card", "trained", "picture", "needs GiB", "s/it", "how"], lines)
    return "\n\n".join([BEGIN, table, NOTE, END])


def short(found: list[tuple[str, Row]]) -> str:
    """The README's: one line a card, with the defaults."""
    cards: dict[str, dict[str, Row]] = {}
    for trained, row in found:
        if trained == DEFAULTS:
            cards.setdefault(row.card.name, {})[row.label] = row
    *sizes, largest = next(iter(cards.values()))
    lines = []
    for card, by_size in cards.items():
        times = [figures(row)[1] or "does not fit" for row in by_size.values()]
        needs, _, how = figures(by_size[largest])
        lines.append([card, *times, f"{needs} GiB: {how}"])
    head = ["card", *(f"{size}, s/it" for size in (*sizes, largest)), f"at {largest}"]
    return "\n\n".join([CARDS_BEGIN, markdown(head, lines), NOTE, CARDS_END])
