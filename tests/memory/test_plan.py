"""The planner: what it must fit, that it stays within its limits, is fast, and what it refuses."""

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

from fluxfast.config.schema import SampleConfig, build_config, load_config
from fluxfast.errors import ConfigError
from fluxfast.memory.planner import saved_bytes, suggest
from fluxfast.memory.planner.cards import card
from fluxfast.memory.planner.choose import Chooser
from fluxfast.memory.planner.plan import CONTEXT, GIB, Plan, Request, cheaper_policies, usable
from fluxfast.memory.planner.report import breakdown, table
from fluxfast.memory.planner.step_spec import Shape, StepSpec, lora_of, shape_of
from fluxfast.memory.planner.suggest import make_plan
from fluxfast.model.activations import EXACT
from fluxfast.model.spec import DEV
from fluxfast.tools.plan import _preview_pixels, plan_rows

ROOT = Path(__file__).parents[2]
STOCK = ROOT / "examples" / "ai-toolkit" / "flux_dev_24gb.yaml"
FOUR_BLOCKS = replace(WIDE, depth_single_blocks=2)


def request(
    sides=(1024,), targets="attn+mlp", include=(), batch=1, storage="nf4", step=None, **options
) -> Request:
    lora = lora_of(DEV, 16, targets, include)
    spec = StepSpec(DEV, storage, "int8", "bf16", lora, **(step or {}))
    shapes = {f"{side}": shape_of(side, side, batch, 512) for side in sides}
    return Request(spec, shapes, **options)


def planned(gpu: str, vram: float, host: int | None = None, **changes) -> Plan:
    return make_plan(request(**changes), card(gpu), usable(vram), host)


def needed(plan: Plan) -> float:
    """GiB of the card, CUDA itself included."""
    return (plan.peak + CONTEXT) / GIB


@pytest.mark.parametrize(
    ("vram", "gpu", "side", "most"),
    [(24, "4090", 1024, 22.5), (16, "4060 Ti", 768, 16), (12, "3060 12 GB", 512, 12)],
)
def test_cards_need_neither_checkpoint_nor_offload(vram, gpu, side, most):
    plan = planned(gpu, vram, sides=(side,))
    assert not {"checkpoint", "offload"} & set(plan.buckets[f"{side}"].choice.policies)
    assert needed(plan) <= most and (plan.host == 0 or vram < 24)


def test_stock_ai_toolkit_on_24_gb():
    """494 modules with their modulation, EMA, 8-bit AdamW, three resolutions, previews."""
    (plan,) = [row.plan for row in plan_rows(load_config(STOCK), 24, None) if row.label == "mixed"]
    assert plan is not None and needed(plan) <= 22.5
    assert plan.request.modulation_trained and plan.request.ema and plan.modulation == "in_place"
    assert set(plan.buckets) == {"512 px", "768 px", "1024 px"}
    assert all("checkpoint" not in b.choice.policies for b in plan.buckets.values())
    assert max(plan.phases.values()) <= usable(24)


@pytest.mark.grid(1)
@pytest.mark.parametrize("vram", [12, 16, 24, 80])
def test_limits_are_kept_in_every_phase(vram):
    for targets, batch in (("attn+mlp", 1), ("all", 1), ("attn+mlp", 2)):
        plan = planned("4090", vram, sides=(512, 1024), targets=targets, batch=batch)
        assert max(plan.phases.values()) <= plan.limit
        for bucket in plan.buckets.values():
            always, choice = sum(plan.static.values()), bucket.choice
            peak = Chooser(plan.request.step, bucket.shape, plan.card, False).peak(choice.policies)
            assert always + peak + choice.staging <= bucket.bytes <= plan.limit


def test_the_largest_preview_counts():
    """Those with a size of their own too."""
    assert _preview_pixels(SampleConfig()) == 0
    sizes = {"prompts": ["a"], "samples": [{"prompt": "b", "width": 2048}], "height": 512}
    assert _preview_pixels(SampleConfig(**sizes)) == 2048 * 512
    assert _preview_pixels(SampleConfig(samples=[{"prompt": "b"}], width=64)) == 64 * 1024


