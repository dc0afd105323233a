"""Times candidates against each other and writes what was measured, with its conditions.

`compare` gates each candidate for correctness, throws the warm-up away, then runs the candidates
in turn, round after round, so that whatever else the machine does falls on all of them. One that
cannot run becomes a `Result` with its reason; it never ends the comparison. A GPU is timed by its
own events, a CPU by the clock.
"""

import contextlib
import ctypes
import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench import ROOT

LIBRARIES = (
    *("numpy", "triton", "diffusers", "transformers", "peft", "bitsandbytes", "liger_kernel"),
)
FLUSH_BYTES = 256 << 20  # overwritten before a cold run: twice the largest L2 of a card (128 MB)
HEAD_START_CYCLES = 2_000_000  # the GPU spins for about 1 ms while the host queues a run's launches


@dataclass
class Result:
    """The outcome of one candidate.

    status: "ok", "skipped" (a library is missing), "gate failed" (wrong results, so not timed),
    "out of memory", "out of time" (of a suite's budget) or "failed"; reason: of all but "ok".
    ratio: its median over the baseline's, below 1 is faster; None where either is missing.
    peak_memory_kind: what `peak_memory_bytes` counts (see `peak_memory`); both None if not known.
    details: further fields of its row.
    """

    name: str
    status: str = "ok"
    reason: str | None = None
    times_ms: list[float] = field(default_factory=list)
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    ratio: float | None = None
    peak_memory_bytes: int | None = None
    peak_memory_kind: str | None = None
    details: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.status}: {self.reason or f'{self.median_ms:.1f} ms'}"

    def divide(self, steps: int) -> None:
        """Makes the times of a call that takes so many steps those of one step."""
        self.times_ms = [time / steps for time in self.times_ms]
        self.summarize()

    def summarize(self) -> None:
        if self.times_ms:
            quantiles = np.quantile(self.times_ms, (0.1, 0.5, 0.9)).tolist()
            self.p10_ms, self.median_ms, self.p90_ms = quantiles


def compare(
    candidates: dict[str, Callable[[], object] | Exception],
    rounds: int,
    warmup: int,
    gate: Callable[[str], str | None] | None = None,
    baseline: str | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
    cold: bool = False,
) -> dict[str, Result]:
    """Times every candidate `rounds` times, interleaved. Returns results in the candidates' order.

    candidates: name -> a call that does the work once, or the error that kept it from being built.
    gate: called with a name before anything is timed; returns None, or what is wrong; raising
    counts as wrong. Each round runs all candidates once and starts one further along, so that none
    always follows the same neighbor. The warm-up rounds run in the same order; the last one
    measures peak memory. cold: see `elapsed_ms`.
    """
    results = {name: Result(name) for name in candidates}
    for name, work in candidates.items():
        if isinstance(work, Exception):
            fail(results[name], work)
        elif gate:
            _check(results[name], gate)
    for r in range(-warmup, rounds):
        running = [name for name, result in results.items() if result.status == "ok"]
        start = r % len(running) if running else 0
        for name in running[start:] + running[:start]:
            _run_once(results[name], candidates[name], r, device, cold)
            if progress:
                progress(f"{name}: round {r + 1} of {rounds}" if r >= 0 else f"{name}: warm-up")
    for result in results.values():
        if result.status == "ok":
            result.summarize()
    add_ratios(results, baseline)
    return results


def add_ratios(results: dict[str, Result], baseline: str | None) -> None:
    """Sets the `ratio` of every result that has a median, if the baseline has one."""
    base = results[baseline].median_ms if baseline in results else None
    for result in results.values():
        result.ratio = result.median_ms / base if base and result.median_ms else None


def attempt(make: Callable, *arguments):
    """Returns what `make` returns, or the exception that it raised, which `compare` takes in place
    of a candidate."""
    try:
        return make(*arguments)
    except Exception as error:
        error.__traceback__ = None  # its frames hold what was built so far
        free_memory()
        return error


def fail(result: Result, error: Exception) -> None:
    """Records an error as the result and frees what its traceback holds. ImportError: skipped."""
    result.status = "skipped" if isinstance(error, ImportError) else "failed"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "not enough memory" in str(error)  # the CPU allocator raises a plain RuntimeError
    ):
        result.status = "out of memory"
    lines = str(error).strip().splitlines()
    result.reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    result.median_ms = result.p10_ms = result.p90_ms = None
    error.__traceback__ = None
    free_memory()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a device that is lost has nothing to give back
            torch.cuda.empty_cache()


