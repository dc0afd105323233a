"""The cards: names that people and torch give them, figures that agree, and measured factors."""

import json
from dataclasses import replace

import pytest
import torch

from bench import calibrate, timing
from bench.step import table as step_table
from bench.step.settings import Cycle, Settings
from fluxfast.errors import ConfigError
from fluxfast.memory.planner.cards import CARDS, MEASURED, Efficiency, card, closest
from fluxfast.memory.planner.cost import Op, optimizer_ops, seconds, step_ops, total_seconds
from fluxfast.memory.planner.step_spec import StepSpec, lora_of, shape_of
from fluxfast.model.spec import DEV

NAMES = {
    "RTX 4090": ["4090", "rtx4090", "rtx 4090", "NVIDIA GeForce RTX 4090", "RTX-4090"],
    "RTX 3090": ["NVIDIA GeForce RTX 3090", "3090"],
    "RTX 5090": ["NVIDIA GeForce RTX 5090", "rtx_5090"],
    "RTX 4060 Ti 16 GB": ["4060ti", "NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti 16GB"],
    "RTX 3060 12 GB": ["3060", "NVIDIA GeForce RTX 3060"],
    "L40S": ["NVIDIA L40S", "l40s"],
    "A100 80 GB": ["NVIDIA A100-SXM4-80GB", "a100"],
    "H100 SXM 80 GB": ["NVIDIA H100 80GB HBM3", "h100", "H100 SXM"],
}


def test_names_resolve():
    assert list(NAMES) == [known.name for known in CARDS]
    for name, others in NAMES.items():
        for alias in (name, *others):
            assert card(alias).name == name, alias


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090"),  # another chip
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090"),
        ("NVIDIA GeForce RTX 3060 Ti", "RTX 4060 Ti"),
        ("NVIDIA A100-SXM4-40GB", "A100"),  # another memory
        ("RTX 4060 Ti 8GB", "RTX 4060 Ti 16 GB"),
        ("NVIDIA H100 PCIe", "H100 SXM"),
    ],
)
def test_another_card_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(ConfigError) as error:
        card(name)
    assert nearest in error.value.hint
    assert all(known.name in error.value.message for known in CARDS)


def test_a_stand_in_is_of_the_generation():
    nearest = {
        ((8, 9), 8): "RTX 4060 Ti 16 GB",
        ((8, 9), 24): "RTX 4090",
        ((8, 9), 44.5): "L40S",
        ((8, 6), 9.8): "RTX 3060 12 GB",
        ((8, 0), 39.4): "A100 80 GB",
        ((12, 0), 15.9): "RTX 5090",
        ((12, 1), 110): "RTX 5090",
        ((10, 0), 180): "H100 SXM 80 GB",
    }
    assert {gpu: closest(*gpu).name for gpu in nearest} == nearest
    # 18 GiB from either: the slower
    assert closest((8, 6), 18).name == "RTX 3060 12 GB"
    with pytest.raises(ConfigError, match=r"7\.5 has no bf16"):
        closest((7, 5), 24)


# tensor cores, fp16 FLOP a clock of each, boost clock in GHz, share of that rate with fp32 sums
CHIPS = {
    "RTX 4090": (512, 256, 2.52, 0.5),
    "RTX 3090": (328, 256, 1.695, 0.5),
    "RTX 5090": (680, 256, 2.407, 0.5),
    "RTX 4060 Ti 16 GB": (136, 256, 2.535, 0.5),
    "RTX 3060 12 GB": (112, 256, 1.777, 0.5),
    "L40S": (568, 256, 2.52, 1),
    "A100 80 GB": (432, 512, 1.41, 1),
    "H100 SXM 80 GB": (528, 1024, 1.83, 1),
}


def test_peaks_are_those_of_the_chips():
    for known in CARDS:
        cores, flop, clock, share = CHIPS[known.name]
        fp16 = cores * flop * clock * 1e9
        assert known.peaks["bf16"] == pytest.approx(fp16 * share, rel=0.015), known.name
        assert known.peaks["int8"] == pytest.approx(2 * fp16, rel=0.015), known.name
        eight_bits = 2 * fp16 * share if known.capability >= (8, 9) else 0
        assert known.peaks["fp8"] == pytest.approx(eight_bits, rel=0.015), known.name


def test_every_figure_says_where_it_comes_from():
    for known in CARDS:
        assert set(known.efficiency) == set(CARDS[0].efficiency)
        for kind, share in known.efficiency.items():
            assert 0 <= share.value <= 1 and (share.value > 0) == (
                kind == "copy" or kind not in known.peaks or known.peaks[kind] > 0
            ), (known.name, kind)
        sources = [share.source for share in known.efficiency.values()]
        assert set(known.sources) == {"peaks", "bandwidth", "pcie", "launch_s"}
        for source in (*sources, *known.sources.values()):
            assert source.startswith(("data sheet", "assumed: ", "measured: ")), source


