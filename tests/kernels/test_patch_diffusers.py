"""patch_diffusers: diffusers' transformer gives the same on the fused ops, and comes back whole.

fp32: outputs and LoRA gradients within 1e-5 of diffusers' own, of each tensor's largest value (5e-5
for gradients, sums of products of such outputs). bf16 and fp16: at most twice the error that
diffusers makes in that dtype against its fp32 self.
"""

import copy
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from fluxfast_kernels.integrations import diffusers as module
from torch import nn

from bench.step.peers import LORA_MODULES

patch_diffusers, unpatch_diffusers = module.patch_diffusers, module.unpatch_diffusers
BATCH, ROWS, COLUMNS, TEXT, CHANNELS = 2, 3, 5, 7, 16


def build(width=64, nf4=None, compute=torch.float32, seed=0) -> FluxTransformer2DModel:
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
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        random = torch.randn(tensor.shape, generator=draw)
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
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if f"lora_A.{adapter}" in name or f"lora_B.{adapter}" in name:
                random = torch.randn(tensor.shape, generator=draw)
                tensor.data = random * 0.5 * tensor.shape[-1] ** -0.5
    return model.train()


def inputs(dtype=torch.float32, seed=2) -> dict:
    draw = torch.Generator().manual_seed(seed)
    img_ids = torch.zeros(ROWS, COLUMNS, 3)
    img_ids[..., 1], img_ids[..., 2] = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)
    x = {
        "hidden_states": torch.randn(BATCH, ROWS * COLUMNS, CHANNELS, generator=draw),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 24, generator=draw),
        "pooled_projections": torch.randn(BATCH, 20, generator=draw),
        "timestep": torch.tensor([0.25, 0.75]),
        "guidance": torch.tensor([1.0, 3.5]),
    }
    x = {name: tensor.bfloat16().to(dtype) for name, tensor in x.items()}
    return x | {"img_ids": img_ids.view(-1, 3), "txt_ids": torch.zeros(TEXT, 3)}


def predict(model, dtype=torch.float32, autocast=False, **more) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(**inputs(dtype), **more, return_dict=False)[0]


def run(model, dtype=torch.float32, autocast=False, **more) -> dict[str, torch.Tensor]:
    """The output and every trained parameter's gradient."""
    model.zero_grad()
    out = predict(model, dtype, autocast, **more)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out.float() - target).square().mean().backward()
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
    calls = dict.fromkeys(
        ("norm_modulate_lora_linear", "qk_norm_rope_attention", "lora_linear", "gelu_lora_linear"),
        0,
    )
    for name in calls:
        op = getattr(module, name)

        def counted(*arguments, name=name, op=op, **more):
            calls[name] += 1
            first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
            computed.add(first.dtype)
            return op(*arguments, **more)

        monkeypatch.setattr(module, name, counted)
    return calls


ONCE = {
    "norm_modulate_lora_linear": 4 + 2,
    "qk_norm_rope_attention": 1 + 2,
    "lora_linear": 2,
    "gelu_lora_linear": 2 + 2,
}


@pytest.fixture(autouse=True)
def silence():
    """A fallback that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "patch_diffusers")
        yield


def assert_close(found: dict, truth: dict, output=1e-5, gradients=5e-5) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        allowed = output if name == "output" else gradients
        error = (found[name] - value).abs().max() / value.abs().max()
        assert found[name].dtype == value.dtype and error <= allowed, f"{name}: {error:.1e}"


def assert_as_exact(found: dict, eager: dict, truth: dict, unit: float, times=2.0) -> None:
    """At most `times` eager's error against the truth; half a unit in the last place is allowed."""
    for name, value in truth.items():
        errors = [(x[name].double() - value).norm() / value.norm() for x in (found, eager)]
        assert found[name].dtype == eager[name].dtype
        allowed = times * max(errors[1], unit / 2)
        assert errors[0] <= allowed, f"{name}: error {errors[0]:.2e}, allowed {allowed:.2e}"


# ---------------------------------------------------------------- the same results


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fp32(width, checkpointing, fused):
    model = add_lora(build(width))
    if checkpointing:
        model.enable_gradient_checkpointing()
    truth = run(model)
    assert not any(fused.values())
    patch_diffusers(model)
    found = run(model)
    assert fused == {name: count * (1 + checkpointing) for name, count in ONCE.items()}
    assert_close(found, truth)


