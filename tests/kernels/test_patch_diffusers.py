"""patch_diffusers: diffusers' transformer gives the same on the fused ops, and comes back whole.

fp32: outputs and LoRA gradients within 1e-5 of diffusers' own, of each tensor's largest value (5e-5
for gradients, sums of products of such outputs). bf16 and fp16: at most twice the error that
diffusers makes in that dtype against its fp32 self.
"""

import copy
import re
import warnings
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import peft
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from fluxfast_kernels import blocks as fused_blocks
from fluxfast_kernels.integrations.diffusers import patch_diffusers, unpatch_diffusers
from numerics import randn, relative_error
from torch import nn
from trainers import (
    DoRAModule,
    KohyaModule,
    LoConModule,
    LokrModule,
    LoRAModule,
    apply_network,
    as_simpletuner,
)

from bench.step.peers import LORA_MODULES

BATCH, ROWS, COLUMNS, TEXT, CHANNELS = 2, 3, 5, 7, 16
ROOT = Path(__file__).parents[2]
NANO = ROOT / "examples" / "nano" / "pretrained"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ONCE = {  # calls of a forward
    "norm_modulate_lora_linear": 4 + 2,
    "qk_norm_rope_attention": 1 + 2,
    "lora_linear": 2,
    "gelu_lora_linear": 2 + 2,
}


def build(width=64, nf4=None, compute=FP32, seed=0) -> FluxTransformer2DModel:
    """Two heads of `width`, one double and two single blocks, every tensor random and frozen, every
    value exact in bf16. nf4: "plain" or "nested" for the blocks' linears."""
    spatial = 2 * (7 * width // 32)
    model = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=width,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(width - 2 * spatial, spatial, spatial),
    ).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        random = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 2:
            random *= tensor.shape[1] ** -0.5
        else:
            random = 0.1 * random + ("norm_" in name and name.endswith("weight"))
        tensor.copy_(random.bfloat16())
    if nf4:
        for path, linear in list(model.named_modules()):
            if "_blocks." in path and isinstance(linear, nn.Linear):
                model.set_submodule(path, quantized(linear, nf4 == "nested", compute))
        model.is_loaded_in_4bit = True
    return model


def quantized(linear: nn.Linear, nested: bool, compute: torch.dtype) -> bnb.nn.Linear4bit:
    N, K = linear.weight.shape
    made = bnb.nn.Linear4bit(K, N, compute_dtype=compute, device="meta")
    made.weight = bnb.nn.Params4bit(
        linear.weight.data, quant_type="nf4", compress_statistics=nested, module=made
    ).to("cpu")
    made.bias = linear.bias
    return made


def add_lora(model, targets=LORA_MODULES, seed=1, adapter="default", **config):
    """peft's LoRA of rank 3, alpha 5, with a random B."""
    config = {"r": 3, "lora_alpha": 5, "target_modules": targets} | config
    model.add_adapter(peft.LoraConfig(**config), adapter_name=adapter)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if f"lora_A.{adapter}" in name or f"lora_B.{adapter}" in name:
            random = torch.randn(tensor.shape, generator=generator)
            tensor.data = random * 0.5 * tensor.shape[-1] ** -0.5
    return model.train()


def inputs(dtype=FP32) -> dict:
    img_ids = torch.zeros(ROWS, COLUMNS, 3)
    img_ids[..., 1], img_ids[..., 2] = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)
    x = {
        "hidden_states": randn(BATCH, ROWS * COLUMNS, CHANNELS, seed=2),
        "encoder_hidden_states": randn(BATCH, TEXT, 24, seed=3),
        "pooled_projections": randn(BATCH, 20, seed=4),
        "timestep": torch.tensor([0.25, 0.75]),
        "guidance": torch.tensor([1.0, 3.5]),
    }
    x = {name: tensor.bfloat16().to(dtype) for name, tensor in x.items()}
    return x | {"img_ids": img_ids.view(-1, 3), "txt_ids": torch.zeros(TEXT, 3)}


def predict(model, dtype=FP32, autocast=False, **more) -> dict[str, torch.Tensor]:
    """{"output": ...}, without gradients."""
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=autocast):
        return {"output": model(**(inputs(dtype) | more), return_dict=False)[0]}


def run(model, dtype=FP32, autocast=False, **more) -> dict[str, torch.Tensor]:
    """The output and every trained parameter's gradient."""
    model.zero_grad()
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = model(**(inputs(dtype) | more), return_dict=False)[0]
    (out.float() - randn(*out.shape, seed=5)).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return {"output": out.detach()} | {name: g.clone() for name, g in gradients.items()}


@pytest.fixture
def computed() -> set[torch.dtype]:
    """The dtypes that a patched block's ops were given."""
    return set()


