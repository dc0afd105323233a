"""The arithmetic of a FLUX.1-dev step at batch 1 with 512 text tokens, as one table.

`python -m bench.roofline --tables` prints it. Linears and attention alone, without an update: no
element-wise pass, no dequantization, no launches, no optimizer. Nothing in it is measured: "peak"
is at the data sheet's rates, "assumed" at the shares of them in `cards.json`.
"""

from dataclasses import replace
from functools import cache

from bench.terminal import markdown
from fluxfast.memory.planner import cost
from fluxfast.memory.planner.cards import Card, Efficiency, card
from fluxfast.memory.planner.cost import BlockOps, Op, total_flop, total_seconds
from fluxfast.memory.planner.saved_bytes import block_saved
from fluxfast.memory.planner.step_spec import Lora, Shape, StepSpec, lora_of, shape_of
from fluxfast.model.spec import DEV

SIDES = (512, 768, 1024)
RANK = 16
RECOMPUTE = {True: "full recompute", False: "none"}
STEPS = [  # card, matmul, whether every block is recomputed in backward
    ("RTX 4090", "bf16", True),
    ("RTX 4090", "bf16", False),
    ("RTX 4090", "int8", False),
    ("H100 SXM 80 GB", "bf16", False),
    ("H100 SXM 80 GB", "fp8", False),
]
LINK = "RTX 4090"  # its PCIe copies beside its int8 forward


def shape(side: int) -> Shape:
    return shape_of(side, side, 1, DEV.text_length)


def shipped(name: str) -> Card:
    """The card without factors that whole steps have measured."""
    return replace(card(name), factors={})


def at_peak(known: Card) -> Card:
    """The card with every share at 1."""
    full = Efficiency(1.0, "data sheet: the peak itself")
    return replace(known, efficiency=dict.fromkeys(known.efficiency, full), factors={})


@cache
def matmuls(kind: str, side: int) -> BlockOps:
    """Matmuls and attention of all blocks, nothing trained inside them."""
    step = StepSpec(DEV, kind, kind, "bf16", Lora(RANK, {}))
    counts = {"double_blocks.0": DEV.depth, "single_blocks.0": DEV.depth_single_blocks}
    forward, backward = [], []
    for block, count in counts.items():
        ops = cost.block_ops(step, block, shape(side))
        forward += count * [op for op in ops.forward if op.kind != "element"]
        backward += count * [op for op in ops.backward if op.kind != "element"]
    return BlockOps(forward, backward)


def step_ops(kind: str, side: int, recompute: bool) -> list[Op]:
    ops = matmuls(kind, side)
    return ops.forward * (1 + recompute) + ops.backward


def saved_gb(targets: str, side: int) -> float:
    """What the blocks save for backward, all of them under `keep`."""
    step = StepSpec(DEV, "nf4", "bf16", "bf16", lora_of(DEV, RANK, targets))
    blocks = (block_saved(step, block, shape(side), "keep") for block in step.blocks)
    return sum(block.device for block in blocks) / 1e9


def figures(side: int) -> dict[str, str]:
    """The table's column of one image size, by the names of its lines."""
    forward = matmuls("bf16", side).forward
    attention = total_flop(op for op in forward if op.kind.startswith("attention")) / 1e12
    linear = total_flop(forward) / 1e12 - attention
    cells = {"forward linear / attention, TFLOP": f"{linear:.2f} / {attention:.2f}"}
    for recompute, name in RECOMPUTE.items():
        tflop = total_flop(step_ops("bf16", side, recompute)) / 1e12
        cells[f"step with {name}, TFLOP"] = f"{tflop:.1f}"
    for name, kind, recompute in STEPS:
        ops, known = step_ops(kind, side, recompute), shipped(name)
        peak, assumed = (1e3 * total_seconds(ops, each) for each in (at_peak(known), known))
        line = f"{name}, {kind}, {RECOMPUTE[recompute]}: peak / assumed, ms"
        cells[line] = f"{peak:.0f} / {assumed:.0f}"
    saved = saved_gb("attn+mlp", side)
    copy_ms = 1e3 * cost.seconds(Op("saved", "copy", 0.0, 1e9 * saved), shipped(LINK))
    int8_ms = 1e3 * total_seconds(matmuls("int8", side).forward, shipped(LINK))
    return cells | {
        "kept by the blocks, LoRA on attn+mlp, GB": f"{saved:.2f}",
        "kept by the blocks, LoRA on all, GB": f"{saved_gb('all', side):.1f}",
        f"{LINK}: attn+mlp's over PCIe, one way, ms": f"{copy_ms:.0f}",
        f"{LINK}: an int8 forward, assumed, ms": f"{int8_ms:.0f}",
    }


def table() -> str:
    columns = [figures(side) for side in SIDES]
    lines = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return markdown(["", *(f"{side} px, T={shape(side).tokens}" for side in SIDES)], lines)
