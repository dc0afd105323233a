"""The items of a suite: candidates of the step, and commands.

Each runs in processes of its own, for a limited time, and every outcome is rows.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from bench import ROOT, timing
from bench.rows import Row, RowFile, peers
from bench.step.run import measure_apart
from bench.step.settings import BASELINE, Cycle, Settings
from bench.step.table import row_settings, rows
from bench.terminal import say

PATIENCE = 3.0  # times its estimate, an item may take before it is cut
OWN_SHARE = 0.8  # of that, for a command that watches its time itself: it must start and end, too


@dataclass
class StepItem:
    """Candidates of `bench.step` in one process, interleaved where there are several."""

    settings: Settings
    names: list[str]
    estimate_s: float

    def __str__(self) -> str:
        cap = self.settings.cap_gib
        within = "" if cap is None else f" within {cap:g} GiB"
        return f"{', '.join(self.names)} ({self.settings.setting}{within})"

    def left(self, file: RowFile) -> "StepItem | None":
        """The item with the cycles that have not been measured yet; None where all have."""
        cycles = [
            cycle
            for cycle in self.settings.cycles
            if not all(file.measured(self._row(name, cycle)) for name in self.names)
        ]
        return replace(self, settings=replace(self.settings, cycles=cycles)) if cycles else None

    def _row(self, name: str, cycle: Cycle) -> Row:
        settings = row_settings(self.settings, name, cycle)
        return {**settings, "name": name, "device": self.settings.device}

    def run(self, limit_s: float, file: RowFile) -> None:
        """Appends rows as they are measured; cut after limit_s."""

        def report(cycle: Cycle, results: dict) -> None:
            row = self._row(BASELINE, cycle)
            same = [r for r in file.rows if r["name"] == BASELINE and peers(r) == peers(row)]
            baseline = timing.Result(BASELINE, median_ms=same[-1]["median_ms"] if same else None)
            timing.add_ratios({BASELINE: baseline} | results, BASELINE)
            for result in results.values():
                say(f"{cycle}: {result}")
            file.append_news(rows(self.settings, cycle, results, file.conditions))

        # the gradients that candidates are gated against are those of the same commit
        commit = str(file.conditions.get("commit"))[:12]
        references = file.path.with_name(f"{file.path.stem}-references") / commit
        references.mkdir(parents=True, exist_ok=True)
        measure_apart(self.settings, self.names, references, report, limit_s)

    def skip(self, reason: str, file: RowFile) -> None:
        """Appends rows with the status "out of time"."""
        for cycle in self.settings.cycles:
            results = {n: timing.Result(n, "out of time", reason) for n in self.names}
            file.append_news(rows(self.settings, cycle, results, file.conditions))


@dataclass
class CommandItem:
    """A module that appends its own rows to the suite's file, or has only an outcome.

    arguments: of Python, where {out}, {budget_s} stand for the file and the seconds it should take.
    """

    name: str
    arguments: list[str]
    estimate_s: float

    def __str__(self) -> str:
        return self.name

    def left(self, file: RowFile) -> "CommandItem | None":
        return None if file.measured(self._row(file)) else self

    def _row(self, file: RowFile) -> Row:
        return {"name": self.name, "bench": "suite", **file.conditions}

    def run(self, limit_s: float, file: RowFile) -> None:
        start = time.monotonic()
        budget = max(1, int(OWN_SHARE * limit_s))
        words = [a.format(out=file.path, budget_s=budget) for a in self.arguments]
        code, output = run_python(words, limit_s)
        file.refresh()
        status, reason = _judge(code, output, limit_s)
        if status != "ok":
            whole = file.path.with_name(f"{file.path.stem}-{self.name.replace(' ', '-')}.txt")
            whole.write_text(output, encoding="utf-8")
            say(f"{self.name}: {status}: {reason}; its output: {whole}")
        self._outcome(file, status, reason, time.monotonic() - start)

    def skip(self, reason: str, file: RowFile) -> None:
        self._outcome(file, "out of time", reason)

    def _outcome(self, file: RowFile, status: str, reason: str, seconds: float = 0.0) -> None:
        row = self._row(file) | {"status": status, "median_ms": None, "seconds": round(seconds, 1)}
        row |= {"reason": None, "said": reason} if status == "ok" else {"reason": reason}
        file.append_news([row])


def _judge(code: int | None, output: str, limit_s: float) -> tuple[str, str]:
    """Returns a status and the last line of output. "missed": the command itself reports a bound
    that it missed, or was cut when tests had failed."""
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
    if code is None:
        failed = re.findall(r"^.*\bFAILED\b.*$", output, re.MULTILINE)
        tests = f"{len(failed)} tests had failed, first {failed[0]}; " if failed else ""
        status = "missed" if failed else "out of time"
        return status, f"cut after {limit_s:.0f} s: {tests}{last}"
    if code == 0:
        return "ok", last
    if last.startswith(("ModuleNotFoundError", "ImportError")) or ": No module named " in last:
        return "skipped", last
    crashed = code != 1 or "Traceback (most recent call last)" in output
    reason = last.removeprefix("missed: ") or f"ended with code {code}"
    return "failed" if crashed else "missed", reason


def run_python(words: list[str], limit_s: float) -> tuple[int | None, str]:
    """Runs Python from the repository's root; kills it with all it started after limit_s. Returns
    its exit code (None where it was killed) and its output."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        pipes = {"stdout": output, "stderr": output, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, **pipes)
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


Item = StepItem | CommandItem


def run_items(
    items: Sequence[Item],
    file: RowFile,
    ends: float,
    clock: Callable[[], float] = time.monotonic,
    in_turn: bool = False,
) -> None:
    """Runs what is left of the items, in order, until `ends` of the clock. One that needs more than
    twice the time that is left is not begun; one that takes too long is cut. in_turn: one that
    takes longer than its estimate leaves those after it theirs."""
    for i, item in enumerate(items):
        todo = item.left(file)
        if todo is None:
            say(f"{item}: measured already")
            continue
        left = ends - clock()
        limit_s = min(left, PATIENCE * todo.estimate_s)
        if in_turn:
            later = sum(after.estimate_s for after in items[i + 1 :] if after.left(file))
            limit_s = min(limit_s, max(left - later, todo.estimate_s))
        if left < todo.estimate_s / 2:
            reason = f"takes about {todo.estimate_s:.0f} s, {max(0, left):.0f} s were left"
            say(f"{todo}: not begun: {reason}")
            todo.skip(reason, file)
        else:
            say(f"{todo}: at most {limit_s:.0f} s")
            todo.run(limit_s, file)
