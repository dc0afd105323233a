"""The bench of single ops: which cases, what they are held to, who is refused, what a row says."""

import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import fluxfast_kernels as fk
import pytest
import torch

from bench import catalogue, floor, kernel_cases, kernels, timing
from bench.kernel_cases import Case, cases, ops_of
from bench.kernel_gate import Gate, errors
from bench.kernel_problem import BOTH, CANDIDATES, EAGER, FORWARD, OURS
from bench.kernel_table import table
from bench.kernel_work import build
from fluxfast.memory.cost import (
    Work,
    block_ops,
    lora_of,
    shape_of,
    total_bytes,
    total_flop,
)
from fluxfast.model.spec import DEV

ROOT = Path(__file__).resolve().parent.parent
ROW_FIELDS = {
    *("name", "status", "reason", "median_ms", "p10_ms", "p90_ms", "ratio", "rounds", "warmup"),
    *("peak_memory_bytes", "peak_memory_kind", "date", "commit", "dirty", "device", "device_name"),
    *("driver", "cuda", "cpu_model", "cpu_count", "threads", "python", "torch", *timing.LIBRARIES),
    *("bench", "op", "direction", "storage", "products", "compute", "pixels", "batch", "tokens"),
    *("text_tokens", "hidden", "rank", "bytes", "flop", "copy_gb_per_s", "matmul_tflop_per_s"),
    *("floor_ms", "percent_of_floor", "gb_per_s", "tflop_per_s", "interleaved"),
    *("worst", "worst_error", "tolerance"),
}
ROOF = floor.Roof(10.0, {kind: 0.5 for kind in floor.KINDS})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, and no search through the heap for each candidate's peak memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(timing, "peak_memory", lambda work, device: (work(), None, None)[1:])
    monkeypatch.setattr(timing, "free_memory", lambda: None)
    yield
    torch.set_num_threads(threads)


def tiny(*arguments: str, compute: str = "fp32", candidates=(OURS, EAGER)):
    """Settings of two samples of narrow layers."""
    given = ["--device", "cpu", "--tiny", "--compute", compute, *arguments]
    return kernels.settings_of(kernels.parse([*given, "--candidates", *candidates]))


def measured(case: Case, settings=None) -> dict[tuple[str, str], dict]:
    rows = kernels.measure(case, settings or tiny(), ROOF)
    return {(row["name"], row["direction"]): row for row in rows}


def case_of(op: str, storage: str = "", products: str = "") -> Case:
    return Case(op, storage, products, 64, 2)


# ---------------------------------------------------------------- which cases


def test_every_op_of_the_catalogue_has_a_case():
    documented = {op.name.split("(")[0] for op in catalogue.OPS}
    settings = tiny()
    assert {case.op for case in cases(settings)} == documented
    linears = {(c.storage, c.products) for c in cases(settings) if c.op == "lora_linear"}
    assert linears == set(kernel_cases.MODES)
    rows = [c.products for c in cases(settings) if c.op == "quantize_rows"]
    assert sorted(rows) == ["fp8", "int8"]


def test_what_costs_a_step_most_comes_first():
    shapes = ((512, 1), (1024, 4), (1024, 1))
    settings = replace(tiny(), spec=DEV, shapes=shapes, compute=torch.bfloat16, text_tokens=512)
    found = cases(settings)
    assert len(set(found)) == len(found)
    seen = [(c.pixels, c.batch) for c in found if c.pixels]
    assert list(dict.fromkeys(seen)) == [(1024, 1), (512, 1), (1024, 4)]
    assert seen == sorted(seen, key=lambda shape: (shape[1], -shape[0]))
    ops = list(dict.fromkeys(case.op for case in found))
    assert ops[0] == "norm_modulate_lora_linear" and ops[-1] == "hadamard_rotate"
    places = [ops.index(op) for op in ("qk_norm_rope_attention", "lora_linear", "flow_loss")]
    assert places == sorted(places)
    assert found.index(Case("nf4_decode", "nf4")) < found.index(Case("flow_mix", "", "", 1024, 1))


def test_cards_without_fp8_are_not_asked_for_it(monkeypatch):
    monkeypatch.setattr(kernel_cases, "arch_of", lambda device: 86)
    assert not any(case.in_fp8() for case in cases(tiny()))


