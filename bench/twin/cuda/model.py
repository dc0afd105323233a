"""FLUX.1-dev whole, without its numbers: sparse files of the real shapes, which take no room on
disk and no memory until somebody reads them. Tokenizers are the nano model's.
"""

import json
import shutil
import struct
from pathlib import Path

import torch

from bench import ROOT
from fluxfast.model.names import linear_shape, tensor_sources
from fluxfast.model.spec import DEV

NANO = ROOT / "examples" / "nano" / "pretrained"
# where the parts of FLUX.1-dev differ from the nano model's
CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip
T5 = {
    "d_ff": 10240, "d_kv": 64, "d_model": 4096, "num_heads": 64, "num_layers": 24,
    "num_decoder_layers": 24, "vocab_size": 32128,
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024,
}  # fmt: skip


def make(folder: Path) -> tuple[Path, Path]:
    """Returns (transformer's file, encoders' folder) below `folder`, made unless they are there."""
    transformer, encoders = folder / "flux1-dev.safetensors", folder / "encoders"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        encoders.mkdir(parents=True)
        _write(transformer, {name: _shape(name) for name in tensor_sources(DEV)})
        for part in ("tokenizer", "tokenizer_2", "scheduler"):
            shutil.copytree(NANO / part, encoders / part)
        for part, tokens in (("tokenizer", 77), ("tokenizer_2", 512)):
            path = encoders / part / "tokenizer_config.json"
            settings = json.loads(path.read_text()) | {"model_max_length": tokens}
            path.write_text(json.dumps(settings))
        shutil.copy(NANO / "model_index.json", encoders)
        for part, changes in (("text_encoder", CLIP), ("text_encoder_2", T5), ("vae", VAE)):
            (encoders / part).mkdir()
            config = json.loads((NANO / part / "config.json").read_text()) | changes
            (encoders / part / "config.json").write_text(json.dumps(config))
            name = "diffusion_pytorch_model" if part == "vae" else "model"
            _write(encoders / part / f"{name}.safetensors", _encoder_shapes(part, config))
        (folder / "complete").touch()
    return transformer, encoders


def _shape(name: str) -> tuple[int, ...]:
    module, _, kind = name.rpartition(".")
    if kind == "scale":
        return (DEV.head_dim,)
    return tuple(linear_shape(module, DEV)[: 1 if kind == "bias" else 2])


def _encoder_shapes(part: str, config: dict) -> dict[str, tuple[int, ...]]:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    config = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        if part == "vae":
            model = AutoencoderKL.from_config(config)
        elif part == "text_encoder":
            model = CLIPTextModel(CLIPTextConfig(**config))
        else:
            model = T5EncoderModel(T5Config(**config))
    tied = {"encoder.embed_tokens.weight"}
    persistent = model.state_dict()
    return {name: tuple(t.shape) for name, t in persistent.items() if name not in tied}


def _write(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes a safetensors file of bf16 zeros that takes no blocks of the disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {
            "dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]
        }  # fmt: skip
        offset += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
