"""Notices a driver that has begun to spill GPU memory into the system's.

Some drivers (NVIDIA's under Windows by default) let a full card go on in system memory over PCIe:
no error, steps many times slower. Seen from outside: steps have become slow, and the card is full.
"""

from collections.abc import Callable
from statistics import median

import torch

from fluxfast.errors import FluxfastError

TIMES = 3.0  # how much slower than the median is slow
IN_A_ROW = 3  # intervals: a checkpoint or a slow disk takes one
LEAST = 4  # intervals that a median is taken of
FULL = 0.04  # of the card is free, or less: it is full


def card_is_full(device: torch.device) -> bool:
    free, total = torch.cuda.mem_get_info(device)
    return free <= FULL * total


class MemorySpills(FluxfastError):
    """The run is better stopped than gone on with."""


class SpillWatch:
    """Judges a run's logging intervals. full: whether the card is full now."""

    def __init__(self, full: Callable[[], bool]):
        self._full = full
        self._ratios: list[float] = []  # measured over expected seconds, of intervals not slow
        self._slow = 0

    def restart(self) -> None:
        """Steps are not what they were: policies have changed."""
        self._ratios.clear()
        self._slow = 0

    def interval(self, seconds: float, expected: float) -> None:
        """An interval took so long; expected: what it was predicted to take, in any unit, so that
        large pictures are no slow ones.

        Raises MemorySpills where the last IN_A_ROW were slow and the card is full.
        """
        ratio = seconds / expected
        usual = median(self._ratios) if len(self._ratios) >= LEAST else None
        if usual is None or ratio <= TIMES * usual:
            self._ratios.append(ratio)
            self._slow = 0
            return
        self._slow += 1
        if self._slow >= IN_A_ROW and self._full():
            raise MemorySpills(
                f"steps take {ratio / usual:.1f} times as long as before and the GPU's memory is "
                "full: the driver seems to move it to system memory",
                hint="close what else uses the GPU, or lower memory.limit_gib; under Windows set "
                "'CUDA - Sysmem Fallback Policy' to 'Prefer No Sysmem Fallback'",
            )
