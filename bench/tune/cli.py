"""Finds the tiles and thresholds that the kernels load: compiled offline, timed on a GPU, written.

    python -m bench.tune candidates --arch 89
    python -m bench.tune sweep --pixels 512 1024 --budget-s 480
    python -m bench.tune write --dry-run

candidates needs no GPU: it compiles every tile of the search space for a card and lists in
bench/tiles/ which of them neither spill nor need more than the card has. sweep times those, and the
ways that dispatch can choose between, on the GPU at hand: rows in bench/results/tune-cuda.jsonl.
write turns rows into configs/gemm_sm_<arch>.json and attention.json, where the gain is larger than
the noise. candidates and sweep can be cut short and go on. Kernels only read what is written.
"""

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path

import torch
from fluxfast_kernels.dispatch import dispatch

from bench import RESULTS, terminal, timing
from bench.compile import ARCHITECTURES
from bench.rows import read
from bench.terminal import aligned, say
from bench.tune import tiles as tune_tiles
from bench.tune import write as tune_write
from bench.tune.problems import hand_overs, problems
from bench.tune.space import ATTENTION, KERNELS, Kernel
from bench.tune.sweep import Job, Precompiler, Target, TileJob, sweep
from bench.tune.ways import BackendJob, HandOverJob
from fluxfast.errors import FluxfastError
from fluxfast.memory.planner.cards import Card, card, closest
from fluxfast.memory.planner.cost import shape_of
from fluxfast.model.spec import DEV

ROWS = RESULTS / "tune-cuda.jsonl"
MOST_WORKERS = 8  # each holds a CUDA context and a small copy of the problem


def wanted(words: list[str]) -> list[Kernel]:
    """Kernels whose name ("gemm_8bit.dense.int8") begins with one of the words; all without any."""
    return [k for k in KERNELS if not words or any(str(k).startswith(word) for word in words)]


def candidates(options: argparse.Namespace) -> int:
    kernels = wanted(options.op)
    limits = options.budget_s, options.workers
    found = tune_tiles.candidates(options.arch, kernels, options.out, *limits)
    lines = [["kernel", "may be timed", "of"]]
    for kernel in kernels:
        headings = list(found.get(str(kernel), {}).values())
        lines.append([str(kernel), f"{headings.count(tune_tiles.KEPT)}", f"{len(headings)}"])
    print(aligned(lines))
    return 0


def known_card(device: str) -> Card:
    """The cost model's card for a device: it only orders the jobs."""
    try:
        return card(torch.cuda.get_device_name(device))
    except FluxfastError:
        total = torch.cuda.get_device_properties(device).total_memory
        return closest(torch.cuda.get_device_capability(device), total / 2**30)


def jobs(options: argparse.Namespace, arch: int, known: Card, where: dict) -> list[Job]:
    """Everything that can be measured on a card, tiles before the ways that they make faster."""
    kernels = wanted(options.op)
    sizes = [(pixels, batch) for pixels in options.pixels for batch in options.batch]
    asked = [p for p in problems(DEV, known, arch, sizes, options.rank) if p.kernel in kernels]
    path = tune_tiles.path_of(arch)
    if not path.is_file():
        hint = f"python -m bench.tune candidates --arch {arch}"
        raise FluxfastError(f"{path.name} is not there: no tile is known to compile", hint=hint)
    verdicts = tune_tiles.load(path)
    target = Target(DEV, options.rank, "cuda", arch, options.rounds)
    found: list[Job] = [TileJob(p, tune_tiles.kept(verdicts, p.kernel), target) for p in asked]

    def measured() -> dict:
        rows = tune_write.of_one_device(read(options.out), arch, where["device_name"])
        return tune_write.merged(dispatch.tables(arch)[0], rows)

    found += [HandOverJob(h, target, measured) for h in hand_overs(asked) if h.kernel in kernels]
    if not options.op or any(kernel.op in ATTENTION for kernel in kernels):
        tokens = {shape_of(p, p, 1, DEV.text_length).tokens for p in options.pixels}
        found += [BackendJob(T, target) for T in sorted(tokens)]
    return found


def alive() -> bool:
    """Whether this process can still use the GPU: after an illegal access nothing works."""
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return False
    return True


def run_sweep(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise FluxfastError("sweep times kernels on an NVIDIA GPU, and there is none here")
    arch = dispatch.arch_of(torch.device("cuda", torch.cuda.current_device()))
    where = timing.conditions("cuda") | {"arch": arch}
    everything = jobs(options, arch, known_card("cuda"), where)
    compiled_by = tune_tiles.triton_of(tune_tiles.path_of(arch))
    if compiled_by != where["triton"]:
        versions = f"compiled by Triton {compiled_by}, this is {where['triton']}"
        say(f"the tiles were {versions}: some may spill here")
    workers = min(options.workers or os.cpu_count() or 1, MOST_WORKERS)
    where |= {"tiles_triton": compiled_by}
    limits = {"budget_s": options.budget_s, "alive": alive}
    if workers == 1:
        return int(not sweep(everything, options.out, where, **limits))
    with closing(Precompiler(workers, DEV, options.rank, "cuda")) as ahead:
        return int(not sweep(everything, options.out, where, precompile=ahead, **limits))


def write(options: argparse.Namespace) -> int:
    rows = read(options.rows)
    if not rows:
        raise FluxfastError(f"{options.rows} has no rows", hint="python -m bench.tune sweep")
    changed = tune_write.changes(rows, options.device)
    for path, text in changed.items():
        print(tune_write.difference(path, text))
        if not options.dry_run:
            path.write_text(text, encoding="utf-8")
    if not changed:
        print("nothing measured is faster than what is shipped by more than the noise")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = terminal.parser(__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("candidates", help="which tiles compile for a card")
    one.add_argument("--arch", type=int, choices=ARCHITECTURES, required=True)
    one.add_argument("--out", type=Path, help="default: bench/tiles/sm_<arch>.json")
    one.set_defaults(run=candidates)
    two = commands.add_parser("sweep", help="time them on this GPU")
    two.add_argument("--pixels", type=int, nargs="+", default=[512, 768, 1024])
    two.add_argument("--batch", type=int, nargs="+", default=[1])
    two.add_argument("--rank", type=int, default=16)
    two.add_argument("--rounds", type=int, default=20)
    two.add_argument("--out", type=Path, default=ROWS)
    two.set_defaults(run=run_sweep)
    for command in (one, two):
        command.add_argument("--op", nargs="+", default=[], help="kernels, as gemm_8bit.dense.int8")
        command.add_argument("--budget-s", type=float, help="begin nothing after so many seconds")
        command.add_argument("--workers", type=int, help="processes that compile")
    three = commands.add_parser("write", help="write what was measured into the kernels' rows")
    three.add_argument("--rows", type=Path, default=ROWS)
    three.add_argument("--device", help="whose rows, where several of one compute capability")
    three.add_argument("--dry-run", action="store_true", help="print, change nothing")
    three.set_defaults(run=write)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return options.run(options)
    except FluxfastError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
