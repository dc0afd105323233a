"""Reads CLIP-L, T5 and the VAE from single files: an all-in-one checkpoint, or a file for each, as
ComfyUI and sd-scripts take them.

    text_encoders.clip_l.transformer.text_model.…   CLIP-L under transformers' names
    text_encoders.t5xxl.transformer.encoder.…       T5 under transformers' names
    vae.encoder.down.0.…                            the VAE under BFL's names, or diffusers'

The same names may be bare or under other prefixes: parts are recognized by content, never by a
file's name. Scaled fp8 and int8 are dequantized. A model's sizes are read from the tensors' shapes;
the rest is FLUX.1's own. Source: ComfyUI `comfy/supported_models.py` and `comfy/sd.py`.
"""

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.eight_bit import DTYPES, SIDE, SideTensors
from fluxfast.formats.container import safetensors_in
from fluxfast.formats.opened import Files
from fluxfast.model.frozen_linear import dequantize

# component of a diffusers folder -> end of the key that identifies it, after the prefix
_MARKS = {
    "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj.weight",
    "text_encoder_2": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "vae": "decoder.conv_in.weight",
}
# after the prefix, a part's keys begin with one of these
_STARTS = {
    "text_encoder": ("text_model.",),
    "text_encoder_2": ("encoder.", "shared."),
    "vae": ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
}
NAMES = {"text_encoder": "CLIP-L", "text_encoder_2": "T5", "vae": "VAE"}
_SUBFOLDERS = ("", "clip", "text_encoders", "vae")  # as ComfyUI's models folder is laid out
_SAMPLE = 16384  # values at each end of a tensor that a fingerprint covers

# of FLUX.1's vae/config.json and text_encoder/config.json
_VAE_SCALE, _VAE_SHIFT, _VAE_GROUPS = 0.3611, 0.1159, 32
_CLIP_HEAD_DIM = 64


@dataclass(frozen=True)
class Part:
    """A component (by diffusers' name) in `file`, with its keys under `prefix`."""

    component: str
    file: Path
    prefix: str

    def keys(self, files: Files) -> list[str]:
        starts = tuple(self.prefix + start for start in _STARTS[self.component])
        return sorted(key for key in files.entries if key.startswith(starts))


def find_part(root: Path, component: str) -> Part | None:
    """Returns the part in the file `root`, or in one of a folder's .safetensors and .sft files.

    component: text_encoder, text_encoder_2 or vae. One in a .safetensors file is taken before one
    in a .sft. Raises ConfigError if a file cannot be read or several have the part.
    """
    paths = [root]
    if not root.is_file():
        folders = [root / name for name in _SUBFOLDERS]
        paths = sorted({path for folder in folders for path in safetensors_in(folder)})
    mark, parts = _MARKS[component], []
    for path in paths:
        with Files([path]) as files:
            prefixes = {key.removesuffix(mark) for key in files.entries if key.endswith(mark)}
        # a complete CLIP has a vision tower too
        prefixes = sorted(prefix for prefix in prefixes if not prefix.endswith("vision_"))
        parts += [Part(component, path, prefix) for prefix in prefixes]
    if len(parts) > 1:
        parts = [part for part in parts if part.file.suffix.lower() != ".sft"] or parts
    if len(parts) > 1:
        listed = ", ".join(f"{part.file.name} ({part.prefix or 'bare'})" for part in parts[:3])
        raise ConfigError(
            f"{root} holds more than one {NAMES[component]}: {listed}",
            hint="model.encoders takes one file, or a folder with one of each",
        )
    return parts[0] if parts else None


def read_part(part: Part) -> dict[str, Tensor]:
    """Returns a part's tensors without the prefix, mapped from the file; fp8 as bf16, fp8 and int8
    with scales as fp32. Raises ConfigError for tensors of other dtypes.
    """
    tensors = {}
    with Files([part.file]) as files:
        side = SideTensors(files, part.prefix)
        for key in part.keys(files):
            name, entry = key.removeprefix(part.prefix), files.entries[key]
            dtype, kind = entry.dtype, key.rpartition(".")[2]
            if kind in SIDE or dtype in ("I64", "I32"):
                continue  # scales are read with their matrix; position ids are built in
            if kind == "weight":
                side.check(key)
            if dtype in DTYPES and kind == "weight" and side.scale_key(key):
                tensors[name] = dequantize(side.read(key))
            elif dtype in ("F8_E4M3", "F8_E5M2"):
                tensors[name] = files.read(key).to(torch.bfloat16)
            elif dtype in ("F32", "F16", "BF16"):
                tensors[name] = files.read(key)
            else:
                raise ConfigError(
                    f"{part.file}: {key} of the {NAMES[part.component]} is stored as {dtype}",
                    hint="use one in bf16, fp16, fp32, fp8 or int8",
                )
    return tensors


