"""Reads and writes matrices in bitsandbytes' 4-bit form, as lllyasviel's all-in-one files and
diffusers save them.

    X.weight                    uint8 [N * K / 2, 1], the first of a pair in the high nibble
    X.weight.absmax             fp32 per block, or uint8 where it is itself quantized
    X.weight.quant_map          fp32 [16]
    X.weight.nested_absmax, X.weight.nested_quant_map     fp32 per 256 blocks, fp32 [256]
    X.weight.quant_state.bitsandbytes__nf4     JSON in bytes: shape, blocksize, nested_offset, …

A matrix stays quantized, byte for byte, if it has NF4's table, blocks of whole 64s and rows of
whole blocks of 64; others (FP4, other tables) are dequantized to fp32.

Source: bitsandbytes 0.50 `functional.QuantState.as_dict` and `dequantize_4bit`.
"""

import json
import math
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from fluxfast_kernels.quant.nf4 import (
    BLOCK,
    NESTED_BLOCK,
    NF4Tensor,
    code_table,
    dynamic_map,
    nf4_absmax,
)
from pydantic import BaseModel, Field, FiniteFloat, ValidationError
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.formats.opened import Files

KINDS = ("nf4", "fp4")
STATE = "quant_state.bitsandbytes__"
WRITTEN_STATE_BYTES = 256  # of the JSON that is written, padded with spaces
_LONGEST_STATE = 65536  # bytes
_CPU = torch.device("cpu")
_Size = Annotated[int, Field(gt=0, lt=2**40)]


class _StateJson(BaseModel, strict=True):
    shape: tuple[_Size, _Size]
    blocksize: _Size
    quant_type: str | None = None
    nested_blocksize: _Size | None = None
    nested_offset: FiniteFloat | None = None


@dataclass(frozen=True)
class State:
    """The form of a 4-bit matrix.

    is_nf4: an NF4Tensor can hold its packed bytes; is_nested_nf4: its quantized absmax as well.
    """

    shape: tuple[int, int]
    blocksize: int
    nested: tuple[int, float] | None  # blocksize and offset of a quantized absmax
    is_nf4: bool
    is_nested_nf4: bool