def test_without_lora_and_with_controlnet(fused):
    model = build()
    hidden = torch.randn(BATCH, ROWS * COLUMNS, 128, generator=torch.Generator().manual_seed(4))
    control = {
        "controlnet_block_samples": [hidden],
        "controlnet_single_block_samples": [hidden, -hidden],
    }
    for more in ({}, control):
        with torch.no_grad():
            truth = predict(model, **more)
            patch_diffusers(model)
            assert_close({"output": predict(model, **more)}, {"output": truth})
        unpatch_diffusers(model)
    assert fused == {name: 2 * count for name, count in ONCE.items()}


def test_a_trainable_model_predicts_fused_without_gradients(fused):
    model = build().requires_grad_(True)
    with torch.no_grad():
        truth = predict(model)
        patch_diffusers(model)
        assert_close({"output": predict(model)}, {"output": truth})
    assert fused == ONCE


@pytest.mark.parametrize("mode", ["bf16", "fp16", "autocast", "autocast over fp32"])
def test_half_precision(mode, fused):
    model = add_lora(build())
    truth = {name: value.double() for name, value in run(model).items()}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mode, torch.float32)
    autocast = mode.startswith("autocast")
    if mode != "autocast over fp32":
        to = dtype if not autocast else torch.bfloat16
        for name, tensor in model.named_parameters():
            if "lora_" not in name:
                tensor.data = tensor.data.to(to)
    eager = run(model, dtype, autocast)
    patch_diffusers(model)
    found = run(model, dtype, autocast)
    assert fused == ONCE
    assert_as_exact(found, eager, truth, unit=2.0**-12 if mode == "fp16" else 2.0**-9)


