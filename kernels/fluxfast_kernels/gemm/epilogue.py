"""The epilogue of a frozen weight's matmul: the LoRA update, bias, gate and residual.

    Y = total + s·down·Upᵀ + bias;   residual + gate·Y where these are given

`dense.py` and `eight_bit.py` share it. total is fp32 in registers; the rank-R matmul runs in the
compute dtype into the same sum. One rounding to the output's dtype at the end.

Here are also the NamedTuples that the ops hand down: `LoRAUpdate` and `Epilogue` on the host,
`Update`, `After`, `Outputs` and the compile-time `Spec` as kernels take them.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast_kernels.dispatch.backend import Matrix, matrix, tl, triton
from fluxfast_kernels.dispatch.dispatch import Tile

# ---------------------------------------------------------------- on the host


class LoRAUpdate(NamedTuple):
    """A low-rank update of some rows of a layer: y[..., start:end] += scale · (x A_indexᵀ) B_partᵀ.

    lora_a: fp32 [P·R, K], P matrices A stacked; lora_b: fp32 [N', R], the parts' rows one after the
    other; parts: flat (start, end, index of A) triples, ascending.
    """

    lora_a: Tensor
    lora_b: Tensor
    parts: Sequence[int]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_b.shape[1]

    def slices(self, low: int = 0, high: int | None = None) -> Iterator[tuple[slice, slice, slice]]:
        """Yields each part's rows of y, of B and of A. low, high: only y's rows in that range,
        counted from low."""
        row = 0
        starts, ends, indices = (self.parts[i::3] for i in range(3))
        for start, end, index in zip(starts, ends, indices, strict=True):
            first, last = max(start, low), end if high is None else min(end, high)
            if first < last:
                b_rows = slice(row + first - start, row + last - start)
                a_rows = slice(index * self.rank, (index + 1) * self.rank)
                yield slice(first - low, last - low), b_rows, a_rows
            row += end - start


class Epilogue(NamedTuple):
    """gate [B, 1, N] and residual [B, T, N], both or neither: the result is residual + gate · y.
    split: columns of the first of two outputs, 0 for one output."""

    gate: Tensor | None = None
    residual: Tensor | None = None
    split: int = 0

    def widths(self, N: int) -> list[int]:
        """Returns the columns of each output of a layer with N of them."""
        return [self.split, N - self.split] if self.split else [N]


NOTHING = Epilogue()


class Part(NamedTuple):
    """Rows start to end of y are updated by A number `index` and B's rows from `row` on."""

    start: int
    end: int
    index: int
    row: int


# ---------------------------------------------------------------- as kernels take them


class Update(NamedTuple):
    """down [M, P·R] of last stride 1 and, with the strides of output column and rank, Up. rank: R,
    which the `Spec` has too."""

    down_ptr: Tensor
    down_stride: int
    up_ptr: Tensor
    column_stride: int
    rank_stride: int
    scale: float
    rank: int


class After(NamedTuple):
    """What is added to a matmul, each None where there is none. gate_stride: a batch's."""

    update: Update | None
    bias_ptr: Tensor | None = None
    gate_ptr: Tensor | None = None
    gate_stride: int | None = None
    residual: Matrix | None = None


def after_of(update: Update | None, bias: Tensor | None, epilogue: Epilogue) -> After:
    """epilogue.split is the outputs' concern."""
    gate = epilogue.gate
    gate_stride = None if gate is None else gate.stride(0)
    return After(update, bias, gate, gate_stride, matrix(epilogue.residual))


class Outputs(NamedTuple):
    """One output, or two of which the first has `split` columns."""

    first: Matrix
    second: Matrix | None
    split: int


def outputs_of(ys: list[Tensor]) -> Outputs:
    """ys: one or two [B, T, width]."""
    return Outputs(matrix(ys[0]), matrix(ys[1]) if len(ys) == 2 else None, ys[0].shape[2])


class Spec(NamedTuple):
    """What a matmul's kernel is compiled for.

    rank: R; parts: empty where one A feeds all columns; transposed: the weight's tile is transposed
    as it is read, for y; masked: some width is no multiple of the tile's; offsets: a
    nested NF4 weight has an offset per nested block. Of 8-bit matmuls: top, the largest quantized
    value; sum, the dtype of sums; update_dtype, that of the update's matmul.
    """

    tile: Tile
    rank: int
    parts: tuple[Part, ...]
    transposed: bool
    masked: bool
    offsets: bool = False
    top: float = 0.0
    sum: object = None
    update_dtype: object = None


def spec_of(
    tile: Tile, widths: list[int], N: int, *, transposed: bool, parts: tuple[Part, ...] = (), **more
) -> Spec:
    """widths: of the inputs side by side; N: output columns; more: other fields."""
    masked = any(width % tile.block_k for width in widths)
    masked |= not transposed and N % tile.block_n != 0
    if parts == (Part(0, N, 0, 0),):
        parts = ()  # all columns, one A: no branch
    return Spec(tile=tile, parts=parts, transposed=transposed, masked=masked, **more)


TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def tile_at(M, N, SPEC: tl.constexpr):
    """First row and column of this program's tile. group_m rows of tiles share their columns of W
    in L2. (Of a constexpr Triton 3.6 passes numbers and dtypes on, no dataclass: not SPEC.tile.)"""
    program = tl.program_id(0)
    m_tiles = tl.cdiv(M, SPEC.tile.block_m)
    in_group = SPEC.tile.group_m * tl.cdiv(N, SPEC.tile.block_n)
    first_tile = program // in_group * SPEC.tile.group_m
    group_rows = tl.minimum(m_tiles - first_tile, SPEC.tile.group_m)
    m_first = (first_tile + program % in_group % group_rows) * SPEC.tile.block_m
    return m_first, program % in_group // group_rows * SPEC.tile.block_n


@triton.jit
def rows_at(x, m_first, m, T):
    """Address of row m_first of a `Matrix`, and the 32-bit distances of the rows m from it; row m
    is token m % T of batch m // T. (64-bit distances cost more registers than 4 warps have.)"""
    batch, token = m_first // T, m_first % T
    distance = (m // T - batch) * x.batch_stride + (m % T - token) * x.token_stride
    first = x.ptr + batch.to(tl.int64) * x.batch_stride + token.to(tl.int64) * x.token_stride
    return first, distance.to(tl.int32)


@triton.jit
def _add_update(
    total, update, m, n, n_from, n_to, down_first, up_first, dtype: tl.constexpr, RANK: tl.constexpr
):
    """total + down[m, down_first:][RANK]·(scale·up)ᵀ for the columns n_from <= n < n_to."""
    # 16 is the least that `tl.dot` takes
    BLOCK_R: tl.constexpr = 16 if RANK <= 16 else 32  # pyright: ignore
    inside = ((n >= n_from) & (n < n_to))[None, :]
    up_rows = (n - n_from + up_first) * update.column_stride
    # neither pipelined nor, since its length is known at run time alone, unrolled: unrolled it
    # spills at rank 128 (80 to 128 bytes, sm_89, Triton 3.7.1)
    for i in tl.range(0, tl.cdiv(update.rank, BLOCK_R), num_stages=1):
        r = i * BLOCK_R + tl.arange(0, BLOCK_R)
        real = r < RANK
        down_rows = update.down_ptr + m.to(tl.int64)[:, None] * update.down_stride
        down = tl.load(down_rows + (down_first + r)[None, :], real[None, :], other=0.0).to(dtype)
        up_at = update.up_ptr + up_rows[None, :] + (r * update.rank_stride)[:, None]
        up = tl.load(up_at, real[:, None] & inside, other=0.0).to(tl.float32) * update.scale
        total = tl.dot(down, up.to(dtype), total, input_precision="ieee")
    return total


@triton.jit
def finish(
    total, after, out, m, m_first, n_first, M, N, T, dtype: tl.constexpr, SPEC: tl.constexpr
):
    """Adds the update, bias, gate and residual to `total` and stores it. dtype: of the update's
    matmul."""
    BLOCK_N: tl.constexpr = SPEC.tile.block_n
    n = n_first + tl.arange(0, BLOCK_N)
    if after.update is not None:
        if len(SPEC.parts) == 0:
            total = _add_update(total, after.update, m, n, 0, N, 0, 0, dtype, SPEC.rank)
        for i in tl.static_range(len(SPEC.parts)):
            start, end = SPEC.parts[i].start, SPEC.parts[i].end
            if (n_first < end) & (n_first + BLOCK_N > start):
                index, row = SPEC.parts[i].index, SPEC.parts[i].row
                total = _add_update(
                    total, after.update, m, n, start, end, index * SPEC.rank, row, dtype, SPEC.rank
                )

    in_n = n < N
    if after.bias_ptr is not None:
        total += tl.load(after.bias_ptr + n, in_n, other=0.0).to(tl.float32)[None, :]
    inside = (m_first + tl.arange(0, SPEC.tile.block_m) < M)[:, None] & in_n[None, :]
    if after.gate_ptr is not None:
        # one batch after the other: [block_m, block_n] gates and their addresses spill
        first_batch = m_first // T
        last_batch = (tl.minimum(m_first + SPEC.tile.block_m, M) - 1) // T
        gate_at = after.gate_ptr + first_batch.to(tl.int64) * after.gate_stride + n
        for batch in tl.range(first_batch, last_batch + 1, num_stages=1):
            gate = tl.load(gate_at, in_n, other=0.0).to(tl.float32)[None, :]
            total = tl.where((m // T == batch)[:, None], total * gate, total)
            gate_at += after.gate_stride
    if after.residual is not None:
        first, rows = rows_at(after.residual, m_first, m, T)
        residual = tl.load(first + rows[:, None] + n[None, :], inside, other=0.0)
        total += residual.to(tl.float32)
    y = total.to(out.first.ptr.dtype.element_ty)
    first, rows = rows_at(out.first, m_first, m, T)
    if out.second is None:
        tl.store(first + rows[:, None] + n[None, :], y, inside)
    else:
        second, second_rows = rows_at(out.second, m_first, m, T)
        if n_first < out.split:
            at = first + rows[:, None] + n[None, :]
            tl.store(at, y, inside & (n < out.split)[None, :])
        if n_first + BLOCK_N > out.split:
            at = second + second_rows[:, None] + (n - out.split)[None, :]
            tl.store(at, y, inside & (n >= out.split)[None, :])
