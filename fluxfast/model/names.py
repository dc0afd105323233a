"""Module names and shapes: Black Forest Labs' fused layout and diffusers' split one.

Base checkpoints, LoRA files and include/exclude patterns all map between the two by these tables.
"""

from functools import cache

from fluxfast.model.spec import FluxSpec

# BFL module inside a block -> diffusers modules inside its block, in row order
DOUBLE_PARTS = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
SINGLE_PARTS = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
SWAPPED = "final_layer.adaLN_modulation.1"  # BFL: [shift, scale]; diffusers: [scale, shift]


def block_linears(spec: FluxSpec) -> list[str]:
    """Returns the BFL names of every linear inside the blocks, in model order."""
    names = [f"double_blocks.{i}.{name}" for i in range(spec.depth) for name in DOUBLE_PARTS]
    singles = range(spec.depth_single_blocks)
    return names + [f"single_blocks.{i}.{name}" for i in singles for name in SINGLE_PARTS]


def outer_linears(spec: FluxSpec) -> list[str]:
    """Returns the BFL names of the linears outside the blocks."""
    return [name for name in OUTER if spec.guidance_embed or not name.startswith("guidance_in")]


def diffusers_parts(module: str) -> list[str]:
    """Returns the diffusers names of a linear's parts (by its BFL name), in row order."""
    if module in OUTER:
        return [OUTER[module]]
    group, index, name = module.split(".", 2)
    if group == "double_blocks":
        return [f"transformer_blocks.{index}.{part}" for part in DOUBLE_PARTS[name]]
    return [f"single_transformer_blocks.{index}.{part}" for part in SINGLE_PARTS[name]]


def part_rows(module: str, spec: FluxSpec) -> list[tuple[int, int]]:
    """Returns the (start, end) rows of each part of a linear."""
    rows, hidden = linear_shape(module, spec)[0], spec.hidden_size
    parts = len(diffusers_parts(module))
    starts = [i * hidden for i in range(parts)]
    return list(zip(starts, [*starts[1:], rows], strict=True))


@cache
def linear_shape(module: str, spec: FluxSpec) -> tuple[int, int]:
    """Returns the (rows, columns) of any linear of the model, by its BFL name."""
    hidden, mlp = spec.hidden_size, spec.mlp_hidden
    name = module
    if "blocks." in module:  # both streams of a double block have the same shapes
        name = module.split(".", 2)[2].removeprefix("img_").removeprefix("txt_")
    return {
        "mod.lin": (6 * hidden, hidden),
        "attn.qkv": (3 * hidden, hidden),
        "attn.proj": (hidden, hidden),
        "mlp.0": (mlp, hidden),
        "mlp.2": (hidden, mlp),
        "modulation.lin": (3 * hidden, hidden),
        "linear1": (3 * hidden + mlp, hidden),
        "linear2": (hidden, hidden + mlp),
        "img_in": (hidden, spec.in_channels),
        "txt_in": (hidden, spec.context_in_dim),
        "time_in.in_layer": (hidden, 256),
        "time_in.out_layer": (hidden, hidden),
        "vector_in.in_layer": (hidden, spec.vec_in_dim),
        "vector_in.out_layer": (hidden, hidden),
        "guidance_in.in_layer": (hidden, 256),
        "guidance_in.out_layer": (hidden, hidden),
        "final_layer.linear": (spec.in_channels, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }[name]


def tensor_sources(spec: FluxSpec) -> dict[str, list[str]]:
    """Returns, for every tensor of the model by BFL name, the diffusers tensors that it stacks."""
    sources: dict[str, list[str]] = {}
    for module in block_linears(spec):
        for kind in ("weight", "bias"):
            sources[f"{module}.{kind}"] = [f"{part}.{kind}" for part in diffusers_parts(module)]
    for kind, prefix, depth, norms in (
        ("double", "transformer_blocks", spec.depth, DOUBLE_NORMS),
        ("single", "single_transformer_blocks", spec.depth_single_blocks, SINGLE_NORMS),
    ):
        for index in range(depth):
            for ours, theirs in norms.items():
                name = f"{kind}_blocks.{index}.{ours}.scale"
                sources[name] = [f"{prefix}.{index}.{theirs}.weight"]
    for module in outer_linears(spec):
        for kind in ("weight", "bias"):
            sources[f"{module}.{kind}"] = [f"{OUTER[module]}.{kind}"]
    return sources
