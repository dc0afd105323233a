"""The sweep's control flow without a GPU: what is timed, refused, written down, not repeated."""

import json
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch
from fluxfast_kernels.dispatch import dispatch
from tuning import LINEAR1, NOW, RANK, TINY, WHERE, clock, nothing, yes  # noqa: F401  (a fixture)

from bench.rows import read
from bench.timing import Result
from bench.tune import cli as tune
from bench.tune import sweep as tune_sweep
from bench.tune import tiles as tune_tiles
from bench.tune.calls import Call
from bench.tune.problems import Problem
from bench.tune.space import Kernel, named_tile, tile_name
from bench.tune.sweep import (
    SCREEN_ROUNDS,
    WARMUP,
    Precompiler,
    Target,
    TileJob,
    sweep,
)
from bench.tune.ways import BackendJob, HandOverJob
from fluxfast.memory.planner.cards import card

KERNEL = Kernel("lora_gemm", "dense", "half")
SHIPPED = named_tile(KERNEL, "128x128x64.8w3")
TRUTH = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("clock")


class Op:
    """Stands in for a launch: milliseconds by tile, or what goes wrong."""

    def __init__(self, **by_stages):
        """by_stages: w3=2.0 takes 2 ms, w4=ValueError("...") raises, w2="wrong" gives others."""
        self.y, self.by_stages, self.ran = torch.empty_like(TRUTH), by_stages, []

    def run(self, tile):
        self.ran.append(tile_name(tile))
        does = self.by_stages[f"w{tile.num_stages}"]
        if isinstance(does, Exception):
            raise does
        self.y.copy_(TRUTH * 2 if does == "wrong" else TRUTH)
        NOW[0] += 0 if does == "wrong" else does / 1e3

    def build(self, problem, spec, rank, device):
        return Call(self.run, [self.y], lambda: [TRUTH])


def tiles(*stages):
    return [named_tile(KERNEL, f"64x64x32.4w{n}") for n in stages]


def job(op, kept, share=0.5, M=4608):
    problem = Problem(KERNEL, M, 21504, 3072, LINEAR1, "product", share)
    one = TileJob(problem, kept, Target(TINY, RANK, "cpu", 89, 5))
    one.build = op.build
    return one


def timed_by(op, *stages, failed=()):
    """-> results by tile, what their rows say, of a job of 5 rounds."""
    timed = job(op, tiles(*stages)).time(set(failed), nothing, yes)
    return {r.name: r for r, _ in timed}, {r.name: more for r, more in timed}


def named(*stages, group=8):
    return [f"64x64x32.4w{n}g{group}" for n in stages]


DEFAULT = tile_name(SHIPPED)
REGROUPED_DEFAULT = ["128x128x64.8w3g4", "128x128x64.8w3g16"]


def test_the_best_are_timed_again_beside_the_shipped_one():
    op = Op(w2=1, w3=6, w4=2, w5=3, w6=4, w7=9, w8=9)
    results, said = timed_by(op, 2, 4, 5, 6, 7, 8)
    # of the best two other groups; the slow ones are not timed again, but their times are kept
    assert set(results) == {
        DEFAULT,
        *named(2, 4, 5, 6),
        *named(2, 4, group=4),
        *named(2, 4, group=16),
    }
    assert results[DEFAULT].ratio == 1
    assert results[named(2)[0]].ratio == pytest.approx(1 / 6)
    assert said[DEFAULT]["screened_ms"] == pytest.approx(
        dict(zip([DEFAULT, *named(2, 4, 5, 6, 7, 8)], (6, 1, 2, 3, 4, 9, 9), strict=True))
    )
    assert said[named(2)[0]]["screened_ms"] is None
    assert all(len(r.times_ms) == 5 for r in results.values())
    assert op.ran.count(named(8)[0]) == 1 + WARMUP + SCREEN_ROUNDS
    assert op.ran.count(named(2)[0]) == 1 + 2 * WARMUP + SCREEN_ROUNDS + 5  # gated once


