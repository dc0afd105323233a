"""Writes `LoraWeights` in any of the LoRA formats that people load.

| format | loaded by | layout |
|---|---|---|
| diffusers | diffusers, ComfyUI, everything that reads ai-toolkit's | split, alpha folded in |
| kohya | sd-scripts, Forge, ComfyUI, diffusers | fused, `.alpha` = rank |
| comfyui | ComfyUI, diffusers | fused, `lora_down` and `lora_up` (diffusers passes over `lora_A` there) |
| xlabs | x-flux, diffusers | fused, attention and linear2 only, one rank in the whole file |
| bfl | BFL's own code | fused, BFL's names bare |
"""  # noqa: E501

import io
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.formats.container import all_finite, write
from fluxfast.formats.lora.names import XLABS_DOUBLE, XLABS_SINGLE
from fluxfast.formats.lora.update import (
    LoraWeights,
    Piece,
    fuse,
    split,
    stack_by_parts,
    swap_halves,
)
from fluxfast.model.names import DOUBLE_NORMS, SINGLE_NORMS, SWAPPED, diffusers_parts

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoraFormat:
    """A format's spelling. An empty string: it cannot hold that."""

    prefix: str
    down: str
    up: str
    joined: bool = False  # dots in names become underscores
    alpha: bool = False
    bias: str = ""
    norm: str = ""
    clip: str = ""
    t5: str = ""

    def spell(self, name: str) -> str:
        return name.replace(".", "_") if self.joined else name


_AB, _DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
FORMATS = {
    "diffusers": LoraFormat(
        *("transformer.", *_AB),
        bias="lora_B.bias",
        norm="weight",
        clip="text_encoder.",
        t5="text_encoder_2.",
    ),
    "kohya": LoraFormat(
        "lora_unet_", *_DOWN_UP, joined=True, alpha=True, clip="lora_te1_", t5="lora_te3_"
    ),
    "comfyui": LoraFormat(
        *("diffusion_model.", *_DOWN_UP),
        bias="diff_b",
        norm="scale.set_weight",
        clip="text_encoders.clip_l.transformer.",
        t5="text_encoders.t5xxl.transformer.",
    ),
    "xlabs": LoraFormat("", "down.weight", "up.weight"),
    "bfl": LoraFormat("", *_AB, bias="lora_B.bias", norm="scale"),
}


def to_state(lora: LoraWeights, format: str, *, drop: bool = False) -> dict[str, Tensor]:
    """Returns the fp32 tensors of a file by key.

    Raises ConfigError naming what the format cannot hold; drop leaves that out, with a warning.
    """
    if format not in FORMATS:
        raise ConfigError(f"LoRA format {format!r} is not one of {', '.join(FORMATS)}")
    form = FORMATS[format]
    is_split = format == "diffusers"
    state: dict[str, Tensor] = {}
    left_out: list[str] = []
    if format == "xlabs":
        linears = _xlabs_linears(lora, left_out)
    else:
        linears = _split_linears(lora) if is_split else _fused_linears(lora)
    for name, piece in linears.items():
        _put(state, form, form.prefix + form.spell(name), piece)
    for module, pieces in lora.text.items():
        encoder, _, name = module.partition("/")
        if prefix := form.clip if encoder == "clip" else form.t5:
            _put(state, form, prefix + form.spell(name), *stack_by_parts(pieces))
        else:
            left_out.append(module)
    for module in lora.biases:
        if form.bias:
            for name, bias in _biases(lora, module, is_split).items():
                state[f"{form.prefix}{form.spell(name)}.{form.bias}"] = bias
        else:
            left_out.append(f"{module}.bias")
    for module, scale in lora.norms.items():
        if form.norm:
            name = _diffusers_norm(module) if is_split else module
            state[f"{form.prefix}{name}.{form.norm}"] = scale
        else:
            left_out.append(f"{module}.scale")
    widened = [p for p in lora.pieces.get("img_in", []) if p.a.shape[1] != 64]
    if format == "comfyui" and widened and lora.norms:  # a control LoRA: ComfyUI widens img_in
        shape = [len(widened[0].stacked_b()), widened[0].a.shape[1]]
        state[f"{form.prefix}img_in.reshape_weight"] = torch.tensor(shape)
    if left_out:
        more = f" and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        message = f"{format} files cannot hold {', '.join(left_out[:4])}{more}"
        if not drop:
            raise ConfigError(message, hint="--drop leaves it out")
        log.warning(f"note: left out: {message}")
    if not state:
        raise ConfigError(f"{format} files can hold nothing of this LoRA")
    return state


