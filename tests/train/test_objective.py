"""The objective against its definitions, and against diffusers' own where it has one."""

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from small import SMALL, random_flux

from fluxfast import rng
from fluxfast.objective import (
    Batch,
    Inputs,
    draw_timesteps,
    flux_shift,
    image_ids,
    noise_batch,
    pack,
    sample_losses,
    text_ids,
    timestep_weight,
    unpack,
)

MANY = list(range(20_000))


def noised(mean, std, mask, indices, **more) -> Inputs:
    text = torch.zeros(len(mean), 5, 2), torch.zeros(len(mean), 3)
    return noise_batch(Batch(mean, std, mask, *text, indices), **more)


def losses_of(velocity, batch: Inputs) -> torch.Tensor:
    return sample_losses(lambda *_: velocity, batch, 1.0)


def test_timesteps_are_distributed_as_named():
    logit = torch.logit(draw_timesteps(0, MANY, 1024, "sigmoid"))
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1) < 0.03
    t = draw_timesteps(0, MANY, 1024, "uniform")
    assert abs(t.mean() - 0.5) < 0.01 and abs(t.var() - 1 / 12) < 0.002


@pytest.mark.parametrize("kind", ["sigmoid", "uniform", "flux_shift", "linear", "weighted"])
def test_bias_moves_towards_noise_or_detail(kind):
    means = {
        bias: draw_timesteps(0, MANY, 1024, kind, bias).mean()
        for bias in ("content", "balanced", "style")
    }
    assert means["style"] < means["balanced"] - 0.1 < means["content"] - 0.2
    # a cubed uniform has mean 1/4
    if kind == "uniform":
        assert abs(means["style"] - 0.25) < 0.01 and abs(means["content"] - 0.75) < 0.01


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_flux_shift_is_the_schedulers(tokens):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15)
    t = torch.linspace(0.05, 0.95, 7)
    theirs = scheduler.time_shift(calculate_shift(tokens, 256, 4096, 0.5, 1.15), 1.0, t)
    assert torch.allclose(flux_shift(t, tokens), theirs, atol=1e-6)


def test_linear_weight_is_a_bell_of_mean_one():
    """ai-toolkit's table: exp(-2((i-500)/1000)^2) over 1000 timesteps, less its minimum, mean 1."""
    steps = torch.linspace(1000, 1, 1000)
    y = torch.exp(-2 * ((steps - 500) / 1000) ** 2)
    y = y - y.min()
    table = y * (1000 / y.sum())
    assert torch.allclose(timestep_weight(steps / 1000, "linear"), table, atol=1e-4)
    assert torch.equal(timestep_weight(torch.rand(5), "sigmoid"), torch.ones(5))


def test_linear2_holds_the_bells_top_over_the_less_noisy_half():
    """ai-toolkit's linear_timesteps2: the second half of its falling timesteps at the maximum."""
    t = torch.tensor([0.999, 0.75, 0.5, 0.25, 0.001])
    bell, half = timestep_weight(t, "linear"), timestep_weight(t, "linear2")
    assert torch.equal(half[:3], bell[:3])
    assert torch.equal(half[3:], bell[2].expand(2)) and bell[2] > bell[3]


def test_weighted_is_ai_toolkits_table():
    """Of its 1000 numbers, at t = 1, 0.999, … 0.001, a few; their mean is 1."""
    theirs = {0: 0.905706524848938, 100: 1.5068002939224243, 500: 0.9254037141799927}
    theirs |= {124: 1.5226575136184692, 800: 0.7161067724227905, 999: 0.4472601115703583}
    t = torch.tensor([(1000 - i) / 1000 for i in theirs])
    assert torch.equal(timestep_weight(t, "weighted"), torch.tensor(list(theirs.values())))
    every = torch.arange(1, 1001) / 1000
    assert abs(timestep_weight(every, "weighted").mean() - 1) < 1e-6
    # any t has the number of the nearest, the ends too
    weights = timestep_weight(torch.tensor([0.1001, 0.1, 1e-6, 1 - 1e-6]), "weighted")
    assert weights[0] == weights[1]
    assert torch.equal(weights[2:], torch.tensor([theirs[999], theirs[0]]))


