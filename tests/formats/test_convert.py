"""`fluxfast convert` as a user meets it, and diffusers' own loaders reading what is written, at the
width that they insist on.
"""

import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import SMALL
from test_lora_formats import REFUSED, ab, lora_of, meaning, same, trained, update

from fluxfast.formats.lora.apply import load_lora, save_lora
from fluxfast.formats.lora.read import read_lora
from fluxfast.formats.lora.update import Lora, Piece
from fluxfast.formats.lora.write import FORMATS, to_state
from fluxfast.model.flux import Flux, fill
from fluxfast.model.lora import inject_lora, lora_layers
from fluxfast.model.names import (
    DOUBLE_NORMS,
    SINGLE_NORMS,
    SWAPPED,
    block_linears,
    linear_shape,
    outer_linears,
    tensor_sources,
)
from fluxfast.model.precision import layer_precisions
from fluxfast.model.spec import DEV


@pytest.fixture
def fluxfast(fluxfast, monkeypatch, tmp_path):
    """Inside an empty folder."""
    monkeypatch.chdir(tmp_path)
    return fluxfast


@pytest.mark.parametrize("format", FORMATS)
def test_command(format, fluxfast, tmp_path):
    model = trained("attn")
    save_lora(model, tmp_path / "a.safetensors", metadata={"trigger": "ohwx"})
    code, out, err = fluxfast("convert", "a.safetensors", "--to", format, "b.safetensors",
                              "--verify")  # fmt: skip
    assert code == 0, err
    *layers, worst, path = out.splitlines()
    assert path == "b.safetensors" and "a.safetensors: diffusers, rank 3" in err
    assert {line.split()[0] for line in layers} >= update(model).keys()
    assert float(worst.split(": ")[1].split()[0]) < 1e-6
    same(meaning(read_lora(tmp_path / "b.safetensors")), update(model))
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["trigger"] == "ohwx"


def test_merge_scale_and_dtype(fluxfast, tmp_path):
    one, two = trained("attn", True, rank=2), trained("attn+mlp", rank=3, seed=2)
    save_lora(one, tmp_path / "a.safetensors", "kohya")
    save_lora(two, tmp_path / "b.safetensors", "comfyui")
    code, _, err = fluxfast("convert", "a.safetensors", "b.safetensors", "--strength", 1,
                            "--strength", -0.5, "--scale", 2, "--dtype", "bf16", "--to",
                            "diffusers", "c.safetensors")  # fmt: skip
    assert code == 0, err
    expected = {name: -delta for name, delta in update(two).items()}
    for name, delta in update(one).items():
        expected[name] = expected[name] + 2 * delta
    assert {t.dtype for t in load_file(tmp_path / "c.safetensors").values()} == {torch.bfloat16}
    for name, got in meaning(read_lora(tmp_path / "c.safetensors")).items():
        assert (got - expected[name]).abs().max() < 0.03 * expected[name].abs().max()


def test_metadata_that_would_be_wrong_is_left_out(fluxfast, tmp_path):
    """alpha is folded in: a loader must not apply it again. Of a sum, nobody's are right."""
    state = ab("transformer.transformer_blocks.0.attn.to_out.0", rank=4)
    alpha = json.dumps({"transformer.lora_alpha": 8})
    for name in "ab":
        said = {"trigger": "ohwx", "lora_adapter_metadata": alpha}
        save_file(state, tmp_path / f"{name}.safetensors", said)
    for sources in (["a.safetensors"], ["a.safetensors", "b.safetensors"]):
        target = f"{len(sources)}.safetensors"
        code, _, err = fluxfast("convert", *sources, "--to", "diffusers", target)
        assert code == 0, err
        with safe_open(tmp_path / target, "pt") as file:
            alone = len(sources) == 1
            assert file.metadata() == {"format": "pt", **({"trigger": "ohwx"} if alone else {})}
        (piece, *_) = read_lora(tmp_path / target).pieces["double_blocks.0.img_attn.proj"]
        assert torch.equal(piece.b @ piece.a, torch.full((64, 64), 4 * 2.0 * len(sources)))


