"""Latents against diffusers' pipelines and schedulers: the same noise, fp32, 1e-5 relative."""

import numpy as np
import pytest
import torch
from PIL import Image
from replay import ReplayRecorder

from fluxfast import load_transformer, rng
from fluxfast.config.schema import DrawConfig
from fluxfast.encoders.vae import Vae
from fluxfast.memory.cuda_graphs import Graphs
from fluxfast.model.flux import Flux
from fluxfast.objective import pack, unpack
from fluxfast.sampling import sampler
from fluxfast.sampling.draw import draw_picture
from fluxfast.sampling.picture import Picture
from fluxfast.sampling.sampler import noise_for, pass_graphs, sample_latents, schedule

CPU = torch.device("cpu")
H, W, STEPS = 8, 12, 6  # latents
SIZE = {"height": 8 * H, "width": 8 * W}


@pytest.fixture(scope="module")
def model(nano_model) -> Flux:
    return load_transformer(nano_model, "fp32", "fp32", "cpu")


@pytest.fixture(scope="module")
def parts(nano_model) -> dict:
    """Of a pipeline without text encoders."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    kinds = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "vae": AutoencoderKL,
        "transformer": FluxTransformer2DModel,
    }
    loaded = {name: k.from_pretrained(nano_model, subfolder=name) for name, k in kinds.items()}
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return loaded | dict.fromkeys(names)


@pytest.fixture(scope="module")
def texts(model) -> list:
    """Embeddings of two prompts."""
    generator = torch.Generator().manual_seed(3)
    shapes = (1, 16, model.spec.context_in_dim), (1, model.spec.vec_in_dim)
    return [tuple(torch.randn(s, generator=generator) for s in shapes) for _ in range(2)]


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(1, 16, H, W, generator=torch.Generator().manual_seed(5))


def picture(**options) -> Picture:
    steps = options.pop("steps", STEPS)
    return Picture("", 7, SIZE["width"], SIZE["height"], steps, 3.5, DrawConfig(**options))


def run(pipeline, texts, **options) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    (t5, pooled), *_ = texts
    prompt = {"prompt_embeds": t5, "pooled_prompt_embeds": pooled, "output_type": "latent"}
    steps = {"num_inference_steps": STEPS, "guidance_scale": 3.5}
    out = pipeline(**prompt, **SIZE, **steps | options).images
    return unpack(out, H, W) if out.ndim == 3 else out


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture
def same_noise(monkeypatch):
    """diffusers draws from its generator what `noise_for` draws from a seed."""
    import diffusers.pipelines.flux as flux

    names = ("pipeline_flux_img2img", "pipeline_flux_inpaint")
    for name in names:
        module = getattr(flux, name)
        monkeypatch.setattr(
            module, "randn_tensor", lambda shape, **_: noise_for(7, *shape[1:]).clone()
        )


@pytest.mark.parametrize("strength", [1, 0.95, 0.6, 0.55, 0.3, 0.05])
def test_image_to_image_is_the_pipelines(model, parts, texts, image, same_noise, strength):
    from diffusers import FluxImg2ImgPipeline

    theirs = run(
        FluxImg2ImgPipeline(**parts), texts, image=image, strength=strength, num_inference_steps=20
    )
    noise = noise_for(7, 16, H, W)
    asked = picture(image="x.png", strength=strength, steps=20)
    ours = sample_latents(model, noise, asked, texts[:1], image)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("strength", [1, 0.6])
def test_inpainting_is_the_pipelines(model, parts, texts, image, same_noise, strength):
    from diffusers import FluxInpaintPipeline

    mask = torch.zeros(1, 1, 8 * H, 8 * W)
    mask[..., 16:40, 24:] = 1
    theirs = run(
        FluxInpaintPipeline(**parts),
        texts,
        image=image,
        mask_image=mask,
        masked_image_latents=image,
        strength=strength,
    )
    asked = picture(image="x.png", strength=strength, mask="m.png")
    small = mask[..., ::8, ::8]
    ours = sample_latents(model, noise_for(7, 16, H, W), asked, texts[:1], image, small)
    assert relative(ours, theirs) < 1e-5
    assert torch.equal(ours * (1 - small), image * (1 - small))


def test_true_cfg_is_the_pipelines(model, parts, texts, monkeypatch):
    from diffusers import FluxPipeline

    noise = noise_for(7, 16, H, W)
    t5, pooled = texts[1]
    negative = {"negative_prompt_embeds": t5, "negative_pooled_prompt_embeds": pooled}
    theirs = run(FluxPipeline(**parts), texts, latents=pack(noise), true_cfg_scale=3.0, **negative)
    asked = picture(cfg=3.0)
    ours = sample_latents(model, noise, asked, texts)
    assert relative(ours, theirs) < 1e-5
    plain = sample_latents(model, noise, picture(), texts[:1])
    assert relative(plain, theirs) > 0.01
    never = sample_latents(model, noise, picture(cfg=3.0, cfg_start=0.99), texts)
    assert torch.equal(never, plain)

    real, sizes = model.forward, []

    def little_memory(img, *args, **options):
        sizes.append(len(img))
        if len(img) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(img, *args, **options)

    monkeypatch.setattr(model, "forward", little_memory)
    assert relative(sample_latents(model, noise, asked, texts), ours) < 1e-5
    assert sizes == [2] + [1] * 2 * STEPS


def test_replayed_passes_are_the_eager_ones(model, texts):
    """A graph a size, captured once: for another picture, and other embeddings."""
    asked, recorder = picture(cfg=3.0, sampler="heun", cfg_end=0.5), ReplayRecorder()
    graphs = Graphs(pass_graphs(model, CPU)._run_pass, torch.empty(0), recorder=recorder)
    for seed, embeddings in ((7, texts), (8, texts[::-1])):
        noise = noise_for(seed, 16, H, W)
        eager = sample_latents(model, noise, asked, embeddings)
        assert torch.equal(sample_latents(model, noise, asked, embeddings, graphs=graphs), eager)
    assert recorder.log.count("record") == 4  # with cfg and without, again for the second


def test_passes_run_eagerly_where_memory_is_too_small_for_a_graph(model, texts):
    class Full(ReplayRecorder):
        def record(self, run, left):
            raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = Graphs(pass_graphs(model, CPU)._run_pass, torch.empty(0), recorder=Full())
    noise = noise_for(7, 16, H, W)
    eager = sample_latents(model, noise, picture(), texts[:1])
    assert torch.equal(sample_latents(model, noise, picture(), texts[:1], graphs=graphs), eager)
    assert graphs.reason == "memory is too small for them"


@pytest.mark.parametrize("sigmas", ["flux", "simple", "beta"])
@pytest.mark.parametrize("kind", ["euler", "heun"])
def test_samplers_are_the_schedulers(model, texts, nano_model, kind, sigmas):
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    noise = noise_for(7, 16, H, W)
    tokens = 4096 if sigmas == "simple" else H * W // 4
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    options = {"use_beta_sigmas": sigmas == "beta"}
    euler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        nano_model, subfolder="scheduler", **options
    )
    euler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=mu)
    assert np.allclose(schedule(STEPS, H * W // 4, sigmas), euler.sigmas, atol=1e-6)
    scheduler = euler
    if kind == "heun":
        scheduler = FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(STEPS)
        inner, t = euler.sigmas, euler.sigmas[:-1] * 1000
        scheduler.sigmas = torch.cat([inner[:1], inner[1:-1].repeat_interleave(2), inner[-1:]])
        scheduler.timesteps = torch.cat([t[:1], t[1:].repeat_interleave(2)])
    x, asked = pack(noise), picture(sampler=kind, sigmas=sigmas)
    velocity = sampler.Velocity(
        model, (H, W), (scheduler.timesteps / 1000).tolist() + [0.0], asked, texts[:1]
    )
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps):
            v = velocity(x, index, index)
            x = scheduler.step(v, t, x, return_dict=False)[0]
    ours = sample_latents(model, noise, asked, texts[:1])
    assert relative(ours, unpack(x, H, W)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [((30, 70), (60, 110)), ((0, 118), (150, 160))])
def test_a_cropped_mask_is_the_pipelines(
    model, parts, texts, nano_model, same_noise, monkeypatch, tmp_path, rows, columns
):
    """Pixels: what is cropped, drawn and pasted back."""
    from diffusers import FluxInpaintPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from skimage import data

    whole = Image.fromarray(data.astronaut()).resize((160, 120))
    white = np.zeros((120, 160), np.uint8)
    inside = slice(*rows), slice(*columns)
    white[inside] = 255
    mask = Image.fromarray(white)
    whole.save(tmp_path / "x.png")
    mask.save(tmp_path / "m.png")

    def drawn(self, generator=None):
        return self.mean + self.std * rng.normal(7, "sample", 1, tuple(self.mean.shape[1:]))

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", drawn)
    pipeline = FluxInpaintPipeline(**parts)
    options = {"image": whole, "mask_image": mask, "padding_mask_crop": 8, "strength": 0.6}
    pipeline.set_progress_bar_config(disable=True)
    (t5, pooled), *_ = texts
    prompt = {"prompt_embeds": t5, "pooled_prompt_embeds": pooled}
    steps = {"num_inference_steps": STEPS, "guidance_scale": 3.5}
    (theirs,) = pipeline(**prompt, **SIZE, **steps, **options).images
    asked = picture(image=tmp_path / "x.png", mask=tmp_path / "m.png", mask_crop=8, strength=0.6)
    ours = draw_picture(model, Vae(nano_model), asked, texts[:1])
    a, b = (np.asarray(each, float) for each in (ours, theirs))
    assert a.shape == b.shape == (120, 160, 3) and np.abs(a - b).max() <= 2
    assert np.abs(a - np.asarray(whole, float))[inside].mean() > 5