@pytest.fixture
def fused(monkeypatch, computed):
    """How often each op was called from a patched block."""
    calls = dict.fromkeys(ONCE, 0)

    def counted(name, op, x, *arguments, **more):
        calls[name] += 1
        computed.add((x[0] if isinstance(x, list) else x).dtype)
        return op(x, *arguments, **more)

    for name in calls:
        monkeypatch.setattr(fused_blocks, name, partial(counted, name, getattr(fused_blocks, name)))
    return calls


@pytest.fixture(autouse=True)
def silence():
    """A fallback that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "patch_diffusers")
        yield


def times(count: int) -> dict[str, int]:
    """What `fused` counts after so many forwards."""
    return {name: count * calls for name, calls in ONCE.items()}


def assert_close(results: dict, truth: dict, output=1e-5, gradients=5e-5) -> None:
    assert results.keys() == truth.keys()
    for name, value in truth.items():
        allowed = output if name == "output" else gradients
        error = (results[name] - value).abs().max() / value.abs().max()
        assert results[name].dtype == value.dtype and error <= allowed, f"{name}: {error:.1e}"


def assert_as_exact(results: dict, eager: dict, truth: dict, unit: float) -> None:
    """At most twice eager's error against the truth; half a unit in the last place is allowed."""
    for name, value in truth.items():
        error, of_eager = (relative_error(x[name], value) for x in (results, eager))
        assert results[name].dtype == eager[name].dtype
        allowed = 2 * max(of_eager, unit / 2)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


# ---------------------------------------------------------------- the same results


def check_patched(model, fused, compare=predict, forwards=1, **more) -> None:
    """A patched model gives what it gave before, by the fused ops."""
    truth = compare(model, **more)
    fused.update(times(0))
    patch_diffusers(model)
    assert_close(compare(model, **more), truth)
    assert fused == times(forwards)


MODULATIONS = LORA_MODULES + r"|.*_blocks\.\d+\.(norm1|norm1_context|norm)\.linear"
RANKS = {"rank_pattern": {"to_q": 1, "proj_mlp": 6}, "alpha_pattern": {"to_v": 2}}
IN_FP32 = {  # arguments of build and add_lora
    "two heads of 32": ({"width": 32}, {}),
    "two heads of 64": ({}, {}),
    "NF4": ({"nf4": "plain"}, {}),
    "nested NF4": ({"nf4": "nested"}, {}),
    "nested NF4 whose blocks are not whole": ({"nf4": "nested", "width": 32}, {}),
    "shift, scale and gate train": ({}, {"targets": MODULATIONS}),
    "q and the MLP": ({}, {"targets": ["to_q", "proj_mlp"]}),
    "v and the text's k": ({}, {"targets": ["to_v", "add_k_proj"]}),
    "the output": ({}, {"targets": ["proj_out"]}),
    "ranks and scales that differ": ({}, {**RANKS, "use_rslora": True}),
}


@pytest.mark.parametrize("name", IN_FP32)
def test_fp32(name, fused):
    model_options, lora_options = IN_FP32[name]
    model = add_lora(build(**model_options), **lora_options)
    state = state_of(model)
    check_patched(model, fused, run)
    assert_same_state(model, state)


@pytest.mark.parametrize("width", [32, 64])  # at 32 a part's nested blocks are not whole
def test_nested_statistics_are_joined_where_blocks_are_whole(width):
    model = build(width, "nested")
    patch_diffusers(model)
    block = model.single_transformer_blocks[0]
    linears = [block.get_submodule(f"attn.to_{name}") for name in "qkv"]
    weight = block._fluxfast.joined["linear1"].weight([*linears, block.proj_mlp])
    assert len(weight.tensors) == (4 if width == 64 else 2)


def test_gradient_checkpointing(fused):
    model = add_lora(build())
    model.enable_gradient_checkpointing()
    check_patched(model, fused, run, forwards=2)


def test_controlnet(fused):
    hidden = randn(BATCH, ROWS * COLUMNS, 128, seed=4)
    control = {
        "controlnet_block_samples": [hidden],
        "controlnet_single_block_samples": [hidden, -hidden],
    }
    check_patched(build(), fused, **control)


@pytest.mark.parametrize("trains", [False, True])
def test_a_model_without_lora_predicts_fused(fused, trains):
    check_patched(build().requires_grad_(trains), fused)


def test_dropout_is_fused_in_eval(fused):
    check_patched(add_lora(build(), ["to_q"], lora_dropout=0.5).eval(), fused)


HALF = {  # build's arguments; dtypes of the frozen weights, the inputs and the ops; under autocast?
    "bf16": ({}, BF16, BF16, BF16, False),
    "fp16": ({}, FP16, FP16, FP16, False),
    "LoRA too": ({}, BF16, BF16, BF16, False),
    "autocast": ({}, BF16, FP32, BF16, True),
    "autocast over fp32": ({}, FP32, FP32, BF16, True),
    "NF4": ({"nf4": "plain", "compute": BF16}, FP32, FP32, BF16, True),
    "nested NF4": ({"nf4": "nested", "compute": BF16}, FP32, FP32, BF16, True),
    # bitsandbytes' default compute dtype: the products are fp32, what is between them bf16
    "NF4 in fp32": ({"nf4": "plain"}, BF16, BF16, FP32, False),
}


