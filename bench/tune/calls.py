"""The launches that tiles are timed on: a problem's tensors, one launch over them, and what it must
give.

Inputs are N(0, 1), weights N(0, 1/K), one batch of M tokens. A linear has the inputs, outputs,
parts, gate and residual that it has in the model: each adds to the kernel that is compiled.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.gemm import dense as gemm
from fluxfast_kernels.gemm import eight_bit as gemm_8bit
from fluxfast_kernels.gemm import grads as gemm_grads
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate
from fluxfast_kernels.ops import attention, qk_norm_rope
from fluxfast_kernels.ops.attention import QKV, attention_backward, attention_forward
from fluxfast_kernels.quant import frozen, nf4
from fluxfast_kernels.quant import rows as rows_8bit
from torch import Tensor

from bench.tune.problems import PRODUCT_DTYPE, HandOver, Problem
from bench.tune.space import ATTENTION
from fluxfast.model.names import linear_shape, part_rows
from fluxfast.model.spec import FluxSpec

HALF = torch.bfloat16
# how far a result may be from the fp32 reference: of its norm, and a value of the largest. One
# rounding to bf16 is 2^-9; a tile that is missing from a product of 128 is 2^-3.5 of the norm.
ALLOWED_NORM, ALLOWED_VALUE = 2**-7, 2**-5


@dataclass
class Call:
    """run(tile) launches once and overwrites `written`; results() are what that says, reference()
    what it must."""

    run: Callable[[object], object]
    written: list[Tensor]
    reference: Callable[[], list[Tensor]]
    results: Callable[[], list[Tensor]] | None = None  # None: `written` itself

    def wrong(self, tile, reference: list[Tensor]) -> str | None:
        """What is wrong with what a tile gives, or None. What it does not write shows."""
        for tensor in self.written:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        self.run(tile)
        return disagreement(self.results() if self.results else self.written, reference)


def disagreement(found: list[Tensor], reference: list[Tensor]) -> str | None:
    """What is wrong with a call's results, or None."""
    for i, (one, truth) in enumerate(zip(found, reference, strict=True)):
        one, truth = one.float(), truth.float()
        if not torch.isfinite(one).all():
            return f"result {i} is not finite"
        difference = one - truth
        error = float(difference.norm() / truth.norm())
        if error > ALLOWED_NORM:
            return f"result {i} differs by {error:.1e} of its norm, allowed {ALLOWED_NORM:.1e}"
        worst = float(difference.abs().max() / truth.abs().max())
        if worst > ALLOWED_VALUE:
            return f"a value of result {i} differs by {worst:.1e}, allowed {ALLOWED_VALUE:.1e}"
    return None


class Tensors:
    """A linear of the model with M rows before and behind it."""

    def __init__(
        self, linear: str, M: int, storage: str, dtype: str, spec: FluxSpec, rank: int, device
    ):
        self.M, self.rank, self.device = M, rank, torch.device(device)
        self.N, self.K = linear_shape(linear, spec)
        self.dtype = dtype
        self._generator = torch.Generator(self.device).manual_seed(0)
        D, F = spec.hidden_size, spec.mlp_hidden
        self.inputs = [D, F] if linear.endswith("linear2") else [self.K]
        self.outputs = [3 * D, F] if linear.endswith("linear1") else [self.N]
        rows = part_rows(linear, spec)
        self.parts = sum(([start, end, i] for i, (start, end) in enumerate(rows)), [])
        self.indices = len(rows)
        self.gate = self.residual = None
        if linear.endswith(("proj", "mlp.2", "linear2")):
            self.gate, self.residual = self.normal(1, 1, self.N), self.normal(1, M, self.N)
        self.bias = self.normal(self.N)
        self.xs = [self.normal(1, M, width) for width in self.inputs]
        self.dys = [self.normal(1, M, width) for width in self.outputs]
        self.down = self.normal(M, self.indices * rank)
        self.lora_a = self.normal(
            self.indices * rank, self.K, std=self.K**-0.5, dtype=torch.float32
        )
        self.lora_b = self.normal(self.N, rank, std=0.1, dtype=torch.float32)
        dense = self.normal(self.N, self.K, std=self.K**-0.5)
        self.weight = [dense]
        if storage == "nf4":
            self.weight = list(nf4.nf4_quantize(dense).tensors().values())

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype = HALF) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=self.device)
        return values.normal_(0.0, std, generator=self._generator)

    def empty(self, widths: list[int], dtype: torch.dtype = HALF) -> list[Tensor]:
        return [torch.empty(1, self.M, width, dtype=dtype, device=self.device) for width in widths]

    @property
    def frozen_weight(self) -> frozen.FrozenWeight:
        matmul = "" if self.dtype == "half" else self.dtype
        return frozen.FrozenWeight(self.weight, self.bias, matmul)

    @property
    def update(self) -> LoRAUpdate:
        return LoRAUpdate(self.lora_a, self.lora_b, self.parts)

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.gate, self.residual, self.outputs[0] if len(self.outputs) == 2 else 0)

    def in_8_bits(self) -> frozen.QuantizedWeight:
        """The weight [N, K] and its scales [N]."""
        weight = frozen.weight_in_8bit(self.weight, self.K, self.dtype)
        return weight._replace(values=weight.values.clone())

    def updated(self, y: Tensor) -> list[Tensor]:
        """y [M, N] fp32 of the product alone -> the outputs of the forward op."""
        y += self.bias.float()
        up = self.lora_b.to(HALF).float()
        for i, (start, end) in enumerate(zip(self.parts[::3], self.parts[1::3], strict=True)):
            down = self.down[:, i * self.rank : (i + 1) * self.rank].float()
            y[:, start:end].addmm_(down, up[start:end].T)
        if self.gate is not None:
            y = self.residual[0].float() + self.gate[0].float() * y
        return list(y[None].split(self.outputs, -1))


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    """[1, M, width] each -> fp32 [M, sum of the widths]."""
    return torch.cat([tensor[0].float() for tensor in tensors], -1)


