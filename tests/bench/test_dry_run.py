"""The planner's bytes are those that a step's own launchers allocate, on meta tensors."""

import os
import subprocess
import sys

import pytest

from bench import ROOT
from bench.twin.dry_run import MIB, Allocator, cases
from fluxfast.memory.planner.plan import NODES


def run(*options: str) -> list[str]:
    """Returns the lines that it prints; in a process of its own, as this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "bench.twin.dry_run", *options]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(words, cwd=ROOT, env=environment | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_predictions_hold_at_one_full_size_and_for_nano():
    *lines, summary = run()
    assert len(lines) == len(list(cases(False))) == 2 and "1024x1024" in lines[1]
    assert summary == "0 predictions off by more than 2%"
    assert int(lines[1].split()[-2]) / 57 == pytest.approx(NODES, abs=1)  # launches a block


@pytest.mark.slow
def test_predictions_hold_for_every_policy_precision_preset_and_dropout():
    *lines, summary = run("--all")
    assert len(lines) == len(list(cases(True))) > 15
    assert summary == "0 predictions off by more than 2%"


def test_segments_are_torchs():
    """Its documented sizes: 2 MiB for what is small, 20 MiB up to 10 MiB, else rounded to 2 MiB."""
    allocator = Allocator()
    small = [allocator.take(700) for _ in range(3)]
    assert allocator.reserved == 2 * MIB and {block.size for block in small} == {1024}
    medium = [allocator.take(9 * MIB), allocator.take(9 * MIB)]
    assert allocator.reserved == 22 * MIB  # one segment for both
    large = allocator.take(33 * MIB)
    assert allocator.reserved == 56 * MIB and large.size == 34 * MIB  # a MiB is not split off
    for block in (medium[0], medium[1], large):
        allocator.release(block)
    # the halves and what was left of their segment are one block again
    assert allocator.take(20 * MIB).size == 20 * MIB and allocator.reserved == 56 * MIB
    assert allocator.take(30 * MIB).size == 30 * MIB and allocator.reserved == 56 * MIB
    allocator.take(35 * MIB)
    assert allocator.reserved == 92 * MIB
