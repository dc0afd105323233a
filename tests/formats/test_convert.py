"""The command `fluxfast convert`, and diffusers' own loaders on what it writes, at the width that
they require.
"""

import dataclasses
import math
from functools import partial
from itertools import product

import pytest
import torch
from checkpoints import tensors_of
from lora_files import (
    KOHYA,
    PROJ,
    PROJ_BFL,
    REFUSED,
    TEXT,
    ab,
    held_by_xlabs,
    kohya,
    meaning,
    same,
    trained,
    update,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import SMALL, diffusers_forward, inputs, random_flux, randomize

from fluxfast.errors import ConfigError
from fluxfast.formats.lora import convert as lora_convert
from fluxfast.formats.lora.apply import extract_lora, load_lora, save_lora
from fluxfast.formats.lora.read import from_tensors, read_lora
from fluxfast.formats.lora.update import LoraWeights, Piece, merged
from fluxfast.formats.lora.write import FORMATS, to_state
from fluxfast.model.flux import Flux
from fluxfast.model.init import fill
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
def convert(fluxfast, monkeypatch, tmp_path):
    """Runs `fluxfast convert` inside an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(fluxfast, "convert")


@pytest.fixture
def a_to_b(convert, tmp_path):
    """Returns run(format, …), which converts a.safetensors to b.safetensors with --verify."""
    save_lora(trained("attn"), tmp_path / "a.safetensors", metadata={"trigger": "ohwx"})
    return lambda format, *more: convert(
        "a.safetensors", "--to", format, "b.safetensors", "--verify", *more
    )


def dtypes(path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(path).values()}


def left(folder) -> list[str]:
    return [file.name for file in folder.iterdir()]


@pytest.mark.parametrize("format", FORMATS)
def test_command(format, a_to_b, tmp_path):
    code, out, err = a_to_b(format)
    assert code == 0, err
    *layers, worst, path = out.splitlines()
    truth = update(trained("attn"))
    assert path == "b.safetensors" and "a.safetensors: diffusers, rank 3" in err
    assert {line.split()[0] for line in layers} >= truth.keys()
    assert float(worst.split(": ")[1].split()[0]) < 1e-6
    same(meaning(read_lora(tmp_path / "b.safetensors")), truth)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["trigger"] == "ohwx"


def test_fp16_survives_a_small_alpha(a_to_b, tmp_path):
    """Factors that fp16 holds badly once alpha is folded in are balanced first."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 64, generator=g), torch.randn(64, 64, generator=g) * 1e-4
    save_file(kohya(f"{KOHYA}proj", a, b, 2.0**-4), tmp_path / "a.safetensors")
    code, _, err = a_to_b("diffusers", "--dtype", "fp16")
    assert code == 0, err
    written = load_file(tmp_path / "b.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    down, up = (written[f"{PROJ}.lora_{side}.weight"].double() for side in "AB")
    truth = (b.double() @ a.double()) * 2.0**-10
    assert (up @ down - truth).abs().max() < 2e-3 * truth.abs().max()
    folded = (b * 2.0**-10).half().double() @ a.half().double()
    assert (folded - truth).abs().max() > 0.05 * truth.abs().max()  # the naive way loses it


def test_merge_scale_and_dtype(convert, tmp_path):
    one, two = trained("attn", True, rank=2), trained("attn+mlp", rank=3, seed=2)
    save_lora(one, tmp_path / "a.safetensors", "kohya")
    save_lora(two, tmp_path / "b.safetensors", "comfyui")
    words = "a.safetensors b.safetensors --strength 1 --strength -0.5 --scale 2 --dtype bf16"
    code, _, err = convert(*words.split(), "--to", "diffusers", "c.safetensors")
    assert code == 0, err
    expected = {name: -delta for name, delta in update(two).items()}
    for name, delta in update(one).items():
        expected[name] = expected[name] + 2 * delta
    assert dtypes(tmp_path / "c.safetensors") == {torch.bfloat16}
    for name, got in meaning(read_lora(tmp_path / "c.safetensors")).items():
        assert (got - expected[name]).abs().max() < 0.03 * expected[name].abs().max()


def test_wrong_metadata_is_left_out(convert, tmp_path):
    """alpha is folded in, so no loader may apply it again; a sum takes no source's metadata."""
    metadata = {"trigger": "ohwx", "lora_adapter_metadata": '{"transformer.lora_alpha": 8}'}
    for name in "ab":
        save_file(ab(PROJ, rank=4), tmp_path / f"{name}.safetensors", metadata)
    for sources in (["a.safetensors"], ["a.safetensors", "b.safetensors"]):
        target = f"{len(sources)}.safetensors"
        code, _, err = convert(*sources, "--to", "diffusers", target)
        assert code == 0, err
        with safe_open(tmp_path / target, "pt") as file:
            alone = len(sources) == 1
            assert file.metadata() == {"format": "pt", **({"trigger": "ohwx"} if alone else {})}
        (piece, *_) = read_lora(tmp_path / target).pieces[PROJ_BFL]
        assert torch.equal(piece.b[0] @ piece.a, torch.full((64, 64), 4 * 2.0 * len(sources)))


def test_verify_reports_rounding(convert, tmp_path):
    """Every layer's largest difference equals that of the whole ΔW."""
    save_lora(trained("attn"), tmp_path / "a.safetensors")
    before, worst = meaning(read_lora(tmp_path / "a.safetensors")), {}
    for dtype in ("fp32", "fp16", "bf16"):
        target = f"{dtype}.safetensors"
        words = ("--to", "kohya", target, "--verify", "--dtype", dtype)
        code, out, _ = convert("a.safetensors", *words)
        *lines, total, _ = out.splitlines()
        worst[dtype] = float(total.split(": ")[1].split()[0])
        assert code == 0 and {line.split()[0] for line in lines} == before.keys()
        after = meaning(read_lora(tmp_path / target))
        for name, *numbers in map(str.split, lines if dtype != "fp32" else []):
            change, size = (after[name] - before[name]).abs().max(), before[name].abs().max()
            assert float(numbers[0]) == pytest.approx(change.item(), rel=6e-3)
            assert float(numbers[2]) == pytest.approx(size.item(), rel=6e-3)
    assert worst["fp32"] < 1e-6 < 1e-5 < worst["fp16"] < worst["bf16"] < 5e-2


def test_unchanged_factors_are_not_multiplied(convert, tmp_path, monkeypatch):
    """fp32 rounds nothing: no ΔW of 12 billion entries need be formed."""
    save_lora(trained("all"), tmp_path / "a.safetensors")
    save_lora(trained("attn", True, seed=2), tmp_path / "b.safetensors", "kohya")
    monkeypatch.setattr(torch, "mm", lambda *arguments, **named: pytest.fail("multiplied"))
    for format in ("kohya", "comfyui", "bfl", "diffusers"):
        words = ("--strength", 0.7, "--to", format, f"{format}.safetensors", "--verify")
        code, out, err = convert("a.safetensors", "b.safetensors", *words)
        assert code == 0, err
        *layers, worst, _ = out.splitlines()
        assert all(line.split()[1:] == ["0"] for line in layers) and "0 in every layer" in worst


def test_verify_accepts_updates_that_cancel(a_to_b, convert):
    """The sum may be smaller than the rounding of one product."""
    words = "a.safetensors a.safetensors --strength 1 --strength -0.9999 --to kohya b.safetensors"
    code, out, err = convert(*words.split(), "--verify")
    assert code == 0 and "0 in every layer" in out, err


@pytest.mark.parametrize(
    "source, word, module",
    [("a", "img_attn_proj", PROJ_BFL), ("text", "fc1", f"clip/{TEXT.partition('.')[2]}")],
)
def test_verify_finds_a_wrong_file(source, word, module, a_to_b, convert, tmp_path, monkeypatch):
    """In a text encoder too. Nothing is written."""
    right = lora_convert.to_state
    save_file(ab("transformer.proj_out") | ab(TEXT), tmp_path / "text.safetensors")

    def wrong(*arguments, **named):
        state = right(*arguments, **named)
        return {key: t * 1.001 if word in key else t for key, t in state.items()}

    monkeypatch.setattr(lora_convert, "to_state", wrong)
    words = (f"{source}.safetensors", "--to", "kohya", "b.safetensors", "--verify")
    code, out, err = convert(*words)
    assert code == 1 and out == "" and f"{module} would change by 0.00" in err
    assert sorted(left(tmp_path)) == ["a.safetensors", "text.safetensors"]


@pytest.mark.parametrize("lost", [PROJ_BFL, "single_blocks.1.linear1"])
def test_verify_finds_missing_parts(lost, a_to_b, tmp_path, monkeypatch):
    """A linear that is not written, or a part of one."""
    right = lora_convert.to_state

    def wrong(lora, *arguments, **named):
        pieces = {name: p[1:] if name == lost else p for name, p in lora.pieces.items()}
        pieces = {name: p for name, p in pieces.items() if p}
        return right(dataclasses.replace(lora, pieces=pieces), *arguments, **named)

    monkeypatch.setattr(lora_convert, "to_state", wrong)
    code, _, err = a_to_b("diffusers")
    assert code == 1 and f"{lost} would change by 1 of its size" in err, err
    assert left(tmp_path) == ["a.safetensors"]


def test_overflow_is_not_written(a_to_b, convert, tmp_path):
    """Not in fp32 either; a file that fp16 alone cannot hold is fp32, with a warning."""
    save_file({k: t * 1e10 for k, t in ab(PROJ).items()}, tmp_path / "a.safetensors")
    run = partial(convert, "a.safetensors", "--to", "kohya", "b.safetensors")
    for words in (("--scale", "nan"), ("--scale", "inf"), ("--strength", "nan")):
        code, out, err = run(*words)
        assert code == 2 and out == "" and "no number to multiply by" in err
    for verify in ([], ["--verify"]):
        code, out, err = run("--scale", 1e30, *verify)
        assert code == 2 and out == "" and "larger than fp32 can hold" in err, err
    code, out, err = run("--scale", 1e19, "--verify", "--dtype", "bf16")
    assert code == 1 and "would change by inf" in err, err  # ΔW itself, of factors that fit
    assert left(tmp_path) == ["a.safetensors"]
    code, out, err = run("--dtype", "fp16")
    assert code == 0 and "fp16 cannot hold lora_unet" in err and "fp32" in err
    assert dtypes(tmp_path / "b.safetensors") == {torch.float32}


def test_dropping(convert, tmp_path):
    model = trained("all")
    state = load_file(save_lora(model, tmp_path / "a.safetensors"))
    stranger = state | ab("transformer.other.thing") | {f"{PROJ}.base_layer.weight": torch.ones(1)}
    run = partial(convert, "a.safetensors", "--to", "xlabs", "b.safetensors")
    code, _, err = run()
    assert code == 2 and "xlabs files cannot hold" in err and "modulation.lin" in err
    assert "hint: --drop leaves it out" in err
    save_file(stranger, tmp_path / "a.safetensors")
    code, _, err = run()
    assert code == 2 and "other.thing" in err
    assert left(tmp_path) == ["a.safetensors"]
    code, out, err = run("--drop", "--verify")
    assert code == 0 and "left out" in err and "other.thing" in err and "modulation.lin" in err, err
    same(meaning(read_lora(tmp_path / "b.safetensors")), held_by_xlabs(update(model)))


# ---------------------------------------------------------------- one rank for all


def mixed(alphas: bool = True) -> dict[str, torch.Tensor]:
    """Returns a kohya LoRA with a rank, and an alpha, of its own for each linear."""
    g, state = torch.Generator().manual_seed(0), {}
    for index, name in enumerate(block_linears(SMALL)):
        rank, (rows, columns) = [2, 3, 6, 1][index % 4], linear_shape(name, SMALL)
        a, b = torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g)
        alpha = [1.0, 4.0, 0.5][index % 3] if alphas else None
        state |= kohya(f"lora_unet_{name.replace('.', '_')}", a, b, alpha)
    clip = "lora_te1_text_model_encoder_layers_0_"
    for name, rank in (("self_attn_q_proj", 2), ("mlp_fc1", 5)):
        state |= kohya(
            clip + name, torch.ones(rank, 64), torch.ones(64, rank), 1.0 if alphas else None
        )
    return state


def ranks(state) -> set[tuple[str, int]]:
    """Returns the ranks of each network."""
    return {(k.split(".")[0], t.shape[0]) for k, t in state.items() if ".lora_A" in k}


@pytest.mark.parametrize("alphas", [True, False])
def test_diffusers_files_have_one_rank(alphas, convert, tmp_path):
    """A loader that takes the first rank for all then scales none, as the installed one, which
    takes each layer's own. What is converted back has its own ranks again.
    """
    from diffusers.utils.peft_utils import get_peft_kwargs

    source = mixed(alphas)
    save_file(source, tmp_path / "a.safetensors")
    code, out, err = convert("a.safetensors", "--to", "diffusers", "b.safetensors", "--verify")
    assert code == 0 and "0 in every layer" in out, err
    written = load_file(tmp_path / "b.safetensors")
    assert ranks(written) == {("transformer", 6), ("text_encoder", 5)}
    assert not any("alpha" in key for key in written)
    same(meaning(read_lora(tmp_path / "b.safetensors")), meaning(from_tensors(source, {}, "x")))
    theirs = {k: t for k, t in written.items() if k.startswith("transformer.")}
    up = {f"^{k}": t.shape[1] for k, t in theirs.items() if "lora_B" in k}
    config = get_peft_kwargs(up, None, theirs)
    assert config["r"] == config["lora_alpha"] == 6
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    code, _, err = convert("b.safetensors", "--to", "kohya", "c.safetensors")
    assert code == 0, err
    back = load_file(tmp_path / "c.safetensors")
    lengths = {k: len(t) for k, t in back.items() if "down" in k and "modulation" in k}
    assert lengths == {k: len(source[k]) for k in lengths} and len(lengths) == 2


@pytest.mark.parametrize("alone", [True, False])
def test_verify_sees_what_older_diffusers_sees(alone, convert, tmp_path, monkeypatch):
    """Ranks that differ act there at the first's strength."""
    monkeypatch.setattr("fluxfast.formats.lora.write._at_one_rank", lambda linears: linears)
    state = ab(PROJ, rank=4) | ({} if alone else ab("transformer.proj_out", rank=2))
    save_file(state, tmp_path / "a.safetensors")
    code, _, err = convert("a.safetensors", "--to", "diffusers", "b.safetensors", "--verify")
    assert code == (0 if alone else 1), err
    assert alone or "img_attn.proj would change by 0.5 of its size" in err


def bfl_wrapper(spec, **options):
    """Returns BFL's model with a LoRA on every linear, its parameters neither set nor on a CPU."""
    from fluxbfl.model import FluxLoraWrapper, FluxParams

    sizes = {f.name: getattr(spec, f.name, None) for f in dataclasses.fields(FluxParams)}
    sizes |= {"out_channels": spec.in_channels, "qkv_bias": True, "axes_dim": list(spec.axes_dim)}
    with torch.device("meta"):
        return FluxLoraWrapper(params=FluxParams(**sizes), **options)


def with_bfl(path, spec, **options) -> torch.Tensor:
    """Loads as BFL's own code does, and returns the model's output for `inputs`."""
    theirs = bfl_wrapper(spec, **options)
    tensors = tensors_of(spec, torch.float32)
    for state in (tensors, load_file(path)):
        _, unexpected = theirs.load_state_dict(state, strict=False, assign=True)
        assert not unexpected
    assert not any(p.is_meta for p in theirs.parameters())
    with torch.no_grad():
        return theirs(*inputs(spec))


@pytest.mark.parametrize(
    "options", [{"targets": "attn"}, {"targets": "all", "rank": 40}, {"share_a": True}]
)
def test_bfls_loader_takes_our_files(options, tmp_path):
    """At its rank of 128, cut to a layer's width (here 64 and less). Rank 40 is 120 in qkv, more
    than there are columns."""
    model = trained(**options)
    path = save_lora(model, tmp_path / "a.safetensors", "bfl")
    with torch.no_grad():
        ours, base = model(*inputs(SMALL)), random_flux(SMALL)(*inputs(SMALL))
    theirs = with_bfl(path, SMALL)
    assert (theirs - ours).abs().max() < 1e-4 * (ours - base).abs().max()
    assert read_lora(path).form == "bfl" and not read_lora(path).biases
    same(meaning(read_lora(path)), update(model))


def test_bfls_loader_takes_what_is_converted(convert, tmp_path):
    """A higher rank is that of the whole file; a control LoRA keeps its biases and norms."""
    g = torch.Generator().manual_seed(1)
    spec = dataclasses.replace(SMALL, hidden_size=256, num_heads=8, in_channels=64)
    every = dict.fromkeys([*block_linears(spec), *outer_linears(spec)])
    state = {}
    for name in every:
        rows, columns = linear_shape(name, spec)
        rank = 150 if name.endswith("img_mlp.2") else 2
        state[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=g) * 0.1
        state[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=g) * 0.1
    state["img_in.lora_B.bias"] = torch.randn(256, generator=g)
    state["double_blocks.0.txt_attn.norm.key_norm.scale"] = torch.rand(32, generator=g)
    save_file(state, tmp_path / "a.safetensors")
    code, _, err = convert("a.safetensors", "--to", "bfl", "b.safetensors", "--verify")
    assert code == 0, err
    written = load_file(tmp_path / "b.safetensors")
    whole = bfl_wrapper(spec, lora_rank=150).state_dict()
    wanted = {k: t.shape for k, t in whole.items() if ".lora_" in k}
    assert {k: t.shape for k, t in written.items() if ".lora_" in k} == wanted
    with_bfl(tmp_path / "b.safetensors", spec, lora_rank=150)
    back = from_tensors(written, {}, "x")
    assert (
        list(back.biases) == ["img_in"] and len(back.norms) == 1 and len(back.pieces) == len(every)
    )


def test_a_bfl_file_of_flux_dev_is_whole():
    """Of any LoRA as wide as FLUX.1-dev. Without memory: it has 2.5 GB."""
    with torch.device("meta"):
        zero = Piece(torch.zeros(16, 3072), {0: torch.zeros(3072, 16)})
        lora = LoraWeights(pieces={PROJ_BFL: [zero]}, hidden=3072, mlp=12288)
        state = to_state(lora, "bfl")
    whole = bfl_wrapper(DEV).state_dict()
    wanted = {k: t.shape for k, t in whole.items() if ".lora_" in k}
    assert {k: t.shape for k, t in state.items()} == wanted


def test_a_bfl_file_of_unknown_sizes_has_a_note(log_lines):
    piece = Piece(torch.ones(4, 96), {0: torch.ones(96, 4)})
    state = to_state(LoraWeights(pieces={PROJ_BFL: [piece]}, hidden=96, mlp=384), "bfl")
    assert len(state) == 3 and "FluxLoraWrapper needs all" in log_lines[-1]


WRONG = ("sdxl", "lokr", "ranks")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a.safetensors --to a1111 b.safetensors", "not one of diffusers, kohya"),
        ("a.safetensors --to kohya", "a file to read and a file to write"),
        ("a.safetensors --to kohya b.safetensors --dtype int8", "dtype"),
        ("a.safetensors --to kohya b.safetensors --strength 1 --strength 2", "2 strengths for 1"),
        ("a.safetensors --to kohya .", "is a folder"),
        ("a.safetensors --to kohya a.safetensors", "a.safetensors is there already"),
        ("a.safetensors wide.safetensors --to kohya", "is there already"),
        ("a.safetensors --to kohya link.safetensors", "is there already"),
        ("none.safetensors --to kohya b.safetensors", "cannot read"),
        ("wide.safetensors a.safetensors --to kohya b.safetensors", "added up"),
        *[(f"{case}.safetensors --to kohya b.safetensors", REFUSED[case][1]) for case in WRONG],
    ],
)
def test_bad_calls_write_nothing(words, message, convert, tmp_path):
    save_lora(trained("attn"), tmp_path / "a.safetensors")
    save_file(ab(PROJ, 48, 48), tmp_path / "wide.safetensors")
    for case in WRONG:
        save_file(REFUSED[case][0], tmp_path / f"{case}.safetensors")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    code, out, err = convert(*words.split())
    assert code == 2 and out == "" and message in err, err
    (tmp_path / "link.safetensors").unlink()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_widths_that_differ_in_the_mlp_are_not_added_up():
    name = "transformer.single_transformer_blocks.0.proj_mlp"
    loras = [from_tensors(ab(name, rows, 64), {}, "x") for rows in (256, 128)]
    with pytest.raises(ConfigError, match="64 wide with an MLP of 256 and 64 wide"):
        merged(loras)


