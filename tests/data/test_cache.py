"""prepare_dataset with a nano model: cache files, reuse, masks, errors; and the cache's store."""

import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from fluxfast.config.schema import build_config
from fluxfast.data import images
from fluxfast.data.cache import Encoding, encode_prompts, prepare_dataset
from fluxfast.data.store import (
    LATENTS,
    TEXT,
    CacheDamaged,
    is_complete,
    read_tensors,
    write_tensors,
)
from fluxfast.errors import ConfigError, FluxfastError

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(seed: int, size=(96, 64), mode="RGB") -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (8, 8, len(mode)), dtype=np.uint8)
    return Image.fromarray(small, mode).resize(size, Image.Resampling.BICUBIC)


def config(tmp_path, trigger=None, **data):
    entry = {"folder": str(tmp_path / "data"), "resolution": 64, "default_caption": "x"} | data
    raw = {"cache_dir": str(tmp_path / "cache"), "trigger": trigger, "data": entry}
    return build_config(raw | {"model": {"path": "unused"}})


@pytest.fixture
def cheap_encoders(monkeypatch):
    """Encoders that cost nothing, where only names and files matter."""

    class Cheap:
        factor = 8

        def __init__(self, root, device, dtype):
            self.dtype = dtype

        def close(self):
            pass

    class Text(Cheap):
        def encode(self, prompts, length):
            return torch.ones(1, length, 4, dtype=self.dtype), torch.ones(1, 4, dtype=self.dtype)

    class Images(Cheap):
        def encode(self, pixels):
            small = torch.nn.functional.avg_pool2d(pixels, self.factor)
            return small, torch.ones_like(small)

    monkeypatch.setattr("fluxfast.encoders.text.TextEncoders", Text)
    monkeypatch.setattr("fluxfast.encoders.vae.Vae", Images)


@pytest.fixture
def folder(tmp_path) -> Path:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    picture(1).save(data / "a.png")
    picture(2, (64, 96)).save(data / "b.jpg")
    picture(3).save(data / "sub" / "c.png")
    (data / "a.txt").write_text("one, two, three, four")
    (data / "b.txt").write_text("")
    return data


def files(tmp_path) -> dict[str, float]:
    root = tmp_path / "cache"
    return {
        path.relative_to(root).as_posix(): path.stat().st_mtime_ns
        for path in root.rglob("*")
        if path.is_file()
    }


def prepare(nano_model, settings, **options):
    return prepare_dataset(settings, Encoding(nano_model, 32), **options)


