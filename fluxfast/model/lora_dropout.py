"""LoRA dropout: (mask · x) Aᵀ in place of x Aᵀ, by ops that are not fused.

A mask is a function of (seed, layer, global sample index): backward generates it again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import fluxfast_kernels as fk
import torch
import torch.nn.functional as F
from fluxfast_kernels.dispatch.backend import last_stride_1
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast import rng
from fluxfast.model.frozen_linear import FrozenLinear


class DropoutClock:
    """The global sample indices of the current batch, set before each forward pass."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.indices: list[int] = []


@dataclass(frozen=True)
class LoRADropout:
    """One layer's dropout. p: probability of a zero; stream: the layer's random stream."""

    p: float
    stream: str
    clock: DropoutClock

    def mask(self, x: Tensor, indices: Sequence[int]) -> Tensor:
        """Returns 0 or 1/(1-p) per element of x [B, ..., K], by global sample index [B]."""
        if len(indices) != x.shape[0]:
            raise ValueError(
                f"LoRA dropout needs the batch's {x.shape[0]} global sample indices in "
                f"model.dropout_clock.indices, got {len(indices)}"
            )
        stream = f"lora_dropout/{self.stream}"
        u = rng.uniform(self.clock.seed, stream, list(indices), tuple(x.shape[1:]), x.device)
        return (u >= self.p).to(x.dtype) / (1 - self.p)


class DroppedLinear(torch.autograd.Function):
    """x Wᵀ + b + the frozen updates of x + the trained update of mask · x. Saves x, A and B."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        parts: list[int],
        scale: float,
        layer: FrozenLinear,
        frozen_update: fk.LoRAUpdate | None,
        dropout: LoRADropout,
    ) -> Tensor:
        """a, b, parts, scale: the trained `fk.LoRAUpdate`."""
        # copies: clock and strength may have changed when backward runs
        ctx.indices = indices = tuple(dropout.clock.indices)
        ctx.layer, ctx.parts, ctx.scale, ctx.frozen_update = layer, parts, scale, frozen_update
        ctx.dropout = dropout
        ctx.save_for_backward(x, a, b)
        (y,) = linear_forward([x], layer.frozen_weight(), frozen_update)
        down = F.linear(x * dropout.mask(x, indices), a.to(x.dtype))
        up = b.to(x.dtype) * scale
        y_2d, down_2d = y.view(-1, y.shape[-1]), down.view(-1, down.shape[-1])
        for y_rows, b_rows, a_rows in fk.LoRAUpdate(a, b, parts, scale).slices():
            y_2d[:, y_rows].addmm_(down_2d[:, a_rows], up[b_rows].T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        layer, dy = ctx.layer, last_stride_1(dy)
        x, a, b = ctx.saved_tensors
        mask = ctx.dropout.mask(x, ctx.indices)
        masked, trained = [x * mask], fk.LoRAUpdate(a, b, ctx.parts, ctx.scale)
        dx_lora, da, db = linear_backward([dy], masked, None, trained, True)
        dxs, _, _ = linear_backward([dy], [x], layer.frozen_weight(), ctx.frozen_update, True)
        assert dxs is not None and dx_lora is not None
        return dxs[0].addcmul_(dx_lora[0], mask), da, db, None, None, None, None, None
