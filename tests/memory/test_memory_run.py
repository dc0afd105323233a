"""A planned run on the CPU: the same losses whatever the plan, and whatever runs out on the way."""

import math
import random
import weakref
from collections.abc import Container
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import CPU, losses, planned, start

import fluxfast.step
import fluxfast.train
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.reader import BaseCheckpoint
from fluxfast.memory import runtime as memory_runtime
from fluxfast.memory.copies import CpuCopies, PinRefused
from fluxfast.memory.cuda_graphs import GraphsTooLarge
from fluxfast.memory.offload import ArenaOverflow
from fluxfast.memory.runtime import MemoryExhausted, MemoryRuntime
from fluxfast.memory.spill import MemorySpills, SpillWatch
from fluxfast.model.frozen_linear import FrozenLinear
from fluxfast.model.modulation import MODULATION_ROWS, ModulationCache
from fluxfast.run.preflight import check_start
from fluxfast.train import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six pictures in two shapes."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        size = (64, 64) if i % 2 else (96, 64)
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


# ---------------------------------------------------------------- plans change no result


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    "more",
    [
        {"policy": "offload"},
        {"policy": "recompute_mlp", "modulation": "in_place"},
        {"policy": "checkpoint", "modulation": "host", "optimizer_state": "host"},
    ],
    ids=["offload", "recompute_mlp", "checkpoint-host"],
)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_planned_run_is_the_plain_one(configure, more, optimizer):
    config = configure(train__optimizer=optimizer, train__ema={"enabled": True})
    plain = losses(*start(config))
    run, loader = start(config, planned(config, **more))
    assert set(run.model.policies) == {"keep"}  # until a pass begins
    assert losses(run, loader) == plain
    assert set(run.model.policies) == {more["policy"]}
    if more["policy"] == "offload":
        host = [bucket.choice.host for bucket in run.memory.plan.buckets.values()]
        assert run.memory._engine.arena.nbytes == max(host)


@pytest.mark.grid(1)
@pytest.mark.parametrize("storage", ["fp32", "nf4", "int8"])
def test_weights_of_the_host_leave_while_loading(configure, monkeypatch, storage):
    """Before the next is read: one that left later would leave a hole in the GPU's segments."""
    config = configure(model__storage=storage)
    plan, events, moved = planned(config, modulation="host"), [], FrozenLinear.move_weight
    read = BaseCheckpoint.read_stored
    monkeypatch.setattr(
        BaseCheckpoint, "read_stored", lambda base, name: events.append(name) or read(base, name)
    )

    def move(layer, device):
        events.append("move")
        assert device == "cpu" and layer.stored_tensors()
        moved(layer, device)

    monkeypatch.setattr(FrozenLinear, "move_weight", move)
    run, _ = start(config, plan)
    names = plan.weights_on_host
    assert [run.model.linear(name) for name in names] == run.model.modulation_linears()
    before = [a for a, b in zip(events, events[1:], strict=False) if b == "move"]
    assert sorted(before) == sorted(f"{name}.weight" for name in names)


def test_a_refused_pin_plans_again_without_host_memory(configure, monkeypatch, log_lines):
    """As on WSL2: the run trains all the same, and the second plan needs nothing of the host."""
    config = configure(name="pins", memory__limit_gib=1.0, train__steps=1)
    plans, lifted = [], []
    plan_run = fluxfast.train.plan_run

    def first_on_host(config, model, shapes, device, host=None):
        if host is None:
            plans.append(planned(config, modulation="host"))
        else:
            plans.append(plan_run(config, model, shapes, device, host))
        return plans[-1]

    def refuse(copies, nbytes):
        raise PinRefused("cannot pin 1.73 GiB of host memory: CUDA error 2")

    monkeypatch.setattr(fluxfast.train, "plan_run", first_on_host)
    monkeypatch.setattr(CpuCopies, "alloc_host", refuse)
    monkeypatch.setattr(fluxfast.train, "lift_limit", lifted.append)
    path = train(config)
    assert [plan.host > 0 for plan in plans] == [True, False] and lifted == [CPU]
    assert "the run is planned again without it" in "\n".join(log_lines)
    assert path.exists()
    monkeypatch.setattr(fluxfast.train, "plan_run", lambda *_: planned(config, modulation="host"))
    with pytest.raises(PinRefused, match="1.73 GiB"):
        train(configure(name="never", memory__limit_gib=1.0))
    assert len(lifted) == 2


