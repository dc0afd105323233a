"""Rows of `bench.step` as a chart, tables and the README's status box.

A table is of one device and one piece of work: what its caption says holds for all of its rows. The
newest row of each candidate, shape and memory cap counts; one that was never tried does not replace
one that was. GPUs come before CPUs, and of CPUs the last one that was timed stands for all: which
one it was says little. Of a device the plain setting comes first (LoRA on attention and MLP, no
memory cap).
"""

from pathlib import Path

from bench import rows
from bench.report import charts
from fluxfast.model.spec import DEV

BEGIN, END = "<!-- rows: begin -->", "<!-- rows: end -->"
STATUS_BEGIN, STATUS_END = "<!-- status: begin -->", "<!-- status: end -->"
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
PLAIN = ("plain", False, "attn+mlp")  # setting, under a memory cap, what has a LoRA
# what a caption says of all rows of a table
WORK = ("hidden", "double_blocks", "single_blocks", "text_tokens", "rank", "optimizer", "compute")
NO_GPU = "**No GPU has timed this yet.**"
COMPILED = (
    "Every kernel is compiled for RTX 3090, 4090, 5090, A100 and H100 and tested under Triton's "
    "interpreter."
)
ON_A_CPU = "On a CPU the ops run as plain PyTorch:"


def setting_of(row: dict) -> tuple[str, bool, str]:
    cap = row.get("memory_cap_gib")
    return row.get("setting", "plain"), cap is not None, row["lora_targets"]


def sides(row: dict) -> tuple[int, ...]:
    """Of the pictures that its steps take in turn, in pixels."""
    return tuple(row.get("mix") or [row["pixels"]])


def tables(results: Path) -> list[list[dict]]:
    """The rows of each table, in their order."""
    found: dict[tuple, dict[tuple, dict]] = {}
    devices: dict[str, None] = {}
    for path in sorted(results.glob("step-*.jsonl")):
        timed = rows.read(path)
        if timed and timed[-1]["device"] == "cpu":
            timed = [row for row in timed if row["device_name"] == timed[-1]["device_name"]]
        for row in timed:
            devices.setdefault(row["device_name"])
            work = tuple(row[key] for key in WORK)
            one = row["device"], row["device_name"], setting_of(row), work
            shape = row.get("memory_cap_gib") or 0, len(sides(row)), sides(row), row["batch"]
            candidates = found.setdefault(one, {}).setdefault(shape, {})
            if row["name"] not in candidates or row["status"] not in UNTRIED:
                candidates[row["name"]] = row

    def place(one: tuple) -> tuple:
        device, name, setting, _ = one
        return device == "cpu", list(devices).index(name), setting != PLAIN, setting[1], setting

    return [
        [row for shape in sorted(found[one]) for row in found[one][shape].values()]
        for one in sorted(found, key=place)
    ]


def is_timed(row: dict) -> bool:
    return row["median_ms"] is not None


def charted(found: list[list[dict]]) -> list[dict]:
    """What the chart shows: of the first table that has times, the largest picture of the smallest
    batch."""
    first = next((one for one in found if any(map(is_timed, one))), [])
    timed = [row for row in first if is_timed(row) and row["pixels"]]
    shape = min(((row["batch"], -row["pixels"]) for row in timed), default=None)
    return [row for row in timed if (row["batch"], -row["pixels"]) == shape]


def title(name: str) -> str:
    """A candidate in words."""
    plain = name.removesuffix(TRAINER)
    said = NAMES.get(plain, plain)
    return said if plain == name else f"{said}, as `fluxfast train` runs it"


