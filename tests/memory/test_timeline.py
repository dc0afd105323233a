"""The schedule of offload as arithmetic: against sums made by hand, and against the engine."""

import math
import time

import pytest
import torch
from offload_model import Counting, Plan
from simulated_copies import ThreadedCopies

from fluxfast.memory.offload import Offload
from fluxfast.memory.planner.timeline import ALIGNMENT, predict, room


def test_without_offload_nothing_waits():
    line = predict([1.0, 2.0], [3.0, 4.0], [0, 0], 1.0, 1.0)
    assert (line.seconds, line.forward_seconds, line.stall_s) == (10.0, 3.0, 0.0)
    assert (line.staging_bytes, line.in_flight_bytes, line.host_bytes) == (0, 0, 0)


def test_a_schedule_by_hand():
    """Four blocks of 1 s and 2 s; the first two put 3 bytes each at 1 byte/s.

    Forward: block 0 is done at 1, its copy at 4; block 1 is done at 2, its copy runs 4..7. Block 2
    waits for the first copy (4), block 3 for the second (7), and ends at 8. Backward: block 1
    arrives at 11, block 0 at 14; blocks 3 and 2 last until 12, block 1 until 14, block 0 until 16.
    """
    line = predict([1.0] * 4, [2.0] * 4, [3, 3, 0, 0], 1.0, 1.0)
    assert (line.forward_seconds, line.seconds, line.stall_s) == (8.0, 16.0, 4.0)
    assert line.in_flight_bytes == 6
    assert line.staging_bytes == 2 * room(3) and line.host_bytes == 2 * room(3)


def test_a_larger_lag_waits_later_and_holds_longer():
    """Every third of six blocks of 1 s puts 3 bytes at 1 byte/s: three blocks hide a copy."""
    sizes = [3, 0, 0, 3, 0, 0]
    short = predict([1.0] * 6, [2.0] * 6, sizes, 1.0, 1.0)
    # block 0 leaves at 1..4: block 2 waits from 2 to 4; block 3, done at 6, leaves until 9
    assert short.forward_seconds == 10.0 and short.in_flight_bytes == 3
    long = predict([1.0] * 6, [2.0] * 6, sizes, 1.0, 1.0, lag=4)
    # block 0's copy is over before block 4; block 3, done at 4, leaves until 7
    assert long.forward_seconds == 7.0 and long.in_flight_bytes == 6


def test_at_most_two_blocks_are_in_flight():
    line = predict([1.0] * 5, [1.0] * 5, [5, 7, 11, 13, 2], 1e9, 1e9, lag=9)
    assert line.in_flight_bytes == 24  # 11 + 13


def test_backward_is_bound_by_the_link():
    """Blocks that compute in no time: out and in are as long as their bytes."""
    line = predict([0.0] * 6, [0.0] * 6, [10] * 6, 5.0, 2.0)
    assert line.forward_seconds == pytest.approx(12.0)
    assert line.seconds == pytest.approx(12.0 + 30.0)
    assert predict([0.0], [0.0], [10], math.inf, math.inf).seconds == 0.0
    assert predict([0.0], [0.0], [10], 1.0, 1.0).staging_bytes == room(10)  # one buffer will do


def test_room_has_place_for_padding():
    assert room(1) % ALIGNMENT == 0 and room(ALIGNMENT) > ALIGNMENT


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="one forward, backward and size per block"):
        predict([1.0], [1.0, 2.0], [0], 1.0, 1.0)
    for out, back, lag in ((0.0, 1.0, 2), (1.0, -1.0, 2), (1.0, 1.0, 0)):
        with pytest.raises(ValueError, match="bandwidths must be above 0"):
            predict([1.0], [1.0], [0], out, back, lag)


def test_a_planner_can_ask_often():
    """A hundred predictions of 57 blocks in half a second of processor time (8 ms, unhurried)."""
    start = time.process_time()
    for _ in range(100):
        predict([5e-3] * 57, [8e-3] * 57, [300_000_000] * 57, 25e9, 25e9)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("seed", range(80))
def test_random_schedules_last_as_predicted(seed):
    """Bytes come back, time and memory are `predict`'s, and later passes allocate nothing."""
    plan = Plan(seed, aligned=True)
    copies = Counting(*plan.bandwidths)
    engine = Offload(copies, lag=plan.lag)
    plan.prepare(engine)
    line = predict(plan.forward, plan.backward, plan.sizes, *plan.bandwidths, lag=plan.lag)
    events = copies.events
    for turn in range(3):
        start = copies.now
        expected = plan.run_forward(engine, copies)
        assert copies.now - start == pytest.approx(line.forward_seconds, abs=1e-9)
        plan.run_backward(engine, copies, expected)
        assert copies.now - start == pytest.approx(line.seconds, abs=1e-9)
        assert engine.most_in_flight_bytes == line.in_flight_bytes
        assert engine.in_flight_bytes == 0
        if turn == 0:
            allocated = copies.host[:], copies.device_memory[:]
    assert (copies.host, copies.device_memory) == allocated and copies.events == events
    assert sum(copies.host) == engine.host_bytes == line.host_bytes
    assert sum(copies.device_memory) == engine.staging_bytes == line.staging_bytes
    assert len(copies.host) <= 1


def test_threads_take_as_long_as_predicted():
    """Sleeping for compute: at least the prediction, at most half as long again and 0.1 s (sleeps
    are late, and the machine may be busy).
    """
    forward, backward, nbytes = [0.01] * 6, [0.02] * 6, 4000
    sizes = [nbytes] * 4 + [0, 0]
    line = predict(forward, backward, sizes, 200e3, 150e3)
    assert line.stall_s > 0.05
    copies = ThreadedCopies(200e3, 150e3)
    engine = Offload(copies)
    engine.prepare("a", {i: n for i, n in enumerate(sizes) if n})
    start, kept = time.perf_counter(), {}
    engine.begin("a")
    for i in range(6):
        store = engine.block(i) if sizes[i] else None
        time.sleep(forward[i])
        if store:
            kept[i] = store, store.put(torch.full((nbytes // 4,), float(i)))
        engine.block_forward_done(i)
    engine.forward_done()
    for i in reversed(range(6)):
        if i in kept:
            assert (kept[i][0].get(kept[i][1]) == i).all()
        time.sleep(backward[i])
        engine.block_backward_done(i)
    took = time.perf_counter() - start
    assert line.seconds - 1e-3 < took < 1.5 * line.seconds + 0.1
