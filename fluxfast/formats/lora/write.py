"""LoRA files out: one `Lora` in any of the formats that people load.

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
from fluxfast.formats.lora.update import Lora, Piece, fused, grouped, part_count, rows_of, split
from fluxfast.model.names import DOUBLE_NORMS, OUTER, SINGLE_NORMS, SWAPPED, diffusers_parts

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Format:
    """How a format spells things. An empty word: it has no place for that."""

    prefix: str
    joined: bool  # dots in names become underscores
    down: str
    up: str
    alpha: bool
    bias: str
    norm: str
    clip: str
    t5: str


_AB, _DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
FORMATS = {
    "diffusers": Format(
        "transformer.", False, *_AB, False, "lora_B.bias", "weight", "text_encoder.",
        "text_encoder_2.",
    ),
    "kohya": Format("lora_unet_", True, *_DOWN_UP, True, "", "", "lora_te1_", "lora_te3_"),
    "comfyui": Format(
        "diffusion_model.", False, *_DOWN_UP, False, "diff_b", "scale.set_weight",
        "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.",
    ),
    "xlabs": Format("", False, "down.weight", "up.weight", False, "", "", "", ""),
    "bfl": Format("", False, *_AB, False, "lora_B.bias", "scale", "", ""),
}  # fmt: skip


def known_format(name: str) -> str:
    """Raises ConfigError for a format that is not written."""
    if name not in FORMATS:
        raise ConfigError(f"LoRA format {name!r} is not one of {', '.join(FORMATS)}")
    return name


def to_state(lora: Lora, format: str, *, drop: bool = False) -> dict[str, Tensor]:
    """Key -> fp32 tensor. Raises ConfigError naming what the format has no place for; drop leaves
    that out, with a warning.
    """
    form = FORMATS[known_format(format)]
    state: dict[str, Tensor] = {}
    left: list[str] = []
    if format == "diffusers":
        _split_linears(lora, form, state)
    elif format == "xlabs":
        _xlabs(lora, form, state, left)
    else:
        _fused_linears(lora, form, state)
    for module, pieces in lora.text.items():
        encoder, _, name = module.partition("/")
        prefix = form.clip if encoder == "clip" else form.t5
        if prefix:
            _put(state, form, prefix + _spelt(name, form), *grouped(pieces, None))
        else:
            left.append(module)
    _biases(lora, format, state, left)
    _norms(lora, format, state, left)
    if left:
        what = f"{format} files have no place for {', '.join(left[:4])}"
        what += f" and {len(left) - 4} more" if len(left) > 4 else ""
        if not drop:
            raise ConfigError(what, hint="--drop leaves it out")
        log.warning(f"note: left out: {what}")
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
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.to(dtype)


# ---------------------------------------------------------------- linears


def _split_linears(lora: Lora, form: Format, state: dict) -> None:
    for module, pieces in lora.pieces.items():
        heights = lora.heights(module)
        if heights is not None:
            pieces = [part for piece in pieces for part in split(piece, heights)]
        for piece in grouped(pieces, None):
            name = _diffusers(module)[piece.parts[0]]
            _put(state, form, form.prefix + name, _turned(module, piece))


def _fused_linears(lora: Lora, form: Format, state: dict) -> None:
    for module, pieces in lora.pieces.items():
        piece = fused(pieces, lora.heights(module), tuple(range(part_count(module))))
        _put(state, form, form.prefix + _spelt(module, form), piece)


def _xlabs(lora: Lora, form: Format, state: dict, left: list[str]) -> None:
    """x-flux builds every processor of a block at one rank: missing ones are zero, lower ranks
    padded with zeros.
    """
    held: dict[str, Piece] = {}
    for module, pieces in lora.pieces.items():
        group, _, rest = module.partition(".")
        index, _, tail = rest.partition(".")
        table = {"double_blocks": XLABS_DOUBLE, "single_blocks": XLABS_SINGLE}.get(group, {})
        target = next(((n, parts) for n, (m, parts) in table.items() if m == tail), None)
        heights = lora.heights(module)
        if target is None:
            left.append(module)
            continue
        name, parts = target
        if heights is not None:
            pieces = [p for piece in pieces for p in split(piece, heights)]
            if any(p.parts[0] not in parts for p in pieces):
                left.append(f"{module} (mlp)")
                pieces = [p for p in pieces if p.parts[0] in parts]
        if pieces:
            held[f"{group}.{index}.processor.{name}"] = fused(pieces, heights, parts)
    rank = max((piece.rank for piece in held.values()), default=0)
    h, wide = lora.hidden, lora.hidden + lora.mlp
    for block in dict.fromkeys(name.rpartition(".")[0] for name in held):
        table = XLABS_DOUBLE if block.startswith("double") else XLABS_SINGLE
        for name, (module, parts) in table.items():
            a = torch.zeros(rank, wide if module == "linear2" else h)
            b = torch.zeros(len(parts) * h, rank)
            if piece := held.get(f"{block}.{name}"):
                a[: piece.rank], b[:, : piece.rank] = piece.a, piece.b
            _put(state, form, f"{block}.{name}", Piece(parts, a, b))


def _put(state: dict, form: Format, name: str, piece: Piece) -> None:
    state[f"{name}.{form.down}"], state[f"{name}.{form.up}"] = piece.a, piece.b
    if form.alpha:
        state[f"{name}.alpha"] = torch.tensor(float(piece.rank))


def _spelt(name: str, form: Format) -> str:
    return name.replace(".", "_") if form.joined else name


def _diffusers(module: str) -> list[str]:
    return [OUTER[module]] if module in OUTER else diffusers_parts(module)


def _turned(module: str, piece: Piece) -> Piece:
    """In diffusers' order of scale and shift."""
    if module != SWAPPED:
        return piece
    return Piece(piece.parts, piece.a, torch.cat(piece.b.chunk(2)[::-1]))


