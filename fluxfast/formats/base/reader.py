"""Opens a base checkpoint and reads it tensor by tensor: a diffusers folder (sharded or not) or one
file in Black Forest Labs' or diffusers' names, bare or inside an all-in-one file, dense, fp8, int8,
bitsandbytes NF4 or GGUF.

A file's kind is detected by its content (`detect.py`), a folder's by its config.json (`folder.py`).
Sources of the layouts: BFL's `flux1-dev.safetensors` keys; diffusers' `FluxTransformer2DModel`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fluxfast_kernels.quant.nf4 import NF4Tensor
from fluxfast_kernels.quant.rows import QuantizedRows
from torch import Tensor

from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base import bnb, eight_bit
from fluxfast.formats.base.detect import (
    Naming,
    find_naming,
    hint_for,
    quantizer,
    read_spec,
)
from fluxfast.formats.base.eight_bit import READ_HINT
from fluxfast.formats.base.folder import (
    check_weights_match,
    folder_quantizer,
    folder_spec,
    other_in,
    transformer_folder,
    weight_files,
)
from fluxfast.formats.base.gguf import BLOCK_TYPES
from fluxfast.formats.container import all_finite
from fluxfast.formats.opened import Files
from fluxfast.model.frozen_linear import Weight, dequantize
from fluxfast.model.names import SWAPPED, linear_shape, part_rows, tensor_sources
from fluxfast.model.precision import multiplies_in_8_bits
from fluxfast.model.spec import FluxSpec

_VECTORS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # dtypes of biases and norms
STORAGE_KEY = "fluxfast.storage"  # metadata of a prequantized file: the storage it was made for


class BaseCheckpoint:
    """An opened base model: `spec`, and `read(BFL name)` for each of its tensors.

    storage: nf4, int8 or fp8 if the file was quantized for it, else None.
    """

    def __init__(self, path: Path, spec: FluxSpec, files: Files, naming: Naming):
        self.spec, self.files, self.naming = spec, files, naming
        self._sources = tensor_sources(spec)
        keys = [key for name in self._sources for key in self.keys(name)]
        if missing := [key for key in keys if key not in files.entries]:
            hint = "the file of another part, or a download that is not complete?"
            if naming.split:
                hint = "a diffusers model in several files is given by its folder"
            raise ConfigError(
                f"{path} is not a complete FLUX.1 transformer: {len(missing)} tensors are missing, "
                f"among them {', '.join(missing[:3])}",
                hint=hint,
            )
        self._side = eight_bit.SideTensors(files, naming.prefix)
        self._states: dict[str, bnb.State | None] = {}  # of the matrices
        for name in self._sources:
            self._check(name)
        self.storage = self._storage()

    def keys(self, name: str) -> list[str]:
        """Returns the keys of the file's tensors whose rows make the tensor of that BFL name."""
        return self.naming.keys(name, self._sources[name])

    def read(self, name: str) -> Tensor:
        """Returns the tensor of that BFL name, fused and dense: in the file's dtype, or fp32 for
        fp64 and quantized ones.
        """
        return dequantize(self.read_stored(name))

    def read_stored(self, name: str) -> Weight:
        """Reads like `read`, but leaves a matrix quantized that the file has in bitsandbytes' NF4,
        fp8 (e4m3) or int8 with a scale a row.

        Raises ConfigError for NaN and infinity. Files that `quantize` wrote are not checked again.
        """
        parts: list[Any] = [self._read_part(key) for key in self.keys(name)]
        swapped = name.rpartition(".")[0] == SWAPPED
        if swapped or len({_kind(part) for part in parts}) > 1:
            parts = [dequantize(part) for part in parts]
        if isinstance(parts[0], NF4Tensor):
            return bnb.join_nf4(parts)
        if isinstance(parts[0], QuantizedRows):
            return eight_bit.join_rows(parts)
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if swapped and self.naming.split:
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        return tensor

    def is_nf4(self, name: str) -> bool:
        """Returns whether `read_stored` returns this matrix in NF4."""
        states = [self._states[key] for key in self.keys(name)]
        return not name.startswith(SWAPPED) and all(state and state.is_nf4 for state in states)

    def is_nested_nf4(self, name: str) -> bool:
        """Returns whether this NF4 matrix has nested scales and one offset for all."""
        states = [self._states[key] for key in self.keys(name)]
        return len(states) == 1 and states[0] is not None and states[0].is_nested_nf4

    def _read_part(self, key: str) -> Weight:
        entry, state = self.files.entries[key], self._states.get(key)
        if state:
            part = bnb.read_bnb(self.files, key, state)
        elif entry.dtype in eight_bit.DTYPES and len(entry.shape) == 2:
            part = self._side.read(key)
        else:
            part = self.files.read(key)
            if entry.dtype in eight_bit.DTYPES:
                part = part.to(torch.bfloat16)  # holds every value of both fp8 kinds
            elif entry.dtype == "F64":
                part = part.float()
        if STORAGE_KEY not in self.files.metadata and not _is_finite(part):
            raise ConfigError(
                f"{self.files.file_of(key)}: {key} holds NaN or infinity",
                hint="the checkpoint is damaged, or was converted badly: use another copy of it",
            )
        return part

    def _check(self, name: str) -> None:
        """Raises ConfigError for a shape or dtype that does not belong there."""
        module, _, kind = name.rpartition(".")
        sources = self.keys(name)
        if kind == "scale":
            shapes = [(self.spec.head_dim,)]
        else:
            rows, *columns = linear_shape(module, self.spec)[: 2 if kind == "weight" else 1]
            parts = part_rows(module, self.spec) if self.naming.split else [(0, rows)]
            shapes = [(end - start, *columns) for start, end in parts]
        for key, needed in zip(sources, shapes, strict=True):
            shape = self.files.entries[key].shape
            if kind == "weight" and (state := bnb.bnb_state(self.files, key)):
                self._states[key], shape = state, state.shape
            else:
                self._states[key] = None
                self._check_dtype(key, kind)
            if shape != needed:
                raise ConfigError(
                    f"{self.files.file_of(key)}: {key} has shape {shape}, this model needs {needed}"
                )

    def _check_dtype(self, key: str, kind: str) -> None:
        dtype = self.files.entries[key].dtype
        if kind == "weight":
            self._side.check(key)
        if dtype not in _VECTORS and (kind != "weight" or dtype not in ("I8", *BLOCK_TYPES)):
            raise ConfigError(
                f"{self.files.file_of(key)}: {key} is stored as {dtype}, which is not read here",
                hint=READ_HINT,
            )

    def _storage(self) -> str | None:
        """Goes by most of the blocks' matrices, those that 8-bit products would take."""
        if storage := self.files.metadata.get(STORAGE_KEY):
            return storage if storage in ("nf4", "int8", "fp8") else None
        names = [n for n in self._sources if n.endswith(".weight") and multiplies_in_8_bits(n)]
        states = [self._states[key] for name in names for key in self.keys(name)]
        in_nf4 = sum(state is not None and state.is_nf4 for state in states)
        return "nf4" if 2 * in_nf4 > len(states) else None


