"""FLUX.1's transformer of diffusers, ai-toolkit or SimpleTuner on the fused ops, its modules and
parameters left in place.

`patch_diffusers` gives each double and single block a `forward` of its own, with the signature and
results of the class's. Gradient checkpointing, controlnet residuals, TREAD's routes and whatever
else calls blocks go on as before. Modulations, embedders and the last layer stay the model's own.
ai-toolkit trains diffusers' class. SimpleTuner has a class of the same name, whose blocks take
`attention_mask` (and newer `context_temb`), pass the joined stream through the single ones, and
make their results finite; a forward is read by its parameters' names.

q, k and v (in a single block q, k, v and proj_mlp) become one matmul: their frozen weights are
moved into one tensor, of which each layer's own `weight.data` (and bias, and NF4 statistics) is
then a view. No memory is doubled, and the state_dict keeps its keys and values. A weight that was
given other memory since (`.to`, an unmerged adapter) is recognized by its address and joined again.
Nested NF4 statistics are joined with one offset per nested block; where a layer's blocks are no
multiple of 256 they are un-nested for the joint matmul (4 more bytes per 64 weights there).

LoRA is that of peft or of modules in the place of a linear's `forward` (`diffusers_linears.py`),
read in each forward. A and B are stacked by differentiable `cat`s, padded with zeros to one rank.

Precision: matmuls, norms and attention run in the dtype that the block's linears compute in (the
activations', autocast's, or bitsandbytes' compute_dtype); q and k are rounded once after norm and
rotation, where diffusers rounds between. The residual stream keeps its dtype: where that is wider
(NF4 under CUDA autocast, which norms in fp32), gate and residual are added unfused.

A block runs as its class wrote it, announced once per reason, where it has what the ops do not
compute: base weights that train, joint_attention_kwargs, an attention mask, a modulation per token,
an attention processor that is not FLUX's plain one, fused projections, LoRA dropout in training,
strengths that differ within the batch, merged adapters, DoRA, LoKr and the other variants, LoRA
biases, linears of other kinds (quanto's, torchao's), hooks inside the block. A chosen attention
backend is announced too, and not used: the ops have their own.

Under `torch.compile` (fullgraph too) addresses are not looked at: give weights other memory before
compiling, not after.

Nothing of these packages is imported. Layouts read in diffusers 0.42, peft 0.21, bitsandbytes 0.50,
LyCORIS 4.1, and ai-toolkit, SimpleTuner and kohya's sd-scripts of 2026.
"""

import inspect
import types
import warnings
import weakref
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxfast_kernels.blocks import Linear, flux_double_block, flux_single_block
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.integrations.diffusers_linears import (
    Declined,
    Foreign,
    JoinedWeight,
    base_of,
    decline_if,
    frozen_base,
    hooked,
    is_4bit,
    read_loras,
    stack_loras,
)
from fluxfast_kernels.ops.norm_modulate import EPS
from fluxfast_kernels.ops.qk_norm_rope import EPSILON


