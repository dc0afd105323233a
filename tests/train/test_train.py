"""The loop end to end on the nano model: what it writes, accumulation, what it trains from."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import metrics, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import noise_pictures, random_flux
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fluxfast.train
from fluxfast.config.schema import Config, load_config
from fluxfast.errors import FluxfastError
from fluxfast.model.spec import NANO
from fluxfast.run.checkpoint import checkpoints
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
    config = configure(train__ema={"enabled": True}, train__steps=6, save__keep=2)
    path = train(config)
    assert path == config.run_dir / "small.safetensors" and path.is_file()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        keys = list(file.keys())
    expected = {"rank": "2", "steps": "6", "trigger": "ohwx", "base_model": config.model.path}
    assert metadata.items() >= expected.items()
    assert Config.model_validate_json(metadata["config"]) == config
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
    assert [step for step, _ in checkpoints(config.run_dir)] == [4, 6]


def test_finished_run_is_left_alone_and_restart_keeps_it(configure, monkeypatch):
    config = configure(validation={"share": 0.2, "every": 2, "timesteps": 1})
    first = train(config).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(fluxfast.train, "_look", lambda *_: pytest.fail("measured again"))
        assert train(config).read_bytes() == first
    assert [row["step"] for row in metrics(config)] == [2, 4]
    train(config, restart=True)
    assert (config.output_dir / "small.1" / "small.safetensors").read_bytes() == first
    more = config.model_copy(deep=True)
    more.train.steps = 6
    train(more)
    assert [row["step"] for row in metrics(more)] == [2, 4, 6]


def test_accumulation_is_a_larger_batch(configure):
    """Two batches of two accumulated equal one batch of four of the same samples."""
    run, loader = start(configure())
    batches = [loader.batch(step) for step in range(8)]
    pair = [batch for batch in batches if batch.mean.shape == batches[0].mean.shape][:2]
    both = type(pair[0])(
        *(torch.cat([getattr(batch, key) for batch in pair]) for key in ("mean", "std")),
        mask=None,
        **{key: torch.cat([getattr(batch, key) for batch in pair]) for key in ("t5", "pooled")},
        **{key: sum((getattr(batch, key) for batch in pair), []) for key in ("indices", "names")},
    )
    run.config.train.max_grad_norm = None
    run.modulation_cache = None  # which goes by the numbers of batches of two
    results = []
    for group in (pair, [both], pair[:1]):
        run.config.train.gradient_accumulation = len(group)
        before = [p.detach().clone() for p in run.parameters]
        loss, *_ = train_step(run, group, 0)
        results.append((loss.item(), run.gradients.clone()))
        with torch.no_grad():
            for p, b in zip(run.parameters, before, strict=True):
                p.copy_(b)
    (loss, gradients), (expected_loss, expected), (_, half) = results
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    scale = expected.abs().max()
    assert (gradients - expected).abs().max() < 1e-4 * scale
    assert (half - expected).abs().max() > 1e-2 * scale


@pytest.mark.slow
def test_loss_falls_when_a_batch_is_learned(configure):
    run, loader = start(configure(lora__rank=16, train__lr=3e-3))
    batch = loader.batch(0)
    losses = [train_step(run, [batch], step)[0].item() for step in range(40)]
    assert losses[-1] < 0.8 * losses[0]


def test_flip_shuffle_masks_and_dropout_train_from_the_cache(configure, photos, tmp_path):
    folder = tmp_path / "rgba"
    folder.mkdir()
    for i in range(2):
        image = Image.new("RGBA", (80, 64), (200, 30 * i, 10, 255))
        image.paste((0, 0, 0, 60), (0, 0, 40, 64))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("[trigger], red, square, flat, bright")
    changing = {"flip": True, "shuffle_captions": True, "caption_dropout": 0.5, "num_repeats": 2}
    config = configure(
        data=[
            {"folder": str(folder), "resolution": [64], "mask": "alpha", **changing},
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
    other = random_flux(NANO.__class__(**{**NANO.__dict__, "context_in_dim": 256}))
    file = tmp_path / "other.safetensors"
    save_file(dict(other.state_dict()), file)
    config = configure(model__path=str(file), model__encoders=str(nano_model))
    with pytest.raises(FluxfastError, match="192 wide, it takes 256"):
        train(config)
