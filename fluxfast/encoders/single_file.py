"""CLIP-L, T5 and VAE out of single files: an all-in-one checkpoint, or a file for each, as ComfyUI
and sd-scripts take them.

    text_encoders.clip_l.transformer.text_model.…   CLIP-L under transformers' names
    text_encoders.t5xxl.transformer.encoder.…       T5 under transformers' names
    vae.encoder.down.0.…                            the VAE under BFL's names, or diffusers'

or the same names bare or under other prefixes: told by content, never by a file's name. fp8 with a
scale is dequantized. A model's sizes are read from the tensors' shapes; what no shape tells is
FLUX.1's own. Source: ComfyUI `comfy/supported_models.py` and `comfy/sd.py`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base import eight_bit as base_8bit
from fluxfast.formats.opened import Files
from fluxfast.model.frozen_linear import dequantize

# component of a diffusers folder -> end of a key that tells it; what stands in front is the prefix
_MARKS = {
    "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj.weight",
    "text_encoder_2": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "vae": "decoder.conv_in.weight",
}
# the keys of a part begin with one of these behind the prefix
_OWN = {
    "text_encoder": ("text_model.",),
    "text_encoder_2": ("encoder.", "shared."),
    "vae": ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
}
NAMES = {"text_encoder": "CLIP-L", "text_encoder_2": "T5", "vae": "VAE"}
_SUBFOLDERS = ("", "clip", "text_encoders", "vae")  # as ComfyUI's models folder is laid out
_SAMPLE = 16384  # values of a larger tensor that count in a fingerprint, of its start and its end

# of FLUX.1's vae/config.json and text_encoder/config.json
_VAE_SCALE, _VAE_SHIFT, _VAE_GROUPS = 0.3611, 0.1159, 32
_CLIP_HEAD_DIM = 64


@dataclass(frozen=True)
class Part:
    """Where a part lies: in `file`, its keys under `prefix`. component: as diffusers calls it."""

    component: str
    file: Path
    prefix: str

    def keys(self, files: Files) -> list[str]:
        starts = tuple(self.prefix + own for own in _OWN[self.component])
        return sorted(key for key in files.entries if key.startswith(starts))


def find_part(root: Path, component: str) -> Part | None:
    """The part in the file `root`, or in one of the .safetensors files of the folder `root`.

    component: text_encoder, text_encoder_2 or vae. Raises ConfigError where a file cannot be read
    or several have it.
    """
    paths = [root]
    if not root.is_file():
        folders = [root / name for name in _SUBFOLDERS]
        paths = sorted({path for folder in folders for path in folder.glob("*.safetensors")})
    mark, parts = _MARKS[component], []
    for path in paths:
        with Files([path]) as files:
            prefixes = {key.removesuffix(mark) for key in files.entries if key.endswith(mark)}
        # a whole CLIP has a vision tower under names of its own, a whole T5 a decoder
        prefixes = {prefix for prefix in prefixes if not prefix.endswith("vision_")}
        parts += [Part(component, path, prefix) for prefix in sorted(prefixes)]
    if len(parts) > 1:
        listed = ", ".join(f"{part.file.name} ({part.prefix or 'bare'})" for part in parts[:3])
        raise ConfigError(
            f"{root} holds more than one {NAMES[component]}: {listed}",
            hint="model.encoders takes one file, or a folder with one of each",
        )
    return parts[0] if parts else None


def read_part(part: Part) -> dict[str, Tensor]:
    """Its tensors without the prefix, mapped from the file as they are stored; fp8 as bf16, or as
    fp32 where it has scales.

    Raises ConfigError for tensors of a dtype that no text encoder or VAE is read in.
    """
    tensors = {}
    with Files([part.file]) as files:
        for key in part.keys(files):
            name = key.removeprefix(part.prefix)
            dtype = files.entries[key].dtype
            if key.rpartition(".")[2] in base_8bit.SIDE or dtype in ("I64", "I32"):
                continue  # scales go with their matrix; position ids are built in
            if dtype.startswith("F8") and base_8bit.scale_key(files, key):
                base_8bit.check_8bit(files, key, part.prefix)
                tensors[name] = dequantize(base_8bit.read_8bit(files, key))
            elif dtype in ("F8_E4M3", "F8_E5M2"):
                tensors[name] = files.read(key).to(torch.bfloat16)
            elif dtype in ("F32", "F16", "BF16"):
                tensors[name] = files.read(key)
            else:
                raise ConfigError(
                    f"{part.file}: {key} of the {NAMES[part.component]} is stored as {dtype}",
                    hint="use one in bf16, fp16, fp32 or fp8",
                )
    return tensors


def fingerprint_part(part: Part) -> str:
    """Hash of what the part holds, 64 hex digits: names, dtypes, shapes, and of each tensor the
    first and last 16384 values. A change between those goes unseen. Raises FluxfastError.
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
    """The transformers or diffusers module in `dtype`, frozen, on the CPU.

    Raises ConfigError where the file lacks tensors, or has them in shapes that do not fit.
    """
    tensors = read_part(part)
    load = {"text_encoder": _clip, "text_encoder_2": _t5, "vae": _vae}[part.component]
    try:
        model = load(tensors, dtype)
    except _Incomplete as error:
        raise ConfigError(
            f"{part.file}: its {NAMES[part.component]} is not complete: {error}",
            hint="download the file again, or give a diffusers folder as model.encoders",
        ) from None
    return model.eval().requires_grad_(False)


