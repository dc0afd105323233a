"""Base checkpoints: every layout loads as the same model, anything else gives one clear message."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import all_in_one, spec_of, split_tensors, tensors_of, write
from safetensors import safe_open
from safetensors.torch import load_file
from small import SMALL

from fluxfast import load_transformer
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.folder import tokenizer_length
from fluxfast.formats.base.load import resolve_device
from fluxfast.formats.base.reader import open_base
from fluxfast.formats.inspect import inspect
from fluxfast.model.spec import FluxSpec

WHOLE = "diffusion_pytorch_model.safetensors"
CONFIG = {"_class_name": "FluxTransformer2DModel", **checkpoints.config_of(SMALL)}


def split(tensors) -> dict[str, torch.Tensor]:
    return split_tensors(tensors, SMALL)


def write_folder(folder: Path, tensors, named=None, **changes) -> Path:
    """Writes a diffusers transformer folder; a config entry of None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    write(folder / WHOLE, named or split(tensors))
    return folder


@pytest.fixture(scope="module")
def tensors():
    return tensors_of(SMALL, torch.float32)


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory, tensors) -> Path:
    """Folders that diffusers saved from our tensors."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**checkpoints.config_of(SMALL))
    model.load_state_dict(split(tensors), strict=True)
    root = tmp_path_factory.mktemp("base")
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "sharded", max_shard_size="200KB")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 2
    model.to(torch.bfloat16).save_pretrained(root / "bf16")
    return root


@pytest.fixture
def own_folder(tmp_path, tensors) -> Path:
    """A folder of config.json and one file, to damage."""
    return write_folder(tmp_path / "own", tensors)


@pytest.fixture
def shards(tmp_path, diffusers_folder) -> Path:
    """A folder of several files and their index, to damage."""
    return shutil.copytree(diffusers_folder / "sharded", tmp_path / "shards")


def load(path: Path, **options):
    return load_transformer(
        path, **{"storage": "fp32", "compute": "fp32", "device": "cpu", **options}
    )


def refused(path: Path, kind=ConfigError, **options) -> str:
    """Returns the message of the error that loading `path` raises."""
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


def test_layouts(tmp_path, diffusers_folder, tensors):
    whole, sharded = diffusers_folder / "whole", diffusers_folder / "sharded"
    stranger = {"text_encoders.clip_l.double_blocks.9.x": torch.tensor(1.0)}
    all_file = write(tmp_path / "all.safetensors", all_in_one(tensors) | stranger)
    shutil.copytree(whole, tmp_path / "pipeline" / "transformer")
    shutil.copytree(sharded, tmp_path / "shards")
    (tmp_path / "shards" / "old.safetensors").write_bytes(b"not in the index, so never read")
    more = write_folder(tmp_path / "more", tensors, split(tensors) | {"ema.decay": torch.ones(())})
    out = write_folder(tmp_path / "out", tensors, out_channels=16)
    pipeline = tmp_path / "pipeline"
    folders = (pipeline, pipeline / "transformer", sharded, tmp_path / "shards", more, out)
    for path in (all_file, whole / WHOLE, str(whole), *folders):
        model = load(path)
        assert model.spec == SMALL, path
        same(model, tensors)
    stored = load_file(whole / WHOLE)  # reading left it as it was
    assert all(torch.equal(stored[key], value) for key, value in split(tensors).items())


@pytest.mark.parametrize("storage, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_bf16_file(diffusers_folder, tensors, storage, dtype):
    model = load(diffusers_folder / "bf16", storage=storage)
    assert model.get_submodule("double_blocks.0.img_attn.qkv").weight.dtype == dtype
    same(model.float(), {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_no_file_stays_open(tmp_path, tensors):
    """Neither a descriptor nor a memory map: some systems could not replace the file."""
    file = write(tmp_path / "flux1.safetensors", tensors)
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


# ---------------------------------------------------------------- the spec


@pytest.mark.parametrize("guidance, length", [(True, 512), (False, 256)])
def test_guidance_makes_it_dev_or_schnell(tmp_path, tensors, guidance, length):
    tensors = {k: v for k, v in tensors.items() if guidance or not k.startswith("guidance_in")}
    named = split_tensors(tensors, replace(SMALL, guidance_embed=guidance))
    folder = write_folder(tmp_path / "d", tensors, named, guidance_embeds=guidance)
    for path in (write(tmp_path / "flux1.safetensors", tensors), folder):
        spec = spec_of(path)
        assert (spec.guidance_embed, spec.text_length) == (guidance, length)
        same(load(path), tensors)


@pytest.mark.parametrize(
    "limits, length",
    [
        ((77, 77.0), 77),
        ((512, 4096, int(1e30), None, "77", 0, -1, True, float("inf"), float("nan")), 512),
    ],
)
def test_the_tokenizer_limits_the_text(tmp_path, tensors, limits, length):
    write_folder(tmp_path / "transformer", tensors)
    assert tokenizer_length(tmp_path / "tokenizer_2") is None
    (tmp_path / "tokenizer_2").mkdir()
    for limit in limits:
        content = json.dumps({"model_max_length": limit})
        (tmp_path / "tokenizer_2" / "tokenizer_config.json").write_text(content)
        assert spec_of(tmp_path).text_length == length, limit
        assert tokenizer_length(tmp_path / "tokenizer_2") in (None, length, limit)


def test_the_axes_may_be_left_out(tmp_path, tensors):
    """FLUX.1's own config.json has none."""
    folder = write_folder(tmp_path, tensors, axes_dims_rope=None)
    assert spec_of(folder).axes_dim == SMALL.axes_dim


