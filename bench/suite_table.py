"""The short table at the end of a suite, and which of its rows are wrong."""

from collections import defaultdict

from bench import timing
from bench.rows import Row, newest, title
from bench.step.table import over_limits
from bench.terminal import aligned
from fluxfast.model.spec import DEV

SLOWEST = 5
GIB = 2**30


def table(rows: list[Row]) -> str:
    """Outcomes, steps by setting, kernels with most to gain, and what was not measured with its
    reason, from the newest row of each identity."""
    rows = newest(rows)
    parts = [
        _outcomes(rows),
        *_steps(rows),
        _first(rows),
        _kernels(rows),
        _others(rows),
        _missing(rows),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def wrong(rows: list[Row]) -> list[str]:
    """The reasons for exit code 1: wrong results, a command that fails, a slow step on the CPU."""
    rows = newest(rows)
    failures = [f"{title(r)}: {r['status']}: {r['reason']}" for r in rows if _is_wrong(r)]
    results = {
        row["name"]: timing.Result(
            row["name"], row["status"], row["reason"], median_ms=row["median_ms"]
        )
        for row in rows
        if row["bench"] == "step" and row["device"] == "cpu" and row["hidden"] == DEV.hidden_size
    }
    return failures + [f"too slow: {line}" for line in over_limits(results)]


def _is_wrong(row: Row) -> bool:
    ended_badly = row["bench"] == "suite" and row["status"] in ("missed", "failed")
    return row["status"] == "gate failed" or ended_badly


def _outcomes(rows: list[Row]) -> list[str]:
    """A line for each command: its status, and how many of its tests passed."""
    lines = []
    for row in rows:
        if row["bench"] == "suite" and row["status"] not in ("skipped", "out of time"):
            last = row.get("said") or ""
            detail = row["reason"] or (last if "passed" in last else "")
            line = f"{row['name']}: {row['status']} after {row['seconds']:.0f} s {detail}"
            lines.append(line.rstrip())
    return lines


def _steps(rows: list[Row]) -> list[list[str]]:
    """A block for each setting, a line for each candidate, a column for each size."""
    blocks = defaultdict(list)
    for row in rows:
        if row["bench"] == "step":
            key = (row["setting"], row["lora_targets"], row["memory_cap_gib"], row["batch"])
            blocks[key].append(row)
    return [_block(*key, group) for key, group in blocks.items()]


def _block(setting: str, targets: str, cap: float | None, batch: int, rows: list[Row]) -> list[str]:
    within = "" if cap is None else f", within {cap:g} GiB"
    sizes = list(dict.fromkeys(_size(row) for row in rows))
    by_size = {(row["name"], _size(row)): row for row in rows}
    lines = [["", *sizes, "TFLOP/s", "MFU", "launches"]]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [by_size.get((name, size)) for size in sizes]
        lines.append([name, *map(_cell, own), *_rates(own)])
    title = f"step, {setting} setting, LoRA on {targets}, batch {batch}{within}"
    return [f"{title}: ms, of the baseline, peak GiB", aligned(lines)]


def _size(row: Row) -> str:
    return "mixed" if row["mix"] else f"{row['pixels']} px"


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row["median_ms"] is None:
        return row["status"]
    # on a CPU only what a step adds is known
    peak = None if row["device"] == "cpu" else row["peak_memory_bytes"]
    figures = _figure(row["ratio"], ".2f"), _figure(peak and peak / GIB, ".1f")
    return f"{row['median_ms']:.0f} {figures[0]:>5} {figures[1]:>5}"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _rates(rows: list[Row | None]) -> list[str]:
    """TFLOP/s, MFU and launches of the largest size that was timed."""
    timed = [row for row in rows if row and row["median_ms"] is not None and row["pixels"]]
    if not timed:
        return ["", "", ""]
    row = max(timed, key=lambda row: row["pixels"])
    return [f"{row['tflop_per_s']:.2f}", _figure(row["mfu"], ".1%"), _figure(row["launches"], "")]


def _kernels(rows: list[Row]) -> list[str]:
    """fluxfast's kernels with the most time over their floor."""
    ours = [row for row in rows if row["bench"] == "kernels" and row["name"].startswith("fluxfast")]
    timed = [row for row in ours if row["status"] == "ok" and row.get("floor_ms")]
    timed.sort(key=lambda row: row["median_ms"] - row["floor_ms"], reverse=True)
    if not timed:
        return []
    lines = [f"{len(timed)} kernels timed; those with the most time over their floor:"]
    for row in timed[:SLOWEST]:
        figures = f"{row['median_ms']:10.3f} ms {row['percent_of_floor']:4.0f} % of the floor"
        lines.append(f"{figures}  {title(row).removeprefix('kernels ')}")
    return lines


def _first(rows: list[Row]) -> list[str]:
    """What `bench.first` measured, a line a row."""
    lines = []
    for row in rows:
        if row["bench"] == "first" and row["status"] == "ok":
            shape = "x".join(map(str, row["shape"]))
            time = _figure(row["median_ms"], ".4f")
            figure = f"{row['figure']:.4g} {row['unit']}" if "figure" in row else ""
            what = " ".join(filter(None, (row["what"], row.get("op"), row.get("storage"), shape)))
            lines.append([what, row["name"], f"{time} ms" if row["median_ms"] else "", figure])
    return aligned(lines, left=(0, 1, 3)).splitlines() if lines else []


def _others(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["bench"] == "quantize" and row["median_ms"] is not None:
            ratio = row["ratio"]
            times = f", {1 / ratio:.1f} times as fast as bitsandbytes" if ratio else ""
            lines.append(f"NF4 {row['what']}, {row['name']}: {row['median_ms']:.1f} ms{times}")
        if row["bench"] == "saved" and row["status"] == "ok":
            lines.append(
                f"{row['name']}, LoRA on {row['lora_targets']}: {row['double_bytes']:.0f} and "
                f"{row['single_bytes']:.0f} bytes saved per token of a double and a single block"
            )
    return lines


def _missing(rows: list[Row]) -> list[str]:
    """One line a reason."""
    reasons = defaultdict(dict)
    for row in rows:
        if row["status"] != "ok" and not _is_wrong(row):
            first, *_ = str(row["reason"]).splitlines() or [""]
            reasons[row["status"], first][row["name"]] = None
    lines = []
    for (status, reason), names in reasons.items():
        shown = ", ".join(list(names)[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{status}: {shown}{more}: {reason}")
    return ["not measured:", *lines] if lines else []
