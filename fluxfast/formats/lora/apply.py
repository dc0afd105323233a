"""Loads LoRA files of any format onto a model, and saves what it carries in any format.

Alpha is folded in both ways: a file means B A.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxfast.config.schema import SampleLoRA
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.container import all_finite
from fluxfast.formats.lora.read import read_all, read_lora
from fluxfast.formats.lora.update import (
    LoraWeights,
    Piece,
    at_rank,
    balanced,
    fuse,
    group,
    merged,
    overlap,
    split,
    split_scale,
)
from fluxfast.formats.lora.write import to_bytes, to_state
from fluxfast.model.flux import Flux
from fluxfast.model.lora import lora_layers
from fluxfast.model.lora_linear import LoRALinear, LowRankUpdate
from fluxfast.model.names import part_rows
from fluxfast.util.files import write_atomic
from fluxfast.util.hub import fetch_lora

log = logging.getLogger(__name__)


def extract_lora(
    model: Flux, tensors: dict[str, tuple[Tensor, Tensor]] | None = None
) -> LoraWeights:
    """Returns the model's LoRA on the CPU in fp32.

    tensors: BFL name -> (A, B) to take instead of the model's own (an average of them, say).
    """
    spec = model.spec
    lora = LoraWeights(hidden=spec.hidden_size, mlp=spec.mlp_hidden, spec=spec, form="fluxfast")
    for module, layer in lora_layers(model).items():
        a, b = (tensors or {}).get(module, (layer.lora.lora_A, layer.lora.lora_B))
        a, b = (tensor.detach().cpu().float() for tensor in (a, b))  # no copy on the device
        for_a, for_b = split_scale(layer.lora.scale)
        slices = layer.lora.slices()
        pieces = lora.pieces[module] = []
        for parts in _parts(model, module, layer):
            _, b_rows, a_rows = zip(*itertools.islice(slices, len(parts)), strict=True)
            rows = {part: b[own] * for_b for part, own in zip(parts, b_rows, strict=True)}
            pieces.append(Piece(a[a_rows[0]] * for_a, rows))
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
    """Writes the model's LoRA, whole or not at all (a temporary file beside it, then a rename).

    format: diffusers, kohya, comfyui, xlabs or bfl. dtype: fp32, fp16 or bf16; a tensor that fp16
    cannot hold makes the whole file fp32. tensors: see `extract_lora`. Raises ConfigError for a
    format that is unknown or cannot hold some of the layers, FluxfastError if there is no
    LoRA, it is not finite or the disk refuses.
    """
    lora = extract_lora(model, tensors)
    if not lora.pieces:
        raise FluxfastError("the model carries no LoRA to save")
    for module, pieces in lora.pieces.items():
        if not all(all_finite(side) for piece in pieces for side in (piece.a, *piece.b.values())):
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
    """Puts LoRA files of any format on `model`, in place of its LoRA. Returns the parameters.

    Several files are summed by stacking their ranks, each times its strength (one for all, or one
    each); that of a single file stays adjustable (`set_lora_strength`). Ranks may differ between
    modules. Text encoder parts are not applied, which is logged. Raises ConfigError for files that
    cannot be read or are not of this model.
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
        update = _update(group(pieces), part_rows(module, model.spec), trainable=True)
        model.linear(module).add_update(update)
        update.strength = strengths[0] if alone else 1.0
        parameters += update.parameters()
    return parameters


