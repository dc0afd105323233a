"""A run that was stopped and went on is the run that was not, bit for bit; what may change on the
way."""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small import logged, noise_pictures
from small_runs import metrics

import fluxfast.data.buckets
import fluxfast.run.evaluate
import fluxfast.run.saves
import fluxfast.train
from fluxfast.config.schema import Config, all_keys, build_config, load_config
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.run.checkpoint import checkpoints, read_state, save_checkpoint
from fluxfast.run.interrupt import Stopped
from fluxfast.run.resume import (
    APPLIED,
    PATHS,
    REFUSED,
    RULES,
    changes,
    check_changes,
    moved,
    settings,
    table_key,
)
from fluxfast.run.validation import read_validations
from fluxfast.train import train

OPTIMIZERS = ["adamw", "adamw8bit", "prodigy", "schedulefree", "adafactor"]
TIMES = {"it_per_s", "s_per_it", "eta_s", "peak_memory_gib"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Six pictures in two shapes."""
    folder, sizes = tmp_path_factory.mktemp("photos"), ((64, 64), (96, 64))
    return noise_pictures(folder, 6, "a picture of a thing", sizes=sizes)


@pytest.fixture(autouse=True)
def no_charts(monkeypatch):
    """They take half of such a short run's time."""
    monkeypatch.setattr(fluxfast.run.evaluate, "plot_validation", lambda rows, path: None)
    monkeypatch.setattr(fluxfast.train, "write_report", lambda run_dir: run_dir / "report.html")


@pytest.fixture
def demanding(configure):
    """Returns make(optimizer, steps): accumulation, an average, caption dropout, two buckets,
    validation at steps that are no saves, log lines that a stop cuts in two."""

    def make(optimizer: str, steps: int, **changes) -> Config:
        common = {
            "train__optimizer": optimizer,
            "train__lr": 1.0 if optimizer == "prodigy" else 1e-3,
            "train__lr_schedule": "constant" if optimizer == "schedulefree" else "cosine",
            "train__warmup_steps": 2,
            "train__batch_size": 1,
            "train__gradient_accumulation": 2,
            "train__ema": {"enabled": True},
            "train__steps": steps,
            "data.0.caption_dropout": 0.3,
            "data.0.resolution": [64, 96],
            "validation": {"share": 0.2, "every": steps // 3, "timesteps": 1},
            "save__every": 0,
            "log_every": 2,
        }
        return configure(**{**common, **changes})

    return make


@contextmanager
def stopped_after(step: int, monkeypatch):
    """Inside, a run gets a signal in the middle of its step `step`."""
    real = fluxfast.train.train_step

    def signaled(run, batches, index):
        if index == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, batches, index)

    with monkeypatch.context() as patch:
        patch.setattr(fluxfast.train, "train_step", signaled)
        with pytest.raises(Stopped) as raised:
            yield
    assert raised.value.step == step


def validated_steps(config: Config) -> list[int]:
    return [row.step for row in read_validations(config.run_dir / "validation.jsonl")]


def last_state(config: Config) -> dict:
    return read_state(checkpoints(config.run_dir)[-1][1])


def everything(config: Config) -> dict:
    """Returns LoRA files as bytes, the last checkpoint's tensors and numbers, both series."""
    files = sorted(config.run_dir.glob("*.safetensors"))
    assert {file.name for file in files} >= {"small.safetensors", "small_ema.safetensors"}
    state = last_state(config)
    del state["config"]  # which also says when to save
    return {
        "files": {file.name: file.read_bytes() for file in files},
        "state": state,
        "metrics": [{k: v for k, v in row.items() if k not in TIMES} for row in metrics(config)],
        "validation": (config.run_dir / "validation.jsonl").read_text(),
    }


def assert_same(one, other, path="") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert type(one) is type(other) and len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}/{index}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    else:
        assert one == other, path


