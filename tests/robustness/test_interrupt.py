"""Signals: the step is finished and saved, the exit code is 0, a second one ends at once; a disk
that refuses does not end a run; two processes do not share a folder."""

import io
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import fluxfast.run.logger
import fluxfast.train as train_module
import fluxfast.util.platform
from fluxfast.errors import DiskError, FluxfastError
from fluxfast.run.checkpoint import checkpoints, newest_checkpoint
from fluxfast.run.interrupt import SIGNALS, handle_signals, stop_on_signals
from fluxfast.run.logger import RunLog
from fluxfast.run.validation import read_validations
from fluxfast.train import train
from fluxfast.util.files import exclusive_lock, shared_lock
from fluxfast.util.platform import flush_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def configure(configure):
    """Shorter runs still."""
    short = {"log_every": 1, "train__steps": 4, "train__batch_size": 1, "save__every": 0}
    return partial(configure, **short)


def signals_at(monkeypatch, *steps: int, number=signal.SIGTERM) -> None:
    """A signal in the middle of each of these steps, counted from 1."""
    real = train_module.train_step

    def signaled(run, batches, index):
        if index + 1 in steps:
            os.kill(os.getpid(), number)
        return real(run, batches, index)

    monkeypatch.setattr(train_module, "train_step", signaled)


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
    """Of a process that a shell started in the background, say."""
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
    file = tmp_path / "my run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with monkeypatch.context() as patch:
        signals_at(patch, 2, number=number)
        code, out, err = fluxfast("train", file, "--restart", "--set", "train.lr=0.001")
    assert (code, out) == (0, "")
    said = f"stopped after step 2 of 4, which is saved; to go on: fluxfast train '{file}' --set"
    assert f"{said} train.lr=0.001\n" in err
    assert [step for step, _ in checkpoints(config.run_dir)] == [2]
    code, out, err = fluxfast("train", file)
    assert code == 0 and out.endswith("small.safetensors\n") and "at step 2" in err


def test_a_second_signal_ends_at_once_and_harms_nothing(configure, fluxfast, tmp_path, monkeypatch):
    """In the middle of a save, and of a step."""
    config = configure(save__every=1)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    real = flush_folder

    def twice(folder):
        if "step-00000002" in str(folder):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(folder)

    with monkeypatch.context() as patch:
        patch.setattr("fluxfast.run.checkpoint.flush_folder", twice)
        code, out, err = fluxfast("train", file)
    assert code == 130 and out == "" and "goes on" in err
    assert [step for step, _ in checkpoints(config.run_dir)] == [1]
    assert not list(config.run_dir.rglob("*.partial"))
    with monkeypatch.context() as patch:
        signals_at(patch, 3, 3)
        step = train_module.train_step
        patch.setattr(train_module, "train_step", lambda *a: (step(*a), step(*a))[0])
        assert fluxfast("train", file)[0] == 130
    assert newest_checkpoint(config.run_dir)[0] == 2
    assert fluxfast("train", file)[0] == 0


def test_a_signal_in_the_last_step_is_no_stop(configure, monkeypatch):
    signals_at(monkeypatch, 4)
    assert train(configure()).is_file()


def test_a_stop_that_cannot_be_saved_is_an_error(configure, monkeypatch):
    """No exit code 0 for what is lost."""
    signals_at(monkeypatch, 3)
    config = configure(save__every=2)
    full_disk(monkeypatch, "step-00000003")
    with pytest.raises(DiskError, match="No space left"):
        train(config)
    assert [step for step, _ in checkpoints(config.run_dir)] == [2]


@pytest.mark.slow
def test_a_process_of_its_own_takes_sigterm(configure, tmp_path):
    config = configure(train__steps=500)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
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


def full_disk(monkeypatch, *parts: str) -> None:
    """It is full whenever one of these is part of what is put in place."""
    for name in ("replace", "rename"):
        real = getattr(os, name)

        def refuses(source, target, real=real):
            if any(part in str(target) for part in parts):
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


