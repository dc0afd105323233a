"""gate_residual against fp64, its strides, what it saves, and what it refuses."""

import pytest
import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.ops import gate_residual as ops
from numerics import assert_as_exact, poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 5, 128), (1, 67, 192), (2, 70, 1100)]  # tiles of 32, 16 and 4 rows; odd widths


def inputs(shape, dtype, device, seed=0):
    """h a stream's tokens in the wider rows of a joint tensor, gate a chunk, y, and dout."""
    B, T, D = shape
    draw = torch.Generator().manual_seed(seed)
    joint = torch.randn(B, T + 3, D + 8, generator=draw).to(dtype).to(device)
    modulation = torch.randn(B, 1, 3 * D, generator=draw).to(dtype).to(device)
    y, dout = torch.randn(2, B, T, D, generator=draw).to(dtype).to(device)
    return joint[:, 3:, :D], modulation.chunk(3, dim=-1)[1], y, dout


def gradients(function, leaves, dout):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def compare(shape, dtype, device):
    *leaves, dout = inputs(shape, dtype, device)
    found = gradients(ops.gate_residual, leaves, dout)
    eager = gradients(ops.gate_residual_reference, leaves, dout)
    truth = gradients(ops.gate_residual_reference, [x.double() for x in leaves], dout.double())
    for name, *three in zip(("out", "dh", "dgate", "dy"), found, eager, truth, strict=True):
        assert_as_exact(name, *three)


@pytest.mark.grid(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape, dtype, device):
    compare(shape, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_path(dtype):
    with backend.cpu_launches(False):
        compare((2, 70, 1100), dtype, "cpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_launchers_write_everything(shape, device):
    h, gate, y, dout = inputs(shape, torch.bfloat16, device)
    out, dy = (poisoned(*shape, dtype=h.dtype, device=device) for _ in range(2))
    dgate = poisoned(*gate.shape, dtype=h.dtype, device=device)
    ops.launch_forward(h, gate, y, out)
    ops.launch_backward(dout, gate, y, dy, dgate)
    for written in (out, dy, dgate):
        assert torch.isfinite(written).all()
    alone, gate_alone = torch.full_like(dy, float("nan")), torch.full_like(dgate, float("nan"))
    ops.launch_backward(dout, gate, None, alone, None)
    ops.launch_backward(dout, None, y, None, gate_alone)
    assert torch.equal(alone, dy) and torch.equal(gate_alone, dgate)


def test_saves_only_what_is_asked_for(device):
    h, gate, y, dout = inputs((2, 5, 128), torch.float32, device)
    for needs in [(True, False, False), (False, True, False), (False, False, True)]:
        leaves = [
            x.detach().requires_grad_(need) for x, need in zip((h, gate, y), needs, strict=True)
        ]
        saved = []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.shape) or x, lambda x: x
        )
        with keep:
            out = ops.gate_residual(*leaves)
        assert saved == [s for s, need in ((gate.shape, needs[2]), (y.shape, needs[1])) if need]
        out.sum().backward()  # an expanded gradient
        assert [leaf.grad is not None for leaf in leaves] == list(needs)


def test_two_runs_agree_bit_for_bit(device):
    *leaves, dout = inputs((2, 70, 192), torch.bfloat16, device)
    first, second = (gradients(ops.gate_residual, leaves, dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck(device):
    h, gate, y, dout = inputs((2, 5, 128), torch.float32, device)
    leaves = tuple(x.detach().requires_grad_() for x in (h, gate, y))
    torch.library.opcheck(ops._gate_residual, leaves)
    for arguments in ((dout, gate, y), (dout, None, y), (dout, gate, None)):
        torch.library.opcheck(ops._gate_residual_backward, arguments)


def test_compiles_as_one_graph(device):
    *leaves, dout = inputs((2, 5, 128), torch.float32, device)
    compiled = torch.compile(ops.gate_residual, fullgraph=True, backend="aot_eager")
    found, plain = (gradients(f, leaves, dout) for f in (compiled, ops.gate_residual))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_gradcheck_of_the_reference():
    h, gate, y, _ = inputs((2, 3, 5), torch.float64, "cpu")
    leaves = [x.detach().requires_grad_() for x in (h, gate, y)]
    assert torch.autograd.gradcheck(ops.gate_residual_reference, leaves)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("h", lambda h, gate, y: (h.double(), gate, y)),
        ("h", lambda h, gate, y: (h[0], gate, y)),
        ("h", lambda h, gate, y: (h.mT.contiguous().mT, gate, y)),
        ("gate", lambda h, gate, y: (h, gate[:, 0], y)),
        ("gate", lambda h, gate, y: (h, gate.bfloat16(), y)),
        ("gate", lambda h, gate, y: (h, gate[..., :1].expand_as(gate), y)),
        ("y", lambda h, gate, y: (h, gate, y[:, :4])),
        ("y", lambda h, gate, y: (h, gate, y.half())),
    ],
)
def test_refuses(name, wrong):
    h, gate, y, _ = inputs((2, 5, 128), torch.float32, "cpu")
    with pytest.raises(ValueError, match=f"^{name} must be"):
        ops.gate_residual(*wrong(h, gate, y))