def test_fp16_factors_are_balanced(fluxfast, tmp_path):
    """What alpha shrinks beyond fp16's digits keeps them."""
    g = torch.Generator().manual_seed(0)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    state = {f"{name}.lora_down.weight": torch.randn(64, 64, generator=g),
             f"{name}.lora_up.weight": torch.randn(64, 64, generator=g) * 1e-6,
             f"{name}.alpha": torch.tensor(2.0**-6)}  # fmt: skip
    save_file(state, tmp_path / "a.safetensors")
    code, _, err = fluxfast("convert", "a.safetensors", "--to", "diffusers", "b.safetensors",
                            "--dtype", "fp16", "--verify")  # fmt: skip
    assert code == 0, err
    assert {t.dtype for t in load_file(tmp_path / "b.safetensors").values()} == {torch.float16}


def test_verify_looks_at_text_encoders_too(fluxfast, tmp_path, monkeypatch):
    from fluxfast.formats.lora import convert as lora_convert

    clip = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    save_file({**ab("transformer.proj_out"), **ab(clip)}, tmp_path / "a.safetensors")
    right = lora_convert.to_state

    def wrong(*arguments, **named):
        state = right(*arguments, **named)
        return {key: t * 1.01 if "fc1" in key else t for key, t in state.items()}

    monkeypatch.setattr(lora_convert, "to_state", wrong)
    code, _, err = fluxfast("convert", "a.safetensors", "--to", "kohya", "b.safetensors",
                            "--verify")  # fmt: skip
    assert code == 1 and "clip/text_model.encoder.layers.0.mlp.fc1 would change by 0.0" in err


def test_verify_reports_rounding(fluxfast, tmp_path):
    save_lora(trained("attn"), tmp_path / "a.safetensors")
    worst = {}
    for dtype in ("fp32", "fp16", "bf16"):
        code, out, _ = fluxfast("convert", "a.safetensors", "--to", "kohya", f"{dtype}.safetensors",
                                "--verify", "--dtype", dtype)  # fmt: skip
        assert code == 0
        worst[dtype] = float(out.splitlines()[-2].split(": ")[1].split()[0])
    assert worst["fp32"] < 1e-6 < 1e-5 < worst["fp16"] < worst["bf16"] < 5e-2


def test_verify_prints_the_largest_difference_of_every_layer(fluxfast, tmp_path):
    """Against ΔW formed whole, of what was read and what is written."""
    save_lora(trained("attn"), tmp_path / "a.safetensors")
    code, out, _ = fluxfast("convert", "a.safetensors", "--to", "kohya", "b.safetensors",
                            "--verify", "--dtype", "bf16")  # fmt: skip
    before, after = (meaning(read_lora(tmp_path / f"{x}.safetensors")) for x in "ab")
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()[:-2]}
    assert code == 0 and lines.keys() == before.keys()
    for name, delta in before.items():
        change, _, size = lines[name]
        assert float(change) == pytest.approx((after[name] - delta).abs().max().item(), rel=6e-3)
        assert float(size) == pytest.approx(delta.abs().max().item(), rel=6e-3)


def test_factors_that_stay_are_not_multiplied(fluxfast, tmp_path, monkeypatch):
    """In fp32 nothing is rounded: ΔW of 12 billion entries need not be formed to say so."""
    save_lora(trained("all"), tmp_path / "a.safetensors")
    save_lora(trained("attn", True, seed=2), tmp_path / "b.safetensors", "kohya")
    monkeypatch.setattr(torch, "mm", lambda *arguments, **named: pytest.fail("multiplied"))
    for format in ("kohya", "comfyui", "bfl", "diffusers"):
        code, out, err = fluxfast("convert", "a.safetensors", "b.safetensors", "--strength", 0.7,
                                  "--to", format, f"{format}.safetensors", "--verify")  # fmt: skip
        assert code == 0, err
        *layers, worst, _ = out.splitlines()
        assert all(line.split()[1:] == ["0"] for line in layers) and "0 in every layer" in worst


