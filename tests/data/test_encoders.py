"""Encoders against diffusers' pipeline, and the fingerprints of their folders."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxfast.encoders import fingerprint as fingerprints
from fluxfast.encoders import text
from fluxfast.encoders.fingerprint import fingerprint
from fluxfast.encoders.placement import place
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


def room_for(t5, blocks: float, monkeypatch) -> None:
    """Lets so many of T5's blocks fit beside the one that is at work, and what is no block."""
    each, total = (sum(p.nbytes for p in x.parameters()) for x in (t5.encoder.block[-1], t5))
    outer = total - sum(p.nbytes for p in t5.encoder.block.parameters())
    first = sum(p.nbytes for p in t5.encoder.block[0].parameters())  # the position bias too
    free = total + outer + first + blocks * each  # total: what it works in, at most
    monkeypatch.setattr(text, "free_bytes", lambda device: free)


def test_t5_blocks_that_do_not_fit_come_for_their_own_pass(
    encoders, nano_model, monkeypatch, log_lines
):
    """The embeddings are the same to the bit, so that a cache does not depend on free memory."""
    count = len(encoders._t5.encoder.block)
    room_for(encoders._t5, 0.1, monkeypatch)
    streamed = TextEncoders(nano_model)
    assert any(f"{count} of its {count} blocks are copied" in line for line in log_lines)
    for _ in range(2):
        pairs = zip(streamed.encode(PROMPTS, 16), encoders.encode(PROMPTS, 16), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def test_as_many_blocks_as_fit_stay_on_the_device():
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    model.requires_grad_(False)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected, block = model(x), 4 * 72
    assert place(model, list(model), torch.device("cpu"), 3.5 * block + 1, work=1) == 2
    assert [len(layer._forward_pre_hooks) for layer in model] == [1, 1, 1, 1]
    assert torch.equal(model(x), expected)


def test_a_t5_of_fp8_stays_so_where_memory_is_short(encoders, nano_model, tmp_path, monkeypatch):
    """Half as many bytes as in bf16, the same bits."""
    root = shutil.copytree(nano_model, tmp_path / "m", ignore=WITHOUT_TRANSFORMER)
    file = root / "text_encoder_2" / "model.safetensors"
    values = {k: v.to(torch.float8_e4m3fn).bfloat16() for k, v in load_file(file).items()}
    save_file(values, file, {"format": "pt"})
    whole = TextEncoders(root, dtype=torch.bfloat16)
    room_for(whole._t5, 0.7, monkeypatch)
    narrow = TextEncoders(root, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow._t5.encoder.block[0].parameters()} == {torch.float8_e4m3fn}
    pairs = zip(narrow.encode(PROMPTS, 16), whole.encode(PROMPTS, 16), strict=True)
    assert all(one.dtype == torch.bfloat16 and torch.equal(one, other) for one, other in pairs)


def test_too_little_memory_for_one_block_is_told_before_any_is_moved(
    encoders, nano_model, monkeypatch
):
    room_for(encoders._t5, -0.1, monkeypatch)
    with pytest.raises(
        FluxfastError, match="T5EncoderModel takes at least .*\nhint: end what else"
    ):
        TextEncoders(nano_model)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ],
)
def test_a_picture_too_large_for_the_memory_is_decoded_in_tiles(
    nano_model, error, monkeypatch, log_lines
):
    vae = Vae(nano_model)
    latents = torch.randn(1, vae.channels, 80, 72, generator=torch.Generator().manual_seed(0))
    whole, decode = vae.decode(latents), vae._vae.decoder.forward

    def small_only(z, *rest):
        if z.shape[-2] > 64:
            raise error
        return decode(z, *rest)

    monkeypatch.setattr(vae._vae.decoder, "forward", small_only)
    tiled = vae.decode(latents)
    assert tiled.shape == whole.shape and "decoded in tiles" in log_lines[-1]
    assert (tiled - whole).abs().mean() < 0.1 * whole.abs().mean()
    monkeypatch.setattr(vae._vae.decoder, "forward", lambda *_: small_only(latents))
    with pytest.raises(type(error)):
        vae.decode(latents)


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
