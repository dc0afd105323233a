"""Flow matching's mixing and its loss, against the formulas in fp64 and eager torch."""

import pytest
import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.ops import flow_loss
from numerics import assert_as_exact, poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, T, C = 3, 137, 64  # 8768 elements: three chunks of 4096, the last one partly filled


def draw(*shape, device="cpu", dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(device)


def mix_inputs(device, std=True):
    mean, vae_noise, noise = (draw(B, T, C, device=device, seed=s) for s in (1, 2, 3))
    spread = draw(B, T, C, device=device, seed=4).exp() if std else None
    return mean, spread, vae_noise, noise, torch.tensor([0.001, 0.4, 0.999], device=device)


def mix(mean, std, vae_noise, noise, t, dtype):
    """The formula as `fluxfast.objective` has it."""
    latent = mean + (1 if std is None else std) * vae_noise
    t = t[:, None, None]
    return ((1 - t) * latent + t * noise).to(dtype), noise - latent


def loss_inputs(device, dtype, weight=True, mask=True, B=B, T=T):
    """prediction: the tokens behind 5 others of a longer sequence."""
    prediction = draw(B, T + 5, C, device=device, dtype=dtype, seed=1)[:, 5:]
    target = draw(B, T, C, device=device, seed=2)
    weights = draw(B, device=device, seed=3).exp() if weight else None
    masks = draw(B, T, C, device=device, seed=4).sigmoid() if mask else None
    return prediction.detach().requires_grad_(), target, weights, masks


def plain(prediction, target, weight, mask):
    """The formula as `fluxfast.objective` has it."""
    error = (prediction.to(target.dtype) - target).square()
    if mask is None:
        per_sample = error.mean(dim=(1, 2))
    else:
        per_sample = (error * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1e-6)
    return per_sample if weight is None else per_sample * weight


def with_gradient(function, inputs):
    loss = function(*inputs)
    d_loss = torch.linspace(0.5, 2, len(loss), device=loss.device).to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, inputs[0], d_loss)
    return loss.detach(), gradient


def in_double(inputs):
    return [
        None if v is None else v.detach().double().requires_grad_(v.requires_grad) for v in inputs
    ]


def check_loss(inputs, function=None):
    loss, gradient = with_gradient(function or flow_loss.flow_loss, inputs)
    eager = with_gradient(plain, inputs)
    truth = with_gradient(plain, in_double(inputs))
    assert loss.dtype == torch.float32 and gradient.dtype == inputs[0].dtype
    assert_as_exact("loss", loss, eager[0], truth[0])
    assert_as_exact("gradient", gradient, eager[1], truth[1])


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flow_mix(device, dtype, std):
    inputs = mix_inputs(device, std)
    truth = mix(*[None if v is None else v.double() for v in inputs], torch.float64)
    eager = mix(*inputs, dtype)
    outputs = [poisoned(B, T, C, dtype=d, device=device) for d in (dtype, torch.float32)]
    flow_loss.launch_mix(*inputs, *outputs)
    public = flow_loss.flow_mix(*inputs, dtype)
    with backend.cpu_launches(False):
        reference = flow_loss.flow_mix(*inputs, dtype)
    for found in (outputs, public, reference):
        for name, value, own, wanted in zip(("x_t", "target"), found, eager, truth, strict=True):
            assert value.dtype == own.dtype and value.is_contiguous()
            assert_as_exact(name, value, own, wanted)
    assert all(torch.equal(a, b) for a, b in zip(outputs, public, strict=True))


@pytest.mark.grid(1)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flow_loss(device, dtype, weight, mask):
    """16 samples: the error of a loss is one rounding or three, by luck, so it takes many."""
    inputs = loss_inputs(device, dtype, weight, mask, B=16, T=70)
    check_loss(inputs)
    with backend.cpu_launches(False):
        check_loss(inputs)
    check_loss(inputs, flow_loss.flow_loss_reference)


def test_an_empty_mask_gives_zero(device):
    prediction, target, weight, mask = loss_inputs(device, torch.float32)
    mask[1] = 0
    loss, gradient = with_gradient(flow_loss.flow_loss, (prediction, target, weight, mask))
    assert loss[1] == 0 and (gradient[1] == 0).all() and (loss[[0, 2]] > 0).all()


@pytest.mark.parametrize("mask", [True, False])
def test_launchers_write_every_element(device, mask):
    prediction, target, weight, masks = loss_inputs(device, torch.float16, mask=mask)
    options = {"device": device}
    gradient = poisoned(B, T, C, dtype=torch.float16, **options)
    loss, factor = (poisoned(B, dtype=torch.float32, **options) for _ in range(2))
    flow_loss.launch_loss(prediction.detach(), target, weight, masks, gradient, loss, factor)
    count = T * C if masks is None else masks.sum(dim=(1, 2))
    torch.testing.assert_close(factor, weight / count)
    error = 2 * (prediction.detach().float() - target) * (1 if masks is None else masks)
    torch.testing.assert_close(gradient, error.half(), rtol=1e-3, atol=1e-6)
    d_prediction = poisoned(B, T, C, dtype=torch.float16, **options)
    d_loss = torch.ones(1, **options).expand(B)  # as the mean's gradient comes: stride 0
    flow_loss.launch_loss_backward(gradient, factor, d_loss, d_prediction)
    expected = (gradient.float() * factor[:, None, None]).half()
    torch.testing.assert_close(d_prediction, expected, rtol=1e-3, atol=1e-7)
    alone = poisoned(B, dtype=torch.float32, **options)
    flow_loss.launch_loss(prediction.detach(), target, weight, masks, None, alone, factor)
    assert torch.equal(alone, loss)


