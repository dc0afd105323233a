"""What a compiled kernel takes of a card, read by cuobjdump of Triton's wheel."""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

from bench.twin.driver import SHARED_LIMIT

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "OMMA", "UTCHMMA")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);", re.M)
_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 120: 48}  # that a multiprocessor holds
_RESERVED = 1024  # bytes of shared memory that a block takes besides its own


class Instruction(NamedTuple):
    at: int
    opcode: str
    rest: str


def _cuobjdump(kernel, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [_CUOBJDUMP, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(kernel) -> list[Instruction]:
    """Returns a compiled kernel's machine code; takes half a second."""
    found = _LINE.findall(_cuobjdump(kernel, "-sass"))
    return [Instruction(int(at, 16), opcode, rest) for at, opcode, rest in found]


def read(kernel, arch: int) -> dict[str, int]:
    """Returns what a block of a compiled kernel takes: registers a thread, stack (bytes a thread
    spills or indexes), local (LDL and STL, a spill's loads and stores), shared (bytes), warps,
    stages, ctas, the blocks that a multiprocessor holds, and slow, 1 where it multiplies 16- or
    8-bit matrices without tensor cores."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump(kernel, "-res-usage"))
    assert usage is not None
    registers, stack = map(int, usage.groups())
    local = stack and sum(i.opcode in ("LDL", "STL") for i in instructions(kernel))
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    cost = {"registers": registers, "stack": stack, "local": local, "shared": shared}
    cost |= {"warps": warps, "stages": kernel.metadata.num_stages}
    multiplied = set(re.findall(r"tt\.dot .*: tensor<[\dx]*x(\w+)>", kernel.asm["ttir"])) - {"f32"}
    slow = int(bool(multiplied) and "mma" not in kernel.asm["ptx"])
    return cost | {"ctas": ctas(arch, registers, shared, warps), "slow": slow}


def ctas(arch: int, registers: int, shared: int, warps: int) -> int:
    """Returns how many blocks a multiprocessor holds: of 65536 registers, given to warps in 256s,
    its warps, and its shared memory. 0 where one has no room."""
    by_registers = 65536 // (-(-registers // 8) * 256 * warps)
    by_shared = (SHARED_LIMIT[arch] + _RESERVED) // (shared + _RESERVED)
    return min(by_registers, by_shared, _WARPS[arch] // warps)


def hot_loop(kernel) -> dict:
    """Returns what a pass of the hot loop takes, {} where there is no loop: the innermost one with
    the most tensor-core instructions, of these the shortest.

    opcodes {opcode: count}; tensor, issue, shared: cycles of a block's warps if that pipe worked
    alone (tensor cores and issue: of a quarter of the multiprocessor).
    """
    code, warps = instructions(kernel), kernel.metadata.num_warps
    loops = [(target, i.at) for i in code if (target := _backwards(i)) is not None]
    bodies = [
        [instruction for instruction in code if first <= instruction.at <= last]
        for first, last in loops
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
    ]
    if not bodies:
        return {}
    body = max(bodies, key=lambda body: (sum(i.opcode in TENSOR for i in body), -len(body)))
    per_quarter = max(1, warps // 4)
    return {
        "opcodes": dict(collections.Counter(i.opcode for i in body)),
        "tensor": sum(map(_tensor_cycles, body)) * per_quarter,
        "issue": len(body) * per_quarter,
        "shared": sum(map(_shared_cycles, body)) * warps,
    }


def _backwards(instruction: Instruction) -> int | None:
    """Returns where a branch jumps back to, None for everything else."""
    target = re.search(r"0x([0-9a-f]+)", instruction.rest)
    if instruction.opcode != "BRA" or not target or int(target[1], 16) > instruction.at:
        return None
    return int(target[1], 16)


def _tensor_cycles(instruction: Instruction) -> int:
    """Cycles between two such instructions of a quarter, at sm_89's rates (int8 16832 in 16, fp8
    16832 and bf16 16816 with fp32 sums in 32), a warp group's at sm_90's (4096 8-bit products a
    cycle, 2048 of bf16)."""
    _, opcode, rest = instruction
    if group := re.match(r"\.(\d+)x(\d+)x(\d+)", rest):
        m, n, k = map(int, group.groups())
        return m * n * k // (2048 if opcode == "HGMMA" else 4096)
    if opcode == "IMMA":
        return 16 if "16832" in rest else 8
    if opcode == "QMMA":
        return 32 if "16832" in rest else 16
    if opcode == "HMMA":
        return (16 if "16816" in rest else 8) * (2 if "F32" in rest else 1)
    return 0


def _shared_cycles(instruction: Instruction) -> int:
    """128-byte accesses of a warp to shared memory or L1, without conflicts."""
    _, opcode, rest = instruction
    if opcode == "LDSM":
        return 4 if ".4" in rest else 2 if ".2" in rest else 1
    if opcode in ("LDS", "STS", "LDGSTS", "LDG", "STG"):
        return 4 if ".128" in rest else 2 if ".64" in rest else 1
    return 4 if opcode == "STSM" else int(opcode in ("SHFL", "ATOMS", "MOVM"))
