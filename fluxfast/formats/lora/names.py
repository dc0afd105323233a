"""What a key of a LoRA file means: which linear, which of its parts, which factor. And how each
format spells it.

Sources: sd-scripts `networks/lora_flux.py`; x-flux `layers.py`; BFL `modules/lora.py`; ComfyUI
`comfy/lora.py`, `lora_convert.py` and `weight_adapter/lora.py` (suffixes); diffusers
`lora_conversion_utils.py`; OneTrainer's legacy and omi names.
"""

import re
from collections import Counter
from dataclasses import dataclass

from fluxfast.model.names import (
    DOUBLE_NORMS,
    DOUBLE_PARTS,
    OUTER,
    SINGLE_NORMS,
    SINGLE_PARTS,
    SWAPPED,
)


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs.

    module: BFL name of a linear or a norm, or `clip/` or `t5/` and transformers' name; parts: of a
    fused linear's (q, k, v, mlp), in row order; style: whose spelling it was.
    """

    module: str
    parts: tuple[int, ...] = (0,)
    style: str = "bfl"

    @property
    def swapped(self) -> bool:
        """Whether the output's halves stand in diffusers' order, [scale, shift]."""
        return self.module == SWAPPED and self.style.startswith("diffusers")


# ---------------------------------------------------------------- suffixes

_FACTOR = r"(?:\.[\w-]+)?(?:\.weight)?"  # peft puts the adapter's name between
_ROLES = [
    ("bias", r"\.lora_(?:B|up)(?:\.[\w-]+)?\.bias|\.diff_b"),
    ("down", r"\.lora_A" + _FACTOR),
    ("up", r"\.lora_B" + _FACTOR),
    ("down", r"\.lora_down\.weight"),
    ("up", r"\.lora_up\.weight"),
    ("down", r"(?:[._]lora|\.lora_linear_layer)?\.down\.weight"),
    ("up", r"(?:[._]lora|\.lora_linear_layer)?\.up\.weight"),
    ("alpha", r"\.(?:lora_)?alpha"),
    ("shape", r"\.reshape_weight"),  # ComfyUI's note that img_in grows
    ("norm", r"\.scale(?:\.set_weight)?|\.weight"),
]
_ROLES = [(role, re.compile(f"(.*?)(?:{pattern})")) for role, pattern in _ROLES]

# what is no plain pair of factors, by the end of a key
_FOREIGN = [
    ("LoKr", r"\.lokr_(w1|w2|t2)(_[ab])?$"),
    ("LoHa", r"\.hada_[wt]\d(_[ab])?$"),
    ("DoRA", r"\.dora_scale$|\.lora_magnitude_vector(\.|$)"),
    ("OFT", r"\.(oft|boft)_\w+(\.|$)"),
    ("GLoRA", r"\.[ab][12]\.weight$"),
    ("LoCon with a middle factor", r"\.lora_mid\.weight$"),
    ("set of full weight differences", r"\.diff$"),
    ("IA3", r"\.(ia3_l|on_input)(\.|$)"),
]


def foreign_kind(key: str) -> str | None:
    """The name of the kind that is no plain LoRA, where a key gives it away."""
    return next((kind for kind, pattern in _FOREIGN if re.search(pattern, key)), None)


# ---------------------------------------------------------------- the transformer's linears

_DOTTED = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.",
    "lora_transformer.",
)  # fmt: skip
_JOINED = ("lora_unet_", "lora_transformer_", "lycoris_")
_GROUPS = {
    "double_blocks": "double_blocks",
    "transformer_blocks": "double_blocks",
    "single_blocks": "single_blocks",
    "single_transformer_blocks": "single_blocks",
}
_BLOCK = re.compile(rf"({'|'.join(_GROUPS)})[._]([0-9]{{1,4}})[._](.+)")


def _tails(group: str, parts: dict[str, list[str]], xlabs: dict) -> dict:
    """(group's spelling, rest of a name) -> (BFL's rest, parts, style)."""
    diffusers = next(word for word, ours in _GROUPS.items() if ours == group and word != group)
    table = {}
    for ours, theirs in parts.items():
        whole = tuple(range(len(theirs)))
        for joined in (ours, ours.replace(".", "_")):
            table[group, joined] = ours, whole, "bfl"
        for index, part in enumerate(theirs):
            for joined in (part, part.replace(".", "_")):
                table[diffusers, joined] = ours, (index,), "diffusers"
            if len(theirs) > 1:
                table[group, f"{ours}.{index}"] = ours, (index,), "omi"
    for theirs, (ours, indices) in xlabs.items():
        table[group, f"processor.{theirs}"] = ours, indices, "xlabs"
        # `_lora` may have been taken for the suffix `_lora.down.weight`
        table[group, f"processor.{theirs.removesuffix('_lora')}"] = ours, indices, "xlabs"
    return table


XLABS_DOUBLE = {
    "qkv_lora1": ("img_attn.qkv", (0, 1, 2)),
    "proj_lora1": ("img_attn.proj", (0,)),
    "qkv_lora2": ("txt_attn.qkv", (0, 1, 2)),
    "proj_lora2": ("txt_attn.proj", (0,)),
}
XLABS_SINGLE = {"qkv_lora": ("linear1", (0, 1, 2)), "proj_lora": ("linear2", (0,))}
_TAILS = _tails("double_blocks", DOUBLE_PARTS, XLABS_DOUBLE)
_TAILS |= _tails("single_blocks", SINGLE_PARTS, XLABS_SINGLE)
_OUTER_NAMES = {
    spelt: (ours, style)
    for ours, theirs in OUTER.items()
    for name, style in ((ours, "bfl"), (theirs, "diffusers"))
    for spelt in (name, name.replace(".", "_"))
} | {"img_in.proj": ("img_in", "omi")}
_NORMS = {("double_blocks", ours): (ours, "bfl") for ours in DOUBLE_NORMS}
_NORMS |= {("single_blocks", ours): (ours, "bfl") for ours in SINGLE_NORMS}
_NORMS |= {
    ("transformer_blocks", theirs): (ours, "diffusers") for ours, theirs in DOUBLE_NORMS.items()
}
_NORMS |= {
    ("single_transformer_blocks", theirs): (ours, "diffusers")
    for ours, theirs in SINGLE_NORMS.items()
}


def _linear(name: str, prefix: str) -> Place | None:
    match = _BLOCK.fullmatch(name)
    if match is None:
        ours, style = _OUTER_NAMES.get(name, (None, ""))
        return ours and Place(ours, style=f"{style} {prefix}")
    group, index, tail = match.groups()
    ours, parts, style = _TAILS.get((group, tail), (None, (), ""))
    return ours and Place(f"{_GROUPS[group]}.{int(index)}.{ours}", parts, f"{style} {prefix}")


def _norm(name: str, prefix: str) -> Place | None:
    match = _BLOCK.fullmatch(name)
    ours, style = _NORMS.get(match.group(1, 3), (None, "")) if match else (None, "")
    return ours and Place(f"{_GROUPS[match[1]]}.{int(match[2])}.{ours}", (0,), f"{style} {prefix}")


# ---------------------------------------------------------------- the text encoders' linears

_TEXT_DOTTED = {
    "text_encoder.": "clip",
    "text_encoder_2.": "t5",
    "text_encoders.clip_l.transformer.": "clip",
    "text_encoders.t5xxl.transformer.": "t5",
    "clip_l.": "clip",
    "t5xxl.": "t5",
    "t5.": "t5",
    "lora_clip_l.": "clip",
    "lora_t5.": "t5",
}
_CLIP = re.compile(
    r"text_model_encoder_layers_(\d+)_(?:(self_attn)_((?:q|k|v|out)_proj)|(mlp)_(fc[12]))"
)
_T5 = re.compile(
    r"encoder_block_(\d+)_layer_([01])_"
    r"(?:(SelfAttention)_([qkvo]|relative_attention_bias)|(DenseReluDense)_(wi_0|wi_1|wi|wo))"
)


def _text(name: str) -> Place | None:
    for prefix, encoder in _TEXT_DOTTED.items():
        if name.startswith(prefix):
            module = name.removeprefix(prefix)
            # transformers 5 drops the outer level that files have
            if encoder == "clip" and module.startswith("encoder."):
                module = f"text_model.{module}"
            return Place(f"{encoder}/{module}", style=f"text {prefix}")
    match = re.fullmatch(r"lora_te([123]?)_(.+)", name)
    if match is None:
        return None
    number, rest = match.groups()
    if number in ("", "1") and (found := _CLIP.fullmatch(rest)):
        index, *words = [word for word in found.groups() if word]
        module = f"clip/text_model.encoder.layers.{index}.{'.'.join(words)}"
        return Place(module, style=f"text lora_te{number}_")
    if number in ("2", "3") and (found := _T5.fullmatch(rest)):  # OneTrainer counts 2, kohya 3
        block, layer, *words = [word for word in found.groups() if word]
        module = f"t5/encoder.block.{block}.layer.{layer}.{'.'.join(words)}"
        return Place(module, style=f"text lora_te{number}_")
    return None


# ---------------------------------------------------------------- a key, whole


def parse(key: str) -> tuple[str, Place] | None:
    """-> (role, place), or None for a key that has no place in FLUX.1.

    role: down (A), up (B), alpha, bias (of the transformer only), norm (a whole new scale), shape.
    """
    for role, pattern in _ROLES:
        match = pattern.fullmatch(key)
        if match is None:
            continue
        place = _norm(*_stripped(match[1])) if role == "norm" else resolve(match[1])
        if role == "bias" and place is not None and "/" in place.module:
            return None  # of a text encoder, which no format that is written has
        if place is not None:
            return role, place
    return None


def resolve(name: str) -> Place | None:
    """A linear by any format's name of it, with its prefix and without a suffix."""
    plain, prefix = _stripped(name)
    return _linear(plain, prefix) or _text(plain) or _text(name)


def _stripped(name: str) -> tuple[str, str]:
    """-> (name, its prefix)."""
    plain = name
    while (cut := next((p for p in _DOTTED if plain.startswith(p)), None)) is not None:
        plain = plain.removeprefix(cut)
    if plain == name:
        cut = next((p for p in _JOINED if plain.startswith(p)), "")
        plain = plain.removeprefix(cut)
    return plain, name[: len(name) - len(plain)]


def form_of(places: list[Place], roles: set[str]) -> str:
    """What a file's keys say of its format, in one word or two, for people."""
    styles = [place.style for place in places]
    styles = [style for style in styles if not style.startswith("text ")] or styles
    style, _, prefix = Counter(styles).most_common(1)[0][0].partition(" ")
    if prefix.startswith("base_model."):
        return "peft"
    if prefix == "lycoris_" or prefix == "lora_transformer_":
        return "LyCORIS" if prefix == "lycoris_" else "OneTrainer"
    if style == "bfl":
        if prefix in ("lora_unet_", "lora_te1_", "lora_te3_"):
            return "kohya"
        word = "comfyui" if prefix else "bfl"
        return f"{word} control" if roles & {"bias", "norm"} else word
    return {"omi": "OneTrainer", "text": "text encoders only"}.get(style, style)