def fingerprint_part(part: Part) -> str:
    """Returns a hash of the part, 64 hex digits: names, dtypes, shapes and both ends of each tensor
    (a change between those is not noticed). Raises FluxfastError.
    """
    digest = hashlib.sha256(part.component.encode())
    try:
        with Files([part.file]) as files:
            for key in part.keys(files):
                name, entry = key.removeprefix(part.prefix), files.entries[key]
                digest.update(f"{name}\0{entry.dtype}{entry.shape}".encode())
                flat = files.read(key).flatten()
                for piece in (flat[:_SAMPLE], flat[_SAMPLE:][-_SAMPLE:]):
                    digest.update(piece.view(torch.uint8).numpy().tobytes())
    except OSError as error:
        raise FluxfastError(f"cannot read {part.file}: {error.strerror or error}") from None
    return digest.hexdigest()


# ---------------------------------------------------------------- modules


def load_part(part: Part, dtype: torch.dtype):
    """Returns the transformers or diffusers module in `dtype`, frozen, on the CPU.

    Raises ConfigError if the file lacks tensors, or has them in shapes that do not fit.
    """
    load = {"text_encoder": _clip, "text_encoder_2": _t5, "vae": _vae}[part.component]
    tensors = read_part(part)
    try:
        model, missing = load(tensors, dtype)
        problem = ", ".join(missing[:3])
    except KeyError as error:
        model, problem = None, f"no {error.args[0]}"
    except (RuntimeError, ValueError) as error:  # other shapes
        model, problem = None, " ".join(str(error).split())
    if model is None or problem:
        raise ConfigError(
            f"{part.file}: its {NAMES[part.component]} is not complete: {problem}",
            hint="download the file again, or give a diffusers folder as model.encoders",
        )
    return model.eval().requires_grad_(False)


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """Returns how many keys there are of `pattern` with 0, 1, 2 and so on in place of {}."""
    return next(i for i in itertools.count() if pattern.format(i) not in tensors)


def _clip(tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[Any, list[str]]:
    from transformers import CLIPTextConfig, CLIPTextModel

    embeddings, layers = "text_model.embeddings", "text_model.encoder.layers"
    vocabulary, hidden = tensors[f"{embeddings}.token_embedding.weight"].shape
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        projection_dim=hidden,
        intermediate_size=tensors[f"{layers}.0.mlp.fc1.weight"].shape[0],
        num_attention_heads=max(1, hidden // _CLIP_HEAD_DIM),
        num_hidden_layers=_count(tensors, f"{layers}.{{}}.self_attn.q_proj.weight"),
        max_position_embeddings=tensors[f"{embeddings}.position_embedding.weight"].shape[0],
        eos_token_id=2,  # as in CLIP-L's own file: the pooled token is that of the highest id
        bos_token_id=0,
    )
    return _from_state(CLIPTextModel, config, tensors, dtype)


def _t5(tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[Any, list[str]]:
    from transformers import T5Config, T5EncoderModel

    embedding = tensors.pop("encoder.embed_tokens.weight", None)  # another name of the same tensor
    if embedding is not None:
        tensors.setdefault("shared.weight", embedding)
    vocabulary, width = tensors["shared.weight"].shape
    attention = "encoder.block.{}.layer.0.SelfAttention"
    bias = tensors[f"{attention.format(0)}.relative_attention_bias.weight"]
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=tensors[f"{attention.format(0)}.q.weight"].shape[0] // bias.shape[1],
        d_ff=tensors["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        num_layers=_count(tensors, f"{attention}.q.weight"),
        num_heads=bias.shape[1],
        relative_attention_num_buckets=bias.shape[0],
        feed_forward_proj="gated-gelu",  # of T5 1.1
        is_encoder_decoder=False,
        use_cache=False,
    )
    return _from_state(T5EncoderModel, config, tensors, dtype)


def _from_state(cls, config, tensors: dict[str, Tensor], dtype: torch.dtype):
    model, info = cls.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    return model, sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))


def _vae(tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[Any, list[str]]:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    is_ldm = "encoder.down.0.block.0.conv1.weight" in tensors
    block = "encoder.down.{}.block.{}" if is_ldm else "encoder.down_blocks.{}.resnets.{}"
    block += ".conv1.weight"
    levels = max(1, _count(tensors, block.format("{}", 0)))
    config = {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [tensors[block.format(i, 0)].shape[0] for i in range(levels)],
        "layers_per_block": _count(tensors, block.format(0, "{}")),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": _VAE_GROUPS,
        "scaling_factor": _VAE_SCALE,
        "shift_factor": _VAE_SHIFT,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "sample_size": 1024,
    }
    if is_ldm:
        tensors = convert_ldm_vae_checkpoint(tensors, config)
    model: Any = AutoencoderKL(**config)
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    return model.to(dtype), missing
