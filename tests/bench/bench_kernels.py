"""What tests of `bench.kernels` share: narrow layers, a made-up roof, and no waiting."""

import pytest
import torch

from bench import timing
from bench.kernels import cli as kernels
from bench.kernels import floor
from bench.kernels.cases import Case
from bench.kernels.problem import EAGER, OURS

ROOF = floor.Roof(10.0, {kind: 0.5 for kind in floor.KINDS})


@pytest.fixture
def quick(monkeypatch):
    """One thread, and no search through the heap for each candidate's peak memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(timing, "peak_memory", lambda work, device: (work(), None, None)[1:])
    monkeypatch.setattr(timing, "free_memory", lambda: None)
    yield
    torch.set_num_threads(threads)


def tiny(*arguments: str, compute: str = "fp32", candidates=(OURS, EAGER)):
    """Settings of two samples of narrow layers."""
    options = ["--device", "cpu", "--tiny", "--compute", compute, *arguments]
    return kernels.settings_of(kernels.parse([*options, "--candidates", *candidates]))


def measured(case: Case, settings=None) -> dict[tuple[str, str], dict]:
    rows = kernels.measure(case, settings or tiny(), ROOF)
    return {(row["name"], row["direction"]): row for row in rows}


def case_of(op: str, storage: str = "", matmul: str = "") -> Case:
    return Case(op, storage, matmul, 64, 2)
