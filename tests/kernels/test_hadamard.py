"""The rotation: the matrix it stands for, its kernel's bits, and what it does to outliers."""

import pytest
import torch
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.quant.frozen import rotate_weight
from fluxfast_kernels.quant.hadamard import hadamard_reference, hadamard_rotate, largest_rotation
from numerics import bits

ROTATIONS = [2, 4, 8, 16, 32, 64, 128, 256]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(rotation: int) -> torch.Tensor:
    """H_b as the docstring builds it, fp64."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < rotation:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)]) / 2**0.5
    return H


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_it_is_the_matrix(rotation):
    """In fp64 to its rounding; symmetric and its own inverse."""
    x, H = draw(3, 2, 512).double(), matrix(rotation)
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
        x = draw(2, 3, rotation * (1100 // rotation)).to(device, dtype)
        expected = hadamard_reference(x.float(), rotation).to(dtype)
        kept, count = x.clone(), x.numel()
        out = torch.full((count + 64,), torch.nan, dtype=dtype, device=device)
        found = hadamard_rotate(x, rotation, out[:count].view(x.shape))
        assert found.data_ptr() == out.data_ptr() and torch.equal(x, kept)
        assert torch.equal(bits(found), bits(expected)) and out[count:].isnan().all()
        assert torch.equal(bits(hadamard_rotate(x, rotation)), bits(expected))
        assert hadamard_rotate(x, rotation, out=x) is x and torch.equal(bits(x), bits(expected))


def test_from_one_dtype_into_another(path, device):
    """As dx of a rotated layer is: fp32 until it is rotated back, then rounded."""
    x = draw(5, 64).to(device)
    out = torch.full(x.shape, torch.nan, dtype=torch.bfloat16, device=device)
    assert torch.equal(hadamard_rotate(x, 64, out), hadamard_reference(x, 64).bfloat16())


@pytest.mark.parametrize("rotation", [2, 16, 256])
def test_a_product_of_rotated_operands_is_the_product(rotation):
    x, W = draw(5, 512), draw(7, 512, seed=1)
    found = hadamard_reference(x, rotation) @ rotate_weight(W, rotation).T
    torch.testing.assert_close(found, x @ W.T, rtol=1e-5, atol=2e-5)
    assert rotate_weight(W, 0) is W


def test_an_outlier_is_spread_over_its_block_and_no_further(path, device):
    x = torch.zeros(1, 512, device=device)
    x[0, 300] = 16.0
    found = hadamard_rotate(x, 256)
    assert torch.equal(found.abs(), (torch.arange(512, device=device) >= 256).float()[None])


def test_nan_stays_in_its_block(path, device):
    x = draw(3, 128).to(device)
    expected = hadamard_rotate(x, 32)
    x[1, 70] = torch.nan
    found = hadamard_rotate(x, 32)
    assert found[1, 64:96].isnan().all()
    found[1, 64:96] = expected[1, 64:96]
    assert torch.equal(found, expected)


def test_the_largest_that_fits():
    assert [largest_rotation(*widths) for widths in ((3072,), (3072, 12288), (64, 256), (96,))] == [
        256, 256, 64, 32
    ]  # fmt: skip
    assert largest_rotation(6) == 2 and largest_rotation(256, 7) == 1


def test_no_rows(path, device):
    assert hadamard_rotate(torch.zeros(0, 64, device=device), 32).shape == (0, 64)


def test_refusals(path):
    x = draw(4, 96)
    refused = {
        "rotation": [
            lambda: hadamard_rotate(x, 0), lambda: hadamard_rotate(x, -32),
            lambda: hadamard_rotate(x, 1), lambda: hadamard_rotate(x, 48),
            lambda: hadamard_rotate(x, 64), lambda: hadamard_rotate(draw(4, 512), 512),
        ],
        "x": [lambda: hadamard_rotate(x.int(), 32)],
        "out": [
            lambda: hadamard_rotate(x, 32, x[:, :64]), lambda: hadamard_rotate(x, 32, x[:3]),
            lambda: hadamard_rotate(x[:3], 32, x),
        ],
    }  # fmt: skip
    for name, calls in refused.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"^{name} must be"):
                call()


def test_a_launch_takes_contiguous_tensors_alone(device):
    x = draw(4, 192).to(device)
    for given in ((x[:, :96], 32), (x[:, :96].contiguous(), 32, x[:, 96:])):
        with pytest.raises(ValueError, match="^x must be contiguous"):
            hadamard_rotate(*given)
