"""Writes small FLUX-shaped checkpoints in every form that is read, from one set of BFL tensors."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from small import random_tensor

from fluxfast.formats.base.reader import open_base
from fluxfast.model.names import part_rows, tensor_sources
from fluxfast.model.spec import FluxSpec, rope_axes

# hidden 256: ggml's K types take rows of 256, and q, k and v have 1024 blocks each, four groups
WIDE = FluxSpec(
    in_channels=64,
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=256,
    num_heads=4,
    depth=1,
    depth_single_blocks=1,
    axes_dim=rope_axes(64),
)
# hidden 96: nf4 takes K of 384 and no other
ODD = FluxSpec(
    in_channels=16,
    vec_in_dim=20,
    context_in_dim=24,
    hidden_size=96,
    num_heads=3,
    depth=1,
    depth_single_blocks=1,
    axes_dim=rope_axes(32),
)
PREFIX = "model.diffusion_model."


def tensors_of(spec: FluxSpec = WIDE, dtype=torch.bfloat16, seed: int = 0):
    """Returns the tensors of `random_flux` by BFL name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: random_tensor(name, spec, generator).to(dtype) for name in tensor_sources(spec)}


def split_tensors(tensors, spec: FluxSpec = WIDE):
    """Returns the same tensors in diffusers' names."""
    split = {}
    for name, sources in tensor_sources(spec).items():
        tensor, module = tensors[name], name.rpartition(".")[0]
        if "final_layer.adaLN_modulation" in name:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        rows = [(0, len(tensor))] if name.endswith(".scale") else part_rows(module, spec)
        parts = [tensor[start:end].clone() for start, end in rows]
        split |= dict(zip(sources, parts, strict=True))
    return split


def config_of(spec: FluxSpec = WIDE) -> dict:
    return {
        "in_channels": spec.in_channels,
        "num_layers": spec.depth,
        "num_single_layers": spec.depth_single_blocks,
        "attention_head_dim": spec.head_dim,
        "num_attention_heads": spec.num_heads,
        "joint_attention_dim": spec.context_in_dim,
        "pooled_projection_dim": spec.vec_in_dim,
        "guidance_embeds": spec.guidance_embed,
        "axes_dims_rope": list(spec.axes_dim),
    }


def write_diffusers(folder: Path, tensors, spec: FluxSpec = WIDE) -> Path:
    """Saves with diffusers itself."""
    from diffusers import FluxTransformer2DModel

    dtype = next(iter(tensors.values())).dtype
    model = FluxTransformer2DModel(**config_of(spec)).to(dtype)
    model.load_state_dict(split_tensors(tensors, spec), strict=True)
    model.save_pretrained(folder)
    return folder


def write_diffusers_nf4(folder: Path, source: Path, nested: bool, monkeypatch, **options) -> Path:
    """Saves with diffusers through bitsandbytes on the CPU."""
    from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(
        BnB4BitDiffusersQuantizer, "validate_environment", lambda self, *args, **named: None
    )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = FluxTransformer2DModel.from_pretrained(
        source, quantization_config=config, torch_dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(folder, **options)
    return folder


def bnb_tensors(tensors, nested: bool, kind: str = "nf4", blocksize: int = 64, skip=()):
    """Returns every matrix (but `skip`) in bitsandbytes' form, as lllyasviel's files have it."""
    import bitsandbytes.functional as bnb

    out = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or any(word in name for word in skip):
            out[name] = tensor
            continue
        packed, state = bnb.quantize_4bit(
            tensor, quant_type=kind, blocksize=blocksize, compress_statistics=nested
        )
        out[name] = packed
        out |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    return out


def bnb_both_ways(matrix, nested: bool, kind: str = "nf4", blocksize: int = 64):
    """Returns what bitsandbytes makes: the packed bytes, and the fp32 matrix that they mean."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        matrix, quant_type=kind, blocksize=blocksize, compress_statistics=nested
    )
    state.dtype = torch.float32
    return packed, bnb.dequantize_4bit(packed, state)


def fp8_tensors(tensors, scaled: bool, dtype=torch.float8_e4m3fn):
    """Returns ComfyUI's fp8: every tensor plain, or matrices with one scale each and a marker."""
    out = {}
    for name, tensor in tensors.items():
        if not scaled:
            out[name] = tensor.to(dtype)
        elif tensor.ndim == 2:
            scale = tensor.float().abs().max() / torch.finfo(dtype).max
            out[name] = (tensor.float() / scale).to(dtype)
            out[name.removesuffix("weight") + "scale_weight"] = scale
            out[name.removesuffix("weight") + "scale_input"] = torch.tensor(1.0)
        else:
            out[name] = tensor
    return out | ({"scaled_fp8": torch.zeros(2, dtype=dtype)} if scaled else {})


def all_in_one(tensors):
    """Returns ComfyUI's all-in-one file: the transformer under its prefix beside other networks."""
    others = {
        "vae.decoder.up.0.block.0.conv1.weight": torch.zeros(3),
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (
            torch.zeros(2, 2).to(torch.float8_e4m3fn)
        ),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.bias": torch.zeros(2),
    }
    return {PREFIX + name: tensor for name, tensor in tensors.items()} | others


def write_gguf(path: Path, tensors, kind: str) -> dict[str, torch.Tensor]:
    """Writes with the gguf package, as city96's converter does: matrices in `kind`, vectors in F32.
    Returns the tensors that gguf itself dequantizes."""
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
        data = _gguf_blocks(values, type_)
        shape = data.shape if data.dtype == np.uint8 else None
        writer.add_tensor(name, data, raw_shape=shape, raw_dtype=type_)
        dense[name] = torch.from_numpy(gguf.quants.dequantize(data, type_).copy())
        dense[name] = dense[name].view(values.shape)
    finish_gguf(writer)
    return dense


def finish_gguf(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_blocks(values: np.ndarray, quant) -> np.ndarray:
    """gguf cannot quantize to K types, so these get random codes with sane scales."""
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


def write(path: Path, tensors, metadata=None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def write_header(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """Writes a raw safetensors file. header: JSON or bytes; length: in the file's first 8 bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def spec_of(path: Path) -> FluxSpec:
    """Opens a base checkpoint and returns its sizes."""
    with open_base(path) as base:
        return base.spec
