"""The planner: what it must fit, that it keeps its limits, is fast, and refuses in words."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from random_inputs import WIDE

from fluxfast.config.schema import build_config, load_config
from fluxfast.errors import ConfigError
from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.cards import card
from fluxfast.memory.planner.choose import Chooser
from fluxfast.memory.planner.plan import (
    CONTEXT,
    GIB,
    Request,
    cheaper_policies,
    usable,
)
from fluxfast.memory.planner.report import breakdown, table
from fluxfast.memory.planner.step_spec import Shape, StepSpec, lora_of, shape_of
from fluxfast.memory.planner.suggest import make_plan
from fluxfast.model.activations import EXACT
from fluxfast.model.spec import DEV
from fluxfast.tools.plan import plan_rows

ROOT = Path(__file__).parents[2]
STOCK = ROOT / "examples" / "ai-toolkit" / "flux_dev_24gb.yaml"
FOUR_BLOCKS = replace(WIDE, depth_single_blocks=2)


def request(sides=(1024,), targets="attn+mlp", batch=1, compute="int8", **more) -> Request:
    step = StepSpec(DEV, "nf4", compute, "bf16", lora_of(DEV, 16, targets))
    shapes = {f"{side}": shape_of(side, side, batch, 512) for side in sides}
    return Request(step, shapes, **more)


def needed(plan) -> float:
    """GiB of the card, CUDA itself included."""
    return (plan.peak + CONTEXT) / GIB


@pytest.mark.parametrize(
    ("vram", "gpu", "side", "most"),
    [(24, "4090", 1024, 22.5), (16, "4060 Ti", 768, 16), (12, "3060 12 GB", 512, 12)],
)
def test_cards_need_neither_checkpoint_nor_offload(vram, gpu, side, most):
    plan = make_plan(request((side,)), card(gpu), usable(vram))
    assert not {"checkpoint", "offload"} & set(plan.buckets[f"{side}"].choice.policies)
    assert needed(plan) <= most and (plan.host == 0 or vram < 24)


def test_stock_ai_toolkit_on_24_gb():
    """494 modules with their modulation, EMA, 8-bit AdamW, three resolutions, previews."""
    config = load_config(STOCK)
    (row,) = [row for row in plan_rows(config, 24, None) if row.label == "mixed"]
    plan = row.plan
    assert plan is not None and needed(plan) <= 22.5
    assert plan.request.modulation_trained and plan.request.ema and plan.modulation == "in_place"
    assert set(plan.buckets) == {"512 px", "768 px", "1024 px"}
    assert all("checkpoint" not in b.choice.policies for b in plan.buckets.values())
    assert max(plan.phases.values()) <= usable(24)


@pytest.mark.grid(1)
@pytest.mark.parametrize("gib", [12, 16, 24, 80])
def test_limits_are_kept_in_every_phase(gib):
    for targets, batch in (("attn+mlp", 1), ("all", 1), ("attn+mlp", 2)):
        plan = make_plan(request((512, 1024), targets, batch), card("4090"), usable(gib))
        assert max(plan.phases.values()) <= plan.limit
        for bucket in plan.buckets.values():
            always, choice = sum(plan.static.values()), bucket.choice
            peak = Chooser(plan.request.step, bucket.shape, plan.card, False).peak(choice.policies)
            assert always + peak + choice.staging <= bucket.bytes <= plan.limit


def small_chooser() -> Chooser:
    step = StepSpec(FOUR_BLOCKS, "bf16", "bf16", "bf16", lora_of(FOUR_BLOCKS, 4))
    return Chooser(step, Shape(1, 1024, 128), card("4090"), launches=False)


@pytest.mark.parametrize("share", [0.55, 0.7, 0.8, 0.9, 0.97, 1.0])
def test_choice_is_near_the_best_of_all_there_are(share):
    """Four blocks, three exact policies and gelu_int8: all 256 mixes tried. The chooser goes block
    by block and misses mixes that use the memory to the last byte: with blocks this few, by 6 %."""
    chooser = small_chooser()
    words = ("keep", "gelu_int8", "recompute_mlp", "checkpoint")
    budget = int(share * chooser.fixed(["keep"] * 4).bytes)
    mixes = [chooser.fixed(mix) for mix in product(words, repeat=4)]
    best = min((m.seconds for m in mixes if m.bytes <= budget), default=None)
    choice = chooser.choose(budget, words)
    if best is None:
        assert choice is None
        return
    assert choice.bytes <= budget
    assert best <= choice.seconds <= 1.06 * best
    assert share < 1.0 or set(choice.policies) == {"keep"}


def test_more_memory_is_never_slower():
    chooser = Chooser(request().step, shape_of(1024, 1024, 1, 512), card("4090"), launches=False)
    full = chooser.fixed(["keep"] * 57).bytes
    times = []
    for share in (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0):
        choice = chooser.choose(int(share * full), EXACT)
        times.append(choice.seconds)
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_saved_8bit_is_the_users_word():
    exact = make_plan(request(saved_8bit="none"), card("4090"), usable(24))
    assert set(exact.buckets["1024"].choice.policies) <= set(EXACT)
    tight = make_plan(request(saved_8bit="all"), card("4090"), usable(18)).buckets["1024"]
    assert "int8" in tight.choice.policies


def test_overrides_are_honored():
    for policy in ("checkpoint", "recompute_mlp", "gelu_int8", "offload"):
        plan = make_plan(request(policy=policy), card("H100"), usable(80))
        bucket = plan.buckets["1024"]
        assert set(bucket.choice.policies) == {policy}
        assert bucket.graphed == (policy != "offload")
    plan = make_plan(request(optimizer_state="host", modulation="host"), card("H100"), usable(80))
    assert plan.optimizer_state == plan.modulation == "host" and plan.host > 2 * GIB
    assert "optimizer" not in plan.static and "weights: modulation" not in plan.static
    with pytest.raises(ConfigError, match="frozen modulation"):
        make_plan(request(targets="all", modulation="ahead"), card("H100"), usable(80))


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 64},
        {"batch": 4, "sides": (2048,), "policy": "keep"},
        {"batch": 2, "policy": "keep", "modulation": "ahead"},
        {"sides": (512,), "optimizer_state": "device", "modulation": "ahead", "policy": "keep"},
        {"preview_pixels": 5000**2},
        {"policy": "keep"},
    ],
)
def test_what_a_refusal_names_does_fit(changes):
    """Every setting that is named is tried as a user would, word by word."""
    small, limit = card("3060 12 GB"), usable(12)
    with pytest.raises(ConfigError) as caught:
        make_plan(request(**changes), small, limit)
    named = caught.value.hint.removeprefix("what fits: ").split("; or ")
    assert named and "no single" not in named[0]
    for words in named:
        again = dict(changes)
        if words.startswith("a card of"):
            make_plan(request(**again), small, usable(int(words.split()[3])))
            continue
        words = words.replace(" with gradient_accumulation", "").replace(" and ", ", ")
        for setting in words.split(", "):
            key, value = setting.split(": ")
            if key == "memory":
                again |= {"policy": "auto", "modulation": "auto", "optimizer_state": "auto"}
            elif key.startswith("memory."):
                again[key.removeprefix("memory.")] = value
            elif key == "train.batch_size":
                again["batch"] = int(value)
            elif key == "data.resolution":
                again["sides"] = (int(value),)
            else:
                assert key in ("sample.width", "sample.height"), key
                again["preview_pixels"] = int(value) ** 2
        make_plan(request(**again), small, limit)


@pytest.mark.slow
def test_a_batch_size_that_a_refusal_names_is_that_of_all_processes(monkeypatch):
    """The planner sees one process's share."""

    def named() -> int:
        with pytest.raises(ConfigError) as caught:
            make_plan(request(batch=64), card("3060 12 GB"), usable(12))
        return int(re.search(r"train.batch_size: (\d+)", caught.value.hint)[1])

    share = named()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert named() == 2 * share


