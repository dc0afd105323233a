"""The sweep's control flow without a GPU: what is timed, refused, written down, not repeated."""

import json
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from fluxfast_kernels.dispatch import dispatch
from tuning import CONDITIONS, LINEAR1, NOW, RANK, TINY, clock, target  # noqa: F401  (a fixture)

from bench.rows import read
from bench.timing import Result
from bench.tune import cli as tune
from bench.tune import sweep as tune_sweep
from bench.tune import tiles as tune_tiles
from bench.tune.calls import Call
from bench.tune.problems import Problem
from bench.tune.space import Kernel, named_tile, tile_name
from bench.tune.sweep import SCREEN_ROUNDS, WARMUP, Job, Precompiler, TileJob, sweep
from bench.tune.ways import BackendJob, HandOverJob
from fluxfast.memory.planner.cards import card
from fluxfast.model.spec import DEV

KERNEL = Kernel("lora_gemm", "dense", "half")
SHIPPED = "128x128x64.8w3g8"
OTHER_GROUPS = ["128x128x64.8w3g4", "128x128x64.8w3g16"]  # of the shipped tile
TRUTH = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
ILLEGAL = RuntimeError("CUDA error: an illegal memory access was encountered")

pytestmark = pytest.mark.usefixtures("clock")


class Op:
    """Stands in for a launch of a tile of so many stages.

    by_stages: w3=2.0 takes 2 ms, w4=ValueError("...") raises, w2="wrong" gives others, w5="none"
    writes nothing; `broken` once an illegal access was made.
    """

    def __init__(self, **by_stages):
        self.y, self.by_stages, self.ran = torch.empty_like(TRUTH), by_stages, []
        self.broken = False

    def run(self, tile):
        self.ran.append(tile_name(tile))
        does = self.by_stages[f"w{tile.num_stages}"]
        self.broken |= does is ILLEGAL
        if self.broken:
            raise ILLEGAL
        if isinstance(does, Exception):
            raise does
        if does != "none":
            self.y.copy_(TRUTH * 2 if does == "wrong" else TRUTH)
        NOW[0] += does / 1e3 if isinstance(does, int) else 0

    def build(self, problem, spec, rank, device):
        return Call(self.run, [self.y], lambda: [TRUTH])

    def job(self, *stages, share=0.5, M=4608, **more):
        """Of tiles with so many stages, and the shipped one."""
        problem = Problem(KERNEL, M, 21504, 3072, LINEAR1, "product", share)
        candidates = [named_tile(KERNEL, f"64x64x32.4w{n}") for n in stages]
        alive = {"alive": lambda: not self.broken}
        job = TileJob(problem, candidates, target(5, **alive | more))
        job.build = self.build
        return job

    def time(self, *stages, failed=()):
        """Results by tile."""
        return {result.name: result for result in self.job(*stages).time(set(failed))}


def named(*stages, group=8):
    return [f"64x64x32.4w{n}g{group}" for n in stages]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "rows.jsonl"


def test_the_best_are_timed_again_beside_the_shipped_one():
    op = Op(w2=1, w3=6, w4=2, w5=3, w6=4, w7=9, w8=9)
    results = op.time(2, 4, 5, 6, 7, 8)
    # of the best two other groups; the slow ones are not timed again, but their times are kept
    others = [*named(2, 4, group=4), *named(2, 4, group=16)]
    assert set(results) == {SHIPPED, *named(2, 4, 5, 6), *others}
    assert results[SHIPPED].ratio == 1
    assert results[named(2)[0]].ratio == pytest.approx(1 / 6)
    assert results[SHIPPED].details["screened_ms"] == pytest.approx(
        dict(zip([SHIPPED, *named(2, 4, 5, 6, 7, 8)], (6, 1, 2, 3, 4, 9, 9), strict=True))
    )
    assert results[named(2)[0]].details["screened_ms"] is None
    assert all(len(r.times_ms) == 5 for r in results.values())
    screened = 1 + WARMUP + SCREEN_ROUNDS
    assert op.ran.count(named(8)[0]) == screened
    assert op.ran.count(named(2)[0]) == screened + 1 + WARMUP + 5


def test_failures_are_results_and_end_nothing():
    oom = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    op = Op(w2=RuntimeError("out of resource: shared memory"), w3=2, w4=oom, w5="wrong", w6=1)
    op.by_stages["w7"] = "none"
    results = op.time(2, 4, 5, 6, 7)
    two, four, five, six, seven = (results[name] for name in named(2, 4, 5, 6, 7))
    assert two.status == five.status == seven.status == "gate failed"
    assert four.status == "out of memory"
    assert six.status == results[SHIPPED].status == "ok"
    assert "shared memory" in two.reason and "of its norm" in five.reason
    assert "errs by inf" in seven.reason  # else its results were those of the tile before it
    assert op.ran.count(named(5)[0]) == 1  # what is wrong is not timed


