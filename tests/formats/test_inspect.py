"""`fluxfast inspect` on every format, and the names of other models."""

import re
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import (
    PREFIX,
    all_in_one,
    bnb_tensors,
    fp8_tensors,
    spec_of,
    tensors_of,
    write,
    write_gguf,
)
from small import SMALL, random_flux

from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.detect import model_name
from fluxfast.formats.base.quantize import quantize
from fluxfast.formats.inspect import inspect
from fluxfast.formats.lora.apply import extract_lora, save_lora
from fluxfast.formats.lora.write import FORMATS, to_state
from fluxfast.model.lora import inject_lora
from fluxfast.model.spec import DEV, SCHNELL


@pytest.fixture(scope="module")
def tensors():
    return tensors_of()


def rows_of(path: Path, **options) -> dict[str, str]:
    lines = inspect(path, **options)
    return dict(re.fullmatch(r"(\w+) +(.*)", line).groups() for line in lines)


@pytest.mark.parametrize(
    "form, layout, how",
    [
        (lambda t: t, "", "BF16"),
        (lambda t: all_in_one(t), PREFIX, "BF16"),
        (lambda t: fp8_tensors(t, False), "", "fp8, plain"),
        (lambda t: all_in_one(fp8_tensors(t, True)), PREFIX, "fp8, scaled"),
        (lambda t: bnb_tensors(t, False), "", "bitsandbytes NF4"),
        (lambda t: all_in_one(bnb_tensors(t, True)), PREFIX, "bitsandbytes NF4 with nested scales"),
    ],
)
def test_base_checkpoints(tmp_path, tensors, form, layout, how):
    file = write(tmp_path / "a.bin", form(tensors))
    rows = rows_of(file)
    assert rows["format"] == (
        "safetensors, BFL names" + (f" under {layout}" if layout else "") + f", {how}"
    )
    assert rows["model"].startswith("a FLUX.1 of other sizes, dev's kind: 1 double and 1 single")
    assert "hidden 256, 4 heads, with guidance" in rows["model"]
    assert (rows["missing"], rows["extra"]) == ("none", "none")
    assert ("beside" in rows) is bool(layout)
    if layout:
        assert all(part in rows["beside"] for part in ("CLIP-L", "T5", "VAE", "3 tensors"))
    size = file.stat().st_size
    assert rows["file"] == f"{file}, {size / 1e6:.1f} MB"


def test_dtypes_with_counts(tmp_path, tensors):
    mixed = {k: v.float() if v.ndim == 1 else v for k, v in tensors.items()}
    rows = rows_of(write(tmp_path / "a", mixed))
    vectors = sum(v.ndim == 1 for v in tensors.values())
    counts = {f"F32 {vectors}", f"BF16 {len(tensors) - vectors}"}
    assert set(rows["dtypes"].split(", ")) == counts


@pytest.mark.parametrize("split", [False, True])
def test_missing_and_extra(tmp_path, tensors, split):
    named = checkpoints.split_tensors(tensors) if split else dict(tensors)
    gone = sorted(key for key in named if "single" in key and key.endswith("bias"))[:2]
    for key in gone:
        del named[key]
    named["something.else"] = torch.zeros(1)
    rows = rows_of(write(tmp_path / "a", named))
    assert rows["missing"] == f"2: {', '.join(gone)}"
    assert rows["extra"] == "1: something.else"


def test_folders_and_prequantized_files(tmp_path, tensors):
    folder = checkpoints.write_diffusers(tmp_path / "d", tensors)
    assert rows_of(folder)["format"] == "safetensors, diffusers names, BF16"
    quantize(folder, tmp_path / "q", "fp8")
    rows = rows_of(tmp_path / "q")
    assert "quantized to fp8 by fluxfast" in rows["format"]
    assert "--checksum" in rows["checksum"]
    assert rows_of(tmp_path / "q", checksum=True)["checksum"] == "right"
    content = bytearray((tmp_path / "q").read_bytes())
    content[-7] ^= 1
    (tmp_path / "q").write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged"):
        inspect(tmp_path / "q", checksum=True)


def test_gguf(tmp_path, tensors):
    write_gguf(tmp_path / "a", tensors, "Q8_0")
    rows = rows_of(tmp_path / "a")
    assert rows["format"] == "GGUF, BFL names, Q8_0"
    assert "Q8_0 " in rows["dtypes"] and "F32 " in rows["dtypes"]


def test_names_of_models():
    assert model_name(DEV) == "FLUX.1-dev or a fine-tune of it"
    assert model_name(SCHNELL) == "FLUX.1-schnell or a fine-tune of it"