@pytest.mark.parametrize("mode", HALF)
def test_half_precision(mode, fused, computed):
    options, frozen, dtype, of_ops, autocast = HALF[mode]
    model = add_lora(build(**options))
    for name, tensor in model.named_parameters():
        if tensor.dtype == FP32 and ("lora_" not in name or mode == "LoRA too"):
            tensor.data = tensor.data.to(frozen)
    nf4 = options.get("nf4")
    truth = run(add_lora(build(nf4=nf4)) if nf4 else copy.deepcopy(model).float())
    eager = run(model, dtype, autocast)
    patch_diffusers(model)
    results = run(model, dtype, autocast)
    assert fused == ONCE and computed == {of_ops}
    assert_as_exact(results, eager, truth, unit=2.0**-12 if mode == "fp16" else 2.0**-9)


@pytest.mark.parametrize("nf4", ["plain", "nested"])
def test_nf4_previews(nf4, fused):
    """In eval without gradients bitsandbytes packs weights anew where the CPU has AVX-512 BF16, and
    rounds absmax to bf16: those of the modulations here, and in a model not patched before all."""
    model = build(nf4=nf4)
    truth, later = predict(model), copy.deepcopy(model).eval()
    patch_diffusers(model)
    assert_close(predict(model.eval()), truth, output=2e-2)
    assert fused == ONCE
    preview = predict(later)
    patch_diffusers(later)
    state = later.transformer_blocks[0].attn.to_q.weight.quant_state
    if state.nested:
        assert_close(predict(later), preview)
    elif hasattr(state, "original_nested"):
        with pytest.warns(UserWarning, match="packed 4-bit weights for its own CPU kernels"):
            assert torch.equal(predict(later)["output"], preview["output"])


def test_positions_that_change(fused):
    """The rotation tables are kept from block to block, not from one batch to the next."""
    model, moved = build(), {"img_ids": inputs()["img_ids"] + 40}
    truth = [predict(model), predict(model, **moved)]
    assert (truth[0]["output"] - truth[1]["output"]).abs().max() > 1e-3
    patch_diffusers(model)
    assert_close(predict(model), truth[0])
    assert_close(predict(model, **moved), truth[1])
    assert fused == times(2)


@pytest.mark.parametrize("nf4", [None, "plain"])
def test_a_stream_wider_than_what_is_computed_in(nf4, fused, computed):
    """Blocks called under autocast with an fp32 stream keep it, and its precision."""
    tokens = [randn(2, n, 128, seed=n) for n in (15, 7)]
    arguments = [*tokens, randn(2, 128, seed=6), build().pos_embed(torch.ones(22, 3))]

    def outputs(model, autocast) -> dict:
        with torch.no_grad(), torch.autocast("cpu", BF16, enabled=autocast):
            made = [out for block in first_blocks(model) for out in block(*arguments)]
        return {str(i): out for i, out in enumerate(made)}

    truth = outputs(build(nf4=nf4), False)
    model = build(nf4=nf4, compute=BF16)
    eager = outputs(model, True)
    patch_diffusers(model)
    results = outputs(model, True)
    assert all(out.dtype == FP32 for out in results.values())
    assert fused["gelu_lora_linear"] == 3 and computed == {BF16}
    assert_as_exact(results, eager, truth, unit=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LoRAModule, LoConModule])
def test_compiled_whole_with_lora_modules(kind):
    model = (build() if kind is LoRAModule else as_simpletuner(build())).train()
    networks = [apply_network(model, kind)]
    truth = train(model, networks)
    patch_diffusers(model)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_close(train(model, networks), truth)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("nf4", [None, "nested"])
def test_compiled_whole(nf4):
    model = add_lora(build(nf4=nf4))
    truth = run(model)
    patch_diffusers(model)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_close(run(model), truth)
    torch.compiler.reset()


# ---------------------------------------------------------------- the model stays the user's


def state_of(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, state: dict) -> None:
    now = model.state_dict()
    assert list(now) == list(state)
    for name, value in state.items():
        assert now[name].dtype == value.dtype and torch.equal(now[name], value), name


def memory(model) -> tuple[int, int]:
    """Bytes of all frozen tensors' storages, each counted once; number of storages."""
    tensors = [*model.parameters(), *model.buffers()]
    for linear in model.modules():
        if isinstance(linear, bnb.nn.Linear4bit):
            state = linear.weight.quant_state
            tensors += [state.absmax] + ([state.state2.absmax] if state.state2 else [])
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values()), len(storages)


