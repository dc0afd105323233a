"""RunLog: what counts as a row of bad steps, the speed, and lines that survive a stop, a full disk
and what else is in the file."""

import io
import json
import os
import re
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

import fluxfast.run.logger
from fluxfast.errors import DiskError
from fluxfast.run.logger import NotFinite, RunLog
from fluxfast.util.terminal import log_to_terminal

CPU = torch.device("cpu")


def open_log(folder: Path, first: int = 0, every: int = 1, **options) -> RunLog:
    return RunLog(folder, first, 100, every, CPU, **options)


def record(log: RunLog, *steps: int, bad: bool = False) -> None:
    loss = torch.tensor(torch.nan if bad else 1.0)
    for step in steps:
        log.step(step, loss, torch.tensor(1.0), torch.tensor(float(bad)), 1e-4, 0)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- bad steps


@pytest.mark.parametrize(
    "bad, every, most_bad, ended",
    [
        ("..bbbb....", 10, 3, (3, 5, 10)),  # over before the interval is
        ("......bbbb", 10, 3, (7, 9, 6)),
        ("bb.bb..bb. b.bb......", 10, 3, None),
        (".......bbb b.........", 10, 4, (8, 11, 20)),  # across the intervals' border
        ("bbbbbbbbbb", 10, 3, (1, 3, 0)),
        ("bbb.bbb.bbbbb", 1, 5, (9, 13, 8)),  # with every step an interval of its own
    ],
)
def test_so_many_bad_steps_in_a_row_end_the_run(tmp_path, bad, every, most_bad, ended):
    letters, raised = bad.replace(" ", ""), None
    with open_log(tmp_path, every=every, most_bad=most_bad) as log:
        for step, letter in enumerate(letters, start=1):
            try:
                record(log, step, bad=letter == "b")
            except NotFinite as error:
                raised = error.first, error.last, error.good
                assert error.message.startswith(f"no step from {error.first} to {error.last} had")
                break
    assert raised == ended
    assert len(rows(tmp_path)) == len(letters) // every  # the last interval too


def test_bad_steps_are_counted_and_left_out_of_the_means(tmp_path):
    with open_log(tmp_path, every=3) as log:
        record(log, 1)
        record(log, 2, bad=True)
        record(log, 3)
        record(log, 4, 5, 6, bad=True)
    mixed, bad = rows(tmp_path)
    assert (mixed["skipped_steps"], mixed["loss"], mixed["grad_norm"]) == (1, 1.0, 1.0)
    assert (bad["skipped_steps"], bad["loss"], bad["loss_smooth"]) == (3, None, 1.0)


@pytest.mark.parametrize("saved", [4, 5])
def test_a_row_of_bad_steps_is_counted_over_a_stop(tmp_path, saved):
    """At the end of an interval, whose bad steps are a number, and in the middle of one."""
    with open_log(tmp_path, every=2, most_bad=4) as log:
        record(log, 1, 2)
        record(log, *range(3, saved + 1), bad=True)
        state = json.loads(json.dumps(log.state()))
    with (
        open_log(tmp_path, saved, 2, resumed=state, most_bad=4) as log,
        pytest.raises(NotFinite) as raised,
    ):
        record(log, *range(saved + 1, 9), bad=True)
    assert (raised.value.first, raised.value.last, raised.value.good) == (3, 6, 2)


def test_a_rank_that_does_not_write_counts_alone(tmp_path):
    with open_log(tmp_path / "run", writes=False) as log:
        record(log, 1)
    assert log.state()["losses"] == [1.0] and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- lines on the disk


@pytest.mark.parametrize("stopped", [False, True])
def test_lines_that_a_full_disk_refused_come_with_the_next(
    tmp_path, monkeypatch, log_lines, stopped
):
    """Those that it cut short are whole then. After a stop they are in the checkpoint."""
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
    log = open_log(tmp_path)
    for step in range(1, 7):
        full[0] = step in (2, 3, 6)
        record(log, step)
        if step == 3 and stopped:
            state = json.loads(json.dumps(log.state()))
            log = open_log(tmp_path, 3, resumed=state)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    whole = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    assert whole == [1, 2, 3, 4, 5] and len(lines) == 6
    note = f"note: {tmp_path / 'metrics.jsonl'}: No space left on device; the run goes on"
    assert log_lines.count(note) == 2  # the third step's line is said to wait already