@pytest.mark.slow
def test_a_refusal_says_what_is_short():
    small, limit = card("3060 12 GB"), usable(12)
    with pytest.raises(ConfigError, match="pinned host memory, of which 1 GiB"):
        make_plan(request(policy="offload"), card("4090"), usable(24), host=GIB)
    with pytest.raises(ConfigError, match="previews of this size"):
        make_plan(request((512,), preview_pixels=5000**2), small, limit)
    with pytest.raises(ConfigError, match="encoding captions needs 9.25 GiB"):
        make_plan(request((512,), policy="checkpoint"), small, usable(10))
    with pytest.raises(ConfigError, match="loading needs"):
        dense = request((512,), modulation="host")
        dense = replace(dense, step=replace(dense.step, storage="bf16"))
        make_plan(dense, card("4090"), usable(24))
    with pytest.raises(ConfigError, match="nothing under lora.dropout"):
        make_plan(
            replace(request(policy="gelu_int8"), step=replace(request().step, dropout=True)),
            small,
            limit,
        )


def test_pinned_memory_is_limited_too():
    lots = make_plan(request((1024,)), card("3060 12 GB"), usable(12))
    few = make_plan(request((1024,)), card("3060 12 GB"), usable(12), host=3 * GIB)
    assert lots.host > 3 * GIB >= few.host


