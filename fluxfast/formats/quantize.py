"""`fluxfast quantize`: a base checkpoint of any form becomes one file that loads as it lies.

The output is a .safetensors file in Black Forest Labs' names. Inside the blocks

    nf4           bitsandbytes' form (see base_bnb.py), which Forge and ComfyUI's NF4 nodes know too
    int8, fp8     X.weight in codes, X.scale_weight fp32 [N, 1] (see base_8bit.py)

and around them bf16; biases and norms keep the source's dtype. Codes of the storage asked for pass
through as they are. Every size is known before anything is read, so the header goes first and then
one matrix after another; the file is filled under another name and put in place when it is whole.

Metadata: fluxfast.storage, fluxfast.version, fluxfast.source, and fluxfast.sha256, the SHA-256 of
the tensors' own SHA-256 digests, ordered by name.
"""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from fluxfast_kernels.quant.frozen import quantize_8bit
from fluxfast_kernels.quant.nf4 import (
    BLOCK,
    NF4Tensor,
    code_table,
    dynamic_map,
    nf4_absmax,
    nf4_quantize,
)
from fluxfast_kernels.quant.rows import Rows
from torch import Tensor

from fluxfast import __version__
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.files import check_new
from fluxfast.formats.base import STORAGE_KEY, BaseCheckpoint, open_base
from fluxfast.formats.base_bnb import state_json
from fluxfast.formats.opened import Files
from fluxfast.formats.safetensors_out import Layout, layout, tensor_bytes
from fluxfast.model.linear import dense
from fluxfast.model.names import linear_shape, tensor_sources
from fluxfast.model.precision import layer_precisions

STORAGES = ("nf4", "int8", "fp8")
SHA_KEY = "fluxfast.sha256"
_STATE_BYTES = 256  # of the JSON beside a matrix, padded with spaces
_ROWS = 2048  # quantised to 8 bits at once: 25 to 126 MB of fp32 in FLUX.1-dev


@dataclass(frozen=True)
class Written:
    """What became of it. bytes: of the output; read: of the source's tensors."""

    path: Path
    storage: str
    bytes: int
    read: int
    seconds: float

    def line(self) -> str:
        rate = self.read / self.seconds / 1e9
        return (
            f"{self.bytes / 1e9:.3g} GB in {self.storage} from {self.read / 1e9:.3g} GB, "
            f"{self.seconds:.1f} s, {rate:.2g} GB/s"
        )


