"""Base checkpoints as other tools write them: the same model as its dense tensors make, exactly, or
within what the file's own numbers hold."""

import re
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import PREFIX, WIDE, all_in_one, bnb_tensors, fp8_tensors, tensors_of, write
from fluxfast_kernels.quant.nf4 import NF4Tensor
from fluxfast_kernels.quant.rows import Rows
from safetensors.torch import load_file

from fluxfast import load_transformer
from fluxfast.errors import ConfigError
from fluxfast.formats.base.reader import open_base
from fluxfast.model.flux import Flux
from fluxfast.model.init import fill
from fluxfast.model.precision import layer_precisions
from fluxfast.model.spec import FluxSpec

MATRIX = "double_blocks.0.img_mlp.0"
FUSED = ("double_blocks.0.txt_attn.qkv", "single_blocks.0.linear1")


@pytest.fixture(scope="module")
def tensors():
    return tensors_of()


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory, tensors) -> Path:
    return checkpoints.write_diffusers(tmp_path_factory.mktemp("d") / "model", tensors)


def load(path: Path, storage: str = "fp32", **options) -> Flux:
    return load_transformer(path, storage=storage, compute="fp32", device="cpu", **options)


def of_dense(tensors, storage: str = "fp32", spec: FluxSpec = WIDE) -> Flux:
    """The model of dense tensors: fluxfast alone, no file."""
    model = Flux(spec)
    fill(model, tensors.__getitem__, layer_precisions(spec, storage, "fp32"))
    return model


def output(model: Flux) -> torch.Tensor:
    spec, draw = model.spec, torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    with torch.no_grad():
        return model(
            normal(1, 6, spec.in_channels),
            torch.zeros(1, 6, 3),
            normal(1, 4, spec.context_in_dim),
            torch.zeros(1, 4, 3),
            torch.tensor([0.6]),
            normal(1, spec.vec_in_dim),
            torch.tensor([3.5]) if spec.guidance_embed else None,
        )


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
    """By content: the file's own name says something else."""
    named = checkpoints.split_tensors(tensors) if split else tensors
    file = write(tmp_path / "sdxl.ckpt", {prefix + k: v for k, v in named.items()})
    same_output(load(file), of_dense(tensors))


def test_what_diffusers_writes(tensors, diffusers_folder):
    same_output(load(diffusers_folder), of_dense(tensors))
    (file,) = diffusers_folder.glob("*.safetensors")
    same_output(load(file), of_dense(tensors))


@pytest.mark.parametrize("depths, guidance", [((1, 1), False), ((3, 2), True), ((2, 5), False)])
def test_schnell_and_other_depths(tmp_path, depths, guidance):
    spec = FluxSpec(
        in_channels=16, vec_in_dim=20, context_in_dim=24, hidden_size=64, num_heads=2,
        depth=depths[0], depth_single_blocks=depths[1], axes_dim=(4, 14, 14),
        guidance_embed=guidance, text_length=512 if guidance else 256,
    )  # fmt: skip
    tensors = tensors_of(spec)
    for split in (False, True):
        named = checkpoints.split_tensors(tensors, spec) if split else tensors
        with open_base(write(tmp_path / f"{split}.safetensors", named)) as base:
            assert base.spec == spec
        same_output(load(tmp_path / f"{split}.safetensors"), of_dense(tensors, spec=spec))


# ---------------------------------------------------------------- fp8


# relative, of the output: a few times half a unit in the last place
FP8_ERROR = {torch.float8_e4m3fn: 0.15, torch.float8_e5m2: 0.3}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layout", ["bare", "all in one", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_comfyui_fp8(tmp_path, tensors, scaled, layout, dtype):
    """Exactly what codes times scale are; near the dense model, as e4m3 keeps 3 bits, e5m2 2."""
    coded = fp8_tensors(tensors, scaled, dtype)
    dense = {}
    for name in tensors:
        scale = coded.get(name.removesuffix("weight") + "scale_weight", torch.tensor(1.0))
        value = coded[name]
        dense[name] = value.float() * scale if name.endswith("weight") else value.float()
    if layout == "diffusers":
        scales = {k: v for k, v in coded.items() if k not in tensors}
        named = checkpoints.split_tensors({k: coded[k] for k in tensors})
        if scales:  # each part brings the scale of what it was cut from
            sources = checkpoints.tensor_sources(WIDE)
            for name in tensors:
                key = name.removesuffix("weight") + "scale_weight"
                for source in sources[name] if key in scales else ():
                    named[source.removesuffix("weight") + "scale_weight"] = scales[key].clone()
        file = write(tmp_path / "a.safetensors", named)
    else:
        file = write(tmp_path / "a", all_in_one(coded) if layout == "all in one" else coded)
    model = load(file)
    same_output(model, of_dense(dense))
    assert 1e-3 < error_of(model, of_dense(tensors)) < FP8_ERROR[dtype]


