"""Charts of a run: validation.png, and SVG text for the report's page.

Colors are from Okabe and Ito's palette for the color-blind; line styles differ as well. The user's
matplotlibrc has no effect and is left as it is.
"""

import io
import math
import re
from pathlib import Path
from typing import Any, TypeGuard, cast

from fluxfast.run.validation import Validation, best
from fluxfast.util.files import write_atomic

INK, LORA, BASE = "#333333", "#0072b2", "#d55e00"
# in a page the charts follow its colors, light or dark; alone they keep those above
_ON_A_PAGE = {INK: "currentColor", LORA: f"var(--lora, {LORA})", BASE: f"var(--base, {BASE})"}
_STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "font.size": 12,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",  # words stay words: a third of the bytes, and they can be searched
}


def drawable(value) -> TypeGuard[float]:
    """Returns whether a chart can show the value: a number, not NaN, of at most 1e30."""
    return isinstance(value, int | float) and abs(value) <= 1e30


def plot_validation(rows: list[Validation], path: Path) -> None:
    """Write the measurements as a PNG of 1260 x 1080 pixels.

    Above, the losses of the LoRA and of the base model; below, their paired difference with its
    95 % interval; the best step is marked. Raises FluxfastError where `path` cannot be written.
    """
    write_atomic(path, _render(_draw_validation, rows, (7.0, 6.0), format="png", dpi=180))


def validation_figure(rows: list[Validation]) -> str:
    """Returns the same chart as SVG text, 5.8 x 5.0 inches."""
    return _svg(_draw_validation, rows, (5.8, 5.0))


def loss_figure(metrics: list[dict]) -> str:
    """Returns loss and smoothed loss over steps as SVG text, 5.8 x 3.6 inches.

    metrics: lines of metrics.jsonl; a loss that is missing, null or not finite leaves a gap.
    """
    return _svg(_draw_loss, metrics, (5.8, 3.6))


def _render(draw, rows: list, size: tuple[float, float], **options) -> bytes:
    """Run `draw(figure, rows)` on a figure of `size` in inches and encode it."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # a salt of its own keeps the ids of two charts on one page apart, and the same from run to run
    with style.context(["default", {**_STYLE, "svg.hashsalt": draw.__name__}]):
        figure = Figure(figsize=size, layout="constrained")
        cast(Any, figure.get_layout_engine()).set(w_pad=0.08, h_pad=0.08)  # inches
        draw(figure, rows)
        figure.savefig(buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def _svg(draw, rows: list, size: tuple[float, float]) -> str:
    """Returns the <svg> element alone, in the page's colors, without names that two may share."""
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    svg = _render(draw, rows, size, format="svg", transparent=True, metadata=no_metadata).decode()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<style [^>]*>.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for color, variable in _ON_A_PAGE.items():
        svg = svg.replace(color, variable)
    return svg


def _draw_validation(figure, rows: list[Validation]) -> None:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    steps = [row.step for row in rows]
    best_row = best([row for row in rows if drawable(row.loss)])
    above.plot(steps, [row.base_loss for row in rows], "s--", color=BASE, ms=6, label="base model")
    above.plot(steps, [row.loss for row in rows], "o-", color=LORA, ms=4, label="with the LoRA")
    if best_row:
        step, label = best_row.step, f"best: step {best_row.step}"
        above.plot([step], [best_row.loss], "*", color=LORA, mfc="none", ms=16, label=label)
        for axes in (above, below):
            axes.axvline(step, color=INK, lw=0.8, ls=":", zorder=0)
    above.set_ylabel("validation loss")
    # above the axes, where no line can run through it
    above.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=3, columnspacing=1.2, borderpad=0
    )

    low, high = ([_value(getattr(row, end)) for row in rows] for end in ("low", "high"))
    below.axhline(0, color=BASE, lw=1.2, ls="--")
    below.fill_between(steps, low, high, color=LORA, alpha=0.22, lw=0)
    below.vlines(steps, low, high, color=LORA, alpha=0.6, lw=1.2)  # one step alone makes no band
    below.plot(steps, [row.difference for row in rows], "o-", color=LORA, ms=4)
    known = any(math.isfinite(value) for value in low)
    band = "with 95 % interval" if known else "no interval: one picture"
    below.set_title(f"LoRA − base, {band}; below zero: it helps", fontsize=11)
    below.set_ylabel("difference")
    _step_axis(below, steps)


def _draw_loss(figure, metrics: list[dict]) -> None:
    axes = figure.subplots()
    steps = [row["step"] for row in metrics]
    mark = "o" if len(steps) == 1 else ""
    loss, smooth = ([_value(row.get(key)) for row in metrics] for key in ("loss", "loss_smooth"))
    axes.plot(steps, loss, f"{mark}-", color=BASE, lw=1, alpha=0.6, label="interval")
    axes.plot(steps, smooth, f"{mark}-", color=LORA, lw=2, label="smoothed")
    axes.set_ylabel("training loss")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, borderpad=0)
    _step_axis(axes, steps)


def _step_axis(axes, steps: list[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    if min(steps) == max(steps):
        axes.set_xticks(steps[:1])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.figure.align_ylabels()
    for each in axes.figure.axes:
        each.grid(axis="y", color=INK, alpha=0.15, lw=0.8)
        each.set_axisbelow(True)


def _value(number: float | None) -> float:
    """Returns NaN, which leaves a gap in a line, for what a chart cannot show."""
    return number if drawable(number) else math.nan
