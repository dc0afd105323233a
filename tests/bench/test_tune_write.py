"""From measured rows to the files that kernels load, and from these to what dispatch answers."""

import json
import shutil

import pytest
import torch
from config_rows import check_attention, check_gemm
from fluxfast_kernels.dispatch import attention as attention_rows
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.attention import AttentionTile, choose_backend, choose_tile

from bench import timing
from bench.tune import cli as tune
from bench.tune import write as tune_write
from bench.tune.write import dumped, merged, merged_attention

OWN = sorted(tune_write.CONFIGS.glob("gemm_sm_*.json"))
N, K = 21504, 3072
FAST, FASTER, SHIPPED = "128x256x64.8w3g8", "256x128x64.8w3g4", "128x128x64.8w3g8"
LATER = {"date": "2026-02-01T10:00:00+00:00", "commit": "fedcba9876543210"}
H100 = {"arch": 90, "device_name": "NVIDIA H100"}
L40S = {"device_name": "NVIDIA L40S"}  # of the compute capability of an RTX 4090


def row(name, ms, shipped=False, spread=0.01, **more):
    """A row of a sweep. ms: None where it failed."""
    common = {
        "bench": "tune",
        "name": name,
        "shipped": shipped,
        "source": "assumed: it compiles",
        "arch": 89,
        "device_name": "NVIDIA GeForce RTX 4090",
        "commit": "0123456789abcdef",
        "dirty": False,
        "date": "2026-01-01T10:00:00+00:00",
        "n": N,
        "k": K,
    }
    times = {"p10_ms": ms and ms * (1 - spread), "p90_ms": ms and ms * (1 + spread)}
    return common | {"median_ms": ms} | times | more


def tile(name, ms, M=4608, shipped=False, **more):
    more = {"op": "lora_gemm", "storage": "dense", "dtype": "half"} | more
    return row(name, ms, shipped, kind="tile", tile=name, m=M, **more)


def won(name=FAST, ms=1.0, before=2.0, M=4608, **more):
    return [tile(SHIPPED, before, M, shipped=True, **more), tile(name, ms, M, **more)]


def ways(M, fused, decode, shipped="fused", **more):
    more = {"op": "lora_gemm", "storage": "nf4", "dtype": "half"} | more
    return [
        row(f"{way} at {M}", ms, way == shipped, kind="hand over", way=way, m=M, **more)
        for way, ms in (("fused", fused), ("decode", decode))
    ]


def backends(T, **by_name):
    more = {"kind": "attention", "dtype": "half", "m": T, "n": 24, "k": 128}
    return [row(name, ms, name == "flash", way=name, **more) for name, ms in by_name.items()]


class Configs:
    """A copy of the shipped files, which `write` changes and dispatch reads."""

    def __init__(self, folder, capsys):
        self.folder, self.rows, self.capsys = folder, folder.parent / "rows.jsonl", capsys

    def write(self, rows, *arguments):
        """Returns the command's exit code and output; dispatch reads the files anew."""
        timing.append_rows(self.rows, rows)
        code = tune.main(["write", "--rows", str(self.rows), *arguments])
        self.forget()
        for name, text in self.texts().items():
            check = check_attention if name == "attention.json" else check_gemm
            check(json.loads(text))
        return code, self.capsys.readouterr()

    def forget(self) -> None:
        for function in (
            *(dispatch.rows, dispatch.choose),
            *(attention_rows.table, choose_backend, choose_tile),
        ):
            function.cache_clear()

    def texts(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.folder.iterdir()}

    def measured(self, kind="tiles", arch=89) -> list[dict]:
        table = json.loads(self.texts()[f"gemm_sm_{arch}.json"])
        return [r for r in table[kind] if r["source"].startswith("measured: ")]


