"""The form between every LoRA file and every other: low-rank pieces of a transformer's update.

A linear's update is the sum of its pieces. A fused file has one piece for all parts (q, k, v, mlp)
of a linear, a split file one for each part, a merge those of all its files: nothing is rounded or
padded by reading. Alpha is folded in.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.model.spec import FluxSpec

_BLOCK = 1 << 18  # entries of ΔW formed at a time: 1 MiB, which stays in a core's cache


@dataclass(frozen=True)
class Piece:
    """ΔW[rows of a part] += b[part] @ a, for each part that A feeds.

    a: [R, K] fp32; b: part -> [rows of the part, R] fp32, in ascending order of the parts.
    """

    a: Tensor
    b: dict[int, Tensor]

    @property
    def parts(self) -> tuple[int, ...]:
        return tuple(self.b)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def stacked_b(self) -> Tensor:
        parts = list(self.b.values())
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass
class LoraWeights:
    """The content of a LoRA file, in BFL's terms.

    pieces: BFL linear -> its pieces; text: `clip/` or `t5/` and transformers' name -> pieces;
    biases: BFL linear -> part -> update of its bias; norms: BFL norm -> its new scale; embeddings:
    key -> vectors of a trigger word, as they are. hidden, mlp: the transformer's widths (0 if
    unknown); spec: of the model that carries it. form: the format it was read from.
    """

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    text: dict[str, list[Piece]] = field(default_factory=dict)
    biases: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    hidden: int = 0
    mlp: int = 0
    spec: FluxSpec | None = None
    form: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def heights(self) -> list[int]:
        """Rows of q, k, v and mlp, the parts of a fused linear."""
        return [self.hidden, self.hidden, self.hidden, self.mlp]

    def rank(self) -> int:
        """Returns the highest rank of a transformer's linear, or of a part with an A of its own."""
        grouped = itertools.chain.from_iterable(map(group, self.pieces.values()))
        return max((piece.rank for piece in grouped), default=0)


