"""`fluxfast quantize`: a base checkpoint of any form becomes one file that loads as it lies.

The output is a .safetensors file in Black Forest Labs' names. Inside the blocks

    nf4           bitsandbytes' form (see base_bnb.py), which Forge and ComfyUI's NF4 nodes know too
    int8, fp8     X.weight quantized, X.scale_weight fp32 [N, 1] (see base_8bit.py)

and around them bf16; biases and norms keep the source's dtype. What the source has in the storage
asked for passes through as it is. Every size is known before anything is read, so the header goes
first and then one matrix after another; the file is filled under another name and put in place when
it is whole.

Metadata: fluxfast.storage, fluxfast.version, fluxfast.source, and fluxfast.sha256, the SHA-256 of
the tensors' own SHA-256 digests, ordered by name.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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
from fluxfast_kernels.quant.rows import QuantizedRows
from torch import Tensor

from fluxfast import __version__
from fluxfast.errors import ConfigError, DiskError, FluxfastError
from fluxfast.formats.base.bnb import STATE, state_json
from fluxfast.formats.base.reader import STORAGE_KEY, BaseCheckpoint, open_base
from fluxfast.formats.container import layout, tensor_bytes
from fluxfast.formats.opened import Files
from fluxfast.model.frozen_linear import dequantize
from fluxfast.model.names import linear_shape, tensor_sources
from fluxfast.model.precision import layer_precisions
from fluxfast.util.files import check_new, partial_of

STORAGES = ("nf4", "int8", "fp8")
SHA_KEY = "fluxfast.sha256"
_STATE_BYTES = 256  # of the JSON beside a matrix, padded with spaces
_ROWS = 2048  # quantized to 8 bits at once: 25 to 126 MB of fp32 in FLUX.1-dev


@dataclass(frozen=True)
class Written:
    """The output. bytes: its size; read: of the source's tensors."""

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
    metadata = {
        "format": "pt",
        STORAGE_KEY: storage,
        "fluxfast.version": __version__,
        "fluxfast.source": source.name,
        SHA_KEY: "0" * 64,
    }
    with open_base(source) as base:
        names = list(tensor_sources(base.spec))
        shapes: Shapes = {}
        for name in names:
            shapes |= _shapes(base, name, storage, double_quant)
        form, digests = layout(shapes, metadata), {}
        with _new_file(target, form.size) as file:
            for index, name in enumerate(names):
                for key, tensor in _tensors(base, name, storage, double_quant):
                    assert (tensor.dtype, tuple(tensor.shape)) == shapes[key], key
                    content = tensor_bytes(tensor)
                    with _disk_errors(target.parent):
                        file.seek(form.offsets[key])
                        file.write(content)
                    digests[key] = hashlib.sha256(content).digest()
                if progress:
                    progress(index + 1, len(names))
            assert digests.keys() == shapes.keys()
            metadata[SHA_KEY] = checksum(digests)
            with _disk_errors(target.parent):
                file.seek(0)
                file.write(layout(shapes, metadata).header)  # of the same length
        entries, prefix = base.files.entries, base.naming.prefix
        read = sum(entry.bytes for key, entry in entries.items() if key.startswith(prefix))
    return Written(target, storage, form.size, read, time.perf_counter() - started)


# ---------------------------------------------------------------- what is written

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # key -> dtype and shape