def test_newer_names_of_the_scale(tmp_path, tensors):
    coded = fp8_tensors(tensors, scaled=True)
    newer = {k.replace(".scale_weight", ".weight_scale"): v for k, v in coded.items()}
    assert newer.keys() != coded.keys()
    same_output(load(write(tmp_path / "b", newer)), load(write(tmp_path / "a", coded)))


def test_fp8_codes_stay_as_they_are(tmp_path, tensors):
    coded = fp8_tensors(tensors, scaled=True)
    model = load(write(tmp_path / "a", all_in_one(coded)), "fp8")
    layer = model.get_submodule(MATRIX)
    assert layer.storage() == "fp8"
    assert torch.equal(layer.codes.view(torch.uint8), coded[f"{MATRIX}.weight"].view(torch.uint8))
    assert torch.equal(layer.row_scale, coded[f"{MATRIX}.scale_weight"].expand(1024))
    same_output(model, of_dense({k: _decoded(coded, k) for k in tensors}, "fp32"))


def _decoded(coded, name: str) -> torch.Tensor:
    """In fp32 inside the blocks; around them storage fp8 keeps bf16."""
    scale = coded.get(name.removesuffix("weight") + "scale_weight", torch.tensor(1.0))
    value = coded[name].float() * scale
    outer = "_blocks." not in name and value.ndim == 2
    return value.bfloat16().float() if outer else value


# ---------------------------------------------------------------- bitsandbytes


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("layout", ["bare", "all in one"])
def test_nf4_in_bfl_names(tmp_path, tensors, nested, layout):
    """lllyasviel's v1 (nested) and v2 (plain): the packed bytes and scales go straight in."""
    import bitsandbytes.functional as bnb

    coded = bnb_tensors(tensors, nested)
    file = write(tmp_path / "a", all_in_one(coded) if layout == "all in one" else coded)
    model = load(file, "auto")
    for name in (MATRIX, *FUSED):
        layer = model.get_submodule(name)
        assert layer.storage() == "nf4"
        assert torch.equal(layer.packed, coded[f"{name}.weight"])
        assert torch.equal(layer.absmax, coded[f"{name}.weight.absmax"])
        assert (layer.nested_absmax is not None) is nested
        _, state = bnb.quantize_4bit(
            tensors[f"{name}.weight"], quant_type="nf4", blocksize=64, compress_statistics=nested
        )
        state.dtype = torch.float32
        theirs = bnb.dequantize_4bit(coded[f"{name}.weight"], state)
        # the offset they add is the file's float64, ours fp32
        torch.testing.assert_close(layer.dequantize(torch.float32), theirs, rtol=0, atol=1e-6)
    same_output(model, of_dense({name: _dense_of(file, name) for name in tensors}))
    assert 0.02 < error_of(model, of_dense(tensors)) < 0.25


