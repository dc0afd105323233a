"""Those who take the step: diffusers + peft + bitsandbytes, and fluxfast, over the same weights.

Weights are a pure function of (seed, Black Forest Labs' parameter name), drawn on the device one
tensor at a time: every candidate holds the same FLUX, though none shares memory with another, and
a full-size one is quantized layer by layer. diffusers and its libraries are imported when a peer
is built, not before.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluxfast.model.names import (
    SWAPPED,
    diffusers_parts,
    linear_shape,
    part_rows,
    tensor_sources,
)
from fluxfast.model.spec import FluxSpec

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


@dataclass
class Batch:
    """One step's inputs under BFL's names, and the velocity to predict.

    img, target [B, T, 64]; txt [B, L, 4096]; img_ids [B, T, 3]; txt_ids [B, L, 3]; y [B, 768];
    timesteps, guidance [B]. img, txt and y are in the compute dtype, the rest is fp32.
    """

    img: Tensor
    img_ids: Tensor
    txt: Tensor
    txt_ids: Tensor
    timesteps: Tensor
    y: Tensor
    guidance: Tensor
    target: Tensor


@dataclass
class Adapter:
    """One of a LoRA's two matrices: some rows of a trained parameter."""

    parameter: nn.Parameter
    rows: slice

    def fill(self, values: Tensor) -> None:
        with torch.no_grad():
            self.parameter[self.rows].copy_(values)

    @property
    def grad(self) -> Tensor:
        return self.parameter.grad[self.rows]


@dataclass
class Candidate:
    """Something that takes a training step.

    predict: Batch -> velocity [B, T, 64]. adapters: diffusers module name -> its A [r, K] and B
    [N, r]. model: whose parameters and buffers do not count as saved activations.
    """

    model: nn.Module
    predict: Callable[[Batch], Tensor]
    adapters: dict[str, tuple[Adapter, Adapter]]

    def parameters(self) -> list[nn.Parameter]:
        both = [a.parameter for pair in self.adapters.values() for a in pair]
        return list({id(p): p for p in both}.values())


@dataclass
class BaseWeights:
    """Random base weights by BFL name; every value is exact in bf16, as a checkpoint's would be."""

    spec: FluxSpec
    seed: int
    device: str

    def __call__(self, name: str) -> Tensor:
        """-> fp32. Matrices keep their input's variance, biases are small, scales near one."""
        module, _, kind = name.rpartition(".")
        if kind == "scale":
            values = 1 + 0.1 * normal(self.seed, name, (self.spec.head_dim,), self.device)
        elif kind == "bias":
            shape = linear_shape(module, self.spec)[:1]
            values = 0.02 * normal(self.seed, name, shape, self.device)
        else:
            shape = linear_shape(module, self.spec)
            values = normal(self.seed, name, shape, self.device).mul_(shape[1] ** -0.5)
        return values.to(torch.bfloat16).float()


def normal(seed: int, name: str, shape: tuple[int, ...], device: str) -> Tensor:
    """fp32 standard normal, a function of seed and name (on one kind of device)."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(shape, generator=generator, device=device)


def build_diffusers(
    weights: BaseWeights,
    storage: str,
    compute: torch.dtype,
    rank: int,
    targets: str = "attn+mlp",
    checkpointing: bool = False,
    compiled: bool = False,
) -> Candidate:
    """diffusers' FLUX with peft's LoRA in fp32 over frozen weights. targets: of LORA_TARGETS.

    storage: "nf4" puts the blocks' linear layers in bitsandbytes' NF4 (fp32 absmax, one per 64
    weights) and the rest in `compute`; "dense" puts all in `compute`. bf16 runs under autocast, as
    the diffusers training scripts do. Raises ImportError, naming the library, where one is
    missing.
    """
    import diffusers
    import peft

    if storage == "nf4":
        import bitsandbytes  # noqa: F401  (named here if it is missing, before any weight is made)
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
        for part, value in zip(parts, values.split(rows), strict=True):
            _fill(model, part, value, compute, nf4=inside and kind == "weight" and storage == "nf4")
    model.requires_grad_(False)
    model.is_loaded_in_4bit = storage == "nf4"  # what peft asks to pick its Linear4bit
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
    if checkpointing:
        model.enable_gradient_checkpointing()
    if compiled:
        model.compile_repeated_blocks()
    device_type = torch.device(weights.device).type

    def predict(batch: Batch) -> Tensor:
        with torch.autocast(device_type, torch.bfloat16, enabled=compute == torch.bfloat16):
            return model(
                hidden_states=batch.img,
                encoder_hidden_states=batch.txt,
                pooled_projections=batch.y,
                timestep=batch.timesteps,
                img_ids=batch.img_ids[0],
                txt_ids=batch.txt_ids[0],
                guidance=batch.guidance if spec.guidance_embed else None,
                return_dict=False,
            )[0]

    return Candidate(model, predict, adapters)


def _fill(model: nn.Module, name: str, value: Tensor, compute: torch.dtype, nf4: bool) -> None:
    """Give a meta-device model one tensor, swapping in a bitsandbytes Linear4bit where asked."""
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
    weights: BaseWeights,
    storage: str,
    compute: torch.dtype,
    rank: int,
    targets: str = "attn+mlp",
    products: str = "",
) -> Candidate:
    """fluxfast's FLUX. storage: "nf4", "dense" (all in `compute`), or another that `Flux` knows;
    products: "int8" or "fp8" where the blocks multiply so."""
    from fluxfast.model.flux import Flux
    from fluxfast.model.init import fill
    from fluxfast.model.lora import inject_lora, lora_layers
    from fluxfast.model.precision import layer_precisions

    model = Flux(weights.spec, compute)
    dense = "bf16" if compute == torch.bfloat16 else "fp32"
    kept = dense if storage == "dense" else storage
    fill(
        model,
        weights,
        layer_precisions(weights.spec, kept, products or dense),
        device=weights.device,
    )
    inject_lora(model, rank=rank, alpha=rank, targets=targets)
    model.to(weights.device).train()
    adapters = {}
    for bfl, layer in lora_layers(model).items():
        for part, (_, b_rows, a_rows) in zip(
            diffusers_parts(bfl), layer.lora.slices(), strict=True
        ):
            adapters[part] = Adapter(layer.lora_A, a_rows), Adapter(layer.lora_B, b_rows)

    def predict(batch: Batch) -> Tensor:
        return model(
            batch.img,
            batch.img_ids,
            batch.txt,
            batch.txt_ids,
            batch.timesteps,
            batch.y,
            batch.guidance if weights.spec.guidance_embed else None,
        )

    return Candidate(model, predict, adapters)
