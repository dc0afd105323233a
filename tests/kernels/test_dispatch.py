"""The dispatch's rows: complete, well-formed, and read as the docstring says."""

import json
from importlib.resources import files

import pytest
import torch
from config_rows import check_attention, check_gemm
from fluxfast_kernels.dispatch import dispatch

CONFIGS = files("fluxfast_kernels.dispatch") / "configs"
FILES = sorted(CONFIGS.iterdir(), key=lambda path: path.name)
CARDS = [0, 75, 80, 86, 89, 90, 100, 120]
IN_8_BITS = [torch.int8, torch.float8_e4m3fn]
# widths that no measured row names: what is assumed answers
N, K = 2048, 4096


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_rows_are_well_formed(path):
    check = check_attention if path.name == "attention.json" else check_gemm
    check(json.loads(path.read_text()))


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


def choose(op, arch, dtype, storage, M):
    return dispatch.choose(op, arch, dtype, storage, M, N, K)


def test_thresholds():
    def kind(arch, storage, M, dtype=torch.bfloat16):
        return choose("lora_gemm", arch, dtype, storage, M).kind

    assert [kind(89, "nf4", M) for M in (1, 256, 257)] == ["fused", "fused", "decode"]
    assert [kind(90, "nf4", M) for M in (1, 64, 65)] == ["fused", "fused", "decode"]
    assert kind(89, "dense", 10**6) == "fused"
    assert kind(89, "dense", 1, torch.float32) == "decode"
    assert kind(75, "dense", 1) == "decode"  # a card without rows of its own
    assert kind(0, "nf4", 10**6, torch.float32) == "fused"  # the interpreter


@pytest.mark.parametrize("arch", CARDS)
def test_rows_that_name_an_op_go_first_and_of_each_sort_a_cards_own(arch):
    """So a card's row for NF4 or fp32 in general does not hide the default's for 8-bit products.
    Those of one N and K go before the rest of their op's."""
    names = [f"gemm_sm_{arch}.json" if arch else "gemm_interpreter.json", "gemm_default.json"]
    files = [CONFIGS / name for name in names if (CONFIGS / name).is_file()]
    assert len(files) == (1 if arch in (75, 100) else 2)
    for kind, ordered in dispatch.rows(arch).items():
        all_rows = [row for path in files for row in json.loads(path.read_text())[kind]]
        exact, named, others = (
            [row for row in all_rows if ("op" in row) + ("n" in row) == count]
            for count in (2, 1, 0)
        )
        assert list(ordered) == exact + named + others and len(named) > 4


@pytest.mark.parametrize("dtype", IN_8_BITS)
@pytest.mark.parametrize("arch", CARDS)
def test_8_bit_products_of_every_card(arch, dtype):
    fp8_by_torch = arch == 90 and dtype == torch.float8_e4m3fn
    for M in (1, 64, 65, 512, 4608, 1 << 20):
        for op in ("gemm_8bit", "gemm_8bit_pair"):
            forward = choose(op, arch, dtype, "dense", M)
            assert forward.kind == ("decode" if fp8_by_torch and M > 64 else "fused")
        for op in dispatch.PRODUCTS_8BIT:
            choice = choose(op, arch, dtype, "nf4", M)
            # few rows: NF4 in the product's own tiles; in 16 bits sm_89 does so up to 256
            assert choice.kind == ("fused" if M <= 64 else "decode"), (op, M)
            for tile in (choice.tile, choose(op, arch, dtype, "dense", M).tile):
                assert tile.block_m >= 16 and tile.block_n % 64 == tile.block_k % 64 == 0
        for of_x in (torch.bfloat16, torch.float32):
            assert choose("lora_skinny_8bit", arch, of_x, "dense", M).kind == "fused"


@pytest.mark.parametrize("op", ["gemm_8bit_dx", "gemm_8bit_dx_pair"])
def test_towards_x_8_bit_weights_are_transposed_above_a_threshold(op):
    rows = json.loads((CONFIGS / "gemm_default.json").read_text())["thresholds"]
    (row,) = [row for row in rows if row.get("op") == op and row["storage"] == "dense"]
    most = row["fused_up_to_m"]
    assert 64 < most < 4608  # 1024 px are above it
    for arch in CARDS:
        for dtype in IN_8_BITS:
            limit = 64 if arch == 90 and dtype == torch.float8_e4m3fn else most  # torch's is tuned
            asked = [choose(op, arch, dtype, "dense", M).kind for M in (limit, limit + 1)]
            assert asked == ["fused", "decode"], arch


@pytest.fixture
def block_m(monkeypatch):
    """The block_m for M, N and K, by rows of which the most general come first."""
    base = {"op": "lora_gemm", "block_n": 64, "block_k": 64, "group_m": 8, "num_warps": 4}
    base |= {"num_stages": 3, "source": "assumed: "}
    shape = {"n": 640, "k": 512}
    tiles = [
        {"block_m": 16},
        {"block_m": 128},  # the first that matches counts
        {**shape, "m_min": 100, "m_max": 200, "block_m": 32},
        {**shape, "block_m": 64},
    ]
    thresholds = dispatch.tables(75)[0]["thresholds"]
    table = {"thresholds": thresholds, "tiles": [base | tile for tile in tiles]}
    monkeypatch.setattr(dispatch, "tables", lambda arch: [{"thresholds": [], "tiles": []}, table])

    def clear():
        dispatch.rows.cache_clear()
        dispatch.choose.cache_clear()

    clear()
    yield (
        lambda *shape: (
            dispatch.choose("lora_gemm", 89, torch.bfloat16, "dense", *shape).tile.block_m
        )
    )
    clear()


def test_a_row_of_this_n_and_k_goes_before_one_of_any(block_m):
    assert [block_m(50, *shape) for shape in ((640, 512), (641, 512), (640, 511))] == [64, 16, 16]


def test_a_row_is_for_its_rows_alone(block_m):
    assert [block_m(M, 640, 512) for M in (99, 100, 200, 201)] == [64, 32, 32, 64]


def test_it_is_cached_and_refuses():
    question = ("lora_gemm", 89, torch.bfloat16, "nf4", 4608, N, K)
    assert dispatch.choose(*question) is dispatch.choose(*question)
    for op, storage in (("gemm", "nf4"), ("lora_gemm", "int8")):
        with pytest.raises(ValueError, match="op and storage"):
            choose(op, 89, torch.bfloat16, storage, 1)
    assert dispatch.arch_of(torch.device("cpu")) == 0
