"""The roofline of a step: ops that add up to the plan, measured rows in their places, a projection
that says what it is."""

import json
import re
from dataclasses import replace

import pytest

from bench import roofline
from bench.report import arithmetic
from bench.report.plan_table import configuration
from fluxfast.memory.planner.cards import Efficiency, card
from fluxfast.memory.planner.cost import Op, total_bytes, total_flop, total_seconds
from fluxfast.memory.planner.plan import Plan, usable
from fluxfast.memory.planner.report import Row
from fluxfast.memory.planner.suggest import make_plan
from fluxfast.model.modulation import MODULATION_ROWS
from fluxfast.model.spec import DEV
from fluxfast.tools.plan import plan_rows


def planned(setting: str, gpu: str, *overrides: str) -> Plan:
    return plan_rows(configuration(setting, list(overrides)), None, gpu)[-1].plan


@pytest.fixture(scope="module")
def plain() -> Plan:
    return planned("plain", "4090")


@pytest.fixture(scope="module")
def stock() -> Plan:
    return planned("stock", "4090")


def total(lines, key: str = "seconds") -> float:
    return sum(getattr(line, key) for line in lines)


def where(items, **fields) -> list:
    """Returns the lines or counted ops that have these values."""
    return [one for one in items if all(getattr(one, k) == v for k, v in fields.items())]


def test_ops_add_up_to_what_the_plan_predicts(plain, stock):
    for plan in (plain, stock):
        for label in plan.buckets:
            lines = roofline.lines_of(plan, label)
            assert total(lines) == pytest.approx(plan.seconds(label), rel=1e-9)
            assert {line.source for line in lines} == {"assumed"}
            assert not where(lines, bound="copies")
    policies = {word for bucket in stock.buckets.values() for word in bucket.choice.policies}
    assert "gelu_int8" in policies  # else the sum above says nothing of them


def test_a_factor_of_whole_steps_is_projected_and_leaves_the_ops_as_they_are(plain):
    """And adds nothing that looks like a copy."""
    factor = Efficiency(1.3, "measured: commit abc, a card, 9 rows")
    slower = replace(plain.card, factors={"int8": factor})
    plan = make_plan(plain.request, slower, usable(24))
    assert plan.seconds("512 px") > 1.25 * plain.seconds("512 px")
    lines = {label: roofline.lines_of(plan, label) for label in plan.buckets}
    assert lines["512 px"] == roofline.lines_of(plain, "512 px")
    seconds, found = roofline.project(plan, lines)
    assert seconds == pytest.approx(sum(map(plan.seconds, plan.buckets)) / 3)
    basis = "1.3 of what shipped shares predict (measured: commit abc, a card, 9 rows)"
    assert found == basis


@pytest.mark.parametrize("policy", ["recompute_mlp", "checkpoint", "int8", "offload"])
def test_what_a_policy_costs_is_in_the_step(policy):
    plan = planned("plain", "h100", f"memory.policy={policy}", "data.0.resolution=768")
    lines = roofline.lines_of(plan, "768 px")
    assert total(lines) == pytest.approx(plan.seconds("768 px"), rel=1e-9)
    if policy == "offload":
        assert where(lines, bound="copies")
        assert plan.seconds("768 px") > 1.02 * total(line for line in lines if line.flop)
        return
    more = where(lines, group=f"policy {policy}")
    forward, backward = (where(more, direction=way) for way in ("forward", "backward"))
    if policy == "int8":  # forward writes the codes of u besides, a byte each
        u = 57 * 2816 * DEV.mlp_hidden
        assert total(forward, "bytes") - total(backward, "bytes") == pytest.approx(u)
    else:
        blocks = [one for one in where(lines, direction="forward") if one.group in roofline.TIMED]
        again = total(backward, "flop") / total(blocks, "flop")
        assert not forward and (again == 1 if policy == "checkpoint" else 0.3 < again < 0.7)


def test_modulation_that_is_formed_ahead_is_shared_by_steps(plain):
    batch = planned("plain", "h100", "train.batch_size=4", "data.0.resolution=512")
    for plan, samples in ((plain, 1), (batch, 4)):
        ops = where(roofline.step_of(plan, "512 px"), group="modulation")
        assert {one.times for one in ops} == {samples / MODULATION_ROWS}


