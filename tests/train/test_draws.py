"""Random123's own numbers, the right moments, and pure functions of (seed, stream, index)."""

import math
from collections import Counter

import pytest
import torch
from fluxfast_kernels.ops.dropout import philox, random_words

from fluxfast import rng

# Random123, tests/kat_vectors, philox4x32 10: words of counter (4), key (2) and output (4)
KNOWN = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""
COUNT = 1 << 18


@pytest.mark.parametrize("line", KNOWN.strip().splitlines())
def test_philox_known_answers(line):
    *counter, key, other_key, _, _, _, _ = words = [int(word, 16) for word in line.split()]
    output = philox(tuple(torch.tensor([word]) for word in counter), (key, other_key))
    assert [int(word) for word in output] == words[6:]


def test_uniform_fills_the_open_interval_evenly():
    values = rng.uniform(1, "a", 0, (COUNT,)).double()
    assert values.shape == (1, COUNT)
    assert values.min() > 0 and values.max() < 1
    # five standard errors of the mean and of the second moment
    assert abs(values.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / COUNT)
    assert abs(values.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / COUNT)
    counts = torch.histc(values, bins=64, min=0, max=1)
    expected = COUNT / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 63 + 5 * math.sqrt(2 * 63)


def test_uniform_never_reaches_an_end(monkeypatch):
    for word in (0, 0xFFFFFFFF):
        monkeypatch.setattr(rng, "random_words", lambda *_, word=word: torch.tensor([[word, word]]))
        values = rng.uniform(0, "a", 0, (2,)).double()
        assert values.min() > 0 and values.max() < 1
        assert math.isfinite(rng.normal(0, "a", 0).item())


def test_normal_has_the_moments_of_a_normal():
    values = rng.normal(1, "a", 0, (COUNT,)).double()
    # standard errors of a normal's first four moments: 1, 2, 15, 96 over the count
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        error = (values**power).mean() - moment
        assert abs(error) < 5 * math.sqrt(variance / COUNT), power
    within = (values.abs() < 1).double().mean()
    assert abs(within - math.erf(1 / math.sqrt(2))) < 5 * math.sqrt(0.22 / COUNT)
    assert values.abs().max() > 4  # the tails are there: 16 of 2^18 expected


def test_both_halves_of_box_muller_are_independent():
    values = rng.normal(1, "a", 0, (COUNT,))[0].double()
    first, second = values[: COUNT // 2], values[COUNT // 2 :]
    limit = 5 / math.sqrt(COUNT // 2)
    assert abs((first * second).mean()) < limit
    assert abs((first.square() * second.square()).mean() - 1) < 3 * limit
    assert abs((first[1:] * first[:-1]).mean()) < limit


@pytest.mark.parametrize(
    "other",
    [(2, "a", 0), (1, "b", 0), (1, "a", 1), (1, "a", 1 << 32), (1, "a", 1 << 40)],
    ids=["seed", "stream", "index", "index above 32 bits", "index above 40 bits"],
)
def test_another_name_is_another_independent_row(other):
    ours = rng.normal(1, "a", 0, (1 << 16,))[0]
    theirs = rng.normal(*other, (1 << 16,))[0]
    assert not torch.equal(ours[:4], theirs[:4])
    assert abs((ours * theirs).double().mean()) < 5 / math.sqrt(1 << 16)


@pytest.mark.parametrize("draw", [rng.uniform, rng.normal])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (4, 4)])
@pytest.mark.parametrize("indices", [[7, 0, 1 << 33, 7], [7, 8, 9], [5], []], ids=str)
def test_a_row_does_not_depend_on_the_batch(draw, shape, indices):
    """Nor on how its index is made on the device: a range is made there, other indices copied."""
    batch = draw(5, "noise", indices, shape)
    assert batch.shape == (len(indices), *shape) and batch.dtype == torch.float32
    for row, index in zip(batch, indices, strict=True):
        assert torch.equal(row, draw(5, "noise", index, shape)[0])
    assert torch.equal(batch, draw(5, "noise", torch.tensor(indices), shape))


def test_a_longer_uniform_row_begins_with_the_shorter():
    assert torch.equal(rng.uniform(0, "a", 3, (5,)), rng.uniform(0, "a", 3, (9,))[:, :5])


def test_permutation_is_one_and_varies():
    orders = [rng.permutation(0, "order", epoch, 50) for epoch in range(20)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 20
    assert [rng.permutation(0, "order", 0, n) for n in (0, 1)] == [[], [0]]


def test_permutations_are_equally_likely():
    seen = Counter(tuple(rng.permutation(9, "p", index, 3)) for index in range(1200))
    assert len(seen) == 6
    chi_squared = sum((count - 200) ** 2 / 200 for count in seen.values())
    assert chi_squared < 20.5  # 0.001 of chi-squared with 5 degrees of freedom


def test_integer_stays_in_range_and_reaches_all_of_it():
    values = [rng.integer(0, "i", index, 5) for index in range(500)]
    assert set(values) == set(range(5))
    assert all(isinstance(value, int) for value in values)
    assert rng.integer(0, "i", 0, 1) == 0


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = rng.normal(1, "a", [1, 2], (8,))
    rng.permutation(1, "a", 0, 9)
    rng.integer(1, "a", 0, 9)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(rng.normal(1, "a", [1, 2], (8,)), first)


def test_values_are_frozen():
    """Changed draws would silently change what a resumed run trains on."""
    words = random_words(rng.key(42, "noise"), torch.tensor([0, 1 << 32]), 2)
    assert words.tolist() == [[0xC1B52E74, 0x475EAB66], [0x5F631F90, 0x01D789FA]]
