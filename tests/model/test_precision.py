"""Precision: the choices as a pure function, and a model's layers and results under them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small import SMALL, inputs, random_flux, randomize

from fluxfast.errors import ConfigError
from fluxfast.formats.base.load import choose_precision, multiplies_8_bits
from fluxfast.model.lora import inject_lora
from fluxfast.model.names import block_linears
from fluxfast.model.precision import (
    MATMULS,
    STORAGES,
    Precision,
    activation_dtype,
    layer_precisions,
    linears,
    multiplies_in_8_bits,
)
from fluxfast.model.spec import DEV
from fluxfast.train import train

CPU = torch.device("cpu")
CLASH = [("int8", "fp8"), ("fp8", "int8")]
PAIRS = [(s, c) for s in STORAGES for c in MATMULS if (s, c) not in CLASH]


def refused(*arguments) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        layer_precisions(*arguments)
    assert "\n" not in caught.value.message
    return caught.value


# ---------------------------------------------------------------- which layer is what


@pytest.mark.parametrize("storage, compute", PAIRS)
def test_without_choices(storage, compute):
    dense = Precision("fp32" if storage == "fp32" else "bf16")
    expected = dict.fromkeys(linears(SMALL), dense)
    for name in block_linears(SMALL):
        in_8_bits = compute in ("int8", "fp8") and "mod" not in name
        expected[name] = Precision(storage, compute if in_8_bits else "")
    assert layer_precisions(SMALL, storage, compute) == expected


def test_dev_has_as_many_layers_in_8_bits_as_it_has_linears_on_tokens():
    """8 of each double block, 2 of each single one."""
    assert sum(map(multiplies_in_8_bits, linears(DEV))) == 19 * 8 + 38 * 2


def test_the_last_match_wins():
    choices = {
        "*": "rotate",
        "single_blocks.*": "bf16",
        "single_blocks.1.linear?": "8bit",
        "txt_in": "bf16",
    }
    found = layer_precisions(SMALL, "nf4", "int8", choices)
    assert found["double_blocks.0.img_attn.qkv"] == Precision("nf4", "int8", 64)
    assert found["double_blocks.0.img_mod.lin"] == Precision("nf4", "int8", 64)
    assert found["single_blocks.0.linear1"] == found["single_blocks.1.modulation.lin"]
    assert found["single_blocks.0.linear1"] == found["txt_in"] == Precision("bf16")
    assert found["single_blocks.1.linear1"] == Precision("nf4", "int8")
    assert found["img_in"] == Precision("bf16", "int8", 16)
    dense = layer_precisions(SMALL, "fp32", "bf16", {"*.linear1": "bf16"})
    assert dense["single_blocks.0.linear1"] == Precision("fp32")


def test_the_rotation_divides_every_input():
    """linear2 takes attention's output and the MLP's side by side: 96 = 32·3, 480 would take 32."""
    spec = replace(SMALL, hidden_size=96, num_heads=3, mlp_ratio=2)
    found = layer_precisions(spec, "fp32", "fp8", {"*": "rotate"})
    assert found["single_blocks.0.linear2"].rotation == 32  # of 96 and 192
    assert found["double_blocks.0.img_mlp.2"].rotation == 64  # of 192
    dev = layer_precisions(DEV, "nf4", "int8", {"*": "rotate"})
    assert {dev[name].rotation for name in linears(DEV)} == {256, 64}
    assert dev["img_in"].rotation == 64  # 64 channels


def test_bad_choices():
    error = refused(SMALL, "nf4", "int8", {"single_blocks.0.liner1": "rotate"})
    assert "matches no linear" in error.message and "'single_blocks.0.linear1'" in error.hint
    error = refused(SMALL, "nf4", "int8", {"*": "8bit", "*.linear3": "bf16"})
    assert "'*.linear3'" in error.message and "glob" in error.hint
    for choice in ("8bit", "rotate"):
        error = refused(SMALL, "nf4", "bf16", {"*.linear1": choice})
        assert f"single_blocks.0.linear1 is to be {choice}" in error.message
        assert "compute is bf16" in error.message and "compute: int8" in error.hint
    error = refused(replace(SMALL, context_in_dim=25), "nf4", "int8", {"txt_in": "rotate"})
    assert "txt_in cannot be rotated" in error.message and "25" in error.message
    assert "'int4'" in refused(SMALL, "nf4", "int8", {"*": "int4"}).message


# ---------------------------------------------------------------- what auto means


@pytest.mark.parametrize(
    "setting, capability, gib, expected",
    [
        ("auto/auto", None, 0, "fp32/bf16"),
        ("auto/auto", (7, 5), 16, "nf4/fp32"),
        ("auto/auto", (8, 0), 39.4, "nf4/int8"),
        ("auto/auto", (8, 0), 79.1, "int8/int8"),
        ("auto/auto", (8, 6), 23.7, "nf4/int8"),
        ("auto/auto", (8, 7), 61, "nf4/bf16"),  # Jetson Orin: nothing is assumed of it
        ("auto/auto", (8, 9), 23.6, "nf4/int8"),
        ("auto/auto", (8, 9), 47.5, "int8/int8"),
        ("auto/auto", (9, 0), 79.1, "fp8/fp8"),
        ("auto/auto", (10, 0), 179, "nf4/bf16"),
        ("auto/auto", (12, 0), 31.4, "nf4/int8"),
        ("auto/auto", (12, 1), 95, "int8/int8"),
        ("int8/auto", (9, 0), 80, "int8/int8"),
        ("fp8/auto", (8, 9), 24, "fp8/fp8"),
        ("fp8/auto", (8, 6), 24, "fp8/bf16"),
        ("auto/int8", (9, 0), 80, "int8/int8"),
        ("auto/bf16", (9, 0), 80, "nf4/bf16"),
        ("auto/fp8", None, 0, "fp32/fp8"),
    ],
)
def test_auto(setting, capability, gib, expected):
    bf16 = capability is None or capability >= (8, 0)
    found = choose_precision(*setting.split("/"), capability, gib, bf16)
    assert "/".join(found) == expected


def test_auto_without_bf16_in_hardware():
    assert choose_precision("auto", "auto", None, 0, False) == ("fp32", "fp32")


@pytest.mark.parametrize(
    "capability, kinds", [((7, 5), []), ((8, 0), ["int8"]), ((8, 9), ["int8", "fp8"])]
)
def test_products_that_a_card_lacks(capability, kinds):
    assert multiplies_8_bits(capability) == kinds
    for kind in {"int8", "fp8"} - set(kinds):
        with pytest.raises(ConfigError, match=f"compute {kind} needs .* this one has") as caught:
            choose_precision("nf4", kind, capability, 24, True)
        assert "compute: auto" in caught.value.hint


@pytest.mark.parametrize("storage, compute", CLASH)
def test_two_kinds_of_8_bits(storage, compute):
    for capability in (None, (9, 0)):
        with pytest.raises(ConfigError, match="do not go together") as caught:
            choose_precision(storage, compute, capability, 24, True)
        assert f"compute: {storage}" in caught.value.hint


def test_activations():
    for compute, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert activation_dtype(compute, "auto", CPU) == dtype
        assert activation_dtype(compute, compute, CPU) == dtype
        assert activation_dtype("int8", compute, CPU) == dtype
    assert activation_dtype("fp8", "auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(ConfigError, match="do not go with compute bf16"):
        activation_dtype("bf16", "fp32", CPU)
    with pytest.raises(ConfigError, match="'fp16' is not one of"):
        activation_dtype("int8", "fp16", CPU)


# ---------------------------------------------------------------- the model obeys


def run(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Its output, and the gradients of a LoRA that does something, flat."""
    parameters = inject_lora(model, 2)
    randomize(model)
    y = model(*inputs(model.spec))
    y.float().square().mean().backward()
    return y.detach().float(), torch.cat([p.grad.flatten() for p in parameters])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ‖difference‖ / ‖true‖ over the whole small model: what one layer makes (0.09 in nf4, 0.013 in int8
# products, 0.037 in fp8's), times three for the layers one after another
BOUND = {"fp32": 0.0, "bf16": 0.03, "nf4": 0.3, "int8": 0.04, "fp8": 0.12}


@pytest.fixture(scope="module")
def true():
    return run(random_flux(SMALL, seed=3))


@pytest.mark.grid(14)
@pytest.mark.parametrize("storage, compute", PAIRS)
def test_every_pair_runs(storage, compute, true):
    model = random_flux(SMALL, storage, compute, seed=3)
    for name, precision in layer_precisions(SMALL, storage, compute).items():
        layer = model.linear(name)
        assert Precision(layer.storage(), layer.matmul, layer.rotation) == precision, name
    bound = max(BOUND[storage], BOUND[compute], 1e-6)
    for found, expected in zip(run(model), true, strict=True):
        assert found.isfinite().all() and apart(found, expected) < bound


@pytest.mark.parametrize("activations", ["fp32", "bf16"])
def test_activations_beside_8_bit_products(activations, true):
    model = random_flux(SMALL, "fp32", "int8", seed=3, activations=activations)
    y, gradients = run(model)
    assert model.compute_dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[activations]
    assert model(*inputs(SMALL)).dtype == model.compute_dtype
    assert 1e-3 < apart(y, true[0]) < BOUND["int8"] and gradients.dtype == torch.float32


@pytest.mark.parametrize("storage", ["fp32", "nf4", "int8"])
def test_choices_are_set_on_the_layers(storage, true):
    layers = {"*.linear?": "rotate", "single_blocks.0.linear1": "bf16", "img_in": "8bit"}
    model = random_flux(SMALL, storage, "int8", seed=3, layers=layers)
    for name, precision in layer_precisions(SMALL, storage, "int8", layers).items():
        layer = model.linear(name)
        assert Precision(layer.storage(), layer.matmul, layer.rotation) == precision, name
    # stored rotated, and rotated back by `dequantize`
    bound = max(BOUND[storage], BOUND["int8"])
    name = "single_blocks.1.linear2"
    plain = random_flux(SMALL, "fp32", "fp32", seed=3).linear(name).weight
    assert apart(model.linear(name).dequantize(torch.float32), plain) < bound
    for found, expected in zip(run(model), true, strict=True):
        assert apart(found, expected) < bound


def test_an_input_width_that_nf4_does_not_take():
    spec = replace(SMALL, hidden_size=96, num_heads=3)
    model = random_flux(spec, "nf4", "int8")
    layer = model.double_blocks[0].img_attn.qkv
    assert (layer.storage(), layer.matmul) == ("bf16", "int8")
    wide = model.double_blocks[0].img_mlp[2]  # 4·96 = 6·64
    assert (wide.storage(), wide.matmul) == ("nf4", "int8")


# ---------------------------------------------------------------- hooks on a layer


@pytest.mark.parametrize("compute", ["fp32", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_hook_sees_the_product_and_changes_nothing(compute, dropout):
    """x and the gradient of y, also where a fused op would form neither by itself. Results
    differ by the roundings that a fused op spares; without hooks they are the same bits.
    """
    seen: dict[str, list] = {}

    def results(hooked: bool):
        model = random_flux(SMALL, "fp32", compute, seed=3, activations="fp32")
        parameters = inject_lora(model, 2, dropout=dropout)
        randomize(model)
        model.train()
        model.dropout_clock.indices = torch.tensor([0, 1])
        for name in linears(SMALL) if hooked else ():

            def hook(layer, inputs, y, name=name):
                tensors = seen.setdefault(name, [inputs[0].detach()])
                if y.requires_grad:
                    y.register_hook(tensors.append)

            model.get_submodule(name).register_forward_hook(hook)
        y = model(*inputs(SMALL))
        y.square().mean().backward()
        return [y.detach(), *(p.grad for p in parameters)]

    plain, hooked = results(False), results(True)
    bound = 1e-5 if compute == "fp32" else 0.02  # a last bit can turn a code
    for a, b in zip(plain, hooked, strict=True):
        assert apart(b, a) < bound
    assert all(torch.equal(a, b) for a, b in zip(plain, results(False), strict=True))
    x, dy = seen["single_blocks.0.linear2"]
    assert x.shape == (2, 10, 64 + 256) and dy.shape == (2, 10, 64)
    assert len(seen["double_blocks.0.img_mod.lin"]) == 1  # nothing before it trains


# ---------------------------------------------------------------- a run


@pytest.mark.slow
def test_a_run_in_int8_is_repeated_and_resumed_exactly(configure, log_lines):
    """NF4 base, int8 products, one layer rotated, one in bf16: the same bytes twice, and when
    resumed half way."""
    layers = {"single_blocks.0.linear2": "rotate", "single_blocks.1.linear2": "bf16"}
    common = {"model__storage": "nf4", "model__compute": "int8", "model__layers": layers}
    whole, again, parts = (configure(name=name, **common) for name in ("whole", "again", "parts"))
    files = [train(config) for config in (whole, again)]
    line = "base in nf4, int8 products, activations in "
    log = "\n".join(log_lines)
    assert line in log and "1 layer rotated, 1 in bf16" in log
    train(parts)
    (parts.run_dir / "parts.safetensors").unlink()
    (parts.run_dir / "checkpoints" / "step-00000004").rename(parts.run_dir / "gone")
    files.append(train(parts))
    assert any(line.startswith("resuming") for line in log_lines)
    first, *others = map(load_file, files)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)
    rows = (whole.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [2, 4]


def test_a_run_may_go_on_in_another_precision(configure, log_lines):
    train(configure(train__steps=2))
    changes = {"model__storage": "int8", "model__compute": "int8"}
    train(configure(train__steps=3, **changes))
    log = "\n".join(log_lines)
    assert "base in int8, int8 products" in log and "at step 2" in log