def test_every_launch_of_a_block_has_its_op(stock):
    counted = roofline.step_of(stock, "512 px")
    groups = {"autograd", "outside the blocks", "modulation", "optimizer", *roofline.TIMED}
    assert {one.group for one in counted} == groups
    parts = {one.part for one in where(counted, group="gelu_lora_linear")}
    assert parts == {"product", "update", "weight", "element-wise"}
    forward = where(counted, group="lora_linear", part="product", direction="forward")
    # the projections of both streams
    assert total_flop(one.op for one in forward) == 19 * 2 * (1024 + 512) * 3072 * 3072


def test_lines_hold_their_ops(plain):
    counted = roofline.step_of(plain, "512 px")
    lines = roofline.lines_of(plain, "512 px")
    key = {"group": "norm_modulate_lora_linear", "direction": "backward", "part": "update"}
    (line,) = where(lines, **key)
    ops = [one.op for one in where(counted, **key)]
    assert len(ops) > 100
    assert (line.flop, line.bytes) == (total_flop(ops), pytest.approx(total_bytes(ops)))
    assert line.seconds == pytest.approx(total_seconds(ops, plain.card))
    assert line.peak_s == pytest.approx(total_seconds(ops, arithmetic.at_peak(plain.card)))
    assert line.launches == sum(op.launches for op in ops)


def test_weights_are_decoded_or_transposed():
    """An 8-bit base that is multiplied so is only transposed, towards x."""
    plan = planned("plain", "h100", "model.storage=int8", "model.compute=int8")
    weights = where(roofline.step_of(plan, "1024 px"), part="weight")
    ready = [one for one in weights if one.group in roofline.TIMED]
    assert {one.op.name.partition(" ")[2] for one in ready} == {"transpose"}
    assert {one.direction for one in ready} == {"backward"}


def test_of_mixed_ops_the_longer_half_names_the_bound(plain):
    """A millisecond of products, and more or less than that of bytes."""
    product = Op("x product", "bf16", 1e-3 * 165.2e12 * 0.909, 0.0)
    for milliseconds, bound in ((0.9, "compute"), (1.1, "memory")):
        element = Op("x product", "element", 0.0, milliseconds * 1e-3 * 1008e9 * 0.91)
        counted = [roofline.Counted("x", "forward", op) for op in (product, element)]
        line = roofline._line("x", "forward", "product", counted, plain.card, None)
        assert line.bound == bound and line.seconds == pytest.approx(1e-3 * (1 + milliseconds))


def test_the_bound_is_what_takes_longer(plain):
    bounds = {(line.group, line.part): line.bound for line in roofline.lines_of(plain, "1024 px")}
    assert bounds["qk_norm_rope_attention", "attention"] == "compute"
    assert bounds["gelu_lora_linear", "product"] == "compute"
    assert bounds["gelu_lora_linear", "element-wise"] == "memory"
    assert bounds["modulation", "product"] == "memory"  # sixteen rows over every weight


def kernel_row(op: str, direction: str, median_ms: float) -> dict:
    """As bench.kernels writes it: at 512 px, on an RTX 4090, NF4 and int8."""
    return {
        **{"bench": "kernels", "op": op, "direction": direction, "name": "fluxfast"},
        **{"status": "ok", "storage": "nf4", "products": "int8", "compute": "bfloat16"},
        **{"pixels": 512, "batch": 1, "tokens": 1024 if op == "lora_linear" else 1536},
        **{"text_tokens": 512, "hidden": 3072, "rank": 16, "median_ms": median_ms},
        "device_name": "NVIDIA GeForce RTX 4090",
    }


def predicted_ms(plan: Plan, op: str, direction: str) -> float:
    row = kernel_row(op, "forward", 0.0)
    return 1e3 * roofline.predicted_s(row, direction, plan.card, plan.request.step)


