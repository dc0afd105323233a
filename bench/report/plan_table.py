"""The table of cards: what `fluxfast plan` predicts for FLUX.1-dev with the defaults, and for
ai-toolkit's stock file. Nothing in it is measured.
"""

from bench import ROOT
from bench.terminal import markdown
from fluxfast.config.schema import Config, build_config, load_config
from fluxfast.memory.planner.plan import CONTEXT, GIB
from fluxfast.tools.plan import Row, plan_rows, what

BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"
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
    plain = [("defaults", row) for row in plan_rows(configuration("plain"), None, None)]
    stock = plan_rows(configuration("stock"), 24, None)
    stock = [("ai-toolkit's stock file", row) for row in stock]
    return [pair for pair in [*plain, *stock] if pair[1].label != "mixed"] + stock[-1:]


def block() -> str:
    lines = []
    for trained, row in rows():
        start = [f"{row.card.name}", trained, row.label]
        if row.plan is None:
            figures = ["does not fit", "", row.reason]
        else:
            needs = f"{(row.plan.peak + CONTEXT) / GIB:.1f}"
            figures = [needs, f"{row.seconds():.2f}", what(row.plan)]
        lines.append([*start, *figures])
    note = (
        "Predicted, not measured: bytes counted from what the ops save, speeds from data sheets "
        "and assumed shares of them; batch 1, 512 text tokens."
    )
    table = markdown(["card", "trained", "picture", "needs GiB", "s/it", "how"], lines)
    return "\n\n".join([BEGIN, table, note, END])
