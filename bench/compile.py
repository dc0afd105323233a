"""Compiles every kernel in every shipped configuration for cards that need not be here.

    python -m bench.compile [--arch 89 90] [--only NAME]

Prints registers, stack, shared memory and tensor-core instructions per kernel, and exits with 1 if
one spills (a stack above zero, or LDL/STL instructions), needs more shared memory than the card
has, or multiplies matrices without tensor cores. No GPU and no driver are needed.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from bench import terminal

ARCHITECTURES = (80, 86, 89, 90, 120)
TENSOR_CORE = ("HMMA", "IMMA", "QMMA", "WGMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "OMMA")


def verdict(case, cost: dict, arch: int) -> str | None:
    """Returns the fault of a compiled kernel, or None."""
    from bench.offline import SHARED_LIMIT

    local = sum(count for opcode, count in cost["sass"].items() if opcode in ("LDL", "STL"))
    if cost["stack"] or local:
        return f"spills: stack {cost['stack']} bytes, {local} LDL/STL"
    if cost["shared"] > SHARED_LIMIT[arch]:
        return f"needs {cost['shared']} bytes of shared memory, the card has {SHARED_LIMIT[arch]}"
    if case.matrix and not tensor_core(cost):
        return "multiplies matrices without tensor cores"
    return None


def tensor_core(cost: dict) -> dict[str, int]:
    return {o: n for o, n in cost["sass"].items() if any(o.startswith(t) for t in TENSOR_CORE)}


def cost_of(case, arch: int) -> tuple[dict, str | None]:
    """Returns the resources of a case on a card (empty where it does not compile), and its fault or
    None."""
    from bench.offline import compile_for, resources

    settings = {name: getattr(case, name) for name in ("num_warps", "num_stages", "maxnreg")}
    try:
        cost = resources(compile_for(case.fn, case.signature, case.constants, arch, **settings))
    except Exception as error:  # one kernel's failure is a row too
        return {}, f"failed: {(str(error).strip() or repr(error)).splitlines()[0]}"
    return cost, verdict(case, cost, arch)


def compile_one(index: int, arch: int) -> tuple[str, str | None]:
    """Returns the row of case `index` on one card, and its fault or None."""
    case = _CASES[index]
    cost, wrong = cost_of(case, arch)
    if not cost:
        return f"{case.name:60} sm_{arch}", wrong
    used = " ".join(f"{opcode} {n}" for opcode, n in sorted(tensor_core(cost).items())) or "-"
    figures = f"{cost['registers']:4} {cost['stack']:5} {cost['shared']:7}"
    return f"{case.name:60} sm_{arch:<3} {figures}  {used}", wrong


_CASES: list = []  # filled before the workers are forked: a kernel cannot be sent to a process


def main(arguments: list[str] | None = None) -> int:
    parser = terminal.parser(__doc__)
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # a process that interprets cannot compile
    from bench.compile_cases import cases

    _CASES[:] = [case for case in cases() if options.only in case.name]
    work = [
        (index, arch)
        for index, case in enumerate(_CASES)
        for arch in options.arch
        if arch >= case.least_arch and (case.archs is None or arch in case.archs)
    ]

    wrong = 0
    print(f"{'kernel':60} arch  regs stack  shared  tensor-core instructions")
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        for row, fault in pool.map(compile_one, *zip(*work, strict=True), chunksize=4):
            wrong += fault is not None
            print(f"{row}  WRONG: {fault}" if fault else row, flush=True)
    print(f"{len(work)} compiled, {wrong} wrong")
    return 1 if wrong or not work else 0


if __name__ == "__main__":
    sys.exit(main())
