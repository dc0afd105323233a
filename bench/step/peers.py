"""The models that take the step: diffusers + peft + bitsandbytes, and fluxfast, over the same
weights and inputs.

Weights are a pure function of (seed, Black Forest Labs' parameter name), generated on the device
one tensor at a time: every candidate has the same FLUX without sharing memory, and a full-size one
is quantized layer by layer. diffusers and its libraries are imported when such a model is built.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.step.settings import SEED, SETTINGS, Kind, Settings, image_tokens
from fluxfast.model.names import (
    SWAPPED,
    diffusers_parts,
    linear_shape,
    part_rows,
    tensor_sources,
)
from fluxfast.model.spec import FluxSpec
from fluxfast.objective import Inputs, image_ids, text_ids

LORA_MODULES = (  # attention and MLP of both block kinds; no modulation, nothing outside the blocks
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
    r"|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
)
LORA_TARGETS = {  # fluxfast's presets as peft's patterns
    "attn+mlp": LORA_MODULES,
    "all": LORA_MODULES
    + r"|transformer_blocks\.\d+\.norm1(_context)?\.linear"
    + r"|single_transformer_blocks\.\d+\.norm\.linear",
}


class Adapter(NamedTuple):
    """One of a LoRA's two matrices: some rows of a trained parameter."""

    parameter: nn.Parameter
    rows: slice


class Candidate(NamedTuple):
    """A model with a LoRA, ready to train.

    predict: inputs -> velocity [B, T, 64]. adapters: diffusers module name -> its A [r, K] and B
    [N, r].
    """

    model: nn.Module
    predict: Callable[[Inputs], Tensor]
    adapters: dict[str, tuple[Adapter, Adapter]]

    def parameters(self) -> list[nn.Parameter]:
        both = [adapter.parameter for pair in self.adapters.values() for adapter in pair]
        return list({id(p): p for p in both}.values())

    def loss(self, inputs: Inputs) -> Tensor:
        return F.mse_loss(self.predict(inputs).float(), inputs.target)

    def reset_adapters(self) -> None:
        """Gives the LoRA the values that all candidates share; none is zero, so no gradient is."""
        for module, (a, b) in self.adapters.items():
            for side, adapter, std in (("A", a, a.parameter.shape[1] ** -0.5), ("B", b, 0.02)):
                values = adapter.parameter.detach()[adapter.rows]
                values.copy_(std * normal(f"{module}.{side}", values.shape, values.device))


def normal(name: str, shape: tuple[int, ...], device: str) -> Tensor:
    """fp32 standard normal, a function of SEED and the name (on one kind of device)."""
    digest = hashlib.blake2b(f"{SEED}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(shape, generator=generator, device=device)


class BaseWeights(NamedTuple):
    """Random base weights by BFL name; every value is exact in bf16, as a checkpoint's would be."""

    spec: FluxSpec
    device: str
    normal: Callable[[str, tuple[int, ...], str], Tensor] = normal

    def __call__(self, name: str) -> Tensor:
        """Returns fp32. Matrices keep their input's variance, biases are small, scales near 1."""
        module, _, kind = name.rpartition(".")
        if kind == "scale":
            values = 1 + 0.1 * self.normal(name, (self.spec.head_dim,), self.device)
        elif kind == "bias":
            values = 0.02 * self.normal(name, linear_shape(module, self.spec)[:1], self.device)
        else:
            N, K = linear_shape(module, self.spec)
            values = self.normal(name, (N, K), self.device).mul_(K**-0.5)
        return values.to(torch.bfloat16).float()


def make_inputs(settings: Settings, pixels: int, batch: int) -> Inputs:
    """Random latents and prompts in the compute dtype; x_t = (1 - t) latent + t noise, whose
    velocity is the target.

    Times are powers of two and the guidance is 1, exact in bf16: diffusers rounds 1000·t to the
    compute dtype, fluxfast does not, and the gate must not see that.
    """
    spec, device, compute = settings.spec, settings.device, settings.compute
    T, L, side = image_tokens(pixels), settings.text_tokens, pixels // 8
    latent, noise = (normal(name, (batch, T, 64), device) for name in ("latent", "noise"))
    t = 0.5 ** torch.arange(1, batch + 1, device=device)
    mixed = (1 - t[:, None, None]) * latent + t[:, None, None] * noise
    return Inputs(
        noisy=mixed.to(compute),
        target=noise - latent,
        timesteps=t,
        weight=torch.ones_like(t),
        mask=None,
        img_ids=image_ids(side, side, device).expand(batch, T, 3),
        txt_ids=text_ids(L, device).expand(batch, L, 3),
        t5=normal("txt", (batch, L, spec.context_in_dim), device).to(compute),
        pooled=normal("y", (batch, spec.vec_in_dim), device).to(compute),
        modulation=None,
    )


def build_model(kind: Kind, settings: Settings) -> Candidate:
    """Raises ImportError for a missing library before any weight is made."""
    if SETTINGS[settings.setting].optimizer == "adamw8bit":
        import bitsandbytes  # noqa: F401
    build = build_diffusers if kind.library == "diffusers" else build_fluxfast
    weights = BaseWeights(settings.spec, settings.device)
    return build(weights, kind, settings.compute, settings.rank, settings.targets)


def build_diffusers(
    weights: BaseWeights, kind: Kind, compute: torch.dtype, rank: int, targets: str
) -> Candidate:
    """diffusers' FLUX with peft's LoRA in fp32 over frozen weights. targets: of LORA_TARGETS.

    bf16 runs under autocast, as in the diffusers training scripts. Raises ImportError, naming the
    library, where one is missing.
    """
    import diffusers  # noqa: F401  (what is missing is named before any weight is made)
    import peft

    if kind.storage == "nf4":
        import bitsandbytes  # noqa: F401
    model = _diffusers_model(weights, kind.storage, compute)
    pattern = LORA_TARGETS[targets]
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern))
    adapters = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            pair = module.lora_A["default"].weight, module.lora_B["default"].weight
            for parameter in pair:
                parameter.data = parameter.data.float()
            adapters[name] = tuple(Adapter(p, slice(None)) for p in pair)
    model.train()
    if kind.checkpointing:
        model.enable_gradient_checkpointing()
    if kind.compiled:
        model.compile_repeated_blocks()
    device_type = torch.device(weights.device).type

    def predict(inputs: Inputs) -> Tensor:
        guidance = torch.ones_like(inputs.timesteps) if weights.spec.guidance_embed else None
        with torch.autocast(device_type, torch.bfloat16, enabled=compute == torch.bfloat16):
            return model(
                hidden_states=inputs.noisy,
                encoder_hidden_states=inputs.t5,
                pooled_projections=inputs.pooled,
                timestep=inputs.timesteps,
                img_ids=inputs.img_ids[0],
                txt_ids=inputs.txt_ids[0],
                guidance=guidance,
                return_dict=False,
            )[0]

    return Candidate(model, predict, adapters)


