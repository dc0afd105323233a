"""norm_modulate and gate_residual against fp64, their strides, and what they save and refuse.

test_fused_linears.py has norm_modulate with its linear.
"""

from functools import partial

import pytest
import torch
from fluxfast_kernels import (
    gate_residual,
    gate_residual_reference,
    norm_modulate,
    norm_modulate_reference,
)
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.ops import gate_residual as gate_ops
from fluxfast_kernels.ops import norm_modulate as norm_ops
from numerics import (
    assert_all_as_exact,
    assert_refused,
    assert_same_bits,
    opcheck,
    outputs_and_gradients,
    poisoned,
    saved_for_backward,
)

OPS = {  # the op, its reference, and its outputs and gradients
    "norm": (norm_modulate, norm_modulate_reference, "x dh dshift dscale"),
    "gate": (gate_residual, gate_residual_reference, "out dh dgate dy"),
}
GATE_SHAPES = [(2, 5, 128), (1, 67, 192), (2, 70, 1100)]  # tiles of 32, 16 and 4 rows; odd widths
CASES = [("gate", shape) for shape in GATE_SHAPES]
# tiles of 16, 16, 2 and 2 rows; sums in chunks of 128, 128, 16 and 16 rows
CASES += [("norm", s) for s in ((2, 5, 128), (1, 131, 192), (2, 19, 3072), (1, 3, 4096))]


def inputs(op, shape, dtype, device):
    """h a stream's tokens in the wider rows of a joint tensor, with shift and scale, or gate and y:
    chunks of a modulation; and the output's gradient."""
    B, T, D = shape
    generator = torch.Generator().manual_seed(0)
    joint = 3 * torch.randn(B, T + 3, D + 8, generator=generator) + 0.5
    modulation = (0.5 * torch.randn(B, 1, 3 * D, generator=generator)).to(dtype).to(device)
    h = joint.to(dtype).to(device)[:, 3:, :D]
    y, d_output = torch.randn(2, B, T, D, generator=generator).to(dtype).to(device)
    shift, scale, gate = modulation.chunk(3, dim=-1)
    return [h, gate, y] if op == "gate" else [h, shift, scale], d_output


@pytest.mark.grid(12)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "shape"), CASES)
def test_forward_and_gradients(path, device, op, shape, dtype):
    leaves, d_output = inputs(op, shape, dtype, device)
    function, reference, names = OPS[op]
    results = outputs_and_gradients(function, leaves, [d_output])
    assert_same_bits(outputs_and_gradients(function, leaves, [d_output]), results)
    eager, truth = (
        outputs_and_gradients(reference, leaves, [d_output], d) for d in (dtype, torch.float64)
    )
    assert_all_as_exact(names, results, eager, truth)


@pytest.mark.parametrize("shape", GATE_SHAPES)
def test_gates_launchers_write_everything(shape, device):
    (h, gate, y), dout = inputs("gate", shape, torch.bfloat16, device)
    out, dy, dy_alone = (poisoned(*shape, dtype=h.dtype, device=device) for _ in range(3))
    dgate, dgate_alone = (poisoned(*gate.shape, dtype=h.dtype, device=device) for _ in range(2))
    gate_ops.launch_forward(h, gate, y, out)
    gate_ops.launch_backward(dout, gate, y, dy, dgate)
    for written in (out, dy, dgate):
        assert torch.isfinite(written).all()
    gate_ops.launch_backward(dout, gate, None, dy_alone, None)
    gate_ops.launch_backward(dout, None, y, None, dgate_alone)
    assert_same_bits([dy_alone, dgate_alone], [dy, dgate])


@pytest.mark.parametrize("shape", [(2, 5, 128), (2, 19, 3072)])
def test_norms_launchers_write_everything(shape, device):
    (h, shift, scale), dx = inputs("norm", shape, torch.bfloat16, device)
    x, again, dh = (poisoned(*shape, dtype=h.dtype, device=device) for _ in range(3))
    mean, rstd = (poisoned(*shape[:2], dtype=torch.float32, device=device) for _ in range(2))
    sums = [poisoned(*shift.shape, dtype=h.dtype, device=device) for _ in range(4)]
    norm_ops.launch_norm_modulate(h, shift, scale, x, mean, rstd, recompute=False)
    norm_ops.launch_norm_modulate(h, shift, scale, again, mean, rstd, recompute=True)
    saved = (h, scale, (mean, rstd))
    norm_ops.launch_norm_modulate_backward(dx, *saved, dh, (sums[0], sums[1]))
    for written in (x, mean, rstd, dh, *sums[:2]):
        assert torch.isfinite(written).all()
    norm_ops.launch_norm_modulate_backward(dx, *saved, None, (sums[2], sums[3]))
    norm_ops.launch_norm_modulate_backward(dx, *saved, dx, None)  # over dx itself
    assert_same_bits([again, *sums[2:], dx], [x, *sums[:2], dh])


@pytest.mark.parametrize("op", OPS)
def test_each_gradient_alone(path, device, op):
    """Of a sum, whose gradient is expanded from one number."""
    leaves, d_output = inputs(op, (2, 5, 128), torch.float32, device)
    _, *whole = outputs_and_gradients(OPS[op][0], leaves, [torch.ones_like(d_output)])
    for wanted, expected in enumerate(whole):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(leaves)]
        with saved_for_backward() as saved:
            out = OPS[op][0](*leaves)
        out.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]
        assert_same_bits([leaves[wanted].grad], [expected])
        if op == "gate":
            _, gate, y = leaves
            assert [x.shape for x in saved] == [[], [y.shape], [gate.shape]][wanted]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, op):
    leaves, _ = inputs(op, (2, 5, 128), torch.float32, device)

    def call(*needs):
        pairs = zip(leaves, needs, strict=True)
        return [OPS[op][0](*(leaf.detach().requires_grad_(need) for leaf, need in pairs))]

    every = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
    opcheck(*(partial(call, *needs) for needs in every))


@pytest.mark.parametrize("op", OPS)
def test_compiles_as_one_graph(device, op):
    leaves, d_output = inputs(op, (2, 5, 128), torch.float32, device)
    compiled = torch.compile(OPS[op][0], fullgraph=True, backend="aot_eager")
    assert_same_bits(
        outputs_and_gradients(compiled, leaves, [d_output]),
        outputs_and_gradients(OPS[op][0], leaves, [d_output]),
    )


def test_gate_refusals():
    (h, gate, y), _ = inputs("gate", (2, 5, 128), torch.float32, "cpu")
    refused = {
        "h": [
            lambda: gate_residual(h.double(), gate, y),
            lambda: gate_residual(h[0], gate, y),
            lambda: gate_residual(h.mT.contiguous().mT, gate, y),
        ],
        "gate": [
            lambda: gate_residual(h, gate[:, 0], y),
            lambda: gate_residual(h, gate.bfloat16(), y),
            lambda: gate_residual(h, gate[..., :1].expand_as(gate), y),
        ],
        "y": [lambda: gate_residual(h, gate, y[:, :4]), lambda: gate_residual(h, gate, y.half())],
    }
    assert_refused(refused)


def test_norm_refusals():
    """(What its linear refuses, which checks the same, is in test_fused_linears.py.)"""
    (h, shift, scale), _ = inputs("norm", (2, 5, 128), torch.float32, "cpu")
    refused = {
        "h": [lambda: norm_modulate(h[0], shift, scale)],
        "shift": [lambda: norm_modulate(h, shift.bfloat16(), scale)],
        "scale": [lambda: norm_modulate(h, shift, scale[..., :64])],
    }
    assert_refused(refused)