def _dense_of(file: Path, name: str) -> torch.Tensor:
    """What the file decodes to, rounded to bf16 around the blocks, as storage nf4 keeps it."""
    with open_base(file) as base:
        value = base.read(name).clone()
    outer = "_blocks." not in name and value.ndim == 2
    return value.bfloat16().float() if outer else value


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_nf4_that_diffusers_saved(
    tmp_path, tensors, diffusers_folder, monkeypatch, nested, sharded
):
    """q, k, v and mlp are joined with their scales, byte for byte, wherever the shards cut."""
    options = {"max_shard_size": "300KB"} if sharded else {}
    folder = checkpoints.write_diffusers_nf4(
        tmp_path / "q", diffusers_folder, nested, monkeypatch, **options
    )
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 3) is sharded
    stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
    model = load(folder, "auto")
    for name in FUSED:
        layer = model.get_submodule(name)
        parts = checkpoints.tensor_sources(WIDE)[f"{name}.weight"]
        assert len(parts) in (3, 4) and layer.storage() == "nf4"
        assert torch.equal(layer.packed, torch.cat([stored[part] for part in parts]))
        absmax = torch.cat([stored[f"{part}.absmax"] for part in parts])
        assert torch.equal(layer.absmax, absmax)
        assert absmax.dtype == (torch.uint8 if nested else torch.float32)
        if nested:
            groups = torch.cat([stored[f"{part}.nested_absmax"] for part in parts])
            assert torch.equal(layer.nested_absmax, groups)
            assert layer.offset.numel() == groups.numel() and len(set(layer.offset.tolist())) > 1
    same_output(model, of_dense({name: _dense_of(folder, name) for name in tensors}))


@pytest.mark.parametrize("nested", [False, True])
def test_diffusers_computes_the_same_from_its_nf4(tmp_path, diffusers_folder, monkeypatch, nested):
    """Its own output from its own file, which rounds every decoded matrix to bf16 first."""
    from diffusers import FluxTransformer2DModel

    folder = checkpoints.write_diffusers_nf4(tmp_path / "q", diffusers_folder, nested, monkeypatch)
    theirs = FluxTransformer2DModel.from_pretrained(folder, device_map={"": "cpu"})
    dense = {}
    for name, module in theirs.named_modules():
        if hasattr(module, "weight") and hasattr(module.weight, "quant_state"):
            import bitsandbytes.functional as bnb

            dense[f"{name}.weight"] = bnb.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
    with open_base(folder) as base:
        for name, sources in checkpoints.tensor_sources(WIDE).items():
            if name.endswith(".weight") and "final_layer.adaLN" not in name:
                joined = torch.cat([dense[source] for source in sources])
                mine = base.read(name)
                assert joined.dtype == torch.bfloat16
                # one rounding to 8 bits of mantissa
                torch.testing.assert_close(mine, joined.float(), rtol=2**-8, atol=1e-7)


def test_parts_whose_groups_do_not_fill_up(tmp_path):
    """Hidden 64: q has 64 blocks, a quarter of a group: the scales are joined un-nested."""
    from small import SMALL

    tensors = tensors_of(SMALL)
    coded = bnb_tensors(checkpoints.split_tensors(tensors, SMALL), nested=True)
    file = write(tmp_path / "a", coded)
    with open_base(file) as base:
        parts = [base._read_part(key) for key in base.keys("single_blocks.0.linear1.weight")]
        joined = base.read_stored("single_blocks.0.linear1.weight")
    assert all(part.nested_absmax is not None for part in parts)
    assert joined.nested_absmax is None and joined.absmax.dtype == torch.float32
    from fluxfast_kernels import nf4_decode

    assert torch.equal(nf4_decode(joined), torch.cat([nf4_decode(part) for part in parts]))


def test_layers_that_were_left_dense(tmp_path, tensors):
    """v2 files keep some: they are quantized here, the others stay."""
    coded = bnb_tensors(tensors, nested=False, skip=("single_blocks.0",))
    model = load(write(tmp_path / "a", coded), "auto")
    layer = model.single_blocks[0].linear1
    assert layer.storage() == "nf4"
    packed = bnb_tensors({"x": tensors["single_blocks.0.linear1.weight"]}, nested=False)["x"]
    assert torch.equal(layer.packed, packed)


@pytest.mark.parametrize("kind, blocksize", [("fp4", 64), ("nf4", 128), ("nf4", 256), ("fp4", 128)])
@pytest.mark.parametrize("nested", [False, True])
def test_other_4_bit_forms(tmp_path, tensors, kind, blocksize, nested):
    """NF4 with larger blocks stays in its codes, each scale repeated; FP4 is decoded."""
    import bitsandbytes.functional as bnb

    file = write(tmp_path / "a", bnb_tensors(tensors, nested, kind, blocksize))
    name = f"{MATRIX}.weight"
    packed, state = bnb.quantize_4bit(
        tensors[name], quant_type=kind, blocksize=blocksize, compress_statistics=nested
    )
    state.dtype = torch.float32
    with open_base(file) as base:
        kept, dense = base.read_stored(name), base.read(name)
        assert base.storage == ("nf4" if kind == "nf4" else None)
    assert isinstance(kept, NF4Tensor) is (kind == "nf4")
    theirs = bnb.dequantize_4bit(packed, state)
    torch.testing.assert_close(dense, theirs, rtol=0, atol=1e-6)


