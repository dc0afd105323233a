"""The rows of `bench.quality` as a chart and a table."""

from pathlib import Path
from statistics import fmean

from bench.quality import MODES, REFERENCE, deviation, ratios
from bench.report import charts
from bench.rows import Row
from bench.terminal import markdown

# Okabe and Ito's palette, with line styles for those who see no color
STYLES = {
    "bf16/bf16": ("#333333", "-"),
    "nf4/bf16": ("#999999", "--"),
    "int8/int8": ("#0072b2", "-"),
    "nf4/int8": ("#d55e00", "--"),
    "nf4/fp8": ("#009e73", ":"),
}


def runs(rows: list[Row], mode: str) -> list[Row]:
    return [row for row in rows if row.get("mode") == mode]


def curves(rows: list[Row], mode: str) -> dict[int, dict[int, float]]:
    """The held-out loss by step of each seed."""
    return {row["seed"]: dict(row["curve"]) for row in runs(rows, mode)}


def draw(rows: list[Row], path: Path) -> None:
    """Above the held-out loss of each mode, mean of the seeds; below its relative difference from
    the same storage with bf16 matmuls, mean and range of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for mode, (color, line) in STYLES.items():
        seeds = curves(rows, mode)
        steps = sorted(next(iter(seeds.values())))
        means = [fmean(curve[step] for curve in seeds.values()) for step in steps]
        above.plot(steps, means, line, color=color, label=mode)
        if mode in REFERENCE:
            reference = curves(rows, REFERENCE[mode])
            percent = [
                [100 * (seeds[seed][step] / reference[seed][step] - 1) for seed in seeds]
                for step in steps
            ]
            below.plot(steps, [fmean(each) for each in percent], line, color=color)
            low, high = [min(each) for each in percent], [max(each) for each in percent]
            below.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    above.set_yscale("log")
    above.set_ylabel("held-out loss")
    above.legend(title="storage/matmuls", frameon=False)
    below.axhline(0, color="#333333", linewidth=0.8)
    below.set_ylabel("over bf16 matmuls, %")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    charts.save(figure, rows, path)


def block(rows: list[Row]) -> str:
    """The table, its sentence and its caption."""
    lines = []
    least = {row["products"]: min(row["cosines"].values()) for row in rows if "cosines" in row}
    for mode in MODES:
        losses, more = [row["best_loss"] for row in runs(rows, mode)], []
        if mode in REFERENCE:
            values = ratios(rows, mode)
            more = [f"{fmean(values):+.2%} ({min(values):+.2%} to {max(values):+.2%})"]
            more.append(f"{least[MODES[mode][1]]:.4f}")
        lines.append([mode, f"{fmean(losses):.4f} ± {deviation(losses):.4f}", *more])
    head = ["storage/matmuls", "best held-out loss"]
    head += ["over the same storage (int8: bf16) with bf16 matmuls", "least gradient cosine"]
    bf16 = runs(rows, "bf16/bf16")
    pairs = zip(bf16, runs(rows, "nf4/bf16"), strict=True)
    storage = fmean(nf4["best_loss"] / plain["best_loss"] - 1 for plain, nf4 in pairs)
    mean = {mode: fmean(ratios(rows, mode)) for mode in REFERENCE}
    sentence = (
        f"What differs: 8-bit matmuls move the best held-out loss by {mean['int8/int8']:+.2%} "
        f"(int8/int8), {mean['nf4/int8']:+.2%} (nf4/int8) and {mean['nf4/fp8']:+.2%} (nf4/fp8), "
        f"keeping the base in NF4 instead of bf16 by {storage:+.2%}."
    )
    row = bf16[0]
    caption = (
        f"{row['device_name']}, {row['threads']} threads; the nano model's zorb, "
        f"{row['steps']} steps, {len(bf16)} seeds, the same data and noise for each mode; "
        f"cosine: per layer, 8-bit matmuls and all else in fp32 against fp32, at a trained LoRA; "
        f"torch {row['torch']}, commit {row['commit'][:7]}."
    )
    return "\n\n".join([markdown(head, lines), sentence, caption])
