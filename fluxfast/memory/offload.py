"""Saved activations of chosen blocks, in host memory between their forward and their backward.

    forward   block i saves its tensors ── copied out while block i+1 computes ── let go
    backward  two staging buffers: block i computes from one while block i-1 arrives in the other

One pinned arena on the host serves every bucket (one batch shape) and is as large as the largest
needs. After the first pass nothing is allocated: arena, staging buffers and events are used again.
Frees are ordered by events, so the memory in use is the same in every step (`record_stream` would
let go whenever the host happens to look).

What saves the tensors (a saved-tensor hook around a block) and this module meet in two objects:

    class BlockStore:                                one per offloaded block and forward pass
        put(flat: Tensor) -> handle                  a whole storage as a 1-D tensor of its dtype;
                                                     in the block's forward, once per storage
        get(handle) -> Tensor                        in backward: 1-D, same dtype and length, with a
                                                     storage of its own, valid until the block's
                                                     backward is over

    class Offload:
        prepare(key, {block: bytes})                 before the first begin(key)
        begin(key)                                   a forward pass of this bucket starts
        block(i) -> BlockStore                       block i, an offloaded one, is about to start
        block_forward_done(i)                        after every block's forward, kept ones too
        forward_done()                               all blocks' forwards are launched
        block_backward_done(i)                       block i's backward is launched

Block numbers count all blocks in the order of the forward pass. `timeline.predict` is this schedule
as arithmetic.
"""

import logging
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from fluxfast.memory.copies import Copies
from fluxfast.memory.planner.timeline import LAG, STAGING_BUFFERS, aligned, room

log = logging.getLogger(__name__)


class ArenaOverflow(RuntimeError):
    """A block wants more of the arena than was prepared for it."""


@dataclass(frozen=True)
class _Handle:
    """Where a storage lies: bytes from the start of its block's region, and what it is."""

    offset: int
    nbytes: int
    dtype: torch.dtype


@dataclass
class _Bucket:
    """One batch shape: where in the arena each block's region starts, in bytes."""

    block_bytes: dict[int, int]
    starts: dict[int, int] = field(default_factory=dict)
    host_bytes: int = 0

    def __post_init__(self):
        for index in sorted(self.block_bytes):
            self.starts[index] = self.host_bytes
            self.host_bytes += room(self.block_bytes[index])


class BlockStore:
    """What one offloaded block saves in one forward pass."""

    def __init__(self, engine: "Offload", index: int, limit: int):
        self._engine, self._index, self._limit = engine, index, limit
        self._pass = engine._pass
        self.nbytes = 0  # put so far
        self.end = 0  # of what was put, in bytes from the start of the region
        self.sources: list[tuple[Tensor, int]] = []  # (flat, offset), until they are let go

    def put(self, flat: Tensor) -> _Handle:
        """Take a storage's content, 1-D and contiguous, to the host. The tensor must not be written
        any more. Raises ArenaOverflow beyond the bytes that were prepared.
        """
        assert flat.dim() == 1 and flat.is_contiguous(), (flat.shape, flat.stride())
        nbytes, offset = flat.numel() * flat.element_size(), aligned(self.end)
        if self.nbytes + nbytes > self._limit or offset + nbytes > room(self._limit):
            raise ArenaOverflow(
                f"block {self._index} wants {self.nbytes + nbytes} bytes of the arena "
                f"({nbytes} more, {len(self.sources)} storages put), {self._limit} were prepared"
            )
        self._engine._count(nbytes)
        self.nbytes, self.end = self.nbytes + nbytes, offset + nbytes
        if nbytes:
            self.sources.append((flat, offset))
        return _Handle(offset, nbytes, flat.dtype)

    def get(self, handle: _Handle) -> Tensor:
        """The content again, on the device, until the block's backward is over. Compute waits for
        its arrival; the host does not. Raises RuntimeError where another pass has begun since, or
        the block's backward is not the one that is due.
        """
        staging = self._engine._arrived(self._index, self._pass)
        content = staging[handle.offset : handle.offset + handle.nbytes]
        # a storage of its own over the same memory: `as_strided` with a saved offset counts from
        # the start of the storage
        return from_dlpack(to_dlpack(content)).view(handle.dtype)