def test_verify_bears_updates_that_cancel(fluxfast, tmp_path):
    """What is left of a sum may be smaller than the rounding of one product."""
    save_lora(trained("attn"), tmp_path / "a.safetensors")
    code, out, err = fluxfast("convert", "a.safetensors", "a.safetensors", "--strength", 1,
                              "--strength", -0.9999, "--to", "kohya", "b.safetensors",
                              "--verify")  # fmt: skip
    assert code == 0 and "0 in every layer" in out, err


def test_verify_finds_a_wrong_file(fluxfast, tmp_path, monkeypatch):
    from fluxfast.formats.lora import convert as lora_convert

    save_lora(trained("attn"), tmp_path / "a.safetensors")
    right = lora_convert.to_state

    def wrong(*arguments, **named):
        state = right(*arguments, **named)
        key = next(key for key in state if "lora_B" in key)
        state[key] = state[key] * 1.001
        return state

    monkeypatch.setattr(lora_convert, "to_state", wrong)
    code, out, err = fluxfast("convert", "a.safetensors", "--to", "diffusers", "b.safetensors",
                              "--verify")  # fmt: skip
    assert code == 1 and out == "" and "would change by 0.00" in err
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("lost", ["double_blocks.0.img_attn.proj", "single_blocks.1.linear1"])
def test_verify_misses_nothing_that_is_gone(lost, fluxfast, tmp_path, monkeypatch):
    """A linear that is not written, or a part of one."""
    from fluxfast.formats.lora import convert as lora_convert

    save_lora(trained("attn"), tmp_path / "a.safetensors")
    right = lora_convert.to_state

    def wrong(lora, *arguments, **named):
        pieces = {**lora.pieces, lost: lora.pieces[lost][1:]}
        return right(dataclasses.replace(lora, pieces=pieces), *arguments, **named)

    def without(lora, *arguments, **named):
        pieces = {name: p for name, p in lora.pieces.items() if name != lost}
        return right(dataclasses.replace(lora, pieces=pieces), *arguments, **named)

    monkeypatch.setattr(lora_convert, "to_state", without if lost.endswith("proj") else wrong)
    code, _, err = fluxfast("convert", "a.safetensors", "--to", "diffusers", "b.safetensors",
                            "--verify")  # fmt: skip
    assert code == 1 and f"{lost} would change by 1 of its size" in err, err
    assert not (tmp_path / "b.safetensors").exists()


def test_what_overflows_is_not_written(fluxfast, tmp_path):
    """Not in fp32 either; what fp16 alone cannot hold goes into fp32, and that is said."""
    state = {k: t * 1e10 for k, t in ab("transformer.transformer_blocks.0.attn.to_out.0").items()}
    save_file(state, tmp_path / "a.safetensors")
    for words in (["--scale", "nan"], ["--scale", "inf"], ["--strength", "nan"]):
        code, out, err = fluxfast("convert", "a.safetensors", "--to", "kohya", "b.safetensors",
                                  *words)  # fmt: skip
        assert code == 2 and out == "" and "no number to multiply by" in err
    for verify in ([], ["--verify"]):
        code, out, err = fluxfast("convert", "a.safetensors", "--to", "kohya", "b.safetensors",
                                  "--scale", 1e30, *verify)  # fmt: skip
        assert code == 2 and out == "" and "larger than fp32 can hold" in err, err
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    code, out, err = fluxfast("convert", "a.safetensors", "--to", "kohya", "b.safetensors",
                              "--dtype", "fp16")  # fmt: skip
    assert code == 0 and "fp16 cannot hold lora_unet" in err and "fp32" in err
    assert {t.dtype for t in load_file(tmp_path / "b.safetensors").values()} == {torch.float32}
    code, out, err = fluxfast("convert", "a.safetensors", "--to", "kohya", "c.safetensors",
                              "--scale", 1e19, "--verify", "--dtype", "bf16")  # fmt: skip
    assert code == 1 and "would change by inf" in err, err  # ΔW itself, of factors that fit


