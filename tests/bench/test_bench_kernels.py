"""The bench of single ops: its rows, its table, and failures."""

import multiprocessing
import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import fluxfast_kernels as fk
import pytest
import torch
from bench_kernels import ROOF, case_of, measured, quick, tiny  # noqa: F401

from bench import timing
from bench.kernels import cli as kernels
from bench.kernels.cases import Case, cases, ops_of
from bench.kernels.problem import BOTH, CANDIDATES, EAGER, FORWARD, OURS
from bench.kernels.table import table
from bench.rows import read
from fluxfast.memory.planner.cost import total_bytes, total_flop

ROOT = Path(__file__).resolve().parents[2]
ROW_FIELDS = {
    *("name", "status", "reason", "median_ms", "p10_ms", "p90_ms", "ratio", "rounds", "warmup"),
    *("peak_memory_bytes", "peak_memory_kind", "date", "commit", "dirty", "device", "device_name"),
    *("driver", "cuda", "cpu_model", "cpu_count", "threads", "python", "torch", *timing.LIBRARIES),
    *("bench", "op", "direction", "storage", "products", "compute", "pixels", "batch", "tokens"),
    *("text_tokens", "hidden", "rank", "bytes", "flop", "copy_gb_per_s", "matmul_tflop_per_s"),
    *("floor_ms", "percent_of_floor", "gb_per_s", "tflop_per_s", "interleaved"),
    *("worst", "worst_error", "tolerance"),
}

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")

pytestmark = pytest.mark.usefixtures("quick")


def test_a_tiny_run_writes_valid_rows(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    ops = ["lora_linear", "attention", "nf4_dequantize", "quantize_rows", "flow_mix"]
    arguments = ["--device", "cpu", "--tiny", "--compute", "fp32", "--rounds", "2"]
    assert kernels.main([*arguments, "--ops", *ops, "--out", str(out)]) == 0
    rows = {}
    for row in read(out):
        assert row.keys() == ROW_FIELDS, row.keys() ^ ROW_FIELDS
        assert row["bench"] == "kernels" and row["status"] == "ok", (row["name"], row["reason"])
        assert row["rounds"] == 2 and row["worst_error"] <= row["tolerance"]
        rate, copy = row["matmul_tflop_per_s"] * 1e12, row["copy_gb_per_s"] * 1e9
        seconds = row["median_ms"] / 1e3
        least = max(row["bytes"] / copy, row["flop"] / rate)
        assert row["floor_ms"] == pytest.approx(1e3 * least)
        assert row["percent_of_floor"] == pytest.approx(100 * least / seconds)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / seconds / 1e9)
        assert row["tflop_per_s"] == pytest.approx(row["flop"] / seconds / 1e12)
        keys = ("op", "storage", "products", "name", "direction")
        rows[tuple(row[key] for key in keys)] = row
    assert {op for op, *_ in rows} == set(ops)
    for case in (case_of("attention"), case_of("lora_linear", "nf4", "int8")):
        forward, backward = ops_of(case, tiny())
        for direction, ops in ((FORWARD, forward), (BOTH, forward + backward)):
            row = rows[case.op, case.storage or None, case.matmul or "float32", OURS, direction]
            assert row["bytes"] == round(total_bytes(ops)) and row["flop"] == total_flop(ops)
    for direction in (FORWARD, BOTH):
        for name in (OURS, EAGER, "bitsandbytes-gemm", "bitsandbytes-dequantize"):
            assert ("lora_linear", "nf4", "float32", name, direction) in rows
        assert ("lora_linear", "float32", "float32", EAGER, direction) in rows
        assert ("lora_linear", "int8", "int8", EAGER, direction) in rows
        assert ("attention", None, "float32", "sdpa", direction) in rows
    assert ("nf4_dequantize", "nf4", "float32", "bitsandbytes-dequantize", FORWARD) in rows
    assert not any(op in ("nf4_dequantize", "flow_mix") and d == BOTH for op, *_, d in rows)
    linear = rows["lora_linear", "nf4", "int8", OURS, BOTH]
    assert (linear["tokens"], linear["text_tokens"], linear["pixels"]) == (16, 8, 64)
    printed = capsys.readouterr().out
    assert "11 of 11 cases" in printed and "five slowest kernels" in printed
    assert len(re.findall(r"^lora_linear .* \+backward ", printed, re.MULTILINE)) == 6


