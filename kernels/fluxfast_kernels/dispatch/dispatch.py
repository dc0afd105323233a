"""Chooses a linear's kernel and its tile: one cached pure function over rows of JSON files.

`configs/gemm_sm_<arch>.json` is for one card, `gemm_default.json` is safe on every one,
`gemm_interpreter.json` is for the interpreter (arch 0). Each file:

    thresholds: [{op, storage, dtype, n, k, fused_up_to_m, source}]
    tiles:      [{op, storage, dtype, n, k, m_min, m_max, block_m, block_n, block_k, group_m,
                  num_warps, num_stages, maxnreg (may be left out), source}]

storage "dense" (8-bit weights too) or "nf4"; dtype of the matmul: "half" (bf16, fp16), "fp32",
"int8" or "fp8"; all before fused_up_to_m and block_m may be left out (any). The first matching row
counts: those that name the op first, of these those that name n and k, of these a card's own.
fused_up_to_m: the largest M for which our kernel takes the weight as it is stored (null: always).
Above it NF4 is dequantized to a scratch, and a dense weight goes to torch's matmul; an 8-bit weight
goes, for dx, through a scratch that holds it transposed (`gemm_8bit_dx`), and for fp8 to torch's
matmul (`gemm_8bit`). `source` says "measured: ", commit, GPU and times (`bench.tune write`), or
"assumed: " and why.
"""

import json
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files

import torch

PRODUCTS_8BIT = ("gemm_8bit", "gemm_8bit_pair", "gemm_8bit_dx", "gemm_8bit_dx_pair")
_PRODUCTS = ("lora_gemm", "lora_gemm_dx", *PRODUCTS_8BIT)  # a pair: of two inputs side by side
OPS = (*_PRODUCTS, "lora_skinny", "lora_skinny_8bit", "lora_grads")
STORAGES = ("dense", "nf4")
ARCHITECTURES = (80, 86, 89, 90, 120)  # the cards that configurations are shipped for
_KINDS = {torch.float32: "fp32", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True)
class Tile:
    """block_m rows (tokens), block_n output columns, block_k of the contraction a step.

    lora_skinny: block_n is the most rank columns of a program. lora_grads: block_m is
    the contraction (tokens a step), block_k the columns of x or dy, block_n as in lora_skinny.
    group_m: rows of tiles that go together through L2; lora_grads: how many programs to aim at.
    maxnreg: registers a thread may take; None leaves it to ptxas, which spills a little where that
    lets one more program run beside (lora_skinny on sm_80 and sm_90, rank 64).
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @cached_property
    def options(self) -> dict[str, int]:
        """The launch's own arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


@dataclass(frozen=True)
class Choice:
    """kind: "fused" (our kernel, the weight as it is stored) or "decode" (M is above the limit)."""

    kind: str
    tile: Tile
    kind_source: str
    tile_source: str

    @property
    def fused(self) -> bool:
        return self.kind == "fused"


def _tile(row: dict) -> Tile:
    return Tile(**{name: row[name] for name in Tile.__dataclass_fields__ if name in row})


@cache
def arch_of(device: torch.device) -> int:
    """Returns 89 for compute capability 8.9; 0 for a CPU (the interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tables(arch: int) -> list[dict[str, list[dict]]]:
    """Returns a card's own table, where there is one, and the default one."""
    folder = files("fluxfast_kernels.dispatch") / "configs"
    own = folder / (f"gemm_sm_{arch}.json" if arch else "gemm_interpreter.json")
    paths = [own, folder / "gemm_default.json"] if own.is_file() else [folder / "gemm_default.json"]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def ordered(tables: list[dict[str, list[dict]]]) -> dict[str, tuple[dict, ...]]:
    """Returns the rows of {"thresholds", "tiles"} in the order in which they are matched."""
    return {
        kind: tuple(sorted((row for table in tables for row in table[kind]), key=_generality))
        for kind in ("thresholds", "tiles")
    }


@cache
def rows(arch: int) -> dict[str, tuple[dict, ...]]:
    """Returns a card's rows of {"thresholds", "tiles"} in the order in which they are matched."""
    return ordered(tables(arch))


def _generality(row: dict) -> tuple[bool, bool]:
    return "op" not in row, not {"n", "k"} <= row.keys()


def _matches(row: dict, M: int | None = None, **wanted) -> bool:
    """Returns whether a row is for M (None: for some M) and for every wanted value."""
    low, high = row.get("m_min"), row.get("m_max")
    if M is not None and (low is not None and low > M or high is not None and high < M):
        return False
    return all(row.get(key) in (None, value) for key, value in wanted.items())


@cache
def choose(op: str, arch: int, dtype: torch.dtype, storage: str, M: int, N: int, K: int) -> Choice:
    """Returns the choice for M rows, N output columns and a contraction of K. Raises ValueError for
    an unknown op or storage."""
    if op not in OPS or storage not in STORAGES:
        raise ValueError(f"op and storage must be of {OPS} and {STORAGES}, got {op!r}, {storage!r}")
    kind = _KINDS.get(dtype, "half")
    wanted = {"op": op, "storage": storage, "dtype": kind, "n": N, "k": K}
    table = rows(arch)
    limit = next(row for row in table["thresholds"] if _matches(row, **wanted))
    tile = next(row for row in table["tiles"] if _matches(row, M, **wanted))
    most = limit["fused_up_to_m"]
    fused = most is None or most >= M
    return Choice("fused" if fused else "decode", _tile(tile), limit["source"], tile["source"])


def shipped_to(op: str, storage: str, dtype: str) -> dict[Tile, tuple[int, ...]]:
    """Returns {tile: cards} of every tile that `choose` can return. dtype: as in the rows."""
    cards: dict[Tile, tuple[int, ...]] = {}
    for arch in ARCHITECTURES:
        for row in rows(arch)["tiles"]:
            if _matches(row, op=op, storage=storage, dtype=dtype):
                tile = _tile(row)
                cards[tile] = (*cards.get(tile, ()), arch)
                if not {"m_min", "m_max", "n", "k"} & row.keys():  # nothing comes past this row
                    break
    return cards
