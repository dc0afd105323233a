"""Compiles a Triton kernel for a GPU that need not be here, and reads the resources it takes.

    kernel = compile_for(fn, {"x": "*bf16", "n": "i32"}, {"BLOCK": 1024}, arch=89, num_warps=8)
    print(resources(kernel))    # registers, stack bytes, shared bytes, counts of SASS instructions

No GPU and no driver are needed: Triton's wheel ships ptxas and cuobjdump. It must run without
TRITON_INTERPRET. The compiler does not refuse a kernel over the card's shared memory: compare
`shared` with SHARED_LIMIT. A spill shows as a stack above zero and as LDL or STL instructions.
Pointers and i32 scalars are declared divisible by 16, as at run time: else vector loads vanish.
"""

import collections
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_for(fn, signature, constants, arch, num_warps=4, num_stages=3, **options):
    """Compiles `fn` for compute capability `arch` (89 = RTX 4090, 90 = H100, 120 = RTX 5090).

    signature: a Triton type per run-time argument, or a (named, nested) tuple of types, None for
    what is None; constants: a value per constexpr.
    """
    types, known, aligned = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            types[name], known[(i,)] = "constexpr", constants[name]
            continue
        types[name] = _types(signature[name])
        for path, kind in _leaves(signature[name], (i,)):
            if kind is None:
                known[path] = None
            elif kind.startswith("*") or kind == "i32":
                aligned[path] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=types, attrs=aligned, constexprs=known)
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=num_warps, num_stages=num_stages, **options),
    )


def _types(kind):
    if isinstance(kind, tuple):
        items = map(_types, kind)
        return kind._make(items) if hasattr(kind, "_make") else tuple(items)
    return "constexpr" if kind is None else kind


def _leaves(kind, path):
    """Yields (path, type) of every argument that is no tuple."""
    if not isinstance(kind, tuple):
        yield path, kind
        return
    for i, item in enumerate(kind):
        yield from _leaves(item, (*path, i))


def _sass(kernel):
    """Returns what cuobjdump prints: resource usage, and the instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        pipe = {"capture_output": True, "text": True, "check": True}
        commands = ([_CUOBJDUMP, flag, file.name] for flag in ("-res-usage", "-sass"))
        return [subprocess.run(command, **pipe).stdout for command in commands]


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);", re.M)


def resources(kernel):
    """Returns registers, stack (bytes a thread spills or indexes), shared (bytes a block),
    instructions, sass {opcode: count}."""
    usage, sass = _sass(kernel)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    opcodes = collections.Counter(opcode for _, opcode, _ in _INSTRUCTION.findall(sass))
    return {
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "instructions": sum(opcodes.values()),
        "sass": dict(opcodes),
    }


def hot_loop(kernel, marks=("IMMA", "QMMA", "HMMA", "IGMMA", "QGMMA", "HGMMA")):
    """Returns {opcode: count} of the innermost loop that holds most of the instructions in
    `marks`."""
    lines = _INSTRUCTION.findall(_sass(kernel)[1])
    instructions = [(int(at, 16), opcode, rest) for at, opcode, rest in lines]
    best, best_key = collections.Counter(), (0, 0)
    for end, opcode, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if opcode != "BRA" or not target or int(target[1], 16) > end:
            continue
        start = int(target[1], 16)
        body = collections.Counter(o for at, o, _ in instructions if start <= at <= end)
        key = (sum(body[mark] for mark in marks), -sum(body.values()))
        if key > best_key:
            best, best_key = body, key
    return dict(best)