def test_failures_are_results_and_end_nothing():
    oom = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    op = Op(w2=RuntimeError("out of resource: shared memory"), w3=2, w4=oom, w5="wrong", w6=1)
    results, _ = timed_by(op, 2, 4, 5, 6)
    two, four, five, six = (results[name] for name in named(2, 4, 5, 6))
    assert two.status == five.status == "gate failed" and four.status == "out of memory"
    assert six.status == results[DEFAULT].status == "ok"
    assert "shared memory" in two.reason and "of its norm" in five.reason
    assert op.ran.count(named(5)[0]) == 1  # what is wrong is not timed


def test_a_tile_that_writes_nothing_is_refused():
    """Its results would be those of the tile before it."""
    op = Op(w3=1, w4=1)
    one = job(op, tiles(4))
    one.build = lambda *given: Call(
        lambda tile: op.run(tile) if tile.num_stages == 3 else None, [op.y], lambda: [TRUTH]
    )
    assert {r.name: r.status for r, _ in one.time(set(), nothing, yes)} == {
        DEFAULT: "ok",
        named(4)[0]: "gate failed",
        **dict.fromkeys(REGROUPED_DEFAULT, "ok"),
    }


def test_where_the_shipped_tile_fails_the_others_are_timed():
    results, said = timed_by(Op(w3=RuntimeError("no"), w4=1), 4)
    assert results[DEFAULT].status == "gate failed" and said[DEFAULT]["shipped"]
    assert results[named(4)[0]].median_ms and results[named(4)[0]].ratio is None


def test_rows_say_what_was_asked_and_under_which_conditions(tmp_path):
    out, op = tmp_path / "rows.jsonl", Op(w3=2, w4=1)
    assert sweep([job(op, tiles(4))], out, WHERE)
    rows = read(out)
    shipped = next(row for row in rows if row["shipped"])
    assert shipped["name"] == shipped["tile"] == tile_name(SHIPPED)
    assert shipped["source"].startswith("assumed: ") and shipped["screened_ms"]
    for row in rows:
        assert row["bench"] == "tune" and row["kind"] == "tile" and row["rounds"] == 5
        assert (row["op"], row["storage"], row["dtype"]) == KERNEL
        assert (row["m"], row["n"], row["k"]) == (4608, 21504, 3072)
        assert row["linear"] == LINEAR1 and row["interleaved"] and row.items() >= WHERE.items()


def test_what_has_rows_is_not_measured_again(tmp_path):
    out, op = tmp_path / "rows.jsonl", Op(w3=2, w4=1)
    sweep([job(op, tiles(4))], out, WHERE)
    text, ran = out.read_text(), len(op.ran)
    sweep([job(op, tiles(4))], out, WHERE | {"commit": "another", "date": "2027-01-01"})
    assert out.read_text() == text and len(op.ran) == ran
    # another card, another Triton, another M are other questions
    for where, M in (
        (WHERE | {"device_name": "b"}, 4608),
        (WHERE | {"triton": "3.8"}, 4608),
        (WHERE, 512),
    ):
        before = len(read(out))
        sweep([job(op, tiles(4), M=M)], out, where)
        assert len(read(out)) > before


def test_a_line_that_was_cut_short_is_measured_again(tmp_path):
    out, op = tmp_path / "rows.jsonl", Op(w3=2, w4=1)
    sweep([job(op, tiles(4))], out, WHERE)
    lines = out.read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if json.loads(line)["shipped"])
    out.write_text("\n".join([*lines[:index], *lines[index + 1 :], lines[index][:40]]))
    sweep([job(op, tiles(4))], out, WHERE)
    assert any(row["shipped"] for row in read(out))


def test_the_largest_share_goes_first_and_the_budget_ends_it(tmp_path, capsys):
    out, op = tmp_path / "rows.jsonl", Op(w3=5, w4=5)
    asked = [job(op, tiles(4), share, M) for share, M in ((0.1, 512), (0.9, 4608), (0.5, 1536))]
    assert sweep(asked, out, WHERE, budget_s=0.05)
    assert {row["m"] for row in read(out)} == {4608}
    assert "budget" in capsys.readouterr().err
    assert sweep(asked, out, WHERE, budget_s=60)
    assert list(dict.fromkeys(row["m"] for row in read(out))) == [4608, 1536, 512]
    sweep(asked, out, WHERE, budget_s=0.0)
    assert "budget" not in capsys.readouterr().err  # nothing was left


