"""Cache files: what a prepared data set is, and how its tensors are written and read.

The trainer reads through this file alone, so it imports no image library and no encoder.
"""

import contextlib
import io
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from torch import Tensor

from fluxfast.errors import FluxfastError
from fluxfast.formats.container import write
from fluxfast.util.files import write_atomic

SPACE_HINT = "set `cache_dir` to a folder with enough space that you may write to"
LATENTS = ("mean", "std")
TEXT = ("t5", "pooled")


class CacheDamaged(FluxfastError):
    """A cache file is gone or damaged; it is not there any more, so that it is encoded anew."""

    def __init__(self, path: Path, message: str):
        super().__init__(message, hint="`fluxfast cache` encodes it anew")
        self.path = path


@dataclass
class Sample:
    """One image at one resolution, as often as it is repeated.

    latents: mean and std [C, h, w] fp32, perhaps mask [h, w] fp32; flipped: the same, mirrored.
    texts: one file per caption variant: t5 [L, D], pooled [P]. size: (width, height) in pixels.
    """

    name: str
    size: tuple[int, int]
    latents: Path
    flipped: Path | None
    texts: list[Path]
    caption: str
    caption_dropout: float


@dataclass
class Dataset:
    """Every sample, repeats and resolutions expanded. buckets: (width, height) -> samples in it."""

    samples: list[Sample]
    empty_text: Path
    buckets: dict[tuple[int, int], int]


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file whole or not at all, with a checksum of each tensor.

    Raises FluxfastError naming the folder if it cannot be written to (full, read-only, no
    permission).
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = {name: str(_checksum(tensor)) for name, tensor in tensors.items()}
    content = io.BytesIO()
    write(content, tensors, sums)
    write_atomic(path, content.getvalue(), hint=SPACE_HINT)


def read_tensors(path: Path, required: tuple[str, ...]) -> dict[str, Tensor]:
    """Read a file of `write_tensors`, on the CPU, checksums verified.

    Raises CacheDamaged naming the file if it is gone, truncated, corrupt or lacks a `required`
    tensor; such a file is deleted, since the cache step looks at headers alone.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = f"cannot read the cache file {path}: {error.strerror or error}"
        raise CacheDamaged(path, reason) from None
    try:
        return _verified(data, required)
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        said = " ".join(str(error).split())
        reason = f"the cache file {path} was corrupt and has been deleted: {said}"
        raise CacheDamaged(path, reason) from None


def _verified(data: bytes, required: tuple[str, ...]) -> dict[str, Tensor]:
    tensors, sums = parse(data), _header(data[: 8 + int.from_bytes(data[:8], "little")])[1]
    for name in required:
        if name not in tensors:
            raise ValueError(f"it lacks {name!r}")
    for name, tensor in tensors.items():
        if sums.get(name) != str(_checksum(tensor)):
            raise ValueError(f"the checksum of {name!r} does not match")
    return tensors


def is_complete(path: Path, required: tuple[str, ...]) -> bool:
    """True if the file's header is sound, names the `required` tensors and fits the file's size.

    Reads the header alone, no tensor.
    """
    try:
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            size = os.fstat(file.fileno()).st_size
            if len(prefix) < 8 or length > size - 8:
                return False
            end, sums, names = _header(prefix + file.read(length))
    except (OSError, ValueError, RecursionError):
        return False
    return size == 8 + length + end and set(required) <= names == set(sums)


def _header(head: bytes) -> tuple[int, dict[str, str], set[str]]:
    """Length and JSON header -> (bytes of tensor data, checksums, tensor names), or ValueError."""
    header = json.loads(head[8:])
    try:
        sums = dict(header.pop("__metadata__", {}))
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        return end, sums, set(header)
    except (AttributeError, IndexError, KeyError, TypeError, OverflowError):
        raise ValueError("not a header of safetensors") from None


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.view(torch.uint8).numpy().data)
