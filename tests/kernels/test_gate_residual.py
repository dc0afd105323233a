"""gate_residual against fp64, its strides, what it saves, and what it refuses."""

import pytest
import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.ops import gate_residual as ops
from numerics import (
    assert_all_as_exact,
    assert_refused,
    assert_same_bits,
    outputs_and_gradients,
    poisoned,
    saved_for_backward,
)

SHAPES = [(2, 5, 128), (1, 67, 192), (2, 70, 1100)]  # tiles of 32, 16 and 4 rows; odd widths


def inputs(shape, dtype, device):
    """h a stream's tokens in the wider rows of a joint tensor, gate a chunk, y; and dout."""
    B, T, D = shape
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(B, T + 3, D + 8, generator=generator).to(dtype).to(device)
    modulation = torch.randn(B, 1, 3 * D, generator=generator).to(dtype).to(device)
    y, dout = torch.randn(2, B, T, D, generator=generator).to(dtype).to(device)
    return [joint[:, 3:, :D], modulation.chunk(3, dim=-1)[1], y], [dout]


@pytest.mark.grid(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(path, device, shape, dtype):
    leaves, dout = inputs(shape, dtype, device)
    results = outputs_and_gradients(ops.gate_residual, leaves, dout)
    assert_same_bits(outputs_and_gradients(ops.gate_residual, leaves, dout), results)
    eager, truth = (
        outputs_and_gradients(ops.gate_residual_reference, leaves, dout, d)
        for d in (dtype, torch.float64)
    )
    assert_all_as_exact("out dh dgate dy", results, eager, truth)


@pytest.mark.parametrize("shape", SHAPES)
def test_launchers_write_everything(shape, device):
    (h, gate, y), (dout,) = inputs(shape, torch.bfloat16, device)
    out, dy, dy_alone = (poisoned(*shape, dtype=h.dtype, device=device) for _ in range(3))
    dgate, dgate_alone = (poisoned(*gate.shape, dtype=h.dtype, device=device) for _ in range(2))
    ops.launch_forward(h, gate, y, out)
    ops.launch_backward(dout, gate, y, dy, dgate)
    for written in (out, dy, dgate):
        assert torch.isfinite(written).all()
    ops.launch_backward(dout, gate, None, dy_alone, None)
    ops.launch_backward(dout, None, y, None, dgate_alone)
    assert_same_bits([dy_alone, dgate_alone], [dy, dgate])


def test_saves_only_what_is_asked_for(device):
    (h, gate, y), _ = inputs((2, 5, 128), torch.float32, device)
    for wanted in range(3):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate((h, gate, y))]
        with saved_for_backward() as saved:
            out = ops.gate_residual(*leaves)
        assert [x.shape for x in saved] == [[], [y.shape], [gate.shape]][wanted]
        out.sum().backward()  # an expanded gradient
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]


def test_opcheck(device):
    leaves, (dout,) = inputs((2, 5, 128), torch.float32, device)
    _, gate, y = leaves
    torch.library.opcheck(ops._gate_residual, tuple(x.detach().requires_grad_() for x in leaves))
    for arguments in ((dout, gate, y), (dout, None, y), (dout, gate, None)):
        torch.library.opcheck(ops._gate_residual_backward, arguments)


def test_compiles_as_one_graph(device):
    leaves, dout = inputs((2, 5, 128), torch.float32, device)
    compiled = torch.compile(ops.gate_residual, fullgraph=True, backend="aot_eager")
    results, plain = (outputs_and_gradients(f, leaves, dout) for f in (compiled, ops.gate_residual))
    assert_same_bits(results, plain)


def test_gradcheck():
    leaves, _ = inputs((2, 3, 5), torch.float64, "cpu")
    with backend.cpu_launches(False):
        assert torch.autograd.gradcheck(
            ops.gate_residual, [x.detach().requires_grad_() for x in leaves]
        )


def test_refusals():
    (h, gate, y), _ = inputs((2, 5, 128), torch.float32, "cpu")
    refused = {
        "h": [
            lambda: ops.gate_residual(h.double(), gate, y),
            lambda: ops.gate_residual(h[0], gate, y),
            lambda: ops.gate_residual(h.mT.contiguous().mT, gate, y),
        ],
        "gate": [
            lambda: ops.gate_residual(h, gate[:, 0], y),
            lambda: ops.gate_residual(h, gate.bfloat16(), y),
            lambda: ops.gate_residual(h, gate[..., :1].expand_as(gate), y),
        ],
        "y": [
            lambda: ops.gate_residual(h, gate, y[:, :4]),
            lambda: ops.gate_residual(h, gate, y.half()),
        ],
    }
    assert_refused(refused)
