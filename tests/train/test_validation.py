"""Validation: fixed noise, paired differences, intervals, the best step; and previews in a run."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import CPU, start
from safetensors import safe_open
from small import noise_pictures, small_run

from fluxfast.data.prepare import hold_out, prepare
from fluxfast.data.store import Dataset, Sample
from fluxfast.errors import ConfigError
from fluxfast.run.validation import Validation, Validator, best, interval, read_validations
from fluxfast.train import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return noise_pictures(tmp_path_factory.mktemp("pictures"), 5, "picture", seed=1)


@pytest.fixture
def configure(nano_model, photos, cache, tmp_path):
    common = {
        "lora__rank": 4,
        "train__batch_size": 1,
        "validation": {"share": 0.4, "every": 2, "timesteps": 2},
    }
    return lambda **changes: small_run(
        nano_model, photos, tmp_path / "runs", cache, **{**common, **changes}
    )


@pytest.mark.parametrize("count", [2, 3, 11, 31, 32, 60, 1000])
def test_the_interval_is_student_t(count):
    from scipy.stats import t

    values = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    low, high = interval(values.tolist())
    half = t.ppf(0.975, count - 1) * values.std().item() / count**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=1e-4)
    assert (high + low) / 2 == pytest.approx(values.mean().item(), abs=1e-12)


def test_one_value_has_no_interval():
    assert interval([1.0]) == (None, None)


def samples(count: int) -> Dataset:
    made = [
        Sample(f"{i}.png", (64 * r, 64), Path(f"{i}-{r}"), None, [Path("t")], "", 0.0)
        for i in range(count)
        for r in (1, 2)
        for _ in range(3)
    ]
    return Dataset(made, Path("e"))


def test_hold_out_takes_whole_pictures():
    rest, held = hold_out(samples(10), 0.3, seed=1)
    names = {sample.name for sample in held}
    assert len(names) == 3 and len(held) == 6
    assert not names & {sample.name for sample in rest.samples} and len(rest.samples) == 42
    others = [{s.name for s in hold_out(samples(10), 0.3, seed=seed)[1]} for seed in range(5)]
    assert others[1] == names and any(other != names for other in others)
    with pytest.raises(ConfigError, match="none to train"):
        hold_out(samples(1), 0.5, seed=0)


def test_measurement_is_fixed_and_paired(configure):
    """The same weights measure the same; a fresh LoRA differs from the base by nothing."""
    config = configure()
    held_out = prepare(config, CPU).held_out
    assert len(held_out) == 2
    run, _ = start(config)
    validator = Validator(held_out, 1, 3, 1.0)
    first = validator.measure(run.model, CPU, 0)
    assert first.difference == 0 and first.low == first.high == 0 and first.pictures == 2
    assert validator.measure(run.model, CPU, 0) == first
    with torch.no_grad():
        for p in run.parameters[1::2]:
            p.add_(0.05)
    changed = validator.measure(run.model, CPU, 5)
    assert changed.base_loss == first.loss
    assert changed.difference == pytest.approx(changed.loss - first.loss) != 0
    assert changed.low < changed.difference < changed.high
    assert run.model.training and run.model.single_blocks[0].linear1.lora.strength == 1.0


def test_run_measures_keeps_the_best_and_resumes(configure):
    size = {"width": 64, "height": 64, "steps": 2}
    prompts = ["[trigger] one", "two"]
    config = configure(sample={"prompts": prompts, "every": 2, "walk_seed": True, **size})
    train(config)
    run = config.run_dir
    rows = read_validations(run / "validation.jsonl")
    assert [row.step for row in rows] == [0, 2, 4] and rows[0].difference == 0
    assert (run / "validation.png").stat().st_size > 2000
    assert "<svg" in (run / "report.html").read_text(encoding="utf-8")
    with safe_open(run / "small_best.safetensors", "pt") as file:
        metadata = file.metadata()
    assert int(metadata["steps"]) == best(rows).step
    assert float(metadata["validation_loss"]) == pytest.approx(best(rows).loss, abs=1e-5)

    files = sorted((run / "samples").iterdir())
    assert [file.name for file in files] == [
        f"{i:02d}-step{s:08d}.png" for i in (0, 1) for s in (0, 2, 4)
    ]
    text = Image.open(files[0]).text
    assert text["prompt"] == "ohwx one" and text["seed"] == "42"
    assert Image.open(files[3]).text["seed"] == "43"
    assert Image.open(run / "samples.png").size[0] > 3 * 256
    base, trained = (Image.open(files[i]).tobytes() for i in (0, 2))
    assert base != trained

    # gone after step 2, as by a crash: the same measurements and pictures come again
    (run / "checkpoints" / "step-00000004").rename(run / "gone")
    train(config)
    assert read_validations(run / "validation.jsonl") == rows
    assert Image.open(files[2]).tobytes() == trained


def test_folder_instead_of_share(configure, photos):
    config = configure(validation={"folder": str(photos), "every": 4, "timesteps": 1})
    train(config)
    rows = read_validations(config.run_dir / "validation.jsonl")
    assert [row.pictures for row in rows] == [5, 5]
    with pytest.raises(ConfigError, match="share or folder"):
        configure(validation={"folder": "x", "share": 0.1})


def test_trigger_is_needed_where_a_prompt_names_it(configure):
    with pytest.raises(ConfigError, match="no trigger"):
        train(configure(trigger=None, sample={"prompts": ["[trigger] one"]}))


def test_best_is_the_earliest_lowest():
    rows = [Validation(s, loss, 2.0, loss - 2, None, None, 1) for s, loss in enumerate((3, 1, 1))]
    assert best(rows).step == 1 and best([]) is None
