"""Every table and chart of README.md, kernels/README.md and docs/, from rows on disk: never typed.

    python -m bench.report   writes the pages' blocks and bench/results/*.svg
    … --check    exits with 1 where a page or a chart differs from the rows

Blocks: steps beside their peers (`step_chart.py`), predictions for the cards (`plan_table.py`),
activations in 8 bits (`activations.py`), the techniques (`technique_table.py`), what 8-bit matmuls
do to training (`quality_chart.py`), the ops (`catalog.py`). Each goes between its markers, comments
"NAME: begin" and "NAME: end".
"""

from collections.abc import Callable
from pathlib import Path

from bench import RESULTS, ROOT, activations, quality, terminal
from bench.report import (
    catalog,
    charts,
    launch_table,
    plan_table,
    quality_chart,
    step_chart,
    technique_table,
)
from bench.rows import Row, last_run
from bench.twin.cuda import cli as twin_cuda


def blocks(results: Path) -> dict[str, str]:
    """The text of each block, by the name in its markers."""
    cards = plan_table.rows()
    paragraphs = {
        "status": step_chart.status(results),
        "rows": step_chart.block(results),
        "cards": plan_table.short(cards),
        "plan": plan_table.block(cards),
        "activations": activations.block(last_run(results / activations.ROWS.name)),
        "speed": technique_table.short(results),
        "techniques": technique_table.block(results),
        "launches": launch_table.block(results),
        "twin": twin_cuda.block(results),
        "quality": quality_chart.block(last_run(results / quality.ROWS.name)),
    }
    tables = {"ops": catalog.table(), "step": catalog.step_table()}
    return {name: f"\n{text}\n" for name, text in paragraphs.items()} | tables


def pages(root: Path) -> dict[Path, str]:
    paths = [root / "README.md", root / "kernels" / "README.md", *root.glob("docs/*.md")]
    return {path: path.read_text(encoding="utf-8") for path in paths}


def put(texts: dict[Path, str], name: str, text: str) -> None:
    """Puts a block on the page that has its markers. Raises ValueError unless one page has them,
    once and in their order."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = "\n".join(texts.values())
    after = whole.partition(begin)[2]
    if [whole.count(begin), whole.count(end), after.count(end)] != [1, 1, 1]:
        raise ValueError(f"one {begin} and then one {end} are wanted on a page")
    page = next(path for path, text in texts.items() if begin in text)
    before, _, after = texts[page].partition(begin)
    if page.parent.name == "docs":
        text = text.replace("](bench/", "](../bench/")
    texts[page] = f"{before}{begin}\n{text}\n{end}{after.partition(end)[2]}"


def drawings(results: Path) -> list[tuple[Path, list[Row], Callable[[list[Row], Path], None]]]:
    """(file, the rows that it shows, the function that draws them) of every chart."""
    path = results / quality.ROWS.name
    charted = [(path.with_suffix(".svg"), last_run(path), quality_chart.draw)]
    shown = step_chart.charted(step_chart.tables(results))
    if shown:
        charted.append((step_chart.chart_path(shown, results), shown, step_chart.draw))
    return charted


def main(arguments: list[str] | None = None) -> int:
    parser = terminal.parser(__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    old, new = pages(ROOT), pages(ROOT)
    for name, text in blocks(RESULTS).items():
        put(new, name, text)
    if not check:
        for path, text in new.items():
            path.write_text(text, encoding="utf-8")
        for path, shown, draw in drawings(RESULTS):
            draw(shown, path)
        return 0
    stale = [str(path.relative_to(ROOT)) for path in new if new[path] != old[path]]
    stale += [path.name for path, shown, _ in drawings(RESULTS) if not charts.is_of(path, shown)]
    for name in stale:
        print(f"{name} differs from the rows: run python -m bench.report")
    if not stale:
        print("all tables and charts are up to date")
    return int(bool(stale))