@pytest.mark.grid(2)
@pytest.mark.parametrize("op", roofline.TIMED)
def test_a_measured_op_stretches_its_lines_and_no_others(plain, op):
    forward, backward = (predicted_ms(plain, op, way) for way in ("forward", "backward"))
    rows = [
        kernel_row(op, "forward", 9.0 * forward),  # an older one
        kernel_row(op, "forward", 2.0 * forward),
        kernel_row(op, "forward+backward", 2.0 * forward + 1.5 * backward),
    ]
    before, after = (roofline.lines_of(plain, "512 px", given) for given in ([], rows))
    for old, new in zip(before, after, strict=True):
        times = {"forward": 2.0, "backward": 1.5}[old.direction] if old.group == op else 1.0
        assert new.seconds == pytest.approx(times * old.seconds), old
        assert new.source == ("measured" if old.group == op else "assumed")
        assert new.peak_s == old.peak_s
    # of other picture sizes nothing is known
    assert roofline.lines_of(plain, "768 px", rows) == roofline.lines_of(plain, "768 px")


@pytest.mark.parametrize(
    ("op", "prefix"),
    [
        ("norm_modulate_lora_linear", "single_blocks.7."),
        ("gelu_lora_linear", "single_blocks.7."),
        ("lora_linear", "double_blocks.7.img_"),
    ],
)
def test_an_op_timed_at_the_steps_own_shape_takes_that_time_in_it(plain, op, prefix):
    """What is predicted of a row is what the step has of it in one block."""
    counted = where(roofline.step_of(plain, "512 px"), group=op)
    own = [one.op for one in counted if one.op.name.startswith(prefix)]
    assert 1e3 * total_seconds(own, plain.card) == pytest.approx(
        sum(predicted_ms(plain, op, way) for way in ("forward", "backward"))
    )


@pytest.mark.grid(4)
@pytest.mark.parametrize(
    "other",
    [
        {"status": "gate failed", "median_ms": None},
        {"name": "eager"},
        {"device_name": "NVIDIA GeForce RTX 3090"},
        {"device_name": "NVIDIA GeForce RTX 4090 Laptop GPU"},
        {"storage": "int8"},
        {"products": "bfloat16"},
        {"compute": "float32"},
        {"pixels": 768},
        {"batch": 4},
        {"hidden": 128},
        {"op": "nf4_dequantize", "pixels": None, "batch": None, "tokens": None},
    ],
)
def test_rows_of_something_else_count_for_nothing(plain, other):
    rows = [kernel_row("lora_linear", "forward", 1e3) | other]
    assert roofline.lines_of(plain, "512 px", rows) == roofline.lines_of(plain, "512 px")


def test_attention_has_no_weight_whose_storage_counts(plain):
    row = kernel_row(roofline.ATTENTION, "forward", 5.0) | {"storage": None, "products": "bfloat16"}
    lines = roofline.lines_of(plain, "512 px", [row])
    sources = {(line.group, line.direction): line.source for line in lines}
    assert sources[roofline.ATTENTION, "forward"] == "measured"
    assert sources[roofline.ATTENTION, "backward"] == "assumed"  # forward alone was timed


def test_measured_shares_are_named(plain):
    measured = {**plain.card.efficiency, "int8": Efficiency(0.7, "measured: commit abc, a card")}
    plan = replace(plain, card=replace(plain.card, efficiency=measured))
    lines = roofline.lines_of(plan, "512 px")
    sources = {line.part: line.source for line in lines if line.group == "lora_linear"}
    assert sources["product"] == "measured" and sources["update"] == "assumed"


# ---------------------------------------------------------------- the projection

# it/s reported of ai-toolkit with its stock file
REPORTED = ["4090, batch 1: 0.4375 it/s", "L40S, batch 1: 0.838 it/s"]
REPORTED += ["A100, batch 4: 0.3478 it/s", "H100, batch 4: 0.4537 it/s"]


def printed(capsys, *arguments: str) -> str:
    assert roofline.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_the_stock_setting_is_set_beside_the_headline(capsys, stock):
    text = printed(capsys, "--card", "4090", "--setting", "stock")
    seconds = sum(stock.seconds(label) for label in stock.buckets) / 3
    assert f"Projection, not measured: {1 / seconds:.2f} it/s ({seconds:.3f} s a step" in text
    assert "; 0% of it from measured ops, the rest from assumed shares" in text
    assert all(f"\n  {line}" in text for line in REPORTED)
    # the ratio to the one of the same card and batch, and to no other
    assert re.findall(r"batch (\d): (.*) it/s; projected: (.*) times that", text) == [
        ("1", "0.4375", f"{1 / seconds / 0.4375:.1f}")
    ]
    assert "LoRA of rank 16 on all, adamw8bit, EMA; nf4 base, bf16 products, batch 1" in text
    for label in ("512 px", "768 px", "1024 px"):
        assert f"\n{label}: " in text


