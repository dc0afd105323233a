"""Matrices in bitsandbytes' 4-bit form, as lllyasviel's all-in-one files and diffusers save them.

    X.weight                    uint8 [N * K / 2, 1], the first of a pair in the high nibble
    X.weight.absmax             fp32 per block, or uint8 where it is itself quantized
    X.weight.quant_map          fp32 [16]
    X.weight.nested_absmax, X.weight.nested_quant_map     fp32 per 256 blocks, fp32 [256]
    X.weight.quant_state.bitsandbytes__nf4     JSON in bytes: shape, blocksize, nested_offset, …

What has NF4's table, blocks that hold whole 64s and rows that hold whole blocks of 64 stays as it
is, bytes and all; the rest (FP4, other tables) is dequantized to fp32.

Source: bitsandbytes 0.50 `functional.QuantState.as_dict` and `dequantize_4bit`.
"""

import json
import math
from dataclasses import dataclass
from typing import cast

import torch
from fluxfast_kernels.quant.nf4 import (
    BLOCK,
    NESTED_BLOCK,
    NF4Tensor,
    code_table,
    dynamic_map,
    nf4_absmax,
)
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.formats.opened import Files

KINDS = ("nf4", "fp4")
STATE = "quant_state.bitsandbytes__"
_LONGEST_STATE = 65536  # bytes
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class State:
    """What a matrix is: by its JSON, and whether an NF4Tensor takes it byte for byte (is_nf4), its
    quantized absmax too (is_nested_nf4).
    """

    kind: str  # "nf4" or "fp4"
    shape: tuple[int, int]
    blocksize: int
    nested: tuple[int, float] | None  # blocksize and offset of a quantized absmax
    is_nf4: bool
    is_nested_nf4: bool


