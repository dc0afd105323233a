"""`fluxfast quantize`: converts a base checkpoint of any form into one quantized file.

The output is a .safetensors file in Black Forest Labs' names. Inside the blocks

    nf4           bitsandbytes' form (see bnb.py), which Forge and ComfyUI's NF4 nodes read too
    int8, fp8     X.weight quantized, X.scale_weight fp32 [N, 1] (see eight_bit.py)

and around them bf16; biases and norms keep the source's dtype. What the source has in the storage
asked for is copied as it is. Every size is known before a matrix is read, so the header is written
first and then one matrix after another.

Metadata: fluxfast.storage, fluxfast.version, fluxfast.source, and fluxfast.sha256, the SHA-256 of
the tensors' own SHA-256 digests, ordered by name.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fluxfast_kernels.quant.frozen import quantize_8bit
from fluxfast_kernels.quant.nf4 import BLOCK, NESTED_BLOCK, NF4Tensor, nf4_quantize
from fluxfast_kernels.quant.rows import QuantizedRows
from torch import Tensor

from fluxfast import __version__
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.bnb import STATE, WRITTEN_STATE_BYTES, nf4_tensors
from fluxfast.formats.base.eight_bit import join_rows
from fluxfast.formats.base.reader import STORAGE_KEY, BaseCheckpoint, open_base
from fluxfast.formats.container import layout, tensor_bytes
from fluxfast.formats.opened import Files
from fluxfast.model.frozen_linear import dequantize
from fluxfast.model.names import linear_shape, tensor_sources
from fluxfast.model.precision import layer_precisions
from fluxfast.model.spec import FluxSpec
from fluxfast.util.files import check_new, new_file

STORAGES = ("nf4", "int8", "fp8")
SHA_KEY = "fluxfast.sha256"
_ROWS = 2048  # quantized to 8 bits at once: 25 to 126 MB of fp32 in FLUX.1-dev

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # key -> dtype and shape


def quantize(
    source: Path | str,
    target: Path | str,
    storage: str = "nf4",
    *,
    double_quant: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Writes `source` (anything that `open_base` takes) to the file `target` in nf4, int8 or fp8,
    and returns a line about sizes and speed.

    double_quant: nf4 with scales in 8 bits; a source in NF4 keeps its own. progress gets (done,
    total) in tensors. Raises ConfigError for a source or target that cannot be used, FluxfastError
    where the disk refuses; then nothing is left of `target`.
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
        storages = _storages(base.spec, storage)
        shapes: Shapes = {}
        for name, kind in storages.items():
            shapes |= _shapes(base, name, kind, double_quant)
        form, digests = layout(shapes, metadata), {}
        with new_file(target, "free some space, or name a folder that you may write to") as file:
            _check_space(target.parent, form.size)
            for index, (name, kind) in enumerate(storages.items()):
                for key, tensor in _tensors(base, name, kind, double_quant).items():
                    assert (tensor.dtype, tuple(tensor.shape)) == shapes[key], key
                    content = tensor_bytes(tensor)
                    file.seek(form.offsets[key])
                    file.write(content)
                    digests[key] = hashlib.sha256(content).digest()
                if progress:
                    progress(index + 1, len(storages))
            assert digests.keys() == shapes.keys()
            metadata[SHA_KEY] = _checksum(digests)
            file.seek(0)
            file.write(layout(shapes, metadata).header)  # of the same length
        entries, prefix = base.files.entries, base.naming.prefix
        size = sum(entry.bytes for key, entry in entries.items() if key.startswith(prefix))
    seconds = time.perf_counter() - started
    return (
        f"{form.size / 1e9:.3g} GB in {storage} from {size / 1e9:.3g} GB, {seconds:.1f} s, "
        f"{size / seconds / 1e9:.2g} GB/s"
    )


def verify(files: Files) -> bool:
    """Returns whether a file that `quantize` wrote still holds the same tensors."""
    contents = ((key, tensor_bytes(files.read(key))) for key in files.entries)
    digests = {key: hashlib.sha256(data).digest() for key, data in contents}
    return _checksum(digests) == files.metadata[SHA_KEY]


def _checksum(digests: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(digests[key] for key in sorted(digests))).hexdigest()


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise FluxfastError(
            f"{folder} has {free / 1e9:.1f} GB free, the file needs {size / 1e9:.1f}",
            hint="free some space, or name another folder",
        )


def _storages(spec: FluxSpec, storage: str) -> dict[str, str | None]:
    """Returns the storage of each matrix by its BFL name, as `FrozenLinear.set_weight` chooses it;
    None for biases and norms.
    """
    precisions = layer_precisions(spec, storage, "bf16")
    storages = {}
    for name in tensor_sources(spec):
        module, _, kind = name.rpartition(".")
        storages[name] = precisions[module].storage if kind == "weight" else None
        if storages[name] == "nf4" and linear_shape(module, spec)[1] % BLOCK:
            storages[name] = "bf16"
    return storages


def _shapes(base: BaseCheckpoint, name: str, storage: str | None, double_quant: bool) -> Shapes:
    """Returns the dtypes and shapes of the tensors that `_tensors` makes."""
    module = name.rpartition(".")[0]
    if storage is None:
        vector = base.read(name)
        return {name: (vector.dtype, tuple(vector.shape))}
    N, K = linear_shape(module, base.spec)
    if storage == "bf16":
        return {name: (torch.bfloat16, (N, K))}
    if storage != "nf4":
        dtype = torch.int8 if storage == "int8" else torch.float8_e4m3fn
        return {name: (dtype, (N, K)), f"{module}.scale_weight": (torch.float32, (N, 1))}
    blocks = N * K // BLOCK
    nested = base.is_nested_nf4(name) if base.is_nf4(name) else double_quant
    shapes: Shapes = {
        name: (torch.uint8, (N * K // 2, 1)),
        f"{name}.absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
        f"{name}.quant_map": (torch.float32, (16,)),
        f"{name}.{STATE}nf4": (torch.uint8, (WRITTEN_STATE_BYTES,)),
    }
    if nested:
        shapes[f"{name}.nested_absmax"] = torch.float32, (-(-blocks // NESTED_BLOCK),)
        shapes[f"{name}.nested_quant_map"] = torch.float32, (256,)
    return shapes


def _tensors(
    base: BaseCheckpoint, name: str, storage: str | None, double_quant: bool
) -> dict[str, Tensor]:
    weight = base.read_stored(name)
    if storage is None:
        return {name: dequantize(weight)}
    if storage == "bf16":
        return {name: dequantize(weight).to(torch.bfloat16)}
    if storage == "nf4":
        if not isinstance(weight, NF4Tensor):
            weight = nf4_quantize(dequantize(weight).contiguous(), double_quant)
        return nf4_tensors(name, weight)
    rows = weight
    if not isinstance(rows, QuantizedRows) or rows.kind != storage:
        # some rows at a time, as the fp32 copies would be large
        pieces = dequantize(weight).split(_ROWS)
        rows = join_rows([QuantizedRows(*quantize_8bit(piece, storage)) for piece in pieces])
    return {name: rows.values, f"{name.removesuffix('weight')}scale_weight": rows.scale[:, None]}
