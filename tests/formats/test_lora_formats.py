"""Every LoRA format keeps an update when it is written and read; what is no LoRA of FLUX.1 is
refused in one clear message.
"""

import json
import random
import re

import pytest
import torch
from lora_files import (
    KOHYA,
    PROJ,
    PROJ_BFL,
    REFUSED,
    ROUNDING,
    TEXT,
    ab,
    held_by_xlabs,
    kohya,
    meaning,
    same,
    trained,
    update,
)
from safetensors.torch import save_file
from small import SMALL, inputs, random_flux

from fluxfast.errors import ConfigError
from fluxfast.formats.base.detect import is_lora
from fluxfast.formats.container import Safetensors
from fluxfast.formats.lora.apply import extract_lora, init_lora, load_lora, save_lora
from fluxfast.formats.lora.names import parse
from fluxfast.formats.lora.read import from_tensors, read_lora
from fluxfast.formats.lora.update import (
    LoraWeights,
    Piece,
    balanced,
    merged,
    scaled,
)
from fluxfast.formats.lora.write import FORMATS, to_bytes, to_state
from fluxfast.model.lora import inject_lora, lora_layers, set_lora_strength
from fluxfast.model.names import block_linears, linear_shape, outer_linears, part_rows


def factor(state: dict, role: str, module: str = PROJ_BFL) -> torch.Tensor:
    keys = {name: parse(name) for name in state}
    (name,) = (name for name, key in keys.items() if (key.role, key.module) == (role, module))
    return state[name]


def through(lora: LoraWeights, format: str, drop=False) -> LoraWeights:
    """Writes and reads back, without a file."""
    return from_tensors(to_state(lora, format, drop=drop), {}, format)


def any_pieces(seed: int) -> LoraWeights:
    """Returns up to three pieces a linear on any of its parts, with A's shared or not, and zeros
    here and there: all that merging can make.
    """
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    lora = LoraWeights(hidden=SMALL.hidden_size, mlp=SMALL.mlp_hidden)
    modules = [*block_linears(SMALL), *outer_linears(SMALL)]
    for module in rng.sample(modules, rng.randint(4, len(modules))):
        columns = linear_shape(module, SMALL)[1]
        heights = [end - start for start, end in part_rows(module, SMALL)]
        shared = [torch.randn(rng.randint(1, 3), columns, generator=g) for _ in range(2)]
        for _ in range(rng.randint(1, 3)):
            parts = sorted(rng.sample(range(len(heights)), rng.randint(1, len(heights))))
            a = rng.choice([*shared, torch.randn(2, columns, generator=g)])
            b = {part: torch.randn(heights[part], len(a), generator=g) for part in parts}
            for tensor in b.values():
                kind = rng.random()
                if kind < 0.2:
                    tensor[:] = 0
                elif kind < 0.4:
                    tensor[:, rng.randrange(len(a))] = 0
            lora.pieces.setdefault(module, []).append(Piece(a, b))
    return lora


@pytest.mark.parametrize("seed", range(6))
def test_every_format_keeps_any_update(seed, tmp_path):
    lora, model = any_pieces(seed), random_flux(SMALL)
    expected = meaning(lora)
    for format in FORMATS:
        held = held_by_xlabs(expected) if format == "xlabs" else expected
        same(meaning(through(lora, format, drop=True)), held)
        file = tmp_path / f"{format}.safetensors"
        file.write_bytes(to_bytes(to_state(lora, format, drop=True), "fp32", {}))
        load_lora(model, file)
        same(update(model), held)


@pytest.mark.parametrize("format", ["kohya", "comfyui", "bfl"])
def test_fused_and_back_keeps_every_rank(format):
    """Split A's come back as blocks, a shared A as one: no rank is gained."""
    for share_a in (False, True):
        lora = extract_lora(trained("all", share_a))
        state = to_state(lora, format)
        rank = 64 if format == "bfl" else 3 if share_a else 4 * 3  # its own, or the layer's width
        assert len(factor(state, "down", "single_blocks.0.linear1")) == rank
        back = to_state(from_tensors(state, {}, format), "diffusers")
        assert {t.shape[0] for k, t in back.items() if "lora_A" in k} == {3}
        again = to_state(from_tensors(back, {}, "diffusers"), format)
        assert {k: t.shape for k, t in again.items()} == {k: state[k].shape for k in again}
        # linears outside the blocks, whose sizes a file does not tell
        assert len(again) == len(state) or format == "bfl"


def test_parts_that_are_not_trained_stay_out():
    lora = extract_lora(trained(include=["to_k", "proj_mlp"]))
    names = set(to_state(lora, "diffusers"))
    assert names == set(to_state(through(lora, "kohya"), "diffusers"))
    assert not any("to_q" in name or "to_v" in name for name in names)


