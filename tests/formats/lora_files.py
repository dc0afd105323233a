"""LoRAs of a small FLUX, their updates, and states that are no LoRA of FLUX.1."""

import torch
from small import SMALL, random_flux, randomize

from fluxfast.formats.lora.update import LoraWeights
from fluxfast.model.lora import inject_lora, lora_layers
from fluxfast.model.names import linear_shape, part_rows

ROUNDING = 1e-6  # of fp32, relative to the largest entry of a layer's ΔW
PROJ = "transformer.transformer_blocks.0.attn.to_out.0"
PROJ_BFL = "double_blocks.0.img_attn.proj"
KOHYA = "lora_unet_double_blocks_0_img_attn_"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


def ab(name: str, rows=64, columns=64, rank=2) -> dict:
    """Returns factors of ones under peft's names."""
    a, b = torch.ones(rank, columns), torch.ones(rows, rank)
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def kohya(name: str, a, b, alpha: float | None = None) -> dict:
    state = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    return state if alpha is None else {**state, f"{name}.alpha": torch.tensor(alpha)}


def trained(targets="attn+mlp", share_a=False, rank=3, alpha=5.0, seed=1, **patterns):
    """Returns a small model with a random LoRA."""
    model = random_flux(SMALL)
    inject_lora(model, rank, alpha, targets, share_a=share_a, seed=seed, **patterns)
    randomize(model, seed, std=1.0)
    return model


def update(model) -> dict[str, torch.Tensor]:
    """Returns ΔW by BFL name, computed from the layers."""
    deltas = {}
    for name, layer in lora_layers(model).items():
        delta = torch.zeros(layer.out_features, layer.in_features)
        for y_rows, b_rows, a_rows in layer.lora.slices():
            delta[y_rows] = layer.lora.scale * (layer.lora_B[b_rows] @ layer.lora_A[a_rows])
        deltas[name] = delta.detach()
    return deltas


def meaning(lora: LoraWeights, spec=SMALL) -> dict[str, torch.Tensor]:
    """Returns ΔW by BFL name, computed from the pieces."""
    deltas = {}
    for name, pieces in lora.pieces.items():
        delta = deltas[name] = torch.zeros(linear_shape(name, spec))
        ranges = part_rows(name, spec)
        for piece in pieces:
            for part, b in piece.b.items():
                delta[slice(*ranges[part])] += b @ piece.a
    return deltas


def same(got: dict, expected: dict) -> None:
    """Asserts that both have the same ΔW up to rounding."""
    for name in got.keys() | expected.keys():
        size = expected[name].abs().max() if name in expected else 0.0
        if not size:  # padding, or nothing at all
            assert name not in got or not got[name].any(), name
            continue
        assert (got[name] - expected[name]).abs().max() <= ROUNDING * size, name


def held_by_xlabs(deltas: dict) -> dict:
    """Returns what an xlabs file can hold: no MLP, no modulation."""
    held = {}
    for name, delta in deltas.items():
        if name.endswith(("_attn.qkv", "_attn.proj", "linear1", "linear2")):
            held[name] = delta.clone()
            if name.endswith("linear1"):
                held[name][3 * SMALL.hidden_size :] = 0
    return held


