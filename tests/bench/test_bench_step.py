"""The bench of a training step: both kinds of step, what the gate refuses, and the rows."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import fluxfast_kernels as fk
import pytest
import torch
from torch.autograd import DeviceType

from bench import RESULTS, timing
from bench.rows import read
from bench.step import cli as step
from bench.step import run as step_run
from bench.step import steps, table
from bench.step.gate import tolerance, verdict
from bench.step.peers import make_inputs
from bench.step.settings import (
    BASELINE,
    CANDIDATES,
    DEFAULTS,
    EMA_DECAY,
    TINY_SPEC,
    Cycle,
    Settings,
    step_spec,
)
from bench.step.steps import ModelStep, RandomLoader, TrainerStep, limit_memory, trainer_config
from bench.step.table import comparable, count_launches, over_limits, rates, row_settings
from fluxfast.config.schema import build_config
from fluxfast.memory.planner.cost import model_flop
from fluxfast.memory.planner.step_spec import Shape
from fluxfast.model.names import block_linears, linear_shape
from fluxfast.model.spec import DEV

ROOT = Path(__file__).resolve().parents[2]
CYCLE = Cycle((64,), 1)
MIX = Cycle((64, 96), 1)
PLAIN = Settings(TINY_SPEC, "cpu", torch.float32, [CYCLE], 8, 4, rounds=1, warmup=1, apart=False)
STOCK = replace(PLAIN, setting="stock", targets="all", cycles=[CYCLE, MIX])
ROW_FIELDS = {
    *("name", "status", "reason", "median_ms", "p10_ms", "p90_ms", "ratio", "rounds", "warmup"),
    *("peak_memory_bytes", "peak_memory_kind", "date", "commit", "dirty", "device", "device_name"),
    *("driver", "cuda", "cpu_model", "cpu_count", "threads", "python", "torch", *timing.LIBRARIES),
    *("bench", "storage", "compute", "hidden", "double_blocks", "single_blocks", "pixels"),
    *("image_tokens", "text_tokens", "batch", "rank", "lora_targets", "lora_dtype", "optimizer"),
    *("checkpointing", "compiled", "autocast", "interleaved", *table.DETAILS),
    *("setting", "step", "mix", "ema", "max_grad_norm", "memory_cap_gib"),
    *("images_per_s", "tflop", "tflop_per_s", "mfu"),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices gain nothing from threads, and lose much where other tests run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measured(settings: Settings, names: list[str], folder) -> dict[Cycle, dict]:
    """Returns results by cycle and name."""
    by_cycle = {}
    step_run.measure(settings, names, folder, by_cycle.__setitem__)
    return by_cycle


def test_a_broken_kernel_is_refused(tmp_path, monkeypatch):
    """By a right candidate that came before, though no peer is there."""
    names = ["fluxfast-nf4", "fluxfast-nf4-trainer"]
    first = measured(PLAIN, names, tmp_path)
    assert [result.status for result in first[CYCLE].values()] == ["ok", "ok"]
    assert first[CYCLE][names[1]].details["reference"] == names[0]

    right = fk.qk_norm_rope_attention
    monkeypatch.setattr(fk, "qk_norm_rope_attention", lambda *a, **k: 1.01 * right(*a, **k))
    result = measured(PLAIN, names[1:], tmp_path)[CYCLE][names[1]]
    assert result.status == "gate failed" and result.median_ms is None
    details = result.details
    assert details["worst_error"] > details["tolerance"] and "errs by" in result.reason


def test_the_trainers_settings_are_its_defaults():
    """Every key that a step reads is one of the configuration's, with its value."""
    whole = build_config({"model": {"path": "x"}, "data": {"folder": "."}})
    config = trainer_config(PLAIN, batch=1)
    for section in ("train", "memory", "lora"):
        for key, value in vars(getattr(config, section)).items():
            wanted = getattr(getattr(whole, section), key)
            if key == "ema":
                assert (value.enabled, value.decay) == (wanted.enabled, wanted.decay)
            elif (section, key) not in {("train", "steps"), ("train", "lr")}:
                assert value == wanted, (section, key)
    assert trainer_config(STOCK, batch=1).train.optimizer == "adamw8bit"
    assert trainer_config(STOCK, batch=1).train.ema.enabled


def test_the_loader_gives_each_size_in_turn_with_its_own_numbers():
    loader = RandomLoader(PLAIN, Cycle((64, 96), 2))
    batches = [loader.batch(n) for n in range(3)]
    assert [b.mean.shape[-1] for b in batches] == [8, 12, 8]
    assert [b.indices for b in batches] == [[0, 1], [2, 3], [4, 5]]
    assert [len(b.mean) for b in loader.examples()] == [2, 2]
    indices, tokens, pooled = loader.peek(1)
    assert (indices, tokens, pooled.shape) == ([2, 3], 36, (2, TINY_SPEC.vec_in_dim))