def uninterrupted(config: Config) -> dict:
    """Returns everything of the run in one go, whose folder is moved out of the way."""
    train(config)
    whole = everything(config)
    config.run_dir.rename(config.output_dir / "whole")
    return whole


def compare(config: Config, stops: list[int], monkeypatch) -> None:
    """The run in one go, beside the one that is stopped at these steps and goes on each time."""
    with logged() as lines:
        whole = uninterrupted(config)
    assert not any("in 1 bucket:" in line for line in lines)
    for step in stops:
        with stopped_after(step, monkeypatch):
            train(config)
        assert checkpoints(config.run_dir)[-1][0] == step
    train(config)
    assert_same(everything(config), whole)
    steps = list(range(2, config.train.steps + 1, 2))
    assert [row["step"] for row in metrics(config)] == steps and validated_steps(config)[0] == 0


@pytest.mark.grid(1)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stopped_and_resumed_is_the_same_run(demanding, optimizer, monkeypatch):
    """Six steps in one go, and three, stop, three."""
    compare(demanding(optimizer, 6), [3], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_hundred_steps_are_a_hundred_and_a_hundred(demanding, optimizer, monkeypatch):
    compare(demanding(optimizer, 200), [100], monkeypatch)


@pytest.mark.slow
def test_many_stops_and_saves_change_nothing(demanding, monkeypatch):
    """Stopped five times, at saves, at measurements and at neither, with dropout in the LoRA."""
    config = demanding("adamw8bit", 24, save__every=4, lora__dropout=0.2)
    compare(config, [3, 8, 9, 16, 21], monkeypatch)


def test_saving_measuring_and_previews_change_nothing(demanding):
    """Schedule-free's two points are turned into each other; in fp32 that rounds."""
    often = {
        "save__every": 1,
        "validation": {"share": 0.2, "every": 1, "timesteps": 1},
        "sample": {"prompts": ["x"], "every": 1, "width": 64, "height": 64, "steps": 1},
    }
    ends = []
    for more in ({}, often):
        config = demanding("schedulefree", 4, **more)
        train(config)
        ends.append(last_state(config))
        config.run_dir.rename(config.output_dir / f"run {len(ends)}")
    for key in ("parameters", "optimizer", "ema"):
        assert_same(ends[0][key], ends[1][key], key)


# ---------------------------------------------------------------- killed, not stopped


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_in(name: str, call: int, monkeypatch, config: Config, module=fluxfast.train) -> None:
    """Run, and end at the given call of a function; nothing is saved on the way out."""
    real, calls = getattr(module, name), [0]

    def dies(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies)
        with pytest.raises(Killed):
            train(config)


@pytest.mark.slow
def test_killed_runs_leave_no_step_twice_or_out(demanding, monkeypatch):
    """In the middle of a measurement, before the best weights are kept, behind lines and
    measurements of steps that no checkpoint has, and between the last measurement and the end."""
    config = demanding("adamw", 8, save__every=3, validation={"share": 0.2, "every": 2})
    whole = uninterrupted(config)
    killed_in("train_step", 6, monkeypatch, config)  # of 3, where the interval to 4 is half over
    assert validated_steps(config) == [0, 2, 4]
    killed_in("save_best", 1, monkeypatch, config)  # at 4, whose measurement is written
    killed_in("train_step", 5, monkeypatch, config)  # of 6, where a measurement is due
    killed_in("_look", 1, monkeypatch, config)  # before 6's
    assert validated_steps(config) == [0, 2, 4]
    killed_in("_look", 2, monkeypatch, config)  # before 8's, behind the last save
    assert checkpoints(config.run_dir)[-1][0] == 8
    killed_in("publish", 1, monkeypatch, config, fluxfast.run.saves.Saves)
    train(config)
    assert_same(everything(config), whole)


def test_the_best_of_steps_that_come_again_is_forgotten(demanding, monkeypatch):
    """NAME_best of a later step that was lost is put back to the one that the checkpoint knew. Had
    the steps after it gone worse this time, that file would have stayed."""

    def best_step() -> int:
        with safe_open(config.run_dir / "small_best.safetensors", "pt") as file:
            return int(file.metadata()["steps"])

    config = demanding("adamw", 8, save__every=3, validation={"share": 0.2, "every": 2})
    killed_in("train_step", 6, monkeypatch, config)
    assert best_step() == 4  # behind the checkpoint of step 3
    killed_in("train_step", 1, monkeypatch, config)
    assert best_step() == 2 and validated_steps(config) == [0, 2]


def test_a_state_that_does_not_fit_is_reported(configure):
    """Sound by its checksums, but another program's, say."""
    config = configure()
    train(config)
    state = last_state(config)
    del state["optimizer"]["param_groups"]
    save_checkpoint(config.run_dir, state, lambda folder: None, keep=1)
    message = "the state in .* does not fit this run: 'param_groups'"
    with pytest.raises(FluxfastError, match=message):
        train(configure(train__steps=6))


def test_a_run_keeps_the_buckets_that_it_began_with(configure, monkeypatch):
    """Merged or, where it began before fluxfast merged any, not; a new run merges them."""
    sizes = {"data.0.resolution": 96, "data.0.num_repeats": 2}

    def trained(name: str, areas: int, steps: int = 4) -> dict:
        with monkeypatch.context() as patch:
            patch.setattr(fluxfast.data.buckets, "AREAS", areas)
            config = configure(name=name, train__steps=steps, **sizes)
            train(config)
        return last_state(config)

    apart, merged = trained("apart", 8), trained("merged", 1)
    assert apart["areas"] == {} and merged["areas"] == {96: [64 * 64]}
    assert apart["data"] != merged["data"]
    trained("merged-2", 1, steps=2)
    assert all_equal(trained("merged-2", 8)["parameters"], merged["parameters"])
    state = trained("earlier", 8, steps=2)
    del state["areas"]
    save_checkpoint(configure(name="earlier").run_dir, state, lambda folder: None, keep=1)
    with logged() as lines:
        earlier = trained("earlier", 1)
    assert all_equal(earlier["parameters"], apart["parameters"]) and earlier["areas"] == {}
    assert not any("have changed" in line or "merged" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("areas", [1, 8])  # merged, and began with fewer than that
def test_a_resumed_run_takes_pictures_that_none_of_its_areas_fits(
    configure, areas, monkeypatch, tmp_path, log_lines
):
    """Those that it knew stay in their buckets."""
    (folder := tmp_path / "growing").mkdir()
    noise_pictures(folder, 4, "a thing", sizes=((64, 64), (96, 64)))
    monkeypatch.setattr(fluxfast.data.buckets, "AREAS", areas)
    config = configure(data={"folder": str(folder), "resolution": 96}, train__steps=2)
    train(config)
    before = last_state(config)["areas"]
    assert before == ({96: [64 * 64]} if areas == 1 else {})
    monkeypatch.setattr(fluxfast.data.buckets, "AREAS", 1)
    for number, size in enumerate(((160, 32), (32, 32), (96, 96))):
        Image.new("RGB", size).save(folder / f"new-{number}.png")
        (folder / f"new-{number}.txt").write_text("a new thing")
    train(configure(data={"folder": str(folder), "resolution": 96}, train__steps=6))
    assert last_state(config)["areas"] == before and checkpoints(config.run_dir)[-1][0] == 6
    buckets = {1: "64x64 (5), 128x32 (1), 32x32 (1)"}
    assert any(buckets.get(areas, "64x64 (2), 96x64 (2), ") in line for line in log_lines)
    assert any("pictures or captions have changed" in line for line in log_lines)


def all_equal(tensors, others) -> bool:
    return all(map(torch.equal, tensors, others))


@pytest.mark.slow
def test_what_was_best_is_known_without_the_series(demanding, monkeypatch):
    """A checkpoint holds the measurements, so that a worse step does not become the best."""
    config = demanding("adamw", 8, validation={"share": 0.2, "every": 2, "timesteps": 1})
    whole = uninterrupted(config)
    with stopped_after(5, monkeypatch):
        train(config)
    (config.run_dir / "validation.jsonl").unlink()
    train(config)
    assert_same(everything(config), whole)


# ---------------------------------------------------------------- other settings


@pytest.fixture(scope="module")
def some_config() -> Config:
    data = [{"folder": "a"}, {"folder": "b", "mask": "alpha"}]
    model, sample = {"path": "m", "layers": {"x": "bf16"}}, {"samples": [{"prompt": "x"}]}
    return build_config({"model": model, "data": data, "sample": sample})


def test_every_setting_is_in_one_class():
    known = all_keys(Config)
    sections = {key for key in known if any(each.startswith(f"{key}.") for each in known)}
    whole = {key for key, _ in RULES} & sections  # compared as one value
    assert {key.rpartition(".")[2] for key in whole} == {"threshold", "loras"}
    parts = {key for key in known if any(key.startswith(f"{each}.") for each in whole)}
    leaves = known - sections - parts | whole
    assert sorted(key for key, _ in RULES) == sorted(leaves)
    assert {kind for _, kind in RULES} == {"refused", "applied", "start"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[0])
def test_every_class_does_what_it_says(some_config, rule):
    key, kind = rule
    if key.startswith("data."):
        key = key.replace("data.", "data.1." if key == "data.folder" else "data.0.")
    key = key.replace("sample.samples.", "sample.samples.0.")
    assert table_key(key) == rule[0]
    now = settings(some_config)
    other = {"other": 1} if isinstance(now[key], dict) else f"not {now[key]}"
    before = now | {key: not now[key] if isinstance(now[key], bool) else other}
    if kind == "refused":
        with pytest.raises(ConfigError, match="with other settings") as raised:
            check_changes(before, some_config)
        assert f"{key} was" in raised.value.message and "--restart" in raised.value.hint
    else:
        (line,) = check_changes(before, some_config)
        assert f"{key} was" in line
        assert ("without effect" in line) == (kind == "start")


def test_no_run_goes_on_as_a_mixture_and_none_is_kept_from_longer_or_slower():
    dangerous = "name seed trigger model.path lora.rank lora.alpha lora.dropout lora.targets"
    dangerous += " data.folder data.resolution train.batch_size train.gradient_accumulation"
    dangerous += " train.optimizer train.optimizer_args train.timesteps validation.share"
    assert set(dangerous.split()) <= REFUSED
    harmless = "train.steps train.lr save.every save.keep save.dtype output_dir sample.prompts"
    assert set(harmless.split()) <= APPLIED


def test_a_setting_that_an_earlier_version_lacked_had_its_default(some_config):
    before = json.loads(some_config.model_dump_json())
    del before["data"][0]["batch_size"], before["train"]["lr_end"]
    assert check_changes(before, some_config) == []
    some = json.loads(some_config.model_dump_json())
    some["data"][0]["batch_size"] = 2
    with pytest.raises(ConfigError, match="data.0.batch_size was None, is 2"):
        check_changes(before, Config.model_validate(some))


def test_the_same_settings_are_no_change(some_config):
    dump = json.loads(json.dumps(some_config.model_dump(mode="json")))
    assert check_changes(dump, some_config) == []
    fewer = some_config.model_copy(update={"data": some_config.data[:1]})
    for one, two in ((dump, fewer), (fewer.model_dump(mode="json"), some_config)):
        with pytest.raises(ConfigError, match="data had"):
            check_changes(one, two)
    del dump["train"]["guidance"], dump["memory"]  # of a version that did not know them
    assert check_changes(dump, some_config) == []
    checkpointed = some_config.model_copy(deep=True)
    checkpointed.memory.policy = "checkpoint"
    dump = checkpointed.model_dump(mode="json")
    dump["memory"]["policy"] = "replay"  # the same, in a version's words that had it so
    assert check_changes(dump, checkpointed) == []
    several = settings(some_config) | {"seed": 1, "lora.rank": 3, "train.lr": 2.0}
    assert len(changes(several, some_config, REFUSED)) == 2


def test_harmless_changes_are_applied_and_named(demanding, monkeypatch, log_lines):
    with stopped_after(2, monkeypatch):
        train(demanding("adamw", 4, train__lr_schedule="constant"))
    changed = {"train__lr": 3e-3, "train__lr_schedule": "constant", "log_every": 1}
    config = demanding("adamw", 5, **changed)
    train(config)
    (line,) = [line for line in log_lines if "other settings" in line]
    for change in (
        "train.steps was 4, is 5",
        "train.lr was 0.001, is 0.003",
        "log_every was 2, is 1",
    ):
        assert change in line
    assert [row["lr"] for row in metrics(config)][-3:] == [3e-3] * 3
    assert [row["step"] for row in metrics(config)] == [2, 3, 4, 5]


def test_dangerous_changes_are_refused_before_anything_is_done(demanding, monkeypatch):
    config = demanding("adamw", 4)
    with stopped_after(2, monkeypatch):
        train(config)
    monkeypatch.setattr(fluxfast.train, "prepare", lambda *_: pytest.fail("went on"))
    for key, value in {"lora__rank": 3, "train__optimizer_args": {"weight_decay": 0.5}}.items():
        with pytest.raises(ConfigError, match=f"{key.replace('__', '.')} was"):
            train(demanding("adamw", 4, **{key: value}))


def test_other_pictures_are_noticed(demanding, photos, tmp_path, monkeypatch, log_lines):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    config = demanding("adamw", 4, **{"data.0.folder": str(copy)})
    with stopped_after(2, monkeypatch):
        train(config)
    (copy / "0.png").unlink()
    train(config)
    assert any("have changed since this run began" in line for line in log_lines)
    log_lines.clear()
    train(demanding("adamw", 5, **{"data.0.folder": str(copy)}))
    assert not any("have changed" in line for line in log_lines)


@pytest.mark.slow
def test_the_same_thing_by_another_path_goes_on_and_another_thing_does_not(
    configure, photos, nano_model, tmp_path, monkeypatch, log_lines
):
    shutil.copytree(photos, tmp_path / "pics")
    shutil.copytree(nano_model, tmp_path / "model")
    shutil.copytree(photos, tmp_path / "val")
    monkeypatch.chdir(tmp_path)

    def run(steps: int, data: str, model: str, val: str) -> int:
        log_lines.clear()
        paths = {"data.0.folder": data, "model__path": model, "validation": {"folder": val}}
        config = configure(**paths, train__steps=steps, save__every=0, validation__every=9)
        train(config)
        assert not any("have changed" in x or ".folder was" in x for x in log_lines)
        assert not any("model.path was" in x for x in log_lines)
        return checkpoints(config.run_dir)[-1][0]

    assert run(1, "pics", "model", "val") == 1
    (tmp_path / "link").symlink_to(tmp_path / "pics")
    assert run(2, f"{tmp_path}/link", "./model/", f"{tmp_path}/val/") == 2
    for name in ("pics", "model", "val"):
        (tmp_path / name).rename(tmp_path / f"{name}2")
    assert run(3, "pics2", f"{tmp_path}/model2", "val2") == 3
    (tmp_path / "pics3").mkdir()
    noise_pictures(tmp_path / "pics3", 6, "others", seed=5)
    with pytest.raises(ConfigError, match="data.0.folder was .*pics2', is 'pics3'") as raised:
        run(4, "pics3", "model2", "val2")
    assert "model" not in raised.value.message
    (tmp_path / "pics2").rename(tmp_path / "gone")  # now its content alone can tell
    with pytest.raises(ConfigError, match="data.0.folder was"):
        run(4, "pics3", "model2", "val2")
    monkeypatch.setattr(fluxfast.train, "prepare", lambda *_: pytest.fail("went on"))
    (weights,) = (tmp_path / "model2/transformer").glob("*.safetensors")
    content = weights.read_bytes()
    (tmp_path / "model2").rename(tmp_path / "model3")
    (tmp_path / "model3/transformer" / weights.name).write_bytes(content[:-1] + b"x")
    with pytest.raises(ConfigError, match="model.path was .*model2', is 'model3'"):
        run(4, "gone", "model3", "val2")


def test_a_moved_folder_of_pictures_may_be_the_same(some_config, tmp_path, monkeypatch):
    """Where the earlier one is gone, or has the same files; else it is refused at once."""
    monkeypatch.chdir(tmp_path)
    before = json.loads(some_config.model_dump_json())
    before["data"][0]["folder"] = "was"
    known = {PATHS["data.folder"]}
    assert moved(before, some_config, known) == set()  # the new one is not there
    Path("a").mkdir()
    Path("a/1.png").write_text("1")
    assert moved(before, some_config, known) == {"data.0.folder"}
    Path("was").mkdir()
    assert moved(before, some_config, known) == set()
    Path("was/1.png").write_text("2")
    assert moved(before, some_config, known) == {"data.0.folder"}
    before["data"][0]["folder"] = f"{tmp_path}/a/"
    assert moved(before, some_config, known) == set() and check_changes(before, some_config) == []


def test_a_checkpoint_that_names_no_weights_takes_no_other_path_of_a_model(some_config):
    """One of an earlier version: nothing tells whether they are the same."""
    before = json.loads(some_config.model_dump_json())
    before["model"]["path"] = "/elsewhere/m"
    assert moved(before, some_config, {PATHS["data.folder"]}) == set()
    assert moved(before, some_config, {PATHS["model.path"]}) == {"model.path"}
    assert check_changes(before, some_config, {"model.path"}) == []
    before["model"]["path"] = "./x/../m"
    assert check_changes(before, some_config) == []


@pytest.mark.slow
def test_seeds_that_are_drawn_stay_the_runs_own(configure, monkeypatch):
    """-1 is drawn once: the run that was stopped is the one whose seeds are written down."""
    sample = {"prompts": ["x"], "every": 0, "first": False, "width": 64, "height": 64, "steps": 1}
    own = [{"prompt": "y", "seed": -1}, {"prompt": "z"}]
    random = {"seed": -1, "sample": {**sample, "seed": -1, "samples": own}, "save__every": 0}
    with stopped_after(1, monkeypatch):
        train(configure(**random))
    drawn = load_config(configure().run_dir / "config.yaml")
    assert 0 <= drawn.seed < 2**32 and 0 <= drawn.sample.seed < 2**32
    resumed = load_file(train(configure(**random)))
    config = load_config(configure().run_dir / "config.yaml")
    assert (config.seed, config.sample) == (drawn.seed, drawn.sample)
    assert config.sample.samples[0].seed >= 0 and config.sample.samples[1].seed is None
    assert last_state(config)["config"]["seed"] == drawn.seed
    config.run_dir.rename(config.output_dir / "drawn")
    whole = load_file(train(configure(**{**random, "seed": drawn.seed})))
    assert all(torch.equal(whole[key], value) for key, value in resumed.items())


def test_an_average_may_begin_late_and_end_early(demanding, monkeypatch):
    off, on = ({"train__ema": {"enabled": switch}} for switch in (False, True))
    with stopped_after(1, monkeypatch):
        train(demanding("adamw", 3, **off))
    with stopped_after(2, monkeypatch):
        train(demanding("adamw", 3, **on))
    config = demanding("adamw", 3, **off)
    assert last_state(config)["ema"]["updates"] == 1
    train(config)
    assert last_state(config)["ema"] is None
