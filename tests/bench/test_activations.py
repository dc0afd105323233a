"""The bench of 8-bit saved activations: its short form runs, its limits refuse, its block shows
the rows."""

import json
import re

import pytest
import torch

from bench import activations, quality
from bench.report import cli as report
from bench.rows import last_run
from fluxfast.model.activations import BlockRunner, Int8Store

PAGES = "\n".join(report.pages(report.ROOT).values())


def made(cosine=0.9999, loss=0.7, counted=1_000_000) -> list[dict]:
    """Rows of a run of two seeds; the arguments are gelu_int8's."""
    rows = []
    for policy in activations.POLICIES:
        u8 = policy == "gelu_int8"
        run = {"policy": policy, "steps": 9, "best_loss": loss if u8 else 0.7}
        rows += [{"bench": "activations-loss", "seed": seed} | run for seed in (1, 2)]
        sizes = {
            **{"batch_size": 8, "tokens": 48, "lora_rank": 16, "lora_targets": "attn+mlp"},
            **{"counted": counted if u8 else 1_000_000, "predicted": 1_000_000},
            **{"flux_dev_predicted": 15_000_000_000, "flux_dev_pixels": 1024},
        }
        rows.append({"bench": "activations-bytes", "policy": policy, **sizes})
        if policy != "keep":
            cosines = {"a": [0.99999, 0.9999], "b": [1.0, cosine if u8 else 0.9995]}
            errors = {"a": [0.01, 0.02], "b": [0.03, 0.06]}
            fields = {"policy": policy, "cosines": cosines, "errors": errors}
            rows.append({"bench": "activations-gradients", **fields})
    where = {"date": "now", "device_name": "a CPU", "threads": 2, "torch": "2", "commit": "0123456"}
    return [row | where for row in rows]


def megabytes(line: str) -> list[float]:
    """Of a table's line: counted, predicted."""
    return [float(number) for number in re.search(r"([\d.]+) / ([\d.]+) MB", line).groups()]


@pytest.mark.slow
def test_short_form(capsys, monkeypatch):
    """Trains under int8, and finds errors, and bytes, of the sizes that 8 bits explain."""
    passes, plain = [], BlockRunner.__init__

    def noted(self, policies, *rest):
        plain(self, policies, *rest)
        if self.grad:
            passes.append(set(policies))

    monkeypatch.setattr(BlockRunner, "__init__", noted)
    assert activations.main(["--short"]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("within the limits")
    steps = 4
    gradients = [{"keep"}, {"gelu_int8"}, {"int8"}]
    assert passes == [{"int8"}] * steps + gradients + gradients  # the last for the bytes
    keep, u8, all_8 = (line for line in printed.splitlines() if line.startswith("| `"))
    for line, smallest in ((u8, 1e-4), (all_8, 1e-3)):
        median, largest = map(float, re.search(r"([\d.]+)% \(([\d.]+)%\)", line).groups())
        assert smallest < median / 100 < largest / 100 < 0.042
    counts = [megabytes(line) for line in (keep, u8, all_8)]
    assert all(counted == pytest.approx(predicted, rel=0.02) for counted, predicted in counts)
    # of 4.91 MB in bf16 u's 2 MB are halved, then nearly all of it
    assert counts[1][0] < 0.82 * counts[0][0] and counts[2][0] < 0.57 * counts[0][0]


@pytest.mark.slow
def test_coarser_codes_are_past_the_limits(tmp_path, monkeypatch):
    """What the limits are for: with four bits instead of eight they refuse int8, and only that."""
    config = activations.settings("keep", 1, 1, tmp_path)
    batches = quality.batches_of(config, config.seed, 1)
    quality.trained(config)
    put = Int8Store.put

    def four_bits(self, flat):
        codes, scale, dtype = put(self, flat)
        return (codes.float() / 16).round().mul(16).clamp(-127, 127).to(torch.int8), scale, dtype

    monkeypatch.setattr(Int8Store, "put", four_bits)
    rows = activations.gradient_rows(config, batches, quality.lora_file(config))
    wrong = activations.over_limits(rows)
    assert len(wrong) == 1 and wrong[0].startswith("int8: gradient cosine 0.9")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (made(), None),
        (made(loss=0.7 * 1.009), None),
        (made(loss=0.7 * 1.011), "gelu_int8: best loss +1.10%"),
        (made(loss=0.7 * 0.989), "gelu_int8: best loss -1.10%"),
        (made(loss=float("nan")), "gelu_int8: best loss +nan%"),
        (made(cosine=0.9995), "gelu_int8: gradient cosine 0.99950 in b"),
        (made(cosine=float("nan")), "gelu_int8: gradient cosine nan in b"),
        (made(counted=1_030_000), "gelu_int8: predicted bytes off by -2.9%"),
    ],
)
def test_limits(rows, message):
    wrong = activations.over_limits(rows)
    assert wrong == [] if message is None else len(wrong) == 1 and wrong[0].startswith(message)


def test_block_of_the_newest_run(tmp_path):
    rows, old = made(loss=0.7035), [{**row, "date": "before"} for row in made(loss=0.8)]
    path = tmp_path / "activations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*old, *rows]))
    found = last_run(path)
    assert found == rows
    text = activations.block(found)
    assert (
        "| `gelu_int8`: u | 15.0 GB | 1.00 / 1.00 MB | 0.99990 | 2.50% (6.00%) | "
        "+0.50% (+0.50% to +0.50%) |"
    ) in text
    assert "batch 8 with 48 tokens a picture" in text and "best of 9 steps in fp32, 2 seeds" in text


def test_committed_rows_are_within_the_limits_that_the_pages_name():
    assert activations.over_limits(last_run(activations.ROWS)) == []
    u8, all_8 = (activations.LEAST_COSINE[policy] for policy in ("gelu_int8", "int8"))
    assert f"below {u8} (`gelu_int8`) or {all_8} (`int8`)" in PAGES
    assert f"by more than {activations.LOSS_LIMIT * 100:.0f} %" in PAGES