def test_a_cap_is_planned_for_and_the_gradients_stay(tmp_path):
    """On a CPU the plan is carried out, though nothing keeps the process to it."""
    kind = CANDIDATES["fluxfast-nf4-trainer"]
    batch = make_inputs(PLAIN, 64, 1)

    def gradients(cap: float | None) -> tuple[torch.Tensor, dict]:
        stepper = TrainerStep(kind, replace(PLAIN, cap_gib=cap))
        stepper.begin(CYCLE, [batch])
        stepper.candidate.reset_adapters()
        stepper.backward(batch)
        stepper.count(result := timing.Result("fluxfast-nf4-trainer"))
        return stepper.run.flat.gradients.clone(), result.details

    kept, details = gradients(None)
    assert details["policies"] == {"64x64": {"keep": 3}} and details["planned_gib"] is None
    assert details["modulation"] == "ahead" and not details["graphs"]
    roomy = gradients(1.0)[1]
    assert roomy["policies"] == details["policies"]
    least = roomy["planned_gib"] - 0.0002
    planned, lean = gradients(least / (1 - steps.MARGIN))
    assert lean["planned_gib"] < roomy["planned_gib"] and lean["policies"] != details["policies"]
    error = (planned - kept).norm() / kept.norm()  # u is kept in 8 bits
    assert 0 < error < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "settings", "reason"),
    [
        ("bench.step.run.build", PLAIN, "CUDA out of memory"),
        ("bench.step.steps.TrainerStep.backward", PLAIN, "CUDA out of memory"),
        # the trainer changes to cheaper policies first, as it does in a run
        ("fluxfast.step.sample_losses", PLAIN, "memory is full"),
        (None, replace(PLAIN, cap_gib=0.01), "does not fit"),
    ],
)
def test_memory_that_ends_is_a_row(tmp_path, monkeypatch, function, settings, reason):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if function:
        monkeypatch.setattr(function, full)
    (result,) = measured(settings, ["fluxfast-nf4-trainer"], tmp_path)[CYCLE].values()
    assert result.status == "out of memory" and reason in result.reason


@pytest.mark.slow
def test_everyone_trains_the_same_in_the_stock_setting(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    names = [BASELINE, "fluxfast-nf4", "fluxfast-nf4-trainer"]
    results = measured(replace(STOCK, cycles=[MIX]), names, tmp_path)[MIX]
    for name, result in results.items():
        assert result.status == "ok", (name, result.reason)
        if name != BASELINE:
            assert result.details["reference"] == BASELINE
            assert result.details["worst_error"] <= result.details["tolerance"]
    # the modulation is trained: not ahead, and both sizes have their policies
    details = results["fluxfast-nf4-trainer"].details
    assert details["modulation"] == "in_place" and len(details["policies"]) == 2
    row = row_settings(STOCK, BASELINE, MIX)
    assert (row["pixels"], row["mix"], row["ema"]) == (None, [64, 96], True)
    assert row["optimizer"] == "bitsandbytes AdamW8bit" and row["max_grad_norm"] == 1.0


def test_the_bare_step_clips_and_averages(monkeypatch):
    """A gradient of any size moves the weights by its direction; the average follows by 1 %."""
    stepper = ModelStep(CANDIDATES["fluxfast-dense"], PLAIN)
    stepper.setting = stepper.setting._replace(ema=True, max_grad_norm=0.5)
    norms = []
    take = stepper.optimizer.step

    def watched():
        grads = [p.grad for p in stepper.parameters]
        norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])).item())
        take()

    monkeypatch.setattr(stepper.optimizer, "step", watched)
    stepper.candidate.reset_adapters()
    before = [p.detach().clone() for p in stepper.parameters]
    stepper.ema = [p.clone() for p in before]
    stepper.begin(CYCLE, [make_inputs(PLAIN, 64, 1)])
    stepper.step()
    assert norms == [pytest.approx(0.5, rel=1e-4)]
    for now, was, average in zip(stepper.parameters, before, stepper.ema, strict=True):
        wanted = was + (1 - EMA_DECAY) * (now.detach() - was)
        assert torch.allclose(average, wanted, rtol=1e-6, atol=1e-9)
        assert not torch.equal(now, was)
    assert all(p.grad is None for p in stepper.parameters)


@pytest.mark.slow
def test_a_mix_is_timed_as_a_cycle_and_reported_per_step(tmp_path, monkeypatch):
    name = "fluxfast-dense"
    monkeypatch.setattr(timing.time, "perf_counter", count(0, 0.6).__next__)  # 600 ms a call
    results = measured(replace(PLAIN, cycles=[CYCLE, MIX], rounds=2), [name], tmp_path)
    single, mixed = results[CYCLE][name], results[MIX][name]
    assert single.median_ms == pytest.approx(600) and single.details["saved_bytes"] > 0
    assert mixed.times_ms == pytest.approx([300, 300]) and mixed.p90_ms == pytest.approx(300)
    assert "saved_bytes" not in mixed.details


