"""The table of docs/performance.md: what the kernels of a step take of each card, compiled."""

import json
from pathlib import Path

from bench.terminal import markdown

ROWS = "twin-launches.jsonl"  # of `python -m bench.twin --all`
_WORDS = {"default": "the default path", "pairs": "every pair of settings", "all": "all"}


def block(results: Path) -> str:
    rows = [json.loads(line) for line in (results / ROWS).read_text("utf-8").splitlines()]
    table = []
    for arch in dict.fromkeys(row["arch"] for row in rows):
        mine = [row for row in rows if row["arch"] == arch]
        registers, stack, shared = (
            max(row[name] for row in mine) for name in ("registers", "stack", "shared")
        )
        keys, compiled = (sum(row[name] for row in mine) for name in ("keys", "compiled"))
        of, limit = _WORDS[mine[0]["configurations"]], mine[0]["limit"]
        numbers = [f"{compiled} of {keys}", str(registers), str(stack), f"{shared} of {limit}"]
        table.append([f"sm_{arch}", of, *numbers])
    head = ["card", "configurations", "compiled", "registers", "stack", "shared memory"]
    made = f"Commit {rows[0]['commit'][:7]}, Triton {rows[0]['triton']}; compiled, never run."
    return f"{markdown(head, table)}\n\n{made}"
