"""What a file of tensors holds, by name, before anything is read: the form that .safetensors and
GGUF files share here.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxfast.errors import ConfigError

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16,
    "BF16": 16, "I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


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


class Container(Protocol):
    """An open file. `metadata` holds its strings; `read` maps where it can and copies nothing."""

    path: Path
    kind: str  # "safetensors" or "GGUF"
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def read(self, key: str) -> Tensor: ...

    def close(self) -> None: ...


class Safetensors:
    """An open .safetensors file. Its library checks header, shapes, offsets and length."""

    kind = "safetensors"

    def __init__(self, path: Path):
        self.path = path
        self._handle = safe_open(path, framework="pt")
        self.metadata = dict(self._handle.metadata() or {})
        self.entries = {}
        for key in self._handle.keys():  # noqa: SIM118
            entry = self._handle.get_slice(key)
            dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
            size = math.prod(shape) * BITS.get(dtype, 8) // 8
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
