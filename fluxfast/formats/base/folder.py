"""Reads a diffusers folder: the sizes in its config.json, and which files hold its weights.

Source: diffusers' `FluxTransformer2DModel` config and its file names.
"""

import contextlib
import json
from collections.abc import Collection
from functools import partial
from pathlib import Path

from fluxfast.errors import ConfigError
from fluxfast.formats.base.detect import (
    Naming,
    check_spec,
    count_blocks,
    find_naming,
    hint_for,
    other_model,
)
from fluxfast.formats.base.gguf import ARCHITECTURE
from fluxfast.formats.container import safetensors_in
from fluxfast.formats.opened import Files
from fluxfast.model.spec import DEV, SCHNELL, FluxSpec, rope_axes

_WHOLE = "diffusion_pytorch_model.safetensors"
_LISTED = 8  # files of a folder that are opened to name them


def transformer_folder(path: Path) -> Path:
    """Returns the transformer's folder inside a pipeline's, or `path` itself."""
    return path / "transformer" if (path / "transformer").is_dir() else path


def folder_spec(path: Path, folder: Path) -> FluxSpec:
    """Returns the sizes in the transformer folder's config.json. path: the pipeline's folder.

    Raises ConfigError for a config.json of another model, FluxfastError for impossible sizes.
    """
    file = folder / "config.json"
    if not file.exists():
        raise _no_config(folder)
    config = _read_json(file)
    if config.get("_class_name") != "FluxTransformer2DModel":
        architectures = config.get("architectures") or ["model of unknown kind"]  # transformers'
        name = str(config.get("_class_name", architectures[0]))
        raise ConfigError(
            f"{folder} holds a {name}, not a FluxTransformer2DModel", hint=hint_for(name)
        )
    guidance = bool(config.get("guidance_embeds", False))
    size = partial(_size, file, config)
    heads, head_dim = size("num_attention_heads"), size("attention_head_dim")
    # FLUX.1's own config.json leaves the axes out
    axes = config.get("axes_dims_rope") or rope_axes(head_dim)
    valid = isinstance(axes, list | tuple) and [type(axis) for axis in axes] == [int] * 3
    if not valid or min(axes) < 1:
        raise ConfigError(f"{file}: axes_dims_rope must be three positive integers, got {axes!r}")
    # dev 512, schnell 256, and never more than the pipeline's own T5 tokenizer takes
    length = (DEV if guidance else SCHNELL).text_length
    spec = FluxSpec(
        in_channels=size("in_channels"),
        vec_in_dim=size("pooled_projection_dim"),
        context_in_dim=size("joint_attention_dim"),
        hidden_size=heads * head_dim,
        num_heads=heads,
        depth=size("num_layers"),
        depth_single_blocks=size("num_single_layers"),
        axes_dim=(axes[0], axes[1], axes[2]),
        guidance_embed=guidance,
        text_length=min(length, tokenizer_length(path / "tokenizer_2") or length),
    )
    check_spec(spec, config.get("out_channels") or spec.in_channels)
    return spec


def _no_config(folder: Path) -> ConfigError:
    """Returns the error for a folder that is no diffusers model, naming what it holds."""
    index = folder / "model_index.json"
    if index.is_file():
        name = _read_json(index).get("_class_name", "pipeline")
        return ConfigError(
            f"{folder} is a {name} without a transformer folder", hint=hint_for(f"{name}")
        )
    found, hint = [], "a model in one .safetensors, .sft or GGUF file is given by the file's path"
    for file in [*safetensors_in(folder), *sorted(folder.glob("*.gguf"))][:_LISTED]:
        with contextlib.suppress(ConfigError), Files([file]) as files:
            if find_naming(files.entries):
                found, hint = [], f"give the file: {file}"
                break
            kind = other_in(files) or "unknown"
            found.append(f"{file.name} ({kind})")
            hint = hint_for(kind)
    holds = f", and holds {', '.join(found)}" if found else ""
    return ConfigError(f"{folder} has no config.json: it is no diffusers model{holds}", hint=hint)


