"""Base checkpoints as other tools write them load as the model of their dense tensors, exactly or
within the precision of the file's own numbers."""

import json
import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import (
    PREFIX,
    WIDE,
    all_in_one,
    bnb_both_ways,
    bnb_tensors,
    fp8_tensors,
    split_tensors,
    tensor_sources,
    tensors_of,
    write,
    write_gguf,
)
from fluxfast_kernels import nf4_dequantize
from fluxfast_kernels.quant.nf4 import NF4Tensor
from safetensors.torch import load_file
from small import SMALL, inputs

from fluxfast import load_transformer
from fluxfast.errors import ConfigError
from fluxfast.formats.base import reader as module
from fluxfast.formats.base.quantize import quantize
from fluxfast.formats.base.reader import open_base
from fluxfast.model.flux import Flux
from fluxfast.model.init import fill
from fluxfast.model.precision import layer_precisions
from fluxfast.model.spec import FluxSpec

MATRIX = "double_blocks.0.img_mlp.0"
WEIGHT = f"{MATRIX}.weight"
FUSED = ("double_blocks.0.txt_attn.qkv", "single_blocks.0.linear1")


@pytest.fixture(scope="module")
def tensors():
    return tensors_of()


@pytest.fixture(scope="module")
def nested(tensors):
    return bnb_tensors(tensors, nested=True)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "nested"])
def nf4_folder(request, tmp_path_factory, tensors):
    """A folder that diffusers saved in NF4, one file or (nested) shards; and whether nested."""
    folder = tmp_path_factory.mktemp("d")
    dense = checkpoints.write_diffusers(folder / "dense", tensors)
    shards = {"max_shard_size": "300KB"} if request.param else {}
    with pytest.MonkeyPatch.context() as patch:
        checkpoints.write_diffusers_nf4(folder / "nf4", dense, request.param, patch, **shards)
        assert (len(list((folder / "nf4").glob("*.safetensors"))) > 3) is request.param
        yield folder / "nf4", request.param


def load(path: Path, storage: str = "fp32", **options) -> Flux:
    return load_transformer(path, storage=storage, compute="fp32", device="cpu", **options)


def of_dense(tensors, storage: str = "fp32", spec: FluxSpec = WIDE) -> Flux:
    """Returns the model of dense tensors, without a file."""
    model = Flux(spec)
    fill(model, tensors.__getitem__, layer_precisions(spec, storage, "fp32"))
    return model


def output(model: Flux) -> torch.Tensor:
    with torch.no_grad():
        return model(*inputs(model.spec))


def same_output(model: Flux, other: Flux) -> None:
    mine, theirs = output(model), output(other)
    assert theirs.std() > 0.02  # there is something to compare
    assert torch.equal(mine, theirs)


def error_of(model: Flux, dense: Flux) -> float:
    mine, exact = output(model), output(dense)
    return ((mine - exact).norm() / exact.norm()).item()


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("prefix", ["", PREFIX, "diffusion_model.", "transformer.", "model."])
@pytest.mark.parametrize("split", [False, True])
def test_names_and_prefixes(tmp_path, tensors, prefix, split):
    """Detected by content: the file's own name is another model's."""
    named = split_tensors(tensors) if split else tensors
    file = write(tmp_path / "sdxl.ckpt", {prefix + k: v for k, v in named.items()})
    same_output(load(file), of_dense(tensors))


def with_weight_norms(tensors):
    """As ComfyUI of 2026 names q's and k's norms."""
    return {re.sub(r"(_norm)\.scale$", r"\1.weight", k): v for k, v in tensors.items()}