@pytest.mark.parametrize("nf4", [None, "plain", "nested"])
def test_unpatch_restores(nf4):
    model = add_lora(build(nf4=nf4))
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    attributes = {path: set(vars(each)) for path, each in modules.items()}
    state, before, held = state_of(model), run(model), memory(model)
    patch_diffusers(model)
    run(model)
    patch_diffusers(model)  # a second time: nothing
    assert memory(model)[0] == held[0] and memory(model)[1] < held[1]
    assert_same_state(model, state)
    unpatch_diffusers(model)
    assert memory(model) == held
    assert_same_state(model, state)
    for now, then in ((model.named_modules(), modules), (model.named_parameters(), parameters)):
        now = dict(now)
        assert list(now) == list(then) and all(now[name] is then[name] for name in then)
    assert {path: set(vars(each)) for path, each in model.named_modules()} == attributes
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        assert block.forward.__func__ is type(block).forward
    after = run(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    unpatch_diffusers(model)  # nothing left to take off


def test_adapters_after_the_patch(fused):
    model = build()
    patch_diffusers(model)
    peer = copy.deepcopy(model)
    unpatch_diffusers(peer)

    def both(change, compare=predict, **more) -> dict:
        """Changes both models; returns what the patched one gives, which is what its peer does."""
        for each in (model, peer):
            change(each)
        results = compare(model, **more)
        assert_close(results, compare(peer, **more))
        return results

    def add_second(model):
        add_lora(model, ["to_k", "proj_mlp"], seed=5, adapter="second")
        model.set_adapter("second")

    def both_active(model):
        model.set_adapters(["default", "second"], [0.5, 2.0])

    def back_to_first(model):
        model.delete_adapters("second")
        model.set_adapter("default")

    both(add_lora, run)
    both(add_second, run)
    outputs = [
        both(lambda model: model.disable_adapters()),
        both(lambda model: model.enable_adapters()),
        both(lambda model: None, joint_attention_kwargs={"scale": 0.5}),
        both(both_active, run),
        both(back_to_first),
    ]
    for one, other in combinations([each["output"] for each in outputs], 2):
        assert (one - other).abs().max() > 1e-3
    assert fused == times(7)


def test_weights_that_change_after_the_patch():
    model = build()
    patch_diffusers(model)
    for assign in (False, True):
        for source in (build(seed=9), build(seed=10)):
            model.load_state_dict(source.state_dict(), assign=assign)
            assert_close(predict(model), predict(source))
    model.double().float()  # other memory
    assert_close(predict(model), predict(source))
    model.double().float()
    with torch.inference_mode():
        predict(model)
    add_lora(model)
    assert_close(run(model), run(add_lora(source)))


def test_copies_are_their_own():
    model = build()
    patch_diffusers(model)
    before = predict(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.single_transformer_blocks[0].attn.to_k.weight.mul_(2)
    changed = predict(twin)
    assert torch.equal(predict(model)["output"], before["output"])
    assert not torch.equal(changed["output"], before["output"])
    unpatch_diffusers(twin)
    assert_close(predict(twin), changed)
    assert torch.equal(predict(model)["output"], before["output"])


def test_a_patched_model_saves(tmp_path):
    model = build()
    state = state_of(model)
    patch_diffusers(model)
    model.save_pretrained(tmp_path)
    assert_same_state(FluxTransformer2DModel.from_pretrained(tmp_path), state)


def test_fp16_is_clipped():
    """As diffusers does: a single block's result, and the text of a double block's."""
    model = build().half()
    x, txt = (randn(1, n, 128, seed=n).sign().half() * 60000 for n in (15, 7))
    temb, rope = randn(1, 128, seed=6).half() * 9, model.pos_embed(torch.zeros(22, 3))
    double, single = first_blocks(model)
    with torch.no_grad():
        for linear in (single.proj_out, double.ff.net[2], double.ff_context.net[2]):
            linear.bias.fill_(60000)
        before = [*double(x, txt, temb, rope), *single(x, txt, temb, rope)]
        patch_diffusers(model)
        after = [*double(x, txt, temb, rope), *single(x, txt, temb, rope)]
    for outs in (before, after):
        assert [float(out.abs().max()) for out in outs] == [65504, float("inf"), 65504, 65504]


# ---------------------------------------------------------------- what is not fused is announced


def first_blocks(model) -> list[nn.Module]:
    return [model.transformer_blocks[0], model.single_transformer_blocks[0]]


class Beside(nn.Module):
    def __init__(self, linears):
        super().__init__()
        self.linears = linears  # not children: no names of their own

    def forward(self, x):
        return torch.cat([linear(x) for linear in self.linears], -1)


def fuse_projections(block):
    block.attn.fused_projections = True
    for name, form in (("to_qkv", "to_{}"), ("to_added_qkv", "add_{}_proj")):
        if hasattr(block.attn, form.format("q")):
            setattr(block.attn, name, Beside([getattr(block.attn, form.format(x)) for x in "qkv"]))


def change_linear(block):
    block.attn.to_q.base_layer.__class__ = type("Other", (nn.Linear,), {})


OtherProcessor = type("Other", (transformer_flux.FluxAttnProcessor,), {})
CHANGES = {  # of the first block of each kind
    "base weights require gradients": lambda b: b.attn.to_q.base_layer.requires_grad_(True),
    "the norms of q and k require gradients": lambda b: b.attn.norm_q.requires_grad_(True),
    "a linear has hooks": lambda b: b.attn.to_q.base_layer.register_forward_hook(lambda *_: None),
    "a module inside has hooks": lambda b: b.attn.register_forward_hook(lambda *_: None),
    "the attention processor is Other": lambda b: b.attn.set_processor(OtherProcessor()),
    "a linear is a Other": change_linear,
    "their projections are fused": fuse_projections,
    "adapters are merged": lambda b: b.attn.to_q.merge(),
}
LORA_OPTIONS = {  # of LoRA that is not fused
    "an adapter drops out in training": {"lora_dropout": 0.5},
    "an adapter is a LoRA variant": {"use_dora": True},
    "an adapter has biases": {"lora_bias": True},
}


@pytest.mark.grid(5)
@pytest.mark.parametrize("reason", [*CHANGES, *LORA_OPTIONS])
def test_fallbacks_are_announced_once(reason, fused):
    model = add_lora(build(), ["to_q"], **LORA_OPTIONS.get(reason, {}))
    peer = copy.deepcopy(model)
    patch_diffusers(model)
    for block in (block for each in (model, peer) for block in first_blocks(each)):
        CHANGES.get(reason, id)(block)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"patch_diffusers: .* where {reason}") as warned:
        results = run(model)
    assert sum("patch_diffusers" in str(each.message) for each in warned) == 1
    run(model)  # no further word: `silence` would raise
    torch.manual_seed(0)
    assert_close(results, run(peer))
    assert fused["qk_norm_rope_attention"] == (2 if reason in CHANGES else 0)


def test_attention_kwargs_are_passed_on(fused):
    """A mask among joint_attention_kwargs reaches diffusers' processor."""
    model = add_lora(build())
    mask = torch.ones(1, 1, 1, TEXT + ROWS * COLUMNS, dtype=torch.bool)
    mask[..., :3] = False
    more = {"joint_attention_kwargs": {"attention_mask": mask}}
    truth = run(model, **more)
    assert (truth["output"] - predict(model)["output"]).abs().max() > 1e-3
    patch_diffusers(model)
    with pytest.warns(UserWarning, match="joint_attention_kwargs has attention_mask"):
        results = run(model, **more)
    assert not any(fused.values())
    assert_close(results, truth)
    run(model)
    assert fused == ONCE


def test_a_chosen_backend_is_announced_and_not_used(fused):
    model = build()
    patch_diffusers(model)
    model.set_attention_backend("native")
    with pytest.warns(UserWarning, match="backend chosen is not used") as warned:
        predict(model)
    assert len(warned) == 1 and fused == ONCE


def test_other_4_bit_weights_are_not_fused(fused):
    model = build(nf4="plain")
    to_q = model.single_transformer_blocks[0].attn.to_q
    weight = nn.Linear(128, 128).weight.data
    to_q.weight = bnb.nn.Params4bit(weight, quant_type="fp4", module=to_q).to("cpu")
    truth = predict(model)
    patch_diffusers(model)
    with pytest.warns(UserWarning, match="4-bit weights are not NF4"):
        assert_close(predict(model), truth)
    assert fused["qk_norm_rope_attention"] == 2


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("call", [patch_diffusers, unpatch_diffusers])
def test_other_classes_are_refused(call):
    wrapped = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["to_q"]))
    for wrong in (nn.Linear(2, 2), wrapped):
        with pytest.raises(TypeError, match=f"FluxTransformer2DModel.*{type(wrong).__name__}"):
            call(wrong)


