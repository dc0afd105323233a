"""What version 0.1.0 wrote is still read: a run folder with its checkpoint and cache, and
prequantized files. `v0_1_0/` holds them; `run.yaml` and `runs/old/config.yaml` use that version's
words (`memory.policy: replay`).
"""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import tensors_of, write
from safetensors.torch import load_file
from small import SMALL

from fluxfast import load_transformer
from fluxfast.encoders import text, vae
from fluxfast.formats.base.quantize import quantize

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = Path(__file__).with_name("v0_1_0")


def test_a_run_of_the_earlier_version_goes_on(tmp_path, monkeypatch, fluxfast):
    """Two of four steps were taken by 0.1.0; `expected.safetensors` is what 0.1.0 made of four."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)

    def no_encoder(*arguments, **named):
        raise AssertionError("everything is in the cache")

    for module, name in ((text, "TextEncoders"), (vae, "Vae")):
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, no_encoder)
    code, _, err = fluxfast("train", "run.yaml", "--set", "train.steps=4")
    assert code == 0, err
    assert "resuming runs/old at step 2" in err
    assert "replay" in err and "checkpoint" in err  # the note on the old word
    made, expected = load_file("runs/old/old.safetensors"), load_file("expected.safetensors")
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():  # fp32 sums differ by processor
        assert torch.allclose(made[name], tensor, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("storage, nested", [("nf4", True), ("int8", False)])
def test_a_prequantized_file_of_the_earlier_version_loads(tmp_path, storage, nested):
    """To the same bits as the file that is written today from the same weights."""
    source = write(tmp_path / "source.safetensors", tensors_of(SMALL))
    quantize(source, tmp_path / "new.safetensors", storage, double_quant=nested)
    old, new = (
        load_transformer(path, compute="fp32", device="cpu").state_dict()
        for path in (WRITTEN / f"{storage}.safetensors", tmp_path / "new.safetensors")
    )
    assert old.keys() == new.keys()
    assert any(tensor.dtype in (torch.uint8, torch.int8) for tensor in old.values())
    for name, tensor in new.items():
        assert tensor.dtype == old[name].dtype and torch.equal(tensor, old[name]), name
