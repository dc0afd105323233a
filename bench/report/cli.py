"""Every table and chart of README.md, kernels/README.md and docs/, from rows on disk: never typed.

    python -m bench.report   writes the pages' blocks and bench/results/*.svg
    … --check    exits with 1 where a page or a chart differs from the rows

Blocks: steps beside their peers (`step_chart.py`), what the cards hold (`plan_table.py`),
activations in 8 bits (`activations.py`), the techniques (`technique_table.py`), what 8-bit matmuls
do to training (`quality_chart.py`), the ops (`catalog.py`). Each goes where its markers are.
"""

from collections.abc import Callable
from pathlib import Path

from bench import RESULTS, ROOT, activations, quality, rows, terminal
from bench.report import (
    catalog,
    charts,
    plan_table,
    quality_chart,
    step_chart,
    technique_table,
)


def blocks(results: Path) -> list[str]:
    """Each begins and ends with its markers."""
    cards = plan_table.rows()
    return [
        step_chart.status(results),
        step_chart.block(results),
        plan_table.short(cards),
        plan_table.block(cards),
        activations.block(rows.last_run(results / activations.ROWS.name)),
        technique_table.short(results),
        technique_table.block(results),
        quality_chart.block(rows.last_run(results / quality.ROWS.name)),
        catalog.table(),
        catalog.step_table(),
    ]


def pages(root: Path) -> dict[Path, str]:
    paths = [root / "README.md", root / "kernels" / "README.md", *root.glob("docs/*.md")]
    return {path: path.read_text(encoding="utf-8") for path in paths}


def put(texts: dict[Path, str], block: str) -> None:
    """Replace the block on the page that has its markers. Raises ValueError where they are not on
    one page, once and in their order."""
    begin, *_, end = block.splitlines()
    whole = "\n".join(texts.values())
    before, _, after = whole.partition(begin)
    if [whole.count(begin), whole.count(end), after.count(end)] != [1, 1, 1]:
        raise ValueError(f"one {begin} and then one {end} are wanted on a page")
    page = next(path for path, text in texts.items() if begin in text)
    before, _, after = texts[page].partition(begin)
    if page.parent.name == "docs":
        block = block.replace("](bench/", "](../bench/")
    texts[page] = before + block + after.partition(end)[2]


def drawings(results: Path) -> list[tuple[Path, list[dict], Callable[[list[dict], Path], None]]]:
    """(file, the rows that it shows, the function that draws them) of every chart."""
    quality_svg = (results / quality.ROWS.name).with_suffix(".svg")
    found = [(quality_svg, rows.last_run(results / quality.ROWS.name), quality_chart.draw)]
    shown = step_chart.charted(step_chart.tables(results))
    if shown:
        found.append((step_chart.chart_path(shown, results), shown, step_chart.draw))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = terminal.parser(__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    old, new = pages(ROOT), pages(ROOT)
    for block in blocks(RESULTS):
        put(new, block)
    if not check:
        for path, text in new.items():
            path.write_text(text, encoding="utf-8")
        for path, shown, draw in drawings(RESULTS):
            draw(shown, path)
        return 0
    wrong = [str(path.relative_to(ROOT)) for path in new if new[path] != old[path]]
    wrong += [path.name for path, shown, _ in drawings(RESULTS) if not charts.is_of(path, shown)]
    for name in wrong:
        print(f"{name} differs from the rows: run python -m bench.report")
    if not wrong:
        print("all tables and charts are up to date")
    return int(bool(wrong))
