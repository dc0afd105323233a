"""Times candidates against each other and writes what was measured, with its conditions.

`compare` gates each candidate for correctness, throws the warm-up away, then runs the candidates
in turn, round after round, so that whatever else the machine does falls on all of them. One that
cannot run becomes a `Result` with its reason; it never ends the comparison. A GPU is timed by its
own events, a CPU by the clock. `append_rows` writes one JSON object a line.
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

from bench import ROOT

LIBRARIES = (
    *("numpy", "triton", "diffusers", "transformers", "peft", "bitsandbytes", "liger_kernel"),
)
FLUSH_BYTES = 256 << 20  # overwritten before a cold run: twice the largest L2 of a card (128 MB)
HEAD_START_CYCLES = 2_000_000  # the GPU spins for about 1 ms while the host queues a run's launches


@dataclass
class Result:
    """What became of one candidate.

    status: "ok", "skipped" (a library is missing), "gate failed" (wrong results, so not timed),
    "out of memory", "out of time" (of a suite's budget) or "failed"; `reason` says why for all but
    "ok". ratio: its median over the baseline's median, below 1 is faster; None where either is
    missing. peak_memory_kind says what `peak_memory_bytes` counts (see `peak_memory`); both None if
    not known.
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

    def __str__(self) -> str:
        return f"{self.name}: {self.status}: {self.reason or f'{self.median_ms:.1f} ms'}"


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
    """Time every candidate `rounds` times, interleaved -> results in the candidates' order.

    candidates: name -> a call that does the work once, or the error that stopped it from being
    built. gate: called with a name before anything is timed; returns None, or what is wrong.
    Raising counts as wrong. Each round runs all candidates once, and each round starts one further
    along, so that none always follows the same neighbor. The warm-up rounds run in the same
    order; the last one measures peak memory. cold: see `elapsed_ms`.
    """
    results = {name: Result(name) for name in candidates}
    running = []
    for name, work in candidates.items():
        if isinstance(work, Exception):
            fail(results[name], work)
        elif _passes(results[name], gate):
            running.append(name)
    for r in range(-warmup, rounds):
        start = r % len(running) if running else 0
        for name in running[start:] + running[:start]:
            _run_once(results[name], candidates[name], r, device, cold)
            if progress:
                progress(f"{name}: round {r + 1} of {rounds}" if r >= 0 else f"{name}: warm-up")
        running = [name for name in running if results[name].status == "ok"]
    for name in running:
        result = results[name]
        if result.times_ms:
            quantiles = np.quantile(result.times_ms, (0.1, 0.5, 0.9)).tolist()
            result.p10_ms, result.median_ms, result.p90_ms = quantiles
    add_ratios(results, baseline)
    return results


def add_ratios(results: dict[str, Result], baseline: str | None) -> None:
    """Fill in `ratio` of every result that has a median, if the baseline has one."""
    base = results[baseline].median_ms if baseline in results else None
    for result in results.values():
        result.ratio = result.median_ms / base if base and result.median_ms else None


def fail(result: Result, error: Exception) -> None:
    """Record an error as the result, let go of what its traceback holds. ImportError: skipped."""
    result.status = "skipped" if isinstance(error, ImportError) else "failed"
    if is_out_of_memory(error):
        result.status = "out of memory"
    lines = str(error).strip().splitlines()
    result.reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    result.median_ms = result.p10_ms = result.p90_ms = None
    error.__traceback__ = None
    free_memory()


def free_memory() -> None:
    """Hand back what nobody holds any more, on a GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a device that is lost has nothing to give back
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "not enough memory" in str(error)  # the CPU allocator raises a plain RuntimeError
    )


def _passes(result: Result, gate: Callable[[str], str | None] | None) -> bool:
    try:
        wrong = gate(result.name) if gate else None
    except Exception as error:
        fail(result, error)
        if result.status == "failed":
            result.status = "gate failed"
        return False
    if wrong is not None:
        result.status, result.reason = "gate failed", wrong
    return wrong is None


def _run_once(result: Result, work: Callable[[], object], r: int, device: str, cold: bool) -> None:
    """Round r of one candidate: r < 0 is warm-up, and -1 measures memory instead of time."""
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
    """Run `work` once -> ms, on a GPU between two events of its own.

    cold, for what is shorter than its launches or fits the L2 (kernels): the L2 holds none of the
    inputs, and the launches are queued before the first one starts, as in a captured graph. Without
    it what the GPU waits for the host counts too. On a CPU it changes nothing.
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


def peak_memory(work: Callable[[], object], device: str) -> tuple[int | None, str | None]:
    """Run `work` once -> (bytes, what they count).

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
    """Hand free pages back, reset the high-water mark -> resident bytes now; None if it cannot."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(key + ":")]
    return int(found[0].split()[1]) * 1024 if found else None


def conditions(device: str) -> dict[str, object]:
    """What a number depends on in this machine and checkout. None: not known, or not there."""
    cuda = torch.device(device).type == "cuda"
    commit = _run("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _run("git", "-C", str(ROOT), "status", "--porcelain")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": None if commit is None or changes is None else bool(changes),
        "device": "cuda" if cuda else "cpu",
        "device_name": torch.cuda.get_device_name(device) if cuda else _cpu_model(),
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if cuda
        else None,
        "cuda": torch.version.cuda,
        "cpu_model": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{library: _version(library) for library in LIBRARIES},
    }


def row(result: Result, **conditions_and_settings: object) -> dict[str, object]:
    """One JSON object: the result, how many rounds it rests on, and its conditions."""
    fields = asdict(result)
    times = fields.pop("times_ms")
    return fields | {"rounds": len(times)} | conditions_and_settings


def append_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Append rows to a .jsonl file, one a line, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)


def _run(*command: str) -> str | None:
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


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
