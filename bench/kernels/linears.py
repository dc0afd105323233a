"""The three linears of `fluxfast_kernels` beside torch's own operations in a row, bitsandbytes'
4-bit product, and its dequantization with torch's product.

All take the same frozen weight (the same NF4 bytes, the same 8-bit values), and all but ours add
the update part by part as peft does, each with an A of its own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import fluxfast_kernels as fk
import torch
import torch.nn.functional as F
from fluxfast_kernels.ops.gelu import gelu_lora_linear_reference
from fluxfast_kernels.quant.frozen import nf4_to_8bit_reference
from fluxfast_kernels.quant.nf4 import nf4_dequantize_reference
from fluxfast_kernels.quant.rows import QuantizedRows, quantize_reference
from torch import Tensor

from bench import timing
from bench.kernels.cases import LINEARS, Case, Settings
from bench.kernels.problem import (
    DEQUANTIZE_4BIT,
    EAGER,
    GEMM_4BIT,
    OURS,
    Function,
    Problem,
    RandomInputs,
)
from fluxfast.model.names import linear_shape, part_rows
from fluxfast.model.spec import FluxSpec

LORA = ("lora_a", "lora_b")
Product = Callable[[Tensor], Tensor]  # x [B, T, K] -> x Wᵀ + b


class Form(NamedTuple):
    """How an op is called.

    ours, reference: with the inputs, the first `before` of them before weight and update, and with
    `split` last, if not 0. eager: with a linear (x -> x Wᵀ + b + update) and the inputs. widths:
    columns of the linear's inputs, side by side; split: columns of the first of two outputs.
    """

    ours: Function
    reference: Function
    eager: Function
    inputs: dict[str, Tensor]
    trained: tuple[str, ...]
    dys: list[Tensor]
    widths: list[int]
    before: int = 1
    split: int = 0


def linear(case: Case, settings: Settings) -> Problem:
    form = _FORMS[case.op](RandomInputs(case, settings), settings.spec)
    layer = Linear(case, settings, form)

    def fused(op: Function, weight: Callable[[torch.dtype], list[Tensor]]) -> Function:
        def run(lora_a, lora_b, **inputs):
            tensors = list(inputs.values())
            frozen = fk.FrozenWeight(weight(tensors[0].dtype), layer.bias, case.matmul)
            update = fk.LoRAUpdate(lora_a, lora_b, layer.parts)
            last = [form.split] if form.split else []
            before, after = tensors[: form.before], tensors[form.before :]
            return op(*before, frozen, update, *after, *last)

        return run

    def eager(product: Product) -> Function:
        return lambda lora_a, lora_b, **inputs: form.eager(
            lambda x: layer.updated(product(x), x, lora_a, lora_b), **inputs
        )

    candidates = {
        name: product if isinstance(product, Exception) else eager(product)
        for name, product in layer.products().items()
    }
    return Problem(
        form.inputs | layer.lora,
        {OURS: fused(form.ours, lambda dtype: layer.stored)} | candidates,
        fused(form.reference, layer.plain_weight),
        form.dys,
        (*form.trained, *LORA),
        LORA,
        wide=settings.matmul_truth,
    )


def _lora_linear(random: RandomInputs, spec: FluxSpec) -> Form:
    D = spec.hidden_size

    def eager(linear, x, gate, residual):
        return residual + gate * linear(x)

    inputs = {
        "x": random.tokens("x", D),
        "gate": random.modulation(6)[2],
        "residual": random.tokens("residual", D),
    }
    ops = (fk.lora_linear, fk.lora_linear_reference, eager)
    return Form(*ops, inputs, ("x", "residual"), [random.tokens("dy", D)], [D])


def _norm_modulate_lora_linear(random: RandomInputs, spec: FluxSpec) -> Form:
    D = spec.hidden_size
    shift, scale, _ = random.modulation(3)

    def eager(linear, h, shift, scale):
        return linear(fk.norm_modulate_reference(h, shift, scale)).tensor_split([3 * D], -1)

    inputs = {"h": random.tokens("h", D), "shift": shift, "scale": scale}
    dys = [random.tokens("dqkv", 3 * D), random.tokens("du", spec.mlp_hidden)]
    ops = (fk.norm_modulate_lora_linear, fk.norm_modulate_lora_linear_reference, eager)
    return Form(*ops, inputs, ("h",), dys, [D], before=3, split=3 * D)


def _gelu_lora_linear(random: RandomInputs, spec: FluxSpec) -> Form:
    D, F_ = spec.hidden_size, spec.mlp_hidden

    def eager(linear, u, head, gate, residual):
        return residual + gate * linear(torch.cat([head, F.gelu(u, approximate="tanh")], -1))

    inputs = {
        "u": random.tokens("u", F_),
        "head": random.tokens("head", D),
        "gate": random.modulation(3)[2],
        "residual": random.tokens("residual", D),
    }
    ops = (fk.gelu_lora_linear, gelu_lora_linear_reference, eager)
    return Form(*ops, inputs, ("u", "head", "residual"), [random.tokens("dy", D)], [D, F_])


_FORMS = {
    "lora_linear": _lora_linear,
    "norm_modulate_lora_linear": _norm_modulate_lora_linear,
    "gelu_lora_linear": _gelu_lora_linear,
}


class Linear:
    """The layer of a case: its weight in every form that a candidate takes, its bias, its LoRA."""

    def __init__(self, case: Case, settings: Settings, form: Form):
        self.case, self.settings, self.form = case, settings, form
        random, name = RandomInputs(case, settings), LINEARS[case.op]
        N, K = linear_shape(name, settings.spec)
        dense = random.normal("weight", N, K, std=K**-0.5)
        self.dense, self.nf4, self.stored = dense, None, [dense]
        if case.storage == "nf4":
            self.nf4 = fk.nf4_quantize(dense)
            self.stored = list(self.nf4.tensors().values())
            self.dense = nf4_dequantize_reference(self.nf4, settings.compute)
        elif case.storage != "dense":
            self.stored = list(fk.quantize_8bit(dense, case.storage))
        self.bias = random.normal("bias", N, std=0.02)
        self.rows, rank = part_rows(name, settings.spec), settings.rank
        self.parts = [n for i, (start, end) in enumerate(self.rows) for n in (start, end, i)]
        fp32 = torch.float32
        self.lora = {
            "lora_a": random.normal("a", len(self.rows) * rank, K, std=K**-0.5, dtype=fp32),
            "lora_b": random.normal("b", N, rank, std=0.05, dtype=fp32),
        }

    def plain_weight(self, dtype: torch.dtype) -> list[Tensor]:
        """Returns the weight without a kernel of ours: dense in the dtype, or the 8 bits that are
        multiplied."""
        return self.in_8_bits() if self.case.matmul else [self.dense.to(dtype)]

    def in_8_bits(self) -> list[Tensor]:
        """int8 or e4m3 [N, K] and scale fp32 [N]; of NF4 they are computed at every call."""
        if self.nf4 is None:
            return self.stored
        rows = nf4_to_8bit_reference(self.nf4, self.case.matmul)
        return [rows.values, rows.scale]

    def products(self) -> dict[str, Product | Exception]:
        """Returns those of all candidates but ours, by name."""
        if self.case.matmul:
            return {EAGER: self._eager_8bit}
        if self.nf4 is None:
            return {EAGER: lambda x: F.linear(x, self.dense, self.bias)}
        return {
            EAGER: lambda x: F.linear(x, nf4_dequantize_reference(self.nf4, x.dtype), self.bias),
            GEMM_4BIT: timing.attempt(self._gemm_4bit),
            DEQUANTIZE_4BIT: timing.attempt(self._dequantize_4bit),
        }

    def _eager_8bit(self, x: Tensor) -> Tensor:
        matmul, split, xs = self.case.matmul, self.form.split, x.split(self.form.widths, -1)
        return _Matmul8bit.apply(*self.in_8_bits(), matmul, split, *xs) + self.bias

    def _gemm_4bit(self) -> Product:
        """As bitsandbytes' Linear4bit calls it, which picks its own kernel."""
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
        for a, (start, end) in zip(lora_a.split(self.settings.rank), self.rows, strict=True):
            update = (x @ a.to(x.dtype).T) @ lora_b[start:end].to(x.dtype).T
            pieces.append(y[..., start:end] + update)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def quant_state(nf4: fk.NF4Tensor, dtype: torch.dtype):
    """Returns packed, and bitsandbytes' QuantState of our very bytes."""
    from bitsandbytes.functional import quantize_4bit

    like = torch.zeros(nf4.shape, dtype=dtype, device=nf4.packed.device)
    _, state = quantize_4bit(like, blocksize=64, quant_type="nf4")
    state.absmax = nf4.absmax
    return nf4.packed, state


