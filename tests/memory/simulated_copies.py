"""Stand-ins for `fluxfast.memory.copies.CudaCopies` on a virtual clock in CPU memory, and a random
model that offloads through them.
"""

import heapq
import math
import random
import weakref
from collections import Counter
from types import SimpleNamespace

import torch
from torch import Tensor

from fluxfast.memory.offload import Offload

POISON = 0xFF  # bytes of staging memory that nothing has arrived in: a NaN in fp32, bf16 and fp16
DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)


class SimulatedCopies:
    """Copies on a virtual clock: exact, repeatable, and nobody sleeps.

    `now` is the compute stream's time. `advance(seconds)` computes; `compute_wait` moves `now` to
    the event. The bytes of a copy move when `now` passes its end, and a destination on the device
    holds POISON from the call until then: a use before arrival shows, and so does a source that is
    overwritten too early. At the default bandwidth copies take no time.
    """

    def __init__(self, bandwidth: float = math.inf):
        self.device = torch.device("cpu")
        self.now = 0.0
        self.host, self.buffers = [], []  # what was allocated: bytes on the host, device buffers
        self._bandwidth = bandwidth
        self._free = {"out": 0.0, "in": 0.0}  # when the copies of a direction are over
        self._pending: list[tuple[float, int, Tensor, Tensor]] = []  # a heap
        self._count = 0

    def alloc_host(self, nbytes: int) -> Tensor:
        self.host.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def alloc_device(self, nbytes: int) -> Tensor:
        self.buffers.append(torch.full((nbytes,), POISON, dtype=torch.uint8))
        return self.buffers[-1]

    def compute_wait(self, event: SimpleNamespace) -> None:
        self._move(max(self.now, event.time))

    def advance(self, seconds: float) -> None:
        """Compute for this long."""
        self._move(self.now + seconds)

    def copy_out(self, pairs) -> SimpleNamespace:
        return self._copy("out", list(pairs))

    def copy_in(self, pairs) -> SimpleNamespace:
        pairs = list(pairs)
        for _, target in pairs:
            target.fill_(POISON)
        return self._copy("in", pairs)

    def _copy(self, direction: str, pairs: list[tuple[Tensor, Tensor]]) -> SimpleNamespace:
        end = max(self.now, self._free[direction])
        for source, target in pairs:
            end += source.numel() / self._bandwidth
            self._count += 1
            heapq.heappush(self._pending, (end, self._count, _alias(source), _alias(target)))
        self._free[direction] = end
        return SimpleNamespace(time=end)

    def _move(self, now: float) -> None:
        self.now = now
        while self._pending and self._pending[0][0] <= now:
            _, _, source, target = heapq.heappop(self._pending)
            target.copy_(source)


def _alias(tensor: Tensor) -> Tensor:
    """The same bytes, without a reference to the tensor: as on a device, only its user keeps it."""
    empty = torch.empty(0, dtype=torch.uint8)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, (1,))


class OrderedCopies(SimulatedCopies):
    """Notes accesses of one memory by different streams, one of them a write, that no event orders:
    vector clocks, as race detectors keep them. Time and luck play no part.
    """

    def __init__(self):
        super().__init__()
        self.clocks = {stream: Counter() for stream in ("compute", "out", "in")}
        self.accesses, self.problems = [], []

    def touch(self, stream: str, memory: Tensor, write: bool) -> None:
        clock = self.clocks[stream]
        clock[stream] += 1
        start = memory.data_ptr()
        end = start + memory.nbytes
        for other, tick, first, last, wrote in self.accesses:
            overlap = first < end and start < last and (write or wrote)
            if overlap and other != stream and clock[other] < tick:
                self.problems.append(f"{stream} races with {other}")
        self.accesses.append((stream, clock[stream], start, end, write))

    def compute_wait(self, event):
        super().compute_wait(event)
        self.clocks["compute"] |= event.clock

    def _copy(self, direction, pairs):
        event = super()._copy(direction, pairs)
        self.clocks[direction] |= self.clocks["compute"]
        for source, target in pairs:
            self.touch(direction, source, write=False)
            self.touch(direction, target, write=True)
        event.clock = Counter(self.clocks[direction])
        return event


