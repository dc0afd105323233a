"""The suite: what runs first, what a budget cuts, what is not measured twice, what it fails for."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import run, suite_items, timing
from bench.rows import RowFile, identity, read
from bench.step import run as step_run
from bench.step.settings import BASELINE, DEFAULTS, TINY_SPEC, Cycle, Settings
from bench.suite_items import CommandItem, StepItem, run_python
from bench.suite_table import table, wrong
from bench.suites import CHECKPOINTED, SIDES, TRAINERS, cpu_suite, gpu_suite

OURS = "fluxfast-nf4"
CYCLES = [Cycle((64,), 1), Cycle((96,), 1)]
SETTINGS = Settings(TINY_SPEC, "cpu", torch.float32, CYCLES, 8, 16, rounds=1, warmup=0, apart=True)
CONDITIONS = timing.conditions("cpu")
TRACEBACK = "Traceback (most recent call last):"


class Bench:
    """Stands in for what takes time: candidates and commands, by a clock of its own."""

    def __init__(self, out, monkeypatch):
        self.out, self.now, self.ran, self.takes_s = out, 0.0, [], {}
        self.outcomes: dict[str, timing.Result] = {}
        self.commands: dict[str, tuple[int | None, str]] = {}
        monkeypatch.setattr(suite_items, "measure_apart", self.measure)
        monkeypatch.setattr(suite_items, "run_python", self.command)

    def measure(self, settings, names, references, report, limit_s):
        self.ran.append(names[0])
        takes = self.takes_s.get(names[0], 0.0)
        for number, cycle in enumerate(settings.cycles, 1):
            cut = takes * number / len(settings.cycles) > limit_s
            results = {}
            for name in names:
                result = timing.Result(name, median_ms=200.0, p10_ms=199.0, p90_ms=201.0)
                result = timing.Result(name, "out of time", "cut") if cut else result
                results[name] = self.outcomes.get(name) or result
            report(cycle, results)
        self.now += min(takes, limit_s)

    def command(self, words, limit_s):
        name = words[0] if words[0] != "-m" else words[1]
        self.ran.append(name)
        takes = self.takes_s.get(name, 0.0)
        self.now += min(takes, limit_s)
        return (None, "") if takes > limit_s else self.commands.get(name, (0, "8 passed"))

    def suite(self, items, budget_s=1000) -> RowFile:
        """The rows after a run of the items; `ran` is what this run has begun."""
        self.ran.clear()
        file = RowFile(self.out, CONDITIONS)
        suite_items.run_items(items, file, self.now + budget_s, lambda: self.now)
        return file

    def statuses(self, name: str) -> list[str]:
        return [row["status"] for row in read(self.out) if row["name"] == name]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path / "rows.jsonl", monkeypatch)


def item(name=OURS, **changes) -> StepItem:
    return StepItem(replace(SETTINGS, **changes), [name], 30)


# ---------------------------------------------------------------- what is measured


def test_eight_minutes_hold_what_is_worth_most(bench):
    """By the estimates: kernels right, every mode and the peer at three sizes, the kernels."""
    items = gpu_suite(tiny=True)
    for one in items:
        word = "pytest" if "kernels right" in str(one) else "bench.kernels"
        key = one.names[0] if isinstance(one, StepItem) else word
        bench.takes_s.setdefault(key, one.estimate_s)
    rows = bench.suite(items, 480).rows
    assert bench.ran[:3] == ["pytest", BASELINE, "fluxfast-nf4-trainer"]
    for name in (BASELINE, *TRAINERS):
        settings = {"name": name, "setting": "plain", "batch": 1, "lora_targets": "attn+mlp"}
        plain = [
            row for row in rows if (settings | {"memory_cap_gib": None}).items() <= row.items()
        ]
        assert [row["status"] for row in plain] == ["ok"] * len(SIDES), name
    assert bench.statuses("kernels right") == bench.statuses("kernels") == ["ok"]
    assert bench.statuses(CHECKPOINTED)[-1] == "out of time"
    assert "takes about" in table(rows) and wrong(rows) == []


def test_the_whole_gpu_suite_has_every_row_once(bench):
    """Missing peers, exhausted memory and a kernel that raises are rows beside the others."""
    missing = "ModuleNotFoundError: No module named 'diffusers'"
    dense, broken = "fluxfast-dense-trainer", "fluxfast-fp8-fp8-trainer"
    for name, status, reason in (
        *((name, "skipped", missing) for name in (BASELINE, CHECKPOINTED)),
        ("diffusers-dense-compile", "skipped", missing),
        (dense, "out of memory", "OutOfMemoryError: CUDA"),
        (broken, "failed", "RuntimeError: misaligned address"),
    ):
        bench.outcomes[name] = timing.Result(name, status, reason)
    rows = bench.suite(gpu_suite(tiny=True), 1e6).rows
    assert len({identity(row) for row in rows}) == len(rows) and rows == read(bench.out)
    steps = [row for row in rows if row["bench"] == "step"]
    assert {(r["setting"], r["lora_targets"], r["memory_cap_gib"]) for r in steps} == {
        ("plain", "attn+mlp", None),
        ("plain", "all", None),
        ("stock", "all", None),
        ("plain", "attn+mlp", 12),
        ("plain", "attn+mlp", 16),
        ("plain", "attn+mlp", 24),
        ("stock", "all", 24),
    }
    mixes = [row for row in steps if row["mix"]]
    assert all(row["setting"] == "stock" and row["pixels"] is None for row in mixes)
    mixed = {row["name"] for row in mixes if row["memory_cap_gib"] is None}
    assert mixed == {BASELINE, CHECKPOINTED, *TRAINERS}
    assert {row["batch"] for row in steps} == {1, 4}
    assert set(bench.statuses(dense)) == {"out of memory"}
    assert set(bench.statuses(broken)) == {"failed"}
    text = table(rows)
    assert "skipped: diffusers-nf4" in text and "No module named 'diffusers'" in text
    assert "kernels right: ok after 0 s 8 passed" in text and "mixed" in text
    assert wrong(rows) == []
    bench.suite(gpu_suite(tiny=True), 1e6)
    assert bench.ran == [] and read(bench.out) == rows


def test_what_takes_too_long_is_cut_and_resumed(bench):
    items = [item(), item("fluxfast-dense"), CommandItem("NF4", ["nf4"], 10)]
    bench.takes_s = {OURS: 100.0, "nf4": 50.0}
    bench.suite(items)
    assert bench.statuses(OURS) == ["ok", "out of time"]  # three times its estimate
    assert bench.statuses("fluxfast-dense") == ["ok", "ok"]
    assert bench.statuses("NF4") == ["out of time"]
    bench.takes_s = {}
    bench.suite(items, 10)  # no time for the first
    assert bench.ran == ["nf4"] and bench.statuses(OURS) == ["ok", "out of time"]
    assert bench.statuses("NF4") == ["out of time", "ok"]
    rows = bench.suite(items).rows
    assert bench.ran == [OURS] and bench.statuses(OURS) == ["ok", "out of time", "ok"]
    assert [row["pixels"] for row in rows if row["name"] == OURS] == [64, 96, 96]


def test_a_killed_run_resumes_without_its_half_line(bench):
    bench.suite([item()])
    lines = bench.out.read_text().splitlines(keepends=True)
    bench.out.write_text(lines[0] + lines[1][:40])
    bench.suite([item()])
    assert bench.ran == [OURS] and [row["pixels"] for row in read(bench.out)] == [64, 96]


@pytest.mark.parametrize("field", ["commit", "device_name", "torch", "diffusers", "threads"])
def test_rows_of_other_conditions_do_not_count(bench, field):
    rows = bench.suite([item()]).rows
    bench.out.write_text("".join(json.dumps(row | {field: "other"}) + "\n" for row in rows))
    assert len(bench.suite([item()]).rows) == 2 and bench.ran == [OURS]


def test_ratios_are_to_the_baseline_of_the_same_work(bench):
    bench.outcomes[BASELINE] = timing.Result(BASELINE, median_ms=400.0, p10_ms=1, p90_ms=1)
    rows = bench.suite([item(BASELINE), item(), item(targets="all")]).rows
    assert [row["ratio"] for row in rows] == [1.0, 1.0, 0.5, 0.5, None, None]


def test_a_stopped_suite_ends_with_its_table(bench, monkeypatch, capsys):
    """SIGTERM in the middle of an item; the same command resumes it."""
    monkeypatch.setitem(run.SUITES, "cpu", lambda tiny: [item()])

    def measure(settings, names, references, report, limit_s):
        bench.ran.append(settings.cycles)
        result = timing.Result(OURS, median_ms=7.0, p10_ms=7, p90_ms=7)
        report(settings.cycles[0], {OURS: result})
        if len(bench.ran) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    monkeypatch.setattr(suite_items, "measure_apart", measure)
    before = signal.getsignal(signal.SIGTERM)
    command = ["--suite", "cpu", "--tiny", "--out", str(bench.out)]
    assert run.main(command) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    printed = capsys.readouterr()
    assert OURS in printed.out and "64 px" in printed.out and "goes on" in printed.err
    assert run.main(command) == 0
    assert bench.ran == [CYCLES, CYCLES[1:]]
    assert [row["pixels"] for row in read(bench.out)] == [64, 96]


# ---------------------------------------------------------------- what makes the exit code


@pytest.mark.parametrize(
    ("row", "failures"),
    [
        ({"status": "ok"}, 0),
        ({"status": "gate failed"}, 1),
        ({"status": "out of memory"}, 0),
        ({"bench": "suite", "status": "missed"}, 1),
        ({"bench": "suite", "status": "failed"}, 1),
        ({"bench": "suite", "status": "out of time"}, 0),
    ],
)
def test_statuses_that_make_the_exit_code(row, failures):
    whole = {"bench": "kernels", "name": "fluxfast", "reason": "why", "device": "cpu", "said": ""}
    assert len(wrong([whole | row])) == failures


def ratio_row(name: str, ratio: float | None, median_ms: float = 500.0, **changes) -> dict:
    row = {"bench": "step", "name": name, "status": "ok", "reason": None, "pixels": 256, "batch": 1}
    return row | {"ratio": ratio, "median_ms": median_ms} | changes


def test_a_slow_step_makes_the_exit_code():
    shared = {"device": "cpu", "hidden": 3072}
    peer = ratio_row(BASELINE, None, 1000.0, **shared)
    assert wrong([peer, ratio_row(OURS, None, 600.0, **shared)]) == []
    assert "too slow" in wrong([peer, ratio_row(OURS, None, 700.0, **shared)])[0]


@pytest.mark.parametrize(
    ("code", "output", "status", "reason"),
    [
        (0, "3 passed in 1 s\n\n", "ok", None),
        (1, "a table\nmissed: decode: 1.2x, not 2.5x\n", "missed", "decode: 1.2x, not 2.5x"),
        (1, f"{TRACEBACK}\nValueError: x\n", "failed", "ValueError: x"),
        (1, f"{TRACEBACK}\nImportError: no bnb\n", "skipped", "ImportError: no bnb"),
        (1, "python: No module named pytest\n", "skipped", "python: No module named pytest"),
        (-9, "", "failed", "ended with code -9"),
        (None, "...", "out of time", "cut after 30 s: ..."),
    ],
)
def test_how_a_command_ended(bench, code, output, status, reason):
    bench.commands["script.py"] = (code, output)
    (row,) = bench.suite([CommandItem("NF4", ["script.py"], 10)]).rows
    assert (row["status"], row["reason"]) == (status, reason)


# ---------------------------------------------------------------- processes


@pytest.mark.slow
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
    sender.send((settings.cycles[0], {names[0]: result}))
    os._exit(7)


def measured(limit_s: float | None = None, settings: Settings = SETTINGS) -> list[tuple]:
    found = []
    step_run.measure_apart(
        settings, [OURS], Path("nowhere"), lambda *report: found.append(report), limit_s
    )
    return [(cycle, r[OURS].status, r[OURS].reason) for cycle, r in found]


@pytest.mark.slow
def test_a_process_that_dies_costs_what_it_had_not_reported(monkeypatch):
    monkeypatch.setattr(step_run, "_child", reports_once_and_dies)
    died = "its process ended with code 7"
    assert measured() == [(CYCLES[0], "ok", None), (CYCLES[1], "failed", died)]


def test_a_process_that_takes_too_long_is_killed():
    started = time.monotonic()
    assert measured(0.3) == [(c, "out of time", "not done after 0 s") for c in CYCLES]
    assert time.monotonic() - started < 5
    assert not step_run.multiprocessing.active_children()


def test_a_cap_on_a_cpu_is_skipped():
    capped = replace(SETTINGS, cap_gib=12.0)
    assert [status for _, status, _ in measured(None, capped)] == ["skipped"] * 2


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"ratio": 0.57}, 0, "0.500 and 0.570 of the baseline: 14.0% apart, agree"),
        ({"ratio": 0.58}, 1, "differ by more than 15%"),
        ({"pixels": 512}, 1, "nothing to compare"),
    ],
)
def test_two_runs_agree_within_15_percent(tmp_path, capsys, changes, code, message):
    first = [
        ratio_row(BASELINE, 1.0),
        ratio_row(OURS, 9.0),
        ratio_row(OURS, 0.50),
        ratio_row("short", 0.5, 99.0),
        ratio_row("failed", None, status="failed"),
        ratio_row("gone", 0.5),
    ]
    second = [ratio_row(OURS, 0.5) | changes, ratio_row("short", 5.0), ratio_row(BASELINE, 1.0)]
    timing.append_rows(tmp_path / "a", first)
    timing.append_rows(tmp_path / "b", second)
    assert run.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == code
    (line,) = capsys.readouterr().out.splitlines()
    assert message in line


def test_saved_rows_go_to_the_file_of_their_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    rows = [
        ratio_row(OURS, 0.5, device="cuda"),
        ratio_row(OURS, 0.5, device="cpu"),
        {"bench": "kernels", "name": "fluxfast", "device": "cuda", "status": "ok"},
        ratio_row("late", None, device="cpu", status="out of time"),
        {"bench": "suite", "name": "NF4", "device": "cpu", "status": "ok"},
    ]
    timing.append_rows(tmp_path / "rows.jsonl", rows)
    names = ["step-cuda.jsonl", "step-cpu.jsonl", "kernels-cuda.jsonl"]
    for _ in range(2):
        assert run.main(["--save", str(tmp_path / "rows.jsonl")]) == 0
        saved = {file.name: read(file) for file in (tmp_path / "results").iterdir()}
        assert saved == {name: [row] for name, row in zip(names, rows, strict=False)}


def test_the_table_ranks_kernels_by_time_over_their_floor():
    def kernel(op: str, median: float, floor: float, name: str = "fluxfast") -> dict:
        times = {"floor_ms": floor, "percent_of_floor": 100 * floor / median}
        work = {"bench": "kernels", "op": op, "direction": "forward"}
        return ratio_row(name, None, median, **work, **times)

    rows = [kernel(f"op{i}", 1.0 + i, 1.0) for i in range(7)]
    rows += [kernel("theirs", 99.0, 1.0, "eager"), kernel("bound", 50.0, 50.0)]
    text = table(rows)
    order = [line.split("forward")[0].split()[-1] for line in text.splitlines()[1:]]
    assert order == ["op6", "op5", "op4", "op3", "op2"] and "14 % of the floor" in text


def test_the_cpu_suite_fits_ten_minutes_and_make_runs_it():
    items = cpu_suite()
    assert sum(one.estimate_s for one in items) <= run.BUDGET_S["cpu"] < 600
    step = items[0]
    assert step.names == DEFAULTS["cpu"] and not step.settings.apart
    assert step.settings.spec.hidden_size == 3072
    makefile = (run.ROOT / "Makefile").read_text()
    assert "-m bench.run --suite $(if $(filter cuda,$(DEVICE)),gpu,cpu)" in makefile


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments"),
        (["--suite", "tpu"], "invalid choice"),
        (["--suite", "gpu"], "no CUDA device"),
        (["--compare", "a"], "expected 2"),
        (["--save", "nowhere.jsonl"], "no such file"),
    ],
)
def test_a_bad_call_ends_with_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        run.parse(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_suite_from_end_to_end(tmp_path, monkeypatch, capsys):
    """One candidate in its own process, a command, and a budget that ends before the last item."""
    items = [
        item("fluxfast-nf4-trainer", cycles=CYCLES[:1]),
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
