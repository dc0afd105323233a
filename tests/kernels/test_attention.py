"""Attention: the Triton kernels, the aten backends, and the differentiable op."""

import pytest
import torch
import torch.nn.functional as F
from fluxfast_kernels import attention, attention_reference
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.attention import choose_backend
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.ops.attention import (
    QKV,
    attention_backward,
    attention_forward,
    launch_backward,
    launch_forward,
)
from numerics import (
    assert_all_as_exact,
    assert_as_exact,
    assert_refused,
    assert_same_bits,
    opcheck,
    outputs_and_gradients,
    poisoned,
    randn,
    relative_error,
)

B, T, H = 2, 110, 2  # one whole block and a part of one


def heads(dtype, device, C=64, tokens=T):
    """q, k, v and do [B, H, T, C], cut out of wider rows and longer sequences."""
    wide = randn(B, tokens + 3, 4 * H * C + 8, dtype=dtype, device=device)
    four = wide[:, 1 : 1 + tokens, : 4 * H * C].unflatten(-1, (4, H, C))
    return [x.transpose(1, 2) for x in four.unbind(2)]


def check(results, q, k, v, do):
    """o, dq, dk and dv."""
    eager, truth = (
        outputs_and_gradients(F.scaled_dot_product_attention, [q, k, v], [do], dtype)
        for dtype in (q.dtype, torch.float64)
    )
    assert_all_as_exact("o dq dk dv", results, eager, truth)


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
    results, lse = launch(q, k, v, do)
    again, lse_again = launch(q, k, v, do)
    assert_same_bits([*again, lse_again], [*results, lse])
    check(results, q, k, v, do)
    truth = attention_reference(q.double(), k.double(), v.double())[1]
    eager = attention_reference(q.float(), k.float(), v.float())[1]
    assert_as_exact("lse", lse, eager, truth)


# rows of absent keys overflow in the dk, dv kernel and are never stored
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero(device, sign):
    """At scores near ±200 the exp of an absent key's score, 0, must not reach a gradient."""
    q, k, v, do = heads(torch.float32, device, 32, 70)
    direction = randn(32, device=device, seed=3)
    direction *= (200 * 32**0.5) ** 0.5 / direction.norm()
    q, k = q * 0.1 + direction, k * 0.1 + sign * direction
    results, lse = launch(q, k, v, do)
    assert (lse.sign() == sign).all() and lse.abs().min() > 150
    check(results, q, k, v, do)


# ---------------------------------------------------------------- the aten backends


CUDA_BACKENDS = [("flash", dtype) for dtype in DTYPES[1:]] + [("efficient", torch.float32)]
CUDA_BACKENDS += [("cudnn", dtype) for dtype in DTYPES[1:]]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("cpu", dtype) for dtype in DTYPES]
    + [pytest.param(*each, marks=pytest.mark.gpu) for each in CUDA_BACKENDS],
)
def test_backend(name, dtype):
    if name == "cudnn" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("cuDNN attention is for Hopper and Blackwell here")
    q, k, v, do = heads(dtype, "cpu" if name == "cpu" else "cuda")
    o, lse = attention_forward(q, k, v, name)
    assert o.transpose(1, 2).is_contiguous() and lse.shape == q.shape[:3]
    assert lse.is_contiguous() and lse.dtype == torch.float32
    truth = attention_reference(q.double(), k.double(), v.double())[1]
    assert relative_error(lse, truth) < 1e-5
    for gradient in (do, do.contiguous()):  # stored otherwise than o, and otherwise again
        grads = attention_backward(gradient, q, k, v, o, lse, name)
        assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)
        check([o, *grads], q, k, v, do)


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


# ---------------------------------------------------------------- the op


def test_op(path):
    q, k, v, do = heads(torch.float32, "cpu", 32, 70)
    results = outputs_and_gradients(attention, [q, k, v], [do])
    check(results, q, k, v, do)
    chosen = {"launched": "triton", "reference": "cpu"}[path]
    assert torch.equal(results[0], attention(q, k, v, chosen))
    formula = outputs_and_gradients(lambda *x: attention_reference(*x)[0], [q, k, v], [do])
    check(formula, q, k, v, do)


def test_a_gradient_of_any_stride(device):
    q, k, v, _ = heads(torch.float32, device, 32, 20)
    q.requires_grad_()
    attention(q, k, v).sum().backward()  # autograd expands one number
    expected = q.detach().double().requires_grad_()
    F.scaled_dot_product_attention(expected, k.double(), v.double()).sum().backward()
    assert relative_error(q.grad, expected.grad) < 1e-5


def test_opcheck_and_gradcheck():
    q, k, v, _ = heads(torch.float32, "cpu", 32)
    inputs = [x[:1, :1, :9].double().requires_grad_() for x in (q, k, v)]
    opcheck(lambda: [attention(*inputs)])
    with backend.cpu_launches(False):
        assert torch.autograd.gradcheck(attention, inputs)


def test_compiles_without_a_graph_break():
    with backend.cpu_launches(False):
        q, k, v, do = heads(torch.float32, "cpu", 32, 20)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        results = outputs_and_gradients(compiled, [q, k, v], [do])
    check(results, q, k, v, do)


def test_refusals(device):
    q, k, v, _ = heads(torch.float32, device, 32, 9)
    refused = {
        "k": [lambda: attention(q, k[:, :, 1:], v)],
        "v": [lambda: attention(q, k, v.half())],
        "q's last stride": [lambda: attention(q.mT.contiguous().mT, k, v)],
        "q": [
            lambda: attention(q[0], k[0], v[0]),
            # of no tokens: aten's CPU kernel would divide by zero
            lambda: attention(*(x[:, :, :0] for x in (q, k, v))),
        ],
        "backend": [lambda: attention(q, k, v, "flashy")],
        "q's head width": [lambda: attention(*(x[..., :16] for x in (q, k, v)), "triton")],
    }
    assert_refused(refused)