class _Incomplete(Exception):
    """Tensors are missing or of other shapes; the message names them."""


def _shape(tensors: dict[str, Tensor], key: str) -> torch.Size:
    if key not in tensors:
        raise _Incomplete(f"no {key}")
    return tensors[key].shape


def _count(tensors: dict[str, Tensor], name: Callable[[int], str]) -> int:
    count = 0
    while name(count) in tensors:
        count += 1
    return count


def _clip(tensors: dict[str, Tensor], dtype: torch.dtype):
    from transformers import CLIPTextConfig, CLIPTextModel

    inner = "text_model."
    vocabulary, hidden = _shape(tensors, f"{inner}embeddings.token_embedding.weight")
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        projection_dim=hidden,
        intermediate_size=_shape(tensors, f"{inner}encoder.layers.0.mlp.fc1.weight")[0],
        num_attention_heads=max(1, hidden // _CLIP_HEAD_DIM),
        num_hidden_layers=_count(
            tensors, lambda i: f"{inner}encoder.layers.{i}.self_attn.q_proj.weight"
        ),
        max_position_embeddings=_shape(tensors, f"{inner}embeddings.position_embedding.weight")[0],
        eos_token_id=2,  # as in CLIP-L's own file: the pooled token is that of the highest id
        bos_token_id=0,
    )
    return _from_state(CLIPTextModel, config, tensors, dtype)


def _t5(tensors: dict[str, Tensor], dtype: torch.dtype):
    from transformers import T5Config, T5EncoderModel

    embedding = tensors.pop("encoder.embed_tokens.weight", None)  # the same tensor once more
    if embedding is not None:
        tensors.setdefault("shared.weight", embedding)
    vocabulary, width = _shape(tensors, "shared.weight")
    first = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = _shape(tensors, f"{first}.relative_attention_bias.weight")
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=_shape(tensors, f"{first}.q.weight")[0] // heads,
        d_ff=_shape(tensors, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        num_layers=_count(tensors, lambda i: f"encoder.block.{i}.layer.0.SelfAttention.q.weight"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",  # T5 1.1's
        is_encoder_decoder=False,
        use_cache=False,
    )
    return _from_state(T5EncoderModel, config, tensors, dtype)


def _from_state(cls, config, tensors: dict[str, Tensor], dtype: torch.dtype):
    try:
        model, info = cls.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:  # of other shapes
        raise _Incomplete(str(error).strip().splitlines()[0]) from None
    if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise _Incomplete(", ".join(wrong[:3]))
    return model


def _vae(tensors: dict[str, Tensor], dtype: torch.dtype):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    is_ldm = "encoder.down.0.block.0.conv1.weight" in tensors
    block = "encoder.down.{}.block.{}" if is_ldm else "encoder.down_blocks.{}.resnets.{}"
    block += ".conv1.weight"
    levels = _count(tensors, lambda i: block.format(i, 0))
    config = {
        "in_channels": _shape(tensors, "encoder.conv_in.weight")[1],
        "out_channels": _shape(tensors, "decoder.conv_out.weight")[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [_shape(tensors, block.format(i, 0))[0] for i in range(levels)],
        "layers_per_block": _count(tensors, lambda i: block.format(0, i)),
        "latent_channels": _shape(tensors, "decoder.conv_in.weight")[1],
        "norm_num_groups": _VAE_GROUPS,
        "scaling_factor": _VAE_SCALE,
        "shift_factor": _VAE_SHIFT,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "sample_size": 1024,
    }
    if not levels:
        raise _Incomplete(f"no {block.format(0, 0)}")
    if is_ldm:
        tensors = convert_ldm_vae_checkpoint(tensors, config)
    try:
        model = AutoencoderKL(**config)
        missing = model.load_state_dict(tensors, strict=False).missing_keys
    except (RuntimeError, ValueError) as error:
        raise _Incomplete(" ".join(str(error).split())) from None
    if missing:
        raise _Incomplete(", ".join(missing[:3]))
    return cast(Any, model).to(dtype)  # its stub takes the dtype for self