@pytest.mark.parametrize("share", [0.55, 0.7, 0.8, 0.9, 0.97, 1.0])
def test_choice_is_near_the_best_of_all_there_are(share):
    """Four blocks, three exact policies and gelu_int8: all 256 mixes tried. The chooser goes block
    by block and misses mixes that use the memory to the last byte: with blocks this few, by 6 %."""
    step = StepSpec(FOUR_BLOCKS, "bf16", "bf16", "bf16", lora_of(FOUR_BLOCKS, 4))
    chooser = Chooser(step, Shape(1, 1024, 128), card("4090"), launches=False)
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
    budgets = [int(share * full) for share in (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)]
    times = [chooser.choose(budget, EXACT).seconds for budget in budgets]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_saved_8bit_decides_what_may_be_rounded():
    exact = planned("4090", 24, saved_8bit="none")
    assert set(exact.buckets["1024"].choice.policies) <= set(EXACT)
    tight = planned("4090", 18, saved_8bit="all")
    assert "int8" in tight.buckets["1024"].choice.policies


def test_overrides_are_honored():
    for policy in ("checkpoint", "recompute_mlp", "gelu_int8", "offload"):
        bucket = planned("H100", 80, policy=policy).buckets["1024"]
        assert set(bucket.choice.policies) == {policy}
        assert bucket.graphed == (policy != "offload")
    plan = planned("H100", 80, optimizer_state="host", modulation="host")
    assert plan.optimizer_state == plan.modulation == "host" and plan.host > 2 * GIB
    assert "optimizer" not in plan.static and "weights: modulation" not in plan.static
    with pytest.raises(ConfigError, match="frozen modulation"):
        planned("H100", 80, targets="all", modulation="ahead")


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
    with pytest.raises(ConfigError) as caught:
        planned("3060 12 GB", 12, **changes)
    cures = caught.value.hint.removeprefix("what fits: ").split("; or ")
    assert cures and "no single" not in cures[0]
    for cure in cures:
        if cure.startswith("a card of"):
            planned("3060 12 GB", int(cure.split()[3]), **changes)
            continue
        changed = dict(changes)
        cure = cure.replace(" with gradient_accumulation", "").replace(" and ", ", ")
        for setting in cure.split(", "):
            key, value = setting.split(": ")
            if key == "memory":
                changed |= {"policy": "auto", "modulation": "auto", "optimizer_state": "auto"}
            elif key.startswith("memory."):
                changed[key.removeprefix("memory.")] = value
            elif key == "train.batch_size":
                changed["batch"] = int(value)
            elif key == "data.resolution":
                changed["sides"] = (int(value),)
            else:
                assert key in ("sample.width", "sample.height"), key
                changed["preview_pixels"] = int(value) ** 2
        planned("3060 12 GB", 12, **changed)


@pytest.mark.slow
def test_a_batch_size_that_a_refusal_names_is_that_of_all_processes(monkeypatch):
    """The planner sees one process's share."""

    def named() -> int:
        with pytest.raises(ConfigError) as caught:
            planned("3060 12 GB", 12, batch=64)
        return int(re.search(r"train.batch_size: (\d+)", caught.value.hint)[1])

    share = named()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert named() == 2 * share