@pytest.mark.parametrize("alpha, scale", [(None, 1.0), (1.0, 0.25), (3.0, 0.75), (64.0, 16.0)])
def test_alpha_over_rank_scales(alpha, scale):
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    lora = from_tensors(kohya(f"{KOHYA}proj", a, b, alpha), {}, "x")
    expected = scale * (b.double() @ a.double())
    (piece,) = lora.pieces[PROJ_BFL]
    assert (piece.b[0] @ piece.a - expected).abs().max() <= ROUNDING * expected.abs().max()
    assert factor(to_state(lora, "kohya"), "alpha") == 4.0


def test_a_1x1_convolution_is_a_linear():
    flat = ab(PROJ)
    state = {key: tensor[:, :, None, None] for key, tensor in flat.items()}
    (piece,) = from_tensors(state, {}, "x").pieces[PROJ_BFL]
    assert torch.equal(piece.a, factor(flat, "down"))
    with pytest.raises(ConfigError, match="two dimensions"):
        from_tensors({key: t.expand(-1, -1, 3, 3) for key, t in state.items()}, {}, "x")


def test_the_last_layers_rows_are_free():
    """The blocks do not tell the model's channels."""
    name = "transformer.proj_out"
    lora = from_tensors({**ab(PROJ), **ab(name, rows=16)}, {}, "x")
    assert to_state(lora, "kohya")["lora_unet_final_layer_linear.lora_up.weight"].shape == (16, 2)


def test_an_update_of_zero_keeps_its_factors():
    """A file saved before the first step is still a LoRA of those linears."""
    state = kohya(f"{KOHYA}qkv", torch.randn(4, 64), torch.zeros(192, 4))
    split = to_state(from_tensors(state, {}, "x"), "diffusers")
    for part in ("to_q", "to_k", "to_v"):
        a = split[f"transformer.transformer_blocks.0.attn.{part}.lora_A.weight"]
        assert torch.equal(a, state[f"{KOHYA}qkv.lora_down.weight"])


def test_balancing_is_exact():
    """It multiplies by powers of two."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 64, generator=g) * 3e-5, torch.randn(64, 4, generator=g) * 7.0
    (piece,) = balanced(LoraWeights(pieces={"x": [Piece(a, {0: b})]})).pieces["x"]
    assert 0.5 < piece.a.abs().max() / piece.b[0].abs().max() < 2
    assert torch.equal(piece.b[0] @ piece.a, b @ a)


def piece(rows: int, columns: int, seed: int = 3) -> Piece:
    g = torch.Generator().manual_seed(seed)
    return Piece(torch.randn(2, columns, generator=g), {0: torch.randn(rows, 2, generator=g)})


def outer_and_text() -> LoraWeights:
    lora = extract_lora(trained("attn"))
    for name in ("img_in", "vector_in.out_layer", "final_layer.adaLN_modulation.1"):
        lora.pieces[name] = [piece(*linear_shape(name, SMALL))]
    lora.text = {
        "clip/text_model.encoder.layers.3.self_attn.out_proj": [piece(8, 8)],
        "clip/text_model.encoder.layers.3.mlp.fc1": [piece(16, 8)],
        "t5/encoder.block.2.layer.0.SelfAttention.q": [piece(8, 8)],
        "t5/encoder.block.2.layer.1.DenseReluDense.wi_0": [piece(16, 8)],
    }
    return lora


CLIP, T5 = "text_model.encoder.layers.3.mlp.fc1", "encoder.block.2.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    "format, clip, t5",
    [
        ("diffusers", f"text_encoder.{CLIP}.lora_A", f"text_encoder_2.{T5}.lora_B"),
        # OneTrainer counts T5 as te2, kohya as te3
        (
            "kohya",
            f"lora_te1_{CLIP.replace('.', '_')}.lora_down",
            f"lora_te3_{T5.replace('.', '_')}.lora_up",
        ),
        (
            "comfyui",
            f"text_encoders.clip_l.transformer.{CLIP}.lora_down",
            f"text_encoders.t5xxl.transformer.{T5}.lora_up",
        ),
    ],
)
def test_text_encoders_in_each_format(format, clip, t5):
    lora = outer_and_text()
    state = to_state(lora, format)
    assert {f"{clip}.weight", f"{t5}.weight"} <= state.keys()
    back = from_tensors(state, {}, "x").text
    assert back.keys() == lora.text.keys()
    for name, (piece,) in back.items():
        (before,) = lora.text[name]
        assert torch.equal(piece.b[0] @ piece.a, before.b[0] @ before.a)


def test_norm_out_halves_are_swapped():
    lora = outer_and_text()
    (ours,) = lora.pieces["final_layer.adaLN_modulation.1"]
    state = to_state(lora, "diffusers")
    b = state["transformer.norm_out.linear.lora_B.weight"]
    a = state["transformer.norm_out.linear.lora_A.weight"]  # and a rank of zeros, as q has 3
    assert torch.equal(b[:64, :2], ours.b[0][64:]) and torch.equal(b[64:, :2], ours.b[0][:64])
    assert torch.equal(a[:2], ours.a) and not a[2:].any() and not b[:, 2:].any()


def test_a_format_names_what_it_cannot_hold(log_lines):
    with pytest.raises(ConfigError, match="xlabs files cannot hold .*img_mlp.0.* more") as e:
        to_state(extract_lora(trained("all")), "xlabs")
    assert e.value.hint is None  # what helps depends on who asks
    to_state(outer_and_text(), "bfl", drop=True)
    (line,) = log_lines
    assert "clip/text_model" in line
    with pytest.raises(ConfigError, match="can hold nothing of this LoRA"):
        to_state(extract_lora(trained("all", include=["mod"])), "xlabs", drop=True)


def test_xlabs_file_has_one_rank_and_whole_blocks():
    """x-flux's own loader builds every processor of a block at one rank."""
    lora = extract_lora(trained("attn", include=["single_blocks.1", "img_attn"]))
    state = to_state(lora, "xlabs")
    processors = ("qkv_lora1", "proj_lora1", "qkv_lora2", "proj_lora2")
    names = [f"double_blocks.0.processor.{name}" for name in processors]
    names += [f"single_blocks.1.processor.{name}" for name in ("qkv_lora", "proj_lora")]
    assert set(state) == {f"{name}.{way}.weight" for name in names for way in ("up", "down")}
    assert {t.shape[0] for k, t in state.items() if "down" in k} == {9}


