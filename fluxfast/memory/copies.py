"""Copies between host and device beside the compute stream: over CUDA streams, over threads, and
on a virtual clock.

The rules of ordering are CUDA's. Copies of one direction run one after the other; a copy starts
when the events in `after` have happened; waiting for an event means its latest record at the time
of the call, so that an event can be recorded again as soon as it has been waited for.
"""

import heapq
import math
import mmap
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from fluxfast.errors import FluxfastError

POISON = 0xFF  # bytes of staging memory that nothing has arrived in: a NaN in fp32, bf16 and fp16


class Copies(Protocol):
    """A backend. Tensors that it copies are uint8, 1-D and contiguous, of equal length."""

    device: torch.device

    def alloc_host(self, nbytes: int) -> Tensor:
        """Pinned host memory, uint8 [nbytes], not initialised."""

    def alloc_device(self, nbytes: int) -> Tensor:
        """Device memory, uint8 [nbytes], not initialised."""

    def event(self) -> Any:
        """A new event, one that has happened. Made once and recorded again and again."""

    def record_compute(self, event: Any) -> None:
        """The event happens when all compute launched so far is done."""

    def compute_wait(self, event: Any) -> None:
        """Compute launched from now on starts after the event."""

    def copy_out(self, src: Tensor, dst: Tensor, after: Sequence[Any] = (), done: Any = None):
        """Device to host. `done` happens with the end of this copy and all earlier ones out."""

    def copy_in(self, src: Tensor, dst: Tensor, after: Sequence[Any] = (), done: Any = None):
        """Host to device. `done` happens with the end of this copy and all earlier ones in."""

    def synchronize(self) -> None:
        """The caller waits until every copy is over."""


class CudaCopies:
    """Two side streams; compute is the caller's current stream. Nothing waits on the host except
    `synchronize`.
    """

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self._out, self._in = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)

    def alloc_host(self, nbytes: int) -> Tensor:
        return pinned(nbytes)

    def alloc_device(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def record_compute(self, event: torch.cuda.Event) -> None:
        event.record(torch.cuda.current_stream(self.device))

    def compute_wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def copy_out(self, src: Tensor, dst: Tensor, after=(), done=None) -> None:
        self._copy(self._out, src, dst, after, done)

    def copy_in(self, src: Tensor, dst: Tensor, after=(), done=None) -> None:
        self._copy(self._in, src, dst, after, done)

    def synchronize(self) -> None:
        self._out.synchronize()
        self._in.synchronize()

    def _copy(self, stream: torch.cuda.Stream, src: Tensor, dst: Tensor, after, done) -> None:
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            dst.copy_(src, non_blocking=True)
        if done is not None:
            done.record(stream)


def pinned(nbytes: int) -> Tensor:
    """Page-locked host memory, uint8 [nbytes], of exactly this size.

    torch's own pinned allocator rounds up to a power of two: 9 GB would take 16. A shared mapping,
    so that a fork (data loading workers) does not turn the parent's pages into copies. Raises
    FluxfastError where the system refuses.
    """
    hint = "offload less (a lower resolution or batch size), or free host memory"
    problem = f"cannot pin {nbytes / 2**30:.2f} GiB of host memory"
    try:
        pages = mmap.mmap(-1, max(nbytes, 1))
    except (OSError, OverflowError) as error:
        raise FluxfastError(f"{problem}: {error}", hint=hint) from None
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    address = memory.data_ptr()
    code = int(torch.cuda.cudart().cudaHostRegister(address, memory.numel(), 0))
    if code:
        raise FluxfastError(f"{problem}: CUDA error {code}", hint=hint)
    # the storage keeps `pages` alive: unregistered after the last view is gone, before the unmap
    finalizer = weakref.finalize(pages, _unregister, address)
    finalizer.atexit = False  # the end of the process does it
    return memory[:nbytes]


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


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
