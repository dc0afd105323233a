"""Reads LoRA files of any format into `LoraWeights`. Formats are told apart by keys and shapes,
never by a file's name.
"""

import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.formats.base.detect import find_naming, other_model
from fluxfast.formats.container import all_finite, safetensors_in
from fluxfast.formats.lora.names import LoraKey, foreign_kind, form_of, of_linear, parse
from fluxfast.formats.lora.update import (
    LoraWeights,
    Piece,
    scaled,
    split_scale,
    swap_halves,
    without_padding,
)
from fluxfast.formats.opened import Files
from fluxfast.model.names import SWAPPED, linear_shape, part_rows
from fluxfast.model.spec import FluxSpec, rope_axes

log = logging.getLogger(__name__)

_IN_A_FOLDER = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_FROM_MLP = ("img_mlp.2", "txt_mlp.2", "linear2")  # their inputs are the MLP's, at least in part
_OTHER_MODELS = {
    "FLUX.2": r"double_stream_modulation|single_stream_modulation|to_qkv_mlp_proj",
    "Chroma": r"distilled_guidance_layer",
    "Stable Diffusion 3": r"joint_blocks",
    "HunyuanVideo": r"img_mlp[._]fc\d|img_mod[._]linear|token_refiner",
    "Stable Diffusion 1.5 or SDXL": (
        r"(down|up|input|output)_blocks|mid_block|middle_block|lora_te2_text_model"
    ),
}
_SD3_WIDTHS = (1536, 2432)  # medium, large
_CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga")  # peft's starts, taken out of the base
_FILLED_UP = ("bfl", "bfl control", "xlabs")  # formats with linears of zeros for those without
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_FLOATS |= {torch.float8_e4m3fn, torch.float8_e5m2}
_INTEGERS = {torch.int64, torch.int32, torch.int16}

_Linear = tuple[str, tuple[int, ...]]  # module and parts, see LoraKey


def read_lora(path: Path | str, *, drop: bool = False) -> LoraWeights:
    """Reads a LoRA file of any format as fp32, alpha folded in.

    path: a .safetensors file, or a folder that peft or diffusers saved one into, or with only one
    such file. drop: leave out keys that FLUX.1 does not have, with a warning, instead of refusing
    them. Raises ConfigError for a file that cannot be read or is no LoRA of FLUX.1,
    naming what it is if that is known.
    """
    path = _file(Path(path))
    with Files([path]) as files:
        return _read(path, files.entries, files.read, files.metadata, drop)


def from_tensors(
    tensors: dict[str, Tensor], metadata: dict[str, str], path: Path | str, *, drop: bool = False
) -> LoraWeights:
    """Reads a LoRA from a file's tensors; `path` is named in errors."""
    return _read(path, tensors, tensors.__getitem__, metadata, drop)


def read_all(
    paths: Sequence[Path | str], strengths: Sequence[float] = (), *, drop: bool = False
) -> list[LoraWeights]:
    """Reads each file times its strength: no strengths are 1, one strength is for all."""
    if len(strengths) not in (0, 1, len(paths)):
        raise ConfigError(f"{len(strengths)} strengths for {len(paths)} LoRAs: give one for each")
    strengths = list(strengths or [1.0]) * (1 if len(strengths) > 1 else len(paths))
    pairs = zip(paths, strengths, strict=True)
    return [scaled(read_lora(path, drop=drop), strength) for path, strength in pairs]


def ranks_of(path: Path | str) -> dict[str, int]:
    """Returns the highest rank of each BFL linear's factors, from the file's header alone.

    Raises ConfigError for a file that cannot be read.
    """
    ranks: dict[str, int] = {}
    with Files([_file(Path(path))]) as files:
        for name, entry in files.entries.items():
            key = parse(name)
            if key and key.role == "down" and "/" not in key.module and entry.shape:
                ranks[key.module] = max(ranks.get(key.module, 0), entry.shape[0])
    return ranks


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _IN_A_FOLDER:
        if (path / name).is_file():
            return path / name
    files = safetensors_in(path)
    if len(files) == 1:
        return files[0]
    raise ConfigError(
        f"{path} is a folder without {' or '.join(_IN_A_FOLDER)}, and with {len(files)} other "
        ".safetensors files",
        hint="name the LoRA's file",
    )


# ---------------------------------------------------------------- keys


