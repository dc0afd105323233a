"""LoRA files and a model: put files of any format on it, write what it carries in any format.

alpha is folded in on both ways: what a file means is B A.
"""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.container import all_finite
from fluxfast.formats.lora.convert import read_all
from fluxfast.formats.lora.read import read_lora
from fluxfast.formats.lora.update import (
    Lora,
    Piece,
    balanced,
    fused,
    grouped,
    merged,
    split,
    split_scale,
)
from fluxfast.formats.lora.write import DTYPES, known_format, to_bytes, to_state
from fluxfast.model.flux import Flux
from fluxfast.model.lora import lora_layers
from fluxfast.model.lora_linear import LoRALinear, LowRankUpdate
from fluxfast.model.names import part_rows
from fluxfast.util.files import write_atomic

log = logging.getLogger(__name__)

__all__ = [
    "DTYPES", "init_lora", "load_assistant", "load_lora", "lora_of", "read_lora", "save_lora",
]  # fmt: skip


def lora_of(model: Flux, tensors: dict[str, tuple[Tensor, Tensor]] | None = None) -> Lora:
    """What the model carries, on the CPU in fp32.

    tensors: BFL name -> (A, B) to take instead of the model's own (an average of them, say).
    """
    lora = Lora(hidden=model.spec.hidden_size, mlp=model.spec.mlp_hidden, form="fluxfast")
    for module, layer in lora_layers(model).items():
        a, b = (tensors or {}).get(module, (layer.lora_A, layer.lora_B))
        a, b = (tensor.detach().cpu().float() for tensor in (a, b))  # no copy on the device
        for_a, for_b = split_scale(layer.lora.scale)
        slices = list(layer.lora.slices())
        for parts in _parts(model, module, layer):
            mine, slices = slices[: len(parts)], slices[len(parts) :]
            rows = torch.cat([b[b_rows] for _, b_rows, _ in mine])
            piece = Piece(parts, a[mine[0][2]] * for_a, rows * for_b)
            lora.pieces.setdefault(module, []).append(piece)
    return lora