def test_dropping(fluxfast, tmp_path):
    model = trained("all")
    state = load_file(save_lora(model, tmp_path / "a.safetensors"))
    save_file({**state, **ab("transformer.other.thing")}, tmp_path / "a.safetensors")
    arguments = ("convert", "a.safetensors", "--to", "xlabs", "b.safetensors")
    code, _, err = fluxfast(*arguments)
    assert code == 2 and "other.thing" in err
    save_file(state, tmp_path / "a.safetensors")
    code, _, err = fluxfast(*arguments)
    assert code == 2 and "xlabs files have no place for" in err and "modulation.lin" in err
    assert not (tmp_path / "b.safetensors").exists()
    save_file({**state, **ab("transformer.other.thing")}, tmp_path / "a.safetensors")
    code, out, err = fluxfast(*arguments, "--drop", "--verify")
    assert code == 0 and "left out" in err and "other.thing" in err and "modulation.lin" in err, err
    kept = {n: d for n, d in update(model).items() if "attn" in n or "linear" in n}
    for name in ("single_blocks.0.linear1", "single_blocks.1.linear1"):
        kept[name][3 * SMALL.hidden_size :] = 0
    same(meaning(read_lora(tmp_path / "b.safetensors")), kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.safetensors", "--to", "a1111", "b.safetensors"], "not one of diffusers, kohya"),
        (["a.safetensors", "--to", "kohya"], "a file to read and a file to write"),
        (["a.safetensors", "--to", "kohya", "b.safetensors", "--dtype", "int8"], "dtype"),
        (["a.safetensors", "--to", "kohya", "b.safetensors", "--strength", "1", "--strength",
          "2"], "2 strengths for 1"),
        (["a.safetensors", "--to", "kohya", "."], "is a folder"),
        (["a.safetensors", "--to", "kohya", "a.safetensors"], "a.safetensors is there already"),
        (["a.safetensors", "wide.safetensors", "--to", "kohya"], "is there already"),
        (["a.safetensors", "--to", "kohya", "link.safetensors"], "is there already"),
        (["none.safetensors", "--to", "kohya", "b.safetensors"], "cannot read"),
        (["wide.safetensors", "a.safetensors", "--to", "kohya", "b.safetensors"], "added up"),
        *[([f"{case}.safetensors", "--to", "kohya", "b.safetensors"], REFUSED[case][1])
          for case in ("sdxl", "sd3 diffusers", "lokr", "ranks")],
    ],
)  # fmt: skip
def test_bad_calls_write_nothing(arguments, message, fluxfast, tmp_path):
    save_lora(trained("attn"), tmp_path / "a.safetensors")
    save_file(ab("transformer.transformer_blocks.0.attn.to_out.0", 48, 48),
              tmp_path / "wide.safetensors")  # fmt: skip
    for case in ("sdxl", "sd3 diffusers", "lokr", "ranks"):
        save_file(REFUSED[case][0], tmp_path / f"{case}.safetensors")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    code, out, err = fluxfast("convert", *arguments)
    assert code == 2 and out == "" and message in err, err
    (tmp_path / "link.safetensors").unlink()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_nothing(fluxfast, tmp_path, monkeypatch):
    save_lora(trained("attn"), tmp_path / "a.safetensors")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, _, err = fluxfast("convert", "a.safetensors", "--to", "kohya", "b.safetensors")
    assert code == 1 and "No space left" in err
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_widths_that_differ_in_the_mlp_are_not_added_up():
    from fluxfast.errors import ConfigError
    from fluxfast.formats.lora.update import merged

    one, two = (read_of(ab("transformer.single_transformer_blocks.0.proj_mlp", rows, 64))
                for rows in (256, 128))  # fmt: skip
    with pytest.raises(ConfigError, match="64 wide with an MLP of 256 and 64 wide"):
        merged([one, two])


# ---------------------------------------------------------------- loaders nobody here wrote

WIDE = dataclasses.replace(DEV, depth=1, depth_single_blocks=1)  # diffusers asserts 3072


