"""Times tiles and ways against those that are shipped, the largest share of a step first.

A job is one question to dispatch. Its tiles are gated once, timed in a few rounds each, and the
best of them again beside the shipped one, interleaved; on a GPU each launch is one CUDA graph, as
in a training step, so that launching from Python is not what is timed. Rows are appended job by
job: a run that is cut short resumes where it stopped, and a tile that failed is not tried again.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.attention import choose_tile, first_row

from bench import timing
from bench.rows import cut_unfinished, read
from bench.terminal import say
from bench.timing import Result
from bench.tune.calls import Call, build
from bench.tune.problems import PRODUCT_DTYPE, Problem
from bench.tune.space import ATTENTION, Kernel, groups, named_tile, tile_name
from fluxfast.model.spec import FluxSpec

SCREEN_ROUNDS, WARMUP = 3, 2
FINALISTS, REGROUPED = 5, 2  # tiles that are timed again; of these, tried with other groups
COMPILED_ROWS = 256  # a kernel's code does not depend on M
STOPPED = "the GPU stopped working in this process"
Timed = list[tuple[Result, dict[str, object]]]  # results, each with further fields of its row
Precompile = Callable[[Problem, list[str]], None]
Alive = Callable[[], bool]


class Target(NamedTuple):
    """What the jobs of a sweep have in common."""

    spec: FluxSpec
    rank: int
    device: str
    arch: int
    rounds: int


def replayed(work: Callable[[], object], device: str) -> Callable[[], object]:
    """`work` as one CUDA graph, recorded when it is first called; on a CPU `work` itself."""
    if torch.device(device).type != "cuda":
        return work
    graph = None

    def run() -> None:
        nonlocal graph
        if graph is None:
            work()  # compiles, and grows the scratch, which a recording could not
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
        graph.replay()

    return run


class Job:
    """share: of a step's time. default: the name of what is shipped. trying: what was launched
    last, to blame where it stops the GPU. A job has `identity`, the fields of a row that tell it
    from others, and `time`, which leaves out what has `failed` before.
    """

    def __init__(self, share: float, default: str, target: Target):
        self.share, self.default, self.trying, self.target = share, default, default, target

    def gated(self, name: str, alive: Alive, check: Callable[[], str | None]) -> str | None:
        if not alive():
            return STOPPED
        self.trying = name
        return check()

    def compare(self, works: dict, rounds: int, gate: Callable, baseline: str) -> dict[str, Result]:
        """works: replayed as CUDA graphs."""
        device = self.target.device
        works = {name: replayed(work, device) for name, work in works.items()}
        return timing.compare(works, rounds, WARMUP, gate, baseline, device)


def shipped_tile(problem: Problem, arch: int):
    """The tile that dispatch gives the problem now, and the source of that."""
    kernel = problem.kernel
    if kernel.op in ATTENTION:
        row = first_row("tiles", kernel=kernel.op, arch=arch, dtype="half", c=problem.K)
        return choose_tile(kernel.op, arch, PRODUCT_DTYPE["half"], problem.K), row["source"]
    question = (PRODUCT_DTYPE[kernel.dtype], kernel.storage, problem.M, problem.N, problem.K)
    choice = dispatch.choose(kernel.op, arch, *question)
    return choice.tile, choice.tile_source


class TileJob(Job):
    """A problem's tiles. candidates: those that compile without a spill."""

    build: Callable[..., Call] = staticmethod(build)

    def __init__(self, problem: Problem, candidates: list, target: Target):
        self.problem, self.candidates = problem, candidates
        self.shipped, self.source = shipped_tile(problem, target.arch)
        super().__init__(problem.share, tile_name(self.shipped), target)

    @property
    def identity(self) -> dict[str, object]:
        p = self.problem
        return {"kind": "tile", **p.kernel._asdict(), "m": p.M, "n": p.N, "k": p.K}

    def time(self, failed: set[str], precompile: Precompile, alive: Alive) -> Timed:
        """The shipped tile, the best ones beside it, and every one that fails."""
        tiles = {tile_name(tile): tile for tile in (self.shipped, *self.candidates)}
        tiles = {name: tile for name, tile in tiles.items() if name not in failed}
        precompile(self.problem, list(tiles))
        call = self.build(self.problem, self.target.spec, self.target.rank, self.target.device)
        reference, passed = call.reference(), set()

        def gate(name: str) -> str | None:
            if name in passed:
                return None
            passed.add(name)
            return self.gated(name, alive, lambda: call.wrong(tiles[name], reference))

        def compare(names: Iterable[str], rounds: int) -> dict[str, Result]:
            works = {name: partial(call.run, tiles[name]) for name in names}
            return self.compare(works, rounds, gate, self.default)

        screen = compare(tiles, SCREEN_ROUNDS)
        ran = {name: r.median_ms for name, r in screen.items() if r.median_ms is not None}
        best = sorted(ran, key=ran.get)[:FINALISTS]
        others = _regrouped(self.problem.kernel, [tiles[name] for name in best[:REGROUPED]])
        precompile(self.problem, list(others))
        tiles |= others
        finals = dict.fromkeys([self.default] * (self.default in ran) + best + list(others))
        results = {name: r for name, r in screen.items() if name not in ran}
        results |= compare(finals, self.target.rounds)
        screened = {name: round(ms, 5) for name, ms in ran.items()}
        return [(r, self._fields(name, screened)) for name, r in results.items()]

    def _fields(self, name: str, screened: dict[str, float]) -> dict[str, object]:
        """screened_ms: of all that ran, once a problem."""
        p, shipped = self.problem, name == self.default
        asked = {"linear": p.linear, "what": p.what, "share": round(p.share, 5)}
        fields = {"tile": name, "shipped": shipped, "source": self.source, **asked}
        return fields | {"screened_ms": screened if shipped else None}