def test_other_tiles_are_timed_where_the_shipped_one_fails():
    results = Op(w3=RuntimeError("no"), w4=1).time(4)
    assert results[SHIPPED].status == "gate failed" and results[SHIPPED].details["shipped"]
    assert results[named(4)[0]].median_ms and results[named(4)[0]].ratio is None


def test_rows_hold_the_question_and_the_conditions(out):
    assert sweep([Op(w3=2, w4=1).job(4)], out, CONDITIONS)
    rows = read(out)
    shipped = next(row for row in rows if row["shipped"])
    assert shipped["name"] == shipped["tile"] == SHIPPED
    assert shipped["source"].startswith("assumed: ") and shipped["screened_ms"]
    for row in rows:
        assert row["bench"] == "tune" and row["kind"] == "tile" and row["rounds"] == 5
        assert (row["op"], row["storage"], row["dtype"]) == KERNEL
        assert (row["m"], row["n"], row["k"]) == (4608, 21504, 3072)
        assert row["linear"] == LINEAR1 and row["what"] == "product" and row["interleaved"]
        assert row.items() >= CONDITIONS.items()


def test_what_has_rows_is_not_measured_again(out):
    op = Op(w3=2, w4=1)
    sweep([op.job(4)], out, CONDITIONS)
    text, ran = out.read_text(), len(op.ran)
    sweep([op.job(4)], out, CONDITIONS | {"commit": "another", "date": "2027-01-01"})
    assert out.read_text() == text and len(op.ran) == ran
    # another card, another Triton, another M are other questions
    for change, M in (({"device_name": "b"}, 4608), ({"triton": "3.8"}, 4608), ({}, 512)):
        before = len(read(out))
        sweep([op.job(4, M=M)], out, CONDITIONS | change)
        assert len(read(out)) > before


def test_a_line_that_was_cut_short_is_measured_again(out):
    op = Op(w3=2, w4=1)
    sweep([op.job(4)], out, CONDITIONS)
    lines = out.read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if json.loads(line)["shipped"])
    out.write_text("\n".join([*lines[:index], *lines[index + 1 :], lines[index][:40]]))
    sweep([op.job(4)], out, CONDITIONS)
    assert any(row["shipped"] for row in read(out))


def test_the_largest_share_goes_first_and_the_budget_ends_it(out, capsys):
    op = Op(w3=5, w4=5)
    jobs = [op.job(4, share=share, M=M) for share, M in ((0.1, 512), (0.9, 4608), (0.5, 1536))]
    assert sweep(jobs, out, CONDITIONS, budget_s=0.05)
    assert {row["m"] for row in read(out)} == {4608}
    assert "budget" in capsys.readouterr().err
    assert sweep(jobs, out, CONDITIONS, budget_s=60)
    assert list(dict.fromkeys(row["m"] for row in read(out))) == [4608, 1536, 512]
    sweep(jobs, out, CONDITIONS, budget_s=0.0)
    assert "budget" not in capsys.readouterr().err  # nothing was left


def test_a_problem_that_cannot_be_built_is_a_row(out, capsys):
    op = Op(w3=1, w4=1)
    too_large = op.job(4, share=0.9)
    too_large.build = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    assert sweep([too_large, op.job(4, M=512)], out, CONDITIONS)
    rows = read(out)
    assert (rows[0]["status"], rows[0]["m"], rows[0]["shipped"]) == ("out of memory", 4608, True)
    assert {row["m"] for row in rows} == {4608, 512}
    assert "out of memory" in capsys.readouterr().err


def test_a_tile_that_breaks_the_gpu_is_written_down_and_not_tried_again(out):
    """After an illegal access everything fails in a process: only what did it is to blame."""
    op = Op(w3=1, w4=1, w5=ILLEGAL, w6=1)
    jobs = [op.job(4, 5, 6), op.job(4, share=0.1, M=512)]
    assert not sweep(jobs, out, CONDITIONS)
    (row,) = read(out)
    assert (row["name"], row["status"], row["shipped"]) == (named(5)[0], "failed", False)
    op.broken = False  # a new process
    assert sweep(jobs, out, CONDITIONS)
    rows = read(out)
    assert {row["m"] for row in rows} == {4608, 512}
    assert [row["name"] for row in rows].count(named(5)[0]) == 1
    assert {*named(4, 6)} <= {row["name"] for row in rows if row["median_ms"]}


def test_an_error_that_ends_a_job_blames_the_tile_that_broke_the_gpu(out):
    op = Op()
    job = op.job(4)

    def time_of(failed):
        job.trying, op.broken = named(4)[0], True
        raise ILLEGAL

    job.time = time_of
    assert not sweep([job], out, CONDITIONS)
    (row,) = read(out)
    assert (row["name"], row["shipped"]) == (named(4)[0], False)


