"""What the commands share: their arguments, tables and progress."""

import argparse
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch

from bench import RESULTS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Columns two spaces apart; those whose index is in `left` begin, the others end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; rows that are short end in empty cells."""
    lines = ["| " + " | ".join(head).lstrip() + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join([*row, *[""] * (len(head) - len(row))]) + " |" for row in rows]
    return "\n".join(lines)


def parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def device_parser(doc: str, bench: str, candidates: Iterable[str], usual: str, sizes: dict):
    """The parser of a bench that compares `candidates` on a device. usual: which of them run by
    default; sizes: the defaults of pixels, batch, text_tokens and rounds, in words."""
    made = parser(doc)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", choices=["cpu", "cuda"], default=default)
    made.add_argument(
        "--candidates",
        nargs="+",
        choices=candidates,
        metavar="NAME",
        help=f"of {', '.join(candidates)}{usual}",
    )
    made.add_argument("--pixels", nargs="+", type=int, help=f"image sides ({sizes['pixels']})")
    made.add_argument("--batch", nargs="+", type=int, help=f"batch sizes ({sizes['batch']})")
    made.add_argument("--text-tokens", type=int, help=f"T5 tokens ({sizes['text_tokens']})")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--rounds", type=int, help=sizes["rounds"])
    made.add_argument(
        "--compute",
        choices=DTYPES,
        help="default: bf16 on cuda and on a CPU that multiplies it, else fp32",
    )
    made.add_argument("--tiny", action="store_true", help="narrow layers: checks the bench itself")
    made.add_argument(
        "--save", action="store_true", help=f"append to bench/results/{bench}-DEVICE.jsonl"
    )
    made.add_argument("--out", type=Path, help="append to this file instead")
    return made


def parse(made: argparse.ArgumentParser, bench: str, arguments: list[str] | None):
    """Options of a `device_parser`, with `compute` as a dtype and `out` as --save has it."""
    from fluxfast.model.precision import multiplies_bf16  # with it come the kernels

    options = made.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch sees no CUDA device here; hint: --device cpu")
    if bad := [p for p in options.pixels or [] if p < 16 or p % 16]:
        made.error(f"--pixels: multiples of 16 only, got {bad}")
    usual = "bf16" if multiplies_bf16(torch.device(options.device)) else "fp32"
    options.compute = DTYPES[options.compute or usual]
    if options.save and options.out is None:
        options.out = RESULTS / f"{bench}-{options.device}.jsonl"
    return options
