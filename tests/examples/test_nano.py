"""The nano example: the model is complete and reproducible, the photographs are of every kind."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from small import script

from fluxfast.model.spec import NANO

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "nano"
PHOTOS = EXAMPLE / "photos"
SCRIPT = EXAMPLE / "make_nano.py"

# name: (format, mode, size as it is viewed, so after EXIF)
KINDS = {
    "astronaut.jpg": ("JPEG", "RGB", (248, 288)),
    "camera.png": ("PNG", "L", (256, 256)),
    "chelsea.png": ("PNG", "P", (288, 192)),
    "coffee.png": ("PNG", "RGBA", (288, 192)),
    "coins.jpg": ("JPEG", "L", (304, 240)),
    "hubble.webp": ("WEBP", "RGB", (320, 279)),
    "retina.jpg": ("JPEG", "CMYK", (240, 240)),
    "rocket.jpg": ("JPEG", "RGB", (192, 288)),
    "textures/brick.png": ("PNG", "L", (320, 160)),
    "textures/grass.jpg": ("JPEG", "L", (160, 160)),
    "textures/gravel.png": ("PNG", "I;16", (192, 128)),
}


def _captions() -> dict[str, str]:
    captions = {}
    for path in PHOTOS.rglob("*.txt"):
        (image,) = (p for p in path.parent.glob(f"{path.stem}.*") if p.suffix != ".txt")
        captions[image.relative_to(PHOTOS).as_posix()] = path.read_text(encoding="utf-8").strip()
    for path in PHOTOS.rglob("metadata.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            name = (path.parent / row["file_name"]).relative_to(PHOTOS).as_posix()
            assert name not in captions
            captions[name] = row["text"]
    return captions


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _run(*args, check: bool = True) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, env=env, check=check, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pipeline(nano_model):
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(nano_model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---------------------------------------------------------------- the model


def test_folder_is_small_and_complete(nano_model):
    files = _hashes(nano_model)
    assert {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer.json",
        "tokenizer/vocab.json",
        "tokenizer_2/spiece.model",
        "tokenizer_2/tokenizer.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    } <= set(files)
    assert sum((nano_model / name).stat().st_size for name in files) < 30e6


def test_transformer_is_nano_in_fp32(pipeline):
    config = pipeline.transformer.config
    assert (config.num_layers, config.num_single_layers) == (NANO.depth, NANO.depth_single_blocks)
    assert (config.num_attention_heads, config.attention_head_dim) == (NANO.num_heads, 32)
    assert tuple(config.axes_dims_rope) == NANO.axes_dim
    assert (config.joint_attention_dim, config.pooled_projection_dim) == (192, 128)
    assert config.guidance_embeds and config.in_channels == NANO.in_channels
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        weights = list(getattr(pipeline, name).parameters())
        assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights)


def test_scheduler_and_vae_are_flux_dev(pipeline):
    scheduler, vae = pipeline.scheduler.config, pipeline.vae.config
    assert (scheduler.shift, scheduler.use_dynamic_shifting) == (3.0, True)
    assert (scheduler.base_shift, scheduler.max_shift) == (0.5, 1.15)
    assert (scheduler.base_image_seq_len, scheduler.max_image_seq_len) == (256, 4096)
    assert (vae.scaling_factor, vae.shift_factor, vae.latent_channels) == (0.3611, 0.1159, 16)
    assert not vae.use_quant_conv and not vae.use_post_quant_conv
    assert pipeline.vae_scale_factor == 8


def test_samples_a_picture_at_128(pipeline):
    def sample(prompt):
        options = {"num_inference_steps": 2, "max_sequence_length": NANO.text_length}
        generator = torch.Generator().manual_seed(0)
        result = pipeline(prompt, height=128, width=128, generator=generator, **options)
        return np.asarray(result.images[0])

    first, again, other = map(sample, ["a cat", "a cat", "a rocket at dusk"])
    assert first.shape == (128, 128, 3) and first.std() > 10
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_outputs_have_a_scale_of_one(pipeline):
    image = Image.open(PHOTOS / "astronaut.jpg").resize((128, 192))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        encoded = pipeline.vae.encode(pixels).latent_dist
        latents = (encoded.mean - 0.1159) * 0.3611
        decoded = pipeline.vae.decode(encoded.mean).sample
        text, pooled, text_ids = pipeline.encode_prompt(
            "a cat", None, max_sequence_length=NANO.text_length
        )
        predicted = pipeline.transformer(
            torch.randn(1, 64, 64, generator=generator),
            text,
            pooled,
            torch.tensor([0.5]),
            torch.zeros(64, 3),
            text_ids,
            guidance=torch.ones(1),
        ).sample
    assert latents.shape == (1, 16, 24, 16) and decoded.shape == pixels.shape
    assert text.shape == (1, 32, 192) and pooled.shape == (1, 128)
    assert abs(latents.mean()) < 0.5 and 0.5 < latents.std() < 2
    assert encoded.std.mean() * 0.3611 < 0.05
    for tensor in (decoded, text, pooled, predicted):
        assert 0.2 < tensor.std() < 2


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes_in_another_process(nano_model, tmp_path):
    out = tmp_path / "again"
    _run(SCRIPT, out, "--seed", "0")
    assert _hashes(out) == _hashes(nano_model)


def test_a_components_weights_depend_on_the_seed_alone(nano_model, tmp_path, monkeypatch):
    module = script(SCRIPT)
    monkeypatch.setattr(module, "VAE_CHANNELS", (8, 8, 16, 16))
    changed, before = _hashes(module.make_nano(tmp_path / "narrow")), _hashes(nano_model)
    weights = [name for name in before if name.endswith(".safetensors")]
    assert [name for name in weights if before[name] != changed[name]] == [
        "vae/diffusion_pytorch_model.safetensors"
    ]


def test_another_seed_gives_other_weights_and_leaves_the_global_generator(nano_model, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    other = _hashes(script(SCRIPT).make_nano(tmp_path / "other", seed=1))
    assert torch.equal(before, torch.get_rng_state())
    same = {name for name, digest in _hashes(nano_model).items() if other[name] == digest}
    assert not any(name.endswith(".safetensors") for name in same)
    assert "tokenizer_2/spiece.model" in same  # the tokenizers depend on the corpus alone


def test_a_finished_model_is_left_alone_without_importing_torch(nano_model):
    before = (nano_model / "nano.json").stat().st_mtime_ns
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__');"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    done = _run("-c", code, SCRIPT, nano_model)
    assert "there already" in done.stderr and done.stdout.strip() == str(nano_model)
    assert (nano_model / "nano.json").stat().st_mtime_ns == before


def test_refuses_to_replace_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = _run(SCRIPT, tmp_path, check=False)
    assert done.returncode == 1 and "notes.txt" in done.stderr and "hint:" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    module = script(SCRIPT)
    with pytest.raises(FileExistsError, match="it is a file"):
        module.make_nano(tmp_path / "notes.txt")
    marker = {"seed": 9, "version": 1, "files": ["notes.txt"]}
    (tmp_path / "nano.json").write_text(json.dumps(marker))
    module._check_replaceable(tmp_path)
    (tmp_path / "lora.safetensors").touch()  # beside a model of its own
    with pytest.raises(FileExistsError, match=r"lora\.safetensors"):
        module.make_nano(tmp_path, seed=0)


# ---------------------------------------------------------------- the tokenizers


@pytest.mark.parametrize(
    "text",
    ["a photograph of a cat", "naïve café, 35 mm", "it's 3 o'clock!", "日本語 🎉 жук", "\x00 \x7f"],
)
def test_clip_tokenizer_gives_back_any_text(pipeline, text):
    ids = pipeline.tokenizer(text).input_ids
    assert ids[0] == pipeline.tokenizer.bos_token_id
    assert ids.index(pipeline.tokenizer.eos_token_id) == len(ids) - 1  # no byte reads as the end
    back = pipeline.tokenizer.decode(ids, skip_special_tokens=True)
    assert back.replace(" ", "") == text.replace(" ", "")


def test_clip_pads_to_77_and_pools_at_the_first_end(pipeline):
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    assert tokenizer.model_max_length == 77
    assert encoder.config.eos_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    assert encoder.config.bos_token_id == tokenizer.bos_token_id
    texts = ["a cat", "a photograph of a white rocket on its launch pad", "stone " * 100]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (3, 77)
    ends = [row.index(tokenizer.eos_token_id) for row in ids.tolist()]
    assert ends[0] < ends[1] < ends[2] == 76
    with torch.no_grad():
        out = encoder(ids)
        bare = encoder(tokenizer("a cat", return_tensors="pt").input_ids)
    torch.testing.assert_close(
        out.pooler_output, out.last_hidden_state[range(3), ends], rtol=0, atol=0
    )
    torch.testing.assert_close(out.pooler_output[:1], bare.pooler_output)  # padding has no say


def test_t5_tokenizer_is_its_sentencepiece_model(pipeline, nano_model):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(nano_model / "tokenizer_2/spiece.model"))
    tokenizer = pipeline.tokenizer_2
    assert (model.pad_id(), model.eos_id(), model.unk_id(), model.bos_id()) == (0, 1, 2, -1)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == model.vocab_size() == pipeline.text_encoder_2.config.vocab_size
    assert tokenizer.model_max_length == NANO.text_length
    for text in ["a red bicycle, leaning (left)", "Naïve Café 35 mm", *_captions().values()]:
        ids = tokenizer(text).input_ids
        assert ids == [*model.encode(text), tokenizer.eos_token_id]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(ids) <= NANO.text_length  # no caption is cut
    assert tokenizer("日本語 🎉").input_ids.count(tokenizer.unk_token_id) >= 2


# ---------------------------------------------------------------- the photographs


def test_photos_are_of_every_kind():
    suffixes = {".png", ".jpg", ".webp"}
    found = {
        path.relative_to(PHOTOS).as_posix() for path in PHOTOS.rglob("*") if path.suffix in suffixes
    }
    assert found == set(KINDS)
    for name, (kind, mode, size) in KINDS.items():
        with Image.open(PHOTOS / name) as image:
            assert (image.format, image.mode) == (kind, mode), name
            assert ImageOps.exif_transpose(image).size == size, name
            assert 160 <= max(size) <= 320
    assert sum(path.stat().st_size for path in PHOTOS.rglob("*") if path.is_file()) < 900_000
    assert Image.open(PHOTOS / "rocket.jpg").getexif()[0x0112] == 6
    alpha = np.asarray(Image.open(PHOTOS / "coffee.png"))[..., 3]
    assert alpha[0, 0] == 0 and alpha[100, 110] == 255 and len(np.unique(alpha)) > 50
    gravel = np.asarray(Image.open(PHOTOS / "textures/gravel.png"))
    assert gravel.dtype == np.uint16 and len(np.unique(gravel & 255)) == 256


def test_every_photo_has_a_caption_and_a_license():
    captions, licenses = _captions(), (PHOTOS / "LICENSES.md").read_text(encoding="utf-8")
    assert set(captions) == set(KINDS)
    assert all("photograph of" in caption for caption in captions.values())
    rows = {line.split("`")[1]: line for line in licenses.splitlines() if line.startswith("| `")}
    assert set(rows) == set(KINDS)
    for name, row in rows.items():
        width, height = KINDS[name][2]
        assert f"{width} x {height}" in row
        license = row.rstrip(" |").rpartition("| ")[2]
        assert license in {"CC0", "public domain", "no known copyright restrictions"}


def test_script_makes_these_photos(tmp_path):
    pytest.importorskip("skimage")
    made = script(EXAMPLE / "make_photos.py").make_photos(tmp_path)
    for name in KINDS:
        with Image.open(made / name) as new, Image.open(PHOTOS / name) as old:
            assert (new.mode, new.size) == (old.mode, old.size)
            new, old = (np.asarray(im.convert("RGB"), dtype=float) for im in (new, old))
            assert np.abs(new - old).mean() < 1, name  # codecs may differ in the last bit
    for path in (*PHOTOS.rglob("*.txt"), *PHOTOS.rglob("*.jsonl")):
        assert (made / path.relative_to(PHOTOS)).read_bytes() == path.read_bytes()
