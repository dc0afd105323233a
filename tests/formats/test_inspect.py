"""`fluxfast inspect` on every format, and the names of other models."""

import json
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

MATRIX = "double_blocks.0.img_mlp.0.weight"


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


@pytest.mark.parametrize(
    "form, how",
    [
        ({"format": "int8_tensorwise"}, "int8, scaled"),
        ({"format": "int8_tensorwise", "convrot": True}, "int8, scaled, rotated (ConvRot)"),
        ({"format": "mxfp8"}, "mxfp8 (not read here)"),
    ],
)
def test_comfyuis_marks(tmp_path, tensors, form, how):
    """Of one matrix, which is counted."""
    marked = tensors | {MATRIX: torch.zeros(1024, 256, dtype=torch.int8)}
    marked[f"{MATRIX}_scale"] = torch.ones(1024, 1)
    mark = torch.tensor(list(json.dumps(form).encode()), dtype=torch.uint8)
    marked[MATRIX.removesuffix("weight") + "comfy_quant"] = mark
    rows = rows_of(file := write(tmp_path / "a", marked))
    assert rows["format"] == f"safetensors, BFL names, BF16 (12); {how} (1)"
    assert (rows["missing"], rows["extra"]) == ("none", "none")
    if "mxfp8" in how:
        with pytest.raises(ConfigError, match=f"{MATRIX} is stored as 'mxfp8', which is not read"):
            spec_of(file)


# quantizer -> what it keeps instead of the matrix X.weight, as its own code names it
QUANTIZERS = {
    "quanto": ["weight._data", "weight._scale"],
    "torchao": ["_weight_qdata", "_weight_scale"],
    "Nunchaku (SVDQuant)": ["qweight", "wscales", "lora_down", "lora_up"],
    "SVDQuant": ["weight", "weight_scale", "weight_proj_down", "weight_proj_up"],
    "GPTQ or AWQ": ["qweight", "qzeros", "scales"],
    "bitsandbytes LLM.int8": ["weight", "SCB", "weight_format"],
    "nvfp4": ["weight", "weight_scale", "weight_scale_2"],
    "asym_w4a8": ["weight", "weight_s_rel", "weight_s_channel"],
    "SDNQ": ["weight", "scale", "svd_up", "svd_down"],
    "HQQ": ["W_q", "meta"],
}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_other_quantizers_have_names(tmp_path, tensors, name, split):
    """Files and folders: what they are called is never that they are not complete."""
    named = checkpoints.split_tensors(tensors) if split else dict(tensors)
    for key in [key for key in named if named[key].ndim == 2 and (split or "_blocks." in key)]:
        del named[key]
        for part in QUANTIZERS[name]:
            named[f"{key.removesuffix('weight')}{part}"] = torch.zeros(4, dtype=torch.int8)
    file = write(tmp_path / "a.safetensors", named)
    with pytest.raises(ConfigError, match=re.escape(f"{file} is quantized with {name}, which")):
        spec_of(file)
    model = rows_of(file)["model"]
    assert re.fullmatch(rf"(FLUX.1 transformer|model) quantized with {re.escape(name)}: .*", model)
    beside = {f"text_encoders.{key}": t for key, t in named.items() if key not in tensors}
    whole = {f"model.diffusion_model.{key}": t for key, t in tensors.items()}
    assert spec_of(write(file, whole | beside)).depth == 1 and rows_of(file)["missing"] == "none"


