"""LoRA files out: one `LoraWeights` in any of the formats that people load.

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
    part_count,
    rows_of,
    split,
    stack_by_parts,
)
from fluxfast.model.names import DOUBLE_NORMS, OUTER, SINGLE_NORMS, SWAPPED, diffusers_parts

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoraFormat:
    """How a format spells things. An empty word: it has no place for that."""

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


def known_format(name: str) -> str:
    """Raises ConfigError for a format that is not written."""
    if name not in FORMATS:
        raise ConfigError(f"LoRA format {name!r} is not one of {', '.join(FORMATS)}")
    return name


def to_state(lora: LoraWeights, format: str, *, drop: bool = False) -> dict[str, Tensor]:
    """Key -> fp32 tensor. Raises ConfigError naming what the format has no place for; drop leaves
    that out, with a warning.
    """
    form = FORMATS[known_format(format)]
    state: dict[str, Tensor] = {}
    left_out: list[str] = []
    if format == "xlabs":
        linears = _xlabs_linears(lora, left_out)
    else:
        linears = _split_linears(lora) if format == "diffusers" else _fused_linears(lora)
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
            for name, bias in _biases(lora, module, format == "diffusers").items():
                state[f"{form.prefix}{form.spell(name)}.{form.bias}"] = bias
        else:
            left_out.append(f"{module}.bias")
    for module, scale in lora.norms.items():
        if form.norm:
            name = _diffusers_norm(module) if format == "diffusers" else module
            state[f"{form.prefix}{name}.{form.norm}"] = scale
        else:
            left_out.append(f"{module}.scale")
    widened = [p for p in lora.pieces.get("img_in", []) if p.a.shape[1] != 64]
    if format == "comfyui" and widened and lora.norms:  # control: ComfyUI grows img_in by it
        shape = [widened[0].b.shape[0], widened[0].a.shape[1]]
        state[f"{form.prefix}img_in.reshape_weight"] = torch.tensor(shape)
    if left_out:
        more = f" and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        message = f"{format} files have no place for {', '.join(left_out[:4])}{more}"
        if not drop:
            raise ConfigError(message, hint="--drop leaves it out")
        log.warning(f"note: left out: {message}")
    if not state:
        raise ConfigError(f"nothing of this LoRA has a place in {format} files")
    return state


def to_bytes(state: dict[str, Tensor], dtype: str, metadata: dict[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content. A tensor that fp16 cannot hold makes
    the whole file fp32, with a warning.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    cast = {key: _cast(tensor, DTYPES[dtype]) for key, tensor in state.items()}
    over = (key for key, tensor in cast.items() if not all_finite(tensor))
    if dtype != "fp32" and (key := next(over, None)):
        log.warning(f"note: {dtype} cannot hold {key}: the whole file is in fp32")
        cast = {key: _cast(tensor, torch.float32) for key, tensor in state.items()}
    file = io.BytesIO()
    write(file, cast, {"format": "pt", **metadata})
    return file.getvalue()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


# ---------------------------------------------------------------- linears: name -> piece


def _split_linears(lora: LoraWeights) -> dict[str, Piece]:
    linears = {}
    for module, pieces in lora.pieces.items():
        for piece in stack_by_parts(split(pieces, lora.heights(module))):
            if module == SWAPPED:
                piece = Piece(piece.parts, piece.a, _swap(piece.b))
            linears[_diffusers(module)[piece.parts[0]]] = piece
    return linears


def _fused_linears(lora: LoraWeights) -> dict[str, Piece]:
    return {
        module: fuse(pieces, lora.heights(module), tuple(range(part_count(module))))
        for module, pieces in lora.pieces.items()
    }


def _xlabs_linears(lora: LoraWeights, left_out: list[str]) -> dict[str, Piece]:
    """x-flux builds every processor of a block at one rank: missing ones are zero, lower ranks
    padded with zeros.
    """
    processors: dict[str, Piece] = {}
    for module, pieces in lora.pieces.items():
        group, index, tail = [*module.split(".", 2), "", ""][:3]
        table = {"double_blocks": XLABS_DOUBLE, "single_blocks": XLABS_SINGLE}.get(group, {})
        target = next(((n, parts) for n, (m, parts) in table.items() if m == tail), None)
        if target is None:
            left_out.append(module)
            continue
        (name, parts), heights = target, lora.heights(module)
        pieces = split(pieces, heights)
        held = [piece for piece in pieces if piece.parts[0] in parts]
        if len(held) < len(pieces):
            left_out.append(f"{module} (mlp)")
        if held:
            processors[f"{group}.{index}.processor.{name}"] = fuse(held, heights, parts)
    rank = max((piece.rank for piece in processors.values()), default=0)
    h, wide = lora.hidden, lora.hidden + lora.mlp
    linears = {}
    for block in dict.fromkeys(name.rpartition(".")[0] for name in processors):
        table = XLABS_DOUBLE if block.startswith("double") else XLABS_SINGLE
        for name, (module, parts) in table.items():
            a = torch.zeros(rank, wide if module == "linear2" else h)
            b = torch.zeros(len(parts) * h, rank)
            if piece := processors.get(f"{block}.{name}"):
                a[: piece.rank], b[:, : piece.rank] = piece.a, piece.b
            linears[f"{block}.{name}"] = Piece(parts, a, b)
    return linears


def _put(state: dict, form: LoraFormat, name: str, piece: Piece) -> None:
    state[f"{name}.{form.down}"], state[f"{name}.{form.up}"] = piece.a, piece.b
    if form.alpha:
        state[f"{name}.alpha"] = torch.tensor(float(piece.rank))


# ---------------------------------------------------------------- biases and norms; names


def _biases(lora: LoraWeights, module: str, in_parts: bool) -> dict[str, Tensor]:
    """Name -> what is added, under BFL's name or, in parts, under diffusers'."""
    heights = lora.heights(module)
    rows = rows_of(tuple(range(len(heights))), heights)
    total = torch.zeros(sum(heights))
    for parts, bias in lora.biases[module]:
        own = rows_of(parts, heights)
        for part in parts:
            total[rows[part]] += bias[own[part]]
    if not in_parts:
        return {module: total}
    total = _swap(total) if module == SWAPPED else total
    return {name: total[rows[index]] for index, name in enumerate(_diffusers(module))}


def _swap(tensor: Tensor) -> Tensor:
    """Into diffusers' order of scale and shift."""
    return torch.cat(tensor.chunk(2)[::-1])


def _diffusers(module: str) -> list[str]:
    return [OUTER[module]] if module in OUTER else diffusers_parts(module)


def _diffusers_norm(module: str) -> str:
    group, index, tail = module.split(".", 2)
    block = "transformer_blocks" if group == "double_blocks" else "single_transformer_blocks"
    return f"{block}.{index}.{(DOUBLE_NORMS | SINGLE_NORMS)[tail]}"
