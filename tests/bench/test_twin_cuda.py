"""Whole runs over torch's CUDA build without a GPU are as planned. The first run downloads it."""

import shutil
import subprocess

import pytest

from bench.twin.cuda import cli
from bench.twin.cuda.scenarios import Scenario, scenarios

ROW = {
    "exit": 0,
    "error": None,
    "policies": {"512x512": "57 keep"},
    "planned": {"512x512": "57 keep"},
    "limit_gib": 21.7,
    "reserved_gib": 21.9,
    "elsewhere_gib": 0.0,
    "steps": [{"launches": 9000, "syncs": 9}, {"launches": 4600, "syncs": 0}],
    "graphs": 1,
    "graphed": True,
    "no_graphs": None,
    "peak_gib": 22.3,
}


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ("policies", {"policies": {"512x512": "50 keep, 7 recompute_mlp"}}),
        ("GiB reserved", {"reserved_gib": 23.0}),
        ("GiB reserved on another card", {"elsewhere_gib": 0.5}),
        ("1 synchronizations a step", {"steps": [ROW["steps"][0], {"launches": 1, "syncs": 1}]}),
        ("0 graphs of 1", {"graphs": 0}),
        ("exit 1", {"exit": 1, "error": "the GPU's memory is full"}),
        ("not an error of its own", {"exit": 1, "error": "RuntimeError: CUDA error"}),
    ],
)
def test_what_differs_from_the_plan_is_a_fault(fault, changes):
    scenario = Scenario("a run", "4090", ("512",))
    assert scenario.wrong(ROW) == []
    assert any(fault in line for line in scenario.wrong(ROW | changes))


def test_a_refusal_that_nothing_met_is_a_fault():
    scenario = Scenario("a run", "4090", ("512",), fail="optimizer")
    assert scenario.wrong(ROW | {"refused": 2}) == []
    assert any("could be refused" in line for line in scenario.wrong(ROW | {"refused": 0}))


def test_scenarios_cover_the_cards_the_sizes_and_the_optimizers():
    made = scenarios()
    assert len({each.name for each in made}) == len({each.key for each in made}) == len(made)
    assert sum(each.quick for each in made) == 8
    for card in cli.CARDS:
        assert {s.sizes for s in made if s.card == card} >= {("512",), ("768",), ("1024",)}
    assert {s.optimizer for s in made} == {
        *("adamw", "adamw8bit", "prodigy", "schedulefree", "adafactor"),
    }


def test_rows_resume_and_are_replaced_by_name(tmp_path, monkeypatch, capsys):
    ran = []

    def run(scenario, environment):
        ran.append(scenario.name)
        wrong = ["too much"] if scenario.card == "h100" else []
        row = {"name": scenario.name, "key": scenario.key, "code": cli.code(), "wrong": wrong}
        return row | ROW

    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr("bench.twin.cuda.stubs.environment", dict)
    out = tmp_path / cli.ROWS.name
    assert cli.main(["--only", "3060*", "--out", str(out)]) == 0 and len(ran) == 3
    assert cli.main(["--only", "3060*", "--out", str(out)]) == 0 and len(ran) == 3
    assert cli.main(["--only", "3060*", "--redo", "--out", str(out)]) == 0 and len(ran) == 6
    assert cli.main(["--only", "h100 512*", "--out", str(out)]) == 1
    text = cli.block(tmp_path)
    assert text.count("as planned") == 3 and "too much" in text and "without a GPU" in text
    assert "of other code" not in text + capsys.readouterr().out
    monkeypatch.setattr(cli, "code", lambda: "changed")
    assert cli.main(["--only", "3060 512*", "--out", str(out)]) == 0 and len(ran) == 8
    assert "1 rows are of other code" in capsys.readouterr().out
    assert "1 of the 4 runs are of other code" in cli.block(tmp_path)


def test_a_process_that_dies_is_a_row_of_the_table(tmp_path, monkeypatch):
    died = subprocess.CompletedProcess([], -11, "", "step 1\nstep 2")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: died)
    row = cli.run(Scenario("3060 512 px", "3060", ("512",)), {})
    cli.save(row, tmp_path / cli.ROWS.name)
    text = cli.block(tmp_path)
    assert "the process ended with -11: step 2 |" in text and "as planned" not in text


def test_the_code_of_a_row_is_the_trainer_the_kernels_and_the_twin(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    (tmp_path / "constraints.txt").write_text("torch")
    made = [cli.code()]
    for name in ("fluxfast/run/a.py", "kernels/fluxfast_kernels/a.json", "bench/twin/cuda/a.c"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
        made.append(cli.code())
    (tmp_path / "fluxfast" / "a.pyc").write_text("")
    (tmp_path / "bench" / "rows.py").write_text("")
    assert cli.code() == made[-1] and len(set(made)) == 4


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="needs gcc and nm")
def test_eight_runs_are_as_planned(tmp_path, capsys):
    code = cli.main(["--quick", "--out", str(tmp_path / "rows.jsonl")])
    assert code == 0, capsys.readouterr().out