@pytest.fixture
def configs(tmp_path, monkeypatch, capsys):
    shutil.copytree(tune_write.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(tune_write, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(tune_write, "ATTENTION_PATH", tmp_path / "configs" / "attention.json")
    for module in (dispatch, attention_rows):
        monkeypatch.setattr(module, "files", lambda package: tmp_path)
    copied = Configs(tmp_path / "configs", capsys)
    copied.forget()
    yield copied
    copied.forget()


def chosen(M, op="lora_gemm", arch=89, dtype=torch.bfloat16, storage="dense", n=N, k=K):
    return dispatch.choose(op, arch, dtype, storage, M, n, k)


def block_n(M, **question):
    return chosen(M, **question).tile.block_n


@pytest.mark.parametrize("path", [*OWN, tune_write.ATTENTION_PATH], ids=lambda path: path.name)
def test_a_file_that_nothing_changes_stays_as_it_is(path):
    text = path.read_text()
    table = json.loads(text)
    assert dumped(table) == text
    same = merged(table, []) if path in OWN else merged_attention(table, [], 89)
    assert dumped(same) == text


# ---------------------------------------------------------------- tiles


OTHER_QUESTIONS = [
    {"arch": 86},
    {"arch": 90},
    {"op": "lora_gemm_dx"},
    {"storage": "nf4"},
    {"dtype": torch.float32},
    {"n": 9216},
    {"k": 15360},
    {"op": "gemm_8bit", "dtype": torch.int8},
]


def test_dispatch_picks_a_winner_for_its_own_question_alone(configs):
    before = configs.texts()
    assert configs.write(won())[0] == 0
    assert {name for name, _ in configs.texts().items() - before.items()} == {"gemm_sm_89.json"}
    assert block_n(4608) == 256 and block_n(4608, dtype=torch.float16) == 256
    for question in OTHER_QUESTIONS:
        assert block_n(4608, **question) != 256, question
    choice = chosen(4608)
    assert choice.tile == dispatch.Tile(128, 256, 64, 8, 8, 3)
    assert choice.tile_source == (
        "measured: commit 0123456, NVIDIA GeForce RTX 4090, M = 4608: 1 ms, 2 before"
    )
    assert choice.kind_source.startswith("assumed: ")


def test_rows_of_two_cards_go_to_a_file_each_before_the_others(configs):
    before = configs.texts()["gemm_sm_90.json"].splitlines()
    configs.write([*won(), *won(FASTER, **H100), *won(FASTER, n=9216, **H100)])
    assert [[r["n"] for r in configs.measured(arch=arch)] for arch in (89, 90)] == [[N], [N, 9216]]
    assert block_n(4608) == 256 and chosen(4608, arch=90).tile.block_m == 256
    lines = configs.texts()["gemm_sm_90.json"].splitlines()
    assert [line for line in lines if "measured" not in line] == before


NOT_THE_LAST = [*won(M=1024), tile(SHIPPED, 1.0, 4096, shipped=True), tile(FAST, 1.5, 4096)]


@pytest.mark.parametrize(
    ("rows", "ranges"),
    [
        ([*won(M=1024), *won(FASTER, M=4096)], [(512, 2048, 256), (2049, 8192, 128)]),
        ([*won(M=1024), *won(M=4096)], [(512, 8192, 256)]),  # neighbors are one row
        (NOT_THE_LAST, [(512, 2048, 256)]),
        ([tile(SHIPPED, None, shipped=True), tile(FAST, 1.0)], [(2304, 9216, 256)]),
    ],
)
def test_each_winner_is_for_the_rows_nearest_to_its_own(configs, rows, ranges):
    configs.write(rows)
    found = configs.measured()
    assert [(r["m_min"], r["m_max"], r["block_n"]) for r in found] == ranges
    assert [block_n(low) for low, _, _ in ranges] == [width for _, _, width in ranges]
    assert block_n(ranges[0][0] - 1) == block_n(ranges[-1][1] + 1) == 128


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(won(ms=1.97), id="2 % is not exceeded"),
        pytest.param(won(ms=1.5, spread=0.3), id="both vary by more"),
        pytest.param(won(ms=3.0), id="it is slower"),
        pytest.param(won(ms=None), id="it failed"),
        pytest.param([tile(FAST, 1.0)], id="the shipped tile has no row yet"),
        pytest.param(backends(4096, flash=1.0, triton=0.99, cudnn=None), id="a backend"),
        pytest.param([{"bench": "step", "arch": 89}], id="another bench"),
    ],
)
def test_without_a_sure_gain_nothing_changes(configs, rows):
    before = configs.texts()
    code, printed = configs.write(rows)
    assert code == 0 and "noise" in printed.out
    assert configs.texts() == before


def test_where_the_shipped_tile_fails_the_best_of_the_others_is_taken(configs):
    configs.write([tile(SHIPPED, None, shipped=True), tile(FASTER, 1.5), tile(FAST, 1.0)])
    assert chosen(4608).tile_source.endswith("M = 4608: 1 ms, the shipped one fails")


def test_a_newer_measurement_takes_the_place_of_an_older_where_it_wins(configs):
    configs.write(won())
    first = chosen(4608).tile_source
    shipped = tile(FAST, 1.0, shipped=True, **LATER | {"source": first})
    configs.write([shipped, tile(FASTER, 0.99, **LATER)])
    assert chosen(4608).tile_source == first and block_n(4608) == 256
    configs.rows.unlink()
    configs.write([shipped, tile(FASTER, 0.5, **LATER)])
    assert chosen(4608).tile == dispatch.Tile(256, 128, 64, 4, 8, 3)
    assert "commit fedcba9" in chosen(4608).tile_source and len(configs.measured()) == 1


def test_another_device_of_the_same_capability(configs):
    configs.write(won())
    before = configs.texts()
    code, printed = configs.write(won(FASTER, **L40S))
    assert code == 2 and "NVIDIA L40S" in printed.err and "hint: --device" in printed.err
    # what another card was measured for stays
    assert configs.write([], "--device", "NVIDIA L40S")[0] == 0
    assert configs.texts() == before
    configs.write(won(FASTER, n=9216, **L40S), "--device", "NVIDIA L40S")
    assert (block_n(4608), chosen(4608, n=9216).tile.block_m) == (256, 256)