@pytest.mark.parametrize("prefix", ["", PREFIX, "transformer."])
def test_norms_named_weight(tmp_path, tensors, prefix):
    named = {prefix + key: value for key, value in with_weight_norms(tensors).items()}
    assert not any(key.endswith("_norm.scale") for key in named)
    dense = of_dense(tensors)
    same_output(load(write(tmp_path / "a", named)), dense)
    write_gguf(tmp_path / "b", named, "F32")
    same_output(load(tmp_path / "b"), dense)
    if not prefix:
        quantize(tmp_path / "a", tmp_path / "c", "nf4")
        same_output(load(tmp_path / "c", "nf4"), load(tmp_path / "a", "nf4"))


@pytest.mark.parametrize("depths, guidance", [((3, 2), True), ((2, 5), False)])
def test_schnell_and_other_depths(tmp_path, depths, guidance):
    spec = replace(
        SMALL,
        depth=depths[0],
        depth_single_blocks=depths[1],
        guidance_embed=guidance,
        text_length=512 if guidance else 256,
    )
    tensors = tensors_of(spec)
    for named in (tensors, split_tensors(tensors, spec)):
        model = load(write(tmp_path / "a", named))
        assert model.spec == spec
        same_output(model, of_dense(tensors, spec=spec))


# ---------------------------------------------------------------- fp8


# relative, of the output: a few times half a unit in the last place
FP8_ERROR = {torch.float8_e4m3fn: 0.15, torch.float8_e5m2: 0.3}


def scale_name(name: str) -> str:
    return name.removesuffix("weight") + "scale_weight"


def dequantized(quantized, name: str) -> torch.Tensor:
    return quantized[name].float() * quantized.get(scale_name(name), torch.tensor(1.0))


def as_nf4_keeps_it(name: str, value: torch.Tensor) -> torch.Tensor:
    """Rounds to bf16 around the blocks, as quantized storage does."""
    outer = "_blocks." not in name and value.ndim == 2
    return value.bfloat16().float() if outer else value


@pytest.mark.grid(5)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "layout, dtype",
    [
        ("bare", torch.float8_e4m3fn),
        ("all in one", torch.float8_e4m3fn),
        ("diffusers", torch.float8_e4m3fn),
        ("bare", torch.float8_e5m2),
    ],
)
def test_comfyui_fp8(tmp_path, tensors, scaled, layout, dtype):
    """The model equals values times scale, and is near the dense one: e4m3 keeps 3 bits, e5m2 2."""
    quantized = fp8_tensors(tensors, scaled, dtype)
    named = quantized
    if layout == "all in one":
        named = all_in_one(quantized)
    elif layout == "diffusers":
        named = split_tensors({k: quantized[k] for k in tensors})
        for name, sources in tensor_sources(WIDE).items():
            if scale_name(name) in quantized:  # each part brings the scale of what it was cut from
                scale = quantized[scale_name(name)]
                named |= {scale_name(source): scale.clone() for source in sources}
    model = load(write(tmp_path / "a", named))
    same_output(model, of_dense({name: dequantized(quantized, name) for name in tensors}))
    assert 1e-3 < error_of(model, of_dense(tensors)) < FP8_ERROR[dtype]


def test_newer_names_of_the_scale(tmp_path, tensors):
    quantized = fp8_tensors(tensors, scaled=True)
    newer = {k.replace(".scale_weight", ".weight_scale"): v for k, v in quantized.items()}
    assert newer.keys() != quantized.keys()
    same_output(load(write(tmp_path / "b", newer)), load(write(tmp_path / "a", quantized)))


def test_fp8_values_stay_as_they_are(tmp_path, tensors):
    quantized = fp8_tensors(tensors, scaled=True)
    model = load(write(tmp_path / "a", all_in_one(quantized)), "fp8")
    layer = model.get_submodule(MATRIX)
    assert layer.storage() == "fp8"
    assert torch.equal(layer.codes.view(torch.uint8), quantized[WEIGHT].view(torch.uint8))
    assert torch.equal(layer.row_scale, quantized[scale_name(WEIGHT)].expand(1024))
    same_output(
        model, of_dense({k: as_nf4_keeps_it(k, dequantized(quantized, k)) for k in tensors})
    )


