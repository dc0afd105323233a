"""Writes `LoraWeights` in any of the LoRA formats that people load.

| format | loaded by | layout |
|---|---|---|
| diffusers | diffusers, ComfyUI, everything that reads ai-toolkit's | split, alpha folded in, one rank for each network |
| kohya | sd-scripts, Forge, ComfyUI, diffusers | fused, `.alpha` = rank |
| comfyui | ComfyUI, diffusers | fused, `lora_down` and `lora_up` (diffusers passes over `lora_A` there) |
| xlabs | x-flux, diffusers | fused, attention and linear2 only, one rank in the whole file |
| bfl | BFL's own code (`FluxLoraWrapper`) | fused, BFL's names bare, one rank, every linear with a bias |

Ranks of zeros make ranks equal. Without an alpha, diffusers up to 0.39 takes the first factor's rank for that of all: at
unequal ranks the others act too strongly or too weakly.
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
    at_rank,
    fuse,
    split,
    stack_by_parts,
    swap_halves,
)
from fluxfast.model.names import (
    DOUBLE_NORMS,
    SINGLE_NORMS,
    SWAPPED,
    block_linears,
    diffusers_parts,
    linear_shape,
    outer_linears,
)
from fluxfast.model.spec import DEV

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BFL_RANK = 128  # that BFL's loader builds its linears with


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
        norm="set_weight",
        clip="text_encoders.clip_l.transformer.",
        t5="text_encoders.t5xxl.transformer.",
    ),
    "xlabs": LoraFormat("", "down.weight", "up.weight"),
    "bfl": LoraFormat("", *_AB, bias="lora_B.bias", norm="scale"),
}


def to_state(
    lora: LoraWeights, format: str, *, drop: bool = False, hint: str | None = None
) -> dict[str, Tensor]:
    """Returns the fp32 tensors of a file by key.

    Raises ConfigError naming what the format cannot hold, with the hint; drop leaves that out, with
    a warning.
    """
    if format not in FORMATS:
        raise ConfigError(f"LoRA format {format!r} is not one of {', '.join(FORMATS)}")
    form = FORMATS[format]
    is_split = format == "diffusers"
    state: dict[str, Tensor] = {}
    left_out: list[str] = []
    if format == "xlabs":
        linears = _xlabs_linears(lora, left_out)
    elif format == "bfl":
        linears = _bfl_linears(lora)
    else:
        linears = _split_linears(lora) if is_split else _fused_linears(lora)
    for name, piece in linears.items():
        _put(state, form, form.prefix + form.spell(name), piece)
    if form.clip:
        for encoder, prefix in (("clip/", form.clip), ("t5/", form.t5)):
            own = {name: stack_by_parts(p)[0] for name, p in lora.text.items() if encoder in name}
            for name, piece in (_at_one_rank(own) if is_split else own).items():
                _put(state, form, prefix + form.spell(name.removeprefix(encoder)), piece)
        state |= lora.embeddings
    else:
        left_out += [*lora.text, *lora.embeddings]
    if form.bias:
        for name, bias in _biases(lora, linears, format).items():
            state[f"{form.prefix}{form.spell(name)}.{form.bias}"] = bias
    else:
        left_out += [f"{module}.bias" for module in lora.biases]
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
            raise ConfigError(message, hint=hint)
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
    return _at_one_rank(linears)


def _at_one_rank(linears: dict[str, Piece]) -> dict[str, Piece]:
    rank = max((piece.rank for piece in linears.values()), default=0)
    return {name: at_rank(piece, rank) for name, piece in linears.items()}


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
    h, linears = lora.hidden, {}
    for block in dict.fromkeys(name.rpartition(".")[0] for name in processors):
        for name, (module, parts) in tables[block.partition(".")[0]].items():
            columns = h + lora.mlp if module == "linear2" else h
            none = _nothing(len(parts) * h, columns)
            linears[f"{block}.{name}"] = processors.get(f"{block}.{name}", none)
    return _at_one_rank(linears)


def _bfl_linears(lora: LoraWeights) -> dict[str, Piece]:
    """Returns every linear of the model, as FluxLoraWrapper builds them: at one rank, or at the
    smaller of rows and columns where that is less.
    """
    pieces = {name: _nothing(*shape) for name, shape in _shapes(lora).items()}
    pieces |= _fused_linears(lora)
    limits = {name: min(len(p.stacked_b()), p.a.shape[1]) for name, p in pieces.items()}
    rank = max([BFL_RANK, *(min(p.rank, limits[name]) for name, p in pieces.items())])
    linears = {}
    for name, piece in pieces.items():
        a, b = piece.a, piece.stacked_b()
        if piece.rank > limits[name]:  # its product needs no more ranks than it has columns or rows
            columns_least = limits[name] == a.shape[1]
            a, b = (torch.eye(len(a[0])), b @ a) if columns_least else (b @ a, torch.eye(len(b)))
        linears[name] = at_rank(Piece(a, {0: b}), min(rank, limits[name]))
    return linears


def _nothing(rows: int, columns: int) -> Piece:
    return Piece(torch.zeros(0, columns), {0: torch.zeros(rows, 0)})


def _shapes(lora: LoraWeights) -> dict[str, tuple[int, int]]:
    """Returns (rows, columns) of the linears of the model that the LoRA was trained on, FLUX.1-dev
    by its widths; none of another that is not known.
    """
    dev = (lora.hidden, lora.mlp) == (DEV.hidden_size, DEV.mlp_hidden)
    spec = lora.spec or (DEV if dev else None)
    if spec is None:
        log.warning(
            "note: the sizes of the LoRA's model are not known: the file has no linears but the "
            "LoRA's own, and FluxLoraWrapper needs all"
        )
        return {}
    return {name: linear_shape(name, spec) for name in block_linears(spec) + outer_linears(spec)}


def _put(state: dict, form: LoraFormat, name: str, piece: Piece) -> None:
    state[f"{name}.{form.down}"], state[f"{name}.{form.up}"] = piece.a, piece.stacked_b()
    if form.alpha:
        state[f"{name}.alpha"] = torch.tensor(float(piece.rank))


# ---------------------------------------------------------------- biases and norms; names


def _biases(lora: LoraWeights, linears: dict[str, Piece], format: str) -> dict[str, Tensor]:
    """Returns the biases by the format's names. diffusers and BFL's code make one for every linear
    if there is one at all, BFL's even without.
    """
    biases = {}
    for module, known in lora.biases.items():
        names = diffusers_parts(module)
        parts = [known.get(p, torch.zeros(lora.heights[p])) for p in range(len(names))]
        if format != "diffusers":
            biases[module] = torch.cat(parts)
            continue
        parts = [swap_halves(part) for part in parts] if module == SWAPPED else parts
        biases |= dict(zip(names, parts, strict=True))
    if format == "bfl" or (format == "diffusers" and biases):
        biases = {name: torch.zeros(len(p.stacked_b())) for name, p in linears.items()} | biases
    return biases


def _diffusers_norm(module: str) -> str:
    group, index, tail = module.split(".", 2)
    block = "transformer_blocks" if group == "double_blocks" else "single_transformer_blocks"
    return f"{block}.{index}.{(DOUBLE_NORMS | SINGLE_NORMS)[tail]}"