def test_other_blocks_are_refused():
    norm, context, forward = build(), build(), build()
    norm.single_transformer_blocks[1].norm.norm.eps = 1e-5
    del context.transformer_blocks[0].ff_context
    forward.transformer_blocks[0].forward = lambda *_: None
    for model, message in (
        (norm, "other norms or another activation"),
        (context, "FluxTransformerBlock has other parts.*ff_context"),
        (forward, "forward of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            patch_diffusers(model)
        assert not any("_fluxfast" in vars(each) for each in model.modules())


def test_unpatch_refuses_under_a_hook():
    model = build()
    patch_diffusers(model)
    block = model.transformer_blocks[0]
    patched = block.forward
    block.forward = lambda *_: None
    with pytest.raises(ValueError, match="was replaced since"):
        unpatch_diffusers(model)
    block.forward = patched
    unpatch_diffusers(model)


# ---------------------------------------------------------------- other trainers' LoRA and blocks


def train(model, networks, **more) -> dict[str, torch.Tensor]:
    """`run` where the LoRA modules are in `networks`. Trained scalars' gradients are one vector, of
    whose largest an error is counted: each is a sum over B that cancels."""
    for network in networks:
        network.zero_grad()
    out = model(**(inputs() | more), return_dict=False)[0]
    (out.float() - randn(*out.shape, seed=5)).square().mean().backward()
    results, scalars = {"output": out.detach()}, []
    for i, network in enumerate(networks):
        for name, parameter in network.named_parameters():
            if name.endswith("scalar"):
                scalars.append(parameter.grad.clone())
            elif parameter.grad is not None:
                results[f"{i} {name}"] = parameter.grad.clone()
    return results | ({"scalars": torch.stack(scalars)} if scalars else {})


def check_networks(model, networks, fused, **more) -> None:
    truth = train(model, networks, **more)
    assert len(truth) > 1
    patch_diffusers(model)
    fused.update(times(0))
    assert_close(train(model, networks, **more), truth)
    assert fused == ONCE
    unpatch_diffusers(model)
    assert_close(train(model, networks, **more), truth)
    assert fused == ONCE


def stacked(model):
    """A frozen assistant below what trains, as ai-toolkit has it for schnell."""
    assistant = apply_network(model, rank=2, seed=7).requires_grad_(False)
    return [assistant.eval(), apply_network(model, multiplier=[0.5] * BATCH)]


NETWORKS = {
    "ai-toolkit": lambda m: [apply_network(m, multiplier=[1.0] * BATCH)],
    "ai-toolkit, attention, one strength": lambda m: [
        apply_network(m, LoRAModule, ["attn"], 4, 1, 0.7)
    ],
    "ai-toolkit, assistant": stacked,
    "LyCORIS": lambda m: [apply_network(m, LoConModule)],
    "kohya": lambda m: [apply_network(m, KohyaModule)],
}


@pytest.mark.grid(5)
@pytest.mark.parametrize("nf4", [None, "plain"])
@pytest.mark.parametrize("name", NETWORKS)
def test_lora_modules_in_the_place_of_a_forward(name, nf4, fused):
    model = build(nf4=nf4).train()
    check_networks(model, NETWORKS[name](model), fused)


@pytest.mark.parametrize("change", ["is_active", "is_merged_in", "multiplier"])
def test_a_network_that_adds_nothing(change, fused):
    """Applied after the patch, switched off for some forwards, as for a prior prediction."""
    peer, model = build().train(), build().train()
    truth, of_peer = predict(peer), apply_network(peer)
    patch_diffusers(model)
    network = apply_network(model)
    value = getattr(network, change)
    setattr(network, change, {"is_active": False, "is_merged_in": True, "multiplier": 0.0}[change])
    assert_close(predict(model), truth)
    setattr(network, change, value)
    assert_close(train(model, [network]), train(peer, [of_peer]))
    assert fused == times(2)


def test_a_multiplier_of_zero_has_gradients(fused):
    """Which are zero and not missing, as of kohya's own forward."""
    model = build().train()
    networks = [apply_network(model, KohyaModule)]
    set_each(networks, multiplier=0.0)
    patch_diffusers(model)
    output, *gradients = train(model, networks).values()
    assert len(gradients) == len(list(networks[0].parameters()))
    assert not any(gradient.any() for gradient in gradients) and output.any() and fused == ONCE


def test_half_precision_of_lora_modules(fused, computed):
    """ai-toolkit's base in bf16 and LoRA in fp32."""

    def make(dtype):
        model = build().to(dtype).train()
        return model, [apply_network(model)]

    truth, (model, networks) = train(*make(FP32)), make(BF16)
    eager = train(model, networks, **inputs(BF16))
    patch_diffusers(model)
    results = train(model, networks, **inputs(BF16))
    assert fused == ONCE and computed == {BF16}
    assert_as_exact(results, eager, truth, unit=2.0**-9)


def set_each(networks, **attributes) -> None:
    for network in networks:
        for lora in network.unet_loras:
            for name, value in attributes.items():
                setattr(lora, name, value)


def one_a_sample(networks) -> None:
    networks[0].multiplier = [1.0, 0.5]


def another_forward(networks) -> None:
    for lora in networks[0].unet_loras:
        lora.org_module[0].forward = partial(lora.org_module[0].forward)


NOT_SERVED = {  # what the LoRA modules are, what is done to them
    "an adapter is a DoRAModule with magnitude": (DoRAModule, lambda _: None),
    "an adapter is a LokrModule": (LokrModule, lambda _: None),
    "an adapter is a LoConModule with wd": (LoConModule, lambda n: set_each(n, wd=True)),
    "an adapter drops out in training": (KohyaModule, lambda n: set_each(n, dropout=0.5)),
    "an adapter drops out in .*": (LoConModule, lambda n: set_each(n, rank_dropout=0.1)),
    "an adapter drops out": (LoRAModule, lambda n: set_each(n, module_dropout=0.1)),
    "an adapter's strength differs": (
        LoRAModule,
        lambda n: setattr(n[0], "multiplier", [1.0, 0.5]),
    ),
    "the forward of a linear was replaced": (LoRAModule, another_forward),
}


@pytest.mark.grid(8)
@pytest.mark.parametrize("reason", NOT_SERVED)
@pytest.mark.parametrize("simpletuner", [False, True])
def test_lora_modules_that_are_not_served(reason, simpletuner, fused):
    """The blocks run as they were written, which is said once."""
    kind, change = NOT_SERVED[reason]
    model = as_simpletuner(build()).train() if simpletuner else build().train()
    networks = [apply_network(model, kind, ["to_q", "to_add_out"])]
    change(networks)
    torch.manual_seed(0)
    truth = train(model, networks)
    patch_diffusers(model)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"patch_diffusers: .* where {reason}") as warned:
        results = train(model, networks)
    assert sum("patch_diffusers" in str(each.message) for each in warned) == 1
    assert all(torch.equal(results[name], truth[name]) for name in truth)
    train(model, networks)  # no further word
    assert not any(fused.values())
    unpatch_diffusers(model)
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)  # memory of its own, though it was not fused