@pytest.mark.parametrize(
    ("rows", "code", "message"),
    [([], 1, "bench.tune sweep"), (won(arch=100), 2, "gemm_sm_100.json")],
    ids=["no rows", "no file for the card"],
)
def test_rows_that_cannot_be_written_are_refused(configs, rows, code, message):
    before = configs.texts()
    ended, printed = configs.write(rows)
    assert ended == code and message in printed.err and configs.texts() == before


def test_a_dry_run_prints_and_changes_nothing(configs):
    before = configs.texts()
    _, printed = configs.write(won(), "--dry-run")
    assert configs.texts() == before
    added = [line for line in printed.out.splitlines() if line.startswith("+    {")]
    assert len(added) == 1 and '"block_n": 256' in added[0]


# ---------------------------------------------------------------- hand-overs


def kinds(Ms, **question):
    return [chosen(M, **{"storage": "nf4"} | question).kind for M in Ms]


def test_a_hand_over_is_written_where_it_pays(configs):
    assert kinds([256, 257, 512]) == ["fused", "decode", "decode"]
    rows = [*ways(256, 1.0, 2.0), *ways(512, 1.0, 1.2, "decode"), *ways(1024, 2.0, 1.0, "decode")]
    configs.write(rows)
    assert kinds([256, 512, 513]) == ["fused", "fused", "decode"]
    for question in ({"arch": 90}, {"n": 9216}, {"op": "lora_gemm_dx"}):
        assert kinds([257, 512], **question) == ["decode"] * 2
    assert chosen(512, storage="nf4").kind_source.endswith("M = 512: 1 ms, 1.2 before")


@pytest.mark.parametrize(
    ("fused", "decode", "shipped", "thresholds"),
    [
        ((1, 1, 1), (2, 2, 2), "decode", [None]),  # always as it is stored
        ((2, 2, 2), (1, 1, 1), "fused", [0]),  # never
        ((1, 3, 3), (2, 2, 2), "fused", [16]),
        ((1.0, 1.0, 2.2), (1.01, 1.01, 2.2), "decode", []),  # within the noise
        ((1, None, 1), (2, 2, 2), "decode", []),  # a way failed
    ],
)
def test_thresholds(configs, fused, decode, shipped, thresholds):
    rows = [ways(M, f, d, shipped) for M, f, d in zip((16, 64, 256), fused, decode, strict=True)]
    configs.write(sum(rows, []))
    found = [list(r.values())[:-1] for r in configs.measured("thresholds")]
    assert found == [["lora_gemm", "nf4", "half", N, K, most] for most in thresholds]


def test_a_threshold_that_was_measured_stays_where_it_still_holds(configs):
    configs.write([*ways(16, 1, 2), *ways(64, 1, 2), *ways(256, 3, 2)])
    before = configs.texts()
    later = LATER | {"source": chosen(16, storage="nf4").kind_source}
    again = [*ways(16, 1, 2, **later), *ways(64, 1, 2, **later)]
    configs.write([*again, *ways(256, 3, 2, "decode", **later)])
    assert configs.texts() == before and kinds([64, 65])[1] == "decode"


# ---------------------------------------------------------------- attention


def test_a_backend_is_picked_for_its_card_and_tokens(configs):
    configs.write([*backends(1024, flash=1.0, triton=2.0), *backends(4096, flash=2.0, triton=1.0)])

    def backend(T, arch=89, dtype=torch.bfloat16, C=128):
        return choose_backend(arch, dtype, C, T)[0]

    assert {backend(T) for T in (1024, 2048, 8193)} == {"flash"}
    assert {backend(T) for T in (2049, 4096, 8192)} == {"triton"}
    assert backend(4096, arch=90) == "cudnn" and backend(4096, arch=86) == "flash"
    assert backend(4096, C=64) == "flash" and backend(4096, dtype=torch.float32) == "efficient"
    assert choose_backend(89, torch.bfloat16, 128, 4096)[1].startswith("measured: commit 0123456")


def test_a_tile_of_attention_is_the_longest_sequences_winner(configs):
    asked = {"op": "dq", "storage": "dense", "dtype": "half", "n": 24, "k": 128}
    short = [tile("128x32.8w2", 1.0, 1536, True, **asked), tile("64x64.4w2", 0.5, 1536, **asked)]
    long = [tile("128x32.8w2", 2.0, 4608, True, **asked), tile("64x32.4w3", 1.0, 4608, **asked)]
    configs.write(short + long)
    half, winner, default = (
        torch.bfloat16,
        AttentionTile(64, 32, 4, 3),
        AttentionTile(128, 32, 8, 2),
    )
    assert choose_tile("dq", 89, half, 128) == winner
    assert choose_tile("dq", 90, half, 128) == default
    for question in (("dkdv", 89, half, 128), ("dq", 89, half, 64), ("dq", 89, torch.float32, 128)):
        assert choose_tile(*question) != winner