@pytest.mark.parametrize(
    "config, name",
    [
        ({"quant_method": "quanto", "weights_dtype": "int8"}, "quanto"),
        ({"quant_method": "torchao", "quant_type": "int8wo"}, "torchao int8wo"),
        ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
        ({"quant_method": "sdnq"}, "sdnq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes LLM.int8"),
    ],
)
def test_folders_that_name_their_quantizer(tmp_path, tensors, config, name):
    content = {"_class_name": "FluxTransformer2DModel", **checkpoints.config_of()}
    content["quantization_config"] = config
    (tmp_path / "config.json").write_text(json.dumps(content))
    for read in (spec_of, inspect):  # torchao saves pickles by default
        with pytest.raises(ConfigError, match=f"no .safetensors weights.* quantized with {name}"):
            read(tmp_path)
    named = checkpoints.split_tensors(tensors)
    file = write(tmp_path / "diffusion_pytorch_model.safetensors", named)
    assert spec_of(tmp_path).depth == 1  # as diffusers saves a dequantized model: it is plain
    assert "BF16" in rows_of(tmp_path)["format"]
    write(file, {k: v.to(torch.int8) if "to_q.weight" in k else v for k, v in named.items()})
    with pytest.raises(ConfigError, match=f"{tmp_path} is quantized with {name}, which"):
        spec_of(tmp_path)
    assert rows_of(tmp_path)["model"].endswith(f"quantized with {name}: not read here")


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
    if form == "bfl":  # and BFL every linear
        assert rows["model"].endswith("(linear1, linear2, modulation.lin); 10 outside the blocks")
    else:
        assert rows["model"] == described
    assert (rows["missing"], rows["extra"]) == ("none", "none")
    # a format of fused linears stacks the A's of q, k and v; XLabs has one rank throughout, and BFL
    # one that is cut to the layer's width: 16, 20 and 24 outside the blocks
    ranks = {"diffusers": "4 (14)", "xlabs": "12 (8)", "bfl": "64 (22), 16 (2), 24 (1), 20 (1)"}
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
    state["bundle_emb.cat.clip_l"] = torch.zeros(8)
    state["something.cat"] = torch.zeros(8)
    rows = rows_of(write(tmp_path / "a", state))
    assert rows["alpha"] == "0.5 (4), 3 (2)"
    assert rows["model"].endswith("; 1 CLIP-L; 1 vectors of trigger words")
    assert rows["missing"] == "1: lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    assert rows["extra"] == "1: something.cat"
    plain = {k: v for k, v in state.items() if not k.endswith(".alpha")}
    assert rows_of(write(tmp_path / "b", plain))["alpha"] == "none: scale 1"


@pytest.mark.parametrize(
    "keys, model",
    [
        (["transformer.transformer_blocks.0.attn.to_q.lokr_w1"], "LoKr: not a plain LoRA"),
        (["lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a"], "LoHa: not a plain LoRA"),
        (["transformer.transformer_blocks.0.attn.to_q.magnitude"], "DoRA: not a plain LoRA"),
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
    "ControlNet": [  # of FLUX.1, in XLabs' form: a part of its transformer, and more
        *("controlnet_blocks.0.weight", "input_hint_block.0.weight", "img_in.weight"),
        "double_blocks.0.img_attn.norm.key_norm.scale",
    ],
    "IP-Adapter": ["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"],
    "FLUX.1 Redux adapter": ["redux_up.weight", "redux_down.weight"],
    "LoRA": ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"],
    "language model": ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.a"],
    "vision encoder": ["vision_model.encoder.layers.0.mlp.fc1.weight"],
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
    what_to_do = {"T5 text encoder": "--encoders", "VAE": "--encoders", "LoRA": "lora.init_from"}
    assert (
        what_to_do.get(name, "FLUX.1-dev" if "CLIP" not in name else "--enc") in caught.value.hint
    )
    if name != "LoRA":
        assert rows_of(file)["model"] == f"{name}: not a FLUX.1 transformer"
    with pytest.raises(ConfigError):
        quantize(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_gguf_of_another_model(tmp_path):
    """By its tensors if they are known, else by what it calls itself."""
    import gguf

    for key, name in (("blk.0.attn_q.weight", "GGUF of the architecture llama"),
                      ("enc.blk.0.attn_q.weight", "T5 text encoder")):  # fmt: skip
        writer = gguf.GGUFWriter(tmp_path / "a", "llama")
        writer.add_tensor(key, torch.zeros(32, 32).numpy())
        checkpoints.finish_gguf(writer)
        with pytest.raises(ConfigError, match=f"it is a {name}"):
            spec_of(tmp_path / "a")
        assert rows_of(tmp_path / "a")["model"] == f"{name}: not a FLUX.1 transformer"


def test_a_controlnet_with_all_of_the_transformers_names(tmp_path, tensors):
    """InstantX's, in diffusers' names: it was taken for a FLUX.1 that is not complete."""
    named = checkpoints.split_tensors(tensors) | {"controlnet_x_embedder.weight": torch.ones(4, 4)}
    with pytest.raises(ConfigError, match="it is a ControlNet"):
        spec_of(write(tmp_path / "a", named))


def test_a_file_of_nothing_known(tmp_path):
    file = write(tmp_path / "a", {"weight": torch.zeros(2)})
    for read in (spec_of, inspect):
        with pytest.raises(ConfigError, match=r"does not hold a FLUX.1 transformer\n"):
            read(file)


def test_paths_without_a_model(tmp_path):
    with pytest.raises(FluxfastError, match="does not exist"):
        inspect(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no config.json: it is no diffusers model"):
        inspect(tmp_path)
