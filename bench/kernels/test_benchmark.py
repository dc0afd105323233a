"""The cases of `bench.kernels` under pytest-benchmark: fluxfast's op, one benchmark a case and
direction, for comparing two checkouts on one machine.

    pytest bench/kernels/test_benchmark.py --benchmark-enable --benchmark-autosave -k lora_linear
    pytest-benchmark compare

The ordinary test run does not collect this file (`testpaths`). Times are the host's, with launches;
on a GPU `bench.kernels` has the kernels' own.
"""

import pytest

from bench import timing
from bench.kernels.build import build
from bench.kernels.cases import cases
from bench.kernels.cli import parse, settings_of
from bench.kernels.gate import Gate
from bench.kernels.problem import BOTH, FORWARD, OURS

SETTINGS = settings_of(parse(["--candidates", OURS]))


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("case", cases(SETTINGS), ids=str)
def test_kernel(benchmark, case, direction):
    problem = build(case, SETTINGS)
    if direction not in problem.directions:
        pytest.skip("the op has no backward")
    ours = problem.candidates[OURS]
    wrong, _ = Gate(problem, case).check(ours, direction)
    assert wrong is None, wrong
    work = problem.call(ours, direction)

    @benchmark
    def run():
        work()
        timing.synchronize(SETTINGS.device)
