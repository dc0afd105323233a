"""Attention: the Triton kernels, the aten backends, and the differentiable op."""

import pytest
import torch
import torch.nn.functional as F
from fluxfast_kernels import attention, attention_reference
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.attention import choose_backend, table
from fluxfast_kernels.ops.attention import (
    QKV,
    attention_backward,
    attention_forward,
    launch_backward,
    launch_forward,
)
from numerics import assert_as_exact, poisoned, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, T, H = 2, 110, 2  # one whole block and a part of one


def draw(*shape, device="cpu", dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(device)


def heads(dtype, device, C=64, tokens=T):
    """q, k, v and do [B, H, T, C], cut out of wider rows and longer sequences."""
    wide = draw(B, tokens + 3, 4 * H * C + 8, dtype=dtype, device=device)
    four = wide[:, 1 : 1 + tokens, : 4 * H * C].unflatten(-1, (4, H, C))
    return [x.transpose(1, 2) for x in four.unbind(2)]


def through_autograd(attend, q, k, v, do, dtype):
    """o, dq, dk, dv in `dtype`."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    o = attend(q, k, v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do.to(dtype))]


def assert_all_as_exact(found, q, k, v, do):
    eager = through_autograd(F.scaled_dot_product_attention, q, k, v, do, q.dtype)
    truth = through_autograd(F.scaled_dot_product_attention, q, k, v, do, torch.float64)
    for name, *three in zip(("o", "dq", "dk", "dv"), found, eager, truth, strict=True):
        assert_as_exact(name, *three)


def launch(q, k, v, do):
    """o, dq, dk, dv and lse by the Triton launchers, all poisoned beforehand."""
    b, h, t, c = q.shape

    def empty():
        return poisoned(b, t, h, c, dtype=q.dtype, device=q.device).transpose(1, 2)

    o, grads = empty(), QKV(empty(), empty(), empty())
    lse, delta = (poisoned(b, h, t, dtype=torch.float32, device=q.device) for _ in range(2))
    launch_forward(QKV(q, k, v), o, lse)
    launch_backward(do, QKV(q, k, v), o, lse, grads, delta)
    return [o, *grads], lse


# ---------------------------------------------------------------- the Triton kernels


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    ("dtype", "C", "tokens"),
    [(dtype, 64, T) for dtype in DTYPES]
    + [(torch.bfloat16, 32, T), (torch.bfloat16, 128, T), (torch.float32, 32, 128)],
)
def test_kernels(device, dtype, C, tokens):
    q, k, v, do = heads(dtype, device, C, tokens)
    found, lse = launch(q, k, v, do)
    assert_all_as_exact(found, q, k, v, do)
    truth = attention_reference(q.double(), k.double(), v.double())[1]
    eager = attention_reference(q.float(), k.float(), v.float())[1]
    assert_as_exact("lse", lse, eager, truth)


def test_two_runs_are_bit_identical(device):
    inputs = heads(torch.bfloat16, device, 32)
    (first, lse), (second, again) = launch(*inputs), launch(*inputs)
    assert torch.equal(lse, again)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# rows of absent keys overflow in the dk, dv kernel and are never stored
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero(device, sign):
    """At scores near ±200 the exp of an absent key's score, 0, must not reach a gradient."""
    q, k, v, do = heads(torch.float32, device, 32, 70)
    direction = draw(32, device=device, seed=3)
    direction *= (200 * 32**0.5) ** 0.5 / direction.norm()
    q, k = q * 0.1 + direction, k * 0.1 + sign * direction
    found, lse = launch(q, k, v, do)
    assert (lse.sign() == sign).all() and lse.abs().min() > 150
    assert_all_as_exact(found, q, k, v, do)


# ---------------------------------------------------------------- the aten backends


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_backend(dtype):
    q, k, v, do = heads(dtype, "cpu")
    o, lse = attention_forward(q, k, v, "cpu")
    assert o.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous() and lse.dtype == torch.float32
    grads = attention_backward(do, q, k, v, o, lse, "cpu")
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)
    assert_all_as_exact([o, *grads], q, k, v, do)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ("flash", "cudnn") for dtype in DTYPES[1:]]
    + [("efficient", torch.float32)],
)
def test_cuda_backends(name, dtype):
    if name == "cudnn" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("cuDNN attention is for Hopper and Blackwell here")
    q, k, v, do = heads(dtype, "cuda")
    o, lse = attention_forward(q, k, v, name)
    assert o.transpose(1, 2).is_contiguous() and lse.shape == q.shape[:3]
    truth = attention_reference(q.double(), k.double(), v.double())[1]
    assert relative_error(lse, truth) < 1e-5
    for gradient in (do, do.contiguous()):  # stored otherwise than o, and otherwise again
        grads = attention_backward(gradient, q, k, v, o, lse, name)
        assert_all_as_exact([o, *grads], q, k, v, do)


