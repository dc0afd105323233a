"""The suite: what runs first, what a budget cuts, what is not measured twice, what it fails for."""

import json
import os
import signal
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from bench import run, suite_items, timing
from bench.rows import RowFile, compare, identity, read
from bench.step import run as step_run
from bench.step.settings import BASELINE, DEFAULTS, TINY_SPEC, Cycle, Settings
from bench.suite_items import CommandItem, StepItem, run_python
from bench.suite_table import table, wrong
from bench.suites import CHECKPOINTED, SIDES, TRAINERS, cpu_suite, gpu_suite

CYCLES = [Cycle((64,), 1), Cycle((96,), 1)]
SETTINGS = Settings(TINY_SPEC, "cpu", torch.float32, CYCLES, 8, 16, rounds=1, warmup=0, apart=True)
HERE = timing.conditions("cpu")
TRACEBACK = "Traceback (most recent call last):"


class Bench:
    """Stands in for what takes time: candidates and commands, by a clock of its own."""

    def __init__(self, monkeypatch):
        self.now, self.ran, self.takes_s = 0.0, [], {}
        self.outcomes: dict[str, timing.Result] = {}
        self.commands: dict[str, tuple[int | None, str]] = {}
        monkeypatch.setattr(suite_items, "measure_apart", self.measure)
        monkeypatch.setattr(suite_items, "run_python", self.command)

    def measure(self, settings, names, references, report, limit_s):
        self.ran.append(names[0])
        takes = self.takes_s.get(names[0], 0.0)
        for number, cycle in enumerate(settings.cycles, 1):
            share = takes * number / len(settings.cycles)
            results = {}
            for name in names:
                known = self.outcomes.get(name)
                result = timing.Result(name, median_ms=200.0, p10_ms=199.0, p90_ms=201.0)
                if share > limit_s:
                    result = timing.Result(name, "out of time", "cut")
                results[name] = known or result
            report(cycle, results, {name: {} for name in names})
        self.now += min(takes, limit_s)

    def command(self, words, limit_s):
        name = words[0] if words[0] != "-m" else words[1]
        self.ran.append(name)
        takes = self.takes_s.get(name, 0.0)
        self.now += min(takes, limit_s)
        return (None, "") if takes > limit_s else self.commands.get(name, (0, "8 passed"))

    def suite(self, items, out, budget_s) -> RowFile:
        kept = RowFile(out, HERE)
        suite_items.run_items(items, kept, self.now + budget_s, lambda: self.now)
        return kept


@pytest.fixture
def bench(monkeypatch):
    return Bench(monkeypatch)


def rows_by(kept: RowFile, name: str) -> list[str]:
    return [row["status"] for row in kept.rows if row["name"] == name]


def test_eight_minutes_hold_what_is_worth_most(bench, tmp_path):
    """By the estimates: kernels right, every mode and the peer at three sizes, the kernels."""
    items = gpu_suite(tiny=True)
    for item in items:
        word = "pytest" if "kernels right" in str(item) else "bench.kernels"
        key = item.names[0] if isinstance(item, StepItem) else word
        bench.takes_s.setdefault(key, item.estimate_s)
    kept = bench.suite(items, tmp_path / "rows.jsonl", 480)
    assert bench.ran[:3] == ["pytest", BASELINE, "fluxfast-nf4-trainer"]
    for name in (BASELINE, *TRAINERS):
        plain = [
            row["status"]
            for row in kept.rows
            if row["name"] == name
            and row["setting"] == "plain"
            and (row["batch"], row["lora_targets"], row["memory_cap_gib"]) == (1, "attn+mlp", None)
        ]
        assert plain == ["ok"] * len(SIDES), name
    assert rows_by(kept, "kernels right") == rows_by(kept, "kernels") == ["ok"]
    assert rows_by(kept, CHECKPOINTED)[-1] == "out of time"
    assert "takes about" in table(kept.rows) and wrong(kept.rows) == []


