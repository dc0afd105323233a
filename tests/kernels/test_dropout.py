"""LoRA dropout's masks: the same bits on every device, read from the indices of the batch."""

import pytest
import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.ops.dropout import dropout, dropout_reference
from numerics import assert_refused, assert_same_bits, randn

from fluxfast import rng

INDICES = [7, 2**40 + 3]


def indices_on(device) -> torch.Tensor:
    return torch.tensor(INDICES, device=device)


@pytest.mark.grid(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    "shape, key, p",
    [((2, 2, 132), -(2**63) + 12345, 0.1), ((2, 1, 2052), 2**62 + 99, 1 / 3), ((2, 64), 1, 0.5)],
)
def test_a_mask_is_the_same_bits_as_in_torch(shape, key, p, dtype, add, device):
    """Rows in part of a larger tensor, a part of a block, one token without a token axis."""
    wide = randn(*shape[:-1], shape[-1] + 8, device=device, dtype=dtype)
    x, indices = wide[..., 4:-4], indices_on(device)
    onto = randn(*shape, device=device, dtype=dtype, seed=1) if add else None
    expected = dropout_reference(x, indices, key, p, onto)
    result = dropout(x, indices, key, p, None if onto is None else onto.clone())
    if add and dtype == torch.float32:  # x·m + out rounds once where the two are fused
        torch.testing.assert_close(result, expected, rtol=2.0**-22, atol=2.0**-22)
    else:
        assert_same_bits([result], [expected])
    assert 0 < (result == (0 if onto is None else onto)).float().mean() < 1


def test_the_words_are_the_trainers(device):
    """`rng.uniform` of the same stream decides what is dropped."""
    x = torch.ones(2, 1, 64, device=device)
    kept = dropout(x, indices_on(device), rng.key(3, "a stream"), 0.25) != 0
    u = rng.uniform(3, "a stream", INDICES, (1, 64), device)
    assert torch.equal(kept, u >= 0.25)


def test_what_the_indices_hold_is_read_at_the_launch(device):
    """As a CUDA graph needs it."""
    x, indices = randn(2, 1, 64, device=device), indices_on(device)
    first = dropout(x, indices, 5, 0.5)
    indices.copy_(torch.tensor([9, 10]))
    assert not torch.equal(dropout(x, indices, 5, 0.5), first)
    indices.copy_(torch.tensor(INDICES))
    assert_same_bits([dropout(x, indices, 5, 0.5)], [first])


def test_wrong_arguments_are_named(device):
    x, i = torch.zeros(2, 3, 64, device=device), indices_on(device)
    calls = {
        "x": [lambda: dropout(x.int(), i, 1, 0.1), lambda: dropout(x[0, 0], i[:1], 1, 0.1)],
        "indices": [lambda: dropout(x, i[:1], 1, 0.1), lambda: dropout(x, i.int(), 1, 0.1)],
        "add_to": [lambda: dropout(x, i, 1, 0.1, x[:1]), lambda: dropout(x, i, 1, 0.1, x.half())],
    }
    assert_refused(calls)
    if backend.launches(x):
        assert_refused({"x": [lambda: dropout(x[..., :6], i, 1, 0.1)]})
