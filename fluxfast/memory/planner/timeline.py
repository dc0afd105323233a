"""How long a step lasts when some blocks' saved activations go to the host: the schedule of
`offload.py` as arithmetic, with no tensors, so that a planner can try thousands of choices.

Three streams: compute, copies out (device to host), copies in. Block i is ready to go out when its
forward is over; its sources are let go when compute has waited for their copy (see `Offload`). In
backward two staging buffers are filled from the last offloaded block to the first. Out and in do
not slow each other down (PCIe is full duplex), and neither slows compute down.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256  # bytes: what every offset in the arena and in a staging buffer is a multiple of
PADDED_STORAGES = 64  # how many storages of a block may need padding to the alignment
STAGING_BUFFERS = 2
LAG = 2  # blocks: block i's sources are let go before the forward of block i + LAG


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def room(nbytes: int) -> int:
    """Bytes set aside for a block that puts `nbytes`, with the padding between its storages."""
    return aligned(nbytes) + PADDED_STORAGES * ALIGNMENT


@dataclass(frozen=True)
class Timeline:
    """One forward and backward pass. Seconds and bytes."""

    seconds: float
    forward_seconds: float  # until the compute stream may begin the backward pass
    stall_s: float  # of `seconds`, how long compute waited for copies
    staging_bytes: int  # on the device, always
    in_flight_bytes: int  # on the device, sources not yet let go: the most at once
    host_bytes: int  # the arena


def predict(
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    offload_bytes: Sequence[int],
    bandwidth_out: float,
    bandwidth_in: float,
    lag: int = LAG,
) -> Timeline:
    """Time and bytes of a pass over blocks that take `forward_s` and `backward_s` seconds each.

    offload_bytes: per block, what it puts into the arena; 0 where it is not offloaded. bandwidth:
    bytes per second. lag: as `Offload` takes it. Padding between a block's storages also travels
    back and is not counted. Raises ValueError for sequences of unequal length, a bandwidth that is
    not positive or a lag below 1.
    """
    blocks = len(forward_s)
    if not blocks == len(backward_s) == len(offload_bytes):
        lengths = (blocks, len(backward_s), len(offload_bytes))
        raise ValueError(f"one forward, backward and size per block, got {lengths}")
    if min(bandwidth_out, bandwidth_in) <= 0 or lag < 1:
        raise ValueError(
            f"bandwidths must be above 0 and lag at least 1, got {bandwidth_out}, {bandwidth_in}, "
            f"{lag}"
        )
    forward_seconds, in_flight_bytes = _forward(forward_s, offload_bytes, bandwidth_out, lag)
    seconds = _backward(forward_seconds, backward_s, offload_bytes, bandwidth_in)
    rooms = [room(nbytes) for nbytes in offload_bytes if nbytes]
    return Timeline(
        seconds=seconds,
        forward_seconds=forward_seconds,
        stall_s=seconds - sum(forward_s) - sum(backward_s),
        staging_bytes=min(STAGING_BUFFERS, len(rooms)) * max(rooms, default=0),
        in_flight_bytes=in_flight_bytes,
        host_bytes=sum(rooms),
    )


def _forward(
    forward_s: Sequence[float], offload_bytes: Sequence[int], bandwidth: float, lag: int
) -> tuple[float, int]:
    """Returns when backward may begin (all copies out are over), and the most bytes in flight."""
    now = copies_free = 0.0
    in_flight = most = 0
    copied = [0.0] * len(forward_s)  # when a block's copy out is over
    pending: deque[int] = deque()
    for i, nbytes in enumerate(offload_bytes):
        while pending and (pending[0] + lag <= i or (nbytes and len(pending) > 1)):
            released = pending.popleft()
            now = max(now, copied[released])
            in_flight -= offload_bytes[released]
        now += forward_s[i]
        if nbytes:
            copied[i] = copies_free = max(copies_free, now) + nbytes / bandwidth
            pending.append(i)
            in_flight += nbytes
            most = max(most, in_flight)
    if pending:
        now = max(now, copied[pending[-1]])
    return now, most


def _backward(
    now: float, backward_s: Sequence[float], offload_bytes: Sequence[int], bandwidth: float
) -> float:
    """Returns when a backward that begins at `now` is over."""
    blocks = list(reversed(range(len(backward_s))))
    queue = deque(i for i in blocks if offload_bytes[i])
    arrived = [0.0] * len(blocks)
    copies_free = 0.0

    def fill() -> None:
        nonlocal copies_free
        if queue:
            i = queue.popleft()
            arrived[i] = copies_free = max(copies_free, now) + offload_bytes[i] / bandwidth

    for _ in range(STAGING_BUFFERS):
        fill()
    for i in blocks:
        now = max(now, arrived[i]) + backward_s[i]
        if offload_bytes[i]:
            fill()
    return now
