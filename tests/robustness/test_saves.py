"""What a save takes: nothing in the device's memory, and the log as it stands, on the disk."""

import json
import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from on_device import OnDevice
from small import SMALL, random_flux

import fluxfast.run.saves
from fluxfast.config.schema import build_config
from fluxfast.distributed import SINGLE_PROCESS
from fluxfast.formats.lora.apply import save_lora
from fluxfast.model.lora import inject_lora, lora_layers
from fluxfast.optim import Ema, eval_weights
from fluxfast.run.checkpoint import read_state
from fluxfast.run.logger import NotFinite, RunLog
from fluxfast.run.saves import Saves

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_copied_yet():
    OnDevice.copies, OnDevice.held = [], []


def values(count: int) -> list[torch.Tensor]:
    return [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(count)]


# ---------------------------------------------------------------- no memory on the device


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_lora_file_takes_nothing_on_the_device(tmp_path, form, dtype):
    model = random_flux(SMALL)
    inject_lora(model, 2)
    layers = {n: (x.lora_A.detach(), x.lora_B.detach()) for n, x in lora_layers(model).items()}
    there = {name: tuple(map(OnDevice, sides)) for name, sides in layers.items()}
    files = [
        save_lora(model, tmp_path / f"{i}.safetensors", form, dtype=dtype, tensors=tensors)
        for i, tensors in enumerate((layers, there))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(OnDevice.held) == 2 * len(layers)


def test_schedule_frees_other_point_waits_on_the_host():
    class TwoPoints:
        def train(self):
            parameters[0].values.zero_()  # as rounding would, worse

        def eval(self):
            parameters[0].values.fill_(7.0)

    parameters = [OnDevice(each) for each in values(3)]
    with eval_weights(TwoPoints(), parameters):
        assert (parameters[0].values == 7).all() and len(OnDevice.held) == 3
    assert all(map(torch.equal, (p.values for p in parameters), values(3)))


def test_a_checkpoint_takes_nothing_on_the_device(tmp_path, monkeypatch):
    """From the run itself to the disk: weights, an optimizer's state, an average."""
    monkeypatch.setattr(fluxfast.run.saves, "_write_files", lambda run, folder, done: None)
    raw = {"model": {"path": "m"}, "data": {"folder": "d"}, "output_dir": str(tmp_path)}
    saves = Saves(build_config(raw))
    ema = Ema([torch.zeros(6, 4)] * 2, 0.9)
    ema.updates, ema.shadow = OnDevice(torch.tensor(3.0)), list(map(OnDevice, values(2)))
    moments = {"state": {0: {"exp_avg": OnDevice(values(1)[0])}}, "param_groups": []}
    run = SimpleNamespace(
        parameters=list(map(OnDevice, values(2))),
        ema=ema,
        loader=SimpleNamespace(fingerprint="f"),
        memory=SimpleNamespace(stepping=nullcontext),
        ranks=SINGLE_PROCESS,
        optimizer=SimpleNamespace(state_dict=lambda: moments),
    )
    saves.save(run, 5, {})
    state = read_state(saves.newest[1])
    assert len(OnDevice.held) == 6 and max(OnDevice.held) <= 1
    assert all(map(torch.equal, state["parameters"] + state["ema"]["average"], values(2) * 2))


# ---------------------------------------------------------------- the log


def log_of(folder, first, every, resumed=None) -> RunLog:
    return RunLog(folder, first, 100, every, CPU, resumed=resumed, most_bad=4)


def note(log: RunLog, *steps: int, bad: bool) -> None:
    one = torch.tensor(1.0)
    for step in steps:
        log.step(step, one, one, torch.tensor(float(bad)), 1e-4, 0)


@pytest.mark.parametrize("saved", [4, 5])
def test_a_row_of_bad_steps_is_counted_over_a_stop(tmp_path, saved):
    """At the end of an interval, whose bad steps are a number, and in the middle of one."""
    with log_of(tmp_path, 0, 2) as log:
        note(log, 1, 2, bad=False)
        note(log, *range(3, saved + 1), bad=True)
        state = json.loads(json.dumps(log.state()))
    with log_of(tmp_path, saved, 2, state) as log, pytest.raises(NotFinite) as raised:
        note(log, *range(saved + 1, 9), bad=True)
    assert (raised.value.first, raised.value.last, raised.value.good) == (3, 6, 2)


def test_a_line_that_a_full_disk_refused_is_written_after_a_stop(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()  # nothing can be written to that
    with log_of(tmp_path, 0, 1) as log:
        note(log, 1, 2, bad=False)
        state = json.loads(json.dumps(log.state()))
    (tmp_path / "metrics.jsonl").rmdir()
    with log_of(tmp_path, 2, 1, state) as log:
        note(log, 3, bad=False)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_the_lines_of_what_is_saved_are_on_the_disk(tmp_path, monkeypatch):
    """Or a machine that loses its power goes on from a checkpoint behind lines that are gone."""
    flushed, fsync = [], os.fsync

    def seen(handle):
        flushed.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))
        fsync(handle)

    with log_of(tmp_path, 0, 1) as log:
        note(log, 1, 2, bad=False)
        monkeypatch.setattr(os, "fsync", seen)
        log.state()
    there = (tmp_path / "metrics.jsonl").stat()
    assert (there.st_ino, there.st_size) in flushed
