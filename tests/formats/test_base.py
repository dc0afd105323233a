"""Base checkpoints: every layout gives the same model, every damaged one a single clear message."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import SMALL

from fluxfast import load_transformer
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.folder import tokenizer_length
from fluxfast.formats.base.load import resolve_device
from fluxfast.formats.base.reader import open_base
from fluxfast.model.names import linear_shape, tensor_sources
from fluxfast.model.spec import FluxSpec

CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 14, 14],
}
SCALE = "double_blocks.0.img_attn.norm.key_norm.scale"


def bfl_tensors(spec: FluxSpec = SMALL, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in tensor_sources(spec):
        module, _, kind = name.rpartition(".")
        if kind == "scale":
            shape = (spec.head_dim,)
        else:
            shape = linear_shape(module, spec)[: 2 if kind == "weight" else 1]
        tensors[name] = torch.randn(shape, generator=generator)
    return tensors


def diffusers_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The split names, by the layouts' own rules: thirds for qkv, the rest of linear1 is mlp."""
    split = {}
    for name, sources in tensor_sources(SMALL).items():
        tensor = tensors[name]
        if "final_layer.adaLN_modulation" in name:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        width = SMALL.hidden_size
        sizes = {1: [len(tensor)], 3: [width] * 3, 4: [width] * 3 + [4 * width]}[len(sources)]
        parts = tensor.split(sizes)
        split |= {source: part.clone() for source, part in zip(sources, parts, strict=True)}
    return split


