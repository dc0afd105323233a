"""Builds candidates, gates and times them cycle by cycle, here or in a process apart."""

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import timing
from bench.step.candidates import (
    BASELINE,
    CANDIDATES,
    REFERENCES,
    ModelStep,
    build_model,
    reset_adapters,
)
from bench.step.figures import launches
from bench.step.gate import disagreement, evidence, tolerance
from bench.step.peers import Batch
from bench.step.settings import Cycle, Settings, make_batch
from bench.step.table import per_step
from bench.step.trainer import TrainerStep, limit_memory
from bench.terminal import say

# cycle, results by name, details by name
Report = Callable[[Cycle, dict[str, timing.Result], dict[str, dict[str, object]]], None]
Stepper = ModelStep | TrainerStep
LEAVE_S = 30  # that a process which has reported everything gets to end


def build(name: str, settings: Settings) -> Stepper:
    """Build one candidate. Raises ImportError for a missing library."""
    kind = CANDIDATES[name]
    if kind.who == "trainer":
        return TrainerStep(kind, settings)
    return ModelStep(build_model(kind, settings), settings)


def measure(settings: Settings, names: list[str], references: Path, report: Report) -> None:
    """Build the named candidates in this process, then gate and time them at every cycle.

    references: a folder where the first candidate of a storage leaves what the others are gated
    against. report(cycle, results by name, details by name) is called after each cycle.
    """
    limit_memory(settings)
    built: dict[str, Stepper | Exception] = {}
    for name in names:
        try:
            say(f"{name}: building")
            built[name] = build(name, settings)
        except Exception as error:  # becomes the row's reason
            built[name] = _let_go(error)
    steppers = {name: s for name, s in built.items() if not isinstance(s, Exception)}
    for cycle in settings.cycles:
        batches = [make_batch(settings, side, cycle.batch) for side in cycle.pixels]
        details: dict[str, dict[str, object]] = {name: {} for name in names}

        def gate(name: str, batches=batches, details=details) -> str | None:
            say(f"{name}: gate")
            wrong, compared = _gate(name, steppers[name], settings, batches, references)
            details[name] |= compared
            return wrong

        work = {name: _begin(stepper, cycle, batches) for name, stepper in built.items()}
        results = timing.compare(
            work, settings.rounds, settings.warmup, gate, BASELINE, settings.device, say
        )
        for name, stepper in steppers.items():
            if results[name].status == "ok":
                _count(name, stepper, cycle, results[name], details[name], settings.device)
                results[name] = per_step(results[name], len(cycle.pixels))
        report(cycle, results, details)
        work.clear()
        for stepper in steppers.values():
            stepper.end()


def _let_go(error: Exception) -> Exception:
    """Without the frames that hold what was built so far."""
    error.__traceback__ = None
    gc.collect()
    return error


def _begin(stepper: Stepper | Exception, cycle: Cycle, batches: list[Batch]):
    if isinstance(stepper, Exception):
        return stepper
    try:
        stepper.begin(cycle, batches)
    except Exception as error:  # becomes the row's reason
        return _let_go(error)
    return stepper.step


def _gate(
    name: str, stepper: Stepper, settings: Settings, batches: list[Batch], references: Path
) -> tuple[str | None, dict[str, object]]:
    """-> (what is wrong or None, what was compared: of several sizes the one that differs most)."""
    kind, candidate = CANDIDATES[name], stepper.candidate
    kept = REFERENCES.get(kind.storage, kind.storage)
    allowed = tolerance(settings.spec, settings.compute, kind.products)
    worst: dict[str, object] = {}
    for batch in batches:
        reset_adapters(candidate)
        found = evidence(candidate, stepper.backward(batch))
        stepper.clear()
        count, tokens = batch.img.shape[:2]
        path = references / f"{kept}-{settings.targets}-{tokens}-{count}.npz"
        by, known = _kept(path)
        if by == name:
            by, known = None, None
        wrong, compared = disagreement(found, known, allowed)
        compared["reference"] = by
        if wrong is not None:
            return wrong, compared
        if by is None and not kind.products:
            _keep(path, name, found)
        if not worst or compared.get("worst_error", 0.0) > worst.get("worst_error", 0.0):
            worst = compared
    return None, worst | {"saved_bytes": stepper.saved_bytes()}


_BY = "candidate"  # among the names of tensors, which have dots but for "loss"


def _keep(path: Path, by: str, found: dict[str, Tensor]) -> None:
    """Whole or not at all: the process may be killed at any moment."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **{_BY: np.array(by)}, **{name: t.numpy() for name, t in found.items()})
    os.replace(part, path)


def _kept(path: Path) -> tuple[str | None, dict[str, Tensor] | None]:
    """-> (whose evidence, the evidence) that `_keep` has left there; None where it has not."""
    if not path.exists():
        return None, None
    with np.load(path) as file:
        by = str(file[_BY])
        found = {name: torch.from_numpy(file[name]) for name in file.files if name != _BY}
    return by, found


def _count(
    name: str,
    stepper: Stepper,
    cycle: Cycle,
    result: timing.Result,
    details: dict[str, object],
    device: str,
) -> None:
    """What is read once everything is timed: peak memory where a step does not show it, launches a
    step, how memory was planned."""
    try:
        if peak := stepper.peak_memory():
            result.peak_memory_bytes, result.peak_memory_kind = peak
        found = launches(stepper.step, device)
        steps = len(cycle.pixels)
        details |= {key: n if n is None else round(n / steps) for key, n in found.items()}
    except Exception as error:  # the times stand
        say(f"{name}: not counted: {type(error).__name__}: {error}")
        _let_go(error)
    details |= stepper.details()


def measure_apart(
    settings: Settings,
    names: list[str],
    references: Path,
    report: Report,
    limit_s: float | None = None,
) -> None:
    """`measure` in a process of its own. If that dies, the cycles it owed failed; after limit_s it
    is killed, and they are "out of time".
    """
    if settings.cap_gib is not None and settings.device == "cpu":
        _report_owed(settings.cycles, names, "skipped", "a memory cap needs a GPU", report)
        return
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(settings, names, references, sender))
    process.start()
    sender.close()
    ends = None if limit_s is None else time.monotonic() + limit_s
    owed = list(settings.cycles)
    status, reason = "out of time", f"not done after {limit_s or 0:.0f} s"
    try:
        while owed and receiver.poll(None if ends is None else max(0.0, ends - time.monotonic())):
            report(*receiver.recv())
            owed.pop(0)
        if not owed:
            process.join(LEAVE_S)
    except (EOFError, OSError):  # OSError: in the middle of a message
        process.join()
        status, reason = "failed", f"its process ended with code {process.exitcode}"
    finally:
        _end(process)
    _report_owed(owed, names, status, reason, report)


def _report_owed(
    cycles: list[Cycle], names: list[str], status: str, reason: str, report: Report
) -> None:
    for cycle in cycles:
        results = {name: timing.Result(name, status, reason) for name in names}
        report(cycle, results, {name: {} for name in names})


def _child(settings: Settings, names: list[str], references: Path, sender) -> None:
    os.setpgrp()  # what it starts ends with it
    measure(settings, names, references, lambda *found: sender.send(found))
    sender.close()


def _end(process) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