def init_lora(model: Flux, path: Path | str) -> None:
    """Starts the LoRA that `model` carries from a file of any format. Where the file has less than
    the model (a linear, a rank), the model keeps its own, which changes nothing.

    Raises ConfigError naming the setting that would allow the file: rank, targets, share_a.
    """
    lora = read_lora(path)
    _check_fits(model, lora, str(path))
    layers, heights = lora_layers(model), lora.heights
    rank = max(layer.lora.lora_B.shape[1] for layer in layers.values())
    if lora.rank() != rank:
        raise ConfigError(
            f"lora.init_from: {path} has rank {lora.rank()}, lora.rank is {rank}",
            hint=f"--set lora.rank={lora.rank()}",
        )
    for module, pieces in lora.pieces.items():
        layer = layers.get(module)
        trained = _parts(model, module, layer) if layer else []
        pieces = split(group(pieces))
        foreign = {p.parts[0] for p in pieces} - {part for parts in trained for part in parts}
        if layer is None or foreign:
            part = f"part {min(foreign)} (of q, k, v, mlp) of " if layer else ""
            raise ConfigError(
                f"lora.init_from: {path} has {part}{module}, which is not among the targets",
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
                b = piece.stacked_b() / layer.lora.scale
                with torch.no_grad():
                    layer.lora.lora_A[index * rank : index * rank + piece.rank] = piece.a
                    layer.lora.lora_B[start : start + len(b), : piece.rank] = b
            start += sum(heights[part] for part in parts)


def load_assistant(model: Flux, path: Path | str) -> None:
    """Adds a LoRA file to `model` as a frozen part of its linears, beside the LoRA that it carries:
    it acts while training (`set_assisted`) and is not saved.

    Raises ConfigError for a file that cannot be read or is not of this model.
    """
    for module, update in _frozen(model, read_lora(path), str(path), "model.assistant_lora"):
        model.linear(module).add_update(update)


@contextmanager
def sampling_loras(model: Flux, loras: Sequence[SampleLoRA]) -> Iterator[None]:
    """Inside, LoRA files act beside the LoRA that `model` trains, added up, each times its
    strength. Raises as `load_assistant` does.
    """
    files = [fetch_lora(each.file) for each in loras]
    pairs = []
    if files:
        lora = merged(read_all(files, [each.strength for each in loras]))
        names = ", ".join(map(str, files))
        pairs = list(_frozen(model, lora, names, "sample.loras"))
    try:
        for module, update in pairs:
            model.linear(module).add_update(update)
        yield
    finally:
        for module, update in pairs:
            model.linear(module).remove_updates([update])


def _frozen(
    model: Flux, lora: LoraWeights, name: str, key: str
) -> Iterator[tuple[str, LowRankUpdate]]:
    """Yields module and frozen update of a LoRA, with an A where the trained LoRA has one. name: of
    the file; key: the setting that names it.
    """
    _check_fits(model, lora, name)
    for module, pieces in lora.pieces.items():
        layer = model.linear(module)
        trained = _parts(model, module, layer) if layer.lora is not None else []
        pieces = split(pieces)
        free = {piece.parts for piece in pieces} - {(p,) for parts in trained for p in parts}
        part_sets = sorted([*trained, *free])
        if overlap(part_sets):
            raise ConfigError(
                f"{key} changes a part of {module} that lies between parts trained with one A",
                hint="lora.share_a: false",
            )
        nothing = Piece(torch.zeros(0, layer.in_features), {})
        aligned = [
            fuse([p for p in pieces if p.parts[0] in parts] or [nothing], lora.heights, parts)
            for parts in part_sets
        ]
        yield module, _update(aligned, part_rows(module, model.spec), trainable=False)


# ---------------------------------------------------------------- between pieces and layers


def _parts(model: Flux, module: str, layer: LoRALinear) -> list[tuple[int, ...]]:
    """Returns the parts that each A of the layer feeds."""
    rows = part_rows(module, model.spec)
    return [tuple(rows.index((a, b)) for a, b in ranges) for ranges in layer.lora.parts]


def _update(pieces: list[Piece], rows: list[tuple[int, int]], trainable: bool) -> LowRankUpdate:
    """Builds the update of pieces that share no row; lower ranks are padded with zeros."""
    rank = max(piece.rank for piece in pieces)
    padded = [at_rank(piece, rank) for piece in pieces]
    a = torch.cat([piece.a for piece in padded])
    b = torch.cat([piece.stacked_b() for piece in padded])
    ranges = [[rows[part] for part in piece.parts] for piece in pieces]
    return LowRankUpdate(a, b, ranges, 1.0, trainable)


def _check_fits(model: Flux, lora: LoraWeights, name: str) -> None:
    """Raises ConfigError if the factors are not of this model; logs what is not applied."""
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
                f"{spec.depth_single_blocks} single blocks) lacks"
            ) from None
        for piece in pieces:
            whole = "_blocks." in module or len(piece.stacked_b()) == layer.out_features
            if piece.a.shape[1] != layer.in_features or not whole:
                raise ConfigError(f"the factors of {name} for {module} do not fit this model")
    if lora.text:
        log.warning(f"note: {name}: its update of the text encoders is not applied")
    if words := sorted({key.split(".")[1] for key in lora.embeddings}):
        log.warning(f"note: {name}: its own embedding of {', '.join(words)} is not applied")
