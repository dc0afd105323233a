"""VAE and text encoders from single files: all-in-one, or a file for each, as for ComfyUI."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from small import noise_pictures
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fluxfast.config.schema import ModelConfig
from fluxfast.data.prepare import resolve_parts
from fluxfast.encoders import components
from fluxfast.encoders.components import component, component_fingerprint
from fluxfast.encoders.text import TextEncoders
from fluxfast.encoders.vae import Vae
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.quantize import quantize

PREFIXES = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
    "vae": "vae.",
}
LDM = [  # diffusers' name -> the name in BFL's ae.safetensors
    (r"down_blocks\.(\d)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block."),
    (r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{3 - int(m[1])}.upsample."),
    (r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
]


def ldm(state: dict) -> dict:
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in LDM:
            key = re.sub(pattern, replacement, key)
        conv = "attn_1" in key and key.endswith("weight") and value.ndim == 2
        renamed[key] = value[:, :, None, None] if conv else value
    return renamed


@pytest.fixture(scope="module")
def folder(nano_model, tmp_path_factory) -> Path:
    """A diffusers folder with FLUX.1's settings, but few and narrow layers."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pipeline")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(nano_model / name, root / name)
    nano = json.loads((nano_model / "text_encoder" / "config.json").read_text())
    clip = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
    clip |= {"num_hidden_layers": 2, "projection_dim": 128, "eos_token_id": 2, "bos_token_id": 0}
    config = CLIPTextConfig(vocab_size=nano["vocab_size"], **clip)
    CLIPTextModel(config).save_pretrained(root / "text_encoder")
    nano = json.loads((nano_model / "text_encoder_2" / "config.json").read_text())
    t5 = {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 3, "use_cache": False}
    t5 |= {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": False}
    config = T5Config(vocab_size=nano["vocab_size"], d_model=nano["d_model"], **t5)
    T5EncoderModel(config).save_pretrained(root / "text_encoder_2")
    AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=1024,
    ).save_pretrained(root / "vae")
    return root


def state_of(folder: Path, name: str) -> dict:
    state = load_file(next((folder / name).glob("*.safetensors")))
    if name == "text_encoder":  # files have the outer level, transformers 5 writes none
        state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in state.items()}
    return state


