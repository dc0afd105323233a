"""What is measured first on a GPU: each item's rows, once; what goes wrong costs its own rows; the
table and the exit code."""

import json
import subprocess
import sys

import pytest
import torch

from bench import ROOT, first, run, suite_items, timing
from bench.rows import read
from bench.suite_table import table
from bench.suites import first_suite
from bench.tune.calls import Call

FAKED = ("gemm", "skinny", "layouts", "dequant", "attention")  # launches: none is here


@pytest.fixture
def no_launches(monkeypatch):
    """Launches that write the right results at once, but for the tile that is named."""
    faults = {}

    def build(problem, spec, rank, device):
        out = torch.zeros(1)

        def launch(tile) -> None:
            out.fill_(faults.get(problem.pass_name, 1.0))

        return Call(launch, [out], lambda: [torch.ones(1)])

    def timed(job, names) -> list[timing.Result]:
        return list(
            job.compare({n: torch.Tensor for n in names}, lambda _: None, 1, names[0]).values()
        )

    def at(job, M, failed):
        return timed(job, [f"fused at {M}", f"decode at {M}"])

    monkeypatch.setattr(first, "build", build)
    monkeypatch.setattr(first.HandOverJob, "at", at)
    monkeypatch.setattr(first.BackendJob, "time", lambda job, _: timed(job, [job.default, "cudnn"]))
    return faults


def measure(item, out) -> list[dict]:
    assert first.main(["--tiny", "--item", item, "--out", str(out)]) == 0
    return read(out)


@pytest.mark.parametrize("item", first.ITEMS)
def test_an_item_measures_each_of_its_rows_once(item, tmp_path, no_launches):
    out = tmp_path / "rows.jsonl"
    rows = measure(item, out)
    assert rows and {row["status"] for row in rows} <= {"ok", "skipped"}
    assert {row["what"] for row in rows} == {item}
    assert item in table(rows) and measure(item, out) == rows


def test_wrong_results_are_not_timed(tmp_path, no_launches):
    no_launches["dx"] = 2.0
    rows = measure("gemm", tmp_path / "rows.jsonl")
    wrong = [row for row in rows if row["status"] == "gate failed"]
    assert {row["op"].split()[-1] for row in wrong} == {"dx"} and len(wrong) < len(rows)
    assert all(row["median_ms"] is None for row in wrong)


def test_a_replay_that_differs_is_wrong(monkeypatch):
    gradients = iter([torch.ones(2), torch.zeros(2)])
    monkeypatch.setattr(first, "relative_errors", lambda a, b: ((next(gradients) - 1).norm(), 0.0))
    settings = {"storage": "nf4"}
    kind = first.Kind("trainer", *first.MODES[settings["storage"]])
    cycle = first.Cycle((64,), 1)
    base = (first.TINY_SPEC, "cpu", torch.float32, [cycle], 8, 4)
    same = first._step(kind, first.Settings(*base, rounds=1, warmup=1, apart=True), cycle)
    other = first._step(kind, first.Settings(*base, rounds=1, warmup=1, apart=True), cycle)
    status = [next(r.status for r in each if r.name == "gradients") for each in (same, other)]
    assert status == ["ok", "gate failed"]


def test_the_whole_flow_goes_on_after_what_fails(tmp_path, monkeypatch, capsys):
    """Items in the order of what they are worth; one crashes, one hangs; the next run takes only
    what is left."""
    out, ran = tmp_path / "rows.jsonl", []
    outcomes = {"gemm": (1, "Traceback (most recent call last):\nRuntimeError: an illegal access")}
    outcomes["skinny"] = (None, "")

    def command(words, limit_s):
        ran.append(words[-1] if "pytest" not in words else "tests")
        return outcomes.get(ran[-1], (0, "8 passed"))

    monkeypatch.setattr(suite_items, "run_python", command)
    arguments = ["--tiny", "--budget-s", "540", "--out", str(out)]
    assert first.main(arguments) == 1
    assert ran == ["tests", *first.ITEMS]
    text = capsys.readouterr().out
    assert "gemm: failed" in text and "illegal access" in text and "out of time: skinny" in text
    with out.open("a") as file:
        file.write('{"bench": "first", "wh')  # a process that was killed
    ran.clear()
    outcomes.clear()
    assert first.main(arguments) == 1 and ran == ["skinny"]  # a failed one is not tried again
    assert all(json.loads(line) for line in out.read_text().splitlines())


def test_a_budget_begins_nothing_that_it_cannot_end(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(suite_items, "run_python", lambda words, _: ran.append(words) or (0, ""))
    assert first.main(["--tiny", "--budget-s", "1", "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert ran == [] and len(first_suite()) == len(first.ITEMS) + 1
    assert set(run.BUDGET_S) == {"cpu", "gpu"}


def test_it_needs_torch_triton_and_numpy_alone():
    others = "pydantic typer transformers diffusers yaml rich bitsandbytes safetensors PIL scipy"
    script = f"""
import sys
OTHERS = {others.split()}
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in OTHERS:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import bench.first, bench.run
"""
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env={"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
