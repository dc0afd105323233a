"""Rows of `bench.step` as a chart, tables and the README's status box.

A table is of one device and one setting: its caption holds for all of its rows. The newest row of
each candidate, shape and memory cap counts, but one that was never tried replaces none that was.
GPUs come before CPUs, and the last CPU that was timed stands for all: which one it was matters
little. The first table of a device is plain (LoRA on attention and MLP, no memory cap).
"""

from pathlib import Path

from bench.report import charts
from bench.rows import Row, read
from bench.terminal import markdown
from fluxfast.model.spec import DEV

NAMES = {
    "diffusers-nf4": "diffusers + peft + bitsandbytes",
    "diffusers-nf4-checkpoint": "the same, checkpointed",
    "diffusers-dense-compile": "diffusers + peft, bf16, compiled",
    "fluxfast-nf4": "fluxfast",
    "fluxfast-dense": "fluxfast, bf16 base",
    "fluxfast-nf4-int8": "fluxfast, int8 matmuls",
    "fluxfast-nf4-fp8": "fluxfast, fp8 matmuls",
    "fluxfast-int8-int8": "fluxfast, int8 base and matmuls",
    "fluxfast-fp8-fp8": "fluxfast, fp8 base and matmuls",
}
TRAINER = "-trainer"  # ends the name of a candidate whose step is that of `fluxfast train`
UNTRIED = ("skipped", "out of time")
PLAIN = ("plain", False, "attn+mlp")  # setting, under a memory cap, LoRA's targets
# the fields that a caption names once for all rows of a table
SHARED = ("hidden", "double_blocks", "single_blocks", "text_tokens", "rank", "optimizer", "compute")
NO_GPU = "**No GPU has timed this yet.**"
COMPILED = (
    "Every kernel is compiled for RTX 3090, 4090, 5090, A100 and H100 and tested under Triton's "
    "interpreter."
)


def setting_of(row: Row) -> tuple[str, bool, str]:
    cap = row.get("memory_cap_gib")
    return row.get("setting", "plain"), cap is not None, row["lora_targets"]


def sides(row: Row) -> tuple[int, ...]:
    """The sides, in pixels, of the images that its steps take in turn."""
    return tuple(row.get("mix") or [row["pixels"]])


def tables(results: Path) -> list[list[Row]]:
    """The rows of each table, in the page's order."""
    groups: dict[tuple, dict[tuple, dict[str, Row]]] = {}
    devices: list[str] = []
    for path in sorted(results.glob("step-*.jsonl")):
        timed = read(path)
        if timed and timed[-1]["device"] == "cpu":
            timed = [row for row in timed if row["device_name"] == timed[-1]["device_name"]]
        for row in timed:
            if row["device_name"] not in devices:
                devices.append(row["device_name"])
            setting = setting_of(row)
            order = (row["device"] == "cpu", devices.index(row["device_name"]))
            shared = tuple(row[key] for key in SHARED)
            group = (*order, setting != PLAIN, setting[1], setting, shared)
            shape = row.get("memory_cap_gib") or 0, len(sides(row)), sides(row), row["batch"]
            candidates = groups.setdefault(group, {}).setdefault(shape, {})
            if row["name"] not in candidates or row["status"] not in UNTRIED:
                candidates[row["name"]] = row
    return [
        [row for shape in sorted(by_shape) for row in by_shape[shape].values()]
        for _, by_shape in sorted(groups.items(), key=lambda item: item[0][:-1])
    ]


def is_timed(row: Row) -> bool:
    return row["median_ms"] is not None


def charted(groups: list[list[Row]]) -> list[Row]:
    """The rows on the chart: of the first table that has times, the largest image of the smallest
    batch."""
    first = next((group for group in groups if any(map(is_timed, group))), [])
    timed = [row for row in first if is_timed(row) and row["pixels"]]
    shape = min(((row["batch"], -row["pixels"]) for row in timed), default=None)
    return [row for row in timed if (row["batch"], -row["pixels"]) == shape]


def title(name: str) -> str:
    """A candidate in words."""
    bare = name.removesuffix(TRAINER)
    words = NAMES.get(bare, bare)
    return words if bare == name else f"{words}, as `fluxfast train` runs it"


def table(group: list[Row]) -> str:
    """A line for each row."""
    on_gpu, capped = group[0]["device"] == "cuda", setting_of(group[0])[1]
    head = ["step of", *["cap GiB"] * capped, "px", "batch", "median ms", "p10–p90", "of the first"]
    head += [*["images/s", "MFU", "launches", "peak GiB"] * on_gpu, "saved MiB"]
    lines = []
    for row in group:
        cells = [title(row["name"])]
        cells += [f"{row['memory_cap_gib']:g}"] if capped else []
        cells += ["/".join(map(str, sides(row))), f"{row['batch']}"]
        if is_timed(row):
            cells += figures(row, on_gpu)
        else:
            cells.append(f"{row['status']}: {row['reason']}".replace("|", "\\|"))
        lines.append(cells)
    return markdown(head, lines)