def whole(folder: Path, vae=ldm) -> dict:
    """Returns the folder's tensors under an all-in-one file's names, with others beside them."""
    state = {"model.diffusion_model.img_in.weight": torch.zeros(4, 4)}
    for name, prefix in PREFIXES.items():
        own = state_of(folder, name)
        own = vae(own) if name == "vae" else own
        state |= {prefix + key: value.contiguous() for key, value in own.items()}
    state["text_encoders.clip_l.logit_scale"] = torch.ones(())
    clip = PREFIXES["text_encoder"]
    state[f"{clip}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return state


def outputs(root: Path) -> list[torch.Tensor]:
    encoders = TextEncoders(root)
    t5, pooled = encoders.encode(["a red circle", "zorb"], 16)
    vae = Vae(root)
    picture = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    mean, std = vae.encode(picture)
    return [t5, pooled, mean, std, vae.decode(mean)]


def beside(folder: Path, root: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, root / name)


def with_embed_tokens(state: dict) -> dict:
    prefix = PREFIXES["text_encoder_2"]
    return state | {f"{prefix}encoder.embed_tokens.weight": state.pop(f"{prefix}shared.weight")}


@pytest.mark.parametrize(
    ("vae", "rename"),
    [(ldm, dict), (dict, dict), (ldm, with_embed_tokens)],
    ids=["BFL's names", "diffusers' names", "T5's embedding under its other name"],
)
def test_an_all_in_one_file_gives_what_the_folder_gives(folder, tmp_path, vae, rename):
    file = tmp_path / "flux-all-in-one.safetensors"
    save_file(rename(whole(folder, vae)), file)
    beside(folder, tmp_path)
    expected = outputs(folder)
    assert all(tensor.std() > 0 for tensor in expected)
    assert all(map(torch.equal, outputs(file), expected))


@pytest.mark.parametrize("suffix", [".safetensors", ".sft"])
def test_a_file_a_part_in_a_folder(folder, tmp_path, suffix):
    """Bare names, as in clip_l.safetensors and others, some in ComfyUI's subfolders."""
    for subfolder, name in (("clip", "text_encoder"), ("", "text_encoder_2"), ("vae", "vae")):
        (tmp_path / subfolder).mkdir(exist_ok=True)
        state = state_of(folder, name)
        state = ldm(state) if name == "vae" else state
        save_file(state, tmp_path / subfolder / f"{name}{suffix}")
        (tmp_path / subfolder / f"._{name}{suffix}").write_bytes(b"what macOS leaves")
    if suffix == ".safetensors":  # a VAE under both its names is one
        save_file(ldm(state_of(folder, "vae")), tmp_path / "ae.sft")
    beside(folder, tmp_path)
    assert all(map(torch.equal, outputs(tmp_path), outputs(folder)))


def test_a_lora_or_a_vae_as_the_base_is_told_before_its_encoders(folder, tmp_path):
    lora = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 4)}
    save_file(lora, tmp_path / "a.safetensors")
    save_file(ldm(state_of(folder, "vae")), tmp_path / "b.sft")
    for file, name in (("a.safetensors", "LoRA"), ("b.sft", "VAE")):
        with pytest.raises(ConfigError, match=f"{file} does not hold .*: it is a {name}"):
            resolve_parts(ModelConfig(path=str(tmp_path / file)), torch.device("cpu"))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_t5_in_fp8(folder, tmp_path, scaled):
    """Plain, or with ComfyUI's scale beside each matrix."""
    coded, plain = whole(folder), whole(folder)
    for key, value in plain.items():
        if key.startswith(PREFIXES["text_encoder_2"]) and value.ndim == 2:
            scale = value.abs().max() / 448 if scaled and "shared" not in key else torch.ones(())
            coded[key] = (value / scale).to(torch.float8_e4m3fn)
            plain[key] = coded[key].float() * scale
            if scaled and "shared" not in key:
                coded[key.removesuffix("weight") + "scale_weight"] = scale
    if scaled:
        coded["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    beside(folder, tmp_path)
    encoded = []
    for name, state in (("coded", coded), ("plain", plain)):
        save_file(state, tmp_path / f"{name}.safetensors")
        encoders = TextEncoders(tmp_path / f"{name}.safetensors")
        encoded.append(encoders.encode(["a red circle"], 16)[0])
    assert torch.equal(*encoded)
    assert not torch.equal(encoded[0], TextEncoders(folder).encode(["a red circle"], 16)[0])


def test_a_t5_in_int8_that_is_rotated(folder, tmp_path):
    """ComfyUI's ConvRot in blocks of 4, said in the header."""
    coded, plain, layers = whole(folder), whole(folder), {}
    four = (torch.ones(4, 4) - 2 * torch.eye(4).flip(0)) / 2
    for key, value in plain.items():
        if key.startswith(PREFIXES["text_encoder_2"]) and value.ndim == 2 and "bias" not in key:
            rows = (value.view(-1, 4) @ four).view(value.shape)
            scale = rows.abs().amax(1, keepdim=True) / 127
            coded[key] = (rows / scale).round().to(torch.int8)
            coded[key.removesuffix("weight") + "weight_scale"] = scale
            plain[key] = ((coded[key] * scale).view(-1, 4) @ four).view(value.shape)
            form = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4}
            layers[key.removesuffix(".weight")] = form
    beside(folder, tmp_path)
    header = {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(coded, tmp_path / "coded.safetensors", header)
    save_file(plain, tmp_path / "plain.safetensors")
    mine, exact = (
        TextEncoders(tmp_path / f"{name}.safetensors").encode(["a red circle"], 16)[0]
        for name in ("coded", "plain")
    )
    torch.testing.assert_close(mine, exact)
    form["format"] = "mxfp8"
    header = {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(coded, tmp_path / "coded.safetensors", header)
    with pytest.raises(ConfigError, match="is stored as 'mxfp8', which is not read here"):
        TextEncoders(tmp_path / "coded.safetensors")


def test_fingerprints_follow_the_content(folder, tmp_path):
    """The same part in another file under another prefix is the same; one value changes it."""
    state = whole(folder)
    one, two, alone = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "ae"))
    save_file(state, one)
    save_file(ldm(state_of(folder, "vae")), alone)
    vae = component_fingerprint(one, "vae")
    assert component_fingerprint(alone, "vae") == vae
    for index in (0, -1):
        changed = {key: value.clone() for key, value in state.items()}
        changed["vae.decoder.conv_in.weight"].view(-1)[index] += 1
        save_file(changed, two)
        assert component_fingerprint(two, "vae") != vae
        assert len({component_fingerprint(file, "text_encoder") for file in (one, two)}) == 1