def test_settings_of_the_command_line():
    options = ["--device", "cpu", "--tiny"]
    stock = [*options, "--setting", "stock", "--pixels", "64", "96"]
    settings = step.settings_of(step.parse(stock))
    assert settings.targets == "all" and settings.cycles == [CYCLE, Cycle((96,), 1), MIX]
    assert step.settings_of(step.parse(options)).targets == "attn+mlp"


@pytest.mark.parametrize(
    "bad",
    [
        ["--setting", "stock", "--targets", "attn+mlp"],
        ["--cap", "12"],
        ["--pixels", "100"],
        ["--candidates", "unknown"],
    ],
)
def test_a_bad_call_ends_with_2(bad):
    with pytest.raises(SystemExit) as error:
        step.parse(["--device", "cpu", *bad])
    assert error.value.code == 2


def test_the_gate_names_what_differs():
    reference = {"loss": torch.tensor(2.0), "a.lora_A": torch.ones(4, 4)}
    assert verdict(reference, reference, 1e-6)[0] is None
    off = reference | {"a.lora_A": torch.full((4, 4), 1.01)}
    wrong, compared = verdict(off, reference, 1e-3)
    assert "a.lora_A" in wrong and compared["worst_error"] == pytest.approx(0.01)
    assert "zero" in verdict(reference | {"a.lora_A": torch.zeros(4, 4)}, None, 1)[0]
    assert "modules differ" in verdict({"loss": reference["loss"]}, reference, 1)[0]