@pytest.mark.parametrize("form", [dict, all_in_one])
def test_plain_matrices_among_scaled_ones(tmp_path, tensors, form):
    """ComfyUI takes them as they are. Where a scale is lost, weights would be a thousand times too
    large: that is refused."""
    quantized = fp8_tensors(tensors, True)
    plain = {
        WEIGHT: tensors[WEIGHT].to(torch.float8_e4m3fn),
        "img_in.weight": tensors["img_in.weight"],
    }
    mixed = {k: v for k, v in quantized.items() if k != scale_name(WEIGHT)}
    mixed["img_in.scale_weight"] = torch.tensor(1.0)  # some tools write one for plain matrices too
    model = load(write(tmp_path / "a", form(mixed | plain)))
    dense = {name: dequantized(quantized, name) for name in tensors}
    same_output(model, of_dense(dense | {k: v.float() for k, v in plain.items()}))
    one = {k: v for k, v in quantized.items() if k != scale_name(WEIGHT)}
    with pytest.raises(ConfigError, match=f"{WEIGHT} lacks its scale"):
        load(write(tmp_path / "d", form(one)))
    lost = {k: v for k, v in quantized.items() if not k.endswith("scale_weight")}
    with pytest.raises(ConfigError, match="has no scale_weight, in a file of scaled fp8"):
        load(write(tmp_path / "b", form(lost)))
    marker = {"text_encoders.t5xxl.transformer.scaled_fp8": quantized["scaled_fp8"]}  # another's
    load(write(tmp_path / "c", all_in_one(fp8_tensors(tensors, False)) | marker))


# ---------------------------------------------------------------- ComfyUI's marks


def as_bytes(form: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(form).encode()), dtype=torch.uint8)


def int8(tensors, size: int):
    """Returns tensors with the blocks' matrices in int8, a scale a row, rotated in blocks of `size`
    where that divides the width (0: none); what each means, fp64; and the rotated ones' forms."""
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    hadamard = np.ones((1, 1))
    while len(hadamard) < size:
        hadamard = np.kron(hadamard, four)
    out, meant, forms = {}, {}, {}
    for name, tensor in tensors.items():
        values = tensor.double().numpy()
        out[name], meant[name] = tensor, values
        if values.ndim == 1 or "_blocks." not in name:
            continue
        is_rotated = size and values.shape[1] % size == 0
        blocks = hadamard if is_rotated else np.ones((1, 1))
        rows = (values.reshape(-1, len(blocks)) @ blocks.T).reshape(values.shape)
        scale = np.abs(rows).max(1, keepdims=True).astype(np.float32) / np.float32(127)
        codes = np.rint(rows / scale)
        module = name.removesuffix(".weight")
        out[name] = torch.from_numpy(codes.astype(np.int8))
        out[f"{module}.weight_scale"] = torch.from_numpy(scale)
        meant[name] = ((codes * scale).reshape(-1, len(blocks)) @ blocks).reshape(values.shape)
        if is_rotated:
            forms[module] = {
                "format": "int8_tensorwise",
                "convrot": True,
                "convrot_groupsize": size,
            }
    return out, meant, forms


@pytest.fixture(scope="module")
def rotated(tensors):
    return cache(partial(int8, tensors))


