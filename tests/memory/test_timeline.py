"""The schedule of offload as arithmetic: against sums made by hand, and against the engine."""

import math
import time

import pytest
from simulated_copies import RandomModel, SimulatedCopies

from fluxfast.memory.offload import Offload
from fluxfast.memory.planner.timeline import predict, room


def test_without_offload_nothing_waits():
    assert predict([1.0, 2.0], [3.0, 4.0], [0, 0], 1.0) == (10.0, 0, 0, 0)


def test_a_schedule_by_hand():
    """Four blocks of 1 s and 2 s; the first two put 3 bytes each at 1 byte/s.

    Forward: block 0 is done at 1, its copy at 4; block 1 is done at 2, its copy runs 4..7. Block 2
    waits for the first copy (4), block 3 for the second (7), and ends at 8. Backward: block 1
    arrives at 11, block 0 at 14; blocks 3 and 2 last until 12, block 1 until 14, block 0 until 16.
    """
    line = predict([1.0] * 4, [2.0] * 4, [3, 3, 0, 0], 1.0)
    assert line == (16.0, 2 * room(3), 6, 2 * room(3))


def test_at_most_two_blocks_are_in_flight():
    assert predict([1.0] * 5, [1.0] * 5, [5, 7, 11, 13, 2], 1e9).in_flight_bytes == 24  # 11 + 13


def test_blocks_that_compute_in_no_time_last_as_long_as_their_copies():
    assert predict([0.0] * 6, [0.0] * 6, [10] * 6, 5.0).seconds == pytest.approx(12.0 + 12.0)
    assert predict([0.0], [0.0], [10], math.inf).seconds == 0.0
    assert predict([0.0], [0.0], [10], 1.0).staging_bytes == room(10)  # one buffer will do


def test_a_planner_can_ask_often():
    """A hundred predictions of 57 blocks in half a second of processor time (8 ms, unhurried)."""
    start = time.process_time()
    for _ in range(100):
        predict([5e-3] * 57, [8e-3] * 57, [300_000_000] * 57, 25e9)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("seed", range(80))
def test_random_schedules_last_as_predicted(seed):
    """Bytes come back, time and memory are `predict`'s, and later passes allocate nothing."""
    model = RandomModel(seed, aligned=True)
    copies = SimulatedCopies(model.bandwidth)
    engine = Offload(copies, {"bucket": model.offloaded})
    line = predict(model.forward, model.backward, model.sizes, model.bandwidth)
    for _ in range(3):
        start = copies.now
        model.run_backward(engine, copies, model.run_forward(engine, copies))
        assert copies.now - start == pytest.approx(line.seconds, abs=1e-9)
        assert model.most_in_flight == line.in_flight_bytes
    assert copies.host == [line.host_bytes]
    assert sum(buffer.nbytes for buffer in copies.buffers) == line.staging_bytes
