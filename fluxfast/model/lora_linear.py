"""LoRALinear: a frozen linear and the low-rank updates of its rows.

    y = x Wᵀ + b;   y[:, rows of part p] += scale · (x A_pᵀ) B_pᵀ    for each update

Shape legend: B batch, T tokens, K inputs, N outputs, P parts, R rank. A is [P·R, K] and B is [N',
R], N' the rows that have an update, part after part: stacked, never block-diagonal, so that
splitting the layer into its parts (q, k, v, mlp) is exact. One A for all parts (kohya's form) is
P = 1 with several row ranges.

The ops of `fluxfast_kernels` fuse the product with norm and modulation or GELU before it, gate and
residual after it; autograd saves the op's input and nothing in between. Module hooks and LoRA
dropout need the product's own input and output: then it runs unfused, as `forward`.
"""

from collections.abc import Iterator
from typing import Any

import fluxfast_kernels as fk
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxfast.model.frozen_linear import FrozenLinear
from fluxfast.model.lora_dropout import DroppedLinear, LoRADropout

# nn.Module's attributes for hooks, which must see this module's own input and output
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Parts = list[list[tuple[int, int]]]  # per A: the row ranges (start, end) of y that it feeds


class LowRankUpdate(nn.Module):
    """One LoRA's update of a linear: trainable, or frozen (an assistant's)."""

    def __init__(self, a: Tensor, b: Tensor, parts: Parts, scale: float, trainable: bool):
        super().__init__()
        self.lora_A = nn.Parameter(a, requires_grad=trainable)
        self.lora_B = nn.Parameter(b, requires_grad=trainable)
        self.parts, self.scale, self.trainable = parts, scale, trainable
        self.strength = 1.0  # times scale; 0 switches it off
        self.dropout: LoRADropout | None = None

    def as_argument(self) -> fk.LoRAUpdate:
        """Returns the update as every fused linear takes it."""
        scale = self.scale * self.strength
        return fk.LoRAUpdate(self.lora_A, self.lora_B, _flat(self.parts), scale)

    def slices(self) -> Iterator[tuple[slice, ...]]:
        """Returns (rows of y, rows of B, rows of A), one per part and range."""
        return self.as_argument().slices()

    def spread(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Returns A [P', R, K] and scaled B [N'', R] for `parts`, zeros for those it lacks."""
        rank, scale = self.lora_B.shape[1], self.scale * self.strength
        a = self.lora_A.unflatten(0, (-1, rank))
        b = self.lora_B if scale == 1 else self.lora_B * scale
        if parts == self.parts:
            return a, b
        blocks = b.split([_height(ranges) for ranges in self.parts])
        own = dict(zip(map(tuple, self.parts), zip(a, blocks, strict=True), strict=True))
        assert all(ranges in parts for ranges in self.parts), (self.parts, parts)
        zero = torch.zeros_like(a[0])
        pairs = [own.get(tuple(r)) or (zero, b.new_zeros(_height(r), rank)) for r in parts]
        a, b = zip(*pairs, strict=True)
        return torch.stack(a), torch.cat(b)


class LoRALinear(FrozenLinear):
    """A frozen linear and its updates: at most one that is trainable, in front, and frozen ones."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.updates: Any = nn.ModuleList()  # of LowRankUpdate

    def add_update(self, update: LowRankUpdate) -> None:
        """Adds an update; a trainable one goes in front and replaces an earlier one."""
        update.to(self.device)
        if not update.trainable:
            self.updates.append(update)
        else:
            self.remove_lora()
            self.updates.insert(0, update)

    def remove_lora(self) -> None:
        """Removes the trainable update."""
        self.remove_updates([update for update in self.updates if update.trainable])

    def remove_updates(self, updates: list[LowRankUpdate]) -> None:
        self.updates = nn.ModuleList(each for each in self.updates if each not in updates)

    @property
    def lora(self) -> Any:
        """The trainable LowRankUpdate, or None."""
        return self.updates[0] if len(self.updates) and self.updates[0].trainable else None

    @property
    def lora_A(self) -> nn.Parameter | None:
        return None if self.lora is None else self.lora.lora_A

    @property
    def lora_B(self) -> nn.Parameter | None:
        return None if self.lora is None else self.lora.lora_B

    def trains(self) -> bool:
        """Returns whether a trainable update is active."""
        return self.lora is not None and self.lora.strength != 0

    def drops(self) -> bool:
        """Returns whether LoRA dropout is active."""
        return self.training and self.trains() and self.lora.dropout is not None

    def forward(self, x: Tensor) -> Tensor:
        """Returns y [..., N] of x [..., K] in the compute dtype."""
        # backward would read the weight where the next one has arrived: see `WeightsOnHost.fetch`
        assert self.weight_provider is None or not x.requires_grad, "x of a weight on the host"
        if self.drops():
            frozen, lora = self._update(frozen_only=True), self.lora
            return DroppedLinear.apply(x, *lora.as_argument(), self, frozen, lora.dropout)
        return fk.lora_linear(x, self.frozen_weight(), self._update())

    def gated_linear(self, x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        """Returns residual + gate · y. x [B, T, K]; gate [B, 1, N]; residual [B, T, N]."""
        if self._runs_by_itself() or _needs_gradient(gate):
            return fk.gate_residual(residual, gate, self(x))
        return fk.lora_linear(x, self.frozen_weight(), self._update(), gate, residual)

    def norm_linear(self, h: Tensor, shift: Tensor, scale: Tensor, split: int = 0) -> Any:
        """Applies the layer to LayerNorm(h) · (1 + scale) + shift. h [B, T, K]; shift, scale
        [B, 1, K]. Returns y [B, T, N], or with a split y's columns before and after it.
        """
        if self._runs_by_itself():
            y = self(fk.norm_modulate(h, shift, scale))
            return y.tensor_split([split], dim=-1) if split else y
        weight, update = self.frozen_weight(), self._update()
        return fk.norm_modulate_lora_linear(h, shift, scale, weight, update, split)

    def gelu_linear(
        self,
        u: Tensor,
        gate: Tensor,
        residual: Tensor,
        head: Tensor | None = None,
        saved_bits: int = 16,
    ) -> Tensor:
        """Returns residual + gate · y, y the layer's output for [head, GELU-tanh(u)].

        u [B, T, F]; head [B, T, K - F] or None; gate [B, 1, N]; residual [B, T, N]. saved_bits: 8
        saves u for backward in 8 bits (if fused).
        """
        if self._runs_by_itself():
            x = F.gelu(u, approximate="tanh")
            x = x if head is None else torch.cat([head, x], dim=-1)
            return fk.gate_residual(residual, gate, self(x))
        args = u, self.frozen_weight(), self._update()
        options: dict[str, Any] = {"head": head, "saved_bits": saved_bits}
        if _needs_gradient(gate):
            return fk.gate_residual(residual, gate, fk.gelu_lora_linear(*args, **options))
        return fk.gelu_lora_linear(*args, **options, gate=gate, residual=residual)

    def _update(self, frozen_only: bool = False) -> fk.LoRAUpdate | None:
        """Returns the active updates as one, their ranks side by side."""
        updates = [update for update in self.updates if update.strength != 0]
        if frozen_only:
            updates = [update for update in updates if not update.trainable]
        if len(updates) < 2:
            return updates[0].as_argument() if updates else None
        parts = max((update.parts for update in updates), key=len)  # these include all others
        a, b = zip(*(update.spread(parts) for update in updates), strict=True)
        a, b = torch.cat(a, dim=1).flatten(0, 1), torch.cat(b, dim=1)
        return fk.LoRAUpdate(a, b, _flat(parts), 1.0)

    def _runs_by_itself(self) -> bool:
        """Returns whether the product must not be fused: see the module docstring."""
        return any(getattr(self, hooks) for hooks in _HOOKS) or self.drops()


def _flat(parts: Parts) -> list[int]:
    """Returns start, end and the index of A of every range, as the ops take parts."""
    return [n for index, ranges in enumerate(parts) for pair in ranges for n in (*pair, index)]


def _height(ranges: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


def _needs_gradient(gate: Tensor) -> bool:
    """Returns whether the gate trains: the fused ops take it as a constant."""
    return gate.requires_grad and torch.is_grad_enabled()