# ---------------------------------------------------------------- beyond the low rank


def _biases(lora: Lora, format: str, state: dict, left: list[str]) -> None:
    form = FORMATS[format]
    for module, found in lora.biases.items():
        heights = lora.heights(module)
        if not form.bias:
            left.append(f"{module}.bias")
            continue
        total = torch.zeros(sum(heights)) if heights else torch.zeros_like(found[0][1])
        rows = rows_of(tuple(range(len(heights))), heights) if heights else {0: slice(None)}
        for parts, bias in found:
            own = rows_of(parts, heights) if heights else {0: slice(None)}
            for part in parts:
                total[rows[part]] += bias[own[part]]
        if format == "diffusers":
            total = torch.cat(total.chunk(2)[::-1]) if module == SWAPPED else total
            for index, name in enumerate(_diffusers(module)):
                state[f"{form.prefix}{name}.{form.bias}"] = total[rows[index]]
        else:
            state[f"{form.prefix}{_spelt(module, form)}.{form.bias}"] = total


def _norms(lora: Lora, format: str, state: dict, left: list[str]) -> None:
    form = FORMATS[format]
    for module, scale in lora.norms.items():
        if not form.norm:
            left.append(f"{module}.scale")
        elif format == "diffusers":
            group, index, tail = module.split(".", 2)
            name = {**DOUBLE_NORMS, **SINGLE_NORMS}[tail]
            block = (
                "transformer_blocks" if group == "double_blocks" else "single_transformer_blocks"
            )
            state[f"{form.prefix}{block}.{index}.{name}.{form.norm}"] = scale
        else:
            state[f"{form.prefix}{module}.{form.norm}"] = scale
    widened = [p for p in lora.pieces.get("img_in", []) if p.a.shape[1] != 64]
    if format == "comfyui" and widened and lora.norms:  # control: ComfyUI grows img_in by it
        shape = [widened[0].b.shape[0], widened[0].a.shape[1]]
        state[f"{form.prefix}img_in.reshape_weight"] = torch.tensor(shape)