def _parse_all(path: Path | str, names: Collection[str], drop: bool) -> dict[str, LoraKey]:
    """Returns the parsed keys that FLUX.1 has.

    Raises ConfigError for the others, or with drop logs them.
    """
    keys, unknown, taken = {}, [], {}
    for name in names:
        if kind := foreign_kind(name):
            raise _not_plain(path, kind, name)
        if (key := parse(name)) is None:
            unknown.append(name)
            continue
        if other := taken.get(key[:3]):
            raise ConfigError(f"{path} has the same twice: {other} and {name}")
        taken[key[:3]] = name
        keys[name] = key
    factors = any(key.role == "down" for key in keys.values())
    if factors and (name := next(filter(of_linear, unknown), None)):
        # without it the factors of that linear mean something else
        raise _not_plain(path, "LoRA with more than factors", name)
    if unknown and drop and factors and not other_lora(unknown):
        log.warning(f"note: {path}: left out {_some(unknown)}, which FLUX.1 does not have")
    elif unknown or not factors:
        what = "FLUX.1 transformer" if find_naming(names) else other_model(names)
        if what and what != "LoRA":
            raise ConfigError(
                f"{path} is not a LoRA of FLUX.1: it is a {what}",
                hint="name the file of a LoRA; a base goes into model.path, or --model",
            )
        raise _not_flux_lora(path, unknown or list(keys), factors)
    return keys


def _not_plain(path: Path | str, kind: str, name: str) -> ConfigError:
    return ConfigError(
        f"{path} is a {kind} (it has {name}), not a plain LoRA: it cannot be read",
        hint="its trainer may export a plain LoRA of the same training",
    )


def other_lora(names: list[str]) -> str | None:
    """Returns the model whose LoRAs have such keys if it is known, None for FLUX.1."""
    patterns = ((model, re.compile(pattern)) for model, pattern in _OTHER_MODELS.items())
    return next((model for model, pattern in patterns if any(map(pattern.search, names))), None)


def _not_flux_lora(path: Path | str, names: list[str], partly: bool) -> ConfigError:
    if not names:
        return ConfigError(f"{path} is not a LoRA of FLUX.1: it holds no tensors")
    if model := other_lora(names):
        return ConfigError(f"{path} is a LoRA of {model}, not of FLUX.1 (it has {_some(names)})")
    hint = "the rest is of FLUX.1: `fluxfast convert --drop` writes a file without such keys"
    return ConfigError(
        f"{path} is not a LoRA of FLUX.1: unknown keys {_some(names)}",
        hint=hint if partly else None,
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


# ---------------------------------------------------------------- alpha in peft's configuration


def _peft_scale(path: Path | str, metadata: dict) -> Callable[[str, int], float]:
    """Returns a function (key, rank) -> scale for factors without an alpha beside them: from the
    configuration that peft saves in the same folder, or diffusers in the header; else 1.
    """
    path, scales = Path(path), {}
    file = path.with_name("adapter_config.json")
    try:
        if path.name == "adapter_model.safetensors" and file.is_file():
            scales[""] = _scale_of(json.loads(file.read_text(encoding="utf-8")), "")
        elif "lora_adapter_metadata" in metadata:
            config = json.loads(metadata["lora_adapter_metadata"])
            for prefix in ("transformer.", "text_encoder."):
                scales[prefix] = _scale_of(config, prefix)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: its peft configuration cannot be read: {error}") from None

    def scale(key: str, rank: int) -> float:
        fitting = (scale for prefix, scale in scales.items() if key.startswith(prefix))
        return next((scale(key, rank) for scale in fitting), 1.0)

    return scale


def _scale_of(config: dict, prefix: str) -> Callable[[str, int], float]:
    if config.get(f"{prefix}use_dora"):
        raise ValueError("it is a DoRA, not a plain LoRA")
    start = str(config.get(f"{prefix}init_lora_weights")).lower()
    if start.startswith(_CHANGED_BASES):
        raise ValueError(f"it belongs to a base that {start} changed, not to the model's own")
    alpha, patterns = config.get(f"{prefix}lora_alpha"), config.get(f"{prefix}alpha_pattern") or {}
    alpha = None if alpha is None else _finite(alpha)
    # the first pattern that matches counts
    values = {
        _plain_name(name): (index, _finite(value))
        for index, (name, value) in reversed([*enumerate(patterns.items())])
    }
    root = bool(config.get(f"{prefix}use_rslora"))

    def scale(key: str, rank: int) -> float:
        # the model's own name: a pattern may begin with ^
        module = key.removeprefix(prefix or "base_model.model.").partition(".lora_A")[0]
        ends = [module[start:] for start in (0, *(m.end() for m in re.finditer(r"\.", module)))]
        matching = [values[name] for name in (f"^{module}", *ends) if name in values]
        value = min(matching)[1] if matching else alpha
        return 1.0 if value is None else value / (math.sqrt(rank) if root else rank)

    return scale


def _plain_name(pattern: str) -> str:
    """Returns the pattern without escapes. peft evaluates it as a regular expression, which a
    malicious file may use to hang the reader: ValueError unless it is a name or the end of one.
    """
    name = pattern.removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"\^?[\w.-]+", name):
        raise ValueError(f"alpha_pattern has {pattern[:60]!r}, which is no module's name")
    return name


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"alpha is {value!r}")
    return number