def test_the_whole_gpu_suite_has_every_row_once(bench, tmp_path):
    """Missing peers, exhausted memory and a kernel that raises are rows beside the others."""
    for name in (BASELINE, CHECKPOINTED, "diffusers-dense-compile"):
        reason = "ModuleNotFoundError: No module named 'diffusers'"
        bench.outcomes[name] = timing.Result(name, "skipped", reason)
    dense = "fluxfast-dense-trainer"
    bench.outcomes[dense] = timing.Result(dense, "out of memory", "OutOfMemoryError: CUDA")
    broken = "fluxfast-fp8-fp8-trainer"
    bench.outcomes[broken] = timing.Result(broken, "failed", "RuntimeError: misaligned address")
    out = tmp_path / "rows.jsonl"
    kept = bench.suite(gpu_suite(tiny=True), out, 1e6)
    found = read(out)
    assert len({identity(row) for row in found}) == len(found) == len(kept.rows)
    settings = {(r["setting"], r["lora_targets"], r["memory_cap_gib"]) for r in found if "mix" in r}
    assert settings == {
        ("plain", "attn+mlp", None),
        ("plain", "all", None),
        ("stock", "all", None),
        ("plain", "attn+mlp", 12),
        ("plain", "attn+mlp", 16),
        ("plain", "attn+mlp", 24),
        ("stock", "all", 24),
    }
    mixes = [row for row in found if row.get("mix")]
    assert all(row["setting"] == "stock" and row["pixels"] is None for row in mixes)
    mixed = {row["name"] for row in mixes if row["memory_cap_gib"] is None}
    assert mixed == {BASELINE, CHECKPOINTED, *TRAINERS}
    assert {row["batch"] for row in found if row["bench"] == "step"} == {1, 4}
    assert set(rows_by(kept, dense)) == {"out of memory"}
    assert set(rows_by(kept, broken)) == {"failed"}
    said = table(kept.rows)
    assert "skipped: diffusers-nf4" in said and "No module named 'diffusers'" in said
    assert "kernels right: ok after 0 s 8 passed" in said and "mixed" in said
    assert wrong(kept.rows) == []

    bench.ran.clear()
    bench.suite(gpu_suite(tiny=True), out, 1e6)
    assert bench.ran == [] and read(out) == found


def test_what_takes_too_long_is_cut_and_taken_up_again(bench, tmp_path):
    out, items = tmp_path / "rows.jsonl", [StepItem(SETTINGS, ["fluxfast-nf4"], 30)]
    items += [StepItem(SETTINGS, ["fluxfast-dense"], 30), CommandItem("NF4", ["nf4"], 10)]
    bench.takes_s = {"fluxfast-nf4": 100.0, "nf4": 50.0}
    kept = bench.suite(items, out, 1000)
    assert rows_by(kept, "fluxfast-nf4") == ["ok", "out of time"]  # three times its estimate
    assert rows_by(kept, "fluxfast-dense") == ["ok", "ok"]
    assert rows_by(kept, "NF4") == ["out of time"]

    bench.ran.clear()
    bench.takes_s.clear()
    kept = bench.suite(items, out, 10)  # no time for the first
    assert bench.ran == ["nf4"] and rows_by(kept, "fluxfast-nf4") == ["ok", "out of time"]
    assert rows_by(kept, "NF4") == ["out of time", "ok"]
    kept = bench.suite(items, out, 1000)
    assert bench.ran == ["nf4", "fluxfast-nf4"]
    assert rows_by(kept, "fluxfast-nf4") == ["ok", "out of time", "ok"]
    pixels = [row["pixels"] for row in kept.rows if row["name"] == "fluxfast-nf4"]
    assert pixels == [64, 96, 96]


def test_a_killed_run_goes_on_without_its_half_line(bench, tmp_path):
    out, item = tmp_path / "rows.jsonl", StepItem(SETTINGS, ["fluxfast-nf4"], 30)
    bench.suite([item], out, 1000)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[0] + lines[1][:40])
    bench.suite([item], out, 1000)
    assert bench.ran == ["fluxfast-nf4"] * 2
    assert [row["pixels"] for row in read(out)] == [64, 96]


