"""QK-norm, rotation and joint attention: the kernels by themselves, and the fused op."""

import pytest
import torch
import torch.nn.functional as F
from fluxfast_kernels import qk_norm_rope_attention
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.ops.attention import QKV
from fluxfast_kernels.ops.qk_norm_rope import (
    Streams,
    launch_backward,
    launch_forward,
    qk_norm_rope_attention_reference,
    qk_norm_rope_backward,
    qk_norm_rope_forward,
)
from numerics import (
    assert_as_exact,
    assert_refused,
    assert_same_bits,
    opcheck,
    outputs_and_gradients,
    poisoned,
    randn,
    saved_for_backward,
)

B, H = 2, 3
STREAMS = {1: [110], 2: [77, 33]}  # tokens of each stream


def problem(streams, dtype, device="cpu", C=64, rope_batch=B, heads=H, tokens=None):
    """qkv cut out of longer sequences and wider rows, scales, cos, sin, heads."""
    options, qkv, scales = {"dtype": dtype, "device": device}, [], []
    lengths = tokens or STREAMS[streams]
    for i, length in enumerate(lengths):
        wide = randn(B, length + 2, 3 * heads * C + 16, seed=i, **options)
        qkv.append(wide[:, 1 : 1 + length, : 3 * heads * C])
        scales += [1 + randn(C, std=0.3, seed=10 + 2 * i + j, **options) for j in range(2)]
    angles = randn(rope_batch, sum(lengths), 1, C // 2, std=3, device=device, seed=20)
    return qkv, scales, angles.cos(), angles.sin(), heads


def eager_norm_rope(qkv, scales, cos, sin, heads):
    """q, k, v as Black Forest Labs' modules compute them: norm, then cat, then rotation."""
    streams = []
    for i, x in enumerate(qkv):
        q, k, v = x.unflatten(-1, (3, heads, -1)).unbind(2)
        q, k = (
            F.rms_norm(y, y.shape[-1:], scale.to(y.dtype), eps=1e-6)
            for y, scale in zip((q, k), scales[2 * i : 2 * i + 2], strict=True)
        )
        streams.append((q, k, v))
    q, k, v = (torch.cat(parts, 1) for parts in zip(*streams, strict=True))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def rotate(x, cos, sin):
    kind = torch.promote_types(x.dtype, torch.float32)
    even, odd = x.to(kind).unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return pairs.flatten(-2).to(x.dtype)


def eager_attention(*arguments):
    q, k, v = (x.transpose(1, 2) for x in eager_norm_rope(*arguments))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def through_autograd(f, arguments, grads, dtype=None):
    """Outputs of f(qkv, ...), then the gradients of qkv; in fp64 of fp64 arguments."""
    qkv, scales, cos, sin, heads = arguments
    if dtype == torch.float64:
        scales, (cos, sin) = [x.double() for x in scales], (cos.double(), sin.double())
    return outputs_and_gradients(
        lambda *qkv: f(list(qkv), scales, cos, sin, heads), qkv, grads, dtype
    )


def check(results, f, arguments, grads):
    eager, truth = (through_autograd(f, arguments, grads, d) for d in (None, torch.float64))
    for i, tensors in enumerate(zip(results, eager, truth, strict=True)):
        assert_as_exact(f"tensor {i}", *tensors)


def joint_gradients(dtype, device, C, tokens):
    """dq, dk, dv [B, T, H, C]: stored [B, H, T, C], cut out, and without gaps."""
    dq = randn(B, H, tokens, C, dtype=dtype, device=device, seed=30).transpose(1, 2)
    dk = randn(B, tokens + 1, H + 1, C, dtype=dtype, device=device, seed=31)[:, 1:, 1:]
    return QKV(dq, dk, randn(B, tokens, H, C, dtype=dtype, device=device, seed=32))


def launch(arguments, grads):
    """q, k, v and dqkv by the launchers, all poisoned beforehand."""
    qkv, heads = arguments[0], arguments[4]
    C, tokens = qkv[0].shape[2] // (3 * heads), sum(x.shape[1] for x in qkv)
    options = {"dtype": qkv[0].dtype, "device": qkv[0].device}
    q, k, v = (poisoned(B, tokens, heads, C, **options) for _ in range(3))
    launch_forward(Streams(*arguments), q, k, v)
    dqkv = [poisoned(*x.shape, **options) for x in qkv]
    launch_backward(grads, Streams(*arguments), dqkv)
    return [q, k, v, *dqkv]


# ---------------------------------------------------------------- norm and rotation


@pytest.mark.grid(8)
@pytest.mark.parametrize(
    ("streams", "dtype", "C", "rope_batch"),
    [(streams, dtype, 64, B) for streams in (1, 2) for dtype in DTYPES]
    + [(1, torch.bfloat16, 128, 1), (2, torch.float32, 32, 1)],
)
def test_norm_and_rotation(path, device, streams, dtype, C, rope_batch):
    arguments = problem(streams, dtype, device, C, rope_batch)
    grads = joint_gradients(dtype, device, C, 110)
    if path == "launched":
        results = launch(arguments, grads)
        assert_same_bits(launch(arguments, grads), results)
    else:
        streams = Streams(*arguments)
        results = [*qk_norm_rope_forward(streams), *qk_norm_rope_backward(grads, streams)]
    check(results, eager_norm_rope, arguments, grads)


def test_one_streams_v_is_not_copied(path):
    arguments = problem(1, torch.float32, C=32, tokens=[5])
    v = qk_norm_rope_forward(Streams(*arguments)).v
    assert v.untyped_storage().data_ptr() == arguments[0][0].untyped_storage().data_ptr()


def test_tiny_and_huge_rows(path):
    """A row of zeros stays zero, one of 1e-4 feels epsilon, one of 1e4 does not."""
    (x,), *rest = problem(1, torch.float32, C=32, tokens=[3])
    arguments = ([x * torch.tensor([0.0, 1e-4, 1e4])[:, None]], *rest)
    grads, streams = joint_gradients(torch.float32, "cpu", 32, 3), Streams(*arguments)
    results = [*qk_norm_rope_forward(streams), *qk_norm_rope_backward(grads, streams)]
    truth = through_autograd(eager_norm_rope, arguments, grads, torch.float64)
    for a, b in zip(results, truth, strict=True):
        for token in range(3):
            torch.testing.assert_close(a[:, token].double(), b[:, token], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the op


@pytest.mark.grid(6)
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_op(path, device, streams, dtype):
    arguments = problem(streams, dtype, device, heads=2)
    do = randn(B, 110, 2 * 64, dtype=dtype, device=device, seed=40)
    o, *dqkv = through_autograd(qk_norm_rope_attention, arguments, [do])
    assert o.is_contiguous()
    check([o, *dqkv], eager_attention, arguments, [do])
    formula = qk_norm_rope_attention_reference(*arguments)
    check([formula, *dqkv], eager_attention, arguments, [do])


@pytest.mark.parametrize("streams", [1, 2])
def test_saves_qkv_o_and_lse_alone(streams):
    arguments = problem(streams, torch.bfloat16, C=32)
    qkv = [x.clone().requires_grad_() for x in arguments[0]]
    with backend.cpu_launches(False), saved_for_backward() as saved:
        o = qk_norm_rope_attention(qkv, *arguments[1:])
    owned = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    tokens = B * 110
    assert sum(owned.values()) == tokens * (3 * H * 32 * 2 + H * 32 * 2 + H * 4)
    assert o.untyped_storage().data_ptr() in owned


@pytest.mark.slow
def test_opcheck_and_gradcheck():
    qkv, *rest = problem(2, torch.float64, C=8, heads=2, tokens=[3, 4], rope_batch=1)
    qkv = [x.clone().requires_grad_() for x in qkv]
    opcheck(lambda: [qk_norm_rope_attention(qkv, *rest)])
    with backend.cpu_launches(False):
        assert torch.autograd.gradcheck(lambda *qkv: qk_norm_rope_attention(list(qkv), *rest), qkv)


def test_compiles_without_a_graph_break():
    arguments = problem(2, torch.float32, C=32, tokens=[6, 7])
    do = randn(B, 13, H * 32, seed=40)
    with backend.cpu_launches(False):
        compiled = torch.compile(qk_norm_rope_attention, fullgraph=True, backend="aot_eager")
        results = through_autograd(compiled, arguments, [do])
    check(results, eager_attention, arguments, [do])


def test_refusals(device):
    arguments = problem(2, torch.float32, device, 32, tokens=[3, 4])
    qkv, scales, cos, sin, _ = arguments

    def call(**changed):
        return lambda: qk_norm_rope_attention(**(Streams(*arguments)._asdict() | changed))

    refused = {
        "qkv must be one or two streams": [call(qkv=[])],
        "qkv must be of one dtype": [call(qkv=[qkv[0], qkv[1].half()])],
        "qkv must be of one batch size": [call(qkv=[qkv[0], qkv[1][:1]])],
        "qkv's last stride must be 1": [call(qkv=[x.mT.contiguous().mT for x in qkv])],
        "qkv's width must be 3": [call(heads=5)],
        "scales must be a q and a k": [call(scales=scales[:2])],
        r"scales must be \[32\] each": [call(scales=[s[:16] for s in scales])],
        "cos must be one of": [call(cos=cos[:, 1:])],
        "sin must be float32": [call(sin=sin.double())],
        "the head width must be one of": [
            lambda: qk_norm_rope_attention(*problem(1, torch.float32, device, 24, tokens=[3]))
        ],
    }
    assert_refused(refused, "^{}")