def routed(model) -> None:
    model.routes = torch.stack([torch.randperm(ROWS * COLUMNS)[:6] for _ in range(BATCH)])


def assisted(model) -> None:
    add_lora(model, ["to_q"], seed=5, adapter="second")
    model.set_adapters(["default", "second"])


SIMPLETUNER = {  # build's arguments, of the older class?, what is done to it
    "with peft": ({}, False, lambda m: None),
    "of 2025": ({}, True, lambda m: None),
    "NF4": ({"nf4": "plain"}, False, lambda m: None),
    "gradient checkpointing": ({}, False, lambda m: m.enable_gradient_checkpointing()),
    "gradient checkpointing of 2025": ({}, True, lambda m: m.enable_gradient_checkpointing()),
    "TREAD": ({}, False, routed),
    "an assistant's LoRA": ({}, False, assisted),
}


@pytest.mark.parametrize("name", SIMPLETUNER)
def test_simpletuner(name, fused):
    options, older, change = SIMPLETUNER[name]
    model = add_lora(as_simpletuner(build(**options), older))
    change(model)
    check_patched(model, fused, run, forwards=1 + ("checkpointing" in name))
    peer = copy.deepcopy(model)
    unpatch_diffusers(peer)
    assert_close(run(peer), run(model))


@pytest.mark.parametrize("kind", [LoRAModule, LoConModule])
def test_simpletuner_with_lora_modules(kind, fused):
    model = as_simpletuner(build()).train()
    check_networks(model, [apply_network(model, kind, ["attn.", "ff."])], fused)