def _kind(part: Weight) -> object:
    return part.values.dtype if isinstance(part, QuantizedRows) else type(part)


def _is_finite(part: Weight) -> bool:
    if isinstance(part, QuantizedRows):
        return all_finite(part.scale) and eight_bit.quantized_is_finite(part.values)
    if isinstance(part, NF4Tensor):
        return all(all_finite(t) for t in part.tensors().values() if t.is_floating_point())
    return all_finite(part)


@contextmanager
def open_base(path: Path | str) -> Iterator[BaseCheckpoint]:
    """Opens a diffusers pipeline folder, its `transformer/` folder, or one .safetensors or GGUF
    file.

    Raises FluxfastError if it does not exist, ConfigError if it cannot be read or is no FLUX.1
    text-to-image transformer.
    """
    path, spec = Path(path), None
    folder = transformer_folder(path) if path.is_dir() else None
    if folder:
        with impossible_sizes(path):
            spec = folder_spec(path, folder)
    elif not path.is_file():
        raise FluxfastError(
            f"model path {path} does not exist",
            hint="give a diffusers folder, a FLUX.1 .safetensors file, or a Hub id such as "
            "black-forest-labs/FLUX.1-dev",
        )
    with Files(weight_files(folder) if folder else [path]) as files:
        naming = Naming("", split=True) if spec else find_naming(files.entries)
        foreign = quantized_with(files, naming, folder)
        other = None if naming else other_in(files)
        if naming is None and (other or not foreign):
            raise not_flux(path, other)
        if naming is None or foreign:
            raise ConfigError(
                f"{path} is quantized with {foreign}, which is not read here", hint=READ_HINT
            )
        if spec:
            check_weights_match(path, spec, files.entries)
        else:
            spec = file_spec(path, files, naming)
        yield BaseCheckpoint(path, spec, files, naming)


def quantized_with(files: Files, naming: Naming | None, folder: Path | None) -> str | None:
    """Returns the name of a quantizer whose matrices are not read here, None if there is none: by
    the transformer's tensors, or the folder's config.json. diffusers leaves that as it was where it
    saves a model dequantized, so it counts for nothing where all tensors are plain.
    """
    prefix = naming.prefix if naming else ""
    own = {key: entry.dtype for key, entry in files.entries.items() if key.startswith(prefix)}
    plain = {"F64", "F32", "F16", "BF16"}.issuperset(own.values())
    return (None if plain or not folder else folder_quantizer(folder)) or quantizer(own)


def not_flux(path: Path, other: str | None) -> ConfigError:
    """Returns the error for a file of something else. other: its name."""
    name = f": it is a {other}" if other else ""
    return ConfigError(
        f"{path} does not hold a FLUX.1 transformer{name}", hint=hint_for(other or "")
    )


@contextmanager
def impossible_sizes(path: Path) -> Iterator[None]:
    """Names the file in an error about sizes that no FLUX.1 has."""
    try:
        yield
    except ConfigError:
        raise
    except FluxfastError as error:
        raise ConfigError(f"{path} is not a complete FLUX.1 transformer: {error.message}") from None


def file_spec(path: Path, files: Files, naming: Naming) -> FluxSpec:
    """Returns the sizes of a single file's model. Raises ConfigError for impossible ones."""

    def shape(key: str) -> tuple[int, ...] | None:
        if key not in files.entries:
            return None
        state = bnb.bnb_state(files, key)
        return files.entries[key].shape if state is None else state.shape

    with impossible_sizes(path):
        return read_spec(files.entries, naming, shape)