def test_tiles_are_shared_among_the_processes_that_compile(monkeypatch):
    pools = [Mock(), Mock()]
    monkeypatch.setattr(tune_sweep, "ProcessPoolExecutor", Mock(side_effect=pools))
    submit = pools[0].submit
    submit.return_value.exception.return_value = None
    ahead = Precompiler(2, TINY, RANK, "cuda")
    ahead(None, list("abcde"))
    ahead(None, ["f"])
    assert [call.args[2] for call in submit.call_args_list] == [["a", "c", "e"], ["b", "d"], ["f"]]
    submit.return_value.exception.return_value = BrokenProcessPool()  # a tile ended its process
    ahead(None, ["g"])
    pools[0].shutdown.assert_called_once()
    ahead.close()
    pools[1].shutdown.assert_called_once()


def test_a_process_that_compiles_survives_tiles_that_fail(monkeypatch):
    op, rows = Op(w2=1, w3=RuntimeError("no"), w4=1), []

    def build(problem, *layer):
        rows.append(problem.M)
        return op.build(problem, *layer)

    monkeypatch.setattr(tune_sweep, "build", build)
    tune_sweep._launch_each(op.job().problem, named(2, 3, 4), TINY, RANK, "cpu")
    assert op.ran == named(2, 3, 4) and rows == [tune_sweep.COMPILED_ROWS]


def test_tiles_are_compiled_ahead_but_for_those_that_failed():
    op, asked = Op(w3=2, w4=1, w5=1), []
    one = op.job(4, 5, precompile=lambda problem, names: asked.append((problem, names)))
    one.time(set(named(5)))
    others = [*named(4, group=4), *named(4, group=16), *OTHER_GROUPS]
    assert asked == [(one.problem, [SHIPPED, *named(4)]), (one.problem, others)]
    assert named(5)[0] not in op.ran


VERDICTS = {str(KERNEL): {"64x64x32.4w2": "kept", "64x64x32.4w3": "spills"}}


def jobs_of(*words) -> list[Job]:
    options = tune.parse(["sweep", "--out", "none.jsonl", *words])
    of = target(20)._replace(spec=DEV)
    return tune.jobs(options, of, card("RTX 4090"), VERDICTS, "a card")


def test_the_jobs_of_a_card():
    found = jobs_of("--pixels", "1024")
    tiles, hand_overs, backends = (
        [one for one in found if isinstance(one, kind)]
        for kind in (TileJob, HandOverJob, BackendJob)
    )
    assert tiles and hand_overs and [one.T for one in backends] == [4608]
    assert len({json.dumps(one.identity) for one in found}) == len(found)
    order = sorted(found, key=lambda one: -one.share)
    assert tile_name(order[1].shipped) == SHIPPED
    assert [tile_name(tile) for tile in order[1].candidates] == named(2)
    for one in hand_overs:  # each waits for the tiles of its product
        for tile in tiles:
            p = tile.problem
            same = (p.kernel, p.N, p.K) == (one.pair.kernel, one.pair.N, one.pair.K)
            assert not same or "mod" in p.linear or order.index(tile) < order.index(one)
    assert hand_overs[0].measured()["tiles"] == dispatch.tables(89)[0]["tiles"]
    assert {one.identity["op"] for one in jobs_of("--op", "gemm_8bit.dense.int8")} == {"gemm_8bit"}
    pair = jobs_of("--op", "gemm_8bit_dx")
    assert {one.identity["op"] for one in pair} == {"gemm_8bit_dx", "gemm_8bit_dx_pair"}


def test_without_a_gpu_sweep_refuses(out, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["sweep", "--out", str(out)]) == 1
    assert "GPU" in capsys.readouterr().err and not out.exists()


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """An RTX 4090 without a list of tiles."""
    known = SimpleNamespace(major=8, minor=9, total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    monkeypatch.setattr(dispatch, "arch_of", lambda device: 89)
    monkeypatch.setattr(tune.timing, "conditions", lambda device: dict(CONDITIONS))
    monkeypatch.setattr(tune_tiles, "FOLDER", tmp_path)


@pytest.mark.usefixtures("gpu")
def test_without_a_list_sweep_names_the_command_that_makes_it(out, capsys):
    assert tune.main(["sweep", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "sm_89.json is not there" in error and "candidates --arch 89" in error


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("works", [True, False])
def test_the_exit_code_tells_whether_the_gpu_still_works(works, out, monkeypatch):
    tune_tiles.save(tune_tiles.path_of(89), 89, "3.7.1", VERDICTS)
    monkeypatch.setattr(tune, "alive", lambda: works)
    done = []

    def time_of(self, failed):
        done.append(self.identity)
        return [Result(self.default, details={"tile": self.default, "shipped": True})]

    monkeypatch.setattr(TileJob, "time", time_of)
    monkeypatch.setattr(HandOverJob, "time", lambda self, failed: [])
    words = ["--op", str(KERNEL), "--pixels", "512", "--workers", "1", "--out", str(out)]
    assert tune.main(["sweep", *words]) == (0 if works else 1)
    assert len(done) == (10 if works else 1)
