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
CARDS = [0, 75, 80, 86, 89, 90, 100, 120]
IN_8_BITS = [torch.int8, torch.float8_e4m3fn]
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
            assert row.get("dtype") in (None, "half", "fp32", "int8", "fp8")
            # a measured row is named by its file below bench/results
            assert row["source"].startswith(("assumed: ", "bench/results/")), row["source"]


@pytest.mark.parametrize("arch", CARDS)
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


def in_8_bits(op, arch, dtype, storage, M):
    return dispatch.choose(op, arch, dtype, storage, M, 3072, 12288)


@pytest.mark.parametrize("arch", CARDS)
def test_rows_that_name_an_op_go_first_and_of_each_sort_a_cards_own(arch):
    """So a card's row for NF4 or fp32 in general does not hide the default's for 8-bit products."""
    names = [f"gemm_sm_{arch}.json" if arch else "gemm_interpreter.json", "gemm_default.json"]
    files = [CONFIGS / name for name in names if (CONFIGS / name).is_file()]
    assert len(files) == (1 if arch in (75, 100) else 2)
    for kind, found in dispatch.rows(arch).items():
        all_rows = [row for path in files for row in json.loads(path.read_text())[kind]]
        named, others = (
            [row for row in all_rows if ("op" in row) == with_op] for with_op in (1, 0)
        )
        assert list(found) == named + others and len(named) > 4


@pytest.mark.parametrize("dtype", IN_8_BITS)
@pytest.mark.parametrize("arch", CARDS)
def test_8_bit_products_of_every_card(arch, dtype):
    fp8_by_torch = arch == 90 and dtype == torch.float8_e4m3fn
    for M in (1, 64, 65, 512, 4608, 1 << 20):
        forward = in_8_bits("gemm_8bit", arch, dtype, "dense", M)
        assert forward.kind == ("decode" if fp8_by_torch and M > 64 else "fused")
        for op in ("gemm_8bit", "gemm_8bit_dx", "gemm_8bit_dx_pair"):
            choice = in_8_bits(op, arch, dtype, "nf4", M)
            # few rows: NF4 in the product's own tiles; in 16 bits sm_89 does so up to 256
            assert choice.kind == ("fused" if M <= 64 else "decode"), (op, M)
            for tile in (choice.tile, in_8_bits(op, arch, dtype, "dense", M).tile):
                assert tile.block_m >= 16 and tile.block_n % 64 == tile.block_k % 64 == 0
            pair = op.endswith("pair") and M > 128  # a scaled sum waits for the other's: 64 columns
            assert not pair or tile.block_n == 64
        for of_x in (torch.bfloat16, torch.float32):
            assert in_8_bits("lora_skinny_8bit", arch, of_x, "dense", M).kind == "fused"


@pytest.mark.parametrize("op", ["gemm_8bit_dx", "gemm_8bit_dx_pair"])
def test_towards_x_codes_are_transposed_above_a_threshold(op):
    rows = json.loads((CONFIGS / "gemm_default.json").read_text())["thresholds"]
    (row,) = [row for row in rows if row.get("op") == op and row["storage"] == "dense"]
    most = row["fused_up_to_m"]
    assert 64 < most < 4608  # 1024 px are above it
    for arch in CARDS:
        for dtype in IN_8_BITS:
            asked = [in_8_bits(op, arch, dtype, "dense", M).kind for M in (most, most + 1)]
            assert asked == ["fused", "decode"], arch


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
