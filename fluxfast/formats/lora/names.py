"""Parses the keys of LoRA files: which linear, which of its parts, which factor, in which format's
spelling.

Sources: sd-scripts `networks/lora_flux.py`; x-flux `layers.py`; BFL `modules/lora.py`; ComfyUI
`comfy/lora.py`, `lora_convert.py` and `weight_adapter/lora.py` (suffixes); diffusers
`lora_conversion_utils.py`; OneTrainer's legacy and omi names.
"""

import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from fluxfast.model.names import (
    DOUBLE_NORMS,
    DOUBLE_PARTS,
    OUTER,
    SINGLE_NORMS,
    SINGLE_PARTS,
    SWAPPED,
)


class LoraKey(NamedTuple):
    """A parsed key.

    role: down (A), up (B), alpha, bias (of the transformer), norm (a new scale), shape or embedding
    (a trigger word's); module: BFL name of a linear or a norm, `clip/` or `t5/` and transformers'
    name, or `embedding/` and the key; parts: of a fused linear (q, k, v, mlp), in row order; style,
    prefix: of the spelling.
    """

    role: str
    module: str
    parts: tuple[int, ...]
    style: str
    prefix: str

    @property
    def swapped(self) -> bool:
        """Whether the output's halves are in diffusers' order, [scale, shift]."""
        return self.module == SWAPPED and self.style == "diffusers"


_Linear = tuple[str, tuple[int, ...], str]  # module, parts, style

# ---------------------------------------------------------------- suffixes

_FACTOR = r"(?:\.[\w-]+)?(?:\.weight)?"  # peft puts the adapter's name between
_ROLE_PATTERNS = {
    r"\.lora_(?:B|up)(?:\.[\w-]+)?\.bias|\.diff_b": "bias",
    r"\.lora_A" + _FACTOR: "down",
    r"\.lora_B" + _FACTOR: "up",
    r"\.lora_down\.weight": "down",
    r"\.lora_up\.weight": "up",
    r"(?:[._]lora|\.lora_linear_layer)?\.down\.weight": "down",
    r"(?:[._]lora|\.lora_linear_layer)?\.up\.weight": "up",
    r"\.(?:lora_)?alpha": "alpha",
    r"\.reshape_weight": "shape",  # ComfyUI's note that img_in grows
    # ComfyUI's norms; BFL's, and ComfyUI's of 2026
    r"(?:\.scale)?\.set_weight|\.scale|\.weight": "norm",
}
_ROLES = [(re.compile(f"(.*?)(?:{pattern})"), role) for pattern, role in _ROLE_PATTERNS.items()]

EMBEDDING = "bundle_emb."  # OneTrainer and A1111: the word, then which encoder's vectors

# relatives of LoRA that are no plain pair of factors, by the end of a key
_FOREIGN = {
    "LoKr": r"\.lokr_(w1|w2|t2)(_[ab])?$",
    "LoHa": r"\.hada_[wt]\d(_[ab])?$",
    # LyCORIS, OneTrainer; peft; ai-toolkit
    "DoRA": r"\.dora_scale$|\.(lora_magnitude_vector|magnitude)(\.|$)",
    "OFT": r"\.(oft|boft)_\w+(\.|$)",
    "GLoRA": r"\.[ab][12]\.weight$|\.glora_",
    "VeRA": r"\.p?vera_",
    "AdaLoRA": r"\.lora_E(\.|$)",
    "LoCon with a middle factor": r"\.lora_mid\.weight$",
    "set of full weight differences": r"\.diff$",
    "IA3": r"\.(ia3_l|on_input)(\.|$)",
}


def foreign_kind(key: str) -> str | None:
    """Returns the kind of a key that no plain LoRA has, None if it may be one."""
    return next((kind for kind, pattern in _FOREIGN.items() if re.search(pattern, key)), None)


# ---------------------------------------------------------------- the transformer's linears

_DOTTED = re.compile(
    r"(?:base_model\.model\.|(?:model\.)?diffusion_model\.|(?:lora_)?transformer\.)+"
)
_JOINED = re.compile(r"lora_unet_|lora_transformer_|lycoris_")

XLABS_DOUBLE = {
    "qkv_lora1": ("img_attn.qkv", (0, 1, 2)),
    "proj_lora1": ("img_attn.proj", (0,)),
    "qkv_lora2": ("txt_attn.qkv", (0, 1, 2)),
    "proj_lora2": ("txt_attn.proj", (0,)),
}
XLABS_SINGLE = {"qkv_lora": ("linear1", (0, 1, 2)), "proj_lora": ("linear2", (0,))}


_GROUPS = [
    ("double_blocks", "transformer_blocks", DOUBLE_PARTS, DOUBLE_NORMS, XLABS_DOUBLE),
    ("single_blocks", "single_transformer_blocks", SINGLE_PARTS, SINGLE_NORMS, XLABS_SINGLE),
]
_BFL_GROUP = {name: ours for ours, theirs, *_ in _GROUPS for name in (ours, theirs)}
_BLOCK = re.compile(rf"({'|'.join(_BFL_GROUP)})[._]([0-9]{{1,4}})[._](.+)")