def test_tensorboard_that_fails_is_left_alone_after_one_note(tmp_path, monkeypatch, log_lines):
    calls = []

    def full(board, name, value, step):
        calls.append(step)
        raise RuntimeError("the writer's thread has ended")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with open_log(tmp_path) as log:
        record(log, 1, 2, 3)
    note = "note: TensorBoard: RuntimeError: the writer's thread has ended; the run goes on"
    assert calls == [1] and log_lines.count(note) == 1
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_metrics_that_cannot_be_rewritten_end_no_resumed_run(tmp_path, monkeypatch, log_lines):
    with open_log(tmp_path) as log:
        record(log, 1, 2)
        state = json.loads(json.dumps(log.state()))
    refuses = DiskError("cannot write into x: Read-only file system")
    monkeypatch.setattr("fluxfast.run.logger.write_atomic", Mock(side_effect=refuses))
    with open_log(tmp_path, 2, resumed=state) as log:
        record(log, 3)
    assert any("Read-only file system; the run goes on" in line for line in log_lines)


def test_the_lines_of_what_is_saved_are_on_the_disk(tmp_path, monkeypatch):
    """Or a machine that loses its power goes on from a checkpoint behind lines that are gone."""
    flushed, fsync = [], os.fsync

    def seen(handle):
        flushed.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))
        fsync(handle)

    with open_log(tmp_path) as log:
        record(log, 1, 2)
        monkeypatch.setattr(os, "fsync", seen)
        log.state()
    there = (tmp_path / "metrics.jsonl").stat()
    assert (there.st_ino, there.st_size) in flushed


def test_foreign_lines_are_left_out_and_counted(tmp_path, log_lines):
    """As a crash, another program or an editor leaves them."""
    foreign = [
        b"{junk}",
        b"{}",
        b"[1]",
        b"\0" * 40 + b"}",
        b'{"step": "3"}',
        b'{"step": true, "loss": 1}',
        b'{"step": 1e999}',
        b'{"step": 3, "loss": "\xc3',  # cut within a letter
        b"\xff\xfe\x00",
        b"[" * 9999,
    ]
    kept = [b'{"step": 1, "loss": 1}', b'{"step": 2, "loss": 1}']
    lines = [*foreign[:5], kept[0], *foreign[5:], kept[1], b'{"step": 3}', b'{"st']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    open_log(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == kept
    file = tmp_path / "metrics.jsonl"
    assert log_lines == [f"note: 11 of 14 lines of {file} cannot be read and are left out"]


# ---------------------------------------------------------------- the progress line


def test_speed_leaves_the_warm_up_out(tmp_path, log_lines):
    """Two slow first steps, then steps of 20 ms: the rate is of the later ones."""
    with open_log(tmp_path, every=10) as log:
        for step in range(1, 21):
            time.sleep(0.5 if step <= 2 else 0.02)
            record(log, step)
    last = rows(tmp_path)[-1]
    assert 0.02 <= last["s_per_it"] < 0.09
    assert last["it_per_s"] == pytest.approx(1 / last["s_per_it"])
    _, line = log_lines
    assert "it/s" in line and "s/it" in line and "ETA 0:00:0" in line


@pytest.mark.parametrize("width", [60, 80, 200])
def test_progress_line_fits_the_terminal(tmp_path, width):
    """At 80 columns rich would cut the step count to `3…`."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, color_system=None)
    with log_to_terminal(console), RunLog(tmp_path, 11990, 12000, 1, CPU) as log:
        for step in range(11991, 12001):
            record(log, step, bad=step % 2 == 0)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert all(len(line) <= width for line in lines)
    assert "12000/12000" in lines[-1] and "loss 1.0000" in lines[-1]
    assert width < 80 or ("it/s" in lines[-1] and "ETA" in lines[-1])
