"""The linears in diffusers' blocks, as the fused ops take them.

`frozen_base` and `read_lora` read one linear (`nn.Linear` or bitsandbytes' `Linear4bit`, bare or in
peft's LoRA layer) and raise `Declined`, with a reason, where the ops do not compute what it does.
`JoinedWeight` moves the frozen tensors of several linears into one tensor per kind, of which each
linear's own become views; `stack_loras` concatenates their LoRA, differentiably.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxfast_kernels.gemm.epilogue import LoRAUpdate
from fluxfast_kernels.quant.frozen import FrozenWeight
from fluxfast_kernels.quant.nf4 import BLOCK, NESTED_BLOCK, NF4Tensor, nf4_absmax

Foreign = Any  # a module of diffusers, peft or bitsandbytes, of which nothing is imported


class Declined(Exception):
    """Why a block runs as diffusers wrote it."""


def decline_if(condition: object, reason: str) -> None:
    if condition:
        raise Declined(reason)


# ---------------------------------------------------------------- one linear and its LoRA


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more, or other, than its class's forward."""
    own = module.__dict__
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in own or any(own[name] for name in names)


def _is(module: Foreign, package: str, *names: str) -> bool:
    kind = type(module)
    return kind.__name__ in names and kind.__module__.startswith(f"{package}.")


def is_4bit(base: Foreign) -> bool:
    return _is(base, "bitsandbytes", "Linear4bit")


def is_lora(module: Foreign) -> bool:
    return _is(module, "peft", "Linear", "Linear4bit")


def base_of(module: Foreign) -> Foreign:
    return module.base_layer if is_lora(module) else module


def frozen_base(module: Foreign) -> Foreign:
    """The frozen linear, checked."""
    base = base_of(module)
    decline_if(hooked(module) or hooked(base), "a linear has hooks")
    known = type(base) is nn.Linear or is_4bit(base)
    decline_if(not known, f"a linear is a {type(base).__name__}")
    weight, bias = base.weight, base.bias
    decline_if(bias is None, "a linear has no bias")
    decline_if(weight.device.type == "meta", "weights are on the meta device")
    trains = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    decline_if(trains, "base weights require gradients")
    if is_4bit(base):
        _check_nf4(base)
    else:
        decline_if(type(weight) is not nn.Parameter, f"weights are {type(weight).__name__}")
    return base


def _check_nf4(base: Foreign) -> None:
    state: Foreign = getattr(base.weight, "quant_state", None)
    decline_if(state is None, "weights are not quantized yet")
    # which rounds absmax to bf16 and transposes it; bitsandbytes 0.50 cannot take that back
    packed = getattr(state, "packing_format_for_cpu", False)
    decline_if(packed, "bitsandbytes has packed 4-bit weights for its own CPU kernels")
    N, K, nested = base.out_features, base.in_features, state.state2
    fits = state.quant_type == "nf4" and state.blocksize == BLOCK and tuple(state.shape) == (N, K)
    fits &= K % BLOCK == 0 and base.weight.dtype == torch.uint8
    fits &= tuple(state.absmax.shape) == (N * K // BLOCK,)
    fits &= nested is None or nested.blocksize == NESTED_BLOCK
    decline_if(not fits, "4-bit weights are not NF4 in blocks of 64 along the rows")


class LoRA(NamedTuple):
    """fp32 A [r, K] and B [N, r] of one linear."""

    a: Tensor
    b: Tensor
    scale: float


def read_lora(module: Foreign) -> LoRA | None:
    """None where the layer is its base alone."""
    if not is_lora(module):
        return None
    decline_if(module.merged, "adapters are merged")
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or not names:
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
    return LoRA(a.weight.float(), b.weight.float(), float(module.scaling[name]))


def stack_loras(loras: list[LoRA | None], rows: list[int]) -> LoRAUpdate | None:
    """The update of linears side by side that have `rows` outputs each. Ranks that differ are
    padded with zeros; scales that differ are multiplied into B."""
    present = [lora for lora in loras if lora is not None]
    if not present:
        return None
    rank = max(lora.a.shape[0] for lora in present)
    shared = len({lora.scale for lora in present}) == 1
    many_a, many_b, parts, end = [], [], [], 0
    for lora, count in zip(loras, rows, strict=True):
        start, end = end, end + count
        if lora is None:
            continue
        a, b = lora.a, lora.b
        if missing := rank - a.shape[0]:
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        parts += [start, end, len(many_a)]
        many_a.append(a)
        many_b.append(b if shared else b * lora.scale)
    if len(present) > 1:
        many_a, many_b = [torch.cat(many_a)], [torch.cat(many_b)]
    return LoRAUpdate(many_a[0], many_b[0], parts, present[0].scale if shared else 1.0)


# ---------------------------------------------------------------- the frozen weights, side by side


def _frozen(base: Foreign) -> dict[str, Tensor]:
    """A linear's frozen tensors by name; weight is packed where it is NF4."""
    tensors = {"weight": base.weight.data, "bias": base.bias.data}
    if is_4bit(base):
        state = base.weight.quant_state
        tensors["absmax"] = state.absmax
        if state.state2 is not None:
            tensors |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
    return tensors


def _set_frozen(base: Foreign, name: str, tensor: Tensor) -> None:
    """Make `tensor` the linear's memory for what `_frozen` calls `name`."""
    if name in ("weight", "bias"):
        getattr(base, name).data = tensor
    else:
        state = base.weight.quant_state
        (state if name == "absmax" else state.state2).absmax = tensor


def _weight(tensors: dict[str, Tensor]) -> FrozenWeight:
    weight = [tensor for name, tensor in tensors.items() if name != "bias"]
    return FrozenWeight(weight, tensors["bias"])


class JoinedWeight:
    """The frozen tensors of linears that one matmul computes."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self.seen: list[Tensor] = []  # referenced, so that no address is used again

    def weight(self, bases: list[Foreign]) -> FrozenWeight:
        """Of the linears side by side, joined first where they are not or no longer."""
        if len(bases) == 1:
            return _weight(_frozen(bases[0]))
        if not (torch.compiler.is_compiling() and self.tensors):
            now = [tensor for base in bases for tensor in _frozen(base).values()]
            if [x.data_ptr() for x in now] != [x.data_ptr() for x in self.seen]:
                self.join(bases)
        return _weight(self.tensors)

    @torch.no_grad()
    def join(self, bases: list[Foreign]) -> None:
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

    def _move(self, bases: list[Foreign], name: str, pieces: list[Tensor]) -> None:
        total, first = sum(len(piece) for piece in pieces), pieces[0]
        joint = torch.empty((total, *first.shape[1:]), dtype=first.dtype, device=first.device)
        self.tensors[name] = joint
        lengths = [len(piece) for piece in pieces]
        for base, piece, view in zip(bases, pieces, joint.split(lengths), strict=True):
            view.copy_(piece)
            _set_frozen(base, name, view)

    def separate(self, bases: list[Foreign]) -> None:
        """Give every linear memory of its own again where it has the joint one."""
        for base in bases:
            for name, tensor in _frozen(base).items():
                joint = self.tensors.get(name)
                if joint is None or name == "offset" or tensor.dtype != joint.dtype:
                    continue
                if tensor.untyped_storage().data_ptr() == joint.untyped_storage().data_ptr():
                    _set_frozen(base, name, tensor.clone())
        self.tensors, self.seen = {}, []


def _unnested(part: dict[str, Tensor]) -> Tensor:
    statistics = (part["absmax"], (0, 0), part["nested_absmax"], part["offset"])
    return nf4_absmax(NF4Tensor(part["weight"], *statistics))
