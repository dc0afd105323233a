"""Reads and writes .safetensors files one tensor at a time.

The same tensors and metadata give the same bytes; the library's own writer orders metadata by
chance, and wants every tensor on the CPU at once.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxfast.errors import ConfigError

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors_in(folder: Path) -> list[Path]:
    """Returns the files of a folder that are called .safetensors or .sft, in order."""
    files = (file for file in folder.glob("*") if not file.name.startswith("."))
    return sorted(file for file in files if file.suffix.lower() in (".safetensors", ".sft"))


@dataclass(frozen=True)
class Entry:
    """One tensor in a file's header. dtype: as safetensors or ggml name it; bytes: in the file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def all_finite(tensor: Tensor) -> bool:
    """Returns whether a tensor of floats (of 16 bits or more) holds neither NaN nor infinity."""
    # a sum is many times faster than isfinite, and finite only if every number is; a sum of finite
    # numbers may overflow (fp16)
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


class Safetensors:
    """An open .safetensors file. The library checks header, shapes, offsets and length; `read`
    returns a view into the mapped file.
    """

    kind = "safetensors"

    def __init__(self, path: Path):
        self.path = path
        self._handle = safe_open(path, framework="pt")
        self.metadata: dict[str, str] = dict(self._handle.metadata() or {})
        self.entries: dict[str, Entry] = {}
        for key in self._handle.keys():  # noqa: SIM118
            entry = self._handle.get_slice(key)
            dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
            bits = re.search(r"\d+", dtype)  # F32, F8_E4M3, …; BOOL takes a byte
            size = math.prod(shape) * int(bits[0] if bits else 8) // 8
            self.entries[key] = Entry(dtype, shape, size)

    def read(self, key: str) -> Tensor:
        try:
            return self._handle.get_tensor(key)
        except (SafetensorError, AttributeError) as error:  # of 4 or 6 bits, which torch lacks
            raise ConfigError(
                f"cannot read {self.path}: {key} is stored as {self.entries[key].dtype}: {error}"
            ) from None

    def close(self) -> None:
        self._handle.__exit__(None, None, None)


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Layout:
    """A file's layout in bytes: its header, where each tensor begins (in file order), its size."""

    header: bytes
    offsets: dict[str, int]
    size: int


def layout(
    shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> Layout:
    """Lays out tensors of these dtypes and shapes. Raises KeyError for a dtype it cannot hold."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    # widest first, as the library orders them: every tensor is aligned
    for key in sorted(shapes, key=lambda key: (-shapes[key][0].itemsize, key)):
        dtype, shape = shapes[key]
        starts[key] = end
        end += math.prod(shape) * dtype.itemsize
        table[key] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[key], end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the data starts at a multiple of 64
    header = len(text).to_bytes(8, "little") + text
    offsets = {key: len(header) + start for key, start in starts.items()}
    return Layout(header, offsets, len(header) + end)


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a whole file. Tensors may be on any device: one at a time is copied to the CPU."""
    form = layout({key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}, metadata)
    file.write(form.header)
    for key in form.offsets:
        file.write(tensor_bytes(tensors[key]))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns a tensor's values as bytes, in order; a view of a contiguous tensor on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
