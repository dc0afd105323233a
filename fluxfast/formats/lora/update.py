"""A LoRA as pieces of its update: what every reader yields and every writer takes.

A piece is one low-rank product on some parts (q, k, v, mlp) of one BFL linear, and a linear's
update is the sum of its pieces. A split file gives a piece per part, a fused one a piece over all
parts, a merge the pieces of all its files: nothing is rounded or grown by being read. Alpha is
folded in: a piece means B A and nothing else.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.model.names import DOUBLE_PARTS, SINGLE_PARTS


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
class Lora:
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

    def heights(self, module: str) -> list[int] | None:
        """Rows of each part of a fused linear; None where there is one part."""
        count = part_count(module)
        return [self.hidden, self.hidden, self.hidden, self.mlp][:count] if count > 1 else None

    def rank(self) -> int:
        """The highest rank of a transformer's linear, of a part where the parts have A's apart."""
        every = self.pieces.items()
        return max((p.rank for m, ps in every for p in grouped(ps, self.heights(m))), default=0)


def part_count(module: str) -> int:
    """How many of diffusers' linears a BFL linear is."""
    group, _, tail = module.partition(".")
    table = {"double_blocks": DOUBLE_PARTS, "single_blocks": SINGLE_PARTS}.get(group, {})
    return len(table.get(tail.partition(".")[2], [""]))


