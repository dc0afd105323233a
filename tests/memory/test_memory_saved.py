"""Predicted bytes beside those that autograd, the model and the optimizers really keep."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from random_inputs import WIDE, random_inputs
from small import SMALL, random_flux

from bench.activations import kept_with_policies
from fluxfast.config.schema import TrainConfig
from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.cards import card
from fluxfast.memory.planner.choose import Chooser
from fluxfast.memory.planner.step_spec import Shape, StepSpec, lora_of
from fluxfast.model.activations import POLICIES
from fluxfast.model.flux import Flux
from fluxfast.model.lora import inject_lora
from fluxfast.model.spec import NANO
from fluxfast.optim import FlatParameters, build_optimizer


def built(spec, targets, rank, storage="bf16", compute="fp32", dropout=0.0, include=()):
    model = random_flux(spec, storage, compute, activations="auto")
    inject_lora(model, rank, targets=targets, dropout=dropout, include=include)
    activations = "bf16" if model.compute_dtype == torch.bfloat16 else "fp32"
    lora = lora_of(spec, rank, targets, include)
    step = StepSpec(spec, storage, compute, activations, lora, dropout=dropout > 0)
    return model.train(), step


class Arena:
    """An offload engine that counts what is put; its copies are the host's."""

    def __init__(self):
        self.bytes = 0

    def put(self, flat):
        self.bytes += -(-flat.nbytes // 256) * 256
        return flat

    def get(self, flat):
        return flat

    def block(self, index):
        return self

    def begin(self):
        self.bytes = 0

    def block_forward_done(self, index): ...
    def forward_done(self): ...
    def block_backward_done(self, index): ...


def counted(model: Flux, inputs: dict, policies) -> int:
    """Bytes that a pass leaves on the card."""
    model.policies, model.offload = policies, Arena()
    known = [*model.parameters(), *model.buffers(), *inputs.values()]
    return kept_with_policies(known, lambda: model(**inputs))


def predicted(step: StepSpec, shape: Shape, policy: str) -> int:
    blocks = (saved_bytes.block_saved(step, block, shape, policy) for block in step.blocks)
    return sum(block.device for block in blocks) + saved_bytes.outer_saved(step, shape)


SHAPES = [(1, 12, 20), (2, 8, 9), (3, 8, 30)]


@pytest.fixture(scope="module")
def models():
    """`built`, each model once."""
    return cache(built)


@pytest.mark.grid(2)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("targets", ["attn", "attn+mlp", "all"])
@pytest.mark.parametrize("spec", [SMALL, WIDE, NANO], ids=["small", "wide", "nano"])
def test_saved_bytes_per_bucket(spec, targets, policy, models):
    """Of whole passes: within 2 % for every shape, in fp32 and in bf16."""
    for rank, compute, shapes in ((2, "fp32", SHAPES[:1]), (5, "bf16", SHAPES)):
        model, step = models(spec, targets, rank, compute=compute)
        for batch, side, text in shapes:
            x, shape = random_inputs(spec, batch, side, text), Shape(batch, side * side // 4, text)
            truth = counted(model, x, [policy] * len(model.policies))
            assert predicted(step, shape, policy) == pytest.approx(truth, rel=0.02)
            if policy == "offload":
                host = [
                    saved_bytes.block_saved(step, block, shape, policy).host
                    for block in step.blocks
                ]
                assert model.offload.bytes == sum(host)


@pytest.mark.grid(2)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["double", "single"])
def test_saved_bytes_per_block(kind, policy):
    """One block more at a time: the difference is that block's, within 2 %."""
    shape = Shape(2, 64, 24)
    field = {"double": "depth", "single": "depth_single_blocks"}[kind]
    truths = []
    for count in (1, 2):
        spec = replace(WIDE, **{"depth": 1, "depth_single_blocks": 1, field: count})
        model, step = built(spec, "all", 4, compute="bf16")
        x = random_inputs(spec, 2, 16, 24)
        width = sum(layer.out_features for layer in model.modulation_linears()) * 2 * 16
        truths.append(counted(model, x, [policy] * len(model.policies)) - width)
    block = saved_bytes.block_saved(step, f"{kind}_blocks.1", shape, policy)
    assert block.device == pytest.approx(truths[1] - truths[0], rel=0.02)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        *((policy, {"dropout": 0.2}) for policy in POLICIES),
        ("keep", {"include": ("single_blocks",)}),  # nothing before the first LoRA is saved
        ("gelu_int8", {"storage": "int8", "compute": "int8"}),
    ],
)
def test_saved_bytes_of_other_settings(policy, options):
    model, step = built(WIDE, "attn+mlp", 4, **options)
    model.dropout_clock.indices = torch.tensor([0, 1])
    x, shape = random_inputs(WIDE, 2, 16, 24), Shape(2, 64, 24)
    truth = counted(model, x, [policy] * 3)
    assert predicted(step, shape, policy) == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("targets", ["attn+mlp", "all"])