def test_a_plans_limit_holds_until_it_is_lifted(configure, monkeypatch):
    """Encoders that are loaded after a run do not have to fit into its plan."""
    config, shares, cuda = configure(), [], torch.device("cuda", 0)
    run, _ = start(config)
    plan = planned(config)
    monkeypatch.setattr(memory_runtime, "CudaCopies", lambda device: CpuCopies())
    monkeypatch.setattr(memory_runtime.backend, "scratch", lambda *_: None)
    card = SimpleNamespace(total_memory=2 * int(plan.limit))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *args: shares.append(args)
    )
    MemoryRuntime(run.model, plan, run.memory.policies, cuda)
    memory_runtime.lift_limit(cuda)
    memory_runtime.lift_limit(CPU)
    assert shares == [(pytest.approx(0.5 + 1 / 32), cuda), (1.0, cuda)]


def test_a_weight_on_the_host_needs_no_gradient_of_its_input(configure):
    """Backward would read it where the next layer's has arrived."""
    config = configure()
    run, _ = start(config, planned(config, modulation="host"))
    layer = run.model.modulation_linears()[0]
    x = torch.randn(2, layer.in_features)
    layer(x)
    with pytest.raises(AssertionError, match="on the host"):
        layer(x.requires_grad_())


def test_a_tight_limit_mixes_exact_policies(configure):
    config = configure()
    here = {"modulation": "ahead", "optimizer_state": "device"}
    plan = planned(config, 0.5, saved_8bit="none", **here)
    mixed = {policy for bucket in plan.buckets.values() for policy in bucket.choice.policies}
    assert len(mixed) > 1 and mixed <= {"keep", "recompute_mlp", "offload", "checkpoint"}
    assert losses(*start(config, plan)) == losses(*start(config))


def test_train_logs_its_plan(configure, log_lines, monkeypatch):
    """On a CPU a limit asks for a plan; its lines come before the first step."""
    config = configure(memory__limit_gib=0.2, name="planned")
    path = train(config)
    logged = "\n".join(log_lines)
    assert "plan for the" in logged and "(predicted)" in logged and "blocks keep" in logged
    assert logged.index("plan for the") < logged.index("step 2/4")
    assert load_file(train(configure(name="plain"))).keys() == load_file(path).keys()
    # before anything is encoded
    monkeypatch.setattr("fluxfast.data.cache.encode_prompts", lambda *_, **__: pytest.fail("late"))
    with pytest.raises(ConfigError, match="needs at least"):
        train(configure(memory__limit_gib=0.1, name="tiny"))
    assert not (config.output_dir / "tiny" / "checkpoints").exists()


def test_resume_with_the_optimizer_on_the_host(configure):
    """Stopped and resumed, its state went through a checkpoint: the same bytes as in one go."""
    common = {"memory__limit_gib": 1.0, "memory__optimizer_state": "host", "train__steps": 4}
    whole = train(configure(name="whole", **common))
    parts = configure(name="parts", **common)
    train(parts)
    (parts.run_dir / "checkpoints" / "step-00000004").rename(parts.run_dir / "gone")
    (parts.run_dir / "parts.safetensors").unlink()
    again = load_file(train(parts))
    assert all(torch.equal(again[key], value) for key, value in load_file(whole).items())


def test_a_lora_on_the_last_blocks_alone_offloads_those(configure):
    config = configure(lora__include=["single_blocks"])
    plain = losses(*start(config))
    run, loader = start(config, planned(config, policy="offload"))
    assert losses(run, loader) == plain
    assert run.model.policies[:2] == ["keep"] * 2 and run.model.policies[2] == "offload"


