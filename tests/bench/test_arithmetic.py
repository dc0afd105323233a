"""The arithmetic of a step beside the project's performance notes: to the last digit that they
print, or why it differs."""

from dataclasses import replace

import pytest

from bench import roofline
from bench.report import arithmetic
from bench.report.arithmetic import SIDES, shape
from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.cards import Card, Efficiency, card
from fluxfast.memory.planner.step_spec import StepSpec, lora_of
from fluxfast.model.names import linear_shape
from fluxfast.model.spec import DEV

# FLUX.1-dev at batch 1 with 512 text tokens, from the notes; of two in ms: floor / realistic
NOTES = {
    "forward linear / attention, TFLOP": ["19.83 / 1.65", "36.35 / 5.55", "59.49 / 14.87"],
    "step with full recompute, TFLOP": ["66.9", "134.1", "245.4"],
    "step with none, TFLOP": ["45.4", "92.1", "171.0"],
    "RTX 4090, bf16, full recompute": ["405 / 455", "811 / 922", "1485 / 1711"],
    "RTX 4090, bf16, none": ["275 / 311", "558 / 643", "1035 / 1216"],
    "RTX 4090, int8, none": ["95 / 139", "228 / 327", "495 / 699"],
    "H100 SXM 80 GB, bf16, none": ["46 / 70", "93 / 147", "173 / 282"],
    "H100 SXM 80 GB, fp8, none": ["26 / 46", "56 / 103", "113 / 211"],
}
# FLOP/s that the notes assume: bf16, 8 bits, attention forward and backward
RATES = {"RTX 4090": (150e12, 430e12, 150e12, 115e12)}
RATES["H100 SXM 80 GB"] = (680e12, 1150e12, 600e12, 450e12)
KEPT_GB = {512: 5.05, 768: 9.25, 1024: 15.14}
PCIE_MS = {512: 202, 768: 370, 1024: 606}
INT8_FORWARD_MS = {512: 57, 768: 122, 1024: 237}


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """What the table says -> its cells, a picture size each."""
    lines = [line.strip("| ").split(" | ") for line in arithmetic.table().splitlines()[2:]]
    return {what: cells for what, *cells in lines}


def figures(cell: str) -> list[float]:
    return [float(figure) for figure in cell.split(" / ")]


def line(printed: dict[str, list[str]], start: str) -> list[str]:
    (found,) = [cells for what, cells in printed.items() if what.startswith(start)]
    return found


@pytest.mark.parametrize("what", [what for what in NOTES if "TFLOP" in what])
def test_flop_are_the_notes_to_the_last_digit(printed, what):
    assert line(printed, what) == NOTES[what]


@pytest.mark.parametrize("what", [what for what in NOTES if "TFLOP" not in what])
def test_floors_are_the_notes_to_the_last_digit(printed, what):
    """The realistic times differ by up to 0.2 %, and both are rounded to a millisecond: cards.json
    has the notes' rates as shares of the peak, to three digits."""
    for cell, wanted in zip(line(printed, what), map(figures, NOTES[what]), strict=True):
        floor, realistic = figures(cell)
        assert floor == wanted[0]
        assert abs(realistic - wanted[1]) <= 1 + 0.002 * wanted[1]


@pytest.fixture
def at_the_notes_rates(monkeypatch):
    monkeypatch.setattr(arithmetic, "shipped", rated)


def rated(name: str) -> Card:
    known = card(name)
    bf16, eight, forward, backward = RATES[name]
    rates = {"bf16": bf16, "int8": eight, "fp8": eight}
    shares = {kind: Efficiency(rate / known.peaks[kind], "") for kind, rate in rates.items()}
    for kind, rate in (("attention_forward", forward), ("attention_backward", backward)):
        shares[kind] = Efficiency(rate / known.peaks["bf16"], "")
    return replace(known, efficiency={**known.efficiency, **shares})


LAST_DIGIT = 0.505  # ms: half of the last digit printed, and of 642.50


@pytest.mark.parametrize("name, compute, again", [*arithmetic.STEPS, ("H100 SXM 80 GB", "int8", 0)])
def test_at_the_notes_rates_their_times_come_out(at_the_notes_rates, name, compute, again):
    said = compute.replace("int8", "fp8") if name.startswith("H100") else compute
    wanted = NOTES[f"{name}, {said}, {arithmetic.RECOMPUTE[bool(again)]}"]
    found = [arithmetic.step_ms(name, compute, bool(again), side)[1] for side in SIDES]
    assert found == [pytest.approx(figures(cell)[1], abs=LAST_DIGIT) for cell in wanted]


def test_at_the_notes_rates_the_forward_takes_theirs(at_the_notes_rates):
    for side in SIDES:
        found = arithmetic.forward_ms("RTX 4090", "int8", side)
        assert found == pytest.approx(INT8_FORWARD_MS[side], abs=LAST_DIGIT)


def test_kept_bytes_are_the_notes_but_for_what_backward_makes_again(printed):
    """The notes' figures are 0.4 % more than the blocks keep. x·Aᵀ of every linear, which backward
    makes again here, and the outputs of one sample's modulation, which belong to no block, are what
    is between: with both, theirs come out to the last digit."""
    rank, e, spec = 16, 2, DEV
    # independent As: q, k, v, proj and both of the MLP; q, k, v, the MLP's first and linear2
    per_token = rank * e * (6 * spec.depth + 5 * spec.depth_single_blocks)
    work = StepSpec(spec, "nf4", "bf16", "bf16", lora_of(spec, rank))
    modulation = e * sum(linear_shape(name, spec)[0] for name in saved_bytes.modulation_names(work))
    cells = line(printed, "kept by the blocks, LoRA on attn+mlp")
    for side, cell in zip(SIDES, cells, strict=True):
        kept = arithmetic.saved_gb("attn+mlp", side)
        assert figures(cell) == [round(kept, 2)]
        with_both = kept + (per_token * shape(side).tokens + modulation) / 1e9
        assert round(with_both, 2) == KEPT_GB[side]
        assert kept == pytest.approx(KEPT_GB[side], rel=0.005)
    # with LoRA on all: 3.74 MB a token, 17.2 GB at 1024 px
    assert line(printed, "kept by the blocks, LoRA on all")[-1] == "17.2"
    assert arithmetic.saved_gb("all", 1024) * 1e3 / 4608 == pytest.approx(3.74, abs=0.005)


def test_copies_and_the_forward_that_would_hide_them(printed):
    """Copies are as the bytes above, 0.4 % below the notes'; the forward is at the card's rates."""
    for start, wanted, allowed in (
        ("RTX 4090: attn+mlp's over PCIe", PCIE_MS, {"rel": 0.005}),
        ("RTX 4090: an int8 forward", INT8_FORWARD_MS, {"abs": 1}),
    ):
        cells = line(printed, start)
        assert [figures(cell)[0] for cell in cells] == [
            pytest.approx(wanted[side], **allowed) for side in SIDES
        ]


def test_tables_are_printed(capsys):
    assert roofline.main(["--tables"]) == 0
    assert capsys.readouterr().out.strip() == arithmetic.table()