def _regrouped(kernel: Kernel, tiles: list) -> dict[str, object]:
    """The same tiles with every other group_m, by name."""
    found = [replace(tile, group_m=group) for tile in tiles for group in groups(kernel)]
    return {tile_name(tile): tile for tile in found if tile not in tiles}


def _launch_each(
    problem: Problem, names: list[str], spec: FluxSpec, rank: int, device: str
) -> None:
    """In a process of its own: leaves the compiled kernels in Triton's cache on disk."""
    call = build(replace(problem, M=COMPILED_ROWS), spec, rank, device)
    for name in names:
        try:
            call.run(named_tile(problem.kernel, name))
        except Exception:  # a row when it is timed
            continue
    timing.synchronize(device)
    torch.cuda.empty_cache()


class Precompiler:
    """Compiles a problem's tiles in several processes before this one asks for them."""

    def __init__(self, workers: int, spec: FluxSpec, rank: int, device: str):
        self._layer, self._workers = (spec, rank, device), workers
        self._pool = self._processes()

    def _processes(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"))

    def __call__(self, problem: Problem, names: list[str]) -> None:
        shares = [names[i :: self._workers] for i in range(min(self._workers, len(names)))]
        asked = [self._pool.submit(_launch_each, problem, s, *self._layer) for s in shares]
        # an error becomes a row when this process comes to it; the pool may be of no more use
        if any([one.exception() for one in asked]):
            self.close()
            self._pool = self._processes()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def sweep(
    jobs: Iterable[Job],
    out: Path,
    where: dict[str, object],
    budget_s: float | None = None,
    precompile: Precompile = lambda problem, names: None,
    alive: Alive = lambda: True,
) -> bool:
    """Run the jobs that `out` has no rows of, and append theirs. where: conditions of every row.

    budget_s: no job begins after so many seconds. alive: a device that a tile has broken ends the
    sweep, and only that tile's failure is written down. Returns whether the device still works.
    """
    deadline = None if budget_s is None else time.monotonic() + budget_s
    cut_unfinished(out)
    held = {key: where[key] for key in ("arch", "device_name", "triton")}
    for job in sorted(jobs, key=lambda job: -job.share):
        wanted = job.identity | held
        before = [row for row in read(out) if wanted.items() <= row.items()]
        if any(row["shipped"] for row in before):
            continue
        if deadline is not None and time.monotonic() >= deadline:
            say("the budget is spent: run again to go on")
            return True
        try:
            timed = job.time({row["name"] for row in before}, precompile, alive)
        except Exception as error:  # a problem that does not fit is a row too
            timed = [(Result(job.default), {"tile": job.default, "shipped": True})]
            if alive():
                timing.fail(timed[0][0], error)
        broken = not alive()
        if broken:  # what followed the one that broke it is not to blame
            result = Result(job.trying, "failed", STOPPED)
            timed = [(result, {"tile": job.trying, "shipped": job.trying == job.default})]
        fields = {"bench": "tune", **job.identity, "warmup": WARMUP, "interleaved": True, **where}
        timing.append_rows(out, [timing.row(result, **fields | more) for result, more in timed])
        say(_line(job, timed))
        if broken:
            say(f"{STOPPED}: run again")
            return False
    return True


def _line(job: Job, timed: Timed) -> str:
    name = " ".join(str(value) for value in job.identity.values())
    ran = [r for r, _ in timed if r.median_ms is not None]
    if not ran:
        return f"{name}: " + "; ".join(f"{r.name} {r.status}: {r.reason}" for r, _ in timed)
    best = min(ran, key=lambda r: r.median_ms)
    ratio = "" if best.ratio is None else f", {best.ratio:.2f} of {job.default}"
    return f"{name}: {best.name} {best.median_ms:.3f} ms{ratio}, {len(timed) - len(ran)} failed"
