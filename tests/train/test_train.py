"""The loop end to end on the nano model: what it writes, accumulation, the guard."""

import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import metrics, start
from safetensors import safe_open
from safetensors.torch import load_file
from small import noise_pictures, random_flux
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fluxfast.config.schema import Config, load_config
from fluxfast.errors import FluxfastError
from fluxfast.run.logger import RunLog
from fluxfast.step import train_step
from fluxfast.train import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Six pictures in two shapes; four have captions beside them."""
    folder = tmp_path_factory.mktemp("photos")
    noise_pictures(folder, 6, sizes=((96, 64), (64, 64)))
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"picture {i} of a thing, bright")
    return folder


def test_run_folder(configure):
    config = configure(train__ema={"enabled": True}, train__steps=6)
    path = train(config)
    assert path == config.run_dir / "small.safetensors" and path.is_file()
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        keys = list(file.keys())
    assert meta["rank"] == "2" and meta["steps"] == "6" and meta["trigger"] == "ohwx"
    assert meta["base_model"] == config.model.path
    assert Config.model_validate_json(meta["config"]) == config
    assert all(key.startswith("transformer.") for key in keys)
    raw, ema = load_file(path), load_file(config.run_dir / "small_ema.safetensors")
    assert raw.keys() == ema.keys()
    assert any(not torch.equal(raw[key], ema[key]) for key in raw)
    rows = metrics(config)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[-1]["s_per_it"] > 0 and rows[-1]["peak_memory_gib"] > 0.05
    assert all(row["skipped_steps"] == 0 and row["grad_norm"] > 0 for row in rows)
    board = EventAccumulator(str(config.run_dir / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [2, 4, 6]
    assert load_config(config.run_dir / "config.yaml") == config
    folders = sorted(folder.name for folder in (config.run_dir / "checkpoints").iterdir())
    assert folders == ["step-00000002", "step-00000004", "step-00000006"]


def test_old_checkpoints_go(configure):
    config = configure(save__every=1, save__keep=2)
    train(config)
    folders = sorted(folder.name for folder in (config.run_dir / "checkpoints").iterdir())
    assert folders == ["step-00000003", "step-00000004"]


def test_finished_run_is_left_alone_and_restart_keeps_it(configure):
    config = configure()
    first = train(config).read_bytes()
    assert train(config).read_bytes() == first
    assert [row["step"] for row in metrics(config)] == [2, 4]
    train(config, restart=True)
    assert (config.output_dir / "small.1" / "small.safetensors").read_bytes() == first
    more = configure(train__steps=6)
    train(more)
    assert [row["step"] for row in metrics(more)] == [2, 4, 6]


def test_accumulation_is_a_larger_batch(configure):
    """Two batches of two accumulated equal one batch of four of the same samples."""
    run, loader = start(configure(data__folder=str(configure().data[0].folder)))
    batches = [loader.batch(step) for step in range(8)]
    shape = batches[0].mean.shape
    pair = [batch for batch in batches if batch.mean.shape == shape][:2]
    both = type(pair[0])(
        mean=torch.cat([b.mean for b in pair]),
        std=torch.cat([b.std for b in pair]),
        mask=None,
        t5=torch.cat([b.t5 for b in pair]),
        pooled=torch.cat([b.pooled for b in pair]),
        indices=[i for b in pair for i in b.indices],
        names=[n for b in pair for n in b.names],
    )
    run.config.train.max_grad_norm = None
    run.modulation_cache = None  # which goes by the numbers of batches of two
    results = []
    for group in (pair, [both], pair[:1]):
        run.config.train.gradient_accumulation = len(group)
        before = [p.detach().clone() for p in run.parameters]
        loss, norm, _, _ = train_step(run, group, 0)
        results.append((loss.item(), run.gradients.clone()))
        with torch.no_grad():
            for p, b in zip(run.parameters, before, strict=True):
                p.copy_(b)
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    scale = results[1][1].abs().max()
    assert (results[0][1] - results[1][1]).abs().max() < 1e-4 * scale
    assert (results[2][1] - results[1][1]).abs().max() > 1e-2 * scale


@pytest.mark.slow
def test_loss_falls_when_a_batch_is_learned(configure):
    run, loader = start(configure(lora__rank=16, train__lr=3e-3))
    batch = loader.batch(0)
    losses = [train_step(run, [batch], step)[0].item() for step in range(40)]
    assert losses[-1] < 0.8 * losses[0]


def test_nan_is_skipped_and_counted(configure):
    """A poisoned batch moves nothing; a run of nothing but poison stops with a message."""
    config = configure(train__steps=100, train__ema={"enabled": True})
    run, loader = start(config)
    good, poisoned = loader.batch(0), loader.batch(0)
    poisoned.mean = torch.full_like(poisoned.mean, torch.nan)
    before = [p.detach().clone() for p in run.parameters]
    _, _, bad, _ = train_step(run, [poisoned], 0)
    assert bad == 1 and all(p.isfinite().all() for p in run.parameters)
    assert run.ema.updates == 0 and torch.equal(run.ema.shadow[0], before[0])
    # B is zero and its gradient was dropped; A moves by weight decay alone
    assert all(torch.equal(p, b) for p, b in zip(run.parameters[1::2], before[1::2], strict=True))
    _, _, bad, _ = train_step(run, [good], 1)
    assert bad == 0 and any(p.abs().max() > 0 for p in run.parameters[1::2])

    config.run_dir.mkdir(parents=True)
    with RunLog(config.run_dir, 0, 100, 5, torch.device("cpu"), most_bad=4) as log:
        one, nan = torch.tensor(1.0), torch.tensor(torch.nan)
        for step in range(1, 6):
            log.step(step, nan if step == 3 else one, one, torch.tensor(float(step == 3)), 1e-4, 0)
        assert metrics(config)[-1]["skipped_steps"] == 1 and metrics(config)[-1]["loss"] == 1.0
        with pytest.raises(
            FluxfastError, match="no step from 6 to 9 had a finite loss and gradient"
        ):
            for step in range(6, 11):
                log.step(step, nan, nan, one, 1e-4, 0)


def test_speed_leaves_the_warm_up_out(tmp_path, log_lines):
    """Two slow first steps, then steps of 20 ms: the rate is of the later ones."""
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    with RunLog(tmp_path, 0, 20, 10, torch.device("cpu")) as log:
        for step in range(1, 21):
            time.sleep(0.5 if step <= 2 else 0.02)
            log.step(step, one, one, zero, 1e-4, 0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0.02 <= rows[-1]["s_per_it"] < 0.09
    assert rows[-1]["it_per_s"] == pytest.approx(1 / rows[-1]["s_per_it"])
    _, line = log_lines
    assert "it/s" in line and "s/it" in line and "ETA" in line


def test_flip_shuffle_masks_and_dropout_train_from_the_cache(configure, photos, tmp_path):
    folder = tmp_path / "rgba"
    folder.mkdir()
    for i in range(2):
        image = Image.new("RGBA", (80, 64), (200, 30 * i, 10, 255))
        image.paste((0, 0, 0, 60), (0, 0, 40, 64))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("[trigger], red, square, flat, bright")
    config = configure(
        data=[
            {
                "folder": str(folder),
                "resolution": [64],
                "mask": "alpha",
                "flip": True,
                "shuffle_captions": True,
                "caption_dropout": 0.5,
                "num_repeats": 2,
            },
            {"folder": str(photos), "resolution": [64, 96]},
        ],
        train__steps=3,
        train__gradient_accumulation=2,
        memory__policy="checkpoint",
    )
    train(config)
    assert metrics(config)[-1]["step"] == 3


def test_encoders_of_another_model_are_refused(configure, nano_model, tmp_path):
    """A transformer with another context width beside the nano model's encoders."""
    from safetensors.torch import save_file

    from fluxfast.model.spec import NANO

    other = random_flux(NANO.__class__(**{**NANO.__dict__, "context_in_dim": 256}))
    save_file(dict(other.state_dict()), tmp_path / "other.safetensors")
    config = configure(
        model__path=str(tmp_path / "other.safetensors"), model__encoders=str(nano_model)
    )
    with pytest.raises(FluxfastError, match="192 wide, it takes 256"):
        train(config)
