"""Safetensors files out, one tensor at a time: the same tensors and metadata give the same bytes.

The library's own writer wants every tensor on the CPU at once, and orders metadata by chance.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


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
        span = [starts[key], end]
        table[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": span}
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
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