def marks(forms, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{module}.comfy_quant": as_bytes(form) for module, form in forms.items()}


def header(forms, prefix: str = "") -> dict[str, str]:
    layers = {prefix + module: form for module, form in forms.items()}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def dropped(forms, *words):
    return {m: {k: v for k, v in form.items() if k not in words} for m, form in forms.items()}


# how a file says which of its matrices are rotated: (tensors, forms) -> tensors, metadata
CONVROT = {
    "marks": lambda t, f: (t | marks(f), None),
    "all in one": lambda t, f: (all_in_one(t | marks(f)), None),
    "INT8-Fast": lambda t, f: (
        t | marks(dropped({m: {**form, "per_row": True} for m, form in f.items()}, "format")),
        None,
    ),
    "no size": lambda t, f: (t | marks(dropped(f, "convrot_groupsize")), None),
    "params": lambda t, f: (t | marks({m: {"params": form} | form for m, form in f.items()}), None),
    "header": lambda t, f: (t, header(f)),
    "header, all in one": lambda t, f: (all_in_one(t), header(f, PREFIX)),
    "bare header": lambda t, f: (all_in_one(t), header(f)),
    "prefixed header": lambda t, f: (t, header(f, PREFIX)),
    "both": lambda t, f: (t | marks(f), header(f)),
}


@pytest.mark.parametrize(
    "convention, size",
    [*[(name, 256) for name in CONVROT], *[("marks", size) for size in (4, 16, 64, 1024)]],
)
def test_convrot(tmp_path, tensors, rotated, convention, size):
    """The rotation is undone: the weights are those of the codes to fp32's precision, and near the
    dense ones as int8 is. Of size 1024 only the MLP's are rotated, of 256 all."""
    quantized, meant, forms = rotated(size)
    assert len(forms) == (2 if size == 1024 else 13)
    named, metadata = CONVROT[convention](quantized, forms)
    with open_base(write(tmp_path / "a", named, metadata)) as base:
        for name, exact in meant.items():
            mine = base.read(name).double().numpy()
            # a sum of `size` products in fp32
            assert np.linalg.norm(mine - exact) <= 1e-6 * np.linalg.norm(exact), name
            dense = tensors[name].double().numpy()
            # half a step of amax / 127, uniform: amax is 3 to 4 deviations, 4 / 127 / √12 = 0.9 %
            assert np.linalg.norm(mine - dense) <= 0.01 * np.linalg.norm(dense), name


def test_int8_without_a_rotation(tmp_path, tensors):
    """Unmarked, marked as such, and by the format's word alone: codes stay as they are."""
    quantized, _, _ = int8(tensors, 0)
    plain = load(write(tmp_path / "a", quantized), "int8")
    layer = plain.get_submodule(MATRIX)
    assert torch.equal(layer.codes, quantized[WEIGHT])
    form = {"format": "int8_tensorwise", "convrot": False, "orig_shape": [1024, 256]}
    for index, metadata in enumerate((header({MATRIX: form}), header({MATRIX: form["format"]}))):
        same_output(load(write(tmp_path / f"b{index}", quantized, metadata), "int8"), plain)
    for rotated in (False, None):
        marked = quantized | marks({MATRIX: form | {"convrot": rotated}})
        both = header({MATRIX: {"format": "int8_tensorwise"}})
        same_output(load(write(tmp_path / f"c{rotated}", marked, both), "int8"), plain)


def test_diffusers_names_and_shards_keep_their_marks(tmp_path, tensors):
    """Each shard's header speaks of its own matrices."""
    quantized, meant, forms = int8(split_tensors(tensors), 64)
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "FluxTransformer2DModel", **checkpoints.config_of()})
    )
    for index in (0, 1):
        shard = {k: v for k, v in quantized.items() if ("single_" in k) is bool(index)}
        own = {m: form for m, form in forms.items() if f"{m}.weight" in shard}
        write(tmp_path / f"{index}.safetensors", shard, header(own))
    with open_base(tmp_path) as base:
        for name, sources in tensor_sources(WIDE).items():
            exact = np.concatenate([meant[source] for source in sources])
            if "adaLN" in name:
                exact = np.concatenate(np.split(exact, 2)[::-1])
            mine = base.read(name).double().numpy()
            assert np.linalg.norm(mine - exact) <= 1e-6 * np.linalg.norm(exact), name


GOOD = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}


