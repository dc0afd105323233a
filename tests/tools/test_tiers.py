"""The default tier takes some cases of a grid, the long tier the others."""

import pytest

CASES = range(7)


@pytest.mark.grid(3)
@pytest.mark.parametrize("case", CASES)
def test_three_of_seven(case, request):
    slow = request.node.get_closest_marker("slow") is not None
    assert slow == (case not in (1, 3, 5))
