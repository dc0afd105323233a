"""Which tiles of the search space compile for a card without a spill: the list that `sweep` times.

`bench/tiles/sm_<arch>.json` holds, per kernel, the tiles that may be timed ("kept") and those that
may not, by what is wrong with them. The list belongs to one version of Triton: with another it is
begun again. Every tile is written down as soon as it is known, so that a run that is cut short
resumes where it stopped.
"""

import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from multiprocessing import connection
from pathlib import Path

from bench import ROOT
from bench.compile import cost_of
from bench.compile_cases import tile_cases
from bench.terminal import say
from bench.tune.space import KERNELS, Kernel, named_tile, space, tile_name
from fluxfast.errors import ConfigError

FOLDER = ROOT / "bench" / "tiles"
KEPT = "kept"
# how a verdict of bench/compile.py begins -> the heading that its tiles stand under
REFUSALS = {
    "spills": "spills",
    "needs": "too much shared memory",
    "multiplies": "no tensor cores",
    "failed": "does not compile",
}
DIED = "the compiler died"
Verdicts = dict[str, dict[str, str]]  # kernel -> tile -> KEPT or why not


def path_of(arch: int) -> Path:
    return FOLDER / f"sm_{arch}.json"


def load(path: Path) -> tuple[str, Verdicts]:
    """The version of Triton that a list was compiled with, and its verdicts; both empty where there
    is no file. Raises ConfigError for a file that is no such list."""
    if not path.is_file():
        return "", {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        verdicts = {
            kernel: {tile: heading for heading, tiles in headings.items() for tile in tiles}
            for kernel, headings in table["kernels"].items()
        }
        return table["triton"], verdicts
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        hint = "delete it and run `bench.tune candidates`"
        raise ConfigError(f"{path} is no list of tiles ({error!r})", hint=hint) from None


def save(path: Path, arch: int, triton: str, verdicts: Verdicts) -> None:
    """Writes one line a heading, kernels in KERNELS' order; the file is never half written."""
    kernels: dict[str, dict[str, list[str]]] = {}
    for kernel in map(str, KERNELS):
        by_heading = sorted(
            verdicts.get(kernel, {}).items(), key=lambda item: (item[1] != KEPT, item[1])
        )
        for tile, heading in by_heading:
            kernels.setdefault(kernel, {}).setdefault(heading, []).append(tile)
    text = json.dumps({"arch": arch, "triton": triton, "kernels": kernels}, indent=2)
    text = re.sub(r"\[[^]]*\]", lambda tiles: json.dumps(json.loads(tiles[0])), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def kept(verdicts: Verdicts, kernel: Kernel) -> list:
    """The tiles of a kernel that may be timed."""
    tiles = verdicts.get(str(kernel), {}).items()
    return [named_tile(kernel, name) for name, heading in tiles if heading == KEPT]


def heading_of(kernel: Kernel, name: str, arch: int) -> str:
    """KEPT, or what is wrong with the first case of a tile that has anything wrong."""
    for case in tile_cases(*kernel, named_tile(kernel, name)):
        wrong = cost_of(case, arch)[1] if case.least_arch <= arch else None
        if wrong is not None:
            return REFUSALS[wrong.split(":")[0].split()[0]]
    return KEPT


def candidates(
    arch: int, kernels: Iterable[Kernel], path: Path, budget_s: float | None, workers: int | None
) -> Verdicts:
    """Compiles what the list does not have yet, a process a tile and `workers` at a time, and
    writes it. budget_s: none is begun after so many seconds."""
    triton = metadata.version("triton")
    compiled_by, verdicts = load(path)
    if compiled_by != triton:
        verdicts = {}
    left = [
        (kernel, name)
        for kernel in kernels
        if arch >= 89 or kernel.dtype != "fp8"
        for name in (tile_name(tile, with_group=False) for tile in space(kernel, arch))
        if name not in verdicts.get(str(kernel), {})
    ]
    deadline = None if budget_s is None else time.monotonic() + budget_s
    judged = _judged(left, arch, deadline, workers or len(os.sched_getaffinity(0)))
    for done, (kernel, name, heading) in enumerate(judged, 1):
        verdicts.setdefault(str(kernel), {})[name] = heading
        save(path, arch, triton, verdicts)
        say(f"{done:5} of {len(left)}  sm_{arch} {kernel} {name}: {heading}")
    return verdicts


def _judged(
    tiles: list[tuple[Kernel, str]], arch: int, deadline: float | None, workers: int
) -> Iterator[tuple[Kernel, str, str]]:
    """Yields kernel, tile and heading as each is known. A process a tile: a compiler that dies
    takes no other tile with it."""
    os.environ.pop("TRITON_INTERPRET", None)  # a process that interprets cannot compile
    fork = multiprocessing.get_context("fork")
    waiting, running = list(reversed(tiles)), {}
    while True:
        while waiting and len(running) < workers:
            if deadline is not None and time.monotonic() >= deadline:
                break
            kernel, name = waiting.pop()
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=_judge, args=(sender, kernel, name, arch))
            process.start()
            sender.close()
            running[process.sentinel] = (process, receiver, kernel, name)
        if not running:
            return
        for sentinel in connection.wait(list(running)):
            process, receiver, kernel, name = running.pop(sentinel)
            process.join()
            done = receiver.poll() and not process.exitcode
            yield kernel, name, receiver.recv() if done else DIED


def _judge(sender: connection.Connection, *question) -> None:
    with tempfile.TemporaryDirectory() as folder:  # each is compiled once: nothing to keep
        os.environ["TRITON_CACHE_DIR"] = folder
        sender.send(heading_of(*question))