def test_a_notch_cheaper_goes_on_until_nothing_is_left():
    bucket = make_plan(request(), card("4090"), usable(24)).buckets["1024"]
    chooser = Chooser(request().step, bucket.shape, card("4090"), launches=False)
    notches, before = 0, chooser.fixed(bucket.choice.policies)
    while policies := cheaper_policies(before.policies):
        choice = chooser.fixed(policies)
        assert choice.bytes <= before.bytes and choice.seconds > before.seconds
        changed = {b for a, b in zip(before.policies, policies, strict=True) if a != b}
        assert changed and changed <= {"recompute_mlp", "checkpoint"}
        before, notches = choice, notches + 1
    assert set(before.policies) == {"checkpoint"} and notches > 10
    assert cheaper_policies(("offload", "checkpoint")) is None
    assert cheaper_policies(("offload", "gelu_int8", "keep")) == (
        "offload",
        "recompute_mlp",
        "keep",
    )


def test_accumulation_and_batch_are_in_the_time():
    plan = make_plan(request((512,)), card("4090"), usable(24))
    one = plan.seconds("512")
    four = make_plan(request((512,), accumulation=4), card("4090"), usable(24)).seconds("512")
    assert four == pytest.approx(4 * one - 3 * plan.step_seconds)
    batch = make_plan(request((512,), batch=4), card("4090"), usable(80)).seconds("512")
    assert 2 * one < batch < 4 * one


def test_blocks_that_save_nothing_are_never_offloaded():
    """A LoRA on the single blocks alone: the double ones have nothing to bring away."""
    lora = lora_of(DEV, 16, "attn+mlp", ["single_blocks"])
    only = replace(request(), step=replace(request().step, lora=lora))
    for each in (only, replace(only, policy="offload")):
        policies = make_plan(each, card("3060 12 GB"), usable(12)).buckets["1024"].choice.policies
        assert set(policies[:19]) == {"keep"} and "offload" in policies[19:]


def test_graphs_keep_their_pool_through_the_optimizers_step():
    plan = make_plan(request((512,), optimizer_state="host"), card("4090"), usable(24))
    state = saved_bytes.trained(plan.request.step, "adamw", ema=False)["optimizer"]
    assert plan.buckets["512"].graphed
    assert plan.phases["optimizer step"] == plan.peak + state
    eager = make_plan(
        request((512,), optimizer_state="host", graphs=False), card("4090"), usable(24)
    )
    assert eager.phases["optimizer step"] < eager.peak