# ---------------------------------------------------------------- measured factors

INT8 = StepSpec(DEV, "nf4", "int8", "bf16", lora_of(DEV, 16))


def row(name: str, ratio: float, pixels: int = 512, **other) -> dict:
    """As bench.step writes it: `ratio` times what the model predicts for INT8 on a 4090."""
    cycle = Cycle((pixels,), 1)
    settings = Settings(
        DEV, "cuda", torch.bfloat16, [cycle], 512, 16, rounds=9, warmup=3, apart=True
    )
    ops = step_ops(INT8, shape_of(pixels, pixels, 1, 512))
    ops += optimizer_ops(INT8, "adamw", guard=False)
    bare = replace(card("4090"), factors={})
    result = timing.Result(name, median_ms=1e3 * ratio * total_seconds(ops, bare, launches=True))
    where = {"commit": "abcdef0123", "device_name": "NVIDIA GeForce RTX 4090", "device": "cuda"}
    fields = step_table.row_settings(settings, name, cycle)
    return timing.row(result, **where, **fields) | other


@pytest.fixture
def run(tmp_path):
    """Calibrates from rows. Returns the exit code, and the file that it may have written."""

    def calibrated(rows: list[dict]):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        out = tmp_path / "measured.json"
        files = ["--rows", str(tmp_path / "rows.jsonl"), "--out", str(out)]
        return calibrate.main(files), out

    return calibrated


def test_the_median_ratio_of_a_card_and_a_kind_is_written(run, capsys):
    rows = [row("fluxfast-nf4-int8", ratio) for ratio in (1.5, 1.1)]
    rows += [row("fluxfast-nf4-int8", 1.2, pixels=1024)]
    rows += [
        row("diffusers-nf4", 9.0),
        row("fluxfast-nf4-int8", 9.0, status="gate failed"),
        row("fluxfast-nf4-int8", 9.0, device="cpu"),
        row("fluxfast-nf4-int8", 9.0, hidden=128),
        row("fluxfast-nf4-int8-trainer", 9.0),
        row("fluxfast-nf4-int8", 9.0, memory_cap_gib=12),
        row("fluxfast-nf4-int8", 9.0, setting="stock"),
        row("fluxfast-nf4-int8", 9.0, device_name="NVIDIA GeForce RTX 4090 Laptop GPU"),
    ]
    code, out = run(rows)
    assert code == 0
    source = "measured: commit abcdef0, NVIDIA GeForce RTX 4090, 3 rows"
    expected = {"factor": pytest.approx(1.2, abs=1e-3), "source": source}
    assert json.loads(out.read_text()) == {"RTX 4090": {"int8": expected}}
    assert "Laptop" in capsys.readouterr().err


def test_a_factor_stretches_the_steps_of_its_kind_and_card(run):
    _, out = run([row("fluxfast-nf4-int8", 1.2)])
    measured = card("4090", out)
    assert measured.factors["int8"] == Efficiency(
        1.2, "measured: commit abcdef0, NVIDIA GeForce RTX 4090, 1 rows"
    )
    assert card("3090", out).factors == {} and closest((8, 9), 24, out) == measured
    ops = [Op("product", "int8", 1e12, 0.0), Op("offload", "copy", 0.0, 1e9)]
    bare = replace(measured, factors={})
    product, copy = (seconds(op, bare) for op in ops)
    assert total_seconds(ops, measured, "int8") == pytest.approx(1.2 * product + copy)
    assert total_seconds(ops, measured, "bf16") == pytest.approx(product + copy)
    assert total_seconds(ops, measured) == pytest.approx(product + copy)


def test_without_rows_nothing_is_written(run, capsys):
    assert not MEASURED.exists()  # no GPU has run: nothing is shipped
    code, out = run([])
    assert code == 0 and not out.exists()
    assert "nothing written" in capsys.readouterr().out
    assert calibrate.main(["--rows", "/nonexistent.jsonl", "--out", str(out)]) == 0
    assert not out.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"RTX 4090": {"int8": {"factor": 0, "source": ""}}}'])
def test_a_broken_file_of_factors_is_named(tmp_path, text):
    (tmp_path / "measured.json").write_text(text)
    with pytest.raises(ConfigError, match=r"measured\.json"):
        card("4090", tmp_path / "measured.json")
