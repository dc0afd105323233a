"""8-bit products at the edges: what is not finite, zero, tiny or huge, outliers, odd widths, and
what is refused."""

import pytest
import torch
from fluxfast_kernels import FrozenWeight, LoRAUpdate
from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.gemm.linear import linear_backward
from fluxfast_kernels.ops.gelu import gelu_lora_linear
from fluxfast_kernels.ops.lora_linear import lora_linear
from fluxfast_kernels.quant import frozen
from linears_8bit import Case, Drawn, K, N, T, norm
from numerics import relative_error, skip_without_fp8

KINDS = ("int8", "fp8")


def normal(*shape, seed=0, std=1.0):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- not finite

# the leaf that gets a bad value, and the case
INPUTS = [
    ("x", Case("linear", "int8", "int8", gate=True)),
    ("x", Case("linear", "int8", "int8", rotation=64, parts=())),
    ("x", Case("linear", "fp8", "nf4")),
    ("h", Case("norm", "int8", "nf4", split=80)),
    ("h", Case("norm", "fp8", "fp8", rotation=32, parts=())),
    ("u", Case("gelu", "int8", "int8", head=48, gate=True)),
    ("head", Case("gelu", "int8", "nf4", head=64)),
    ("head", Case("gelu", "fp8", "fp8", head=64, parts=())),
    ("u", Case("gelu", "int8", "int8", rotation=128, parts=(), saved_bits=8)),
]


@pytest.mark.grid(4)
@pytest.mark.parametrize(("leaf", "case"), INPUTS)
def test_nan_or_infinity_in_a_token_fills_its_result_and_no_other(path, device, leaf, case):
    skip_without_fp8(case.kind, device)
    drawn = Drawn(case, device)
    with torch.no_grad():
        clean = torch.cat(drawn.call(drawn.leaves), -1)
        x = drawn.leaves[leaf].clone()
        for token, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
            x[1, token + 1, 7 * token] = bad
        y = torch.cat(drawn.call(drawn.leaves | {leaf: x}), -1)
    assert y[1, 1:4].isnan().all()
    y[1, 1:4] = clean[1, 1:4]
    assert torch.equal(y, clean)


GRADIENTS = [
    Case("linear", "int8", "int8", gate=True),
    Case("linear", "int8", "int8", parts=(), gate=True),
    Case("linear", "fp8", "fp8", rotation=64, parts=()),
    Case("linear", "int8", "nf4", rotation=32, parts=(0, 50, 0)),
    Case("norm", "int8", "int8", split=80),
    Case("gelu", "fp8", "nf4", head=64),
]


@pytest.mark.grid(1)
@pytest.mark.parametrize("case", GRADIENTS)
def test_nan_or_infinity_in_a_gradient_fills_its_tokens_dx_and_no_other(path, device, case):
    """In columns with an update and without one (50 to 64 and beyond)."""
    skip_without_fp8(case.kind, device)
    drawn = Drawn(case, device)
    of_tokens = [name for name in ("x", "h", "u", "head") if name in drawn.leaves]
    clean = drawn.gradients(drawn.call)
    for columns in ((3, 40, 47), (52, 60, 63)):
        dy = torch.cat(drawn.dys, -1)
        for token, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
            dy[1, token + 1, columns[token]] = bad
        given = drawn.dys
        drawn.dys = list(dy.tensor_split([case.split] if case.split else [], -1))
        found = drawn.gradients(drawn.call)
        drawn.dys = given
        for name in of_tokens:
            dx = found[name].clone()
            assert dx[1, 1:4].isnan().all(), name
            dx[1, 1:4] = clean[name][1, 1:4]
            assert torch.equal(dx, clean[name]), name