def test_a_problem_that_cannot_be_built_is_a_row(tmp_path, capsys):
    out, op = tmp_path / "rows.jsonl", Op(w3=1, w4=1)

    def build(*given):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    broken = job(op, tiles(4), share=0.9)
    broken.build = build
    assert sweep([broken, job(op, tiles(4), M=512)], out, WHERE)
    rows = read(out)
    assert (rows[0]["status"], rows[0]["m"], rows[0]["shipped"]) == ("out of memory", 4608, True)
    assert {row["m"] for row in rows} == {4608, 512}
    assert "out of memory" in capsys.readouterr().err


def test_a_tile_that_breaks_the_gpu_is_written_down_and_not_tried_again(tmp_path):
    """After an illegal access everything fails in a process: only what did it is to blame."""
    out, broken = tmp_path / "rows.jsonl", []
    op = Op(w3=1, w4=1, w5=1, w6=1)

    def run(tile):
        if tile.num_stages == 5:
            broken.append(tile)
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        op.run(tile)

    def asked():
        one = job(op, tiles(4, 5, 6))
        one.build = lambda *given: Call(run, [op.y], lambda: [TRUTH])
        return one

    later = job(op, tiles(4), share=0.1, M=512)
    assert not sweep([asked(), later], out, WHERE, alive=lambda: not broken)
    (row,) = read(out)
    assert (row["name"], row["status"], row["shipped"]) == ("64x64x32.4w5g8", "failed", False)
    broken.clear()  # a new process
    assert sweep([asked(), later], out, WHERE, alive=lambda: not broken)
    rows = read(out)
    assert {row["m"] for row in rows} == {4608, 512}
    assert [row["name"] for row in rows].count("64x64x32.4w5g8") == 1
    assert {"64x64x32.4w4g8", "64x64x32.4w6g8"} <= {row["name"] for row in rows if row["median_ms"]}


def test_what_breaks_the_gpu_is_known_where_even_its_failure_cannot_be_handled(tmp_path):
    out, broken = tmp_path / "rows.jsonl", []
    one = job(Op(), tiles(4))

    def time_of(*given):
        one.trying = "64x64x32.4w4g8"
        broken.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    one.time = time_of
    assert not sweep([one], out, WHERE, alive=lambda: not broken)
    (row,) = read(out)
    assert (row["name"], row["shipped"]) == ("64x64x32.4w4g8", False)


class Pool:
    """Stands in for processes: runs nothing, fails as told."""

    made = []

    def __init__(self, workers, context):
        self.asked, self.open, self.error = [], True, None
        Pool.made.append(self)

    def submit(self, function, problem, names, *given):
        self.asked.append(names)
        return SimpleNamespace(exception=lambda: self.error)

    def shutdown(self, cancel_futures):
        self.open = False


def test_tiles_are_shared_among_the_processes_that_compile(monkeypatch):
    monkeypatch.setattr(tune_sweep, "ProcessPoolExecutor", Pool)
    Pool.made = []
    ahead = Precompiler(2, TINY, RANK, "cuda")
    ahead(None, list("abcde"))
    ahead(None, ["f"])
    assert Pool.made[0].asked == [["a", "c", "e"], ["b", "d"], ["f"]]
    Pool.made[0].error = BrokenProcessPool()  # a tile took its process with it
    ahead(None, ["g"])
    assert len(Pool.made) == 2 and [pool.open for pool in Pool.made] == [False, True]
    ahead.close()
    assert not Pool.made[1].open


def test_a_process_that_compiles_survives_tiles_that_fail(monkeypatch):
    op, seen = Op(w2=1, w3=RuntimeError("no"), w4=1), []
    monkeypatch.setattr(
        tune_sweep,
        "build",
        lambda problem, *given: (seen.append(problem.M), op.build(*[None] * 4))[1],
    )
    problem = job(op, []).problem
    names = [f"64x64x32.4w{n}g8" for n in (2, 3, 4)]
    tune_sweep._launch_each(problem, names, TINY, RANK, "cpu")
    assert op.ran == names and seen == [tune_sweep.COMPILED_ROWS]


