"""Builds candidates, gates and times them cycle by cycle, here or in a process of their own."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bench import timing
from bench.step import gate
from bench.step.peers import make_inputs
from bench.step.settings import BASELINE, CANDIDATES, Cycle, Settings
from bench.step.steps import ModelStep, TrainerStep, limit_memory
from bench.step.table import launches
from bench.terminal import say

Report = Callable[[Cycle, dict[str, timing.Result]], None]  # with results by name
Stepper = ModelStep | TrainerStep
EXIT_S = 30  # for a process that has reported everything to end


def build(name: str, settings: Settings) -> Stepper:
    """Builds one candidate. Raises ImportError for a missing library."""
    kind = CANDIDATES[name]
    return (TrainerStep if kind.library == "trainer" else ModelStep)(kind, settings)


def measure(settings: Settings, names: list[str], references: Path, report: Report) -> None:
    """Builds the candidates in this process, then gates and times them at every cycle.

    references: the folder of `gate.check`.
    """
    limit_memory(settings)
    steppers: dict[str, Stepper | Exception] = {}
    for name in names:
        say(f"{name}: building")
        steppers[name] = timing.attempt(build, name, settings)
    for cycle in settings.cycles:
        batches = [make_inputs(settings, side, cycle.batch) for side in cycle.pixels]
        compared: dict[str, dict[str, object]] = {}

        def check(name: str, batches=batches, compared=compared) -> str | None:
            say(f"{name}: gate")
            args = (name, steppers[name], settings, batches, references)
            wrong, compared[name] = gate.check(*args)
            return wrong

        work = {name: timing.attempt(_begin, steppers[name], cycle, batches) for name in names}
        results = timing.compare(
            work, settings.rounds, settings.warmup, check, BASELINE, settings.device, say
        )
        for name, result in results.items():
            result.details |= compared.get(name, {})
            if result.status == "ok":
                result.divide(len(cycle.pixels))
                _count(steppers[name], cycle, result, settings.device)
        report(cycle, results)
        work.clear()
        for stepper in steppers.values():
            if not isinstance(stepper, Exception):
                stepper.end()


def _begin(stepper: Stepper | Exception, cycle: Cycle, batches: list) -> Callable[[], None]:
    if isinstance(stepper, Exception):
        raise stepper
    stepper.begin(cycle, batches)
    return stepper.step


def _count(stepper: Stepper, cycle: Cycle, result: timing.Result, device: str) -> None:
    """Adds to the result what is counted once everything is timed."""
    for error in (
        timing.attempt(stepper.count, result),
        timing.attempt(launches, stepper.step, cycle, result, device),
    ):
        if error:  # the times stand
            say(f"{result.name}: not counted: {type(error).__name__}: {error}")


def measure_apart(
    settings: Settings,
    names: list[str],
    references: Path,
    report: Report,
    limit_s: float | None = None,
) -> None:
    """Runs `measure` in a process of its own. If that dies, the cycles it has not reported are
    "failed"; after limit_s it is killed, and they are "out of time".
    """
    owed = list(settings.cycles)
    if settings.cap_gib is not None and settings.device == "cpu":
        _report_all(owed, names, "skipped", "a memory cap needs a GPU", report)
        return
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(settings, names, references, sender))
    process.start()
    sender.close()
    ends = None if limit_s is None else time.monotonic() + limit_s
    status, reason = "out of time", f"not done after {limit_s or 0:.0f} s"
    try:
        while owed and receiver.poll(None if ends is None else max(0.0, ends - time.monotonic())):
            report(*receiver.recv())
            owed.pop(0)
        if not owed:
            process.join(EXIT_S)
    except (EOFError, OSError):  # OSError: in the middle of a message
        process.join()
        status, reason = "failed", f"its process ended with code {process.exitcode}"
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    _report_all(owed, names, status, reason, report)


def _report_all(
    cycles: list[Cycle], names: list[str], status: str, reason: str, report: Report
) -> None:
    for cycle in cycles:
        report(cycle, {name: timing.Result(name, status, reason) for name in names})


def _child(settings: Settings, names: list[str], references: Path, sender) -> None:
    os.setpgrp()  # a kill of the group ends what it starts too
    measure(settings, names, references, lambda *report: sender.send(report))
    sender.close()