def test_an_mlp_width_that_is_no_exact_multiple():
    """176 * (185 / 176) is a little less than 185: the width must not be cut to 184."""
    assert int(176 * (185 / 176)) == 184
    spec = FluxSpec(hidden_size=176, num_heads=11, axes_dim=(4, 6, 6), mlp_ratio=185 / 176)
    assert spec.mlp_hidden == 185


# ---------------------------------------------------------------- storage


def test_matrices_that_nf4_cannot_hold_stay_bf16(tmp_path, log_lines):
    """Hidden 96: of K = 96, 384 and 480 only 384 is a multiple of 64."""
    tensors = tensors_of(checkpoints.ODD, torch.float32)
    model = load(write(tmp_path / "flux1.safetensors", tensors), storage="nf4")
    assert model.get_submodule("double_blocks.0.img_mlp.2").weight is None
    dense = model.get_submodule("double_blocks.0.img_attn.qkv").weight
    assert torch.equal(dense, tensors["double_blocks.0.img_attn.qkv.weight"].bfloat16())
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


@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4"])
def test_the_base_is_frozen_without_a_warning(diffusers_folder, storage, log_lines):
    assert not list(load(diffusers_folder / "whole", storage=storage).parameters())
    assert not log_lines


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
    assert all(part in message for part in parts)


def test_auto_is_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


# ---------------------------------------------------------------- what is missing or does not fit


def test_a_damaged_file_of_a_folder(own_folder, tmp_path):
    (own_folder / WHOLE).write_bytes(b"hello, this is text\n" * 50)
    assert f"cannot read {own_folder / WHOLE}" in refused(own_folder)
    (own_folder / WHOLE).unlink()
    assert "no .safetensors weights" in refused(own_folder)
    assert "does not exist" in refused(tmp_path / "nothing", FluxfastError)


def test_a_shard_that_is_missing_or_alone(shards):
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    assert first.name in refused(first)
    second.unlink()
    assert second.name in refused(shards)


