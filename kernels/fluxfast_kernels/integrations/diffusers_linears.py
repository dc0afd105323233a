"""The linears in the blocks, and their LoRA, as the fused ops take them.

`frozen_base` and `read_loras` read one linear (`nn.Linear` or bitsandbytes' `Linear4bit`) and raise
`Declined`, with a reason, where the ops do not compute what it does. LoRA is found in two places:

- peft: its `Linear` stands in the linear's place and holds it as `base_layer`; `lora_A`, `lora_B`
  and `scaling` by adapter. Several active adapters add up.
- ai-toolkit, LyCORIS and kohya: the linear's `forward` is that of a module with `lora_down` (A) and
  `lora_up` (B), which calls the one there before, the linear's or the next module's, as
  `org_forward`. `_read_module` knows what else such modules and their networks have.

`JoinedWeight` moves the frozen tensors of several linears into one tensor per kind, of which each
linear's own become views; `stack_loras` concatenates their LoRA, differentiably. LyCORIS rounds the
sum of base and update to the base's dtype; here the update stays exact.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxfast_kernels.gemm.epilogue import LoRAUpdate
from fluxfast_kernels.quant.frozen import FrozenWeight
from fluxfast_kernels.quant.nf4 import BLOCK, NESTED_BLOCK, NF4Tensor, nf4_absmax

Foreign = Any  # a module of diffusers, peft or bitsandbytes, of which nothing is imported


class Declined(Exception):
    """Why a block runs as its class wrote it."""


def decline_if(condition: object, reason: str) -> None:
    if condition:
        raise Declined(reason)


# ---------------------------------------------------------------- one linear


def hooked(module: nn.Module, of_its_own: bool = True) -> bool:
    """Whether calling the module does more than its forward or, of its own, than its class's."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = module.__dict__
    return (of_its_own and "forward" in own) or any(own[name] for name in names)


def _is(module: Foreign, package: str, *names: str) -> bool:
    kind = type(module)
    return kind.__name__ in names and kind.__module__.startswith(f"{package}.")


def is_4bit(base: Foreign) -> bool:
    return _is(base, "bitsandbytes", "Linear4bit")


def is_peft(module: Foreign) -> bool:
    return _is(module, "peft", "Linear", "Linear4bit")


def base_of(module: Foreign) -> Foreign:
    return module.base_layer if is_peft(module) else module


def frozen_base(module: Foreign) -> Foreign:
    """The frozen linear, checked."""
    base = base_of(module)
    hooks = hooked(base, of_its_own=False) or (module is not base and hooked(module))
    decline_if(hooks, "a linear has hooks")
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


# ---------------------------------------------------------------- its LoRA


class LoRA(NamedTuple):
    """fp32 A [r, K] and B [N, r] of one linear."""

    a: Tensor
    b: Tensor
    scale: float


# what a LoRA module, or its network, has beside lora_down, lora_up, scale and multiplier
OFF = {"is_active": False, "enabled": False, "is_merged_in": True}  # it adds nothing then
OTHER = ("lora_mid", "wd", "full_rank", "is_lorm", "vector_gates", "ggpo_sigma")  # not a plain LoRA
DROPOUTS = ("dropout", "rank_dropout", "module_dropout")
DROPS, DIFFERS = "an adapter drops out in training", "an adapter's strength differs in the batch"


def read_loras(module: Foreign) -> list[LoRA]:
    """What is added to the base, [] where it is the base alone."""
    base = base_of(module)
    loras = [_read_module(lora, base) for lora in _in_place_of_forward(base)]
    return [lora for lora in loras if lora] + (_read_peft(module) if is_peft(module) else [])


def _in_place_of_forward(base: Foreign) -> list[Foreign]:
    """The modules whose forward took the place of the linear's, the one called first in front."""
    forward, found = base.__dict__.get("forward"), []
    while forward is not None and getattr(forward, "__self__", None) is not base:
        found.append(getattr(forward, "__self__", None))
        forward = getattr(found[-1], "org_forward", None)
        replaced = not isinstance(found[-1], nn.Module) or forward is None
        decline_if(replaced, "the forward of a linear was replaced, not by a LoRA module's")
    return found


