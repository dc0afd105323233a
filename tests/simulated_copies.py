"""Stand-ins for `fluxfast.memory.copies.CudaCopies` in CPU memory: on a virtual clock, and over
threads that sleep.
"""

import heapq
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

POISON = 0xFF  # bytes of staging memory that nothing has arrived in: a NaN in fp32, bf16 and fp16


class _Moment:
    """An event on the virtual clock: when it happens, in seconds."""

    def __init__(self):
        self.time = 0.0


class SimulatedCopies:
    """Copies on a virtual clock, in CPU memory: exact, repeatable, and nobody sleeps.

    `now` is the compute stream's time. `advance(seconds)` computes; `compute_wait` moves `now` to
    the event. The bytes of a copy move when `now` passes its end, and a destination on the device
    holds POISON from the call until then: a use before arrival shows, and so does a source that is
    overwritten too early. At the default bandwidth copies take no time: for training on a CPU.
    """

    def __init__(self, bandwidth_out: float = math.inf, bandwidth_in: float | None = None):
        self.device = torch.device("cpu")
        self.now = 0.0
        self._bandwidth = (bandwidth_out, bandwidth_out if bandwidth_in is None else bandwidth_in)
        self._free = [0.0, 0.0]  # when the copies of a direction are over
        self._pending: list[tuple[float, int, Tensor, Tensor]] = []  # a heap
        self._count = 0

    def alloc_host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def alloc_device(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def event(self) -> _Moment:
        return _Moment()

    def record_compute(self, event: _Moment) -> None:
        event.time = self.now

    def compute_wait(self, event: _Moment) -> None:
        self._move(max(self.now, event.time))

    def advance(self, seconds: float) -> None:
        """Compute for this long."""
        self._move(self.now + seconds)

    def copy_out(self, src: Tensor, dst: Tensor, after=(), done=None) -> None:
        self._copy(0, src, dst, after, done)

    def copy_in(self, src: Tensor, dst: Tensor, after=(), done=None) -> None:
        dst.fill_(POISON)
        self._copy(1, src, dst, after, done)

    def synchronize(self) -> None:
        self._move(max(self.now, *self._free))

    def _copy(self, direction: int, src: Tensor, dst: Tensor, after, done) -> None:
        start = max(self.now, self._free[direction], *(event.time for event in after))
        end = self._free[direction] = start + src.numel() / self._bandwidth[direction]
        self._count += 1
        heapq.heappush(self._pending, (end, self._count, _alias(src), _alias(dst)))
        if done is not None:
            done.time = end

    def _move(self, now: float) -> None:
        self.now = now
        while self._pending and self._pending[0][0] <= now:
            _, _, src, dst = heapq.heappop(self._pending)
            dst.copy_(src)


def _alias(tensor: Tensor) -> Tensor:
    """The same bytes, without a reference to the tensor: as on a device, only its user keeps it."""
    empty = torch.empty(0, dtype=torch.uint8)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, (1,))


class _Ticket:
    """An event of the threads: the work whose end it is, None where it has happened."""

    def __init__(self):
        self.work: Future | None = None


class ThreadedCopies:
    """Copies in CPU memory by one thread per direction that sleeps as long as a link would take."""

    def __init__(self, bandwidth_out: float, bandwidth_in: float | None = None):
        self.device = torch.device("cpu")
        self._bandwidth = (bandwidth_out, bandwidth_out if bandwidth_in is None else bandwidth_in)
        self._threads = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]

    def alloc_host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def alloc_device(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def event(self) -> _Ticket:
        return _Ticket()

    def record_compute(self, event: _Ticket) -> None:
        event.work = None  # on a CPU what was called is done

    def compute_wait(self, event: _Ticket) -> None:
        if event.work is not None:
            event.work.result()

    def copy_out(self, src: Tensor, dst: Tensor, after=(), done=None) -> None:
        self._copy(0, src, dst, after, done)

    def copy_in(self, src: Tensor, dst: Tensor, after=(), done=None) -> None:
        self._copy(1, src, dst, after, done)

    def synchronize(self) -> None:
        for thread in self._threads:
            thread.submit(lambda: None).result()

    def _copy(self, direction: int, src: Tensor, dst: Tensor, after, done) -> None:
        before = [event.work for event in after if event.work is not None]

        def work() -> None:
            for other in before:
                other.result()
            if direction == 1:
                dst.fill_(POISON)
            time.sleep(src.numel() / self._bandwidth[direction])
            dst.copy_(src)

        future = self._threads[direction].submit(work)
        if done is not None:
            done.work = future
