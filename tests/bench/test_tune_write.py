"""From measured rows to the files that kernels load, and from these to what dispatch answers."""

import json

import pytest
import torch
from config_rows import check_attention, check_gemm
from fluxfast_kernels.dispatch import attention as attention_rows
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.attention import AttentionTile, choose_backend, choose_tile

from bench import compile_cases, timing
from bench.tune import cli as tune
from bench.tune import write as tune_write
from bench.tune.write import changes, dumped, merged, merged_attention, ranges
from fluxfast.errors import ConfigError

OWN = sorted(tune_write.CONFIGS.glob("gemm_sm_*.json"))
N, K = 21504, 3072
FAST, FASTER, SHIPPED = "128x256x64.8w3g8", "256x128x64.8w3g4", "128x128x64.8w3g8"
ASSUMED = "assumed: it compiles"


def row(name, ms, shipped=False, **more):
    """A row of a sweep. ms: None where it failed."""
    spread = more.pop("spread", 0.01)
    times = {
        "median_ms": ms,
        "p10_ms": ms and ms * (1 - spread),
        "p90_ms": ms and ms * (1 + spread),
    }
    return (
        {
            "bench": "tune",
            "name": name,
            "status": "ok" if ms else "failed",
            "shipped": shipped,
            "source": ASSUMED,
            "arch": 89,
            "device_name": "NVIDIA GeForce RTX 4090",
            "commit": "0123456789abcdef",
            "dirty": False,
            "date": "2026-01-01T10:00:00+00:00",
            "n": N,
            "k": K,
        }
        | times
        | more
    )


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
    default = "flash"
    more = {"kind": "attention", "dtype": "half", "m": T, "n": 24, "k": 128}
    return [row(name, ms, name == default, way=name, **more) for name, ms in by_name.items()]


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """The shipped files, copied: what dispatch reads and `write` writes."""
    for path in tune_write.CONFIGS.glob("*.json"):
        (tmp_path / "configs" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "configs" / path.name).write_text(path.read_text())
    monkeypatch.setattr(tune_write, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(tune_write, "ATTENTION_PATH", tmp_path / "configs" / "attention.json")
    for module in (dispatch, attention_rows):
        monkeypatch.setattr(module, "files", lambda package: tmp_path)
    forget_rows()
    yield tmp_path / "configs"
    forget_rows()


def forget_rows() -> None:
    for cache in (
        dispatch.rows,
        dispatch.choose,
        attention_rows.table,
        choose_backend,
        choose_tile,
    ):
        cache.cache_clear()


@pytest.fixture
def write(configs, capsys):
    """Rows -> the command's exit code and output, dispatch reading anew."""

    def run(rows, *arguments):
        timing.append_rows(configs.parent / "rows.jsonl", rows)
        code = tune.main(["write", "--rows", str(configs.parent / "rows.jsonl"), *arguments])
        forget_rows()
        for path in configs.glob("gemm_sm_*.json"):
            check_gemm(json.loads(path.read_text()))
        check_attention(json.loads((configs / "attention.json").read_text()))
        return code, capsys.readouterr()

    return run


def chosen(M, op="lora_gemm", arch=89, dtype=torch.bfloat16, storage="dense", n=N, k=K):
    return dispatch.choose(op, arch, dtype, storage, M, n, k)


def block_n(M, **question):
    return chosen(M, **question).tile.block_n


@pytest.mark.parametrize("path", [*OWN, tune_write.ATTENTION_PATH], ids=lambda path: path.name)
def test_a_file_that_nothing_changes_stays_as_it_is(path):
    text = path.read_text()
    table = json.loads(text)
    assert dumped(table) == text
    if path in OWN:
        assert dumped(merged(table, [])) == text
    else:
        assert dumped(merged_attention(table, [], 89)) == text


def test_dispatch_picks_a_winner_for_its_own_question_alone(write, configs):
    before = {path.name: path.read_text() for path in configs.iterdir()}
    assert write(won())[0] == 0
    changed = {path.name for path in configs.iterdir() if before[path.name] != path.read_text()}
    assert changed == {"gemm_sm_89.json"}
    assert block_n(4608) == 256 and block_n(4608, dtype=torch.float16) == 256
    others = [
        {"arch": 86},
        {"arch": 90},
        {"op": "lora_gemm_dx"},
        {"storage": "nf4"},
        {"dtype": torch.float32},
        {"n": 9216},
        {"k": 15360},
        {"op": "gemm_8bit", "dtype": torch.int8},
    ]
    for question in others:
        assert block_n(4608, **question) != 256, question
    choice = chosen(4608)
    assert choice.tile == dispatch.Tile(128, 256, 64, 8, 8, 3)
    assert choice.tile_source == (
        "measured: commit 0123456, NVIDIA GeForce RTX 4090, M = 4608: 1 ms, 2 before"
    )
    assert choice.kind_source.startswith("assumed: ")


def test_a_winner_is_compiled_for_its_own_card(write):
    """`bench/compile.py` has it for sm_89 alone, and the shipped tile for every card as before."""
    archs = {op: {} for op in ("lora_gemm", "lora_skinny", "gemm_8bit_dx")}
    skinny, k = {"op": "lora_skinny", "n": 16, "k": 3072}, {"op": "gemm_8bit_dx", "dtype": "int8"}
    write([*won(), *won("32x128x128.8w2g1", **skinny), *won(FASTER, **k)])
    for case in compile_cases.cases():
        op = case.name.split(".")[0]
        if op in archs:
            archs[op].setdefault(case.name, case.archs)
    for op, shape in (
        ("lora_gemm", "128x256x64.8w3"),
        ("lora_skinny", "32x128.8w2"),
        ("gemm_8bit_dx", "256x128x64.8w3"),
    ):
        own = {name for name, cards in archs[op].items() if cards == (89,)}
        assert own and all(shape in name for name in own), op
    assert archs["lora_gemm"]["lora_gemm.bf16.dense.128x128x64.8w3"] == dispatch.ARCHITECTURES


def test_rows_of_two_cards_go_to_a_file_each(write, configs):
    h100 = {"arch": 90, "device_name": "NVIDIA H100"}
    write([*won(), *won(FASTER, **h100), *won(FASTER, n=9216, **h100)])
    tiles = [
        json.loads((configs / f"gemm_sm_{arch}.json").read_text())["tiles"] for arch in (89, 90)
    ]
    measured = [[r["n"] for r in rows if r["source"].startswith("measured: ")] for rows in tiles]
    assert measured == [[N], [N, 9216]] and block_n(4608) == 256
    assert chosen(4608, arch=90).tile.block_m == 256


def test_the_rows_that_were_there_stay_as_they_were(write, configs):
    lines = (configs / "gemm_sm_90.json").read_text().splitlines()
    write(won(arch=90, device_name="NVIDIA H100", op="gemm_8bit", dtype="fp8"))
    now = (configs / "gemm_sm_90.json").read_text().splitlines()
    assert [line for line in now if line in lines] == lines and len(now) == len(lines) + 1


def test_each_winner_is_for_the_rows_nearest_to_its_own(write):
    write([*won(M=1024), *won(FASTER, M=4096)])
    wide = {M: block_n(M) for M in (511, 512, 2048, 2049, 8192, 8193)}
    assert wide == {511: 128, 512: 256, 2048: 256, 2049: 128, 8192: 128, 8193: 128}
    assert chosen(4096).tile.group_m == 4 and chosen(8193).tile.group_m == 8


def test_between_winners_the_default_stays_where_it_won(write):
    write([*won(M=1024), tile(SHIPPED, 1.0, 4096, shipped=True), tile(FAST, 1.5, 4096)])
    assert [block_n(M) for M in (2048, 2049, 4096)] == [256, 128, 128]


def test_neighbors_with_one_winner_are_one_row(write, configs):
    write([*won(M=1024), *won(M=4096)])
    (first, *others) = json.loads((configs / "gemm_sm_89.json").read_text())["tiles"]
    assert (first["m_min"], first["m_max"]) == (512, 8192) and not others


def test_ranges():
    assert ranges([1024, 4096, 4608]) == [(512, 2048), (2049, 4344), (4345, 9216)]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (won(ms=1.97), "2 % is not exceeded"),
        (won(ms=1.5, spread=0.3), "both vary by more"),
        (won(ms=3.0), "it is slower"),
        (won(ms=None), "it failed"),
        ([tile(FAST, 1.0)], "the shipped tile has no row yet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_without_a_sure_gain_nothing_changes(write, configs, rows, why):
    before = {path.name: path.read_text() for path in configs.iterdir()}
    code, said = write(rows)
    assert code == 0 and "noise" in said.out, why
    assert {path.name: path.read_text() for path in configs.iterdir()} == before


def test_where_the_shipped_tile_fails_the_best_of_the_others_is_taken(write):
    write([tile(SHIPPED, None, shipped=True), tile(FAST, 1.0), tile(FASTER, 1.5)])
    assert block_n(4608) == 256
    assert chosen(4608).tile_source.endswith("M = 4608: 1 ms, the shipped one fails")


def test_a_newer_measurement_takes_the_place_of_an_older(write, configs):
    write(won())
    measured = chosen(4608).tile_source
    later = {"date": "2026-02-01T10:00:00+00:00", "commit": "fedcba9876543210"}
    write(
        [tile(FAST, 1.0, shipped=True, **later | {"source": measured}), tile(FASTER, 0.5, **later)]
    )
    assert chosen(4608).tile == dispatch.Tile(256, 128, 64, 4, 8, 3)
    assert "commit fedcba9" in chosen(4608).tile_source
    assert len(json.loads((configs / "gemm_sm_89.json").read_text())["tiles"]) == 1


def test_what_was_measured_before_and_still_wins_stays(write):
    write(won())
    measured = chosen(4608).tile_source
    later = {"date": "2026-02-01T10:00:00+00:00"}
    write(
        [tile(FAST, 1.0, shipped=True, **later | {"source": measured}), tile(FASTER, 0.99, **later)]
    )
    assert chosen(4608).tile_source == measured and block_n(4608) == 256


def test_another_device_of_the_same_capability(write, configs):
    write(won())
    text = (configs / "gemm_sm_89.json").read_text()
    theirs = won(FASTER, device_name="NVIDIA L40S")
    code, said = write(theirs)
    assert code == 2 and "NVIDIA L40S" in said.err and "hint: --device" in said.err
    # what another card was measured for stays
    assert write([], "--device", "NVIDIA L40S")[0] == 0
    assert (configs / "gemm_sm_89.json").read_text() == text
    write(won(FASTER, device_name="NVIDIA L40S", n=9216), "--device", "NVIDIA L40S")
    assert (block_n(4608), chosen(4608, n=9216).tile.block_m) == (256, 256)


def test_a_card_that_no_file_is_shipped_for(write, configs):
    code, said = write(won(arch=100))
    assert code == 2 and "gemm_sm_100.json" in said.err
    assert not (configs / "gemm_sm_100.json").exists()


def test_a_dry_run_prints_and_changes_nothing(write, configs):
    before = (configs / "gemm_sm_89.json").read_text()
    _, said = write(won(), "--dry-run")
    assert (configs / "gemm_sm_89.json").read_text() == before
    added = [line for line in said.out.splitlines() if line.startswith("+    {")]
    assert len(added) == 1 and '"block_n": 256' in added[0]


def test_without_rows_the_command_says_where_they_come_from(configs, capsys):
    assert tune.main(["write", "--rows", str(configs / "none.jsonl")]) == 1
    assert "bench.tune sweep" in capsys.readouterr().err


def kinds(Ms, **question):
    return [chosen(M, **{"storage": "nf4"} | question).kind for M in Ms]


def test_a_hand_over_is_written_where_it_pays(write, configs):
    assert kinds([256, 257, 512]) == ["fused", "decode", "decode"]
    write([*ways(256, 1.0, 2.0), *ways(512, 1.0, 1.2, "decode"), *ways(1024, 2.0, 1.0, "decode")])
    assert kinds([256, 512, 513]) == ["fused", "fused", "decode"]
    for question in ({"arch": 90}, {"n": 9216}, {"op": "lora_gemm_dx"}, {"storage": "dense"}):
        now = kinds([257, 512], **question)
        assert now == (["fused"] * 2 if question.get("storage") else ["decode"] * 2)
    source = chosen(512, storage="nf4").kind_source
    assert source.endswith("M = 512: 1 ms, 1.2 before")


@pytest.mark.parametrize(
    ("fused", "decode", "shipped", "most"),
    [
        ((1, 1, 1), (2, 2, 2), "decode", None),  # always as it is kept
        ((2, 2, 2), (1, 1, 1), "fused", 0),  # never
        ((1, 3, 3), (2, 2, 2), "fused", 16),
        ((1.0, 1.0, 2.2), (1.01, 1.01, 2.2), "decode", "no row"),  # within the noise
        ((1, None, 1), (2, 2, 2), "decode", "no row"),  # a way failed
    ],
)
def test_thresholds(write, configs, fused, decode, shipped, most):
    rows = [ways(M, f, d, shipped) for M, f, d in zip((16, 64, 256), fused, decode, strict=True)]
    write(sum(rows, []))
    table = json.loads((configs / "gemm_sm_89.json").read_text())["thresholds"]
    new = [r for r in table if r["source"].startswith("measured: ")]
    assert [r["fused_up_to_m"] for r in new] == ([] if most == "no row" else [most])
    if new:
        keys = ("op", "storage", "dtype", "n", "k")
        assert [new[0][key] for key in keys] == ["lora_gemm", "nf4", "half", N, K]
        assert table[0] == new[0]


def test_a_threshold_that_was_measured_stays_where_it_still_holds(write, configs):
    rows = [*ways(16, 1, 2), *ways(64, 1, 2), *ways(256, 3, 2)]
    write(rows)
    text = (configs / "gemm_sm_89.json").read_text()
    said = {"source": chosen(16, storage="nf4").kind_source, "date": "2026-03-01"}
    again = [*ways(16, 1, 2, **said), *ways(64, 1, 2, **said), *ways(256, 3, 2, "decode", **said)]
    write(again)
    assert (configs / "gemm_sm_89.json").read_text() == text and kinds([64, 65])[1] == "decode"


def test_a_backend_is_picked_for_its_card_and_tokens(write):
    write([*backends(1024, flash=1.0, triton=2.0), *backends(4096, flash=2.0, triton=1.0)])

    def backend(T, arch=89, dtype=torch.bfloat16, C=128):
        return choose_backend(arch, dtype, C, T)[0]

    assert [backend(T) for T in (1024, 2048, 2049, 4096, 8192, 8193)] == [
        "flash",
        "flash",
        "triton",
        "triton",
        "triton",
        "flash",
    ]
    assert backend(4096, arch=90) == "cudnn" and backend(4096, arch=86) == "flash"
    assert backend(4096, C=64) == "flash" and backend(4096, dtype=torch.float32) == "efficient"
    assert choose_backend(89, torch.bfloat16, 128, 4096)[1].startswith("measured: commit 0123456")


def test_a_tile_of_attention_is_the_longest_sequences_winner(write):
    asked = {"op": "dq", "storage": "dense", "dtype": "half", "n": 24, "k": 128}
    short = [tile("128x32.8w2", 1.0, 1536, True, **asked), tile("64x64.4w2", 0.5, 1536, **asked)]
    long = [tile("128x32.8w2", 2.0, 4608, True, **asked), tile("64x32.4w3", 1.0, 4608, **asked)]
    write(short + long)

    def found(kernel, arch=89, dtype=torch.bfloat16, C=128):
        return choose_tile(kernel, arch, dtype, C)

    assert found("dq") == AttentionTile(64, 32, 4, 3)
    default = AttentionTile(128, 32, 8, 2)
    assert found("dq", arch=90) == default and found("dkdv") != found("dq")
    assert found("dq", C=64).block_m == 128 and found("dq", dtype=torch.float32).block_m == 16


def test_attention_within_the_noise_changes_nothing(write, configs):
    text = (configs / "attention.json").read_text()
    write(backends(4096, flash=1.0, triton=0.99, cudnn=None))
    assert (configs / "attention.json").read_text() == text


def test_rows_of_other_benches_are_left_out(configs):
    assert changes([{"bench": "step", "arch": 89}]) == {}


def test_a_device_must_be_named_where_there_are_two():
    rows = [*won(), *won(device_name="NVIDIA L40S")]
    with pytest.raises(ConfigError, match="name one"):
        tune_write.of_one_device(rows, 89)
    assert len(tune_write.of_one_device(rows, 89, "NVIDIA L40S")) == 2