@pytest.mark.grid(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weights_row_that_is_not_finite_fills_its_column(path, device, kind):
    skip_without_fp8(kind, device)
    x, W = normal(2, T, K).to(device), normal(20, K, seed=1).to(device)
    clean = lora_linear(x, FrozenWeight([W], matmul=kind))
    W[5, 9], W[19, 0] = torch.nan, torch.inf
    for weight in ([W], list(frozen.quantize_8bit(W, kind))):
        y = lora_linear(x, FrozenWeight(weight, matmul=kind))
        assert y[..., [5, 19]].isnan().all()
        y[..., [5, 19]] = clean[..., [5, 19]]
        assert torch.equal(y, clean)


# ---------------------------------------------------------------- zero, tiny and huge


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_give_exactly_the_bias(path, device, kind):
    skip_without_fp8(kind, device)
    for case in (
        Case("linear", kind, "nf4"), Case("linear", kind, "nf4", bias=False, rotation=64),
        Case("gelu", kind, "nf4", head=64), Case("norm", kind, kind, bias=False, parts=()),
    ):  # fmt: skip
        drawn = Drawn(case, device)
        for name, leaf in drawn.leaves.items():
            if name in ("x", "u", "head"):
                leaf[0, 2:4] = 0.0
            if name in ("shift", "scale"):  # norm has no row of zeros: LayerNorm(h) · 0 + 0
                leaf[0] = -1.0 if name == "scale" else 0.0
        for dy in drawn.dys:
            dy[1, 1] = 0.0
        found = drawn.gradients(drawn.call)
        y = found["y0"][0, 2:4]
        assert torch.equal(y, (torch.zeros_like(y) if drawn.bias is None else drawn.bias + 0 * y))
        for name in ("x", "h", "u", "head"):
            if name in found:
                assert not found[name][1, 1].any(), name


@pytest.mark.grid(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_times_a_power_of_two_gives_its_result_times_that(path, device, kind):
    """Bit for bit, for values from 2^-90 (a gradient: 2^-76) to 8e37 (rotated: 1e36, since the
    sums that a rotation forms are up to its width times as large)."""
    skip_without_fp8(kind, device)
    x, dy = normal(1, 4, K).to(device), normal(1, 4, N, seed=2).to(device)
    x, dy = (v / v.abs().amax(-1, keepdim=True) for v in (x, dy))
    weight = [part.to(device) for part in frozen.quantize_8bit(normal(N, K, std=K**-0.5), kind)]
    factor = torch.tensor([2.0**126, 2.0**100, 2.0**-60, 2.0**-90], device=device)[:, None]
    for rotation in (0, 32):
        frozen_weight = FrozenWeight(weight, None, kind, rotation)
        plain, scaled = (lora_linear(v, frozen_weight) for v in (x, x * factor))
        assert scaled.isfinite().all() and torch.equal(scaled, plain * factor)
        factor[0] = 2.0**120
    factor[3] = 2.0**-76
    given = ([x], FrozenWeight(weight, matmul=kind), None, True)
    plain, scaled = (linear_backward([v], *given)[0][0] for v in (dy, dy * factor))
    assert scaled.isfinite().all() and torch.equal(scaled, plain * factor)


@pytest.mark.parametrize("kind", KINDS)
def test_denormal_rows_vanish(path, device, kind):
    """Below 1e-32 every value is 0 or nearly: the result is the bias, never NaN."""
    skip_without_fp8(kind, device)
    weight = [part.to(device) for part in frozen.quantize_8bit(normal(N, K), kind)]
    x, bias = normal(1, 4, K, seed=1).to(device), normal(N, seed=2).to(device)
    y = lora_linear(x * 1e-40, FrozenWeight(weight, bias, kind))
    assert torch.equal(y, bias.expand_as(y))


# ---------------------------------------------------------------- odd widths, no rows


@pytest.mark.grid(5)
@pytest.mark.parametrize(("inner", "outer"), [(1, 5), (5, 1), (67, 33)])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_widths(path, device, kind, inner, outer):
    """Both products, the update and the weight in 8 bits; K = 1 is where torch's own product of
    int8 reads beyond its operand."""
    skip_without_fp8(kind, device)
    x, W = normal(2, 3, inner).to(device), normal(outer, inner, seed=1).to(device)
    a, b = normal(2, inner, seed=2).to(device), normal(outer, 2, seed=3).to(device)
    x, a, b = (leaf.requires_grad_() for leaf in (x, a, b))
    update = LoRAUpdate(a, b, [0, outer, 0])
    y = lora_linear(x, FrozenWeight([W], matmul=kind), update)
    dy = normal(2, 3, outer, seed=4).to(device)
    found = [y, *torch.autograd.grad(y, (x, a, b), dy)]
    y = x.double() @ (W.double() + b.double() @ a.double()).T
    expected = [y, *torch.autograd.grad(y, (x, a, b), dy.double())]
    for each, truth in zip(found, expected, strict=True):
        assert relative_error(each, truth) < (0.02 if kind == "int8" else 0.06)


def test_no_rows(path, device):
    x = torch.zeros(2, 0, K, device=device).requires_grad_()
    a, b = (normal(*s).to(device).requires_grad_() for s in ((4, K), (N, 4)))
    weight = [part.to(device) for part in frozen.quantize_8bit(normal(N, K), "int8")]
    for rotation in (0, 32):
        update = LoRAUpdate(a, b, [0, N, 0])
        y = lora_linear(x, FrozenWeight(weight, None, "int8", rotation), update)
        assert y.shape == (2, 0, N)
        dx, da, db = torch.autograd.grad(y.sum(), (x, a, b))
        assert dx.shape == x.shape and not da.any() and not db.any()


def test_a_matrix_of_tokens_with_a_gate(path, device):
    """x [M, K]: as one sample of M tokens."""
    x = normal(5, K).to(device)
    weight = [part.to(device) for part in frozen.quantize_8bit(normal(N, K, seed=1), "int8")]
    gate, residual = normal(1, N, seed=2).to(device), normal(5, N, seed=3).to(device)
    found, expected = [], []
    for leaf, into in ((x, found), (x[None], expected)):
        leaf = leaf.clone().requires_grad_()
        gated = gate.view(leaf.shape[:-2] + (1, N)), residual.view(leaf.shape[:-1] + (N,))
        y = lora_linear(leaf, FrozenWeight(weight, matmul="int8"), None, *gated)
        into += [y.detach(), torch.autograd.grad(y, leaf, y.detach())[0]]
    assert all(torch.equal(a, b[0]) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------- gradients that are not asked for


@pytest.mark.grid(2)
@pytest.mark.parametrize("op", ["linear", "norm", "gelu"])
def test_the_updates_gradients_without_dx(path, device, op):
    """Nothing is quantized then; A and B get the same."""
    drawn = Drawn(Case(op, "int8", "int8", gate=op != "norm", rotation=32), device)
    whole = drawn.gradients(drawn.call)
    leaves = {
        name: leaf.clone().requires_grad_() if "lora" in name else leaf
        for name, leaf in drawn.leaves.items()
    }
    a, b = torch.autograd.grad(drawn.call(leaves), (leaves["lora_a"], leaves["lora_b"]), drawn.dys)
    torch.testing.assert_close(a, whole["lora_a"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b, whole["lora_b"], rtol=1e-5, atol=1e-6)


def test_one_output_that_is_not_used(path, device):
    """Its gradient is zeros: a scale of 1e-30 / 127 and values of 0."""
    drawn = Drawn(Case("norm", "int8", "int8", split=80), device)
    drawn.dys[1] = torch.zeros_like(drawn.dys[1])
    expected = drawn.gradients(drawn.call)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in drawn.leaves.items()}
    found = torch.autograd.grad(drawn.call(leaves)[0], list(leaves.values()), drawn.dys[0])
    for name, value in zip(leaves, found, strict=True):
        assert torch.equal(value, expected[name]) and value.any(), name


# ---------------------------------------------------------------- outliers


@pytest.mark.parametrize("outliers", [False, True])
def test_a_rotation_takes_the_outliers_error_away(outliers):
    """int8 against fp64 over 3072 columns, as FLUX has; with 8 channels 40 times as large or none.
    In plain torch: the launchers give the same values."""
    x, W = normal(128, 3072), normal(256, 3072, seed=1)
    if outliers:
        x[:, torch.randperm(3072, generator=torch.Generator().manual_seed(2))[:8]] *= 40
    truth, error = x.double() @ W.double().T, {}
    with backend.cpu_launches(False):
        for rotation in (0, 256):
            weight = list(frozen.quantize_8bit(W, "int8", rotation))
            y = lora_linear(x, FrozenWeight(weight, None, "int8", rotation))
            error[rotation] = relative_error(y, truth)
    said = f"outliers: {outliers}; {error[0]:.2%} without, {error[256]:.2%} with rotation 256"
    if outliers:
        assert error[0] > 0.04 and error[256] < 0.02, said
    else:
        assert error[0] < 0.018 and error[256] < 0.018, said


# ---------------------------------------------------------------- refusals


def test_refusals(path):
    x, W = normal(2, 3, 96), normal(40, 96, seed=1)
    values, scale = frozen.quantize_8bit(W, "int8")

    def y(weight=(W,), matmul="int8", rotation=0, bias=None):
        return lora_linear(x, FrozenWeight(list(weight), bias, matmul, rotation))

    def gelu(matmul, rotation=0):
        weight = FrozenWeight([W], None, matmul, rotation)
        return gelu_lora_linear(x[..., 16:], weight, head=x[..., :16])

    def norm_modulate(matmul, rotation=0):
        ones = torch.ones(2, 1, 96)
        weight = FrozenWeight([W], None, matmul, rotation)
        return norm.norm_modulate_lora_linear(x, ones, ones, weight)

    for matmul in ("int4", "INT8"):
        check_refused("matmul", y, matmul=matmul)
    check_refused("matmul", y, frozen.quantize_8bit(W, "fp8"))
    check_refused("matmul", y, (values, scale), "fp8")
    check_refused("matmul", gelu, "fp4")
    check_refused("matmul", norm_modulate, "bf16")
    check_refused("rotation", y, matmul="", rotation=32)
    for rotation in (48, 64, -2, 1, 512):
        check_refused("rotation", y, rotation=rotation)
    check_refused("rotation", gelu, "int8", 32)
    check_refused("rotation", norm_modulate, "int8", 64)
    check_refused(r"weight \(quantized\)", y, (values.T.contiguous().T, scale))
    for wrong in (scale[1:], scale.double(), scale[:, None], scale.repeat(2)[::2]):
        check_refused(r"weight \(scale\)", y, (values, wrong))
    check_refused(r"weight \(scale\)", y, (values, scale, scale, scale))
    for wrong in ((values,), (W.int(),), (values[:, :64], scale), (values[0], scale), (W,) * 3):
        check_refused("weight", y, wrong)
    check_refused("weight", y, (values,), "")
    check_refused("bias", y, bias=W[0])
    check_refused("bias", y, (values, scale), bias=scale[1:])


def check_refused(name, call, *arguments, **named):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        call(*arguments, **named)


def test_a_launch_refuses_a_dense_weight_of_other_strides(device):
    """Which its kernel would read as if they were not there."""
    W = normal(40, 96).to(device).T.contiguous().T
    with pytest.raises(ValueError, match="^weight must be of last stride 1"):
        lora_linear(normal(2, 3, 96).to(device), FrozenWeight([W], matmul="int8"))


def test_fp8_is_refused_before_sm_89(monkeypatch):
    x, W = normal(2, 3, 96), normal(40, 96, seed=1)
    ones, fp8 = torch.ones(2, 1, 96), FrozenWeight([W], matmul="fp8")
    for arch, can in ((75, False), (80, False), (86, False), (89, True), (90, True), (120, True)):
        monkeypatch.setattr(dispatch, "arch_of", lambda device, arch=arch: arch)
        with backend.cpu_launches(False):
            calls = [
                lambda: lora_linear(x, fp8),
                lambda: gelu_lora_linear(x, fp8),
                lambda: norm.norm_modulate_lora_linear(x, ones, ones, fp8),
            ]
            for call in calls:
                if can:
                    assert call().isfinite().all()
                else:
                    with pytest.raises(ValueError, match=f"^matmul must be .* sm_{arch}"):
                        call()
            assert lora_linear(x, FrozenWeight([W], matmul="int8")).isfinite().all()