@pytest.mark.parametrize(
    "content", ["{", "[]", "3", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"]
)
def test_an_index_that_is_damaged(shards, content):
    (index,) = shards.glob("*.index.json")
    index.write_text(content)
    assert index.name in refused(shards)


# those that the sizes are read from
@pytest.mark.parametrize(
    "name",
    [
        "img_in.weight",
        "txt_in.weight",
        "vector_in.in_layer.weight",
        "final_layer.linear.weight",
        "double_blocks.0.img_mlp.0.weight",
    ],
)
def test_a_file_with_unreadable_sizes(tmp_path, tensors, name):
    for shape in (None, (), (0, 0), (64,)):
        changed = {k: v for k, v in tensors.items() if k != name}
        if shape is not None:
            changed[name] = torch.zeros(shape)
        file = write(tmp_path / "flux1.safetensors", changed)
        message = refused(file)
        assert str(file) in message
        assert name in message or "shape" in message or "channels" in message


@pytest.mark.parametrize("width", [0, 1, 5, 48, 1000])
def test_an_impossible_head_width(tmp_path, tensors, width):
    name = "double_blocks.0.img_attn.norm.key_norm.scale"
    file = write(tmp_path / "flux1.safetensors", tensors | {name: torch.zeros(width)})
    assert str(file) in refused(file)


def test_a_file_of_an_inpainting_variant(tmp_path, tensors):
    file = write(tmp_path / "fill.safetensors", tensors | {"img_in.weight": torch.zeros(64, 96)})
    assert "96 channels and returns 16: an inpainting" in refused(file)


@pytest.mark.parametrize(
    "part, shape",
    [
        ("attn.to_k.weight", (64, 32)),
        ("attn.to_k.weight", (64,)),
        ("attn.to_k.weight", ()),
        ("attn.to_k.bias", (32,)),
        ("attn.norm_q.weight", (64,)),
        ("ff.net.0.proj.weight", (64, 256)),
    ],
)
def test_a_wrong_shape(own_folder, tensors, part, shape):
    name = f"transformer_blocks.0.{part}"
    write(own_folder / WHOLE, split(tensors) | {name: torch.zeros(shape)})
    message = refused(own_folder)
    assert name in message and str(shape) in message


def test_parts_of_wrong_size_that_add_up(own_folder, tensors):
    """q with 96 rows and k with 32 would make a fused matrix of the right size."""
    q, k = (f"transformer_blocks.0.attn.{part}.weight" for part in ("to_q", "to_k"))
    wrong = {q: torch.zeros(96, 64), k: torch.zeros(32, 64)}
    write(own_folder / WHOLE, split(tensors) | wrong)
    assert q in refused(own_folder)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool])
def test_an_unsupported_dtype(tmp_path, tensors, dtype):
    name = "double_blocks.0.img_attn.qkv.weight"
    file = write(tmp_path / "flux1.safetensors", tensors | {name: tensors[name].to(dtype)})
    with safe_open(file, "pt") as handle:
        stored = handle.get_slice(name).get_dtype()
    message = refused(file)
    assert name in message and stored in message


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "not valid JSON"),
        (b"[" * 9999, "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[]", "JSON object"),
        (b"{}", "model of unknown kind"),
        (b'{"_class_name": "SD3Transformer2DModel"}', "holds a SD3Transformer2DModel"),
        (b'{"architectures": ["CLIPTextModel"]}', "holds a CLIPTextModel, not a Flux"),
    ],
)
def test_a_broken_config(own_folder, content, part):
    (own_folder / "config.json").write_bytes(content)
    message = refused(own_folder)
    assert part in message and str(own_folder) in message


def test_a_folder_without_a_config(own_folder):
    (own_folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="no config.json") as error:
        load(own_folder)
    assert error.value.hint == f"give the file: {own_folder / WHOLE}"


def test_folders_of_something_else_are_told_by_what_they_hold(tmp_path):
    write(tmp_path / "ae.sft", {"decoder.up.0.a": torch.ones(1), "encoder.down.0.a": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"no config.json.*, and holds ae.sft \(VAE\)") as error:
        load(tmp_path)
    assert "model.encoders" in error.value.hint
    lora = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 4)}
    write(tmp_path / "b.safetensors", lora)
    with pytest.raises(ConfigError, match=r"ae.sft \(VAE\), b.safetensors \(LoRA\)") as error:
        load(tmp_path)
    assert "--lora" in error.value.hint
    (tmp_path / "._b.safetensors").write_bytes(b"what macOS leaves on other disks")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert "is a StableDiffusionXLPipeline without a transformer folder" in refused(tmp_path)