def test_bytes_and_flop_are_the_catalogues():
    """At its shape, for the ops that it counts the same way: one launch, or a sum of passes."""
    settings = replace(tiny(), spec=DEV, compute=torch.bfloat16, text_tokens=512)
    wanted = {op.name: op for op in catalogue.OPS}
    for op, products in {
        "attention": "",
        "norm_modulate": "",
        "nf4_decode": "",
        "quantize_rows": "int8",
        "hadamard_rotate": "",
        "flow_mix": "",
        "flow_loss": "",
    }.items():
        forward, _ = ops_of(Case(op, "", products, 1024, 1), settings)
        known = wanted[op]
        assert total_bytes(forward) == pytest.approx(known.bytes_moved, rel=1e-6), op
        if known.flop > 1e10:
            assert total_flop(forward) == pytest.approx(known.flop), op


@pytest.mark.parametrize(("storage", "products"), kernel_cases.MODES)
def test_a_single_blocks_ops_are_those_of_its_three_cases(storage, products):
    """All but the sum of two gradients, which autograd takes."""
    settings = replace(tiny(compute="bf16"), spec=DEV, text_tokens=512)
    kinds = {"dense": "bf16"}
    work = Work(
        DEV, kinds.get(storage, storage), products or "bf16", "bf16", lora_of(DEV, settings.rank)
    )
    block = block_ops(work, "single_blocks.0", shape_of(1024, 1024, 1, 512))
    block_backward = [op for op in block.backward if not op.name.endswith("gradients added")]
    timed = [
        ops_of(Case(op, storage, products, 1024, 1), settings)
        for op in ("norm_modulate_lora_linear", "qk_norm_rope_attention", "gelu_lora_linear")
    ]
    assert [op for forward, _ in timed for op in forward] == block.forward
    assert [op for _, backward in timed for op in backward] == block_backward


def test_what_goes_backward_is_counted_too():
    settings = replace(tiny(compute="bf16"), spec=DEV, text_tokens=512)
    forward, backward = ops_of(Case("flow_loss", "", "", 512, 4), settings)
    latents = 4 * 1024 * 64
    assert total_bytes(forward) == (2 + 2 + 4) * latents
    assert total_bytes(backward) == (2 + 2) * latents
    forward, backward = ops_of(Case("gate_residual", "", "", 512, 4), settings)
    assert total_bytes(forward) == total_bytes(backward) == 3 * 2 * 4 * 1024 * 3072
    forward, backward = ops_of(Case("lora_linear", "nf4", "", 512, 4), settings)
    rows, update = 4 * 1024, 2 * 4 * 1024 * 16
    product, decoded = 2 * rows * 3072 * 3072, 3072 * 3072
    # x A, · B; backward the first again, both towards their factors and towards x; dy = gate · dout
    assert total_flop(forward) == product + 2 * update * 3072 + decoded
    assert total_flop(backward) == product + 5 * update * 3072 + decoded + rows * 3072


# ---------------------------------------------------------------- the floor


def test_the_roof_is_measured_and_a_missing_product_is_left_out(monkeypatch):
    def missing(*_):
        raise RuntimeError("not here")

    monkeypatch.setattr(torch, "_int_mm", missing)
    roof = floor.measure_roof("cpu", ("fp32", "int8"), tiny=True)
    assert roof.copy_gb_per_s > 0
    assert roof.matmul_tflop_per_s.keys() == {"fp32"} and roof.matmul_tflop_per_s["fp32"] > 0
    assert floor.floor_ms(roof, "int8", 1.0, 1.0) is None


def test_the_roof_counts_a_copy_twice_and_a_multiply_add_as_two(monkeypatch):
    def compare(work, *_, **__):
        return {name: timing.Result(name, median_ms=2.0) for name in work}

    monkeypatch.setattr(floor.timing, "compare", compare)
    roof = floor.measure_roof("cpu", ("bf16",), tiny=True)
    size, side = floor.TINY_SIZES
    assert roof.copy_gb_per_s == pytest.approx(2 * size / 2e-3 / 1e9)
    assert roof.matmul_tflop_per_s["bf16"] == pytest.approx(2 * side**3 / 2e-3 / 1e12)


def test_the_floor_is_the_greater_of_bytes_and_flop():
    assert floor.floor_ms(ROOF, "bf16", 10e9, 0.1e12) == pytest.approx(1000)
    assert floor.floor_ms(ROOF, "bf16", 1e9, 1e12) == pytest.approx(2000)


# ---------------------------------------------------------------- rows


