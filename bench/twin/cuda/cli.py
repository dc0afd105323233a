"""`fluxfast train` whole, at FLUX.1-dev's size, on cards that are not here: torch's own CUDA build
over a runtime that reserves memory and computes nothing (`fakecudart.c`).

    python -m bench.twin.cuda              what bench/results/twin-cuda.jsonl lacks of today's code
    … --only "3060*" --redo                those whose name fits, again
    … --quick --out rows.jsonl             the eight of the long tests

`make twin` is all of it. Exits with 1 where a run differs from its plan. The first call downloads
torch's CUDA build (530 MB).
"""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

from bench import RESULTS, ROOT
from bench.rows import read
from bench.terminal import markdown, parser
from bench.twin.cuda.scenarios import CARDS, Scenario, scenarios

ROWS = RESULTS / "twin-cuda.jsonl"
CODE = ("fluxfast", "kernels/fluxfast_kernels", "bench/twin/cuda")  # what a row depends on
NOTE = (
    "Checked on torch's own CUDA allocator, without a GPU; no times. The peak is of the whole "
    "card, 0.44 GiB for CUDA itself and what the desktop takes included; launches a step: the "
    "graph's nodes, and what is launched beside it."
)


def code() -> str:
    """Returns a digest of the files of CODE and of the versions of what they import."""
    files = [p for f in CODE for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".c", ".json")]
    digest = hashlib.sha256()
    for path in [*sorted(files), ROOT / "constraints.txt"]:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run(scenario: Scenario, environment: dict[str, str], timeout_s: float = 1800) -> dict:
    """Runs a scenario in a process of its own. Returns its row; wrong: what differs."""
    task = {
        "sizes": scenario.pictures,
        "settings": list(scenario.settings),
        "fail": scenario.fail,
    }
    start = {"bench": "twin-cuda", "name": scenario.name, "key": scenario.key, "code": code()}
    child = subprocess.run(
        [sys.executable, "-c", "from bench.twin.cuda.child import main; main()", json.dumps(task)],
        env=environment | scenario.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        last = "".join(child.stderr.splitlines()[-1:])
        wrong = [f"the process ended with {child.returncode}: {last}"]
        return start | {"peak_gib": 0, "steps": [], "graphs": 0, "wrong": wrong}
    row = json.loads(lines[-1])
    return start | row | {"wrong": scenario.wrong(row)}


def save(row: dict, path: Path) -> None:
    """Puts the row in the place of an earlier one of its name."""
    rows = {str(old["name"]): old for old in read(path)} | {row["name"]: row}
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows.values()), encoding="utf-8")


def block(results: Path) -> str:
    """Returns the table of docs/performance.md: the rows of today's scenarios."""
    found = {str(row["key"]): row for row in read(results / ROWS.name)}
    lines, shown = [], []
    for scenario in scenarios():
        row = found.get(scenario.key)
        if row is None:
            continue
        shown.append(row)
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
    versions = Counter(row.get("code") for row in shown)
    other = len(shown) - max(versions.values(), default=0)
    note = f" {other} of the {len(shown)} runs are of other code than the rest." if other else ""
    return f"{markdown([*head, 'graphs', 'result'], lines)}\n\n{NOTE}{note}"


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
    variables, failed, now = environment(), 0, code()
    rows = {str(row["key"]): row for row in read(given.out)}
    done = {key: row for key, row in rows.items() if row.get("code") == now}
    other = sum(s.key in rows.keys() - done.keys() for s in chosen)
    if other:
        print(f"{other} rows are of other code: these run again", flush=True)
    for scenario in chosen:
        row = done.get(scenario.key)
        if row is None or given.redo:
            row = run(scenario, variables)
            save(row, given.out)
        failed += bool(row["wrong"])
        result = "; ".join(row["wrong"]) or f"as planned, {row['peak_gib']} GiB"
        print(f"{scenario.name}: {result}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} runs are as planned")
    return int(failed > 0)
