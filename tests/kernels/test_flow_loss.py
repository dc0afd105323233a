"""Flow matching's mixing and its loss, against the formulas in fp64 and eager torch."""

import pytest
import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.ops import flow_loss
from numerics import (
    assert_all_as_exact,
    assert_same_bits,
    opcheck,
    outputs_and_gradients,
    poisoned,
    randn,
    saved_for_backward,
)

B, T, C = 3, 137, 64  # 8768 elements: three chunks of 4096, the last one partly filled


def mix_inputs(device, std=True):
    mean, vae_noise, noise = (randn(B, T, C, device=device, seed=s) for s in (1, 2, 3))
    spread = randn(B, T, C, device=device, seed=4).exp() if std else None
    return mean, spread, vae_noise, noise, torch.tensor([0.001, 0.4, 0.999], device=device)


def mix(mean, std, vae_noise, noise, t, dtype):
    """The formula as `fluxfast.objective` has it."""
    latent = mean + (1 if std is None else std) * vae_noise
    t = t[:, None, None]
    return ((1 - t) * latent + t * noise).to(dtype), noise - latent


def loss_inputs(device, dtype, weight=True, mask=True, B=B, T=T):
    """prediction, the tokens behind 5 others of a longer sequence; target, weight and mask."""
    prediction = randn(B, T + 5, C, device=device, dtype=dtype, seed=1)[:, 5:]
    target = randn(B, T, C, device=device, seed=2)
    weights = randn(B, device=device, seed=3).exp() if weight else None
    masks = randn(B, T, C, device=device, seed=4).sigmoid() if mask else None
    return prediction, (target, weights, masks)


def plain(prediction, target, weight, mask):
    """The formula as `fluxfast.objective` has it."""
    error = (prediction.to(target.dtype) - target).square()
    if mask is None:
        per_sample = error.mean(dim=(1, 2))
    else:
        per_sample = (error * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1e-6)
    return per_sample if weight is None else per_sample * weight


def double(*tensors):
    return [x if x is None else x.double() for x in tensors]


def with_gradient(function, prediction, data, dtype=None):
    """[losses, gradient of prediction]."""
    d_loss = torch.linspace(0.5, 2, len(prediction), device=prediction.device)
    return outputs_and_gradients(lambda p: function(p, *data), [prediction], [d_loss], dtype)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flow_mix(device, dtype, std):
    inputs = mix_inputs(device, std)
    eager, truth = mix(*inputs, dtype), mix(*double(*inputs), torch.float64)
    outputs = [poisoned(B, T, C, dtype=d, device=device) for d in (dtype, torch.float32)]
    flow_loss.launch_mix(*inputs, *outputs)
    public = flow_loss.flow_mix(*inputs, dtype)
    with backend.cpu_launches(False):
        reference = flow_loss.flow_mix(*inputs, dtype)
    for results in (public, reference):
        assert_all_as_exact("x_t target", results, eager, truth)
        for result, wanted in zip(results, eager, strict=True):
            assert result.dtype == wanted.dtype and result.is_contiguous()
    assert_same_bits(outputs, public)


@pytest.mark.grid(2)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flow_loss(path, device, dtype, weight, mask):
    """16 samples: the error of a loss is one rounding or three, by luck, so it takes many."""
    prediction, data = loss_inputs(device, dtype, weight, mask, B=16, T=70)
    eager = with_gradient(plain, prediction, data)
    truth = with_gradient(plain, prediction, double(*data), torch.float64)
    for function in (flow_loss.flow_loss, flow_loss.flow_loss_reference):
        results = with_gradient(function, prediction, data)
        assert_same_bits(with_gradient(function, prediction, data), results)
        assert results[0].dtype == torch.float32 and results[1].dtype == dtype
        assert_all_as_exact("loss gradient", results, eager, truth)


def test_an_empty_mask_gives_zero(path, device):
    prediction, (target, weight, mask) = loss_inputs(device, torch.float32)
    mask[1] = 0
    loss, gradient = with_gradient(flow_loss.flow_loss, prediction, (target, weight, mask))
    assert loss[1] == 0 and (gradient[1] == 0).all() and (loss[[0, 2]] > 0).all()


