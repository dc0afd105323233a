"""LoRA: targets, injection, gradients, dropout, and its file in diffusers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small import SMALL, diffusers_forward, inputs, random_flux, randomize

from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.lora.apply import load_lora, save_lora
from fluxfast.model.lora import fresh_update, inject_lora, select_targets
from fluxfast.model.lora_dropout import DropoutClock, LoRADropout
from fluxfast.model.lora_linear import LoRALinear
from fluxfast.model.spec import DEV, FluxSpec


@pytest.mark.parametrize(("targets", "count"), [("attn", 266), ("attn+mlp", 418), ("all", 494)])
def test_presets_of_dev(targets, count):
    """494 is the number of modules that ai-toolkit trains; 76 of them are modulation linears."""
    assert len(select_targets(DEV, targets)) == count


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["to_k"], [], {"attn.to_k"}),
        (["img_attn.qkv"], ["*.to_q"], {"attn.to_k", "attn.to_v"}),
        (["transformer.single_transformer_blocks.1.proj_mlp"], [], {"proj_mlp"}),
        (["double_blocks.*.txt_mlp.2"], [], {"ff_context.net.2"}),
        (["single_blocks.0.linear1"], ["attn"], {"proj_mlp"}),
    ],
)
def test_patterns(include, exclude, expected):
    chosen = select_targets(SMALL, "attn+mlp", include, exclude)
    assert {target.diffusers.split(".", 2)[2] for target in chosen} == expected


@pytest.mark.parametrize(
    "bad", [{"include": ["nonsense"]}, {"exclude": ["img_mod.lin"]}, {"exclude": ["*"]}]
)
def test_pattern_without_effect_is_an_error(bad):
    with pytest.raises(ConfigError, match="lora"):
        select_targets(SMALL, "attn+mlp", **bad)


def test_injection_changes_nothing_and_is_seeded():
    model, other = random_flux(SMALL), random_flux(SMALL)
    x = inputs(SMALL)
    with torch.no_grad():
        before = model(*x)
        parameters = inject_lora(model, 4, 8.0, seed=3)
        assert torch.equal(model(*x), before)
    again = inject_lora(other, 4, 8.0, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))
    a = model.double_blocks[0].img_attn.qkv.lora_A
    assert a.shape == (12, 64) and a.abs().max() <= 1 / 8
    assert not torch.equal(a[:4], a[4:8])


def test_alpha_and_strength_scale_the_update():
    """alpha/rank multiplies the update; small enough, the output follows in proportion."""
    x = inputs(SMALL)
    deltas = {}
    for alpha in (4.0, 12.0):
        model = random_flux(SMALL)
        base = model(*x).detach()
        inject_lora(model, 4, alpha, include=["single_blocks.1.linear2"], seed=3)
        layer = model.single_blocks[1].linear2
        torch.nn.init.constant_(layer.lora_B, 1e-4)
        deltas[alpha] = model(*x).detach() - base
        assert layer.lora.scale == alpha / 4
    ratio = deltas[12.0].norm() / deltas[4.0].norm()
    assert abs(ratio - 3) < 0.01


def test_shared_a_is_kohyas_form():
    model = random_flux(SMALL)
    inject_lora(model, 4, share_a=True)
    layer = model.single_blocks[0].linear1
    assert layer.lora_A.shape == (4, 64)
    assert layer.lora_B.shape == (3 * 64 + 256, 4)
    randomize(model)
    delta = layer.lora_B @ layer.lora_A
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        update = layer(x) - torch.nn.functional.linear(x, layer.dequantize(x.dtype), layer.bias)
    assert torch.allclose(update, x @ delta.T, atol=1e-5)


def test_fp16_that_overflows_is_kept_in_fp32(tmp_path):
    model = random_flux(SMALL)
    inject_lora(model, 2)
    for value, dtype, expected in (
        (0.0, "bf16", torch.bfloat16),
        (1e6, "fp16", torch.float16),  # A takes its share
        (1e12, "fp16", torch.float32),
    ):
        torch.nn.init.constant_(model.single_blocks[0].linear2.lora_B, value)
        state = load_file(save_lora(model, tmp_path / "a.safetensors", dtype=dtype))
        assert all(t.dtype == expected and t.isfinite().all() for t in state.values())


def test_wrong_files_are_refused(tmp_path):
    model = random_flux(SMALL)
    with pytest.raises(FluxfastError, match="no LoRA"):
        save_lora(model, tmp_path / "x.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(FluxfastError, match="cannot read"):
        load_lora(model, tmp_path / "text.safetensors")
    wide = random_flux(FluxSpec(**{**SMALL.__dict__, "hidden_size": 128, "num_heads": 4}))
    inject_lora(wide, 2)
    path = save_lora(wide, tmp_path / "wide.safetensors")
    with pytest.raises(FluxfastError, match="do not fit"):
        load_lora(model, path)


def test_dropout_is_a_function_of_the_sample():
    x = inputs(SMALL)
    model = random_flux(SMALL)
    inject_lora(model, 4, dropout=0.5, seed=5)
    randomize(model)
    model.train()
    model.dropout_clock.indices = torch.tensor([10, 11])
    first = model(*x)
    torch.manual_seed(99)
    assert torch.equal(model(*x), first)
    model.dropout_clock.indices = torch.tensor([12, 11])
    other = model(*x)
    assert not torch.allclose(other[0], first[0]) and torch.allclose(other[1], first[1], atol=1e-5)
    model.dropout_clock.indices = torch.tensor([1])
    with pytest.raises(ValueError, match="indices"):
        model(*x)
    model.eval()
    model.dropout_clock.indices = None
    assert not torch.equal(model(*x), first)


def test_a_dropout_mask_keeps_the_mean():
    """1/(1-p) where it is not zero: 8192 values average to 1 within five standard deviations."""
    dropout = LoRADropout(0.25, "x", DropoutClock(3))
    mask = dropout(torch.ones(2, 64, 64), torch.tensor([7, 8]))
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(mask.mean() - 1) < 5 * (1 / 3 / mask.numel()) ** 0.5


@pytest.mark.parametrize("strengths", [(1.0,), (0.5,), (0.5, 1.0), (0.0, 0.25)])
def test_each_update_acts_at_its_own_strength(strengths):
    torch.manual_seed(0)
    layer, x = LoRALinear(64, 32), torch.randn(1, 3, 64)
    layer.set_weight(torch.randn(32, 64))
    expected = layer(x).detach()
    for index, strength in enumerate(strengths):
        update = fresh_update(layer, 4, 12.0, [[(0, 32)]], seed=index)
        torch.nn.init.normal_(update.lora_B)
        update.strength, update.trainable = strength, index == 0  # a layer trains one
        layer.add_update(update)
        expected += (strength * 3 * x @ update.lora_A.T @ update.lora_B.T).detach()
    assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_strength_changed_before_backward_leaves_the_gradients():
    """As a look at the base model between the two does."""

    def gradients(strength_after: float) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = LoRALinear(64, 32)
        layer.set_weight(torch.randn(32, 64))
        layer.add_update(fresh_update(layer, 4, 4.0, [[(0, 32)]]))
        torch.nn.init.normal_(layer.lora_B)
        layer.lora.dropout = LoRADropout(0.3, "", DropoutClock())
        layer.lora.dropout.clock.indices = torch.tensor([0])
        y = layer(torch.randn(1, 3, 64))
        layer.lora.strength = strength_after
        return list(torch.autograd.grad(y.sum(), list(layer.lora.parameters())))

    assert all(map(torch.equal, gradients(1.0), gradients(0.0)))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_the_layer_are_right(dropout):
    """Against autograd through the plain formula, in fp64."""
    layer = LoRALinear(6, 10)
    layer.weight = torch.randn(10, 6, dtype=torch.float64)
    layer.bias = torch.randn(10, dtype=torch.float64)
    layer.add_update(fresh_update(layer, 2, 3.0, [[(0, 4)], [(6, 9)]]).double())
    torch.nn.init.normal_(layer.lora_B)
    clock = DropoutClock(1)
    clock.indices = torch.tensor([4, 9])
    layer.lora.dropout = LoRADropout(dropout, "x", clock) if dropout else None
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, b: layer(x), (x, layer.lora_A, layer.lora_B))


def test_diffusers_pipeline_reads_the_file(nano_model, tmp_path):
    from diffusers import FluxPipeline

    from fluxfast import load_transformer

    pipeline = FluxPipeline.from_pretrained(nano_model)
    ours = load_transformer(nano_model, "fp32", "fp32", "cpu")
    inject_lora(ours, 4, 6.0, "all")
    randomize(ours)
    path = save_lora(ours, tmp_path / "lora.safetensors", metadata={"config": json.dumps({})})
    x = inputs(ours.spec)

    with torch.no_grad():
        base = diffusers_forward(pipeline.transformer, x)
        pipeline.load_lora_weights(path)
        with_lora = diffusers_forward(pipeline.transformer, x)
        assert (with_lora - base).abs().max() > 1e-2
        error = (ours(*x) - with_lora).abs().max() / with_lora.abs().max()
    assert error < 1e-5