def test_nf4_in_another_storage(tmp_path, tensors):
    """Decoded and kept as asked."""
    file = write(tmp_path / "a", bnb_tensors(tensors, nested=True))
    with open_base(file) as base:
        dense = base.read(f"{MATRIX}.weight")
    for storage in ("fp32", "bf16", "int8", "fp8"):
        layer = load(file, storage).get_submodule(MATRIX)
        assert layer.storage() == storage
    assert torch.equal(load(file, "bf16").get_submodule(MATRIX).weight, dense.bfloat16())


@pytest.mark.parametrize(
    "key, value",
    [
        ("absmax", torch.zeros(5)),
        ("absmax", None),
        ("quant_map", torch.zeros(15)),
        ("quant_state.bitsandbytes__nf4", torch.tensor(list(b"{}"), dtype=torch.uint8)),
        ("quant_state.bitsandbytes__nf4", torch.tensor(list(b"\xff{"), dtype=torch.uint8)),
        ("quant_state.bitsandbytes__nf4", torch.zeros(9)),
        ("nested_absmax", torch.zeros(1)),
        ("nested_quant_map", torch.zeros(256, dtype=torch.float16)),
    ],
)
def test_a_state_that_does_not_fit(tmp_path, tensors, key, value):
    coded = bnb_tensors(tensors, nested=True)
    name = f"{MATRIX}.weight.{key}"
    if value is None:
        del coded[name]
    else:
        coded[name] = value
    with pytest.raises(ConfigError, match=re.escape(name)):
        load(write(tmp_path / "a", coded))


