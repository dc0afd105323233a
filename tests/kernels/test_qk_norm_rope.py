"""QK-norm, rotation and joint attention: the kernels by themselves, and the fused op."""

import pytest
import torch
import torch.nn.functional as F
from fluxfast_kernels import qk_norm_rope_attention
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.ops.attention import QKV
from fluxfast_kernels.ops.qk_norm_rope import (
    Streams,
    launch_backward,
    launch_forward,
    qk_norm_rope_attention_reference,
    qk_norm_rope_backward,
    qk_norm_rope_forward,
)
from numerics import assert_as_exact, poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, H = 2, 3
STREAMS = {1: [110], 2: [77, 33]}  # tokens of each stream


def draw(*shape, device="cpu", dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(device)


def problem(streams, dtype, device="cpu", C=64, rope_batch=B, heads=H, tokens=None):
    """qkv cut out of longer sequences and wider rows, scales, cos, sin, heads."""
    qkv, scales = [], []
    lengths = tokens or STREAMS[streams]
    for i, length in enumerate(lengths):
        wide = draw(B, length + 2, 3 * heads * C + 16, dtype=dtype, device=device, seed=i)
        qkv.append(wide[:, 1 : 1 + length, : 3 * heads * C])
        noise = (draw(C, dtype=dtype, device=device, seed=10 + 2 * i + j) for j in range(2))
        scales += [1 + 0.3 * x for x in noise]
    angles = 3 * draw(rope_batch, sum(lengths), 1, C // 2, device=device, seed=20)
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


def in_double(qkv, scales, cos, sin, heads):
    wide = ([x.double() for x in group] for group in (qkv, scales, (cos, sin)))
    qkv, scales, (cos, sin) = wide
    return qkv, scales, cos, sin, heads


def through_autograd(f, arguments, grads):
    """Outputs of f(qkv, ...), then the gradients of qkv."""
    qkv, *rest = arguments
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = f(qkv, *rest)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    grads = [g.to(y.dtype) for g, y in zip(grads, out, strict=True)]
    return [y.detach() for y in out] + list(torch.autograd.grad(out, qkv, grads))


def assert_all_as_exact(found, f, arguments, grads):
    eager = through_autograd(f, arguments, grads)
    truth = through_autograd(f, in_double(*arguments), grads)
    for i, three in enumerate(zip(found, eager, truth, strict=True)):
        assert_as_exact(f"tensor {i}", *three)


def joint_gradients(dtype, device, C, tokens):
    """dq, dk, dv [B, T, H, C]: stored [B, H, T, C], cut out, and without gaps."""
    dq = draw(B, H, tokens, C, dtype=dtype, device=device, seed=30).transpose(1, 2)
    dk = draw(B, tokens + 1, H + 1, C, dtype=dtype, device=device, seed=31)[:, 1:, 1:]
    return QKV(dq, dk, draw(B, tokens, H, C, dtype=dtype, device=device, seed=32))


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


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    ("streams", "dtype", "C", "rope_batch"),
    [(2, dtype, 64, B) for dtype in DTYPES]
    + [(1, torch.bfloat16, 128, 1), (2, torch.float32, 32, 1)],
)
def test_kernels(device, streams, dtype, C, rope_batch):
    arguments = problem(streams, dtype, device, C, rope_batch)
    grads = joint_gradients(dtype, device, C, 110)
    found = launch(arguments, grads)
    assert_all_as_exact(found, eager_norm_rope, arguments, grads)
    again = launch(arguments, grads)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(streams, dtype):
    arguments = problem(streams, dtype)
    grads = joint_gradients(dtype, "cpu", 64, 110)
    with backend.cpu_launches(False):
        streams = Streams(*arguments)
        found = [*qk_norm_rope_forward(streams), *qk_norm_rope_backward(grads, streams)]
    assert_all_as_exact(found, eager_norm_rope, arguments, grads)


@pytest.mark.parametrize("launched", [True, False])
def test_one_streams_v_is_not_copied(launched):
    arguments = problem(1, torch.float32, C=32, tokens=[5])
    with backend.cpu_launches(launched):
        v = qk_norm_rope_forward(Streams(*arguments)).v
    assert v.untyped_storage().data_ptr() == arguments[0][0].untyped_storage().data_ptr()


@pytest.mark.parametrize("launched", [True, False])
def test_tiny_and_huge_rows(launched):
    """A row of zeros stays zero, one of 1e-4 feels epsilon, one of 1e4 does not."""
    qkv, *rest = problem(1, torch.float32, C=32, tokens=[3])
    qkv = [qkv[0] * torch.tensor([0.0, 1e-4, 1e4])[:, None]]
    grads = joint_gradients(torch.float32, "cpu", 32, 3)
    with backend.cpu_launches(launched):
        streams = Streams(qkv, *rest)
        found = [*qk_norm_rope_forward(streams), *qk_norm_rope_backward(grads, streams)]
    truth = through_autograd(eager_norm_rope, in_double(qkv, *rest), grads)
    for a, b in zip(found, truth, strict=True):
        for token in range(3):
            torch.testing.assert_close(a[:, token].double(), b[:, token], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the op


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    ("streams", "dtype"), [(2, dtype) for dtype in DTYPES] + [(1, torch.bfloat16)]
)
def test_op(device, streams, dtype):
    arguments = problem(streams, dtype, device, heads=2)
    do = draw(B, 110, 2 * 64, dtype=dtype, device=device, seed=40)
    found = through_autograd(qk_norm_rope_attention, arguments, [do])
    assert found[0].is_contiguous()
    assert_all_as_exact(found, eager_attention, arguments, [do])


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_op_by_reference(streams, dtype):
    arguments = problem(streams, dtype)
    do = draw(B, 110, H * 64, dtype=dtype, seed=40)
    with backend.cpu_launches(False):
        found = through_autograd(qk_norm_rope_attention, arguments, [do])
        formula = qk_norm_rope_attention_reference(*arguments)
    assert_all_as_exact(found, eager_attention, arguments, [do])
    truth = eager_attention(*in_double(*arguments))
    assert_as_exact("reference", formula, eager_attention(*arguments), truth)


def test_gradients_by_the_kernels_equal_those_by_the_reference():
    arguments = problem(2, torch.float32, C=32, heads=1, tokens=[6, 7])
    do = draw(B, 13, 32, seed=40)
    with backend.cpu_launches(False):
        expected = through_autograd(qk_norm_rope_attention, arguments, [do])
    found = through_autograd(qk_norm_rope_attention, arguments, [do])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("streams", [1, 2])
def test_saves_qkv_o_and_lse_alone(streams):
    arguments = problem(streams, torch.bfloat16, C=32)
    qkv = [x.clone().requires_grad_() for x in arguments[0]]
    saved = []
    with (
        backend.cpu_launches(False),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        o = qk_norm_rope_attention(qkv, *arguments[1:])
    owned = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    tokens = B * 110
    assert sum(owned.values()) == tokens * (3 * H * 32 * 2 + H * 32 * 2 + H * 4)
    assert o.untyped_storage().data_ptr() in owned


@pytest.mark.slow
def test_opcheck_and_gradcheck():
    qkv, *rest = problem(2, torch.float64, C=8, heads=2, tokens=[3, 4], rope_batch=1)
    qkv = [x.clone().requires_grad_() for x in qkv]
    scales, cos, sin, heads = rest
    arguments = (qkv, scales, cos, sin, heads)
    with backend.cpu_launches(False):
        torch.library.opcheck(torch.ops.fluxfast.qk_norm_rope_attention, arguments)
        o, lse = (x.detach() for x in torch.ops.fluxfast.qk_norm_rope_attention(*arguments))
        flat = [x.detach() for x in qkv]
        torch.library.opcheck(
            torch.ops.fluxfast.qk_norm_rope_attention_backward,
            (torch.ones_like(o), flat, scales, cos, sin, heads, o, lse),
        )
        assert torch.autograd.gradcheck(
            lambda *streams: qk_norm_rope_attention(list(streams), *rest), qkv
        )


def test_compiles_without_a_graph_break():
    arguments = problem(2, torch.float32, C=32, tokens=[6, 7])
    do = draw(B, 13, H * 32, seed=40)
    with backend.cpu_launches(False):
        compiled = torch.compile(qk_norm_rope_attention, fullgraph=True, backend="aot_eager")
        found = through_autograd(compiled, arguments, [do])
    assert_all_as_exact(found, eager_attention, arguments, [do])


def test_refusals(device):
    qkv, scales, cos, sin, heads = problem(2, torch.float32, device, 32, tokens=[3, 4])
    half = [qkv[0], qkv[1].half()]
    transposed = [x.mT.contiguous().mT for x in qkv]
    for message, arguments in {
        "qkv must be one or two streams": ([], scales, cos, sin, heads),
        "qkv must be of one dtype": (half, scales, cos, sin, heads),
        "qkv must be of one batch size": ([qkv[0], qkv[1][:1]], scales, cos, sin, heads),
        "qkv's last stride must be 1": (transposed, scales, cos, sin, heads),
        "qkv's width must be 3": (qkv, scales, cos, sin, 5),
        "scales must be a q and a k": (qkv, scales[:2], cos, sin, heads),
        r"scales must be \[32\] each": (qkv, [s[:16] for s in scales], cos, sin, heads),
        "cos must be one of": (qkv, scales, cos[:, 1:], sin, heads),
        "sin must be float32": (qkv, scales, cos, sin.double(), heads),
    }.items():
        with pytest.raises(ValueError, match=message):
            qk_norm_rope_attention(*arguments)
    with pytest.raises(ValueError, match="head width must be one of"):
        qk_norm_rope_attention(*problem(1, torch.float32, device, 24, tokens=[3]))