def table(group: list[dict]) -> str:
    """Markdown: one line a row."""
    on_gpu, capped = group[0]["device"] == "cuda", setting_of(group[0])[1]
    head = ["step of", *["cap GiB"] * capped, "px", "batch", "median ms", "p10–p90", "of the first"]
    head += [*["images/s", "MFU", "launches", "peak GiB"] * on_gpu, "saved MiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in group:
        cells = [title(row["name"])]
        cells += [f"{row['memory_cap_gib']:g}"] if capped else []
        cells += ["/".join(map(str, sides(row))), f"{row['batch']}"]
        if is_timed(row):
            cells += figures(row, on_gpu)
        else:
            cells.append(f"{row['status']}: {row['reason']}".replace("|", "\\|"))
        lines.append("| " + " | ".join([*cells, *[""] * (len(head) - len(cells))]) + " |")
    return "\n".join(lines)


def figures(row: dict, on_gpu: bool) -> list[str]:
    def cell(key: str, form: str, unit: float = 1.0) -> str:
        value = row.get(key)
        return "" if value is None else f"{value / unit:{form}}"

    median = row["median_ms"]
    cells = [f"{median:.0f}", f"{row['p10_ms']:.0f}–{row['p90_ms']:.0f}", cell("ratio", ".2f")]
    if on_gpu:
        cells += [f"{1e3 * row['batch'] / median:.2f}", cell("mfu", ".0%"), cell("launches", ".0f")]
        cells.append(cell("peak_memory_bytes", ".1f", 2**30))
    return [*cells, cell("saved_bytes", ".0f", 2**20)]


def heading(group: list[dict]) -> str:
    """What a table that is not of the plain setting is of; else empty."""
    setting, capped, targets = setting_of(group[0])
    said = ["ai-toolkit's stock setting"] if setting == "stock" else []
    said += [f"LoRA on {targets}"] if (setting, targets) != (PLAIN[0], PLAIN[2]) else []
    said += ["the GPU's memory capped, as on smaller cards"] if capped else []
    return f"With {', '.join(said)}:" if said else ""


def caption(group: list[dict]) -> str:
    """What all of a table's rows were measured on and with."""
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


def chart_path(group: list[dict], results: Path) -> Path:
    return results / f"step-{group[0]['device']}.svg"


def image(group: list[dict]) -> str:
    """The page's line of the chart."""
    row = group[0]
    depths = row["double_blocks"], row["single_blocks"]
    whole = depths == (DEV.depth, DEV.depth_single_blocks)
    work = "FLUX.1-dev" if whole else f"{sum(depths)} blocks of width {row['hidden']}"
    device = "a CPU" if row["device"] == "cpu" else f"one {row['device_name']}"
    said = f"one training step of {work} on {device}, beside diffusers + peft + bitsandbytes"
    return f"![{said}](bench/results/{chart_path(group, Path()).name})"


def draw(group: list[dict], path: Path) -> None:
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


def is_gpu(shown: list[dict]) -> bool:
    return bool(shown) and shown[0]["device"] == "cuda"


def block(results: Path) -> str:
    """The chart, the tables and their captions, and whether a GPU has timed anything."""
    found = tables(results)
    shown = charted(found)
    parts = [image(shown)] if shown else []
    for one in found:
        parts += [part for part in (heading(one), table(one), caption(one)) if part]
    parts.append(COMPILED if is_gpu(shown) else f"{NO_GPU} {COMPILED}")
    return "\n\n".join([BEGIN, *parts, END])


def status(results: Path) -> str:
    """The README's status box: what was measured, on which device, in one paragraph."""
    shown = charted(tables(results))
    parts = [COMPILED] if is_gpu(shown) else [NO_GPU, COMPILED]
    ours = [row for row in shown if row["name"].startswith("fluxfast") and row["ratio"]]
    if ours:
        row = ours[0]
        blocks = row["double_blocks"] + row["single_blocks"]
        whole = blocks == DEV.depth + DEV.depth_single_blocks
        work = "FLUX.1-dev" if whole else f"{blocks} blocks of width {row['hidden']}"
        times = ", ".join(f"{one['ratio']:.2f} ({title(one['name'])})" for one in ours)
        parts += [] if is_gpu(shown) else [ON_A_CPU]
        parts.append(
            f"one step of {work} at {row['pixels']} px takes {times} of the time of diffusers + "
            f"peft + bitsandbytes; {row['device_name']}."
        )
    parts.append("All figures, with their conditions: [docs/performance.md](docs/performance.md).")
    return "\n\n".join([STATUS_BEGIN, "> " + " ".join(parts), STATUS_END])
