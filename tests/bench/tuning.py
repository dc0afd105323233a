"""What the tests of `bench/tune` share: a tiny model, conditions of a row, a clock."""

from dataclasses import replace

import pytest
from fluxfast_kernels.dispatch import backend

from bench import timing
from bench.tune import sweep as tune_sweep
from bench.tune.sweep import Target
from fluxfast.model.spec import DEV, rope_axes

TINY = replace(
    DEV,
    hidden_size=64,
    num_heads=2,
    axes_dim=rope_axes(32),
    depth=1,
    depth_single_blocks=1,
    text_length=32,
)
RANK, M = 4, 48
QKV, PROJ = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj"
LINEAR1, LINEAR2 = "single_blocks.0.linear1", "single_blocks.0.linear2"
CONDITIONS = {
    "arch": 89,
    "device_name": "a card",
    "triton": "3.7.1",
    "commit": "0123456789",
    "dirty": False,
    "date": "2026-01-01",
}
NOW = [0.0]  # seconds; a test's work moves it on


def target(rounds: int, **more) -> Target:
    return Target(TINY, RANK, "cpu", 89, rounds, **more)


@pytest.fixture
def launchers():
    with backend.cpu_launches(True):
        yield


@pytest.fixture
def clock(monkeypatch):
    """Time stands still but for NOW; nobody counts memory, which takes long on a CPU."""
    monkeypatch.setattr(timing.time, "perf_counter", lambda: NOW[0])
    monkeypatch.setattr(tune_sweep.time, "monotonic", lambda: NOW[0])
    monkeypatch.setattr(timing, "peak_memory", lambda work, device: (work(), None, None)[1:])
