"""Arguments, tables and progress of the bench's commands."""

import argparse
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import RESULTS
from fluxfast.model.spec import FluxSpec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Sizes(NamedTuple):
    """What a bench measures by default."""

    spec: FluxSpec
    pixels: list[int]
    batch: list[int]
    text_tokens: int
    rounds: int
    warmup: int


def say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Returns columns two spaces apart, those whose index is in `left` flush left, others right."""
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


def device_parser(
    doc: str, bench: str, candidates: Iterable[str], usual: str, sizes: dict[str, Sizes]
) -> argparse.ArgumentParser:
    """Returns the parser of a bench that compares `candidates` on a device. usual: the ones that
    run by default; sizes: by "cpu", "cuda" or "tiny"."""

    def default(key: str) -> str:
        values = ((device, getattr(sizes[device], key)) for device in ("cpu", "cuda"))
        return "; ".join(f"{device}: {str(value).strip('[]')}" for device, value in values)

    args = parser(doc)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.add_argument("--device", choices=["cpu", "cuda"], default=device)
    args.add_argument(
        "--candidates",
        nargs="+",
        choices=candidates,
        metavar="NAME",
        help=f"of {', '.join(candidates)}{usual}",
    )
    args.add_argument("--pixels", nargs="+", type=int, help=f"image sides ({default('pixels')})")
    args.add_argument("--batch", nargs="+", type=int, help=f"batch sizes ({default('batch')})")
    args.add_argument("--text-tokens", type=int, help=f"T5 tokens ({default('text_tokens')})")
    args.add_argument("--rank", type=int, default=16)
    args.add_argument("--rounds", type=int, help=default("rounds"))
    args.add_argument(
        "--compute",
        choices=DTYPES,
        help="default: bf16 on cuda and on a CPU that multiplies it, else fp32",
    )
    args.add_argument("--tiny", action="store_true", help="narrow layers: checks the bench itself")
    args.add_argument(
        "--save", action="store_true", help=f"append to bench/results/{bench}-DEVICE.jsonl"
    )
    args.add_argument("--out", type=Path, help="append to this file instead")
    return args


def parse(
    args: argparse.ArgumentParser, bench: str, arguments: list[str] | None
) -> argparse.Namespace:
    """Returns the options of a `device_parser`, with `compute` as a dtype and `out` as --save has
    it."""
    from fluxfast.model.precision import multiplies_bf16  # with it come the kernels

    options = args.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        args.error("--device cuda: torch sees no CUDA device here; hint: --device cpu")
    if bad := [p for p in options.pixels or [] if p < 16 or p % 16]:
        args.error(f"--pixels: multiples of 16 only, got {bad}")
    usual = "bf16" if multiplies_bf16(torch.device(options.device)) else "fp32"
    options.compute = DTYPES[options.compute or usual]
    if options.save and options.out is None:
        options.out = RESULTS / f"{bench}-{options.device}.jsonl"
    return options


def settings(options: argparse.Namespace, sizes: dict[str, Sizes]) -> dict[str, object]:
    """Sets the sizes that were not given. Returns the settings that all such benches have."""
    for key, value in sizes["tiny" if options.tiny else options.device]._asdict().items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    keys = ("spec", "device", "compute", "text_tokens", "rank", "rounds", "warmup")
    return {key: getattr(options, key) for key in keys}
