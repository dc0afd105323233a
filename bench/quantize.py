"""NF4 on a CPU beside bitsandbytes: quantize a bf16 matrix, and dequantize it to bf16.

    python -m bench.quantize [--save | --out FILE]

The same matrix (FLUX.1's linear1, 21504 x 3072, N(0, 1/K)) goes to both, in one process on the same
threads; bytes and dequantized values are compared before anything is timed, and rounds are
interleaved. fluxfast dequantizes into memory that it reuses, as a training step does; bitsandbytes
has no such way on a CPU (another row shows fluxfast without it). With AVX-512 the exit code is 1
where quantizing is less than LEAST["quantize"] times as fast, or dequantizing less than
LEAST["decode"].
"""

import argparse
import sys
from pathlib import Path

import fluxfast_kernels as fk
import torch
from fluxfast_kernels.quant import native

from bench import RESULTS, timing
from bench.terminal import aligned

SHAPE = (21504, 3072)
LEAST = {"quantize": 30.0, "decode": 2.5}
OURS, FRESH, THEIRS = "fluxfast", "fluxfast, fresh memory", "bitsandbytes"
ROWS = RESULTS / "quantize.jsonl"


def run(shape: tuple[int, int], rounds: int, warmup: int) -> list[dict[str, object]]:
    """Returns one row per "quantize" or "decode" (a row's `what`) and candidate."""
    import bitsandbytes.functional as bnb

    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * shape[1] ** -0.5).bfloat16()
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = fk.nf4_quantize(weight)
    out = torch.empty(shape, dtype=torch.bfloat16)
    work = {
        "quantize": {
            THEIRS: lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"),
            OURS: lambda: fk.nf4_quantize(weight),
        },
        "decode": {
            THEIRS: lambda: bnb.dequantize_4bit(packed, state),
            FRESH: lambda: fk.nf4_dequantize(ours, torch.bfloat16),
            OURS: lambda: fk.nf4_dequantize(ours, torch.bfloat16, out),
        },
    }

    def gate(task: str) -> str | None:
        if task == "quantize":
            same = torch.equal(ours.packed, packed) and torch.equal(ours.absmax, state.absmax)
            return None if same else "codes or scales differ"
        same = torch.equal(work[task][OURS](), bnb.dequantize_4bit(packed, state))
        return None if same else "decoded values differ"

    rows = []
    for task, candidates in work.items():
        results = timing.compare(
            candidates, rounds, warmup, lambda _, task=task: gate(task), baseline=THEIRS
        )
        for result in results.values():
            rate = None
            if result.median_ms:
                rate = round(shape[0] * shape[1] / result.median_ms / 1e6, 4)
            settings = {"bench": "quantize", "what": task, "shape": list(shape), "warmup": warmup}
            more = {"gweights_per_s": rate, "isa": native.isa(), "interleaved": True}
            rows.append(timing.row(result, **settings, **more, **timing.conditions("cpu")))
    return rows


def too_slow(rows: list[dict[str, object]], isa: str | None) -> list[str]:
    """Returns a line for each failed comparison and, with AVX-512, for each miss of LEAST."""
    missed = [f"{row['name']} {row['what']}: {row['reason']}" for row in rows if row["reason"]]
    for row in rows:
        if row["name"] == OURS and row["ratio"] and isa == "avx512":
            times, least = 1 / row["ratio"], LEAST[row["what"]]
            if times < least:
                missed.append(f"{row['what']}: {times:.1f}x, not {least:g}x")
    return missed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=SHAPE[0])
    parser.add_argument("--columns", type=int, default=SHAPE[1])
    parser.add_argument("--save", action="store_true", help=f"append to {ROWS.name}")
    parser.add_argument("--out", type=Path, help="append to this file instead")
    options = parser.parse_args(arguments)
    rows = run((options.rows, options.columns), options.rounds, warmup=2)
    lines = [["", "", "median ms", "G weights/s", "times"]]
    for row in rows:
        if row["median_ms"] is None:
            print(f"{row['what']} {row['name']}: {row['status']}: {row['reason']}")
            continue
        times = f"{1 / row['ratio']:.1f}" if row["ratio"] else "-"
        figures = f"{row['median_ms']:.1f}", f"{row['gweights_per_s']:.3f}", times
        lines.append([row["what"], row["name"], *figures])
    print(aligned(lines, left=(0, 1)))
    print(f"{rows[0]['cpu_model']}, {rows[0]['threads']} threads, {native.isa()}")
    missed = too_slow(rows, native.isa())
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    if out := options.out or (ROWS if options.save else None):
        timing.append_rows(out, rows)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
