"""A training step on a card that need not be here: FLOP, bytes, bound and time of every op.

    python -m bench.roofline --card 4090                    the defaults
    python -m bench.roofline --card 4090 --setting stock    ai-toolkit's file
    python -m bench.roofline --tables      the arithmetic, batch 1, no update

The step is that of the memory plan which `fluxfast plan` prints, and so is its predicted time, but
for ops that `bench/results/kernels-cuda.jsonl` has rows of (`bench/step/ops.py` says how they
count). Where `bench/calibrate.py` has measured whole steps of the card, the projection is theirs.
A projection is no measurement. Only the stock setting at 512, 768 and 1024 px is set beside
ai-toolkit's figures, which are of that.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from bench import RESULTS, rows, terminal
from bench.report import arithmetic
from bench.report.plan_table import configuration
from bench.step.ops import Line, lines_of
from fluxfast.config.schema import Config
from fluxfast.errors import ConfigError
from fluxfast.memory.planner.cards import card
from fluxfast.memory.planner.plan import Plan
from fluxfast.memory.planner.report import summary
from fluxfast.tools.plan import plan_rows

ROWS = RESULTS / "kernels-cuda.jsonl"
# it/s that are reported of ai-toolkit with its stock file, by card and batch
HEADLINE = {("4090", 1): 0.4375, ("L40S", 1): 0.838, ("A100", 4): 0.3478, ("H100", 4): 0.4537}
MIX = [512, 768, 1024]


class Projection(NamedTuple):
    """seconds: of a step, the mean over picture sizes. basis: what it rests on, in words."""

    seconds: float
    basis: str


def project(plan: Plan, lines: dict[str, list[Line]]) -> Projection:
    """lines: by bucket."""
    if factor := plan.card.factors.get(plan.request.step.matmul):
        total = sum(plan.seconds(label) for label in lines)
        basis = f"{factor.value:g} of what shipped shares predict ({factor.source})"
        return Projection(total / len(lines), basis)
    every = [line for found in lines.values() for line in found]
    total = sum(line.seconds for line in every)
    measured = sum(line.seconds for line in every if line.source == "measured")
    basis = f"{measured / total:.0%} of it from measured ops, the rest from assumed shares"
    return Projection(total / len(lines), basis)


def table(lines: list[Line]) -> str:
    """Aligned columns, and their sums."""
    keys = ("launches", "flop", "bytes", "peak_s", "seconds")
    sums = {key: sum(getattr(line, key) for line in lines) for key in keys}
    rows = [["op", "pass", "part", "launches", "GFLOP", "GB", "bound", "peak ms", "ms", "from"]]
    for line in [*lines, Line("step", "", "", bound="", source="", **sums)]:
        figures = f"{line.launches:.0f}", f"{line.flop / 1e9:.1f}", f"{line.bytes / 1e9:.2f}"
        times = f"{1e3 * line.peak_s:.2f}", f"{1e3 * line.seconds:.2f}"
        names = line.group, line.direction, line.part
        rows.append([*names, *figures, line.bound, *times, line.source])
    return terminal.aligned(rows, left=(0, 1, 2, 6, 9))


def title(setting: str, config: Config, plan: Plan) -> str:
    work, train = plan.request.step, config.train
    ema = ", EMA" if train.ema.enabled else ""
    return (
        f"{plan.card.name}, the {setting} setting: LoRA of rank {config.lora.rank} on "
        f"{config.lora.targets}, {train.optimizer}{ema}; {work.storage} base, {work.matmul} "
        f"products, batch {train.batch_size}; modulation "
        + {"in_place": "formed in every step"}.get(plan.modulation, "formed ahead")
    )


def beside(setting: str, pixels: list[int], plan: Plan, batch: int, found: Projection) -> list[str]:
    """The projection, and ai-toolkit's figures where they are of the same setting."""
    rate = 1 / found.seconds
    sizes = ", ".join(f"{side}" for side in pixels)
    over = f"at {sizes} px" if len(pixels) == 1 else f"the mean of {sizes} px"
    lines = [
        f"Projection, not measured: {rate:.2f} it/s ({found.seconds:.3f} s a step, {over}); "
        f"{found.basis}."
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
    """All that is printed of one card and setting. Raises ConfigError where nothing fits."""
    config = configuration(setting, overrides)
    row = plan_rows(config, None, gpu)[-1]  # of several sizes: all of them in one plan
    if row.plan is None:
        raise ConfigError(f"{row.card.name}: {row.reason}")
    plan, parts = row.plan, [title(setting, config, row.plan)]
    lines = {label: lines_of(plan, label, timed) for label in plan.buckets}
    for label, found in lines.items():
        policies = summary(plan.buckets[label].choice.policies)
        parts.append(f"{label}: {policies}\n{table(found)}")
    pixels, batch = sorted(config.data[0].resolution), config.train.batch_size
    parts.append("\n".join(beside(setting, pixels, plan, batch, project(plan, lines))))
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