def test_tiles_are_compiled_ahead_but_for_those_that_failed():
    op, asked = Op(w3=2, w4=1, w5=1), []
    one = job(op, tiles(4, 5))
    one.time(set(named(5)), lambda problem, names: asked.append((problem, names)), yes)
    others = [*named(4, group=4), *named(4, group=16), *REGROUPED_DEFAULT]
    assert asked == [(one.problem, [DEFAULT, *named(4)]), (one.problem, others)]
    assert named(5)[0] not in op.ran


def options(tmp_path, *words):
    return tune.parse(["sweep", "--out", str(tmp_path / "rows.jsonl"), *words])


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A list of tiles of sm_89 with two of each product."""
    names = {"64x64x32.4w2": "kept", "64x64x32.4w3": "spills"}
    tune_tiles.save(tmp_path / "sm_89.json", 89, "3.7.1", {str(KERNEL): names})
    monkeypatch.setattr(tune_tiles, "FOLDER", tmp_path)


def test_the_jobs_of_a_card(tmp_path, listed):
    found = tune.jobs(options(tmp_path, "--pixels", "1024"), 89, card("RTX 4090"), WHERE)
    by_kind = {
        kind: [one for one in found if isinstance(one, kind)]
        for kind in (TileJob, HandOverJob, BackendJob)
    }
    assert all(by_kind.values()) and [one.T for one in by_kind[BackendJob]] == [4608]
    assert len({json.dumps(one.identity) for one in found}) == len(found)
    first = sorted(found, key=lambda one: -one.share)[1]
    assert tile_name(first.shipped) == "128x128x64.8w3g8"
    assert [tile_name(tile) for tile in first.candidates] == ["64x64x32.4w2g8"]
    # a hand-over waits for the tiles of its product
    order = sorted(found, key=lambda one: -one.share)
    for one in by_kind[HandOverJob]:
        for tiles_of in by_kind[TileJob]:
            p = tiles_of.problem
            same = (p.kernel, p.N, p.K) == (one.pair.kernel, one.pair.N, one.pair.K)
            assert not same or "mod" in p.linear or order.index(tiles_of) < order.index(one)
    assert one.measured()["tiles"] == dispatch.tables(89)[0]["tiles"]
    only = tune.jobs(options(tmp_path, "--op", "gemm_8bit.dense.int8"), 89, card("4090"), WHERE)
    assert {one.identity["op"] for one in only} == {"gemm_8bit"}


def test_without_a_list_the_command_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tune_tiles, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"sm_89.json[\s\S]*candidates --arch 89"):
        tune.jobs(options(tmp_path), 89, card("RTX 4090"), WHERE)


def test_without_a_gpu_the_command_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["sweep", "--out", str(tmp_path / "rows.jsonl")]) == 1
    assert "GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("works", [True, False])
def test_the_exit_code_says_whether_the_gpu_still_works(works, tmp_path, listed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "arch_of", lambda device: 89)
    monkeypatch.setattr(tune.timing, "conditions", lambda device: dict(WHERE))
    monkeypatch.setattr(tune, "known_card", lambda device: card("RTX 4090"))
    monkeypatch.setattr(tune, "alive", lambda: works)
    done = []

    def time_of(self, *given):
        done.append(self.identity)
        return [(Result(self.default), {"tile": self.default, "shipped": True})]

    monkeypatch.setattr(TileJob, "time", time_of)
    arguments = [
        "sweep",
        "--op",
        str(KERNEL),
        "--pixels",
        "512",
        "--workers",
        "1",
        "--out",
        str(tmp_path / "rows.jsonl"),
    ]
    monkeypatch.setattr(
        tune,
        "HandOverJob",
        lambda *given: SimpleNamespace(
            share=0.0, identity={"kind": "x"}, default="", trying="", time=lambda *_: []
        ),
    )
    assert tune.main(arguments) == (0 if works else 1)
    assert len(done) == (10 if works else 1)