def test_cuda_backends_take_these_arguments():
    """The aten ops' schemas and layouts, on tensors without data."""
    q, k, v, do = (x.to("meta") for x in heads(torch.bfloat16, "cpu"))
    for name in ("flash", "cudnn", "efficient"):
        o, lse = attention_forward(q, k, v, name)
        assert o.transpose(1, 2).is_contiguous() and lse.shape == q.shape[:3]
        for grad in attention_backward(do, q, k, v, o, lse, name):
            assert grad.shape == q.shape and grad.transpose(1, 2).is_contiguous()


def test_choice_of_backend():
    def choice(arch, dtype):
        return choose_backend(arch, dtype, 64, 4608)[0]

    assert [choice(arch, torch.bfloat16) for arch in (80, 86, 89, 120)] == ["flash"] * 4
    assert choice(90, torch.float16) == "cudnn"
    assert choice(89, torch.float32) == choice(90, torch.float32) == "efficient"
    rows = [*table()["backends"], *table()["tiles"]]
    assert all(row["source"] for row in rows)


# ---------------------------------------------------------------- the op


@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_op(name):
    q, k, v, do = heads(torch.float32, "cpu", 32, 70)
    with backend.cpu_launches(name == "triton"):
        found = through_autograd(attention, q, k, v, do, torch.float32)
    assert_all_as_exact(found, q, k, v, do)
    assert torch.equal(found[0], attention(q, k, v, name))


def test_reference():
    q, k, v, do = heads(torch.float32, "cpu", 32)
    formula = through_autograd(lambda *x: attention_reference(*x)[0], q, k, v, do, torch.float32)
    assert_all_as_exact(formula, q, k, v, do)


def test_a_gradient_of_any_stride(device):
    q, k, v, _ = heads(torch.float32, device, 32, 20)
    q.requires_grad_()
    attention(q, k, v).sum().backward()  # autograd expands one number
    expected = q.detach().double().requires_grad_()
    F.scaled_dot_product_attention(expected, k.double(), v.double()).sum().backward()
    assert relative_error(q.grad, expected.grad) < 1e-5


def test_opcheck_and_gradcheck():
    with backend.cpu_launches(False):
        q, k, v, do = (x[:1, :1, :9].double() for x in heads(torch.float32, "cpu", 32))
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(torch.ops.fluxfast.attention, (*inputs, "auto"))
        o, lse = attention_forward(q, k, v)
        arguments = (do, q, k, v, o, lse, "auto")
        torch.library.opcheck(torch.ops.fluxfast.attention_backward, arguments)
        assert torch.autograd.gradcheck(attention, inputs)


def test_compiles_without_a_graph_break():
    with backend.cpu_launches(False):
        q, k, v, do = heads(torch.float32, "cpu", 32, 20)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        found = through_autograd(compiled, q, k, v, do, torch.float32)
    assert_all_as_exact(found, q, k, v, do)


def test_refusals(device):
    q, k, v, _ = heads(torch.float32, device, 32, 9)
    with pytest.raises(ValueError, match=r"k must be shaped like q"):
        attention(q, k[:, :, 1:], v)
    with pytest.raises(ValueError, match=r"v must be q's dtype"):
        attention(q, k, v.half())
    with pytest.raises(ValueError, match=r"q's last stride must be 1"):
        attention(q.mT.contiguous().mT, k, v)
    with pytest.raises(ValueError, match=r"q must be \[B, H, T, C\]"):
        attention(q[0], k[0], v[0])
    with pytest.raises(ValueError, match=r"backend must be auto or one of"):
        attention(q, k, v, "flashy")
    with pytest.raises(ValueError, match=r"q's head width must be one of"):
        attention(*(x[..., :16] for x in (q, k, v)), "triton")


def test_no_tokens_are_refused():
    """aten's CPU kernel would divide by zero."""
    with pytest.raises(ValueError, match="^q must be"):
        attention(*[torch.randn(1, 2, 0, 32)] * 3)