@pytest.mark.parametrize("batch", [2, 20])
def test_dropout_on_the_modulation_trains(configure, batch):
    """Its masks are drawn for the batch's own samples: there is no padding to 16 rows."""
    config = configure(lora__targets="all", lora__dropout=0.3, train__batch_size=batch)
    loss, norm = losses(*start(config), 1)
    assert math.isfinite(loss) and math.isfinite(norm) and norm > 0


def test_what_needs_a_plan_is_refused_without_one(configure):
    for setting in ("memory__policy", "memory__modulation", "memory__optimizer_state"):
        with pytest.raises(ConfigError, match="limit_gib"):
            value = "offload" if setting == "memory__policy" else "host"
            check_start(configure(**{setting: value}), CPU, fresh=True)
    with pytest.raises(ConfigError, match="frozen modulation"):
        check_start(configure(memory__modulation="ahead", lora__targets="all"), CPU, fresh=True)


# ---------------------------------------------------------------- modulation ahead


@pytest.mark.grid(1)
@pytest.mark.parametrize("timesteps", ["sigmoid", "flux_shift"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 20])
def test_ahead_is_in_place_bit_for_bit(configure, batch_size, timesteps):
    """More batches than one filling holds, captions and their dropout drawn ahead."""
    changes = {
        "train__batch_size": batch_size,
        "train__timesteps": timesteps,
        "data__caption_dropout": 0.5,
        "train__gradient_accumulation": 2,
        "train__steps": 12,
    }
    steps = 2 if batch_size > 2 else 10
    run, loader = start(configure(memory__modulation="in_place", **changes))
    assert run.modulation_cache is None
    in_place = losses(run, loader, steps)
    run, loader = start(configure(**changes))
    assert isinstance(run.modulation_cache, ModulationCache)
    assert losses(run, loader, steps) == in_place


def test_batch_sizes_per_entry_plan_and_train(configure):
    """Each has a bucket in the plan; modulation ahead holds batches of both in one filling."""

    def mixed(**changes):
        config = configure(train__steps=8, **changes)
        data = [config.data[0].model_copy(update={"batch_size": size}) for size in (2, 3)]
        return config.model_copy(update={"data": data})

    in_place = losses(*start(mixed(memory__modulation="in_place")), 8)
    run, loader = start(mixed(), planned(mixed(), modulation="ahead"))
    assert losses(run, loader, 8) == in_place and loader.batch_size == 3
    assert {count for count, _ in run.labels} == {2, 3}
    assert len({label for label in run.labels.values()}) == len(run.labels)
    shapes = {label: plan.shape for label, plan in run.memory.plan.buckets.items()}
    assert {run.labels[s.batch, s.image_tokens] for s in shapes.values()} == set(shapes)


def test_ahead_fills_as_many_rows_as_there_are(configure, monkeypatch):
    run, loader = start(configure(train__batch_size=2, train__steps=11))
    sizes = []
    modulation = run.model.modulation

    def counted(t, y, guidance):
        sizes.append(len(t))
        return modulation(t, y, guidance)

    monkeypatch.setattr(run.modulation_cache, "modulation", counted)
    losses(run, loader, 11)
    assert sizes == [MODULATION_ROWS, 6]  # and none is formed for batches after the end


# ---------------------------------------------------------------- memory that runs out


def failing(run, monkeypatch, when: Container[int], at="backward"):
    """The passes numbered `when` run out of memory, before or after their gradients are there."""
    numbers = count()

    def gradient_pass(inputs):
        fails = next(numbers) in when
        loss = run.gradient_pass(inputs) if at == "backward" or not fails else None
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    monkeypatch.setattr(run.graphs, "_run_pass", gradient_pass)


