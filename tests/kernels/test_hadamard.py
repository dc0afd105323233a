"""The rotation: the matrix it stands for, its kernel's bits, and what it does to outliers."""

import pytest
import torch
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.quant.frozen import rotate_weight
from fluxfast_kernels.quant.hadamard import hadamard_reference, hadamard_rotate, largest_rotation
from numerics import assert_refused, assert_same_bits, randn

ROTATIONS = [2, 4, 8, 16, 32, 64, 128, 256]


def matrix(rotation: int) -> torch.Tensor:
    """H_b as the docstring builds it, fp64."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < rotation:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)]) / 2**0.5
    return H


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_it_is_the_matrix(rotation):
    """In fp64 to its rounding; symmetric and its own inverse."""
    x, H = randn(3, 2, 512).double(), matrix(rotation)
    expected = (x.view(-1, rotation) @ H).view(x.shape)
    torch.testing.assert_close(hadamard_reference(x, rotation), expected, rtol=1e-13, atol=1e-13)
    again = hadamard_reference(hadamard_reference(x, rotation), rotation)
    torch.testing.assert_close(again, x, rtol=1e-13, atol=1e-13)
    assert torch.equal(H, H.T)


@pytest.mark.grid(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_gives_the_references_bits(path, device, dtype):
    """Formed in fp32, rounded once; over the end of a program's 1024 columns, and in place."""
    for rotation in ROTATIONS:
        x = randn(2, 3, rotation * (1100 // rotation)).to(device, dtype)
        expected = hadamard_reference(x.float(), rotation).to(dtype)
        before, count = x.clone(), x.numel()
        out = torch.full((count + 64,), torch.nan, dtype=dtype, device=device)
        result = hadamard_rotate(x, rotation, out[:count].view(x.shape))
        assert result.data_ptr() == out.data_ptr() and out[count:].isnan().all()
        assert_same_bits([result, hadamard_rotate(x, rotation), x], [expected, expected, before])
        assert hadamard_rotate(x, rotation, out=x) is x
        assert_same_bits([x], [expected])


def test_from_one_dtype_into_another(path, device):
    """As dx of a rotated layer is: fp32 until it is rotated back, then rounded."""
    x = randn(5, 64).to(device)
    out = torch.full(x.shape, torch.nan, dtype=torch.bfloat16, device=device)
    assert torch.equal(hadamard_rotate(x, 64, out), hadamard_reference(x, 64).bfloat16())


@pytest.mark.parametrize("rotation", [2, 16, 256])
def test_a_product_of_rotated_operands_is_the_product(rotation):
    x, W = randn(5, 512), randn(7, 512, seed=1)
    result = hadamard_reference(x, rotation) @ rotate_weight(W, rotation).T
    torch.testing.assert_close(result, x @ W.T, rtol=1e-5, atol=2e-5)
    assert rotate_weight(W, 0) is W


def test_an_outlier_is_spread_over_its_block_and_no_further(path, device):
    x = torch.zeros(1, 512, device=device)
    x[0, 300] = 16.0
    result = hadamard_rotate(x, 256)
    assert torch.equal(result.abs(), (torch.arange(512, device=device) >= 256).float()[None])


def test_nan_stays_in_its_block(path, device):
    x = randn(3, 128).to(device)
    expected = hadamard_rotate(x, 32)
    x[1, 70] = torch.nan
    result = hadamard_rotate(x, 32)
    assert result[1, 64:96].isnan().all()
    result[1, 64:96] = expected[1, 64:96]
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("widths", "largest"),
    [((3072, 12288), 256), ((64, 256), 64), ((96,), 32), ((6,), 2), ((256, 7), 1)],
)
def test_the_largest_that_fits(widths, largest):
    assert largest_rotation(*widths) == largest


def test_no_rows(path, device):
    assert hadamard_rotate(torch.zeros(0, 64, device=device), 32).shape == (0, 64)


def test_refusals(path):
    x, wide = randn(4, 96), randn(4, 512)
    wrong = [(x, 0), (x, -32), (x, 1), (x, 48), (x, 64), (wide, 512)]
    refused = {
        "rotation": [lambda each=each: hadamard_rotate(*each) for each in wrong],
        "x": [lambda: hadamard_rotate(x.int(), 32)],
        "out": [
            lambda: hadamard_rotate(x, 32, x[:, :64]),
            lambda: hadamard_rotate(x, 32, x[:3]),
            lambda: hadamard_rotate(x[:3], 32, x),
        ],
    }
    assert_refused(refused)


def test_a_launch_takes_contiguous_tensors_alone(device):
    x = randn(4, 192).to(device)
    for given in ((x[:, :96], 32), (x[:, :96].contiguous(), 32, x[:, 96:])):
        with pytest.raises(ValueError, match="^x must be contiguous"):
            hadamard_rotate(*given)