FOUR_BITS = torch.zeros(2, 32, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
DIFFUSERS = "transformer.transformer_blocks.0.attn."


def with_a(a: torch.Tensor) -> dict:
    return {**ab(PROJ), f"{PROJ}.lora_A.weight": a}


SINGLE = "diffusion_model.single_blocks.0.linear"
REFUSED = {
    "sdxl": (ab("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"), "SDXL"),
    "sdxl diffusers": (ab("unet.down_blocks.1.attentions.0.proj_in"), "SDXL"),
    "sdxl text": (ab("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "SDXL"),
    "sd3 kohya": (ab("lora_unet_joint_blocks_0_x_block_attn_qkv"), "Stable Diffusion 3"),
    "sd3 diffusers": (ab(PROJ, 1536, 1536), "Stable Diffusion 3"),
    "flux2": (ab("transformer.double_stream_modulation_img.linear"), "FLUX.2"),
    "flux2 shapes": (ab(f"{SINGLE}1", 9 * 64) | ab(f"{SINGLE}2", 64, 4 * 64), "does not fit"),
    "hunyuan": (ab(f"{KOHYA}qkv", 3 * 64) | ab(f"{KOHYA[:-5]}mlp_fc1", 4 * 64), "HunyuanVideo"),
    "chroma": (ab("diffusion_model.distilled_guidance_layer.in_proj"), "Chroma"),
    "other": (ab("blocks.0.cross_attn.q"), "not a LoRA of FLUX.1"),
    "not lora": ({"double_blocks.0.img_attn.qkv.weight": torch.ones(4, 4)}, "not a LoRA of FLUX.1"),
    "nothing": ({}, "not a LoRA of FLUX.1"),
    "lokr": ({"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.ones(2, 2)}, "LoKr"),
    "loha": ({f"{KOHYA}qkv.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
    "dora": (ab(PROJ) | {f"{PROJ}.dora_scale": torch.ones(64, 1)}, "DoRA"),
    "dora peft": (ab(PROJ) | {f"{PROJ}.lora_magnitude_vector": torch.ones(64)}, "DoRA"),
    "dora diffusers": (ab(PROJ) | {f"{PROJ}.lora_magnitude_vector.weight": torch.ones(64)}, "DoRA"),
    "dora ai-toolkit": (ab(PROJ) | {f"{PROJ}.magnitude": torch.ones(64)}, "DoRA"),
    "dora kohya": (
        kohya(f"{KOHYA}proj", torch.ones(2, 64), torch.ones(64, 2), 2.0)
        | {f"{KOHYA}proj.dora_scale": torch.ones(64, 1)},
        "DoRA",
    ),
    "oft": (ab(PROJ) | {f"{KOHYA}proj.oft_blocks": torch.ones(2, 4, 4)}, "OFT"),
    "oft peft": (ab(PROJ) | {f"{PROJ}.oft_R.weight": torch.ones(2, 6)}, "OFT"),
    "boft": (ab(PROJ) | {f"{PROJ}.boft_s": torch.ones(64, 1)}, "OFT"),
    "ia3": (ab(PROJ) | {f"base_model.model.{PROJ}.ia3_l": torch.ones(64, 1)}, "IA3"),
    "vera": (ab(PROJ) | {f"base_model.model.{PROJ}.vera_lambda_d": torch.ones(2)}, "VeRA"),
    "adalora": (ab(PROJ) | {f"base_model.model.{PROJ}.lora_E": torch.ones(2, 1)}, "AdaLoRA"),
    "glora": (ab(PROJ) | {f"{PROJ}.a1.weight": torch.ones(2, 64)}, "GLoRA"),
    "locon": (ab(PROJ) | {f"{PROJ}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "LoCon"),
    "a factor more": (ab(PROJ) | {f"{PROJ}.hra_u": torch.ones(2)}, f"has {PROJ}.hra_u.*plain LoRA"),
    "a factor more, kohya": (
        ab(PROJ) | {f"{KOHYA}proj.scalar": torch.ones(1)},
        f"has {KOHYA}proj.scalar.*not a plain LoRA",
    ),
    "ai-toolkit control": (
        ab(PROJ) | {"transformer.x_embedder.weight": torch.ones(64, 128)},
        "more than factors .*x_embedder.weight",
    ),
    "full": ({f"{PROJ}.diff": torch.ones(64, 64)}, "full weight differences"),
    "half": ({f"{PROJ}.lora_A.weight": torch.ones(2, 64)}, "no partner"),
    "widths": (
        ab(PROJ) | ab(f"{DIFFUSERS}to_q") | ab(f"{DIFFUSERS}to_k", 64, 48),
        "does not fit",
    ),
    "tall": (ab(PROJ) | ab(f"{DIFFUSERS}to_q", 65), "does not fit"),
    "half a norm_out": (ab("transformer.norm_out.linear", 127), "two halves"),
    "twice": (ab(PROJ) | ab(f"{KOHYA}proj"), "the same twice"),
    "two formats": (ab(f"{KOHYA}qkv", 192) | ab(f"{DIFFUSERS}to_q"), "the same twice"),
    "ranks": (with_a(torch.ones(3, 64)), "do not fit each other"),
    "no rank": (ab(PROJ, rank=0), "do not fit each other"),
    "no rows": (ab(PROJ, 0), "do not fit each other"),
    "no columns": (ab(PROJ, columns=0), "do not fit each other"),
    "dimensions": (with_a(torch.ones(2)), "two dimensions"),
    "integers": (with_a(torch.ones(2, 64).int()), "stored as"),
    "4 bits": (with_a(FOUR_BITS), "stored as"),
    "nan": (with_a(torch.full((2, 64), torch.nan)), "NaN"),
    "alpha": (ab(PROJ) | {f"{PROJ}.alpha": torch.ones(2)}, "not one number"),
    "alpha of 4 bits": (ab(PROJ) | {f"{PROJ}.alpha": FOUR_BITS[0, :1]}, "not one number"),
    "bias": (
        ab("transformer.proj_out") | {"transformer.proj_out.lora_B.bias": torch.ones(7)},
        r"proj_out.lora_B.bias has shape \[7\]",
    ),
    "bias twice": (
        ab(PROJ)
        | {f"{DIFFUSERS}to_q.lora_B.bias": torch.ones(64)}
        | {"double_blocks.0.img_attn.qkv.lora_B.bias": torch.ones(192)},
        "the same twice",
    ),
    "square norm": (
        ab(PROJ) | {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(3, 3)},
        "not one dimension",
    ),
    "bias of a text encoder": (
        ab(PROJ) | ab(TEXT) | {f"{TEXT}.lora_B.bias": torch.ones(64)},
        "unknown keys text_encoder.*bias\n",
    ),
    "norm of a text encoder": (
        ab(PROJ) | ab("lora_te1_text_model_encoder_layers_0_layer_norm1"),
        "unknown keys lora_te1_",
    ),
    "block of many digits": (ab(PROJ.replace("0", "9" * 5000, 1)), "unknown keys"),
    "block of other digits": (ab(PROJ.replace("0", "\u0663", 1)), "unknown keys"),
}