@pytest.mark.parametrize(
    "form, problem",
    [
        ({"format": "nvfp4"}, "stored as 'nvfp4', which is not read"),
        ({"format": "mxfp8"}, "stored as 'mxfp8'"),
        ({"format": "convrot_w4a4", "convrot_groupsize": 256}, "stored as 'convrot_w4a4'"),
        ({"format": "asym_w4a8_int8"}, "stored as 'asym_w4a8_int8'"),
        ({"format": "int8_blockwise", "group_size": 128}, "stored as 'int8_blockwise'"),
        ({"format": ["int8_tensorwise"]}, "stored as "),
        ({"format": "float8_e4m3fn"}, "marked as float8_e4m3fn and stored as I8"),
        (GOOD | {"transposed": True}, "marked with 'transposed', which"),
        (GOOD | {"params": {"smooth": 1}}, "marked with 'smooth'"),
        *[(GOOD | {"convrot_groupsize": n}, f"blocks of {n!r}") for n in (0, 1, 3, 8, 128, -4)],
        *[(GOOD | {"convrot_groupsize": n}, f"blocks of {n!r}") for n in (1024, 4**9, 64.0, True)],
        (GOOD | {"convrot_groupsize": "256"}, "blocks of '256'"),
        ([], "no JSON object"),
        (3, "no JSON object"),
    ],
)
def test_marks_that_are_not_known(tmp_path, rotated, form, problem):
    """In the file or in its header: never passed over. 1024 does not divide 256."""
    quantized, _, _ = rotated(256)
    for metadata in (None, header({MATRIX: form})):
        marked = {} if metadata else marks({MATRIX: form})
        file = write(tmp_path / "a", quantized | marked, metadata)
        with pytest.raises(ConfigError, match=re.escape(problem)) as error:
            load(file)
        assert str(file) in error.value.message


def test_marks_that_do_not_fit_the_file(tmp_path, tensors, rotated):
    quantized, _, forms = rotated(256)
    side = f"{MATRIX}.pre_quant_scale"
    wrong = {
        "is marked as int8_tensorwise and stored as BF16": tensors | marks({MATRIX: GOOD}),
        "has pre_quant_scale beside it": tensors | {side: torch.ones(256)},
        "is stored as BF16, and has a scale beside it": tensors
        | {f"{MATRIX}.weight_scale": torch.full((1,), 0.5)},
        "holds no JSON object": quantized | {f"{MATRIX}.comfy_quant": torch.ones(2)},
        "is stored as F8_E4M3 without a scale": {
            k: v for k, v in fp8_tensors(tensors, False).items()
        }
        | marks({MATRIX: {"format": "float8_e4m3fn"}}),
    }
    for problem, named in wrong.items():
        with pytest.raises(ConfigError, match=re.escape(problem)):
            load(write(tmp_path / "a", named))
    for problem, metadata in (
        ("names 'layer.7'", header({"layer.7": GOOD})),
        ("holds no JSON object", {"_quantization_metadata": "{"}),
        (f"and comfy_quant differ on {WEIGHT}", header({MATRIX: {"format": "int8_tensorwise"}})),
    ):
        with pytest.raises(ConfigError, match=re.escape(problem)):
            load(write(tmp_path / "a", quantized | marks(forms), metadata))


def test_fp8_under_comfyuis_marks(tmp_path, tensors):
    """One scale, one a row, and the input's scale, which concerns no weight."""
    quantized = fp8_tensors(tensors, scaled=True)
    del quantized["scaled_fp8"]
    newer = {
        k.replace("scale_weight", "weight_scale").replace("scale_input", "input_scale"): v
        for k, v in quantized.items()
    }
    rows = {
        k: v.expand(len(newer[k[:-6]])).clone() if k.endswith("weight_scale") else v
        for k, v in newer.items()
    }
    modules = [k.removesuffix(".weight_scale") for k in newer if k.endswith("weight_scale")]
    plain = load(write(tmp_path / "a", quantized))
    for word, named in (("float8_e4m3fn", newer), ("float8_e4m3fn_rowwise", rows)):
        form = {"format": word, "full_precision_matrix_mult": True}
        same_output(load(write(tmp_path / "b", named, header(dict.fromkeys(modules, form)))), plain)