def bnb_state(files: Files, key: str) -> State | None:
    """Returns the form of the matrix `key`, or None if it is not in bitsandbytes' form.

    Raises ConfigError if the state or the tensors beside it do not fit together.
    """
    kind = next((kind for kind in KINDS if f"{key}.{STATE}{kind}" in files.entries), None)
    if kind is None:
        return None
    parsed = _parse_state(files, f"{key}.{STATE}{kind}", kind)
    shape, blocksize, count = parsed.shape, parsed.blocksize, math.prod(parsed.shape)
    stored, half = files.entries[key].bytes, -(-count // 2)
    if stored != half:
        raise _misfit(files, key, f"{half} bytes for {shape}", f"{stored}")
    # one value per block; several of bitsandbytes' blocks of 64 never share one
    blocks, nested = -(-count // blocksize), None
    if parsed.nested_offset is not None and parsed.nested_blocksize is not None:
        nested = parsed.nested_blocksize, parsed.nested_offset
        _check_values(files, f"{key}.nested_absmax", "F32", -(-blocks // nested[0]))
        _check_values(files, f"{key}.nested_quant_map", "F32", 256)
    _check_values(files, f"{key}.quant_map", "F32", 16)
    _check_values(files, f"{key}.absmax", "U8" if nested else "F32", blocks)
    whole = shape[1] % BLOCK == 0 and count % blocksize == 0 and blocksize % BLOCK == 0
    is_nf4 = kind == "nf4" and whole and _holds(files, f"{key}.quant_map", code_table(_CPU))
    is_nested = is_nf4 and nested is not None and (blocksize, nested[0]) == (BLOCK, NESTED_BLOCK)
    is_nested = is_nested and _holds(files, f"{key}.nested_quant_map", dynamic_map(_CPU))
    return State(shape, blocksize, nested, is_nf4, is_nested)


def _holds(files: Files, key: str, table: Tensor) -> bool:
    return torch.equal(files.read(key).flatten(), table)


def _parse_state(files: Files, name: str, kind: str) -> _StateJson:
    entry = files.entries[name]
    if entry.dtype != "U8" or entry.bytes > _LONGEST_STATE:
        wanted = f"at most {_LONGEST_STATE} bytes of JSON"
        raise _misfit(files, name, wanted, f"{entry.bytes} bytes")
    try:
        state = _StateJson.model_validate_json(bytes(files.read(name).flatten().tolist()))
        offset_alone = state.nested_offset is not None and state.nested_blocksize is None
        if state.quant_type in (kind, None) and not offset_alone:
            return state
    except ValidationError:
        pass
    wanted = f"JSON of {kind} with shape [N, K], blocksize and nested_*"
    raise _misfit(files, name, wanted, "something else")


def _check_values(files: Files, key: str, dtype: str, count: int) -> None:
    entry = files.entries.get(key)
    stored = "nothing" if entry is None else f"{entry.dtype} of {entry.count} values"
    wanted = f"{dtype} of {count} values"
    if stored != wanted:
        raise _misfit(files, key, wanted, stored)


def _misfit(files: Files, key: str, wanted: str, stored: str) -> ConfigError:
    return ConfigError(f"{files.containers[0].path}: {key} should hold {wanted}, has {stored}")


def read_bnb(files: Files, key: str, state: State) -> NF4Tensor | Tensor:
    """Returns the matrix on the CPU, quantized if `state` allows it, else fp32 [N, K]."""
    packed = files.read(key).reshape(-1).view(torch.uint8)
    absmax = files.read(f"{key}.absmax").flatten()
    if state.nested:
        size, offset = state.nested
        nested = files.read(f"{key}.nested_absmax").flatten()
        if state.is_nested_nf4:
            offset = torch.tensor(offset, dtype=torch.float32)
            return NF4Tensor(packed[:, None], absmax, state.shape, nested, offset)
        table = files.read(f"{key}.nested_quant_map").flatten()
        absmax = table[absmax.int()] * nested.repeat_interleave(size)[: len(absmax)] + offset
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
    """Stacks the rows of several matrices, byte for byte.

    Scales stay nested if all parts have nested ones and all but the last fill whole groups of 256;
    each group keeps its own part's offset.
    """
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    packed = torch.cat([part.packed for part in parts])
    nested = all(part.nested_absmax is not None for part in parts)
    if not nested or any(part.absmax.numel() % NESTED_BLOCK for part in parts[:-1]):
        return NF4Tensor(packed, torch.cat([nf4_absmax(part) for part in parts]), shape)
    absmax = torch.cat([part.absmax for part in parts])
    groups = [cast(Tensor, part.nested_absmax) for part in parts]
    offsets = [cast(Tensor, p.offset).expand(len(g)) for p, g in zip(parts, groups, strict=True)]
    return NF4Tensor(packed, absmax, shape, torch.cat(groups), torch.cat(offsets))


def nf4_tensors(name: str, weight: NF4Tensor) -> dict[str, Tensor]:
    """Returns the tensors of a file that hold the matrix `name`, by their keys."""
    if weight.offset is not None and weight.offset.numel() > 1:
        # the form has room for one offset: the same scales, un-nested
        weight = NF4Tensor(weight.packed, nf4_absmax(weight), weight.shape)
    # dtype: what bitsandbytes dequantizes to
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": weight.shape}
    tensors = {
        name: weight.packed,
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": code_table(_CPU),
    }
    if weight.nested_absmax is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": cast(Tensor, weight.offset).item(),
        }
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax
        tensors[f"{name}.nested_quant_map"] = dynamic_map(_CPU)
    text = json.dumps(state).encode().ljust(WRITTEN_STATE_BYTES)
    tensors[f"{name}.{STATE}nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors
