"""Cache files: what a prepared data set is, and how its tensors are written and read.

The trainer reads through this file alone, so it imports no image library and no encoder.
"""

import contextlib
import io
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from fluxfast.data.buckets import Areas
from fluxfast.errors import FluxfastError
from fluxfast.formats.container import tensor_bytes, write
from fluxfast.util.files import write_atomic

SPACE_HINT = "set `cache_dir` to a folder with enough space that you may write to"
LATENTS = ("mean", "std")
TEXT = ("t5", "pooled")


class CacheDamaged(FluxfastError):
    """A cache file is missing, or was damaged and has been deleted: it has to be encoded again."""

    def __init__(self, path: Path, message: str):
        super().__init__(message, hint="`fluxfast cache` encodes it again")
        self.path = path


@dataclass
class Sample:
    """One image at one resolution; a data set lists it once per repeat.

    latents: mean and std [C, h, w] fp32, optionally mask [h, w] fp32; flipped: the same, mirrored.
    texts: one file per caption variant: t5 [L, D], pooled [P]. size: (width, height) in pixels.
    batch_size: of its batches; None: the run's.
    """

    name: str
    size: tuple[int, int]
    latents: Path
    flipped: Path | None
    texts: list[Path]
    caption: str
    caption_dropout: float
    batch_size: int | None = None


@dataclass
class Dataset:
    """Every sample, with repeats and resolutions expanded, the file of the empty prompt, and the
    areas that buckets are merged to.
    """

    samples: list[Sample]
    empty_text: Path
    areas: Areas = field(default_factory=dict)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file atomically, with a checksum of each tensor as its metadata.

    Raises FluxfastError naming the folder if it cannot be written to (full, read-only, no
    permission).
    """
    content = io.BytesIO()
    write(content, tensors, {name: _checksum(tensor) for name, tensor in tensors.items()})
    write_atomic(path, content.getvalue(), hint=SPACE_HINT)


def read_tensors(path: Path, required: tuple[str, ...]) -> dict[str, Tensor]:
    """Read a file of `write_tensors` to the CPU and verify its checksums.

    Raises CacheDamaged naming the file if it is missing, truncated, corrupt or lacks a `required`
    tensor. Such a file is deleted, since the cache step reads only headers.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = f"cannot read the cache file {path}: {error.strerror or error}"
        raise CacheDamaged(path, reason) from None
    try:
        return _verified(data, required)
    except (SafetensorError, ValueError, KeyError) as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        problem = " ".join(str(error).split())
        reason = f"the cache file {path} was corrupt and has been deleted: {problem}"
        raise CacheDamaged(path, reason) from None


def _verified(data: bytes, required: tuple[str, ...]) -> dict[str, Tensor]:
    tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    checksums = header.get("__metadata__", {})
    for name in required:
        if name not in tensors:
            raise ValueError(f"it lacks {name!r}")
    for name, tensor in tensors.items():
        if checksums.get(name) != _checksum(tensor):
            raise ValueError(f"the checksum of {name!r} does not match")
    return tensors


def is_complete(path: Path, required: tuple[str, ...]) -> bool:
    """Returns whether the file's header is sound, names the `required` tensors and their checksums,
    and fits the file's size. Reads no tensor.
    """
    try:
        with safe_open(path, "numpy") as file:
            names, checksums = set(file.keys()), set(file.metadata() or {})
    except (OSError, SafetensorError):
        return False
    return set(required) <= names == checksums


def _checksum(tensor: Tensor) -> str:
    return str(zlib.crc32(tensor_bytes(tensor)))