@pytest.mark.parametrize("field", ["commit", "device_name", "torch", "diffusers", "threads"])
def test_rows_of_other_conditions_do_not_count(bench, tmp_path, field):
    out, item = tmp_path / "rows.jsonl", StepItem(SETTINGS, ["fluxfast-nf4"], 30)
    bench.suite([item], out, 1000)
    out.write_text("".join(json.dumps(row | {field: "other"}) + "\n" for row in read(out)))
    kept = bench.suite([item], out, 1000)
    assert bench.ran == ["fluxfast-nf4"] * 2 and len(kept.rows) == 2


def test_ratios_are_of_the_baseline_of_the_same_work(bench, tmp_path):
    names = [BASELINE, "fluxfast-nf4-trainer"]
    bench.outcomes[names[0]] = timing.Result(names[0], median_ms=400.0, p10_ms=1, p90_ms=1)
    items = [StepItem(SETTINGS, [name], 30) for name in names]
    kept = bench.suite(items, tmp_path / "rows.jsonl", 1000)
    assert [row["ratio"] for row in kept.rows] == [1.0, 1.0, 0.5, 0.5]
    other = StepItem(replace(SETTINGS, targets="all"), names[1:], 30)
    kept = bench.suite([other], tmp_path / "rows.jsonl", 1000)
    assert [row["ratio"] for row in kept.rows[-2:]] == [None, None]


def test_a_stopped_suite_ends_with_its_table(bench, tmp_path, monkeypatch, capsys):
    """SIGTERM in the middle of an item; the same command goes on."""
    monkeypatch.setitem(run.SUITES, "cpu", lambda tiny: [StepItem(SETTINGS, ["fluxfast-nf4"], 9)])
    stops = count()

    def measure(settings, names, references, report, limit_s):
        result = timing.Result(names[0], median_ms=7.0, p10_ms=7, p90_ms=7)
        report(settings.cycles[0], {names[0]: result}, {names[0]: {}})
        if next(stops) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert settings.cycles == CYCLES[1:]

    monkeypatch.setattr(suite_items, "measure_apart", measure)
    before = signal.getsignal(signal.SIGTERM)
    command = ["--suite", "cpu", "--tiny", "--out", str(tmp_path / "rows.jsonl")]
    assert run.main(command) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    said = capsys.readouterr()
    assert "fluxfast-nf4" in said.out and "64 px" in said.out and "goes on" in said.err
    assert run.main(command) == 0
    assert [row["pixels"] for row in read(tmp_path / "rows.jsonl")] == [64, 96]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"status": "ok"}, 0),
        ({"status": "gate failed"}, 1),
        ({"status": "out of memory"}, 0),
        ({"bench": "suite", "status": "missed"}, 1),
        ({"bench": "suite", "status": "failed"}, 1),
        ({"bench": "suite", "status": "out of time"}, 0),
    ],
)
def test_what_makes_the_exit_code(row, code):
    whole = {"bench": "kernels", "name": "fluxfast", "reason": "why", "device": "cpu", "said": ""}
    assert len(wrong([whole | row])) == code


def test_a_slow_step_makes_the_exit_code():
    def row(name: str, median: float) -> dict:
        shared = {"bench": "step", "status": "ok", "reason": None, "device": "cpu"}
        return {**shared, "name": name, "hidden": 3072, "median_ms": median}

    peer = row(BASELINE, 1000.0)
    assert wrong([peer, row("fluxfast-nf4", 600.0)]) == []
    assert "too slow" in wrong([peer, row("fluxfast-nf4", 700.0)])[0]


@pytest.mark.parametrize(
    ("code", "output", "status", "reason"),
    [
        (0, "3 passed in 1 s\n\n", "ok", None),
        (1, "a table\nmissed: decode: 1.2x, not 2.5x\n", "missed", "decode: 1.2x, not 2.5x"),
        (1, f"{TRACEBACK}\nValueError: x\n", "failed", "ValueError: x"),
        (1, f"{TRACEBACK}\nImportError: no bnb\n", "skipped", "ImportError: no bnb"),
        (-9, "", "failed", "ended with code -9"),
        (None, "...", "out of time", "cut after 30 s: ..."),
    ],
)
def test_how_a_command_ended(bench, tmp_path, code, output, status, reason):
    bench.commands["script.py"] = (code, output)
    (row,) = bench.suite([CommandItem("NF4", ["script.py"], 10)], tmp_path / "r", 1000).rows
    assert (row["status"], row["reason"]) == (status, reason)


