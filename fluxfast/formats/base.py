"""Base checkpoints in, read tensor by tensor: a diffusers folder (sharded or not) or one file in
Black Forest Labs' or diffusers' names, bare or inside an all-in-one file, dense, fp8, int8,
bitsandbytes NF4 or GGUF.

What a file is, is told by its content (`base_detect.py`), a folder by its config.json
(`base_folder.py`). Sources of the layouts: BFL's `flux1-dev.safetensors` keys; diffusers'
`FluxTransformer2DModel`.
"""

from pathlib import Path

import torch
from fluxfast_kernels.quant.nf4 import NF4Tensor
from fluxfast_kernels.quant.rows import Rows
from torch import Tensor

from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats import base_8bit, base_bnb
from fluxfast.formats.base_detect import (
    Naming,
    find_naming,
    is_lora,
    other_model,
    read_spec,
)
from fluxfast.formats.base_folder import (
    check_nothing_is_left,
    folder_spec,
    of_some_depth,
    weight_files,
)
from fluxfast.formats.base_gguf import BLOCK_TYPES
from fluxfast.formats.container import all_finite
from fluxfast.formats.opened import Files
from fluxfast.model.linear import dense
from fluxfast.model.names import SWAPPED, linear_shape, part_rows, tensor_sources
from fluxfast.model.precision import multiplies_in_8_bits
from fluxfast.model.spec import FluxSpec

_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")
STORAGE_KEY = "fluxfast.storage"  # metadata of a prequantised file: the storage it was made for


class BaseCheckpoint:
    """An opened base model: `spec`, and `read(BFL name)` for each of its tensors. A context
    manager.

    storage: nf4, int8 or fp8 where the file was quantised for it, else None.
    """

    def __init__(self, path: Path, spec: FluxSpec, files: Files, naming: Naming):
        self.path, self.spec, self.files, self.naming = path, spec, files, naming
        self._sources = tensor_sources(spec)
        if absent := self.missing():
            hint = "the file of another part, or a download that is not complete?"
            if naming.split:
                hint = "a diffusers model in several files is given by its folder"
            raise ConfigError(
                f"{path} is not a complete FLUX.1 transformer: {len(absent)} tensors are missing, "
                f"among them {', '.join(absent[:3])}",
                hint=hint,
            )
        self._states: dict[str, base_bnb.State | None] = {}
        for name in self._sources:
            self._check(name)
        self.storage = self._storage()

    def keys(self, name: str) -> list[str]:
        """The file's tensors whose rows make the tensor of that BFL name."""
        prefix = self.naming.prefix
        if not self.naming.split:
            return [prefix + name]
        return [prefix + source for source in self._sources[name]]

    def missing(self) -> list[str]:
        """The tensors that the model needs and the file lacks, by the file's own names."""
        keys = [key for name in self._sources for key in self.keys(name)]
        return [key for key in keys if key not in self.files.entries]

    def read(self, name: str) -> Tensor:
        """The tensor under its BFL name, fused, dense: in the dtype that the file has, or fp32
        where that is fp64 or quantised.
        """
        return dense(self.read_kept(name))

    def read_kept(self, name: str) -> Tensor | NF4Tensor | Rows:
        """As `read`, but a matrix that the file has in codes stays in them: NF4 of bitsandbytes,
        fp8 (e4m3) or int8 with a scale a row.

        Raises ConfigError for NaN and infinity. What `quantize` wrote is not looked through again.
        """
        module = name.rpartition(".")[0]
        parts = [self._part(key) for key in self.keys(name)]
        if len({_kind(part) for part in parts}) > 1 or module == SWAPPED:
            parts = [dense(part) for part in parts]
        if isinstance(parts[0], NF4Tensor):
            return base_bnb.join_nf4(parts)
        if isinstance(parts[0], Rows):
            return base_8bit.join_rows(parts)
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.naming.split and module == SWAPPED:
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        return tensor

    def in_nf4(self, name: str) -> bool:
        """Whether `read_kept` gives this matrix in NF4."""
        states = [self._states[key] for key in self.keys(name)]
        return not name.startswith(SWAPPED) and all(state and state.kept for state in states)

    def in_nested_nf4(self, name: str) -> bool:
        """Whether it does so with nested scales and one offset for all."""
        keys = self.keys(name)
        return self.in_nf4(name) and len(keys) == 1 and self._states[keys[0]].kept_nested

    def _part(self, key: str) -> Tensor | NF4Tensor | Rows:
        part = self._as_kept(key)
        if STORAGE_KEY not in self.files.metadata and not _is_finite(part):
            raise ConfigError(
                f"{self.files.file_of(key)}: {key} holds NaN or infinity",
                hint="the checkpoint is damaged, or was converted badly: use another copy of it",
            )
        return part

    def _as_kept(self, key: str) -> Tensor | NF4Tensor | Rows:
        entry = self.files.entries[key]
        if state := self._states.get(key):
            return base_bnb.read_bnb(self.files, key, state)
        if entry.dtype in (*_FP8, "I8"):
            if len(entry.shape) == 2:
                return base_8bit.read_8bit(self.files, key)
            return self.files.read(key).to(torch.bfloat16)  # holds every value of both fp8 kinds
        tensor = self.files.read(key)
        return tensor.float() if entry.dtype == "F64" else tensor

    def _check(self, name: str) -> None:
        """Raise ConfigError for a shape or dtype that does not belong there."""
        module, _, kind = name.rpartition(".")
        sources = self.keys(name)
        if kind == "scale":
            shapes = [(self.spec.head_dim,)]
        else:
            rows, *columns = linear_shape(module, self.spec)[: 2 if kind == "weight" else 1]
            parts = part_rows(module, self.spec) if len(sources) > 1 else [(0, rows)]
            shapes = [(end - start, *columns) for start, end in parts]
        for key, needed in zip(sources, shapes, strict=True):
            entry, state = self.files.entries[key], None
            if kind == "weight":
                state = self._states[key] = base_bnb.bnb_state(self.files, key)
            shape = entry.shape if state is None else state.shape
            if state is None:
                self._check_dtype(key, entry.dtype, kind)
            if shape != needed:
                raise ConfigError(
                    f"{self.files.file_of(key)}: {key} has shape {shape}, this model needs {needed}"
                )

    def _check_dtype(self, key: str, dtype: str, kind: str) -> None:
        coded = ("I8", *BLOCK_TYPES) if kind == "weight" else ()
        if dtype not in (*_FLOATS, *_FP8, *coded):
            raise ConfigError(
                f"{self.files.file_of(key)}: {key} is stored as {dtype}, which is not read here",
                hint="use a bf16, fp16, fp8, bitsandbytes NF4 or GGUF checkpoint; storage: nf4 "
                "shrinks it on loading",
            )
        if dtype in (*_FP8, "I8") and kind == "weight":
            base_8bit.check_8bit(self.files, key, self.naming.prefix)

    def _storage(self) -> str | None:
        """By what most of the blocks' matrices are, those that 8-bit products would take."""
        if said := self.files.metadata.get(STORAGE_KEY):
            return said if said in ("nf4", "int8", "fp8") else None
        modules = [n for n in self._sources if n.endswith(".weight")]
        keys = [k for n in modules if multiplies_in_8_bits(n) for k in self.keys(n)]
        kept = [key for key in keys if (state := self._states[key]) and state.kept]
        return "nf4" if 2 * len(kept) > len(keys) else None

    def close(self) -> None:
        self.files.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _kind(part: Tensor | NF4Tensor | Rows) -> object:
    return part.codes.dtype if isinstance(part, Rows) else type(part)


