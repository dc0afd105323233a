"""Validation: fixed noise, paired differences, intervals, the best step; and previews in a run."""

import sys
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from small import noise_pictures, small_run
from small_runs import CPU, start

import fluxfast.run.evaluate
import fluxfast.train
from fluxfast.data.prepare import _held_out, hold_out, prepare, preview_pictures
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


def test_the_names_of_many_pictures_are_sorted_once():
    names = MagicMock(__iter__=Mock(side_effect=lambda: iter(map(str, range(50)))))
    assert len(_held_out(names, 0.5, 0)) == 25 and names.__iter__.call_count == 1


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
        for p in run.flat.parameters[1::2]:
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


@pytest.mark.slow
def test_nothing_that_serves_only_looking_ends_a_run(configure, monkeypatch, log_lines):
    """Everything of it fails, each in its own way."""
    size = {"width": 64, "height": 64, "steps": 1, "every": 2, "first": False}
    config = configure(sample={"prompts": ["x"], **size}, log_every=1, train__steps=3)

    def fails(error):
        def failing(*arguments, **named):
            raise error

        return failing

    evaluate, logger = fluxfast.run.evaluate, "fluxfast.run.logger"
    monkeypatch.setattr(evaluate, "draw_picture", fails(torch.OutOfMemoryError("CUDA: no memory")))
    monkeypatch.setattr(evaluate, "plot_validation", fails(TypeError("_distutils_hack")))
    monkeypatch.setattr(fluxfast.train, "write_report", fails(ImportError("No module 'jinja2'")))
    monkeypatch.setattr(f"{logger}.RunLog._append_unwritten", fails(PermissionError(13, "denied")))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(config) == config.run_dir / "small.safetensors"
    notes = [line for line in log_lines if line.endswith("; the run goes on")]
    for begins, count in {
        "note: preview 0 of step 2: OutOfMemoryError: CUDA: no memory": 1,
        "note: preview 0 of step 3: OutOfMemoryError": 1,
        "note: validation.png: TypeError: _distutils_hack": 3,
        "note: report.html: ImportError: No module 'jinja2'": 1,
        f"note: {config.run_dir / 'metrics.jsonl'}: denied": 1,
        "note: TensorBoard: ModuleNotFoundError": 1,
    }.items():
        assert sum(line.startswith(begins) for line in notes) == count, begins
    assert len(notes) == 8


def test_a_preview_that_fails_leaves_the_others(configure, monkeypatch, log_lines):
    """Those of a step have one VAE, which is gone after them."""
    size = {"width": 64, "height": 64, "steps": 1, "every": 0, "first": False}
    config = configure(sample={"prompts": ["one", "two", "three"], **size}, train__steps=1)
    draw, vaes = fluxfast.run.evaluate.draw_picture, []

    def draw_picture(model, vae, picture, embedding):
        vaes.append(vae)
        if picture.prompt == "two":
            raise torch.OutOfMemoryError("CUDA: no memory")
        return draw(model, vae, picture, embedding)

    monkeypatch.setattr(fluxfast.run.evaluate, "draw_picture", draw_picture)
    run = train(config).parent
    assert len({id(vae) for vae in vaes}) == 1 and vaes[0]._vae is None
    drawn = [f"{number:02d}-step00000001.png" for number in (0, 2)]
    assert sorted(f.name for f in (run / "samples").iterdir()) == drawn
    assert sum("preview 1 of step 1: OutOfMemoryError" in line for line in log_lines) == 1
    assert (run / "samples.png").exists()


def test_a_measurement_that_fails_leaves_the_lora_at_work(configure, monkeypatch, log_lines):
    """The base model's half of it is measured with the LoRA switched off."""
    run, loader = start(configure())
    prepared = prepare(configure(), CPU)
    watch = fluxfast.run.evaluate.Watch(configure(), run.model, prepared, CPU)
    monkeypatch.setattr(Validator, "_losses", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    assert watch.look(2) is None
    assert run.model.single_blocks[0].linear1.lora.strength == 1.0 and run.model.training
    assert log_lines[-1] == "note: validation at step 2: MemoryError: full; the run goes on"


@pytest.mark.slow
def test_equal_prompts_are_pictures_of_their_own(configure):
    size = {"width": 64, "height": 72, "steps": 1, "every": 0, "walk_seed": True, "first": False}
    config = configure(
        sample={"prompts": ["a [cat]/dog", "a [cat]/dog"], **size}, validation={}, train__steps=1
    )
    train(config)
    files = sorted((config.run_dir / "samples").iterdir())
    assert [file.name for file in files] == ["00-step00000001.png", "01-step00000001.png"]
    pictures = [Image.open(file) for file in files]
    assert [picture.text["seed"] for picture in pictures] == ["42", "43"]
    assert {picture.size for picture in pictures} == {(64, 64)}
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert Image.open(config.run_dir / "samples.png").size[1] > 2 * 256


def test_folder_instead_of_share(configure, photos):
    validation = {"folder": str(photos), "every": 4, "timesteps": 1}
    config = configure(validation=validation, train__guidance=None)  # both leave it out
    train(config)
    rows = read_validations(config.run_dir / "validation.jsonl")
    assert [row.pictures for row in rows] == [5, 5]
    with pytest.raises(ConfigError, match="share or folder"):
        configure(validation={"folder": "x", "share": 0.1})


def test_trigger_is_needed_where_a_prompt_names_it(configure):
    samples = {"samples": [{"prompt": "[trigger] one"}]}
    with pytest.raises(ConfigError, match="no one trigger"):
        train(configure(trigger=None, sample=samples))
    assert [p.prompt for p in preview_pictures(configure(sample=samples))] == ["ohwx one"]
    of_data = configure(trigger=None, sample=samples, data__trigger="alice")
    assert [p.prompt for p in preview_pictures(of_data)] == ["alice one"]
    with pytest.raises(ConfigError, match="no one trigger") as caught:
        data = [of_data.data[0], of_data.data[0].model_copy(update={"trigger": "bob"})]
        preview_pictures(of_data.model_copy(update={"data": data}))
    assert caught.value.hint == "write the one that is meant: alice, bob"


def test_best_is_the_earliest_lowest():
    rows = [Validation(s, loss, 2.0, loss - 2, None, None, 1) for s, loss in enumerate((3, 1, 1))]
    assert best(rows).step == 1 and best([]) is None
    other = Validation(3, 9.0, 9.5, -0.5, None, None, 2)
    assert best([*rows, other]) is other  # measured on other pictures: the lower ones do not count
