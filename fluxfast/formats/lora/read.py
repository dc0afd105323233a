"""LoRA files in: whatever their format, one `Lora`. What is told apart is told by keys and shapes,
never by a file's name.
"""

import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.formats.container import all_finite
from fluxfast.formats.lora.names import Place, foreign_kind, form_of, parse
from fluxfast.formats.lora.update import Lora, Piece, split_scale, widths
from fluxfast.formats.opened import Files
from fluxfast.model.names import SWAPPED, linear_shape
from fluxfast.model.spec import FluxSpec, rope_axes

log = logging.getLogger(__name__)

_IN_A_FOLDER = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_OTHER_MODELS = [
    ("FLUX.2", r"double_stream_modulation|single_stream_modulation|to_qkv_mlp_proj"),
    ("Chroma", r"distilled_guidance_layer"),
    ("Stable Diffusion 3", r"joint_blocks"),
    ("HunyuanVideo", r"img_mlp[._]fc\d|img_mod[._]linear|token_refiner"),
    (
        "Stable Diffusion 1.5 or SDXL",
        r"(down|up|input|output)_blocks|mid_block|middle_block|lora_te2_text_model",
    ),
]
_SD3_WIDTHS = (1536, 2432)  # medium, large
_FLOATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # fmt: skip
_INTEGERS = (torch.int64, torch.int32, torch.int16)


def read_lora(path: Path | str, *, drop: bool = False) -> Lora:
    """Read a LoRA file of any format, fp32, alpha folded in.

    path: a .safetensors file, or a folder that peft or diffusers saved one into, or with only one
    such file. drop: leave out keys that have no place in FLUX.1, with a warning, instead of
    refusing them. Raises ConfigError for a file that cannot be read or is no LoRA of FLUX.1,
    naming what it is where that can be told.
    """
    path = _file(Path(path))
    with Files([path]) as files:
        places = _places(path, files.entries, drop)  # before anything is read
        tensors = {key: files.read(key) for key in places}
        return _lora(path, tensors, places, files.metadata)


def from_tensors(
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    path: Path | str,
    *,
    drop: bool = False,
) -> Lora:
    """The same of what a file holds; `path` is named in errors."""
    return _lora(path, tensors, _places(path, tensors, drop), metadata)


def _lora(path: Path | str, tensors: dict, places: dict, metadata: dict[str, str]) -> Lora:
    lora = _assemble(path, tensors, places, _peft_scale(path, metadata))
    lora.metadata = metadata
    _check_shapes(path, lora)
    return lora


def ranks_of(path: Path | str) -> dict[str, int]:
    """BFL linear -> the highest rank of a factor that the file has for it, from its header alone.

    Raises ConfigError for a file that cannot be read.
    """
    ranks: dict[str, int] = {}
    with Files([_file(Path(path))]) as files:
        for key, entry in files.entries.items():
            role, place = parse(key) or ("", None)
            if role == "down" and "/" not in place.module and entry.shape:
                ranks[place.module] = max(ranks.get(place.module, 0), entry.shape[0])
    return ranks


