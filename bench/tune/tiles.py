"""Which tiles of the search space compile for a card without a spill: the list that `sweep` times.

A tile is compiled in the kernels that a step at FLUX.1-dev's widths launches with it.

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
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib import metadata
from multiprocessing import connection
from pathlib import Path
from unittest.mock import patch

import torch
from fluxfast_kernels.dispatch import attention as attention_rows
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.attention import AttentionTile
from fluxfast_kernels.ops import attention, qk_norm_rope

from bench import ROOT
from bench.terminal import say
from bench.tune.space import ATTENTION, KERNELS, Kernel, named_tile, space, tile_name
from fluxfast.errors import ConfigError

FOLDER = ROOT / "bench" / "tiles"
KEPT = "kept"
# how a `problem` of bench/twin begins -> the heading that its tiles stand under
REFUSALS = {
    "spills": "spills",
    "needs": "too much shared memory",
    "multiplies": "no tensor cores",
    "does": "does not compile",
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
    """KEPT, or what is wrong with the first kernel launched with a tile that has anything wrong."""
    from bench.twin.readings import problem, reading_of

    for launched in launched_with(kernel, named_tile(kernel, name), arch):
        wrong = problem(reading_of(launched), arch)
        if wrong is not None:
            return REFUSALS[wrong.split(":")[0].split()[0]]
    return KEPT


class _Candidate(dispatch.Tile):
    """A tile that its kernels can be told by."""


def launched_with(kernel: Kernel, tile, arch: int) -> list:
    """Returns the kernels (`bench.twin.driver`) that a step at 1024 px launches with a tile in
    place of the rows' own: rank 16, and 128 for LoRA's products."""
    from bench.twin.launches import Case, step_launches

    def choose(op: str, arch: int, dtype: torch.dtype, storage: str, *shape: int):
        choice = shipped(op, arch, dtype, storage, *shape)
        if (op, storage, dispatch._KINDS.get(dtype, "half")) != kernel:
            return choice
        return replace(choice, kind="fused", tile=_Candidate(**asdict(tile)))

    def choose_tile(op: str, *card) -> AttentionTile:
        return tile if op == kernel.op else shipped_tile(op, *card)

    shipped, shipped_tile = dispatch.choose, attention_rows.choose_tile
    with ExitStack() as stack:
        stack.enter_context(patch.object(dispatch, "choose", choose))
        if kernel.op in ATTENTION:
            chosen = ("triton", "as asked")
            stack.enter_context(patch.object(attention_rows, "choose_backend", return_value=chosen))
            for module in (attention, qk_norm_rope):
                stack.enter_context(patch.object(module, "choose_tile", choose_tile))
        cases = [
            Case(arch, *mode, rank) for mode in _modes(kernel, arch) for rank in _ranks(kernel)
        ]
        launches = [launch for case in cases for launch in step_launches(case)]
    found = {launch.kernel.key: launch.kernel for launch in launches if launch.kernel}
    return [each for each in found.values() if _has_tile(each, kernel)]


def _modes(kernel: Kernel, arch: int) -> list[tuple[str, str]]:
    """Returns the storages and products of a step that launches a kernel."""
    if kernel.op == "lora_skinny_8bit":
        return [("bf16", "int8"), ("bf16", "fp8")][: 2 if arch >= 89 else 1]
    if kernel.dtype in ("int8", "fp8"):
        stored = [] if kernel.storage == "nf4" else [(kernel.dtype, kernel.dtype)]
        return [*stored, ("nf4", kernel.dtype)]
    nested = [("nf4-nested", "bf16")] if kernel.storage == "nf4" else []
    return [("nf4" if nested else "bf16", "bf16"), *nested]


def _ranks(kernel: Kernel) -> tuple[int, ...]:
    return (16, 128) if kernel.op.startswith(("lora_skinny", "lora_grads")) else (16,)


def _has_tile(launched, kernel: Kernel) -> bool:
    source = launched.source
    if kernel.op in attention.KERNELS:
        return source.fn is attention.KERNELS[kernel.op]
    if kernel.op == "qk_norm_rope":
        return source.fn.module == qk_norm_rope.__name__
    specs = (value for value in source.constants.values() if hasattr(value, "tile"))
    return any(isinstance(spec.tile, _Candidate) for spec in specs)


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
