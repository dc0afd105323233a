"""The dispatch's rows: complete, well-formed, and read as the docstring says."""

import json
from importlib.resources import files

import pytest
import torch
from fluxfast_kernels import dispatch

CONFIGS = files("fluxfast_kernels") / "configs"
FILES = sorted(
    (path for path in CONFIGS.iterdir() if path.name.startswith("gemm_")),
    key=lambda path: path.name,
)
FILTERS = {"op", "storage", "dtype", "m_max", "n", "k"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_rows_are_well_formed(path):
    table = json.loads(path.read_text())
    assert set(table) == {"thresholds", "tiles"}
    needed = {"thresholds": {"fused_up_to_m", "source"}}
    needed["tiles"] = set(dispatch.Tile.__dataclass_fields__) | {"source"}
    for kind, rows in table.items():
        for row in rows:
            assert needed[kind] <= set(row) <= needed[kind] | FILTERS, row
            assert row.get("op") in (None, *dispatch.OPS)
            assert row.get("storage") in (None, *dispatch.STORAGES)
            assert row.get("dtype") in (None, "half", "fp32")
            # a measured row is named by its file below bench/results
            assert row["source"].startswith(("assumed: ", "bench/results/")), row["source"]


@pytest.mark.parametrize("arch", [0, 75, 80, 86, 89, 90, 100, 120])
def test_every_question_has_an_answer(arch):
    for op in dispatch.OPS:
        for storage in dispatch.STORAGES:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for M in (1, 16, 77, 512, 4608, 1 << 20):
                    choice = dispatch.choose(op, arch, dtype, storage, M, 3072, 3072)
                    tile = choice.tile
                    assert choice.kind in ("fused", "decode")
                    for side in (tile.block_m, tile.block_n, tile.block_k):
                        assert side >= 16 and side & (side - 1) == 0
                    if storage == "nf4" and op == "lora_gemm_dx":
                        assert tile.block_n % 64 == 0 or tile.block_n == 32
                    if storage == "nf4" and op == "lora_gemm":
                        assert tile.block_k in (32, 64)


def test_thresholds():
    def kind(arch, storage, M, dtype=torch.bfloat16):
        return dispatch.choose("lora_gemm", arch, dtype, storage, M, 3072, 3072).kind

    assert [kind(89, "nf4", M) for M in (1, 256, 257)] == ["fused", "fused", "decode"]
    assert [kind(90, "nf4", M) for M in (1, 64, 65)] == ["fused", "fused", "decode"]
    assert kind(89, "dense", 10**6) == "fused"
    assert kind(89, "dense", 1, torch.float32) == "decode"
    assert kind(75, "dense", 1) == "decode"  # a card without rows of its own
    assert kind(0, "nf4", 10**6, torch.float32) == "fused"  # the interpreter


def test_the_first_row_that_matches_counts(monkeypatch):
    default = dispatch.rows(89)
    own = dict(default["tiles"][-1], n=640, k=None, m_max=100, block_m=16, op="lora_gemm")
    table = {"thresholds": default["thresholds"], "tiles": (own, *default["tiles"])}
    monkeypatch.setattr(dispatch, "rows", lambda arch: table)
    dispatch.choose.cache_clear()
    try:
        for M, N, expected in [(100, 640, True), (101, 640, False), (100, 641, False)]:
            tile = dispatch.choose("lora_gemm", 89, torch.float16, "dense", M, N, 7).tile
            assert (tile.block_m == 16) == expected
    finally:
        dispatch.choose.cache_clear()


def test_it_is_cached_and_refuses():
    question = ("lora_gemm", 89, torch.bfloat16, "nf4", 4608, 3072, 3072)
    assert dispatch.choose(*question) is dispatch.choose(*question)
    with pytest.raises(ValueError, match="op and storage"):
        dispatch.choose("gemm", 89, torch.bfloat16, "nf4", 1, 64, 64)
    with pytest.raises(ValueError, match="op and storage"):
        dispatch.choose("lora_gemm", 89, torch.bfloat16, "int8", 1, 64, 64)
    assert dispatch.arch_of(torch.device("cpu")) == 0
