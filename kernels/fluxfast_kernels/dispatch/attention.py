"""Chooses the attention backend and its tile: the rows of `configs/attention.json`.

{"backends": rows, "tiles": rows}; the first row that matches counts. A row's arch, dtype ("half" or
"fp32"), c and kernel list the values that it is for (null or absent: any); t_min and t_max, where
present, are the shortest and the longest T.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch


@dataclass(frozen=True)
class AttentionTile:
    """block_m queries by block_n keys a step; qk_norm_rope: block_m heads of tokens a program."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@cache
def table() -> dict[str, list[dict]]:
    path = files("fluxfast_kernels.dispatch") / "configs" / "attention.json"
    return json.loads(path.read_text(encoding="utf-8"))


def first_row(kind: str, T: int = 0, **wanted) -> dict:
    """Returns the first row of `kind` ("backends" or "tiles") whose lists hold every wanted value
    and whose limits hold T. Raises ValueError where there is none."""
    for row in table()[kind]:
        matches = (row.get(key) is None or value in row[key] for key, value in wanted.items())
        if row.get("t_min", T) <= T <= row.get("t_max", T) and all(matches):
            return row
    raise ValueError(f"configs/attention.json has no {kind} row for {wanted}")


@cache
def choose_backend(arch: int, dtype: torch.dtype, C: int, T: int) -> tuple[str, str]:
    """Returns the backend on a GPU of compute capability `arch` (89: 8.9) and its row's source."""
    row = first_row("backends", T, arch=arch, dtype=_kind(dtype), c=C)
    return row["backend"], row["source"]


@cache
def choose_tile(kernel: str, arch: int, dtype: torch.dtype, C: int) -> AttentionTile:
    """Returns the tile of "forward", "dq", "dkdv" or "qk_norm_rope"; arch 0 is the interpreter."""
    row = first_row("tiles", kernel=kernel, arch=arch, dtype=_kind(dtype), c=C)
    return AttentionTile(**{name: row[name] for name in AttentionTile.__dataclass_fields__})


def _kind(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "half"