# ---------------------------------------------------------------- the file


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _IN_A_FOLDER:
        if (path / name).is_file():
            return path / name
    files = list(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    raise ConfigError(
        f"{path} is a folder without {' or '.join(_IN_A_FOLDER)}, and with {len(files)} other "
        ".safetensors files",
        hint="name the LoRA's file",
    )


# ---------------------------------------------------------------- keys


def _places(path: Path | str, keys: Iterable[str], drop: bool) -> dict[str, tuple[str, Place]]:
    """Key -> role and place, of the keys that have one. Raises ConfigError for the others, or with
    drop logs them.
    """
    places, unknown, taken = {}, [], {}
    for key in keys:
        if kind := foreign_kind(key):
            raise ConfigError(
                f"{path} is a {kind} (it has {key}), not a plain LoRA: it cannot be read",
                hint="its trainer may export a plain LoRA of the same training",
            )
        found = parse(key)
        if found is None:
            unknown.append(key)
            continue
        role, place = found
        if other := taken.get((role, place.module, place.parts)):
            raise ConfigError(f"{path} says the same twice: {other} and {key}")
        taken[role, place.module, place.parts] = key
        places[key] = role, place
    if unknown and drop and places and not other_lora(unknown):
        log.warning(f"note: {path}: left out {_some(unknown)}: no place in FLUX.1")
    elif unknown or not any(role == "down" for role, _ in places.values()):
        raise ConfigError(*_unknown(path, unknown or list(places)))
    return places


def other_lora(keys: list[str]) -> str | None:
    """The name of the model whose LoRA has such keys, where it is known; None for FLUX.1's."""
    patterns = ((model, re.compile(pattern)) for model, pattern in _OTHER_MODELS)
    return next((model for model, found in patterns if any(map(found.search, keys))), None)


def _unknown(path: Path, keys: list[str]) -> tuple[str, str | None]:
    if not keys:
        return f"{path} is not a LoRA of FLUX.1: it holds no tensors", None
    if model := other_lora(keys):
        return f"{path} is a LoRA of {model}, not of FLUX.1 (it has {_some(keys)})", None
    return (
        f"{path} is not a LoRA of FLUX.1: no place here for {_some(keys)}",
        "`fluxfast convert --drop` leaves such keys out, if the rest is of FLUX.1",
    )


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    return ", ".join(keys[:2]) + more


# ---------------------------------------------------------------- alpha that peft keeps elsewhere


def _peft_scale(path: Path, metadata: dict) -> Callable[[str, int], float]:
    """(key, rank) -> scale where there is no alpha beside the factors: from the configuration that
    peft saves in the same folder, or diffusers in the header; else 1.
    """
    config, prefixes, path = {}, ("",), Path(path)
    file = path.with_name("adapter_config.json")
    try:
        if path.name == "adapter_model.safetensors" and file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
        elif "lora_adapter_metadata" in metadata:
            config = json.loads(metadata["lora_adapter_metadata"])
            prefixes = ("transformer.", "text_encoder.")
        scales = {prefix: _scale_of(config, prefix) for prefix in prefixes}
        dora = any(config.get(f"{prefix}use_dora") for prefix in prefixes)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: its peft configuration cannot be read: {error}") from None
    if dora:
        raise ConfigError(f"{path} is a DoRA (its peft configuration says so), not a plain LoRA")

    def scale(key: str, rank: int) -> float:
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        return 1.0 if prefix is None else scales[prefix](key, rank)

    return scale


def _scale_of(config: dict, prefix: str) -> Callable[[str, int], float]:
    alpha, patterns = config.get(f"{prefix}lora_alpha"), config.get(f"{prefix}alpha_pattern") or {}
    alpha = None if alpha is None else _finite(alpha)
    # the first that fits counts
    values = {
        _plain_name(name): (place, _finite(value))
        for place, (name, value) in reversed([*enumerate(patterns.items())])
    }
    root = bool(config.get(f"{prefix}use_rslora"))

    def scale(key: str, rank: int) -> float:
        # as the model has it: a pattern may begin with ^
        module = key.removeprefix(prefix or "base_model.model.").partition(".lora_A")[0]
        ends = [module[start:] for start in (0, *(m.end() for m in re.finditer(r"\.", module)))]
        fitting = [values[name] for name in (f"^{module}", *ends) if name in values]
        value = min(fitting)[1] if fitting else alpha
        return 1.0 if value is None else value / (math.sqrt(rank) if root else rank)

    return scale


def _plain_name(pattern: str) -> str:
    """The same without escapes. peft takes it for a regular expression, which a stranger may have
    written to never end: ValueError for more than a name or the end of one.
    """
    name = pattern.removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"\^?[\w.-]+", name):
        raise ValueError(f"alpha_pattern has {pattern[:60]!r}, which is no module's name")
    return name


def _finite(value: object) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"alpha is {value!r}")
    return number


# ---------------------------------------------------------------- tensors


def _assemble(path: Path, tensors: dict, places: dict, scale_of: Callable) -> Lora:
    lora = Lora(form=form_of([p for _, p in places.values()], {r for r, _ in places.values()}))
    found: dict[tuple, dict[str, str]] = defaultdict(dict)
    swaps = set()
    for key, (role, place) in places.items():
        if role == "norm":
            lora.norms[place.module] = _vector(path, key, tensors)
        elif role != "shape":  # alpha may be spelt otherwise than the factors
            found[place.module, place.parts][role] = key
            if place.swapped:
                swaps.add((place.module, place.parts))
    for (module, parts), keys in found.items():
        order = _swap if (module, parts) in swaps else (lambda tensor: tensor)
        bias, scale = None, 1.0
        if "bias" in keys:
            bias = _vector(path, keys["bias"], tensors)
        if keys.keys() != {"bias"}:
            a, b = _factors(path, keys, tensors)
            if bias is not None and bias.shape != b.shape[:1]:
                raise ConfigError(f"{path}: {keys['bias']} has shape {list(bias.shape)}")
            rank = a.shape[0]
            alpha = _alpha(path, keys["alpha"], tensors) if "alpha" in keys else None
            scale = scale_of(keys["down"], rank) if alpha is None else alpha / rank
            for_a, for_b = split_scale(scale)
            table = lora.text if "/" in module else lora.pieces
            others = {part for piece in table.get(module, []) for part in piece.parts}
            if others & set(parts):  # some files hold one LoRA in two formats
                raise ConfigError(f"{path} says the same twice: {module}, under {keys['down']} too")
            table.setdefault(module, []).append(Piece(parts, a * for_a, order(b) * for_b))
        if bias is not None:
            # the up factor's own, which its scale goes for; ComfyUI's `diff_b` is added as it is
            bias = bias if keys["bias"].endswith(".diff_b") else bias * scale
            lora.biases.setdefault(module, []).append((parts, order(bias)))
    return lora


