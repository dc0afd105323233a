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
    LoraWeights,
    Piece,
    balanced,
    fuse,
    group,
    merged,
    split,
    split_scale,
)
from fluxfast.formats.lora.write import known_format, to_bytes, to_state
from fluxfast.model.flux import Flux
from fluxfast.model.lora import lora_layers
from fluxfast.model.lora_linear import LoRALinear, LowRankUpdate
from fluxfast.model.names import part_rows
from fluxfast.util.files import write_atomic

log = logging.getLogger(__name__)


def extract_lora(
    model: Flux, tensors: dict[str, tuple[Tensor, Tensor]] | None = None
) -> LoraWeights:
    """What the model carries, on the CPU in fp32.

    tensors: BFL name -> (A, B) to take instead of the model's own (an average of them, say).
    """
    lora = LoraWeights(hidden=model.spec.hidden_size, mlp=model.spec.mlp_hidden, form="fluxfast")
    for module, layer in lora_layers(model).items():
        a, b = (tensors or {}).get(module, (layer.trained.lora_A, layer.trained.lora_B))
        a, b = (tensor.detach().cpu().float() for tensor in (a, b))  # no copy on the device
        for_a, for_b = split_scale(layer.trained.scale)
        slices = layer.trained.slices()
        pieces = lora.pieces[module] = []
        for parts in _parts(model, module, layer):
            own = list(itertools.islice(slices, len(parts)))
            rows = torch.cat([b[b_rows] for _, b_rows, _ in own])
            pieces.append(Piece(parts, a[own[0][2]] * for_a, rows * for_b))
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
    cannot hold makes the whole file fp32. tensors: see `extract_lora`. Raises ConfigError for a
    format that is unknown or has no place for some of the layers, FluxfastError where there is no
    LoRA, it is not finite or the disk refuses.
    """
    known_format(format)
    lora = extract_lora(model, tensors)
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
    """Put LoRA files of any format on `model`, in place of what it may carry. Returns the
    parameters.

    Several files are summed by stacking their ranks, each times its strength (one for all, or one
    each); that of a single file stays adjustable (`set_lora_strength`). Ranks may differ between
    modules. Text encoder parts, which a transformer has no place for, are logged. Raises
    ConfigError for files that cannot be read or are not of this model.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    strengths = [strength] if isinstance(strength, int | float) else list(strength)
    alone = len(paths) == 1 and len(strengths) == 1
    lora = merged(read_all(paths, [] if alone else strengths))
    _check_fits(model, lora, ", ".join(map(str, paths)))
    for layer in lora_layers(model).values():
        layer.remove_lora()
    parameters = []
    for module, pieces in lora.pieces.items():
        layer = model.linear(module)
        update = _update(group(pieces, lora.heights(module)), _rows(model, module), True)
        layer.add_update(update)
        update.strength = strengths[0] if alone else 1.0
        parameters += update.parameters()
    return parameters


def init_lora(model: Flux, path: Path | str) -> None:
    """Start the LoRA that `model` carries from a file of any format. Where the file has less than
    the model (a linear, a rank), the model keeps what it has, which changes nothing.

    Raises ConfigError naming the setting that would take the file: rank, targets, share_a.
    """
    lora = read_lora(path)
    _check_fits(model, lora, str(path))
    layers = lora_layers(model)
    rank = max(layer.trained.lora_B.shape[1] for layer in layers.values())
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
        layer, heights = layers[module], lora.heights(module)
        trained = _parts(model, module, layer)
        pieces = split(group(pieces, heights), heights)
        if foreign := {p.parts[0] for p in pieces} - {part for parts in trained for part in parts}:
            raise ConfigError(
                f"lora.init_from: {path} has a part of {module} (of q, k, v, mlp the number "
                f"{min(foreign)}) that is not among the targets",
                hint="lora.targets: all, or include and exclude without it",
            )
        start = 0
        for index, parts in enumerate(trained):
            own = [piece for piece in pieces if piece.parts[0] in parts]
            if own:
                piece = fuse(own, heights, parts)
                if piece.rank > rank:
                    raise ConfigError(
                        f"lora.init_from: {path} has an A for each part of {module}, with "
                        "lora.share_a there is one",
                        hint="--set lora.share_a=false",
                    )
                b = piece.b / layer.trained.scale
                with torch.no_grad():
                    layer.trained.lora_A[index * rank : index * rank + piece.rank] = piece.a
                    layer.trained.lora_B[start : start + len(b), : piece.rank] = b
            start += sum(heights[part] for part in parts)


