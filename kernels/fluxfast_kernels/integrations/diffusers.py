"""diffusers' `FluxTransformer2DModel` on the fused ops, its modules and parameters left in place.

`patch_diffusers` gives each double and single block a `forward` of its own, with the signature and
results of the class's. Gradient checkpointing, controlnet residuals and whatever else calls blocks
go on as before. Modulations, embedders and the last layer stay diffusers' own.

q, k and v (in a single block q, k, v and proj_mlp) become one matmul: their frozen weights are
moved into one tensor, of which each layer's own `weight.data` (and bias, and NF4 statistics) is
then a view. No memory is doubled, and the state_dict keeps its keys and values. A weight that was
given other memory since (`.to`, an unmerged adapter) is recognized by its address and joined again.
Nested NF4 statistics are joined with one offset per nested block; where a layer's blocks are no
multiple of 256 they are un-nested for the joint matmul (4 more bytes per 64 weights there).

LoRA is peft's: state, scaling and rank of every layer are read in each forward, and A and B are
stacked by differentiable `cat`s; ranks that differ are padded with zeros.

Precision: matmuls, norms and attention run in the dtype that the block's linears compute in (the
activations', autocast's, or bitsandbytes' compute_dtype); q and k are rounded once after norm and
rotation, where diffusers rounds between. The residual stream keeps diffusers' dtype: where that is
wider (NF4 under CUDA autocast, which norms in fp32), gate and residual are added unfused.

A block runs as diffusers wrote it, announced once per reason, where it has what the ops do not
compute: base weights that train, joint_attention_kwargs, an attention processor that is not FLUX's
plain one, fused projections, LoRA dropout in training, several active adapters, merged adapters,
DoRA and the other variants, LoRA biases, linears of other kinds, hooks inside the block. A chosen
attention backend is announced too, and not used: the ops have their own.

Under `torch.compile` (fullgraph too) addresses are not looked at: give weights other memory before
compiling, not after.

Nothing of diffusers, peft or bitsandbytes is imported. Layouts read in diffusers 0.42, peft 0.21
and bitsandbytes 0.50.
"""

