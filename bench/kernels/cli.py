"""Every op of `fluxfast_kernels` at FLUX's shapes: time, rate and % of the floor, beside eager
torch, torch.compile and the libraries that have the op.

    python -m bench.kernels --device cpu     what a CPU trains with
    python -m bench.kernels --device cuda --pixels 1024 --batch 1 --save

A row is one candidate of one op at one shape, forward or forward and backward. Its floor is the
larger of bytes over the rate of a large copy and FLOP over the rate of a large product, both
measured by this run (`floor.py`); % of the floor is floor over median. Nothing is timed that
`gate.py` finds wrong. On a GPU each run starts with a cold L2 and its launches queued, as in a
captured graph, and cases run in a process of their own: one that takes the device down costs its
own rows. A peer whose library is missing is a row that says so. The exit code is 1 where a
fluxfast op failed or was wrong.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable

import torch

from bench import terminal, timing
from bench.kernels.cases import (
    CPU_MODES,
    MODES,
    OPS,
    Case,
    Settings,
    cases,
    kind_of,
    ops_of,
)
from bench.kernels.floor import Roof, floor_ms, measure_roof
from bench.kernels.gate import verdicts
from bench.kernels.problem import BOTH, CANDIDATES, COMPILED, EAGER, FORWARD, OURS, Problem
from bench.kernels.table import table
from bench.kernels.work import build
from bench.step.settings import TINY_SPEC
from bench.terminal import say
from fluxfast.memory.planner.cost import total_bytes, total_flop
from fluxfast.model.spec import DEV

GATE_FIELDS = ("worst", "worst_error", "tolerance")
SIZES = {
    "pixels": "cpu: 128; cuda: 512 768 1024",
    "batch": "cpu: 1; cuda: 1 4",
    "text_tokens": "cpu: 64; cuda: 512",
    "rounds": "cpu: 5; cuda: 30",
}
LOST = 3  # exit code of a process whose device answers no more

Report = Callable[[Case, list[dict[str, object]]], None]


def measure(case: Case, settings: Settings, roof: Roof) -> list[dict[str, object]]:
    """Gate and time everyone who does this op's work at this shape -> a row each and direction,
    without the machine's conditions (`timing.conditions`)."""
    try:
        problem = build(case, settings)
    except Exception as error:  # no memory for the inputs, say
        return failed(case, settings, roof, error)
    judged = verdicts(problem, case)
    rows = []
    for direction in problem.directions:
        results = _timed(problem, direction, judged, settings)
        for name, result in results.items():
            compared = dict.fromkeys(GATE_FIELDS) | judged[name, direction][1]
            rows.append(_row(result, case, direction, settings, roof) | compared)
    del problem, judged
    if COMPILED in settings.candidates:
        torch.compiler.reset()  # compiled code holds a case's weights
    timing.free_memory()
    return rows


def _timed(
    problem: Problem, direction: str, judged: dict, settings: Settings
) -> dict[str, timing.Result]:
    def gate(name: str) -> str | None:
        wrong = judged[name, direction][0]
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    work = {
        name: function if isinstance(function, Exception) else problem.call(function, direction)
        for name, function in problem.candidates.items()
    }
    how = (settings.rounds, settings.warmup, gate, EAGER, settings.device)
    return timing.compare(work, *how, cold=True)


def failed(case: Case, settings: Settings, roof: Roof, error: Exception) -> list[dict[str, object]]:
    """The row of a case that could not be built."""
    result = timing.Result(OURS)
    timing.fail(result, error)
    return [_row(result, case, FORWARD, settings, roof) | dict.fromkeys(GATE_FIELDS)]


def _row(
    result: timing.Result, case: Case, direction: str, settings: Settings, roof: Roof
) -> dict[str, object]:
    """What a row says about the work, beside its times; rates are of the case's bytes and FLOP."""
    forward, backward = ops_of(case, settings)
    ops = forward + backward if direction == BOTH else forward
    moved, flop, kind = total_bytes(ops), total_flop(ops), kind_of(case, settings)
    floor, median = floor_ms(roof, kind, moved, flop), result.median_ms
    compute = str(settings.compute).removeprefix("torch.")
    return timing.row(
        result,
        bench="kernels",
        op=case.op,
        direction=direction,
        storage=compute if case.storage == "dense" else case.storage or None,
        products=case.products or compute,
        compute=compute,
        pixels=case.pixels or None,
        batch=case.batch or None,
        tokens=settings.tokens(case) or None,
        text_tokens=settings.text_tokens,
        hidden=settings.spec.hidden_size,
        rank=settings.rank,
        bytes=round(moved),
        flop=round(flop),
        copy_gb_per_s=roof.copy_gb_per_s,
        matmul_tflop_per_s=roof.matmul_tflop_per_s.get(kind),
        floor_ms=floor,
        percent_of_floor=100 * floor / median if floor and median else None,
        gb_per_s=moved / median / 1e6 if median else None,
        tflop_per_s=flop / median / 1e9 if median else None,
        warmup=settings.warmup,
        interleaved=True,
    )