@pytest.mark.grid(1)
@pytest.mark.parametrize("at", ["forward", "backward"])
@pytest.mark.parametrize("seed", range(4))
def test_losses_after_running_out_are_those_of_an_undisturbed_run(
    configure, monkeypatch, log_lines, seed, at
):
    """At random passes, in the middle of accumulation windows too; with and without a plan."""
    config = configure(train__gradient_accumulation=2, train__ema={"enabled": True})
    plain = losses(*start(config), steps=6)
    when = random.Random(seed).sample(range(12), 2)
    exact = {"saved_8bit": "none", "modulation": "ahead", "optimizer_state": "device"}
    plan = planned(config, 0.9 if seed % 2 else None, **exact) if seed else None
    run, loader = start(config, plan)
    log_lines.clear()
    before = dict(run.memory.policies)
    failing(run, monkeypatch, when, at)
    assert losses(run, loader, steps=6) == plain
    assert run.memory.policies != before
    assert len(log_lines) == 2 and all("out of memory at" in line for line in log_lines)


def test_the_optimizer_begun_is_not_begun_again(configure, monkeypatch):
    run, loader = start(configure())
    monkeypatch.setattr(fluxfast.step, "step_unless", Mock(side_effect=torch.OutOfMemoryError))
    run_pass = Mock(wraps=run.graphs._run_pass)
    monkeypatch.setattr(run.graphs, "_run_pass", run_pass)
    with pytest.raises(torch.OutOfMemoryError):
        losses(run, loader, 1)
    assert run_pass.call_count == 1


@pytest.mark.slow
def test_where_no_policy_is_cheaper_the_run_ends(configure, monkeypatch):
    run, loader = start(configure())
    failing(run, monkeypatch, range(1000))
    with pytest.raises(MemoryExhausted, match="Tried to allocate") as caught:
        losses(run, loader, 1)
    assert "data.resolution" in caught.value.hint
    assert set(next(iter(run.memory.policies.values()))) <= {"checkpoint", "keep"}


