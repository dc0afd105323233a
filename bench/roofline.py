"""A training step on a card that need not be here: FLOP, bytes, bound and time of every op.

    python -m bench.roofline --card 4090                    the defaults
    python -m bench.roofline --card 4090 --setting stock    ai-toolkit's file
    python -m bench.roofline --tables      the arithmetic, batch 1, no update

The step is that of the memory plan which `fluxfast plan` prints. A line is one part (product,
update, weight, attention, element-wise) of one fused op in one direction, over all blocks: its FLOP
and bytes, whether arithmetic or memory bounds it, its time at the card's peak and at what the card
is taken to reach. That is the shipped share of the peak ("assumed"), stretched, where a row of
`bench/results/kernels-cuda.jsonl` is of the same op, card, picture size and precision, by what the
op took over what the shares predict of it ("measured"). Where `bench/calibrate.py` has measured
whole steps of the card, the projection is theirs. A projection is no measurement. Only the stock
setting at 512, 768 and 1024 px is set beside ai-toolkit's figures, which are of that.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bench import RESULTS, rows, terminal
from bench.report import arithmetic
from bench.report.arithmetic import at_peak
from bench.report.plan_table import configuration
from bench.step.settings import DTYPE_NAMES
from fluxfast.config.schema import Config
from fluxfast.errors import ConfigError
from fluxfast.memory.planner import cost
from fluxfast.memory.planner.cards import Card, card
from fluxfast.memory.planner.choose import policy_ops
from fluxfast.memory.planner.cost import Op, seconds, total_seconds
from fluxfast.memory.planner.plan import Plan
from fluxfast.memory.planner.report import summary
from fluxfast.memory.planner.step_spec import Shape, StepSpec, lora_of
from fluxfast.model.modulation import MODULATION_ROWS
from fluxfast.tools.plan import plan_rows

ROWS = RESULTS / "kernels-cuda.jsonl"
# it/s that are reported of ai-toolkit with its stock file, by card and batch
HEADLINE = {("4090", 1): 0.4375, ("L40S", 1): 0.838, ("A100", 4): 0.3478, ("H100", 4): 0.4537}
MIX = [512, 768, 1024]
# a block's linear -> the fused op that computes it; what is of no linear is attention's
FUSED = {
    **dict.fromkeys(("attn.qkv", "mlp.0", "linear1"), "norm_modulate_lora_linear"),
    "attn.proj": "lora_linear",
    **dict.fromkeys(("mlp.2", "linear2"), "gelu_lora_linear"),
}
ATTENTION = "qk_norm_rope_attention"
DIRECTIONS = ("forward", "backward")
AUTOGRAD = ("gradients added", "gradients joined")
# op -> the block that its rows of bench.kernels are timed as
TIMED = {
    "norm_modulate_lora_linear": "single_blocks.0",
    "gelu_lora_linear": "single_blocks.0",
    ATTENTION: "single_blocks.0",
    "lora_linear": "double_blocks.0",
}
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
    """Returns the op of fluxfast_kernels that launches it; "autograd" for autograd's sums."""
    if op.name.endswith(AUTOGRAD):
        return "autograd"
    linear = op.name.partition(" ")[0].removeprefix(f"{block}.")
    return next((fused for end, fused in FUSED.items() if linear.endswith(end)), ATTENTION)