# ---------------------------------------------------------------- spellings of other programs


def onetrainer(key: str) -> str:
    """Legacy names: `lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight`."""
    name, _, side = key.removesuffix(".weight").rpartition(".")
    suffix = {"lora_A": "lora_down", "lora_B": "lora_up"}[side]
    return f"lora_{name.replace('.', '_')}.{suffix}.weight"


def peft(key: str) -> str:
    return key.replace("transformer.", "base_model.model.", 1)


def sides(down: str, up: str):
    return lambda key: re.sub(r"\.lora_(B|up)", up, re.sub(r"\.lora_(A|down)", down, key))


SPELLINGS = {
    "peft": ("diffusers", peft),
    "peft adapter": ("diffusers", lambda k: peft(k).replace(".weight", ".default.weight")),
    "peft bfl": ("bfl", lambda k: f"base_model.model.{k}"),
    "bare diffusers": ("diffusers", lambda k: k.removeprefix("transformer.")),
    "simpletuner": ("diffusers", lambda k: k.replace("transformer.", "diffusion_model.", 1)),
    "comfyui lora_A": ("bfl", lambda k: f"diffusion_model.{k}"),
    "comfyui _lora.up": ("comfyui", sides("_lora.down", "_lora.up")),
    "comfyui lora.up": ("comfyui", sides(".lora.down", ".lora.up")),
    "comfyui no weight": ("bfl", lambda k: f"diffusion_model.{k.removesuffix('.weight')}"),
    "linear_layer": ("diffusers", sides(".lora_linear_layer.down", ".lora_linear_layer.up")),
    "onetrainer legacy": ("diffusers", onetrainer),
    "lycoris": ("diffusers", lambda k: onetrainer(k).replace("lora_transformer_", "lycoris_")),
    "onetrainer original": ("comfyui", lambda k: k.removeprefix("diffusion_model.")),
    "xlabs in comfyui": ("xlabs", lambda k: f"diffusion_model.{k}"),
}


@pytest.mark.parametrize("spelling", [*FORMATS, *SPELLINGS])
def test_spellings(spelling):
    format, rename = SPELLINGS.get(spelling, (spelling, str))
    lora = extract_lora(trained("attn" if format == "xlabs" else "all"))
    written = to_state(lora, format)
    state = {rename(key): tensor for key, tensor in written.items()}
    assert (state.keys() == written.keys()) is (spelling in FORMATS)
    same(meaning(from_tensors(state, {}, spelling)), meaning(lora))
    for key in state:  # a file may hold one linear only, and is a LoRA all the same
        assert is_lora([key]) or key.endswith(".alpha"), key