def _shapes(base: BaseCheckpoint, name: str, storage: str, double_quant: bool) -> Shapes:
    """Of the tensors that `_tensors` gives for one of the model's, before any is read."""
    module, _, kind = name.rpartition(".")
    if kind != "weight":
        shape = (base.spec.head_dim,) if kind == "scale" else linear_shape(module, base.spec)[:1]
        return {name: (_vector_dtype(base, name), shape)}
    N, K = linear_shape(module, base.spec)
    storage = _storage_of(base, name, storage)
    if storage == "bf16":
        return {name: (torch.bfloat16, (N, K))}
    if storage != "nf4":
        dtype = torch.int8 if storage == "int8" else torch.float8_e4m3fn
        return {name: (dtype, (N, K)), f"{module}.scale_weight": (torch.float32, (N, 1))}
    blocks = N * K // BLOCK
    nested = base.is_nested_nf4(name) if base.is_nf4(name) else double_quant
    shapes = {
        name: (torch.uint8, (N * K // 2, 1)),
        f"{name}.absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
        f"{name}.quant_map": (torch.float32, (16,)),
        f"{name}.{STATE}nf4": (torch.uint8, (_STATE_BYTES,)),
    }
    if nested:
        shapes[f"{name}.nested_absmax"] = torch.float32, (-(-blocks // 256),)
        shapes[f"{name}.nested_quant_map"] = torch.float32, (256,)
    return shapes


def _storage_of(base: BaseCheckpoint, name: str, storage: str) -> str:
    """bf16, or the storage; as `layer_precisions` and `FrozenLinear.set_weight` choose it."""
    module = name.rpartition(".")[0]
    storage = layer_precisions(base.spec, storage, "bf16")[module].storage
    fits = linear_shape(module, base.spec)[1] % BLOCK == 0
    return storage if storage != "nf4" or fits else "bf16"


def _vector_dtype(base: BaseCheckpoint, name: str) -> torch.dtype:
    """Of a bias or norm: the source's where all its parts agree on a float of 16 or 32 bits."""
    kinds = {base.files.entries[key].dtype for key in base.keys(name)}
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if len(kinds) == 1 and (dtype := known.get(next(iter(kinds)))):
        return dtype
    return torch.bfloat16 if all(kind.startswith("F8") for kind in kinds) else torch.float32


def _tensors(
    base: BaseCheckpoint, name: str, storage: str, double_quant: bool
) -> Iterator[tuple[str, Tensor]]:
    module, _, kind = name.rpartition(".")
    weight = base.read_stored(name)
    if kind != "weight":
        yield name, dequantize(weight).to(_vector_dtype(base, name))
        return
    storage = _storage_of(base, name, storage)
    if storage == "bf16":
        yield name, dequantize(weight).to(torch.bfloat16)
    elif storage == "nf4":
        if not isinstance(weight, NF4Tensor):
            weight = nf4_quantize(dequantize(weight).contiguous(), double_quant)
        yield from _nf4_tensors(name, weight)
    else:
        rows = _rows(weight, storage)
        yield name, rows.values
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
    yield f"{name}.{STATE}nf4", torch.tensor(list(state), dtype=torch.uint8)
    if weight.nested_absmax is not None:
        yield f"{name}.nested_absmax", weight.nested_absmax
        yield f"{name}.nested_quant_map", dynamic_map(cpu)


def _rows(weight: Tensor | NF4Tensor | QuantizedRows, kind: str) -> QuantizedRows:
    """In 8 bits; a dense matrix some rows at a time, as the fp32 copies would be large."""
    if isinstance(weight, QuantizedRows) and weight.kind == kind:
        return weight
    pieces = [quantize_8bit(rows, kind) for rows in dequantize(weight).split(_ROWS)]
    values = torch.cat([values.view(torch.uint8) for values, _ in pieces])
    scale = torch.cat([scale for _, scale in pieces])
    return QuantizedRows(values.view(pieces[0][0].dtype), scale)


# ---------------------------------------------------------------- writing


@contextmanager
def _new_file(target: Path, size: int) -> Iterator[BinaryIO]:
    """A file to be filled with `size` bytes: put in place at the end, or, where something is
    raised, removed.
    """
    folder, partial = target.parent, partial_of(target)
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise FluxfastError(
                f"{folder} has {free / 1e9:.1f} GB free, the file needs {size / 1e9:.1f}",
                hint="free some space, or name another folder",
            )
        file = open(partial, "wb")  # noqa: SIM115  closed below
    try:
        yield file
        with _disk_errors(folder):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(partial, target)
    finally:
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """An OSError becomes a DiskError that names the folder."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"cannot write into {folder}: {error.strerror or error}",
            hint="free some space, or name a folder that you may write to",
        ) from None


def checksum(digests: dict[str, bytes]) -> str:
    """SHA-256 of the tensors' SHA-256 digests, ordered by name."""
    return hashlib.sha256(b"".join(digests[key] for key in sorted(digests))).hexdigest()


def verify(files: Files) -> bool | None:
    """Whether a prequantized file holds what was written; None where it has no checksum."""
    expected = files.metadata.get(SHA_KEY)
    if expected is None:
        return None
    contents = ((key, tensor_bytes(files.read(key))) for key in files.entries)
    return checksum({key: hashlib.sha256(data).digest() for key, data in contents}) == expected
