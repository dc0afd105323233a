"""What a run tells: a progress line, metrics.jsonl and TensorBoard files.

Losses stay on the device until the logging interval ends: one wait per interval.
"""

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from fluxfast.errors import FluxfastError
from fluxfast.util.files import read_rows, warn_on_disk_error, write_atomic
from fluxfast.util.platform import peak_resident_gib
from fluxfast.util.terminal import progress_bars, terminal_width

log = logging.getLogger(__name__)

WARMUP_STEPS = 2  # the first steps compile, allocate and fill caches: they are not timed
RATE_WINDOW = 50  # steps
ROOMY = 150  # columns of a terminal that the whole progress line fits in
LOSS_WINDOW = 100  # steps that the smoothed loss is the mean of


def peak_memory_gib(device: torch.device) -> float | None:
    """Allocated on the GPU at most so far; on a CPU the process's largest resident size.

    None where the system does not tell (a CPU under Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_gib()


class NotFinite(FluxfastError):
    """So many steps in a row as `train.max_bad_steps` allows had no finite loss and gradient: from
    `first` to `last`, counted from 1. Seen where an interval ends: `good` is the last good step by
    then, before them or after.
    """

    def __init__(self, first: int, last: int, good: int):
        super().__init__(f"no step from {first} to {last} had a finite loss and gradient")
        self.first, self.last, self.good = first, last, good


class RunLog:
    """Collects per-step results and writes them out every `every` steps. A context manager.

    A line of metrics.jsonl: step, loss (mean of the interval), loss_smooth, grad_norm (mean), lr,
    it_per_s, s_per_it, eta_s, peak_memory_gib, skipped_steps (in the interval), epoch. Rates are
    null until known. on_interval gets the seconds of every interval, None of the first. resumed:
    the `state` that a checkpoint of step `first` kept, so that the lines are those of a run that
    was never stopped. A disk that refuses a line is logged, and the line written with the next one.
    most_bad: steps in a row without a finite loss and gradient that end the run. Without `writes`
    it only counts those.
    """

    def __init__(
        self,
        run_dir: Path,
        first: int,
        steps: int,
        every: int,
        device: torch.device,
        on_interval: Callable[[float | None], None] | None = None,
        resumed: dict | None = None,
        most_bad: int = 10,
        *,
        writes: bool = True,
    ):
        self.on_interval, self._last = on_interval, None
        self.path, self.steps, self.every = run_dir / "metrics.jsonl", steps, every
        self.device = device
        self._first, self._paused = first, 0.0
        state = resumed or {"interval": [], "losses": [], "bad": 0, "unwritten": []}
        self._results = [torch.tensor(row, device=device) for row in state["interval"]]
        self._losses: deque[float] = deque(state["losses"], maxlen=LOSS_WINDOW)
        self.most_bad = most_bad
        # bad steps in a row, up to the last interval's end
        self._bad = state["bad"]
        self._times: deque[tuple[int, float]] = deque()
        self.writes = writes
        if writes:
            self._drop_lines_after(first)
        self._size = self.path.stat().st_size if self.path.is_file() else 0  # of whole lines
        self._unwritten: list[str] = state["unwritten"]
        self._board: Any = _board(run_dir, first) if writes else None
        # rich cuts every column alike where they do not fit, the step count too: so they must fit
        line = TextColumn("{task.fields[line]}", markup=False)
        bar = (TextColumn("{task.description}"), BarColumn())
        columns = (*bar, MofNCompleteColumn(), TimeElapsedColumn(), line)
        width = terminal_width()
        wide = width >= ROOMY
        self._room = width - (70 if wide else 2) - 2 * len(str(steps))
        self._progress = progress_bars(*(columns if wide else (MofNCompleteColumn(), line)))
        self._task = self._progress.add_task("training", total=steps, completed=first, line="")

    def _drop_lines_after(self, step: int) -> None:
        """A run resumed at `step` writes the lines after it again."""
        if self.path.is_file():
            rows = read_rows(self.path)
            kept = [json.dumps(row) for row in rows if row["step"] <= step]
            write_atomic(self.path, "".join(f"{line}\n" for line in kept).encode())

    def state(self) -> dict:
        """What a checkpoint keeps: the interval that is not over, and what goes into later lines.
        Those that there are already are on the disk when this returns. Waits for the device.
        """
        if self.path.is_file():
            with warn_on_disk_error(), open(self.path, "rb") as file:
                os.fsync(file.fileno())
        interval = torch.stack(self._results).tolist() if self._results else []  # sync: a save
        return {
            "interval": interval,
            "losses": list(self._losses),
            "bad": self._bad,
            "unwritten": list(self._unwritten),
        }

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *exception):
        self._progress.stop()
        if self._board is not None:
            with warn_on_disk_error():
                self._board.close()

    def step(
        self, step: int, loss: Tensor, norm: Tensor, bad: Tensor, lr: float, epoch: int
    ) -> None:
        """Note step `step` (counted from 1). Waits for the device only where an interval ends.

        Raises NotFinite there when `most_bad` steps in a row were bad.
        """
        self._results.append(torch.stack([loss.float(), norm, bad]))
        self._progress.update(self._task, completed=step)
        if step == self._first + WARMUP_STEPS:
            self._wait()
            self._times.append((step, self._clock()))
        if step % self.every == 0 or step == self.steps:
            self._write(step, lr, epoch)

    @contextmanager
    def pause(self):
        """Time spent inside is not training: the clock stands still."""
        self._wait()
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def _clock(self) -> float:
        return time.perf_counter() - self._paused

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # sync: the clock is read

    def _write(self, step: int, lr: float, epoch: int) -> None:
        rows = torch.stack(self._results).tolist()  # sync: the interval's one wait
        self._results = []
        good = [row for row in rows if row[2] == 0]
        self._losses.extend(loss for loss, _, _ in good)
        lost = self._lost(step, rows)
        seconds = self._seconds_per_step(step)
        row = {
            "step": step,
            "loss": _mean([loss for loss, _, _ in good]),
            "loss_smooth": _mean(self._losses),
            "grad_norm": _mean([norm for _, norm, _ in good]),
            "lr": lr,
            "it_per_s": seconds and 1 / seconds,
            "s_per_it": seconds,
            "eta_s": seconds and seconds * (self.steps - step),
            "peak_memory_gib": peak_memory_gib(self.device),
            "skipped_steps": len(rows) - len(good),
            "epoch": epoch,
        }
        if self.writes:
            self._keep(row)
        self._show(row)
        now, before = self._clock(), self._last
        self._last = now
        if self.on_interval is not None:
            self.on_interval(None if before is None else now - before)
        if lost is not None:
            raise lost

    def _keep(self, row: dict) -> None:
        self._unwritten.append(json.dumps(row) + "\n")
        with warn_on_disk_error(self.path):
            self._append()
            for key, value in row.items():
                if value is not None and key not in ("step", "eta_s"):
                    self._board.add_scalar(f"train/{key}", value, row["step"])

    def _lost(self, step: int, rows: list[list[float]]) -> NotFinite | None:
        """Count the bad steps of an interval that ends with `step`."""
        lost = None
        for number, (_, _, bad) in enumerate(rows, start=step - len(rows) + 1):
            self._bad = self._bad + 1 if bad else 0
            if self._bad >= self.most_bad and lost is None:
                lost = number - self._bad + 1, number
        return None if lost is None else NotFinite(*lost, good=step - self._bad)

    def _append(self) -> None:
        """Lines that are not in the file yet, behind the whole ones: a full disk cuts one short."""
        content = "".join(self._unwritten).encode()
        with open(self.path, "ab") as file:
            start = min(file.tell(), self._size)
            file.truncate(start)
            file.write(content)
        self._size = start + len(content)
        self._unwritten = []

    def _seconds_per_step(self, step: int) -> float | None:
        """Over the last RATE_WINDOW steps that were timed, the warm-up left out."""
        now = self._clock()
        while len(self._times) > 1 and self._times[1][0] <= step - RATE_WINDOW:
            self._times.popleft()
        seconds = None
        if self._times and self._times[0][0] < step:
            then, at = self._times[0]
            seconds = (now - at) / (step - then)
            self._times.append((step, now))
        return seconds

    def _show(self, row: dict) -> None:
        parts = [f"loss {_number(row['loss_smooth'])}"]
        if row["s_per_it"]:
            parts += [f"{row['it_per_s']:.2f} it/s", f"{row['s_per_it']:.3f} s/it"]
        if row["eta_s"] is not None:
            parts.append(f"ETA {_clock(row['eta_s'])}")
        if row["skipped_steps"]:
            parts.append(f"{row['skipped_steps']} steps skipped (not finite)")
        if row["peak_memory_gib"] is not None:
            parts.append(f"peak {row['peak_memory_gib']:.2f} GiB")
        line = "  ".join(parts)
        if self._progress.disable:
            log.info(f"step {row['step']}/{self.steps}  {line}")
        else:
            self._progress.update(self._task, line=line[: self._room])


def _board(run_dir: Path, first: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first + 1)


def _mean(values) -> float | None:
    values = list(values)
    return math.fsum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