def step_of(plan: Plan, label: str) -> list[Counted]:
    """Returns every op of one step of a plan's bucket but copies."""
    request, bucket = plan.request, plan.buckets[label]
    work, shape, eager = request.step, bucket.shape, not bucket.graphed
    counted = []
    for block, policy in zip(work.blocks, bucket.choice.policies, strict=True):
        ops = cost.block_ops(work, block, shape)
        added = policy_ops(work, shape, block, policy, ops)
        for direction, own, more in zip(
            DIRECTIONS, (ops.forward, ops.backward), added, strict=True
        ):
            counted += [Counted(fused_op(block, op), direction, op, eager=eager) for op in own]
            counted += [Counted(f"policy {policy}", direction, op, eager=eager) for op in more]
    outer = cost.outer_ops(work, shape)
    # in rows of MODULATION_ROWS, which serve several steps where they are computed ahead
    rows = -(-shape.batch // MODULATION_ROWS) * MODULATION_ROWS
    share = 1.0 if plan.modulation == "in_place" else 1 / max(1, MODULATION_ROWS // shape.batch)
    modulation = cost.modulation_ops(work, rows)
    for direction in DIRECTIONS:
        outside, ahead = getattr(outer, direction), getattr(modulation, direction)
        counted += [Counted("outside the blocks", direction, op, eager=eager) for op in outside]
        counted += [Counted("modulation", direction, op, share, True) for op in ahead]
    ops = cost.optimizer_ops(work, request.optimizer, request.ema)
    return counted + [Counted("optimizer", "step", op, eager=True) for op in ops]


def fits(row: dict, known: Card, work: StepSpec, shape: Shape) -> bool:
    """Whether a row of the kernels' bench is of this card, picture size and precision."""
    if row["name"] != "fluxfast" or row["status"] != "ok" or row["hidden"] != work.spec.hidden_size:
        return False
    try:
        if card(row["device_name"]).name != known.name:
            return False
    except ConfigError:
        return False
    storage, matmul, compute = (
        DTYPE_NAMES.get(row[key], row[key]) for key in ("storage", "products", "compute")
    )
    # attention has no weight
    same = row["op"] == ATTENTION or (storage, matmul) == (work.storage, work.matmul)
    size = (row["pixels"] // 16) ** 2, row["batch"]
    return same and compute == work.activations and size == (shape.image_tokens, shape.batch)


def predicted_s(row: dict, direction: str, known: Card, work: StepSpec) -> float:
    """Returns what the shipped shares predict of one direction of the row's work: one fused op over
    all tokens, modulation frozen."""
    block = TIMED[row["op"]]
    plain = replace(work, lora=lora_of(work.spec, row["rank"]), dropout=False, layers={})
    ops = getattr(cost.block_ops(plain, block, Shape(row["batch"], row["tokens"], 0)), direction)
    own = [op for op in ops if fused_op(block, op) == row["op"] and ".txt_" not in op.name]
    return total_seconds(own, known)


def measured_ratios(
    rows: Iterable[dict], known: Card, work: StepSpec, shape: Shape
) -> dict[tuple[str, str], float]:
    """Returns (fused op, direction) -> measured over predicted time, by the newest rows that fit.
    Backward is what forward and backward take beyond forward."""
    newest: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["op"] in TIMED and fits(row, known, work, shape):
            newest.setdefault(row["op"], {})[row["direction"]] = row
    ratios = {}
    for op, by_direction in newest.items():
        forward, both = (by_direction.get(key) for key in ("forward", "forward+backward"))
        if forward:
            median = forward["median_ms"] / 1e3
            ratios[op, "forward"] = median / predicted_s(forward, "forward", known, work)
        if forward and both:
            median = (both["median_ms"] - forward["median_ms"]) / 1e3
            ratios[op, "backward"] = median / predicted_s(both, "backward", known, work)
    return ratios


def lines_of(plan: Plan, label: str, rows: Iterable[dict] = ()) -> list[Line]:
    """Returns the step of a plan's bucket; without measured rows (of the kernels' bench) the times
    add up to what the plan predicts from the shipped shares."""
    known, bucket = plan.card, plan.buckets[label]
    counted = step_of(plan, label)
    ratios = measured_ratios(rows, known, plan.request.step, bucket.shape)
    groups: dict[tuple, list[Counted]] = {}
    for one in counted:
        groups.setdefault((one.group, one.direction, one.part), []).append(one)
    lines = [_line(*key, group, known, ratios.get(key[:2])) for key, group in groups.items()]
    starts = sum(one.times * one.op.launches for one in counted if one.eager)
    waits = plan.seconds(label) - sum(
        one.times * total_seconds([one.op], known, plan.request.step.matmul, one.eager)
        for one in counted
    )
    for name, bound, time in (
        (f"starting {starts:.0f} kernels, no graph", "launches", starts * known.launch_s),
        ("copies that nothing hides", "copies", waits),
    ):
        if time > SHORTEST:
            lines.append(Line(name, "", "", 0.0, 0.0, 0.0, bound, time, time, "assumed"))
    return lines


def _line(
    group: str, direction: str, part: str, counted: list[Counted], known: Card, ratio: float | None
) -> Line:
    def total(figure) -> float:
        return sum(one.times * figure(one.op) for one in counted)

    def arithmetic_bound(op: Op) -> bool:
        return seconds(replace(op, bytes=0.0), known) >= seconds(replace(op, flop=0.0), known)

    peak, reached = at_peak(known), total(lambda op: seconds(op, known))
    by_arithmetic = total(lambda op: seconds(op, known) * arithmetic_bound(op))
    shares = {"element" if one.part == "element-wise" else one.op.kind for one in counted}
    measured = all(known.efficiency[kind].source.startswith("measured") for kind in shares)
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
        "measured" if ratio or measured else "assumed",
    )


def project(plan: Plan, lines: dict[str, list[Line]]) -> tuple[float, str]:
    """Returns seconds of a step, the mean over image sizes, and what they rest on. lines: by
    bucket."""
    if factor := plan.card.factors.get(plan.request.step.matmul):
        total = sum(plan.seconds(label) for label in lines)
        basis = f"{factor.value:g} of what shipped shares predict ({factor.source})"
        return total / len(lines), basis
    every = [line for bucket in lines.values() for line in bucket]
    total = sum(line.seconds for line in every)
    measured = sum(line.seconds for line in every if line.source == "measured")
    basis = f"{measured / total:.0%} of it from measured ops, the rest from assumed shares"
    return total / len(lines), basis


def table(lines: list[Line]) -> str:
    """Returns aligned columns, and their sums."""
    keys = ("launches", "flop", "bytes", "peak_s", "seconds")
    sums = {key: sum(getattr(line, key) for line in lines) for key in keys}
    rows = [["op", "pass", "part", "launches", "GFLOP", "GB", "bound", "peak ms", "ms", "from"]]
    for line in [*lines, Line("step", "", "", bound="", source="", **sums)]:
        figures = f"{line.launches:.0f}", f"{line.flop / 1e9:.1f}", f"{line.bytes / 1e9:.2f}"
        times = f"{1e3 * line.peak_s:.2f}", f"{1e3 * line.seconds:.2f}"
        rows.append([*line[:3], *figures, line.bound, *times, line.source])
    return terminal.aligned(rows, left=(0, 1, 2, 6, 9))


def title(setting: str, config: Config, plan: Plan) -> str:
    work, train = plan.request.step, config.train
    ema = ", EMA" if train.ema.enabled else ""
    modulation = "formed in every step" if plan.modulation == "in_place" else "formed ahead"
    return (
        f"{plan.card.name}, the {setting} setting: LoRA of rank {config.lora.rank} on "
        f"{config.lora.targets}, {train.optimizer}{ema}; {work.storage} base, {work.matmul} "
        f"products, batch {train.batch_size}; modulation {modulation}"
    )


def beside(setting: str, config: Config, plan: Plan, seconds: float, basis: str) -> list[str]:
    """Returns the projection, and ai-toolkit's figures where they are of the same setting."""
    pixels, batch = sorted(config.data[0].resolution), config.train.batch_size
    rate = 1 / seconds
    sizes = ", ".join(f"{side}" for side in pixels)
    over = f"at {sizes} px" if len(pixels) == 1 else f"the mean of {sizes} px"
    lines = [
        f"Projection, not measured: {rate:.2f} it/s ({seconds:.3f} s a step, {over}); {basis}."
    ]
    if setting != "stock" or pixels != MIX:
        note = "ai-toolkit's figures are of the stock setting at 512, 768 and 1024 px: none is set"
        return [*lines, f"{note} beside this."]
    lines.append("Reported of ai-toolkit, the same setting:")
    for (name, size), reported in HEADLINE.items():
        same = card(name).name == plan.card.name and size == batch
        times = f"; projected: {rate / reported:.1f} times that" if same else ""
        lines.append(f"  {name}, batch {size}: {reported} it/s{times}")
    return lines


def report(setting: str, gpu: str, overrides: list[str], timed: list[dict]) -> str:
    """Returns what is printed of a card and setting. Raises ConfigError where nothing fits."""
    config = configuration(setting, overrides)
    row = plan_rows(config, None, gpu)[-1]  # of several sizes: all of them in one plan
    if row.plan is None:
        raise ConfigError(f"{row.card.name}: {row.reason}")
    plan, parts = row.plan, [title(setting, config, row.plan)]
    lines = {label: lines_of(plan, label, timed) for label in plan.buckets}
    for label, bucket in lines.items():
        policies = summary(plan.buckets[label].choice.policies)
        parts.append(f"{label}: {policies}\n{table(bucket)}")
    parts.append("\n".join(beside(setting, config, plan, *project(plan, lines))))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = terminal.parser(__doc__)
    parser.add_argument("--card", metavar="NAME", help="such as 4090, 3060, L40S, H100")
    parser.add_argument("--setting", choices=["plain", "stock"], default="plain")
    parser.add_argument("--pixels", nargs="+", type=int, help="image sides; default: 512 768 1024")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--storage", help="of the base, instead of what the setting has")
    parser.add_argument("--compute", help="of the blocks' products, likewise")
    parser.add_argument("--rows", type=Path, default=ROWS, help="JSON lines of the kernels' bench")
    parser.add_argument("--tables", action="store_true", help="the arithmetic instead of a step")
    options = parser.parse_args(arguments)
    if options.tables:
        print(arithmetic.table())
        return 0
    if options.card is None:
        parser.error("--card or --tables")
    overrides = [f"train.batch_size={options.batch}"]
    overrides += [f"data.0.resolution={options.pixels}"] if options.pixels else []
    for key in ("storage", "compute"):
        if getattr(options, key):
            overrides.append(f"model.{key}={getattr(options, key)}")
    try:
        print(report(options.setting, options.card, overrides, rows.read(options.rows)))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
