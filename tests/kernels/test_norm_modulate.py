"""norm_modulate, alone and with its linear, against fp64; what they save, and what they refuse."""

import pytest
import torch
from fluxfast_kernels import FrozenWeight, LoRAUpdate
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.ops import norm_modulate as ops
from fluxfast_kernels.ops.lora_linear import flatten
from fluxfast_kernels.quant.nf4 import nf4_quantize
from numerics import assert_as_exact, poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tiles of 16, 16, 2 and 2 rows; sums in chunks of 128, 128, 16 and 16 rows
SHAPES = [(2, 5, 128), (1, 131, 192), (2, 19, 3072), (1, 3, 4096)]
N, PARTS, RANK = 160, [0, 48, 0, 48, 96, 1, 112, 160, 0], 4  # rows 96:112 have no update


def inputs(shape, dtype, device, seed=0):
    """h a stream's tokens in the wider rows of a joint tensor, two chunks, and dx."""
    B, T, D = shape
    draw = torch.Generator().manual_seed(seed)
    joint = (3 * torch.randn(B, T + 3, D + 8, generator=draw) + 0.5).to(dtype).to(device)
    modulation = (0.5 * torch.randn(B, 1, 3 * D, generator=draw)).to(dtype).to(device)
    dx = torch.randn(B, T, D, generator=draw).to(dtype).to(device)
    return joint[:, 3:, :D], *modulation.chunk(3, dim=-1)[:2], dx


def linear_inputs(K, dtype, device, storage="dense", update=True):
    """The frozen weight and the update, A and B in fp32."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(N, K, generator=draw).div(K**0.5).to(dtype)
    if storage == "dense":
        weight = [weight.to(device)]
    else:
        weight = [part.to(device) for part in nf4_quantize(weight, nested=True).tensors().values()]
    bias = torch.randn(N, generator=draw).to(dtype).to(device)
    if not update:
        return FrozenWeight(weight, bias), None
    lora_a = torch.randn(2 * RANK, K, generator=draw).div(K**0.5).to(device)
    lora_b = torch.randn(144, RANK, generator=draw).to(device)
    return FrozenWeight(weight, bias), LoRAUpdate(lora_a, lora_b, PARTS, 0.7)


def gradients(function, leaves, dys):
    """[outputs, gradients], of a function of one output or several."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    ys = function(*leaves)
    ys = ys if isinstance(ys, tuple) else (ys,)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]


def double(tensors):
    return [x.double() for x in tensors]


def compare(shape, dtype, device):
    *leaves, dx = inputs(shape, dtype, device)
    found = gradients(ops.norm_modulate, leaves, dx)
    eager = gradients(ops.norm_modulate_reference, leaves, dx)
    truth = gradients(ops.norm_modulate_reference, double(leaves), dx.double())
    for name, *three in zip(("x", "dh", "dshift", "dscale"), found, eager, truth, strict=True):
        assert_as_exact(name, *three)


def compare_with_linear(dtype, device, storage="dense", update=True, split=0):
    *leaves, _ = inputs((2, 5, 128), dtype, device)
    weight, low_rank = linear_inputs(128, dtype, device, storage, update)
    leaves += low_rank[:2] if update else []
    dy = inputs((2, 5, N), dtype, device, seed=2)[3]
    dys = list(dy.tensor_split([split], dim=-1)) if split else [dy]

    def call(op):
        def function(h, shift, scale, *lora):
            update = LoRAUpdate(*lora, PARTS, 0.7) if lora else None
            return op(h, shift, scale, weight, update, split)

        return function

    reference = call(ops.norm_modulate_lora_linear_reference)
    found = gradients(call(ops.norm_modulate_lora_linear), leaves, dys)
    eager = gradients(reference, leaves, dys)
    truth = gradients(reference, double(leaves), double(dys))
    names = [f"y{i}" for i in range(len(dys))] + ["dh", "dshift", "dscale", "da", "db"]
    for name, *three in zip(names, found, eager, truth, strict=False):
        assert_as_exact(name, *three)
    assert all(y.is_contiguous() for y in found[: len(dys)])


