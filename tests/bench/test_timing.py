"""Timing of interleaved candidates: the order, what is thrown away, failures, memory, a GPU."""

from unittest.mock import MagicMock

import pytest
import torch

from bench import timing


class Clock:
    """Stands in for time.perf_counter; a candidate says how long it takes."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing, "peak_memory", lambda work, device: (work(), None, None)[1:])

    def candidate(self, name: str, *milliseconds: float):
        """Takes each of the times in turn, then the last one again and again."""
        left = list(milliseconds)

        def work():
            self.calls.append(name)
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1e3

        return work


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_rounds_are_interleaved_and_rotated(clock):
    timing.compare({name: clock.candidate(name, 1.0) for name in "abc"}, rounds=3, warmup=0)
    assert "".join(clock.calls) == "abcbcacab"


def test_warm_up_is_thrown_away_and_ratios_are_of_medians(clock):
    candidates = {
        "peer": clock.candidate("peer", 900, 900, 10, 20, 30, 40, 500),
        "ours": clock.candidate("ours", 700, 700, 15),
    }
    results = timing.compare(candidates, rounds=5, warmup=2, baseline="peer")
    peer = results["peer"]
    assert peer.times_ms == pytest.approx([10, 20, 30, 40, 500])
    assert (peer.p10_ms, peer.median_ms, peer.p90_ms) == pytest.approx((14, 30, 316))
    assert (peer.ratio, results["ours"].ratio) == pytest.approx((1, 0.5))


def raises(error: Exception, calls: int = 0):
    """Raises the error after so many calls, and once only."""
    errors = [None] * calls + [error]

    def work():
        if error := errors.pop(0):
            raise error

    return work


@pytest.mark.slow
def test_a_failure_is_a_row_and_never_ends_the_run(clock):
    full = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    candidates = {
        "good": clock.candidate("good", 5),
        "full": raises(full, calls=1),
        "broken": raises(ValueError("wrong shape")),
        "missing": ModuleNotFoundError("No module named 'peft'"),
    }
    results = timing.compare(candidates, rounds=3, warmup=0, baseline="missing")
    assert {name: (r.status, r.reason) for name, r in results.items()} == {
        "good": ("ok", None),
        "full": ("out of memory", "OutOfMemoryError: CUDA out of memory."),
        "broken": ("failed", "ValueError: wrong shape"),
        "missing": ("skipped", "ModuleNotFoundError: No module named 'peft'"),
    }
    assert results["good"].median_ms == pytest.approx(5) and results["good"].ratio is None
    assert results["full"].median_ms is None


def test_a_candidate_that_fails_its_gate_is_not_timed(clock):
    gates = {
        "right": lambda: None,
        "wrong": lambda: "loss is 3, expected 2",
        "raises": raises(AssertionError("no gradient")),
    }
    candidates = {name: clock.candidate(name, 1) for name in gates}
    results = timing.compare(candidates, rounds=2, warmup=1, gate=lambda name: gates[name]())
    assert set(clock.calls) == {"right"}
    for name, reason in {
        "wrong": "loss is 3, expected 2",
        "raises": "AssertionError: no gradient",
    }.items():
        assert (results[name].status, results[name].reason) == ("gate failed", reason)


def test_peak_memory_sees_what_a_step_allocates():
    used, kind = timing.peak_memory(lambda: torch.ones(16 << 20).sum(), "cpu")
    if kind is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 60 << 20 < used < 128 << 20  # 64 MiB, and what else the process did


def test_outside_a_checkout_the_commit_is_null(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    conditions = timing.conditions("cpu")
    assert conditions["commit"] is None and conditions["dirty"] is None
    assert conditions["torch"] == torch.__version__


@pytest.mark.parametrize("cold", [False, True])
def test_a_gpu_is_timed_by_its_own_events(monkeypatch, cold):
    gpu = MagicMock()  # stands in for torch
    gpu.device.return_value.type = "cuda"
    gpu.cuda.Event.return_value.elapsed_time.return_value = 12.5
    monkeypatch.setattr(timing, "torch", gpu)
    assert timing.elapsed_ms(gpu.work, "cuda", cold) == 12.5
    calls = [name.replace("cuda.Event()", "event") for name, *_ in gpu.mock_calls]
    flush = ["empty", "empty().zero_", "cuda._sleep"] if cold else []
    events = ["cuda.Event", "cuda.Event", "event.record", "work", "event.record"]
    wanted = ["cuda.synchronize", *flush, *events, "event.synchronize", "event.elapsed_time"]
    assert [name for name in calls if name != "device"] == wanted
    if cold:
        (count,), options = gpu.empty.call_args
        assert count >= 256 << 20 and options == {"dtype": gpu.int8, "device": "cuda"}