def split_scale(scale: float) -> tuple[float, float]:
    """Returns a power of two for A and the rest for B, each about the root of `scale`: A stays
    exact, and 16-bit factors neither overflow nor vanish.
    """
    if scale == 0:
        return 1.0, 0.0
    power = 2.0 ** (math.frexp(abs(scale))[1] // 2)
    return power, scale / power


def swap_halves(rows: Tensor) -> Tensor:
    """Swaps the rows of [scale, shift] and [shift, scale]."""
    return torch.cat(rows.chunk(2)[::-1])


# ---------------------------------------------------------------- ranks of zeros


def at_rank(piece: Piece, rank: int) -> Piece:
    """Returns the same update at a higher rank, by ranks of zeros at the end."""
    if not (more := rank - piece.rank):
        return piece
    b = {part: F.pad(rows, (0, more)) for part, rows in piece.b.items()}
    return Piece(F.pad(piece.a, (0, 0, 0, more)), b)


def without_padding(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns A and B without the ranks at the end that are zero in both: `at_rank`'s, XLabs'. What
    is zero altogether stays.
    """
    if a[-1].any() or b[:, -1].any():  # as in nearly every file
        return a, b
    used = ((a != 0).any(dim=1) | (b != 0).any(dim=0)).nonzero()
    rank = int(used.max()) + 1 if len(used) else len(a)
    return a[:rank], b[:, :rank]


# ---------------------------------------------------------------- between fused and split


def split(pieces: Iterable[Piece]) -> list[Piece]:
    """Returns the same update in pieces of one part each, without the ranks that are zero in a
    part: of a block-diagonal B the blocks remain, of a dense one every part gets all of A.
    """
    result = []
    for piece in pieces:
        for part, used in _used_ranks(piece).items():
            b = piece.b[part]
            if len(piece.b) == 1 or used.all() or not piece.stacked_b().any():
                result.append(Piece(piece.a, {part: b}))  # an update of zero keeps its A
            elif used.any():
                result.append(Piece(piece.a[used], {part: b[:, used]}))
    return result


def _used_ranks(piece: Piece) -> dict[int, Tensor]:
    return {part: (b != 0).any(dim=0) for part, b in piece.b.items()}


def group(pieces: Iterable[Piece]) -> list[Piece]:
    """Returns the same update in pieces on rows that ascend and do not overlap, one for each set of
    parts. Parts keep a shared A if every piece allows it.
    """
    blocks = []
    for piece in pieces:
        counts = torch.stack(list(_used_ranks(piece).values())).sum(dim=0)
        block_diagonal = bool(counts.any() and not (counts > 1).any())
        blocks += split([piece]) if block_diagonal else [piece]
    pieces = _rejoin(blocks)
    if overlap({piece.parts for piece in pieces}):
        pieces = split(pieces)
    return stack_by_parts(pieces)


def overlap(part_sets: Iterable[tuple[int, ...]]) -> bool:
    """Returns whether the sets of parts, sorted, are not ascending runs of rows."""
    return any(one[-1] >= other[0] for one, other in itertools.pairwise(sorted(part_sets)))


def stack_by_parts(pieces: Iterable[Piece]) -> list[Piece]:
    """Returns the same update with one piece for each set of parts, in their order."""
    by_parts: dict[tuple[int, ...], list[Piece]] = {}
    for piece in pieces:
        by_parts.setdefault(piece.parts, []).append(piece)
    return [fuse(by_parts[parts], [], parts) for parts in sorted(by_parts)]


def fuse(pieces: list[Piece], heights: list[int], parts: tuple[int, ...]) -> Piece:
    """Returns one piece on `parts`, a superset of those of `pieces`: A's stacked, B's side by side,
    zeros elsewhere. heights: rows of each part.
    """
    pieces = _rejoin(pieces)
    if len(pieces) == 1 and pieces[0].parts == parts:
        return pieces[0]
    b = {
        part: torch.cat(
            [
                piece.b[part] if part in piece.b else piece.a.new_zeros(heights[part], piece.rank)
                for piece in pieces
            ],
            dim=1,
        )
        for part in parts
    }
    return Piece(torch.cat([piece.a for piece in pieces]), b)


def _rejoin(pieces: list[Piece]) -> list[Piece]:
    """Joins pieces on different parts with equal A's: fused updates, split by copying A."""
    result: list[Piece] = []
    for piece in pieces:
        for index, other in enumerate(result):
            if not piece.b.keys() & other.b.keys() and _equal(piece.a, other.a):
                result[index] = Piece(piece.a, dict(sorted({**other.b, **piece.b}.items())))
                break
        else:
            result.append(piece)
    return result


def _equal(a: Tensor, b: Tensor) -> bool:
    # the first row settles nearly every comparison
    return a.shape == b.shape and torch.equal(a[:1], b[:1]) and torch.equal(a, b)


# ---------------------------------------------------------------- sums and differences


def scaled(lora: LoraWeights, strength: float) -> LoraWeights:
    """Returns the update times `strength`."""
    if strength == 1:
        return lora

    def times(b: dict[int, Tensor]) -> dict[int, Tensor]:
        return {part: tensor * strength for part, tensor in b.items()}

    biases = {module: times(bias) for module, bias in lora.biases.items()}
    lora = _changed(lora, lambda pieces: [Piece(p.a, times(p.b)) for p in pieces])
    return replace(lora, biases=biases)


def _changed(lora: LoraWeights, change: Callable[[list[Piece]], list[Piece]]) -> LoraWeights:
    """Returns the LoRA with other pieces for each linear."""
    pieces, text = (
        {module: change(pieces) for module, pieces in table.items()}
        for table in (lora.pieces, lora.text)
    )
    return replace(lora, pieces=pieces, text=text)


def balanced(lora: LoraWeights) -> LoraWeights:
    """Returns the same update, exactly, with A and B of similar size, best for 16-bit floats. A
    linear's pieces all get the same power of two, so that a shared A stays shared.
    """

    def even(pieces: list[Piece]) -> list[Piece]:
        a = max(piece.a.abs().max().item() for piece in pieces)
        b = max(b.abs().max().item() for piece in pieces for b in piece.b.values())
        if not a or not b:
            return pieces
        power = 2.0 ** round(math.log2(b / a) / 2)
        return [Piece(p.a * power, {part: b / power for part, b in p.b.items()}) for p in pieces]

    return _changed(lora, even)


def merged(loras: list[LoraWeights]) -> LoraWeights:
    """Returns the exact sum: ranks add up. Raises ConfigError for transformers of different widths,
    and for two that set the same norm or embedding.
    """
    widths = [(lora.hidden, lora.mlp) for lora in loras if lora.hidden] or [(0, 0)]
    for hidden, mlp in widths:
        if (hidden, mlp) != widths[0]:
            raise ConfigError(
                f"these LoRAs are of transformers {widths[0][0]} wide with an MLP of "
                f"{widths[0][1]} and {hidden} wide with an MLP of {mlp}: they cannot be added up"
            )
    if len(loras) == 1:
        return loras[0]
    total = LoraWeights(hidden=widths[0][0], mlp=widths[0][1], form=loras[0].form)
    for lora in loras:
        for sums, own in ((total.norms, lora.norms), (total.embeddings, lora.embeddings)):
            if both := sums.keys() & own.keys():
                raise ConfigError(f"two of these LoRAs set {min(both)}: they cannot be added up")
            sums |= own
        for module, pieces in lora.pieces.items():
            total.pieces[module] = total.pieces.get(module, []) + pieces
        for module, pieces in lora.text.items():
            total.text[module] = total.text.get(module, []) + pieces
        for module, bias in lora.biases.items():
            known = total.biases.setdefault(module, {})
            known |= {part: known[part] + b if part in known else b for part, b in bias.items()}
    return total


def difference(
    one: list[Piece], other: list[Piece], only: set[int] | None = None
) -> tuple[float, float]:
    """Returns (max |ΔW difference|, max |ΔW| of `one`) of a linear over the parts that differ.

    Parts with bit-identical factors are not multiplied. only: these parts. Overflow is infinite.
    """
    worst = largest = 0.0
    factors, others = (
        {piece.parts[0]: (piece.a, piece.stacked_b()) for piece in stack_by_parts(split(side))}
        for side in (one, other)
    )
    for part in factors.keys() | others.keys():
        if only is not None and part not in only:
            continue
        a, b = factors.get(part) or _zero(*others[part])
        c, d = others.get(part) or _zero(a, b)
        if _same(a, b, c, d) or _same(*_without_zero_ranks(a, b), *_without_zero_ranks(c, d)):
            continue
        height, columns = len(b), a.shape[1]
        count = max(1, _BLOCK // columns)
        delta = torch.empty(min(count, height), columns)
        for start in range(0, height, count):
            rows = slice(start, start + count)
            block = torch.mm(b[rows], a, out=delta[: height - start])
            largest = max(largest, _largest(block))
            worst = max(worst, _largest(block.addmm_(d[rows], c, alpha=-1)))
    return worst, largest


def _zero(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a[:0], b[:, :0]


def _same(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> bool:
    return torch.equal(a, c) and torch.equal(b, d)


def _without_zero_ranks(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    used = (a != 0).any(dim=1) & (b != 0).any(dim=0)
    return a[used], b[:, used]


def _largest(block: Tensor) -> float:
    # amax and amin take half the time of aminmax
    size = max(block.amax().item(), -block.amin().item())
    return size if math.isfinite(size) else math.inf
