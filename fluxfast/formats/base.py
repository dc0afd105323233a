"""Base checkpoints in: a diffusers folder (sharded or not) or one BFL safetensors file, read tensor
by tensor.

Sources of the layouts: BFL's `flux1-dev.safetensors` keys; diffusers' `FluxTransformer2DModel`
config and keys.
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxfast.errors import FluxfastError
from fluxfast.model.names import SWAPPED, linear_shape, part_rows, tensor_sources
from fluxfast.model.spec import DEV, SCHNELL, FluxSpec, rope_axes

_FLOATS = {"F64", "F32", "F16", "BF16"}
_PREFIXES = ("", "model.diffusion_model.")  # bare, and as all-in-one files have it


class BaseCheckpoint:
    """An opened base model: `spec`, and `read(BFL name)` for each of its tensors. A context
    manager.
    """

    def __init__(self, path: Path, spec: FluxSpec, files: list[Path], split: bool, prefix: str):
        self.path, self.spec, self._split, self._prefix = path, spec, split, prefix
        self._handles = [_open(file) for file in files]
        self._where = {key: handle for handle in self._handles for key in handle.keys()}  # noqa: SIM118
        self._sources = tensor_sources(spec)
        missing = [
            source
            for name, sources in self._sources.items()
            for source in (sources if split else [prefix + name])
            if source not in self._where
        ]
        if missing:
            self.close()
            raise FluxfastError(
                f"{path} is not a complete FLUX.1 transformer: {len(missing)} tensors are missing, "
                f"among them {', '.join(missing[:3])}"
            )

    def read(self, name: str) -> Tensor:
        """The tensor under its BFL name, fused, in the dtype that the file has.

        Raises FluxfastError for a shape or dtype that does not belong there.
        """
        sources = self._sources[name] if self._split else [self._prefix + name]
        module, _, kind = name.rpartition(".")
        if kind == "scale":
            shapes = [(self.spec.head_dim,)]
        else:
            rows, *columns = linear_shape(module, self.spec)[: 2 if kind == "weight" else 1]
            parts = part_rows(module, self.spec) if len(sources) > 1 else [(0, rows)]
            shapes = [(end - start, *columns) for start, end in parts]
        tensors = []
        for source, needed in zip(sources, shapes, strict=True):
            handle = self._where[source]
            dtype, shape = _kind(handle, source)
            if dtype not in _FLOATS:
                raise FluxfastError(
                    f"{self.path}: {source} is stored as {dtype}, which is not read here",
                    hint="use a bf16, fp16 or fp32 checkpoint; storage: nf4 shrinks it on loading",
                )
            if shape != needed:
                raise FluxfastError(
                    f"{self.path}: {source} has shape {shape}, this model needs {needed}"
                )
            tensors.append(handle.get_tensor(source))
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self._split and module == SWAPPED:
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        return tensor

    def close(self) -> None:
        for handle in self._handles:
            handle.__exit__(None, None, None)
        self._handles, self._where = [], {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def open_base(path: Path | str) -> BaseCheckpoint:
    """Open a diffusers pipeline folder, its `transformer/` folder, or one BFL .safetensors file.

    Raises FluxfastError where it does not exist, cannot be read, or is no FLUX.1 text-to-image
    transformer.
    """
    path = Path(path)
    if path.is_file():
        return _open_single_file(path)
    if not path.is_dir():
        raise FluxfastError(
            f"model path {path} does not exist",
            hint="give a diffusers folder, a FLUX.1 .safetensors file, or a Hub id such as "
            "black-forest-labs/FLUX.1-dev",
        )
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    return _open_diffusers(path, folder)


def _open_diffusers(path: Path, folder: Path) -> BaseCheckpoint:
    file = folder / "config.json"
    config = _json(file)
    if config.get("_class_name") != "FluxTransformer2DModel":
        raise FluxfastError(
            f"{folder} holds a {config.get('_class_name', 'model of unknown kind')}, "
            "not a FluxTransformer2DModel"
        )
    guidance = bool(config.get("guidance_embeds", False))
    size = partial(_size, file, config)
    heads, head_dim = size("num_attention_heads"), size("attention_head_dim")
    # FLUX.1's own config.json leaves the axes out
    axes = config.get("axes_dims_rope") or rope_axes(head_dim)
    if not isinstance(axes, list | tuple) or [type(axis) for axis in axes] != [int] * 3:
        raise FluxfastError(f"{file}: axes_dims_rope must be three integers, got {axes!r}")
    spec = _spec(
        path,
        in_channels=size("in_channels"),
        vec_in_dim=size("pooled_projection_dim"),
        context_in_dim=size("joint_attention_dim"),
        hidden_size=heads * head_dim,
        num_heads=heads,
        depth=size("num_layers"),
        depth_single_blocks=size("num_single_layers"),
        axes_dim=tuple(axes),
        guidance_embed=guidance,
        text_length=_text_length(path, guidance),
    )
    _check_in_channels(path, spec.in_channels, config.get("out_channels") or spec.in_channels)
    files = _weight_files(folder)
    if not files:
        raise FluxfastError(f"{folder} holds no .safetensors weights")
    return BaseCheckpoint(path, spec, files, split=True, prefix="")


def _size(file: Path, config: dict, key: str) -> int:
    if key not in config:
        raise FluxfastError(f"{file} has no {key!r}")
    if type(config[key]) is not int or config[key] < 1:
        raise FluxfastError(f"{file}: {key} must be a positive integer, got {config[key]!r}")
    return config[key]


def _spec(path: Path, **sizes) -> FluxSpec:
    try:
        return FluxSpec(**sizes)
    except FluxfastError as error:
        raise FluxfastError(f"{path} is not a FLUX.1 transformer: {error.message}") from None


def _weight_files(folder: Path) -> list[Path]:
    """The shards that the index names, or every .safetensors file where there is no index."""
    index = sorted(folder.glob("*.safetensors.index.json"))
    if not index:
        return sorted(folder.glob("*.safetensors"))
    shards = _json(index[0]).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise FluxfastError(f"{index[0]} does not map tensors to files under 'weight_map'")
    return [folder / name for name in sorted(set(shards.values()))]


def _text_length(path: Path, guidance: bool) -> int:
    """dev 512, schnell 256, and never more than the pipeline's own T5 tokenizer takes."""
    length = (DEV if guidance else SCHNELL).text_length
    return min(length, tokenizer_length(path) or length)


