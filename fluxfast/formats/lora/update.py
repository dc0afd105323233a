"""A LoRA as pieces of its update: what every reader yields and every writer takes.

A piece is one low-rank product on some parts (q, k, v, mlp) of one BFL linear, and a linear's
update is the sum of its pieces. A split file gives a piece per part, a fused one a piece over all
parts, a merge the pieces of all its files: nothing is rounded or grown by being read. Alpha is
folded in: a piece means B A and nothing else.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.model.names import DOUBLE_PARTS, SINGLE_PARTS

_BLOCK = 1 << 18  # entries of ΔW formed at a time: 1 MiB, which stays in a core's cache


@dataclass(frozen=True)
class Piece:
    """ΔW[rows of parts] += B A.

    a: [R, K] fp32; b: [rows of the parts, one after another, R] fp32.
    """

    parts: tuple[int, ...]
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass
class LoraWeights:
    """What a LoRA file holds, in BFL's terms.

    pieces: BFL linear -> its pieces; text: `clip/` or `t5/` and transformers' name -> pieces;
    biases: BFL linear -> [(parts, what is added to the bias)]; norms: BFL norm -> its new scale.
    hidden, mlp: the transformer's widths (0 where nothing tells). form: the format it was read
    from.
    """

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    text: dict[str, list[Piece]] = field(default_factory=dict)
    biases: dict[str, list[tuple[tuple[int, ...], Tensor]]] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    hidden: int = 0
    mlp: int = 0
    form: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    def heights(self, module: str) -> list[int]:
        """Rows of each part of a linear that there are pieces or biases of."""
        if (count := part_count(module)) > 1:
            return [self.hidden, self.hidden, self.hidden, self.mlp][:count]
        if pieces := self.pieces.get(module) or self.text.get(module):
            return [pieces[0].b.shape[0]]
        return [len(self.biases[module][0][1])]

    def rank(self) -> int:
        """The highest rank of a transformer's linear, of a part where the parts have A's apart."""
        grouped = (group(pieces, self.heights(m)) for m, pieces in self.pieces.items())
        return max((piece.rank for pieces in grouped for piece in pieces), default=0)


def part_count(module: str) -> int:
    """How many of diffusers' linears a BFL linear is."""
    group, _, tail = module.partition(".")
    table = {"double_blocks": DOUBLE_PARTS, "single_blocks": SINGLE_PARTS}.get(group, {})
    return len(table.get(tail.partition(".")[2], [""]))