class Offload:
    """The schedule of the copies of one model.

    lag: the sources of block i are let go before block i + lag starts, at the latest before the
    next but one offloaded block: at most two blocks' sources are in flight. A larger lag gives
    copies that last longer than a block more time, and holds their sources for longer. That the
    arena has to grow after the first pass is logged.
    """

    def __init__(self, copies: Copies, *, lag: int = LAG):
        if lag < 1:
            raise ValueError(f"lag must be at least 1, got {lag}")
        self._copies, self._lag = copies, lag
        self._buckets: dict[Hashable, _Bucket] = {}
        self._arena: Tensor | None = None
        self._staging: list[Tensor] = []
        self._computed = copies.event()  # recorded and waited for at once, again and again
        self._arrivals = [copies.event() for _ in range(STAGING_BUFFERS)]
        self._copied: dict[int, Any] = {}  # block -> the event of its copy out
        self._begun = False
        self._pass = 0  # counts passes: a handle of an earlier one is refused
        self._bucket: _Bucket | None = None
        self.in_flight_bytes = 0  # of sources that are not let go yet
        self.most_in_flight_bytes = 0  # since the pass began
        self._clear()

    @property
    def host_bytes(self) -> int:
        """Of the arena."""
        return 0 if self._arena is None else self._arena.numel()

    @property
    def staging_bytes(self) -> int:
        """Of the staging buffers on the device."""
        return sum(buffer.numel() for buffer in self._staging)

    def reserve(self, host_bytes: int) -> None:
        """Allocate the arena now, for the largest bucket that will come: see
        `Timeline.host_bytes`.
        """
        if host_bytes > self.host_bytes:
            self.abandon()
            self._copies.synchronize()  # sync: the old arena is unmapped
            self._arena = None  # freed before the larger one is asked for
            self._arena = self._copies.alloc_host(host_bytes)

    def prepare(self, key: Hashable, block_bytes: dict[int, int]) -> None:
        """Make room for a bucket: per offloaded block, the bytes that it will put.

        Memory for all buckets that are known comes with the first `begin`; a larger bucket after
        that re-allocates it, and gives up a pass whose backward is not over. Raises ArenaOverflow
        for a known key with other sizes, ValueError for a size that is not positive.
        """
        if bad := {index: n for index, n in block_bytes.items() if n <= 0}:
            raise ValueError(f"an offloaded block puts at least one byte, got {bad}")
        if known := self._buckets.get(key):
            for index in sorted(known.block_bytes.keys() | block_bytes.keys()):
                was, wanted = known.block_bytes.get(index, 0), block_bytes.get(index, 0)
                if was != wanted:
                    raise ArenaOverflow(
                        f"bucket {key!r}, block {index} wants {wanted} bytes of the arena, "
                        f"{was} were prepared"
                    )
            return
        self._buckets[key] = _Bucket(dict(block_bytes))
        for index in block_bytes:
            if index not in self._copied:
                self._copied[index] = self._copies.event()
        if self._begun:
            self._allocate()

    def begin(self, key: Hashable) -> None:
        """A forward pass starts. What is left of a pass that had no backward is given up."""
        if key not in self._buckets:
            raise RuntimeError(f"bucket {key!r} was not prepared for offload")
        if not self._begun:
            self._allocate()
            self._begun = True
        self.abandon()
        self._bucket = self._buckets[key]
        self.most_in_flight_bytes = 0

    def block(self, index: int) -> BlockStore:
        """Block `index` is about to start, and what it saves is to go to the returned store."""
        if self._bucket is None or index not in self._bucket.block_bytes:
            raise RuntimeError(f"block {index} was not prepared for offload in this pass")
        self._release(index, most=1)
        store = BlockStore(self, index, self._bucket.block_bytes[index])
        self._stores[index] = store
        return store

    def block_forward_done(self, index: int) -> None:
        """Block `index`, offloaded or not, has been launched: its copies start when it is done."""
        store = self._stores.get(index)
        if store is not None and store.sources and index not in self._pending:
            self._copies.record_compute(self._computed)
            assert self._bucket is not None and self._arena is not None
            start = self._bucket.starts[index]
            for number, (flat, offset) in enumerate(store.sources, 1):
                source = flat.detach().view(torch.uint8)
                target = self._arena[start + offset :][: source.numel()]
                done = self._copied[index] if number == len(store.sources) else None
                self._copies.copy_out(source, target, [self._computed], done)
            self._pending.append(index)
        self._release(index + 1)

    def forward_done(self) -> None:
        """The backward pass comes next: what it needs first is fetched. Raises RuntimeError where a
        block's forward was begun and not declared over.
        """
        self._release()
        if still := [index for index, store in self._stores.items() if store.sources]:
            raise RuntimeError(f"block_forward_done was not called for the blocks {still}")
        # after all copies out, and after what may have read the staging buffers before
        self._copies.record_compute(self._computed)
        self._queue.extend(i for i in sorted(self._stores, reverse=True) if self._stores[i].end)
        for buffer in range(len(self._staging)):
            self._fill(buffer)

    def block_backward_done(self, index: int) -> None:
        """Block `index`, offloaded or not, is done with what `get` gave."""
        if index in self._held:
            buffer, _ = self._held.pop(index)
            self._copies.record_compute(self._computed)
            self._fill(buffer)

    def abandon(self) -> None:
        """Give up the pass: every tensor that the engine holds for it is let go. `begin` does so by
        itself; call it where the memory is wanted before, as after an out-of-memory error. What
        copies still read or write is used again after compute has waited for them.
        """
        self._release()
        for buffer, waited in self._held.values():
            if not waited:
                self._copies.compute_wait(self._arrivals[buffer])
        for store in self._stores.values():  # the graph may hold them for longer
            store.sources.clear()
        self._clear()
        self._pass += 1

    def _allocate(self) -> None:
        """Room for the largest of all buckets."""
        host = max((bucket.host_bytes for bucket in self._buckets.values()), default=0)
        sizes = [bucket.block_bytes for bucket in self._buckets.values()]
        largest = max((room(n) for blocks in sizes for n in blocks.values()), default=0)
        count = max(map(len, sizes), default=0)
        count = min(STAGING_BUFFERS, count)
        if host > self.host_bytes:
            if self._begun:
                log.warning(
                    f"note: the offload arena grows from {self.host_bytes / 2**30:.2f} to "
                    f"{host / 2**30:.2f} GiB of host memory"
                )
            self.reserve(host)
        if count > len(self._staging) or largest * count > self.staging_bytes:
            self.abandon()
            self._staging = []
            self._staging = [self._copies.alloc_device(largest) for _ in range(count)]

    def _clear(self) -> None:
        self._stores: dict[int, BlockStore] = {}
        self._pending: deque[int] = deque()  # copied out, sources not let go
        self._queue: deque[int] = deque()  # blocks to fetch, the one needed first in front
        self._held: dict[int, tuple[int, bool]] = {}  # block -> (staging buffer, waited for)
        self.in_flight_bytes = 0

    def _release(self, start: int | None = None, most: int = STAGING_BUFFERS) -> None:
        """Drop sources before block `start` begins, all of them where it is None; at most `most`
        blocks keep theirs.
        """
        while self._pending:
            index = self._pending[0]
            if start is not None and index + self._lag > start and len(self._pending) <= most:
                break
            # memory that is freed now is used again by compute: it has to wait for the copy
            self._copies.compute_wait(self._copied[index])
            store = self._stores[index]
            store.sources.clear()
            self.in_flight_bytes -= store.nbytes
            self._pending.popleft()

    def _count(self, nbytes: int) -> None:
        self.in_flight_bytes += nbytes
        self.most_in_flight_bytes = max(self.most_in_flight_bytes, self.in_flight_bytes)

    def _fill(self, buffer: int) -> None:
        """Fetch the next block into a staging buffer that compute is done with."""
        if not self._queue:
            return
        assert self._bucket is not None and self._arena is not None
        index = self._queue.popleft()
        end, start = self._stores[index].end, self._bucket.starts[index]
        source, target = self._arena[start : start + end], self._staging[buffer][:end]
        self._copies.copy_in(source, target, [self._computed], self._arrivals[buffer])
        self._held[index] = (buffer, False)

    def _arrived(self, index: int, number: int) -> Tensor:
        """The staging buffer that holds a block; compute waits for it the first time."""
        if number != self._pass:
            raise RuntimeError(
                f"block {index}: a new pass has begun since these tensors were saved; offload "
                "needs each forward pass followed by its own backward pass"
            )
        if index not in self._held:
            raise RuntimeError(
                f"block {index} is not in a staging buffer, {sorted(self._held)} are: either its "
                "backward was declared over, or the backward passes are not in reverse order"
            )
        buffer, waited = self._held[index]
        if not waited:
            self._copies.compute_wait(self._arrivals[buffer])
            self._held[index] = (buffer, True)
        return self._staging[buffer]
