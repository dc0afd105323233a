"""`fluxfast check`: the errors that it measures, what it chooses by them, the file it writes."""

import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small import SMALL, logged, noise_pictures
from typer.testing import CliRunner

from fluxfast.cli import app
from fluxfast.config.schema import dump_config
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.model.names import diffusers_parts
from fluxfast.model.precision import Precision
from fluxfast.model.spec import DEV
from fluxfast.tools import check as module
from fluxfast.tools.check import check
from fluxfast.tools.layer_errors import LIMITS, Errors, Measured, measure, table
from fluxfast.train import train

OUTLIER = "double_blocks.1.img_mlp.2"  # whose input has a channel 40 times the others


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return noise_pictures(tmp_path_factory.mktemp("photos"), 4, "noise of the kind")


@pytest.fixture(scope="module")
def outlier_model(nano_model, tmp_path_factory) -> Path:
    """The nano model with one channel of an MLP made large on one side of the GELU, and small again
    on the other, as real transformers have them."""
    folder = tmp_path_factory.mktemp("outlier") / "model"
    shutil.copytree(nano_model, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    (out,) = diffusers_parts(OUTLIER)
    (into,) = diffusers_parts(OUTLIER.replace("mlp.2", "mlp.0"))
    for kind in ("weight", "bias"):
        tensors[f"{into}.{kind}"][7] *= 40
    tensors[f"{out}.weight"][:, 7] /= 40
    save_file(tensors, file)
    return folder


def checked(config, **options) -> tuple[dict[str, Measured], str, dict]:
    """Returns the layers by name, what was logged, and the file."""
    with logged() as lines:
        layers = check(config, **options)
    written = yaml.safe_load((config.run_dir / "check.yaml").read_text())
    return {layer.name: layer for layer in layers}, "\n".join(lines), written


@pytest.fixture
def in_8_bits(configure):
    """Returns make(**changes): a run's configuration whose products are int8 by default."""
    return partial(configure, model__compute="int8", model__storage="fp32")


# ---------------------------------------------------------------- one layer


@pytest.mark.grid(1)
@pytest.mark.parametrize("storage", ["fp32", "nf4", "own"])
@pytest.mark.parametrize("kind, expected", [("int8", 0.0125), ("fp8", 0.0375)])
def test_errors_of_normal_values(kind, expected, storage):
    """What the limits were set by; and with the same codes kept, nothing more than they cost."""
    g = torch.Generator().manual_seed(0)
    shapes = ((3072, 3072), (32, 3072), (32, 3072))
    weight, x, dy = (torch.randn(shape, generator=g) for shape in shapes)
    plain = Precision(kind if storage == "own" else storage, kind)
    name = "double_blocks.0.img_attn.proj"
    layer = measure(name, DEV, weight, x, dy, plain, 0.0, torch.float32)
    own = {"fp32": 0.0, "nf4": 0.092, "int8": 0.009, "fp8": 0.0265}[plain.storage]
    for got in (layer.own.forward, layer.own.dx):
        assert got == pytest.approx(own, rel=0.15, abs=1e-6)
    total = math.hypot(own, expected) if storage == "nf4" else expected
    for errors in (layer.plain, layer.rotated):
        assert errors.forward == pytest.approx(total, rel=0.15)
        assert errors.dx == pytest.approx(total, rel=0.15)


def test_an_outlier_channel_is_spread_by_the_rotation():
    g = torch.Generator().manual_seed(0)
    weight, x, dy = (torch.randn(shape, generator=g) for shape in ((96, 256), (64, 256), (64, 96)))
    x[:, 3] *= 100
    weight[:, 3] /= 100
    plain = Precision("fp32", "int8")
    name = "double_blocks.0.img_mlp.2"
    layer = measure(name, SMALL, weight, x, dy, plain, LIMITS["int8"], torch.float32)
    assert layer.plain.forward > 0.2 and layer.rotated.forward < 0.1
    assert layer.choice == "rotate"


def test_linear1_and_linear2_come_in_two_parts():
    """The MLP's part is 1000 times smaller than attention's: with scales of its own it survives."""
    g = torch.Generator().manual_seed(0)
    hidden, mlp = SMALL.hidden_size, SMALL.mlp_hidden
    plain, how = Precision("fp32", "int8"), (LIMITS["int8"], torch.float32)
    x = torch.cat([torch.randn(32, hidden, generator=g), torch.zeros(32, mlp)], 1)
    x[:, hidden:] = 1e-3 * torch.randn(32, mlp, generator=g)
    weight = torch.cat([torch.zeros(hidden, hidden), torch.randn(hidden, mlp, generator=g)], 1)
    layer = measure("single_blocks.0.linear2", SMALL, weight, x, None, plain, *how)
    assert layer.plain.forward < 0.02 and layer.plain.dx is None
    dy = torch.randn(32, 3 * hidden + mlp, generator=g)
    dy[:, 3 * hidden :] *= 1e-3
    weight = torch.randn(3 * hidden + mlp, hidden, generator=g)
    weight[: 3 * hidden] *= 1e-6
    x = torch.randn(32, hidden, generator=g)
    layer = measure("single_blocks.0.linear1", SMALL, weight, x, dy, plain, *how)
    assert layer.plain.dx < 0.02


@pytest.mark.parametrize(
    "own, plain, rotated, choice",
    [
        ((0.002, 0.002), (0.01, 0.02), (0.01, 0.01), "8bit"),
        ((0.002, 0.002), (0.01, 0.031), (0.01, 0.02), "rotate"),
        ((0.002, 0.002), (0.031, None), (0.01, None), "rotate"),
        ((0.002, 0.002), (0.5, 0.1), (0.35, 0.05), "rotate"),  # above the limit, and yet a gain
        ((0.002, 0.002), (0.5, 0.1), (0.48, 0.05), "bf16"),  # hardly one
        ((0.002, 0.002), (0.031, 0.01), None, "bf16"),
        ((0.09, 0.08), (0.11, 0.11), (0.09, 0.09), "8bit"),  # the storage costs that already
        ((0.09, 0.08), (0.12, 0.11), (0.10, 0.11), "rotate"),
        ((0.0, 0.0), (math.inf, 0.01), (math.inf, 0.01), "bf16"),
        ((0.0, 0.0), (math.inf, 0.01), (0.01, 0.01), "rotate"),
    ],
)
def test_the_choice(own, plain, rotated, choice):
    rotated = None if rotated is None else Errors(*rotated)
    assert Measured("x", Errors(*own), Errors(*plain), rotated, 0.03).choice == choice


def test_the_table_has_a_column_of_each():
    errors = Errors(0.01, None)
    one = Measured("img_in", errors, errors, None, 0.03)
    other = Measured("single_blocks.0.linear1", errors, errors, errors, 0.03, 0.5)
    heading, first, second = table([one, other])
    assert len(heading.split()) == 9 and len(heading) == len(first) == len(second)
    assert first.split() == ["img_in", "0.0100", "0.0100", *"----", "8bit"]
    assert second.split()[-2:] == ["0.5000", "8bit"]


# ---------------------------------------------------------------- the model on data


@pytest.mark.slow
def test_check_finds_the_outlier_and_train_takes_its_file(
    in_8_bits, outlier_model, tmp_path, fluxfast
):
    config = in_8_bits(model__path=str(outlier_model), name="outlier")
    layers, log, written = checked(config, batches=2)
    assert len(layers) == 2 * 8 + 4 * 2  # the nano model's blocks, without modulation
    assert layers[OUTLIER].choice == "rotate"
    assert layers[OUTLIER].rotated.worst < 0.03 < layers[OUTLIER].plain.forward
    assert written == {"layers": {OUTLIER: "rotate"}}
    assert all(layer.cosine > 0.98 for layer in layers.values())
    path = config.run_dir / "check.yaml"
    line = f"23 layers in plain int8, 1 rotated, 0 in bf16; train so with --set model.layers={path}"
    assert log.splitlines()[-1] == line
    text = path.read_text()
    assert all(f"# {row}\n" in text for row in table(list(layers.values())))

    file = tmp_path / "c.yaml"
    file.write_text(dump_config(config))
    arguments = ["train", str(file), "--set", f"model.layers={path}", "--set", "train.steps=1"]
    code, _, err = fluxfast(*arguments)
    assert code == 0 and "1 layer rotated" in err, err
    saved = yaml.safe_load((config.run_dir / "config.yaml").read_text())
    assert saved["model"]["layers"] == {OUTLIER: "rotate"}


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind, storage", [("int8", "nf4"), ("int8", "int8"), ("fp8", "fp8")])
def test_check_in_other_storages(in_8_bits, kind, storage):
    layers, log, written = checked(
        in_8_bits(model__compute=kind, model__storage=storage), batches=1
    )
    assert written == {"layers": {}} and f"24 layers in plain {kind}" in log
    for layer in layers.values():
        assert layer.plain.worst <= layer.bound and layer.cosine > 0.98
        assert (layer.own.worst > 0.03) == (storage == "nf4")


@pytest.mark.slow
def test_check_depends_on_the_seed_and_not_on_the_memory_policy(in_8_bits):
    """Every draw is the seed's; recomputing blocks, or not, is no matter of the configuration."""
    first = checked(in_8_bits(), batches=1)[0]
    assert checked(in_8_bits(memory__policy="checkpoint"), batches=1)[0] == first
    assert checked(in_8_bits(seed=1), batches=1)[0] != first


def test_nothing_before_the_first_lora_has_a_dx(in_8_bits):
    config = in_8_bits(lora__include=["single_blocks.2", "single_blocks.3"])
    layers = checked(config, batches=1)[0]
    assert layers["double_blocks.0.img_mlp.2"].plain.dx is None
    assert layers["single_blocks.1.linear1"].plain.dx is None
    assert layers["single_blocks.2.linear1"].plain.dx is None  # its input, not its output
    assert layers["single_blocks.3.linear1"].plain.dx > 0
    cosines = {name for name, layer in layers.items() if layer.cosine is not None}
    assert cosines == {f"single_blocks.{i}.linear{j}" for i in (2, 3) for j in (1, 2)}


@pytest.mark.slow
def test_layers_named_in_the_configuration_are_measured(in_8_bits):
    """Asked-for layers are measured as well; what is said of others stays in the file."""
    given = {
        "*.img_mod.lin": "bf16",  # not in 8 bits anyhow: kept
        "single_blocks.0.modulation.lin": "8bit",  # measured: and kept, as it does well
        "single_blocks.*.linear1": "bf16",  # measured afresh, and given back
    }
    config = in_8_bits(model__layers=given)
    layers, _, written = checked(config, batches=1, limit=0.1)
    assert len(layers) == 25 and {layer.choice for layer in layers.values()} == {"8bit"}
    assert layers["single_blocks.0.modulation.lin"].plain.forward > 0
    linear1 = {f"single_blocks.{i}.linear1": "8bit" for i in range(4)}
    assert written["layers"] == given | linear1
    assert list(written["layers"])[-4:] == list(linear1)  # after the glob: the last match wins
    # a second look, over its own file, ends with the same
    again = in_8_bits(model__layers=written["layers"])
    assert checked(again, batches=1, limit=0.1)[2] == written


def test_a_limit_of_zero_is_met_by_no_layer(in_8_bits):
    layers, log, written = checked(in_8_bits(), batches=1, limit=0.0)
    kept = {name for name, layer in layers.items() if layer.choice == "bf16"}
    rotated = {name for name, layer in layers.items() if layer.choice == "rotate"}
    assert kept and kept | rotated == set(layers) == set(written["layers"])
    assert ("still above the limit" in log) == bool(rotated)


@pytest.mark.slow
def test_the_newest_checkpoint_is_what_is_measured(in_8_bits):
    config = in_8_bits(train__steps=2)
    fresh = checked(config, batches=1)[0]
    train(config)
    trained, log, _ = checked(config, batches=1)
    assert "that of step 2" in log and trained != fresh
    # how it is trained does not matter, another LoRA does
    same, log, _ = checked(in_8_bits(train__lr=1.0, lora__dropout=0.2), batches=1)
    assert "that of step 2" in log and same.keys() == trained.keys()
    assert "LoRA of step 2" in (config.run_dir / "check.yaml").read_text()
    _, log, _ = checked(in_8_bits(lora__rank=3), batches=1)
    assert "a fresh LoRA is measured" in log and "lora.rank was 2, is 3" in log
    assert "LoRA of step 0" in (config.run_dir / "check.yaml").read_text()


def test_nan_is_not_measured(in_8_bits, outlier_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(outlier_model, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    (name,) = diffusers_parts("double_blocks.1.txt_mlp.0")
    tensors[f"{name}.weight"].fill_(3e38)  # finite each, their sums are not
    save_file(tensors, file)
    config = in_8_bits(model__path=str(folder), name="broken")
    with pytest.raises(FluxfastError, match="NaN or infinity in the "):
        checked(config, batches=1)
    assert not (config.run_dir / "check.yaml").exists()


@pytest.mark.slow
def test_a_restart_keeps_the_file_and_moves_nothing_for_a_bad_one(in_8_bits):
    config = in_8_bits(train__steps=1)
    checked(config, batches=1)
    file = config.run_dir / "check.yaml"
    written = file.read_bytes()
    again = in_8_bits(train__steps=1, model__layers=str(file))
    for _ in range(2):
        train(again, restart=True)
        assert file.read_bytes() == written
    runs = sorted(config.run_dir.parent.iterdir())
    with pytest.raises(ConfigError, match="matches no linear"):
        bad = in_8_bits(model__layers={"nothing*": "bf16"})
        train(bad, restart=True)
    assert sorted(config.run_dir.parent.iterdir()) == runs


@pytest.mark.slow
def test_what_is_captured(in_8_bits, monkeypatch):
    """At most ROWS rows of a layer, shared out to the batches; x and dY of the same tokens."""
    seen = {}

    def spy(name, spec, weight, x, dy, *rest):
        seen[name] = (x.shape, None if dy is None else dy.shape)
        return measure(name, spec, weight, x, dy, *rest)

    monkeypatch.setattr(module, "measure", spy)
    monkeypatch.setattr(module, "ROWS", 30)
    checked(in_8_bits(), batches=2)
    assert seen["single_blocks.0.linear2"] == ((30, 960), (30, 192))
    assert seen["double_blocks.1.img_mlp.0"] == ((30, 192), (30, 768))
    assert seen["double_blocks.0.img_attn.qkv"] == ((30, 192), None)


# ---------------------------------------------------------------- the call


def test_without_8_bit_products_there_is_nothing_to_check(configure):
    config = configure()
    with pytest.raises(ConfigError, match="compute is fp32") as caught:
        check(config)
    assert "model.compute=int8" in caught.value.hint and not config.run_dir.exists()


@pytest.mark.parametrize("option", ["--limit=-0.1", "--batches=0", "--batches=257"])
def test_a_bad_option(option):
    assert CliRunner().invoke(app, ["check", "x.yaml", option]).exit_code == 2


def test_the_command(in_8_bits, tmp_path, fluxfast):
    config = in_8_bits()
    file = tmp_path / "c.yaml"
    file.write_text(dump_config(config))
    code, out, err = fluxfast("check", file, "--batches", "1", "--limit", "0.5")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split()[0] == "layer" and len(lines) == 25
    assert all(line.endswith(" 8bit") for line in lines[1:])
    assert "--set model.layers=" in err.splitlines()[-1]