@pytest.mark.parametrize("name", ["flux.sft", "FLUX.SFT"])
def test_files_called_sft(tmp_path, tensors, name):
    """As Black Forest Labs called them: alone, and in a folder with a config.json."""
    same(load(write(tmp_path / name, tensors)), tensors)
    folder = write_folder(tmp_path / "d", tensors)
    (folder / WHOLE).rename(folder / name)
    same(load(folder), tensors)
    assert inspect(folder)[1].endswith("safetensors, diffusers names, F32")


@pytest.mark.parametrize("key", [key for key in CONFIG if type(CONFIG[key]) is int])
def test_a_missing_or_invalid_size(tmp_path, key):
    for value in (None, "2", 2.0, [2], {}, True, 0, -1):
        config = {k: v for k, v in (CONFIG | {key: value}).items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        message = refused(tmp_path)
        assert key in message and "config.json" in message
        assert (f"has no {key!r}" if value is None else repr(value)) in message


AXES = [5, "abc", [32], [16, 16], [4, 14, "14"], [4, 14, 14.0], [5, 13, 14], [-4, 18, 18]]


@pytest.mark.parametrize(
    "changes, part",
    [
        *[({"axes_dims_rope": axes}, "axes") for axes in AXES],
        # narrower, wider, or another count of heads: never loaded, whatever adds up
        *[({"num_attention_heads": heads}, "shape") for heads in (1, 3, 4)],
        ({"num_layers": 0}, "positive integer"),
        # diffusers would leave out the blocks that it does not speak of
        (
            {"num_single_layers": 1},
            "has 1 double and 1 single blocks, the weights have 1 and",
        ),
        ({"guidance_embeds": False}, "guidance_embeds: false"),
        ({"num_layers": 100_000}, "it has 100000 double"),
        # FLUX.1-Fill takes 384 channels and returns 64
        ({"in_channels": 384, "out_channels": 64}, "384 channels and returns 64: an inpainting"),
    ],
)
def test_a_config_of_another_model(tmp_path, tensors, changes, part):
    folder = write_folder(tmp_path, tensors, **changes)
    assert part in refused(folder)
    if "num_layers" in changes:  # no table is built of a number
        with pytest.raises(ConfigError, match=part):
            inspect(folder)


# ---------------------------------------------------------------- folders that mislead


@pytest.mark.parametrize("names", [["a", "b"], ["diffusion_pytorch_model-00001-of-00002", "x"]])
def test_a_tensor_in_two_files(own_folder, names):
    whole = own_folder / WHOLE
    for name in names:
        (own_folder / f"{name}.safetensors").write_bytes(whole.read_bytes())
    with open_base(own_folder) as base:  # diffusers' own file alone counts
        assert [file.path for file in base.files.containers] == [whole]
    whole.unlink()
    message = refused(own_folder)
    assert all(f"{name}.safetensors" in message for name in names)


@pytest.mark.parametrize(
    "name", ["../{}", "/tmp/{}", "sub/{}", "..", ".", "", "a\0b", "a\nb", "{}/"]
)
def test_an_index_that_points_elsewhere(tmp_path, tensors, name):
    """Even to a file that exists."""
    outside = write_folder(tmp_path, tensors) / WHOLE
    folder = write_folder(tmp_path / "d", tensors)
    (folder / "sub").mkdir()
    (folder / WHOLE).rename(folder / "sub" / WHOLE)
    path = str(outside) if name.startswith("/") else name.format(WHOLE)
    index = {"weight_map": {"x_embedder.weight": path}}
    (folder / f"{WHOLE}.index.json").write_text(json.dumps(index))
    message = refused(folder)
    assert "no file of the folder" in message or "Is a directory" in message
