"""Every op of `fluxfast_kernels` at FLUX's shapes: time, rate and % of the floor, beside eager
torch, torch.compile and the libraries that have the op.

    python -m bench.kernels --device cpu     what a CPU trains with
    python -m bench.kernels --device cuda --pixels 1024 --batch 1 --save

A row is one candidate of one op at one shape, forward or forward and backward. Its floor is the
larger of bytes over the rate of a large copy and FLOP over the rate of a large product, both
measured by this run (`floor.py`); % of the floor is floor over median. Nothing is timed that
`gate.py` finds wrong. On a GPU each run starts with a cold L2 and its launches queued, as in a
captured graph, and cases run in a process of their own: one that takes the device down costs its
own rows. A peer whose library is missing is a "skipped" row. The exit code is 1 where a
fluxfast op failed or was wrong.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable

import torch

from bench import terminal, timing
from bench.kernels.build import build
from bench.kernels.cases import CPU_MODES, OPS, Case, Settings, cases, matmul_kind
from bench.kernels.floor import Roof, measure_roof
from bench.kernels.gate import verdicts
from bench.kernels.problem import CANDIDATES, COMPILED, EAGER, FORWARD, OURS, Problem
from bench.kernels.table import row, table
from bench.step.settings import MODES, TINY_SPEC
from bench.terminal import Sizes, say
from fluxfast.model.spec import DEV

SIZES = {
    "cpu": Sizes(DEV, [128], [1], 64, rounds=5, warmup=1),
    "cuda": Sizes(DEV, [512, 768, 1024], [1, 4], 512, rounds=30, warmup=3),
    "tiny": Sizes(TINY_SPEC, [64], [2], 8, rounds=1, warmup=1),
}
DEVICE_LOST = 3  # exit code of a process whose device does not answer any more

Report = Callable[[Case, list[dict[str, object]]], None]


def measure(case: Case, settings: Settings, roof: Roof) -> list[dict[str, object]]:
    """Gates and times all candidates of a case. Returns a row for each of them and direction."""
    problem = timing.attempt(build, case, settings)
    if isinstance(problem, Exception):  # no memory for the inputs, say
        return failed(case, settings, roof, problem)
    rows = _rows(problem, case, settings, roof)
    del problem
    if COMPILED in settings.candidates:
        torch.compiler.reset()  # compiled code holds a case's weights
    timing.free_memory()
    return rows


def _rows(problem: Problem, case: Case, settings: Settings, roof: Roof) -> list[dict[str, object]]:
    judged = verdicts(problem, case)
    rows = []
    for direction in problem.directions:

        def gate(name: str, direction=direction) -> str | None:
            wrong = judged[name, direction][0]
            if isinstance(wrong, Exception):
                raise wrong
            return wrong

        work = {
            name: function if isinstance(function, Exception) else problem.call(function, direction)
            for name, function in problem.candidates.items()
        }
        results = timing.compare(
            work, settings.rounds, settings.warmup, gate, EAGER, settings.device, cold=True
        )
        for name, result in results.items():
            _, result.details = judged[name, direction]
            rows.append(row(result, case, direction, settings, roof))
    return rows


def failed(case: Case, settings: Settings, roof: Roof, error: Exception) -> list[dict[str, object]]:
    """Returns the row of a case that could not be built."""
    result = timing.Result(OURS)
    timing.fail(result, error)
    return [row(result, case, FORWARD, settings, roof)]


def measure_all(
    wanted: list[Case], settings: Settings, roof: Roof, report: Report, deadline: float
) -> list[Case]:
    """Measures case after case and reports each one's rows, until the deadline (of
    time.monotonic). Returns those that are left."""
    for index, case in enumerate(wanted):
        if time.monotonic() > deadline:
            return wanted[index:]
        say(str(case))
        report(case, measure(case, settings, roof))
    return []


def measure_apart(
    wanted: list[Case], settings: Settings, report: Report, deadline: float
) -> list[Case]:
    """Runs `measure_all` in a process of its own, and in a new one for the rest after a case that
    ended it or its device. Raises RuntimeError where a process ends before it has measured the
    roof."""
    context = multiprocessing.get_context("spawn")
    left, roof = list(wanted), None
    while left and time.monotonic() < deadline:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(left, settings, roof, deadline, sender))
        process.start()
        sender.close()
        try:
            roof = receiver.recv()
            while True:
                rows = receiver.recv()
                report(left.pop(0), rows)
        except EOFError:
            process.join()
        if process.exitcode == 0:
            break
        error = RuntimeError(f"its process ended with code {process.exitcode}")
        if roof is None:
            raise error
        if left and process.exitcode != DEVICE_LOST:
            case = left.pop(0)
            report(case, failed(case, settings, roof, error))
    return left


def _child(wanted, settings: Settings, roof: Roof | None, deadline: float, sender) -> None:
    roof = roof or roof_of(wanted, settings)
    sender.send(roof)

    def report(case: Case, rows: list[dict[str, object]]) -> None:
        sender.send(rows)
        try:
            timing.synchronize(settings.device)
        except RuntimeError:
            sender.close()
            os._exit(DEVICE_LOST)  # Python's own end would wait for the device

    measure_all(wanted, settings, roof, report, deadline)
    sender.close()


def roof_of(wanted: list[Case], settings: Settings) -> Roof:
    """Measures what the cases' floors need."""
    kinds = dict.fromkeys(matmul_kind(case, settings) for case in wanted)
    return measure_roof(settings.device, kinds, settings.tiny)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    usual = f" (cuda: all; cpu: all but {COMPILED})"
    parser = terminal.device_parser(__doc__, "kernels", CANDIDATES, usual, SIZES)
    parser.add_argument("--ops", nargs="+", choices=OPS, metavar="NAME", help=", ".join(OPS))
    parser.add_argument(
        "--budget-s", type=float, default=float("inf"), help="start no case after so many seconds"
    )
    return terminal.parse(parser, "kernels", arguments)


def settings_of(options: argparse.Namespace) -> Settings:
    shared = terminal.settings(options, SIZES)
    cuda = options.device == "cuda"
    usual = CANDIDATES if cuda else [name for name in CANDIDATES if name != COMPILED]
    return Settings(
        **shared,
        ops=tuple(options.ops or OPS),
        modes=tuple((MODES if cuda or options.tiny else CPU_MODES).values()),
        shapes=tuple((side, batch) for batch in options.batch for side in options.pixels),
        candidates=tuple(options.candidates or usual),
        tiny=options.tiny,
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = settings_of(options)
    deadline = time.monotonic() + options.budget_s
    conditions = timing.conditions(options.device)
    rows: list[dict[str, object]] = []

    def report(case: Case, measured: list[dict[str, object]]) -> None:
        measured = [row | conditions for row in measured]
        rows.extend(measured)
        if options.out is not None:
            timing.append_rows(options.out, measured)

    wanted = cases(settings)
    if settings.device == "cuda":
        left = measure_apart(wanted, settings, report, deadline)
    else:
        left = measure_all(wanted, settings, roof_of(wanted, settings), report, deadline)
    print(f"{conditions['device_name']}, {len(wanted) - len(left)} of {len(wanted)} cases")
    print(table(rows))
    broken = {"failed", "gate failed"}
    return int(any(row["name"] == OURS and row["status"] in broken for row in rows))
