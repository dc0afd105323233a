"""Detects a model by the names and shapes of its tensors: a FLUX.1 transformer in BFL's or
diffusers' names, under any known prefix, or another model that can be named.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fluxfast.errors import FluxfastError
from fluxfast.model.spec import DEV, SCHNELL, FluxSpec, rope_axes

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")

# the tensors that sizes are read from: (BFL's name, diffusers' name)
_SOURCES = {
    "marker": (
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "transformer_blocks.0.attn.norm_k.weight",
    ),
    "img_in": ("img_in.weight", "x_embedder.weight"),
    "txt_in": ("txt_in.weight", "context_embedder.weight"),
    "vector_in": ("vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight"),
    "guidance_in": ("guidance_in.", "time_text_embed.guidance_embedder."),
    "mlp": ("double_blocks.0.img_mlp.0.weight", "transformer_blocks.0.ff.net.0.proj.weight"),
    "out": ("final_layer.linear.weight", "proj_out.weight"),
    "doubles": ("double_blocks.", "transformer_blocks."),
    "singles": ("single_blocks.", "single_transformer_blocks."),
}
# an SD3 or Qwen-Image transformer has the marker in diffusers' naming too; FLUX has all of these
_ALL_OF = ("marker", "img_in", "txt_in", "vector_in")
_MOST_BLOCKS = 512  # of a kind; FLUX.1 has 19 and 38

# (model, strings): the first row of which every string is in some key names the model
_OTHERS = (
    ("ControlNet", ["controlnet_"]),
    ("ControlNet", ["input_hint_block."]),
    ("IP-Adapter", ["ip_adapter"]),
    ("FLUX.1 Redux adapter", ["redux_up."]),
    ("FLUX.2 transformer", ["double_stream_modulation_img."]),
    ("Chroma transformer", ["distilled_guidance_layer."]),
    ("Hunyuan Video transformer", ["individual_token_refiner."]),
    ("Qwen-Image transformer", ["transformer_blocks.0.img_mod."]),
    ("Stable Diffusion 3 transformer", ["joint_blocks.0."]),
    ("Stable Diffusion 3 transformer", ["transformer_blocks.0.ff_context.", "pos_embed."]),
    ("AuraFlow transformer", ["double_layers.0.", "single_layers.0."]),
    ("Lumina 2 or Z-Image transformer", ["noise_refiner.0.", "cap_embedder."]),
    ("Wan video transformer", ["blocks.0.self_attn.", "patch_embedding.", "text_embedding."]),
    ("HiDream transformer", ["double_stream_blocks.0."]),
    ("LTX-Video transformer", ["transformer_blocks.0.attn1.", "patchify_proj."]),
    ("PixArt transformer", ["adaln_single.", "caption_projection."]),
    ("Stable Diffusion XL checkpoint", ["input_blocks.0.", "label_emb."]),
    ("Stable Diffusion XL checkpoint", ["down_blocks.0.", "add_embedding."]),
    ("Stable Diffusion 1 or 2 checkpoint", ["input_blocks.0.", "output_blocks.0."]),
    ("Stable Diffusion UNet", ["down_blocks.0.", "up_blocks.0.", "time_embedding."]),
    ("T5 text encoder", ["block.0.layer.0.SelfAttention."]),
    ("T5 text encoder", ["enc.blk.0."]),
    ("CLIP text encoder", ["text_model.encoder.layers.0."]),
    ("CLIP text encoder", ["transformer.resblocks.0.", "text_projection"]),
    ("vision encoder", ["vision_model.encoder.layers.0."]),
    ("language model", ["layers.0.self_attn.q_proj.", "layers.0.mlp.gate_proj."]),
    ("VAE", ["decoder.up.0.", "encoder.down.0."]),
    ("VAE", ["decoder.up_blocks.0.", "encoder.down_blocks.0."]),
)
# end of a key that another quantizer keeps beside or instead of a matrix -> its name
_QUANTIZERS = {
    ".weight._data": "quanto",
    "._weight_qdata": "torchao",
    ".wscales": "Nunchaku (SVDQuant)",
    ".weight_proj_down": "SVDQuant",
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes LLM.int8",
    ".weight_scale_2": "nvfp4",
    ".weight_s_rel": "asym_w4a8",
    ".weight_packed": "compressed-tensors",
    ".svd_up": "SDNQ",
    ".W_q": "HQQ",
    "encoded_exponent": "DFloat11",
}
# in keys of models that otherwise have FLUX.1's names
_NEVER = re.compile(
    r"double_stream_modulation_img\.|distilled_guidance_layer\.|individual_token_refiner\."
    r"|controlnet_|input_hint_block\."
)
_LORA = re.compile(
    r"\.lora_[AB]|\.lora_(down|up)\.|_lora[12]?\.|\.lora(_linear_layer)?\.|\.lokr_|\.hada_|\.oft_"
)
_HINTS = {  # in the name of what was found -> what to do with it
    "LoRA": "a LoRA goes on top of a base model: lora.init_from, --lora, or `fluxfast inspect`",
    "CLIP|T5|VAE|AutoencoderKL": "text encoders and VAE go into model.encoders (--encoders)",
    "": "model.path wants FLUX.1-dev, FLUX.1-schnell or a fine-tune of either",
}


@dataclass(frozen=True)
class Naming:
    """How a file names its tensors. prefix: before every key; split: diffusers' names, with q, k, v
    and mlp apart; norm: BFL's name of q's and k's norms, `weight` in ComfyUI's files of 2026.
    """

    prefix: str
    split: bool
    norm: str = "scale"

    def key(self, part: str) -> str:
        bfl, diffusers = _SOURCES[part]
        return self.keys(bfl, [diffusers])[0]

    def keys(self, name: str, sources: list[str]) -> list[str]:
        """Returns the keys of the tensor of that BFL name. sources: its parts' diffusers names."""
        if not self.split:
            sources = [re.sub(r"(?<=_norm\.)scale$", self.norm, name)]
        return [self.prefix + source for source in sources]


