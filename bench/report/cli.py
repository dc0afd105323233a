"""Every table and chart of the README, from the rows of bench/results/ and the plan: never typed.

    python -m bench.report   writes the README's blocks and bench/results/*.svg
    … --check    exits with 1 where the README or a chart says otherwise

Blocks: steps beside their peers (`step_chart.py`), what the cards hold (`plan_table.py`),
activations in 8 bits (`activations.py`), the techniques (`technique_table.py`), what 8-bit products
do to training (`quality_chart.py`).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bench import RESULTS, ROOT, activations, quality, rows
from bench.report import charts, plan_table, quality_chart, step_chart, technique_table

README = ROOT / "README.md"


def blocks(results: Path) -> list[str]:
    """Each begins and ends with the markers that are its place in the README."""
    return [
        step_chart.block(results),
        plan_table.block(),
        activations.block(rows.last_run(results / activations.ROWS.name)),
        technique_table.block(results),
        quality_chart.block(rows.last_run(results / quality.ROWS.name)),
    ]


def put(text: str, block: str) -> str:
    """The text with the block in its place. Raises ValueError where its markers are not there once,
    in their order."""
    lines = block.splitlines()
    before, begin, rest = text.partition(lines[0])
    _, end, after = rest.partition(lines[-1])
    if not (begin and end) or lines[0] in rest or lines[-1] in before + after:
        raise ValueError(f"one {lines[0]} and then one {lines[-1]} are wanted in the README")
    return before + block + after


def drawings(results: Path) -> list[tuple[Path, list[dict], Callable[[list[dict], Path], None]]]:
    """(file, the rows that it shows, what draws them) of every chart."""
    quality_svg = (results / quality.ROWS.name).with_suffix(".svg")
    found = [(quality_svg, rows.last_run(results / quality.ROWS.name), quality_chart.draw)]
    shown = step_chart.charted(step_chart.tables(results))
    if shown:
        found.append((step_chart.chart_path(shown, results), shown, step_chart.draw))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    text = wanted = README.read_text(encoding="utf-8")
    for block in blocks(RESULTS):
        wanted = put(wanted, block)
    if not check:
        README.write_text(wanted, encoding="utf-8")
        for path, shown, draw in drawings(RESULTS):
            draw(shown, path)
        return 0
    wrong = ["README.md"] if wanted != text else []
    wrong += [path.name for path, shown, _ in drawings(RESULTS) if not charts.is_of(path, shown)]
    for name in wrong:
        print(f"{name} is not what the rows say: run python -m bench.report")
    if not wrong:
        print("the README's tables and charts are up to date")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