def _factors(path: Path, keys: dict[str, str], tensors: dict) -> tuple[Tensor, Tensor]:
    """-> A [R, K], B [N, R] as stored, in fp32."""
    if not {"down", "up"} <= keys.keys():
        raise ConfigError(
            f"{path}: {next(iter(keys.values()))} has no partner: a LoRA has two factors for each "
            "linear"
        )
    a, b = (_matrix(path, keys[role], tensors) for role in ("down", "up"))
    if a.shape[0] != b.shape[1] or not a.numel() or not b.numel():
        raise ConfigError(
            f"{path}: {keys['down']} {list(a.shape)} and {keys['up']} {list(b.shape)} do not fit "
            "each other"
        )
    return a, b


def _number(path: Path, key: str, tensors: dict) -> Tensor:
    tensor = tensors[key]
    if tensor.dtype not in _FLOATS:
        raise ConfigError(f"{path}: {key} is stored as {tensor.dtype}, which is no LoRA's")
    tensor = tensor.float()
    if not all_finite(tensor):
        raise ConfigError(f"{path}: {key} holds NaN or infinity")
    return tensor


def _vector(path: Path, key: str, tensors: dict) -> Tensor:
    tensor = _number(path, key, tensors)
    if tensor.ndim != 1 or not tensor.numel():
        raise ConfigError(f"{path}: {key} has shape {list(tensor.shape)}, not one dimension")
    return tensor


def _matrix(path: Path, key: str, tensors: dict) -> Tensor:
    tensor = _number(path, key, tensors)
    if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):  # a 1x1 convolution is a linear
        tensor = tensor[:, :, 0, 0]
    if tensor.ndim != 2:
        raise ConfigError(f"{path}: {key} has shape {list(tensor.shape)}, not two dimensions")
    return tensor


def _alpha(path: Path, key: str, tensors: dict) -> float:
    tensor = tensors[key]
    known = tensor.numel() == 1 and tensor.dtype in (*_FLOATS, *_INTEGERS)
    if not known or not math.isfinite(value := tensor.float().item()):
        raise ConfigError(f"{path}: {key} is not one number")
    return value


def _swap(tensor: Tensor) -> Tensor:
    """[scale, shift] <-> [shift, scale], along the rows."""
    return torch.cat(tensor.chunk(2)[::-1])


# ---------------------------------------------------------------- shapes


def _check_shapes(path: Path, lora: Lora) -> None:
    """Fill in the widths; every factor must have those of one and the same FLUX.1."""
    shapes = {
        module: [(piece.parts, piece.b.shape[0], piece.a.shape[1]) for piece in pieces]
        for module, pieces in lora.pieces.items()
    }
    if any(rows % 2 for _, rows, _ in shapes.get(SWAPPED, [])):
        raise ConfigError(f"{path} does not fit FLUX.1: {SWAPPED} has two halves of rows")
    hidden, mlp = widths(shapes)
    if hidden in _SD3_WIDTHS and not any(name.startswith("single_") for name in lora.pieces):
        raise ConfigError(f"{path} is a LoRA of Stable Diffusion 3, not of FLUX.1")
    if not hidden:
        return
    if hidden % 2 or mlp < 1:
        raise ConfigError(f"{path} does not fit FLUX.1: a hidden size of {hidden}, an MLP of {mlp}")
    lora.hidden, lora.mlp = hidden, mlp
    spec = FluxSpec(
        hidden_size=hidden, mlp_ratio=mlp / hidden, num_heads=1, axes_dim=rope_axes(hidden)
    )
    for module, found in shapes.items():
        rows, columns = linear_shape(module, spec)
        for parts, got_rows, got_columns in found:
            heights = lora.heights(module)
            want = sum(heights[part] for part in parts) if heights else rows
            # what lies outside the blocks has inputs that variants of the model widen
            free = "_blocks." not in module
            if (got_rows != want and module != "final_layer.linear") or (
                got_columns != columns and not free
            ):
                raise ConfigError(
                    f"{path} does not fit FLUX.1: {module} takes {columns} and gives {want} in a "
                    f"transformer {hidden} wide, its factors {got_columns} and {got_rows}"
                )
    for module, biases in lora.biases.items():
        heights = lora.heights(module)
        for parts, bias in biases:
            want = sum(heights[p] for p in parts) if heights else linear_shape(module, spec)[0]
            if bias.shape != (want,) and module != "final_layer.linear":
                raise ConfigError(f"{path}: the bias of {module} has shape {list(bias.shape)}")
