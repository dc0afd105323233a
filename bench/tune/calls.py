"""The launches that tiles are timed on: a problem's tensors, one launch over them, its reference.

Inputs are N(0, 1), weights N(0, 1/K), one batch of M tokens. A linear has the inputs, outputs,
parts, gate and residual that it has in the model: each adds to the kernel that is compiled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.gemm import dense, eight_bit, grads
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.gemm.linear_dense import update_gradients
from fluxfast_kernels.ops import attention, qk_norm_rope
from fluxfast_kernels.ops.attention import QKV, attention_backward, attention_forward
from fluxfast_kernels.quant import frozen, nf4
from fluxfast_kernels.quant.rows import empty_rows, quantize_rows, quantize_rows_reference
from torch import Tensor

from bench.errors import compare
from bench.tune.problems import MATMUL_DTYPE, Problem
from bench.tune.space import ATTENTION
from fluxfast.model.names import linear_shape, part_rows
from fluxfast.model.spec import FluxSpec

HALF = torch.bfloat16
# error allowed against fp32: of the norm, and of the largest value. One rounding to bf16 is 2^-9;
# a tile that is missing from a product of 128 is 2^-3.5 of the norm.
ALLOWED_NORM, ALLOWED_VALUE = 2**-7, 2**-5


@dataclass
class Call:
    """run(tile) launches once and overwrites `written`; results() reads the values from there, and
    reference() computes them in fp32. read: the operands, of LoRA's skinny products."""

    run: Callable[[object], object]
    written: list[Tensor]
    reference: Callable[[], list[Tensor]]
    results: Callable[[], list[Tensor]] | None = None  # None: `written` itself
    read: Sequence[Tensor] = ()

    def error(self, tile, reference: list[Tensor]) -> str | None:
        """Launches with the tile and returns what is wrong with the results, or None."""
        for tensor in self.written:  # what the launch leaves out shows
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        self.run(tile)
        return disagreement(self.results() if self.results else self.written, reference)


def disagreement(results: list[Tensor], reference: list[Tensor]) -> str | None:
    """The first result that is too far from its reference, in words, or None."""
    truth = {f"result {i}": tensor.float() for i, tensor in enumerate(reference)}
    allowed = dict.fromkeys(truth, (ALLOWED_NORM, ALLOWED_VALUE))
    return compare(dict(zip(truth, results, strict=True)), truth, allowed)[0]


class LinearTensors:
    """A problem's linear of the model, its update, and M rows of its inputs and gradients."""

    def __init__(self, problem: Problem, spec: FluxSpec, rank: int, device: str):
        linear, self.M, self.device = problem.linear, problem.M, torch.device(device)
        self.N, self.K = linear_shape(linear, spec)
        self.matmul = "" if problem.kernel.dtype == "half" else problem.kernel.dtype
        self._generator = torch.Generator(self.device).manual_seed(0)
        D, F = spec.hidden_size, spec.mlp_hidden
        self.inputs = [D, F] if linear.endswith("linear2") else [self.K]
        self.outputs = [3 * D, F] if linear.endswith("linear1") else [self.N]
        self.xs = [self.normal(1, self.M, width) for width in self.inputs]
        self.dys = [self.normal(1, self.M, width) for width in self.outputs]
        gate = residual = None
        if linear.endswith(("proj", "mlp.2", "linear2")):
            gate, residual = self.normal(1, 1, self.N), self.normal(1, self.M, self.N)
        self.epilogue = Epilogue(gate, residual, self.outputs[0] if len(self.outputs) == 2 else 0)
        rows = part_rows(linear, spec)
        parts = sum(([start, end, i] for i, (start, end) in enumerate(rows)), [])
        lora_a = self.normal(len(rows) * rank, self.K, std=self.K**-0.5, dtype=torch.float32)
        lora_b = self.normal(self.N, rank, std=0.1, dtype=torch.float32)
        self.update = LoRAUpdate(lora_a, lora_b, parts)
        tensors = [self.normal(self.N, self.K, std=self.K**-0.5)]
        if problem.kernel.storage == "nf4":
            tensors = list(nf4.nf4_quantize(tensors[0]).tensors().values())
        self.weight = frozen.FrozenWeight(tensors, self.normal(self.N), self.matmul)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype = HALF) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=self.device)
        return values.normal_(0.0, std, generator=self._generator)

    def empty(self, widths: list[int]) -> list[Tensor]:
        return [torch.empty(1, self.M, width, dtype=HALF, device=self.device) for width in widths]

    def weight_in_8bit(self, transposed: bool = False) -> frozen.QuantizedWeight:
        tensors = self.weight.tensors
        if len(tensors) > 1:
            return frozen.nf4_with_scales(tensors, self.N, self.K, self.matmul)
        weight = frozen.weight_in_8bit(tensors, self.K, self.matmul, transposed)
        return weight._replace(values=weight.values.clone())  # they lie in the scratch

    def reference(self, pass_name: str) -> list[Tensor]:
        """The results of a pass in plain torch and fp32."""
        xs, dys = [x.float() for x in self.xs], [dy.float() for dy in self.dys]
        with patch.object(backend, "launches", lambda tensor: False):
            if pass_name == "down":
                return [torch.cat(xs, -1)[0] @ self.update.lora_a.T]
            if pass_name == "product":
                gate, residual, split = self.epilogue
                if gate is not None:
                    gate, residual = gate.float(), residual.float()
                epilogue = Epilogue(gate, residual, split)
                return linear_forward(xs, self.weight, self.update, epilogue)
            if pass_name == "dx":
                return linear_backward(dys, xs, self.weight, self.update, True)[0]
            da, db, d_down = update_gradients(xs, dys, self.update)
        return [{"dA": da, "dB": db, "d_down": d_down}[pass_name]]


