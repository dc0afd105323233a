"""The benchmark suite: one command, a time budget, rows as they come, one short table last.

    python -m bench.run --suite cpu            about ten minutes on two cores
    python -m bench.run --suite gpu --budget-s 480 --out rows.jsonl
    python -m bench.run --compare A.jsonl B.jsonl
    python -m bench.run --save rows.jsonl

The most valuable comes first. Rows that a file has already, from the same commit, device, settings
and libraries, are not measured again: the same command goes on where it was stopped. Without --out
each run has a file of its own in runs/bench/. Work that the budget does not reach, or cuts, is a
row with the reason, as is a peer whose library is missing. Needs torch, triton and numpy; no
network.

--compare: whether two runs' ratios to their baselines agree, of what takes over 100 ms; the exit
code is 1 where they do not. --save: appends a run's rows to the files of bench/results/. Otherwise
the exit code is 1 where a result is wrong or past a limit, 130 where the run was stopped.
"""

import argparse
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

import torch

from bench import RESULTS, ROOT, terminal, timing
from bench.rows import Row, RowFile, compare, read
from bench.suite_items import run_items
from bench.suite_table import table, wrong
from bench.suites import cpu_suite, first_suite, gpu_suite

SUITES = {"cpu": cpu_suite, "gpu": gpu_suite, "first": first_suite}
BUDGET_S = {"cpu": 580.0, "gpu": 3600.0}
FILES = {  # bench -> the file that its rows are kept in
    "step": "step-{device}.jsonl",
    "kernels": "kernels-{device}.jsonl",
    "quantize": "quantize.jsonl",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = terminal.parser(__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--suite", choices=BUDGET_S)
    action.add_argument("--compare", nargs=2, type=Path, metavar="FILE")
    action.add_argument("--save", type=Path, metavar="FILE")
    parser.add_argument("--budget-s", type=float, help="seconds (cpu: 580, gpu: 3600)")
    parser.add_argument("--out", type=Path, help="append to this file, and go on from it")
    parser.add_argument(
        "--tiny", action="store_true", help="narrow blocks: checks the bench itself"
    )
    options = parser.parse_args(arguments)
    if options.suite == "gpu" and not options.tiny and not torch.cuda.is_available():
        parser.error("--suite gpu: torch sees no CUDA device here; hint: --suite cpu, or --tiny")
    for file in [*(options.compare or []), *([options.save] if options.save else [])]:
        if not file.is_file():
            parser.error(f"{file}: no such file")
    return options


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    options = parse(arguments)
    if options.compare:
        lines, agree = compare(*(read(file) for file in options.compare))
        print("\n".join(lines) or "nothing to compare: no row over 100 ms with a ratio is in both")
        return int(not agree)
    if options.save:
        for file, rows in save(read(options.save)).items():
            print(f"{len(rows)} rows to {file}")
        return 0
    device = "cuda" if options.suite == "gpu" and not options.tiny else "cpu"
    budget = BUDGET_S[options.suite] if options.budget_s is None else options.budget_s
    return run_suite(options.suite, device, options, started + budget)


def run_suite(suite: str, device: str, options: argparse.Namespace, ends: float) -> int:
    """Runs what is left of a suite until `ends` of time.monotonic. options: out, tiny."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = options.out or ROOT / "runs" / "bench" / f"{suite}-{now}.jsonl"
    file = RowFile(out.resolve(), timing.conditions(device))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    stopped = False
    try:
        run_items(SUITES[suite](options.tiny), file, ends, in_turn=suite == "first")
    except KeyboardInterrupt:
        stopped = True
        file.refresh()
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{file.conditions['device_name']}, torch {file.conditions['torch']}, {out}\n")
    print(table(file.rows))
    failures = wrong(file.rows)
    for line in failures:
        print(line)
    if stopped:
        print("stopped: the same command with --out goes on from here", file=sys.stderr)
        return 130
    return int(bool(failures))


def save(rows: list[Row]) -> dict[Path, list[Row]]:
    """Append rows to the files of their benches, without those that are there and those "out of
    time". Returns the rows that each file got."""
    files: dict[Path, list[Row]] = {}
    for row in rows:
        if row["bench"] in FILES and row["status"] != "out of time":
            files.setdefault(RESULTS / FILES[row["bench"]].format(**row), []).append(row)
    for file, new in files.items():
        known = read(file)
        files[file] = [row for row in new if row not in known]
        timing.append_rows(file, files[file])
    return files


if __name__ == "__main__":
    raise SystemExit(main())
