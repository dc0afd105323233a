"""The arithmetic of a FLUX.1-dev step at batch 1 with 512 text tokens, as one table.

`bench/roofline.py --tables` prints it. Linears and attention alone, without an update: no
element-wise pass, no decoding, no launches, no optimizer. Nothing in it is measured: "peak" is at
the data sheet's rates, "assumed" at the shares of them in `fluxfast/memory/planner/cards.json`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from bench.terminal import markdown
from fluxfast.memory.planner.cards import Card, Efficiency, card
from fluxfast.memory.planner.cost import (
    BlockOps,
    Lora,
    Op,
    Shape,
    Work,
    block_ops,
    lora_of,
    seconds,
    shape_of,
    total_flop,
    total_seconds,
)
from fluxfast.memory.planner.saved_bytes import block_saved, blocks_of
from fluxfast.model.spec import DEV

SIDES = (512, 768, 1024)
RANK = 16
RECOMPUTE = {True: "full recompute", False: "none"}
STEPS = [  # card, compute, whether every block is computed again in backward
    ("RTX 4090", "bf16", True),
    ("RTX 4090", "bf16", False),
    ("RTX 4090", "int8", False),
    ("H100 SXM 80 GB", "bf16", False),
    ("H100 SXM 80 GB", "fp8", False),
]
LINK = "RTX 4090"  # whose PCIe and int8 forward are set beside each other


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
def products(compute: str, side: int) -> BlockOps:
    """Matrix products and attention of all blocks, nothing trained inside them."""
    work = Work(DEV, compute, compute, "bf16", Lora(RANK, {}))
    found = BlockOps([], [])
    counts = {"double_blocks.0": DEV.depth, "single_blocks.0": DEV.depth_single_blocks}
    for block, count in counts.items():
        ops = block_ops(work, block, shape(side))
        forward, backward = (
            [op for op in each if op.kind != "element"] for each in (ops.forward, ops.backward)
        )
        found += BlockOps(count * forward, count * backward)
    return found


def step(compute: str, side: int, again: bool) -> list[Op]:
    """again: the forward is made a second time in backward."""
    ops = products(compute, side)
    return ops.forward * (1 + again) + ops.backward


# ---------------------------------------------------------------- figures of one picture size


def forward_tflop(side: int) -> tuple[float, float]:
    """-> linears', attention's."""
    ops = products("bf16", side).forward
    attention = total_flop(op for op in ops if op.kind.startswith("attention"))
    return (total_flop(ops) - attention) / 1e12, attention / 1e12


def step_tflop(again: bool, side: int) -> tuple[float]:
    return (total_flop(step("bf16", side, again)) / 1e12,)


def step_ms(name: str, compute: str, again: bool, side: int) -> tuple[float, float]:
    """-> at the card's peak, at the assumed shares of it."""
    ops, known = step(compute, side, again), shipped(name)
    return 1e3 * total_seconds(ops, at_peak(known)), 1e3 * total_seconds(ops, known)


def forward_ms(name: str, compute: str, side: int) -> tuple[float]:
    return (1e3 * total_seconds(products(compute, side).forward, shipped(name)),)


def kept_gb(targets: str, side: int) -> tuple[float]:
    """What the blocks keep for backward, all of them under `keep`."""
    work = Work(DEV, "nf4", "bf16", "bf16", lora_of(DEV, RANK, targets))
    kept = (block_saved(work, block, shape(side), "keep").device for block in blocks_of(work))
    return (sum(kept) / 1e9,)


def link_ms(name: str, targets: str, side: int) -> tuple[float]:
    """All of that over PCIe, one way."""
    copy = Op("kept", "copy", 0.0, 1e9 * kept_gb(targets, side)[0])
    return (1e3 * seconds(copy, shipped(name)),)


# ---------------------------------------------------------------- the table

Figures = Callable[[int], tuple[float, ...]]


def rows() -> list[tuple[str, str, Figures]]:
    """(what, the format of a figure, side in pixels -> its figures)."""
    found = [("forward linear / attention, TFLOP", ".2f", forward_tflop)]
    for again, said in RECOMPUTE.items():
        found.append((f"step with {said}, TFLOP", ".1f", partial(step_tflop, again)))
    for name, compute, again in STEPS:
        said = f"{name}, {compute}, {RECOMPUTE[again]}: peak / assumed, ms"
        found.append((said, ".0f", partial(step_ms, name, compute, again)))
    return [
        *found,
        ("kept by the blocks, LoRA on attn+mlp, GB", ".2f", partial(kept_gb, "attn+mlp")),
        ("kept by the blocks, LoRA on all, GB", ".1f", partial(kept_gb, "all")),
        (f"{LINK}: attn+mlp's over PCIe, one way, ms", ".0f", partial(link_ms, LINK, "attn+mlp")),
        (f"{LINK}: an int8 forward, assumed, ms", ".0f", partial(forward_ms, LINK, "int8")),
    ]


def table() -> str:
    """Markdown."""
    lines = []
    for name, form, figures in rows():
        cells = [" / ".join(f"{value:{form}}" for value in figures(side)) for side in SIDES]
        lines.append([name, *cells])
    return markdown(["", *(f"{side} px, T={shape(side).tokens}" for side in SIDES)], lines)