@pytest.mark.parametrize("form", FORMATS)
def test_lora_files(tmp_path, form):
    """Every format that is written here: its name, layers, rank and alpha."""
    model = random_flux(SMALL)
    inject_lora(model, rank=4, alpha=2.0, targets="attn")
    rows = rows_of(save_lora(model, tmp_path / "a.safetensors", form))
    assert rows["format"] == f"safetensors, {form}"
    linears = "img_attn.proj, img_attn.qkv, txt_attn.proj, txt_attn.qkv"
    single = "linear1, linear2" if form == "xlabs" else "linear1"  # xlabs fills in zeros
    described = f"LoRA of FLUX.1: 1 double block ({linears}); 2 single blocks ({single})"
    assert rows["model"] == described
    assert (rows["missing"], rows["extra"]) == ("none", "none")
    # a format of fused linears stacks the A's of q, k and v; XLabs has one rank throughout
    ranks = {"diffusers": "4 (14)", "xlabs": "12 (8)"}
    assert rows["rank"] == ranks.get(form, "12 (4), 4 (2)")
    assert rows["alpha"] == ("12 (4), 4 (2)" if form == "kohya" else "none: scale 1")
    with pytest.raises(ConfigError, match="it is a LoRA"):
        spec_of(tmp_path / "a.safetensors")


def test_alphas_of_a_lora(tmp_path):
    model = random_flux(SMALL)
    inject_lora(model, rank=4, alpha=2.0, targets="attn", share_a=True)
    state = to_state(extract_lora(model), "kohya")
    for key in state:
        if key.endswith(".alpha"):
            state[key] = torch.tensor(0.5 if "double" in key else 3.0)
    state["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(4, 8)
    state["bundle_emb.cat"] = torch.zeros(8)
    rows = rows_of(write(tmp_path / "a", state))
    assert rows["alpha"] == "0.5 (4), 3 (2)"
    assert rows["model"].endswith("; 1 CLIP-L")
    assert rows["missing"] == "1: lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    assert rows["extra"] == "1: bundle_emb.cat"
    plain = {k: v for k, v in state.items() if not k.endswith(".alpha")}
    assert rows_of(write(tmp_path / "b", plain))["alpha"] == "none: scale 1"


@pytest.mark.parametrize(
    "keys, model",
    [
        (["transformer.transformer_blocks.0.attn.to_q.lokr_w1"], "LoKr: not a plain LoRA"),
        (["lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a"], "LoHa: not a plain LoRA"),
        (["lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_up.weight"], "LoRA of Stable Diffusion 3"),
        (["lora_unet_double_blocks_0_img_mlp_fc1.lora_up.weight"], "LoRA of HunyuanVideo"),
        (["blocks.0.cross_attn.q.lora_A.weight"], "LoRA of another model than FLUX.1"),
    ],
)
def test_other_adapters(tmp_path, keys, model):
    rows = rows_of(write(tmp_path / "a", {key: torch.zeros(4, 4) for key in keys}))
    assert rows["model"].startswith(model)


# keys that these models' files have, from their published layouts
OTHERS = {
    "Stable Diffusion XL checkpoint": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.label_emb.0.0.bias",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.bias",
        "first_stage_model.decoder.up.0.block.0.conv1.weight",
    ],
    "Stable Diffusion 1 or 2 checkpoint": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.output_blocks.0.0.in_layers.0.bias",
    ],
    "Stable Diffusion 3 transformer": [
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "model.diffusion_model.x_embedder.proj.weight",
    ],
    "Chroma transformer": [
        "distilled_guidance_layer.in_proj.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "img_in.weight",
    ],
    "FLUX.2 transformer": [
        "double_stream_modulation_img.lin.weight",
        "single_stream_modulation.lin.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "img_in.weight",
        "txt_in.weight",
    ],
    "Hunyuan Video transformer": [
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "img_in.proj.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale",
    ],
    "AuraFlow transformer": ["double_layers.0.attn.w1q.weight", "single_layers.0.attn.w1q.weight"],
    "Qwen-Image transformer": [
        "transformer_blocks.0.img_mod.1.weight",
        "transformer_blocks.0.attn.norm_k.weight",
        "txt_in.weight",
        "img_in.weight",
    ],
    "Nunchaku (SVDQuant) FLUX transformer": [
        "transformer_blocks.0.qkv_proj.qweight",
        "transformer_blocks.0.qkv_proj.wscales",
        "transformer_blocks.0.qkv_proj.lora_down",
    ],
    "T5 text encoder": ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
    "CLIP text encoder": ["text_model.encoder.layers.0.mlp.fc1.bias"],
    "VAE": ["decoder.up.0.block.0.conv1.weight", "encoder.down.0.block.0.conv1.weight"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_have_names(tmp_path, name):
    file = write(tmp_path / "flux1-dev.safetensors", {k: torch.zeros(2, 2) for k in OTHERS[name]})
    with pytest.raises(ConfigError) as caught:
        spec_of(file)
    assert caught.value.message.endswith(f"does not hold a FLUX.1 transformer: it is a {name}")
    assert rows_of(file)["model"] == f"{name}: not a FLUX.1 transformer"
    with pytest.raises(ConfigError):
        quantize(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_file_of_nothing_known(tmp_path):
    file = write(tmp_path / "a", {"weight": torch.zeros(2)})
    for read in (spec_of, inspect):
        with pytest.raises(ConfigError, match=r"does not hold a FLUX.1 transformer\n"):
            read(file)


def test_paths_without_a_model(tmp_path):
    with pytest.raises(FluxfastError, match="does not exist"):
        inspect(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="holds no .safetensors"):
        inspect(tmp_path)
