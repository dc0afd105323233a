"""The transformer against two other implementations: diffusers' and BFL's own.

fp32, random small configurations. The forward may differ by 1e-5 of the output's largest value,
LoRA gradients (against peft on the diffusers model) by 1e-4 of each tensor's.
"""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from fluxbfl.model import Flux as BflFlux
from fluxbfl.model import FluxParams
from peft import LoraConfig
from safetensors.torch import save_file

from fluxfast import load_transformer
from fluxfast.model.lora import inject_lora, lora_layers, select_targets, set_lora_strength
from fluxfast.model.names import diffusers_parts, part_rows, tensor_sources
from fluxfast.model.spec import rope_axes

# heads, head width, double, single, guidance, batch, image rows x columns, text tokens
CONFIGS = {
    "dev-like": (2, 32, 2, 2, True, 2, (4, 6), 7),
    "schnell-like": (3, 64, 1, 3, False, 3, (5, 3), 16),
    "full head width": (1, 128, 1, 1, True, 1, (2, 8), 1),
    "narrow": (4, 16, 2, 1, True, 2, (3, 3), 5),
}


def peer_model(heads, width, double, single, guidance, seed=0) -> FluxTransformer2DModel:
    """A diffusers transformer with every tensor random, norms and biases too."""
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=width,
        num_attention_heads=heads,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance,
        axes_dims_rope=rope_axes(width),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            random = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 2:
                tensor.copy_(random * tensor.shape[1] ** -0.5)
            else:
                tensor.copy_(random * 0.1 + ("norm_" in name and name.endswith("weight")))
    return model.eval()


def inputs(batch, rows, columns, text, guidance, seed=1) -> dict[str, torch.Tensor]:
    """BFL's arguments."""
    generator = torch.Generator().manual_seed(seed)
    img_ids = torch.zeros(rows, columns, 3)
    img_ids[..., 1] = torch.arange(rows)[:, None]
    img_ids[..., 2] = torch.arange(columns)[None, :]
    return dict(
        img=torch.randn(batch, rows * columns, 16, generator=generator),
        img_ids=img_ids.view(1, -1, 3).expand(batch, -1, -1),
        txt=torch.randn(batch, text, 24, generator=generator),
        txt_ids=torch.zeros(batch, text, 3),
        timesteps=torch.rand(batch, generator=generator),
        y=torch.randn(batch, 20, generator=generator),
        guidance=torch.linspace(1.0, 4.0, batch) if guidance else None,
    )


def peer_forward(model, x) -> torch.Tensor:
    return model(
        hidden_states=x["img"],
        encoder_hidden_states=x["txt"],
        pooled_projections=x["y"],
        timestep=x["timesteps"],
        img_ids=x["img_ids"][0],
        txt_ids=x["txt_ids"][0],
        guidance=x["guidance"],
        return_dict=False,
    )[0]


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()


@pytest.fixture(params=CONFIGS, scope="module")
def case(request, tmp_path_factory):
    heads, width, double, single, guidance, batch, (rows, columns), text = CONFIGS[request.param]
    peer = peer_model(heads, width, double, single, guidance)
    folder = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(folder)
    return peer, folder, inputs(batch, rows, columns, text, guidance)


def test_forward_is_diffusers(case):
    peer, folder, x = case
    ours = load_transformer(folder, "fp32", "fp32", "cpu")
    with torch.no_grad():
        assert relative(ours(**x), peer_forward(peer, x)) < 1e-5


def test_forward_is_bfl(case, tmp_path):
    """BFL's own module takes our tensors under our names, and the same file loads back into
    ours.
    """
    _, folder, x = case
    ours = load_transformer(folder, "fp32", "fp32", "cpu")
    spec = ours.spec
    params = asdict(spec) | {"out_channels": spec.in_channels, "qkv_bias": True}
    params |= {"axes_dim": list(params["axes_dim"])}
    del params["text_length"]
    bfl = BflFlux(FluxParams(**params))
    state = ours.state_dict()
    assert set(state) == set(tensor_sources(spec))
    bfl.load_state_dict(state, strict=True)
    file = tmp_path / "flux1.safetensors"
    save_file(bfl.state_dict(), file)
    again = load_transformer(file, "fp32", "fp32", "cpu")
    assert replace(again.spec, text_length=0) == replace(spec, text_length=0)
    with torch.no_grad():
        truth = bfl(**x)
        assert relative(ours(**x), truth) < 1e-5
        assert torch.equal(again(**x), ours(**x))


@pytest.mark.grid(4)
@pytest.mark.parametrize("targets", ["attn", "attn+mlp", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gradients_are_peft(case, targets, checkpointing, tmp_path):
    """Same A and B on both sides, alpha != rank; loss = mean square error to a fixed target."""
    _, folder, x = case
    peer = FluxTransformer2DModel.from_pretrained(folder)
    ours = load_transformer(folder, "fp32", "fp32", "cpu")
    rank, alpha = 3, 5.0
    parameters = inject_lora(ours, rank, alpha, targets, seed=7)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(ours).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
    names = [target.diffusers for target in select_targets(ours.spec, targets)]
    peer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names))
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            for part, b_rows, a_rows in parts_of(ours, name, layer):
                module = peer.get_submodule(part)
                module.lora_A["default"].weight.copy_(layer.lora_A[a_rows])
                module.lora_B["default"].weight.copy_(layer.lora_B[b_rows])
    ours.policies = ["checkpoint" if checkpointing else "keep"] * len(ours.policies)
    target = torch.randn(x["img"].shape, generator=generator)
    truth = peer_forward(peer, x)
    out = ours(**x)
    assert relative(out, truth) < 1e-5
    (out - target).square().mean().backward()
    (truth - target).square().mean().backward()
    compared = 0
    for name, layer in lora_layers(ours).items():
        for part, b_rows, a_rows in parts_of(ours, name, layer):
            module = peer.get_submodule(part)
            assert relative(layer.lora_A.grad[a_rows], module.lora_A["default"].weight.grad) < 1e-4
            assert relative(layer.lora_B.grad[b_rows], module.lora_B["default"].weight.grad) < 1e-4
            compared += 1
    assert compared == len(names)
    assert all(p.grad is not None and p.dtype == torch.float32 for p in parameters)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in parameters}
    set_lora_strength(ours, 0.0)
    with torch.no_grad():
        peer.disable_adapters()
        assert relative(ours(**x), peer_forward(peer, x)) < 1e-5


def parts_of(model, name, layer):
    parts = dict(zip(part_rows(name, model.spec), diffusers_parts(name), strict=True))
    for y_rows, b_rows, a_rows in layer.lora.slices():
        yield parts[(y_rows.start, y_rows.stop)], b_rows, a_rows


@pytest.mark.grid(5)
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_bf16_is_as_near_as_diffusers(case, storage):
    """bf16 against fp32 on the same stored weights: at most twice diffusers' own bf16 error."""
    peer, folder, x = case
    ours, exact = (load_transformer(folder, storage, dtype, "cpu") for dtype in ("bf16", "fp32"))
    peer16 = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    x16 = {
        key: value.bfloat16() if value is not None and value.is_floating_point() else value
        for key, value in x.items()
    }
    x16["img_ids"], x16["txt_ids"] = x["img_ids"], x["txt_ids"]
    rounded = {key: None if value is None else value.float() for key, value in x16.items()}
    with torch.no_grad():
        theirs = relative(peer_forward(peer16, x16).float(), peer_forward(peer, rounded))
        assert relative(ours(**x16).float(), exact(**rounded)) < 2 * theirs