import inspect
import types
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.gemm.epilogue import LoRAUpdate
from fluxfast_kernels.integrations.diffusers_linears import (
    Declined,
    Foreign,
    JoinedWeight,
    base_of,
    decline_if,
    frozen_base,
    hooked,
    is_4bit,
    read_lora,
    stack_loras,
)
from fluxfast_kernels.ops.gate_residual import gate_residual
from fluxfast_kernels.ops.gelu import gelu_lora_linear
from fluxfast_kernels.ops.lora_linear import lora_linear
from fluxfast_kernels.ops.norm_modulate import EPS, norm_modulate_lora_linear
from fluxfast_kernels.ops.qk_norm_rope import EPSILON, qk_norm_rope_attention
from fluxfast_kernels.quant.frozen import FrozenWeight


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
        """[1, T, 1, C/2] of diffusers' cos and sin [T, C], which hold every value twice. Computed
        once for all blocks of a forward."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self._rope is not None:
            refs, rope = self._rope
            same = all(ref() is x for ref, x in zip(refs, tables, strict=True))
            if same and rope[0].device == device:
                return rope
        cos, sin = (x.to(device, torch.float32)[None, :, None, ::2].contiguous() for x in tables)
        if not compiling:
            self._rope = tuple(map(weakref.ref, tables)), (cos, sin)
        return cos, sin

    def __deepcopy__(self, memo):
        return type(self)()


# ---------------------------------------------------------------- a block's forward


class _Run(NamedTuple):
    """One block's forward: the linears' arguments, and the dtypes."""

    layers: dict[str, tuple[FrozenWeight, LoRAUpdate | None]]
    head_norms: list[Tensor]
    heads: int
    rope: tuple[Tensor, Tensor]
    dtype: torch.dtype  # computed in
    stream: torch.dtype  # the residual stream's, afterwards

    def modulation(self, norm: Foreign, temb: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """shift, scale, gate (twice in a double block), [B, 1, D] each."""
        out = norm.linear(norm.silu(temb)).to(self.dtype)[:, None]
        return out.expand(h.shape[0], -1, -1).split(h.shape[2], dim=-1)

    def norm_linear(
        self, h: Tensor, shift: Tensor, scale: Tensor, layer: str, split: int = 0
    ) -> Any:
        weight, update = self.layers[layer]
        return norm_modulate_lora_linear(h.to(self.dtype), shift, scale, weight, update, split)

    def attention(self, qkv: list[Tensor]) -> Tensor:
        return qk_norm_rope_attention(qkv, self.head_norms, *self.rope, self.heads)

    def add(self, h: Tensor, gate: Tensor, op: Callable, x: Tensor, layer: str, **more) -> Tensor:
        """h + gate · (the layer of x)."""
        call = partial(op, x, *self.layers[layer], **more)
        if not h.dtype == self.dtype == self.stream:
            return torch.addcmul(h.to(self.stream), gate.to(self.stream), call().to(self.stream))
        if gate.requires_grad and torch.is_grad_enabled():
            return gate_residual(h, gate, call())
        return call(gate=gate, residual=h)


def _forward(
    self,
    hidden_states,
    encoder_hidden_states,
    temb,
    image_rotary_emb=None,
    joint_attention_kwargs=None,
):
    """A patched block's forward, with diffusers' signature."""
    run = self._fluxfast.prepare(self, hidden_states, image_rotary_emb, joint_attention_kwargs)
    if run is None:
        inputs = (hidden_states, encoder_hidden_states, temb, image_rotary_emb)
        return type(self).forward(self, *inputs, joint_attention_kwargs)
    return self._fluxfast.kind.forward(self, run, hidden_states, encoder_hidden_states, temb)


def _double_forward(block: Foreign, run: _Run, img: Tensor, txt: Tensor, temb: Tensor):
    img_mod = run.modulation(block.norm1, temb, img)
    txt_mod = run.modulation(block.norm1_context, temb, txt)
    with torch.autocast(img.device.type, enabled=False):
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod

        txt_qkv = run.norm_linear(txt, txt_shift1, txt_scale1, "txt_qkv")
        img_qkv = run.norm_linear(img, img_shift1, img_scale1, "img_qkv")
        attn = run.attention([txt_qkv, img_qkv])
        txt_attn, img_attn = attn.split([txt.shape[1], img.shape[1]], dim=1)
        img = run.add(img, img_gate1, lora_linear, img_attn, "img_proj")
        txt = run.add(txt, txt_gate1, lora_linear, txt_attn, "txt_proj")

        img_u = run.norm_linear(img, img_shift2, img_scale2, "img_in")
        img = run.add(img, img_gate2, gelu_lora_linear, img_u, "img_out")
        txt_u = run.norm_linear(txt, txt_shift2, txt_scale2, "txt_in")
        txt = run.add(txt, txt_gate2, gelu_lora_linear, txt_u, "txt_out")
        return _clipped(txt), img


def _single_forward(block: Foreign, run: _Run, img: Tensor, txt: Tensor, temb: Tensor):
    x = torch.cat([txt, img], dim=1)
    shift, scale, gate = run.modulation(block.norm, temb, x)
    with torch.autocast(img.device.type, enabled=False):
        qkv, u = run.norm_linear(x, shift, scale, "linear1", split=3 * x.shape[2])
        attn = run.attention([qkv])
        x = _clipped(run.add(x, gate, gelu_lora_linear, u, "linear2", head=attn))
        return x[:, : txt.shape[1]], x[:, txt.shape[1] :]


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


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
            "txt_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "img_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "txt_proj": ("attn.to_add_out",),
            "img_proj": ("attn.to_out.0",),
            "txt_in": ("ff_context.net.0.proj",),
            "img_in": ("ff.net.0.proj",),
            "txt_out": ("ff_context.net.2",),
            "img_out": ("ff.net.2",),
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
    return [attrgetter(path)(block) for path in paths]


class _Patch:
    """A patched block's state, in `block._fluxfast`."""

    def __init__(self, kind: _Kind, shared: _Shared):
        self.kind, self.shared = kind, shared
        self.joined = {layer: JoinedWeight() for layer in kind.layers}

    def prepare(
        self, block: Foreign, h: Tensor, rope: tuple | None, kwargs: dict | None
    ) -> _Run | None:
        """None where the block has to run as diffusers wrote it."""
        try:
            return self._run(block, h, rope, kwargs)
        except Declined as reason:
            self.shared.announce(f"blocks run as diffusers wrote them where {reason}")
            return None

    def _run(self, block: Foreign, h: Tensor, rope, kwargs: dict | None) -> _Run:
        self._check_around(block, rope, kwargs)
        head_norms = self._head_norms(block)
        on = torch.is_autocast_enabled(h.device.type)
        autocast = torch.get_autocast_dtype(h.device.type) if on else None
        # LayerNorm is on CUDA autocast's list of fp32 operations, not on the CPU's
        fp32_norm = on and h.device.type == "cuda"
        normed = torch.float32 if fp32_norm else torch.promote_types(h.dtype, autocast or h.dtype)
        layers, dtypes, stream = {}, set(), h.dtype
        for name, paths in self.kind.layers.items():
            linears = _at(block, paths)
            bases = [frozen_base(linear) for linear in linears]
            for base in bases:
                if is_4bit(base):  # computes in its own dtype, and answers in its input's
                    dtypes.add(base.compute_dtype or normed)
                    stream = torch.promote_types(stream, normed)
                else:
                    dtypes.add(autocast or base.weight.dtype)
                    stream = torch.promote_types(stream, autocast or base.weight.dtype)
            update = stack_loras([read_lora(x) for x in linears], [x.out_features for x in bases])
            layers[name] = (self.joined[name].weight(bases), update)
        decline_if(len(dtypes) > 1, "linears compute in several dtypes")
        dtype = dtypes.pop()
        decline_if(dtype not in DTYPES, f"linears compute in {dtype}")
        decline_if(not on and stream != h.dtype, f"weights of another dtype are given {h.dtype}")
        heads = block.attn.to_q.out_features // head_norms[0].shape[0]
        return _Run(layers, head_norms, heads, self.shared.rope(rope, h.device), dtype, stream)

    def _check_around(self, block: Foreign, rope, kwargs: dict | None) -> None:
        """Declines what the ops do not compute around the linears."""
        kind, attn = self.kind, block.attn
        decline_if(kwargs, f"joint_attention_kwargs has {', '.join(kwargs or ())}")
        plain_rope = isinstance(rope, tuple) and len(rope) == 2 and rope[0].ndim == 2
        decline_if(not plain_rope, "image_rotary_emb is not cos and sin, [T, C] each")
        decline_if(getattr(attn, "fused_projections", False), "their projections are fused")
        processor = type(attn.processor).__name__
        known = processor in ("FluxAttnProcessor", "FluxAttnProcessor2_0")
        decline_if(not known, f"the attention processor is {processor}")
        parallel = getattr(attn.processor, "_parallel_config", None) is not None
        decline_if(parallel, "attention runs on several devices")
        if getattr(attn.processor, "_attention_backend", None) is not None:
            self.shared.announce("the attention backend chosen is not used: the fused ops choose")
        groups = (kind.around, kind.layer_norms, kind.head_norms, kind.activations, kind.dropouts)
        decline_if(any(map(hooked, _at(block, sum(groups, ())))), "a module inside has hooks")
        drops = any(dropout.training and dropout.p > 0 for dropout in _at(block, kind.dropouts))
        decline_if(drops, "there is dropout in training")

    def _head_norms(self, block: Foreign) -> list[Tensor]:
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
    kinds = {kind.__name__ for kind in type(transformer).__mro__}
    if "FluxTransformer2DModel" not in kinds:
        raise TypeError(
            f"transformer must be diffusers' FluxTransformer2DModel itself, not a wrapper of it, "
            f"got {type(transformer).__name__}"
        )
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


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
    parameters, expected = (
        list(inspect.signature(forward).parameters) for forward in (type(block).forward, _forward)
    )
    if parameters != expected:
        raise ValueError(f"{name}.forward takes {parameters} in this diffusers, not {expected}")
    kind = KINDS[name]
    try:
        _at(block, (*sum(kind.layers.values(), ()), *kind.around, *kind.dropouts))
        layer_norms, head_norms = _at(block, kind.layer_norms), _at(block, kind.head_norms)
        activations = _at(block, kind.activations)
    except AttributeError as missing:
        raise ValueError(f"{name} has other parts than in the diffusers known: {missing}") from None
    as_known = all(norm.eps == EPS and norm.weight is None for norm in layer_norms)
    as_known &= all(norm.eps == EPSILON and norm.weight is not None for norm in head_norms)
    as_known &= all(activation.approximate == "tanh" for activation in activations)
    if not as_known:
        raise ValueError(f"{name} has other norms or another activation than FLUX.1's")


def patch_diffusers(transformer: nn.Module) -> None:
    """Run the blocks of a diffusers `FluxTransformer2DModel` on the fused ops, until
    `unpatch_diffusers`.

    With or without peft LoRA, which may be added, trained, switched and removed afterwards; linears
    in fp32, bf16, fp16 or bitsandbytes NF4. Patching twice does nothing. Raises TypeError for
    another class and ValueError for blocks that are not as known; see the file's head for what
    makes a block run unfused later.
    """
    blocks = [block for block in _blocks(transformer) if "_fluxfast" not in block.__dict__]
    for block in blocks:
        _check_block(block)
    shared = _Shared()
    for block in blocks:
        block._fluxfast = _Patch(KINDS[type(block).__name__], shared)
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
