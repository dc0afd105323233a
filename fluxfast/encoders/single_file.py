"""CLIP-L, T5 and VAE out of single files: their sizes are read from the tensors' shapes, what no
shape tells is FLUX.1's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fluxfast.encoders.quiet import quiet
from fluxfast.errors import ConfigError
from fluxfast.formats.parts import NAMES, Part, read_part

# of FLUX.1's vae/config.json and text_encoder/config.json
_VAE_SCALE, _VAE_SHIFT, _VAE_GROUPS = 0.3611, 0.1159, 32
_CLIP_HEAD_DIM = 64


def load_part(part: Part, dtype: torch.dtype):
    """-> the transformers or diffusers module in `dtype`, for evaluation, on the CPU.

    Raises ConfigError where the file lacks tensors, or has them in shapes that do not fit.
    """
    tensors = read_part(part)
    load = {"text_encoder": _clip, "text_encoder_2": _t5, "vae": _vae}[part.component]
    try:
        model = load(tensors, dtype)
    except _Lacks as error:
        raise ConfigError(
            f"{part.file}: its {NAMES[part.component]} is not complete: {error}",
            hint="download the file again, or give a diffusers folder as model.encoders",
        ) from None
    return model.eval().requires_grad_(False)


class _Lacks(Exception):
    """Tensors are missing or of other shapes; says which."""


def _shape(tensors: dict[str, Tensor], key: str) -> torch.Size:
    if key not in tensors:
        raise _Lacks(f"no {key}")
    return tensors[key].shape


def _count(tensors: dict[str, Tensor], name: Callable[[int], str]) -> int:
    count = 0
    while name(count) in tensors:
        count += 1
    return count


def _clip(tensors: dict[str, Tensor], dtype: torch.dtype):
    from transformers import CLIPTextConfig, CLIPTextModel

    inner = "text_model."
    vocabulary, hidden = _shape(tensors, f"{inner}embeddings.token_embedding.weight")
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        projection_dim=hidden,
        intermediate_size=_shape(tensors, f"{inner}encoder.layers.0.mlp.fc1.weight")[0],
        num_attention_heads=max(1, hidden // _CLIP_HEAD_DIM),
        num_hidden_layers=_count(
            tensors, lambda i: f"{inner}encoder.layers.{i}.self_attn.q_proj.weight"
        ),
        max_position_embeddings=_shape(tensors, f"{inner}embeddings.position_embedding.weight")[0],
        eos_token_id=2,  # as in CLIP-L's own file: the pooled token is that of the highest id
        bos_token_id=0,
    )
    return _from_state(CLIPTextModel, config, tensors, dtype)


def _t5(tensors: dict[str, Tensor], dtype: torch.dtype):
    from transformers import T5Config, T5EncoderModel

    if "shared.weight" not in tensors and "encoder.embed_tokens.weight" in tensors:
        tensors["shared.weight"] = tensors["encoder.embed_tokens.weight"]
    tensors.pop("encoder.embed_tokens.weight", None)  # the same tensor once more
    vocabulary, width = _shape(tensors, "shared.weight")
    first = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = _shape(tensors, f"{first}.relative_attention_bias.weight")
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=_shape(tensors, f"{first}.q.weight")[0] // heads,
        d_ff=_shape(tensors, gated)[0],
        num_layers=_count(tensors, lambda i: f"encoder.block.{i}.layer.0.SelfAttention.q.weight"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",  # T5 1.1's
        is_encoder_decoder=False,
        use_cache=False,
    )
    return _from_state(T5EncoderModel, config, tensors, dtype)


def _from_state(cls, config, tensors: dict[str, Tensor], dtype: torch.dtype):
    try:
        with quiet("transformers"):
            model, info = cls.from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
            )
    except RuntimeError as error:  # of other shapes
        raise _Lacks(str(error).strip().splitlines()[0]) from None
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise _Lacks(", ".join(wrong[:3]))
    return model


def _vae(tensors: dict[str, Tensor], dtype: torch.dtype):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    plain = "encoder.down.0.block.0.conv1.weight" in tensors
    block = "encoder.down.{}.block.{}" if plain else "encoder.down_blocks.{}.resnets.{}"
    levels = _count(tensors, lambda i: block.format(i, 0) + ".conv1.weight")
    config = {
        "in_channels": _shape(tensors, "encoder.conv_in.weight")[1],
        "out_channels": _shape(tensors, "decoder.conv_out.weight")[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [
            _shape(tensors, block.format(i, 0) + ".conv1.weight")[0] for i in range(levels)
        ],
        "layers_per_block": _count(tensors, lambda i: block.format(0, i) + ".conv1.weight"),
        "latent_channels": _shape(tensors, "decoder.conv_in.weight")[1],
        "norm_num_groups": _VAE_GROUPS,
        "scaling_factor": _VAE_SCALE,
        "shift_factor": _VAE_SHIFT,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "sample_size": 1024,
    }
    if not levels:
        raise _Lacks(f"no {block.format(0, 0)}.conv1.weight")
    if plain:
        tensors = convert_ldm_vae_checkpoint(tensors, config)
    try:
        with quiet("diffusers"):
            model = AutoencoderKL(**config)
            found = model.load_state_dict(tensors, strict=False)
    except (RuntimeError, ValueError) as error:
        raise _Lacks(" ".join(str(error).split())) from None
    if found.missing_keys:
        raise _Lacks(", ".join(found.missing_keys[:3]))
    return model.to(dtype)
