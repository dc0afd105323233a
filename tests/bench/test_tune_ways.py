"""Ways that dispatch can choose between are both taken, compared and timed."""

import pytest
import torch
from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.gemm.eight_bit import gemm_8bit_dx
from tuning import PROJ, RANK, TINY, WHERE, clock, nothing, yes  # noqa: F401  (a fixture)

from bench.rows import read
from bench.tune import ways as tune_ways
from bench.tune.problems import HandOver
from bench.tune.space import Kernel
from bench.tune.sweep import Target, sweep
from bench.tune.ways import BackendJob, HandOverJob, answering, shipping

EMPTY = {"thresholds": [], "tiles": []}


def target(rounds: int) -> Target:
    return Target(TINY, RANK, "cpu", 89, rounds)


pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture
def launchers():
    with backend.cpu_launches(True):
        yield


def test_both_ways_are_taken_at_every_m(launchers, tmp_path, monkeypatch):
    pair = HandOver(Kernel("gemm_8bit_dx", "dense", "int8"), 64, 64, PROJ, "dx", 0.5)
    seen = []

    def launch(rows, weight, *given, **named):
        seen.append(weight.transposed)
        return gemm_8bit_dx(rows, weight, *given, **named)

    monkeypatch.setattr("fluxfast_kernels.gemm.linear_8bit.gemm_8bit_dx", launch)
    one = HandOverJob(pair, target(1), lambda: EMPTY, rows=(16, 32))
    out = tmp_path / "rows.jsonl"
    assert sweep([one], out, WHERE)
    rows = read(out)
    assert [row["name"] for row in rows] == [
        "fused at 16",
        "decode at 16",
        "fused at 32",
        "decode at 32",
    ]
    assert {row["status"] for row in rows} == {"ok"} and set(seen) == {True, False}
    assert [row["shipped"] for row in rows] == [True, False] * 2  # up to 2048 as it is kept
    assert all(row["source"].startswith("assumed: ") and row["kind"] == "hand over" for row in rows)
    assert sweep([one], out, WHERE) and len(read(out)) == 4


PAIR = HandOver(Kernel("lora_gemm", "nf4", "half"), 64, 64, PROJ, "product", 0.5)


def answered(monkeypatch, fused=1.0):
    """The op gives 1, or `fused` where dispatch says so. -> what it was told, call by call."""
    calls = []

    def op_of(t, what):
        def run():
            kind = dispatch.choose("lora_gemm", 89, torch.bfloat16, "nf4", t.M, 64, 64).kind
            calls.append(kind)
            return [torch.full((4,), 1.0 if kind == "decode" else fused)]

        return run

    monkeypatch.setattr(tune_ways, "op_of", op_of)
    return calls


def test_ways_that_differ_are_not_timed(monkeypatch):
    calls = answered(monkeypatch, fused=2.0)
    one = HandOverJob(PAIR, target(2), lambda: EMPTY, rows=(16,))
    timed = {r.name: r for r, _ in one.time(set(), nothing, yes)}
    assert timed["fused at 16"].status == "gate failed" and calls.count("fused") == 1
    assert timed["decode at 16"].median_ms is not None
    assert [r.name for r, _ in one.time({"fused at 16"}, nothing, yes)] == ["decode at 16"]


def test_what_is_shipped_is_what_would_be_written_now(monkeypatch):
    answered(monkeypatch)
    row = {"op": "lora_gemm", "fused_up_to_m": 16, "source": "measured: before"}
    measured = {"thresholds": [row], "tiles": []}
    one = HandOverJob(PAIR, target(1), lambda: measured, rows=(16, 32))
    said = [(r.name, more["shipped"], more["source"]) for r, more in one.time(set(), nothing, yes)]
    assert said == [
        (name, shipped, "measured: before")
        for name, shipped in (
            ("fused at 16", True),
            ("decode at 16", False),
            ("fused at 32", False),
            ("decode at 32", True),
        )
    ]


def test_the_way_that_breaks_the_gpu_is_known(monkeypatch):
    calls = answered(monkeypatch)
    one = HandOverJob(PAIR, target(1), lambda: EMPTY, rows=(16, 32))
    timed = one.time(set(), nothing, lambda: "fused" not in calls)
    assert one.trying == "fused at 16"
    assert {r.name: r.status for r, _ in timed}["decode at 32"] == "gate failed"


def test_attention_on_each_backend(launchers, tmp_path):
    """On a CPU flash and cuDNN are missing: rows all the same."""
    out = tmp_path / "rows.jsonl"
    sweep([BackendJob(32, target(1))], out, WHERE)
    rows = {row["way"]: row for row in read(out)}
    assert set(rows) == {"flash", "cudnn", "triton"}
    assert rows["triton"]["status"] == "ok" and rows["triton"]["median_ms"] is not None
    assert rows["flash"]["shipped"] and rows["flash"]["status"] == "gate failed"


def test_dispatch_answers_as_told_and_then_as_before():
    question = ("lora_gemm", 89, torch.bfloat16, "nf4", 16, 2048, 2048)
    before = dispatch.choose(*question)
    with answering("lora_gemm", "nf4", "decode"):
        assert dispatch.choose(*question).kind == "decode"
        assert dispatch.choose(*question).tile == before.tile
        other = ("lora_gemm", 89, torch.bfloat16, "dense", 16, 2048, 2048)
        assert dispatch.choose(*other).kind == "fused"
    tile = {
        "block_m": 16,
        "block_n": 64,
        "block_k": 32,
        "group_m": 1,
        "num_warps": 4,
        "num_stages": 2,
        "source": "measured: ",
    }
    with shipping(89, {"thresholds": [], "tiles": [{"op": "lora_gemm"} | tile]}):
        assert dispatch.choose(*question).tile.block_k == 32
        assert dispatch.choose(*question).kind == "fused"  # the default's: up to 64 rows
    assert dispatch.choose(*question) == before