Q_PROJ, WO = "self_attn.q_proj", "1.DenseReluDense.wo"


@pytest.mark.parametrize(
    "key, module, parts",
    [
        ("lora_te1_text_model_encoder_layers_11_mlp_fc2.alpha", "clip/11.mlp.fc2", 0),
        (
            "lora_te2_encoder_block_0_layer_1_DenseReluDense_wo.lora_up.weight",
            f"t5/0.layer.{WO}",
            0,
        ),
        (
            "lora_te3_encoder_block_23_layer_0_SelfAttention_v.lora_up.weight",
            "t5/23.layer.0.SelfAttention.v",
            0,
        ),
        (f"lora_clip_l.text_model.encoder.layers.0.{Q_PROJ}.lora_up.weight", f"clip/0.{Q_PROJ}", 0),
        (f"lora_t5.encoder.block.0.layer.{WO}.lora_down.weight", f"t5/0.layer.{WO}", 0),
        (
            f"text_encoder.text_model.encoder.layers.0.{Q_PROJ}.lora_linear_layer.up.weight",
            f"clip/0.{Q_PROJ}",
            0,
        ),
        # transformers 5
        (f"text_encoder.encoder.layers.0.{Q_PROJ}.lora_A.weight", f"clip/0.{Q_PROJ}", 0),
        # OneTrainer's omi names
        ("transformer.single_blocks.0.linear1.1.lora_A.weight", "single_blocks.0.linear1", 1),
        ("lora_transformer.single_blocks.0.linear1.2.lora_A.weight", "single_blocks.0.linear1", 2),
        ("transformer.img_in.proj.lora_down.weight", "img_in", 0),
    ],
)
def test_names(key, module, parts):
    module = module.replace("clip/", "clip/text_model.encoder.layers.")
    parsed = parse(key)
    assert parsed.module == module.replace("t5/", "t5/encoder.block.")
    assert parsed.parts == (parts,)


def test_a_text_encoders_bias_is_dropped_by_name(log_lines):
    for bias in (f"{TEXT}.lora_B.bias", f"{TEXT}.diff_b"):
        state = {**ab(TEXT), bias: torch.ones(64)}
        lora = from_tensors(state, {}, "x", drop=True)
        assert to_state(lora, "diffusers").keys() == ab(TEXT).keys()
        assert bias in log_lines.pop()