def split_scale(scale: float) -> tuple[float, float]:
    """A power of two for A and the rest for B, about the root of `scale` each: exact in A, and
    16-bit factors neither overflow nor vanish.
    """
    if scale == 0:
        return 1.0, 0.0
    power = 2.0 ** (math.frexp(abs(scale))[1] // 2)
    return power, scale / power


# ---------------------------------------------------------------- between fused and split
# heights: rows of each part of the pieces' linear


def rows_of(parts: tuple[int, ...], heights: list[int]) -> dict[int, slice]:
    """Part -> its rows within a B that stacks `parts`."""
    rows, start = {}, 0
    for part in parts:
        rows[part] = slice(start, start + heights[part])
        start += heights[part]
    return rows


def split(pieces: Iterable[Piece], heights: list[int]) -> list[Piece]:
    """The same update in pieces of one part each. Columns of B that are zero in a part are left out
    there: of a block-diagonal B the blocks remain, of a dense one every part gets all of A.
    """
    result = []
    for piece in pieces:
        if len(piece.parts) == 1:
            result.append(piece)
            continue
        for part, rows in rows_of(piece.parts, heights).items():
            b = piece.b[rows]
            used = (b != 0).any(dim=0)
            if used.any() and not used.all():
                result.append(Piece((part,), piece.a[used], b[:, used]))
            elif used.any() or not piece.b.any():  # an update of zero keeps its A
                result.append(Piece((part,), piece.a, b))
    return result


def _is_block_diagonal(piece: Piece, heights: list[int]) -> bool:
    """Whether no column of B feeds several parts, and some feed one."""
    fed = [(piece.b[rows] != 0).any(dim=0) for rows in rows_of(piece.parts, heights).values()]
    counts = torch.stack(fed).sum(dim=0)
    return bool(counts.any() and not (counts > 1).any())


def group(pieces: list[Piece], heights: list[int]) -> list[Piece]:
    """The same update in pieces on rows that ascend and do not overlap: stacked where they lie on
    the same parts, split where they overlap otherwise.
    """
    blocks = []
    for piece in pieces:
        blocks += split([piece], heights) if _is_block_diagonal(piece, heights) else [piece]
    pieces = _rejoin(blocks)
    part_sets = sorted({piece.parts for piece in pieces})
    if any(one[-1] >= other[0] for one, other in itertools.pairwise(part_sets)):
        pieces = split(pieces, heights)
    return stack_by_parts(pieces)


def stack_by_parts(pieces: list[Piece]) -> list[Piece]:
    """The same update with one piece for each set of parts, in their order."""
    by_parts: dict[tuple[int, ...], list[Piece]] = {}
    for piece in pieces:
        by_parts.setdefault(piece.parts, []).append(piece)
    return [_stack(by_parts[parts]) for parts in sorted(by_parts)]


def _rejoin(pieces: list[Piece]) -> list[Piece]:
    """Pieces on different parts with one and the same A become one: what was a fused update, split
    by copying A.
    """
    result: list[Piece] = []
    for piece in pieces:
        for index, other in enumerate(result):
            if not set(piece.parts) & set(other.parts) and _equal(piece.a, other.a):
                low, high = sorted([other, piece], key=lambda p: p.parts)
                if low.parts[-1] < high.parts[0]:
                    b = torch.cat([low.b, high.b])
                    result[index] = Piece(low.parts + high.parts, piece.a, b)
                    break
        else:
            result.append(piece)
    return result


def fuse(pieces: list[Piece], heights: list[int], parts: tuple[int, ...]) -> Piece:
    """One piece on `parts`, which cover those of `pieces`: A's stacked, B's in place, zeros
    elsewhere (block-diagonal for pieces of one part each).
    """
    pieces = _rejoin(pieces)
    if len(pieces) == 1 and pieces[0].parts == parts:
        return pieces[0]
    rows = rows_of(parts, heights)
    a = torch.cat([piece.a for piece in pieces])
    b = a.new_zeros(sum(heights[part] for part in parts), a.shape[0])
    column = 0
    for piece in pieces:
        for part, own in rows_of(piece.parts, heights).items():
            b[rows[part], column : column + piece.rank] = piece.b[own]
        column += piece.rank
    return Piece(parts, a, b)


def _stack(pieces: list[Piece]) -> Piece:
    """Of pieces on the same parts: their sum."""
    if len(pieces) == 1:
        return pieces[0]
    a, b = torch.cat([p.a for p in pieces]), torch.cat([p.b for p in pieces], dim=1)
    return Piece(pieces[0].parts, a, b)


def _equal(a: Tensor, b: Tensor) -> bool:
    # the first row settles nearly every comparison
    return a.shape == b.shape and torch.equal(a[:1], b[:1]) and torch.equal(a, b)


# ---------------------------------------------------------------- sums and differences


def scaled(lora: LoraWeights, strength: float) -> LoraWeights:
    """The update times `strength`."""
    if strength == 1:
        return lora
    pieces, text = (
        {m: [replace(p, b=p.b * strength) for p in ps] for m, ps in table.items()}
        for table in (lora.pieces, lora.text)
    )
    biases = {m: [(parts, t * strength) for parts, t in ps] for m, ps in lora.biases.items()}
    return replace(lora, pieces=pieces, text=text, biases=biases)


def balanced(lora: LoraWeights) -> LoraWeights:
    """The same update, exactly, with A and B of one size: what 16-bit floats hold best. A linear's
    pieces all get the same power of two, so that a shared A stays shared.
    """

    def even(pieces: list[Piece]) -> list[Piece]:
        a, b = (max(getattr(p, side).abs().max().item() for p in pieces) for side in "ab")
        if not a or not b:
            return pieces
        power = 2.0 ** round(math.log2(b / a) / 2)
        return [Piece(p.parts, p.a * power, p.b / power) for p in pieces]

    pieces, text = ({m: even(ps) for m, ps in t.items()} for t in (lora.pieces, lora.text))
    return replace(lora, pieces=pieces, text=text)


def merged(loras: list[LoraWeights]) -> LoraWeights:
    """Their sum, exact: ranks add up. Raises ConfigError for transformers of different widths, and
    for several that set the same norm.
    """
    total = loras[0]
    for other in loras[1:]:
        if total.hidden and other.hidden and _sizes(total) != _sizes(other):
            raise ConfigError(
                f"these LoRAs are of transformers {_sizes(total)} and {_sizes(other)}: they cannot "
                "be added up"
            )
        if both := total.norms.keys() & other.norms.keys():
            raise ConfigError(f"two of these LoRAs set {min(both)}: they cannot be added up")
        known = total if total.hidden else other
        total = LoraWeights(
            pieces=_joined(total.pieces, other.pieces),
            text=_joined(total.text, other.text),
            biases=_joined(total.biases, other.biases),
            norms={**total.norms, **other.norms},
            hidden=known.hidden,
            mlp=known.mlp,
            form=total.form,
        )
    return total


def _sizes(lora: LoraWeights) -> str:
    return f"{lora.hidden} wide with an MLP of {lora.mlp}"


def _joined(one: dict[str, list], other: dict[str, list]) -> dict[str, list]:
    return {module: one.get(module, []) + other.get(module, []) for module in {**one, **other}}


def difference(
    one: LoraWeights, other: LoraWeights, table: str, module: str, only: set[int] | None = None
) -> tuple[float, float]:
    """(max |ΔW difference|, max |ΔW| of `one`) of a linear, both over the parts that differ: parts
    whose factors are the same bits differ by nothing and are not multiplied. table: pieces or text;
    only: these parts. What overflows is infinite.
    """
    mine, theirs = (getattr(lora, table).get(module, []) for lora in (one, other))
    heights = (one if mine else other).heights(module)
    mine, theirs = split(mine, heights), split(theirs, heights)
    worst = largest = 0.0
    for part, height in enumerate(heights):
        sides = [[p for p in side if p.parts == (part,)] for side in (mine, theirs)]
        if not any(sides) or (only is not None and part not in only):
            continue
        columns = next(p.a.shape[1] for side in sides for p in side)
        whole = [_on_part(side, height, columns) for side in sides]
        if _same(*whole) or _same(*map(_acting, whole)):
            continue
        (a, b), (c, d) = whole
        count = max(1, _BLOCK // columns)
        delta = torch.empty(min(count, height), columns)
        for start in range(0, height, count):
            rows = slice(start, start + count)
            block = torch.mm(b[rows], a, out=delta[: height - start])
            largest = max(largest, _largest(block))
            worst = max(worst, _largest(block.addmm_(d[rows], c, alpha=-1)))
    return worst, largest


def _on_part(pieces: list[Piece], rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A and B of pieces on one part, side by side."""
    if not pieces:
        return torch.zeros(0, columns), torch.zeros(rows, 0)
    whole = _stack(pieces)
    return whole.a, whole.b


def _acting(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same update without ranks that are zero in A or in B."""
    a, b = pair
    used = (a != 0).any(dim=1) & (b != 0).any(dim=0)
    return a[used], b[:, used]


def _same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def _largest(block: Tensor) -> float:
    # amax and amin take half the time of aminmax
    size = max(block.amax().item(), -block.amin().item())
    return size if math.isfinite(size) else math.inf
