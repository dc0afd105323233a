"""Random cases of the three fused linears, in x's dtype and in 8 bits, and what they must equal."""

from copy import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from fluxfast_kernels import FrozenWeight, LoRAUpdate
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.ops import gelu
from fluxfast_kernels.ops import norm_modulate as norm
from fluxfast_kernels.ops.lora_linear import lora_linear, lora_linear_reference
from fluxfast_kernels.quant import frozen, nf4
from numerics import assert_as_exact, outputs_and_gradients

B, T, K, N = 2, 5, 128, 144
BF16, FP16 = torch.bfloat16, torch.float16
TWO_A = (0, 48, 1, 64, 144, 0)  # rows 48 to 64 have no update


@dataclass(frozen=True)
class Case:
    """op: "linear", "norm" or "gelu". head: columns of gelu's input that are not gelu(u)."""

    op: str
    matmul: str = ""
    storage: str = "dense"
    rotation: int = 0
    dtype: torch.dtype = torch.float32
    parts: tuple[int, ...] = TWO_A
    rank: int = 4
    gate: bool = False
    bias: bool = True
    head: int = 0
    split: int = 0
    saved_bits: int = 16


def case(op, **options):
    name = " ".join([op, *(str(v) for v in options.values())]).replace("torch.", "")
    return pytest.param(Case(op, **options), id=name)


IN_8_BITS = [
    case("linear", matmul="int8"),
    case("linear", matmul="int8", storage="int8", gate=True, rotation=64),
    case("linear", matmul="int8", storage="nf4", gate=True, dtype=BF16),
    case("linear", matmul="int8", storage="nested", rotation=32, dtype=FP16, parts=(0, 144, 0)),
    case("linear", matmul="fp8", storage="fp8", parts=(), gate=True),
    case("linear", matmul="fp8", storage="nf4", rotation=128, dtype=BF16, parts=(0, 70, 0)),
    case("linear", matmul="int8", storage="int8", parts=(), bias=False, dtype=FP16, rotation=16),
    case("norm", matmul="int8", storage="int8", split=80),
    case("norm", matmul="int8", storage="int8", split=48, dtype=BF16, rotation=128),
    case("norm", matmul="int8", storage="nested", dtype=FP16, parts=(0, 72, 0, 72, 144, 0)),
    case("norm", matmul="fp8", storage="fp8", rotation=16, dtype=BF16, parts=()),
    case("norm", matmul="int8", storage="nf4", rotation=64, parts=(), split=16),
    case("gelu", matmul="int8", storage="int8", gate=True, head=48),
    case("gelu", matmul="int8", storage="int8", head=64, gate=True, dtype=BF16, rotation=64),
    case("gelu", matmul="int8", storage="nf4", dtype=FP16, rotation=32, parts=()),
    case("gelu", matmul="int8", storage="nested", head=64, parts=(), gate=True, rotation=64),
    case("gelu", matmul="fp8", storage="fp8", head=64, dtype=BF16, rotation=32),
]


