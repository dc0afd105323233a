"""The three linears of `fluxfast_kernels` and those who do their work: torch's own operations in a
row, bitsandbytes' 4-bit product, and its dequantizing with torch's product.

All take the same frozen weight (the same NF4 bytes, the same 8-bit values), and everyone but us
adds the update part by part as peft does, each with an A of its own.
"""

from collections.abc import Callable

import fluxfast_kernels as fk
import torch
import torch.nn.functional as F
from fluxfast_kernels.ops.gelu import gelu_lora_linear_reference
from fluxfast_kernels.quant.frozen import nf4_to_8bit_reference
from fluxfast_kernels.quant.nf4 import nf4_dequantize_reference
from torch import Tensor

from bench.kernels.cases import LINEARS, Case, Settings
from bench.kernels.eager_8bit import product_8bit
from bench.kernels.problem import (
    DEQUANTIZE_4BIT,
    EAGER,
    GEMM_4BIT,
    OURS,
    Draws,
    Function,
    Problem,
    half,
    library,
)
from fluxfast.model.names import linear_shape, part_rows

SHARED = ("lora_a", "lora_b")
Product = Callable[[Tensor], Tensor]  # x [B, T, K] -> x Wᵀ + b


class Linear:
    """The layer of a case: its weight in every form that a candidate takes, its bias, its update.

    widths: columns of each of its inputs, side by side. split: columns of the first of two outputs.
    """

    def __init__(self, case: Case, settings: Settings, widths: list[int], split: int = 0):
        self.case, self.widths, self.split = case, widths, split
        self.draw = draw = Draws(case, settings)
        name = LINEARS[case.op]
        N, K = linear_shape(name, settings.spec)
        dense = draw("weight", N, K, std=K**-0.5)
        self.dense, self.nf4, self.kept = dense, None, [dense]
        if case.storage == "nf4":
            self.nf4 = fk.nf4_quantize(dense)
            self.kept = list(self.nf4.tensors().values())
            self.dense = nf4_dequantize_reference(self.nf4, settings.compute)
        elif case.storage != "dense":
            self.kept = list(fk.quantize_8bit(dense, case.storage))
        self.bias = draw("bias", N, std=0.02)
        self.rows, self.rank = part_rows(name, settings.spec), settings.rank
        self.parts = [n for i, (start, end) in enumerate(self.rows) for n in (start, end, i)]
        self.inputs = {
            "lora_a": draw("a", len(self.rows) * self.rank, K, std=K**-0.5, dtype=torch.float32),
            "lora_b": draw("b", N, self.rank, std=0.05, dtype=torch.float32),
        }

    def arguments(
        self, lora_a: Tensor, lora_b: Tensor, plain: torch.dtype | None = None
    ) -> tuple[fk.FrozenWeight, fk.LoRAUpdate]:
        """As the ops take them, or with a dtype as their references do, without a kernel of ours:
        the weight dense in that dtype, or the 8 bits that are multiplied."""
        weight = self.kept
        if plain is not None:
            weight = self.in_8_bits() if self.case.products else [self.dense.to(plain)]
        frozen = fk.FrozenWeight(weight, self.bias, self.case.products)
        return frozen, fk.LoRAUpdate(lora_a, lora_b, self.parts)

    def in_8_bits(self) -> list[Tensor]:
        """int8 or e4m3 [N, K] and scale fp32 [N]; of NF4 they are made anew."""
        if self.nf4 is None:
            return self.kept
        rows = nf4_to_8bit_reference(self.nf4, self.case.products)
        return [rows.values, rows.scale]

    def products(self) -> dict[str, Product | Exception]:
        """Of everyone but us, by name."""
        if self.case.products:
            return {EAGER: self._eager_8bit}
        if self.nf4 is None:
            return {EAGER: lambda x: F.linear(x, self.dense, self.bias)}
        return {
            EAGER: lambda x: F.linear(x, nf4_dequantize_reference(self.nf4, x.dtype), self.bias),
            GEMM_4BIT: library(self._gemm_4bit),
            DEQUANTIZE_4BIT: library(self._dequantize_4bit),
        }

    def _eager_8bit(self, x: Tensor) -> Tensor:
        xs = x.split(self.widths, -1)
        return product_8bit(xs, *self.in_8_bits(), self.case.products, self.split) + self.bias

    def _gemm_4bit(self) -> Product:
        """As bitsandbytes' Linear4bit calls it, from which it picks its own kernel."""
        import bitsandbytes as bnb

        packed, state = quant_state(self.nf4, self.bias.dtype)
        return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state, bias=self.bias)

    def _dequantize_4bit(self) -> Product:
        from bitsandbytes.functional import dequantize_4bit

        packed, state = quant_state(self.nf4, self.bias.dtype)
        return lambda x: F.linear(x, dequantize_4bit(packed, state), self.bias)

    def updated(self, y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """y [B, T, N] with each part's (x Aᵀ) Bᵀ added."""
        pieces = []
        for a, (start, end) in zip(lora_a.split(self.rank), self.rows, strict=True):
            update = (x @ a.to(x.dtype).T) @ lora_b[start:end].to(x.dtype).T
            pieces.append(y[..., start:end] + update)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)

    def problem(
        self,
        inputs: dict[str, Tensor],
        trained: tuple[str, ...],
        dys: list[Tensor],
        ours: Function,
        reference: Function,
        by: Callable[[Product], Function],
        settings: Settings,
    ) -> Problem:
        """by: makes a candidate of its product."""
        made = {
            name: product if isinstance(product, Exception) else by(product)
            for name, product in self.products().items()
        }
        return Problem(
            inputs | self.inputs,
            {OURS: ours} | made,
            reference,
            dys,
            (*trained, *SHARED),
            SHARED,
            wide=torch.float32 if half(settings) else torch.float64,
        )