def write_folder(folder: Path, tensors=None, **changes) -> Path:
    """A diffusers transformer folder; a config entry of None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = diffusers_tensors(bfl_tensors()) if tensors is None else tensors
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tensors():
    return bfl_tensors()


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory) -> Path:
    """Written by diffusers itself, from our tensors."""
    from diffusers import FluxTransformer2DModel

    arguments = {key: value for key, value in CONFIG.items() if not key.startswith("_")}
    model = FluxTransformer2DModel(**arguments)
    model.load_state_dict(diffusers_tensors(bfl_tensors()), strict=True)
    root = tmp_path_factory.mktemp("base")
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "sharded", max_shard_size="200KB")
    model.to(torch.bfloat16).save_pretrained(root / "bf16")
    return root


def load(path: Path, **options):
    return load_transformer(
        path, **{"storage": "fp32", "compute": "fp32", "device": "cpu", **options}
    )


def refused(path: Path, kind=ConfigError, **options) -> str:
    """The one message that loading `path` ends with."""
    with pytest.raises(FluxfastError) as caught:
        load(path, **options)
    assert type(caught.value) is kind
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    message = caught.value.message
    assert "\n" not in message and message.strip()
    return message


def same(model, tensors) -> None:
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor.float()), name


# ---------------------------------------------------------------- layouts


def test_a_single_file(tmp_path, tensors):
    save_file(tensors, tmp_path / "flux1.safetensors")
    model = load(tmp_path / "flux1.safetensors")
    assert model.spec == SMALL
    same(model, tensors)


def test_an_all_in_one_file(tmp_path, tensors):
    """As ComfyUI has it: the transformer under a prefix, other networks and scalars beside it."""
    file = tmp_path / "all.safetensors"
    everything = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    everything |= {
        "vae.decoder.up_blocks.0.weight": torch.zeros(3),
        "text_encoders.t5xxl.logit_scale": torch.tensor(1.0),
        "text_encoders.clip_l.double_blocks.9.x": torch.zeros(1),
    }
    save_file(everything, file)
    model = load(file)
    assert model.spec == SMALL
    same(model, tensors)


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_what_diffusers_writes(diffusers_folder, tensors, name):
    folder = diffusers_folder / name
    shards = list(folder.glob("*.safetensors"))
    assert (len(shards) > 2) == (name == "sharded")
    model = load(folder)
    assert model.spec == SMALL
    same(model, tensors)


def test_a_pipeline_folder(tmp_path, diffusers_folder, tensors):
    shutil.copytree(diffusers_folder / "whole", tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    same(load(tmp_path), tensors)
    same(load(tmp_path / "transformer"), tensors)


def test_a_path_may_be_a_string(diffusers_folder, tensors):
    same(load(str(diffusers_folder / "whole")), tensors)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_a_bf16_file(diffusers_folder, tensors, storage):
    model = load(diffusers_folder / "bf16", storage=storage)
    matrix = model.get_submodule("double_blocks.0.img_attn.qkv").weight
    assert matrix.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[storage]
    same(model.float(), {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_more_tensors_than_needed_are_fine(tmp_path, tensors):
    folder = write_folder(tmp_path, diffusers_tensors(tensors) | {"ema.decay": torch.tensor(0.9)})
    same(load(folder), tensors)


def test_shards_beside_a_whole_copy(tmp_path, diffusers_folder, tensors):
    """Where there is an index, only the files that it names are read."""
    shutil.copytree(diffusers_folder / "sharded", tmp_path, dirs_exist_ok=True)
    (tmp_path / "old.safetensors").write_bytes(b"left over")
    same(load(tmp_path), tensors)


def test_no_file_stays_open(tmp_path, tensors):
    """Neither a descriptor nor a memory map: on some systems the file could not be replaced."""
    file = tmp_path / "flux1.safetensors"
    save_file(tensors, file)
    for storage in ("fp32", "bf16", "nf4"):
        model = load(file, storage=storage)
        assert file.name not in Path("/proc/self/maps").read_text(), storage
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        assert not [link for link in links if file.name in str(link.readlink())]
        del model
    with open_base(file) as base:
        matrix = base.read("img_in.weight")
        assert file.name in Path("/proc/self/maps").read_text()  # what the check above looks for
        del matrix


def test_progress_ends_at_the_last_tensor(diffusers_folder, tensors):
    seen = []
    load(diffusers_folder / "whole", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(tensors)) for i in range(len(tensors))]


# ---------------------------------------------------------------- the spec


@pytest.mark.parametrize("guidance, length", [(True, 512), (False, 256)])
def test_guidance_makes_it_dev_or_schnell(tmp_path, tensors, guidance, length):
    kept = {k: v for k, v in tensors.items() if guidance or not k.startswith("guidance_in")}
    file = tmp_path / "flux1.safetensors"
    save_file(kept, file)
    split = diffusers_tensors(tensors)
    split = {k: v for k, v in split.items() if guidance or "guidance_embedder" not in k}
    folder = write_folder(tmp_path / "d", split, guidance_embeds=guidance)
    for path in (file, folder):
        with open_base(path) as base:
            assert base.spec.guidance_embed is guidance
            assert base.spec.text_length == length
        names = load(path).state_dict()
        assert any(name.startswith("guidance_in") for name in names) is guidance


@pytest.mark.parametrize(
    "limit, length",
    [(77, 77), (512, 512), (4096, 512), (77.0, 77), (int(1e30), 512), (None, 512), ("77", 512),
     (0, 512), (-1, 512), (True, 512), (float("inf"), 512), (float("nan"), 512)],
)  # fmt: skip
def test_the_tokenizer_limits_the_text(tmp_path, limit, length):
    write_folder(tmp_path / "transformer")
    (tmp_path / "tokenizer_2").mkdir()
    file = tmp_path / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps({"model_max_length": limit}))
    with open_base(tmp_path) as base:
        assert base.spec.text_length == length
    assert tokenizer_length(tmp_path) in (None, length, limit)


def test_no_tokenizer_no_limit(tmp_path):
    assert tokenizer_length(tmp_path) is None


def test_the_axes_may_be_left_out(tmp_path):
    """FLUX.1's own config.json has none."""
    with open_base(write_folder(tmp_path, axes_dims_rope=None)) as base:
        assert base.spec.axes_dim == SMALL.axes_dim


def test_an_mlp_width_that_is_no_exact_multiple():
    """176 * (185 / 176) is a little less than 185: the width must not be cut to 184."""
    assert int(176 * (185 / 176)) == 184
    spec = FluxSpec(hidden_size=176, num_heads=11, axes_dim=(4, 6, 6), mlp_ratio=185 / 176)
    assert spec.mlp_hidden == 185


# ---------------------------------------------------------------- storage


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_is_bitsandbytes(diffusers_folder, tensors, nested):
    """Bit for bit what bitsandbytes makes of the fused matrix."""
    import bitsandbytes.functional as bnb

    model = load(diffusers_folder / "whole", storage="nf4", double_quant=nested)
    for name in (
        "double_blocks.0.img_attn.qkv",
        "single_blocks.1.linear1",
        "single_blocks.0.linear2",
    ):
        layer = model.get_submodule(name)
        assert layer.weight is None
        packed, state = bnb.quantize_4bit(
            tensors[f"{name}.weight"], quant_type="nf4", blocksize=64, compress_statistics=nested
        )
        assert torch.equal(layer.packed, packed)
        assert (layer.nested_absmax is not None) is nested
        theirs = bnb.dequantize_4bit(packed, state)
        torch.testing.assert_close(layer.dequantize(torch.float32), theirs, rtol=0, atol=1e-6)
        assert torch.equal(model.state_dict()[f"{name}.bias"], tensors[f"{name}.bias"])