def measure_all(
    wanted: list[Case], settings: Settings, roof: Roof, report: Report, deadline: float
) -> list[Case]:
    """Measure case after case and report each one's rows, until the deadline (of time.monotonic)
    -> those that are left."""
    for index, case in enumerate(wanted):
        if time.monotonic() > deadline:
            return wanted[index:]
        say(str(case))
        report(case, measure(case, settings, roof))
    return []


def measure_apart(
    wanted: list[Case], settings: Settings, report: Report, deadline: float
) -> list[Case]:
    """`measure_all` in a process of its own, and in a new one for the rest after a case that ended
    it or its device. Raises RuntimeError where a process ends before it has measured the roof."""
    context = multiprocessing.get_context("spawn")
    owed, roof = list(wanted), None
    while owed and time.monotonic() < deadline:
        receiver, sender = context.Pipe(duplex=False)
        given = (owed, settings, roof, deadline, sender)
        process = context.Process(target=_child, args=given)
        process.start()
        sender.close()
        try:
            roof = receiver.recv()
            while True:
                rows = receiver.recv()
                report(owed.pop(0), rows)
        except EOFError:
            process.join()
        if roof is None:
            raise RuntimeError(f"the first process ended with code {process.exitcode}")
        if process.exitcode == 0:
            break
        if owed and process.exitcode != LOST:
            error = RuntimeError(f"its process ended with code {process.exitcode}")
            case = owed.pop(0)
            report(case, failed(case, settings, roof, error))
    return owed


def _child(wanted, settings: Settings, roof: Roof | None, deadline: float, sender) -> None:
    roof = roof or roof_of(wanted, settings)
    sender.send(roof)

    def report(case: Case, rows: list[dict[str, object]]) -> None:
        sender.send(rows)
        try:
            timing.synchronize(settings.device)
        except RuntimeError:
            sender.close()
            os._exit(LOST)  # Python's own end would wait for the device

    measure_all(wanted, settings, roof, report, deadline)
    sender.close()


def roof_of(wanted: list[Case], settings: Settings) -> Roof:
    """Measure what the cases' floors need."""
    kinds = dict.fromkeys(kind_of(case, settings) for case in wanted)
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
    cuda = options.device == "cuda"
    default = (DEV, [512, 768, 1024], [1, 4], 512, 30, 3) if cuda else (DEV, [128], [1], 64, 5, 1)
    if options.tiny:
        default = (TINY_SPEC, [64], [2], 8, 1, 1)
    spec, pixels, batches, text, rounds, warmup = default
    usual = CANDIDATES if cuda else [name for name in CANDIDATES if name != COMPILED]
    return Settings(
        spec=spec,
        device=options.device,
        compute=options.compute,
        ops=tuple(options.ops or OPS),
        modes=MODES if cuda or options.tiny else CPU_MODES,
        shapes=tuple((p, b) for b in options.batch or batches for p in options.pixels or pixels),
        text_tokens=options.text_tokens or text,
        rank=options.rank,
        candidates=tuple(options.candidates or usual),
        rounds=options.rounds or rounds,
        warmup=warmup,
        tiny=options.tiny,
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = settings_of(options)
    deadline = time.monotonic() + options.budget_s
    shared = timing.conditions(options.device)
    rows: list[dict[str, object]] = []

    def report(case: Case, found: list[dict[str, object]]) -> None:
        found = [row | shared for row in found]
        rows.extend(found)
        if options.out is not None:
            timing.append_rows(options.out, found)

    wanted = cases(settings)
    if settings.device == "cuda":
        left = measure_apart(wanted, settings, report, deadline)
    else:
        left = measure_all(wanted, settings, roof_of(wanted, settings), report, deadline)
    print(f"{shared['device_name']}, {len(wanted) - len(left)} of {len(wanted)} cases")
    print(table(rows))
    broken = {"failed", "gate failed"}
    return int(any(row["name"] == OURS and row["status"] in broken for row in rows))