def test_two_of_a_kind_are_named(folder, tmp_path):
    for name in ("fp16", "fp8"):
        save_file(state_of(folder, "text_encoder_2"), tmp_path / f"t5_{name}.safetensors")
    with pytest.raises(ConfigError, match=r"more than one T5: t5_fp16.*t5_fp8"):
        component(tmp_path, "text_encoder_2")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc2.weight", "CLIP-L"),
        ("text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight", "T5"),
        ("vae.decoder.norm_out.weight", "VAE"),
        ("vae.encoder.conv_in.weight", "VAE is not complete: no encoder.conv_in"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "another shape"])
def test_a_part_that_is_not_whole(folder, tmp_path, key, message, damage):
    state = whole(folder)
    value = state.pop(key)
    if damage == "another shape":
        state[key] = torch.zeros(*(size + 1 for size in value.shape))
        message = message.partition(" is not")[0]
    file = tmp_path / "x.safetensors"
    save_file(state, file)
    beside(folder, tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        TextEncoders(file), Vae(file)
    assert str(file) in error.value.message and "\n" not in error.value.message


def test_without_tokenizers_and_offline(folder, tmp_path, monkeypatch):
    """The message says what is missing, where it would be looked for, and what to do."""
    save_file(whole(folder), tmp_path / "x.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        components, "_TOKENIZERS", {name: f"nobody/{name}" for name in components._TOKENIZERS}
    )
    with pytest.raises(FluxfastError, match="bring no tokenizers") as error:
        TextEncoders(tmp_path / "x.safetensors")
    assert "put a diffusers model's tokenizer folder there" in error.value.hint


@pytest.mark.slow
def test_a_run_from_one_file(folder, nano_model, tmp_path, fluxfast):
    """`train` needs nothing but an all-in-one file; with the transformer alone it says what is
    missing."""
    bare = tmp_path / "bare.safetensors"
    quantize(nano_model, bare, "fp8")
    own = {f"model.diffusion_model.{k}": v for k, v in load_file(bare).items()}
    file = tmp_path / "one.safetensors"
    save_file(whole(folder) | own, file)
    beside(folder, tmp_path)
    code, out, err = fluxfast("inspect", file)
    assert code == 0 and re.search(r"beside +CLIP-L, T5, VAE", out)
    pictures = noise_pictures(tmp_path, 2, "ohwx")
    run = ["train", pictures, "--trigger", "ohwx", "--set", "data.resolution=64"]
    run += ["--set", "train.steps=2", "--set", f"output_dir={tmp_path}/runs"]
    code, out, err = fluxfast(*run, "--name", "x", "--model", file)
    assert code == 0, err
    assert (tmp_path / "runs" / "x" / "x.safetensors").is_file()
    code, out, err = fluxfast(*run, "--name", "y", "--model", bare)
    assert code == 2 and "lacks vae, text_encoder, text_encoder_2" in err