def _diffusers_model(weights: BaseWeights, storage: str, compute: torch.dtype) -> nn.Module:
    """storage: "nf4" puts the blocks' linears in bitsandbytes' NF4 (fp32 absmax, one per 64
    weights) and the rest in `compute`; "dense" puts all in `compute`."""
    import diffusers

    spec = weights.spec
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(
            in_channels=spec.in_channels,
            num_layers=spec.depth,
            num_single_layers=spec.depth_single_blocks,
            attention_head_dim=spec.head_dim,
            num_attention_heads=spec.num_heads,
            joint_attention_dim=spec.context_in_dim,
            pooled_projection_dim=spec.vec_in_dim,
            guidance_embeds=spec.guidance_embed,
            axes_dims_rope=spec.axes_dim,
        )
    for name, parts in tensor_sources(spec).items():
        module, _, kind = name.rpartition(".")
        values = weights(name)
        if module == SWAPPED:
            values = values.roll(spec.hidden_size, 0)
        inside = "_blocks." in name and kind != "scale"
        rows = [end - start for start, end in part_rows(module, spec)] if inside else [len(values)]
        nf4 = inside and kind == "weight" and storage == "nf4"
        for part, value in zip(parts, values.split(rows), strict=True):
            _fill(model, part, value, compute, nf4)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = storage == "nf4"  # peft reads it to pick its Linear4bit
    return model


def _fill(model: nn.Module, name: str, value: Tensor, compute: torch.dtype, nf4: bool) -> None:
    """Gives a meta-device model one tensor; nf4 replaces the layer by a bitsandbytes Linear4bit."""
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    if nf4:
        import bitsandbytes as bnb

        N, K = value.shape
        module = bnb.nn.Linear4bit(K, N, compute_dtype=compute, device="meta")
        parameter = bnb.nn.Params4bit(
            value.contiguous(), quant_type="nf4", compress_statistics=False, module=module
        ).to(value.device)  # quantizes, on the CPU too
        model.set_submodule(path, module)
    else:
        parameter = nn.Parameter(value.to(compute, copy=True), requires_grad=False)
    setattr(module, kind, parameter)


def build_fluxfast(
    weights: BaseWeights, kind: Kind, compute: torch.dtype, rank: int, targets: str
) -> Candidate:
    """fluxfast's FLUX with its LoRA in fp32 over frozen weights."""
    from fluxfast.model.flux import Flux
    from fluxfast.model.init import fill
    from fluxfast.model.lora import inject_lora, lora_layers
    from fluxfast.model.precision import layer_precisions

    model = Flux(weights.spec, compute)
    dense = "bf16" if compute == torch.bfloat16 else "fp32"
    storage = dense if kind.storage == "dense" else kind.storage
    precisions = layer_precisions(weights.spec, storage, kind.matmul or dense)
    fill(model, weights, precisions, device=weights.device)
    inject_lora(model, rank=rank, alpha=rank, targets=targets)
    model.to(weights.device).train()
    adapters = {}
    for name, layer in lora_layers(model).items():
        parts = zip(diffusers_parts(name), layer.lora.slices(), strict=True)
        for part, (_, b_rows, a_rows) in parts:
            adapters[part] = Adapter(layer.lora_A, a_rows), Adapter(layer.lora_B, b_rows)

    def predict(inputs: Inputs) -> Tensor:
        text = inputs.t5, inputs.txt_ids, inputs.timesteps, inputs.pooled
        guidance = torch.ones_like(inputs.timesteps) if weights.spec.guidance_embed else None
        return model(inputs.noisy, inputs.img_ids, *text, guidance)

    return Candidate(model, predict, adapters)