# ---------------------------------------------------------------- bitsandbytes


def dense_of(path: Path, names) -> dict[str, torch.Tensor]:
    with open_base(path) as base:
        return {name: as_nf4_keeps_it(name, base.read(name).clone()) for name in names}


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_in_bfl_names(tmp_path, tensors, nested):
    """lllyasviel's v1 (nested) and v2 (plain): packed bytes and scales are taken as they are."""
    quantized = bnb_tensors(tensors, nested)
    file = write(tmp_path / "a", all_in_one(quantized) if nested else quantized)
    model = load(file, "auto")
    for name in (MATRIX, *FUSED):
        layer = model.get_submodule(name)
        assert layer.storage() == "nf4"
        assert torch.equal(layer.packed.view(-1, 1), quantized[f"{name}.weight"])
        assert torch.equal(layer.absmax, quantized[f"{name}.weight.absmax"])
        assert (layer.nested_absmax is not None) is nested
        _, theirs = bnb_both_ways(tensors[f"{name}.weight"], nested)
        # the offset they add is the file's float64, ours fp32
        torch.testing.assert_close(layer.dequantize(torch.float32), theirs, rtol=0, atol=1e-6)
    same_output(model, of_dense(dense_of(file, tensors)))
    assert 0.02 < error_of(model, of_dense(tensors)) < 0.25


def test_nf4_that_diffusers_saved(tensors, nf4_folder):
    """q, k, v and mlp are joined with their scales, byte for byte, wherever the shards cut."""
    folder, nested = nf4_folder
    files = folder.glob("*.safetensors")
    stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
    model = load(folder, "auto")
    for name in FUSED:
        layer = model.get_submodule(name)
        parts = tensor_sources(WIDE)[f"{name}.weight"]
        assert len(parts) in (3, 4) and layer.storage() == "nf4"
        assert torch.equal(layer.packed.view(-1, 1), torch.cat([stored[part] for part in parts]))
        absmax = torch.cat([stored[f"{part}.absmax"] for part in parts])
        assert torch.equal(layer.absmax, absmax)
        assert absmax.dtype == (torch.uint8 if nested else torch.float32)
        if nested:
            groups = torch.cat([stored[f"{part}.nested_absmax"] for part in parts])
            assert torch.equal(layer.nested_absmax, groups)
            assert layer.offset.numel() == groups.numel() and len(set(layer.offset.tolist())) > 1
    same_output(model, of_dense(dense_of(folder, tensors)))


def test_diffusers_computes_the_same_from_its_nf4(nf4_folder):
    """diffusers' own weights from its file, which it rounds to bf16."""
    import bitsandbytes.functional as bnb
    from diffusers import FluxTransformer2DModel

    folder, _ = nf4_folder
    theirs = FluxTransformer2DModel.from_pretrained(folder, device_map={"": "cpu"})
    dense = {
        f"{name}.weight": bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in theirs.named_modules()
        if hasattr(layer, "weight") and hasattr(layer.weight, "quant_state")
    }
    with open_base(folder) as base:
        for name, sources in tensor_sources(WIDE).items():
            if name.endswith(".weight") and "final_layer.adaLN" not in name:
                joined = torch.cat([dense[source] for source in sources])
                assert joined.dtype == torch.bfloat16
                # one rounding to 8 bits of mantissa
                torch.testing.assert_close(base.read(name), joined.float(), rtol=2**-8, atol=1e-7)


def test_scales_of_partial_groups_are_joined_unnested(tmp_path):
    """Hidden 64: q has 64 blocks, a quarter of a group: the scales are joined un-nested."""
    quantized = bnb_tensors(split_tensors(tensors_of(SMALL), SMALL), nested=True)
    with open_base(write(tmp_path / "a", quantized)) as base:
        parts = [base._read_part(key) for key in base.keys("single_blocks.0.linear1.weight")]
        joined = base.read_stored("single_blocks.0.linear1.weight")
    assert all(part.nested_absmax is not None for part in parts)
    assert joined.nested_absmax is None and joined.absmax.dtype == torch.float32
    assert torch.equal(nf4_dequantize(joined), torch.cat([nf4_dequantize(part) for part in parts]))