def _product(t: Tensors) -> Call:
    ys = t.empty(t.outputs)
    after = (t.down, t.update, t.epilogue, ys)
    if t.dtype == "half":
        return Call(
            lambda tile: gemm.lora_gemm(t.xs, t.frozen_weight, *after, tile),
            ys,
            lambda: t.updated(
                _side_by_side(t.xs) @ frozen.dequantize(t.weight, t.K, torch.float32).T
            ),
        )
    rows = [rows_8bit.quantize_rows(x, t.dtype)[0] for x in t.xs]
    dense = weight = t.in_8_bits()
    if len(t.weight) > 1:
        weight = frozen.nf4_with_scales(t.weight, t.N, t.K, t.dtype)

    def reference() -> list[Tensor]:
        y = 0
        for row, columns in zip(rows, dense.values.split(t.inputs, 1), strict=True):
            part = rows_8bit.multiply_8bit(row.flat().values, columns.T)
            y = y + part * dense.scale * row.flat().scale[:, None]
        return t.updated(y)

    return Call(
        lambda tile: gemm_8bit.gemm_8bit(rows, weight, HALF, t.bias, *after, tile), ys, reference
    )


def _dx(t: Tensors, op: str) -> Call:
    dxs = t.empty(t.inputs)
    update = t.down.float() @ t.lora_a.to(HALF).float()
    if t.dtype == "half":

        def reference() -> list[Tensor]:
            dx = _side_by_side(t.dys) @ frozen.dequantize(t.weight, t.K, torch.float32)
            return list((dx + update)[None].split(t.inputs, -1))

        given = (t.dys, t.frozen_weight, t.down, t.lora_a, t.inputs, dxs)
        return Call(lambda tile: gemm.lora_gemm_dx(*given, tile), dxs, reference)
    dense = weight = t.in_8_bits()
    pieces = zip(t.dys, dense.scale.split(t.outputs), strict=True)
    rows = [rows_8bit.quantize_rows(dy, t.dtype, part.contiguous())[0] for dy, part in pieces]
    if len(t.weight) > 1:
        weight = frozen.nf4_with_scales(t.weight, t.N, t.K, t.dtype)
    else:
        question = (dispatch.arch_of(t.device), PRODUCT_DTYPE[t.dtype], "dense", t.M, t.K, t.N)
        if not dispatch.choose(op, *question).fused:
            weight = dense._replace(values=dense.values.T.contiguous(), transposed=True)

    def reference_8bit() -> list[Tensor]:
        dx = update.clone()
        for row, part in zip(rows, dense.values.split(t.outputs), strict=True):
            row = row.flat()
            dx += rows_8bit.multiply_8bit(row.values, part) * row.scale[:, None]
        return list(dx[None].split(t.inputs, -1))

    given = (rows, weight, t.down, t.lora_a, t.inputs, HALF)
    return Call(
        lambda tile: gemm_8bit.gemm_8bit_dx(*given, out=dxs, tile=tile), dxs, reference_8bit
    )


def _skinny(t: Tensors, what: str, with_rows: bool) -> Call:
    """down or d_down; with rows of all that another op made: linear2's second input has its own."""
    out = torch.empty_like(t.down)
    inputs = t.dys if what == "d_down" else t.xs
    made = [rows_8bit.empty_rows(x, "int8") if with_rows else None for x in inputs]
    if what != "d_down":
        made[1:] = [None] * (len(made) - 1)
    rows = made if with_rows else None
    filled = [(x, row) for x, row in zip(inputs, made, strict=True) if row is not None]
    channel = torch.rand(t.N, device=t.device) + 0.5

    def run(tile) -> None:
        if what == "d_down":
            given = (out, tile, rows, channel if with_rows else None)
            gemm_grads.lora_d_down(inputs, t.update, *given)
        else:
            gemm_grads.lora_down(inputs, t.lora_a, out, tile, rows)

    def reference() -> list[Tensor]:
        x = _side_by_side(inputs)
        if what == "d_down":
            up = t.lora_b.to(HALF).float()
            ranges = zip(t.parts[::3], t.parts[1::3], strict=True)
            found = [torch.cat([x[:, a:b] @ up[a:b] for a, b in ranges], 1)]
            channels = channel.split(t.outputs)
        else:
            found = [x @ t.lora_a.to(HALF).float().T]
            channels = [None] * len(inputs)
        for (y, _), part in zip(filled, channels, strict=False):
            found.append(rows_8bit.quantize_rows_reference(y, "int8", part).dequantize())
        return found

    def results() -> list[Tensor]:
        return [out, *(row.dequantize() for _, row in filled)]

    written = [out, *(tensor for _, row in filled for tensor in (row.values, row.scale))]
    return Call(run, written, reference, results)


