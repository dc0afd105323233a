"""What a suite is made of: candidates of the step, and commands. Each runs in processes of its own,
for at most so long, and whatever becomes of it is rows.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from bench import ROOT, timing
from bench.rows import Kept, Row, beside
from bench.step.candidates import BASELINE
from bench.step.run import measure_apart
from bench.step.settings import Settings
from bench.step.table import row_settings, rows
from bench.terminal import say

PATIENCE = 3.0  # times its estimate, an item may take before it is cut
OWN_SHARE = 0.8  # of that, for a command that watches its time itself: it must start and end, too


class Item(Protocol):
    estimate_s: float

    def left(self, kept: Kept) -> "Item | None":
        """What of it has not been measured yet; None where all has."""

    def run(self, limit_s: float, kept: Kept) -> None:
        """Measure; append rows as they come. Cut after limit_s."""

    def skip(self, reason: str, kept: Kept) -> None:
        """Leave rows that say it was out of time."""


def run_items(
    items: list[Item], kept: Kept, ends: float, clock: Callable[[], float] = time.monotonic
) -> None:
    """Run what is left of the items, in order, until `ends` of the clock. One that needs more than
    twice the time that is left is not begun; one that goes on for too long is cut."""
    for item in items:
        todo = item.left(kept)
        if todo is None:
            say(f"{item}: measured already")
            continue
        left = ends - clock()
        if left < todo.estimate_s / 2:
            reason = f"takes about {todo.estimate_s:.0f} s, {max(0, left):.0f} s were left"
            say(f"{todo}: not begun: {reason}")
            todo.skip(reason, kept)
            continue
        say(f"{todo}: at most {min(left, PATIENCE * todo.estimate_s):.0f} s")
        todo.run(min(left, PATIENCE * todo.estimate_s), kept)


@dataclass
class StepItem:
    """Candidates of bench.step in one process, interleaved where there are several."""

    settings: Settings
    names: list[str]
    estimate_s: float

    def __str__(self) -> str:
        cap = self.settings.cap_gib
        within = "" if cap is None else f" within {cap:g} GiB"
        return f"{', '.join(self.names)} ({self.settings.setting}{within})"

    def left(self, kept: Kept) -> "StepItem | None":
        cycles = [
            cycle
            for cycle in self.settings.cycles
            if not all(kept.measured(self._row(name, cycle)) for name in self.names)
        ]
        settings = replace(self.settings, cycles=cycles)
        return replace(self, settings=settings) if cycles else None

    def _row(self, name: str, cycle) -> Row:
        work = row_settings(self.settings, name, cycle)
        return {**work, "name": name, "device": self.settings.device}

    def run(self, limit_s: float, kept: Kept) -> None:
        measure_apart(self.settings, self.names, references(kept), self._report_to(kept), limit_s)

    def skip(self, reason: str, kept: Kept) -> None:
        for cycle in self.settings.cycles:
            results = {n: timing.Result(n, "out of time", reason) for n in self.names}
            self._append(kept, cycle, results, {name: {} for name in self.names})

    def _append(self, kept: Kept, cycle, results: dict, details: dict) -> None:
        made = rows(self.settings, cycle, results, details, kept.conditions)
        kept.append([row for row in made if _news(row, kept)])

    def _report_to(self, kept: Kept):
        def report(cycle, results: dict, details: dict) -> None:
            base = baseline_ms(kept, self._row(BASELINE, cycle))
            known = {BASELINE: timing.Result(BASELINE, median_ms=base)} if base else {}
            timing.add_ratios(known | results, BASELINE)
            for name, result in results.items():
                said = result.reason or f"{result.median_ms:.1f} ms"
                say(f"{name}: {cycle}: {result.status}: {said}")
            self._append(kept, cycle, results, details)

        return report


def baseline_ms(kept: Kept, row: Row) -> float | None:
    """The median of the baseline that `row` is compared with, where it has been timed."""
    for found in reversed(kept.rows):
        if found["name"] == BASELINE and beside(found) == beside(row):
            return found["median_ms"]
    return None


def references(kept: Kept) -> Path:
    """The folder beside the rows where candidates leave what others are gated against; another one
    for every commit."""
    commit = str(kept.conditions.get("commit"))[:12]
    folder = kept.path.with_name(f"{kept.path.stem}-references") / commit
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _news(row: Row, kept: Kept) -> bool:
    """Not a second time that there was no time."""
    found = kept.find(row)
    return row["status"] != "out of time" or found is None or found["status"] != "out of time"


@dataclass
class CommandItem:
    """A script or module that appends its own rows to the suite's file, or has only an outcome.

    arguments: of Python, where {out}, {budget_s} stand for the file and the seconds it should take.
    needs: a module that must be there.
    """

    name: str
    arguments: list[str]
    estimate_s: float
    needs: str = ""

    def __str__(self) -> str:
        return self.name

    def left(self, kept: Kept) -> "CommandItem | None":
        return None if kept.measured(self._row(kept)) else self

    def _row(self, kept: Kept) -> Row:
        return {"name": self.name, "bench": "suite", **kept.conditions}

    def run(self, limit_s: float, kept: Kept) -> None:
        missing = self._missing()
        if missing:
            self._outcome(kept, "skipped", missing, 0.0)
            return
        start = time.monotonic()
        budget = max(1, int(OWN_SHARE * limit_s))
        words = [a.format(out=kept.path, budget_s=budget) for a in self.arguments]
        code, output = run_python(words, limit_s)
        kept.refresh()
        status, reason = self._judge(code, output, limit_s)
        if status != "ok":
            say(f"{self.name}: {status}: {reason}")
        self._outcome(kept, status, reason, time.monotonic() - start)

    def skip(self, reason: str, kept: Kept) -> None:
        self._outcome(kept, "out of time", reason, 0.0)

    def _missing(self) -> str | None:
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"No module named {self.needs!r}"
        return None

    def _judge(self, code: int | None, output: str, limit_s: float) -> tuple[str, str]:
        """-> (status, the last line). "missed": the script itself says that something is wrong."""
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        if code is None:
            return "out of time", f"cut after {limit_s:.0f} s: {last}"
        if code == 0:
            return "ok", last
        if last.startswith(("ModuleNotFoundError", "ImportError")):
            return "skipped", last
        crashed = code != 1 or "Traceback (most recent call last)" in output
        said = last.removeprefix("missed: ") or f"ended with code {code}"
        return "failed" if crashed else "missed", said

    def _outcome(self, kept: Kept, status: str, reason: str, seconds: float) -> None:
        row = self._row(kept) | {"status": status, "median_ms": None, "seconds": round(seconds, 1)}
        row |= {"reason": None, "said": reason} if status == "ok" else {"reason": reason}
        if _news(row, kept):
            kept.append([row])


def run_python(words: list[str], limit_s: float) -> tuple[int | None, str]:
    """Run Python from the repository's root, killed with all it started after limit_s -> (exit code
    or None where it was killed, all it printed)."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        code = None
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read()
