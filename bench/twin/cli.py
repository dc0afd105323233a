"""Every kernel that a training step launches, compiled for a card that need not be here.

    python -m bench.twin --arch 89                                  # the default path
    python -m bench.twin --arch 89 --storage nf4 --compute bf16 --rank 64 --only gemm --loops

Triton runs over a fake driver: the project's own launchers specialize their kernels at FLUX.1-dev's
widths as on the card, and ptxas compiles them. Prints registers, stack, shared memory and blocks a
multiprocessor of each kernel; exits with 1 where one spills, needs more shared memory than the card
has, or does not compile. Nothing is executed or timed. Readings are saved in build/twin.
"""

import os
from collections import Counter
from dataclasses import replace

from bench import terminal
from bench.twin import sass
from bench.twin.driver import Kernel, Launch
from bench.twin.launches import WHOLE, Case, step_launches
from bench.twin.readings import fault, readings_of
from fluxfast.model.lora import PRESETS

ARCHITECTURES = (80, 86, 89, 90, 120)
_NUMBERS = ("registers", "stack", "local", "shared", "warps", "stages", "ctas")


def _options(arguments: list[str] | None):
    parser = terminal.parser(__doc__)
    usual = Case()
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=[89])
    parser.add_argument("--storage", default=usual.storage, help="also nf4-nested")
    parser.add_argument("--compute", default=usual.matmul, help="also int8-rotated, fp8-rotated")
    parser.add_argument("--rank", type=int, default=usual.rank)
    parser.add_argument("--targets", choices=PRESETS, default=usual.targets)
    parser.add_argument("--size", nargs="+", default=["1024x1024", "512x512"])
    parser.add_argument("--batch", type=int, default=usual.batch, help="above 1: with masks")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--loops", action="store_true", help="the hot loop of each, by pipe")
    parser.add_argument("--workers", type=int)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # a process that interprets cannot compile
    wrong = 0
    for arch in options.arch:
        case = Case(arch, options.storage, options.compute, options.rank, options.targets)
        cases = [replace(case, size=size, batch=options.batch) for size in options.size]
        wrong += _listed(cases, options)
    return 1 if wrong else 0


def _listed(cases: list[Case], options) -> int:
    """Prints every kernel of these configurations of one card. Returns how many are wrong."""
    launches = [launch for case in cases for launch in step_launches(case)]
    first: dict[str, tuple[Launch, Kernel]] = {}
    for launch in launches:
        if launch.kernel and options.only in launch.name:
            first.setdefault(launch.kernel.key, (launch, launch.kernel))
    readings = readings_of((kernel for _, kernel in first.values()), options.workers)
    rows, wrong = [["kernel", "key", "grid", *_NUMBERS]], []
    for key, (launch, kernel) in first.items():
        numbers = [str(readings[key].get(name, "-")) for name in _NUMBERS]
        rows.append([kernel.name, key[:8], "x".join(map(str, launch.grid)), *numbers])
        if problem := fault(readings[key], cases[0].arch):
            wrong.append(f"WRONG: {kernel.name} {key[:8]} {problem}\n  {kernel.constants()}")
    print(terminal.aligned(rows, left=(0, 1)))
    if options.loops:
        print(terminal.aligned(_loops([kernel for _, kernel in first.values()]), left=(0, 1, 6)))
    print("\n".join([*wrong, *map(_count, cases)]))
    worst = ", ".join(
        f"{name} {_worst(readings, name)}" for name in ("registers", "stack", "shared")
    )
    print(f"sm_{cases[0].arch}: {len(readings)} kernels, at most {worst}; {len(wrong)} wrong")
    return len(wrong)


def _worst(readings: dict[str, dict], name: str) -> int:
    return max((reading.get(name, 0) for reading in readings.values()), default=0)


def _loops(kernels: list[Kernel]) -> list[list[str]]:
    """Returns a table of the kernels' hot loops, those with tensor cores."""
    rows = [["hot loop", "key", "tensor", "issue", "shared", "bound", "instructions"]]
    for kernel in kernels:
        loop = sass.hot_loop(kernel.compile())
        if any(opcode in sass.TENSOR for opcode in loop.get("opcodes", ())):
            pipes = [loop["tensor"], loop["issue"], loop["shared"]]
            bound = f"{loop['tensor'] / max(pipes):.0%}"
            most = Counter(loop["opcodes"]).most_common(8)
            mix = " ".join(f"{opcode} {count}" for opcode, count in most)
            rows.append([kernel.name, kernel.key[:8], *map(str, pipes), bound, mix])
    return rows


def _count(case: Case) -> str:
    """Returns how many kernels a step over the whole model launches."""
    launches = step_launches(case, *WHOLE)
    triton = sum(launch.kernel is not None for launch in launches)
    return f"{case}: {triton} launches of Triton's a step, {len(launches) - triton} of aten's"
