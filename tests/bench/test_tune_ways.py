"""Ways that dispatch can choose between are both taken, compared and timed."""

from dataclasses import replace

import pytest
import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.gemm.eight_bit import gemm_8bit_dx
from tuning import CONDITIONS, PROJ, clock, launchers, target  # noqa: F401  (fixtures)

from bench.rows import read
from bench.tune import ways as tune_ways
from bench.tune.problems import Problem
from bench.tune.space import Kernel
from bench.tune.sweep import sweep
from bench.tune.ways import BackendJob, HandOverJob

EMPTY = {"thresholds": [], "tiles": []}
PAIR = Problem(Kernel("lora_gemm", "nf4", "half"), 0, 64, 64, PROJ, "product", 0.5)

pytestmark = pytest.mark.usefixtures("clock", "launchers")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(tune_ways, "HAND_OVER_ROWS", (16, 32))


@pytest.mark.slow
def test_both_ways_are_taken_at_every_m(tmp_path, monkeypatch):
    pair = replace(PAIR, kernel=Kernel("gemm_8bit_dx", "dense", "int8"), pass_name="dx")
    seen = []

    def launch(rows, weight, *arguments, **named):
        seen.append(weight.transposed)
        return gemm_8bit_dx(rows, weight, *arguments, **named)

    monkeypatch.setattr("fluxfast_kernels.gemm.linear_8bit.gemm_8bit_dx", launch)
    one = HandOverJob(pair, target(1), lambda: EMPTY)
    out = tmp_path / "rows.jsonl"
    assert sweep([one], out, CONDITIONS)
    rows = read(out)
    names = ["fused at 16", "decode at 16", "fused at 32", "decode at 32"]
    assert [row["name"] for row in rows] == names
    assert {row["status"] for row in rows} == {"ok"} and set(seen) == {True, False}
    assert [row["shipped"] for row in rows] == [True, False] * 2  # up to 2048 as it is stored
    assert all(row["source"].startswith("assumed: ") and row["kind"] == "hand over" for row in rows)
    assert sweep([one], out, CONDITIONS) and len(read(out)) == 4


@pytest.fixture
def kinds(monkeypatch):
    """What dispatch answers the op, call by call; its result is 1, or kinds.fused where fused."""

    class Kinds(list):
        fused = 1.0

    kinds = Kinds()

    def op_of(t, pass_name):
        kinds.append(dispatch.choose("lora_gemm", 89, torch.bfloat16, "nf4", t.M, 64, 64).kind)
        return [torch.full((4,), 1.0 if kinds[-1] == "decode" else kinds.fused)]

    monkeypatch.setattr(tune_ways, "op_of", op_of)
    return kinds


def test_ways_that_differ_are_not_timed(kinds):
    kinds.fused = 2.0
    one = HandOverJob(PAIR, target(2), lambda: EMPTY)
    timed = {r.name: r for r in one.time(set())}
    assert timed["fused at 16"].status == "gate failed" and kinds.count("fused") == 2
    assert timed["decode at 16"].median_ms is not None
    assert "fused at 16" not in {r.name for r in one.time({"fused at 16"})}


def test_the_shipped_way_is_what_would_be_written_now(kinds):
    row = {"op": "lora_gemm", "fused_up_to_m": 16, "source": "measured: before"}
    measured = {"thresholds": [row], "tiles": []}
    question = ("lora_gemm", 89, torch.bfloat16, "nf4", 32, 64, 64)
    before = dispatch.choose(*question)
    one = HandOverJob(PAIR, target(1), lambda: measured)
    timed = [(r.name, r.details["shipped"], r.details["source"]) for r in one.time(set())]
    names = ["fused at 16", "decode at 16", "fused at 32", "decode at 32"]
    shipped = [True, False, False, True]
    assert timed == list(zip(names, shipped, ["measured: before"] * 4, strict=True))
    assert dispatch.choose(*question) == before and before.kind == "fused"


def test_the_way_that_breaks_the_gpu_is_known(kinds):
    of = target(1, alive=lambda: "fused" not in kinds)
    one = HandOverJob(PAIR, of, lambda: EMPTY)
    timed = one.time(set())
    assert one.trying == "fused at 16"
    assert {r.name: r.status for r in timed}["decode at 32"] == "gate failed"


@pytest.mark.slow
def test_attention_on_each_backend(tmp_path):
    """On a CPU flash and cuDNN are missing: rows all the same."""
    out = tmp_path / "rows.jsonl"
    sweep([BackendJob(32, target(1))], out, CONDITIONS)
    rows = {row["way"]: row for row in read(out)}
    assert set(rows) == {"flash", "cudnn", "triton"}
    assert rows["triton"]["status"] == "ok" and rows["triton"]["median_ms"] is not None
    assert rows["flash"]["shipped"] and rows["flash"]["status"] == "gate failed"
