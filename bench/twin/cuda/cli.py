"""`fluxfast train` whole, at FLUX.1-dev's size, on cards that are not here: torch's own CUDA build
over a runtime that reserves memory and computes nothing (`fakecudart.c`).

    python -m bench.twin.cuda              what is not in bench/results/twin-cuda.jsonl yet
    … --only "3060*" --redo                those whose name fits, again
    … --quick --out rows.jsonl             the eight of the long tests

`make twin` is all of it. Exits with 1 where a run differs from its plan. The first call downloads
torch's CUDA build (530 MB).
"""

import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

from bench import RESULTS, ROOT
from bench.rows import read
from bench.terminal import markdown, parser
from bench.twin.cuda.scenarios import CARDS, Scenario, scenarios

ROWS = RESULTS / "twin-cuda.jsonl"
NOTE = (
    "Checked on torch's own CUDA allocator, without a GPU; no times. The peak is of the whole "
    "card, 0.44 GiB for CUDA itself and what the desktop takes included; launches a step: the "
    "graph's nodes, and what is launched beside it."
)


def run(scenario: Scenario, environment: dict[str, str], timeout_s: float = 1800) -> dict:
    """Runs a scenario in a process of its own. Returns its row; wrong: what differs."""
    task = {
        "sizes": scenario.pictures,
        "settings": list(scenario.settings),
        "fail": scenario.fail,
    }
    child = subprocess.run(
        [sys.executable, "-c", "from bench.twin.cuda.child import main; main()", json.dumps(task)],
        env=environment | scenario.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    start = {"bench": "twin-cuda", "name": scenario.name, "key": scenario.key}
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        return start | {
            "wrong": [f"the process ended with {child.returncode}: {child.stderr[-500:]}"]
        }
    row = json.loads(lines[-1])
    return start | row | {"wrong": scenario.wrong(row)}


def save(row: dict, path: Path) -> None:
    """Puts the row in the place of an earlier one of its name."""
    rows = {str(old["name"]): old for old in read(path)} | {row["name"]: row}
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows.values()), encoding="utf-8")


def block(results: Path) -> str:
    """Returns the table of docs/performance.md: the rows of today's scenarios."""
    found = {str(row["key"]): row for row in read(results / ROWS.name)}
    lines = []
    for scenario in scenarios():
        row = found.get(scenario.key)
        if row is None or "steps" not in row:
            continue
        plans = row.get("policies") or {}
        how = "; ".join(dict.fromkeys(plans.values()))
        last = (row["steps"] or [{"launches": "", "syncs": ""}])[-1]
        result = "as planned" if not row["wrong"] else "; ".join(row["wrong"])
        if not row["wrong"] and row["exit"]:
            result = f"ends: {row['error'].partition(' Tried')[0]}"
        total = CARDS[scenario.card][2] / 1024
        figures = f"{row['peak_gib']:.2f} of {total:.2f}", str(last["syncs"]), str(last["launches"])
        lines.append([scenario.name, how, *figures, str(row["graphs"]), result])
    head = ["run", "blocks", "card's peak, GiB", "synchronizations a step", "launches a step"]
    return f"{markdown([*head, 'graphs', 'result'], lines)}\n\n{NOTE}"


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--only", default="*", metavar="GLOB")
    options.add_argument("--redo", action="store_true")
    options.add_argument("--quick", action="store_true")
    options.add_argument("--out", type=Path, default=ROWS)
    given = options.parse_args(arguments)
    from bench.twin.cuda.stubs import environment

    chosen = [
        s for s in scenarios() if fnmatch(s.name, given.only) and (s.quick or not given.quick)
    ]
    done = {str(row["key"]): row for row in read(given.out)}
    variables, failed = environment(), 0
    for scenario in chosen:
        row = done.get(scenario.key)
        if row is None or given.redo:
            row = run(scenario, variables)
            save(row, given.out)
        failed += bool(row["wrong"])
        peak = row.get("peak_gib", "")
        print(
            f"{scenario.name}: {'; '.join(row['wrong']) or f'as planned, {peak} GiB'}", flush=True
        )
    print(f"{len(chosen) - failed} of {len(chosen)} runs are as planned")
    return int(failed > 0)
