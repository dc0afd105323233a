"""The loop end to end on the nano model: what it writes, accumulation, what it trains from."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import noise_pictures, random_flux
from small_runs import metrics, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fluxfast.run.preflight
import fluxfast.train
from fluxfast.config.schema import Config, load_config
from fluxfast.errors import DiskError, FluxfastError
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
    own = {"data__trigger": "alice"}
    config = configure(train__ema={"enabled": True}, train__steps=6, save__keep=2, **own)
    path = train(config)
    assert path == config.run_dir / "small.safetensors" and path.is_file()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        keys = list(file.keys())
    expected = {"rank": "2", "steps": "6", "base_model": config.model.path}
    expected |= dict.fromkeys(("trigger", "modelspec.trigger_phrase"), "ohwx, alice")
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
    run.labels |= {(4, tokens): label for (_, tokens), label in run.labels.items()}
    results = []
    for group in (pair, [both], pair[:1]):
        run.config.train.gradient_accumulation = len(group)
        before = [p.detach().clone() for p in run.flat.parameters]
        loss, *_ = train_step(run, group, 0)
        results.append((loss.item(), run.flat.gradients.clone()))
        with torch.no_grad():
            for p, b in zip(run.flat.parameters, before, strict=True):
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


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train__optimizer_args": {"weight_decya": 1}}, "did you mean 'weight_decay'"),
        ({"sample": {"prompts": ["[trigger]"]}, "trigger": None}, "sample.prompts"),
        ({"memory__policy": "offload"}, "takes a plan, and on a CPU there is none"),
        ({"memory__modulation": "ahead", "lora__targets": "all"}, "needs frozen modulation"),
        ({"data.0.folder": "/gone"}, "cannot read the folder /gone: No such file"),
        ({"validation__folder": "/gone"}, "cannot read the folder /gone: No such file"),
        ({"data.0.mask": "folder", "data.0.mask_folder": "/gone"}, "the folder /gone: No such"),
        ({"output_dir": "/dev/null/x"}, "cannot write into"),
        ({"output_dir": "full"}, "GiB free, and each checkpoint takes at least 0.0 GiB"),
    ],
)
def test_what_can_be_seen_is_refused_before_any_work(configure, monkeypatch, changes, words):
    """Before pictures are encoded, and of settings before a model is fetched."""
    full = shutil._ntuple_diskusage(1, 1, 5)
    monkeypatch.setattr(fluxfast.train, "prepare", lambda *_: pytest.fail("worked"))
    if changes.get("output_dir") == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
        changes = {}
    elif "lora__targets" not in changes:
        monkeypatch.setattr(
            fluxfast.run.preflight, "resolve_parts", lambda *_: pytest.fail("fetched")
        )
    with pytest.raises(FluxfastError) as raised:
        train(configure(**changes))
    assert words in raised.value.message


def test_a_run_folder_that_takes_no_file_is_reported_first(configure, monkeypatch):
    monkeypatch.setattr(fluxfast.run.preflight, "resolve_parts", lambda *_: pytest.fail("fetched"))
    refuses = DiskError("cannot write into runs/small: Read-only file system")
    monkeypatch.setattr("fluxfast.util.files.write_atomic", Mock(side_effect=refuses))
    with pytest.raises(DiskError, match="Read-only"):
        train(configure())


def test_a_rank_that_writes_nothing_needs_no_run_folder(configure):
    config = configure()
    fluxfast.run.preflight.check_start(config, torch.device("cpu"), fresh=True)
    assert not config.run_dir.exists()


def test_encoders_of_another_model_are_refused(configure, nano_model, tmp_path, monkeypatch):
    """A transformer with another context width beside the nano model's encoders: before anything is
    encoded."""
    monkeypatch.setattr(fluxfast.train, "prepare", lambda *_: pytest.fail("worked"))
    other = random_flux(NANO.__class__(**{**NANO.__dict__, "context_in_dim": 256}))
    file = tmp_path / "other.safetensors"
    save_file(dict(other.state_dict()), file)
    config = configure(model__path=str(file), model__encoders=str(nano_model))
    with pytest.raises(FluxfastError, match="192 wide, it takes 256"):
        train(config)