class _Shared:
    """What the blocks of one transformer have in common."""

    def __init__(self):
        self.announced: set[str] = set()
        self._rope = None

    def announce(self, text: str) -> None:
        if text not in self.announced:
            self.announced.add(text)
            warnings.warn(f"patch_diffusers: {text}", stacklevel=4)

    def rope(self, tables: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """[1 or B, T, 1, C/2] of cos and sin [T, C] or, routed, [B, T, C], which hold every value
        twice. Computed once for all blocks of a forward."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self._rope is not None:
            refs, rope = self._rope
            same = all(ref() is x for ref, x in zip(refs, tables, strict=True))
            if same and rope[0].device == device:
                return rope
        batched = [x[None] if x.ndim == 2 else x for x in tables]
        cos, sin = (x.to(device, torch.float32)[:, :, None, ::2].contiguous() for x in batched)
        if not compiling:
            self._rope = tuple(map(weakref.ref, tables)), (cos, sin)
        return cos, sin

    def __deepcopy__(self, memo):
        return type(self)()


# ---------------------------------------------------------------- a block's forward


class _Run(NamedTuple):
    """One block's forward: what the linears compute with, and the dtypes."""

    linears: dict[str, Linear]
    scales: list[Tensor]  # of the norms of q and k
    rope: tuple[Tensor, Tensor]
    dtype: torch.dtype  # computed in
    stream: torch.dtype  # the residual stream's, afterwards

    def modulation(self, norm: Foreign, temb: Tensor, h: Tensor) -> Tensor:
        """shift, scale, gate (twice in a double block), [B, 1, 3·D or 6·D]."""
        out = norm.linear(norm.silu(temb)).to(self.dtype)[:, None]
        return out.expand(h.shape[0], -1, -1)


def _forward(self, *args, **kwargs):
    """A patched block's forward, with its class's signature."""
    patch = self._fluxfast
    call = dict(zip(patch.names, args, strict=False)) | kwargs
    run = patch.prepare(self, call)
    if run is None:
        return type(self).forward(self, *args, **kwargs)
    return patch.kind.forward(self, run, call, patch.end)


def _double_forward(block: Foreign, run: _Run, call: dict[str, Any], end: Callable):
    img, txt, temb = (call[x] for x in ("hidden_states", "encoder_hidden_states", "temb"))
    txt_temb = call.get("context_temb")
    img_mod = run.modulation(block.norm1, temb, img)
    txt_mod = run.modulation(block.norm1_context, temb if txt_temb is None else txt_temb, txt)
    streams = img.to(run.stream), txt.to(run.stream)
    img, txt = flux_double_block(*streams, img_mod, txt_mod, run.rope, run.linears, run.scales)
    return end(txt), img


def _single_forward(block: Foreign, run: _Run, call: dict[str, Any], end: Callable):
    x, txt = call["hidden_states"], call.get("encoder_hidden_states")
    x = x if txt is None else torch.cat([txt, x], dim=1)
    mod = run.modulation(block.norm, call["temb"], x)
    x = end(flux_single_block(x.to(run.stream), mod, run.rope, run.linears, run.scales))
    return x if txt is None else (x[:, : txt.shape[1]], x[:, txt.shape[1] :])


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _finite(x: Tensor) -> Tensor:
    return _clipped(torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504))


# how a block's results end, by the parameter in which its forward takes what is passed to attention
ENDS = {"joint_attention_kwargs": _clipped, "attention_mask": _finite}
PROCESSORS = ("FluxAttnProcessor", "FluxAttnProcessor2_0", "FluxSingleAttnProcessor2_0")
USED = {"hidden_states", "encoder_hidden_states", "temb", "context_temb", "image_rotary_emb"}


# ---------------------------------------------------------------- what a block is made of


class _Kind(NamedTuple):
    """Paths of a block's modules. layers: the linears that one matmul computes, in order."""

    forward: Callable
    layers: dict[str, tuple[str, ...]]
    layer_norms: tuple[str, ...]
    head_norms: tuple[str, ...]  # q and k of each stream, text first
    activations: tuple[str, ...]
    dropouts: tuple[str, ...]
    around: tuple[str, ...]  # the other modules whose own forward is not called