def test_nf4_leaves_what_does_not_fit_and_says_so(tmp_path, log_lines):
    """Hidden 96: K = 96 is no multiple of 64, K = 384 and 480 - one is, one is not."""
    spec = FluxSpec(
        in_channels=16, vec_in_dim=20, context_in_dim=24, hidden_size=96, num_heads=3,
        depth=1, depth_single_blocks=1, axes_dim=(4, 14, 14),
    )  # fmt: skip
    file = tmp_path / "flux1.safetensors"
    tensors = bfl_tensors(spec)
    save_file(tensors, file)
    model = load(file, storage="nf4")
    assert model.get_submodule("double_blocks.0.img_mlp.2").weight is None
    kept = model.get_submodule("double_blocks.0.img_attn.qkv").weight
    assert torch.equal(kept, tensors["double_blocks.0.img_attn.qkv.weight"].bfloat16())
    (line,) = log_lines
    assert "bf16 instead of nf4" in line and "multiple of 64" in line
    # 10 linears of the double block and 3 of the single one, but for the two with K = 384
    assert line.startswith("note: 11 matrices")


def test_layers_and_activations_reach_the_model(diffusers_folder):
    """8-bit products over a quantized base, with choices for single layers."""
    layers = {"single_blocks.*.linear2": "rotate", "double_blocks.0.txt_mlp.0": "bf16"}
    model = load(
        diffusers_folder / "whole",
        storage="int8",
        compute="int8",
        activations="bf16",
        layers=layers,
    )
    assert model.compute_dtype == torch.bfloat16
    assert model.single_blocks[1].linear2.rotation == 64
    assert model.single_blocks[1].linear1.storage() == "int8"
    dense = model.double_blocks[0].txt_mlp[0]
    assert (dense.storage(), dense.matmul) == ("bf16", "")
    with pytest.raises(ConfigError, match="matches no linear"):
        load(diffusers_folder / "whole", compute="int8", layers={"linear3": "bf16"})


def test_nothing_is_announced_where_all_fits(diffusers_folder, log_lines):
    for storage in ("fp32", "bf16", "nf4"):
        load(diffusers_folder / "whole", storage=storage)
    assert not log_lines


def test_the_base_is_frozen(diffusers_folder):
    for storage in ("fp32", "bf16", "nf4"):
        assert not list(load(diffusers_folder / "whole", storage=storage).parameters())


# ---------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"storage": "int3"}, ["'int3'", "fp32, bf16, nf4"]),
        ({"compute": "fp64"}, ["'fp64'", "fp32, bf16, int8, fp8"]),
        ({"compute": "int8", "storage": "fp8"}, ["fp8", "int8", "do not go together"]),
        ({"activations": "bf16"}, ["activations bf16", "compute fp32"]),
        ({"compute": "int8", "activations": "fp16"}, ["'fp16'", "fp32, bf16"]),
        ({"device": "cuda:7"}, ["'cuda:7'", "GPU"]),
        ({"device": "warp drive"}, ["'warp drive'", "cpu, cuda"]),
        ({"device": "meta"}, ["'meta'"]),
    ],
)
def test_a_wrong_argument(diffusers_folder, options, parts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = refused(diffusers_folder / "whole", ConfigError, **options)
    for part in parts:
        assert part in message


def test_auto_is_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


# ---------------------------------------------------------------- damaged files


def test_a_path_that_does_not_exist(tmp_path):
    assert "does not exist" in refused(tmp_path / "nothing", FluxfastError)


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is text\n" * 50, b"\x00" * 8, b"<html>" * 99]
)
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_file_that_is_no_safetensors(tmp_path, content, layout):
    file = write_folder(tmp_path) / "diffusion_pytorch_model.safetensors"
    file.write_bytes(content)
    message = refused(file if layout == "file" else tmp_path)
    assert str(file) in message and "cannot read" in message


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_file(tmp_path, keep, tensors):
    file = tmp_path / "flux1.safetensors"
    save_file(tensors, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    assert f"cannot read {file}" in refused(file)


def test_a_shard_that_is_missing(tmp_path, diffusers_folder):
    shutil.copytree(diffusers_folder / "sharded", tmp_path, dirs_exist_ok=True)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", "3", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"]
)
def test_an_index_that_is_damaged(tmp_path, diffusers_folder, content):
    shutil.copytree(diffusers_folder / "sharded", tmp_path, dirs_exist_ok=True)
    (index,) = tmp_path.glob("*.index.json")
    index.write_text(content)
    assert index.name in refused(tmp_path)