class Problem:
    """A case's arguments. Every value is exact in its dtype."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, std=1.0):
            return std * torch.randn(*shape, generator=generator)

        W = frozen.rotate_weight(normal(N, K, std=K**-0.5), case.rotation)
        if case.storage == "dense":
            self.weight = [W.to(case.dtype)]
        elif case.storage in ("nf4", "nested"):
            self.weight = list(nf4.nf4_quantize(W, case.storage == "nested").tensors().values())
        else:
            self.weight = list(frozen.quantize_8bit(W, case.storage))
        self.weight = [part.to(device) for part in self.weight]

        def tokens(width, of=0):
            """One stream's tokens of a joint tensor, in wider rows."""
            return normal(B, T + 3, width + 8)[:, 3:, :width].add(of).to(device, case.dtype)

        self.leaves = {}
        if case.op == "linear":
            self.leaves["x"] = tokens(K)
        elif case.op == "norm":
            self.leaves["h"] = tokens(K, of=0.5)
            modulation = normal(B, 1, 3 * K, std=0.5).to(device, case.dtype).chunk(3, -1)
            self.leaves["shift"], self.leaves["scale"] = modulation[:2]
        else:
            self.leaves["u"] = tokens(K - case.head, of=-0.5)
            if case.head:
                self.leaves["head"] = tokens(case.head)
        if case.parts:
            a_count, b_rows = (
                1 + max(case.parts[2::3]),
                sum(case.parts[1::3]) - sum(case.parts[::3]),
            )
            a = normal(a_count * case.rank, K, std=K**-0.5)
            b = normal(b_rows, case.rank, std=0.3)
            self.leaves["lora_a"] = a.to(device, case.dtype).float()
            self.leaves["lora_b"] = b.to(device, case.dtype).float()
        self.gate = None
        if case.gate:
            self.leaves["residual"] = tokens(N)
            self.gate = normal(B, 1, 3 * N).to(device, case.dtype).chunk(3, -1)[1]
        self.bias = normal(N).to(device, case.dtype) if case.bias else None
        self.dys = self.cut(tokens(N))
        self.x = self.linear_input()

    def cut(self, y):
        """y [B, T, N] as the op's one or two outputs."""
        return list(y.tensor_split([self.case.split] if self.case.split else [], -1))

    @torch.no_grad()
    def linear_input(self):
        """What norm or gelu makes of its input for the linear."""
        leaves = self.leaves
        if self.case.op == "norm":
            return norm.norm_modulate_forward(leaves["h"], leaves["shift"], leaves["scale"])[0]
        return gelu.gelu_forward(leaves["u"]) if self.case.op == "gelu" else leaves["x"]

    def with_leaves(self, **leaves):
        """The same problem with other inputs."""
        changed = copy(self)
        changed.leaves = self.leaves | leaves
        changed.x = changed.linear_input()
        return changed

    def call(self, leaves):
        """The op's outputs, as a list."""
        case, get = self.case, leaves.get
        linear = self.frozen(self.bias), self.update(leaves)
        gated = {"gate": self.gate, "residual": get("residual")}
        if case.op == "norm":
            inputs = (leaves["h"], leaves["shift"], leaves["scale"])
            ys = norm.norm_modulate_lora_linear(*inputs, *linear, split=case.split)
            return list(ys) if case.split else [ys]
        if case.op == "gelu":
            gated |= {"head": get("head"), "saved_bits": case.saved_bits}
            return [gelu.gelu_lora_linear(leaves["u"], *linear, **gated)]
        return [lora_linear(leaves["x"], *linear, **gated)]

    def frozen(self, bias):
        return FrozenWeight(self.weight, bias, self.case.matmul, self.case.rotation)

    def update(self, leaves):
        if not self.case.parts:
            return None
        return LoRAUpdate(leaves["lora_a"], leaves["lora_b"], list(self.case.parts), 0.5)

    def reference(self, leaves):
        """The same by `lora_linear_reference` of `linear_input`'s value, with norm's or gelu's
        gradient: another rounding of it may move over a tie, to another 8-bit value."""
        xs = [leaves.get("x")]
        if self.case.op == "norm":
            x = norm.norm_modulate_reference(leaves["h"], leaves["shift"], leaves["scale"])
            xs = [_At.apply(x, self.x)]
        elif self.case.op == "gelu":
            x = _At.apply(F.gelu(leaves["u"], approximate="tanh"), self.x)
            xs = [leaves["head"], x] if self.case.head else [x]
        linear, gate = self.reference_arguments(leaves)
        y = lora_linear_reference(xs, *linear, gate, leaves.get("residual"), self.case.split)
        return self.cut(y)

    def public_reference(self, leaves):
        """The same by the op's own reference."""
        linear, gate = self.reference_arguments(leaves)
        if self.case.op == "norm":
            inputs = (leaves["h"], leaves["shift"], leaves["scale"])
            ys = norm.norm_modulate_lora_linear_reference(*inputs, *linear, self.case.split)
            return list(ys) if self.case.split else [ys]
        gated = (leaves.get("head"), gate, leaves.get("residual"))
        return [gelu.gelu_lora_linear_reference(leaves["u"], *linear, *gated)]

    def reference_arguments(self, leaves):
        """Weight and update, and the gate, in the dtype of the leaves."""
        dtype = next(iter(leaves.values())).dtype
        bias, gate = (None if t is None else t.to(dtype) for t in (self.bias, self.gate))
        return (self.frozen(bias), self.update(leaves)), gate

    def gradients(self, function=None, dtype=None):
        """{"y0": ..., "x": ...}: outputs, and the gradient of every leaf, all cast to `dtype`."""
        function, names = function or self.call, list(self.leaves)

        def of_tensors(*leaves):
            return function(dict(zip(names, leaves, strict=True)))

        leaves = list(self.leaves.values())
        results = outputs_and_gradients(of_tensors, leaves, self.dys, dtype)
        outputs = [f"y{i}" for i in range(len(self.dys))]
        return dict(zip(outputs + names, results, strict=True))


class _At(torch.autograd.Function):
    """`value` in x's place, with x's gradient."""

    @staticmethod
    def forward(ctx, x, value):
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx, dx):
        return dx, None


def check_against_truth(problem: Problem, results: dict, reference=None) -> None:
    """At most twice the error of the same reference run in the dtype. In 8 bits its sums are fp64
    and its roundings more (each of bias, update, gate and residual rounds).

    8 bits in fp32 with a rotation four times: dx is rotated back in fp32, which rounds once a
    stage, seven times for 64 columns; the reference's in fp64. e4m3 on a GPU, judged in 16 bits
    alone, four times: tensor cores keep 13 bits of a sum and cut it 128 / 32 times, 4 · 2^-13 of
    its largest beside 2^-9 of one rounding in bf16 and 2^-12 in fp16."""
    case, reference = problem.case, reference or problem.reference
    times = 4.0 if case.rotation and case.dtype == torch.float32 else 2.0
    times = 4.0 if case.matmul == "fp8" and problem.device == "cuda" else times
    with backend.cpu_launches(False):
        truth = problem.gradients(reference, torch.float64)
        eager = problem.gradients(reference, case.dtype)
    for name, value in results.items():
        # A's and B's gradients come in fp32 from products of the dtype: judged as that
        assert_as_exact(name, value.to(case.dtype), eager[name], truth[name], times)