def test_a_tiny_run_writes_valid_rows(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    ops = ["lora_linear", "attention", "nf4_decode", "quantize_rows", "flow_mix"]
    arguments = ["--device", "cpu", "--tiny", "--compute", "fp32", "--rounds", "2"]
    assert kernels.main([*arguments, "--ops", *ops, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["op"] for row in rows} == set(ops)
    for row in rows:
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
    settings = tiny()
    for case in (case_of("attention"), case_of("lora_linear", "nf4", "int8")):
        forward, backward = ops_of(case, settings)
        for direction, ops in ((FORWARD, forward), (BOTH, forward + backward)):
            (row,) = (
                r for r in rows
                if (r["op"], r["products"]) == (case.op, case.products or "float32")
                and r["storage"] == (case.storage or None) and r["name"] == OURS
                and r["direction"] == direction
            )  # fmt: skip
            assert row["bytes"] == round(total_bytes(ops)) and row["flop"] == total_flop(ops)
    seen = {(r["op"], r["storage"], r["products"], r["name"], r["direction"]) for r in rows}
    for direction in (FORWARD, BOTH):
        for name in (OURS, EAGER, "bitsandbytes-gemm", "bitsandbytes-dequantize"):
            assert ("lora_linear", "nf4", "float32", name, direction) in seen
        assert ("lora_linear", "float32", "float32", EAGER, direction) in seen
        assert ("lora_linear", "int8", "int8", EAGER, direction) in seen
        assert ("attention", None, "float32", "sdpa", direction) in seen
    assert ("nf4_decode", "nf4", "float32", "bitsandbytes-dequantize", FORWARD) in seen
    assert not any(op in ("nf4_decode", "flow_mix") and d == BOTH for op, *_, d in seen)
    linear = next(r for r in rows if r["op"] == "lora_linear" and r["direction"] == BOTH)
    assert (linear["tokens"], linear["text_tokens"], linear["pixels"]) == (16, 8, 64)
    said = capsys.readouterr().out
    assert "11 of 11 cases" in said and "five slowest kernels" in said
    assert len(re.findall(r"^lora_linear .* \+backward ", said, re.MULTILINE)) == 6


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
        (Case("nf4_decode", "nf4"), "bitsandbytes-dequantize", "bitsandbytes"),
        (case_of("norm_modulate"), "liger", "liger_kernel"),
    ):
        found = measured(case, settings)
        row = found[name, FORWARD]
        assert row["status"] == "skipped" and library in row["reason"] and not row["median_ms"]
        assert found[OURS, FORWARD]["status"] == found[EAGER, FORWARD]["status"] == "ok"


def raises_after(error: Exception, calls: int = 0):
    """gate_residual, until it has been called so often."""
    real, seen = fk.gate_residual, []

    def call(h, gate, y):
        seen.append(0)
        if len(seen) > calls:
            raise error
        return real(h, gate, y)

    return call


@pytest.mark.parametrize(
    ("error", "calls", "status", "code"),
    [
        (RuntimeError("an illegal address\nand where"), 0, "gate failed", 1),
        (RuntimeError("an illegal address\nand where"), 3, "failed", 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 0, "out of memory", 0),
        (torch.OutOfMemoryError("CUDA out of memory"), 3, "out of memory", 0),
    ],
)
def test_a_kernel_that_raises_is_a_row(monkeypatch, tmp_path, capsys, error, calls, status, code):
    monkeypatch.setattr(fk, "gate_residual", raises_after(error, calls))
    out = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--tiny", "--ops", "gate_residual", "--out", str(out)]
    assert kernels.main(arguments) == code
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ours = [row for row in rows if row["name"] == OURS]
    assert [row["status"] for row in ours] == [status, status]
    assert all(row["reason"] == f"{type(error).__name__}: {str(error).splitlines()[0]}"
               and row["percent_of_floor"] is None for row in ours)  # fmt: skip
    assert [row["status"] for row in rows if row["name"] == EAGER] == ["ok", "ok"]
    assert f"{OURS} {status}" in capsys.readouterr().out


def test_inputs_that_do_not_fit_are_a_row(monkeypatch):
    def build(case, settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "build", build)
    (row,) = kernels.measure(case_of("attention"), tiny(), ROOF)
    assert row["name"] == OURS and row["status"] == "out of memory"


# ---------------------------------------------------------------- the gate


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_every_op_and_its_eager_form_pass(compute):
    settings = tiny(compute=compute)
    for case in cases(settings):
        problem = build(case, settings)
        gate = Gate(problem, case)
        for name in (OURS, EAGER):
            for direction in problem.directions:
                wrong, seen = gate.check(problem.candidates[name], direction)
                assert wrong is None, (str(case), name, wrong)
                assert 0 <= seen["worst_error"] <= seen["tolerance"] < 0.1, (str(case), seen)


class _Scaled(torch.autograd.Function):
    """x, whose gradient is 2 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return 1.02 * dx


def wrong_values(real, at: str):
    def call(*arguments, **named):
        y = real(*arguments, **named)
        if at == "everywhere":
            return 1.02 * y
        wrong = torch.zeros_like(y)
        wrong.view(-1)[-1] = 0.5 if at == "one element" else float("nan")
        return y + wrong

    return call


CASES = [
    case_of("lora_linear", "nf4"),
    case_of("gelu_lora_linear", "int8", "int8"),
    case_of("qk_norm_rope_attention"),
    case_of("norm_modulate"),
    case_of("flow_loss"),
]


@pytest.mark.parametrize("at", ["everywhere", "one element", "not a number"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_wrong_values_are_refused_and_not_timed(monkeypatch, case, at):
    monkeypatch.setattr(fk, case.op, wrong_values(getattr(fk, case.op), at))
    found = measured(case, tiny(compute="bf16"))
    for direction in (FORWARD, BOTH):
        row = found[OURS, direction]
        assert row["status"] == "gate failed" and row["reason"].startswith("y0 errs by")
        assert (row["worst_error"] is None) == (at == "not a number")  # JSON has no infinity
        assert row["median_ms"] is None and row["rounds"] == 0
        assert found[EAGER, direction]["status"] == "ok"


@pytest.mark.parametrize(
    ("case", "trained"),
    [
        (CASES[0], "lora_a"),
        (CASES[0], "lora_b"),
        (CASES[0], "residual"),
        (CASES[1], "u"),
        (CASES[3], "h"),
        (CASES[4], "prediction"),
    ],
)
def test_wrong_gradients_are_refused_and_the_forward_is_timed(monkeypatch, case, trained):
    real = getattr(fk, case.op)

    def call(*arguments, **named):
        bound = inspect.signature(real).bind(*arguments, **named)
        bound.arguments[trained] = _Scaled.apply(bound.arguments[trained])
        return real(*bound.args, **bound.kwargs)

    monkeypatch.setattr(fk, case.op, call)
    found = measured(case, tiny(compute="bf16"))
    refused, forward = found[OURS, BOTH], found[OURS, FORWARD]
    assert refused["status"] == "gate failed" and refused["median_ms"] is None
    assert refused["reason"].startswith(f"d{trained} errs by")
    assert forward["status"] == "ok" and forward["median_ms"] > 0


def test_wrong_codes_are_refused(monkeypatch):
    real = fk.quantize_rows

    def off(x, kind):
        rows, x = real(x, kind)
        return replace(rows, scale=1.01 * rows.scale), x

    monkeypatch.setattr(fk, "quantize_rows", off)
    found = measured(case_of("quantize_rows", "", "int8"))
    assert found[OURS, FORWARD]["status"] == "gate failed"


def test_the_truth_is_that_of_all_samples():
    settings = tiny(compute="fp32")
    case = case_of("lora_linear", "dense")
    problem = build(case, settings)
    gate = Gate(problem, case)
    inputs = {n: t.detach().double() for n, t in problem.inputs.items()}
    for name in problem.trained:
        inputs[name].requires_grad_()
    y = problem.reference(**inputs)
    leaves = [inputs[name] for name in problem.trained]
    grads = torch.autograd.grad(y, leaves, [dy.double() for dy in problem.dys])
    for name, expected in zip(
        ["y0", *(f"d{n}" for n in problem.trained)], [y, *grads], strict=True
    ):
        assert max(errors(gate.truth[name], expected.detach())) < 1e-12, name


# ---------------------------------------------------------------- a run


def test_a_spent_budget_leaves_cases_out(capsys):
    assert kernels.main(["--device", "cpu", "--tiny", "--ops", "flow_mix", "--budget-s", "0"]) == 0
    assert "0 of 1 cases" in capsys.readouterr().out


def test_a_bad_call_ends_with_2():
    for bad in (["--pixels", "100"], ["--ops", "unknown"], ["--candidates", "unknown"]):
        with pytest.raises(SystemExit) as error:
            kernels.parse(["--device", "cpu", *bad])
        assert error.value.code == 2


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
            os._exit(kernels.LOST)
    sender.close()
    os._exit(0)


@pytest.fixture
def forked(monkeypatch):
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(kernels.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(kernels, "_child", _child)


def test_a_case_that_ends_its_process_costs_its_own_rows(forked):
    found = []

    def report(case, rows):
        found.append((case.op, rows[0].get("reason"), rows[0].get("roof")))

    assert kernels.measure_apart(WANTED, tiny(), report, float("inf")) == []
    assert found == [
        ("attention", None, False),
        ("norm_modulate", "RuntimeError: its process ended with code 9", None),
        ("gate_residual", None, True),  # the first process's roof goes on
        ("flow_mix", None, True),
    ]


def test_a_process_that_cannot_start_is_not_tried_for_every_case(forked, monkeypatch):
    monkeypatch.setenv("WITHOUT_ROOF", "1")
    with pytest.raises(RuntimeError, match="ended with code 7"):
        kernels.measure_apart(WANTED, tiny(), lambda *_: None, float("inf"))


def test_a_process_of_its_own_measures_the_same():
    rows = []
    settings = tiny("--ops", "flow_mix", candidates=[OURS])
    report = lambda case, found: rows.extend(found)  # noqa: E731
    assert kernels.measure_apart(cases(settings), settings, report, float("inf")) == []
    assert [(row["name"], row["status"]) for row in rows] == [(OURS, "ok")]
    assert rows[0]["percent_of_floor"] > 0


def test_the_table_says_what_costs_a_step_most():
    def row(op, direction, median, name=OURS, floor=1.0, **more):
        shape = {"storage": None, "products": "bfloat16", "pixels": 1024, "batch": 1}
        return {"op": op, "direction": direction, "name": name, "median_ms": median,
                "floor_ms": floor, "percent_of_floor": median and 100 * floor / median,
                "status": "ok", "reason": None} | shape | more  # fmt: skip

    rows = [
        row("attention", FORWARD, 90.0),
        row("attention", BOTH, 4.0),
        row("attention", BOTH, 8.0, EAGER),
        row("attention", BOTH, 5.0, "compile"),
        row("attention", BOTH, 16.0, "sdpa"),
        row("norm_modulate", BOTH, 3.0),
        row("flow_mix", FORWARD, 50.0),
        row("flow_loss", BOTH, None, status="out of memory", reason="too much"),
        row("flow_loss", BOTH, None, "liger", status="skipped", reason="No module"),
    ]
    said = table(rows).splitlines()
    (line,) = (each for each in said if each.startswith("attention") and "+backward" in each)
    assert line.split()[-5:] == ["4.000", "25", "0.50", "0.80", "0.25"]
    assert any("flow_loss" in each and "out of memory: too much" in each for each in said)
    assert any(each == "liger skipped: No module" for each in said)
    first = said.index(next(each for each in said if "five slowest" in each))
    # by calls times the time over the floor, of the longest direction: 57 x 3, 76 x 2, 1 x 49
    assert [each.split()[0] for each in said[first + 1 :]] == [
        "attention", "norm_modulate", "flow_mix",
    ]  # fmt: skip


# ---------------------------------------------------------------- what it stands on


class _Event:
    log: list[str] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.log.append("record")

    def synchronize(self):
        self.log.append("wait")

    def elapsed_time(self, end):
        return 12.5


@pytest.mark.parametrize(
    ("cold", "before"), [(False, ["ready"]), (True, ["ready", "flush", "spin"])]
)
def test_a_gpu_is_timed_by_its_own_events(monkeypatch, cold, before):
    log = _Event.log = []

    class Flushed:
        def zero_(self):
            log.append("flush")

    def empty(count, dtype, device):
        assert count >= 256 << 20 and dtype.itemsize == 1 and device == "cuda"
        return Flushed()

    monkeypatch.setattr(timing.torch.cuda, "Event", _Event)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda device: log.append("ready"))
    monkeypatch.setattr(timing.torch.cuda, "_sleep", lambda cycles: log.append("spin"))
    with monkeypatch.context() as patch:
        patch.setattr(timing.torch, "empty", empty)
        elapsed = timing.elapsed_ms(lambda: log.append("work"), "cuda", cold)
    assert elapsed == 12.5
    assert log == [*before, "record", "work", "record", "wait"]


def test_ops_are_timed_cold(monkeypatch):
    seen = []
    real = timing.compare
    monkeypatch.setattr(timing, "compare", lambda *a, **k: seen.append(k) or real(*a, **k))
    measured(case_of("flow_mix"))
    assert seen == [{"cold": True}]


def test_a_script_of_the_bench_does_not_hide_the_package_kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))  # as Python does for `python bench/step.py`
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    hidden = str(ROOT / "bench" / "kernels.py")
    assert find_spec("kernels").origin == hidden
    spec = spec_from_file_location("timing_again", ROOT / "bench" / "timing.py")
    again = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    found = find_spec("kernels")
    assert found is None or found.origin != hidden


def test_pytest_benchmark_runs_the_cases_and_the_ordinary_run_does_not(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    arguments = [
        "bench/test_kernels_benchmark.py",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "flow_loss",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
