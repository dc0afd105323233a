"""What a save takes: no memory on the device, from weights, optimizer and average to the disk."""

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
from fluxfast.optim import Ema, FlatParameters, eval_weights
from fluxfast.run.checkpoint import read_state
from fluxfast.run.saves import Saves


@pytest.fixture(autouse=True)
def nothing_copied_yet():
    OnDevice.copies, OnDevice.held = [], []


def values(count: int) -> list[torch.Tensor]:
    return [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(count)]


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_lora_file_takes_nothing_on_the_device(tmp_path, form, dtype):
    model = random_flux(SMALL)
    inject_lora(model, 2)
    layers = {n: (x.lora_A.detach(), x.lora_B.detach()) for n, x in lora_layers(model).items()}
    on_device = {name: tuple(map(OnDevice, sides)) for name, sides in layers.items()}
    files = [
        save_lora(model, tmp_path / f"{i}.safetensors", form, dtype=dtype, tensors=tensors)
        for i, tensors in enumerate((layers, on_device))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(OnDevice.held) == 2 * len(layers)


def test_schedule_frees_train_weights_wait_on_the_host():
    class TwoPoints:
        @property
        def param_groups(self):
            return [{"params": parameters}]

        def train(self):
            parameters[0].values.zero_()  # as rounding would, worse

        def eval(self):
            parameters[0].values.fill_(7.0)

    parameters = [OnDevice(each) for each in values(3)]
    with eval_weights(TwoPoints()):
        assert (parameters[0].values == 7).all() and len(OnDevice.held) == 3
    assert all(map(torch.equal, (p.values for p in parameters), values(3)))


def test_a_checkpoint_takes_nothing_on_the_device(tmp_path, monkeypatch):
    """One tensor at a time is copied to the host."""
    monkeypatch.setattr(fluxfast.run.saves, "_write_files", lambda run, folder, done: None)
    raw = {"model": {"path": "m"}, "data": {"folder": "d"}, "output_dir": str(tmp_path)}
    saves = Saves(build_config(raw))
    ema = Ema(FlatParameters([torch.zeros(6, 4)] * 2), 0.9)
    ema.updates, ema.shadow = OnDevice(torch.tensor(3.0)), list(map(OnDevice, values(2)))
    moments = {"state": {0: {"exp_avg": OnDevice(values(1)[0])}}, "param_groups": []}
    run = SimpleNamespace(
        flat=SimpleNamespace(
            parameters=list(map(OnDevice, values(2))), state_dict=lambda optimizer: moments
        ),
        ema=ema,
        loader=SimpleNamespace(fingerprint="f", dataset=SimpleNamespace(areas={})),
        memory=SimpleNamespace(stepping=nullcontext),
        ranks=SINGLE_PROCESS,
        optimizer=None,
    )
    saves.save(run, 5, {})
    state = read_state(saves.newest[1])
    assert len(OnDevice.held) == 6 and max(OnDevice.held) <= 1
    assert all(map(torch.equal, state["parameters"] + state["ema"]["average"], values(2) * 2))
    with pytest.raises(AssertionError, match="clone would allocate"):
        run.flat.parameters[0].clone()
