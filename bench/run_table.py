"""The short table at the end of a suite, and what in it is wrong."""

from bench import timing
from bench.rows import Row, newest, title
from bench.step.table import over_limits
from fluxfast.model.spec import DEV

SLOWEST = 5
HEAD = "  TFLOP/s   MFU launches"
GIB = 2**30


def table(rows: list[Row]) -> str:
    """Of the newest row of everything: outcomes, steps by setting, kernels with most to gain, and
    what was not measured, with its reason."""
    rows = newest(rows)
    parts = [_outcomes(rows), *_steps(rows), _kernels(rows), _others(rows), _missing(rows)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def wrong(rows: list[Row]) -> list[str]:
    """What makes the exit code 1: wrong results, a script that says so, a slow step on the CPU."""
    rows = newest(rows)
    said = [f"{title(r)}: {r['status']}: {r['reason']}" for r in rows if _is_wrong(r)]
    results = {
        row["name"]: timing.Result(
            row["name"], row["status"], row["reason"], median_ms=row["median_ms"]
        )
        for row in rows
        if row["bench"] == "step" and row["device"] == "cpu" and row["hidden"] == DEV.hidden_size
    }
    return said + [f"too slow: {line}" for line in over_limits(results)]


def _is_wrong(row: Row) -> bool:
    ended_badly = row["bench"] == "suite" and row["status"] in ("missed", "failed")
    return row["status"] == "gate failed" or ended_badly


def _outcomes(rows: list[Row]) -> list[str]:
    """How the commands ended; of tests, how many passed."""
    lines = []
    for row in rows:
        if row["bench"] == "suite" and row["status"] not in ("skipped", "out of time"):
            passed = row["said"] if row["status"] == "ok" and "passed" in row["said"] else ""
            said = passed or row["reason"] or ""
            lines.append(f"{row['name']}: {row['status']} after {row['seconds']:.0f} s {said}")
    return [line.rstrip() for line in lines]


def _steps(rows: list[Row]) -> list[list[str]]:
    """A block for each setting, a line for each candidate, a column for each size."""
    blocks: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["bench"] == "step":
            key = (row["setting"], row["lora_targets"], row["memory_cap_gib"], row["batch"])
            blocks.setdefault(key, []).append(row)
    return [_block(key, found) for key, found in blocks.items()]


def _block(key: tuple, rows: list[Row]) -> list[str]:
    setting, targets, cap, batch = key
    within = "" if cap is None else f", within {cap:g} GiB"
    sizes = list(dict.fromkeys(_size(row) for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    found = {(row["name"], _size(row)): row for row in rows}
    width = max(len(name) for name in names)
    lines = [
        f"step, {setting} setting, LoRA on {targets}, batch {batch}{within}: ms, of the baseline, "
        "peak GiB",
        "".join([f"{'':{width}}", *(f" {size:>22}" for size in sizes), HEAD]),
    ]
    for name in names:
        mine = [found.get((name, size)) for size in sizes]
        cells = "".join(f" {_cell(row):>22}" for row in mine)
        lines.append(f"{name:{width}}{cells}{_rates(mine)}".rstrip())
    return lines


def _size(row: Row) -> str:
    if row["mix"]:
        return "mixed"
    return f"{row['pixels']} px"


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row["median_ms"] is None:
        return row["status"]
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    # on a CPU only what a step adds is known
    peak = row["peak_memory_bytes"] if row["device"] != "cpu" else None
    return f"{row['median_ms']:.0f} {ratio:>5} {'-' if peak is None else f'{peak / GIB:.1f}':>5}"


def _rates(rows: list[Row | None]) -> str:
    """Of the largest size that was timed."""
    timed = [row for row in rows if row and row["median_ms"] is not None and row["pixels"]]
    if not timed:
        return ""
    row = max(timed, key=lambda row: row["pixels"])
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    counted = "-" if row["launches"] is None else row["launches"]
    return f" {row['tflop_per_s']:8.2f} {mfu:>5} {counted:>8}"


def _kernels(rows: list[Row]) -> list[str]:
    """Ours that take the most time over their floor."""
    timed = [
        row
        for row in rows
        if row["bench"] == "kernels"
        and row["name"].startswith("fluxfast")
        and row["status"] == "ok"
        and row.get("floor_ms")
    ]
    timed.sort(key=lambda row: row["median_ms"] - row["floor_ms"], reverse=True)
    if not timed:
        return []
    lines = [f"{len(timed)} kernels timed; those with the most time over their floor:"]
    for row in timed[:SLOWEST]:
        figures = f"{row['median_ms']:10.3f} ms {row['percent_of_floor']:4.0f} % of the floor"
        lines.append(f"{figures}  {title(row).removeprefix('kernels ')}")
    return lines


def _others(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["bench"] == "quantize" and row["median_ms"] is not None:
            times = (
                f", {1 / row['ratio']:.1f} times as fast as bitsandbytes" if row["ratio"] else ""
            )
            lines.append(f"NF4 {row['what']}, {row['name']}: {row['median_ms']:.1f} ms{times}")
        if row["bench"] == "saved" and row["status"] == "ok":
            lines.append(
                f"{row['name']}, LoRA on {row['lora_targets']}: {row['double_bytes']:.0f} and "
                f"{row['single_bytes']:.0f} bytes saved per token of a double and a single block"
            )
    return lines


def _missing(rows: list[Row]) -> list[str]:
    """One line a reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok" and not _is_wrong(row):
            said = str(row["reason"]).splitlines() or [""]
            reasons.setdefault((row["status"], said[0]), []).append(row["name"])
    lines = []
    for (status, reason), names in reasons.items():
        who = list(dict.fromkeys(names))
        more = f" and {len(who) - 3} more" if len(who) > 3 else ""
        lines.append(f"{status}: {', '.join(who[:3])}{more}: {reason}")
    return ["not measured:", *lines] if lines else []