def test_without_guidance_its_embedding_is_left_out():
    model = random_flux(SMALL)
    text = torch.randn(2, 5, SMALL.context_in_dim), torch.randn(2, SMALL.vec_in_dim)
    mean, std = torch.randn(2, 4, 4, 4), torch.ones(2, 4, 4, 4)
    batch = noise_batch(Batch(mean, std, None, *text, [0, 1]), seed=0)
    modulation = model.modulation(batch.timesteps, batch.pooled, None)
    left_out = sample_losses(model, batch, None)
    ahead = sample_losses(model, batch._replace(modulation=modulation), None)
    assert torch.equal(left_out, ahead)
    assert not torch.allclose(left_out, sample_losses(model, batch, 1.0))
    model.guidance_in = None  # as a model that has none
    assert torch.equal(left_out, sample_losses(model, batch, 1.0))


def test_noise_belongs_to_the_sample_not_to_the_batch():
    shape = (2, 4, 4)
    mean, std = torch.zeros(3, *shape), torch.ones(3, *shape)
    three = noised(mean, std, None, [4, 5, 6], seed=1)
    one = noised(mean[:1], std[:1], None, [5], seed=1)
    assert torch.equal(three.noisy[1:2], one.noisy) and torch.equal(three.target[1:2], one.target)
    assert not torch.equal(three.noisy[0], three.noisy[1])
    assert not torch.equal(noised(mean, std, None, [4, 5, 6], seed=2).noisy, three.noisy)


def test_mixture_and_target():
    """x_t = (1 - t) x + t n and target n - x, with x carrying the VAE's own noise."""
    mean = torch.randn(2, 3, 4, 6)
    batch = noised(mean, 0.1 * torch.ones_like(mean), None, [7, 8], seed=3)
    x = pack(mean + 0.1 * rng.normal(3, "vae", [7, 8], (3, 4, 6)))
    n = pack(rng.normal(3, "noise", [7, 8], (3, 4, 6)))
    t = batch.timesteps[:, None, None]
    assert torch.allclose(batch.noisy, (1 - t) * x + t * n, atol=1e-6)
    assert torch.allclose(batch.target, n - x, atol=1e-6)
    # noisy = x + t * target, so the picture follows from a right prediction
    assert torch.allclose(batch.noisy - t * batch.target, x, atol=1e-5)


def test_packing_is_the_pipelines():
    latents = torch.randn(2, 16, 6, 10)
    theirs = FluxPipeline._pack_latents(latents, 2, 16, 6, 10)
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(pack(latents), 6, 10), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(image_ids(6, 10)[0], ids)
    assert torch.equal(text_ids(4), torch.zeros(1, 4, 3))


def test_mask_weights_places_and_keeps_the_scale():
    mean = torch.randn(2, 4, 4, 4)
    mask = torch.zeros(2, 4, 4)
    mask[:, :2] = 1.0
    batch = noised(mean, torch.zeros_like(mean), mask, [0, 1], seed=0)
    right = batch.target.clone()
    assert torch.equal(losses_of(right, batch), torch.zeros(2))
    black = unpack(right, 4, 4)
    black[:, :, 2:] += 100.0
    assert torch.equal(losses_of(pack(black), batch), torch.zeros(2))
    white = unpack(right, 4, 4)
    white[:, :, :2] += 3.0
    assert torch.allclose(losses_of(pack(white), batch), torch.full((2,), 9.0), atol=1e-4)


def test_loss_is_per_sample_and_weighted():
    mean = torch.randn(3, 4, 4, 4)
    batch = noised(mean, torch.zeros_like(mean), None, [0, 1, 2], seed=0, kind="linear")
    per_sample = losses_of(batch.target + 2.0, batch)
    assert torch.allclose(per_sample, 4.0 * timestep_weight(batch.timesteps, "linear"), atol=1e-5)