def test_torch_compile_does_the_same_work(monkeypatch):
    # without the code generator, which takes a C++ compiler and most of a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = measured(case_of("gate_residual"), tiny(candidates=[OURS, EAGER, "compile"]))
    assert found["compile", BOTH]["status"] == "ok", found["compile", BOTH]["reason"]
    assert found["compile", BOTH]["ratio"] > 0


def test_a_missing_library_is_a_skipped_row_that_names_it(monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.functional", "liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    settings = tiny(candidates=CANDIDATES[:2] + CANDIDATES[3:])
    for case, name, library in (
        (case_of("lora_linear", "nf4"), "bitsandbytes-gemm", "bitsandbytes"),
        (case_of("lora_linear", "nf4"), "bitsandbytes-dequantize", "bitsandbytes"),
        (Case("nf4_dequantize", "nf4"), "bitsandbytes-dequantize", "bitsandbytes"),
        (case_of("norm_modulate"), "liger", "liger_kernel"),
    ):
        found = measured(case, settings)
        row = found[name, FORWARD]
        assert row["status"] == "skipped" and library in row["reason"] and not row["median_ms"]
        assert found[OURS, FORWARD]["status"] == found[EAGER, FORWARD]["status"] == "ok"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RuntimeError("an illegal address"), "gate failed", 1),
        (OUT_OF_MEMORY, "out of memory", 0),
    ],
)
def test_a_kernel_that_raises_is_a_row(monkeypatch, tmp_path, capsys, error, status, code):
    def raises(h, gate, y):
        raise error

    monkeypatch.setattr(fk, "gate_residual", raises)
    out = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--tiny", "--ops", "gate_residual", "--out", str(out)]
    assert kernels.main(arguments) == code
    statuses = {(row["name"], row["status"], row["percent_of_floor"] is None) for row in read(out)}
    assert statuses == {(OURS, status, True), (EAGER, "ok", False)}
    assert f"{OURS} {status}: {type(error).__name__}: {error}" in capsys.readouterr().out


def test_inputs_that_do_not_fit_are_a_row(monkeypatch):
    def build(case, settings):
        raise OUT_OF_MEMORY

    monkeypatch.setattr(kernels, "build", build)
    (row,) = kernels.measure(case_of("attention"), tiny(), ROOF)
    assert row["name"] == OURS and row["status"] == "out of memory"


def test_a_spent_budget_leaves_cases_out(capsys):
    assert kernels.main(["--device", "cpu", "--tiny", "--ops", "flow_mix", "--budget-s", "0"]) == 0
    assert "0 of 1 cases" in capsys.readouterr().out


WANTED = [case_of(op) for op in ("attention", "norm_modulate", "gate_residual", "flow_mix")]


def _child(wanted, settings, roof, deadline, sender):
    """Dies in norm_modulate; in gate_residual it loses the device after its rows."""
    if os.environ.get("WITHOUT_ROOF"):
        os._exit(7)
    sender.send(roof or ROOF)
    for case in wanted:
        if case.op == "norm_modulate":
            os._exit(9)
        sender.send([{"op": case.op, "roof": roof is not None}])
        if case.op == "gate_residual":
            sender.close()
            os._exit(kernels.DEVICE_LOST)
    sender.close()
    os._exit(0)


