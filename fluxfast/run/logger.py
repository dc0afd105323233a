"""What a run reports: a progress line, metrics.jsonl and TensorBoard files.

Losses stay on the device until the logging interval ends: one synchronization per interval.
"""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from fluxfast.errors import FluxfastError
from fluxfast.util.files import keep_running, read_rows, write_atomic
from fluxfast.util.platform import peak_resident_gib
from fluxfast.util.terminal import progress_bars, terminal_width

log = logging.getLogger(__name__)

WARMUP_STEPS = 2  # the first steps compile, allocate and fill caches: they are not timed
RATE_WINDOW = 50  # steps that the speed is measured over
LOSS_WINDOW = 100  # steps that the smoothed loss is the mean of
ROOMY = 150  # columns of a terminal that the whole progress line fits in


def peak_memory_gib(device: torch.device) -> float | None:
    """Returns the most that was allocated on the GPU so far; on a CPU the process's largest
    resident size, or None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_gib()


class NotFinite(FluxfastError):
    """`train.max_bad_steps` steps in a row, `first` to `last` (from 1), had no finite loss and
    gradient. Raised when an interval ends; `good` is the last good step of the run by then.
    """

    def __init__(self, first: int, last: int, good: int):
        super().__init__(f"no step from {first} to {last} had a finite loss and gradient")
        self.first, self.last, self.good = first, last, good


class RunLog:
    """Collects per-step results and writes them out every `every` steps. A context manager.

    A line of metrics.jsonl: step, loss (mean of the interval), loss_smooth, grad_norm (mean), lr,
    it_per_s, s_per_it, eta_s, peak_memory_gib, skipped_steps (in the interval), epoch. Rates are
    null until known. A line that the disk refuses is written with the next one.

    on_interval is called with each interval's seconds, None for the first. resumed: the `state` in
    the checkpoint of step `first`. most_bad: bad steps in a row that end the run. writes: False on
    ranks that only count those.
    """

    def __init__(
        self,
        run_dir: Path,
        first: int,
        steps: int,
        every: int,
        device: torch.device,
        on_interval: Callable[[float | None], None] = lambda seconds: None,
        resumed: dict | None = None,
        most_bad: int = 10,
        *,
        writes: bool = True,
    ):
        self.path, self.steps, self.every = run_dir / "metrics.jsonl", steps, every
        self.device, self.writes = device, writes
        self.most_bad, self.on_interval = most_bad, on_interval
        self._last: float | None = None  # the clock at the end of the last interval
        self._paused = 0.0
        self._timed_from = first + WARMUP_STEPS
        self._times: deque[tuple[int, float]] = deque()
        state = resumed or {"interval": [], "losses": [], "bad": 0, "unwritten": []}
        self._results = [torch.tensor(row, device=device) for row in state["interval"]]
        self._losses: deque[float] = deque(state["losses"], maxlen=LOSS_WINDOW)
        self._bad: int = state["bad"]  # bad steps in a row, up to the last interval's end
        self._unwritten: list[str] = state["unwritten"]
        self._board: Any = None
        if writes and self.path.is_file():  # a resumed run writes the lines after `first` again
            with keep_running(self.path):
                again = {json.loads(line)["step"] for line in self._unwritten}
                rows = (r for r in read_rows(self.path) if r["step"] <= first)
                lines = (json.dumps(row) + "\n" for row in rows if row["step"] not in again)
                write_atomic(self.path, "".join(lines).encode())
        if writes:
            with keep_running("TensorBoard"):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first + 1)
        self._size = self.path.stat().st_size if self.path.is_file() else 0  # of whole lines
        # rich shortens every column where they do not fit, the step count too: so they must fit
        width, line = terminal_width(), TextColumn("{task.fields[line]}", markup=False)
        columns = [MofNCompleteColumn(), line]
        self._room = width - 2 - 2 * len(str(steps))  # for the line
        if width >= ROOMY:
            bar = TextColumn("{task.description}"), BarColumn()
            columns = [*bar, columns[0], TimeElapsedColumn(), line]
            self._room -= 68
        self._progress = progress_bars(*columns)
        self._task = self._progress.add_task("training", total=steps, completed=first, line="")

    def state(self) -> dict:
        """Returns what a checkpoint keeps: the unfinished interval, and what later lines need.
        Flushes the lines written so far. Synchronizes with the device.
        """
        if self.path.is_file():
            with keep_running(self.path), open(self.path, "rb") as file:
                os.fsync(file.fileno())
        return {
            "interval": [result.tolist() for result in self._results],  # sync: a save
            "losses": list(self._losses),
            "bad": self._bad,
            "unwritten": list(self._unwritten),
        }

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *exception):
        self._progress.stop()
        if self._board:
            with keep_running("TensorBoard"):
                self._board.close()

    def step(
        self, step: int, loss: Tensor, norm: Tensor, bad: Tensor, lr: float, epoch: int
    ) -> None:
        """Record step `step` (counted from 1). Synchronizes with the device only where an interval
        ends, and raises NotFinite there after `most_bad` bad steps in a row.
        """
        self._results.append(torch.stack([loss.float(), norm, bad]))
        self._progress.update(self._task, completed=step)
        if step == self._timed_from:
            self._synchronize()
            self._times.append((step, self._clock()))
        if step % self.every == 0 or step == self.steps:
            self._end_interval(step, lr, epoch)

    @contextmanager
    def pause(self):
        """Leaves the time spent inside out of the speed."""
        self._synchronize()
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def _clock(self) -> float:
        return time.perf_counter() - self._paused

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # sync: the clock is read

    def _end_interval(self, step: int, lr: float, epoch: int) -> None:
        rows = torch.stack(self._results).tolist()  # sync: the interval's only one
        self._results = []
        good = [row for row in rows if row[2] == 0]
        self._losses.extend(loss for loss, _, _ in good)
        too_many_bad = self._count_bad(step, rows)
        seconds = self._seconds_per_step(step)
        row = {
            "step": step,
            "loss": fmean(loss for loss, _, _ in good) if good else None,
            "loss_smooth": fmean(self._losses) if self._losses else None,
            "grad_norm": fmean(norm for _, norm, _ in good) if good else None,
            "lr": lr,
            "it_per_s": seconds and 1 / seconds,
            "s_per_it": seconds,
            "eta_s": seconds and seconds * (self.steps - step),
            "peak_memory_gib": peak_memory_gib(self.device),
            "skipped_steps": len(rows) - len(good),
            "epoch": epoch,
        }
        if self.writes:
            self._unwritten.append(json.dumps(row) + "\n")
            with keep_running(self.path, silent=len(self._unwritten) > 1):  # lines wait already
                self._append_unwritten()
            self._add_to_board(row)
        self._show(row)
        now, last = self._clock(), self._last
        self._last = now
        self.on_interval(None if last is None else now - last)
        if too_many_bad:
            raise too_many_bad

    def _count_bad(self, step: int, rows: list[list[float]]) -> NotFinite | None:
        """Count the bad steps of an interval that ends with `step`."""
        ended = None
        for number, (_, _, bad) in enumerate(rows, start=step - len(rows) + 1):
            self._bad = self._bad + 1 if bad else 0
            if self._bad >= self.most_bad and ended is None:
                ended = number - self._bad + 1, number
        return None if ended is None else NotFinite(*ended, good=step - self._bad)

    def _append_unwritten(self) -> None:
        """Append lines behind the whole ones in the file; a full disk may have cut one short."""
        content = "".join(self._unwritten).encode()
        with open(self.path, "ab") as file:
            start = min(file.tell(), self._size)
            file.truncate(start)
            file.write(content)
        self._size = start + len(content)
        self._unwritten = []

    def _add_to_board(self, row: dict) -> None:
        """Give TensorBoard the interval's numbers; after an error, which its thread repeats at
        every call, nothing any more.
        """
        board, self._board = self._board, None
        if board is None:
            return
        with keep_running("TensorBoard"):
            for key, value in row.items():
                if value is not None and key not in ("step", "eta_s"):
                    board.add_scalar(f"train/{key}", value, row["step"])
            self._board = board

    def _seconds_per_step(self, step: int) -> float | None:
        """Returns the mean over the last RATE_WINDOW timed steps."""
        while len(self._times) > 1 and self._times[1][0] <= step - RATE_WINDOW:
            self._times.popleft()
        if not self._times or self._times[0][0] == step:
            return None
        (start, started), now = self._times[0], self._clock()
        self._times.append((step, now))
        return (now - started) / (step - start)

    def _show(self, row: dict) -> None:
        smooth = row["loss_smooth"]
        parts = ["loss -" if smooth is None else f"loss {smooth:.4f}"]
        if row["s_per_it"]:
            parts += [f"{row['it_per_s']:.2f} it/s", f"{row['s_per_it']:.3f} s/it"]
        if row["eta_s"] is not None:
            parts.append(f"ETA {timedelta(seconds=round(row['eta_s']))}")
        if row["skipped_steps"]:
            parts.append(f"{row['skipped_steps']} steps skipped (not finite)")
        if row["peak_memory_gib"] is not None:
            parts.append(f"peak {row['peak_memory_gib']:.2f} GiB")
        line = "  ".join(parts)
        if self._progress.disable:
            log.info(f"step {row['step']}/{self.steps}  {line}")
        else:
            self._progress.update(self._task, line=line[: self._room])