@pytest.mark.parametrize("nf4", ["plain", "nested"])
@pytest.mark.parametrize("width", [32, 64])  # at 32 a part's nested blocks are not whole
def test_nf4(nf4, width, fused):
    model = add_lora(build(width, nf4))
    truth = run(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    patch_diffusers(model)
    block = model.single_transformer_blocks[0]
    joined = block._fluxfast.joined["linear1"]
    paths = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    weight = joined.weight([block.get_submodule(path).base_layer for path in paths]).tensors
    assert len(weight) == (4 if nf4 == "nested" and width == 64 else 2)
    assert_close(run(model), truth)
    assert fused == ONCE
    assert_same_state(model, state)


@pytest.mark.parametrize("nf4", ["plain", "nested"])
def test_nf4_under_autocast(nf4, fused):
    truth = {name: x.double() for name, x in run(add_lora(build(nf4=nf4))).items()}
    model = add_lora(build(nf4=nf4, compute=torch.bfloat16))
    eager = run(model, autocast=True)
    patch_diffusers(model)
    found = run(model, autocast=True)
    assert fused == ONCE
    assert_as_exact(found, eager, truth, unit=2.0**-9)


def test_nf4_computed_in_fp32_keeps_a_bf16_stream(fused, computed):
    """bitsandbytes' default compute dtype: the products are fp32, what is between them bf16."""
    truth = {name: x.double() for name, x in run(add_lora(build(nf4="plain"))).items()}
    model = add_lora(build(nf4="plain"))
    for name, tensor in model.named_parameters():
        if "lora_" not in name and tensor.dtype == torch.float32:
            tensor.data = tensor.data.bfloat16()
    eager = run(model, torch.bfloat16)
    patch_diffusers(model)
    found = run(model, torch.bfloat16)
    assert fused == ONCE and computed == {torch.float32}
    assert_as_exact(found, eager, truth, unit=2.0**-9)


@pytest.mark.parametrize("nf4", ["plain", "nested"])
def test_nf4_previews(nf4, fused):
    """In eval without gradients bitsandbytes packs weights anew where the CPU has AVX-512 BF16, and
    rounds absmax to bf16: those of the modulations here, and in a model not patched before all."""
    model = build(nf4=nf4)
    with torch.no_grad():
        truth = {"output": predict(model)}
        later = copy.deepcopy(model).eval()
        patch_diffusers(model)
        assert_close({"output": predict(model.eval())}, truth, output=2e-2)
        assert fused == ONCE
        preview = {"output": predict(later)}
        patch_diffusers(later)
        if later.transformer_blocks[0].attn.to_q.weight.quant_state.nested:
            assert_close({"output": predict(later)}, preview)
        elif hasattr(later.transformer_blocks[0].attn.to_q.weight.quant_state, "original_nested"):
            with pytest.warns(UserWarning, match="packed 4-bit weights for its own CPU kernels"):
                assert torch.equal(predict(later), preview["output"])


def test_lora_on_the_modulations(fused):
    """shift, scale and gate need gradients then."""
    targets = LORA_MODULES + r"|.*_blocks\.\d+\.(norm1|norm1_context|norm)\.linear"
    model = add_lora(build(), targets)
    truth = run(model)
    assert any("norm1_context.linear.lora_B" in name for name in truth)
    patch_diffusers(model)
    assert_close(run(model), truth)
    assert fused == ONCE


@pytest.mark.parametrize("targets", [["to_q", "proj_mlp"], ["to_v", "add_k_proj"], ["proj_out"]])
def test_lora_on_some_linears(targets, fused):
    model = add_lora(build(), targets)
    truth = run(model)
    patch_diffusers(model)
    assert_close(run(model), truth)
    assert fused == ONCE


def test_ranks_and_scales_that_differ(fused):
    pattern = {"rank_pattern": {"to_q": 1, "proj_mlp": 6}, "alpha_pattern": {"to_v": 2}}
    model = add_lora(build(), **pattern, use_rslora=True)
    truth = run(model)
    patch_diffusers(model)
    assert_close(run(model), truth)
    assert fused == ONCE


def test_half_precision_lora(fused):
    model = add_lora(build()).bfloat16()
    truth = {name: x.double() for name, x in run(copy.deepcopy(model).float()).items()}
    eager = run(model, torch.bfloat16)
    patch_diffusers(model)
    assert_as_exact(run(model, torch.bfloat16), eager, truth, unit=2.0**-9)
    assert fused == ONCE


def test_positions_that_change(fused):
    """The rotation tables are kept from block to block, not from one batch to the next."""
    model = build()
    moved = inputs() | {"img_ids": inputs()["img_ids"] + 40}
    with torch.no_grad():
        truth = [model(**x, return_dict=False)[0] for x in (inputs(), moved)]
        patch_diffusers(model)
        found = [model(**x, return_dict=False)[0] for x in (inputs(), moved)]
    assert (truth[0] - truth[1]).abs().max() > 1e-3
    for one, other in zip(found, truth, strict=True):
        assert_close({"output": one}, {"output": other})
    assert fused == {name: 2 * count for name, count in ONCE.items()}


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_stream_wider_than_what_is_computed_in(kind, fused, computed):
    """Blocks called under autocast with an fp32 stream keep it, and its precision."""
    nf4 = "plain" if kind == "nf4" else None
    draw = torch.Generator().manual_seed(6)
    given = [torch.randn(2, n, 128, generator=draw) for n in (15, 7)]
    given += [torch.randn(2, 128, generator=draw), build().pos_embed(torch.ones(22, 3))]

    def made(model, autocast) -> dict:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = [out for block in first_blocks(model) for out in block(*given)]
        return {str(i): out for i, out in enumerate(outputs)}

    truth = {name: out.double() for name, out in made(build(nf4=nf4), False).items()}
    model = build(nf4=nf4, compute=torch.bfloat16)
    eager = made(model, True)
    patch_diffusers(model)
    found = made(model, True)
    assert all(out.dtype == torch.float32 for out in found.values())
    assert fused["gelu_lora_linear"] == 3 and computed == {torch.bfloat16}
    assert_as_exact(found, eager, truth, unit=0.0)


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
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before, held = run(model), memory(model)
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
    for each in (model, peer):
        add_lora(each)
    assert_close(run(model), run(peer))
    for each in (model, peer):
        add_lora(each, ["to_k", "proj_mlp"], seed=5, adapter="second")
        each.set_adapter("second")
    assert_close(run(model), run(peer))
    with torch.no_grad():
        outputs = []
        for step in ("disable_adapters", "enable_adapters"):
            for each in (model, peer):
                getattr(each, step)()
            outputs.append(predict(model))
            assert_close({"output": outputs[-1]}, {"output": predict(peer)})
        half = {"joint_attention_kwargs": {"scale": 0.5}}
        outputs.append(predict(model, **half))
        assert_close({"output": outputs[-1]}, {"output": predict(peer, **half)})
        for each in (model, peer):
            each.delete_adapters("second")
            each.set_adapter("default")
        outputs.append(predict(model))
        assert_close({"output": outputs[-1]}, {"output": predict(peer)})
    for i, one in enumerate(outputs):
        assert all((one - other).abs().max() > 1e-3 for other in outputs[:i])
    assert fused == {name: 6 * count for name, count in ONCE.items()}


def test_weights_that_change_after_the_patch(fused):
    model, other = build(), build(seed=9)
    patch_diffusers(model)
    with torch.no_grad():
        for assign in (False, True):
            for source in (other, build(seed=10)):
                model.load_state_dict(source.state_dict(), assign=assign)
                assert_close({"output": predict(model)}, {"output": predict(source)})
        model.double().float()  # other memory
        assert_close({"output": predict(model)}, {"output": predict(source)})
        model.double().float()
        with torch.inference_mode():
            predict(model)
    add_lora(model)
    assert_close(run(model), run(add_lora(build(seed=10))))


def test_copies_are_their_own():
    model = build()
    patch_diffusers(model)
    with torch.no_grad():
        before = predict(model)
        twin = copy.deepcopy(model)
        twin.single_transformer_blocks[0].attn.to_k.weight.mul_(2)
        changed = predict(twin)
        assert torch.equal(predict(model), before) and not torch.equal(changed, before)
        unpatch_diffusers(twin)
        assert_close({"output": predict(twin)}, {"output": changed})
        assert torch.equal(predict(model), before)


def test_a_patched_model_saves(tmp_path):
    model = build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    patch_diffusers(model)
    model.save_pretrained(tmp_path)
    assert_same_state(FluxTransformer2DModel.from_pretrained(tmp_path), state)


def test_fp16_is_clipped():
    """As diffusers does: a single block's result, and the text of a double block's."""
    model = build().half()
    draw = torch.Generator().manual_seed(6)
    x, txt = (torch.randn(1, n, 128, generator=draw).sign().half() * 60000 for n in (15, 7))
    temb, rope = torch.randn(1, 128, generator=draw).half() * 9, model.pos_embed(torch.zeros(22, 3))
    double, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    with torch.no_grad():
        for linear in (single.proj_out, double.ff.net[2], double.ff_context.net[2]):
            linear.bias.fill_(60000)
        before = [*double(x, txt, temb, rope), *single(x, txt, temb, rope)]
        patch_diffusers(model)
        after = [*double(x, txt, temb, rope), *single(x, txt, temb, rope)]
    largest = [65504, float("inf"), 65504, 65504]
    for made in (before, after):
        assert [float(out.abs().max()) for out in made] == largest


# ---------------------------------------------------------------- what is not fused is said


def first_blocks(model) -> list[nn.Module]:
    return [model.transformer_blocks[0], model.single_transformer_blocks[0]]


def train_base(model):
    for block in first_blocks(model):
        block.attn.to_q.base_layer.weight.requires_grad_(True)


def train_norms(model):
    for block in first_blocks(model):
        block.attn.norm_q.weight.requires_grad_(True)


def add_hooks(model):
    for block in first_blocks(model):
        block.attn.to_q.base_layer.register_forward_hook(lambda *_: None)


def add_inner_hooks(model):
    for block in first_blocks(model):
        block.attn.register_forward_hook(lambda *_: None)


def change_processor(model):
    class Other(transformer_flux.FluxAttnProcessor):
        pass

    for block in first_blocks(model):
        block.attn.set_processor(Other())


def change_linear(model):
    class Other(nn.Linear):
        pass

    for block in first_blocks(model):
        block.attn.to_q.base_layer.__class__ = Other


def fuse_projections(model):
    for block in first_blocks(model):
        block.attn.fused_projections = True
        for name, parts in (("to_qkv", "qkv"), ("to_added_qkv", "qkv")):
            form = "add_{}_proj" if "added" in name else "to_{}"
            if hasattr(block.attn, form.format("q")):
                linears = [getattr(block.attn, form.format(part)) for part in parts]
                setattr(block.attn, name, Beside(linears))


class Beside(nn.Module):
    def __init__(self, linears):
        super().__init__()
        self.linears = linears  # not children: no names of their own

    def forward(self, x):
        return torch.cat([linear(x) for linear in self.linears], -1)


def merge(model):
    for block in first_blocks(model):
        block.attn.to_q.merge()


def second_adapter(model):
    add_lora(model, ["to_q"], seed=5, adapter="second")
    model.set_adapters(["default", "second"])


FALLBACKS = {
    "base weights require gradients": train_base,
    "the norms of q and k require gradients": train_norms,
    "a linear has hooks": add_hooks,
    "a module inside has hooks": add_inner_hooks,
    "the attention processor is Other": change_processor,
    "a linear is a Other": change_linear,
    "their projections are fused": fuse_projections,
    "adapters are merged": merge,
    "several adapters are active at once": second_adapter,
}


@pytest.mark.grid(3)
@pytest.mark.parametrize("reason", FALLBACKS)
def test_fallbacks_are_announced_once(reason, fused):
    change, model = FALLBACKS[reason], add_lora(build())
    peer = copy.deepcopy(model)
    patch_diffusers(model)
    change(model)
    change(peer)
    with pytest.warns(UserWarning, match=f"patch_diffusers: .* where {reason}") as told:
        found = run(model)
    assert sum("patch_diffusers" in str(each.message) for each in told) == 1
    again = run(model)  # no further word: `silence` would raise
    assert_close(found, run(peer))
    assert_close(again, found)
    unfused = 1 if reason != "several adapters are active at once" else 2
    assert fused["qk_norm_rope_attention"] == 2 * (2 - unfused)


@pytest.mark.parametrize(
    "reason, config",
    [
        ("an adapter drops out in training", {"lora_dropout": 0.5}),
        ("an adapter is a LoRA variant", {"use_dora": True}),
        ("an adapter has biases", {"lora_bias": True}),
    ],
)
def test_lora_that_is_not_fused(reason, config, fused):
    model = add_lora(build(), ["to_q"], **config)
    peer = copy.deepcopy(model)
    patch_diffusers(model)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"patch_diffusers: .* where {reason}"):
        found = run(model)
    torch.manual_seed(0)
    assert_close(found, run(peer))
    assert not any(fused.values())
    if "lora_dropout" in config:  # none in eval
        with torch.no_grad():
            found = predict(model.eval())
        assert fused == ONCE
        assert_close({"output": found}, {"output": predict(peer.eval()).detach()})