# less than a matrix takes while it is quantized
SMALL_PASSES = {"sides": (256,), "policy": "checkpoint", "graphs": False, "modulation": "host"}
SMALL_PASSES |= {"include": ["single_blocks.37"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("message", "gpu", "vram", "changes"),
    [
        ("of pinned host memory, of which 1 GiB", "4090", 24, {"policy": "offload", "host": GIB}),
        ("previews of this size", "3060 12 GB", 12, {"sides": (512,), "preview_pixels": 5000**2}),
        ("loading needs", "4090", 6.2, SMALL_PASSES),
        ("needs at least", "3060 12 GB", 12, {"policy": "keep"}),
        (
            "nothing under lora.dropout",
            "3060 12 GB",
            12,
            {"policy": "gelu_int8", "step": {"dropout": True}},
        ),
    ],
)
def test_a_refusal_says_what_is_short(message, gpu, vram, changes):
    with pytest.raises(ConfigError, match=message):
        planned(gpu, vram, **changes)


def test_t5_takes_what_there_is_for_it():
    """Blocks that do not fit stay on the host: 9.25 GiB for all of them exclude no card."""
    assert planned("4090", 24).phases["encoding captions"] == pytest.approx(9.25 * GIB, rel=1e-3)
    small = planned("3060 12 GB", 10)
    assert small.phases["encoding captions"] == small.limit < 9.25 * GIB


def test_pinned_memory_is_limited_too():
    lots, few = planned("3060 12 GB", 12), planned("3060 12 GB", 12, host=3 * GIB)
    assert lots.host > 3 * GIB >= few.host


def test_a_notch_cheaper_goes_on_until_nothing_is_left():
    bucket = planned("4090", 24).buckets["1024"]
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
    cheaper = cheaper_policies(("offload", "gelu_int8", "keep"))
    assert cheaper == ("offload", "recompute_mlp", "keep")


def test_accumulation_and_batch_are_in_the_time():
    plan = planned("4090", 24, sides=(512,))
    one = plan.seconds("512")
    four = planned("4090", 24, sides=(512,), accumulation=4).seconds("512")
    assert four == pytest.approx(4 * one - 3 * plan.step_seconds)
    batch = planned("4090", 80, sides=(512,), batch=4).seconds("512")
    assert 2 * one < batch < 4 * one


@pytest.mark.parametrize("policy", ["auto", "offload"])
def test_blocks_that_save_nothing_are_never_offloaded(policy):
    """A LoRA on the single blocks alone: the double ones have nothing to bring away."""
    plan = planned("3060 12 GB", 12, include=["single_blocks"], policy=policy)
    policies = plan.buckets["1024"].choice.policies
    assert set(policies[:19]) == {"keep"} and "offload" in policies[19:]


def test_graphs_keep_their_pool_through_the_optimizers_step():
    options = {"sides": (512,), "optimizer_state": "host"}
    plan, eager = planned("4090", 24, **options), planned("4090", 24, graphs=False, **options)
    state = saved_bytes.trained(plan.request.step, "adamw", ema=False)["optimizer"]
    assert plan.buckets["512"].graphed
    assert plan.phases["optimizer step"] == plan.peak + state
    assert eager.phases["optimizer step"] < eager.peak


def test_a_graph_of_every_shape_is_planned_for():
    """The driver's memory for it, which torch's allocator does not count."""
    few, many = (planned("H100", 80, sides=sides) for sides in ((512,), (512, 768, 1024)))
    each = few.static["CUDA graphs"]
    assert 57 * 81 * 10_000 < each < 57 * 82 * 65_536 and many.static["CUDA graphs"] == 3 * each
    for eager in (planned("H100", 80, graphs=False), planned("H100", 80, policy="offload")):
        assert "CUDA graphs" not in eager.static and not eager.buckets["1024"].graphed


def test_an_eager_step_takes_at_least_as_long_as_its_launches():
    graphed, eager = (planned("H100", 80, sides=(256,), graphs=graphs) for graphs in (True, False))
    assert eager.mean_seconds > 57 * 81 * 50e-6 > graphed.mean_seconds


def test_a_limit_of_the_user_is_taken_as_it_is():
    """It counts CUDA's own memory; a card's nominal size is more than CUDA shows."""
    options = {"data": [{"folder": ".", "resolution": [512]}], "memory": {"limit_gib": 14.0}}
    config = build_config({"model": {"path": "black-forest-labs/FLUX.1-dev"}} | options)
    (row,) = plan_rows(config, None, "4090")
    assert row.plan.limit == 14 * GIB - CONTEXT and usable(24) < 23.64 * 15 / 16 * GIB


def test_a_card_with_ecc_is_planned_with_what_cuda_shows_of_it():
    """An L40S of 48 GB shows 44.42 GiB."""
    options = {"data": [{"folder": ".", "resolution": [512]}]}
    config = build_config({"model": {"path": "black-forest-labs/FLUX.1-dev"}} | options)
    for gpu, shown in (("L40S", 44.42), ("4090", 23.64)):
        (row,) = plan_rows(config, None, gpu)
        assert 0.97 < row.plan.limit / (shown * 15 / 16 * GIB - CONTEXT) < 1


def test_buckets_of_one_token_count_share_a_graph():
    one = planned("H100", 80)
    wide = request(sides=(1024,))
    shapes = {"1024x1024": shape_of(1024, 1024, 1, 512), "2048x512": shape_of(2048, 512, 1, 512)}
    both = make_plan(replace(wide, shapes=shapes), card("H100"), usable(80))
    assert both.static["CUDA graphs"] == one.static["CUDA graphs"]


def test_phases_count_what_is_held_only_for_a_while():
    """schedule-free copies all gradients in its step; loading quantizes linear1 in fp32."""
    plan = planned("4090", 24, sides=(512,), optimizer="schedulefree", graphs=False)
    static = sum(plan.static.values())
    assert plan.phases["optimizer step"] == static + plan.static["gradients"]
    weights = sum(size for name, size in plan.static.items() if name.startswith("weights"))
    largest = max(rows * columns for rows, columns in [(21504, 3072), (3072, 15360)])
    assert plan.phases["loading"] == weights + plan.static["LoRA"] + 12 * largest
    host = planned("4090", 24, sides=(512,), modulation="host")
    assert host.phases["loading"] == plan.phases["loading"] - plan.static["weights: modulation"]


def test_processes_of_one_machine_share_what_may_be_pinned(monkeypatch):
    monkeypatch.setattr(suggest, "available_memory", lambda: 64 * GIB)
    assert suggest.host_memory() == 32 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert suggest.host_memory() == 8 * GIB


def test_wsl_pins_half_a_gib(monkeypatch):
    """So a 3060 plans without the 1.7 GiB of modulation that other systems could pin."""
    monkeypatch.setattr(suggest, "available_memory", lambda: 64 * GIB)
    monkeypatch.setattr("platform.release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    assert suggest.host_memory() == GIB // 2


def test_layers_kept_dense_cost_memory_and_time():
    plain = planned("H100", 80)
    dense = planned("H100", 80, step={"layers": {"single_blocks.*.linear1": "bf16"}})
    assert dense.static["weights: blocks"] > plain.static["weights: blocks"] + 3 * GIB
    assert dense.seconds("1024") > plain.seconds("1024")


# ---------------------------------------------------------------- the command


def rows_of(vram: float | None, gpu: str | None, **changes) -> list:
    raw = {"model": {"path": "black-forest-labs/FLUX.1-dev"}, "data": {"folder": "."}}
    raw["data"]["resolution"] = [512, 768, 1024]
    sets = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return plan_rows(build_config(raw, sets), vram, gpu)


@pytest.mark.slow
def test_table_has_a_row_per_card_and_size():
    rows = rows_of(None, None)
    lines = table(rows)
    assert len(lines) == 1 + 16 + 2 and "predicted" in lines[-1]
    assert lines[0].split()[:2] == ["card", "GiB"]
    labels = ("512 px", "768 px", "1024 px", "mixed")
    assert Counter(row.label for row in rows) == dict.fromkeys(labels, 4)
    assert not any("does not fit" in line for line in lines)
    small = table(rows_of(12, "3060", model__storage="bf16"))
    assert all("does not fit" in line and "nf4" in line for line in small[1:5])


@pytest.mark.slow
def test_rows_say_what_is_planned():
    (row,) = rows_of(None, "4090", data__0__resolution=[540])
    assert row.plan.buckets["540 px"].shape.image_tokens == 284 * 4  # as wide a bucket as there is
    schnell = {"model__path": "black-forest-labs/FLUX.1-schnell", "data__0__resolution": [512]}
    (row,) = rows_of(None, "4090", **schnell)
    assert row.plan.request.step.spec.guidance_embed is False
    assert row.plan.buckets["512 px"].shape.text_tokens == 256
    (row,) = rows_of(24, None, memory__limit_gib=8, data__0__resolution=[512])
    assert row.vram_gib == 8
    with pytest.raises(ConfigError, match="needs a GPU of compute capability 8.9"):
        rows_of(None, "3090", model__compute="fp8")
    mixed = [row for row in rows_of(None, None, model__compute="fp8") if row.label == "512 px"]
    assert [row.plan is None for row in mixed] == [True, False, False, False]
    with pytest.raises(ConfigError, match="matches no module"):
        rows_of(None, "4090", lora__include=["nothing"])


@pytest.mark.slow
def test_breakdown_adds_up():
    rows = rows_of(None, "4090")
    plan = rows[-1].plan
    entries = (line for line in breakdown(rows) if line.startswith("  "))
    figures = {line[10:]: float(line[:10]) for line in entries}
    parts = ("weights", "LoRA", "gradients", "optimizer", "scratch", "other", "CUDA graphs")
    total = sum(size for name, size in figures.items() if name.split(":")[0] in parts)
    total += figures["activations and passes, 1024 px"] + figures["CUDA itself (assumed)"]
    assert total == pytest.approx(needed(plan), abs=0.06)
    assert figures["training"] == pytest.approx(plan.peak / GIB, abs=0.01)
    assert breakdown(rows_of(None, None)[:5]) == []


@pytest.mark.slow
def test_command_line():
    def call(*arguments):
        command = [sys.executable, "-m", "fluxfast", "plan", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = call(str(STOCK), "--gpu", "4090", "--set", "data.0.resolution=[512]")
    assert done.returncode == 0 and "512 px" in done.stdout and "mixed" not in done.stdout
    assert "RTX 4090" in done.stdout and "note:" in done.stderr
    bad = call("--gpu", "voodoo2")
    assert bad.returncode == 2 and "hint" in bad.stderr and "RTX 4090" in bad.stderr
    assert call("--set", "lora.targets=all", "--vram", "-3").returncode == 2
