"""An op's FLOP and bytes, the time that a card takes for them, and the launches that steps are made
of. `cost.py` says which of them a training step has.

Least traffic: each tensor that a launch takes or gives crosses the memory once. Vectors of a batch
(modulation, biases) and lse are left out. FLOP: 2 a multiply-add.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fluxfast.errors import ConfigError
from fluxfast.memory.planner.cards import Card

NF4 = 0.5 + 4 / 64  # bytes a weight: a nibble, and an fp32 absmax for each block of 64
_PEAK = {"element": "fp32", "attention_forward": "bf16", "attention_backward": "bf16"}


@dataclass(frozen=True)
class Op:
    """kind: one of `cards.KINDS`. bytes: through the card's memory ("copy": through PCIe). launches
    0: a part of another op's kernel, whose time adds to it."""

    name: str
    kind: str
    flop: float
    bytes: float
    launches: int = 1


# ---------------------------------------------------------------- time


def seconds(op: Op, card: Card, launches: bool = False) -> float:
    """The longer of FLOP over what the card reaches of its peak and bytes over what it reaches of
    its bandwidth. launches: each adds the card's launch_s (in a captured graph none does).

    Raises ConfigError for products that the card does not have.
    """
    if op.kind == "copy":
        time = op.bytes / (card.pcie * card.efficiency["copy"].value)
    else:
        peak = _PEAK.get(op.kind, op.kind)
        # element-wise FLOP are bound by bytes on every card: fp32's own share will do
        share = card.efficiency["fp32" if op.kind == "element" else op.kind].value
        if not card.peaks[peak]:
            raise ConfigError(f"{card.name} has no {peak} products", hint="compute: int8 or bf16")
        time = op.bytes / (card.bandwidth * card.efficiency["element"].value)
        time = max(time, op.flop / (card.peaks[peak] * share))
    return time + (op.launches * card.launch_s if launches else 0.0)


def total_flop(ops: Iterable[Op]) -> float:
    return sum(op.flop for op in ops)


def total_bytes(ops: Iterable[Op]) -> float:
    return sum(op.bytes for op in ops)


def total_seconds(ops: Iterable[Op], card: Card, matmul: str = "", launches: bool = False) -> float:
    """Of ops one after the other. matmul: stretched by the card's measured factor of that kind,
    where it has one; copies over PCIe are not, as no measured step had any."""
    factor = card.factors[matmul].value if matmul in card.factors else 1.0
    return sum(seconds(op, card, launches) * (1 if op.kind == "copy" else factor) for op in ops)


# ---------------------------------------------------------------- single launches


def linear_op(
    name: str,
    kind: str,
    M: int,
    N: int,
    K: int,
    weight: float,
    width: float,
    update: tuple[int, int, int] = (0, 0, 0),
    extra: float = 0.0,
) -> Op:
    """y = x Wᵀ in one launch: x [M, K] and y [M, N] of `width` bytes an element, `weight` bytes a
    weight. update: a low-rank one within, (P As, N' rows, R rank), A and B in fp32. extra: more
    bytes."""
    parts, rows, rank = update
    moved = width * M * (N + K) + weight * N * K + 4 * rank * (rows + parts * K) + extra
    return Op(name, kind, 2.0 * M * N * K + 2.0 * M * rank * (parts * K + rows), moved)


def attention_op(batch: int, tokens: int, hidden: int, width: int, backward: int = 0) -> Op:
    """Reads q, k, v and writes o; backward reads these and do and writes three gradients.

    backward: its products of T·T·hidden, 5 with flash (scores made again), 4 where the scores were
    kept; 0 is the forward, which has 2. fp32 runs without tensor cores.
    """
    direction = "backward" if backward else "forward"
    kind = "fp32" if width == 4 else f"attention_{direction}"
    flop = 2.0 * (backward or 2) * batch * tokens**2 * hidden
    moved = (8 if backward else 4) * width * batch * tokens * hidden
    # backward: do · o summed, the products, dq rounded
    return Op(f"attention {direction}", kind, flop, moved, 3 if backward else 1)


def element_op(name: str, elements: float, each: float, flop: float = 1.0, launches: int = 1) -> Op:
    """An element-wise pass: bytes and FLOP an element."""
    return Op(name, "element", flop * elements, each * elements, launches)


def codes_ops(elements: int, width: int) -> tuple[Op, Op]:
    """-> (pack, unpack) of a saved activation: 1 byte an element and a 4-byte scale per 128."""
    each = width + 1 + 4 / 128
    return element_op("pack", elements, each, 4.0), element_op("unpack", elements, each, 2.0)