# ---------------------------------------------------------------- tensors


def _read(
    path: Path | str,
    entries: Mapping[str, Any],
    read: Callable[[str], Tensor],
    metadata: dict[str, str],
    drop: bool,
) -> LoraWeights:
    """entries: name -> something with a shape, as the file's header has it."""
    keys = _parse_all(path, entries, drop)
    linears: dict[_Linear, dict[str, str]] = defaultdict(dict)  # role -> name
    for name, key in keys.items():
        if key.role not in ("norm", "shape", "embedding"):  # alpha may have another spelling
            linears[key.module, key.parts][key.role] = name
    swapped = {key.module for key in keys.values() if key.swapped}
    spec = _transformer(path, _shapes(linears, entries))
    file = _Checked(path, read)
    peft_scale = _peft_scale(path, metadata)
    lora = LoraWeights(form=form_of(keys.values()), metadata=metadata)
    lora.norms = {k.module: file.floats(name, 1) for name, k in keys.items() if k.role == "norm"}
    lora.embeddings = {name: read(name) for name, k in keys.items() if k.role == "embedding"}
    if spec:
        lora.hidden, lora.mlp = spec.hidden_size, spec.mlp_hidden
    for (module, parts), roles in linears.items():
        order = swap_halves if module in swapped else (lambda rows: rows)
        heights = _heights(module, parts, spec)
        scale, rows = 1.0, heights and sum(heights)
        if roles.keys() != {"bias"}:
            a, b = file.factors(roles)
            rank, rows = b.shape[1], b.shape[0]
            scale = peft_scale(roles["down"], rank)
            if "alpha" in roles:
                scale = file.alpha(roles["alpha"]) / rank
            table = lora.text if "/" in module else lora.pieces
            if any(piece.b.keys() & set(parts) for piece in table.get(module, [])):
                # some files hold one LoRA in two formats
                raise ConfigError(f"{path} has the same twice: {module}, under {roles['down']} too")
            (for_a, for_b), (a, b) = split_scale(scale), without_padding(a, b)
            piece = Piece(a * for_a, _by_part(order(b) * for_b, parts, heights))
            table.setdefault(module, []).append(piece)
        if "bias" in roles:
            bias = file.floats(roles["bias"], 1)
            if rows not in (None, len(bias)) or (spec is None and len(parts) > 1):
                raise ConfigError(f"{path}: {roles['bias']} has shape {list(bias.shape)}")
            # the up factor's own, which its scale applies to; ComfyUI's `diff_b` is added as it is
            bias = bias if roles["bias"].endswith(".diff_b") else bias * scale
            known = lora.biases.get(module, {})
            if known.keys() & set(parts):
                raise ConfigError(f"{path} has the same twice: {module}, under {roles['bias']} too")
            if bias.any():
                lora.biases[module] = known | _by_part(order(bias), parts, heights)
    if lora.form in _FILLED_UP:
        own = {m: p for m, p in lora.pieces.items() if p[0].a.any() or p[0].stacked_b().any()}
        lora.pieces = own or lora.pieces
    return lora


def _by_part(rows: Tensor, parts: tuple[int, ...], heights: list[int] | None) -> dict[int, Tensor]:
    return dict(zip(parts, rows.split(heights or len(rows)), strict=True))


