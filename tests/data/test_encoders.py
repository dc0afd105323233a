"""Encoders against diffusers' pipeline, and the fingerprints of their folders."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxfast.encoders import fingerprint as fingerprints
from fluxfast.encoders.fingerprint import fingerprint
from fluxfast.encoders.text import TextEncoders
from fluxfast.encoders.vae import Vae
from fluxfast.errors import FluxfastError

pytestmark = pytest.mark.usefixtures("one_thread")
WITHOUT_TRANSFORMER = shutil.ignore_patterns("transformer")
PROMPTS = ["", "a cat", "a red car parked in front of a brick building, 35 mm film, grain " * 9]


@pytest.fixture(scope="module")
def encoders(nano_model):
    return TextEncoders(nano_model)


@pytest.fixture(scope="module")
def pipeline(nano_model):
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(nano_model)


@pytest.mark.parametrize("max_length", [32, 16, 64])
def test_text_equals_diffusers(encoders, pipeline, max_length):
    with torch.no_grad():
        expected = pipeline.encode_prompt(PROMPTS, max_sequence_length=max_length)
    t5, pooled = encoders.encode(PROMPTS, max_length)
    assert t5.shape[:2] == (3, max_length) and t5.std() > 0
    assert torch.equal(t5, expected[0]) and torch.equal(pooled, expected[1])
    alone = encoders.encode(PROMPTS[1:2], max_length)[0]
    assert torch.allclose(alone[0], t5[1], atol=1e-6), "the batch does not matter"


def test_dtype(nano_model):
    t5, pooled = TextEncoders(nano_model, dtype=torch.bfloat16).encode(["a cat"], 8)
    assert t5.dtype == pooled.dtype == torch.bfloat16 and not t5.requires_grad


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_a_t5_of_fewer_bits(encoders, nano_model, tmp_path, dtype):
    """The embeddings are those of the same values in fp32: each is read as it stands."""
    root = shutil.copytree(nano_model, tmp_path / "m", ignore=WITHOUT_TRANSFORMER)
    file, embeddings = root / "text_encoder_2" / "model.safetensors", []
    values = {k: v.to(dtype) for k, v in load_file(file).items()}
    for state in (values, {k: v.float() for k, v in values.items()}):
        save_file(state, file, {"format": "pt"})
        embeddings.append(TextEncoders(root).encode(["a cat"], 16)[0])
    assert embeddings[0].std() > 0 and torch.equal(*embeddings)
    assert not torch.equal(embeddings[0], encoders.encode(["a cat"], 16)[0])


def test_truncation_is_announced_once(nano_model, caplog):
    encoders = TextEncoders(nano_model)
    with caplog.at_level(logging.WARNING, logger="fluxfast"):
        encoders.encode(["a cat"], 32)
        assert not caplog.records
        encoders.encode(PROMPTS, 32)
        encoders.encode(PROMPTS[::-1], 32)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2 and "77" in texts[0] and "32" in texts[1]
    assert "a red car" in texts[1] and len(texts[1]) < 200


def test_values_that_are_not_finite_are_refused(nano_model):
    encoders = TextEncoders(nano_model)
    encoders._t5.shared.weight.fill_(float("inf"))
    with pytest.raises(FluxfastError, match="text encoders .* not finite"):
        encoders.encode(["a cat"], 8)
    with pytest.raises(FluxfastError, match="VAE .* not finite"):
        Vae(nano_model).encode(torch.full((1, 3, 32, 32), float("nan")))


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
def test_missing_text_parts_are_named(nano_model, tmp_path, part):
    root = shutil.copytree(nano_model, tmp_path / "m", ignore=WITHOUT_TRANSFORMER)
    shutil.rmtree(root / part)
    for _ in range(2):
        with pytest.raises(FluxfastError, match=rf"{part} is missing\nhint: "):
            TextEncoders(root)
        (root / part).mkdir(exist_ok=True)  # an empty folder is missing too


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
def test_damaged_weights_are_named_never_random(nano_model, tmp_path, part):
    cls = Vae if part == "vae" else TextEncoders
    root = shutil.copytree(nano_model, tmp_path / "m", ignore=WITHOUT_TRANSFORMER)
    (weights,) = (root / part).glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if name.endswith("weight"))
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(FluxfastError, match=rf"{part}\b"):
        cls(root)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FluxfastError, match=rf"{part}\b"):
        cls(root)


def test_vae_normalizes_and_returns(nano_model, pipeline):
    vae = Vae(nano_model)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = vae.encode(images)
    theirs = pipeline.vae
    posterior = theirs.encode(images).latent_dist
    shift, scale = theirs.config.shift_factor, theirs.config.scaling_factor
    assert (vae.factor, vae.channels) == (8, 16) and mean.shape == (2, 16, 8, 12)
    torch.testing.assert_close(mean, (posterior.mean - shift) * scale)
    torch.testing.assert_close(std, posterior.std * scale)
    decoded = theirs.decode(mean / scale + shift).sample.clamp(-1, 1)
    torch.testing.assert_close(vae.decode(mean), decoded)
    low = Vae(nano_model, dtype=torch.bfloat16).encode(images)[0]
    assert low.dtype == torch.float32 and (low - mean).abs().max() < 0.2


def folder(path, **files):
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name.replace("__", ".")).write_bytes(data)
    return path


def test_fingerprint_sees_contents_and_names_only(tmp_path):
    files = {"config__json": b"{}", "model__safetensors": b"x" * 100}
    base = fingerprint(folder(tmp_path / "a", **files))
    assert len(base) == 64
    extra = {"README__md": b"text", ".hidden__json": b"x"}
    assert fingerprint(folder(tmp_path / "b", **files, **extra)) == base
    changed = [
        files | {"config__json": b"{ }"},
        files | {"model__safetensors": b"x" * 99 + b"y"},
        files | {"merges__txt": b""},
        {"config__json": b"{}", "other__safetensors": b"x" * 100},
    ]
    prints = {fingerprint(folder(tmp_path / f"c{i}", **it)) for i, it in enumerate(changed)}
    assert len(prints | {base}) == 5


def test_fingerprint_of_large_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "FULL_BYTES", 1024)
    monkeypatch.setattr(fingerprints, "MIB", 64)
    header = b'{"t": 1}'
    data = bytearray(len(header).to_bytes(8, "little") + header + bytes(50_000))
    path = folder(tmp_path / "a", model__safetensors=bytes(data))

    def after(offset: int, value: int = 1) -> str:
        changed = bytearray(data)
        changed[offset] = value
        (path / "model.safetensors").write_bytes(changed)
        return fingerprint(path)

    base = fingerprint(path)
    assert after(9, 32) != base, "the header counts in full"
    assert after(len(data) - 1) != base and after(len(data) - 64) != base, "so does the last chunk"
    middle = 7 * (len(data) - 64) // 15
    assert after(middle) != base and after(middle + 63) != base
    assert after(middle + 200) == base, "what lies between the chunks does not"
    (path / "model.safetensors").write_bytes(data + b"\0")
    assert fingerprint(path) != base


def test_fingerprint_errors(tmp_path):
    with pytest.raises(FluxfastError, match="neither weights nor settings"):
        fingerprint(folder(tmp_path / "empty"))
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(FluxfastError, match="cannot read"):
        fingerprint(tmp_path / "link")