MASK = torch.ones(BATCH, TEXT + ROWS * COLUMNS)
MASK[:, 3:TEXT] = 0


@pytest.mark.parametrize(
    ("reason", "more"),
    [
        ("attention_mask is given", {"attention_mask": MASK}),
        ("temb is not one vector", {"timestep": torch.rand(BATCH, ROWS * COLUMNS)}),
    ],
)
def test_what_simpletuner_passes_to_its_blocks(reason, more, fused):
    model = add_lora(as_simpletuner(build()))
    model.requires_grad_(False)
    truth = predict(model, **more)
    assert (truth["output"] - predict(model)["output"]).abs().max() > 1e-3
    patch_diffusers(model)
    with pytest.warns(UserWarning, match=f"patch_diffusers: .* where {reason}"):
        assert torch.equal(predict(model, **more)["output"], truth["output"])
    assert not any(fused.values())
    predict(model)
    assert fused == ONCE


def test_a_modulation_of_the_text_of_its_own(fused):
    """SimpleTuner's context_temb."""
    double, _ = first_blocks(as_simpletuner(build()))
    model, tokens = as_simpletuner(build()), [randn(2, n, 128, seed=n) for n in (15, 7)]
    tembs, rope = [randn(2, 128, seed=n) for n in (6, 8)], model.pos_embed(torch.ones(22, 3))
    arguments = [*tokens, *tembs, rope]
    patch_diffusers(model)
    with torch.no_grad():
        pairs = zip(first_blocks(model)[0](*arguments), double(*arguments), strict=True)
        assert_close(*({"txt": out[0], "img": out[1]} for out in zip(*pairs, strict=True)))
    assert fused["lora_linear"] == 2


def test_simpletuners_results_are_finite():
    x, txt = (randn(1, n, 128, seed=n) for n in (15, 7))
    model = as_simpletuner(build())
    temb, rope = randn(1, 128, seed=6), model.pos_embed(torch.zeros(22, 3))
    _, single = first_blocks(model)
    x[0, 3, 5], x[0, 4, 5] = torch.inf, torch.nan
    with torch.no_grad():
        before = single(torch.cat([txt, x], 1), temb, rope)
        patch_diffusers(model)
        after = single(torch.cat([txt, x], 1), temb, rope)
    assert torch.isfinite(after).all() and torch.equal(before == 0, after == 0)


