"""SVG files that say which rows they were drawn of, so that a stale one is found."""

import hashlib
import json
from pathlib import Path


def mark(rows: list[dict]) -> str:
    """What a chart of these rows says in its metadata."""
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return f"rows {digest[:16]}"


def save(figure, rows: list[dict], path: Path) -> None:
    """Write a matplotlib figure of `rows`; the same rows make the same file."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None, "Description": mark(rows)})


def is_of(path: Path, rows: list[dict]) -> bool:
    """Whether the file is there and was drawn of these rows."""
    return path.is_file() and mark(rows) in path.read_text(encoding="utf-8")
