"""One LoRA step (forward, backward, optimizer): fluxfast beside diffusers + peft + bitsandbytes.

    python -m bench.step --device cpu    three full-width blocks on the CPU
    python -m bench.step --device cuda --pixels 512 1024 --batch 1 4
    … --setting stock       ai-toolkit's stock settings, its sizes one by one and mixed
    … --cap 12 16 24        what fits into so many GiB of the GPU

All candidates train the same LoRA (rank 16 on attention and MLP, fp32, fused AdamW) over the same
random base weights on the same inputs. The stock setting trains the modulation too, with
bitsandbytes' AdamW8bit, clipping and a moving average of the weights. Candidates that end in
`-trainer` are the step of `fluxfast train`: planned memory, modulation ahead, CUDA graphs.

Before anything is timed, a gate compares loss and LoRA gradients with the diffusers candidate of
the same storage, or with the first one that ran where that is missing. On CPU all candidates live
in one process and are interleaved round by round. On CUDA two full-size models do not fit beside
each other: each candidate has a process of its own, one after the other, so a crash or an exhausted
memory costs one row. A candidate whose library is missing is a "skipped" row: torch, triton and
numpy are enough to run the rest. The exit code is 1 where a gate failed, or on a CPU where
fluxfast's step takes more of a peer's than LIMITS allow.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from bench import terminal, timing
from bench.step.run import measure, measure_apart
from bench.step.settings import (
    BASELINE,
    CANDIDATES,
    CPU_SPEC,
    DEFAULTS,
    SETTINGS,
    STOCK_TARGETS,
    TINY_SPEC,
    Cycle,
    Settings,
    image_tokens,
)
from bench.step.table import over_limits, rows, table, verdicts
from bench.terminal import Sizes, say
from fluxfast.model.lora import PRESETS
from fluxfast.model.spec import DEV

SIZES = {
    "cpu": Sizes(CPU_SPEC, [256], [1], 128, rounds=9, warmup=3),
    "cuda": Sizes(DEV, [512, 768, 1024], [1, 4], 512, rounds=9, warmup=3),
    "tiny": Sizes(TINY_SPEC, [64], [1], 8, rounds=9, warmup=3),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = terminal.device_parser(__doc__, "step", CANDIDATES, "", SIZES)
    parser.add_argument(
        "--setting", choices=SETTINGS, default="plain", help="stock has a batch of 1 by default"
    )
    parser.add_argument(
        "--targets",
        choices=[preset for preset in PRESETS if preset != "attn"],
        help="LoRA modules (plain: attn+mlp; the stock setting has all)",
    )
    parser.add_argument(
        "--cap", nargs="+", type=float, metavar="GIB", help="GPU memory allowed, one run for each"
    )
    parser.add_argument(
        "--warmup", type=int, help="steps thrown away (3); the last measures memory"
    )
    parser.add_argument("--apart", action="store_true", help="a process per candidate on cpu too")
    options = terminal.parse(parser, "step", arguments)
    if options.setting == "stock" and options.targets not in (None, STOCK_TARGETS):
        parser.error(f"--targets: the stock setting has {STOCK_TARGETS}, got {options.targets}")
    if options.cap and options.device == "cpu":
        parser.error("--cap: limits a GPU's memory; hint: --device cuda")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    stock = options.setting == "stock"
    if stock and options.batch is None:
        options.batch = [1]
    shared = terminal.settings(options, SIZES)
    cycles = [Cycle((side,), batch) for batch in options.batch for side in options.pixels]
    if stock and len(options.pixels) > 1:
        cycles += [Cycle(tuple(options.pixels), batch) for batch in options.batch]
    return Settings(
        **shared,
        cycles=cycles,
        apart=options.apart or options.device == "cuda",
        setting=options.setting,
        targets=STOCK_TARGETS if stock else options.targets or "attn+mlp",
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = settings_of(options)
    chosen = options.candidates or DEFAULTS[options.device]
    names = [name for name in CANDIDATES if name in chosen]  # references come first
    conditions = timing.conditions(options.device)
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for cap in options.cap or [None]:
            capped = replace(settings, cap_gib=cap)
            measured = _run(capped, names, Path(folder), conditions, options.out)
            for cycle, results in measured.items():
                print(f"\n{conditions['device_name']}: {_title(capped, cycle)}")
                print(table(results))
                print("\n".join(verdicts(results)))
                refused = [r for r in results.values() if r.status == "gate failed"]
                failures += [f"wrong: {result.name}: {result.reason}" for result in refused]
                if settings.device == "cpu" and settings.setting == "plain" and not options.tiny:
                    failures += [f"too slow: {line}" for line in over_limits(results)]
    for line in failures:
        print(line)
    return int(bool(failures))


def _run(
    settings: Settings, names: list[str], references: Path, conditions: dict, out: Path | None
) -> dict[Cycle, dict]:
    """Measures every cycle and appends rows as they come. Returns results by name."""
    measured: dict[Cycle, dict] = {cycle: {} for cycle in settings.cycles}

    def report(cycle: Cycle, results: dict) -> None:
        measured[cycle] |= results
        timing.add_ratios(measured[cycle], BASELINE)
        for result in results.values():
            say(f"{cycle}: {result}")
        if out is not None:
            timing.append_rows(out, rows(settings, cycle, results, conditions))

    for group in [[name] for name in names] if settings.apart else [names]:
        run = measure_apart if settings.apart else measure
        run(settings, group, references, report)
    return measured


def _title(settings: Settings, cycle: Cycle) -> str:
    tokens = "/".join(str(image_tokens(side)) for side in cycle.pixels)
    cap = "" if settings.cap_gib is None else f", within {settings.cap_gib:g} GiB"
    return (
        f"{cycle} ({tokens} image + {settings.text_tokens} text tokens), {settings.setting} "
        f"setting, rank {settings.rank} on {settings.targets}{cap}, compute {settings.dtype}, "
        f"{settings.rounds} rounds"
    )