def test_a_missing_module_is_a_row(tmp_path):
    items = [CommandItem("one", ["-S", "-m", "nothing_here"], 100)]
    kept = RowFile(tmp_path / "rows.jsonl", HERE)
    suite_items.run_items(items, kept, time.monotonic() + 100)
    (row,) = kept.rows
    assert row["status"] == "skipped" and "nothing_here" in row["reason"]


def test_a_command_is_killed_with_what_it_started(tmp_path):
    pid = tmp_path / "pid"
    code = (
        "import pathlib, subprocess, sys, time; print('begun', flush=True);"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']);"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid)); time.sleep(60)"
    )
    ended, output = run_python(["-S", "-c", code], 4)
    assert ended is None and output == "begun\n"
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # until init has collected it
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.1)


def test_a_command_finds_the_repository(monkeypatch):
    """`-S`: the package is not installed there."""
    code = "import os, bench, sys; print(os.getcwd(), *sys.path, sep='\\n'); raise SystemExit(5)"
    monkeypatch.delenv("PYTHONPATH", raising=False)
    ended, output = run_python(["-S", "-c", code], 60)
    where, *path = output.splitlines()
    assert (ended, where) == (5, str(run.ROOT)), output
    assert str(run.ROOT / "kernels") in path


def reports_once_and_dies(settings, names, references, sender):
    result = timing.Result(names[0], median_ms=1.0, p10_ms=1, p90_ms=1)
    sender.send((settings.cycles[0], {names[0]: result}, {names[0]: {}}))
    os._exit(7)


def found_of(limit_s: float | None = None, settings: Settings = SETTINGS) -> list[tuple]:
    found = []
    step_run.measure_apart(
        settings, ["fluxfast-nf4"], Path("nowhere"), lambda *f: found.append(f), limit_s
    )
    return [(cycle, r["fluxfast-nf4"].status, r["fluxfast-nf4"].reason) for cycle, r, _ in found]


@pytest.mark.slow
def test_a_process_that_dies_costs_what_it_owed(monkeypatch):
    monkeypatch.setattr(step_run, "_child", reports_once_and_dies)
    died = "its process ended with code 7"
    assert found_of() == [(CYCLES[0], "ok", None), (CYCLES[1], "failed", died)]


def test_a_process_that_goes_on_for_too_long_is_killed(monkeypatch):
    started = time.monotonic()
    assert found_of(0.3) == [(c, "out of time", "not done after 0 s") for c in CYCLES]
    assert time.monotonic() - started < 5
    assert not step_run.multiprocessing.active_children()


def test_a_cap_on_a_cpu_is_skipped():
    capped = replace(SETTINGS, cap_gib=12.0)
    assert [status for _, status, _ in found_of(None, capped)] == ["skipped"] * 2


def ratio_row(name: str, ratio: float | None, median_ms: float = 500.0, **other) -> dict:
    row = {"bench": "step", "name": name, "status": "ok", "pixels": 256, "batch": 1}
    return row | {"ratio": ratio, "median_ms": median_ms} | other


def test_two_runs_agree_within_15_percent(tmp_path, capsys):
    first = [
        ratio_row(BASELINE, 1.0),
        ratio_row("fluxfast-nf4", 9.0),
        ratio_row("fluxfast-nf4", 0.50),
        ratio_row("short", 0.5, 99.0),
        ratio_row("failed", None, status="failed"),
        ratio_row("gone", 0.5),
    ]
    second = [ratio_row("fluxfast-nf4", 0.57), ratio_row("short", 5.0), ratio_row(BASELINE, 1.0)]
    lines, agree = compare(first, second)
    assert agree and len(lines) == 1 and "0.500 and 0.570" in lines[0] and "14.0%" in lines[0]
    second.append(ratio_row("fluxfast-nf4", 0.58))
    assert not compare(first, second)[1]
    assert compare(first, [ratio_row("fluxfast-nf4", 0.5, pixels=512)]) == ([], False)
    files = [tmp_path / "a", tmp_path / "b"]
    for file, rows in zip(files, (first, second), strict=True):
        timing.append_rows(file, rows)
    assert run.main(["--compare", *map(str, files)]) == 1
    assert "differ by more than 15%" in capsys.readouterr().out
    assert run.main(["--compare", str(files[0]), str(files[0])]) == 0