def storage(numel: int, dtype: torch.dtype, rng: random.Random, copies=None) -> Tensor:
    """A flat tensor whose memory is written over, by compute, as soon as nobody holds it."""
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    nbytes = numel * dtype.itemsize
    memory = torch.randint(0, POISON, (nbytes,), generator=g, dtype=torch.uint8)
    flat = torch.empty(0, dtype=dtype).set_(memory.view(dtype).untyped_storage())
    weakref.finalize(flat, memory.fill_, POISON)
    if isinstance(copies, OrderedCopies):
        copies.touch("compute", memory, write=True)
        weakref.finalize(flat, copies.touch, "compute", memory, write=True)
    return flat


def content(flat: Tensor) -> bytes:
    return flat.view(torch.uint8).numpy().tobytes()


class RandomModel:
    """Durations of blocks, what each block saves, and passes over them.

    aligned: all storages of a block but its last are whole multiples of 256 bytes, as activations
    are, so that no padding travels.
    """

    def __init__(self, seed: int, aligned: bool = False):
        self.rng = rng = random.Random(seed)
        self.blocks = range(rng.randint(1, 12))
        self.forward = [rng.uniform(0.1, 2.0) for _ in self.blocks]
        self.backward = [rng.uniform(0.1, 4.0) for _ in self.blocks]
        self.bandwidth = rng.uniform(500, 20_000)
        self.storages = []  # per block, (numel, dtype)
        for _ in self.blocks:
            count = rng.randint(1, 4) if rng.random() < 0.6 else 0
            sizes = [(rng.randint(1, 700), rng.choice(DTYPES)) for _ in range(count)]
            if aligned:
                sizes[:-1] = [(-(-n // 256) * 256, dtype) for n, dtype in sizes[:-1]]
            self.storages.append(sizes)
        self.sizes = [sum(n * dtype.itemsize for n, dtype in each) for each in self.storages]
        self.offloaded = {i: nbytes for i, nbytes in enumerate(self.sizes) if nbytes}
        self.most_in_flight = 0  # bytes of sources that a forward pass held at once

    def run_forward(self, engine: Offload, copies, bucket="bucket") -> dict:
        engine.select(bucket)
        engine.begin()
        expected = {}
        for i in self.blocks:
            store = engine.block(i) if self.sizes[i] else None
            copies.advance(self.forward[i])
            for numel, dtype in self.storages[i]:
                flat = storage(numel, dtype, self.rng, copies)
                expected.setdefault(i, []).append((store, store.put(flat), dtype, content(flat)))
                del flat
            held = sum(flat.nbytes for s in engine._stores.values() for flat, _ in s.sources)
            self.most_in_flight = max(self.most_in_flight, held)
            engine.block_forward_done(i)
        engine.forward_done()
        return expected

    def run_backward(self, engine: Offload, copies, expected: dict) -> None:
        for i in reversed(self.blocks):
            tensors = [(s.get(handle), *rest) for s, handle, *rest in expected.get(i, [])]
            self.compare(tensors, copies)
            copies.advance(self.backward[i])
            self.compare(tensors, copies)  # still there when the block's backward is over
            engine.block_backward_done(i)

    def compare(self, tensors: list, copies) -> None:
        for flat, dtype, data in tensors:
            assert flat.dim() == 1 and flat.dtype == dtype and flat.storage_offset() == 0
            starts = [buffer.data_ptr() for buffer in copies.buffers]
            assert any((flat.data_ptr() - start) % 256 == 0 for start in starts)
            if isinstance(copies, OrderedCopies):
                copies.touch("compute", flat, write=False)
            assert content(flat) == data
