"""Measures the relative error of one linear's products on real rows, and chooses its precision.

The truth is x Wᵀ and dY W in fp32, with the checkpoint's own W. An error is ‖got − true‖ / ‖true‖
over all rows together. Three ways are measured: dense products, which have the storage's error
alone; 8-bit products; 8-bit products of the rotated weight and input.

A layer keeps plain 8-bit products if neither of their errors is above the bound: the limit, or 1.25
times the storage's own error if that is more. Otherwise it is rotated, if that brings both errors
within the bound or lowers the larger one by a fifth; otherwise it stays dense in bf16.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from torch import Tensor

from fluxfast.model.frozen_linear import FrozenLinear
from fluxfast.model.precision import Precision, input_widths, rotation_of
from fluxfast.model.spec import FluxSpec

LIMITS = {"int8": 0.03, "fp8": 0.05}  # normal values make 0.013 in int8 and 0.037 in fp8
OWN = 1.25
GAIN = 0.8  # of the plain error: a rotation that leaves more is not worth its pass over dx


class Errors(NamedTuple):
    """The errors of y and of dx; dx is None where nothing before the layer trains."""

    forward: float
    dx: float | None

    @property
    def worst(self) -> float:
        return max(self.forward, self.dx or 0.0)


@dataclass(frozen=True)
class Measured:
    """The errors of one layer. own: with dense products. rotated: None where no rotation fits.
    cosine: of the LoRA's gradients with 8-bit products in all layers and those with none, None
    without a LoRA.
    """

    name: str
    own: Errors
    plain: Errors
    rotated: Errors | None
    limit: float
    cosine: float | None = None

    @property
    def bound(self) -> float:
        return max(self.limit, OWN * self.own.worst)

    @property
    def choice(self) -> str:
        """Returns 8bit, rotate or bf16, by the rule at the top of this file."""
        if self.plain.worst <= self.bound:
            return "8bit"
        if self.rotated is None:
            return "bf16"
        most = max(self.bound, GAIN * self.plain.worst)
        helps = math.isfinite(self.rotated.worst) and self.rotated.worst <= most
        return "rotate" if helps else "bf16"


@torch.no_grad()
def measure(
    name: str,
    spec: FluxSpec,
    weight: Tensor,
    x: Tensor,
    dy: Tensor | None,
    plain: Precision,
    limit: float,
    dtype: torch.dtype,
    nested: bool = False,
) -> Measured:
    """Measures one layer on its device. weight [N, K], x [rows, K], dy [rows, N], all fp32.

    plain: the layer's storage and product without a rotation; dtype: of the activations; nested:
    double quantization of an NF4 storage.
    """
    truth = x @ weight.T, cast(Any, None if dy is None else dy @ weight)

    def errors(way: Precision) -> Errors:
        y, dx = _products(name, spec, weight, x, dy, way, dtype, nested)
        return Errors(_relative(y, truth[0]), None if dx is None else _relative(dx, truth[1]))

    rotation = rotation_of(name, spec)
    return Measured(
        name,
        own=errors(replace(plain, matmul="")),
        plain=errors(plain),
        rotated=errors(replace(plain, rotation=rotation)) if rotation else None,
        limit=limit,
    )


def _products(name, spec, weight, x, dy, way: Precision, dtype, nested: bool):
    """Returns y and dx as the model computes them: linear2's inputs and linear1's gradients come in
    two parts side by side, each with its own scales.
    """
    N, K = weight.shape
    layer = FrozenLinear(K, N)
    layer.matmul, layer.rotation = way.matmul, way.rotation
    layer.set_weight(weight, way.storage, nested)
    frozen = layer.frozen_weight()
    xs = x[None].to(dtype).split(input_widths(name, spec), -1)
    (y,) = linear_forward(xs, frozen)
    if dy is None:
        return y[0], None
    qkv = 3 * spec.hidden_size
    dys = dy[None].to(dtype).split((qkv, N - qkv) if name.endswith("linear1") else (N,), -1)
    dxs, _, _ = linear_backward(dys, xs, frozen, None, True)
    return y[0], torch.cat(cast(list[Tensor], dxs), -1)[0]


def _relative(got: Tensor, true: Tensor) -> float:
    """Returns ‖got − true‖ / ‖true‖: 0 if both are 0, infinite if it is not finite."""
    difference, size = (got.float() - true).norm().item(), true.norm().item()
    if difference == 0:
        return 0.0
    error = difference / size if size else math.inf
    return error if math.isfinite(error) else math.inf


def table(layers: Sequence[Measured]) -> list[str]:
    """Returns a heading, then a line per layer."""
    width = max(len(layer.name) for layer in layers)
    heading = ("dense", "y", "dx", "rotated y", "dx", "gradient", "choice")
    lines = [f"{'layer':{width}} " + " ".join(f"{word:>9}" for word in heading)]
    for layer in layers:
        errors = (layer.own.worst, *layer.plain, *(layer.rotated or (None, None)), layer.cosine)
        numbers = ["-" if n is None or math.isnan(n) else f"{n:.4f}" for n in errors]
        cells = " ".join(f"{cell:>9}" for cell in (*numbers, layer.choice))
        lines.append(f"{layer.name:{width}} {cells}")
    return lines
