"""One LoRA step (forward, backward, optimiser): fluxfast beside diffusers + peft + bitsandbytes.

    python -m bench.step --device cpu    three full-width blocks on the CPU
    python -m bench.step --device cuda --pixels 512 1024 --batch 1 4
    … --setting stock       ai-toolkit's stock settings, its sizes one by one and mixed
    … --cap 12 16 24        what fits into so many GiB of the GPU

Everyone trains the same LoRA (rank 16 on attention and MLP, fp32, fused AdamW) over the same
random base weights on the same inputs. The stock setting trains the modulation too, with
bitsandbytes' AdamW8bit, clipping and an average of the weights, for everyone. Candidates that end
in `-trainer` are the step of `fluxfast train`: planned memory, modulation ahead, CUDA graphs.

Before anything is timed, a gate compares loss and LoRA gradients with the diffusers candidate of
the same storage, or with the first one that ran where that is missing. On CPU all candidates live
in one process and are interleaved round by round. On CUDA two full-size models do not fit beside
each other: each candidate has a process of its own, one after the other, so a crash or an exhausted
memory costs one row. A candidate whose library is missing is a row that says so: torch, triton and
numpy are enough to run the rest. The exit code is 1 where a gate failed, or on a CPU where
fluxfast's step takes more of a peer's than LIMITS allow.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from bench import RESULTS, timing
from bench.step.candidates import BASELINE, CANDIDATES, DEFAULTS
from bench.step.run import measure, measure_apart, say
from bench.step.settings import (
    CPU_SPEC,
    SETTINGS,
    STOCK_TARGETS,
    TINY_SPEC,
    Cycle,
    Settings,
    image_tokens,
)
from bench.step.table import over_limits, refused, rows, verdicts
from fluxfast.model.lora import PRESETS
from fluxfast.model.spec import DEV


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        choices=CANDIDATES,
        metavar="NAME",
        help=f"of {', '.join(CANDIDATES)}",
    )
    parser.add_argument("--setting", choices=SETTINGS, default="plain")
    parser.add_argument(
        "--targets",
        choices=[preset for preset in PRESETS if preset != "attn"],
        help="LoRA modules (plain: attn+mlp; the stock setting has all)",
    )
    parser.add_argument(
        "--cap", nargs="+", type=float, metavar="GIB", help="GPU memory allowed, one run for each"
    )
    parser.add_argument(
        "--pixels", nargs="+", type=int, help="image sides (cpu: 256; cuda: 512 768 1024)"
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, help="batch sizes (cpu: 1; cuda: 1 4; stock: 1)"
    )
    parser.add_argument("--text-tokens", type=int, help="T5 tokens (cpu: 128; cuda: 512)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--compute",
        choices=["bf16", "fp32"],
        help="default: bf16 on cuda and on a CPU that multiplies it, else fp32",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--warmup", type=int, default=3, help="steps thrown away; the last measures memory"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="three narrow blocks: checks the bench itself"
    )
    parser.add_argument("--apart", action="store_true", help="a process per candidate on cpu too")
    parser.add_argument(
        "--save", action="store_true", help="append to bench/results/step-DEVICE.jsonl"
    )
    parser.add_argument("--out", type=Path, help="append to this file instead")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; hint: --device cpu")
    if bad := [p for p in options.pixels or [] if p < 16 or p % 16]:
        parser.error(f"--pixels: multiples of 16 only, got {bad}")
    if options.setting == "stock" and options.targets not in (None, STOCK_TARGETS):
        parser.error(f"--targets: the stock setting has {STOCK_TARGETS}, got {options.targets}")
    if options.cap and options.device == "cpu":
        parser.error("--cap: limits a GPU's memory; hint: --device cuda")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    cuda, stock = options.device == "cuda", options.setting == "stock"
    default = (DEV, [512, 768, 1024], [1] if stock else [1, 4], 512)
    if not cuda:
        default = (CPU_SPEC, [256], [1], 128)
    if options.tiny:
        default = (TINY_SPEC, [64], [1], 8)
    spec, pixels, batches, text = default
    pixels, batches = options.pixels or pixels, options.batch or batches
    cycles = [Cycle((side,), batch) for batch in batches for side in pixels]
    if stock and len(pixels) > 1:
        cycles += [Cycle(tuple(pixels), batch) for batch in batches]
    bf16 = cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    compute = options.compute or ("bf16" if bf16 else "fp32")
    return Settings(
        spec=spec,
        device=options.device,
        compute={"bf16": torch.bfloat16, "fp32": torch.float32}[compute],
        cycles=cycles,
        text_tokens=options.text_tokens or text,
        rank=options.rank,
        rounds=options.rounds,
        warmup=options.warmup,
        apart=cuda or options.apart,
        setting=options.setting,
        targets=STOCK_TARGETS if stock else options.targets or "attn+mlp",
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = settings_of(options)
    chosen = options.candidates or DEFAULTS[options.device]
    names = [name for name in CANDIDATES if name in chosen]  # references come first
    shared = timing.conditions(options.device)
    out = options.out
    if options.save and out is None:
        out = RESULTS / f"step-{options.device}.jsonl"
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for cap in options.cap or [None]:
            capped = replace(settings, cap_gib=cap)
            found = _run(capped, names, Path(folder), shared, out)
            for cycle, (results, details) in found.items():
                print(f"\n{shared['device_name']}: {_title(capped, cycle)}")
                print(timing.table(results, details))
                print("\n".join(verdicts(results)))
                wrong += [f"wrong: {line}" for line in refused(results)]
                if settings.device == "cpu" and settings.setting == "plain" and not options.tiny:
                    wrong += [f"too slow: {line}" for line in over_limits(results)]
    for line in wrong:
        print(line)
    return int(bool(wrong))


def _run(
    settings: Settings, names: list[str], references: Path, shared: dict, out: Path | None
) -> dict[Cycle, tuple[dict, dict]]:
    """-> cycle -> results and details by name."""
    found: dict[Cycle, tuple[dict, dict]] = {cycle: ({}, {}) for cycle in settings.cycles}

    def report(cycle: Cycle, results: dict, details: dict) -> None:
        every, seen = found[cycle]
        every |= results
        seen |= details
        timing.add_ratios(every, BASELINE)
        for name, result in results.items():
            said = result.reason or f"{result.median_ms:.1f} ms"
            say(f"{name}: {cycle}: {result.status}: {said}")
        if out is not None:
            timing.append_rows(out, rows(settings, cycle, results, details, shared))

    for group in [[name] for name in names] if settings.apart else [names]:
        run = measure_apart if settings.apart else measure
        run(settings, group, references, report)
    return found


def _title(settings: Settings, cycle: Cycle) -> str:
    tokens = "/".join(str(image_tokens(side)) for side in cycle.pixels)
    cap = "" if settings.cap_gib is None else f", within {settings.cap_gib:g} GiB"
    return (
        f"{cycle} ({tokens} image + {settings.text_tokens} text tokens), {settings.setting} "
        f"setting, rank {settings.rank} on {settings.targets}{cap}, compute {settings.dtype}, "
        f"{settings.rounds} rounds"
    )


if __name__ == "__main__":
    raise SystemExit(main())
