"""The measuring stick: who is timed, in which order, against whom, and what a row must say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import timing
from bench.step import cli as step
from bench.step import table as step_table
from bench.step.candidates import BASELINE, CANDIDATES, DEFAULTS
from bench.step.gate import disagreement, saved_bytes, tolerance
from bench.step.peers import Candidate
from bench.step.settings import make_batch

ROOT = Path(__file__).resolve().parents[2]
ROW_FIELDS = {
    *("name", "status", "reason", "median_ms", "p10_ms", "p90_ms", "ratio", "rounds", "warmup"),
    *("peak_memory_bytes", "peak_memory_kind", "date", "commit", "dirty", "device", "device_name"),
    *("driver", "cuda", "cpu_model", "cpu_count", "threads", "python", "torch", *timing.LIBRARIES),
    *("bench", "storage", "compute", "hidden", "double_blocks", "single_blocks", "pixels"),
    *("image_tokens", "text_tokens", "batch", "rank", "lora_targets", "lora_dtype", "optimizer"),
    *("checkpointing", "compiled", "autocast", "interleaved", *step_table.GATE_FIELDS),
    *("setting", "step", "mix", "ema", "max_grad_norm", "memory_cap_gib", *step_table.RUN_FIELDS),
    *("images_per_s", "tflop", "tflop_per_s", "mfu"),
}


class Clock:
    """Stands in for time.perf_counter; a candidate says how long it takes."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing, "peak_memory", lambda work, device: (work(), None, None)[1:])

    def candidate(self, name: str, *milliseconds: float):
        """Takes each of the given times in turn, then the last one again and again."""
        left = list(milliseconds)

        def work():
            self.calls.append(name)
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1e3

        return work


def test_rounds_are_interleaved_and_rotated(monkeypatch):
    clock = Clock(monkeypatch)
    candidates = {name: clock.candidate(name, 1.0) for name in "abc"}
    timing.compare(candidates, rounds=3, warmup=0)
    assert "".join(clock.calls) == "abcbcacab"


def test_warm_up_is_thrown_away_and_ratios_are_of_medians(monkeypatch):
    clock = Clock(monkeypatch)
    candidates = {
        "peer": clock.candidate("peer", 900, 900, 10, 20, 30, 40, 500),
        "ours": clock.candidate("ours", 700, 700, 15),
    }
    results = timing.compare(candidates, rounds=5, warmup=2, baseline="peer")
    assert results["peer"].times_ms == pytest.approx([10, 20, 30, 40, 500])
    assert results["peer"].median_ms == pytest.approx(30)
    assert results["peer"].p10_ms == pytest.approx(14)
    assert results["peer"].p90_ms == pytest.approx(316)
    assert results["ours"].ratio == pytest.approx(0.5)
    assert results["peer"].ratio == pytest.approx(1)


def test_a_failure_is_a_row_and_never_ends_the_run(monkeypatch):
    clock = Clock(monkeypatch)
    calls = []

    def breaks_in_round_two():
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    def breaks():
        raise ValueError("wrong shape")

    results = timing.compare(
        {
            "good": clock.candidate("good", 5),
            "oom": breaks_in_round_two,
            "broken": breaks,
            "missing": ModuleNotFoundError("No module named 'peft'"),
        },
        rounds=3,
        warmup=0,
        baseline="missing",
    )
    assert {name: r.status for name, r in results.items()} == {
        "good": "ok",
        "oom": "out of memory",
        "broken": "failed",
        "missing": "skipped",
    }
    assert results["good"].median_ms == pytest.approx(5) and results["good"].ratio is None
    assert results["oom"].reason == "OutOfMemoryError: CUDA out of memory."
    assert results["oom"].median_ms is None
    assert results["broken"].reason == "ValueError: wrong shape"
    assert "peft" in results["missing"].reason
    assert len(calls) == 2


def test_a_candidate_that_fails_its_gate_is_not_timed(monkeypatch):
    clock = Clock(monkeypatch)

    def gate(name):
        if name == "raises":
            raise AssertionError("no gradient")
        return "loss is 3, expected 2" if name == "wrong" else None

    names = ("right", "wrong", "raises")
    candidates = {name: clock.candidate(name, 1) for name in names}
    results = timing.compare(candidates, rounds=2, warmup=1, gate=gate)
    assert set(clock.calls) == {"right"}
    assert results["wrong"].status == results["raises"].status == "gate failed"
    assert results["wrong"].reason == "loss is 3, expected 2"
    assert results["raises"].reason == "AssertionError: no gradient"


def test_peak_memory_sees_what_a_step_allocates():
    used, kind = timing.peak_memory(lambda: torch.ones(16 << 20).sum(), "cpu")
    if kind is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 60 << 20 < used < 128 << 20  # 64 MiB, and what else the process did