KINDS = {
    "FluxTransformerBlock": _Kind(
        forward=_double_forward,
        layers={
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "txt_attn.proj": ("attn.to_add_out",),
            "img_attn.proj": ("attn.to_out.0",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "img_mlp.0": ("ff.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "img_mlp.2": ("ff.net.2",),
        },
        layer_norms=("norm1.norm", "norm1_context.norm", "norm2", "norm2_context"),
        head_norms=("attn.norm_added_q", "attn.norm_added_k", "attn.norm_q", "attn.norm_k"),
        activations=("ff.net.0", "ff_context.net.0"),
        dropouts=("attn.to_out.1", "ff.net.1", "ff_context.net.1"),
        around=("norm1", "norm1_context", "attn", "ff", "ff_context"),
    ),
    "FluxSingleTransformerBlock": _Kind(
        forward=_single_forward,
        layers={
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
        },
        layer_norms=("norm.norm",),
        head_norms=("attn.norm_q", "attn.norm_k"),
        activations=("act_mlp",),
        dropouts=(),
        around=("norm", "attn"),
    ),
}


def _at(block: Foreign, paths: tuple[str, ...]) -> list[Foreign]:
    try:
        return [attrgetter(path)(block) for path in paths]
    except AttributeError as missing:
        raise Declined(f"a part is missing: {missing}") from None


class _Patch:
    """A patched block's state, in `block._fluxfast`."""

    def __init__(self, block: Foreign, shared: _Shared):
        self.kind, self.names, self.shared = KINDS[type(block).__name__], _parameters(block), shared
        self.end = next(end for name, end in ENDS.items() if name in self.names)
        self.joined = {layer: JoinedWeight() for layer in self.kind.layers}

    def prepare(self, block: Foreign, call: dict[str, Any]) -> _Run | None:
        """None where the block has to run as its class wrote it."""
        try:
            return self._run(block, call)
        except Declined as reason:
            self.shared.announce(f"blocks run as they were written where {reason}")
            for joined in self.joined.values():
                joined.forget()
            return None

    def _run(self, block: Foreign, call: dict[str, Any]) -> _Run:
        self._check_call(call)
        self._check_around(block)
        h, rope, scales = call["hidden_states"], call["image_rotary_emb"], self._scales(block)
        on = torch.is_autocast_enabled(h.device.type)
        autocast = torch.get_autocast_dtype(h.device.type) if on else None
        # LayerNorm is on CUDA autocast's list of fp32 operations, not on the CPU's
        fp32_norm = on and h.device.type == "cuda"
        normed = torch.float32 if fp32_norm else torch.promote_types(h.dtype, autocast or h.dtype)
        linears, dtypes, stream = {}, set(), h.dtype
        for name, paths in self.kind.layers.items():
            modules = _at(block, paths)
            bases = [frozen_base(module) for module in modules]
            for base in bases:
                if is_4bit(base):  # computes in its own dtype, and answers in its input's
                    dtypes.add(base.compute_dtype or normed)
                    stream = torch.promote_types(stream, normed)
                else:
                    dtypes.add(autocast or base.weight.dtype)
                    stream = torch.promote_types(stream, autocast or base.weight.dtype)
            update = stack_loras([read_loras(x) for x in modules], [x.out_features for x in bases])
            linears[name] = (self.joined[name].weight(bases), update)
        decline_if(len(dtypes) > 1, "linears compute in several dtypes")
        dtype = dtypes.pop()
        decline_if(dtype not in DTYPES, f"linears compute in {dtype}")
        decline_if(not on and stream != h.dtype, f"weights of another dtype are given {h.dtype}")
        return _Run(linears, scales, self.shared.rope(rope, h.device), dtype, stream)

    def _check_call(self, call: dict[str, Any]) -> None:
        """Declines arguments that the ops have no place for."""
        for name in call.keys() - USED:
            value = call[name]
            if isinstance(value, dict):
                decline_if(value, f"{name} has {', '.join(value)}")
            else:
                decline_if(value is not None, f"{name} is given")
        tembs = [call[x] for x in ("temb", "context_temb") if call.get(x) is not None]
        decline_if(any(temb.ndim != 2 for temb in tembs), "temb is not one vector a sample")
        rope = call.get("image_rotary_emb")
        plain = isinstance(rope, tuple) and len(rope) == 2 and all(x.ndim in (2, 3) for x in rope)
        decline_if(not plain, "image_rotary_emb is not cos and sin, [T, C] each")

    def _check_around(self, block: Foreign) -> None:
        """Declines what the ops do not compute around the linears."""
        kind, attn = self.kind, block.attn
        decline_if(getattr(attn, "fused_projections", False), "their projections are fused")
        processor = type(attn.processor).__name__
        decline_if(processor not in PROCESSORS, f"the attention processor is {processor}")
        parallel = getattr(attn.processor, "_parallel_config", None) is not None
        decline_if(parallel, "attention runs on several devices")
        if getattr(attn.processor, "_attention_backend", None) is not None:
            self.shared.announce("the attention backend chosen is not used: the fused ops choose")
        groups = (kind.around, kind.layer_norms, kind.head_norms, kind.activations, kind.dropouts)
        decline_if(any(map(hooked, _at(block, sum(groups, ())))), "a module inside has hooks")
        drops = any(dropout.training and dropout.p > 0 for dropout in _at(block, kind.dropouts))
        decline_if(drops, "there is dropout in training")

    def _scales(self, block: Foreign) -> list[Tensor]:
        """The weights of q's and k's norms."""
        norms = [norm.weight for norm in _at(block, self.kind.head_norms)]
        trains = torch.is_grad_enabled() and any(norm.requires_grad for norm in norms)
        decline_if(trains, "the norms of q and k require gradients")
        return norms

    def join(self, block: Foreign) -> None:
        """Join the weights ahead of the first forward, where they can be: a forward that cannot
        tries again, and says why."""
        for layer, joined in self.joined.items():
            try:
                with torch.no_grad():
                    joined.weight([frozen_base(x) for x in _at(block, self.kind.layers[layer])])
            except Declined:
                pass

    def separate(self, block: Foreign) -> None:
        """Give the linears memory of their own."""
        for layer, joined in self.joined.items():
            joined.separate([base_of(x) for x in _at(block, self.kind.layers[layer])])


# ---------------------------------------------------------------- patch and unpatch


def _blocks(transformer: Foreign) -> list[Foreign]:
    kinds = [kind.__name__ for kind in type(transformer).__mro__]
    if not any(kind.startswith("FluxTransformer2DModel") for kind in kinds):
        raise TypeError(
            f"transformer must be a FluxTransformer2DModel, not a wrapper of it, got {kinds[0]}"
        )
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def _parameters(block: Foreign) -> list[str]:
    return list(inspect.signature(type(block).forward).parameters)[1:]


def _check_block(block: Foreign) -> None:
    """Raise ValueError unless it is a block whose forward this file knows."""
    name = type(block).__name__
    if name not in KINDS:
        raise ValueError(f"the block {name} is not one of {', '.join(KINDS)}")
    if "forward" in block.__dict__:
        raise ValueError(
            f"this {name} has a forward of its own (a hook: offloading or caching)\n"
            "hint: call patch_diffusers before that is set up"
        )
    parameters = _parameters(block)
    needed = {"hidden_states", "temb", "image_rotary_emb"} <= set(parameters)
    if not needed or len(ENDS.keys() & set(parameters)) != 1:
        raise ValueError(f"{name}.forward takes {parameters}: neither diffusers' nor SimpleTuner's")
    kind = KINDS[name]
    try:
        _at(block, (*sum(kind.layers.values(), ()), *kind.around, *kind.dropouts))
        layer_norms, head_norms = _at(block, kind.layer_norms), _at(block, kind.head_norms)
        activations = _at(block, kind.activations)
    except Declined as missing:
        raise ValueError(f"{name} has other parts than in the diffusers known: {missing}") from None
    as_known = all(norm.eps == EPS and norm.weight is None for norm in layer_norms)
    as_known &= all(norm.eps == EPSILON and norm.weight is not None for norm in head_norms)
    as_known &= all(activation.approximate == "tanh" for activation in activations)
    if not as_known:
        raise ValueError(f"{name} has other norms or another activation than FLUX.1's")


def patch_diffusers(transformer: nn.Module) -> None:
    """Run the blocks of a `FluxTransformer2DModel` of diffusers, ai-toolkit or SimpleTuner on the
    fused ops, until `unpatch_diffusers`.

    With or without LoRA of peft, ai-toolkit, LyCORIS or kohya, which may be added, trained,
    switched and removed afterwards; linears in fp32, bf16, fp16 or bitsandbytes NF4. Patching twice
    does nothing. Raises TypeError for another class and ValueError for blocks that are not as
    known; see the file's head for what makes a block run unfused later.
    """
    blocks = [block for block in _blocks(transformer) if "_fluxfast" not in block.__dict__]
    for block in blocks:
        _check_block(block)
    shared = _Shared()
    for block in blocks:
        block._fluxfast = _Patch(block, shared)
        block.forward = types.MethodType(_forward, block)
        block._fluxfast.join(block)


def unpatch_diffusers(transformer: nn.Module) -> None:
    """Give the blocks diffusers' forward back, and their linears memory of their own.

    Nothing happens to a block that is not patched. Raises TypeError for another class, ValueError
    where something has since replaced a block's forward.
    """
    blocks = [block for block in _blocks(transformer) if "_fluxfast" in block.__dict__]
    for block in blocks:
        if getattr(block.__dict__.get("forward"), "__func__", None) is not _forward:
            raise ValueError(
                f"the forward of a patched {type(block).__name__} was replaced since\n"
                "hint: take hooks (offloading, caching) off first"
            )
    for block in blocks:
        block._fluxfast.separate(block)
        del block._fluxfast, block.forward
