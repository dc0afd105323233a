"""A frozen linear with its update, forward and backward, without autograd: what the ops call.

Matmuls run in x's dtype (`weight.matmul` "") or in 8 bits ("int8", "fp8"); see `linear_dense.py`
and `linear_8bit.py`. Layouts: `ops/lora_linear.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxfast_kernels.gemm import linear_8bit, linear_dense
from fluxfast_kernels.gemm.epilogue import NOTHING, Epilogue, LoRAUpdate
from fluxfast_kernels.quant.frozen import FrozenWeight
from fluxfast_kernels.quant.rows import QuantizedRows


def _autocast_off(x: Tensor) -> torch.autocast:
    """Matmuls stay in x's dtype: inside an op autocast would round some of them and not others."""
    return torch.autocast(x.device.type, enabled=False)


def linear_forward(
    xs: Sequence[Tensor],
    weight: FrozenWeight,
    update: LoRAUpdate | None = None,
    epilogue: Epilogue = NOTHING,
    rows: Sequence[QuantizedRows | None] | None = None,
) -> list[Tensor]:
    """Returns [y [B, T, N]] or, with a split, [y[..., :split], y[..., split:]], each contiguous.

    xs: inputs side by side, each [B, T, K_i]. rows: per input its 8-bit rows, where the kernel that
    made it wrote these too.
    """
    with _autocast_off(xs[0]):
        if weight.matmul:
            given = [None] * len(xs) if rows is None else list(rows)
            return linear_8bit.forward(xs, weight, update, epilogue, given)
        return linear_dense.forward(xs, weight, update, epilogue)


def linear_backward(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    weight: FrozenWeight | None,
    update: LoRAUpdate | None,
    need_dx: bool,
    gate: Tensor | None = None,
) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None]:
    """Returns [dx_i [B, T, K_i]] or None, dA and dB in fp32 or None. dys, xs: as `linear_forward`.

    gate [B, 1, N]: dys is one tensor, the gradient of gate · y. No weight: the gradients of the
    update alone.
    """
    with _autocast_off(dys[0]):
        if weight is not None and weight.matmul:
            return linear_8bit.backward(dys, xs, weight, update, need_dx, gate)
        dys = dys if gate is None else [dys[0] * gate]
        return linear_dense.backward(dys, xs, weight, update, need_dx)
