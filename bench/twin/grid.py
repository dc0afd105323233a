"""The configurations whose launches are compiled: all of them, and few that cover every pair."""

from collections.abc import Iterator
from itertools import combinations, product

from bench.twin.launches import FP8_ARCH, WIDTHS, Case

ARCHITECTURES = (80, 86, 89, 90, 120)
MODES = (  # storage, matmul
    ("nf4", "int8"),
    ("nf4", "fp8"),
    ("nf4", "bf16"),
    ("int8", "int8"),
    ("fp8", "fp8"),
    ("bf16", "bf16"),
    ("bf16", "int8"),
    ("bf16", "fp8"),
    ("int8", "bf16"),
    ("fp8", "bf16"),
    ("nf4-nested", "bf16"),
    ("nf4-nested", "int8"),
    ("nf4", "int8-rotated"),
    ("fp8", "fp8-rotated"),
    ("fp32", "fp32"),
    ("nf4", "fp32"),
)
RANKS = (16, 64, 128)
TARGETS = ("attn+mlp", False), ("all", False), ("attn+mlp", True)  # and whether with dropout
SIZES = ("512x512", "768x768", "1024x1024", "1008x528")  # the last with an odd number of tokens
SHORT = ("1024x1024", "512x512")


def cases(arch: int) -> Iterator[Case]:
    """Returns every configuration of a card, those of one model together."""
    for (storage, matmul), rank, (targets, dropout), size, batch in product(
        MODES, RANKS, TARGETS, SIZES, (1, 4)
    ):
        if arch >= FP8_ARCH or not matmul.startswith("fp8"):
            yield Case(arch, storage, matmul, rank, targets, size, batch, dropout)
    yield from beside(arch)


def beside(arch: int) -> Iterator[Case]:
    """Returns the configurations beside the product: fp16, Triton's attention, small heads."""
    for size in ("1024x1024", "1008x528"):
        yield Case(arch, size=size, head_dim=32)
        yield Case(arch, "nf4", "fp16", size=size, attention="triton")
        for head_dim, matmul in product(WIDTHS, ("fp32", "bf16")):
            yield Case(arch, "nf4", matmul, size=size, head_dim=head_dim, attention="triton")


def default(arch: int) -> list[Case]:
    """Returns the default path's configurations, at two sizes."""
    return [Case(arch, "nf4", "fp8" if arch == 90 else "int8", size=size) for size in SHORT]


def _pairs(case: Case) -> frozenset:
    mode = case.storage, case.matmul
    return frozenset(
        combinations((mode, case.rank, (case.targets, case.dropout), case.size, -case.batch), 2)
    )


def pairwise(arch: int) -> list[Case]:
    """Returns few configurations of a card that hold every pair of two axes' values (storage and
    matmul are one axis), the first that hold most first: greedy, not the fewest."""
    more = list(beside(arch))
    left = {case: _pairs(case) for case in cases(arch) if case not in more}
    missing, chosen = frozenset().union(*left.values()), []
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        missing -= left.pop(best)
        chosen.append(best)
    return [*chosen, *more]
