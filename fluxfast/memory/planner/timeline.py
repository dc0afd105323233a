"""How long a step takes when some blocks' saved activations go to the host: the schedule of
`offload.py` as arithmetic, without tensors, so that a planner can try thousands of choices.

Three streams: compute, copies out (device to host), copies in. Block i is ready to go out when its
forward is over; its sources are released when compute has waited for their copy (see `Offload`). In
backward two staging buffers are filled from the last offloaded block to the first. Out and in do
not slow each other down (PCIe is full duplex), and neither slows compute down.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 256  # bytes: what every offset in the arena and in a staging buffer is a multiple of
PADDED_STORAGES = 64  # how many storages of a block may need padding to the alignment
STAGING_BUFFERS = 2
LAG = 2  # blocks: block i's sources are released before the forward of block i + LAG


def aligned(nbytes: int) -> int:
    """Returns the next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def room(nbytes: int) -> int:
    """Returns the bytes reserved for a block that saves `nbytes`, padding between its storages
    included."""
    return aligned(nbytes) + PADDED_STORAGES * ALIGNMENT


class Timeline(NamedTuple):
    """One forward and backward pass. staging_bytes: on the device, always; in_flight_bytes: on the
    device, sources not yet released, the most at once; host_bytes: the arena.
    """

    seconds: float
    staging_bytes: int
    in_flight_bytes: int
    host_bytes: int


def predict(
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    offload_bytes: Sequence[int],
    bandwidth: float,
) -> Timeline:
    """Returns time and bytes of a pass over blocks that take `forward_s` and `backward_s` seconds
    each.

    offload_bytes: per block, what it puts into the arena; 0 where it is not offloaded. bandwidth:
    bytes per second, each way. Padding between a block's storages also travels back and is not
    counted.
    """
    forward_seconds, in_flight_bytes = _forward(forward_s, offload_bytes, bandwidth)
    seconds = _backward(forward_seconds, backward_s, offload_bytes, bandwidth)
    rooms = [room(nbytes) for nbytes in offload_bytes if nbytes]
    staging_bytes = min(STAGING_BUFFERS, len(rooms)) * max(rooms, default=0)
    return Timeline(seconds, staging_bytes, in_flight_bytes, sum(rooms))


def _forward(
    forward_s: Sequence[float], offload_bytes: Sequence[int], bandwidth: float
) -> tuple[float, int]:
    """Returns when backward may begin (all copies out are over), and the most bytes in flight."""
    now = copies_free = 0.0
    in_flight = most = 0
    pending: deque[tuple[int, float]] = deque()  # (block, when its copy out is over)
    for i, (seconds, nbytes) in enumerate(zip(forward_s, offload_bytes, strict=True)):
        while pending and pending[0][0] + LAG <= i:
            block, copied = pending.popleft()
            now = max(now, copied)
            in_flight -= offload_bytes[block]
        now += seconds
        if nbytes:
            copies_free = max(copies_free, now) + nbytes / bandwidth
            pending.append((i, copies_free))
            in_flight += nbytes
            most = max(most, in_flight)
    return max(now, copies_free), most


def _backward(
    now: float, backward_s: Sequence[float], offload_bytes: Sequence[int], bandwidth: float
) -> float:
    """Returns when a backward that begins at `now` is over."""
    blocks = range(len(backward_s))[::-1]
    queue = deque(i for i in blocks if offload_bytes[i])
    arrived = dict.fromkeys(blocks, 0.0)
    copies_free = 0.0

    def fetch() -> None:
        nonlocal copies_free
        if queue:
            i = queue.popleft()
            arrived[i] = copies_free = max(copies_free, now) + offload_bytes[i] / bandwidth

    for _ in range(STAGING_BUFFERS):
        fetch()
    for i in blocks:
        now = max(now, arrived[i]) + backward_s[i]
        if offload_bytes[i]:
            fetch()
    return now