def quantize(
    source: Path | str,
    target: Path | str,
    storage: str = "nf4",
    *,
    double_quant: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write `source` (what `open_base` takes) to the file `target` in nf4, int8 or fp8.

    double_quant: nf4 with scales in 8 bits; a source in NF4 keeps its own. progress gets (done,
    total) in tensors. Raises ConfigError for a source or target that cannot be, FluxfastError
    where the disk refuses; `target` is then not there, nor is part of it.
    """
    source, target = Path(source), Path(target)
    if storage not in STORAGES:
        raise ConfigError(f"storage {storage!r} is not one of {', '.join(STORAGES)}")
    if double_quant and storage != "nf4":
        raise ConfigError(f"double_quant goes with nf4: {storage} has one scale a row")
    check_new(target)
    started = time.perf_counter()
    with open_base(source) as base:
        forms = {
            name: _form(base, name, storage, double_quant) for name in tensor_sources(base.spec)
        }
        metadata = {
            "format": "pt", STORAGE_KEY: storage, "fluxfast.version": __version__,
            "fluxfast.source": source.name, SHA_KEY: "0" * 64,
        }  # fmt: skip
        writer = _Writer(target, [item for form in forms.values() for item in form], metadata)
        with writer:
            for index, name in enumerate(forms):
                for key, tensor in _tensors(base, name, storage, double_quant):
                    writer.write(key, tensor)
                if progress:
                    progress(index + 1, len(forms))
        entries, prefix = base.files.entries, base.naming.prefix
        read = sum(entry.bytes for key, entry in entries.items() if key.startswith(prefix))
    return Written(target, storage, writer.size, read, time.perf_counter() - started)


# ---------------------------------------------------------------- what is written


@dataclass(frozen=True)
class _Item:
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def _form(base: BaseCheckpoint, name: str, storage: str, double_quant: bool) -> list[_Item]:
    """The tensors that `_tensors` gives for one of the model's, before any is read."""
    module, _, kind = name.rpartition(".")
    if kind != "weight":
        sizes = (base.spec.head_dim,) if kind == "scale" else linear_shape(module, base.spec)[:1]
        return [_Item(name, _vector_dtype(base, name), sizes)]
    N, K = linear_shape(module, base.spec)
    kept = _storage_of(base, name, storage)
    if kept == "bf16":
        return [_Item(name, torch.bfloat16, (N, K))]
    if kept != "nf4":
        codes = torch.int8 if kept == "int8" else torch.float8_e4m3fn
        return [_Item(name, codes, (N, K)), _Item(f"{module}.scale_weight", torch.float32, (N, 1))]
    blocks = N * K // BLOCK
    nested = base.in_nested_nf4(name) if base.in_nf4(name) else double_quant
    items = [
        _Item(name, torch.uint8, (N * K // 2, 1)),
        _Item(f"{name}.absmax", torch.uint8 if nested else torch.float32, (blocks,)),
        _Item(f"{name}.quant_map", torch.float32, (16,)),
        _Item(f"{name}.quant_state.bitsandbytes__nf4", torch.uint8, (_STATE_BYTES,)),
    ]
    if nested:
        items += [
            _Item(f"{name}.nested_absmax", torch.float32, (-(-blocks // 256),)),
            _Item(f"{name}.nested_quant_map", torch.float32, (256,)),
        ]
    return items


def _storage_of(base: BaseCheckpoint, name: str, storage: str) -> str:
    """bf16, or the storage; as `layer_precisions` and `LoRALinear.set_weight` choose it."""
    module = name.rpartition(".")[0]
    kept = layer_precisions(base.spec, storage, "bf16")[module].storage
    fits = linear_shape(module, base.spec)[1] % BLOCK == 0
    return kept if kept != "nf4" or fits else "bf16"


def _vector_dtype(base: BaseCheckpoint, name: str) -> torch.dtype:
    """Of a bias or norm: the source's where all its parts agree on a float of 16 or 32 bits."""
    kinds = {base.files.entries[key].dtype for key in base.keys(name)}
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if len(kinds) == 1 and (dtype := known.get(*kinds)):
        return dtype
    return torch.bfloat16 if all(kind.startswith("F8") for kind in kinds) else torch.float32


def _tensors(
    base: BaseCheckpoint, name: str, storage: str, double_quant: bool
) -> Iterator[tuple[str, Tensor]]:
    module, _, kind = name.rpartition(".")
    weight = base.read_kept(name)
    if kind != "weight":
        yield name, dense(weight).to(_vector_dtype(base, name))
        return
    kept = _storage_of(base, name, storage)
    if kept == "bf16":
        yield name, dense(weight).to(torch.bfloat16)
    elif kept == "nf4":
        if not isinstance(weight, NF4Tensor):
            weight = nf4_quantize(dense(weight).contiguous(), double_quant)
        yield from _nf4_tensors(name, weight)
    else:
        rows = _rows(weight, kept)
        yield name, rows.codes
        yield f"{module}.scale_weight", rows.scale[:, None]


def _nf4_tensors(name: str, weight: NF4Tensor) -> Iterator[tuple[str, Tensor]]:
    if weight.offset is not None and weight.offset.numel() > 1:
        # parts with an offset each, for which the form has no room: the same scales, un-nested
        weight = NF4Tensor(weight.packed, nf4_absmax(weight), weight.shape)
    cpu = torch.device("cpu")
    state = state_json(weight).ljust(_STATE_BYTES)
    yield name, weight.packed
    yield f"{name}.absmax", weight.absmax
    yield f"{name}.quant_map", code_table(cpu)
    yield f"{name}.quant_state.bitsandbytes__nf4", torch.tensor(list(state), dtype=torch.uint8)
    if weight.nested_absmax is not None:
        yield f"{name}.nested_absmax", weight.nested_absmax
        yield f"{name}.nested_quant_map", dynamic_map(cpu)


def _rows(weight: Tensor | NF4Tensor | Rows, kind: str) -> Rows:
    """8-bit codes; of a dense matrix some rows at a time, as the fp32 copies would be large."""
    if isinstance(weight, Rows) and (weight.codes.dtype == torch.int8) == (kind == "int8"):
        return weight
    pieces = [quantize_8bit(rows, kind) for rows in dense(weight).split(_ROWS)]
    codes = torch.cat([codes.view(torch.uint8) for codes, _ in pieces])
    return Rows(codes.view(pieces[0][0].dtype), torch.cat([scale for _, scale in pieces]))


# ---------------------------------------------------------------- writing


class _Writer:
    """A .safetensors file of known tensors, filled in any order. A context manager: leaving it
    puts the file in place, or, with an error or a tensor missing, removes what there is of it.
    """

    def __init__(self, target: Path, items: list[_Item], metadata: dict[str, str]):
        self._target, self._metadata = target, metadata
        self._partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        self._items = {item.key: item for item in items}
        self._digests: dict[str, bytes] = {}
        form = self._layout()
        self._at, self.size = form.offsets, form.size

    def _layout(self) -> Layout:
        shapes = {key: (item.dtype, item.shape) for key, item in self._items.items()}
        return layout(shapes, self._metadata)

    def __enter__(self):
        folder = self._target.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if free < self.size:
                raise FluxfastError(
                    f"{folder} has {free / 1e9:.1f} GB free, the file needs {self.size / 1e9:.1f}",
                    hint="free some space, or name another folder",
                )
            self._file = open(self._partial, "wb")  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise self._refused(error) from None
        return self

    def write(self, key: str, tensor: Tensor) -> None:
        """Put one tensor where it belongs. An OSError of the disk becomes a FluxfastError."""
        item = self._items[key]
        assert (tensor.dtype, tuple(tensor.shape)) == (item.dtype, item.shape), (key, tensor.shape)
        try:
            self._file.seek(self._at[key])
            self._file.write(tensor_bytes(tensor))
        except OSError as error:
            raise self._refused(error) from None
        self._digests[key] = _digest(tensor)

    def __exit__(self, kind, value, trace):
        try:
            if kind is None:
                self._finish()
        except OSError as error:
            raise self._refused(error) from None
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        assert self._digests.keys() == self._items.keys()
        self._metadata[SHA_KEY] = checksum(self._digests)
        self._file.seek(0)
        self._file.write(self._layout().header)  # of the same length, now with the checksum
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self._target)

    def _refused(self, error: OSError) -> FluxfastError:
        return FluxfastError(
            f"cannot write into {self._target.parent}: {error.strerror or error}",
            hint="free some space, or name a folder that you may write to",
        )


def checksum(digests: dict[str, bytes]) -> str:
    """SHA-256 of the tensors' SHA-256 digests, ordered by name."""
    return hashlib.sha256(b"".join(digests[key] for key in sorted(digests))).hexdigest()


def verify(files: Files) -> bool | None:
    """Whether a prequantised file holds what was written; None where it has no checksum."""
    said = files.metadata.get(SHA_KEY)
    if said is None:
        return None
    return checksum({key: _digest(files.read(key)) for key in files.entries}) == said


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor_bytes(tensor)).digest()
