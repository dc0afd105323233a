"""Random cases of the three fused linears in 8-bit products, and what they must equal."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fluxfast_kernels import FrozenWeight, LoRAUpdate
from fluxfast_kernels.ops import gelu
from fluxfast_kernels.ops import norm_modulate as norm
from fluxfast_kernels.ops.lora_linear import lora_linear, lora_linear_reference
from fluxfast_kernels.quant import frozen, nf4

B, T, K, N, R = 2, 5, 128, 144, 4
TWO_A = (0, 48, 1, 64, 144, 0)  # rows 48 to 64 have no update


@dataclass(frozen=True)
class Case:
    """op: "linear", "norm" or "gelu". head: columns of gelu's input that are not gelu(u)."""

    op: str
    kind: str = "int8"
    storage: str = "dense"
    rotation: int = 0
    dtype: torch.dtype = torch.float32
    parts: tuple[int, ...] = TWO_A
    gate: bool = False
    bias: bool = True
    head: int = 0
    split: int = 0
    saved_bits: int = 16


class Drawn:
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
            rank_rows, fed = R * (1 + max(case.parts[2::3])), sum(case.parts[1::3])
            a, b = normal(rank_rows, K, std=K**-0.5), normal(fed - sum(case.parts[::3]), R, std=0.3)
            self.leaves["lora_a"] = a.to(device, case.dtype).float()
            self.leaves["lora_b"] = b.to(device, case.dtype).float()
        self.gate = None
        if case.gate:
            self.leaves["residual"] = tokens(N)
            self.gate = normal(B, 1, 3 * N).to(device, case.dtype).chunk(3, -1)[1]
        self.bias = normal(N).to(device, case.dtype) if case.bias else None
        self.dys = list(tokens(N).tensor_split([case.split] if case.split else [], -1))
        with torch.no_grad():
            self.x = self.input_of(self.leaves)

    def input_of(self, leaves):
        if self.case.op == "norm":
            return norm.norm_modulate_forward(leaves["h"], leaves["shift"], leaves["scale"])[0]
        return gelu.gelu_rows(leaves["u"])[0] if self.case.op == "gelu" else leaves["x"]

    def call(self, leaves):
        """The op -> its outputs."""
        case, get = self.case, leaves.get
        linear = self.frozen(self.bias), self.update(leaves)
        gated = {"gate": self.gate, "residual": get("residual")}
        if case.op == "norm":
            first = (leaves["h"], leaves["shift"], leaves["scale"])
            ys = norm.norm_modulate_lora_linear(*first, *linear, split=case.split)
            return ys if case.split else (ys,)
        if case.op == "gelu":
            gated |= {"head": get("head"), "saved_bits": case.saved_bits}
            return (gelu.gelu_lora_linear(leaves["u"], *linear, **gated),)
        return (lora_linear(leaves["x"], *linear, **gated),)

    def frozen(self, bias):
        return FrozenWeight(self.weight, bias, self.case.kind, self.case.rotation)

    def update(self, leaves):
        if not self.case.parts:
            return None
        return LoRAUpdate(leaves["lora_a"], leaves["lora_b"], list(self.case.parts), 0.5)

    def reference(self, leaves):
        """The same by `lora_linear_reference` of `input_of`'s value, with norm's or gelu's
        gradient: another rounding of it may move over a tie, to another 8-bit value."""
        case, get = self.case, leaves.get
        xs = [leaves.get("x")]
        if case.op == "norm":
            x = norm.norm_modulate_reference(leaves["h"], leaves["shift"], leaves["scale"])
            xs = [_At.apply(x, self.x)]
        elif case.op == "gelu":
            x = _At.apply(F.gelu(leaves["u"], approximate="tanh"), self.x)
            xs = [leaves["head"], x] if case.head else [x]
        dtype = xs[0].dtype
        bias, gate = (None if t is None else t.to(dtype) for t in (self.bias, self.gate))
        linear = self.frozen(bias), self.update(leaves)
        y = lora_linear_reference(xs, *linear, gate, get("residual"), case.split)
        return y.tensor_split([case.split] if case.split else [], -1)

    def gradients(self, function, dtype=None, **changed):
        """{"y0": ..., "x": ...}: outputs, and the gradient of every leaf, all cast to `dtype`."""
        leaves = {
            name: leaf.to(dtype or leaf.dtype).detach().requires_grad_()
            for name, leaf in (self.leaves | changed).items()
        }
        ys = function(leaves)
        dys = [dy.to(y.dtype) for dy, y in zip(self.dys, ys, strict=True)]
        found = torch.autograd.grad(ys, list(leaves.values()), dys)
        named = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        return named | dict(zip(leaves, found, strict=True))


class _At(torch.autograd.Function):
    """`value` in x's place, with x's gradient."""

    @staticmethod
    def forward(ctx, x, value):
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx, dx):
        return dx, None
