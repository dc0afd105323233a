"""What kernels take of a card, compiled where it is not known yet and saved under `build/twin`.

A reading is a dict of `sass.read`, or {"error": first line} where the compiler fails. The key of a
kernel names its source, specialization, options, card and compiler: a reading is never stale.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench import ROOT
from bench.twin import sass
from bench.twin.driver import SHARED_LIMIT, Kernel

FOLDER = ROOT / "build" / "twin"
_waiting: list[Kernel] = []  # filled before the workers are forked: a kernel cannot be sent to one


def path_of(arch: int) -> Path:
    return FOLDER / f"sm_{arch}.jsonl"


def known(arch: int) -> dict[str, dict]:
    """Returns key -> reading of what has been compiled for a card."""
    readings = {}
    if path_of(arch).is_file():
        for line in path_of(arch).read_text(encoding="utf-8").splitlines():
            try:
                readings.update([json.loads(line)])
            except ValueError:  # cut short: compiled again
                continue
    return readings


def readings_of(
    kernels: Iterable[Kernel], workers: int | None = None, deadline: float | None = None
) -> dict[str, dict]:
    """Returns key -> reading of the kernels of one card. deadline: of `time.monotonic`; what is not
    begun by then is missing."""
    wanted = {kernel.key: kernel for kernel in kernels}
    if not wanted:
        return {}
    arch = next(iter(wanted.values())).target.arch
    readings = {key: value for key, value in known(arch).items() if key in wanted}
    _waiting[:] = [kernel for key, kernel in wanted.items() if key not in readings]
    if not _waiting:
        return readings
    os.environ.pop("TRITON_INTERPRET", None)  # a process that interprets cannot compile
    FOLDER.mkdir(parents=True, exist_ok=True)
    workers = workers or len(os.sched_getaffinity(0))
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork) as pool, path_of(arch).open("a") as file:
        for pair in pool.map(_read, range(len(_waiting)), [deadline] * len(_waiting)):
            if pair is not None:
                readings.update([pair])
                file.write(json.dumps(pair) + "\n")
                file.flush()
    return readings


def _read(index: int, deadline: float | None) -> tuple[str, dict] | None:
    if deadline is not None and time.monotonic() > deadline:
        return None
    kernel = _waiting[index]
    with tempfile.TemporaryDirectory() as folder:  # the reading is what is saved
        os.environ["TRITON_CACHE_DIR"] = folder
        return kernel.key, reading_of(kernel)


def reading_of(kernel: Kernel) -> dict:
    """Compiles a kernel. Returns its reading."""
    try:
        return sass.read(kernel.compile(), kernel.target.arch)
    except Exception as error:  # one kernel's failure is a reading too
        return {"error": (str(error).strip() or repr(error)).splitlines()[0]}


def problem(reading: dict, arch: int) -> str | None:
    """Returns what is wrong with a kernel, or None."""
    if "error" in reading:
        return f"does not compile: {reading['error']}"
    if reading["stack"]:
        return f"spills: {reading['stack']} bytes of stack, {reading['local']} LDL/STL"
    if reading["shared"] > SHARED_LIMIT[arch]:
        return (
            f"needs {reading['shared']} bytes of shared memory, the card has {SHARED_LIMIT[arch]}"
        )
    return "multiplies matrices without tensor cores" if reading.get("slow") else None


def fault(reading: dict, kernel: Kernel) -> str | None:
    """Returns what is wrong with a kernel, and which it is, or None."""
    arch = kernel.target.arch
    wrong = problem(reading, arch)
    name = f"{kernel.name} {kernel.key[:8]} for sm_{arch}"
    return wrong and f"WRONG: {name} {wrong}\n  {kernel.constants()}"