def wide_flux() -> Flux:
    """Its weights repeat a million drawn numbers: half a billion would take a minute."""
    bank = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))  # prime: rows differ

    def read(name: str) -> torch.Tensor:
        module, _, kind = name.rpartition(".")
        if kind == "scale":
            return 1 + 0.02 * bank[: WIDE.head_dim]
        shape = linear_shape(module, WIDE)[: 1 if kind == "bias" else 2]
        count = math.prod(shape)
        std = 0.02 if kind == "bias" else shape[1] ** -0.5
        return (bank * std).repeat(count // len(bank) + 1)[:count].view(shape)

    model = Flux(WIDE, torch.float32)
    fill(model, read, layer_precisions(WIDE, "fp32", "fp32", None))
    return model


@pytest.fixture(scope="module")
def pair():
    """diffusers' transformer and ours on the same weights."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        theirs = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    ours = wide_flux()
    tensors = {}
    for name, sources in tensor_sources(WIDE).items():
        module, _, kind = name.rpartition(".")
        tensor = getattr(ours.get_submodule(module), kind)
        if module == SWAPPED:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        heights = [theirs.get_parameter(source).shape[0] for source in sources]
        for source, part in zip(sources, tensor.split(heights), strict=True):
            tensors[source] = part
    theirs.load_state_dict(tensors, assign=True)
    return theirs, ours


@pytest.fixture
def x():
    from test_lora import inputs

    return inputs(WIDE, batch=1)


def run_theirs(theirs, x):
    img, img_ids, txt, txt_ids, t, y, guidance = x
    with torch.no_grad():
        return theirs(
            hidden_states=img, encoder_hidden_states=txt, pooled_projections=y, timestep=t,
            img_ids=img_ids[0], txt_ids=txt_ids[0], guidance=guidance,
        ).sample  # fmt: skip


def wide_lora(ours, share_a: bool, targets: str):
    for layer in lora_layers(ours).values():
        layer.remove_lora()
    inject_lora(ours, 2, 3.0, targets, share_a=share_a)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(ours).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g) * 0.05)


@pytest.mark.parametrize("share_a", [False, True], ids=["split", "shared"])
@pytest.mark.parametrize("format", ["diffusers", "kohya", "comfyui", "xlabs"])
def test_diffusers_loads_what_we_write(format, share_a, pair, x, tmp_path):
    from diffusers.loaders import FluxLoraLoaderMixin

    theirs, ours = pair
    wide_lora(ours, share_a, "attn" if format == "xlabs" else "all")
    path = save_lora(ours, tmp_path / "x.safetensors", format)
    state, alphas, metadata = FluxLoraLoaderMixin.lora_state_dict(
        str(path), return_alphas=True, return_lora_metadata=True
    )
    base = run_theirs(theirs, x)
    FluxLoraLoaderMixin.load_lora_into_transformer(state, alphas, theirs, metadata=metadata)
    with_lora = run_theirs(theirs, x)
    theirs.unload_lora()
    with torch.no_grad():
        mine = ours(*x)
    scale = (with_lora - base).abs().max()
    assert scale > 1e-2 * base.abs().max()
    assert (mine - with_lora).abs().max() < 1e-4 * scale
    assert torch.equal(run_theirs(theirs, x), base)


@pytest.mark.parametrize("share_a", [False, True], ids=["split", "shared"])
def test_peft_writes_what_we_load(share_a, pair, x, tmp_path):
    """A LoRA that peft made on diffusers' model, saved by peft: its own keys and configuration."""
    from peft import LoraConfig, get_peft_model

    theirs, ours = pair
    targets = ["to_k", "to_out.0", "proj_mlp", "norm1.linear", "ff.net.2", "norm_out.linear"]
    config = LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    wrapped = get_peft_model(theirs, config)
    wrapped.save_pretrained(tmp_path)
    expected = run_theirs(wrapped, x)
    wrapped.unload()
    base = run_theirs(theirs, x)
    load_lora(ours, tmp_path)
    with torch.no_grad():
        mine = ours(*x)
    scale = (expected - base).abs().max()
    assert scale > 1e-3 * base.abs().max()
    assert (mine - expected).abs().max() < 1e-4 * max(scale, base.abs().max())


def control_state() -> dict[str, torch.Tensor]:
    """All that a BFL control LoRA holds, of one double and one single block."""
    g, state = torch.Generator().manual_seed(5), {}
    for name in [*block_linears(WIDE), *outer_linears(WIDE)]:
        rows, columns = linear_shape(name, WIDE)
        columns = 128 if name == "img_in" else columns  # the picture and what controls it
        state[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=g)
        state[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=g)
        state[f"{name}.lora_B.bias"] = torch.randn(rows, generator=g)
    for block, norms in (("double_blocks.0", DOUBLE_NORMS), ("single_blocks.0", SINGLE_NORMS)):
        for name in norms:
            state[f"{block}.{name}.scale"] = torch.randn(128, generator=g)
    return state


def test_control_lora_as_diffusers_converts_it(monkeypatch):
    """Tensor by tensor against diffusers' converter, with its loops cut to one block each.

    One apart: for norm_out it also swaps the halves of A's ranks, which changes B A.
    """
    from diffusers.loaders import lora_conversion_utils as utils

    state = control_state()
    source = utils._convert_bfl_flux_control_lora_to_diffusers
    monkeypatch.setattr(utils, "range", lambda n: range(1 if n in (19, 38) else n), raising=False)
    theirs = source(dict(state))
    ours = {k.removeprefix("transformer."): t
            for k, t in to_state(read_of(state), "diffusers").items()}  # fmt: skip
    theirs = {key.removeprefix("transformer."): tensor for key, tensor in theirs.items()}
    a = "norm_out.linear.lora_A.weight"
    theirs[a] = theirs[a].flip(0)  # its two ranks
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


def read_of(state) -> Lora:
    from fluxfast.formats.lora.read import from_tensors

    return from_tensors(state, {}, "control")


# ComfyUI's map of a diffusers name onto its own tensor: (BFL weight, rows it patches, or all)
def comfyui_slices(h: int = 64) -> dict:
    return {
        "transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", h, h),
        "transformer_blocks.0.attn.add_v_proj": ("double_blocks.0.txt_attn.qkv", 2 * h, h),
        "single_transformer_blocks.1.attn.to_q": ("single_blocks.1.linear1", 0, h),
        "single_transformer_blocks.1.proj_mlp": ("single_blocks.1.linear1", 3 * h, 4 * h),
        "single_transformer_blocks.1.proj_out": ("single_blocks.1.linear2", 0, h),
        "transformer_blocks.0.ff_context.net.2": ("double_blocks.0.txt_mlp.2", 0, h),
    }