@pytest.mark.grid(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape, dtype, device):
    compare(shape, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_path(shape, dtype):
    with backend.cpu_launches(False):
        compare(shape, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_linear(dtype, device):
    compare_with_linear(dtype, device, split=64)


@pytest.mark.parametrize(
    "options", [{"storage": "nf4"}, {"update": False, "split": 16}, {"split": 144}]
)
def test_with_linear_of_other_kinds(options, device):
    compare_with_linear(torch.bfloat16, device, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_path_with_linear(dtype):
    with backend.cpu_launches(False):
        compare_with_linear(dtype, "cpu", split=64)
        compare_with_linear(dtype, "cpu", storage="nf4")
        compare_with_linear(dtype, "cpu", update=False)


@pytest.mark.parametrize("shape", [(2, 5, 128), (2, 19, 3072)])
def test_launchers_write_everything(shape, device):
    h, shift, scale, dx = inputs(shape, torch.bfloat16, device)
    x, again, dh = (poisoned(*shape, dtype=h.dtype, device=device) for _ in range(3))
    mean, rstd = (poisoned(*shape[:2], dtype=torch.float32, device=device) for _ in range(2))
    sums = [poisoned(*shift.shape, dtype=h.dtype, device=device) for _ in range(4)]
    ops.launch_norm_modulate(h, shift, scale, x, mean, rstd, recompute=False)
    ops.launch_norm_modulate(h, shift, scale, again, mean, rstd, recompute=True)
    saved = (h, scale, (mean, rstd))
    ops.launch_norm_modulate_backward(dx, *saved, dh, (sums[0], sums[1]))
    for written in (x, mean, rstd, again, dh, *sums[:2]):
        assert torch.isfinite(written).all()
    assert torch.equal(x, again)
    ops.launch_norm_modulate_backward(dx, *saved, None, (sums[2], sums[3]))
    assert torch.equal(sums[0], sums[2]) and torch.equal(sums[1], sums[3])
    ops.launch_norm_modulate_backward(dx, *saved, dx, None)  # over dx itself
    assert torch.equal(dx, dh)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [True, False])
def test_each_gradient_alone(launch, device):
    """Only what is asked for is formed, and x is never saved."""
    h, shift, scale, _ = inputs((2, 5, 128), torch.float32, device)
    weight, low_rank = linear_inputs(128, torch.float32, device)
    everything = [h, shift, scale, *low_rank[:2]]
    dy = inputs((2, 5, N), torch.float32, device, seed=2)[3]

    def run(needs):
        leaves = [
            x.detach().requires_grad_(need) for x, need in zip(everything, needs, strict=True)
        ]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.append(x.shape) or x, lambda x: x
        ):
            update = LoRAUpdate(*leaves[3:], PARTS, 0.7)
            y = ops.norm_modulate_lora_linear(*leaves[:3], weight, update)
        y.backward(dy)
        assert sum(shape == h.shape for shape in saved) == 1
        return [leaf.grad for leaf in leaves]

    with backend.cpu_launches(launch):
        whole = run([True] * 5)
        for i in range(5):
            alone = run([j == i for j in range(5)])
            assert [gradient is not None for gradient in alone] == [j == i for j in range(5)]
            assert torch.equal(alone[i], whole[i])


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used, device):
    h, shift, scale, _ = inputs((2, 5, 128), torch.float32, device)
    arguments = linear_inputs(128, torch.float32, device)

    def gradient(op, dtype=torch.float32):
        leaf = h.detach().to(dtype).requires_grad_()
        ys = op(leaf, shift.to(dtype), scale.to(dtype), *arguments, split=64)
        ys[used].square().sum().backward()
        return leaf.grad

    reference = ops.norm_modulate_lora_linear_reference
    found, eager = gradient(ops.norm_modulate_lora_linear), gradient(reference)
    assert_as_exact("dh", found, eager, gradient(reference, torch.float64))


def test_expanded_gradient(device):
    leaves = [x.requires_grad_() for x in inputs((2, 5, 128), torch.float32, device)[:3]]
    ops.norm_modulate(*leaves).sum().backward()
    assert torch.equal(leaves[1].grad, torch.full_like(leaves[1], 5.0))


