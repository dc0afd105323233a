"""Times tiles and ways against those that are shipped, the largest share of a step first.

A job is one question to dispatch. Its tiles are gated, timed in a few rounds each, and the best of
them again beside the shipped one, interleaved; on a GPU each launch is one CUDA graph, as in a
training step, so that launching from Python is not what is timed. Rows are appended job by job: a
run that is cut short resumes where it stopped, and a tile that failed is not tried again.
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
from bench.rows import Row, cut_unfinished, read
from bench.terminal import say
from bench.timing import Result
from bench.tune.calls import build
from bench.tune.problems import MATMUL_DTYPE, Problem
from bench.tune.space import ATTENTION, groups, named_tile, tile_name
from fluxfast.model.spec import FluxSpec

SCREEN_ROUNDS, WARMUP = 3, 2
FINALISTS, REGROUPED = 5, 2  # tiles that are timed again; of these, tried with other groups
COMPILED_ROWS = 256  # a kernel's code does not depend on M
STOPPED = "the GPU stopped working in this process"


class Target(NamedTuple):
    """What all jobs of a sweep share. precompile(problem, tile names): compiles them ahead. alive:
    whether this process can still use the GPU."""

    spec: FluxSpec
    rank: int
    device: str
    arch: int
    rounds: int
    precompile: Callable[[Problem, list[str]], None] = lambda problem, names: None
    alive: Callable[[], bool] = lambda: True


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
    """One question to dispatch, whose `time(failed)` times every answer but those that `failed`.

    identity: the fields of its rows that no other job has. share: of a step's time. default: the
    name of what is shipped. trying: what was launched last, to blame where it stops the GPU.
    """

    def __init__(self, identity: Row, share: float, default: str, target: Target):
        self.identity, self.share, self.default, self.target = identity, share, default, target
        self.trying = default

    def compare(
        self, runs: dict, error: Callable[[str], str | None], rounds: int, baseline: str
    ) -> dict[str, Result]:
        """Times the runs, as CUDA graphs, in which `error(name)` finds nothing wrong."""

        def gate(name: str) -> str | None:
            if not self.target.alive():
                return STOPPED
            self.trying = name
            return error(name)

        device = self.target.device
        runs = {name: replayed(work, device) for name, work in runs.items()}
        return timing.compare(runs, rounds, WARMUP, gate, baseline, device)


class TileJob(Job):
    """A problem's tiles. candidates: those that compile without a spill."""

    build = staticmethod(build)

    def __init__(self, problem: Problem, candidates: list, target: Target):
        self.problem, self.candidates = problem, candidates
        kernel, M, N, K = problem.kernel, problem.M, problem.N, problem.K
        if kernel.op in ATTENTION:
            self.shipped = choose_tile(kernel.op, target.arch, MATMUL_DTYPE["half"], K)
            row = first_row("tiles", kernel=kernel.op, arch=target.arch, dtype="half", c=K)
            self.source = row["source"]
        else:
            question = (MATMUL_DTYPE[kernel.dtype], kernel.storage, M, N, K)
            choice = dispatch.choose(kernel.op, target.arch, *question)
            self.shipped, self.source = choice.tile, choice.tile_source
        identity = {"kind": "tile", **kernel._asdict(), "m": M, "n": N, "k": K}
        super().__init__(identity, problem.share, tile_name(self.shipped), target)

    def time(self, failed: set[str]) -> list[Result]:
        """The shipped tile, the best ones beside it, and every one that fails."""
        problem, target = self.problem, self.target
        tiles = {tile_name(tile): tile for tile in (self.shipped, *self.candidates)}
        tiles = {name: tile for name, tile in tiles.items() if name not in failed}
        target.precompile(problem, list(tiles))
        call = self.build(problem, target.spec, target.rank, target.device)
        reference = call.reference()

        def error(name: str) -> str | None:
            return call.error(tiles[name], reference)

        def compare(names: Iterable[str], rounds: int) -> dict[str, Result]:
            runs = {name: partial(call.run, tiles[name]) for name in names}
            return self.compare(runs, error, rounds, self.default)

        screen = compare(tiles, SCREEN_ROUNDS)
        ran = {name: r.median_ms for name, r in screen.items() if r.median_ms is not None}
        best = sorted(ran, key=ran.get)[:FINALISTS]
        # the same tiles with every other group_m
        regrouped = [
            replace(tiles[name], group_m=group)
            for name in best[:REGROUPED]
            for group in groups(problem.kernel)
        ]
        others = {tile_name(tile): tile for tile in regrouped if tile_name(tile) not in best}
        target.precompile(problem, list(others))
        tiles |= others
        finals = dict.fromkeys([self.default] * (self.default in ran) + best + list(others))
        results = {name: r for name, r in screen.items() if name not in ran}
        results |= compare(finals, target.rounds)
        fields = {"source": self.source, "linear": problem.linear, "what": problem.pass_name}
        fields |= {"share": round(problem.share, 5)}
        screened = {name: round(ms, 5) for name, ms in ran.items()}
        for name, result in results.items():
            shipped = name == self.default
            own = {"tile": name, "shipped": shipped, "screened_ms": screened if shipped else None}
            result.details = fields | own
        return list(results.values())


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


def sweep(jobs: Iterable[Job], out: Path, conditions: Row, budget_s: float | None = None) -> bool:
    """Runs the jobs that `out` has no rows of, and appends theirs, with the conditions.

    budget_s: no job begins after so many seconds. A device that a tile has broken ends the sweep,
    and only that tile's failure is written down. Returns whether the device still works.
    """
    deadline = None if budget_s is None else time.monotonic() + budget_s
    cut_unfinished(out)
    same = {key: conditions[key] for key in ("arch", "device_name", "triton")}
    for job in sorted(jobs, key=lambda job: -job.share):
        wanted = job.identity | same
        before = [row for row in read(out) if wanted.items() <= row.items()]
        if any(row["shipped"] for row in before):
            continue
        if deadline is not None and time.monotonic() >= deadline:
            say("the budget is spent: run again to continue")
            return True
        try:
            results = job.time({row["name"] for row in before})
        except Exception as error:  # a problem that does not fit is a row too
            results = [Result(job.default, details={"tile": job.default, "shipped": True})]
            timing.fail(results[0], error)
        broken = not job.target.alive()
        if broken:  # what followed the one that broke it is not to blame
            details = {"tile": job.trying, "shipped": job.trying == job.default}
            results = [Result(job.trying, "failed", STOPPED, details=details)]
        fields = {"bench": "tune", **job.identity, "warmup": WARMUP, "interleaved": True}
        timing.append_rows(out, [timing.row(r, **fields | conditions) for r in results])
        say(_line(job, results))
        if broken:
            say(f"{STOPPED}: run again")
            return False
    return True


def _line(job: Job, results: list[Result]) -> str:
    name = " ".join(str(value) for value in job.identity.values())
    ran = [r for r in results if r.median_ms is not None]
    if not ran:
        return f"{name}: " + "; ".join(f"{r.name} {r.status}: {r.reason}" for r in results)
    best = min(ran, key=lambda r: r.median_ms)
    ratio = "" if best.ratio is None else f", {best.ratio:.2f} of {job.default}"
    return f"{name}: {best.name} {best.median_ms:.3f} ms{ratio}, {len(results) - len(ran)} failed"