def test_peft_configuration_beside_the_file(tmp_path):
    """peft saves alpha in adapter_config.json."""
    lora = extract_lora(trained("attn", rank=4, alpha=4.0))
    state = {peft(key): tensor for key, tensor in to_state(lora, "diffusers").items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian"}
    config["alpha_pattern"] = {"^transformer_blocks.0.attn.to_out.0": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scales = {name: 0.5 if name == PROJ_BFL else 2.0 for name in lora.pieces}
    expected = {name: scales[name] * delta for name, delta in meaning(lora).items()}
    same(meaning(read_lora(tmp_path)), expected)


@pytest.mark.parametrize(
    "text",
    [
        '{"use_dora": true}',
        '{"init_lora_weights": "pissa_niter_4"}',
        '{"init_lora_weights": "OLoRA"}',
        "[1]",
        '{"lora_alpha": "a"}',
        '{"lora_alpha": NaN}',
        '{"alpha_pattern": [1]}',
        '{"alpha_pattern": {"x": 1e999}}',
    ],
)
def test_a_bad_peft_configuration(text, tmp_path):
    save_file(ab(PROJ), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    refused(tmp_path / "adapter_model.safetensors", "peft configuration cannot be read")


def scale_of(config: dict, key: str = PROJ, **state) -> float:
    """Returns the scale of the factors under `key`, with the configuration in diffusers' header."""
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    lora = from_tensors({**ab(PROJ, rank=4), **ab(TEXT, rank=4), **state}, metadata, "x")
    ((piece,),) = (lora.pieces if key == PROJ else lora.text).values()
    return (piece.b[0] @ piece.a)[0, 0].item() / 4


def test_peft_configuration_in_the_header():
    """It has alphas of the transformer and of CLIP; an alpha beside the factors overrides them."""
    config = {"transformer.lora_alpha": 2, "text_encoder.lora_alpha": 12}
    assert scale_of(config) == 0.5 and scale_of(config, TEXT) == 3.0
    assert scale_of(config, **{f"{PROJ}.alpha": torch.tensor(1.0)}) == 0.25
    assert scale_of({"transformer.lora_alpha": 8, "transformer.use_rslora": True}) == 4.0


@pytest.mark.parametrize(
    "patterns, alpha",
    [
        ({"attn.to_out.0": 1, "to_out.0": 2}, 1),
        ({"to_out.0": 2, "attn.to_out.0": 1}, 2),
        ({"out.0": 1}, 8),
        ({"^attn.to_out.0": 1}, 8),
        ({r"to_out\.0$": 1}, 1),
        ({"0": 3}, 3),
        ({"^transformer_blocks.0.attn.to_out.0": 5, "0": 3}, 5),
        ({"to_out.0.": 1, "x": 2}, 8),
    ],
)
def test_the_first_matching_pattern_counts(patterns, alpha):
    """A pattern is the end of a name at its dots, or with ^ the whole, escaped or not."""
    config = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": patterns}
    assert scale_of(config) == alpha / 4


@pytest.mark.parametrize("pattern", ["(([a-z_.0-9])+)+X", "(.|.)" * 30 + "X", ".*.*.*.*.*.*X"])
def test_no_pattern_of_a_file_is_run_as_an_expression(pattern):
    """These would hang a regular expression engine."""
    with pytest.raises(ConfigError, match=r"alpha_pattern has .* which is no module's name"):
        scale_of({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {pattern: 1}})


def test_a_bias_has_the_scale_of_its_factor():
    """peft's lora_bias; ComfyUI's `diff_b` is added as it is."""
    name = "diffusion_model.img_in"
    state = {**ab(name, rank=4), f"{name}.alpha": torch.tensor(2.0)}
    for bias, scale in ((f"{name}.lora_B.bias", 0.5), (f"{name}.diff_b", 1.0)):
        lora = from_tensors({**state, bias: torch.arange(64.0)}, {}, "x")
        assert torch.equal(lora.biases["img_in"][0], scale * torch.arange(64.0))


def control(seed: int, norm: str) -> LoraWeights:
    """Returns a control LoRA: two linears with biases, one norm, img_in of twice the width."""
    g = torch.Generator().manual_seed(seed)
    pieces = {PROJ_BFL: [piece(64, 64, seed)], "img_in": [piece(64, 32, seed)]}
    biases = {name: {0: torch.randn(64, generator=g)} for name in pieces}
    biases["double_blocks.0.img_attn.qkv"] = {p: torch.randn(64, generator=g) for p in range(3)}
    norms = {f"double_blocks.0.{norm}": torch.randn(32, generator=g)}
    return LoraWeights(pieces=pieces, biases=biases, norms=norms, hidden=64, mlp=256)


def test_no_rank_of_zeros_is_read():
    """Nor a bias of zeros: what fills a file up is no part of the update."""
    a, b = torch.randn(3, 64), torch.randn(64, 3)
    down, up = torch.cat([a, torch.zeros(2, 64)]), torch.cat([b, torch.zeros(64, 2)], dim=1)
    bias = {f"{KOHYA}proj.diff_b": torch.zeros(64)}
    lora = from_tensors(kohya(f"{KOHYA}proj", down, up, 10.0) | bias, {}, "x")
    assert list(lora.pieces) == [PROJ_BFL] and not lora.biases
    (piece,) = lora.pieces[PROJ_BFL]
    assert piece.rank == 3  # alpha is over the rank in the file
    assert torch.allclose(piece.b[0] @ piece.a, 2.0 * (b @ a), rtol=1e-5)
    half = from_tensors(kohya(f"{KOHYA}proj", down, torch.ones(64, 5)), {}, "x")
    assert half.pieces[PROJ_BFL][0].rank == 5  # zero in one factor alone: it may be trained


@pytest.mark.parametrize("format", FORMATS)
def test_linears_of_zeros(format):
    """Blocks that a tool switched off, or all. What bfl and xlabs fill up with is read as none."""
    zeros = {
        key: torch.zeros_like(t)
        for key, t in ab("transformer.transformer_blocks.1.attn.to_q").items()
    }
    off = from_tensors(zeros, {}, "x")
    assert through(off, format).pieces.keys() >= off.pieces.keys()
    one = from_tensors(zeros | ab(PROJ), {}, "x")
    assert one.pieces.keys() == off.pieces.keys() | {PROJ_BFL}
    filled = format in ("bfl", "xlabs")
    assert through(one, format).pieces.keys() == ({PROJ_BFL} if filled else one.pieces.keys())


WORD = "bundle_emb.ohwx 🐱"


def test_embeddings_of_trigger_words(tmp_path, log_lines):
    """OneTrainer puts them into the LoRA's file: they are kept, and not applied."""
    vectors = {f"{WORD}.clip_l": torch.randn(2, 768), f"{WORD}.t5_out": torch.randn(2, 4096)}
    state = {**ab(PROJ), **ab(TEXT), **vectors}
    lora = from_tensors(state, {}, "x")
    for format in ("diffusers", "kohya", "comfyui"):
        written = to_state(lora, format)
        assert all(torch.equal(written[key], vector) for key, vector in vectors.items())
        assert through(lora, format).embeddings.keys() == vectors.keys()
    for format in ("bfl", "xlabs"):
        with pytest.raises(ConfigError, match=f"{format} files cannot hold .*{WORD}"):
            to_state(lora, format)
    with pytest.raises(ConfigError, match="two of these LoRAs set bundle_emb"):
        merged([lora, lora])
    assert merged([lora, extract_lora(trained("attn"))]).embeddings.keys() == vectors.keys()
    on_model(lora, tmp_path / "x.safetensors", "kohya")
    assert log_lines[-1].endswith("its own embedding of ohwx 🐱 is not applied")


@pytest.mark.parametrize("rest, drop", [(ab(PROJ), True), ({}, False), (ab(TEXT), True)])
def test_a_hint_that_helps(rest, drop):
    """--drop where something is left."""
    with pytest.raises(ConfigError, match="unknown keys transformer.other") as error:
        from_tensors(ab("transformer.other.thing") | rest, {}, "x")
    assert ("--drop" in (error.value.hint or "")) is drop


def test_a_control_lora_comes_back(tmp_path):
    lora = control(1, "img_attn.norm.query_norm")
    state = to_state(lora, "bfl")
    assert "double_blocks.0.img_attn.qkv.lora_B.bias" in state
    assert "double_blocks.0.img_attn.norm.query_norm.scale" in state
    key = "diffusion_model.double_blocks.0.img_attn.norm.query_norm"  # ComfyUI renamed its norms
    comfyui = to_state(lora, "comfyui")
    assert f"{key}.set_weight" in comfyui and f"{key}.scale.set_weight" not in comfyui
    comfyui[f"{key}.scale.set_weight"] = comfyui.pop(f"{key}.set_weight")
    assert from_tensors(comfyui, {}, "x").norms.keys() == lora.norms.keys()
    assert from_tensors(state, {}, "x").form == "bfl control"
    for format in ("bfl", "comfyui", "diffusers"):
        back = through(through(lora, format), "bfl")
        assert back.norms.keys() == lora.norms.keys() and back.biases.keys() == lora.biases.keys()
        assert all(torch.equal(back.norms[k], lora.norms[k]) for k in lora.norms)
        for name, bias in lora.biases.items():
            assert all(torch.equal(back.biases[name][part], b) for part, b in bias.items())
    with pytest.raises(ConfigError, match=r"kohya files cannot hold .*proj.bias"):
        to_state(lora, "kohya")
    with pytest.raises(ConfigError, match="control LoRA"):
        on_model(lora, tmp_path / "x.safetensors")


def test_control_loras_add_up():
    """Factors and biases are summed; a norm is a new scale, which only one may set."""
    one, two = control(1, "img_attn.norm.query_norm"), control(2, "txt_attn.norm.key_norm")
    total = through(merged([one, scaled(two, -0.5)]), "bfl")
    deltas = [sum(p.b[0] @ p.a for p in lora.pieces[PROJ_BFL]) for lora in (one, two, total)]
    same({PROJ_BFL: deltas[2]}, {PROJ_BFL: deltas[0] - 0.5 * deltas[1]})
    for name, bias in total.biases.items():
        for part, b in bias.items():
            assert torch.equal(b, one.biases[name][part] - 0.5 * two.biases[name][part])
    assert total.biases.keys() == one.biases.keys()
    assert total.norms.keys() == one.norms.keys() | two.norms.keys()
    for name, scale in {**one.norms, **two.norms}.items():
        assert torch.equal(total.norms[name], scale)
    with pytest.raises(ConfigError, match="two of these LoRAs set double_blocks.0.img_attn.norm"):
        merged([one, control(3, "img_attn.norm.query_norm")])


def test_comfyui_files_have_the_width_of_a_wider_img_in():
    lora = control(1, "img_attn.norm.query_norm")
    assert to_state(lora, "comfyui")["diffusion_model.img_in.reshape_weight"].tolist() == [64, 32]
    plain = LoraWeights(pieces={"img_in": [piece(3072, 64)]}, norms=lora.norms)
    assert not any("reshape" in key for key in to_state(plain, "comfyui"))


@pytest.mark.parametrize("name", ["x_blocks.0", "double_blocks.0.img_mlp.2"])
def test_a_text_encoders_widths_are_its_own(name):
    """Whatever its linears are called, and first in the file."""
    lora = from_tensors(ab(f"text_encoder.{name}", 48, 32) | ab(PROJ), {}, "a file")
    assert list(lora.text) == [f"clip/{name}"] and (lora.hidden, lora.mlp) == (64, 256)


def test_a_text_encoders_lora_first_in_a_sum():
    """The first file need not tell the widths."""
    text = from_tensors(ab(TEXT), {}, "x")
    lora = extract_lora(trained("attn"))
    for total in (merged([text, lora]), merged([lora, text])):
        assert (total.hidden, total.mlp) == (64, 256) and total.text.keys() == text.text.keys()
        same(meaning(through(total, "kohya")), meaning(lora))


def on_model(lora: LoraWeights, file, format="bfl"):
    """Returns a model that has loaded the LoRA from a file."""
    file.write_bytes(to_bytes(to_state(lora, format), "fp32", {}))
    model = random_flux(SMALL)
    load_lora(model, file)
    return model


# ---------------------------------------------------------------- on a model


@pytest.mark.parametrize("format", FORMATS)
def test_no_rank_is_gained_by_saving_and_loading(format, tmp_path):
    for share_a in (False, True):
        model = trained("attn" if format == "xlabs" else "all", share_a)
        loaded = random_flux(SMALL)
        load_lora(loaded, save_lora(model, tmp_path / "x.safetensors", format))
        same(update(loaded), update(model))
        for name, layer in lora_layers(model).items():
            other = loaded.get_submodule(name)
            if format != "xlabs":  # which has one rank throughout
                assert other.lora_A.shape == layer.lora_A.shape, name
                assert other.lora.parts == layer.lora.parts


def with_weights(lora: LoraWeights, strength: float = 1.0):
    """Returns a model whose weights have the update added."""
    model = random_flux(SMALL)
    with torch.no_grad():
        for name, delta in meaning(lora).items():
            model.get_submodule(name).weight.add_(strength * delta)
    return model


def close(model, other, tolerance: float) -> bool:
    x = inputs(SMALL)
    with torch.no_grad():
        mine, truth = model(*x), other(*x)
    return (mine - truth).abs().max() < tolerance * truth.abs().max()


def test_linears_outside_the_blocks_act(tmp_path):
    lora = outer_and_text()
    lora.text, lora.pieces = {}, {k: v for k, v in lora.pieces.items() if "_blocks" not in k}
    lora.pieces[PROJ_BFL] = [Piece(torch.zeros(1, 64), {0: torch.zeros(64, 1)})]
    model = on_model(lora, tmp_path / "x.safetensors")
    assert close(model, with_weights(lora), 1e-5) and not close(model, random_flux(SMALL), 1e-3)


def test_the_strength_of_one_file_acts_and_stays_adjustable(tmp_path):
    file = save_lora(trained("attn", alpha=0.3), tmp_path / "x.safetensors")
    lora, model = read_lora(file), random_flux(SMALL)
    for strength in (0.5, -1.0, 0.0):
        load_lora(model, file, [strength])
        assert close(model, with_weights(lora, strength), 1e-4)
    set_lora_strength(model, 1.0)
    assert close(model, with_weights(lora), 1e-4)
    assert not close(model, with_weights(lora, 0.5), 1e-2)


def test_several_are_summed(tmp_path):
    """Different formats, ranks, targets and kinds of A, each with its strength."""
    one, two = trained("attn", True, rank=2), trained("attn+mlp", False, rank=3, seed=2)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_lora(one, files[0], "kohya")
    save_lora(two, files[1])
    model = random_flux(SMALL)
    parameters = load_lora(model, files, [1.5, -0.5])
    expected = {name: -0.5 * delta for name, delta in update(two).items()}
    for name, delta in update(one).items():
        expected[name] = expected[name] + 1.5 * delta
    same(update(model), expected)
    assert all(parameter.requires_grad for parameter in parameters)
    with pytest.raises(ConfigError, match="3 strengths for 2 LoRAs"):
        load_lora(model, files, [1, 2, 3])


def test_text_encoder_parts_are_not_applied(tmp_path, log_lines):
    on_model(outer_and_text(), tmp_path / "x.safetensors", "kohya")
    (line,) = log_lines
    assert line.endswith("text encoders is not applied")


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("share_a", [False, True])
def test_training_starts_from_a_file(format, share_a, tmp_path):
    old = trained("attn", share_a, rank=4, alpha=3.0)
    file = save_lora(old, tmp_path / "old.safetensors", format)
    model = random_flux(SMALL)
    inject_lora(model, 4, 7.0, "attn+mlp", share_a=share_a, seed=9)
    fresh = model.single_blocks[0].linear2.lora_A.clone()
    shapes = {n: layer.lora_A.shape for n, layer in lora_layers(model).items()}
    init_lora(model, file)
    same(update(model), update(old))
    assert {n: layer.lora_A.shape for n, layer in lora_layers(model).items()} == shapes
    assert torch.equal(model.single_blocks[0].linear2.lora_A, fresh)  # and trains from nothing


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"rank": 8}, "has rank 4, lora.rank is 8", "lora.rank=4"),
        ({"targets": "attn"}, "not among the targets", "targets: all"),
        ({"exclude": ["to_k"]}, "not among the targets", "exclude"),
        ({"share_a": True}, "lora.share_a", "share_a=false"),
    ],
)
def test_an_unsuitable_start_names_the_setting(changes, message, hint, tmp_path):
    file = save_lora(trained("attn+mlp", rank=4), tmp_path / "old.safetensors")
    model = random_flux(SMALL)
    inject_lora(model, **{"rank": 4, "targets": "attn+mlp", **changes})
    with pytest.raises(ConfigError, match=message) as error:
        init_lora(model, file)
    assert hint in error.value.hint