def test_a_final_save_that_fails_is_an_error_and_the_one_before_stays(configure, monkeypatch):
    config = configure(save__every=2, train__steps=3)
    with monkeypatch.context() as patch:
        full_disk(patch, "step-00000003")
        with pytest.raises(DiskError, match="No space left") as raised:
            train(config)
    assert "partial" not in str(raised.value) and "checkpoints" in raised.value.message
    assert newest_checkpoint(config.run_dir)[0] == 2
    assert not list(config.run_dir.rglob("*.partial"))
    assert train(config).is_file()


@pytest.mark.slow
def test_measurements_and_previews_survive_a_full_disk(configure, monkeypatch, log_lines):
    """The rows are there in the end; pictures that could not be written are said to be missing."""
    looks = {
        "validation": {"share": 0.4, "every": 1, "timesteps": 1},
        "sample": {"prompts": ["x"], "every": 1, "width": 64, "height": 64, "steps": 1},
    }
    config = configure(**looks)
    real, refusing = train_module.Watch.look, [False]

    def look(watch, done):
        refusing[0] = done == 2
        try:
            return real(watch, done)
        finally:
            refusing[0] = False

    write = os.replace

    def replace(source, target):
        if refusing[0]:
            raise OSError(28, "No space left on device")
        return write(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(train_module.Watch, "look", look)
    train(config)
    rows = read_validations(config.run_dir / "validation.jsonl")
    assert [row.step for row in rows] == [0, 1, 2, 3, 4]
    pictures = sorted(path.name for path in (config.run_dir / "samples").iterdir())
    assert pictures == [f"00-step{step:08d}.png" for step in (0, 1, 3, 4)]
    notes = [line for line in log_lines if "No space left on device; the run goes on" in line]
    assert len(notes) == 2


def test_log_lines_survive_a_full_disk(tmp_path, monkeypatch, log_lines):
    """What was cut short is taken back, and comes with the next line."""
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    full = [False]

    class Half(io.FileIO):
        def write(self, content):
            if not full[0]:
                return super().write(content)
            super().write(content[: len(content) // 2])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        fluxfast.run.logger, "open", lambda path, mode: Half(path, mode), raising=False
    )
    with RunLog(tmp_path, 0, 6, 1, torch.device("cpu")) as log:
        for step in range(1, 7):
            full[0] = step in (2, 3, 6)
            log.step(step, one, one, zero, 1e-4, 0)
            if step == 2:
                (line,) = log.state()["unwritten"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [yaml.safe_load(line)["step"] for line in lines if line.endswith("}")]
    assert steps == [1, 2, 3, 4, 5] and line.strip() == lines[1]
    line = f"note: {tmp_path / 'metrics.jsonl'}: No space left on device; the run goes on"
    assert log_lines.count(line) == 3


# ---------------------------------------------------------------- two processes


HOLD = """
import sys
from pathlib import Path
from fluxfast.util.files import {0}
with {0}(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path, how: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(how), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == "held\n"
    return process


needs_flock = pytest.mark.skipif(sys.platform == "win32", reason="no flock")


@needs_flock
def test_a_folder_that_was_moved_between_opening_and_locking_is_opened_again(tmp_path, monkeypatch):
    """`--restart` moves a run aside: whoever had its folder open would lock the wrong one."""
    run, moved = tmp_path / "run", []
    flock = fluxfast.util.platform.fcntl.flock

    def late(handle, how):
        if not moved:
            moved.append(run.rename(tmp_path / "run.1"))
        flock(handle, how)

    monkeypatch.setattr(fluxfast.util.platform.fcntl, "flock", late)
    with exclusive_lock(run):
        assert run.is_dir()
        with pytest.raises(FluxfastError, match="another process"), exclusive_lock(run):
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
    other = holder(tmp_path, "shared_lock")
    try:
        assert left[1].exists() and not left[0].exists()  # it was told of no folder below
        left[0].write_text("")
        with shared_lock(tmp_path, "latents"):
            assert all(path.exists() for path in left)
    finally:
        other.kill()
        other.communicate()
    with shared_lock(tmp_path, "latents"):
        assert not any(path.exists() for path in left) and whole.exists()
        with shared_lock(tmp_path, "latents"):
            pass
    other = holder(tmp_path, "exclusive_lock")  # should somebody have such a folder to himself
    try:
        with shared_lock(tmp_path, "latents"):
            pass
    finally:
        other.kill()
        other.communicate()