def quant_state(nf4: fk.NF4Tensor, dtype: torch.dtype):
    """-> packed, bitsandbytes' QuantState of our very bytes."""
    from bitsandbytes.functional import quantize_4bit

    like = torch.zeros(nf4.shape, dtype=dtype, device=nf4.packed.device)
    _, state = quantize_4bit(like, blocksize=64, quant_type="nf4")
    state.absmax = nf4.absmax
    return nf4.packed, state


def lora_linear(case: Case, settings: Settings) -> Problem:
    D = settings.spec.hidden_size
    layer = Linear(case, settings, [D])
    draw = layer.draw

    def ours(x, gate, residual, lora_a, lora_b):
        return fk.lora_linear(x, *layer.arguments(lora_a, lora_b), gate, residual)

    def reference(x, gate, residual, lora_a, lora_b):
        linear = layer.arguments(lora_a, lora_b, x.dtype)
        return fk.lora_linear_reference(x, *linear, gate, residual)

    def by(product: Product) -> Function:
        def run(x, gate, residual, lora_a, lora_b):
            return residual + gate * layer.updated(product(x), x, lora_a, lora_b)

        return run

    inputs = {
        "x": draw.tokens("x", D),
        "gate": draw.modulation(6)[2],
        "residual": draw.tokens("residual", D),
    }
    trained, dys = ("x", "residual"), [draw.tokens("dy", D)]
    return layer.problem(inputs, trained, dys, ours, reference, by, settings)


def norm_modulate_lora_linear(case: Case, settings: Settings) -> Problem:
    D, F_ = settings.spec.hidden_size, settings.spec.mlp_hidden
    layer = Linear(case, settings, [D], 3 * D)
    draw = layer.draw

    def ours(h, shift, scale, lora_a, lora_b):
        linear = layer.arguments(lora_a, lora_b)
        return fk.norm_modulate_lora_linear(h, shift, scale, *linear, 3 * D)

    def reference(h, shift, scale, lora_a, lora_b):
        linear = layer.arguments(lora_a, lora_b, h.dtype)
        return fk.norm_modulate_lora_linear_reference(h, shift, scale, *linear, 3 * D)

    def by(product: Product) -> Function:
        def run(h, shift, scale, lora_a, lora_b):
            x = fk.norm_modulate_reference(h, shift, scale)
            y = layer.updated(product(x), x, lora_a, lora_b)
            return y.tensor_split([3 * D], -1)

        return run

    shift, scale, _ = draw.modulation(3)
    inputs = {"h": draw.tokens("h", D), "shift": shift, "scale": scale}
    dys = [draw.tokens("dqkv", 3 * D), draw.tokens("du", F_)]
    return layer.problem(inputs, ("h",), dys, ours, reference, by, settings)


def gelu_lora_linear(case: Case, settings: Settings) -> Problem:
    D, F_ = settings.spec.hidden_size, settings.spec.mlp_hidden
    layer = Linear(case, settings, [D, F_])
    draw = layer.draw

    def ours(u, head, gate, residual, lora_a, lora_b):
        return fk.gelu_lora_linear(u, *layer.arguments(lora_a, lora_b), head, gate, residual)

    def reference(u, head, gate, residual, lora_a, lora_b):
        linear = layer.arguments(lora_a, lora_b, u.dtype)
        return gelu_lora_linear_reference(u, *linear, head, gate, residual)

    def by(product: Product) -> Function:
        def run(u, head, gate, residual, lora_a, lora_b):
            x = torch.cat([head, F.gelu(u, approximate="tanh")], -1)
            return residual + gate * layer.updated(product(x), x, lora_a, lora_b)

        return run

    inputs = {
        "u": draw.tokens("u", F_),
        "head": draw.tokens("head", D),
        "gate": draw.modulation(3)[2],
        "residual": draw.tokens("residual", D),
    }
    trained, dys = ("u", "head", "residual"), [draw.tokens("dy", D)]
    return layer.problem(inputs, trained, dys, ours, reference, by, settings)
