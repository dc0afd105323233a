"""Files of tensors: what a .safetensors or GGUF file holds, by name, before anything is read; and
.safetensors files out, one tensor at a time, the same bytes for the same tensors and metadata (the
library's own writer wants every tensor on the CPU at once, and orders metadata by chance).
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


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. dtype: as safetensors or ggml name it; bytes: in the file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floats (of 16 bits or more) holds neither NaN nor infinity."""
    # a sum is NaN or infinite where any number is, and many times faster than isfinite; where it
    # overflows by itself (fp16) the numbers are looked at
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


class Safetensors:
    """An open .safetensors file. Its library checks header, shapes, offsets and length; `read` maps
    and copies nothing.
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
    """header: how the file starts. offsets: where each tensor begins in it, in file order. size: of
    the whole. All in bytes.
    """

    header: bytes
    offsets: dict[str, int]
    size: int


def layout(
    shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> Layout:
    """Where tensors of these dtypes and shapes go. KeyError for a dtype that the format lacks."""
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
    """Write a whole file. Tensors may be on any device: one at a time is copied to the CPU."""
    form = layout({key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}, metadata)
    file.write(form.header)
    for key in form.offsets:
        file.write(tensor_bytes(tensors[key]))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values in order, as bytes; of its own memory where it lies so on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