# ---------------------------------------------------------------- loaders nobody here wrote

WIDE = dataclasses.replace(DEV, depth=1, depth_single_blocks=1)  # diffusers asserts 3072


def wide_flux() -> Flux:
    """Its weights repeat a million random numbers: half a billion would take a minute."""
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


@pytest.fixture(scope="module")
def x():
    return inputs(WIDE, batch=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "format, share_a",
    [
        ("diffusers", False),
        ("kohya", True),
        *[
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in product(("diffusers", "kohya", "comfyui", "xlabs"), (False, True))
            if pair not in (("diffusers", False), ("kohya", True))
        ],
    ],
)
def test_diffusers_loads_our_files(format, share_a, pair, x, tmp_path):
    from diffusers.loaders import FluxLoraLoaderMixin

    theirs, ours = pair
    for layer in lora_layers(ours).values():
        layer.remove_lora()
    inject_lora(ours, 2, 3.0, "attn" if format == "xlabs" else "all", share_a=share_a)
    randomize(ours, std=0.05)
    path = save_lora(ours, tmp_path / "x.safetensors", format)
    state, alphas, metadata = FluxLoraLoaderMixin.lora_state_dict(
        str(path), return_alphas=True, return_lora_metadata=True
    )
    base = diffusers_forward(theirs, x)
    FluxLoraLoaderMixin.load_lora_into_transformer(state, alphas, theirs, metadata=metadata)
    with_lora = diffusers_forward(theirs, x)
    theirs.unload_lora()
    with torch.no_grad():
        mine = ours(*x)
    scale = (with_lora - base).abs().max()
    assert scale > 1e-2 * base.abs().max()
    assert (mine - with_lora).abs().max() < 1e-4 * scale
    assert torch.equal(diffusers_forward(theirs, x), base)