def test_a_folder_without_weights(tmp_path):
    (write_folder(tmp_path) / "diffusion_pytorch_model.safetensors").unlink()
    assert "no .safetensors weights" in refused(tmp_path)


def test_a_missing_tensor(tmp_path, tensors):
    split = diffusers_tensors(tensors)
    del split["transformer_blocks.0.attn.to_k.weight"], split["proj_out.bias"]
    message = refused(write_folder(tmp_path, split))
    assert "2 tensors are missing" in message
    assert "transformer_blocks.0.attn.to_k.weight" in message
    file = tmp_path / "flux1.safetensors"
    save_file({k: v for k, v in tensors.items() if k != "single_blocks.1.linear2.bias"}, file)
    assert "single_blocks.1.linear2.bias" in refused(file)


@pytest.mark.parametrize(
    "name",
    ["img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight",
     "double_blocks.0.img_mlp.0.weight"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [None, (), (0, 0), (64,)])
def test_a_file_whose_sizes_cannot_be_read(tmp_path, tensors, name, shape):
    changed = {k: v for k, v in tensors.items() if k != name}
    if shape is not None:
        changed[name] = torch.zeros(shape)
    file = tmp_path / "flux1.safetensors"
    save_file(changed, file)
    message = refused(file)
    assert str(file) in message
    assert name in message or "shape" in message or "channels" in message


@pytest.mark.parametrize("width", [0, 1, 5, 48, 1000])
def test_a_head_width_that_cannot_be(tmp_path, tensors, width):
    file = tmp_path / "flux1.safetensors"
    save_file(tensors | {SCALE: torch.zeros(width)}, file)
    assert str(file) in refused(file)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("transformer_blocks.0.attn.to_k.weight", (64, 32)),
        ("transformer_blocks.0.attn.to_k.weight", (64,)),
        ("transformer_blocks.0.attn.to_k.weight", ()),
        ("transformer_blocks.0.attn.to_k.bias", (32,)),
        ("transformer_blocks.0.attn.norm_q.weight", (64,)),
        ("transformer_blocks.0.ff.net.0.proj.weight", (64, 256)),
        ("proj_out.weight", (64, 64)),
    ],
)
def test_a_wrong_shape(tmp_path, tensors, name, shape):
    split = diffusers_tensors(tensors) | {name: torch.zeros(shape)}
    message = refused(write_folder(tmp_path, split))
    assert name in message and str(shape) in message


def test_parts_of_wrong_size_that_add_up(tmp_path, tensors):
    """q with 96 rows and k with 32 make a fused matrix of the right size and the wrong content."""
    split = diffusers_tensors(tensors)
    split["transformer_blocks.0.attn.to_q.weight"] = torch.zeros(96, 64)
    split["transformer_blocks.0.attn.to_k.weight"] = torch.zeros(32, 64)
    assert "transformer_blocks.0.attn.to_q.weight" in refused(write_folder(tmp_path, split))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool])
def test_a_dtype_that_is_not_read(tmp_path, tensors, dtype):
    name = "double_blocks.0.img_attn.qkv.weight"
    file = tmp_path / "flux1.safetensors"
    save_file(tensors | {name: tensors[name].to(dtype)}, file)
    with safe_open(file, "pt") as handle:
        stored = handle.get_slice(name).get_dtype()
    message = refused(file)
    assert name in message and stored in message


def test_one_file_of_a_diffusers_folder(diffusers_folder, tensors):
    """All of it in one file loads as it is; a shard of several is no model."""
    same(load(diffusers_folder / "whole" / "diffusion_pytorch_model.safetensors"), tensors)
    shard = sorted((diffusers_folder / "sharded").glob("*.safetensors"))[0]
    with pytest.raises(ConfigError) as caught:
        load(shard)
    assert shard.name in caught.value.message


def test_a_file_of_something_else(tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, file)
    assert "does not hold a FLUX.1 transformer" in refused(file)


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    "content, part",
    [(None, "no config.json"), ("", "not valid JSON"), ("{", "not valid JSON"),
     ("[]", "JSON object"), ("null", "JSON object"), ("{}", "model of unknown kind"),
     ("[" * 9999, "not valid JSON")],
)  # fmt: skip
def test_a_config_that_is_missing_or_broken(tmp_path, content, part):
    config = write_folder(tmp_path) / "config.json"
    config.unlink()
    if content is not None:
        config.write_text(content)
    message = refused(tmp_path)
    assert part in message and str(tmp_path) in message


def test_a_config_that_is_not_utf_8(tmp_path):
    (write_folder(tmp_path) / "config.json").write_bytes(b'{"a": "\xff"}')
    assert "not valid JSON" in refused(tmp_path)