def _check(result: Result, gate: Callable[[str], str | None]) -> None:
    try:
        result.reason = gate(result.name)
        if result.reason is not None:
            result.status = "gate failed"
    except Exception as error:
        fail(result, error)
        if result.status == "failed":
            result.status = "gate failed"


def _run_once(result: Result, work: Callable[[], object], r: int, device: str, cold: bool) -> None:
    """Runs round r of a candidate: r < 0 is warm-up, and -1 measures memory instead of time."""
    try:
        if r == -1:
            result.peak_memory_bytes, result.peak_memory_kind = peak_memory(work, device)
            return
        elapsed = elapsed_ms(work, device, cold)
        if r >= 0:
            result.times_ms.append(elapsed)
    except Exception as error:
        fail(result, error)


def elapsed_ms(work: Callable[[], object], device: str, cold: bool = False) -> float:
    """Runs `work` once. Returns ms, on a GPU between two events of its own.

    cold, for kernels, which are shorter than their launches or fit the L2: the L2 holds none of the
    inputs, and the launches are queued before the first one starts, as in a captured graph. Without
    it, time that the GPU waits for the host counts too. On a CPU it changes nothing.
    """
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    synchronize(device)
    if cold:
        torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def busy(work: Callable[[], object], device: str) -> float:
    """Returns the share of `work`'s time in which a kernel runs, by torch's profiler."""
    at = "CPU" if device == "cpu" else "CUDA"
    kind, runs_on = (getattr(names, at) for names in (ProfilerActivity, DeviceType))
    synchronize(device)
    with torch.profiler.profile(activities=[kind]) as profile:
        work()
        synchronize(device)
    # a profile of the device has the host's calls of CUDA, too
    events = [e.time_range for e in profile.events() if e.device_type == runs_on]
    spans = sorted((span.start, span.end) for span in events)
    if not spans:
        raise RuntimeError("the profiler saw no kernel")
    inside, end = 0.0, spans[0][0]
    for first, last in spans:
        inside += max(0.0, last - max(first, end))
        end = max(end, last)
    return inside / max(end - spans[0][0], 1e-9)


def peak_memory(work: Callable[[], object], device: str) -> tuple[int | None, str | None]:
    """Runs `work` once. Returns bytes, and what they count.

    "cuda max allocated": torch's high-water mark on the device, weights included. "peak rss over
    start": how far the process grew while it ran (Linux); weights that were there before do not
    count, and pages an allocator kept from earlier work can hide some. (None, None) elsewhere.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device), "cuda max allocated"
    before = _reset_peak_rss()
    work()
    after = _status_bytes("VmHWM")
    if before is None or after is None:
        return None, None
    return max(after - before, 0), "peak rss over start"


def _reset_peak_rss() -> int | None:
    """Returns free pages to the system and resets the high-water mark. Returns resident bytes, None
    where that is not possible."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int | None:
    size = _proc_value("/proc/self/status", key)
    return int(size.split()[0]) * 1024 if size else None


def _proc_value(path: str, key: str) -> str | None:
    """Returns the first value of "key: value" in a file of /proc; None where there is none."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None


def conditions(device: str) -> dict[str, object]:
    """Returns the facts of this machine and checkout that a number depends on. None: unknown, or
    not there."""
    cuda = torch.device(device).type == "cuda"
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain")
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    cpu = _proc_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": None if commit is None or changes is None else bool(changes),
        "device": "cuda" if cuda else "cpu",
        "device_name": torch.cuda.get_device_name(device) if cuda else cpu,
        "driver": _output(*driver) if cuda else None,
        "cuda": torch.version.cuda,
        "cpu_model": cpu,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{library: _version(library) for library in LIBRARIES},
    }


def row(result: Result, **fields: object) -> dict[str, object]:
    """Returns one JSON object: the result, its number of rounds, the fields (conditions and
    settings) and the result's details."""
    values = asdict(result)
    times, details = values.pop("times_ms"), values.pop("details")
    return values | {"rounds": len(times)} | fields | details


def append_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Appends rows to a .jsonl file, one a line, and creates its folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
