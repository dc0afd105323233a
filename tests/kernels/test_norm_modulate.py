"""norm_modulate against fp64, and what it refuses (its linear: test_fused_linears.py)."""

import pytest
import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.ops import norm_modulate as ops
from numerics import (
    assert_all_as_exact,
    assert_refused,
    assert_same_bits,
    outputs_and_gradients,
    poisoned,
)

# tiles of 16, 16, 2 and 2 rows; sums in chunks of 128, 128, 16 and 16 rows
SHAPES = [(2, 5, 128), (1, 131, 192), (2, 19, 3072), (1, 3, 4096)]


def inputs(shape, dtype, device):
    """h a stream's tokens in the wider rows of a joint tensor, two chunks; and dx."""
    B, T, D = shape
    generator = torch.Generator().manual_seed(0)
    joint = (3 * torch.randn(B, T + 3, D + 8, generator=generator) + 0.5).to(dtype).to(device)
    modulation = (0.5 * torch.randn(B, 1, 3 * D, generator=generator)).to(dtype).to(device)
    dx = torch.randn(B, T, D, generator=generator).to(dtype).to(device)
    return [joint[:, 3:, :D], *modulation.chunk(3, dim=-1)[:2]], [dx]


@pytest.mark.grid(8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(path, device, shape, dtype):
    leaves, dx = inputs(shape, dtype, device)
    results = outputs_and_gradients(ops.norm_modulate, leaves, dx)
    assert_same_bits(outputs_and_gradients(ops.norm_modulate, leaves, dx), results)
    eager, truth = (
        outputs_and_gradients(ops.norm_modulate_reference, leaves, dx, d)
        for d in (dtype, torch.float64)
    )
    assert_all_as_exact("x dh dshift dscale", results, eager, truth)


@pytest.mark.parametrize("shape", [(2, 5, 128), (2, 19, 3072)])
def test_launchers_write_everything(shape, device):
    (h, shift, scale), (dx,) = inputs(shape, torch.bfloat16, device)
    x, again, dh = (poisoned(*shape, dtype=h.dtype, device=device) for _ in range(3))
    mean, rstd = (poisoned(*shape[:2], dtype=torch.float32, device=device) for _ in range(2))
    sums = [poisoned(*shift.shape, dtype=h.dtype, device=device) for _ in range(4)]
    ops.launch_norm_modulate(h, shift, scale, x, mean, rstd, recompute=False)
    ops.launch_norm_modulate(h, shift, scale, again, mean, rstd, recompute=True)
    saved = (h, scale, (mean, rstd))
    ops.launch_norm_modulate_backward(dx, *saved, dh, (sums[0], sums[1]))
    for written in (x, mean, rstd, dh, *sums[:2]):
        assert torch.isfinite(written).all()
    ops.launch_norm_modulate_backward(dx, *saved, None, (sums[2], sums[3]))
    ops.launch_norm_modulate_backward(dx, *saved, dx, None)  # over dx itself
    assert_same_bits([again, *sums[2:], dx], [x, *sums[:2], dh])


def test_expanded_gradient(device):
    leaves = [x.requires_grad_() for x in inputs((2, 5, 128), torch.float32, device)[0]]
    ops.norm_modulate(*leaves).sum().backward()
    assert torch.equal(leaves[1].grad, torch.full_like(leaves[1], 5.0))


def test_opcheck(device):
    (h, shift, scale), (dx,) = inputs((2, 5, 128), torch.float32, device)
    leaves = tuple(x.detach().requires_grad_() for x in (h, shift, scale))
    torch.library.opcheck(ops._norm_modulate, leaves)
    _, mean, rstd, _ = ops.norm_modulate_forward(h, shift, scale)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops._norm_modulate_backward, (dx, h, scale, mean, rstd, *needs))


def test_compiles_as_one_graph(device):
    leaves, dx = inputs((2, 5, 128), torch.float32, device)
    compiled = torch.compile(ops.norm_modulate, fullgraph=True, backend="aot_eager")
    results, plain = (outputs_and_gradients(f, leaves, dx) for f in (compiled, ops.norm_modulate))
    assert_same_bits(results, plain)


def test_gradcheck():
    leaves, _ = inputs((2, 3, 8), torch.float64, "cpu")
    with backend.cpu_launches(False):
        assert torch.autograd.gradcheck(
            ops.norm_modulate_reference, [x.detach().requires_grad_() for x in leaves]
        )


def test_refusals():
    (h, shift, scale), _ = inputs((2, 5, 128), torch.float32, "cpu")
    wide = h.new_empty(1, 1, 2 * ops.MAX_WIDTH)
    refused = {
        "h": [
            lambda: ops.norm_modulate(h.double(), shift, scale),
            lambda: ops.norm_modulate(h[0], shift, scale),
            lambda: ops.norm_modulate(h.mT.contiguous().mT, shift, scale),
            lambda: ops.norm_modulate(wide, shift, scale),
        ],
        "shift": [
            lambda: ops.norm_modulate(h, shift[:, 0], scale),
            lambda: ops.norm_modulate(h, shift.bfloat16(), scale),
        ],
        "scale": [
            lambda: ops.norm_modulate(h, shift, scale[..., :64]),
            lambda: ops.norm_modulate(h, shift, scale[..., :1].expand_as(scale)),
        ],
    }
    assert_refused(refused)
