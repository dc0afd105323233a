"""A run's folder: held by one process, and usable as a crash, a copy or an editor leaves it."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import logged

import fluxfast.train
import fluxfast.util.platform
from fluxfast.config.schema import Config
from fluxfast.errors import FluxfastError
from fluxfast.run.checkpoint import checkpoints, read_state
from fluxfast.run.validation import Validation, best, read_validations
from fluxfast.train import train
from fluxfast.util.files import exclusive_lock, read_rows, shared_lock

ROOT = Path(__file__).parents[2]


@pytest.fixture
def configure(configure, monkeypatch):
    """Shorter runs, without charts, which take half of their time."""
    monkeypatch.setattr(fluxfast.train, "write_report", lambda run_dir: run_dir / "report.html")
    return partial(configure, train__batch_size=1, log_every=1)


def run(config: Config) -> list[str]:
    """Train to the end. Returns the log lines."""
    with logged() as lines:
        train(config)
    return lines


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


@pytest.mark.slow
def test_what_killed_processes_left_is_gone_at_the_next_start(configure):
    config = configure()
    left = [".small.safetensors.7.partial", "samples/.a.png.7.partial"]
    left += [f"checkpoints/.step-00000002.{gone}7.partial/state/x" for gone in ("", "gone.")]
    for name in left:
        (config.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (config.run_dir / name).write_text("")
    run(config)
    assert not [path for path in config.run_dir.rglob("*") if ".partial" in path.name]


@pytest.mark.slow
def test_a_run_that_was_moved_and_is_reached_by_a_link_goes_on_the_same(configure):
    """Under another name of its folder's folder; the settings that were saved name the old one."""
    longer = {"train__steps": 6, "train__lr_schedule": "constant"}
    whole = configure(**longer)
    run(whole)
    expected = load_file(whole.run_dir / "small.safetensors")
    whole.run_dir.rename(whole.output_dir / "whole")
    config = configure()
    run(config)
    elsewhere, link = config.output_dir.with_name("on another disk"), config.output_dir / "link"
    config.run_dir.rename(elsewhere)
    link.mkdir()
    (link / "small").symlink_to(elsewhere, target_is_directory=True)
    lines = run(configure(output_dir=str(link), **longer))
    (changed,) = [line for line in lines if "with other settings" in line]
    assert "output_dir was" in changed and "train.steps was 4, is 6" in changed
    assert (link / "small").is_symlink() and not config.run_dir.exists()
    ours = load_file(elsewhere / "small.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], value) for key, value in expected.items())


def test_settings_of_saving_that_shrink_lose_nothing_before_there_is_more(configure):
    """Fewer steps than there are, and fewer checkpoints."""
    config = configure(save__every=1, save__keep=3)
    run(config)
    last = checkpoints(config.run_dir)
    (config.run_dir / "small.safetensors").unlink()
    lines = run(configure(train__steps=2, save__keep=1))
    assert lines[-1].startswith("4 steps done") and checkpoints(config.run_dir) == last
    assert read_state(last[-1][1], tensors=False)["step"] == 4
    run(configure(train__steps=5, save__keep=1))
    assert [step for step, _ in checkpoints(config.run_dir)] == [5]


# ---------------------------------------------------------------- locks

needs_flock = pytest.mark.skipif(sys.platform == "win32", reason="no flock")
HOLD = """
import sys
from pathlib import Path
from fluxfast.util.files import {0}
with {0}(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder: Path, lock: str):
    """Inside, another process holds the folder; a kill ends that, as every end does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(lock), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@needs_flock
def test_two_processes_do_not_train_in_one_folder(configure):
    config = configure(train__steps=2)
    with held(config.run_dir, "exclusive_lock"):
        for restart in (False, True):
            with pytest.raises(FluxfastError, match="another process"):
                train(config, restart=restart)
    assert train(config).is_file()
    train(config, restart=True)
    assert (config.output_dir / "small.1" / "small.safetensors").is_file()


def test_a_lock_leaves_no_empty_folder(tmp_path):
    with exclusive_lock(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run").is_dir()
    assert not (tmp_path / "a" / "run").exists()
    with exclusive_lock(tmp_path / "b"):
        (tmp_path / "b" / "file").write_text("")
    assert (tmp_path / "b" / "file").exists()
    with (
        pytest.raises(FluxfastError, match="cannot write"),
        exclusive_lock(tmp_path / "b" / "file" / "run"),
    ):
        pass


@needs_flock
def test_a_folder_that_was_moved_between_opening_and_locking_is_opened_again(tmp_path, monkeypatch):
    """`--restart` moves a run aside: whoever had its folder open would lock the wrong one."""
    folder, moved = tmp_path / "run", []
    flock = fluxfast.util.platform.fcntl.flock

    def late(handle, operation):
        if not moved:
            moved.append(folder.rename(tmp_path / "run.1"))
        flock(handle, operation)

    monkeypatch.setattr(fluxfast.util.platform.fcntl, "flock", late)
    with exclusive_lock(folder):
        assert folder.is_dir()
        with pytest.raises(FluxfastError, match="another process"), exclusive_lock(folder):
            pass
        with exclusive_lock(tmp_path / "run.1"):
            pass


@needs_flock
def test_leftovers_in_a_shared_folder_go_when_nobody_else_is_there(tmp_path):
    """Two runs may fill one cache; what one is writing, the other must not remove."""
    (tmp_path / "latents").mkdir()
    left = [tmp_path / ".sizes.json.12.partial", tmp_path / "latents" / ".a.safetensors.7.partial"]
    whole = tmp_path / "latents" / "a.safetensors"
    for path in (*left, whole):
        path.write_text("")
    with held(tmp_path, "shared_lock"):
        assert left[1].exists() and not left[0].exists()  # it was told of no folder below
        left[0].write_text("")
        with shared_lock(tmp_path, "latents"):
            assert all(path.exists() for path in left)
    with shared_lock(tmp_path, "latents"):
        assert not any(path.exists() for path in left) and whole.exists()
        with shared_lock(tmp_path, "latents"):
            pass
    # should another process hold such a folder alone
    with held(tmp_path, "exclusive_lock"), shared_lock(tmp_path, "latents"):
        pass