@pytest.fixture
def forked(monkeypatch):
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(kernels.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(kernels, "_child", _child)


def test_a_case_that_ends_its_process_costs_its_own_rows(forked):
    reports = []

    def report(case, rows):
        reports.append((case.op, rows[0].get("reason"), rows[0].get("roof")))

    assert kernels.measure_apart(WANTED, tiny(), report, float("inf")) == []
    assert reports == [
        ("attention", None, False),
        ("norm_modulate", "RuntimeError: its process ended with code 9", None),
        ("gate_residual", None, True),  # the first process's roof goes on
        ("flow_mix", None, True),
    ]


def test_a_process_that_cannot_start_is_not_tried_for_every_case(forked, monkeypatch):
    monkeypatch.setenv("WITHOUT_ROOF", "1")
    with pytest.raises(RuntimeError, match="ended with code 7"):
        kernels.measure_apart(WANTED, tiny(), lambda *_: None, float("inf"))


def test_a_lost_device_ends_the_process_after_its_rows(monkeypatch):
    sender = Mock()
    lost = Mock(side_effect=RuntimeError("an illegal address"))
    monkeypatch.setattr(timing, "synchronize", lost)
    monkeypatch.setattr(kernels.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        kernels._child(WANTED[3:] + WANTED, tiny(), ROOF, float("inf"), sender)
    assert ended.value.code == kernels.DEVICE_LOST
    (roof,), (rows,) = (call.args for call in sender.send.call_args_list)
    assert roof is ROOF and rows[0]["op"] == "flow_mix"
    sender.close.assert_called_once()


@pytest.mark.slow
def test_a_process_of_its_own_measures_the_same():
    rows = []
    settings = tiny("--ops", "flow_mix", candidates=[OURS])
    report = lambda case, found: rows.extend(found)  # noqa: E731
    assert kernels.measure_apart(cases(settings), settings, report, float("inf")) == []
    assert [(row["name"], row["status"]) for row in rows] == [(OURS, "ok")]
    assert rows[0]["percent_of_floor"] > 0


def test_the_table_shows_what_costs_a_step_most():
    def row(op, direction, median, name=OURS, status="ok", reason=None):
        return {
            **{"op": op, "storage": None, "products": "bfloat16", "pixels": 1024, "batch": 1},
            **{"direction": direction, "name": name, "status": status, "reason": reason},
            **{"median_ms": median, "floor_ms": 1.0},
            "percent_of_floor": median and 100 / median,
        }

    rows = [
        row("attention", FORWARD, 90.0),
        row("attention", BOTH, 4.0),
        row("attention", BOTH, 8.0, EAGER),
        row("attention", BOTH, 5.0, "compile"),
        row("attention", BOTH, 16.0, "sdpa"),
        row("attention", BOTH, 40.0, "liger"),  # the faster peer counts
        row("norm_modulate", BOTH, 3.0),
        row("flow_mix", FORWARD, 50.0),
        row("flow_loss", BOTH, None, status="out of memory", reason="too much"),
        row("flow_loss", BOTH, None, "liger", status="skipped", reason="No module"),
    ]
    lines = table(rows).splitlines()
    (line,) = (each for each in lines if each.startswith("attention") and "+backward" in each)
    assert line.split()[-5:] == ["4.000", "25", "0.50", "0.80", "0.25"]
    assert any("flow_loss" in each and "out of memory: too much" in each for each in lines)
    assert any(each == "liger skipped: No module" for each in lines)
    first = lines.index(next(each for each in lines if "five slowest" in each))
    # by calls times the time over the floor, of the longest direction: 57 x 3, 76 x 2, 1 x 49
    assert [each.split()[0] for each in lines[first + 1 :]] == [
        "attention",
        "norm_modulate",
        "flow_mix",
    ]


def test_ops_are_timed_cold(monkeypatch):
    compare = Mock(side_effect=timing.compare)
    monkeypatch.setattr(timing, "compare", compare)
    measured(case_of("flow_mix"))
    assert compare.call_args.kwargs["cold"]


def test_no_script_hides_the_package_kernels():
    """bitsandbytes, transformers and diffusers import `kernels` where there is one."""
    found = find_spec("kernels")
    assert found is None or found.origin is None  # a folder with no code in it


@pytest.mark.slow
def test_pytest_benchmark_runs_the_cases_and_the_ordinary_run_does_not(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    options = ["-q", "-p", "no:cacheprovider", "-k", "flow_loss"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/kernels/test_benchmark.py", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
