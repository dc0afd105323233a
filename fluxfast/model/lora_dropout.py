"""LoRA dropout: (mask · x) Aᵀ in place of x Aᵀ, by ops that are not fused.

A mask is a function of (seed, layer, global sample index): backward draws it again.
"""

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
    """The global sample indices of the current batch, int64 [B] on the model's device, set before
    each forward pass.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.indices: Tensor | None = None


@dataclass(frozen=True)
class LoRADropout:
    """One layer's dropout. p: probability of a zero; stream: the layer's random stream."""

    p: float
    stream: str
    clock: DropoutClock

    def __call__(self, x: Tensor, indices: Tensor, add_to: Tensor | None = None) -> Tensor:
        """Returns mask · x [B, ..., K]; or adds it to `add_to`, in place, and returns that."""
        key = rng.key(self.clock.seed, f"lora_dropout/{self.stream}")
        return fk.dropout(x, indices, key, self.p, add_to)

    def indices(self, x: Tensor) -> Tensor:
        """Returns the clock's. Raises ValueError unless there is one for each sample of x."""
        indices = self.clock.indices
        if indices is None or len(indices) != len(x):
            raise ValueError(
                f"LoRA dropout needs the batch's {len(x)} global sample indices in "
                f"model.dropout_clock.indices, got {0 if indices is None else len(indices)}"
            )
        return indices


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
        # now: clock and strength may have changed when backward runs
        ctx.indices = indices = dropout.indices(x)
        ctx.layer, ctx.parts, ctx.scale, ctx.frozen_update = layer, parts, scale, frozen_update
        ctx.dropout = dropout
        ctx.save_for_backward(x, a, b)
        (y,) = linear_forward([x], layer.frozen_weight(), frozen_update)
        down = F.linear(dropout(x, indices), a.to(x.dtype))
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
        masked, trained = ctx.dropout(x, ctx.indices), fk.LoRAUpdate(a, b, ctx.parts, ctx.scale)
        dx_lora, da, db = linear_backward([dy], [masked], None, trained, True)
        del masked
        dxs, _, _ = linear_backward([dy], [x], layer.frozen_weight(), ctx.frozen_update, True)
        assert dxs is not None and dx_lora is not None
        dx = ctx.dropout(dx_lora[0], ctx.indices, add_to=dxs[0])
        return dx, da, db, None, None, None, None, None
