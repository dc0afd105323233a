"""A T5 in fp8 or bf16, as folders of FLUX's parts often have it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxfast.encoders.text import TextEncoders


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_a_t5_of_fewer_bits(nano_model, tmp_path, dtype):
    """The embeddings are those of the same values in fp32: each is read as it stands."""
    folders = {}
    for name in ("coded", "plain"):
        folders[name] = tmp_path / name
        shutil.copytree(nano_model, folders[name])
        file = folders[name] / "text_encoder_2" / "model.safetensors"
        values = {k: v.to(dtype) for k, v in load_file(file).items()}
        if name == "plain":
            values = {k: v.float() for k, v in values.items()}
        save_file(values, file, {"format": "pt"})
    given = {}
    for name, folder in folders.items():
        encoders = TextEncoders(folder, "cpu", torch.float32)
        given[name], _ = encoders.encode(["a cat"], 16)
        encoders.close()
    assert given["plain"].std() > 0 and torch.equal(given["coded"], given["plain"])
    original, _ = TextEncoders(nano_model, "cpu", torch.float32).encode(["a cat"], 16)
    assert not torch.equal(given["plain"], original)
