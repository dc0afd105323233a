"""Compiles what many configurations launch, each kernel once, and keeps the worst of each."""

import json
import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby

from bench import RESULTS, terminal
from bench.terminal import say
from bench.timing import conditions
from bench.twin.driver import SHARED_LIMIT, Kernel
from bench.twin.grid import cases, default, pairwise
from bench.twin.launches import Case, launches_apart, step_launches
from bench.twin.readings import fault, known, readings_of

TABLE = RESULTS / "twin-launches.jsonl"


def kernels_of(wanted: Iterable[Case]) -> dict[str, Kernel]:
    """Returns key -> kernel of what these configurations launch."""
    order = sorted(wanted, key=_model_of)
    launches = [launch for case in order for launch in step_launches(case)]  # a model at a time
    for arch in {case.arch for case in order}:
        launches += launches_apart(arch)
    return {launch.kernel.key: launch.kernel for launch in launches if launch.kernel}


def _model_of(case: Case) -> tuple:
    return *case.model, case.head_dim


def keys_of(wanted: list[Case], workers: int | None) -> set[str]:
    """Returns the keys of what these configurations launch: nothing is compiled."""
    models = groupby(wanted, _model_of)
    groups = [list(group) for _, group in models]
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), fork) as pool:
        return set().union(*pool.map(_keys, groups))


def _keys(wanted: list[Case]) -> set[str]:
    return set(kernels_of(wanted))


def cover(arch: int, chosen: list[Case], workers: int | None, budget_s: float | None) -> int:
    """Compiles what these configurations of a card launch, and prints the worst of each kernel.
    Returns how many are wrong."""
    deadline = None if budget_s is None else time.monotonic() + budget_s
    kernels, every = kernels_of(chosen), len(keys_of(list(cases(arch)), workers))
    readings = readings_of(kernels.values(), workers, deadline)
    faults = [fault(readings[key], kernel) for key, kernel in kernels.items() if key in readings]
    faults = [each for each in faults if each]
    columns = ["kernel", "keys", "compiled", "registers", "stack", "shared", "ctas"]
    rows = [[str(row[name]) for name in columns] for row in worst(kernels, readings)]
    print(terminal.aligned([columns, *rows]))
    print("\n".join(faults)) if faults else None
    print(
        f"sm_{arch}: {len(kernels)} kernels of {len(chosen)} configurations, of {every} of all; "
        f"{len(readings)} compiled, {len(faults)} wrong"
    )
    return len(faults)


def worst(kernels: dict[str, Kernel], readings: dict[str, dict]) -> list[dict]:
    """Returns a row per kernel function: how many specializations, how many of them compiled, and
    the worst of their readings."""
    rows = []
    for name in sorted({kernel.name for kernel in kernels.values()}):
        keys = [key for key, kernel in kernels.items() if kernel.name == name]
        read = [readings[key] for key in keys if "error" not in readings.get(key, {"error": ""})]
        most = {n: max((r[n] for r in read), default=0) for n in ("registers", "stack", "shared")}
        least = min((r["ctas"] for r in read), default=0)
        rows.append(
            {"kernel": name, "keys": len(keys), "compiled": len(read), **most, "ctas": least}
        )
    return rows


def cover_all(archs: Iterable[int], workers: int | None, budget_s: float | None) -> int:
    """Compiles every kernel of every configuration of these cards, the default path and the cover
    in pairs first, and writes the table. Resumes where it stopped. Returns the exit status."""
    start = time.monotonic()
    made = {name: conditions("cpu")[name] for name in ("date", "commit", "triton")}
    deadline = None if budget_s is None else start + budget_s
    found: dict[int, tuple[str, dict[str, Kernel]]] = {}
    for configurations, wanted in {"default": default, "pairs": pairwise, "all": cases}.items():
        for arch in archs:
            if arch not in found or deadline is None or time.monotonic() < deadline:
                kernels = kernels_of(wanted(arch))
                found[arch] = configurations, kernels
                readings_of(kernels.values(), workers, deadline)
                say(f"{time.monotonic() - start:.0f} s: {_state(arch, *found[arch])}")
    rows, wrong = [], 0
    for arch, (configurations, kernels) in found.items():
        readings = {key: value for key, value in known(arch).items() if key in kernels}
        faults = [fault(reading, kernels[key]) for key, reading in readings.items()]
        wrong += sum(each is not None for each in faults)
        of = {"arch": arch, "limit": SHARED_LIMIT[arch], "configurations": configurations}
        rows += [of | row | made for row in worst(kernels, readings)]
        print("\n".join([*filter(None, faults), _state(arch, configurations, kernels)]))
    TABLE.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 1 if wrong else 0


def _state(arch: int, configurations: str, kernels: dict[str, Kernel]) -> str:
    compiled = len(known(arch).keys() & kernels.keys())
    return f"sm_{arch}: {compiled} of {len(kernels)} kernels of {configurations} compiled"
