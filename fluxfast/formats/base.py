"""Base checkpoints in: a diffusers folder (sharded or not) or one BFL safetensors file, read tensor
by tensor.

Sources of the layouts: BFL's `flux1-dev.safetensors` keys; diffusers' `FluxTransformer2DModel`
config and keys.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxfast.errors import FluxfastError
from fluxfast.model.names import SWAPPED, linear_shape, tensor_sources
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
        tensors = []
        for source in sources:
            handle = self._where[source]
            dtype = handle.get_slice(source).get_dtype()
            if dtype not in _FLOATS:
                raise FluxfastError(
                    f"{self.path}: {source} is stored as {dtype}, which is not read here",
                    hint="use a bf16, fp16 or fp32 checkpoint; storage: nf4 shrinks it on loading",
                )
            tensors.append(handle.get_tensor(source))
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        module, _, kind = name.rpartition(".")
        if kind == "scale":
            expected = (self.spec.head_dim,)
        else:
            expected = linear_shape(module, self.spec)[: 2 if kind == "weight" else 1]
        if tuple(tensor.shape) != expected:
            raise FluxfastError(
                f"{self.path}: {' + '.join(sources)} has shape {tuple(tensor.shape)}, "
                f"this model needs {expected}"
            )
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
    config = _json(folder / "config.json")
    if config.get("_class_name") != "FluxTransformer2DModel":
        raise FluxfastError(
            f"{folder} holds a {config.get('_class_name', 'model of unknown kind')}, "
            "not a FluxTransformer2DModel"
        )
    guidance = bool(config.get("guidance_embeds", False))
    try:
        spec = FluxSpec(
            in_channels=config["in_channels"],
            vec_in_dim=config["pooled_projection_dim"],
            context_in_dim=config["joint_attention_dim"],
            hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
            num_heads=config["num_attention_heads"],
            depth=config["num_layers"],
            depth_single_blocks=config["num_single_layers"],
            # FLUX.1's own config.json leaves the axes out
            axes_dim=tuple(config.get("axes_dims_rope") or rope_axes(config["attention_head_dim"])),
            guidance_embed=guidance,
            text_length=_text_length(path, guidance),
        )
    except KeyError as error:
        raise FluxfastError(f"{folder / 'config.json'} has no {error.args[0]!r}") from None
    _check_in_channels(path, spec.in_channels, config.get("out_channels") or spec.in_channels)
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        names = sorted(set(_json(index[0]).get("weight_map", {}).values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FluxfastError(f"{folder} holds no .safetensors weights")
    return BaseCheckpoint(path, spec, files, split=True, prefix="")


def _text_length(path: Path, guidance: bool) -> int:
    """dev 512, schnell 256, and never more than the pipeline's own T5 tokenizer takes."""
    length = (DEV if guidance else SCHNELL).text_length
    return min(length, tokenizer_length(path) or length)


def tokenizer_length(root: Path) -> int | None:
    """The longest prompt that a pipeline folder's T5 tokenizer takes, where it says so."""
    config = root / "tokenizer_2" / "tokenizer_config.json"
    limit = _json(config).get("model_max_length") if config.is_file() else None
    return int(limit) if isinstance(limit, int | float) else None


def _open_single_file(path: Path) -> BaseCheckpoint:
    with _open(path) as handle:
        shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    marker = "double_blocks.0.img_attn.norm.key_norm.scale"
    prefix = next((p for p in _PREFIXES if p + marker in shapes), None)
    if prefix is None:
        raise FluxfastError(
            f"{path} does not hold a FLUX.1 transformer in Black Forest Labs' layout",
            hint="a diffusers model is given by its folder, not by one of its files",
        )
    shapes = {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)}
    blocks = Counter(".".join(key.split(".")[:2]) for key in shapes if "_blocks." in key)
    try:
        hidden, in_channels = shapes["img_in.weight"]
        head_dim = shapes[marker][0]
        guidance = "guidance_in.in_layer.weight" in shapes
        spec = FluxSpec(
            in_channels=in_channels,
            vec_in_dim=shapes["vector_in.in_layer.weight"][1],
            context_in_dim=shapes["txt_in.weight"][1],
            hidden_size=hidden,
            mlp_ratio=shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
            num_heads=hidden // head_dim,
            depth=sum(name.startswith("double_blocks.") for name in blocks),
            depth_single_blocks=sum(name.startswith("single_blocks.") for name in blocks),
            axes_dim=rope_axes(head_dim),
            guidance_embed=guidance,
            text_length=(DEV if guidance else SCHNELL).text_length,
        )
        _check_in_channels(path, in_channels, shapes["final_layer.linear.weight"][0])
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise FluxfastError(f"{path} is not a complete FLUX.1 transformer: no {error}") from None
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


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FluxfastError(f"cannot read {path}: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FluxfastError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise FluxfastError(f"{path} must hold a JSON object")
    return content