@pytest.mark.slow
def test_all_candidates_take_the_same_step(tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "rows.jsonl"
    shape = ["--pixels", "64", "--batch", "2", "--rounds", "1", "--warmup", "1"]
    common = ["--device", "cpu", "--tiny", "--compute", "fp32", "--out", str(out)]
    assert step.main([*common, *shape]) == 0
    rows = {row["name"]: row for row in read(out)}
    assert list(rows) == DEFAULTS["cpu"]
    peer = rows[BASELINE]
    for name, row in rows.items():
        assert row["status"] == "ok", (name, row["reason"])
        assert row.keys() >= ROW_FIELDS, ROW_FIELDS - row.keys()
        matmul = CANDIDATES[name].matmul
        allowed = tolerance(TINY_SPEC, torch.float32, matmul)
        assert row["loss"] == pytest.approx(peer["loss"], rel=allowed)
        assert row["products"] == (matmul or "float32") and row["tolerance"] == allowed
        assert row["median_ms"] > 0 and row["rounds"] == 1 and row["saved_bytes"] > 0
        assert row["storage"] == "nf4" and row["compute"] == "float32"
        if name != BASELINE:
            assert row["worst_error"] <= row["tolerance"]
    assert rows["diffusers-nf4-checkpoint"]["saved_bytes"] < peer["saved_bytes"]
    last = capsys.readouterr().out.splitlines()[-2:]
    assert "fluxfast / diffusers+peft+bnb = " in last[0]
    assert "fluxfast-nf4-int8 / diffusers+peft+bnb = " in last[1]


@pytest.mark.slow
def test_peers_are_skipped_by_name_where_their_libraries_are_missing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in ('diffusers', 'peft', 'bitsandbytes', 'transformers', 'pydantic', 'typer',\n"
        "             'safetensors', 'yaml', 'rich', 'PIL', 'gguf', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
    )
    out = tmp_path / "rows.jsonl"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    # --apart: each candidate in its own process, as on a GPU
    arguments = ["--device", "cpu", "--tiny", "--apart", "--rounds", "1", "--out", str(out)]
    arguments += ["--candidates", "diffusers-nf4", "fluxfast-nf4", "fluxfast-nf4-trainer"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.step", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in read(out)}
    assert rows["diffusers-nf4"]["status"] == "skipped"
    assert "diffusers" in rows["diffusers-nf4"]["reason"]
    for name in ("fluxfast-nf4", "fluxfast-nf4-trainer"):
        assert rows[name]["status"] == "ok", rows[name]["reason"]
    # where there is no peer to compare with, they are compared with each other
    assert rows["fluxfast-nf4"]["reference"] is None
    assert rows["fluxfast-nf4-trainer"]["reference"] == "fluxfast-nf4"
    assert not rows["fluxfast-nf4"]["interleaved"]
    assert all(row.keys() >= ROW_FIELDS for row in rows.values())
    assert "fluxfast / diffusers+peft+bnb = - (no checkpointing)" in done.stdout


@pytest.mark.parametrize(("ours", "wrong"), [(600.0, 0), (641.0, 1), (651.0, 2), (None, 1)])
def test_a_slow_cpu_step_is_reported(ours, wrong):
    medians = {BASELINE: 1000.0, f"{BASELINE}-checkpoint": 1600.0, "fluxfast-nf4": ours}
    results = {name: timing.Result(name, median_ms=ms) for name, ms in medians.items()}
    assert len(over_limits(results)) == wrong
    assert over_limits({"fluxfast-nf4": results["fluxfast-nf4"]}) == []


def test_model_flop_is_what_a_step_cannot_do_without():
    """By hand: 4·M·N·K a frozen linear (forward, towards x), the LoRA's two factors and their four
    products, attention's 2 and 4."""
    settings = replace(PLAIN, spec=replace(DEV, depth=1, depth_single_blocks=1), rank=16)
    work = step_spec(CANDIDATES["fluxfast-nf4"], settings)
    images, texts, D = 1024, 512, 3072
    T = images + texts
    shape = Shape(1, images, texts)
    wanted = 6 * 2.0 * T * T * D * 2
    for name in block_linears(work.spec):
        if "mod" in name:
            continue
        M = T if "single" in name else images if ".img_" in name else texts
        N, K = linear_shape(name, work.spec)
        parts, rows = work.lora.modules[name]
        wanted += 4.0 * M * N * K
        wanted += 2.0 * M * 16 * (3 * parts * K + 3 * rows)  # A: x, dA, dx; B: y, dB, d(down)
    assert model_flop(work, shape) == pytest.approx(wanted, rel=0.01)


def test_figures_of_a_time():
    settings = replace(PLAIN, spec=DEV, device="cuda", compute=torch.bfloat16, text_tokens=512)
    cycle = Cycle((512, 1024), 2)
    found = rates(settings, "fluxfast-nf4-int8", cycle, 500.0, "NVIDIA H100 80GB HBM3")
    work = step_spec(CANDIDATES["fluxfast-nf4-int8"], settings)
    mean = sum(model_flop(work, Shape(2, n, 512)) for n in (1024, 4096)) / 2e12
    assert found["tflop"] == pytest.approx(mean) and found["images_per_s"] == pytest.approx(4)
    assert found["tflop_per_s"] == pytest.approx(2 * mean)
    assert found["mfu"] == pytest.approx(2 * mean / 1979, rel=0.01)  # its int8 peak
    assert rates(settings, "fluxfast-nf4", cycle, 500.0, "Unknown")["mfu"] is None
    none = rates(settings, "fluxfast-nf4", cycle, None, "Unknown")
    assert none["tflop"] > 0 and none["images_per_s"] is none["mfu"] is None
    cpu = replace(settings, device="cpu")
    assert rates(cpu, "fluxfast-nf4", cycle, 500.0, "NVIDIA H100 80GB HBM3")["mfu"] is None


def test_launches_are_the_hosts_calls_and_kernels_what_ran():
    def event(name: str, device: DeviceType, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [event(name, cpu) for name in ("aten::mm", "cudaLaunchKernel", "cuLaunchKernelEx")]
    events += [event(n, cpu) for n in ("cudaGraphLaunch", "cudaMemcpyAsync", "cudaLaunchHostFunc")]
    events += [event(name, cuda) for name in ("gemm", "gemm", "norm", "Memcpy HtoD", "Memset")]
    events += [event("Optimizer.step", cuda, annotation=True)]
    assert count_launches(events) == {"launches": 3, "kernels": 3}


def test_rows_from_before_are_comparable_and_the_new_ones_only_where_they_are():
    old = read(RESULTS / "step-cpu.jsonl")
    assert old and all(comparable(row) for row in old)
    plain = row_settings(PLAIN, "fluxfast-nf4", CYCLE) | {"status": "ok"}
    assert comparable(plain)
    for other in (
        row_settings(PLAIN, "fluxfast-nf4-trainer", CYCLE),
        row_settings(replace(PLAIN, targets="all"), "fluxfast-nf4", CYCLE),
        row_settings(replace(PLAIN, cap_gib=12), "fluxfast-nf4", CYCLE),
        row_settings(STOCK, "fluxfast-nf4", CYCLE),
        plain | {"status": "out of time"},
    ):
        assert not comparable({"status": "ok"} | other)


def test_a_cap_is_so_many_gib_of_the_card(monkeypatch):
    cuda = Mock()
    cuda.current_device.return_value = 0
    cuda.get_device_properties.return_value.total_memory = 80 * 2**30
    monkeypatch.setattr(torch, "cuda", cuda)
    for cap in (None, 12.0, 96.0):
        limit_memory(replace(PLAIN, device="cuda", cap_gib=cap))
    assert cuda.set_per_process_memory_fraction.call_args_list == [call(0.15, 0), call(1.0, 0)]
