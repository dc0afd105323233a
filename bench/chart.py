"""Puts the newest rows of bench/results/ into the README: tables and charts, never typed.

    PYTHONPATH=.:kernels python bench/chart.py   writes bench/results/*.svg and the README's tables
    … --check                                    exits with 1 where the README says otherwise

The newest run of each (device, pixels, batch) counts; a row that is not "ok" is shown with its
reason.
"""

import argparse
import json
import sys
from pathlib import Path

from bench import plan_table, quality_chart

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- rows: begin -->", "<!-- rows: end -->"
NAMES = {
    "diffusers-nf4": "diffusers + peft + bitsandbytes",
    "diffusers-nf4-checkpoint": "the same, checkpointed",
    "diffusers-dense-compile": "diffusers + peft, bf16, compiled",
    "fluxfast-nf4": "fluxfast",
    "fluxfast-dense": "fluxfast, bf16 base",
    "fluxfast-nf4-int8": "fluxfast, int8 products",
    "fluxfast-nf4-fp8": "fluxfast, fp8 products",
    "fluxfast-int8-int8": "fluxfast, int8 base and products",
    "fluxfast-fp8-fp8": "fluxfast, fp8 base and products",
}


def newest(path: Path) -> list[dict]:
    """The rows of the last run of each shape: rows of one run share date-less conditions and are
    written together, one per candidate."""
    runs: dict[tuple, dict[str, dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        runs.setdefault((row["pixels"], row["batch"]), {})[row["name"]] = row
    return [row for shape in sorted(runs) for row in runs[shape].values()]


def table(rows: list[dict]) -> str:
    """Markdown: one line a row, and what they were measured on."""
    lines = [
        "| step of | px | batch | median ms | p10–p90 | of the first | saved MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = NAMES.get(row["name"], row["name"])
        if row["median_ms"] is None:
            figures = [f"{row['status']}: {row['reason']}", "", "", ""]
        else:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            saved = "" if row["saved_bytes"] is None else f"{row['saved_bytes'] / 2**20:.0f}"
            spread = f"{row['p10_ms']:.0f}–{row['p90_ms']:.0f}"
            figures = [f"{row['median_ms']:.0f}", spread, ratio, saved]
        lines.append(
            "| " + " | ".join([name, f"{row['pixels']}", f"{row['batch']}", *figures]) + " |"
        )
    return "\n".join([*lines, "", caption(rows[0])])


def caption(row: dict) -> str:
    blocks = f"{row['double_blocks']} double and {row['single_blocks']} single blocks"
    return (
        f"{row['device_name']}, {row['threads']} threads; {blocks} of width {row['hidden']}, "
        f"{row['image_tokens']} image and {row['text_tokens']} text tokens, NF4 base, "
        f"{row['compute']} "
        f"products, rank {row['rank']} on {row['lora_targets']}, {row['optimizer']}; medians of "
        f"{row['rounds']} rounds, interleaved; torch {row['torch']}, commit {row['commit'][:7]}."
    )


def draw(rows: list[dict], path: Path) -> None:
    """Horizontal bars of the median steps, with p10 to p90."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["median_ms"] is not None]
    figure = Figure(figsize=(8, 0.8 + 0.45 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(reversed(shown)):
        colour = "#d6336c" if row["name"].startswith("fluxfast") else "#adb5bd"
        median = row["median_ms"]
        spread = [[median - row["p10_ms"]], [row["p90_ms"] - median]]
        axes.barh(at, median, color=colour, xerr=spread, ecolor="#495057")
        axes.text(0, at, f"  {median:.0f} ms", va="center", color="white", fontweight="bold")
    axes.set_yticks(range(len(shown)), [NAMES.get(r["name"], r["name"]) for r in reversed(shown)])
    axes.set_xlabel("one LoRA training step, ms (shorter is better)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def readme_block() -> str:
    parts = [table(newest(path)) for path in sorted(RESULTS.glob("step-*.jsonl"))]
    return "\n\n".join([BEGIN, *parts, END])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    wanted = text.split(BEGIN)[0] + readme_block() + text.split(END)[1]
    measured = quality_chart.newest()
    before, after = wanted.split(quality_chart.BEGIN)[0], wanted.split(quality_chart.END)[1]
    wanted = before + quality_chart.block(measured) + after
    before, after = wanted.split(plan_table.BEGIN)[0], wanted.split(plan_table.END)[1]
    wanted = before + plan_table.block() + after
    if check:
        said = "the README's tables are up to date"
        print(said if wanted == text else "run python bench/chart.py")
        return wanted != text
    readme.write_text(wanted, encoding="utf-8")
    for path in sorted(RESULTS.glob("step-*.jsonl")):
        draw(newest(path), path.with_suffix(".svg"))
    quality_chart.draw(measured, quality_chart.RESULTS.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
