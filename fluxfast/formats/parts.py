"""The parts of FLUX.1 beside the transformer (CLIP-L, T5, VAE) in single files: an all-in-one
checkpoint, or a folder with a file for each, as ComfyUI and sd-scripts take them.

    text_encoders.clip_l.transformer.text_model.…   CLIP-L under transformers' names
    text_encoders.t5xxl.transformer.encoder.…       T5 under transformers' names
    vae.encoder.down.0.…                            the VAE under BFL's names, or diffusers'

or the same names bare or under other prefixes: told by content, never by a file's name. fp8 with a
scale is decoded. Source: ComfyUI `comfy/supported_models.py` and `comfy/sd.py`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats import base_8bit
from fluxfast.formats.opened import Files
from fluxfast.model.linear import dense

# component of a diffusers folder -> ends of a key that tell it; what stands in front is the prefix
_MARKS = {
    "text_encoder": ("text_model.encoder.layers.0.self_attn.q_proj.weight",),
    "text_encoder_2": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "vae": ("decoder.conv_in.weight",),
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
    found = []
    for file in _files(root):
        with Files([file]) as files:
            prefixes = {
                key.removesuffix(mark)
                for mark in _MARKS[component]
                for key in files.entries
                if key.endswith(mark)
            }
        # a whole CLIP has a vision tower under names of its own, a whole T5 a decoder
        prefixes -= {prefix for prefix in prefixes if prefix.endswith("vision_")}
        found += [Part(component, file, prefix) for prefix in sorted(prefixes)]
    if len(found) > 1:
        places = ", ".join(f"{part.file.name} ({part.prefix or 'bare'})" for part in found[:3])
        raise ConfigError(
            f"{root} holds more than one {NAMES[component]}: {places}",
            hint="model.encoders takes one file, or a folder with one of each",
        )
    return found[0] if found else None


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    folders = [root / name for name in _SUBFOLDERS]
    return sorted({file for folder in folders for file in folder.glob("*.safetensors")})


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
                tensors[name] = dense(base_8bit.read_8bit(files, key))
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
    """Hash of what the part holds -> 64 hex digits: names, dtypes, shapes, and of each tensor the
    first and last 16384 values. A change between those goes unseen. Raises FluxfastError.
    """
    digest = hashlib.sha256(part.component.encode())
    try:
        with Files([part.file]) as files:
            for key in part.keys(files):
                entry = files.entries[key]
                digest.update(
                    f"{key.removeprefix(part.prefix)}\0{entry.dtype}{entry.shape}".encode()
                )
                flat = files.read(key).flatten()
                for piece in (flat[:_SAMPLE], flat[_SAMPLE:][-_SAMPLE:]):
                    digest.update(piece.view(torch.uint8).numpy().tobytes())
    except OSError as error:
        raise FluxfastError(f"cannot read {part.file}: {error.strerror or error}") from None
    return digest.hexdigest()