@pytest.mark.slow
def test_we_load_a_file_of_peft(pair, x, tmp_path):
    """A LoRA that peft made on diffusers' model and saved, with its keys and configuration."""
    from peft import LoraConfig, get_peft_model

    theirs, ours = pair
    targets = ["to_k", "to_out.0", "proj_mlp", "norm1.linear", "ff.net.2", "norm_out.linear"]
    config = LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    wrapped = get_peft_model(theirs, config)
    wrapped.save_pretrained(tmp_path)
    expected = diffusers_forward(wrapped, x)
    wrapped.unload()
    base = diffusers_forward(theirs, x)
    load_lora(ours, tmp_path)
    with torch.no_grad():
        mine = ours(*x)
    scale = (expected - base).abs().max()
    assert scale > 1e-3 * base.abs().max()
    assert (mine - expected).abs().max() < 1e-4 * max(scale, base.abs().max())


def control_state() -> dict[str, torch.Tensor]:
    """Returns a BFL control LoRA of one double and one single block."""
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
    theirs = {key.removeprefix("transformer."): tensor for key, tensor in theirs.items()}
    ours = to_state(from_tensors(state, {}, "control"), "diffusers")
    ours = {key.removeprefix("transformer."): tensor for key, tensor in ours.items()}
    a = "norm_out.linear.lora_A.weight"
    theirs[a] = theirs[a].flip(0)  # its two ranks
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