def test_two_runs_agree_bit_for_bit(device):
    *leaves, dx = inputs((2, 19, 3072), torch.bfloat16, device)
    first, second = (gradients(ops.norm_modulate, leaves, dx) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck(device):
    h, shift, scale, dx = inputs((2, 5, 128), torch.float32, device)
    leaves = tuple(x.detach().requires_grad_() for x in (h, shift, scale))
    torch.library.opcheck(ops._norm_modulate, leaves)
    _, mean, rstd, _ = ops.norm_modulate_forward(h, shift, scale)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops._norm_modulate_backward, (dx, h, scale, mean, rstd, *needs))


@pytest.mark.slow
@pytest.mark.parametrize("update", [True, False])
def test_opcheck_with_linear(update, device):
    h, shift, scale, _ = inputs((2, 5, 128), torch.float32, device)
    weight, low_rank = linear_inputs(128, torch.float32, device, update=update)
    leaves = [x.detach().requires_grad_() for x in (h, shift, scale)]
    trained = None
    if update:
        a, b, *rest = low_rank
        trained = LoRAUpdate(a.clone().requires_grad_(), b.clone().requires_grad_(), *rest)
    for split in (0, 64):
        arguments = (*leaves, *flatten(weight, trained), split)
        torch.library.opcheck(ops._norm_modulate_lora_linear, arguments)
    _, mean, rstd, _ = ops.norm_modulate_forward(h, shift, scale)
    dy = inputs((2, 5, N), torch.float32, device)[3]
    arguments = ([dy], h, shift, scale, mean, rstd, *flatten(weight, low_rank))
    for needs in ((True, True), (False, False)) if update else ((True, False),):
        torch.library.opcheck(ops._norm_modulate_lora_linear_backward, (*arguments, *needs))


def test_compiles_as_one_graph(device):
    *leaves, dx = inputs((2, 5, 128), torch.float32, device)
    weight, low_rank = linear_inputs(128, torch.float32, device)

    def both(h, shift, scale, lora_a, lora_b):
        update = LoRAUpdate(lora_a, lora_b, PARTS, 0.7)
        y = ops.norm_modulate_lora_linear(h, shift, scale, weight, update, split=64)
        return ops.norm_modulate(h, shift, scale), *y

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    dys = [dx, dx[..., :64], torch.cat([dx, dx], dim=-1)[..., : N - 64]]
    found, plain = (gradients(f, [*leaves, *low_rank[:2]], dys) for f in (compiled, both))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_gradcheck_of_the_reference():
    h, shift, scale, _ = inputs((2, 3, 8), torch.float64, "cpu")
    leaves = [x.detach().requires_grad_() for x in (h, shift, scale)]
    assert torch.autograd.gradcheck(ops.norm_modulate_reference, leaves)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("h", lambda h, shift, scale: (h.double(), shift, scale)),
        ("h", lambda h, shift, scale: (h[0], shift, scale)),
        ("h", lambda h, shift, scale: (h.mT.contiguous().mT, shift, scale)),
        ("h", lambda h, shift, scale: (h.new_empty(1, 1, 2 * ops.MAX_WIDTH), shift, scale)),
        ("shift", lambda h, shift, scale: (h, shift[:, 0], scale)),
        ("shift", lambda h, shift, scale: (h, shift.bfloat16(), scale)),
        ("scale", lambda h, shift, scale: (h, shift, scale[..., :64])),
        ("scale", lambda h, shift, scale: (h, shift, scale[..., :1].expand_as(scale))),
    ],
)
def test_refuses(name, wrong):
    leaves = inputs((2, 5, 128), torch.float32, "cpu")[:3]
    with pytest.raises(ValueError, match=f"^{name} must be"):
        ops.norm_modulate(*wrong(*leaves))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        ops.norm_modulate_lora_linear(*wrong(*leaves), *linear_inputs(128, torch.float32, "cpu"))


def test_linear_refuses():
    leaves = inputs((2, 5, 128), torch.float32, "cpu")[:3]
    weight, update = linear_inputs(128, torch.float32, "cpu")
    call = ops.norm_modulate_lora_linear
    with pytest.raises(ValueError, match="^weight must be"):
        call(*leaves, weight._replace(tensors=[weight.tensors[0][:, :64]]))
    with pytest.raises(ValueError, match="^lora_b must be"):
        call(*leaves, weight, update._replace(lora_b=update.lora_b[1:]))
    with pytest.raises(ValueError, match="^split must be"):
        call(*leaves, weight, split=N)