@pytest.mark.parametrize(
    "kind, blocksize, nested",
    [("fp4", 64, False), ("fp4", 128, True), ("nf4", 128, True), ("nf4", 256, False)],
)
def test_other_4_bit_forms(tmp_path, tensors, kind, blocksize, nested):
    """NF4 with larger blocks stays quantized, each scale repeated; FP4 is dequantized."""
    with open_base(write(tmp_path / "a", bnb_tensors(tensors, nested, kind, blocksize))) as base:
        assert isinstance(base.read_stored(WEIGHT), NF4Tensor) is (kind == "nf4")
        assert base.storage == ("nf4" if kind == "nf4" else None)
        dense = base.read(WEIGHT)
    _, theirs = bnb_both_ways(tensors[WEIGHT], nested, kind, blocksize)
    torch.testing.assert_close(dense, theirs, rtol=0, atol=1e-6)


STATE = "quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "key, value",
    [
        ("absmax", torch.zeros(5)),
        ("absmax", None),
        ("quant_map", torch.zeros(15)),
        ("nested_absmax", torch.zeros(1)),
        ("nested_quant_map", torch.zeros(256, dtype=torch.float16)),
        (STATE, torch.zeros(9)),
        *[(STATE, text) for text in (b"{}", b"\xff{", b"[]", b"3", b'"a"', b"null")],
        *[(STATE, {"shape": size}) for size in ([256, 1024], [1024, 257], [2**62] * 2)],
        *[(STATE, {"shape": size}) for size in ("ab", [-4, 8])],
        *[(STATE, {"blocksize": size}) for size in (0, 3, "64")],
        *[(STATE, {key: -1}) for key in ("nested_blocksize", "quant_type")],
        (STATE, {"nested_offset": "nan"}),
        (STATE, {"quant_type": "fp4"}),
    ],
)
def test_an_inconsistent_bnb_state(tmp_path, nested, key, value):
    quantized = dict(nested)
    name = f"{WEIGHT}.{key}"
    if isinstance(value, dict):
        state = json.loads(bytes(quantized[name].tolist())) | value
        value = json.dumps(state).encode()
    if isinstance(value, bytes):
        value = torch.tensor(list(value), dtype=torch.uint8)
    quantized[name] = value
    file = write(tmp_path / "a", {k: v for k, v in quantized.items() if v is not None})
    with pytest.raises(ConfigError, match=re.escape(MATRIX)) as error:
        load(file)
    assert name in error.value.message or WEIGHT in error.value.message


# ---------------------------------------------------------------- GGUF


EXACT = ("F32", "BF16", "F16")  # hold all (F16: nearly all) that bf16 does
# kind -> largest relative error of the output; K types hold random codes here
GGUF_ERROR = {"F16": 1e-4, "BF16": 0.0, "F32": 0.0, "Q8_0": 0.02, "Q5_1": 0.15, "Q5_0": 0.15}
GGUF_ERROR |= {"Q4_1": 0.25, "Q4_0": 0.25}