def test_layers_kept_dense_are_dearer_and_known():
    plain = request((1024,))
    dense = replace(plain, step=replace(plain.step, layers={"single_blocks.*.linear1": "bf16"}))
    a, b = (make_plan(each, card("H100"), usable(80)) for each in (plain, dense))
    assert b.static["weights: blocks"] > a.static["weights: blocks"] + 3 * GIB
    assert b.seconds("1024") > a.seconds("1024")


# ---------------------------------------------------------------- the command


def defaults(**sets):
    raw = {"model": {"path": "black-forest-labs/FLUX.1-dev"}, "data": {"folder": "."}}
    raw["data"]["resolution"] = [512, 768, 1024]
    return build_config(raw, [f"{k.replace('__', '.')}={json.dumps(v)}" for k, v in sets.items()])


@pytest.mark.slow
def test_table_has_a_row_per_card_and_size():
    rows = plan_rows(defaults(), None, None)
    lines = table(rows)
    assert len(lines) == 1 + 16 + 2 and "predicted" in lines[-1]
    cells = [line.split() for line in lines]
    assert cells[0][:2] == ["card", "GiB"]
    assert Counter(row.label for row in rows) == dict.fromkeys(
        ("512 px", "768 px", "1024 px", "mixed"), 4
    )
    assert not any("does not fit" in line for line in lines)
    small = table(plan_rows(defaults(model__storage="bf16"), 12, "3060"))
    assert all("does not fit" in line and "nf4" in line for line in small[1:5])


@pytest.mark.slow
def test_rows_say_what_is_planned():
    (row,) = plan_rows(defaults(data__0__resolution=[540]), None, "4090")
    assert row.plan.buckets["540 px"].shape.image_tokens == 284 * 4  # as wide a bucket as there is
    (row,) = plan_rows(
        defaults(model__path="black-forest-labs/FLUX.1-schnell", data__0__resolution=[512]),
        None,
        "4090",
    )
    assert row.plan.request.step.spec.guidance_embed is False
    assert row.plan.buckets["512 px"].shape.text_tokens == 256
    (row,) = plan_rows(defaults(memory__limit_gib=8, data__0__resolution=[512]), 24, None)
    assert row.vram_gib == 8
    with pytest.raises(ConfigError, match="needs a GPU of compute capability 8.9"):
        plan_rows(defaults(model__compute="fp8"), None, "3090")
    mixed = plan_rows(defaults(model__compute="fp8"), None, None)
    assert [row.plan is None for row in mixed if row.label == "512 px"] == [
        True,
        False,
        False,
        False,
    ]
    with pytest.raises(ConfigError, match="matches no module"):
        plan_rows(defaults(lora__include=["nothing"]), None, "4090")


@pytest.mark.slow
def test_breakdown_adds_up():
    rows = plan_rows(defaults(), None, "4090")
    lines = breakdown(rows)
    plan = rows[-1].plan
    entries = (line for line in lines if line.startswith("  "))
    figures = {line[10:]: float(line[:10]) for line in entries}
    static = sum(
        v
        for k, v in figures.items()
        if k.split(":")[0] in ("weights", "LoRA", "gradients", "optimizer", "scratch", "other")
    )
    total = static + figures["activations and passes, 1024 px"] + figures["CUDA itself (assumed)"]
    assert total == pytest.approx(needed(plan), abs=0.06)
    assert figures["training"] == pytest.approx(plan.peak / GIB, abs=0.01)
    assert breakdown(plan_rows(defaults(), None, None)[:5]) == []


@pytest.mark.slow
def test_command_line():
    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "fluxfast", "plan", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    done = call(str(STOCK), "--gpu", "4090", "--set", "data.0.resolution=[512]")
    assert done.returncode == 0 and "512 px" in done.stdout and "mixed" not in done.stdout
    assert "RTX 4090" in done.stdout and "note:" in done.stderr
    bad = call("--gpu", "voodoo2")
    assert bad.returncode == 2 and "hint" in bad.stderr and "RTX 4090" in bad.stderr
    assert call("--set", "lora.targets=all", "--vram", "-3").returncode == 2