# ComfyUI's map of a diffusers name onto its own tensor: (BFL weight, rows it patches, or all)
# by ComfyUI's map of diffusers' names: the part of a BFL weight, and the rows that it patches
COMFYUI_SLICES = {
    "transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", slice(64, 128)),
    "transformer_blocks.0.attn.add_v_proj": ("double_blocks.0.txt_attn.qkv", slice(128, 192)),
    "single_transformer_blocks.1.attn.to_q": ("single_blocks.1.linear1", slice(0, 64)),
    "single_transformer_blocks.1.proj_mlp": ("single_blocks.1.linear1", slice(192, 448)),
    "single_transformer_blocks.1.proj_out": ("single_blocks.1.linear2", slice(0, 64)),
    "transformer_blocks.0.ff_context.net.2": ("double_blocks.0.txt_mlp.2", slice(0, 64)),
}


def test_comfyui_applies_our_files():
    """ComfyUI adds ΔW = up · down (there is no alpha) to the weight of that name under
    `diffusion_model.`, or to some rows of it.
    """
    model = trained("all")
    truth, lora = update(model), extract_lora(model)
    updates = []
    for format, prefix, sides in (
        ("comfyui", "diffusion_model.", ("lora_up", "lora_down")),
        ("bfl", "", ("lora_B", "lora_A")),
        ("diffusers", "transformer.", ("lora_B", "lora_A")),
    ):
        state = to_state(lora, format)
        assert not any(key.endswith("alpha") for key in state)
        names = COMFYUI_SLICES if format == "diffusers" else {m: (m, slice(None)) for m in truth}
        for name, (module, rows) in names.items():
            up, down = (state[f"{prefix}{name}.{side}.weight"] for side in sides)
            updates.append((up @ down, truth[module][rows]))
    for delta, expected in updates:
        assert (delta - expected).abs().max() < 1e-5 * expected.abs().max()


def test_ranks_of_a_merge_add_up():
    """No new decomposition: the factors of both files remain."""
    loras = [extract_lora(trained("attn", rank=2)), extract_lora(trained("attn", rank=5, seed=2))]
    state = to_state(merged(loras), "diffusers")
    assert {t.shape[0] for k, t in state.items() if "lora_A" in k} == {7}
    factors = [lora.pieces[PROJ_BFL][0].a for lora in loras]
    assert torch.equal(state[f"{PROJ}.lora_A.weight"], torch.cat(factors))