def to_bytes(state: dict[str, Tensor], dtype: str, metadata: dict[str, str]) -> bytes:
    """Returns a safetensors file, the same bytes for the same content. If fp16 cannot hold a tensor
    the whole file is fp32, with a warning.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")

    def cast(to: torch.dtype) -> dict[str, Tensor]:
        return {key: t.to(to) if t.is_floating_point() else t for key, t in state.items()}

    tensors = cast(DTYPES[dtype])
    overflow = (key for key, tensor in tensors.items() if not all_finite(tensor))
    if dtype != "fp32" and (key := next(overflow, None)):
        log.warning(f"note: {dtype} cannot hold {key}: the whole file is in fp32")
        tensors = cast(torch.float32)
    file = io.BytesIO()
    write(file, tensors, {"format": "pt", **metadata})
    return file.getvalue()


# ---------------------------------------------------------------- linears: name -> piece


def _split_linears(lora: LoraWeights) -> dict[str, Piece]:
    linears = {}
    for module, pieces in lora.pieces.items():
        for piece in stack_by_parts(split(pieces)):
            ((part, b),) = piece.b.items()
            b = swap_halves(b) if module == SWAPPED else b
            linears[diffusers_parts(module)[part]] = Piece(piece.a, {part: b})
    return linears


def _fused_linears(lora: LoraWeights) -> dict[str, Piece]:
    return {
        module: fuse(pieces, lora.heights, tuple(range(len(diffusers_parts(module)))))
        for module, pieces in lora.pieces.items()
    }


def _xlabs_linears(lora: LoraWeights, left_out: list[str]) -> dict[str, Piece]:
    """Builds all processors of a block at one rank, as x-flux does: missing ones are zero, lower
    ranks are padded with zeros.
    """
    tables = {"double_blocks": XLABS_DOUBLE, "single_blocks": XLABS_SINGLE}
    processors: dict[str, Piece] = {}
    for module, pieces in lora.pieces.items():
        group, index, tail = [*module.split(".", 2), "", ""][:3]
        table = tables.get(group, {})
        target = next(((n, parts) for n, (m, parts) in table.items() if m == tail), None)
        if target is None:
            left_out.append(module)
            continue
        name, parts = target
        pieces = split(pieces)
        held = [piece for piece in pieces if piece.parts[0] in parts]
        if len(held) < len(pieces):
            left_out.append(f"{module} (mlp)")
        if held:
            processors[f"{group}.{index}.processor.{name}"] = fuse(held, lora.heights, parts)
    rank = max((piece.rank for piece in processors.values()), default=0)
    h, linears = lora.hidden, {}
    for block in dict.fromkeys(name.rpartition(".")[0] for name in processors):
        for name, (module, parts) in tables[block.partition(".")[0]].items():
            a = torch.zeros(rank, h + lora.mlp if module == "linear2" else h)
            b = torch.zeros(len(parts) * h, rank)
            if piece := processors.get(f"{block}.{name}"):
                a[: piece.rank], b[:, : piece.rank] = piece.a, piece.stacked_b()
            linears[f"{block}.{name}"] = Piece(a, {0: b})
    return linears


def _put(state: dict, form: LoraFormat, name: str, piece: Piece) -> None:
    state[f"{name}.{form.down}"], state[f"{name}.{form.up}"] = piece.a, piece.stacked_b()
    if form.alpha:
        state[f"{name}.alpha"] = torch.tensor(float(piece.rank))


# ---------------------------------------------------------------- biases and norms; names


def _biases(lora: LoraWeights, module: str, is_split: bool) -> dict[str, Tensor]:
    """Returns a linear's bias under BFL's name, or split under diffusers' names."""
    parts = dict(lora.biases[module])
    for part in range(len(diffusers_parts(module))):
        if part not in parts:
            parts[part] = torch.zeros(lora.heights[part])
    if not is_split:
        return {module: torch.cat([parts[part] for part in sorted(parts)])}
    if module == SWAPPED:
        parts[0] = swap_halves(parts[0])
    return {name: parts[part] for part, name in enumerate(diffusers_parts(module))}


def _diffusers_norm(module: str) -> str:
    group, index, tail = module.split(".", 2)
    block = "transformer_blocks" if group == "double_blocks" else "single_transformer_blocks"
    return f"{block}.{index}.{(DOUBLE_NORMS | SINGLE_NORMS)[tail]}"