def test_saved_rows_go_to_the_file_of_their_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    rows = [
        ratio_row("fluxfast-nf4", 0.5, device="cuda"),
        ratio_row("fluxfast-nf4", 0.5, device="cpu"),
        ratio_row("late", None, device="cpu", status="out of time"),
        {"bench": "kernels", "name": "fluxfast", "device": "cuda", "status": "ok"},
        {"bench": "suite", "name": "NF4", "device": "cpu", "status": "ok"},
    ]
    timing.append_rows(tmp_path / "rows.jsonl", rows)
    for _ in range(2):
        assert run.main(["--save", str(tmp_path / "rows.jsonl")]) == 0
        kept = {file.name: read(file) for file in (tmp_path / "results").iterdir()}
        wanted = {"step-cuda.jsonl": rows[:1], "step-cpu.jsonl": rows[1:2]}
        assert kept == wanted | {"kernels-cuda.jsonl": rows[3:4]}


def test_the_table_ranks_kernels_by_time_over_their_floor():
    def kernel(op: str, median: float, floor: float, name: str = "fluxfast") -> dict:
        shared = {"bench": "kernels", "status": "ok", "direction": "forward", "pixels": 1024}
        more = {"median_ms": median, "floor_ms": floor, "percent_of_floor": 100 * floor / median}
        return {**shared, **more, "op": op, "name": name, "batch": 1}

    rows = [kernel(f"op{i}", 1.0 + i, 1.0) for i in range(7)]
    rows += [kernel("theirs", 99.0, 1.0, "eager"), kernel("bound", 50.0, 50.0)]
    said = table(rows)
    order = [line.split("forward")[0].split()[-1] for line in said.splitlines()[1:]]
    assert order == ["op6", "op5", "op4", "op3", "op2"] and "14 % of the floor" in said


def test_the_cpu_suite_fits_ten_minutes_and_make_runs_it():
    items = cpu_suite()
    assert sum(item.estimate_s for item in items) <= run.BUDGET_S["cpu"] < 600
    step = items[0]
    assert step.names == DEFAULTS["cpu"] and not step.settings.apart
    assert step.settings.spec.hidden_size == 3072
    makefile = (run.ROOT / "Makefile").read_text()
    assert "-m bench.run --suite $(if $(filter cuda,$(DEVICE)),gpu,cpu)" in makefile


@pytest.mark.parametrize(
    "bad", [[], ["--suite", "tpu"], ["--compare", "a"], ["--save", "nowhere.jsonl"]]
)
def test_a_bad_call_ends_with_2(bad):
    with pytest.raises(SystemExit) as error:
        run.parse(bad)
    assert error.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_suite_wants_a_gpu(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--suite", "gpu"])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_suite_from_end_to_end(tmp_path, monkeypatch, capsys):
    """One candidate in its own process, a command, and a budget that ends before the last item."""
    one = replace(SETTINGS, cycles=CYCLES[:1])
    items = [
        StepItem(one, ["fluxfast-nf4-trainer"], 40),
        CommandItem("version", ["-c", "print('1 passed')"], 20),
        CommandItem("never", ["-c", "raise SystemExit(3)"], 10_000),
    ]
    monkeypatch.setitem(run.SUITES, "cpu", lambda tiny: items)
    out = tmp_path / "rows.jsonl"
    assert run.main(["--suite", "cpu", "--tiny", "--budget-s", "400", "--out", str(out)]) == 0
    found = {row["name"]: row for row in read(out)}
    assert list(found) == ["fluxfast-nf4-trainer", "version", "never"]
    timed = found["fluxfast-nf4-trainer"]
    assert timed["status"] == "ok" and timed["median_ms"] > 0, timed["reason"]
    assert timed["tflop_per_s"] > 0 and timed["images_per_s"] > 0 and timed["mfu"] is None
    assert found["version"]["said"] == "1 passed" and found["never"]["status"] == "out of time"
    assert (tmp_path / "rows-references").is_dir()
    assert "out of time: never" in capsys.readouterr().out