@pytest.mark.grid(3)
@pytest.mark.parametrize("kind", [*GGUF_ERROR, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_gguf(tmp_path, tensors, kind):
    """The model equals what gguf dequantizes; for types that gguf writes, nearly the dense one."""
    file = tmp_path / "flux.safetensors"  # detected by its content
    dense = write_gguf(file, tensors, kind)
    model = load(file)
    assert model.spec == WIDE
    same_output(model, of_dense(dense))
    if kind in GGUF_ERROR:
        error, most = error_of(model, of_dense(tensors)), GGUF_ERROR[kind]
        assert error <= most and (error > most / 50 or kind in EXACT)
    if kind == "Q8_0":  # tensor by tensor into the storage asked for
        same_output(load(file, "nf4"), of_dense(dense, "nf4"))


def test_an_unsupported_gguf_type(tmp_path, tensors):
    import gguf

    kind = gguf.GGMLQuantizationType.IQ4_XS
    block = np.zeros((1024, 136), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    for name, tensor in tensors.items():
        if name == WEIGHT:
            writer.add_tensor(name, block, raw_shape=block.shape, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.float().numpy())
    checkpoints.finish_gguf(writer)
    with pytest.raises(ConfigError, match="IQ4_XS"):
        load(tmp_path / "a.gguf")


# ---------------------------------------------------------------- what is read, and how


def test_a_prequantized_file_is_mapped(tmp_path, tensors):
    """On a CPU a prequantized file is mapped, not copied."""
    file = write(tmp_path / "mapped.safetensors", bnb_tensors(tensors, nested=False))
    model = load(file, "auto")
    lines = [li for li in Path("/proc/self/maps").read_text().splitlines() if file.name in li]
    spans = [[int(part, 16) for part in line.split()[0].split("-")] for line in lines]
    start, end = min(span[0] for span in spans), max(span[1] for span in spans)
    assert start <= model.get_submodule(MATRIX).packed.data_ptr() < end


# ---------------------------------------------------------------- numbers that are none


def to(dtype: torch.dtype):
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


e5m2 = partial(fp8_tensors, scaled=False, dtype=torch.float8_e5m2)
# the form, the tensor in which one value is changed, that value (an int: a byte)
NOT_FINITE = {
    "bf16": (dict, "weight", torch.nan),
    "fp16": (to(torch.float16), "weight", torch.inf),
    "fp32": (to(torch.float32), "weight", -torch.inf),
    "bias": (dict, "bias", torch.nan),
    "fp8": (partial(fp8_tensors, scaled=False), "weight", 0xFF),
    "e5m2": (e5m2, "weight", 0x7C),
    "fp8's scale": (partial(fp8_tensors, scaled=True), "scale_weight", torch.nan),
    "absmax": (partial(bnb_tensors, nested=False), "weight.absmax", torch.nan),
    "nested absmax": (partial(bnb_tensors, nested=True), "weight.nested_absmax", torch.inf),
}


@pytest.mark.parametrize("form", NOT_FINITE)
def test_nan_and_infinity_are_refused(tmp_path, tensors, form):
    make, name, value = NOT_FINITE[form]
    quantized = make(tensors)
    key = f"{MATRIX}.{name}"
    changed = quantized[key].clone().view(-1)
    view = changed.view(torch.uint8) if isinstance(value, int) else changed
    view[min(5, len(view) - 1)] = value
    file = write(tmp_path / "a", {**quantized, key: changed.view(quantized[key].shape)})
    named = key if name == "bias" else WEIGHT
    for read in (load, partial(quantize, target=tmp_path / "b", storage="nf4")):
        with pytest.raises(ConfigError, match=rf"{re.escape(named)} holds NaN or infinity"):
            read(file)
    assert [left.name for left in tmp_path.iterdir()] == ["a"]


def test_fp16_with_an_overflowing_sum_is_finite(tmp_path, tensors):
    large = torch.full_like(tensors[WEIGHT], 1.0).half()
    assert not large.sum().isfinite()
    with open_base(write(tmp_path / "a", {**tensors, WEIGHT: large})) as base:
        assert torch.equal(base.read(WEIGHT), large)


def test_quantized_files_are_not_checked_again(tmp_path, tensors, monkeypatch):
    """They were when they were written; a mapped file need not be read whole."""
    quantize(write(tmp_path / "a", tensors), tmp_path / "b", "nf4")
    monkeypatch.setattr(module, "_is_finite", lambda part: pytest.fail("looked through"))
    load(tmp_path / "b")
