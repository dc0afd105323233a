"""Detects a driver that has begun to spill GPU memory into the system's.

Some drivers (NVIDIA's under Windows by default) let a full card go on in system memory over PCIe:
no error, steps many times slower. Seen from outside: steps have become slow, and the card is full.
"""

from collections.abc import Callable
from statistics import median

import torch

from fluxfast.errors import FluxfastError

TIMES = 3.0  # an interval this many times slower than the median is slow
IN_A_ROW = 3  # slow intervals: a checkpoint or a slow disk takes one
LEAST = 4  # intervals that a median is taken of
FULL = 0.04  # a card with at most this share free is full


class MemorySpills(FluxfastError):
    """The driver moves GPU memory to system memory."""


def card_is_full(device: torch.device) -> bool:
    free, total = torch.cuda.mem_get_info(device)
    return free <= FULL * total


class SpillWatch:
    """Judges a run's logging intervals. full: returns whether the card is full now."""

    def __init__(self, full: Callable[[], bool]):
        self._full = full
        self.restart()

    def restart(self) -> None:
        """Forgets all intervals: policies have changed, and with them how long steps take."""
        self._ratios: list[float] = []  # measured over expected seconds, of intervals not slow
        self._slow = 0

    def interval(self, seconds: float, expected: float) -> None:
        """Counts an interval. expected: the time that it was predicted to take, in any unit, so
        that large pictures do not count as slow.

        Raises MemorySpills where the last IN_A_ROW were slow and the card is full.
        """
        ratio = seconds / expected
        if len(self._ratios) < LEAST or ratio <= TIMES * median(self._ratios):
            self._ratios.append(ratio)
            self._slow = 0
            return
        self._slow += 1
        if self._slow >= IN_A_ROW and self._full():
            raise MemorySpills(
                f"steps take {ratio / median(self._ratios):.1f} times as long as before and the "
                "GPU's memory is full: the driver seems to move it to system memory",
                hint="close what else uses the GPU, or lower memory.limit_gib; under Windows set "
                "'CUDA - Sysmem Fallback Policy' to 'Prefer No Sysmem Fallback'",
            )
