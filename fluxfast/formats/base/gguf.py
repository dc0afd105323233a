"""Reads GGUF files (city96's FLUX checkpoints and others): F32, F16, BF16 and ggml's block types.

    "GGUF" | version u32 | tensors u64 | pairs u64 | pairs: key, type u32, value | tensors: name,
    dimensions u32, [u64] innermost first, type u32, offset u64 | padding to `general.alignment` |
    data;   a string is its length u64 and its bytes; all little-endian

The header is parsed here, within bounds: a false length would keep the `gguf` package's own reader
in an endless loop. That package dequantizes the block types, tensor by tensor.

Source: ggml's docs/gguf.md, versions 2 and 3.
"""

import contextlib
import math
import mmap
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.formats.container import Entry

ARCHITECTURE = "general.architecture"  # of a file's metadata: flux, t5, llama, …
_HEADER_LIMIT = 100_000_000  # bytes, the limit of safetensors
# type of a scalar -> struct's letter
_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_ROWS = 128  # dequantized at once by one thread
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": np.int16, "F64": np.float64}
_KINDS = ("4_0", "4_1", "5_0", "5_1", "8_0", "2_K", "3_K", "4_K", "5_K", "6_K")
BLOCK_TYPES = tuple(f"Q{kind}" for kind in _KINDS)


class _Damaged(ValueError):
    """The header cannot be read; the message says why."""


class Gguf:
    """An open GGUF file. `read` dequantizes block types to fp32, and keeps other dtypes."""

    kind = "GGUF"

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            header = _Header(self._map)
        except _Damaged as error:
            self._map.close()
            raise ConfigError(
                f"cannot read {path}: {error}", hint="download the file again"
            ) from None
        self.metadata: dict[str, str] = {ARCHITECTURE: header.architecture}
        self.entries = {name: entry for name, (entry, _) in header.tensors.items()}
        self._offsets = {name: offset for name, (_, offset) in header.tensors.items()}

    def read(self, key: str) -> Tensor:
        entry = self.entries[key]
        if entry.dtype not in (*_PLAIN, *BLOCK_TYPES):
            raise ConfigError(
                f"{self.path}: {key} is stored as {entry.dtype}, which is not read here",
                hint=f"read are F32, F16, BF16, {', '.join(BLOCK_TYPES)}",
            )
        kind = _PLAIN.get(entry.dtype, np.uint8)
        count = entry.bytes // np.dtype(kind).itemsize
        data = np.frombuffer(self._map, kind, count, self._offsets[key])
        if entry.dtype in BLOCK_TYPES:
            return _dequantize(data, entry)
        # a copy: the map is read-only, and a view would keep it open
        values = torch.from_numpy(data.copy()).view(entry.shape)
        return values.view(torch.bfloat16) if entry.dtype == "BF16" else values

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # an error's traceback may still hold a view
            self._map.close()


def _dequantize(data: np.ndarray, entry: Entry) -> Tensor:
    """Dequantizes a block type to fp32, the rows split among threads: gguf itself uses one core."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[entry.dtype]
    out = np.empty(entry.shape, np.float32)
    flat = out.reshape(-1, entry.shape[-1])
    rows = data.reshape(len(flat), -1)

    def dequantize_rows(start: int) -> None:
        piece = slice(start, start + _ROWS)
        with np.errstate(all="ignore"):  # infinite scales are found in the values
            flat[piece] = dequantize(rows[piece], kind)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(dequantize_rows, range(0, len(rows), _ROWS)))
    return torch.from_numpy(out)


class _Header:
    """A parsed header. tensors: name -> (Entry, offset in the file)."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at = data, 4
        self._end = min(len(data), _HEADER_LIMIT)
        version = self._number("I")
        if version not in (2, 3):
            raise _Damaged(f"GGUF version {version} is not 2 or 3")
        tensors, pairs = self._number("Q"), self._number("Q")
        alignment, self.architecture = 32, ""
        for _ in range(pairs):
            key, value = self._string(), self._value(self._number("I"))
            if key == "general.alignment" and value is not None:
                alignment = value
            if key == ARCHITECTURE and isinstance(value, str) and value.isprintable():
                self.architecture = value
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _Damaged(f"its alignment {alignment!r} is no power of two")
        infos = [self._tensor() for _ in range(tensors)]
        start = -(-self._at // alignment) * alignment
        self.tensors = {}
        for name, entry, offset in infos:
            if name in self.tensors:
                raise _Damaged(f"tensor {name!r} is there twice")
            self.tensors[name] = entry, start + offset
        self._check_data(len(data))

    def _check_data(self, size: int) -> None:
        """Checks that all data lie inside the file and no two tensors overlap."""
        spans = sorted((at, at + entry.bytes, n) for n, (entry, at) in self.tensors.items())
        previous = 0
        for start, end, name in spans:
            if end > size:
                raise _Damaged(f"it is truncated: {name!r} ends at byte {end} of {size}")
            if start < previous and end > start:
                raise _Damaged(f"{name!r} overlaps another tensor")
            previous = max(previous, end)

    def _take(self, count: int) -> bytes:
        if count > self._end - self._at:
            raise _Damaged("its header is damaged: it runs past the end")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self, code: str):
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        try:
            return self._take(self._number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged("its header is damaged: a name is not UTF-8") from None

    def _value(self, kind: int):
        """Returns a number, bool or string; skips an array and returns None."""
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_scalar(kind))
        inner, count = self._number("I"), self._number("Q")
        if inner == _STRING:
            for _ in range(count):
                self._take(self._number("Q"))
        else:
            self._take(count * struct.calcsize("<" + _scalar(inner)))
        return None

    def _tensor(self) -> tuple[str, Entry, int]:
        name, dimensions = self._string(), self._number("I")
        if dimensions > 4:
            raise _Damaged(f"{name!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        kind, offset = self._number("I"), self._number("Q")
        dtype, size = _size(name, kind, shape)
        return name, Entry(dtype, shape, size), offset


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise _Damaged(f"its header is damaged: no value is of type {kind}")
    return _SCALARS[kind]


def _size(name: str, kind: int, shape: tuple[int, ...]) -> tuple[str, int]:
    """Returns ggml's name of the type `kind`, and the tensor's size in bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        raise _Damaged(f"{name!r} is of an unknown type {kind}") from None
    block, size = GGML_QUANT_SIZES[known]
    if (shape[-1] if shape else 1) % block:
        raise _Damaged(f"{name!r} has rows of {shape[-1]}, no multiple of {known.name}'s {block}")
    return known.name, math.prod(shape) // block * size