def tokenizer_length(root: Path) -> int | None:
    """The longest prompt that a pipeline folder's T5 tokenizer takes, where it says so."""
    config = root / "tokenizer_2" / "tokenizer_config.json"
    limit = _json(config).get("model_max_length") if config.is_file() else None
    # transformers writes 1e30 for "no limit"
    return int(limit) if type(limit) in (int, float) and 1 <= limit < 1e9 else None


def _open_single_file(path: Path) -> BaseCheckpoint:
    with _open(path) as handle:
        shapes = {key: _kind(handle, key)[1] for key in handle.keys()}  # noqa: SIM118
    marker = "double_blocks.0.img_attn.norm.key_norm.scale"
    prefix = next((p for p in _PREFIXES if p + marker in shapes), None)
    if prefix is None:
        raise FluxfastError(
            f"{path} does not hold a FLUX.1 transformer in Black Forest Labs' layout",
            hint="a diffusers model is given by its folder, not by one of its files",
        )
    shapes = {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)}
    blocks = Counter(".".join(key.split(".")[:2]) for key in shapes if "_blocks." in key)

    def size(key: str, dim: int) -> int:
        shape = shapes.get(key)
        if shape is None or len(shape) <= dim or shape[dim] < 1:
            what = "is missing" if shape is None else f"has shape {shape}"
            raise FluxfastError(f"{path} is not a complete FLUX.1 transformer: {key} {what}")
        return shape[dim]

    hidden, head_dim = size("img_in.weight", 0), size(marker, 0)
    guidance = "guidance_in.in_layer.weight" in shapes
    spec = _spec(
        path,
        in_channels=size("img_in.weight", 1),
        vec_in_dim=size("vector_in.in_layer.weight", 1),
        context_in_dim=size("txt_in.weight", 1),
        hidden_size=hidden,
        mlp_ratio=size("double_blocks.0.img_mlp.0.weight", 0) / hidden,
        num_heads=hidden // head_dim,
        depth=sum(name.startswith("double_blocks.") for name in blocks),
        depth_single_blocks=sum(name.startswith("single_blocks.") for name in blocks),
        axes_dim=rope_axes(head_dim),
        guidance_embed=guidance,
        text_length=(DEV if guidance else SCHNELL).text_length,
    )
    _check_in_channels(path, spec.in_channels, size("final_layer.linear.weight", 0))
    return BaseCheckpoint(path, spec, [path], split=False, prefix=prefix)


def _check_in_channels(path: Path, in_channels: int, out_channels: int) -> None:
    if in_channels != out_channels:
        raise FluxfastError(
            f"{path} takes {in_channels} channels and returns {out_channels}: an inpainting or "
            "control variant of FLUX.1, which cannot be trained as text-to-image"
        )


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise FluxfastError(
            f"cannot read {path}: {error}", hint="the file is missing, truncated or not safetensors"
        ) from None


def _kind(handle, key: str) -> tuple[str, tuple[int, ...]]:
    """dtype as the file names it, and shape."""
    entry = handle.get_slice(key)
    return entry.get_dtype(), tuple(entry.get_shape())


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FluxfastError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise FluxfastError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise FluxfastError(f"{path} must hold a JSON object")
    return content