def figures(row: Row, on_gpu: bool) -> list[str]:
    def cell(key: str, form: str, unit: float = 1.0) -> str:
        value = row.get(key)
        return "" if value is None else f"{value / unit:{form}}"

    median = row["median_ms"]
    cells = [f"{median:.0f}", f"{row['p10_ms']:.0f}–{row['p90_ms']:.0f}", cell("ratio", ".2f")]
    if on_gpu:
        cells += [f"{1e3 * row['batch'] / median:.2f}", cell("mfu", ".0%"), cell("launches", ".0f")]
        cells.append(cell("peak_memory_bytes", ".1f", 2**30))
    return [*cells, cell("saved_bytes", ".0f", 2**20)]


def heading(group: list[Row]) -> str:
    """What sets a table apart from the plain one; empty for that."""
    setting, capped, targets = setting_of(group[0])
    words = ["ai-toolkit's stock setting"] if setting == "stock" else []
    words += [f"LoRA on {targets}"] if (setting, targets) != (PLAIN[0], PLAIN[2]) else []
    words += ["the GPU's memory capped, as on smaller cards"] if capped else []
    return f"With {', '.join(words)}:" if words else ""


def caption(group: list[Row]) -> str:
    """The conditions of all of a table's rows."""
    row = group[0]
    where = f"driver {row['driver']}" if row["device"] == "cuda" else f"{row['threads']} threads"
    sizes = {one["image_tokens"] for one in group}
    tokens = f"{row['image_tokens']} image and " if len(sizes) == 1 else ""
    base = "NF4 base, " if {one["storage"] for one in group} == {"nf4"} else ""
    ran = list(filter(is_timed, group))
    together = ", interleaved" if all(one["interleaved"] for one in ran) else ""
    rounds = max((one["rounds"] for one in ran), default=0)
    ema = ", EMA" if row.get("ema") else ""
    commits = ", ".join(dict.fromkeys((one["commit"] or "unknown")[:7] for one in group))
    return (
        f"{row['device_name']}, {where}; {row['double_blocks']} double and {row['single_blocks']} "
        f"single blocks of width {row['hidden']}, {tokens}{row['text_tokens']} text tokens, "
        f"{base}{row['compute']} matmuls, rank {row['rank']} on {row['lora_targets']}, "
        f"{row['optimizer']}{ema}; medians of {rounds} rounds{together}; torch {row['torch']}, "
        f"commit {commits}."
    )


def model_of(row: Row) -> str:
    depths = row["double_blocks"], row["single_blocks"]
    if depths == (DEV.depth, DEV.depth_single_blocks):
        return "FLUX.1-dev"
    return f"{sum(depths)} blocks of width {row['hidden']}"


def chart_path(group: list[Row], results: Path) -> Path:
    return results / f"step-{group[0]['device']}.svg"


def image(group: list[Row]) -> str:
    """The page's line of the chart."""
    row = group[0]
    device = "a CPU" if row["device"] == "cpu" else f"one {row['device_name']}"
    alt = (
        f"one training step of {model_of(row)} on {device}, beside diffusers + peft + bitsandbytes"
    )
    return f"![{alt}](bench/results/{chart_path(group, Path()).name})"


def draw(group: list[Row], path: Path) -> None:
    """Horizontal bars of the median steps, with p10 to p90."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 0.45 * len(group)), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(reversed(group)):
        color = "#d6336c" if row["name"].startswith("fluxfast") else "#adb5bd"
        median = row["median_ms"]
        spread = [[median - row["p10_ms"]], [row["p90_ms"] - median]]
        axes.barh(at, median, color=color, xerr=spread, ecolor="#495057")
        axes.text(0, at, f"  {median:.0f} ms", va="center", color="white", fontweight="bold")
    names = [title(row["name"]).replace("`", "") for row in reversed(group)]
    axes.set_yticks(range(len(group)), names)
    shape = f"{group[0]['pixels']} px, batch {group[0]['batch']}"
    axes.set_xlabel(f"one LoRA training step at {shape}, ms (shorter is better)")
    axes.spines[["top", "right"]].set_visible(False)
    charts.save(figure, group, path)


def block(results: Path) -> str:
    """The chart, the tables and their captions, and whether a GPU has timed anything."""
    groups = tables(results)
    shown = charted(groups)
    parts = [image(shown)] if shown else []
    for group in groups:
        parts += [part for part in (heading(group), table(group), caption(group)) if part]
    parts.append(COMPILED if _on_gpu(shown) else f"{NO_GPU} {COMPILED}")
    return "\n\n".join(parts)


def status(results: Path) -> str:
    """The README's status box: measured ratios and their device, in one paragraph."""
    shown = charted(tables(results))
    parts = [COMPILED] if _on_gpu(shown) else [NO_GPU, COMPILED]
    ours = [row for row in shown if row["name"].startswith("fluxfast") and row["ratio"]]
    if ours:
        row = ours[0]
        times = ", ".join(f"{one['ratio']:.2f} ({title(one['name'])})" for one in ours)
        parts += [] if _on_gpu(shown) else ["On a CPU the ops run as plain PyTorch:"]
        parts.append(
            f"one step of {model_of(row)} at {row['pixels']} px takes {times} of the time of "
            f"diffusers + peft + bitsandbytes; {row['device_name']}."
        )
    parts.append("All figures, with their conditions: [docs/performance.md](docs/performance.md).")
    return "> " + " ".join(parts)


def _on_gpu(shown: list[Row]) -> bool:
    return bool(shown) and shown[0]["device"] == "cuda"
