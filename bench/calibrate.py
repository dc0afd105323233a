"""Writes fluxfast/memory/measured.json: how much longer a step takes than the cost model predicts.

    python -m bench.calibrate           from bench/results/step-cuda.jsonl
    python -m bench.calibrate --dry-run  prints, writes nothing

Per card and compute kind: the median of measured / predicted over the rows of fluxfast candidates
that ran ("ok") over full-width blocks on a card of the table: bare steps of one size in the plain
setting, without a cap on memory. Predicted is the whole step with eager launches and AdamW, from
the shipped shares: an older measured.json plays no part. Without such rows nothing is written, and
the exit code is 0.
"""

import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median

from bench import RESULTS, terminal
from bench.rows import read
from bench.step.settings import DTYPE_NAMES
from bench.step.table import comparable
from fluxfast.errors import ConfigError
from fluxfast.memory.planner.cards import MEASURED, card
from fluxfast.memory.planner.cost import optimizer_ops, step_ops, total_seconds
from fluxfast.memory.planner.step_spec import Shape, StepSpec, lora_of
from fluxfast.model.spec import DEV

ROWS = RESULTS / "step-cuda.jsonl"


def usable(row: dict) -> bool:
    return (
        row.get("bench") == "step"
        and row["device"] == "cuda"
        and row["name"].startswith("fluxfast")
        and row["status"] == "ok"
        and row["hidden"] == DEV.hidden_size
        and not row["checkpointing"]
        and comparable(row)
    )


def step_of(row: dict) -> tuple[StepSpec, Shape]:
    """Returns the step and the images that a row of `bench.step` was timed on."""
    spec = replace(DEV, depth=row["double_blocks"], depth_single_blocks=row["single_blocks"])
    storage, matmul, activations = (
        DTYPE_NAMES.get(row[key], row[key]) for key in ("storage", "products", "compute")
    )
    lora = lora_of(spec, row["rank"], row["lora_targets"])
    shape = Shape(row["batch"], row["image_tokens"], row["text_tokens"])
    return StepSpec(spec, storage, matmul, activations, lora), shape


def calibrate(rows: list[dict]) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """Returns {card: {compute kind: {factor, source}}}, and device names that are not in the
    table."""
    groups, unknown = defaultdict(list), {}
    for row in filter(usable, rows):
        try:
            shipped = replace(card(row["device_name"]), factors={})
        except ConfigError:
            unknown[row["device_name"]] = None
            continue
        step, shape = step_of(row)
        ops = step_ops(step, shape) + optimizer_ops(step, "adamw", guard=False)
        predicted = total_seconds(ops, shipped, launches=True)
        groups[shipped.name, step.matmul].append((row, row["median_ms"] / 1e3 / predicted))
    table: dict[str, dict[str, dict]] = defaultdict(dict)
    for (name, compute), group in sorted(groups.items()):
        commits = ", ".join(dict.fromkeys((row["commit"] or "unknown")[:7] for row, _ in group))
        device = group[0][0]["device_name"]
        table[name][compute] = {
            "factor": round(median(factor for _, factor in group), 3),
            "source": f"measured: commit {commits}, {device}, {len(group)} rows",
        }
    return dict(table), list(unknown)


def main(arguments: list[str] | None = None) -> int:
    parser = terminal.parser(__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS, help="JSON lines of bench.step")
    parser.add_argument("--out", type=Path, default=MEASURED)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    table, unknown = calibrate(read(options.rows))
    for name in unknown:
        print(
            f"{name}: not in fluxfast/memory/planner/cards.json, its rows are left out",
            file=sys.stderr,
        )
    if not table:
        print(f"{options.rows}: no rows of fluxfast on a known GPU; nothing written")
        return 0
    for name, kinds in table.items():
        for compute, row in kinds.items():
            print(f"{name}, {compute}: {row['factor']:.3f} of the prediction ({row['source']})")
    if not options.dry_run:
        options.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
