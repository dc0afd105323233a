"""Times tiles and ways against those that are shipped, the largest share of a step first.

A job is one question to dispatch. Its tiles are gated once, timed in a few rounds each, and the
best of them again beside the shipped one, interleaved; on a GPU each launch is one CUDA graph, as
in a training step, so that launching from Python is not what is timed. Rows are appended job by
job: a run that is cut short goes on where it stopped, and a tile that failed is not tried again.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.attention import choose_tile, first_row

from bench import timing
from bench.timing import Result
from bench.tune.calls import Call, build
from bench.tune.problems import PRODUCT_DTYPE, Problem
from bench.tune.space import ATTENTION, Kernel, groups, named_tile, tile_name
from fluxfast.model.spec import FluxSpec

SCREEN_ROUNDS, WARMUP = 3, 2
FINALISTS, REGROUPED = 5, 2  # tiles that are timed again; of these, tried with other groups
COMPILED_ROWS = 256  # a kernel's code does not depend on M
STOPPED = "the GPU stopped working in this process"
Rows = list[dict[str, object]]
Timed = list[tuple[Result, dict[str, object]]]  # what a row says beside the result
Precompile = Callable[[Problem, list[str]], None]


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


def shipped_tile(problem: Problem, arch: int):
    """-> the tile that dispatch gives the problem now, and where that comes from."""
    kernel = problem.kernel
    if kernel.op in ATTENTION:
        half = PRODUCT_DTYPE["half"]
        row = first_row("tiles", kernel=kernel.op, arch=arch, dtype="half", c=problem.K)
        return choose_tile(kernel.op, arch, half, problem.K), row["source"]
    question = (PRODUCT_DTYPE[kernel.dtype], kernel.storage, problem.M, problem.N, problem.K)
    choice = dispatch.choose(kernel.op, arch, *question)
    return choice.tile, choice.tile_source


class TileJob:
    """A problem's tiles. kept: those that compile without a spill; build: as `tune_calls.build`."""

    def __init__(
        self, problem: Problem, kept: list, spec: FluxSpec, rank: int, device: str, arch: int,
        rounds: int, build: Callable[..., Call] = build,
    ):  # fmt: skip
        self.problem, self.kept, self.device, self.rounds = problem, kept, device, rounds
        self.spec, self.rank, self.build = spec, rank, build
        self.shipped, self.source = shipped_tile(problem, arch)
        self.default = tile_name(self.shipped)
        self.share, self.trying = problem.share, self.default

    @property
    def identity(self) -> dict[str, object]:
        p = self.problem
        return {"kind": "tile", **p.kernel._asdict(), "m": p.M, "n": p.N, "k": p.K}

    def time(
        self, failed: set[str], precompile: Precompile, alive: Callable[[], bool]
    ) -> Timed:  # fmt: skip
        """The shipped tile, the best ones beside it, and every one that fails; none of `failed`."""
        tiles = {tile_name(tile): tile for tile in (self.shipped, *self.kept)}
        tiles = {name: tile for name, tile in tiles.items() if name not in failed}
        precompile(self.problem, list(tiles))
        call = self.build(self.problem, self.spec, self.rank, self.device)
        reference, gated = call.reference(), set()

        def gate(name: str) -> str | None:
            if name in gated:
                return None
            gated.add(name)
            if not alive():
                return STOPPED
            self.trying = name
            return call.wrong(tiles[name], reference)

        def compare(names: Iterable[str], rounds: int) -> dict[str, Result]:
            works = {name: replayed(partial(call.run, tiles[name]), self.device) for name in names}
            return timing.compare(works, rounds, WARMUP, gate, self.default, self.device)

        screen = compare(tiles, SCREEN_ROUNDS)
        ran = {name: r.median_ms for name, r in screen.items() if r.median_ms is not None}
        best = sorted(ran, key=ran.get)[:FINALISTS]
        others = _regrouped(self.problem.kernel, [tiles[name] for name in best[:REGROUPED]])
        precompile(self.problem, list(others))
        tiles |= others
        finals = dict.fromkeys([self.default] * (self.default in ran) + best + list(others))
        results = {name: r for name, r in screen.items() if name not in ran}
        results |= compare(finals, self.rounds)
        screened = {name: round(ms, 5) for name, ms in ran.items()}
        return [(r, self._said(name, screened)) for name, r in results.items()]

    def _said(self, name: str, screened: dict[str, float]) -> dict[str, object]:
        """What a row says beside the result. screened_ms: of all that ran, once a problem."""
        p, shipped = self.problem, name == self.default
        return {"tile": name, "shipped": shipped, "source": self.source, "linear": p.linear,
                "what": p.what, "share": round(p.share, 5),
                "screened_ms": screened if shipped else None}  # fmt: skip


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
        self._given, self._workers = (spec, rank, device), workers
        self._pool = self._processes()

    def _processes(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"))

    def __call__(self, problem: Problem, names: list[str]) -> None:
        shares = [names[i :: self._workers] for i in range(min(self._workers, len(names)))]
        asked = [self._pool.submit(_launch_each, problem, s, *self._given) for s in shares]
        # what went wrong becomes a row when this process comes to it; theirs may be of no more use
        if any([one.exception() for one in asked]):
            self.close()
            self._pool = self._processes()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def read_rows(path: Path) -> Rows:
    """Rows of a .jsonl file; a last line that was cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def sweep(
    jobs: Iterable,
    out: Path,
    where: dict[str, object],
    budget_s: float | None = None,
    precompile: Precompile = lambda problem, names: None,
    alive: Callable[[], bool] = lambda: True,
) -> bool:
    """Run the jobs that `out` has no rows of, and append theirs. where: conditions of every row.

    A job has `share`, `identity`, `default` (what is shipped), `trying` (what was launched last)
    and `time(failed, precompile, alive)`. budget_s: no job begins after so many seconds. alive:
    whether the device still works; one that a tile has broken ends the sweep, and only that tile's
    failure is written down. -> whether it still worked.
    """
    deadline = None if budget_s is None else time.monotonic() + budget_s
    for job in sorted(jobs, key=lambda job: -job.share):
        before = [row for row in read_rows(out) if _same(row, job.identity | _held(where))]
        if any(row["shipped"] for row in before):
            continue
        if deadline is not None and time.monotonic() >= deadline:
            print("the budget is spent: run again to go on", file=sys.stderr)
            return True
        failed = {row["name"] for row in before}
        try:
            timed = job.time(failed, precompile, alive)
        except Exception as error:  # a problem that does not fit is a row too
            timed = [(Result(job.default), {"tile": job.default, "shipped": True})]
            if alive():
                timing.fail(timed[0][0], error)
        broken = not alive()
        if broken:  # whatever came after the one that broke it failed for no fault of its own
            result = Result(job.trying, "failed", STOPPED)
            timed = [(result, {"tile": job.trying, "shipped": job.trying == job.default})]
        timing.append_rows(out, [
            timing.row(result, bench="tune", **job.identity, **more, warmup=WARMUP,
                       interleaved=True, **where)
            for result, more in timed
        ])  # fmt: skip
        print(_line(job, timed), file=sys.stderr, flush=True)
        if broken:
            print(f"{STOPPED}: run again", file=sys.stderr)
            return False
    return True


def _held(where: dict[str, object]) -> dict[str, object]:
    """The conditions under which a row is not measured again."""
    return {key: where[key] for key in ("arch", "device_name", "triton")}


def _same(row: dict, wanted: dict) -> bool:
    return all(row.get(key) == value for key, value in wanted.items())


def _line(job, timed: Timed) -> str:
    name = " ".join(str(value) for value in job.identity.values())
    ran = [r for r, _ in timed if r.median_ms is not None]
    if not ran:
        return f"{name}: " + "; ".join(f"{r.name} {r.status}: {r.reason}" for r, _ in timed)
    best = min(ran, key=lambda r: r.median_ms)
    ratio = "" if best.ratio is None else f", {best.ratio:.2f} of {job.default}"
    return f"{name}: {best.name} {best.median_ms:.3f} ms{ratio}, {len(timed) - len(ran)} failed"