def test_attention_kwargs_are_passed_on(fused):
    """A mask among joint_attention_kwargs reaches diffusers' processor."""
    model = add_lora(build())
    mask = torch.ones(1, 1, 1, TEXT + ROWS * COLUMNS, dtype=torch.bool)
    mask[..., :3] = False
    more = {"joint_attention_kwargs": {"attention_mask": mask}}
    truth = run(model, **more)
    assert (truth["output"] - predict(model)).abs().max() > 1e-3
    patch_diffusers(model)
    with pytest.warns(UserWarning, match="joint_attention_kwargs has attention_mask"):
        found = run(model, **more)
    assert not any(fused.values())
    assert_close(found, truth)
    run(model)
    assert fused == ONCE


def test_a_chosen_backend_is_announced_and_not_used(fused):
    model = build()
    patch_diffusers(model)
    model.set_attention_backend("native")
    with torch.no_grad(), pytest.warns(UserWarning, match="backend chosen is not used") as told:
        predict(model)
    assert len(told) == 1 and fused == ONCE


@pytest.mark.parametrize("quant_type", ["fp4"])
def test_other_4_bit_weights_are_not_fused(quant_type, fused):
    model = build(nf4="plain")
    block = model.single_transformer_blocks[0]
    linear = nn.Linear(128, 128)
    block.attn.to_q.weight = bnb.nn.Params4bit(
        linear.weight.data, quant_type=quant_type, module=block.attn.to_q
    ).to("cpu")
    with torch.no_grad():
        truth = predict(model)
        patch_diffusers(model)
        with pytest.warns(UserWarning, match="4-bit weights are not NF4"):
            assert_close({"output": predict(model)}, {"output": truth})
    assert fused["qk_norm_rope_attention"] == 2


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("call", [patch_diffusers, unpatch_diffusers])
def test_other_classes_are_refused(call):
    wrapped = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["to_q"]))
    for wrong in (nn.Linear(2, 2), wrapped):
        with pytest.raises(TypeError, match=f"FluxTransformer2DModel.*{type(wrong).__name__}"):
            call(wrong)


def test_other_blocks_are_refused():
    model = build()
    model.single_transformer_blocks[1].norm.norm.eps = 1e-5
    with pytest.raises(ValueError, match="other norms or another activation"):
        patch_diffusers(model)
    model = build()
    del model.transformer_blocks[0].ff_context
    with pytest.raises(ValueError, match="FluxTransformerBlock has other parts.*ff_context"):
        patch_diffusers(model)
    model = build()
    model.transformer_blocks[0].forward = lambda *_: None
    with pytest.raises(ValueError, match="forward of its own"):
        patch_diffusers(model)
    assert not any("_fluxfast" in vars(each) for each in model.modules())


def test_unpatch_refuses_under_a_hook():
    model = build()
    patch_diffusers(model)
    block = model.transformer_blocks[0]
    mine = block.forward
    block.forward = lambda *_: None
    with pytest.raises(ValueError, match="was replaced since"):
        unpatch_diffusers(model)
    block.forward = mine
    unpatch_diffusers(model)
