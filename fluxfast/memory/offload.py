"""Activation offload: what chosen blocks save is in host memory between forward and backward.

    forward   block i saves its tensors ── copied out while block i+1 computes ── released
    backward  two staging buffers: block i computes from one while block i-1 arrives in the other

One pinned arena on the host serves every bucket (batch shape); it and the staging buffers are as
large as the largest bucket needs and are allocated once. Sources are released when compute has
waited for their copy, so the memory in use is the same in every step (`record_stream` would release
them whenever the host happens to look). `timeline.predict` is this schedule as arithmetic.

`BlockRunner` in `model/activations.py` calls the engine. Block numbers count all blocks in the
order of the forward pass.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from fluxfast.memory.copies import Copies
from fluxfast.memory.planner.timeline import LAG, STAGING_BUFFERS, aligned, room


class ArenaOverflow(RuntimeError):
    """A block saves more bytes than the arena has for it."""


_Handle = tuple[slice, torch.dtype]  # a storage's bytes in its block's region of the arena


class BlockStore:
    """What one offloaded block saves in one forward pass. start, limit: of its region in the arena.

    A `Store` as `model/activations.py` defines it.
    """

    def __init__(self, engine: "Offload", index: int, start: int, limit: int):
        self.index, self.start = index, start
        self._engine, self._limit = engine, limit
        self._pass = engine._pass
        self._nbytes = 0  # put so far
        self.end = 0  # of what was put, in bytes from the start of the region
        self.sources: list[tuple[Tensor, int]] = []  # (flat, offset), until they are released

    def put(self, flat: Tensor) -> _Handle:
        """Takes a storage's content, 1-D and contiguous, to the host. Nothing may write to the
        tensor any more. Raises ArenaOverflow beyond the bytes that were planned.
        """
        assert flat.dim() == 1 and flat.is_contiguous(), (flat.shape, flat.stride())
        total, offset = self._nbytes + flat.nbytes, aligned(self.end)
        if total > self._limit or offset + flat.nbytes > room(self._limit):
            raise ArenaOverflow(
                f"block {self.index} saves {total} bytes ({flat.nbytes} more, {len(self.sources)} "
                f"storages before), {self._limit} were planned"
            )
        self._nbytes, self.end = total, offset + flat.nbytes
        if flat.nbytes:
            self.sources.append((flat, offset))
        return slice(offset, self.end), flat.dtype

    def get(self, handle: _Handle) -> Tensor:
        """Returns the content on the device, valid until the block's backward is over. Compute
        waits for its arrival; the host does not. Raises RuntimeError where another pass has begun
        since, or the block's backward is not the one that is due.
        """
        place, dtype = handle
        content = self._engine._arrived(self.index, self._pass)[place]
        # a storage of its own over the same memory: `as_strided` with a saved offset counts from
        # the start of the storage
        return from_dlpack(to_dlpack(content)).view(dtype)


class Offload:
    """Copies what blocks save out and back. At most LAG blocks' sources are in flight: those of
    block i are released before block i + LAG starts.

    buckets: name -> {offloaded block: bytes that it saves}.
    """

    def __init__(self, copies: Copies, buckets: Mapping[str, Mapping[int, int]]):
        self._copies, self._buckets = copies, buckets
        rooms = [[room(nbytes) for nbytes in sizes.values()] for sizes in buckets.values()]
        largest = max((size for sizes in rooms for size in sizes), default=0)
        self.arena = copies.alloc_host(max(map(sum, rooms)))
        count = min(STAGING_BUFFERS, max(map(len, rooms)))
        self.staging = [copies.alloc_device(largest) for _ in range(count)]
        self._sizes: Mapping[int, int] = {}  # of the selected bucket
        self._pass = 0  # counts passes: a handle of an earlier one is refused
        self._used = 0  # bytes of the arena, in this pass
        self._stores: dict[int, BlockStore] = {}
        self._pending: deque[tuple[BlockStore, Any]] = deque()  # (not released, copied-out event)
        self._queue: deque[BlockStore] = deque()  # to fetch, the first needed in front
        self._held: dict[int, tuple[int, Any]] = {}  # block -> (staging buffer, arrival event)

    def select(self, bucket: str) -> None:
        """The passes that begin from now on are of this bucket."""
        self._sizes = self._buckets[bucket]

    def begin(self) -> None:
        """A forward pass starts. A pass that had no backward is abandoned."""
        self.abandon()

    def block(self, index: int) -> BlockStore:
        """Returns where the offloaded block `index`, which is about to start, saves."""
        self._release(index)
        limit = self._sizes[index]
        store = self._stores[index] = BlockStore(self, index, self._used, limit)
        self._used += room(limit)
        return store

    def block_forward_done(self, index: int) -> None:
        """Block `index`, offloaded or not, has been launched: its copies start when it is done."""
        store = self._stores.get(index)
        if store is not None and store.sources:
            pairs = [
                (flat.detach().view(torch.uint8), self.arena[store.start + offset :][: flat.nbytes])
                for flat, offset in store.sources
            ]
            self._pending.append((store, self._copies.copy_out(pairs)))
        self._release(index + 1)

    def forward_done(self) -> None:
        """All blocks' forwards are launched: what backward needs first is fetched."""
        self._release()
        self._queue.extend(store for store in reversed(self._stores.values()) if store.end)
        for buffer in range(len(self.staging)):
            self._fetch(buffer)

    def block_backward_done(self, index: int) -> None:
        """Block `index`, offloaded or not, is done with what `get` returned."""
        if index in self._held:
            buffer, _ = self._held.pop(index)
            self._fetch(buffer)

    def abandon(self) -> None:
        """Releases every tensor held for the current pass, as where memory has run out. Compute
        waits for copies that still read or write that memory.
        """
        self._release()
        for _, arrival in self._held.values():
            self._copies.compute_wait(arrival)
        for store in self._stores.values():  # the graph may hold them for longer
            store.sources.clear()
        for held in (self._stores, self._queue, self._held):
            held.clear()
        self._used = 0
        self._pass += 1

    def _release(self, start: float = math.inf) -> None:
        """Drops sources before block `start` begins, all of them by default."""
        while self._pending:
            store, copied = self._pending[0]
            if store.index + LAG > start:
                break
            # compute uses memory that is freed now: it has to wait for the copy
            self._copies.compute_wait(copied)
            store.sources.clear()
            self._pending.popleft()

    def _fetch(self, buffer: int) -> None:
        """Copies the next block into a staging buffer that compute is done with."""
        if self._queue:
            store = self._queue.popleft()
            source = self.arena[store.start : store.start + store.end]
            pair = source, self.staging[buffer][: store.end]
            self._held[store.index] = buffer, self._copies.copy_in([pair])

    def _arrived(self, index: int, number: int) -> Tensor:
        """Returns the staging buffer that holds a block of pass `number`; compute waits for it."""
        if number != self._pass or index not in self._held:
            raise RuntimeError(
                f"block {index} is not in a staging buffer, {sorted(self._held)} are: a new pass "
                "has begun, the block's backward is over, or backward is not in reverse order"
            )
        buffer, arrival = self._held[index]
        self._copies.compute_wait(arrival)
        return self.staging[buffer]