def _product(t: LinearTensors) -> Call:
    ys = t.empty(t.outputs)
    after = (t.reference("down")[0].to(HALF), t.update, t.epilogue, ys)
    run = partial(dense.lora_gemm, t.xs, t.weight, *after)
    if t.matmul:
        rows = [quantize_rows(x, t.matmul)[0] for x in t.xs]
        weight = (t.weight_in_8bit(), HALF, t.weight.bias)
        run = partial(eight_bit.gemm_8bit, rows, *weight, *after)
    return Call(run, ys, lambda: t.reference("product"))


def _dx(t: LinearTensors, op: str) -> Call:
    dxs = t.empty(t.inputs)
    update = (t.reference("d_down")[0].to(HALF), t.update.lora_a, t.inputs)
    run = partial(dense.lora_gemm_dx, t.dys, t.weight, *update, dxs)
    if t.matmul:
        question = (dispatch.arch_of(t.device), MATMUL_DTYPE[t.matmul], "dense", t.M, t.K, t.N)
        weight = t.weight_in_8bit(transposed=not dispatch.choose(op, *question).fused)
        pieces = zip(t.dys, weight.scale.split(t.outputs), strict=True)
        rows = [quantize_rows(dy, t.matmul, part.contiguous())[0] for dy, part in pieces]
        run = partial(eight_bit.gemm_8bit_dx, rows, weight, *update, HALF, HALF, dxs)
    return Call(run, dxs, lambda: t.reference("dx"))


def _skinny(t: LinearTensors, pass_name: str, with_rows: bool) -> Call:
    """down, d_down or "d_down without channel", with the 8-bit rows that it writes on its way:
    linear2's second input has its own already."""
    pass_name, _, without = pass_name.partition(" without ")
    inputs = t.dys if pass_name == "d_down" else t.xs
    quantized = (inputs if pass_name == "d_down" else inputs[:1]) if with_rows else []
    rows = [empty_rows(x, "int8") for x in quantized]
    out = torch.empty(t.M, len(t.update.lora_a), dtype=HALF, device=t.device)
    if pass_name == "d_down":
        channel = torch.rand(t.N, device=t.device) + 0.5 if rows and not without else None
        weight = t.update.lora_b
        run = partial(grads.lora_d_down, inputs, t.update, out, rows=rows, channel=channel)
    else:
        channel, weight = None, t.update.lora_a
        run = partial(grads.lora_down, inputs, t.update.lora_a, out, rows=rows)

    def reference() -> list[Tensor]:
        channels = [None] * len(rows) if channel is None else channel.split(t.outputs)
        pairs = zip(quantized, channels, strict=True)
        truth = [quantize_rows_reference(x, "int8", part).dequantize() for x, part in pairs]
        return t.reference(pass_name) + truth

    def results() -> list[Tensor]:
        return [out, *(row.dequantize() for row in rows)]

    written = [out, *(tensor for row in rows for tensor in (row.values, row.scale))]
    return Call(run, written, reference, results, [*inputs, weight])