def test_comfyui_applies_our_files():
    """By ComfyUI's rule: ΔW = alpha / rank · up · down (1 without alpha), added to the slice of the
    weight that the name stands for, or to the weight under `diffusion_model.`.
    """
    model = trained("all")
    truth, lora = update(model), lora_of(model)
    split = to_state(lora, "diffusers")
    for theirs, (module, start, count) in comfyui_slices().items():
        up, down = (split[f"transformer.{theirs}.lora_{side}.weight"] for side in "BA")
        expected = truth[module][start : start + count]
        assert (up @ down - expected).abs().max() < 1e-5 * expected.abs().max()
    for format, prefix, names in (
        ("comfyui", "diffusion_model.", ("lora_up", "lora_down")),
        ("bfl", "", ("lora_B", "lora_A")),
    ):
        fused = to_state(lora, format)
        for module, expected in truth.items():
            up, down = (fused[f"{prefix}{module}.{side}.weight"] for side in names)
            assert (up @ down - expected).abs().max() < 1e-5 * expected.abs().max()
        assert not any(key.endswith("alpha") for key in fused)


def test_ranks_of_a_merge_add_up():
    """Nothing is decomposed anew: the factors of both files are there."""
    from fluxfast.formats.lora.update import merged

    one, two = lora_of(trained("attn", rank=2)), lora_of(trained("attn", rank=5, seed=2))
    state = to_state(merged([one, two]), "diffusers")
    assert {t.shape[0] for k, t in state.items() if "lora_A" in k} == {7}
    (first, *_), (second, *_) = (x.pieces["double_blocks.0.img_attn.proj"] for x in (one, two))
    a = state["transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight"]
    assert torch.equal(a, torch.cat([first.a, second.a])) and isinstance(first, Piece)
