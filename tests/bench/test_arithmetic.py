"""The arithmetic of a step beside the project's performance notes: to the last digit that they
print, or why it differs."""

import pytest

from bench import roofline
from bench.report import arithmetic
from bench.report.arithmetic import SIDES, shape
from fluxfast.memory.planner import saved_bytes
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
KEPT_GB = [5.05, 9.25, 15.14]
PCIE_MS = [202, 370, 606]
INT8_FORWARD_MS = [57, 122, 237]


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """The name of a line -> its cells, one an image size."""
    lines = [line.strip("| ").split(" | ") for line in arithmetic.table().splitlines()[2:]]
    return {name.removesuffix(": peak / assumed, ms"): cells for name, *cells in lines}


def figures(cell: str) -> list[float]:
    return [float(figure) for figure in cell.split(" / ")]


@pytest.mark.parametrize("name", NOTES)
def test_flop_and_floors_are_the_notes_to_the_last_digit(printed, name):
    """The realistic times differ by up to 0.2 %, and both are rounded to a millisecond: cards.json
    has the notes' rates as shares of the peak, to three digits."""
    if "TFLOP" in name:
        assert printed[name] == NOTES[name]
        return
    for cell, note in zip(printed[name], NOTES[name], strict=True):
        (floor, realistic), (wanted, wanted_realistic) = figures(cell), figures(note)
        assert floor == wanted
        assert realistic == pytest.approx(wanted_realistic, rel=0.002, abs=1)


def test_kept_bytes_are_the_notes_but_for_what_backward_recomputes(printed):
    """The notes' figures are 0.4 % more than the blocks keep: x·Aᵀ of every linear, which backward
    recomputes here, and the outputs of one sample's modulation, which belong to no block."""
    rank, e = 16, 2
    # independent As: q, k, v, proj and both of the MLP; q, k, v, the MLP's first and linear2
    per_token = rank * e * (6 * DEV.depth + 5 * DEV.depth_single_blocks)
    step = StepSpec(DEV, "nf4", "bf16", "bf16", lora_of(DEV, rank))
    modulation = e * sum(linear_shape(name, DEV)[0] for name in saved_bytes.modulation_names(step))
    cells = printed["kept by the blocks, LoRA on attn+mlp, GB"]
    for side, cell, note in zip(SIDES, cells, KEPT_GB, strict=True):
        kept = arithmetic.saved_gb("attn+mlp", side)
        assert figures(cell) == [round(kept, 2)]
        assert round(kept + (per_token * shape(side).tokens + modulation) / 1e9, 2) == note
    # with LoRA on all: 3.74 MB a token, 17.2 GB at 1024 px
    assert printed["kept by the blocks, LoRA on all, GB"][-1] == "17.2"
    assert arithmetic.saved_gb("all", 1024) * 1e3 / 4608 == pytest.approx(3.74, abs=0.005)


def test_copies_and_the_forward_that_would_hide_them(printed):
    """Copies are as the bytes above, 0.4 % below the notes'; the forward is at the card's rates."""
    copies = [float(cell) for cell in printed["RTX 4090: attn+mlp's over PCIe, one way, ms"]]
    assert copies == pytest.approx(PCIE_MS, rel=0.005)
    forward = [float(cell) for cell in printed["RTX 4090: an int8 forward, assumed, ms"]]
    assert forward == pytest.approx(INT8_FORWARD_MS, abs=1)


def test_tables_are_printed(capsys):
    assert roofline.main(["--tables"]) == 0
    assert capsys.readouterr().out.strip() == arithmetic.table()