@pytest.mark.parametrize(
    "changes",
    [{"shape": [256, 1024]}, {"shape": [1024, 257]}, {"shape": [2**62, 2**62]}, {"shape": "ab"},
     {"shape": [-4, 8]}, {"blocksize": 0}, {"blocksize": 3}, {"blocksize": "64"},
     {"nested_offset": "nan"}, {"nested_blocksize": -1}, {"quant_type": "fp4"}],
)  # fmt: skip
def test_a_state_that_says_something_else(tmp_path, tensors, changes):
    import json

    coded = bnb_tensors(tensors, nested=True)
    name = f"{MATRIX}.weight.quant_state.bitsandbytes__nf4"
    said = json.loads(bytes(coded[name].tolist())) | changes
    coded[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    with pytest.raises(ConfigError, match=re.escape(MATRIX)):
        load(write(tmp_path / "a", coded))


@pytest.mark.parametrize("text", ["[]", "3", '"a"', "null"])
def test_a_state_that_is_no_object(tmp_path, tensors, text):
    coded = bnb_tensors(tensors, nested=False)
    name = f"{MATRIX}.weight.quant_state.bitsandbytes__nf4"
    coded[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(ConfigError, match=re.escape(MATRIX)):
        load(write(tmp_path / "a", coded))


# ---------------------------------------------------------------- GGUF


def write_gguf(path: Path, tensors, kind: str) -> dict[str, torch.Tensor]:
    """By gguf's own writer, as city96's converter does: matrices in `kind`, vectors in F32. ->
    what each tensor decodes to, by gguf."""
    import gguf

    quant = gguf.GGMLQuantizationType[kind]
    writer, dense = gguf.GGUFWriter(path, "flux"), {}
    writer.add_string("general.name", "a test")
    writer.add_array("a.list", ["one", "two"])
    writer.add_array("numbers", [1, 2, 3])
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
            dense[name] = tensor.float()
            continue
        # rows that are no multiple of the type's block stay F16, as llama.cpp's quantizer has it
        fits = values.shape[1] % gguf.GGML_QUANT_SIZES[quant][0] == 0
        type_ = quant if fits else gguf.GGMLQuantizationType.F16
        data = _blocks(values, type_)
        shape = data.shape if data.dtype == np.uint8 else None
        writer.add_tensor(name, data, raw_shape=shape, raw_dtype=type_)
        dense[name] = torch.from_numpy(gguf.quants.dequantize(data, type_).copy())
        dense[name] = dense[name].view(values.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


def _blocks(values: np.ndarray, quant) -> np.ndarray:
    """gguf quantizes to the plain types; to the K types it cannot, so these hold random codes with
    sane scales, which decode to something all the same."""
    import gguf

    try:
        return gguf.quants.quantize(values, quant)
    except NotImplementedError:
        pass
    block, size = gguf.GGML_QUANT_SIZES[quant]
    count = values.size // block
    data = np.random.default_rng(0).integers(0, 256, (count, size), dtype=np.uint8)
    scale = np.full(count, 2e-4, np.float16).view(np.uint8).reshape(count, 2)
    at = {"Q6_K": [size - 2], "Q3_K": [size - 2], "Q2_K": [size - 4, size - 2]}
    for start in at.get(quant.name, [0, 2]):
        data[:, start : start + 2] = scale
    return data.reshape(values.shape[0], -1)


EXACT = ("F32", "BF16", "F16")  # hold all (F16: nearly all) that bf16 does
PLAIN = {"F16": 1e-4, "BF16": 0.0, "F32": 0.0, "Q8_0": 0.02, "Q5_1": 0.15, "Q5_0": 0.15,
         "Q4_1": 0.25, "Q4_0": 0.25}  # fmt: skip


@pytest.mark.parametrize("kind", [*PLAIN, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_gguf(tmp_path, tensors, kind):
    """Exactly what gguf itself decodes; for the types that it writes, near the dense model too."""
    file = tmp_path / "flux.safetensors"  # told by its content
    dense = write_gguf(file, tensors, kind)
    model = load(file)
    assert model.spec == WIDE
    same_output(model, of_dense(dense))
    if kind in PLAIN:
        error = error_of(model, of_dense(tensors))
        assert error <= PLAIN[kind] and (error > PLAIN[kind] / 50 or kind in EXACT)


def test_gguf_in_nf4(tmp_path, tensors):
    """Tensor by tensor into the storage asked for."""
    dense = write_gguf(tmp_path / "a.gguf", tensors, "Q8_0")
    same_output(load(tmp_path / "a.gguf", "nf4"), of_dense(dense, "nf4"))


def test_a_gguf_type_that_is_not_read(tmp_path, tensors):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if name == f"{MATRIX}.weight":
            data = np.zeros((1024, 136), np.uint8)
            writer.add_tensor(name, data, raw_shape=data.shape,
                              raw_dtype=gguf.GGMLQuantizationType.IQ4_XS)  # fmt: skip
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="IQ4_XS"):
        load(tmp_path / "a.gguf")


# ---------------------------------------------------------------- what is kept, and where


def test_codes_stay_in_the_file(tmp_path, tensors):
    """On a CPU a prequantized file is mapped, not copied."""
    file = write(tmp_path / "mapped.safetensors", bnb_tensors(tensors, nested=False))
    model = load(file, "auto")
    assert file.name in Path("/proc/self/maps").read_text()
    start, end = _span(file.name)
    assert start <= model.get_submodule(MATRIX).packed.data_ptr() < end


def _span(name: str) -> tuple[int, int]:
    lines = [li for li in Path("/proc/self/maps").read_text().splitlines() if name in li]
    spans = [[int(part, 16) for part in line.split()[0].split("-")] for line in lines]
    return min(span[0] for span in spans), max(span[1] for span in spans)


@pytest.mark.parametrize("keep", ["nf4", "fp8"])
def test_kept_and_dense_reading_agree(tmp_path, tensors, keep):
    coded = bnb_tensors(tensors, True) if keep == "nf4" else fp8_tensors(tensors, True)
    with open_base(write(tmp_path / "a", coded)) as base:
        for name in tensors:
            kept, dense = base.read_stored(name), base.read(name)
            assert isinstance(dense, torch.Tensor) and dense.shape == tensors[name].shape
            if keep == "fp8" and isinstance(kept, Rows):
                assert torch.equal(kept.codes.float() * kept.scale[:, None], dense)


# ---------------------------------------------------------------- numbers that are none

BIAS = f"{MATRIX}.bias"


def with_one(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[5] = value
    return changed


def nan_code(tensor: torch.Tensor, code: int) -> torch.Tensor:
    return with_one(tensor.view(torch.uint8), code).view(tensor.dtype)


NOT_FINITE = {
    "bf16": (lambda t: t, f"{MATRIX}.weight", lambda x: with_one(x, torch.nan)),
    "fp16": (lambda t: {k: v.half() for k, v in t.items()}, f"{MATRIX}.weight",
             lambda x: with_one(x, torch.inf)),
    "fp32": (lambda t: {k: v.float() for k, v in t.items()}, f"{MATRIX}.weight",
             lambda x: with_one(x, -torch.inf)),
    "bias": (lambda t: t, BIAS, lambda x: with_one(x, torch.nan)),
    "fp8": (lambda t: fp8_tensors(t, False), f"{MATRIX}.weight", lambda x: nan_code(x, 0xFF)),
    "e5m2": (lambda t: fp8_tensors(t, False, torch.float8_e5m2), f"{MATRIX}.weight",
             lambda x: nan_code(x, 0x7C)),
    "fp8's scale": (lambda t: fp8_tensors(t, True), f"{MATRIX}.scale_weight",
                    lambda x: torch.tensor(torch.nan)),
    "absmax": (lambda t: bnb_tensors(t, False), f"{MATRIX}.weight.absmax",
               lambda x: with_one(x, torch.nan)),
    "nested absmax": (lambda t: bnb_tensors(t, True), f"{MATRIX}.weight.nested_absmax",
                      lambda x: with_one(x, torch.inf)),
}  # fmt: skip


@pytest.mark.parametrize("storage", ["nf4", "fp8", "bf16"])
@pytest.mark.parametrize("form", NOT_FINITE)
def test_nan_and_infinity_are_named(tmp_path, tensors, form, storage):
    from fluxfast.formats.base.quantize import quantize

    make, key, change = NOT_FINITE[form]
    coded = make(tensors)
    file = write(tmp_path / "a", {**coded, key: change(coded[key])})
    name = BIAS if key == BIAS else f"{MATRIX}.weight"
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} holds NaN or infinity"):
        load(file, storage)
    if storage != "bf16":
        with pytest.raises(ConfigError, match="NaN or infinity"):
            quantize(file, tmp_path / "b", storage)
        assert [left.name for left in tmp_path.iterdir()] == ["a"]


def test_fp16_whose_sum_overflows_is_finite(tmp_path, tensors):
    large = torch.full_like(tensors[f"{MATRIX}.weight"], 1.0).half()
    assert not large.sum().isfinite()
    with open_base(write(tmp_path / "a", {**tensors, f"{MATRIX}.weight": large})) as base:
        assert torch.equal(base.read(f"{MATRIX}.weight"), large)


def test_what_was_quantized_is_not_looked_through_again(tmp_path, tensors, monkeypatch):
    """It was when it was written; a mapped file is not read whole to start from it."""
    from fluxfast.formats.base import reader as module
    from fluxfast.formats.base.quantize import quantize

    quantize(write(tmp_path / "a", tensors), tmp_path / "b", "nf4")
    monkeypatch.setattr(module, "_is_finite", lambda part: pytest.fail("looked through"))
    load(tmp_path / "b")


def test_a_scale_that_is_missing_beside_the_marker(tmp_path, tensors):
    """Codes without their scale would be weights a thousand times too large."""
    coded = fp8_tensors(tensors, True)
    del coded[f"{MATRIX}.scale_weight"]
    with pytest.raises(ConfigError, match=f"{MATRIX}.weight has no scale_weight"):
        load(write(tmp_path / "a", coded))
    with pytest.raises(ConfigError, match=f"{MATRIX}.weight has no scale_weight"):
        load(write(tmp_path / "b", all_in_one(coded)))
    beside = {f"text_encoders.t5xxl.transformer.{k}": coded[k] for k in ("scaled_fp8",)}
    load(write(tmp_path / "c", all_in_one(fp8_tensors(tensors, False)) | beside))