def other_in(files: Files) -> str | None:
    """Returns the name of a model that is not FLUX.1's transformer, None if it is not known."""
    return other_model(files.entries, files.metadata.get(ARCHITECTURE))


def check_weights_match(path: Path, spec: FluxSpec, keys: Collection[str]) -> None:
    """Raises ConfigError if the weights have more than config.json says: the model would silently
    be cut short.
    """
    naming = Naming("", split=True)
    depths = spec.depth, spec.depth_single_blocks
    stored = [count_blocks(keys, naming.key(part)) for part in ("doubles", "singles")]
    guided = any(key.startswith(naming.key("guidance_in")) for key in keys)
    if stored[0] > depths[0] or stored[1] > depths[1]:
        mismatch = (
            f"has {depths[0]} double and {depths[1]} single blocks, the weights have {stored[0]} "
            f"and {stored[1]}"
        )
    elif guided and not spec.guidance_embed:
        mismatch = "says guidance_embeds: false, the weights embed guidance"
    else:
        return
    raise ConfigError(f"{path}: config.json {mismatch}", hint="the config.json is another model's")


def _size(file: Path, config: dict, key: str) -> int:
    if key not in config:
        raise ConfigError(f"{file} has no {key!r}")
    if type(config[key]) is not int or config[key] < 1:
        raise ConfigError(f"{file}: {key} must be a positive integer, got {config[key]!r}")
    return config[key]


def weight_files(folder: Path) -> list[Path]:
    """Returns the shards that the index names; without an index diffusers' own file, or else every
    .safetensors and .sft file. Raises ConfigError if there is none.
    """
    index, whole = folder / f"{_WHOLE}.index.json", folder / _WHOLE
    indices = [index] if index.is_file() else sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        return [folder / name for name in _shard_names(indices[0])]
    files = [whole] if whole.is_file() else safetensors_in(folder)
    if not files and not (folder / "config.json").is_file():
        raise _no_config(folder)
    if not files:
        method = folder_quantizer(folder)
        raise ConfigError(
            f"{folder} holds no .safetensors weights"
            + (f": its config.json says that it is quantized with {method}" if method else "")
        )
    return files


def folder_quantizer(folder: Path) -> str | None:
    """Returns the quantizer that the folder's config.json names, None for bitsandbytes' 4 bits."""
    file = folder / "config.json"
    config = _read_json(file).get("quantization_config") if file.is_file() else None
    if not isinstance(config, dict):
        return None
    method, kind = config.get("quant_method", "bitsandbytes"), config.get("quant_type")
    if method == "bitsandbytes":
        return "bitsandbytes LLM.int8" if config.get("load_in_8bit") else None
    return f"{method} {kind}" if isinstance(kind, str) else f"{method}"


def _shard_names(index: Path) -> list[str]:
    shards = _read_json(index).get("weight_map")
    if (
        not isinstance(shards, dict)
        or not shards
        or not all(isinstance(name, str) for name in shards.values())
    ):
        raise ConfigError(f"{index} does not map tensors to files under 'weight_map'")
    names = sorted(set(shards.values()))
    # a file's name, not a path that leads elsewhere
    for name in names:
        if not name.isprintable() or Path(name).name != name:
            raise ConfigError(f"{index} names {name!r}, which is no file of the folder")
    return names


def tokenizer_length(folder: Path) -> int | None:
    """Returns the longest prompt that the tokenizer in `folder` takes, None if it does not say."""
    config = folder / "tokenizer_config.json"
    content = _read_json(config) if config.is_file() else {}
    limit = content.get("model_max_length", 0)
    # transformers writes 1e30 for "no limit"
    return int(limit) if type(limit) in (int, float) and 1 <= limit < 1e9 else None


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return content
