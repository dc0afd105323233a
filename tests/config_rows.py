"""Checks of the files in `dispatch/configs`, shipped or written by `bench.tune`."""

from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.attention import AttentionTile
from fluxfast_kernels.ops.attention import BACKENDS, KERNELS

SOURCES = ("assumed: ", "measured: ")
FILTERS = {"op", "storage", "dtype", "n", "k"}


def check_gemm(table: dict) -> None:
    """Asserts that a `gemm_*.json` is well formed."""
    assert set(table) == {"thresholds", "tiles"}
    needed = {"thresholds": {"fused_up_to_m", "source"}}
    needed["tiles"] = set(dispatch.Tile.__dataclass_fields__) - {"maxnreg"} | {"source"}
    allowed = {"thresholds": set(), "tiles": {"m_min", "m_max", "maxnreg"}}
    for kind, rows in table.items():
        for row in rows:
            assert needed[kind] <= set(row) <= needed[kind] | FILTERS | allowed[kind], row
            assert row.get("op") in (None, *dispatch.OPS)
            assert row.get("storage") in (None, *dispatch.STORAGES)
            assert row.get("dtype") in (None, "half", "fp32", "int8", "fp8")
            assert ("n" in row) == ("k" in row), row  # or it would not go before the general ones
            assert row["source"].startswith(SOURCES), row["source"]


def check_attention(table: dict) -> None:
    """Asserts that `attention.json` is well formed."""
    assert set(table) == {"backends", "tiles"}
    tile = set(AttentionTile.__dataclass_fields__)
    for row in table["backends"]:
        assert row["backend"] in BACKENDS
        assert set(row) - {"backend", "source"} <= {"arch", "dtype", "c", "t_min", "t_max"}, row
    for row in table["tiles"]:
        assert tile <= set(row) <= tile | {"kernel", "arch", "dtype", "c", "source"}, row
        assert set(row["kernel"]) <= {*KERNELS, "qk_norm_rope"}
    for row in table["backends"] + table["tiles"]:
        assert row["source"].startswith((*SOURCES, "the interpreter")), row["source"]
        for name in ("arch", "dtype", "c"):
            assert isinstance(row.get(name), list | None), row