def load_assistant(model: Flux, path: Path | str) -> None:
    """Put a LoRA file on `model` as a frozen part of its linears, beside the LoRA that it carries
    already: it acts while training (`set_assisted`) and is not among what is saved.

    Raises ConfigError for a file that cannot be read or is not of this model.
    """
    lora = read_lora(path)
    _check_fits(model, lora, str(path))
    for module, pieces in lora.pieces.items():
        layer, heights = model.linear(module), lora.heights(module)
        trained = _parts(model, module, layer) if layer.lora is not None else []
        pieces = split(pieces, heights)
        free = {piece.parts for piece in pieces} - {(p,) for parts in trained for p in parts}
        part_sets = sorted([*trained, *free])
        if any(one[-1] >= other[0] for one, other in itertools.pairwise(part_sets)):
            raise ConfigError(
                f"model.assistant_lora changes a part of {module} that lies between parts trained "
                "with one A",
                hint="lora.share_a: false",
            )
        aligned = []
        for parts in part_sets:
            own = [piece for piece in pieces if piece.parts[0] in parts]
            rows = sum(heights[part] for part in parts)
            empty = Piece(parts, torch.zeros(0, layer.in_features), torch.zeros(rows, 0))
            aligned.append(fuse(own, heights, parts) if own else empty)
        layer.add_update(_update(aligned, _rows(model, module), False))


# ---------------------------------------------------------------- between pieces and layers


def _rows(model: Flux, module: str) -> list[tuple[int, int]]:
    """Of each part of a linear."""
    if "_blocks." in module:
        return part_rows(module, model.spec)
    return [(0, model.linear(module).out_features)]


def _parts(model: Flux, module: str, layer: LoRALinear) -> list[tuple[int, ...]]:
    """Per A of the layer: the parts that it feeds."""
    rows = _rows(model, module)
    return [tuple(rows.index((a, b)) for a, b in ranges) for ranges in layer.trained.parts]


def _update(pieces: list[Piece], rows: list[tuple[int, int]], trainable: bool) -> LowRankUpdate:
    """Of pieces that share no row, lower ranks padded with zeros."""
    rank = max(piece.rank for piece in pieces)
    a = torch.cat([F.pad(piece.a, (0, 0, 0, rank - piece.rank)) for piece in pieces])
    b = torch.cat([F.pad(piece.b, (0, rank - piece.rank)) for piece in pieces])
    ranges = [[rows[part] for part in piece.parts] for piece in pieces]
    return LowRankUpdate(a, b, ranges, 1.0, trainable)


def _check_fits(model: Flux, lora: LoraWeights, name: str) -> None:
    """Raise ConfigError where the file's factors are not of this model; log what is not applied."""
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
            layer = model.linear(module)
        except AttributeError:
            raise ConfigError(
                f"{name} has {module}, which this model (with {spec.depth} double and "
                f"{spec.depth_single_blocks} single blocks) has not"
            ) from None
        for piece in pieces:
            whole = "_blocks." in module or piece.b.shape[0] == layer.out_features
            if piece.a.shape[1] != layer.in_features or not whole:
                raise ConfigError(f"the factors of {name} for {module} do not fit this model")
    if lora.text:
        log.warning(f"note: {name}: what it changes of the text encoders is not applied")