def recipes() -> list[str]:
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return [recipe for recipe in found if "patch_diffusers" in recipe]


@pytest.mark.parametrize("index", range(3))
def test_recipes_of_the_readme(index, fused):
    """diffusers with peft, ai-toolkit, SimpleTuner: each has what its recipe names."""
    model = as_simpletuner(build()) if index == 2 else build()
    network = apply_network(model) if index == 1 else add_lora(model)
    names = {
        "transformer": model,
        "self": SimpleNamespace(sd=SimpleNamespace(unet=model)),
        "trainer": SimpleNamespace(model=SimpleNamespace(get_trained_component=lambda: model)),
    }
    recipe = recipes()[index]
    assert len(recipes()) == 3 and [x for x in names if x in recipe] == [[*names][index]]
    steps = {0: ["unpatch_diffusers(transformer)"]}.get(index, [])
    exec(recipe.split(*steps)[0] if steps else recipe, names)
    train(model, [network])
    assert fused == ONCE
    exec(recipe, names)
    train(model, [network])
    assert fused == (ONCE if index == 0 else times(2))


# ---------------------------------------------------------------- a whole training step


class Batch:
    """What the data loader and the encoders hand to a step."""

    def __init__(self, size=2, rows=4, columns=3, tokens=5):
        self.latents = randn(size, 16, 2 * rows, 2 * columns, seed=1)
        self.noise = randn(size, 16, 2 * rows, 2 * columns, seed=2)
        self.u = torch.sigmoid(randn(size, seed=3))  # logit_normal, mean 0, std 1
        self.prompt, self.pooled = randn(size, tokens, 192, seed=4), randn(size, 128, seed=5)
        self.img_ids, self.txt_ids = torch.zeros(rows, columns, 3), torch.zeros(tokens, 3)
        self.img_ids[..., 1] += torch.arange(rows)[:, None]
        self.img_ids[..., 2] += torch.arange(columns)


def dreambooth_step(model, scheduler, batch: Batch, weighting: str) -> dict[str, torch.Tensor]:
    """The step of diffusers' examples/dreambooth/train_dreambooth_lora_flux.py: timesteps by their
    density, flow matching's input and target, packed tokens, the weighted loss, backward."""
    at = (batch.u * scheduler.config.num_train_timesteps).long()
    timesteps, sigmas = scheduler.timesteps[at], scheduler.sigmas[at].view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * batch.latents + sigmas * batch.noise
    cut = noisy.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # [B, C, rows, 2, columns, 2]
    packed = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    predicted = model(
        hidden_states=packed,
        timestep=timesteps / 1000,
        guidance=torch.full((len(at),), 3.5),
        pooled_projections=batch.pooled,
        encoder_hidden_states=batch.prompt,
        txt_ids=batch.txt_ids,
        img_ids=batch.img_ids.flatten(0, 1),
        return_dict=False,
    )[0]
    predicted = predicted.unflatten(1, batch.img_ids.shape[:2]).unflatten(3, (16, 2, 2))
    predicted = predicted.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    weights = {
        "none": torch.ones_like(sigmas),
        "sigma_sqrt": sigmas**-2,
        "cosmap": 2 / (torch.pi * (1 - 2 * sigmas + 2 * sigmas**2)),
    }
    squares = weights[weighting] * (predicted - (batch.noise - batch.latents)) ** 2
    loss = squares.flatten(1).mean(1).mean()
    model.zero_grad()
    loss.backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients


@pytest.mark.parametrize(("weighting", "checkpointing"), [("none", False), ("cosmap", True)])
def test_the_dreambooth_step_of_diffusers(weighting, checkpointing, fused):
    """On the nano model, with the LoRA of that script (gaussian A), B as after some steps.

    fp32 losses within 1e-6. Gradients: some 8 matmuls in a row a block, six blocks, there and back,
    over K up to 800, each product rounded at 2^-24: where such errors add up as in a random walk,
    2^-24 · sqrt(2 · 8 · 6 · 800) = 1.7e-5 of a tensor's largest value, on both sides 2.5e-5.
    """
    model = FluxTransformer2DModel.from_pretrained(NANO / "transformer").requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(NANO / "scheduler")
    targets = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out"
    targets = [f"attn.{name}" for name in targets.split()]
    targets += [f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")]
    config = {"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian", "target_modules": targets}
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(**config))
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.data.normal_(std=0.05)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    truth = dreambooth_step(model, scheduler, Batch(), weighting)
    assert len(truth) == 1 + 2 * (2 * 12 + 4 * 3)
    patch_diffusers(model)
    results = dreambooth_step(model, scheduler, Batch(), weighting)
    assert fused["qk_norm_rope_attention"] == 6 * (1 + checkpointing)
    torch.testing.assert_close(results["loss"], truth["loss"], rtol=1e-6, atol=0)
    del results["loss"], truth["loss"]
    assert_close(results, truth, gradients=2.5e-5)
