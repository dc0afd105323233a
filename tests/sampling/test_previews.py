"""Previews of a training run with settings of their own, and LoRAs that act in them alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fluxfast import load_transformer
from fluxfast.config.schema import DrawConfig, ModelConfig, SampleLoRA
from fluxfast.data.prepare import preview_pictures
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.lora.apply import sampling_loras, save_lora
from fluxfast.model.lora import inject_lora, lora_layers
from fluxfast.model.lora_linear import LoRALinear
from fluxfast.model.precision import linears
from fluxfast.run.evaluate import _keep_earlier
from fluxfast.sampling.picture import Picture, save_picture, settings_of
from fluxfast.tools.generate import generate, redrawn
from fluxfast.train import train


@pytest.fixture(scope="module")
def lora(nano_model, tmp_path_factory) -> Path:
    """Strong enough to be seen."""
    model = load_transformer(nano_model, "fp32", "fp32", "cpu")
    inject_lora(model, 2, targets="all", seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    return save_lora(model, tmp_path_factory.mktemp("lora") / "few.safetensors")


def pixels(file: Path) -> np.ndarray:
    return np.array(Image.open(file))


def test_a_preview_is_what_sample_draws_and_training_goes_on_the_same(
    configure, nano_model, photos, lora, tmp_path
):
    size = {"width": 64, "height": 64, "steps": 2, "every": 0}
    entry = {
        "prompt": "[trigger] b",
        "negative": "dogs",
        "cfg": 2.0,
        "image": str(photos / "0.png"),
        "strength": 0.9,
        "threshold": "preset",
        "loras": [{"file": str(lora), "strength": 0.5}],
    }
    sample = {**size, "prompts": ["a", entry]}
    config = configure(name="looks", sample=sample, train__steps=2)
    done = load_file(train(config))
    plain = load_file(train(configure(name="plain", train__steps=2)))
    assert all(torch.equal(done[key], plain[key]) for key in plain)

    folder = config.run_dir / "samples"
    first = folder / "01-step00000000.png"
    settings = settings_of(first)
    assert (
        settings["loras"][0]["strength"] == 0.5 and settings["threshold"]["interpolate_phi"] == 0.7
    )
    picture = Picture.from_settings(settings, str(first))
    assert picture.prompts == ["ohwx b", "dogs"] and picture.options.image == photos / "0.png"
    model = ModelConfig(path=str(nano_model), storage="fp32", compute="fp32")
    (again,) = generate(model, [picture], tmp_path / "again", "cpu")
    assert np.array_equal(pixels(first), pixels(again))
    without = replace(picture, options=picture.options.model_copy(update={"loras": []}))
    (other,) = generate(model, [without], tmp_path / "other", "cpu")
    assert not np.array_equal(pixels(first), pixels(other))
    # the first preview is drawn without the second's LoRA
    (base,) = generate(model, [Picture("a", 42, 64, 64, 2, 4.0)], tmp_path / "base", "cpu")
    assert np.array_equal(pixels(folder / "00-step00000000.png"), pixels(base))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": "none.png"}, "none.png"),
        ({"loras": [{"file": "none.safetensors"}]}, "the LoRA none.safetensors does not exist"),
        ({"image": "PHOTO", "strength": 0, "steps": 2}, "strength 0 of 2 steps leaves no step"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_encoded(
    configure, photos, monkeypatch, entry, message
):
    photo = str(photos / "0.png")
    entry = {key: photo if value == "PHOTO" else value for key, value in entry.items()}
    config = configure(sample={"prompts": [{"prompt": "a", **entry}]})
    monkeypatch.setattr("fluxfast.data.cache._encode_texts", lambda *_: pytest.fail("encoded"))
    with pytest.raises((ConfigError, FluxfastError), match=message):
        train(config)


def test_a_lora_of_previews_never_stays(nano_model, lora, monkeypatch):
    """Not where memory runs out while it is put on either: it would act in training."""
    model = load_transformer(nano_model, "fp32", "fp32", "cpu")
    inject_lora(model, 2)
    layers = [model.linear(name) for name in linears(model.spec)]
    before = [list(layer.updates) for layer in layers]
    few, real, calls = [SampleLoRA(file=str(lora))], LoRALinear.add_update, []

    def full(self, update):
        calls.append(self)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, update)

    with sampling_loras(model, few):
        assert sum(len(layer.updates) for layer in layers) > sum(map(len, before))
    assert [list(layer.updates) for layer in layers] == before
    monkeypatch.setattr(LoRALinear, "add_update", full)
    with pytest.raises(torch.OutOfMemoryError), sampling_loras(model, few):
        pass
    assert len(calls) == 6 and [list(layer.updates) for layer in layers] == before


def test_a_trigger_is_filled_into_both_prompts(configure):
    entry = {"prompt": "[trigger] a", "negative": "no [trigger]", "cfg": 2}
    (picture,) = preview_pictures(configure(sample={"prompts": [entry]}))
    assert picture.prompts == ["ohwx a", "no ohwx"]


def test_a_preview_with_a_setting_less_is_another_one(tmp_path):
    path, image = tmp_path / "00-step00000002.png", Image.new("RGB", (32, 32))
    plain = Picture("a", 1, 32, 32, 2, 1.0)
    guided = replace(plain, options=DrawConfig(cfg=2.0))
    save_picture(path, image, guided, run="r", step="2")
    _keep_earlier(path, guided)
    assert path.exists()
    _keep_earlier(path, plain)
    assert not path.exists() and path.with_suffix(".1.png").exists()
    with pytest.raises(ConfigError, match="a preview of the run r"):
        redrawn(path.with_suffix(".1.png"), "model")
