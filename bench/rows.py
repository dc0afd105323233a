"""Rows as JSON lines: which of them measured the same under the same conditions, the file that a
suite appends to and resumes from, and whether two runs agree.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from bench import timing

Row = dict[str, object]

# what was measured, with which candidate; a bench has some of these
WORK = (
    *("bench", "what", "op", "direction", "step", "setting", "lora_targets", "memory_cap_gib"),
    *("pixels", "mix", "batch", "shape", "rank", "text_tokens", "hidden", "double_blocks"),
    *("single_blocks", "compute", "device"),
)
CANDIDATE = ("name", "storage", "products")
# rows that differ in these are not taken for each other
CONDITIONS = ("commit", "dirty", "device_name", "threads", "torch", *timing.LIBRARIES)
AGREEMENT = 0.15  # of the smaller of two ratios
LEAST_MS = 100.0  # shorter ones say more of the machine than of the code


def _values(row: Row, fields: Iterable[str]) -> tuple:
    values = (row.get(field) for field in fields)
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def identity(row: Row) -> tuple:
    """Returns a value that is equal for rows that measure the same."""
    return _values(row, (*WORK, *CANDIDATE))


def peers(row: Row) -> tuple:
    """Returns a value that is equal for rows that are compared with each other."""
    return _values(row, (field for field in WORK if field != "step"))


def read(path: Path) -> list[Row]:
    """Returns the rows of a file, if it exists, in order, without a last line that a killed process
    left unfinished."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def last_run(path: Path) -> list[Row]:
    """Returns the rows of a file's last run: those with the last row's date."""
    rows = read(path)
    return [row for row in rows if row["date"] == rows[-1]["date"]]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Returns the last row of each identity, in the order in which they first came."""
    return list({identity(row): row for row in rows}.values())


class RowFile:
    """The rows of a file that were measured under the same conditions (`timing.conditions`), and
    those to come. A line that a killed process left unfinished is cut off."""

    def __init__(self, path: Path, conditions: Row):
        self.path, self.conditions = path, conditions
        cut_unfinished(path)
        self.refresh()

    def append_news(self, rows: list[Row]) -> None:
        """Appends rows, but none that is "out of time" for a second time."""
        late = "out of time"
        news = [row for row in rows if not row["status"] == self._status(row) == late]
        timing.append_rows(self.path, news)
        self.rows += news

    def refresh(self) -> None:
        """Reads what another process has appended."""
        now = _values(self.conditions, CONDITIONS)
        self.rows = [row for row in read(self.path) if _values(row, CONDITIONS) == now]

    def _status(self, row: Row) -> object:
        """Returns the status of the newest row of the same identity, None without one."""
        same = (r["status"] for r in reversed(self.rows) if identity(r) == identity(row))
        return next(same, None)

    def measured(self, row: Row) -> bool:
        """Whether it is there and need not be taken again."""
        return self._status(row) not in (None, "out of time")


def cut_unfinished(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)


def compare(first: list[Row], second: list[Row]) -> tuple[list[str], bool]:
    """Returns a line per row that both runs timed at over LEAST_MS beside a baseline, and whether
    all their ratios agree within AGREEMENT. Nothing to compare does not agree.
    """
    others = {identity(row): row for row in newest(second)}
    lines, agree = [], True
    for row in newest(first):
        other = others.get(identity(row))
        if other is None or not (_counts(row) and _counts(other)):
            continue
        low, high = sorted((row["ratio"], other["ratio"]))
        apart = high / low - 1
        agree &= apart <= AGREEMENT
        verdict = "agree" if apart <= AGREEMENT else f"differ by more than {AGREEMENT:.0%}"
        lines.append(
            f"{title(row)}: {row['ratio']:.3f} and {other['ratio']:.3f} of the baseline: "
            f"{apart:.1%} apart, {verdict}"
        )
    return lines, agree and bool(lines)


def _counts(row: Row) -> bool:
    """Whether a row has a ratio that could differ: the baseline's own is 1."""
    timed = row.get("status") == "ok" and row.get("ratio") and row["median_ms"] > LEAST_MS
    return bool(timed) and row["ratio"] != 1


def title(row: Row) -> str:
    """Returns a row's name, such as: step fluxfast-nf4 256 px batch 1."""
    sizes = row.get("mix") or row.get("pixels")
    parts = [row["bench"], row.get("what"), row.get("op"), row.get("direction"), row["name"]]
    if row["bench"] == "kernels":
        parts += ["/".join(str(row[key]) for key in ("storage", "products") if row.get(key))]
    if sizes:
        parts += ["/".join(map(str, sizes)) if isinstance(sizes, list) else sizes, "px"]
        parts += ["batch", row.get("batch")]
    if row.get("setting", "plain") != "plain":
        parts.append(row["setting"])
    if row.get("memory_cap_gib"):
        parts.append(f"within {row['memory_cap_gib']:g} GiB")
    return " ".join(str(part) for part in parts if part is not None)
