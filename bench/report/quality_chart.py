"""The quality run's rows as a chart and the README's block; `report.py` writes both."""

from pathlib import Path

from bench.quality import MODES, REFERENCE, ratios, spread
from bench.report import charts

BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
# Okabe and Ito's palette, with line styles for those who see no colour
STYLES = {
    "bf16/bf16": ("#333333", "-"),
    "nf4/bf16": ("#999999", "--"),
    "int8/int8": ("#0072b2", "-"),
    "nf4/int8": ("#d55e00", "--"),
    "nf4/fp8": ("#009e73", ":"),
}


def runs(rows: list[dict], mode: str) -> list[dict]:
    return [row for row in rows if row.get("mode") == mode]


def draw(rows: list[dict], path: Path) -> None:
    """Above the held-out loss of each mode, mean of the seeds; below its relative difference from
    the same storage with bf16 products, mean and range of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for mode in MODES:
        colour, line = STYLES[mode]
        curves = [dict(row["curve"]) for row in runs(rows, mode)]
        steps = sorted(curves[0])
        means = [spread([curve[step] for curve in curves])[0] for step in steps]
        above.plot(steps, means, line, color=colour, label=mode)
        if mode in REFERENCE:
            beside = {row["seed"]: dict(row["curve"]) for row in runs(rows, REFERENCE[mode])}
            apart = [
                [
                    100 * (dict(row["curve"])[step] / beside[row["seed"]][step] - 1)
                    for row in runs(rows, mode)
                ]
                for step in steps
            ]
            below.plot(steps, [spread(each)[0] for each in apart], line, color=colour)
            low, high = [min(each) for each in apart], [max(each) for each in apart]
            below.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    above.set_yscale("log")
    above.set_ylabel("held-out loss")
    above.legend(title="storage/products", frameon=False)
    below.axhline(0, color="#333333", linewidth=0.8)
    below.set_ylabel("over bf16 products, %")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    charts.save(figure, rows, path)


def block(rows: list[dict]) -> str:
    """The README's table, its sentence and its caption."""
    lines = [
        "| storage/products | best held-out loss | over the same storage (int8: bf16) with bf16 "
        "products | least gradient cosine |",
        "|---|---|---|---|",
    ]
    least = {row["products"]: min(row["cosines"].values()) for row in rows if "cosines" in row}
    for mode in MODES:
        mean, deviation = spread([row["best_loss"] for row in runs(rows, mode)])
        over, cosine = "", ""
        if mode in REFERENCE:
            values = ratios(rows, mode)
            over = f"{spread(values)[0]:+.2%} ({min(values):+.2%} to {max(values):+.2%})"
            cosine = f"{least[MODES[mode][1]]:.4f}"
        lines.append(f"| {mode} | {mean:.4f} ± {deviation:.4f} | {over} | {cosine} |")
    one = runs(rows, "bf16/bf16")
    storage = spread([
        other["best_loss"] / row["best_loss"] - 1
        for row, other in zip(one, runs(rows, "nf4/bf16"), strict=True)
    ])[0]  # fmt: skip
    rms = {mode: spread(ratios(rows, mode))[0] for mode in REFERENCE}
    lines += [
        "",
        f"What differs: 8-bit products move the best held-out loss by {rms['int8/int8']:+.2%} "
        f"(int8/int8), {rms['nf4/int8']:+.2%} (nf4/int8) and {rms['nf4/fp8']:+.2%} (nf4/fp8), "
        f"keeping the base in NF4 instead of bf16 by {storage:+.2%}.",
        "",
        f"{one[0]['device_name']}, {one[0]['threads']} threads; the nano model's zorb, "
        f"{one[0]['steps']} steps, {len(one)} seeds, the same data and noise for each mode; "
        f"cosine: per layer, 8-bit products and all else in fp32 against fp32, at a trained LoRA; "
        f"torch {one[0]['torch']}, commit {one[0]['commit'][:7]}.",
    ]
    return "\n".join([BEGIN, "", *lines, "", END])
