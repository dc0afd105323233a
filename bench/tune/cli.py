"""Finds the tiles and thresholds that the kernels load: compiled offline, timed on a GPU, written.

    python -m bench.tune candidates --arch 89
    python -m bench.tune sweep --pixels 512 1024 --budget-s 480
    python -m bench.tune write --dry-run

candidates needs no GPU: it compiles every tile of the search space for a card and lists in
bench/tiles/ which of them neither spill nor need more than the card has. sweep times those, and the
ways that dispatch can choose between, on the GPU at hand: rows in bench/results/tune-cuda.jsonl.
write turns rows into configs/gemm_sm_<arch>.json and attention.json, where the gain is larger than
the noise. candidates and sweep can be stopped and resumed. Kernels only read what is written.
"""

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path

import torch
from fluxfast_kernels.dispatch import dispatch

from bench import RESULTS, terminal, timing
from bench.rows import Row, read
from bench.terminal import aligned, say
from bench.tune import tiles as tune_tiles
from bench.tune import write as tune_write
from bench.tune.problems import hand_overs, problems
from bench.tune.space import ATTENTION, KERNELS, Kernel
from bench.tune.sweep import Job, Precompiler, Target, TileJob, sweep
from bench.tune.ways import BackendJob, HandOverJob
from fluxfast.errors import FluxfastError
from fluxfast.memory.planner.cards import Card, closest
from fluxfast.memory.planner.step_spec import shape_of
from fluxfast.model.spec import DEV

ROWS = RESULTS / "tune-cuda.jsonl"
MOST_WORKERS = 8  # each holds a CUDA context and a small copy of the problem


def selected(prefixes: list[str]) -> list[Kernel]:
    """Kernels whose name ("gemm_8bit.dense.int8") has one of the prefixes; all without any."""
    return [k for k in KERNELS if not prefixes or str(k).startswith(tuple(prefixes))]


def candidates(options: argparse.Namespace) -> int:
    kernels, path = selected(options.op), options.out or tune_tiles.path_of(options.arch)
    limits = options.budget_s, options.workers
    verdicts = tune_tiles.candidates(options.arch, kernels, path, *limits)
    lines = [["kernel", "may be timed", "of"]]
    for kernel in map(str, kernels):
        headings = list(verdicts.get(kernel, {}).values())
        lines.append([kernel, f"{headings.count(tune_tiles.KEPT)}", f"{len(headings)}"])
    print(aligned(lines))
    return 0


def jobs(
    options: argparse.Namespace,
    target: Target,
    card: Card,
    verdicts: tune_tiles.Verdicts,
    device_name: str,
) -> list[Job]:
    """Everything that can be measured on a card, tiles before the ways that they make faster. The
    cost model of the card only orders them."""
    kernels, arch = selected(options.op), target.arch
    sizes = [(pixels, batch) for pixels in options.pixels for batch in options.batch]
    asked = problems(DEV, card, arch, sizes, options.rank)
    asked = [problem for problem in asked if problem.kernel in kernels]
    every: list[Job] = [
        TileJob(problem, tune_tiles.kept(verdicts, problem.kernel), target) for problem in asked
    ]

    def measured() -> tune_write.Table:
        rows = tune_write.of_one_device(read(options.out), arch, device_name)
        return tune_write.merged(dispatch.tables(arch)[0], rows)

    every += [HandOverJob(h, target, measured) for h in hand_overs(asked) if h.kernel in kernels]
    if any(kernel.op in ATTENTION for kernel in kernels):
        tokens = {shape_of(p, p, 1, DEV.text_length).tokens for p in options.pixels}
        every += [BackendJob(T, target) for T in sorted(tokens)]
    return every


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
    path = tune_tiles.path_of(arch)
    compiled_by, verdicts = tune_tiles.load(path)
    if not compiled_by:
        hint = f"python -m bench.tune candidates --arch {arch}"
        raise FluxfastError(f"{path.name} is not there: no tile is known to compile", hint=hint)
    conditions: Row = timing.conditions("cuda") | {"arch": arch, "tiles_triton": compiled_by}
    if compiled_by != conditions["triton"]:
        versions = f"compiled by Triton {compiled_by}, this is {conditions['triton']}"
        say(f"the tiles were {versions}: some may spill here")
    properties = torch.cuda.get_device_properties("cuda")
    known = closest((properties.major, properties.minor), properties.total_memory / 2**30)
    workers = min(options.workers or os.cpu_count() or 1, MOST_WORKERS)
    with closing(Precompiler(workers, DEV, options.rank, "cuda")) as precompile:
        target = Target(DEV, options.rank, "cuda", arch, options.rounds, precompile, alive)
        every = jobs(options, target, known, verdicts, conditions["device_name"])
        return int(not sweep(every, options.out, conditions, options.budget_s))


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
    compiling = commands.add_parser("candidates", help="which tiles compile for a card")
    compiling.add_argument("--arch", type=int, choices=dispatch.ARCHITECTURES, required=True)
    compiling.add_argument("--out", type=Path, help="default: bench/tiles/sm_<arch>.json")
    compiling.set_defaults(run=candidates)
    sweeping = commands.add_parser("sweep", help="time them on this GPU")
    sweeping.add_argument("--pixels", type=int, nargs="+", default=[512, 768, 1024])
    sweeping.add_argument("--batch", type=int, nargs="+", default=[1])
    sweeping.add_argument("--rank", type=int, default=16)
    sweeping.add_argument("--rounds", type=int, default=20)
    sweeping.add_argument("--out", type=Path, default=ROWS)
    sweeping.set_defaults(run=run_sweep)
    for command in (compiling, sweeping):
        command.add_argument("--op", nargs="+", default=[], help="kernels, as gemm_8bit.dense.int8")
        command.add_argument("--budget-s", type=float, help="begin nothing after so many seconds")
        command.add_argument("--workers", type=int, help="processes that compile")
    writing = commands.add_parser("write", help="write what was measured into the kernels' rows")
    writing.add_argument("--rows", type=Path, default=ROWS)
    writing.add_argument("--device", help="whose rows, where several of one compute capability")
    writing.add_argument("--dry-run", action="store_true", help="print, change nothing")
    writing.set_defaults(run=write)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return options.run(options)
    except FluxfastError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
