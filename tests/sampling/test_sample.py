"""Sampling against diffusers' FluxPipeline: the same noise and prompt give the same picture."""

import gc
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluxfast import load_transformer
from fluxfast.config.schema import DrawConfig, ModelConfig, SampleConfig
from fluxfast.encoders.vae import Vae
from fluxfast.errors import ConfigError, DiskError, FluxfastError
from fluxfast.formats.lora.apply import save_lora
from fluxfast.model.lora import inject_lora, lora_layers
from fluxfast.objective import pack
from fluxfast.rng import settle_seed
from fluxfast.run.evaluate import _keep_earlier
from fluxfast.sampling import draw
from fluxfast.sampling.draw import draw_picture
from fluxfast.sampling.picture import Picture, pictures_of, save_picture, settings_of
from fluxfast.sampling.sampler import noise_for, schedule
from fluxfast.sampling.sheet import contact_sheet
from fluxfast.tools import generate as module
from fluxfast.tools.generate import _reserve, generate

CAT = Picture("a photograph of a cat", 7, 96, 64, 4, 3.5)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def with_lora_of(picture: Picture, lora: Path, strength: float = 1.0) -> Picture:
    options = DrawConfig(loras=[{"file": str(lora), "strength": strength}])
    return replace(picture, options=options)


@pytest.fixture(scope="module")
def lora(nano_model, tmp_path_factory) -> Path:
    """A LoRA strong enough to be seen."""
    model = load_transformer(nano_model, "fp32", "fp32", "cpu")
    inject_lora(model, 4, targets="all", seed=1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g) * 2.0)
    return save_lora(model, tmp_path_factory.mktemp("lora") / "l.safetensors")


@pytest.mark.parametrize(("steps", "tokens"), [(4, 64), (20, 1024), (28, 4096)])
def test_schedule_is_the_pipelines(steps, tokens, nano_model):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(nano_model, subfolder="scheduler")
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert np.allclose(schedule(steps, tokens), scheduler.sigmas.numpy(), atol=1e-6)
    assert np.allclose(schedule(steps, tokens, shifted=False), np.linspace(1, 0, steps + 1))


