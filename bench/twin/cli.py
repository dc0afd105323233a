"""Every kernel that a training step launches, compiled for a card that need not be here.

    python -m bench.twin --arch 89                       # a cover of all configurations, in pairs
    python -m bench.twin --arch 89 --short               # the default path, kernel by kernel
    python -m bench.twin --storage nf4 --compute bf16 --rank 64 --only gemm --loops
    python -m bench.twin --all                           # everything, resumable; saves the table

Triton runs over a fake driver: the project's own launchers specialize their kernels at FLUX.1-dev's
widths as on the card, and ptxas compiles them. Prints registers, stack, shared memory and blocks a
multiprocessor; exits with 1 where a kernel spills, needs more shared memory than the card has, or
does not compile. Nothing is executed or timed. Readings are saved in build/twin.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from bench import terminal
from bench.twin import sass
from bench.twin.cover import cover, cover_all
from bench.twin.driver import Kernel, Launch
from bench.twin.grid import ARCHITECTURES, default, pairwise
from bench.twin.launches import WHOLE, Case, step_launches
from bench.twin.readings import fault, readings_of
from fluxfast.model.lora import PRESETS

_NUMBERS = ("registers", "stack", "local", "shared", "warps", "stages", "ctas")
_CASE = ("storage", "compute", "rank", "targets", "size", "batch", "dropout")


def _options(arguments: list[str] | None):
    parser = terminal.parser(__doc__)
    usual = Case()
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES)
    parser.add_argument("--short", action="store_true", help="the default path alone")
    parser.add_argument("--all", action="store_true", help="every configuration of every card")
    parser.add_argument("--storage", help=f"default: {usual.storage}; also nf4-nested")
    parser.add_argument(
        "--compute", help=f"default: {usual.matmul}; also int8-rotated, fp8-rotated"
    )
    parser.add_argument("--rank", type=int, help=f"default: {usual.rank}")
    parser.add_argument("--targets", choices=PRESETS, help=f"default: {usual.targets}")
    parser.add_argument("--size", help=f"default: {usual.size}")
    parser.add_argument("--batch", type=int, help=f"default: {usual.batch}; above 1: with masks")
    parser.add_argument("--dropout", action="store_const", const=True, help="of the LoRA")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--loops", action="store_true", help="the hot loop of each, by pipe")
    parser.add_argument("--workers", type=int, help="processes that compile; default: all cores")
    parser.add_argument("--budget-s", type=float, help="no kernel is begun after so many seconds")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # a process that interprets cannot compile
    asked = {name: getattr(options, name) for name in _CASE if getattr(options, name) is not None}
    archs = options.arch or (ARCHITECTURES if options.all else [89])
    if options.all:
        return cover_all(archs, options.workers, options.budget_s)
    wrong = 0
    for arch in archs:
        if asked:
            asked["matmul"] = asked.pop("compute", Case.matmul)
            wrong += _listed([replace(Case(arch), **asked)], options)
        elif options.short:
            wrong += _listed(default(arch), options)
        else:
            wrong += cover(arch, pairwise(arch), options.workers, options.budget_s)
    return 1 if wrong else 0


def _listed(cases: list[Case], options) -> int:
    """Prints every kernel of these configurations of one card. Returns how many are wrong."""
    launches = [launch for case in cases for launch in step_launches(case)]
    first: dict[str, tuple[Launch, Kernel]] = {}
    for launch in launches:
        if launch.kernel and options.only in launch.name:
            first.setdefault(launch.kernel.key, (launch, launch.kernel))
    kernels = [kernel for _, kernel in first.values()]
    readings = readings_of(kernels, options.workers)
    rows, wrong = [["kernel", "key", "grid", *_NUMBERS]], []
    for key, (launch, kernel) in first.items():
        numbers = [str(readings[key].get(name, "-")) for name in _NUMBERS]
        rows.append([kernel.name, key[:8], "x".join(map(str, launch.grid)), *numbers])
        if problem := fault(readings[key], kernel):
            wrong.append(problem)
    print(terminal.aligned(rows, left=(0, 1)))
    if options.loops:
        print(terminal.aligned(_loops(kernels), left=(0, 1, 6)))
    print("\n".join([*wrong, _count(cases[0])]))
    worst = (
        f"{name} {max((r.get(name, 0) for r in readings.values()), default=0)}"
        for name in ("registers", "stack", "shared")
    )
    print(
        f"sm_{cases[0].arch}: {len(readings)} kernels, at most {', '.join(worst)}; "
        f"{len(wrong)} wrong"
    )
    return len(wrong)


def _loops(kernels: Iterable[Kernel]) -> list[list[str]]:
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