def _is_finite(part: Tensor | NF4Tensor | Rows) -> bool:
    if isinstance(part, Rows):
        return all_finite(part.scale) and base_8bit.codes_are_finite(part.codes)
    if isinstance(part, NF4Tensor):
        scales = (part.absmax, part.nested_absmax, part.offset)
        return all(all_finite(t) for t in scales if t is not None and t.is_floating_point())
    return all_finite(part)


def open_base(path: Path | str) -> BaseCheckpoint:
    """Open a diffusers pipeline folder, its `transformer/` folder, or one .safetensors or GGUF
    file.

    Raises FluxfastError where it does not exist, ConfigError where it cannot be read or is no
    FLUX.1 text-to-image transformer.
    """
    path = Path(path)
    if path.is_file():
        return _opened(path, [path])
    if not path.is_dir():
        raise FluxfastError(
            f"model path {path} does not exist",
            hint="give a diffusers folder, a FLUX.1 .safetensors file, or a Hub id such as "
            "black-forest-labs/FLUX.1-dev",
        )
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    spec = folder_spec(path, folder)
    files = weight_files(folder)
    if not files:
        raise ConfigError(f"{folder} holds no .safetensors weights")
    return _opened(path, files, spec)


def _opened(path: Path, paths: list[Path], spec: FluxSpec | None = None) -> BaseCheckpoint:
    files = Files(paths)
    try:
        naming = Naming("", split=True)
        if spec is None:
            naming = find_naming(files.entries)
            if naming is None:
                raise not_flux(path, list(files.entries))
            spec = spec_of(path, files, naming)
        else:
            check_nothing_is_left(path, spec, files.entries)
        return BaseCheckpoint(path, spec, files, naming)
    except BaseException:
        files.close()
        raise


def not_flux(path: Path, keys: list[str]) -> ConfigError:
    """The error for a file of something else, by name where it is known."""
    if is_lora(keys):
        hint = "a LoRA goes on top of a base model: --lora, or `fluxfast inspect` to see it"
    else:
        hint = "model.path wants FLUX.1-dev, FLUX.1-schnell or a fine-tune of either"
    what = other_model(keys)
    what = f": it is a {what}" if what else ""
    return ConfigError(f"{path} does not hold a FLUX.1 transformer{what}", hint=hint)


def spec_of(path: Path, files: Files, naming: Naming) -> FluxSpec:
    """The sizes of a single file's model. Raises ConfigError where they cannot be."""

    def shape(key: str) -> tuple[int, ...] | None:
        if key not in files.entries:
            return None
        state = base_bnb.bnb_state(files, key)
        return files.entries[key].shape if state is None else state.shape

    try:
        return of_some_depth(path, read_spec(files.entries, naming, shape))
    except ConfigError:
        raise
    except FluxfastError as error:
        raise ConfigError(f"{path} is not a complete FLUX.1 transformer: {error.message}") from None
