"""Numbers that are not finite: steps are skipped, a row of them ends the run with the last good
state and a diagnosis. And the same seed gives the same files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import CPU, start

import fluxfast.train
from fluxfast.config.schema import load_config
from fluxfast.data.loader import Loader
from fluxfast.data.prepare import prepare
from fluxfast.data.store import LATENTS, read_tensors, write_tensors
from fluxfast.errors import FluxfastError
from fluxfast.run.checkpoint import checkpoints, read_state
from fluxfast.run.diagnose import diagnose
from fluxfast.step import train_step
from fluxfast.train import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def configure(configure, tmp_path):
    """A cache of its own, to spoil samples in."""
    return lambda **changes: configure(cache_dir=str(tmp_path / "own"), **changes)


def loader_of(config) -> Loader:
    return Loader(prepare(config, CPU).dataset, config.train.batch_size, config.seed)


def spoil(loader: Loader, name: str, value: float) -> None:
    """Give the sample latents of `value`, in a cache file that is sound in every other way."""
    (sample,) = (s for s in loader.dataset.samples if s.name == name)
    tensors = read_tensors(sample.latents, LATENTS)
    write_tensors(sample.latents, {**tensors, "mean": torch.full_like(tensors["mean"], value)})


# ---------------------------------------------------------------- a run that cannot go on


def test_a_bad_run_ends_with_the_last_good_state_and_says_which_sample(configure):
    settings = {"train__batch_size": 1, "log_every": 1, "save__every": 0}
    config = configure(train__steps=8, train__max_bad_steps=1, **settings)
    loader = loader_of(config)
    name = loader.batch(2).names[0]
    spoil(loader, name, 1e30)
    with pytest.raises(FluxfastError) as raised:
        train(config)
    assert raised.value.message.startswith("no step from 3 to 3 had a finite loss and gradient: ")
    (line,) = (config.run_dir / "diagnosis.txt").read_text().splitlines()
    assert line in raised.value.message and line.startswith(f"step 3, {name}: fluxfast::")
    assert "(forward) is the first op whose result is not finite" in line

    ((step, folder),) = checkpoints(config.run_dir)
    assert step == 2
    assert read_state(folder)["log"]["bad"] == 0  # the run goes on from before the row
    clean = train(configure(name="clean", train__steps=2, **settings))
    ours, theirs = load_file(folder / "small.safetensors"), load_file(clean)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("kind", ["a loss alone", "a batch"])
def test_a_step_that_is_not_finite_moves_nothing(configure, kind):
    """Not the weights, their average or the optimizer, whose next step is the first."""
    run, loader = start(configure(train__ema={"enabled": True}))
    before = [p.detach().clone() for p in run.flat.parameters]
    batch, graphs = loader.batch(0), run.graphs
    if kind == "a batch":
        batch.mean = torch.full_like(batch.mean, torch.nan)
    else:
        run.graphs = lambda key, inputs: run.gradient_pass(inputs) + torch.inf
    loss, norm, bad, _ = train_step(run, [batch], 0)
    assert bad == 1 and not loss.isfinite() and norm.isfinite() == (kind == "a loss alone")
    assert all(torch.equal(p, b) for p, b in zip(run.flat.parameters, before, strict=True))
    assert run.ema.updates == 0 and torch.equal(run.ema.shadow[0], before[0])
    run.graphs = graphs
    _, _, bad, _ = train_step(run, [loader.batch(0)], 1)
    assert bad == 0 and any(p.abs().max() > 0 for p in run.flat.parameters[1::2])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("side", [0, 1])
def test_weights_that_are_not_finite_are_never_saved(configure, monkeypatch, dtype, side):
    """A good step may be the one that breaks them. The last save would be of no use, and the sound
    one before it dropped."""
    settings = {"train__steps": 9, "save__every": 2, "save__keep": 1, "save__dtype": dtype}
    config = configure(train__max_bad_steps=2, **settings)
    real = fluxfast.train.train_step

    def breaks(run, batches, step):
        result = real(run, batches, step)
        if step == 2:
            with torch.no_grad():
                run.flat.parameters[side][0, 0] = torch.inf if side else torch.nan
        return result

    monkeypatch.setattr(fluxfast.train, "train_step", breaks)
    for log_every, message in ((9, "holds numbers that are not"), (1, "weights that are not")):
        with pytest.raises(FluxfastError, match=message) as raised:
            train(config.model_copy(update={"log_every": log_every}))
        assert "double_blocks.0.img_attn.qkv" in raised.value.message
        ((step, folder),) = checkpoints(config.run_dir)
        weights = read_state(folder)["parameters"]
        assert step == 2 and all(tensor.isfinite().all() for tensor in weights)
        config.save.every = 5  # behind the steps that end the run


# ---------------------------------------------------------------- the diagnosis


def test_every_bad_sample_of_a_step_is_named(configure):
    run, loader = start(configure(train__gradient_accumulation=2))
    for name, value in (("1.png", float("inf")), ("3.png", 1e30)):
        spoil(loader, name, value)
    for sample in loader.dataset.samples:  # as bytes of a file's name may be
        sample.name = sample.name.replace("3.png", "3\n\udce9.png")
    lines = sorted(diagnose(run, 1))
    assert len(lines) == 2  # four pictures make the step
    assert lines[0] == "step 1, 1.png: the cached sample itself is not finite (noisy)"
    assert lines[1].startswith(r"step 1, 3\n\udce9.png: ") and " of double_blocks.0." in lines[1]
    assert not run.flat.gradients.any()


@pytest.mark.slow
def test_a_step_that_is_sound_when_repeated_is_said_to_be_one(configure, monkeypatch):
    """A fault of the machine, or of a captured graph, say."""
    real = fluxfast.train.train_step

    def broken(*arguments):
        loss, norm, bad, lr = real(*arguments)
        return loss * float("nan"), norm, torch.ones_like(bad), lr

    monkeypatch.setattr(fluxfast.train, "train_step", broken)
    with pytest.raises(FluxfastError, match="step 1: repeated .* everything is finite"):
        train(configure(train__max_bad_steps=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer, policy",
    [("double_blocks.0.txt_attn.qkv", "keep"), ("single_blocks.1.linear2", "checkpoint")],
)
def test_the_layer_where_it_begins_is_named(configure, layer, policy):
    run, _ = start(configure(memory__policy=policy))
    run.model.get_submodule(layer).weight.fill_(3e38)
    for line in diagnose(run, 1):
        assert f"_lora_linear of {layer} (forward) is the first op" in line
        assert "; loss nan; " in line and "gradients are not finite" in line


def test_weights_that_are_broken_are_named_first(configure):
    run, _ = start(configure())
    run.model.get_submodule("single_blocks.0.linear1").bias[3] = torch.nan
    with torch.no_grad():
        run.flat.parameters[0][0, 0] = torch.inf
    assert diagnose(run, 1) == [
        "weights that are not finite: double_blocks.0.img_attn.qkv.lora_A, "
        "single_blocks.0.linear1.bias"
    ]


@pytest.mark.slow
def test_a_gradient_that_overflows_alone_is_traced_to_backward(configure):
    run, _ = start(configure())
    layer = run.model.get_submodule("single_blocks.0.linear1")
    with torch.no_grad():  # nothing of it reaches the forward pass
        layer.lora_A.zero_()
        layer.lora_B.fill_(3e38)
    assert diagnose(run, 1)[0].endswith(": every gradient is finite, but their norm is not")
    run.model.final_layer.linear.weight.mul_(1e12)  # and so is the gradient that comes down
    for line in diagnose(run, 1):
        assert " of single_blocks.0.linear1 (backward) is the first op" in line
        assert "that of single_blocks.0.linear1.lora_A among them" in line
        assert "loss nan" not in line


# ---------------------------------------------------------------- the same seed, the same files


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_to_the_byte(nano_model, photos, tmp_path, monkeypatch):
    """In two folders and two processes, which order their sets differently; apart from dates, times
    and memory, which are not the run's own."""
    data = {"folder": "photos", "resolution": 64, "flip": True, "caption_dropout": 0.5}
    raw = {
        "name": "same",
        "trigger": "ohwx",
        "seed": 7,
        "device": "cpu",
        "log_every": 1,
        "model": {"path": "model", "storage": "nf4", "compute": "fp32"},
        "lora": {"rank": 2, "dropout": 0.2, "targets": "attn"},
        "data": {**data, "shuffle_captions": True},
        "train": {"steps": 3, "batch_size": 2, "ema": {"enabled": True}},
        "save": {"every": 2, "formats": ["diffusers", "kohya"]},
        "sample": {"prompts": ["[trigger] b"], "width": 64, "height": 64, "steps": 1, "every": 0},
        "validation": {"share": 0.25, "timesteps": 1},
    }
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "photos").symlink_to(photos)
        (tmp_path / folder / "model").symlink_to(nano_model)
        (tmp_path / folder / "c.yaml").write_text(yaml.safe_dump(raw))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    same = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "fluxfast", "train", "c.yaml"],
        cwd=tmp_path / "a",
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **same, "PYTHONHASHSEED": "1"},
    )
    monkeypatch.chdir(tmp_path / "b")
    train(load_config("c.yaml"))
    assert process.communicate()[1] and process.returncode == 0
    one, other = everything(tmp_path / "a" / "runs"), everything(tmp_path / "b" / "runs")
    assert one.keys() == other.keys() and len(one) > 20
    assert [name for name in one if one[name] != other[name]] == []


def everything(folder: Path) -> dict[str, bytes]:
    """Relative name -> content, of every file but TensorBoard's, which are named after the time."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts
    }
    rows = list(map(json.loads, files["same/metrics.jsonl"].splitlines()))
    for row in rows:
        for key in ("it_per_s", "s_per_it", "eta_s", "peak_memory_gib"):
            del row[key]
    files["same/metrics.jsonl"] = json.dumps(rows).encode()
    for fact in (rb"Date", rb"Speed, median", rb"Peak memory"):
        pattern = rb"<dt>" + fact + rb"</dt><dd>[^<]*</dd>"
        files["same/report.html"], count = re.subn(pattern, b"", files["same/report.html"])
        assert count == 1
    return files