def test_an_arena_has_room_for_what_dropout_saves(targets):
    model, step = built(WIDE, targets, 4, dropout=0.2)
    model.dropout_clock.indices = torch.tensor([0, 1])
    counted(model, random_inputs(WIDE, 2, 16, 24), ["offload"] * 3)
    shape = Shape(2, 64, 24)
    sizes = [saved_bytes.block_saved(step, block, shape, "offload").host for block in step.blocks]
    assert model.offload.bytes == sum(sizes)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4", "int8", "fp8"])
def test_weights_are_as_large_as_the_model(storage):
    compute = {"int8": "int8", "fp8": "fp8", "fp32": "fp32"}.get(storage, "bf16")
    model, step = built(WIDE, "attn+mlp", 4, storage=storage, compute=compute)
    truth = sum(buffer.nbytes for buffer in model.buffers())
    assert sum(saved_bytes.weights(step).values()) == truth


def test_nested_scales_are_counted():
    model, step = built(WIDE, "attn", 4, storage="nf4", compute="bf16")
    for name in saved_bytes.modulation_names(step)[:3]:
        layer = model.get_submodule(name)
        layer.set_weight(layer.dequantize(torch.float32), "nf4", nested=True)
        truth = sum(buffer.nbytes for buffer in layer.buffers())
        assert saved_bytes.weight_bytes(step, name, double_quant=True) == truth


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adamw8bit", "prodigy", "schedulefree", "adafactor"]
)
def test_trained_bytes_are_those_of_the_optimizers(optimizer):
    model, step = built(replace(WIDE, hidden_size=512, num_heads=4), "all", 8)
    parameters = [p for p in model.parameters() if p.requires_grad]
    train = TrainConfig(optimizer=optimizer)
    flat = FlatParameters(parameters, train)
    built_optimizer = build_optimizer(train, flat)
    state = sum(
        value.nbytes
        for each in built_optimizer.state.values()
        for key, value in each.items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap") and value.numel() > 1
    )
    sizes = saved_bytes.trained(step, optimizer, ema=True)
    assert sizes["LoRA"] == sizes["EMA"] == sum(p.nbytes for p in parameters)
    assert sizes["gradients"] == flat.gradients.nbytes
    assert sizes["optimizer"] == pytest.approx(state, rel=0.01)


def test_peak_counts_what_is_alive_together():
    """Checkpointed blocks in front cost nothing at the peak, which is the last block's backward."""
    _, step = built(WIDE, "attn+mlp", 4, compute="bf16")
    shape = Shape(1, 256, 64)
    peak = Chooser(step, shape, card("H100"), launches=False).peak
    keep = peak(["keep"] * 3)
    front = peak(["checkpoint", "keep", "keep"])
    back = peak(["keep", "keep", "checkpoint"])
    full = saved_bytes.block_saved(step, "double_blocks.0", shape, "keep").device
    inputs = saved_bytes.block_saved(step, "double_blocks.0", shape, "checkpoint").device
    assert keep - front == full - inputs
    assert back == keep  # made again just where everything else is there
