"""The bench of single ops: which cases in which order, what they cost, the floor, and the gate."""

import inspect
from dataclasses import replace

import fluxfast_kernels as fk
import pytest
import torch
from bench_kernels import ROOF, case_of, measured, quick, tiny  # noqa: F401

from bench import timing
from bench.errors import relative_errors
from bench.kernels import cases as kernel_cases
from bench.kernels import floor
from bench.kernels.build import build
from bench.kernels.cases import Case, cases, ops_of
from bench.kernels.gate import Gate
from bench.kernels.problem import BOTH, EAGER, FORWARD, OURS
from bench.report import catalog
from bench.step.settings import MODES
from fluxfast.memory.planner.cost import block_ops, total_bytes, total_flop
from fluxfast.memory.planner.step_spec import StepSpec, lora_of, shape_of
from fluxfast.model.spec import DEV

pytestmark = pytest.mark.usefixtures("quick")


def test_every_op_of_the_catalog_has_a_case():
    documented = {name.split("(")[0] for name in catalog.COSTS}
    settings = tiny()
    assert {case.op for case in cases(settings)} == documented
    linears = {(c.storage, c.matmul) for c in cases(settings) if c.op == "lora_linear"}
    assert linears == set(MODES.values())
    rows = [c.matmul for c in cases(settings) if c.op == "quantize_rows"]
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
    assert ops[0] == "norm_modulate_lora_linear" and set(ops[-2:]) == {"hadamard_rotate", "dropout"}
    places = [ops.index(op) for op in ("qk_norm_rope_attention", "lora_linear", "flow_loss")]
    assert places == sorted(places)
    assert found.index(Case("nf4_dequantize", "nf4")) < found.index(
        Case("flow_mix", "", "", 1024, 1)
    )


def test_cards_without_fp8_are_not_asked_for_it(monkeypatch):
    monkeypatch.setattr(kernel_cases, "arch_of", lambda device: 86)
    assert not any(case.in_fp8() for case in cases(tiny()))


@pytest.mark.parametrize(
    "op",
    [
        *(
            "attention",
            "norm_modulate",
            "nf4_dequantize",
            "quantize_rows",
            "hadamard_rotate",
            "dropout",
        ),
        *("flow_mix", "flow_loss"),
    ],
)
def test_bytes_and_flop_are_the_catalogs(op):
    """At its shape, for the ops that it counts the same way: one launch, or a sum of passes."""
    settings = replace(tiny(), spec=DEV, compute=torch.bfloat16, text_tokens=512)
    matmul = "int8" if op == "quantize_rows" else ""
    forward, _ = ops_of(Case(op, "", matmul, 1024, 1), settings)
    moved, flop = catalog.COSTS[op]
    assert total_bytes(forward) == pytest.approx(moved, rel=1e-6)
    if flop > 1e10:
        assert total_flop(forward) == pytest.approx(flop)


@pytest.mark.parametrize(("storage", "matmul"), MODES.values())
def test_a_single_blocks_ops_are_those_of_its_three_cases(storage, matmul):
    """All but the sum of two gradients, which autograd takes."""
    settings = replace(tiny(compute="bf16"), spec=DEV, text_tokens=512)
    stored = "bf16" if storage == "dense" else storage
    step = StepSpec(DEV, stored, matmul or "bf16", "bf16", lora_of(DEV, settings.rank))
    block = block_ops(step, "single_blocks.0", shape_of(1024, 1024, 1, 512))
    block_backward = [op for op in block.backward if not op.name.endswith("gradients added")]
    timed = [
        ops_of(Case(op, storage, matmul, 1024, 1), settings)
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


def test_the_roof_is_measured_and_a_missing_product_is_left_out(monkeypatch):
    def missing(*_):
        raise RuntimeError("not here")

    monkeypatch.setattr(torch, "_int_mm", missing)
    roof = floor.measure_roof("cpu", ("fp32", "int8"), True)
    assert roof.copy_gb_per_s > 0
    assert roof.matmul_tflop_per_s.keys() == {"fp32"} and roof.matmul_tflop_per_s["fp32"] > 0
    assert floor.floor_ms(roof, "int8", 1.0, 1.0) is None


def test_the_roof_counts_a_copy_twice_and_a_multiply_add_as_two(monkeypatch):
    def compare(work, *_, **__):
        return {name: timing.Result(name, median_ms=2.0) for name in work}

    monkeypatch.setattr(floor.timing, "compare", compare)
    size, side = floor.TINY_SIZES
    copy, rates = floor.measure_roof("cpu", ("bf16",), True)
    assert copy == pytest.approx(2 * size / 2e-3 / 1e9)
    assert rates["bf16"] == pytest.approx(2 * side**3 / 2e-3 / 1e12)


def test_the_floor_is_the_greater_of_bytes_and_flop():
    assert floor.floor_ms(ROOF, "bf16", 10e9, 0.1e12) == pytest.approx(1000)
    assert floor.floor_ms(ROOF, "bf16", 1e9, 1e12) == pytest.approx(2000)


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
        given = bound.arguments
        if trained in fk.LoRAUpdate._fields:
            scaled = {trained: _Scaled.apply(getattr(given["update"], trained))}
            given["update"] = given["update"]._replace(**scaled)
        else:
            given[trained] = _Scaled.apply(given[trained])
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
    case = case_of("lora_linear", "dense")
    problem = build(case, tiny(compute="fp32"))
    inputs = {name: tensor.detach().double() for name, tensor in problem.inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in problem.trained]
    y = problem.reference(**inputs)
    grads = torch.autograd.grad(y, leaves, [dy.double() for dy in problem.dys])
    truth = Gate(problem, case).truth
    assert list(truth) == ["y0", *(f"d{name}" for name in problem.trained)]
    for name, expected in zip(truth, [y.detach(), *grads], strict=True):
        assert max(relative_errors(truth[name], expected)) < 1e-12, name
