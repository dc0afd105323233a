"""Signals: the step is finished and saved, the exit code is 0, a second one ends at once. A full
disk does not end a run."""

import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import yaml

import fluxfast.train
from fluxfast.errors import DiskError
from fluxfast.run.checkpoint import checkpoints, newest_checkpoint
from fluxfast.run.interrupt import handle_signals, stop_on_signals
from fluxfast.run.validation import read_validations
from fluxfast.train import train
from fluxfast.util.platform import SIGNALS, flush_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def configure(configure):
    """Shorter runs still."""
    return partial(configure, log_every=1, train__batch_size=1, save__every=0)


def written(config, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def signals_at(monkeypatch, step: int, *numbers: int) -> None:
    """Signals in the middle of a step, counted from 1."""
    real = fluxfast.train.train_step

    def signaled(run, batches, index):
        for number in numbers if index + 1 == step else ():
            os.kill(os.getpid(), number)
        return real(run, batches, index)

    monkeypatch.setattr(fluxfast.train, "train_step", signaled)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_ends(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
        os.kill(os.getpid(), number)
        pytest.fail("went on")
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_what_was_to_be_ignored_stays_ignored():
    """Such as in a process that a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_have_no_handlers():
    seen = []

    def work():
        with stop_on_signals() as stop:
            seen.append((stop.is_set(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]


def test_sigterm_ends_what_is_no_training_like_ctrl_c():
    with pytest.raises(KeyboardInterrupt), handle_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")


@pytest.mark.grid(1)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_names_the_command(configure, fluxfast, tmp_path, monkeypatch, number):
    config = configure()
    file = written(config, tmp_path / "my run.yaml")
    with monkeypatch.context() as patch:
        signals_at(patch, 2, number)
        code, out, err = fluxfast("train", file, "--restart", "--set", "train.lr=0.001")
    assert (code, out) == (0, "")
    line = f"stopped after step 2 of 4, which is saved; to go on: fluxfast train '{file}' --set"
    assert f"{line} train.lr=0.001\n" in err
    assert [step for step, _ in checkpoints(config.run_dir)] == [2]
    code, out, err = fluxfast("train", file)
    assert code == 0 and out.endswith("small.safetensors\n") and "at step 2" in err


def test_a_second_signal_ends_at_once_and_harms_nothing(configure, fluxfast, tmp_path, monkeypatch):
    """In the middle of a save, and of a step."""
    config = configure(save__every=1)
    file = written(config, tmp_path / "c.yaml")

    def interrupted(folder):
        if "step-00000002" in str(folder):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return flush_folder(folder)

    with monkeypatch.context() as patch:
        patch.setattr("fluxfast.run.checkpoint.flush_folder", interrupted)
        code, out, err = fluxfast("train", file)
    assert code == 130 and out == "" and "goes on" in err
    assert [step for step, _ in checkpoints(config.run_dir)] == [1]
    assert not list(config.run_dir.rglob("*.partial"))
    with monkeypatch.context() as patch:
        signals_at(patch, 3, signal.SIGTERM, signal.SIGTERM)
        assert fluxfast("train", file)[0] == 130
    assert newest_checkpoint(config.run_dir)[0] == 2
    assert fluxfast("train", file)[0] == 0


def test_a_signal_in_the_last_step_is_no_stop(configure, monkeypatch):
    signals_at(monkeypatch, 4, signal.SIGTERM)
    assert train(configure()).is_file()


@pytest.mark.slow
def test_a_process_of_its_own_takes_sigterm(configure, tmp_path):
    config = configure(train__steps=500)
    file = written(config, tmp_path / "c.yaml")
    command = [sys.executable, "-m", "fluxfast", "train", str(file)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step "):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait() == 0 and "Traceback" not in rest
    assert f"to go on: python -m fluxfast train {file}" in rest
    (step, _) = newest_checkpoint(config.run_dir)
    assert 1 <= step < 500


# ---------------------------------------------------------------- a disk that refuses


def full_disk(monkeypatch, part: str = "", when=lambda: True) -> None:
    """The disk is full, whenever `when()`, for what is put in place under a name with this part."""
    for name in ("replace", "rename"):
        real = getattr(os, name)

        def refuses(source, target, real=real):
            if part in str(target) and when():
                raise OSError(28, "No space left on device")
            return real(source, target)

        monkeypatch.setattr(os, name, refuses)


def test_a_save_that_fails_is_said_once_and_tried_at_the_next(configure, monkeypatch, log_lines):
    config = configure(train__steps=7, save__every=2)
    whole = train(config).read_bytes()
    config.run_dir.rename(config.output_dir / "whole")
    with monkeypatch.context() as patch:
        full_disk(patch, "step-00000004")
        assert train(config).read_bytes() == whole
    (line,) = [line for line in log_lines if "is not saved" in line]
    assert line.startswith("note: ")
    assert "step 4 is not saved" in line and "No space left" in line and "saved at step 6" in line
    assert ".partial" not in line
    assert [step for step, _ in checkpoints(config.run_dir)] == [2, 6, 7]


@pytest.mark.parametrize("stopped", [True, False])
def test_a_last_save_that_fails_is_an_error_and_the_one_before_stays(
    configure, monkeypatch, stopped
):
    """Of the last step, or of a stop: no exit code 0 for what is lost."""
    config = configure(save__every=2, train__steps=4 if stopped else 3)
    with monkeypatch.context() as patch:
        full_disk(patch, "step-00000003")
        signals_at(patch, 3, *[signal.SIGTERM] * stopped)
        with pytest.raises(DiskError, match="No space left") as raised:
            train(config)
    assert "partial" not in str(raised.value) and "checkpoints" in raised.value.message
    assert newest_checkpoint(config.run_dir)[0] == 2
    assert not list(config.run_dir.rglob("*.partial"))
    assert train(config).is_file()


@pytest.mark.slow
def test_measurements_and_previews_survive_a_full_disk(configure, monkeypatch, log_lines):
    """The rows are there in the end; pictures that could not be written are said to be missing."""
    config = configure(
        validation={"share": 0.4, "every": 1, "timesteps": 1},
        sample={"prompts": ["x"], "every": 1, "width": 64, "height": 64, "steps": 1},
    )
    real, steps = fluxfast.train.Watch.look, [0]

    def look(watch, done):
        steps.append(done)
        row = real(watch, done)
        steps.append(0)
        return row

    full_disk(monkeypatch, when=lambda: steps[-1] == 2)
    monkeypatch.setattr(fluxfast.train.Watch, "look", look)
    train(config)
    rows = read_validations(config.run_dir / "validation.jsonl")
    assert [row.step for row in rows] == [0, 1, 2, 3, 4]
    pictures = sorted(path.name for path in (config.run_dir / "samples").iterdir())
    assert pictures == [f"00-step{step:08d}.png" for step in (0, 1, 3, 4)]
    notes = [line for line in log_lines if "No space left on device; the run goes on" in line]
    assert len(notes) == 4  # the rows, their chart, the preview, its sheet
