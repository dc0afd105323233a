"""The tiles that each kernel could be given, before a compiler or a GPU has seen them.

A `Kernel` is what dispatch's rows choose a tile for; a tile's name is rows x columns x depth, warps
and stages: "128x128x64.8w3", with "r128" behind where it names maxnreg and "g8" where it names
group_m. What cannot work is left out at once: accumulators that do not fit a thread's registers,
operands in flight that do not fit the card's shared memory.
"""

import re
from itertools import product
from typing import NamedTuple

from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.attention import AttentionTile
from fluxfast_kernels.ops.attention import KERNELS as ATTENTION_KERNELS

C = 128  # FLUX's head width
ACCUMULATORS = (8, 128)  # fp32 sums a thread: fewer leave it idle, more spill


class Kernel(NamedTuple):
    """op, storage and dtype as in dispatch's rows; attention's kernels by `attention.json`'s names,
    "dense", "half"."""

    op: str
    storage: str
    dtype: str

    def __str__(self) -> str:
        return ".".join(self)


ATTENTION = (*ATTENTION_KERNELS, "qk_norm_rope")
KERNELS = (
    *(Kernel(op, "dense", "half") for op in ("lora_gemm", "lora_gemm_dx")),
    *(Kernel(op, "dense", kind) for op in dispatch.PRODUCTS_8BIT for kind in ("int8", "fp8")),
    *(Kernel(op, "dense", "half") for op in ("lora_skinny", "lora_skinny_8bit", "lora_grads")),
    *(Kernel(op, "nf4", "half") for op in ("lora_gemm", "lora_gemm_dx")),
    *(Kernel(op, "nf4", kind) for op in dispatch.PRODUCTS_8BIT for kind in ("int8", "fp8")),
    *(Kernel(op, "dense", "half") for op in ATTENTION),
)

_WARPS, _STAGES = (4, 8), (2, 3, 4)
# block_m, block_n, block_k, warps, stages: of an op, else of a product's storage, else of its dtype
_SIDES = {
    "lora_skinny": ((16, 32, 64, 128), (128,), (64, 128), _WARPS, _STAGES),
    "lora_skinny_8bit": ((16, 32, 64), (128,), (64, 128), _WARPS, (2, 3)),
    "lora_grads": ((32, 64, 128), (128,), (64, 128, 256), _WARPS, _STAGES),
    "qk_norm_rope": ((4, 8, 16, 32), (1,), (1,), (2, 4, 8), (1,)),
    **dict.fromkeys(ATTENTION_KERNELS, ((64, 128), (32, 64, 128), (1,), _WARPS, _STAGES)),
    "nf4": ((16, 32, 64, 128), (64, 128), (64,), _WARPS, _STAGES),  # more rows come dequantized
    "half": ((64, 128, 256), (64, 128, 256), (32, 64), _WARPS, _STAGES),
    **dict.fromkeys(("int8", "fp8"), ((64, 128, 256), (64, 128, 256), (64, 128), _WARPS, _STAGES)),
}
# further tiles of dense 8-bit products: two programs beside each other, and more warps
_MORE_8BIT = (
    *("128x128x64.8w3r128", "128x128x128.8w3r128", "128x128x64.16w3"),
    *("128x256x64.16w3", "256x128x64.16w3"),
)
# what else is worth a try once a tile is known to be good
_GROUPS = {"lora_skinny": (1,), "lora_skinny_8bit": (1,), "lora_grads": (256, 128, 512)}
_PRODUCT_GROUPS = (8, 4, 16)


def groups(kernel: Kernel) -> tuple[int, ...]:
    """Values of group_m to try, the one to begin with first; none for attention's kernels."""
    return () if kernel.op in ATTENTION else _GROUPS.get(kernel.op, _PRODUCT_GROUPS)


def tile_name(tile: dispatch.Tile | AttentionTile, with_group: bool = True) -> str:
    depth = f"x{tile.block_k}" if isinstance(tile, dispatch.Tile) else ""
    group = f"g{tile.group_m}" if depth and with_group else ""
    most = getattr(tile, "maxnreg", None)
    registers = "" if most is None else f"r{most}"
    shape = f"{tile.block_m}x{tile.block_n}{depth}.{tile.num_warps}w{tile.num_stages}"
    return shape + registers + group


def named_tile(kernel: Kernel, name: str) -> dispatch.Tile | AttentionTile:
    """The inverse of `tile_name`; without a group, the kernel's first. Raises ValueError."""
    match = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?\.(\d+)w(\d+)(?:r(\d+))?(?:g(\d+))?", name)
    if not match or (match[3] is None) != (kernel.op in ATTENTION):
        raise ValueError(f"{kernel}: {name!r} is no name of a tile, as 128x128x64.8w3g8 is")
    m, n, k, warps, stages, most, group = (part and int(part) for part in match.groups())
    if kernel.op in ATTENTION:
        return AttentionTile(m, n, warps, stages)
    return dispatch.Tile(m, n, k, group or groups(kernel)[0], warps, stages, most)


def space(kernel: Kernel, arch: int) -> list[dispatch.Tile | AttentionTile]:
    """Every tile worth compiling for a card, with the kernel's first group_m."""
    names = (kernel.op, kernel.storage, kernel.dtype)
    sides = next(_SIDES[name] for name in names if name in _SIDES)
    more = _MORE_8BIT if kernel.storage == "dense" and kernel.dtype in ("int8", "fp8") else ()
    return [
        named_tile(kernel, f"{m}x{n}{'' if kernel.op in ATTENTION else f'x{k}'}.{warps}w{stages}")
        for m, n, k, warps, stages in product(*sides)
        if _fits(kernel, arch, m, n, k, warps, stages)
    ] + [named_tile(kernel, name) for name in more]


def _fits(kernel: Kernel, arch: int, m: int, n: int, k: int, warps: int, stages: int) -> bool:
    from bench.twin.driver import SHARED_LIMIT

    least, most = ACCUMULATORS
    if kernel.op in ATTENTION:
        return kernel.op == "qk_norm_rope" or m * C / (32 * warps) <= most
    sums = (n * k if kernel.op == "lora_grads" else m * n) / (32 * warps)
    # operands of the steps that are loaded ahead; NF4 is dequantized in registers on its way
    width = 2 if kernel.dtype == "half" else 1
    ahead = (stages - 1) * width * k * (m if kernel.storage == "nf4" else m + n)
    return least <= sums <= most and ahead <= SHARED_LIMIT[arch]