# ---------------------------------------------------------------- what is refused


def refused(path, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read_lora(path)
    assert str(path) in error.value.message and "\n" not in error.value.message


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_are_refused(case, tmp_path):
    """With --drop too, but for what is of another part of the model than the factors."""
    state, message = REFUSED[case]
    path = tmp_path / "flux_lora.safetensors"  # a name that promises what is not there
    save_file(state, path)
    refused(path, message)
    if "text encoder" not in case and "block of" not in case:
        with pytest.raises(ConfigError, match=message) as error:
            read_lora(path, drop=True)
        assert "--drop" not in (error.value.hint or "")


def test_a_file_of_something_else_is_not_read_to_be_refused(tmp_path, monkeypatch):
    """A base checkpoint has tens of GB; its names are enough."""
    path = tmp_path / "base.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(4, 4)}, path)
    monkeypatch.setattr(Safetensors, "read", lambda self, key: pytest.fail(f"{key} was read"))
    refused(path, "not a LoRA of FLUX.1")
    keys = ("img_attn.qkv.weight", "img_attn.norm.key_norm.scale")
    save_file({f"double_blocks.0.{key}": torch.ones(4) for key in keys}, path)
    refused(path, "not a LoRA of FLUX.1: it is a FLUX.1 transformer")
    save_file(
        {f"{side}.0.block.0.x": torch.ones(4) for side in ("decoder.up", "encoder.down")}, path
    )
    refused(path, "not a LoRA of FLUX.1: it is a VAE")


def test_a_folder_with_one_file_is_that_file(tmp_path):
    """A Hub repository holds a LoRA under any name."""
    refused(tmp_path, "is a folder without")
    save_file(ab(PROJ), tmp_path / "anything.safetensors")
    assert read_lora(tmp_path).rank() == 2
    save_file(ab(PROJ), tmp_path / "another.safetensors")
    refused(tmp_path, "with 2 other .safetensors files")
    save_file(ab(PROJ, rank=3), tmp_path / "adapter_model.safetensors")
    assert read_lora(tmp_path).rank() == 3


WORDS = [
    *("transformer.", "diffusion_model.", "base_model.model.", "lora_unet_", "lora_te1_"),
    *("lycoris_", "transformer_blocks.0.", "single_blocks.1.", "double_blocks_0_"),
    *("single_transformer_blocks.", "attn.to_q", "linear1", "img_attn_qkv", "img_attn.qkv"),
    *("processor.qkv_lora", "proj_out", "0.", ".lora_A", ".lora_B", ".lora_down", "_lora.up"),
    *(".weight", ".bias", ".alpha", ".default", ".norm.query_norm.scale", "x_embedder"),
    *("norm_out.linear", "text_model_encoder_layers_0_mlp_fc1"),
]


def test_any_keys_are_read_or_refused():
    read = 0
    for seed in range(400):
        rng, state = random.Random(seed), {}
        for _ in range(rng.randrange(6)):
            key = "".join(rng.choices(WORDS, k=rng.randint(1, 6)))
            state[key] = torch.ones([rng.randrange(5) for _ in range(rng.randrange(5))])
        if rng.random() < 0.5:
            state |= ab(PROJ)
        try:
            lora = from_tensors(state, {}, "x", drop=True)
        except ConfigError as error:
            assert error.message and "\n" not in error.message
        else:
            assert lora.pieces or lora.text
            to_state(lora, "diffusers", drop=True)
            read += 1
    assert 100 < read < 300