def _grads(t: Tensors, what: str) -> Call:
    out = torch.empty_like(t.lora_a if what == "dA" else t.lora_b)
    if what == "dA":
        return Call(
            lambda tile: gemm_grads.lora_da(t.xs, t.down, out, tile),
            [out],
            lambda: [t.down.float().T @ _side_by_side(t.xs)],
        )

    def reference() -> list[Tensor]:
        dy, down = _side_by_side(t.dys), t.down.float().split(t.rank, 1)
        ranges = zip(t.parts[::3], t.parts[1::3], down, strict=True)
        return [torch.cat([dy[:, a:b].T @ part for a, b, part in ranges])]

    return Call(
        lambda tile: gemm_grads.lora_db(t.dys, t.down, t.update, out, tile),
        [out],
        reference,
    )


class Heads:
    """q, k, v and do [1, H, T, C], stored [1, T, H, C], and what attention gives for them."""

    def __init__(self, T: int, heads: int, C: int, device):
        generator = torch.Generator(device).manual_seed(0)
        values = torch.empty(4, 1, T, heads, C, dtype=HALF, device=device)
        self.qkv_do = values.normal_(generator=generator).transpose(2, 3).unbind()
        *qkv, self.do = self.qkv_do
        self.qkv = QKV(*qkv)
        self.o, self.lse = attention_forward(*self.qkv)

    def truth(self) -> tuple[list[Tensor], list[Tensor]]:
        """-> [o, lse], [dq, dk, dv] of the same in fp32."""
        q, k, v, do = (x.float() for x in self.qkv_do)
        o, lse = attention_forward(q, k, v)
        return [o, lse], list(attention_backward(do, q, k, v, o, lse))


def _attention(kernel: str, T: int, heads: int, C: int, device) -> Call:
    h = Heads(T, heads, C, device)
    o, lse = torch.empty_like(h.o), torch.empty_like(h.lse)
    dq, dk, dv = (torch.empty_like(h.o) for _ in range(3))
    delta = (h.o.float() * h.do.float()).sum(-1)
    if kernel == "forward":
        return Call(
            lambda tile: attention.launch_forward(h.qkv, o, lse, tile),
            [o, lse],
            lambda: h.truth()[0],
        )
    if kernel == "dq":
        made = torch.empty_like(delta)  # written beside dq
        return Call(
            lambda tile: attention.launch_dq(h.do, h.qkv, h.o, h.lse, dq, made, tile),
            [dq, made],
            lambda: [h.truth()[1][0], delta],
        )
    return Call(
        lambda tile: attention.launch_dkdv(h.do, h.qkv, h.lse, delta, dk, dv, tile),
        [dk, dv],
        lambda: h.truth()[1][1:],
    )


def _qk_norm_rope(T: int, heads: int, C: int, device) -> Call:
    """Forward and backward, as both have one tile."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=HALF):
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    qkv, scales = [normal(1, T, 3 * heads * C)], [normal(C), normal(C)]
    angle = normal(1, T, 1, C // 2, dtype=torch.float32)
    streams = qk_norm_rope.Streams(qkv, scales, angle.cos(), angle.sin(), heads)
    grads = QKV(*(normal(1, T, heads, C) for _ in range(3)))
    q, k, dqkv = *(torch.empty_like(grads[0]) for _ in range(2)), torch.empty_like(qkv[0])

    def run(tile) -> None:
        qk_norm_rope.launch_forward(streams, q, k, None, tile)
        qk_norm_rope.launch_backward(grads, streams, [dqkv], tile)

    def reference() -> list[Tensor]:
        forward = qk_norm_rope.qk_norm_rope_reference(*streams)[:2]
        return [*forward, *qk_norm_rope.qk_norm_rope_backward_reference(grads, streams)]

    return Call(run, [q, k, dqkv], reference)


def tensors_of(problem: Problem | HandOver, M: int, spec: FluxSpec, rank: int, device) -> Tensors:
    kernel = problem.kernel
    return Tensors(problem.linear, M, kernel.storage, kernel.dtype, spec, rank, device)


def build(problem: Problem, spec: FluxSpec, rank: int, device: str) -> Call:
    """The launch that a problem stands for."""
    op, what = problem.kernel.op, problem.what
    if op in ATTENTION:
        shape = (problem.M, problem.N, problem.K, device)
        return _qk_norm_rope(*shape) if op == "qk_norm_rope" else _attention(op, *shape)
    t = tensors_of(problem, problem.M, spec, rank, device)
    if what == "product":
        return _product(t)
    if what == "dx":
        return _dx(t, op)
    return _grads(t, what) if op == "lora_grads" else _skinny(t, what, op.endswith("_8bit"))