@pytest.mark.slow
def test_many_chunks(device):
    """More partial sums than one step of the second stage takes."""
    size = flow_loss.BLOCK * flow_loss.CHUNK * (flow_loss.SUM_BLOCK + 3)
    ones = torch.ones(1, size // 64, 64, device=device)
    loss, gradient, factor = (
        poisoned(*shape, dtype=torch.float32, device=device) for shape in ((1,), ones.shape, (1,))
    )
    flow_loss.launch_loss(ones, -ones, None, None, gradient, loss, factor)
    assert loss.item() == 4 and (gradient == 4).all() and factor.item() == pytest.approx(1 / size)


def test_saves_the_gradient_only(device):
    saved = []
    prediction, target, weight, mask = loss_inputs(device, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        flow_loss.flow_loss(prediction, target, weight, mask)
        flow_loss.flow_loss(prediction.detach(), target, weight, mask)
    assert sum(t.nbytes for t in saved) == prediction.nbytes + 4 * B


@pytest.mark.parametrize("launch", [True, False])
def test_two_runs_agree_in_every_bit(device, launch):
    inputs = loss_inputs(device, torch.bfloat16)
    with backend.cpu_launches(launch):
        first, second = (with_gradient(flow_loss.flow_loss, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck():
    inputs = [v[:, :3, :4] if v.ndim == 3 else v for v in loss_inputs("cpu", torch.float32)]
    prediction, *data = [v.detach().contiguous().double() for v in inputs]
    prediction.requires_grad_()
    with backend.cpu_launches(False):
        for given in (data, [data[0], None, None]):
            assert torch.autograd.gradcheck(
                lambda p, given=given: flow_loss.flow_loss(p, *given), prediction
            )


def test_opcheck(device):
    mean, std, vae_noise, noise, t = mix_inputs(device)
    prediction, target, weight, mask = loss_inputs(device, torch.bfloat16)
    ops = torch.ops.fluxfast
    for spread, dtype in ((std, torch.bfloat16), (None, torch.float32)):
        torch.library.opcheck(ops.flow_mix.default, (mean, spread, vae_noise, noise, t, dtype))
    with backend.cpu_launches(False):
        for given in ((weight, mask, True), (None, None, False)):
            own = prediction if given[-1] else prediction.detach()
            torch.library.opcheck(ops.flow_loss.default, (own, target, *given))
    torch.library.opcheck(
        ops.flow_loss_backward.default, (noise.bfloat16(), weight, weight.flip(0))
    )


def test_compiles_without_a_graph_break(device):
    def step(prediction, target, weight, mask, mean, std, vae_noise, noise, t):
        noisy, flow = flow_loss.flow_mix(mean, std, vae_noise, noise, t, torch.bfloat16)
        return flow_loss.flow_loss(prediction * noisy, flow + target, weight, mask)

    inputs = loss_inputs(device, torch.bfloat16), mix_inputs(device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = with_gradient(lambda *loss: compiled(*loss, *inputs[1]), inputs[0])
    eager = with_gradient(lambda *loss: step(*loss, *inputs[1]), inputs[0])
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("prediction", lambda i: {"prediction": i["prediction"].double()}),
        ("prediction", lambda i: {"prediction": i["prediction"][..., ::2]}),
        ("prediction", lambda i: {"prediction": i["prediction"][0]}),
        ("target", lambda i: {"target": i["target"].bfloat16()}),
        ("target", lambda i: {"target": i["target"][:, 1:]}),
        ("target", lambda i: {"target": i["target"].clone().requires_grad_()}),
        ("weight", lambda i: {"weight": i["weight"][:1]}),
        ("weight", lambda i: {"weight": i["weight"].double()}),
        ("mask", lambda i: {"mask": i["mask"].bool()}),
        ("mask", lambda i: {"mask": i["mask"][..., :1].expand(B, T, C)}),
    ],
)
def test_flow_loss_refuses(name, change):
    names = ("prediction", "target", "weight", "mask")
    made = dict(zip(names, loss_inputs("cpu", torch.float32), strict=True))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        flow_loss.flow_loss(**(made | change(made)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mean", lambda i: {"mean": i["mean"][0]}),
        ("std", lambda i: {"std": i["std"].half()}),
        ("vae_noise", lambda i: {"vae_noise": i["vae_noise"].transpose(1, 2)}),
        ("noise", lambda i: {"noise": i["noise"][:1]}),
        ("t", lambda i: {"t": i["t"][:, None]}),
        ("dtype", lambda i: {"dtype": torch.float64}),
    ],
)
def test_flow_mix_refuses(name, change):
    names = ("mean", "std", "vae_noise", "noise", "t")
    made = dict(zip(names, mix_inputs("cpu"), strict=True))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        flow_loss.flow_mix(**(made | change(made)))