class _Checked:
    """A file's tensors, in fp32. Raises ConfigError naming the file for what no LoRA holds."""

    def __init__(self, path: Path | str, read: Callable[[str], Tensor]):
        self._path, self._read = path, read

    def floats(self, name: str, dimensions: int) -> Tensor:
        """Returns a vector (dimensions 1), not empty, or a matrix (2)."""
        tensor = self._read(name)
        if tensor.dtype not in _FLOATS:
            raise self._error(f"{name} is stored as {tensor.dtype}, which no LoRA is")
        tensor = tensor.float()
        if not all_finite(tensor):
            raise self._error(f"{name} holds NaN or infinity")
        if dimensions == 2 and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]  # a 1x1 convolution is a linear
        if tensor.ndim != dimensions or (dimensions == 1 and not tensor.numel()):
            wanted = "two dimensions" if dimensions == 2 else "one dimension"
            raise self._error(f"{name} has shape {list(tensor.shape)}, not {wanted}")
        return tensor

    def factors(self, roles: dict[str, str]) -> tuple[Tensor, Tensor]:
        """Returns A [R, K] and B [N, R] as stored. roles: role -> name."""
        if not {"down", "up"} <= roles.keys():
            raise self._error(
                f"{next(iter(roles.values()))} has no partner: a LoRA has two factors for each "
                "linear"
            )
        a, b = (self.floats(roles[role], 2) for role in ("down", "up"))
        if a.shape[0] != b.shape[1] or not a.numel() or not b.numel():
            raise self._error(
                f"{roles['down']} {list(a.shape)} and {roles['up']} {list(b.shape)} "
                "do not fit each other"
            )
        return a, b

    def alpha(self, name: str) -> float:
        tensor = self._read(name)
        number = tensor.numel() == 1 and tensor.dtype in _FLOATS | _INTEGERS
        if not number or not math.isfinite(value := tensor.float().item()):
            raise self._error(f"{name} is not one number")
        return value

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self._path}: {problem}")


# ---------------------------------------------------------------- shapes


def _shapes(
    linears: Mapping[_Linear, dict[str, str]], entries: Mapping[str, Any]
) -> dict[_Linear, tuple[int, int]]:
    """Returns rows and columns of the transformer's linears, but for malformed ones, which reading
    refuses.
    """
    shapes = {}
    for linear, roles in linears.items():
        if {"down", "up"} <= roles.keys() and "/" not in linear[0]:
            up, down = (tuple(entries[roles[role]].shape) for role in ("up", "down"))
            if min(len(up), len(down)) >= 2 and up[0] and down[1]:
                shapes[linear] = up[0], down[1]
    return shapes


def _transformer(path: Path | str, shapes: dict[_Linear, tuple[int, int]]) -> FluxSpec | None:
    """Returns the sizes of the FLUX.1 that all linears fit, None if none of them lies in a block.
    Raises ConfigError if there is no such FLUX.1.
    """
    if any(module == SWAPPED and rows % 2 for (module, _), (rows, _) in shapes.items()):
        raise ConfigError(f"{path} does not fit FLUX.1: {SWAPPED} has two halves of rows")
    hidden, mlp = _widths(shapes)
    if hidden in _SD3_WIDTHS and not any(module.startswith("single_") for module, _ in shapes):
        raise ConfigError(f"{path} is a LoRA of Stable Diffusion 3, not of FLUX.1")
    if not hidden:
        return None
    if hidden % 2 or mlp < 1:
        raise ConfigError(f"{path} does not fit FLUX.1: a hidden size of {hidden}, an MLP of {mlp}")
    spec = FluxSpec(
        hidden_size=hidden, mlp_ratio=mlp / hidden, num_heads=1, axes_dim=rope_axes(hidden)
    )
    for (module, parts), (rows, columns) in shapes.items():
        needed_rows, needed_columns = _heights(module, parts, spec), linear_shape(module, spec)[1]
        # variants of the model widen the inputs outside the blocks
        fits = columns == needed_columns or "_blocks." not in module
        if not fits or (needed_rows and sum(needed_rows) != rows):
            raise ConfigError(
                f"{path} does not fit FLUX.1: {module} takes {needed_columns} and gives "
                f"{sum(needed_rows or [rows])} in a transformer {hidden} wide, its factors "
                f"{columns} and {rows}"
            )
    return spec


def _heights(module: str, parts: tuple[int, ...], spec: FluxSpec | None) -> list[int] | None:
    """Returns the rows of each part, None if there may be any number."""
    if spec is None or "/" in module or module == "final_layer.linear":
        return None
    ranges = part_rows(module, spec)
    return [ranges[part][1] - ranges[part][0] for part in parts]


def _widths(shapes: dict[_Linear, tuple[int, int]]) -> tuple[int, int]:
    """Returns (hidden, mlp) by the first linears that tell them, (0, 0) if none lies in a block."""
    blocks = [
        (module.split(".", 2)[2], parts, *shape)
        for (module, parts), shape in shapes.items()
        if "_blocks." in module
    ]
    hidden = next((rows if tail in _FROM_MLP else columns for tail, _, rows, columns in blocks), 0)
    for tail, parts, rows, columns in blocks:
        if tail in ("img_mlp.0", "txt_mlp.0"):
            return hidden, rows
        if tail in _FROM_MLP:
            return hidden, columns - hidden if tail == "linear2" else columns
        if tail == "linear1" and 3 in parts:
            return hidden, rows - (len(parts) - 1) * hidden
    return hidden, 4 * hidden