def test_everything_is_written_once(nano_model, tmp_path, folder, monkeypatch):
    picture(1).save(folder / "copy of a.png")  # the same bytes under another name
    settings = config(tmp_path, num_repeats=3, resolution=[96, 64], caption_dropout=0.25)
    seen = []
    dataset = prepare(nano_model, settings, progress=lambda *report: seen.append(report))

    names = Counter((sample.name, sample.size) for sample in dataset.samples)
    assert set(names.values()) == {3} and len(names) == 8
    assert [name for name, size in names][:4] == ["a.png", "b.jpg", "copy of a.png", "sub/c.png"]
    first, second = dataset.samples[0], dataset.samples[3]
    assert (first.caption, second.caption) == ("one, two, three, four", "")
    assert first.caption_dropout == 0.25 and first.flipped is None
    assert second.texts == [dataset.empty_text], "an empty caption is the empty prompt"

    kinds = Counter(name.split("/")[0] for name in files(tmp_path))
    assert kinds == {"latents": 6, "text": 3, "sizes.json": 1}
    for sample in dataset.samples:
        latents = read_tensors(sample.latents, LATENTS)
        (w, h), shape = sample.size, latents["mean"].shape
        assert shape == (16, h // 8, w // 8) == latents["std"].shape and "mask" not in latents
        assert latents["mean"].dtype == latents["std"].dtype == torch.float32
    text = read_tensors(dataset.empty_text, TEXT)
    assert text["t5"].shape == (32, 192) and text["pooled"].shape == (128,)
    assert [r for r in seen if r[0] == "hash"] == [("hash", i, 4) for i in range(1, 5)]
    assert [r for r in seen if r[0] == "text"] == [("text", i, 3) for i in range(1, 4)]
    assert seen[-1] == ("latents", 6, 6)

    before = files(tmp_path)
    seen.clear()
    for library in ("transformers", "diffusers"):  # not needed if everything is cached
        monkeypatch.setitem(sys.modules, library, None)
    assert prepare(nano_model, settings, progress=lambda *report: seen.append(report)) == dataset
    assert files(tmp_path) == before and {kind for kind, _, _ in seen} == {"hash"}


def test_latents_are_the_images(nano_model, tmp_path, folder):
    from fluxfast.encoders.vae import Vae

    dataset = prepare(nano_model, config(tmp_path, flip=True))
    vae = Vae(nano_model)
    for sample in dataset.samples:
        pixels = images.fit_image(images.load_image(folder / sample.name)[0], sample.size)
        for path, expected in [(sample.latents, pixels), (sample.flipped, pixels.flip(-1))]:
            mean, std = vae.encode(expected[None])
            cached = read_tensors(path, LATENTS)
            assert torch.equal(cached["mean"], mean[0]) and torch.equal(cached["std"], std[0])


def test_texts_are_the_prompts(nano_model, tmp_path, folder):
    from fluxfast.encoders.text import TextEncoders

    settings = config(tmp_path, shuffle_captions=True, shuffle_variants=3, trigger="tok")
    dataset = prepare(nano_model, settings, extra_prompts=["a preview"])
    sample = dataset.samples[0]
    assert sample.caption.startswith("tok, ") and 1 < len(sample.texts) <= 3
    assert dataset.samples[1].caption == "tok", "an empty sidecar leaves the trigger alone"
    before = files(tmp_path)
    prompts = ["a preview", sample.caption, "", "a preview"]
    paths = encode_prompts(prompts, settings.cache_path, Encoding(nano_model, 32))
    assert files(tmp_path) == before and paths[sample.caption] == sample.texts[0]
    encoders = TextEncoders(nano_model)
    for prompt, path in paths.items():
        t5, pooled = encoders.encode([prompt], 32)
        cached = read_tensors(path, TEXT)
        assert torch.equal(cached["t5"], t5[0]) and torch.equal(cached["pooled"], pooled[0])


def test_prompts_of_previews_may_fail_and_captions_may_not(
    cheap_encoders, nano_model, tmp_path, folder, monkeypatch, log_lines
):
    settings = config(tmp_path)
    prepare(nano_model, settings)

    class Fails:
        def __init__(self, *arguments):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fluxfast.encoders.text.TextEncoders", Fails)
    dataset = prepare(nano_model, settings, extra_prompts=["a preview", ""])
    assert dataset.samples
    full = "the GPU's memory is full while encoding captions: CUDA out of memory"
    assert log_lines.count(f"note: the prompts of previews: {full}; the run goes on") == 1
    with pytest.raises(FluxfastError, match=f"{full}\nhint: end what else uses the GPU"):
        prepare(nano_model, config(tmp_path, default_caption="new"), extra_prompts=["a preview"])


def test_memory_that_is_too_small_for_a_picture_is_told(
    cheap_encoders, nano_model, tmp_path, folder, monkeypatch
):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    monkeypatch.setattr("fluxfast.encoders.vae.Vae.encode", Mock(side_effect=full))
    words = r"full while encoding \S*a.png at 64x64: CUDA out of memory. Tried.*\nhint: end what"
    with pytest.raises(FluxfastError, match=words):
        prepare(nano_model, config(tmp_path))


def test_what_is_refused_is_refused_before_anything_is_encoded(nano_model, tmp_path, folder):
    seen = []

    def check(names, buckets):
        seen.append((names, buckets))
        raise ConfigError("this does not fit")

    with pytest.raises(ConfigError, match="does not fit"):
        prepare(nano_model, config(tmp_path, resolution=[96, 64], batch_size=3), check=check)
    ((names, buckets),) = seen
    assert "sub/c.png" in names and {count for _, count in buckets} == {3}
    assert len(buckets) > 1 and not list((tmp_path / "cache").rglob("*.safetensors"))


def test_settings_that_matter_change_the_names(cheap_encoders, nano_model, tmp_path, folder):
    picture(5, mode="RGBA").save(folder / "a.png")

    def names(dtype=torch.float32, length=32, **data) -> tuple[Path, Path]:
        dataset = prepare_dataset(
            config(tmp_path, **data), Encoding(nano_model, length, dtype=dtype)
        )
        return dataset.samples[0].latents, dataset.samples[0].texts[0]

    latents, text = names()
    assert names(num_repeats=2, caption_dropout=0.5, mask_min=0.5) == (latents, text)
    assert names(length=16)[0] == latents and names(length=16)[1] != text
    half = names(dtype=torch.bfloat16)
    assert half[0] != latents and half[1] != text
    assert read_tensors(half[1], TEXT)["t5"].dtype == torch.bfloat16
    masked = {names(mask="alpha", mask_min=least)[0] for least in (0.0, 0.5)}
    assert len(masked | {latents, names(resolution=96)[0]}) == 4
    (folder / "a.txt").write_text("another")
    assert names()[0] == latents and names()[1] != text
    picture(6).save(folder / "a.png")
    assert names()[0] != latents


def test_masks(cheap_encoders, nano_model, tmp_path, folder, caplog):
    shaped = picture(1, (64, 64), "RGBA")
    shaped.putalpha(0)
    shaped.paste((9, 9, 9, 255), (0, 0, 32, 64))
    shaped.save(folder / "a.png")
    settings = config(tmp_path, mask="alpha", mask_min=0.2, flip=True)
    one, other, _ = prepare(nano_model, settings).samples
    expected = torch.cat([torch.ones(8, 4), torch.full((8, 4), 0.2)], dim=1)
    assert torch.allclose(read_tensors(one.latents, LATENTS)["mask"], expected)
    assert torch.allclose(read_tensors(one.flipped, LATENTS)["mask"], expected.flip(-1))
    assert "mask" not in read_tensors(other.latents, LATENTS)
    assert "2 images have no alpha" in caplog.text


def test_mask_folder(cheap_encoders, nano_model, tmp_path, folder, log_lines):
    masks = folder / "masks"  # inside the data folder: no training images
    (masks / "sub").mkdir(parents=True)
    half = Image.new("L", (96, 64), 0)
    half.paste(255, (0, 0, 48, 64))
    half.save(masks / "a.png")
    half.resize((48, 32)).save(masks / "sub" / "c.WEBP", lossless=True)
    (folder / "b.txt").write_text("not empty, which strict refuses")
    data = {"mask": "folder", "mask_folder": str(masks)}
    settings, strict = config(tmp_path, **data), config(tmp_path, **data, strict=True)
    with pytest.raises(FluxfastError, match=r"no mask for .*b\.jpg"):
        prepare(nano_model, strict)
    for size, message in (
        ((64, 64), r"b\.jpg is 64x64, its image 64x96"),
        ((64, 96), r"mask of .*b\.jpg is black everywhere"),
    ):
        Image.new("L", size, 0).save(masks / "b.jpg")
        with pytest.raises(FluxfastError, match=message):
            prepare(nano_model, strict)
    log_lines.clear()
    dataset = prepare(nano_model, settings)
    assert [sample.name for sample in dataset.samples] == ["a.png", "sub/c.png"]
    lost, count = [line for line in log_lines if "skipped" in line]
    assert "black everywhere" in lost and count.startswith("1 of 3 pictures skipped")
    Image.new("L", (64, 96), 255).save(masks / "b.jpg")
    dataset = prepare(nano_model, settings)
    assert [sample.name for sample in dataset.samples] == ["a.png", "b.jpg", "sub/c.png"]
    for sample in (dataset.samples[0], dataset.samples[2]):
        mask = read_tensors(sample.latents, LATENTS)["mask"]
        assert mask[:, 0].min() == 1.0 and mask[:, -1].max() == 0.0
        assert abs(mask.mean() - 0.5) < 0.02
    old = dataset.samples[0].latents
    half.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(masks / "a.png")
    assert prepare(nano_model, settings).samples[0].latents != old, "the mask's content counts"


def test_damaged_entries_are_encoded_again(nano_model, tmp_path, folder):
    settings = config(tmp_path)
    dataset = prepare(nano_model, settings)
    paths = [dataset.samples[0].latents, dataset.samples[1].latents, dataset.empty_text]
    whole = [path.read_bytes() for path in paths]
    for path, damaged in zip(paths, (whole[0][:-1], b"", whole[2][:100]), strict=True):
        path.write_bytes(damaged)
        with pytest.raises(CacheDamaged, match=path.name) as raised:
            read_tensors(path, ())
        assert "fluxfast cache" in raised.value.hint and not path.exists()
    assert prepare(nano_model, settings) == dataset
    assert [path.read_bytes() for path in paths] == whole


def test_an_interruption_keeps_what_was_written(nano_model, tmp_path, folder, monkeypatch):
    def stop(kind, done, total):
        if kind == "latents":
            raise KeyboardInterrupt

    settings = config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prepare(nano_model, settings, progress=stop)
    before = files(tmp_path)
    assert len([name for name in before if name.startswith("latents/")]) == 1
    monkeypatch.setattr("fluxfast.encoders.text.TextEncoders", None)  # all texts are there
    seen = []
    prepare(nano_model, settings, progress=lambda *report: seen.append(report))
    assert seen[-1] == ("latents", 2, 2)
    assert before.items() <= files(tmp_path).items()


def test_encoders_are_never_loaded_together(nano_model, tmp_path, folder, monkeypatch):
    from fluxfast.encoders.text import TextEncoders
    from fluxfast.encoders.vae import Vae

    expected = [(cls, name) for cls in (TextEncoders, Vae) for name in ("__init__", "close")]
    calls = []

    def record(call):
        method = getattr(*call)
        monkeypatch.setattr(*call, lambda *args: calls.append(call) or method(*args))

    for call in expected:
        record(call)
    prepare(nano_model, config(tmp_path))
    assert calls == expected


def test_inputs_are_checked_before_encoding(nano_model, tmp_path, folder, monkeypatch):
    monkeypatch.setattr("fluxfast.encoders.text.TextEncoders", None)
    monkeypatch.setattr("fluxfast.encoders.vae.Vae", None)
    with pytest.raises(FluxfastError, match=r"1 of 3 images have no caption: c\.png"):
        prepare(nano_model, config(tmp_path, default_caption=None))
    with pytest.raises(FluxfastError, match=r"c\.png: .*\[trigger\]"):
        prepare(nano_model, config(tmp_path, default_caption="[trigger]"))
    with pytest.raises(FluxfastError, match="none.*is missing"):
        prepare(tmp_path / "none", config(tmp_path))
    picture(1, (400, 20)).save(folder / "thin.png")
    with pytest.raises(FluxfastError, match=r"thin\.png: 400x20 .*too small"):
        prepare(nano_model, config(tmp_path, strict=True))


def test_cache_path_that_is_a_file(nano_model, tmp_path, folder):
    (tmp_path / "cache").write_text("")
    with pytest.raises(FluxfastError, match="cannot write into") as raised:
        prepare(nano_model, config(tmp_path))
    assert "cache_dir" in raised.value.hint


def test_store_round_trip_and_damage(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 4).T, "b": torch.randn(5).bfloat16(), "c": torch.randn(4)[::2]}
    write_tensors(path, tensors)
    read = read_tensors(path, ("a", "b"))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert is_complete(path, ("a", "b")) and not is_complete(path, ("d",))
    data = path.read_bytes()
    with pytest.raises(CacheDamaged, match=r"x\.safetensors .* lacks 'd'"):
        read_tensors(path, ("d",))
    damages = [data[:cut] for cut in (0, 1, 7, 8, 30, len(data) - 1)]
    damages += [data + b"\0", b"\xff" * 8 + data[8:], data[:8] + b"[" + data[9:]]
    for damaged in damages:
        path.write_bytes(damaged)
        assert not is_complete(path, ("a",))
        with pytest.raises(FluxfastError, match=r"x\.safetensors"):
            read_tensors(path, ("a",))
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # one bit
    with pytest.raises(CacheDamaged, match="has been deleted.*checksum") as raised:
        read_tensors(path, ("a",))
    assert raised.value.path == path and not path.exists()
    with pytest.raises(FluxfastError, match="No such file"):
        read_tensors(tmp_path / "none", ())