def _gradient(t: LinearTensors, pass_name: str) -> Call:
    if pass_name == "dA":
        out, d_down = torch.empty_like(t.update.lora_a), t.reference("d_down")[0].to(HALF)
        run = partial(grads.lora_da, t.xs, d_down, out)
    else:
        out, down = torch.empty_like(t.update.lora_b), t.reference("down")[0].to(HALF)
        run = partial(grads.lora_db, t.dys, down, t.update, out)
    return Call(run, [out], lambda: t.reference(pass_name))


class Heads:
    """q, k, v and do [1, H, T, C], stored [1, T, H, C], and attention's output for them."""

    def __init__(self, T: int, heads: int, C: int, device: str):
        generator = torch.Generator(device).manual_seed(0)
        values = torch.empty(4, 1, T, heads, C, dtype=HALF, device=device)
        self.qkv_do = values.normal_(generator=generator).transpose(2, 3).unbind()
        *qkv, self.do = self.qkv_do
        self.qkv = QKV(*qkv)
        self.o, self.lse = attention_forward(*self.qkv)

    def reference(self) -> list[Tensor]:
        """[o, lse, dq, dk, dv] in fp32."""
        q, k, v, do = (x.float() for x in self.qkv_do)
        o, lse = attention_forward(q, k, v)
        return [o, lse, *attention_backward(do, q, k, v, o, lse)]


def _attention(kernel: str, T: int, heads: int, C: int, device: str) -> Call:
    h = Heads(T, heads, C, device)
    o, dq, dk, dv = (torch.empty_like(h.o) for _ in range(4))
    lse, delta_out = torch.empty_like(h.lse), torch.empty_like(h.lse)  # dq's kernel makes delta
    delta = (h.o.float() * h.do.float()).sum(-1)
    if kernel == "forward":
        run = partial(attention.launch_forward, h.qkv, o, lse)
        return Call(run, [o, lse], lambda: h.reference()[:2])
    if kernel == "dq":
        run = partial(attention.launch_dq, h.do, h.qkv, h.o, h.lse, dq, delta_out)
        return Call(run, [dq, delta_out], lambda: [h.reference()[2], delta])
    run = partial(attention.launch_dkdv, h.do, h.qkv, h.lse, delta, dk, dv)
    return Call(run, [dk, dv], lambda: h.reference()[3:])


def _qk_norm_rope(T: int, heads: int, C: int, device: str) -> Call:
    """Forward and backward, as both have one tile."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=HALF):
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    qkv, scales = [normal(1, T, 3 * heads * C)], [normal(C), normal(C)]
    angle = normal(1, T, 1, C // 2, dtype=torch.float32)
    streams = qk_norm_rope.Streams(qkv, scales, angle.cos(), angle.sin(), heads)
    gradients = QKV(*(normal(1, T, heads, C) for _ in range(3)))
    q, k, dqkv = *(torch.empty_like(gradients[0]) for _ in range(2)), torch.empty_like(qkv[0])

    def run(tile) -> None:
        qk_norm_rope.launch_forward(streams, q, k, None, tile)
        qk_norm_rope.launch_backward(gradients, streams, [dqkv], tile)

    def reference() -> list[Tensor]:
        forward = qk_norm_rope.qk_norm_rope_reference(*streams)[:2]
        return [*forward, *qk_norm_rope.qk_norm_rope_backward_reference(gradients, streams)]

    return Call(run, [q, k, dqkv], reference)


def build(problem: Problem, spec: FluxSpec, rank: int, device: str) -> Call:
    """The launch of a problem."""
    op, pass_name = problem.kernel.op, problem.pass_name
    if op in ATTENTION:
        shape = (problem.M, problem.N, problem.K, device)
        return _qk_norm_rope(*shape) if op == "qk_norm_rope" else _attention(op, *shape)
    tensors = LinearTensors(problem, spec, rank, device)
    if pass_name == "product":
        return _product(tensors)
    if pass_name == "dx":
        return _dx(tensors, op)
    if op == "lora_grads":
        return _gradient(tensors, pass_name)
    return _skinny(tensors, pass_name.removesuffix(" again"), op.endswith("_8bit"))
