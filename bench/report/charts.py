"""SVG files that name the rows they were drawn from, so that a stale one is found."""

import hashlib
import json
from pathlib import Path

from bench.rows import Row


def mark(rows: list[Row]) -> str:
    """The description that a chart of these rows has in its metadata."""
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return f"rows {digest[:16]}"


def save(figure, rows: list[Row], path: Path) -> None:
    """Writes a matplotlib figure of `rows`; the same rows make the same file."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None, "Description": mark(rows)})


def is_of(path: Path, rows: list[Row]) -> bool:
    """Whether the file exists and was drawn from these rows."""
    return path.is_file() and mark(rows) in path.read_text(encoding="utf-8")
