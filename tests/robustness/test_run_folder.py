"""A run's folder as a crash, a copy or an editor leaves it: the run goes on where it can, and says
what is lost."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from small import logged

import fluxfast.run.evaluate
import fluxfast.train
from fluxfast.config.schema import Config
from fluxfast.run.checkpoint import checkpoints, read_state
from fluxfast.run.validation import Validation, best, read_validations
from fluxfast.train import train
from fluxfast.util.files import read_rows


@pytest.fixture
def configure(configure, monkeypatch):
    """Shorter runs, measured, without charts, which take half of their time."""
    monkeypatch.setattr(fluxfast.run.evaluate, "plot_validation", lambda rows, path: path)
    monkeypatch.setattr(fluxfast.train, "write_report", lambda run_dir: run_dir / "report.html")
    short = {
        "train__batch_size": 1,
        "log_every": 1,
        "validation": {"share": 0.25, "every": 2, "timesteps": 1},
    }
    return partial(configure, **short)


def run(config: Config) -> list[str]:
    """Train to the end. -> what was said."""
    with logged() as lines:
        train(config)
    return lines


# ---------------------------------------------------------------- metrics.jsonl, validation.jsonl

FOREIGN = [
    b"{junk}",
    b"[1]",
    b"{}",
    b'{"step": "3"}',
    b'{"step": true, "loss": 1}',
    b'{"step": 3, "loss": "\xc3',  # cut within a letter
    b"\xff\xfe\x00",
    b"\x00" * 40,  # as a file system may leave what was not flushed
    b'{"a":' * 3000 + b"1" + b"}" * 3000,
]


@pytest.mark.slow
def test_lines_that_are_none_of_the_logs_are_left_out_and_counted(configure):
    """Nothing of the others, of what comes later, or of the training is another for them."""
    ends = []
    for spoiled in (False, True):
        config = configure()
        run(config)
        files = [config.run_dir / f"{name}.jsonl" for name in ("metrics", "validation")]
        for file in files if spoiled else ():
            first, rest = file.read_bytes().split(b"\n", 1)
            file.write_bytes(b"\n".join([*FOREIGN[:5], first, *FOREIGN[5:], rest]) + b'{"step": 4')
        said = run(configure(train__steps=6))
        notes = [line for line in said if "cannot be read and are left out" in line]
        assert len(notes) == spoiled  # the measurements are in the checkpoint
        if spoiled:
            assert notes[0].startswith(f"note: 10 of 14 lines of {files[0]} cannot")
        steps = [row["step"] for row in map(json.loads, files[0].read_text().splitlines())]
        assert steps == [1, 2, 3, 4, 5, 6]
        lora = (config.run_dir / "small.safetensors").read_bytes()
        ends.append((lora, read_validations(files[1])))
        config.run_dir.rename(config.output_dir / f"run {spoiled}")
    assert ends[0] == ends[1] and [row.step for row in ends[0][1]] == [0, 2, 4, 6]


def test_only_measurements_are_read_as_such(tmp_path, log_lines):
    row = {"step": 2, "loss": 1.5, "base_loss": 2, "difference": -0.5, "low": None, "high": None}
    row["pictures"] = 1
    wrong = [{"loss": "x"}, {"loss": None}, {"low": "x"}, {"pictures": []}, {"more": 1}]
    lines = [{**row, **each} for each in (*wrong, {"loss": float("nan")}, {})]
    file = tmp_path / "validation.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (*lines, {"step": 3})))
    rows = read_validations(file)
    assert len(rows) == 2 and rows[1] == Validation(**row)
    assert read_rows(tmp_path / "none.jsonl") == []
    assert log_lines == [f"note: 6 of 8 lines of {file} cannot be read and are left out"]
    assert best(rows) is rows[1]  # though the one before it has no number


# ---------------------------------------------------------------- what is found there


def test_what_killed_processes_left_is_gone_at_the_next_start(configure):
    config = configure(validation={})
    left = [".small.safetensors.7.partial", "samples/.a.png.7.partial"]
    left += [f"checkpoints/.step-00000002.{gone}7.partial/state/x" for gone in ("", "gone.")]
    for name in left:
        (config.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (config.run_dir / name).write_text("")
    run(config)
    assert not [path for path in config.run_dir.rglob("*") if ".partial" in path.name]


def test_a_run_that_was_moved_and_is_reached_by_a_link_goes_on_the_same(configure):
    """Under another name of its folder's folder; the settings that were saved name the old one."""
    longer = {"train__steps": 6, "train__lr_schedule": "constant"}
    whole = configure(**longer)
    run(whole)
    kept = load_file(whole.run_dir / "small.safetensors")
    whole.run_dir.rename(whole.output_dir / "whole")
    config = configure()
    run(config)
    elsewhere, link = config.output_dir.with_name("on another disk"), config.output_dir / "link"
    config.run_dir.rename(elsewhere)
    link.mkdir()
    (link / "small").symlink_to(elsewhere, target_is_directory=True)
    said = run(configure(output_dir=str(link), **longer))
    (changed,) = [line for line in said if "with other settings" in line]
    assert "output_dir was" in changed and "train.steps was 4, is 6" in changed
    assert (link / "small").is_symlink() and not config.run_dir.exists()
    ours = load_file(elsewhere / "small.safetensors")
    assert ours.keys() == kept.keys() and all(torch.equal(ours[key], kept[key]) for key in kept)


def test_settings_of_saving_that_shrink_lose_nothing_before_there_is_more(configure):
    """Fewer steps than there are, and fewer checkpoints."""
    config = configure(save__every=1, save__keep=3)
    run(config)
    last = checkpoints(config.run_dir)
    (config.run_dir / "small.safetensors").unlink()
    said = run(configure(train__steps=2, save__keep=1))
    assert said[-1].startswith("4 steps done") and checkpoints(config.run_dir) == last
    assert read_state(last[-1][1], tensors=False)["step"] == 4
    run(configure(train__steps=5, save__keep=1))
    assert [step for step, _ in checkpoints(config.run_dir)] == [5]