class _Matmul8bit(torch.autograd.Function):
    """An 8-bit product out of torch's own operations: what a trainer without fused kernels would
    write. [x_0, x_1, …] Wᵀ [B, T, N] in xs' dtype; xs [B, T, K_i], W in 8 bits [N, K], scale fp32
    [N]. kind: "int8" or "fp8". split: columns of the first of two outputs, 0 for one.

    Rows of x, or of dy times W's scales, are quantized in a few passes, multiplied by torch's int8
    or fp8 product and scaled in one more. As in the fused ops each input has a scale a row of its
    own, and so has the gradient of each output.
    """

    @staticmethod
    def forward(ctx, weight, scale, kind, split, *xs):
        ctx.save_for_backward(weight, scale)
        ctx.kind, ctx.widths = kind, [x.shape[-1] for x in xs]
        ctx.outputs = [split, len(weight) - split] if split else [len(weight)]
        columns = weight.split(ctx.widths, 1)
        parts = [
            _multiply(_quantized(x, kind), part.T, scale)
            for x, part in zip(xs, columns, strict=True)
        ]
        return _sum(parts).view(*xs[0].shape[:-1], -1).to(xs[0].dtype)

    @staticmethod
    def backward(ctx, dy):
        weight, scale = ctx.saved_tensors
        transposed = weight.T.contiguous()  # 8-bit products take their right operand by columns
        pieces = (dy.split(ctx.outputs, -1), scale.split(ctx.outputs))
        pieces += (transposed.split(ctx.outputs, 1),)
        ones = scale.new_ones(weight.shape[1])
        parts = [
            _multiply(_quantized(piece * channel, ctx.kind), columns.T, ones)
            for piece, channel, columns in zip(*pieces, strict=True)
        ]
        dx = _sum(parts).view(*dy.shape[:-1], -1).to(dy.dtype)
        return None, None, None, None, *dx.split(ctx.widths, -1)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _quantized(x: Tensor, kind: str) -> QuantizedRows:
    v = x.flatten(0, -2).float()
    return quantize_reference(v, v.abs().amax(-1), kind)


def _multiply(rows: QuantizedRows, right: Tensor, scale: Tensor) -> Tensor:
    """[M, K] rows · right [K, N] · scale fp32 [N]; right's columns lie one after the other."""
    if rows.kind == "int8":
        return torch._int_mm(rows.values, right) * rows.scale[:, None] * scale
    scales = (rows.scale[:, None], scale[None])
    dtype = torch.bfloat16
    return torch._scaled_mm(rows.values, right, *scales, out_dtype=dtype, use_fast_accum=False)