def find_naming(keys: Iterable[str]) -> Naming | None:
    """Returns how a FLUX.1 transformer's tensors are named among `keys`, None if there is none."""
    keys = set(keys)
    if is_lora(keys) or any(map(_NEVER.search, keys)):
        return None
    for split, norm in ((False, "scale"), (False, "weight"), (True, "scale")):
        for prefix in PREFIXES:
            naming = Naming(prefix, split, norm)
            needed = _ALL_OF if split else ("marker",)
            if all(naming.key(part) in keys for part in needed):
                return naming
    return None


def bare(key: str) -> str:
    """Returns the key without a known prefix."""
    return next((key.removeprefix(p) for p in PREFIXES if p and key.startswith(p)), key)


def is_lora(keys: Iterable[str]) -> bool:
    """Returns whether the keys are a LoRA's. SVDQuant keeps low-rank parts in a base model."""
    keys = list(keys)
    return any(map(_LORA.search, keys)) and not any(key.endswith(".qweight") for key in keys)


def quantizer(keys: Iterable[str]) -> str | None:
    """Returns the name of a quantizer whose matrices are not read, None if no key is such a one."""
    keys = list(keys)
    return next((n for end, n in _QUANTIZERS.items() if any(k.endswith(end) for k in keys)), None)


def other_model(keys: Iterable[str], architecture: str | None = None) -> str | None:
    """Returns the name of the model that the keys belong to, None if it is not known.
    architecture: a GGUF file's own name for it.
    """
    keys = list(keys)
    if is_lora(keys):
        return "LoRA"
    for name, words in _OTHERS:
        if all(any(word in key for key in keys) for word in words):
            return name
    return f"GGUF of the architecture {architecture}" if architecture else None


def hint_for(name: str) -> str:
    """Returns what to do with a model of that name, which is no base."""
    return next(hint for pattern, hint in _HINTS.items() if re.search(pattern, name))


def count_blocks(keys: Iterable[str], prefix: str) -> int:
    """Returns how many different block indices follow `prefix`."""
    return len({key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)})


def read_spec(
    keys: Mapping[str, object], naming: Naming, shape: Callable[[str], tuple[int, ...] | None]
) -> FluxSpec:
    """Returns the model's sizes. shape(key): of a tensor as the model has it, None if missing.
    Raises FluxfastError naming the key that does not fit.
    """

    def size(part: str, dim: int) -> int:
        key, sizes = naming.key(part), shape(naming.key(part))
        if sizes is None or len(sizes) <= dim or sizes[dim] < 1:
            problem = "is missing" if sizes is None else f"has shape {sizes}"
            raise FluxfastError(f"{key} {problem}")
        return sizes[dim]

    hidden, head_dim = size("img_in", 0), size("marker", 0)
    guidance = any(key.startswith(naming.key("guidance_in")) for key in keys)
    in_channels, out_channels = size("img_in", 1), size("out", 0)
    spec = FluxSpec(
        in_channels=in_channels,
        vec_in_dim=size("vector_in", 1),
        context_in_dim=size("txt_in", 1),
        hidden_size=hidden,
        mlp_ratio=size("mlp", 0) / hidden,
        num_heads=hidden // head_dim,
        depth=count_blocks(keys, naming.key("doubles")),
        depth_single_blocks=count_blocks(keys, naming.key("singles")),
        axes_dim=rope_axes(head_dim),
        guidance_embed=guidance,
        text_length=(DEV if guidance else SCHNELL).text_length,
    )
    check_spec(spec, out_channels)
    return spec


def check_spec(spec: FluxSpec, out_channels: int) -> None:
    """Raises FluxfastError for a model that takes more channels than it returns, and for so many
    blocks that a table of them would be large.
    """
    if spec.in_channels != out_channels:
        raise FluxfastError(
            f"it takes {spec.in_channels} channels and returns {out_channels}: an inpainting or "
            "control variant of FLUX.1, which cannot be trained as text-to-image"
        )
    if max(spec.depth, spec.depth_single_blocks) > _MOST_BLOCKS:
        raise FluxfastError(
            f"it has {spec.depth} double and {spec.depth_single_blocks} single blocks"
        )


def model_name(spec: FluxSpec) -> str:
    """Returns a name for people: dev, schnell, or other sizes of either's kind."""
    for name, known in (("FLUX.1-dev", DEV), ("FLUX.1-schnell", SCHNELL)):
        if spec == known:
            return f"{name} or a fine-tune of it"
    kind = "dev" if spec.guidance_embed else "schnell"
    return f"a FLUX.1 of other sizes, {kind}'s kind"
