"""Copies between host and device beside the compute stream.

The rules of ordering are CUDA's. Copies of one direction run one after the other; a copy starts
when the events in `after` have happened; waiting for an event means its latest record at the time
of the call, so that an event can be recorded again as soon as it has been waited for. Tensors that
are copied are uint8, 1-D, contiguous and of equal length.
"""

import mmap
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fluxfast.errors import FluxfastError


class CudaCopies:
    """Two side streams; compute is the caller's current stream. Only `synchronize` waits on the
    host.
    """

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self._out, self._in = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)

    def alloc_host(self, nbytes: int) -> Tensor:
        """Returns pinned host memory, uint8 [nbytes], not initialized."""
        return pinned(nbytes)

    def alloc_device(self, nbytes: int) -> Tensor:
        """Returns device memory, uint8 [nbytes], not initialized."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def event(self) -> torch.cuda.Event:
        """Returns a new event, one that has happened."""
        return torch.cuda.Event()

    def record_compute(self, event: torch.cuda.Event) -> None:
        """The event happens when all compute launched so far is done."""
        event.record(torch.cuda.current_stream(self.device))

    def compute_wait(self, event: torch.cuda.Event) -> None:
        """Compute launched from now on starts after the event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def copy_out(
        self,
        src: Tensor,
        dst: Tensor,
        after: Sequence[torch.cuda.Event] = (),
        done: torch.cuda.Event | None = None,
    ) -> None:
        """Device to host. `done` happens with the end of this copy and all earlier ones out."""
        self._copy(self._out, src, dst, after, done)

    def copy_in(
        self,
        src: Tensor,
        dst: Tensor,
        after: Sequence[torch.cuda.Event] = (),
        done: torch.cuda.Event | None = None,
    ) -> None:
        """Host to device. `done` happens with the end of this copy and all earlier ones in."""
        self._copy(self._in, src, dst, after, done)

    def synchronize(self) -> None:
        """The caller waits until every copy is over."""
        self._out.synchronize()
        self._in.synchronize()

    def _copy(self, stream: torch.cuda.Stream, src: Tensor, dst: Tensor, after, done) -> None:
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            dst.copy_(src, non_blocking=True)
        if done is not None:
            done.record(stream)


class CpuCopies:
    """The same calls in CPU memory, each done when it returns: for training on a CPU."""

    device = torch.device("cpu")

    def alloc_host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    alloc_device = alloc_host

    def event(self) -> Any:
        return None

    def record_compute(self, event: Any) -> None:
        pass

    compute_wait = record_compute

    def copy_out(self, src: Tensor, dst: Tensor, after=(), done=None) -> None:
        dst.copy_(src)

    copy_in = copy_out

    def synchronize(self) -> None:
        pass


Copies = CudaCopies | CpuCopies


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
    code = int(cast(Any, torch.cuda.cudart()).cudaHostRegister(address, memory.numel(), 0))
    if code:
        raise FluxfastError(f"{problem}: CUDA error {code}", hint=hint)
    # the storage keeps `pages` alive: unregistered after the last view is gone, before the unmap
    finalizer = weakref.finalize(pages, _unregister, address)
    finalizer.atexit = False  # the end of the process does it
    return memory[:nbytes]


def _unregister(address: int) -> None:
    cast(Any, torch.cuda.cudart()).cudaHostUnregister(address)