@pytest.mark.slow
def test_picture_is_the_pipelines(nano_model, lora, tmp_path):
    """fp32, same noise, with the LoRA loaded on both sides: at least 40 dB; and the LoRA shows."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(nano_model)
    pipeline.set_progress_bar_config(disable=True)

    def theirs() -> np.ndarray:
        return np.array(
            pipeline(
                CAT.prompt,
                width=CAT.width,
                height=CAT.height,
                num_inference_steps=CAT.steps,
                guidance_scale=CAT.guidance,
                latents=pack(noise_for(CAT.seed, 16, CAT.height // 8, CAT.width // 8)),
                max_sequence_length=32,
            ).images[0]
        )

    config = ModelConfig(path=str(nano_model), storage="fp32", compute="fp32")
    base = theirs()
    pipeline.load_lora_weights(lora)
    with_lora = theirs()
    files = generate(config, [with_lora_of(CAT, lora)], tmp_path / "a", device="cpu")
    ours = np.array(Image.open(files[0]))
    assert ours.shape == (64, 96, 3)
    assert psnr(ours, with_lora) >= 40
    plain = generate(config, [CAT], tmp_path / "b", device="cpu")
    off = generate(config, [with_lora_of(CAT, lora, 0.0)], tmp_path / "c", device="cpu")
    assert psnr(np.array(Image.open(plain[0])), base) >= 40
    assert np.array_equal(np.array(Image.open(plain[0])), np.array(Image.open(off[0])))
    assert psnr(ours, base) < 35


def test_a_preview_may_have_settings_of_its_own(caplog):
    own = [{"prompt": "b", "seed": 7, "width": 48, "height": 100}, {"prompt": "c", "guidance": 1.5}]
    settings = SampleConfig(
        prompts=["a"], samples=own, width=64, height=64, steps=2, seed=3, walk_seed=True
    )
    assert pictures_of(settings) == [
        Picture("a", 3, 64, 64, 2, 4.0),
        Picture("b", 7, 48, 96, 2, 4.0),
        Picture("c", 5, 64, 64, 2, 1.5),
    ]
    assert "previews of height 100 are drawn at 96" in caplog.text


def test_png_says_how_it_was_made(tmp_path):
    picture = Picture("a “cat”, 猫", 3, 32, 32, 4, 1.0)
    save_picture(tmp_path / "x.png", Image.new("RGB", (32, 32)), picture, lora="l.safetensors")
    text = Image.open(tmp_path / "x.png").text
    assert text["prompt"] == picture.prompt and text["seed"] == "3"
    assert json.loads(text["fluxfast"])["lora"] == "l.safetensors"


def test_a_preview_with_other_settings_is_kept(tmp_path):
    path, image = tmp_path / "00-step00000002.png", Image.new("RGB", (32, 32))
    save_picture(path, image, CAT, step="2")
    assert settings_of(path)["prompt"] == CAT.prompt
    _keep_earlier(path, CAT)
    assert path.exists()  # it comes again as it was
    for steps, aside in ((9, "00-step00000002.1.png"), (10, "00-step00000002.2.png")):
        _keep_earlier(path, replace(CAT, steps=steps))
        assert not path.exists() and (tmp_path / aside).exists()
        save_picture(path, image, replace(CAT, steps=steps), step="2")
    path.write_bytes(b"no picture")
    _keep_earlier(path, CAT)
    assert path.exists() and settings_of(path) == {} == settings_of(tmp_path / "none.png")


def test_contact_sheet(tmp_path):
    Image.new("RGB", (300, 100), (255, 0, 0)).save(tmp_path / "a.png")
    rows = [("one", [tmp_path / "a.png", None]), ("two 猫 " * 30, [None, tmp_path / "gone.png"])]
    contact_sheet(rows, ["step 0", "step 9"], tmp_path / "sheet.png")
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    red = (sheet == (255, 0, 0)).all(axis=-1)
    assert 200 * 60 < red.sum() < 256 * 100
    assert not red[:, sheet.shape[1] - 256 :].any() and not red[sheet.shape[0] // 2 :].any()


@pytest.mark.grid(1)
@pytest.mark.parametrize(("width", "height"), [(100, 64), (64, 8), (0, 64)])
def test_sizes_off_the_grid_are_refused(nano_model, tmp_path, width, height):
    config = ModelConfig(path=str(nano_model), storage="fp32", compute="fp32")
    with pytest.raises(ConfigError, match="multiples of 16"):
        generate(config, [Picture("x", 0, width, height, 2, 1.0)], tmp_path, device="cpu")


@pytest.mark.slow
def test_nothing_stays_in_memory(nano_model, monkeypatch, tmp_path):
    """The transformer, the VAE and every tensor of the sampler are gone with the pictures."""
    alive, real = [], module.Vae

    class Watched(real):
        def __init__(self, *args):
            super().__init__(*args)
            alive.append(weakref.ref(self._vae))

    monkeypatch.setattr(module, "Vae", Watched)
    config = ModelConfig(path=str(nano_model), storage="fp32", compute="fp32")
    generate(config, [CAT], tmp_path, device="cpu")
    gc.collect()
    before = sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor))
    generate(config, [CAT], tmp_path, device="cpu")
    gc.collect()
    after = sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor))
    assert [ref() for ref in alive] == [None, None] and after <= before


def test_command(nano_model, lora, tmp_path, fluxfast):
    size = ("--width", "64", "--height", "64", "--steps", "2", "--out", tmp_path)
    prompts = ("--prompt", "a cat", "--prompt", "a dog", "--walk-seed")
    code, out, err = fluxfast("sample", "--model", nano_model, "--lora", lora, *prompts, *size)
    files = [Path(line) for line in out.splitlines()]
    assert code == 0, err
    assert [file.name for file in files] == ["00-seed42-a-cat.png", "01-seed43-a-dog.png"]
    assert all(Image.open(file).size == (64, 64) for file in files)
    before = [file.read_bytes() for file in files]
    # the same prompt and seed without the LoRA, then a seed that is drawn, in a size to be rounded
    again = ("sample", "--model", nano_model, "--prompt", "a cat", *size)
    (third,) = map(Path, fluxfast(*again)[1].splitlines())
    _, out, err = fluxfast(*again, "--seed", "-1", "--width", "72")
    fourth = Path(out.strip())
    assert "width 72 are drawn at 64" in err and Image.open(fourth).size == (64, 64)
    assert third.name == "02-seed42-a-cat.png" and third.read_bytes() != before[0]
    assert fourth.name == f"03-seed{Image.open(fourth).text['seed']}-a-cat.png"
    assert [file.read_bytes() for file in files] == before


def test_a_seed_is_drawn_or_the_runs_own():
    assert len({settle_seed(-1) for _ in range(8)}) == 8
    assert settle_seed(-1, 7) == 7 and settle_seed(3, 7) == 3 and settle_seed(-1, 0) == 0


def test_a_name_is_taken_by_one_process(tmp_path, monkeypatch):
    """Another takes the number between looking and writing."""
    (tmp_path / "07-seed1-a.png").touch()
    (tmp_path / "notes.png").touch()
    assert _reserve(tmp_path, "seed1-a.png").name == "08-seed1-a.png"
    monkeypatch.setattr(Path, "glob", lambda *_: iter([tmp_path / "07-seed1-a.png"]))
    assert _reserve(tmp_path, "seed1-a.png").name == "09-seed1-a.png"


def test_pictures_that_are_not_finite_are_refused(nano_model, monkeypatch):
    monkeypatch.setattr(draw, "sample_latents", lambda _, noise, *__: noise * math.nan)
    with pytest.raises(FluxfastError, match="'a photograph of a cat' is not finite"):
        draw_picture(None, Vae(nano_model), CAT, [])


def test_a_folder_that_takes_no_file_is_reported_first(nano_model, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DiskError, match="cannot write into .*out"):
        generate(ModelConfig(path="absent"), [CAT], tmp_path / "out", device="cpu")