def test_outside_a_checkout_the_commit_is_null(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = timing.conditions("cpu")
    assert found["commit"] is None and found["dirty"] is None
    assert found["torch"] == torch.__version__


def test_the_gate_names_what_differs():
    reference = {"loss": torch.tensor(2.0), "a.lora_A": torch.ones(4, 4)}
    assert disagreement(reference, reference, 1e-6)[0] is None
    off = reference | {"a.lora_A": torch.full((4, 4), 1.01)}
    wrong, compared = disagreement(off, reference, 1e-3)
    assert "a.lora_A" in wrong and compared["worst_error"] == pytest.approx(0.01)
    assert "zero" in disagreement(reference | {"a.lora_A": torch.zeros(4, 4)}, None, 1)[0]
    assert "modules differ" in disagreement({"loss": reference["loss"]}, reference, 1)[0]


@pytest.fixture(scope="module")
def tiny():
    arguments = ["--device", "cpu", "--tiny", "--compute", "fp32", "--batch", "2"]
    return step.settings_of(step.parse(arguments))


def test_saved_bytes_counts_storages_once_and_no_weights(tiny):
    batch = make_batch(tiny, 64, 2)
    model = torch.nn.Linear(64, 64)

    def predict(batch):
        return torch.relu(model(batch.img)).square()  # saves relu's output: for relu and for square

    candidate = Candidate(model, predict, {})
    activation = batch.img.nbytes
    # and the difference to the target, which mse_loss keeps as its two inputs: one is the target
    assert saved_bytes(candidate, batch) == 2 * activation


@pytest.fixture
def one_thread():
    """Tiny matrices gain nothing from threads, and lose much where other tests run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_smoke_all_candidates_take_the_same_step(tmp_path, capsys, tiny, one_thread):
    pytest.importorskip("peft")
    out = tmp_path / "rows.jsonl"
    shape = ["--pixels", "64", "--batch", "2", "--rounds", "1", "--warmup", "1"]
    common = ["--device", "cpu", "--tiny", "--compute", "fp32", "--out", str(out)]
    assert step.main([*common, *shape]) == 0
    rows = {row["name"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == DEFAULTS["cpu"]
    peer = rows[BASELINE]
    for name, row in rows.items():
        assert row["status"] == "ok", (name, row["reason"])
        assert row.keys() >= ROW_FIELDS, ROW_FIELDS - row.keys()
        products = CANDIDATES[name].products
        allowed = tolerance(tiny.spec, tiny.compute, products)
        assert row["loss"] == pytest.approx(peer["loss"], rel=allowed)
        assert row["products"] == (products or "float32") and row["tolerance"] == allowed
        assert row["median_ms"] > 0 and row["rounds"] == 1 and row["saved_bytes"] > 0
        assert row["storage"] == "nf4" and row["compute"] == "float32"
        if name != BASELINE:
            assert row["worst_error"] <= row["tolerance"]
    assert rows["diffusers-nf4-checkpoint"]["saved_bytes"] < peer["saved_bytes"]
    said = capsys.readouterr().out.splitlines()[-2:]
    assert "fluxfast / diffusers+peft+bnb = " in said[0]
    assert "fluxfast-nf4-int8 / diffusers+peft+bnb = " in said[1]


@pytest.mark.slow
def test_peers_are_skipped_by_name_where_their_libraries_are_missing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in ('diffusers', 'peft', 'bitsandbytes', 'transformers', 'pydantic', 'typer',\n"
        "             'safetensors', 'yaml', 'rich', 'PIL', 'gguf', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
    )
    out = tmp_path / "rows.jsonl"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    # --apart: each candidate in its own process, as on a GPU
    arguments = ["--device", "cpu", "--tiny", "--apart", "--rounds", "1", "--out", str(out)]
    arguments += ["--candidates", "diffusers-nf4", "fluxfast-nf4", "fluxfast-nf4-trainer"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.step", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["diffusers-nf4"]["status"] == "skipped"
    assert "diffusers" in rows["diffusers-nf4"]["reason"]
    for name in ("fluxfast-nf4", "fluxfast-nf4-trainer"):
        assert rows[name]["status"] == "ok", rows[name]["reason"]
    # where there is no peer to compare with, they are compared with each other
    assert rows["fluxfast-nf4"]["reference"] is None
    assert rows["fluxfast-nf4-trainer"]["reference"] == "fluxfast-nf4"
    assert not rows["fluxfast-nf4"]["interleaved"]
    assert all(row.keys() >= ROW_FIELDS for row in rows.values())
    assert "fluxfast / diffusers+peft+bnb = - (no checkpointing)" in done.stdout


def test_a_bad_call_ends_with_2():
    for bad in (["--pixels", "100"], ["--candidates", "unknown"]):
        with pytest.raises(SystemExit) as error:
            step.parse(["--device", "cpu", *bad])
        assert error.value.code == 2


@pytest.mark.parametrize(
    ("ours", "wrong"),
    [(600.0, 0), (641.0, 1), (651.0, 2), (None, 1)],
)
def test_a_slow_cpu_step_is_said(ours, wrong):
    results = {
        "diffusers-nf4": timing.Result("diffusers-nf4", median_ms=1000.0),
        "diffusers-nf4-checkpoint": timing.Result("diffusers-nf4-checkpoint", median_ms=1600.0),
        "fluxfast-nf4": timing.Result("fluxfast-nf4", median_ms=ours),
    }
    assert len(step_table.over_limits(results)) == wrong
    assert step_table.over_limits({"fluxfast-nf4": results["fluxfast-nf4"]}) == []
