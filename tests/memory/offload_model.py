"""A random model that offloads, and copies that record what the engine does."""

import random
import weakref
from collections import Counter

import torch
from simulated_copies import POISON, SimulatedCopies

from fluxfast.memory.offload import Offload

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)


class Counting(SimulatedCopies):
    """Counts what it is asked to allocate."""

    def __init__(self, *bandwidths: float):
        super().__init__(*bandwidths)
        self.host, self.device_memory, self.addresses, self.events = [], [], [], 0

    def alloc_host(self, nbytes):
        self.host.append(nbytes)
        return super().alloc_host(nbytes)

    def alloc_device(self, nbytes):
        self.device_memory.append(nbytes)
        memory = super().alloc_device(nbytes)
        self.addresses.append(memory.data_ptr())
        return memory

    def event(self):
        self.events += 1
        return super().event()


class Ordered(Counting):
    """Notes accesses of one memory by different streams, one of them a write, that no event orders:
    vector clocks, as race detectors keep them. Time and luck play no part.
    """

    def __init__(self):
        super().__init__()
        self.clocks = {stream: Counter() for stream in ("compute", "out", "in")}
        self.accesses, self.synced, self.problems = [], Counter(), []

    def touch(self, stream: str, memory: torch.Tensor, write: bool) -> None:
        clock = self.clocks[stream]
        clock[stream] += 1
        start = memory.data_ptr()
        end = start + memory.nbytes
        for other, tick, first, last, wrote in self.accesses:
            overlap = first < end and start < last and (write or wrote)
            if overlap and other != stream and clock[other] < tick:
                self.problems.append(f"{stream} races with {other}")
        self.accesses.append((stream, clock[stream], start, end, write))

    def alloc_host(self, nbytes):
        memory = super().alloc_host(nbytes)
        weakref.finalize(memory, self.unmapped, memory.data_ptr(), nbytes)
        return memory

    def unmapped(self, address: int, nbytes: int) -> None:
        """By the host, which waits for nobody unless it was told to."""
        for stream, tick, first, last, _ in self.accesses:
            if first < address + nbytes and address < last and self.synced[stream] < tick:
                self.problems.append(f"host memory is gone before {stream} was done with it")

    def event(self):
        event = super().event()
        event.clock = Counter()
        return event

    def record_compute(self, event):
        super().record_compute(event)
        event.clock = Counter(self.clocks["compute"])

    def compute_wait(self, event):
        super().compute_wait(event)
        self.clocks["compute"] |= event.clock

    def copy_out(self, src, dst, after=(), done=None):
        super().copy_out(src, dst, after, done)
        self._follow("out", src, dst, after, done)

    def copy_in(self, src, dst, after=(), done=None):
        super().copy_in(src, dst, after, done)
        self._follow("in", src, dst, after, done)

    def synchronize(self):
        super().synchronize()
        self.synced = everything = self.clocks["compute"] | self.clocks["out"] | self.clocks["in"]
        self.clocks = {stream: Counter(everything) for stream in self.clocks}

    def _follow(self, stream, src, dst, after, done):
        for event in after:
            self.clocks[stream] |= event.clock
        self.touch(stream, src, write=False)
        self.touch(stream, dst, write=True)
        if done is not None:
            done.clock = Counter(self.clocks[stream])


def storage(numel: int, dtype: torch.dtype, rng: random.Random, copies=None) -> torch.Tensor:
    """A flat tensor whose memory is written over, by compute, as soon as nobody holds it."""
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    nbytes = numel * dtype.itemsize
    memory = torch.randint(0, POISON, (nbytes,), generator=g, dtype=torch.uint8)
    flat = torch.empty(0, dtype=dtype).set_(memory.view(dtype).untyped_storage())
    weakref.finalize(flat, memory.fill_, POISON)
    if isinstance(copies, Ordered):
        copies.touch("compute", memory, write=True)
        weakref.finalize(flat, copies.touch, "compute", memory, write=True)
    return flat


def content(flat: torch.Tensor) -> bytes:
    return flat.view(torch.uint8).numpy().tobytes()


class Plan:
    """A random model: durations, and what each block puts.

    aligned: all storages of a block but its last are whole multiples of 256 bytes, as activations
    are, so that no padding travels.
    """

    def __init__(self, seed: int, aligned: bool = False):
        self.rng = rng = random.Random(seed)
        self.blocks = rng.randint(1, 12)
        self.forward = [rng.uniform(0.1, 2.0) for _ in range(self.blocks)]
        self.backward = [rng.uniform(0.1, 4.0) for _ in range(self.blocks)]
        self.lag = rng.choice([1, 2, 2, 3, 5])
        self.bandwidths = rng.uniform(500, 20_000), rng.uniform(500, 20_000)
        self.storages = []  # per block, (numel, dtype)
        for _ in range(self.blocks):
            count = rng.randint(1, 4) if rng.random() < 0.6 else 0
            sizes = [(rng.randint(1, 700), rng.choice(DTYPES)) for _ in range(count)]
            if aligned:
                sizes[:-1] = [(-(-n // 256) * 256, dtype) for n, dtype in sizes[:-1]]
            self.storages.append(sizes)
        self.sizes = [sum(n * dtype.itemsize for n, dtype in each) for each in self.storages]

    def prepare(self, engine: Offload, key="bucket") -> None:
        engine.prepare(key, {i: nbytes for i, nbytes in enumerate(self.sizes) if nbytes})

    def run_forward(self, engine: Offload, copies, key="bucket") -> dict:
        engine.begin(key)
        expected = {}
        for i in range(self.blocks):
            keeper = engine.block(i) if self.sizes[i] else None
            copies.advance(self.forward[i])
            for numel, dtype in self.storages[i]:
                flat = storage(numel, dtype, self.rng, copies)
                expected.setdefault(i, []).append((keeper, keeper.put(flat), dtype, content(flat)))
                del flat
            engine.block_forward_done(i)
        engine.forward_done()
        return expected

    def run_backward(self, engine: Offload, copies, expected: dict) -> None:
        for i in reversed(range(self.blocks)):
            got = [(k.get(handle), dtype, data) for k, handle, dtype, data in expected.get(i, [])]
            self.compare(got, copies)
            copies.advance(self.backward[i])
            self.compare(got, copies)  # still there when the block's backward is over
            engine.block_backward_done(i)

    def compare(self, got: list, copies) -> None:
        for flat, dtype, data in got:
            assert flat.dim() == 1 and flat.dtype == dtype and flat.storage_offset() == 0
            assert any((flat.data_ptr() - start) % 256 == 0 for start in copies.addresses)
            if isinstance(copies, Ordered):
                copies.touch("compute", flat, write=False)
            assert content(flat) == data