def test_another_class(tmp_path):
    message = refused(write_folder(tmp_path, _class_name="SD3Transformer2DModel"))
    assert "SD3Transformer2DModel" in message


SIZES = [
    "in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "pooled_projection_dim",
]  # fmt: skip


@pytest.mark.parametrize("key", SIZES)
def test_a_missing_size(tmp_path, key):
    message = refused(write_folder(tmp_path, **{key: None}))
    assert f"has no {key!r}" in message and "config.json" in message


@pytest.mark.parametrize("value", ["2", 2.0, [2], {}, True, 0, -1])
@pytest.mark.parametrize("key", SIZES)
def test_a_size_of_the_wrong_kind(tmp_path, key, value):
    config = CONFIG | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused(tmp_path)
    assert key in message and repr(value) in message


@pytest.mark.parametrize(
    "axes", [5, "abc", [32], [16, 16], [4, 14, "14"], [4, 14, 14.0], [5, 13, 14]]
)
def test_wrong_axes(tmp_path, axes):
    assert "axes" in refused(write_folder(tmp_path, axes_dims_rope=axes))


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_a_config_that_belongs_to_other_weights(tmp_path, heads):
    """Narrower, wider, or another count of heads: never loaded, whatever adds up."""
    message = refused(write_folder(tmp_path, num_attention_heads=heads))
    assert "shape" in message


def test_inpainting_and_control_variants(tmp_path, tensors):
    """FLUX.1-Fill takes 384 channels and returns 64."""
    message = refused(write_folder(tmp_path / "d", in_channels=384, out_channels=64))
    assert "384" in message and "64" in message and "inpainting" in message
    file = tmp_path / "fill.safetensors"
    save_file(tensors | {"img_in.weight": torch.zeros(64, 96)}, file)
    message = refused(file)
    assert "96" in message and "16" in message and "inpainting" in message


def test_out_channels_that_say_the_same(tmp_path, tensors):
    same(load(write_folder(tmp_path, out_channels=16)), tensors)


def test_reading_leaves_the_file_as_it_was(diffusers_folder, tensors):
    load(diffusers_folder / "whole")
    stored = load_file(diffusers_folder / "whole" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[k], v) for k, v in diffusers_tensors(tensors).items())


# ---------------------------------------------------------------- folders that mislead


@pytest.mark.parametrize("names", [["a", "b"], ["diffusion_pytorch_model-00001-of-00002", "x"]])
def test_a_tensor_that_two_files_have(tmp_path, names):
    folder = write_folder(tmp_path)
    whole = folder / "diffusion_pytorch_model.safetensors"
    for name in names:
        (folder / f"{name}.safetensors").write_bytes(whole.read_bytes())
    with open_base(folder) as base:  # diffusers' own file alone counts
        assert [file.path for file in base.files.containers] == [whole]
    whole.unlink()
    message = refused(folder)
    assert all(f"{name}.safetensors" in message for name in names)


@pytest.mark.parametrize(
    "name", ["../{}", "/tmp/{}", "sub/{}", "..", ".", "", "a\0b", "a\nb", "{}/"]
)
def test_an_index_that_leads_out_of_the_folder(tmp_path, name):
    """Though the file be there."""
    file = "diffusion_pytorch_model.safetensors"
    outside = write_folder(tmp_path) / file
    folder = write_folder(tmp_path / "d")
    (folder / "sub").mkdir()
    (folder / file).rename(folder / "sub" / file)
    path = str(outside) if name.startswith("/") else name.format(file)
    index = {"weight_map": {"x_embedder.weight": path}}
    (folder / f"{file}.index.json").write_text(json.dumps(index))
    message = refused(folder)
    assert "no file of the folder" in message or "Is a directory" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"num_layers": 0}, "positive integer"),
        (
            {"num_single_layers": 1},
            "speaks of 1 double and 1 single blocks, the weights have 1 and",
        ),
        ({"guidance_embeds": False}, "guidance_embeds: false"),
        ({"num_layers": 100_000}, "it has 100000 double"),
        ({"axes_dims_rope": [-4, 18, 18]}, "three positive integers"),
    ],
)
def test_a_config_of_another_model(tmp_path, changes, part):
    """diffusers would leave out the blocks that it does not speak of."""
    from fluxfast.formats.inspect import inspect

    folder = write_folder(tmp_path, **changes)
    assert part in refused(folder)
    if "num_layers" in changes:  # no table is built of a number
        with pytest.raises(ConfigError, match=part):
            inspect(folder)
