"""Copies between host and device memory on streams beside the compute stream.

Copies of one direction run one after the other and start when all compute launched before them is
done. They are given as pairs (source, target) of uint8 tensors, 1-D, contiguous and equally long.
The event that a call returns happens at their end.
"""

import mmap
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor

from fluxfast.errors import FluxfastError

Pairs = Iterable[tuple[Tensor, Tensor]]


class PinRefused(FluxfastError):
    """The system page-locks no more host memory."""


class CudaCopies:
    """Two side streams; compute is the caller's current stream. Never waits on the host."""

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self._out, self._in = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)

    def alloc_host(self, nbytes: int) -> Tensor:
        """Returns pinned host memory, uint8 [nbytes], not initialized."""
        return pinned(nbytes)

    def alloc_device(self, nbytes: int) -> Tensor:
        """Returns device memory, uint8 [nbytes], not initialized."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy_out(self, pairs: Pairs) -> torch.cuda.Event:
        """Copies from the device to the host."""
        return self._copy(self._out, pairs)

    def copy_in(self, pairs: Pairs) -> torch.cuda.Event:
        """Copies from the host to the device."""
        return self._copy(self._in, pairs)

    def compute_wait(self, event: torch.cuda.Event) -> None:
        """Compute launched from now on starts after the event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def _copy(self, stream: torch.cuda.Stream, pairs: Pairs) -> torch.cuda.Event:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
        return event


class CpuCopies:
    """The same calls in CPU memory, each done when it returns: for training on a CPU."""

    device = torch.device("cpu")

    def alloc_host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    alloc_device = alloc_host

    def copy_out(self, pairs: Pairs) -> Any:
        for source, target in pairs:
            target.copy_(source)

    copy_in = copy_out

    def compute_wait(self, event: Any) -> None:
        pass


Copies = CudaCopies | CpuCopies


def pinned(nbytes: int) -> Tensor:
    """Returns page-locked host memory, uint8 [nbytes], of exactly this size.

    torch's own pinned allocator rounds up to a power of two: 9 GB would take 16. A shared mapping,
    so that a fork (data loading workers) does not turn the parent's pages into copies; a container
    is charged for it as for memory of its own. Raises PinRefused where the system refuses.
    """
    hint = "offload less (a lower resolution or batch size), or free host memory"
    problem = f"cannot pin {nbytes / 2**30:.2f} GiB of host memory"
    try:
        pages = mmap.mmap(-1, max(nbytes, 1))
    except (OSError, OverflowError) as error:
        raise PinRefused(f"{problem}: {error}", hint=hint) from None
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    address = memory.data_ptr()
    code = int(cast(Any, torch.cuda.cudart()).cudaHostRegister(address, memory.numel(), 0))
    if code:
        _clear_error()
        raise PinRefused(f"{problem}: CUDA error {code}", hint=hint)
    # the storage keeps `pages` alive: unregistered after the last view is gone, before the unmap
    finalizer = weakref.finalize(pages, _unregister, address)
    finalizer.atexit = False  # the end of the process does it
    return memory[:nbytes]


def _clear_error() -> None:
    """Takes back the error that a failed call leaves in the runtime for the next launch to raise;
    torch has no name for cudaGetLastError."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _unregister(address: int) -> None:
    cast(Any, torch.cuda.cudart()).cudaHostUnregister(address)