@pytest.mark.slow
def test_running_out_for_good_saves_what_was_trained(configure, monkeypatch):
    """Of a run that has no checkpoint yet: in the passes and in a preview, not in the optimizer."""
    gradient_pass, numbers = fluxfast.step.Training.gradient_pass, count(1)

    def later_never(run, inputs):
        if next(numbers) > 3:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return gradient_pass(run, inputs)

    config = configure(name="passes", save__every=0, memory__policy="checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(fluxfast.step.Training, "gradient_pass", later_never)
        with pytest.raises(MemoryExhausted, match="ALLOC_FAILED"):
            train(config)
    assert [f.name for f in (config.run_dir / "checkpoints").iterdir()] == ["step-00000003"]
    plain = load_file(train(configure(name="plain")))
    again = load_file(train(config))
    assert all(torch.equal(again[key], value) for key, value in plain.items())

    def out(*_):
        raise torch.OutOfMemoryError("in a preview")

    config = configure(name="looks", save__every=0, validation__share=0.3, validation__every=2)
    with monkeypatch.context() as patch:
        look = fluxfast.train.Watch.look
        patch.setattr(fluxfast.train.Watch, "look", lambda w, n: out() if n else look(w, n))
        with pytest.raises(FluxfastError, match="in a preview"):
            train(config)
    assert [f.name for f in (config.run_dir / "checkpoints").iterdir()] == ["step-00000002"]

    config = configure(name="optimizer", save__every=0)
    with monkeypatch.context() as patch:
        patch.setattr(fluxfast.step, "step_unless", out)
        with pytest.raises(FluxfastError, match="memory is full"):
            train(config)
    assert not (config.run_dir / "checkpoints").exists()


def test_with_graphs_the_bucket_that_needs_the_most_becomes_leaner(configure):
    """Their pool is as large as it needs, whichever bucket fails beside it."""
    exact = {"saved_8bit": "none", "modulation": "ahead", "optimizer_state": "device"}
    config = configure()
    data = [config.data[0].model_copy(update={"batch_size": size}) for size in (2, 3)]
    config = config.model_copy(update={"data": data})
    run, _ = start(config, planned(config, **exact))
    small, large = sorted(
        run.memory.policies, key=lambda label: run.memory.plan.buckets[label].bytes
    )
    run.memory.graphs.reason = None  # as on a GPU
    for failed in (small, large):
        before = dict(run.memory.policies)
        asked = iter([torch.OutOfMemoryError("full"), None])

        def fails_once(failed=failed, asked=asked):
            run.memory.use(failed)
            if error := next(asked):
                raise error

        run.memory.retry(fails_once)
        assert run.memory.policies[small] == before[small]
        assert run.memory.policies[large] != before[large]
    run.memory.graphs.reason = "offload"
    asked = iter([torch.OutOfMemoryError("full"), None])
    before = dict(run.memory.policies)
    run.memory.retry(lambda: fails_once(small, asked))
    assert run.memory.policies[small] != before[small]


def test_what_the_driver_takes_for_graphs_is_made_room_for_at_once(
    configure, monkeypatch, log_lines
):
    exact = {"saved_8bit": "none", "modulation": "ahead", "optimizer_state": "device"}
    config = configure()
    data = [config.data[0].model_copy(update={"batch_size": size}) for size in (2, 3)]
    config = config.model_copy(update={"data": data})
    run, _ = start(config, planned(config, **exact))
    memory, graphs = run.memory, run.memory.graphs
    large = max(memory.policies, key=lambda label: memory.plan.buckets[label].bytes)

    def largest():
        return max(memory._bytes(label, now) for label, now in memory.policies.items())

    def capture(examples):
        if graphs.reason is None and (error := next(asked)):
            raise error

    monkeypatch.setattr(graphs, "reason", None)  # as on a GPU
    monkeypatch.setattr(graphs, "capture", capture)
    least, lean = largest(), ("checkpoint",) * len(memory.policies[large])
    missing = (least - memory._bytes(large, lean)) // 2  # more than one notch
    asked, before = iter([GraphsTooLarge(missing), None]), dict(memory.policies)
    log_lines.clear()
    memory.capture()
    assert largest() <= least - missing and memory.policies[large] != before[large]
    assert len(log_lines) == 1 and "more for CUDA graphs" in log_lines[0]
    asked, before = iter([GraphsTooLarge(1 << 40)]), dict(memory.policies)
    memory.capture()
    assert memory.policies == before and "driver" in graphs.reason and len(log_lines) == 2


def test_a_step_that_does_not_fit_beside_the_graphs_is_known_at_capture(configure, monkeypatch):
    """Where policies can become cheaper; in the step itself the run would end."""
    config = configure(train__optimizer="prodigy", train__lr=1.0)
    run, _ = start(config, planned(config, optimizer_state="device"))
    before, captured = dict(run.memory.policies), []
    asked = iter([torch.OutOfMemoryError("full"), None])

    def capture(examples):
        run.memory.use(next(iter(before)))
        captured.append(dict(run.memory.policies))

    def stepping():
        if error := next(asked):
            raise error
        return nullcontext()

    monkeypatch.setattr(run.memory.graphs, "reason", None)  # as on a GPU
    monkeypatch.setattr(run.memory.graphs, "capture", capture)
    monkeypatch.setattr(run.memory, "stepping", stepping)
    run.memory.capture()
    assert captured == [before, run.memory.policies] and run.memory.policies != before


def test_memory_that_is_full_before_a_capture_runs_a_pass_takes_cheaper_policies(
    configure, monkeypatch
):
    """Every shape is warmed up already, and the card has no room for a graph."""
    run, _ = start(configure())
    before, asked = dict(run.memory.policies), iter([torch.OutOfMemoryError("full"), None])

    def capture(examples):
        if error := next(asked):
            raise error

    monkeypatch.setattr(run.memory.graphs, "reason", None)  # as on a GPU
    monkeypatch.setattr(run.memory.graphs, "capture", capture)
    run.memory.capture()
    assert run.memory.policies != before


def test_a_look_that_does_not_fit_is_tried_again_with_all_that_can_be_freed(configure):
    """Eagerly too: the allocator keeps what it has cached where cuBLAS or cuDNN run out."""
    run, _ = start(configure())
    held = []

    class Held:
        pass

    def part():
        if held:
            return held[0]() is None
        first = Held()
        first.cycle = first  # as an error that its own frame holds
        held.append(weakref.ref(first))
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    with run.memory.looking(again=True):
        assert run.memory.attempt(part)


def test_a_look_runs_beside_the_graphs_until_it_does_not_fit(configure):
    run, _ = start(configure())
    events = []

    class Graphs:
        reason, captured = None, True

        def drop(self):
            events.append("drop")
            self.captured = False

        def capture(self, examples):
            events.append("capture")
            self.captured = True

    memory, graphs = run.memory, Graphs()
    memory.graphs = graphs

    def look(*errors):
        asked = iter([*errors, None, None])

        def part():
            events.append("look")
            if error := next(asked):
                raise error
            return 3

        with memory.looking(again=True):
            assert memory.attempt(part) == memory.attempt(part) == 3
        return events.copy(), events.clear()

    assert look()[0] == ["look", "look"]
    with pytest.raises(RuntimeError, match="shape"):
        look(RuntimeError("shape"))
    events.clear()
    full = torch.OutOfMemoryError("full")
    assert look(full)[0] == ["look", "drop", "look", "look", "capture"]
    assert look()[0] == ["drop", "look", "look", "capture"]  # it has not fitted once
    with pytest.raises(torch.OutOfMemoryError):
        look(full)


def test_where_no_policy_is_cheaper_a_step_is_tried_once_more(configure, monkeypatch, log_lines):
    config = configure(memory__policy="checkpoint")
    plain = losses(*start(config))
    run, loader = start(config)
    log_lines.clear()
    failing(run, monkeypatch, {2})
    assert losses(run, loader) == plain
    assert len(log_lines) == 1 and "no policy is cheaper" in log_lines[0]


def test_an_arena_too_small_is_no_silent_growth(configure):
    config = configure()
    run, loader = start(config, planned(config, policy="offload"))
    for sizes in run.memory._engine._buckets.values():
        sizes.update(dict.fromkeys(sizes, 1024))
    with pytest.raises(ArenaOverflow, match="were planned"):
        losses(run, loader, 1)


# ---------------------------------------------------------------- a driver that spills


def test_spilling_is_slow_steps_on_a_full_card():
    watch, roomy = SpillWatch(lambda: True), SpillWatch(lambda: False)
    for seconds in (1.0, 1.1, 0.9, 1.0, 1.2):
        watch.interval(seconds, 1.0)
        roomy.interval(seconds, 1.0)
    watch.interval(6.0, 2.0)  # three times as much to do
    for seconds in (9.0, 1.0, 9.0, 9.0):  # a checkpoint, then slow
        watch.interval(seconds, 1.0)
    with pytest.raises(MemorySpills, match="9.0 times as long") as caught:
        watch.interval(9.0, 1.0)
    assert "limit_gib" in caught.value.hint
    for _ in range(4):
        roomy.interval(9.0, 1.0)


def test_a_run_that_spills_is_saved_and_stopped(configure, monkeypatch):
    monkeypatch.setattr(fluxfast.train, "card_is_full", lambda device: True)

    class Slow(SpillWatch):
        def __init__(self, full):
            super().__init__(lambda: True)
            self.count = 0

        def interval(self, seconds, expected):
            assert expected == 2.0  # without a plan a count of passes
            self.count += 1
            super().interval(1.0 if self.count < 5 else 50.0, expected)

    monkeypatch.setattr(fluxfast.train, "SpillWatch", Slow)
    config = configure(train__steps=100, log_every=2, save__every=0)
    with pytest.raises(MemorySpills):
        train(config)
    (saved,) = (config.run_dir / "checkpoints").iterdir()
    assert saved.name == "step-00000016"