def _read_module(lora: Foreign, base: Foreign) -> LoRA | None:
    """A LoRA module's update; None where it adds nothing."""
    name, network = type(lora).__name__, getattr(lora, "network_ref", lambda: lora)()
    has = {x: getattr(lora, x, getattr(network, x, None)) for x in (*OFF, *OTHER, *DROPOUTS)}
    down, up = (cast(Foreign, getattr(lora, x, None)) for x in ("lora_down", "lora_up"))
    decline_if(type(down) is not nn.Linear or type(up) is not nn.Linear, f"an adapter is a {name}")
    frozen = set(map(id, base.parameters()))
    more = {x for x, parameter in lora.named_parameters() if id(parameter) not in frozen}
    more -= {"lora_down.weight", "lora_up.weight", "scalar"}
    more |= {x for x in OTHER if has[x] is not None and has[x] is not False}
    decline_if(more, f"an adapter is a {name} with {', '.join(sorted(more))}")
    strength: Any = getattr(network, "multiplier", getattr(lora, "multiplier", 1.0))
    if isinstance(strength, list | tuple):  # one a sample
        decline_if(len(set(strength)) != 1, DIFFERS)
        strength = strength[0]
    elif network is not lora and not isinstance(strength, Tensor) and strength == 0:
        return None
    if any(has[x] is value for x, value in OFF.items()):
        return None
    decline_if(any(_drops(has[x], lora) for x in DROPOUTS), DROPS)
    decline_if(hooked(down) or hooked(up), "an adapter has hooks")
    a, b, scale = down.weight.float(), up.weight.float(), 1.0
    own = lora.scale if hasattr(lora, "scale") else lora.alpha / a.shape[0]
    more = (getattr(lora, x, 1.0) for x in ("scalar", "assistant_inverse_scale"))
    for factor in (own, strength, *more):
        if isinstance(factor, Tensor):  # perhaps trained
            decline_if(factor.numel() != 1, DIFFERS)
            b = b * factor.reshape(())
        else:
            scale *= float(factor)
    return LoRA(a, b, scale)


def _drops(dropout: Any, lora: Foreign) -> bool:
    """dropout: a probability, a module or None."""
    if not isinstance(dropout, nn.Module):
        return bool(dropout) and lora.training
    drops = type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)
    return type(dropout) is not nn.Identity and drops


def _read_peft(module: Foreign) -> list[LoRA]:
    decline_if(module.merged, "adapters are merged")
    if module.disable_adapters:
        return []
    loras = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        variant = name in getattr(module, "lora_variant", ()) or module.use_dora.get(name)
        a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        plain = type(a) is nn.Linear and type(b) is nn.Linear
        decline_if(variant or not plain, "an adapter is a LoRA variant")
        decline_if(a.bias is not None or b.bias is not None, "an adapter has biases")
        decline_if(any(map(hooked, (a, b, dropout))), "an adapter has hooks")
        decline_if(_drops(dropout, module), DROPS)
        loras.append(LoRA(a.weight.float(), b.weight.float(), float(module.scaling[name])))
    return loras


def _sum(loras: list[LoRA]) -> LoRA | None:
    """One of all their ranks."""
    if len(loras) < 2:
        return loras[0] if loras else None
    b = torch.cat([lora.b * lora.scale for lora in loras], dim=1)
    return LoRA(torch.cat([lora.a for lora in loras]), b, 1.0)


def stack_loras(by_linear: list[list[LoRA]], rows: list[int]) -> LoRAUpdate | None:
    """The update of linears side by side that have `rows` outputs each. Ranks that differ are
    padded with zeros; scales that differ are multiplied into B."""
    loras = [_sum(loras) for loras in by_linear]
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


def _weight(tensors: dict[str, Tensor], K: int) -> FrozenWeight:
    packed, *statistics = (tensor for name, tensor in tensors.items() if name != "bias")
    rows = packed.view(-1, K // 2) if packed.dtype == torch.uint8 else packed
    return FrozenWeight([rows, *statistics], tensors["bias"])


class JoinedWeight:
    """The frozen tensors of linears that one matmul computes."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self.seen: list[Tensor] = []  # referenced, so that no address is used again

    def weight(self, bases: list[Foreign]) -> FrozenWeight:
        """Of the linears side by side, joined first where they are not or no longer."""
        K = bases[0].in_features
        if len(bases) == 1:
            return _weight(_frozen(bases[0]), K)
        if not (torch.compiler.is_compiling() and self.tensors):
            now = [tensor for base in bases for tensor in _frozen(base).values()]
            if [x.data_ptr() for x in now] != [x.data_ptr() for x in self.seen]:
                self.join(bases)
        return _weight(self.tensors, K)

    def forget(self) -> None:
        """Holds the linears' memory no longer: they may be moved or replaced."""
        self.tensors, self.seen = {}, []

    @torch.no_grad()
    def join(self, bases: list[Foreign]) -> None:
        """Move the linears' tensors side by side, and make the linears' own views of them."""
        self.forget()
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
        """Give every linear memory of its own again where several have the same."""
        storages = [
            x.untyped_storage().data_ptr() for base in bases for x in _frozen(base).values()
        ]
        for base in bases:
            for name, tensor in _frozen(base).items():
                shared = storages.count(tensor.untyped_storage().data_ptr()) > 1
                if shared and name != "offset":
                    _set_frozen(base, name, tensor.clone())
        self.forget()


def _unnested(part: dict[str, Tensor]) -> Tensor:
    statistics = (part["absmax"], (0, 0), part["nested_absmax"], part["offset"])
    return nf4_absmax(NF4Tensor(part["weight"], *statistics))
