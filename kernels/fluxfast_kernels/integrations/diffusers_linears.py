"""The linears that `diffusers.py` finds in diffusers' blocks, as the fused ops take them.

`base_of` and `lora_of` read one linear (`nn.Linear` or bitsandbytes' `Linear4bit`, bare or in
peft's LoRA layer) and raise `Declined`, with a reason, where the ops do not compute what it does.
`Joint` lays the frozen tensors of several linears side by side in one tensor per kind, of which
each linear's own become views; `stacked` does so with their LoRA, differentiably.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxfast_kernels.gemm.epilogue import LoRAUpdate
from fluxfast_kernels.quant.frozen import FrozenWeight
from fluxfast_kernels.quant.nf4 import BLOCK, NESTED_BLOCK, NF4Tensor, nf4_absmax


class Declined(Exception):
    """Why a block runs as diffusers wrote it."""


def decline_if(condition: object, reason: str) -> None:
    if condition:
        raise Declined(reason)


# ---------------------------------------------------------------- one linear: what it is, its LoRA


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more, or other, than its class's forward."""
    own = module.__dict__
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in own or any(own[name] for name in names)


def is_4bit(base: nn.Module) -> bool:
    kind = type(base)
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")


def is_lora(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ in ("Linear", "Linear4bit") and kind.__module__.startswith("peft.")


def base_of(module: nn.Module) -> nn.Module:
    """The frozen linear, checked."""
    base = module.base_layer if is_lora(module) else module
    decline_if(hooked(module) or hooked(base), "a linear has hooks")
    decline_if(
        type(base) is not nn.Linear and not is_4bit(base), f"a linear is a {type(base).__name__}"
    )
    weight, bias = base.weight, base.bias
    decline_if(bias is None, "a linear has no bias")
    decline_if(weight.device.type == "meta", "weights are on the meta device")
    decline_if(
        torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad),
        "base weights require gradients",
    )
    if not is_4bit(base):
        decline_if(type(weight) is not nn.Parameter, f"weights are {type(weight).__name__}")
        return base
    state = getattr(weight, "quant_state", None)
    decline_if(state is None, "weights are not quantized yet")
    # which rounds absmax to bf16 and transposes it; bitsandbytes 0.50 cannot take that back
    packed = getattr(state, "packing_format_for_cpu", False)
    decline_if(packed, "bitsandbytes has packed 4-bit weights for its own CPU kernels")
    nested = state.state2
    plain = state.quant_type == "nf4" and state.blocksize == BLOCK
    plain &= tuple(state.shape) == (base.out_features, base.in_features)
    plain &= base.in_features % BLOCK == 0 and base.weight.dtype == torch.uint8
    plain &= tuple(state.absmax.shape) == (base.out_features * base.in_features // BLOCK,)
    plain &= nested is None or nested.blocksize == NESTED_BLOCK
    decline_if(not plain, "4-bit weights are not NF4 in blocks of 64 along the rows")
    return base


def lora_of(module: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """A [r, K], B [N, r] and their scale, or None where the layer is its base alone."""
    if not is_lora(module):
        return None
    decline_if(module.merged, "adapters are merged")
    if module.disable_adapters:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return None
    decline_if(len(names) > 1, "several adapters are active at once")
    name = names[0]
    variant = name in getattr(module, "lora_variant", ()) or module.use_dora.get(name)
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    plain = type(a) is nn.Linear and type(b) is nn.Linear
    decline_if(variant or not plain, "an adapter is a LoRA variant")
    decline_if(a.bias is not None or b.bias is not None, "an adapter has biases")
    decline_if(any(map(hooked, (a, b, dropout))), "an adapter has hooks")
    drops = type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)
    decline_if(type(dropout) is not nn.Identity and drops, "an adapter drops out in training")
    return a.weight.float(), b.weight.float(), float(module.scaling[name])


def stacked(loras: list[tuple | None], rows: list[int]) -> LoRAUpdate | None:
    """The update of linears that have `rows` outputs each."""
    present = [lora for lora in loras if lora is not None]
    if not present:
        return None
    rank = max(a.shape[0] for a, _, _ in present)
    scales = {scale for _, _, scale in present}
    scale = scales.pop() if len(scales) == 1 else None
    many_a, many_b, parts, end = [], [], [], 0
    for lora, count in zip(loras, rows, strict=True):
        start, end = end, end + count
        if lora is None:
            continue
        a, b, own = lora
        if a.shape[0] < rank:
            missing = rank - a.shape[0]
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        parts += [start, end, len(many_a)]
        many_a.append(a)
        many_b.append(b if scale is not None else b * own)
    if len(present) > 1:
        many_a, many_b = [torch.cat(many_a)], [torch.cat(many_b)]
    return LoRAUpdate(many_a[0], many_b[0], parts, 1.0 if scale is None else scale)


# ---------------------------------------------------------------- the frozen weights, side by side


def _frozen(base: nn.Module) -> dict[str, Tensor]:
    """A linear's frozen tensors by name; weight is packed where it is NF4."""
    found = {"weight": base.weight.data, "bias": base.bias.data}
    if is_4bit(base):
        state = base.weight.quant_state
        found["absmax"] = state.absmax
        if state.state2 is not None:
            found |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
    return found


def _give(base: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the linear's memory for what `_frozen` calls `name`."""
    if name in ("weight", "bias"):
        getattr(base, name).data = tensor
    else:
        state = base.weight.quant_state
        (state if name == "absmax" else state.state2).absmax = tensor


def _weight(tensors: dict[str, Tensor]) -> FrozenWeight:
    weight = [tensor for name, tensor in tensors.items() if name != "bias"]
    return FrozenWeight(weight, tensors["bias"])


@dataclass
class Joint:
    """The frozen tensors of linears that make one product."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    seen: list[Tensor] = field(default_factory=list)  # kept, so that no address is used again

    def of(self, bases: list[nn.Module]) -> FrozenWeight:
        """The weight of linears side by side, joined where it is not or no longer."""
        if len(bases) == 1:
            return _weight(_frozen(bases[0]))
        if not (torch.compiler.is_compiling() and self.tensors):
            now = [tensor for base in bases for tensor in _frozen(base).values()]
            if [x.data_ptr() for x in now] != [x.data_ptr() for x in self.seen]:
                self.join(bases)
        return _weight(self.tensors)

    @torch.no_grad()
    def join(self, bases: list[nn.Module]) -> None:
        """Move the linears' tensors side by side, and make the linears' own views of them."""
        self.tensors, self.seen = {}, []
        parts = [_frozen(base) for base in bases]
        kinds = {tuple((name, x.dtype, x.device) for name, x in p.items()) for p in parts}
        decline_if(len(kinds) > 1, "q, k and v are stored in different ways")
        counts = [base.out_features * base.in_features // BLOCK for base in bases]
        straddles = any(count % NESTED_BLOCK for count in counts[:-1])
        unnested = "offset" in parts[0] and straddles
        # a forward in inference mode may be the first to join
        with torch.inference_mode(False):
            for name in parts[0]:
                pieces = [part[name] for part in parts]
                if unnested and name in ("absmax", "nested_absmax", "offset"):
                    if name == "absmax":
                        self.tensors[name] = torch.cat([_unnested(part) for part in parts])
                elif name == "offset":
                    blocks = [part["nested_absmax"].numel() for part in parts]
                    spread = [x.expand(n) for x, n in zip(pieces, blocks, strict=True)]
                    self.tensors[name] = torch.cat(spread)
                else:
                    self._move(bases, name, pieces)
        self.seen = [tensor for base in bases for tensor in _frozen(base).values()]

    def _move(self, bases: list[nn.Module], name: str, pieces: list[Tensor]) -> None:
        total, first = sum(len(piece) for piece in pieces), pieces[0]
        joint = torch.empty((total, *first.shape[1:]), dtype=first.dtype, device=first.device)
        self.tensors[name] = joint
        lengths = [len(piece) for piece in pieces]
        for base, piece, view in zip(bases, pieces, joint.split(lengths), strict=True):
            view.copy_(piece)
            _give(base, name, view)

    def part(self, bases: list[nn.Module]) -> None:
        """Give every linear memory of its own again where it has the joint one."""
        for base in bases:
            for name, tensor in _frozen(base).items():
                joint = self.tensors.get(name)
                if joint is None or name == "offset" or tensor.dtype != joint.dtype:
                    continue
                if tensor.untyped_storage().data_ptr() == joint.untyped_storage().data_ptr():
                    _give(base, name, tensor.clone())
        self.tensors, self.seen = {}, []


def _unnested(part: dict[str, Tensor]) -> Tensor:
    statistics = (part["absmax"], (0, 0), part["nested_absmax"], part["offset"])
    return nf4_absmax(NF4Tensor(part["weight"], *statistics))