@pytest.mark.parametrize("mask", [True, False])
def test_launchers_write_every_element(device, mask):
    prediction, (target, weight, mask) = loss_inputs(device, torch.float16, mask=mask)
    fp16, fp32 = ({"dtype": d, "device": device} for d in (torch.float16, torch.float32))
    gradient, d_prediction = (poisoned(B, T, C, **fp16) for _ in range(2))
    loss, factor, loss_alone = (poisoned(B, **fp32) for _ in range(3))
    flow_loss.launch_loss(prediction, target, weight, mask, gradient, loss, factor)
    count = T * C if mask is None else mask.sum(dim=(1, 2))
    torch.testing.assert_close(factor, weight / count)
    error = 2 * (prediction.float() - target) * (1 if mask is None else mask)
    torch.testing.assert_close(gradient, error.half(), rtol=1e-3, atol=1e-6)
    d_loss = torch.ones(1, device=device).expand(B)  # as the mean's gradient comes: stride 0
    flow_loss.launch_loss_backward(gradient, factor, d_loss, d_prediction)
    expected = (gradient.float() * factor[:, None, None]).half()
    torch.testing.assert_close(d_prediction, expected, rtol=1e-3, atol=1e-7)
    flow_loss.launch_loss(prediction, target, weight, mask, None, loss_alone, factor)
    assert torch.equal(loss_alone, loss)


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
    prediction, data = loss_inputs(device, torch.bfloat16)
    with saved_for_backward() as saved:
        flow_loss.flow_loss(prediction.detach().requires_grad_(), *data)
        flow_loss.flow_loss(prediction, *data)
    assert sum(x.nbytes for x in saved) == prediction.nbytes + 4 * B


def test_gradcheck():
    prediction, data = loss_inputs("cpu", torch.float64)
    prediction, target, mask = (x[:, :3, :4].double() for x in (prediction, data[0], data[2]))
    prediction = prediction.contiguous().requires_grad_()
    target, weight, mask = target.contiguous(), data[1].double(), mask.contiguous()
    with backend.cpu_launches(False):
        for given in ((target, weight, mask), (target, None, None)):
            assert torch.autograd.gradcheck(
                lambda p, given=given: flow_loss.flow_loss(p, *given), prediction
            )


def test_opcheck(device):
    mean, std, *rest = mix_inputs(device)
    prediction, data = loss_inputs(device, torch.bfloat16)
    trained = prediction.detach().requires_grad_()
    opcheck(
        lambda: flow_loss.flow_mix(mean, std, *rest, torch.bfloat16),
        lambda: flow_loss.flow_mix(mean, None, *rest),
        lambda: [flow_loss.flow_loss(trained, *data)],
        lambda: [flow_loss.flow_loss(prediction, data[0])],
    )


def test_compiles_without_a_graph_break(device):
    mixed = mix_inputs(device)

    def step(prediction, target, weight, mask):
        noisy, flow = flow_loss.flow_mix(*mixed, torch.bfloat16)
        return flow_loss.flow_loss(prediction * noisy, flow + target, weight, mask)

    inputs = loss_inputs(device, torch.bfloat16)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits(with_gradient(compiled, *inputs), with_gradient(step, *inputs))


def test_refusals():
    prediction, (target, weight, mask) = loss_inputs("cpu", torch.float32)
    mean, std, vae_noise, noise, t = mix_inputs("cpu")
    loss = {"prediction": prediction, "target": target, "weight": weight, "mask": mask}
    mixed = {"mean": mean, "std": std, "vae_noise": vae_noise, "noise": noise, "t": t}
    for function, arguments, name, wrong in [
        (flow_loss.flow_loss, loss, "prediction", prediction.double()),
        (flow_loss.flow_loss, loss, "prediction", prediction[..., ::2]),
        (flow_loss.flow_loss, loss, "prediction", prediction[0]),
        (flow_loss.flow_loss, loss, "target", target.bfloat16()),
        (flow_loss.flow_loss, loss, "target", target[:, 1:]),
        (flow_loss.flow_loss, loss, "target", target.clone().requires_grad_()),
        (flow_loss.flow_loss, loss, "weight", weight[:1]),
        (flow_loss.flow_loss, loss, "weight", weight.double()),
        (flow_loss.flow_loss, loss, "mask", mask.bool()),
        (flow_loss.flow_loss, loss, "mask", mask[..., :1].expand(B, T, C)),
        (flow_loss.flow_mix, mixed, "mean", mean[0]),
        (flow_loss.flow_mix, mixed, "std", std.half()),
        (flow_loss.flow_mix, mixed, "vae_noise", vae_noise.transpose(1, 2)),
        (flow_loss.flow_mix, mixed, "noise", noise[:1]),
        (flow_loss.flow_mix, mixed, "t", t[:, None]),
        (flow_loss.flow_mix, mixed, "dtype", torch.float64),
    ]:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            function(**(arguments | {name: wrong}))