def save_lora(
    model: Flux,
    path: Path | str,
    format: str = "diffusers",
    *,
    dtype: str = "fp32",
    metadata: dict[str, str] | None = None,
    tensors: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> Path:
    """Write the model's LoRA, whole or not at all (a temporary file beside it, then a rename).

    format: diffusers, kohya, comfyui, xlabs or bfl. dtype: fp32, fp16 or bf16; a tensor that fp16
    cannot hold makes the whole file fp32. tensors: see `lora_of`. Raises ConfigError for a format
    that is unknown or has no place for some of the layers, FluxfastError where there is no LoRA, it
    is not finite or the disk refuses.
    """
    known_format(format)
    lora = lora_of(model, tensors)
    if not lora.pieces:
        raise FluxfastError("the model carries no LoRA to save")
    for module, pieces in lora.pieces.items():
        if not all(all_finite(side) for piece in pieces for side in (piece.a, piece.b)):
            raise FluxfastError(
                f"the LoRA of {module} holds numbers that are not finite: it is not saved",
                hint="lower train.lr; what was saved before is as it was",
            )
    lora = balanced(lora) if dtype == "fp16" else lora
    content = to_bytes(to_state(lora, format), dtype, metadata or {})
    write_atomic(Path(path), content)
    return Path(path)


def load_lora(
    model: Flux,
    path: Path | str | Sequence[Path | str],
    strength: float | Sequence[float] = 1.0,
) -> list[nn.Parameter]:
    """Put LoRA files of any format on `model`, in place of what it may carry. -> the parameters.

    Several files are summed by stacking their ranks, each times its strength (one for all, or one
    each); that of a single file stays adjustable (`set_lora_strength`). Ranks may differ between
    modules. Text encoder parts, which a transformer has no place for, are logged. Raises
    ConfigError for files that cannot be read or are not of this model.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    strengths = [strength] if isinstance(strength, int | float) else list(strength)
    alone = len(paths) == 1 and len(strengths) == 1
    lora = merged(read_all(paths, [] if alone else strengths))
    name = ", ".join(map(str, paths))
    _check_fits(model, lora, name)
    if lora.text:
        log.warning(f"note: {name}: what it changes of the text encoders is not applied")
    for layer in lora_layers(model).values():
        layer.remove_lora()
    parameters = []
    for module, pieces in lora.pieces.items():
        layer, heights = model.get_submodule(module), lora.heights(module)
        parameters += _put(layer, grouped(pieces, heights), _rows(model, module))
        layer.lora.strength = strengths[0] if alone else 1.0
    return parameters


def init_lora(model: Flux, path: Path | str) -> None:
    """Start the LoRA that `model` carries from a file of any format. Where the file has less than
    the model (a linear, a rank), the model keeps what it has, which changes nothing.

    Raises ConfigError naming the setting that would take the file: rank, targets, share_a.
    """
    lora = read_lora(path)
    _check_fits(model, lora, str(path))
    if lora.text:
        log.warning(f"note: {path}: what it changes of the text encoders is left out")
    layers = lora_layers(model)
    rank = max(layer.lora_B.shape[1] for layer in layers.values())
    if lora.rank() != rank:
        raise ConfigError(
            f"lora.init_from: {path} has rank {lora.rank()}, lora.rank is {rank}",
            hint=f"--set lora.rank={lora.rank()}",
        )
    for module, pieces in lora.pieces.items():
        if module not in layers:
            raise ConfigError(
                f"lora.init_from: {path} has {module}, which is not among the targets",
                hint="lora.targets: all, or include and exclude without it",
            )
        _fill(model, module, layers[module], pieces, lora, path)


def load_assistant(model: Flux, path: Path | str) -> None:
    """Put a LoRA file on `model` as a frozen part of its linears, beside the LoRA that it carries
    already: it acts while training (`set_assisted`) and is not among what is saved.

    Raises ConfigError for a file that cannot be read or is not of this model.
    """
    lora = read_lora(path)
    _check_fits(model, lora, str(path))
    if lora.text:
        log.warning(f"note: {path}: what it changes of the text encoders is not applied")
    for module, pieces in lora.pieces.items():
        layer, heights = model.get_submodule(module), lora.heights(module)
        trained = _parts(model, module, layer) if layer.lora is not None else []
        single = [
            part for piece in pieces for part in (split(piece, heights) if heights else [piece])
        ]
        free = {piece.parts for piece in single} - {(p,) for parts in trained for p in parts}
        parts = sorted([*trained, *free])
        if any(one[-1] >= other[0] for one, other in itertools.pairwise(parts)):
            raise ConfigError(
                f"model.assistant_lora changes a part of {module} that lies between parts trained "
                "with one A",
                hint="lora.share_a: false",
            )
        stacked = []
        for own in parts:
            mine = [piece for piece in single if piece.parts[0] in own]
            rows = sum(heights[part] for part in own) if heights else layer.out_features
            empty = Piece(own, torch.zeros(0, layer.in_features), torch.zeros(rows, 0))
            stacked.append(fused(mine, heights, own) if mine else empty)
        rank = max(piece.rank for piece in stacked)
        a = torch.stack([F.pad(piece.a, (0, 0, 0, rank - piece.rank)) for piece in stacked])
        b = torch.cat([F.pad(piece.b, (0, rank - piece.rank)) for piece in stacked])
        rows = _rows(model, module)
        ranges = [[rows[part] for part in own] for own in parts]
        layer.add_update(LowRankUpdate(a.flatten(0, 1), b, ranges, 1.0, trainable=False))


# ---------------------------------------------------------------- between pieces and layers


def _rows(model: Flux, module: str) -> list[tuple[int, int]]:
    if "_blocks." in module:
        return part_rows(module, model.spec)
    return [(0, model.get_submodule(module).out_features)]


def _parts(model: Flux, module: str, layer: LoRALinear) -> list[tuple[int, ...]]:
    """Per A of the layer: the parts that it feeds."""
    rows = _rows(model, module)
    return [tuple(rows.index(tuple(pair)) for pair in ranges) for ranges in layer.lora.parts]


def _check_fits(model: Flux, lora: Lora, name: str) -> None:
    spec = model.spec
    if lora.biases or lora.norms:
        extra = next(iter([*(f"{m}.bias" for m in lora.biases), *lora.norms]))
        raise ConfigError(
            f"{name} also sets {extra}, which is no low-rank update (a control LoRA): it cannot be "
            "loaded onto a text-to-image model"
        )
    if not lora.pieces:
        raise ConfigError(f"{name} changes the text encoders only, nothing of the transformer")
    if lora.hidden and (lora.hidden, lora.mlp) != (spec.hidden_size, spec.mlp_hidden):
        raise ConfigError(
            f"the factors of {name} do not fit this model: they are of a transformer {lora.hidden} "
            f"wide with an MLP of {lora.mlp}, this one has {spec.hidden_size} and {spec.mlp_hidden}"
        )
    for module, pieces in lora.pieces.items():
        try:
            layer = model.get_submodule(module)
        except AttributeError:
            raise ConfigError(
                f"{name} has {module}, which this model (with {spec.depth} double and "
                f"{spec.depth_single_blocks} single blocks) has not"
            ) from None
        for piece in pieces:
            whole = "_blocks." in module or piece.b.shape[0] == layer.out_features
            if piece.a.shape[1] != layer.in_features or not whole:
                raise ConfigError(f"the factors of {name} for {module} do not fit this model")


def _put(layer: LoRALinear, pieces: list[Piece], rows: list[tuple[int, int]]) -> list[nn.Parameter]:
    """Pieces that share no row, as the layer's LoRA, lower ranks padded with zeros."""
    rank = max(piece.rank for piece in pieces)
    ranges = [[rows[part] for part in piece.parts] for piece in pieces]
    a = [F.pad(piece.a, (0, 0, 0, rank - piece.rank)) for piece in pieces]
    b = [F.pad(piece.b, (0, rank - piece.rank)) for piece in pieces]
    update = LowRankUpdate(torch.cat(a), torch.cat(b), ranges, 1.0, trainable=True)
    layer.add_update(update)
    return list(update.parameters())


def _fill(model, module, layer, pieces, lora, path) -> None:
    """The layer's own factors from the file's."""
    heights, rank = lora.heights(module), layer.lora_B.shape[1]
    trained = _parts(model, module, layer)
    if heights is not None:
        pieces = [part for piece in grouped(pieces, heights) for part in split(piece, heights)]
    left = {part for p in pieces for part in p.parts} - {part for ps in trained for part in ps}
    if left:
        raise ConfigError(
            f"lora.init_from: {path} has a part of {module} (of q, k, v, mlp the number "
            f"{min(left)}) that is not among the targets",
            hint="lora.targets: all, or include and exclude without it",
        )
    start = 0
    for index, parts in enumerate(trained):
        height = sum(heights[part] for part in parts) if heights else layer.out_features
        mine = [piece for piece in pieces if piece.parts[0] in parts]
        if mine:
            piece = fused(mine, heights, parts)
            if piece.rank > rank:
                raise ConfigError(
                    f"lora.init_from: {path} has an A for each part of {module}, with "
                    "lora.share_a there is one",
                    hint="--set lora.share_a=false",
                )
            with torch.no_grad():
                layer.lora_A[index * rank : index * rank + piece.rank] = piece.a
                b = piece.b / layer.lora.scale
                layer.lora_B[start : start + height, : piece.rank] = b
        start += height