def bnb_state(files: Files, key: str) -> State | None:
    """The state of the matrix `key`, None where it is not in this form.

    Raises ConfigError where the state or the tensors beside it do not fit together.
    """
    kind = next((kind for kind in KINDS if f"{key}.{STATE}{kind}" in files.entries), None)
    if kind is None:
        return None
    shape, blocksize, nested = _parse_state(files, f"{key}.{STATE}{kind}", kind)
    count = math.prod(shape)
    stored, half = files.entries[key].bytes, -(-count // 2)
    _check(files, key, stored == half, f"{half} bytes for {shape}", f"{stored}")
    # one value per block; several of bitsandbytes' blocks of 64 never share one
    blocks = -(-count // blocksize)
    _check_values(files, f"{key}.quant_map", "F32", 16)
    _check_values(files, f"{key}.absmax", "U8" if nested else "F32", blocks)
    if nested:
        _check_values(files, f"{key}.nested_absmax", "F32", -(-blocks // nested[0]))
        _check_values(files, f"{key}.nested_quant_map", "F32", 256)
    whole = shape[1] % BLOCK == 0 and count % blocksize == 0 and blocksize % BLOCK == 0
    is_nf4 = kind == "nf4" and whole and _holds(files, f"{key}.quant_map", code_table(_CPU))
    is_nested = is_nf4 and nested is not None and (blocksize, nested[0]) == (BLOCK, NESTED_BLOCK)
    is_nested = is_nested and _holds(files, f"{key}.nested_quant_map", dynamic_map(_CPU))
    return State(kind, shape, blocksize, nested, is_nf4, is_nested)


def _holds(files: Files, key: str, table: Tensor) -> bool:
    return torch.equal(files.read(key).flatten(), table)


def _parse_state(
    files: Files, name: str, kind: str
) -> tuple[tuple[int, int], int, tuple[int, float] | None]:
    """Shape, blocksize and nested (see State)."""
    entry = files.entries[name]
    known = entry.dtype == "U8" and entry.bytes <= _LONGEST_STATE
    _check(files, name, known, f"at most {_LONGEST_STATE} bytes of JSON", f"{entry.bytes} bytes")
    try:
        state = json.loads(bytes(files.read(name).flatten().tolist()))
        if state.get("quant_type", kind) != kind:
            raise ValueError(state["quant_type"])
        nested = None
        if "nested_offset" in state:
            nested = _size(state["nested_blocksize"]), float(state["nested_offset"])
            if not math.isfinite(nested[1]):
                raise ValueError(nested)
        rows, columns = state["shape"]
        return (_size(rows), _size(columns)), _size(state["blocksize"]), nested
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        wanted = f"JSON of {kind} with shape [N, K], blocksize and nested_*"
        raise _unfit(files, name, wanted, "something else") from None


def _size(value: object) -> int:
    if type(value) is not int or not 0 < value < 2**40:
        raise ValueError(value)
    return value


def _check_values(files: Files, key: str, dtype: str, count: int) -> None:
    entry = files.entries.get(key)
    got = "nothing" if entry is None else f"{entry.dtype} of {entry.count} values"
    wanted = f"{dtype} of {count} values"
    _check(files, key, got == wanted, wanted, got)


def _check(files: Files, key: str, fits: bool, wanted: str, got: str) -> None:
    if not fits:
        raise _unfit(files, key, wanted, got)


def _unfit(files: Files, key: str, wanted: str, got: str) -> ConfigError:
    return ConfigError(f"{files.containers[0].path}: {key} should hold {wanted}, has {got}")


def read_bnb(files: Files, key: str, state: State) -> NF4Tensor | Tensor:
    """The matrix quantized where it may stay so, else fp32 [N, K]. Both on the CPU."""
    packed = files.read(key).reshape(-1).view(torch.uint8)
    absmax = files.read(f"{key}.absmax").flatten()
    if state.is_nested_nf4:
        nested = files.read(f"{key}.nested_absmax").flatten()
        assert state.nested is not None
        offset = torch.tensor(state.nested[1], dtype=torch.float32)
        return NF4Tensor(packed[:, None], absmax, state.shape, nested, offset)
    if state.nested:
        size, offset = state.nested
        table = files.read(f"{key}.nested_quant_map").flatten()
        scale = files.read(f"{key}.nested_absmax").flatten().repeat_interleave(size)
        absmax = table[absmax.int()] * scale[: len(absmax)] + offset
    if state.is_nf4:
        times = state.blocksize // BLOCK
        absmax = absmax.repeat_interleave(times) if times > 1 else absmax
        return NF4Tensor(packed[:, None], absmax, state.shape)
    count = math.prod(state.shape)
    table = files.read(f"{key}.quant_map").flatten()
    index = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:count].int()
    scale = absmax.repeat_interleave(state.blocksize)[:count]
    return (table[index] * scale).view(state.shape)


def join_nf4(parts: list[NF4Tensor]) -> NF4Tensor:
    """Stack the rows of several matrices, byte for byte. Nested scales stay so where all parts have
    them and all but the last fill whole groups of 256; each group keeps its own part's offset.
    """
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    packed = torch.cat([part.packed for part in parts])
    nested = all(part.nested_absmax is not None for part in parts)
    if not nested or any(part.absmax.numel() % NESTED_BLOCK for part in parts[:-1]):
        return NF4Tensor(packed, torch.cat([nf4_absmax(part) for part in parts]), shape)
    absmax = torch.cat([part.absmax for part in parts])
    pairs = [(cast(Tensor, part.nested_absmax), cast(Tensor, part.offset)) for part in parts]
    groups = torch.cat([scales for scales, _ in pairs])
    offsets = [offset.expand(scales.numel()) for scales, offset in pairs]
    return NF4Tensor(packed, absmax, shape, groups, torch.cat(offsets))


def state_json(weight: NF4Tensor) -> bytes:
    """The JSON of an NF4 matrix, as bitsandbytes writes it. dtype: what it dequantizes to."""
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": weight.shape}
    if weight.nested_absmax is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": cast(Tensor, weight.offset).item(),
        }
    return json.dumps(state).encode()