def split_scale(scale: float) -> tuple[float, float]:
    """-> (a power of two for A, the rest for B), about the root of `scale` each: exact in A, and
    16-bit factors neither overflow nor vanish.
    """
    if scale == 0:
        return 1.0, 0.0
    power = 2.0 ** (math.frexp(abs(scale))[1] // 2)
    return power, scale / power


def widths(shapes: dict[str, list[tuple[tuple[int, ...], int, int]]]) -> tuple[int, int]:
    """-> (hidden, mlp) that most factors agree on. shapes: BFL linear -> [(parts, rows,
    columns)].
    """
    hidden, mlp = Counter(), Counter()
    for module, found in shapes.items():
        if not module.startswith(("double_blocks.", "single_blocks.")):
            continue
        tail = module.split(".", 2)[2]
        for _, rows, columns in found:
            hidden[rows if tail in ("img_mlp.2", "txt_mlp.2", "linear2") else columns] += 1
    if not hidden:
        return 0, 0
    width = hidden.most_common(1)[0][0]
    for module, found in shapes.items():
        tail = module.partition(".")[2].partition(".")[2]
        for parts, rows, columns in found:
            if tail in ("img_mlp.0", "txt_mlp.0"):
                mlp[rows] += 1
            elif tail in ("img_mlp.2", "txt_mlp.2"):
                mlp[columns] += 1
            elif tail == "linear2":
                mlp[columns - width] += 1
            elif tail == "linear1" and 3 in parts:
                mlp[rows - (len(parts) - 1) * width] += 1
    return width, mlp.most_common(1)[0][0] if mlp else 4 * width


# ---------------------------------------------------------------- between fused and split


def rows_of(parts: tuple[int, ...], heights: list[int]) -> dict[int, slice]:
    """Part -> its rows within a B that stacks `parts`."""
    rows, start = {}, 0
    for part in parts:
        rows[part] = slice(start, start + heights[part])
        start += heights[part]
    return rows


def split(piece: Piece, heights: list[int]) -> list[Piece]:
    """A piece per part. Columns of B that are zero in a part are left out there: of a
    block-diagonal B the blocks remain, of a dense one every part gets all of A.
    """
    if len(piece.parts) == 1:
        return [piece]
    pieces = []
    for part, rows in rows_of(piece.parts, heights).items():
        b = piece.b[rows]
        used = (b != 0).any(dim=0)
        if used.any() and not used.all():
            pieces.append(Piece((part,), piece.a[used], b[:, used]))
        elif used.any() or not piece.b.any():  # an update of zero keeps its A
            pieces.append(Piece((part,), piece.a, b))
    return pieces


def unblocked(piece: Piece, heights: list[int] | None) -> list[Piece]:
    """Its blocks, where B is block-diagonal by parts; itself where columns feed several parts."""
    if heights is None or len(piece.parts) == 1 or not piece.b.any():
        return [piece]
    feeds = [(piece.b[rows] != 0).any(dim=0) for rows in rows_of(piece.parts, heights).values()]
    shared = torch.stack(feeds).sum(dim=0) > 1
    return [piece] if shared.any() else split(piece, heights)


def grouped(pieces: list[Piece], heights: list[int] | None) -> list[Piece]:
    """The same update in pieces on rows that ascend and do not overlap: stacked where they lie on
    the same parts, split where they overlap otherwise.
    """
    if heights is not None:
        pieces = shared_again([part for piece in pieces for part in unblocked(piece, heights)])
        sets = sorted({piece.parts for piece in pieces})
        if any(one[-1] >= other[0] for one, other in itertools.pairwise(sets)):
            pieces = [part for piece in pieces for part in split(piece, heights)]
    found: dict[tuple[int, ...], list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.parts, []).append(piece)
    return [_stack(found[parts]) for parts in sorted(found)]


def shared_again(pieces: list[Piece]) -> list[Piece]:
    """Pieces on different parts with one and the same A become one: what was a fused update, split
    by copying A.
    """
    result: list[Piece] = []
    for piece in pieces:
        for index, other in enumerate(result):
            if not set(piece.parts) & set(other.parts) and _equal(piece.a, other.a):
                both = sorted([other, piece], key=lambda p: p.parts)
                if both[0].parts[-1] < both[1].parts[0]:
                    parts = both[0].parts + both[1].parts
                    result[index] = Piece(parts, piece.a, torch.cat([p.b for p in both]))
                    break
        else:
            result.append(piece)
    return result


def fused(pieces: list[Piece], heights: list[int] | None, only: tuple[int, ...]) -> Piece:
    """One piece on the parts `only`, which cover those of `pieces`: A's stacked, B's placed, zeros
    elsewhere (block-diagonal for pieces of one part each).
    """
    pieces = shared_again(pieces) if heights is not None else pieces
    if len(pieces) == 1 and pieces[0].parts == only:
        return pieces[0]
    if heights is None:
        return _stack(pieces)
    rows = rows_of(only, heights)
    a = torch.cat([piece.a for piece in pieces])
    b = a.new_zeros(sum(heights[part] for part in only), a.shape[0])
    column = 0
    for piece in pieces:
        for part, own in rows_of(piece.parts, heights).items():
            b[rows[part], column : column + piece.rank] = piece.b[own]
        column += piece.rank
    return Piece(only, a, b)


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

_BLOCK = 1 << 18  # entries of ΔW formed at a time: 1 MiB, which stays in a core's cache


def scaled(lora: Lora, strength: float) -> Lora:
    """The update times `strength`."""
    if strength == 1:
        return lora

    def times(table: dict[str, list[Piece]]) -> dict[str, list[Piece]]:
        return {m: [Piece(p.parts, p.a, p.b * strength) for p in ps] for m, ps in table.items()}

    biases = {m: [(parts, t * strength) for parts, t in ps] for m, ps in lora.biases.items()}
    return replace(lora, pieces=times(lora.pieces), text=times(lora.text), biases=biases)


def balanced(lora: Lora) -> Lora:
    """The same update, exactly, with A and B of one size: what 16-bit floats hold best. A linear's
    pieces all get the same power of two, so that a shared A stays shared.
    """

    def even(pieces: list[Piece]) -> list[Piece]:
        a, b = (max(getattr(p, side).abs().max().item() for p in pieces) for side in "ab")
        if not a or not b:
            return pieces
        power = 2.0 ** round(math.log2(b / a) / 2)
        return [Piece(p.parts, p.a * power, p.b / power) for p in pieces]

    tables = ({m: even(ps) for m, ps in table.items()} for table in (lora.pieces, lora.text))
    return replace(lora, **dict(zip(("pieces", "text"), tables, strict=True)))


def merged(loras: list[Lora]) -> Lora:
    """Their sum, exact: ranks add up. Raises ConfigError for transformers of different widths, and
    for several that set the same norm.
    """
    total = loras[0]
    for other in loras[1:]:
        sizes = [(lora.hidden, lora.mlp) for lora in (total, other)]
        if total.hidden and other.hidden and sizes[0] != sizes[1]:
            one, two = (f"{hidden} wide with an MLP of {mlp}" for hidden, mlp in sizes)
            raise ConfigError(
                f"these LoRAs are of transformers {one} and {two}: they cannot be added up"
            )
        if both := total.norms.keys() & other.norms.keys():
            raise ConfigError(f"two of these LoRAs set {min(both)}: they cannot be added up")
        larger = total if total.hidden else other
        total = Lora(
            **{
                name: {
                    module: getattr(total, name).get(module, [])
                    + getattr(other, name).get(module, [])
                    for module in {**getattr(total, name), **getattr(other, name)}
                }
                for name in ("pieces", "text", "biases")
            },
            norms={**total.norms, **other.norms},
            hidden=larger.hidden,
            mlp=larger.mlp,
            form=total.form,
        )
    return total


def difference(
    one: Lora, other: Lora, table: str, module: str, only: set[int] | None = None
) -> tuple[float, float]:
    """-> (max |ΔW difference|, max |ΔW| of `one`) of a linear, both over the parts that differ:
    parts whose factors are the same bits differ by nothing and are not multiplied. table: pieces
    or text; only: these parts. What overflows is infinite.
    """
    mine, theirs = (getattr(lora, table).get(module, []) for lora in (one, other))
    heights = one.heights(module) or other.heights(module)
    if heights is None:
        heights = [max(piece.b.shape[0] for piece in [*mine, *theirs])]
    mine, theirs = ([p for piece in side for p in split(piece, heights)] for side in (mine, theirs))
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