@pytest.mark.parametrize("options", [[], ["--setting", "stock", "--pixels", "1024"]])
def test_other_settings_are_not(capsys, options):
    text = printed(capsys, "--card", "4090", *options)
    assert "Projection, not measured:" in text and "none is set beside this" in text
    assert not any(line in text for line in REPORTED) and "times that" not in text


def test_another_batch_is_no_ratio(capsys):
    text = printed(capsys, "--card", "L40S", "--setting", "stock", "--batch", "4")
    assert all(line in text for line in REPORTED) and "times that" not in text


def test_rows_count_in_the_projection(capsys, tmp_path):
    row = kernel_row("lora_linear", "forward", 1e3)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    common = ["--card", "4090", "--pixels", "512"]
    without = printed(capsys, *common, "--rows", str(tmp_path / "none.jsonl"))
    text = printed(capsys, *common, "--rows", str(tmp_path / "rows.jsonl"))
    assert "lora_linear" in without and "measured\n" not in without
    assert re.search(r"lora_linear +forward +product .* measured\n", text)
    rate = float(re.search(r"measured: ([\d.]+) it/s", text)[1])
    share = int(re.search(r"(\d+)% of it from measured ops", text)[1])
    assert rate < 0.1 and share > 95  # 38 projections of about a second


def test_options_reach_the_plan(capsys):
    options = "--card 4090 --pixels 512 --batch 2 --storage int8 --compute int8"
    text = printed(capsys, *options.split())
    assert "int8 base, int8 products, batch 2" in text and "\n512 px: " in text
    assert "\n768 px: " not in text and " at 512 px)" in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--card", "5070"], "hint: the nearest is"),
        (["--card", "3090", "--compute", "fp8"], "compute fp8 needs"),
        (["--card", "4090", "--pixels", "0"], "resolution"),
    ],
)
def test_a_bad_call_says_why(capsys, arguments, words):
    assert roofline.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_what_does_not_fit_says_what_is_missing(capsys, monkeypatch):
    reason = "it needs at least 14 GiB; what fits: a smaller batch"
    row = Row(card("3060"), 12, "mixed", None, reason)
    monkeypatch.setattr(roofline, "plan_rows", lambda *_: [row])
    assert roofline.main(["--card", "3060", "--batch", "4"]) == 2
    assert "RTX 3060 12 GB: it needs at least 14 GiB; what fits" in capsys.readouterr().err


def test_no_card_is_a_bad_call():
    with pytest.raises(SystemExit) as error:
        roofline.main([])
    assert error.value.code == 2


def test_sums_are_of_the_lines():
    lines = [
        roofline.Line("a", "forward", "product", 3, 2e9, 4e9, "compute", 0.001, 0.002, "assumed"),
        roofline.Line("b", "backward", "update", 4, 5e9, 6e9, "memory", 0.003, 0.005, "measured"),
    ]
    head, first, second, last = roofline.table(lines).splitlines()
    assert first.split() == [
        *("a", "forward", "product", "3", "2.0", "4.00", "compute", "1.00", "2.00", "assumed")
    ]
    assert last.split() == ["step", "7", "7.0", "10.00", "4.00", "7.00"]


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("attention forward", roofline.ATTENTION),
        ("double_blocks.1.txt_mlp.2 dx", "gelu_lora_linear"),
        ("double_blocks.1.img_attn.qkv norm", "norm_modulate_lora_linear"),
        ("double_blocks.1.img_attn.qkv gradients added", "autograd"),
        ("double_blocks.1 gradients joined", "autograd"),
        ("double_blocks.1 qk norm", roofline.ATTENTION),
    ],
)
def test_a_launch_has_its_op(name, op):
    assert roofline.fused_op("double_blocks.1", Op(name, "element", 0, 0)) == op
