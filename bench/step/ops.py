"""The step of a memory plan, op by op, for `bench.roofline`.

A line is one part (product, update, weight, attention, element-wise) of one fused op in one
direction, over all blocks: its FLOP and bytes, whether arithmetic or memory bounds it, its time at
the card's peak and at what the card is taken to reach. That is the shipped share of the peak
("assumed"), stretched, where a row of `bench/results/kernels-cuda.jsonl` is of the same op, card,
picture size and precision, by what the op took over what the shares predict of it ("measured").
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from bench.calibrate import WORDS
from bench.report.arithmetic import at_peak
from fluxfast.errors import ConfigError
from fluxfast.memory.planner import cost
from fluxfast.memory.planner.cards import Card, card
from fluxfast.memory.planner.choose import policy_ops
from fluxfast.memory.planner.cost import Op, Shape, StepSpec, seconds, total_seconds
from fluxfast.memory.planner.plan import Plan
from fluxfast.memory.planner.saved_bytes import blocks_of
from fluxfast.model.modulation import MODULATION_ROWS

# a block's linear -> the fused op that computes it; what is of no linear is attention's
FUSED = {
    **dict.fromkeys(("attn.qkv", "mlp.0", "linear1"), "norm_modulate_lora_linear"),
    "attn.proj": "lora_linear",
    **dict.fromkeys(("mlp.2", "linear2"), "gelu_lora_linear"),
}
ATTENTION = "qk_norm_rope_attention"
DIRECTIONS = ("forward", "backward")
AUTOGRAD = ("gradients added", "gradients joined")
# the block whose launches are those of the op's row in bench/results/kernels-cuda.jsonl
TIMED = {
    "norm_modulate_lora_linear": "single_blocks.0",
    "gelu_lora_linear": "single_blocks.0",
    ATTENTION: "single_blocks.0",
    "lora_linear": "double_blocks.0",
}
PRECISION = ("storage", "products", "compute")  # fields of a row
SHORTEST = 1e-6  # s: what is below is the rounding of sums
PARTS = {"product": "product", "dx": "product", "decode": "weight", "transpose": "weight"}
PARTS |= dict.fromkeys(("down", "up", "down again", "d_down", "dB", "dA", "dx up"), "update")


class Counted(NamedTuple):
    """An op of the step. times: how often, below 1 where steps share it. eager: whether its
    launches cost their own time (no CUDA graph)."""

    group: str
    direction: str
    op: Op
    times: float = 1.0
    eager: bool = False

    @property
    def part(self) -> str:
        if self.op.kind.startswith("attention"):
            return "attention"
        return PARTS.get(self.op.name.partition(" ")[2], "element-wise")


class Line(NamedTuple):
    """bound: "compute", "memory", "launches" or "copies". source: "assumed" or "measured"."""

    group: str
    direction: str
    part: str
    launches: float
    flop: float
    bytes: float
    bound: str
    peak_s: float
    seconds: float
    source: str


def fused_op(block: str, op: Op) -> str:
    """The public op of fluxfast_kernels that launches it; "autograd" for what autograd sums."""
    if op.name.endswith(AUTOGRAD):
        return "autograd"
    linear = op.name.partition(" ")[0].removeprefix(f"{block}.")
    return next((fused for end, fused in FUSED.items() if linear.endswith(end)), ATTENTION)


def step_of(plan: Plan, label: str) -> list[Counted]:
    """Every op of one step of a plan's bucket; copies apart."""
    request, bucket = plan.request, plan.buckets[label]
    work, shape, eager = request.step, bucket.shape, not bucket.graphed
    found = []
    for block, policy in zip(blocks_of(work), bucket.choice.policies, strict=True):
        ops = cost.block_ops(work, block, shape)
        added = policy_ops(work, shape, block, policy, ops)
        for direction, own, more in zip(
            DIRECTIONS, (ops.forward, ops.backward), added, strict=True
        ):
            found += [Counted(fused_op(block, op), direction, op, eager=eager) for op in own]
            found += [Counted(f"policy {policy}", direction, op, eager=eager) for op in more]
    outer = cost.outer_ops(work, shape)
    # in rows of MODULATION_ROWS, which serve several steps where they are computed ahead
    rows = -(-shape.batch // MODULATION_ROWS) * MODULATION_ROWS
    share = 1.0 if plan.modulation == "in_place" else 1 / max(1, MODULATION_ROWS // shape.batch)
    modulation = cost.modulation_ops(work, rows)
    for way in DIRECTIONS:
        outside, ahead = getattr(outer, way), getattr(modulation, way)
        found += [Counted("outside the blocks", way, op, eager=eager) for op in outside]
        found += [Counted("modulation", way, op, share, True) for op in ahead]
    ops = cost.optimizer_ops(work, request.optimizer, request.ema)
    return found + [Counted("optimizer", "step", op, eager=True) for op in ops]


def fits(row: dict, known: Card, work: StepSpec, shape: Shape) -> bool:
    """Whether a row of the kernels' bench is of this card, picture size and precision."""
    if row["name"] != "fluxfast" or row["status"] != "ok" or row["hidden"] != work.spec.hidden_size:
        return False
    try:
        same = card(row["device_name"]).name == known.name
    except ConfigError:
        return False
    storage, products, compute = (WORDS.get(row[k], row[k]) for k in PRECISION)
    same = same and compute == work.activations
    if row["op"] != ATTENTION:  # which has no weight
        same = same and (storage, products) == (work.storage, work.matmul)
    tokens = (row["pixels"] // 16) ** 2
    return same and (tokens, row["batch"]) == (shape.image_tokens, shape.batch)


def predicted_s(row: dict, direction: str, known: Card, work: StepSpec) -> float:
    """What the shipped shares say of one direction of what the row timed: one fused op over all
    tokens, modulation frozen."""
    block = TIMED[row["op"]]
    plain = replace(work, lora=cost.lora_of(work.spec, row["rank"]), dropout=False, layers={})
    ops = getattr(cost.block_ops(plain, block, Shape(row["batch"], row["tokens"], 0)), direction)
    own = [op for op in ops if fused_op(block, op) == row["op"] and ".txt_" not in op.name]
    return total_seconds(own, known)


def measured_ratios(
    rows: Iterable[dict], known: Card, work: StepSpec, shape: Shape
) -> dict[tuple[str, str], float]:
    """(fused op, direction) -> measured over predicted time, by the newest rows that fit. Backward
    is what forward and backward take beyond forward."""
    newest: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["op"] in TIMED and fits(row, known, work, shape):
            newest.setdefault(row["op"], {})[row["direction"]] = row
    found = {}
    for op, by_direction in newest.items():
        forward, both = (by_direction.get(key) for key in ("forward", "forward+backward"))
        if forward:
            median = forward["median_ms"] / 1e3
            found[op, "forward"] = median / predicted_s(forward, "forward", known, work)
        if forward and both:
            median = (both["median_ms"] - forward["median_ms"]) / 1e3
            found[op, "backward"] = median / predicted_s(both, "backward", known, work)
    return found


def lines_of(plan: Plan, label: str, rows: Iterable[dict] = ()) -> list[Line]:
    """The step of a plan's bucket; without measured rows their sum is what the plan predicts from
    the shipped shares. rows: of the kernels' bench."""
    known, bucket = plan.card, plan.buckets[label]
    counted = step_of(plan, label)
    ratios = measured_ratios(rows, known, plan.request.step, bucket.shape)
    groups: dict[tuple, list[Counted]] = {}
    for one in counted:
        groups.setdefault((one.group, one.direction, one.part), []).append(one)
    found = [_line(*key, group, known, ratios.get(key[:2])) for key, group in groups.items()]
    starts = sum(one.times * one.op.launches for one in counted if one.eager)
    starting = starts * known.launch_s
    waits = plan.seconds(label) - sum(
        one.times * total_seconds([one.op], plan.card, plan.request.step.matmul, one.eager)
        for one in counted
    )
    for name, bound, time in (
        (f"starting {starts:.0f} kernels, no graph", "launches", starting),
        ("copies that nothing hides", "copies", waits),
    ):
        if time > SHORTEST:
            found.append(Line(name, "", "", 0.0, 0.0, 0.0, bound, time, time, "assumed"))
    return found


def _line(
    group: str, direction: str, part: str, counted: list[Counted], known: Card, ratio: float | None
) -> Line:
    def total(figure) -> float:
        return sum(one.times * figure(one.op) for one in counted)

    peak, reached = at_peak(known), total(lambda op: seconds(op, known))
    by_arithmetic = total(lambda op: seconds(op, known) * _bound_by_arithmetic(op, known))
    return Line(
        group,
        direction,
        part,
        total(lambda op: op.launches),
        total(lambda op: op.flop),
        total(lambda op: op.bytes),
        "compute" if by_arithmetic > reached / 2 else "memory",
        total(lambda op: seconds(op, peak)),
        reached * (ratio or 1.0),
        "measured" if ratio or _shares_measured(counted, known) else "assumed",
    )


def _bound_by_arithmetic(op: Op, known: Card) -> bool:
    return seconds(replace(op, bytes=0.0), known) >= seconds(replace(op, flop=0.0), known)


def _shares_measured(counted: list[Counted], known: Card) -> bool:
    shares = {"element" if one.part == "element-wise" else one.op.kind for one in counted}
    return all(known.efficiency[kind].source.startswith("measured") for kind in shares)