def _block_tables() -> tuple[dict, dict]:
    """Returns tables of a block's linears and norms: (spelling of the group, rest of a name) ->
    (name in the block, parts, style).
    """
    linear_table, norm_table = {}, {}
    for ours, theirs, linears, norms, xlabs in _GROUPS:
        for linear, names in linears.items():
            for spelling in (linear, linear.replace(".", "_")):
                linear_table[ours, spelling] = linear, tuple(range(len(names))), "bfl"
            for index, name in enumerate(names):
                for spelling in (name, name.replace(".", "_")):
                    linear_table[theirs, spelling] = linear, (index,), "diffusers"
                if len(names) > 1:
                    linear_table[ours, f"{linear}.{index}"] = linear, (index,), "omi"
        for name, (linear, parts) in xlabs.items():
            # `_lora` may have been taken for the suffix `_lora.down.weight`
            for spelling in (name, name.removesuffix("_lora")):
                linear_table[ours, f"processor.{spelling}"] = linear, parts, "xlabs"
        for norm, name in norms.items():
            norm_table[ours, norm] = norm, (0,), "bfl"
            norm_table[theirs, name] = norm, (0,), "diffusers"
    return linear_table, norm_table


_LINEARS, _NORMS = _block_tables()
_OUTER = {
    spelling: (ours, (0,), style)
    for ours, theirs in OUTER.items()
    for name, style in ((ours, "bfl"), (theirs, "diffusers"))
    for spelling in (name, name.replace(".", "_"))
} | {"img_in.proj": ("img_in", (0,), "omi")}


def _in_block(name: str, table: dict) -> _Linear | None:
    if (match := _BLOCK.fullmatch(name)) and (entry := table.get(match.group(1, 3))):
        module, parts, style = entry
        return f"{_BFL_GROUP[match[1]]}.{int(match[2])}.{module}", parts, style
    return None


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
# the linears that are read from joined names; the dots of others are not known
_TEXT_LINEARS = {
    "clip": r"text_model\.encoder\.layers\.[0-9]+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])",
    "t5": r"encoder\.block\.[0-9]+\.layer\.[01]\."
    r"(SelfAttention\.([qkvo]|relative_attention_bias)|DenseReluDense\.(wi|wi_[01]|wo))",
}
# words of a joined name that hold an underscore of their own
_WORD = re.compile(r"text_model|self_attn|(?:[qkv]|out)_proj|wi_[01]|relative_attention_bias|_")


def _text(name: str) -> tuple[str, str] | None:
    """Returns the module and the prefix of a text encoder's linear."""
    for prefix, encoder in _TEXT_DOTTED.items():
        if name.startswith(prefix):
            module = name.removeprefix(prefix)
            # transformers 5 drops the outer level that files have
            if encoder == "clip" and module.startswith("encoder."):
                module = f"text_model.{module}"
            return f"{encoder}/{module}", prefix
    if (joined := re.fullmatch(r"(lora_te([123]?)_)(.+)", name)) is None:
        return None
    prefix, number, rest = joined.groups()
    module = _WORD.sub(lambda word: "." if word[0] == "_" else word[0], rest)
    encoder = "t5" if number in ("2", "3") else "clip"  # OneTrainer counts T5 as 2, kohya as 3
    known = re.fullmatch(_TEXT_LINEARS[encoder], module)
    return (f"{encoder}/{module}", prefix) if known else None


# ---------------------------------------------------------------- a key, whole


def parse(key: str) -> LoraKey | None:
    """Returns the parsed key, None for one that FLUX.1 does not have."""
    if key.startswith(EMBEDDING):
        return LoraKey("embedding", f"embedding/{key}", (0,), "text", EMBEDDING)
    for pattern, role in _ROLES:
        if (match := pattern.fullmatch(key)) is None:
            continue
        plain, prefix = _strip(match[1])
        if role == "norm":
            linear = _in_block(plain, _NORMS)
        else:
            linear = _OUTER.get(plain) or _in_block(plain, _LINEARS)
        if linear:
            return LoraKey(role, *linear, prefix)
        if role == "norm":
            continue
        if text := _text(plain) or _text(match[1]):
            # no format that is written holds a text encoder's bias
            return None if role == "bias" else LoraKey(role, text[0], (0,), "text", text[1])
    return None


def of_linear(key: str) -> bool:
    """Returns whether the key belongs to a linear of FLUX.1, whatever it holds but the base's own
    weight, which peft's state_dict() has too.
    """
    plain = _strip(key)[0].partition(".base_layer")[0]
    names = [plain[: dot.start()] for dot in re.finditer(r"\.", plain)]
    return any(name in _OUTER or _in_block(name, _LINEARS) for name in names)


def _strip(name: str) -> tuple[str, str]:
    """Returns a name without its prefix, and the prefix."""
    match = _DOTTED.match(name) or _JOINED.match(name)
    return (name[match.end() :], match[0]) if match else (name, "")


def form_of(keys: Collection[LoraKey]) -> str:
    """Returns the name of the format with such keys, for people."""
    spellings = [(key.style, key.prefix) for key in keys if key.style != "text"]
    spellings = spellings or [(key.style, key.prefix) for key in keys]
    ((style, prefix), _), *_ = Counter(spellings).most_common(1)
    if prefix.startswith("base_model."):
        return "peft"
    if prefix in ("lycoris_", "lora_transformer_"):
        return "LyCORIS" if prefix == "lycoris_" else "OneTrainer"
    if style == "bfl":
        if prefix == "lora_unet_":
            return "kohya"
        form = "comfyui" if prefix else "bfl"
        return f"{form} control" if any(key.role == "norm" for key in keys) else form
    return {"omi": "OneTrainer", "text": "text encoders only"}.get(style, style)
