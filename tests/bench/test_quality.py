"""The quality bench: its short form runs, its limits refuse, its table shows the rows."""

import json

import pytest

from bench import quality
from bench.report import quality_chart
from bench.rows import last_run


def row(mode: str, seed: int, loss: float) -> dict:
    return {
        **{"bench": "quality", "mode": mode, "seed": seed, "steps": 50, "seconds": 1.0},
        **{"base_loss": 2.0, "best_loss": loss, "best_step": 50},
        "curve": [[0, 2.0], [25, 1.5], [50, loss]],
        **{"date": "now", "device_name": "a CPU", "threads": 2, "torch": "2", "commit": "0123456"},
    }


def made(int8: float = 0.7, cosine: float = 0.999) -> list[dict]:
    """Rows of two seeds of every mode, and the cosines."""
    losses = {mode: 0.7 for mode in quality.MODES} | {"int8/int8": int8}
    rows = [row(mode, seed, loss) for seed in (1, 2) for mode, loss in losses.items()]
    for kind in ("int8", "fp8"):
        layers = {"a": 0.9999, "b": cosine}
        rows.append({"bench": "quality-cosine", "products": kind, "cosines": layers, "date": "now"})
    return rows


@pytest.mark.slow
def test_short_form(capsys):
    """Trains, validates and compares gradients; the losses of so few steps prove nothing."""
    modes = ["bf16/bf16", "int8/int8", "nf4/int8"]
    assert quality.main(["--short", "--modes", *modes]) == 0
    printed = capsys.readouterr().out
    assert all(mode in printed for mode in modes) and printed.rstrip().endswith("within the limits")
    cosine = float(printed.split("int8 products: gradient cosine per layer, least ")[1].split()[0])
    assert 0.99 <= cosine < 1  # 1 would mean that int8 was not used


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (made(), None),
        (made(int8=0.7 * 1.009), None),
        (made(int8=0.7 * 1.011), "int8/int8: best loss +1.10%"),
        (made(cosine=0.989), "int8: gradient cosine 0.9890 in b"),
        (made(cosine=float("nan")), "int8: gradient cosine nan"),
    ],
)
def test_limits(rows, message):
    wrong = quality.over_limits(rows)
    assert wrong == [] if message is None else len(wrong) == 1 and wrong[0].startswith(message)


def test_block_and_chart_of_the_newest_run(tmp_path):
    rows, old = made(int8=0.7 * 1.005), [{**r, "date": "before"} for r in made(int8=0.8)]
    path = tmp_path / "quality.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*old, *rows]))
    found = last_run(path)
    assert found == rows
    block = quality_chart.block(found)
    assert "| int8/int8 | 0.7035 ± 0.0000 | +0.50% (+0.50% to +0.50%) | 0.9990 |" in block
    quality_chart.draw(found, tmp_path / "quality.svg")
    assert "<svg" in (tmp_path / "quality.svg").read_text()
