"""Three ways to multiply dY·W in 8 bits when W is stored as [N, K], compared by their code.

    python -m bench.dx_layouts [--arch 89]

The contraction runs along N, across W's rows; the tensor cores of sm_80 to sm_120 want four bytes
along the contraction in a register, and ldmatrix transposes only 16-bit pairs. Compiled offline,
per step of the inner loop of a 128x128x64 tile (8 warps, 3 stages), without update:

    as kept      W's tile is read byte by byte and permuted (gemm_8bit_dx)
    swapped      dXᵀ = Wᵀ·dYᵀ: the operands change roles, in a kernel of this file
    transposed   W as [K, N], written so when NF4 is dequantized, else by a pass of 2 bytes a weight

Fewer instructions per tensor-core instruction is better; nothing is timed here.
"""

import sys

import triton
import triton.language as tl
from fluxfast_kernels.dispatch import dispatch

from bench import terminal
from bench.compile_cases import TYPES_8BIT, gemm_8bit_case
from bench.offline import compile_for, hot_loop, resources

TILE = dispatch.Tile(128, 128, 64, 8, 8, 3)


@triton.jit
def _swapped_kernel(
    dy,
    w,
    s,
    dx,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM: tl.constexpr,
):
    """dx[m, k] = s[m]·Σ dy[m, n]·w[n, k], formed as the transpose. BLOCK_K runs along n."""
    m = tl.minimum(tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    for i in range(0, tl.cdiv(N, BLOCK_K)):
        n = i * BLOCK_K + tl.arange(0, BLOCK_K)
        left = tl.trans(tl.load(w + n[:, None] * K + k[None, :]))
        right = tl.trans(tl.load(dy + m[:, None] * N + n[None, :]))
        total = tl.dot(left, right, total, out_dtype=SUM)
    y = tl.trans(total).to(tl.float32) * tl.load(s + m)[:, None]
    tl.store(dx + m[:, None] * K + k[None, :], y.to(dx.dtype.element_ty))


def compiled(way: str, kind: str, arch: int):
    """Compiles one of the three for one card."""
    if way == "swapped":
        pointer = f"*{TYPES_8BIT[kind]}"
        types = {"dy": pointer, "w": pointer, "s": "*fp32", "dx": "*bf16"}
        types |= dict.fromkeys(("M", "N", "K"), "i32")
        constants = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n, "BLOCK_K": TILE.block_k}
        constants["SUM"] = tl.int32 if kind == "int8" else tl.float32
        return compile_for(_swapped_kernel, types, constants, arch, TILE.num_warps, TILE.num_stages)
    layout = ("dense", TILE, False, way == "transposed")
    case = gemm_8bit_case("gemm_8bit_dx", kind, *layout, with_update=False)
    return compile_for(case.fn, case.signature, case.constants, arch, **TILE.options)


def rows(arch: int) -> list[list]:
    """Returns [kind, way, registers, MMA, PRMT, LDS, LDSM, all, all per MMA] each, of the inner
    loop."""
    table = []
    for kind in ("int8", "fp8") if arch >= 89 else ("int8",):
        for way in ("as kept", "swapped", "transposed"):
            kernel = compiled(way, kind, arch)
            cost = resources(kernel)
            assert not cost["stack"], (kind, way, cost["stack"])
            loop = hot_loop(kernel)
            mma = sum(n for opcode, n in loop.items() if opcode.endswith("MMA"))
            counts = [loop.get(opcode, 0) for opcode in ("PRMT", "LDS", "LDSM")]
            every = sum(loop.values())
            table.append([kind, way, cost["registers"], mma, *counts, every, every / max(mma, 1)])
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = terminal.parser(__doc__)
    parser.add_argument("--arch", type=int, choices=(80, 86, 89, 90, 120), default=89)
    arch = parser.parse_args(arguments).arch
    print(f"sm_{arch}, Triton {triton.__version__}: inner loop of a 128x128x64 tile")
    lines = [["codes", "W", "regs", "MMA", "PRMT", "LDS", "LDSM", "all", "a MMA"]]
    lines += [[*map(str, row), f"{ratio:.1f}"] for *row, ratio in rows(arch)]
    print(terminal.aligned(lines, left=(0, 1)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
