"""Two ways to multiply dY·W in 8 bits when W is stored as [N, K], compared by their code.

    python -m bench.dx_layouts [--arch 89]

The contraction runs along N, across W's rows; the tensor cores of sm_80 to sm_120 want four bytes
along the contraction in a register, and ldmatrix transposes only 16-bit pairs. Compiled offline,
per step of the inner loop of a 128x128x64 tile (8 warps, 3 stages), without update:

    as kept      W's tile is read byte by byte and permuted (gemm_8bit_dx)
    transposed   W as [K, N], written so when NF4 is dequantized, else by a pass of 2 bytes a weight

Fewer instructions per tensor-core instruction is better; nothing is timed here.
"""

import sys

import torch
import triton
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.gemm.eight_bit import gemm_8bit_dx
from fluxfast_kernels.quant.frozen import QuantizedWeight
from fluxfast_kernels.quant.rows import DTYPE, QuantizedRows

from bench import terminal
from bench.twin import sass
from bench.twin.driver import card
from bench.twin.grid import ARCHITECTURES

TILE = dispatch.Tile(128, 128, 64, 8, 8, 3)
M, N, K = 4608, 12288, 3072


def _compiled(kind: str, transposed: bool, arch: int):
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dtype = DTYPE[kind]
    rows = QuantizedRows(empty(1, M, N, dtype=dtype), empty(1, M))
    values = empty(*((K, N) if transposed else (N, K)), dtype=dtype)
    weight = QuantizedWeight(values, empty(N), transposed=transposed)
    with card(arch) as launches:
        gemm_8bit_dx([rows], weight, None, None, [K], torch.bfloat16, tile=TILE)
    return launches[-1].kernel.compile()


def rows(arch: int) -> list[list[str]]:
    """Returns a table's row per kind and way: registers, and instructions of the inner loop."""
    table = []
    for kind in ("int8", "fp8") if arch >= 89 else ("int8",):
        for way in ("as kept", "transposed"):
            kernel = _compiled(kind, way == "transposed", arch)
            cost, loop = sass.read(kernel, arch), sass.hot_loop(kernel)["opcodes"]
            assert not cost["stack"], (kind, way, cost["stack"])
            mma = sum(n for opcode, n in loop.items() if opcode.endswith("MMA"))
            counts = [loop.get(opcode, 0) for opcode in ("PRMT", "LDS", "LDSM")]
            total = sum(loop.values())
            numbers = [cost["registers"], mma, *counts, total]
            table.append([kind, way, *map(str, numbers), f"{total / max(mma, 1):.1f}"])
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = terminal.parser(__doc__)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=89)
    arch = parser.parse_args(arguments).arch
    print(f"sm_{arch}, Triton {triton.__version__}: inner loop of a 128x128x64 tile")
    head = ["kind", "W", "regs", "MMA", "PRMT", "LDS", "LDSM", "all", "a MMA"]
    print(terminal.aligned([head, *rows(arch)], left=(0, 1)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
