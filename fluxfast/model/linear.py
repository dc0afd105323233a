"""LoRALinear: a frozen linear layer in fp32, bf16, NF4, int8 or fp8, with a trainable low-rank
update on some of its rows.

    y = x Wᵀ + b;   y[:, rows of part p] += scale · (x A_pᵀ) B_pᵀ

Shape legend: B batch, T tokens, K inputs, N outputs, P parts, R rank. A is [P·R, K] and B is [N',
R], N' the rows that have an update, part after part: stacked, never a block-diagonal matrix, so
that splitting the layer into its parts (q, k, v, mlp) is exact. One A for all parts (kohya's form)
is P = 1 with several row ranges.

The work is done by the fused ops of `fluxfast_kernels`, with what comes before the product (norm
and modulation, GELU) or after it (gate and residual). Autograd then keeps the op's input and
nothing in between. LoRA dropout takes a path of its own that is not fused, and so does a probe.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import fluxfast_kernels as fk
import torch
import torch.nn.functional as F
from fluxfast_kernels.dispatch.backend import last_stride_1
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward
from fluxfast_kernels.gemm.linear_dense import lora_slices
from fluxfast_kernels.quant.frozen import dense_weight, rotate_weight, storage_of
from fluxfast_kernels.quant.nf4 import BLOCK, NF4Tensor
from fluxfast_kernels.quant.rows import Rows
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fluxfast import draws

# the buffers of a quantised weight, in the order in which the ops take them
_QUANTIZED = ("codes", "row_scale", "packed", "absmax", "nested_absmax", "offset")


class DropoutClock:
    """Which samples the model sees now: what LoRA dropout masks are drawn by. Set once per
    batch.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.indices: list[int] = []


class LoRALinear(nn.Module):
    """A frozen [N, K] weight with a bias; `set_weight` fills it, `add_lora` makes it trainable."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        for name in ("weight", "bias", *_QUANTIZED):
            self.register_buffer(name, None)
        self.products = ""  # "int8", "fp8": multiplied in codes of 8 bits; "" in x's dtype
        self.rotation = 0  # columns a block of the Hadamard rotation that the weight is kept in
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.lora_parts: list[list[tuple[int, int]]] = []  # per A: the row ranges that it feeds
        self.lora_scale = 1.0
        self.lora_strength = 1.0  # 0 switches the update off: the base model's own output
        # a frozen update that acts in training only: A [P', Ra, K], B [rows, Ra], their row ranges
        self.assistant: tuple[Tensor, Tensor, list[list[tuple[int, int]]]] | None = None
        self.assisted = False  # whether it acts now
        self.dropout = 0.0
        self.dropout_stream = ""
        self.clock: DropoutClock | None = None
        # sees x of every pass; what it returns (or None) sees y's gradient. Changes no result
        self.probe: Callable[[Tensor], Callable[[Tensor], None] | None] | None = None
        # gives the frozen tensors where they are kept on the host: see `memory/host.py`
        self.lender: Callable[[LoRALinear], list[Tensor]] | None = None

    def set_weight(
        self, weight: Tensor | NF4Tensor | Rows, storage: str = "fp32", nested: bool = False
    ) -> bool:
        """Keep `weight` [N, K] as fp32, bf16, nf4, int8 or fp8, rotated where the layer is. ->
        False where nf4 had to stay bf16 (K % 64).

        A weight in codes of that very storage (a file's) is kept as it is, not copied; in other
        codes it is decoded and quantised anew.
        """
        assert _shape(weight) == (self.out_features, self.in_features), _shape(weight)
        if storage not in ("fp32", "bf16", "nf4", "int8", "fp8"):
            raise ValueError(f"storage must be fp32, bf16, nf4, int8 or fp8, got {storage!r}")
        kept = {} if self.rotation else _codes_of(weight, storage)
        if not kept:
            weight = rotate_weight(dense(weight), self.rotation)
            if storage in ("int8", "fp8"):
                codes = fk.quantize_8bit(weight, storage)
                kept = dict(zip(("codes", "row_scale"), codes, strict=True))
            elif storage == "nf4" and self.in_features % BLOCK == 0:
                kept = fk.nf4_quantize(weight, nested).tensors()
        for name in ("weight", *_QUANTIZED):
            setattr(self, name, kept.get(name))
        if kept:
            return True
        # a copy: a slice of a file's memory map would keep the whole file's pages alive
        self.weight = weight.to(torch.float32 if storage == "fp32" else torch.bfloat16, copy=True)
        return storage != "nf4"

    def frozen(self) -> list[Tensor]:
        """The frozen weight as the fused ops take it: one to four tensors."""
        return self.kept() if self.lender is None else self.lender(self)

    def kept(self) -> list[Tensor]:
        """The frozen tensors where they lie, on the host where the layer has a lender."""
        kept = [self.weight, *(getattr(self, name) for name in _QUANTIZED)]
        return [tensor for tensor in kept if tensor is not None]

    def storage(self) -> str:
        """fp32, bf16, nf4, int8 or fp8: how the weight is kept."""
        if self.weight is None:
            return storage_of(self.kept())
        return "fp32" if self.weight.dtype == torch.float32 else "bf16"

    def dense(self, dtype: torch.dtype) -> Tensor:
        """A copy of the frozen weight [N, K] in `dtype`, rotated back where it is kept rotated."""
        weight = dense_weight(self.frozen(), self.in_features, dtype).clone()
        return rotate_weight(weight, self.rotation).to(dtype)  # its own inverse

    def add_lora(
        self,
        rank: int,
        alpha: float,
        parts: list[list[tuple[int, int]]],
        *,
        seed: int = 0,
        stream: str = "lora",
    ) -> list[nn.Parameter]:
        """Add a rank-`rank` update, fp32: A uniform in ±1/sqrt(K) (as peft and kohya draw it), B
        zero.

        parts: per independent A, the row ranges [(start, end)] it feeds. -> [A, B].
        """
        device = self.kept()[0].device
        rows = sum(end - start for ranges in parts for start, end in ranges)
        uniform = draws.uniform(
            seed, f"{stream}.lora_A", 0, (len(parts) * rank, self.in_features), device
        )[0]
        self.lora_A = nn.Parameter((2 * uniform - 1) / math.sqrt(self.in_features))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=device))
        self.lora_parts = [list(ranges) for ranges in parts]
        self.lora_scale = alpha / rank
        return [self.lora_A, self.lora_B]

    def set_assistant(self, a: Tensor, b: Tensor, parts: list[list[tuple[int, int]]]) -> None:
        """Add a frozen update, apart from the trained one: it acts while `assisted` says so.

        a: [P', Ra, K]; b: [rows of the parts, Ra]; parts: ascending, the trained parts among them.
        """
        assert all(ranges in parts for ranges in self.lora_parts), (self.lora_parts, parts)
        device = self.kept()[0].device
        self.assistant = (a.to(device), b.to(device), parts)
        self.assisted = True

    def _with_assistant(self) -> tuple:
        """A, B, parts, scale of the trained and the frozen update in one: their ranks side by
        side.
        """
        a, b, parts = self.assistant
        flat = _flat(parts)
        if not self.trains():
            return a.flatten(0, 1), b, flat, 1.0
        rank = self.lora_B.shape[1]
        own_a = self.lora_A.view(-1, rank, self.in_features)
        own_b = self.lora_B * (self.lora_scale * self.lora_strength)
        if len(own_a) < len(a):  # parts that are not trained get rows of zero
            blocks = iter(own_b.split([_rows(ranges) for ranges in self.lora_parts]))
            columns = iter(own_a)
            trained = [ranges in self.lora_parts for ranges in parts]
            own_a = torch.stack(
                [next(columns) if t else torch.zeros_like(own_a[0]) for t in trained]
            )
            own_b = torch.cat([
                next(blocks) if t else own_b.new_zeros(_rows(ranges), rank)
                for t, ranges in zip(trained, parts, strict=True)
            ])  # fmt: skip
        both = torch.cat([own_a, a], dim=1).flatten(0, 1), torch.cat([own_b, b], dim=1)
        return *both, flat, 1.0

    def _helps(self) -> bool:
        return self.assisted and self.assistant is not None

    def trains(self) -> bool:
        """Whether its update takes part."""
        return self.lora_A is not None and self.lora_strength != 0

    def lora_slices(self):
        """Yields (rows of y, rows of B, rows of A) as slices, one per part and range."""
        for ranges in lora_slices(self._parts(), self.lora_B.shape[1]):
            yield tuple(slice(*pair) for pair in ranges)

    def forward(
        self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """x [..., K] in the compute dtype -> y [..., N], or residual + gate · y."""
        if self._apart():
            return _gated(self._product(x), gate, residual)
        if _trains(gate):
            return _gated(fk.lora_linear(x, *self._arguments(), **self._how()), gate, residual)
        given = {"gate": gate, "residual": residual}
        return fk.lora_linear(x, *self._arguments(), **given, **self._how())

    def of_norm(self, h: Tensor, shift: Tensor, scale: Tensor, split: int = 0):
        """The layer of LayerNorm(h) · (1 + scale) + shift. h [B, T, K]; shift, scale [B, 1, K].

        -> y [B, T, N], or with a split the tensors of y's columns before and after it.
        """
        if self._apart():
            y = self._product(fk.norm_modulate(h, shift, scale))
            return y.tensor_split([split], dim=-1) if split else y
        given = (h, shift, scale, *self._arguments())
        return fk.norm_modulate_lora_linear(*given, split=split, **self._how())

    def of_gelu(
        self,
        u: Tensor,
        gate: Tensor,
        residual: Tensor,
        head: Tensor | None = None,
        saved_bits: int = 16,
    ) -> Tensor:
        """residual + gate · y, y the layer of [head, GELU-tanh(u)].

        u [B, T, F]; head [B, T, K - F] or None; gate [B, 1, N]; residual [B, T, N]. saved_bits: 8
        keeps u for backward in codes of 8 bits (not where LoRA dropout or a probe takes it apart).
        """
        if self._apart():
            x = F.gelu(u, approximate="tanh")
            x = x if head is None else torch.cat([head, x], dim=-1)
            return _gated(self._product(x), gate, residual)
        if _trains(gate):
            given = {"head": head, "saved_bits": saved_bits}
            y = fk.gelu_lora_linear(u, *self._arguments(), **given, **self._how())
            return _gated(y, gate, residual)
        given = {"head": head, "gate": gate, "residual": residual, "saved_bits": saved_bits}
        return fk.gelu_lora_linear(u, *self._arguments(), **given, **self._how())

    def _arguments(self) -> tuple:
        """weight, bias, A, B, parts, scale: what every fused linear takes."""
        if self._helps():
            return self.frozen(), self.bias, *self._with_assistant()
        if not self.trains():
            return self.frozen(), self.bias, None, None, [], 1.0
        scale = self.lora_scale * self.lora_strength
        return self.frozen(), self.bias, self.lora_A, self.lora_B, self._parts(), scale

    def _how(self) -> dict:
        """How the product is formed: what every fused linear takes by name."""
        return {"products": self.products, "rotation": self.rotation}

    def _frozen_update(self) -> tuple:
        """A, B, parts, scale of what acts and is not trained."""
        if not self._helps():
            return None, None, [], 1.0
        a, b, parts = self.assistant
        return a.flatten(0, 1), b, _flat(parts), 1.0

    def _parts(self) -> list[int]:
        return _flat(self.lora_parts)

    def _apart(self) -> bool:
        """Whether the product's input and output must exist by themselves: nothing is fused."""
        return self.probe is not None or self.drops()

    def _product(self, x: Tensor) -> Tensor:
        if self.drops():
            y = self._dropped(x)
        else:
            y = fk.lora_linear(x, *self._arguments(), **self._how())
        see_gradient = self.probe(x) if self.probe is not None else None
        if see_gradient is not None and y.requires_grad:
            y.register_hook(see_gradient)
        return y

    def drops(self) -> bool:
        """Whether LoRA dropout takes part: no path of it is fused."""
        return self.training and self.dropout > 0 and self.trains()

    def _dropped(self, x: Tensor) -> Tensor:
        indices = tuple(self.clock.indices)
        return _DroppedLinear.apply(x, self.lora_A, self.lora_B, self, indices)

    def dropout_mask(self, x: Tensor, indices: tuple[int, ...]) -> Tensor:
        """0 or 1/(1-p) per element of x [B, ..., K], drawn by global sample index."""
        if len(indices) != x.shape[0]:
            raise ValueError(
                f"LoRA dropout needs the batch's {x.shape[0]} global sample indices in "
                f"model.dropout_clock.indices, got {len(indices)}"
            )
        stream = f"lora_dropout/{self.dropout_stream}"
        u = draws.uniform(self.clock.seed, stream, list(indices), tuple(x.shape[1:]), x.device)
        return (u >= self.dropout).to(x.dtype) / (1 - self.dropout)

    def extra_repr(self) -> str:
        how = f", {self.products} products" if self.products else ""
        how += f", rotated by {self.rotation}" if self.rotation else ""
        rank = f", rank={self.lora_B.shape[1]}" if self.lora_B is not None else ""
        return f"{self.in_features} -> {self.out_features}, {self.storage()}{how}{rank}"


def _flat(parts: list[list[tuple[int, int]]]) -> list[int]:
    return [
        number
        for index, ranges in enumerate(parts)
        for start, end in ranges
        for number in (start, end, index)
    ]


def _rows(ranges: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


def moved(weight: Tensor | NF4Tensor | Rows, device: str | torch.device):
    """The weight on `device`, dense or in codes."""
    if isinstance(weight, Tensor):
        return weight.to(device)
    parts = {
        name: part.to(device) for name, part in vars(weight).items() if isinstance(part, Tensor)
    }
    return replace(weight, **parts)


def _shape(weight: Tensor | NF4Tensor | Rows) -> tuple[int, ...]:
    return tuple(weight.codes.shape if isinstance(weight, Rows) else weight.shape)


def _codes_of(weight: Tensor | NF4Tensor | Rows, storage: str) -> dict[str, Tensor]:
    """The tensors to keep where the weight is in codes of `storage`, else nothing."""
    if isinstance(weight, NF4Tensor):
        return weight.tensors() if storage == "nf4" else {}
    if isinstance(weight, Rows) and storage_of([weight.codes, weight.scale]) == storage:
        return {"codes": weight.codes, "row_scale": weight.scale}
    return {}


def dense(weight: Tensor | NF4Tensor | Rows) -> Tensor:
    """Codes to fp32 [N, K]; a tensor as it is."""
    if isinstance(weight, NF4Tensor):
        return fk.nf4_decode(weight)
    return weight.codes.float() * weight.scale[:, None] if isinstance(weight, Rows) else weight


def _trains(gate: Tensor | None) -> bool:
    return gate is not None and gate.requires_grad and torch.is_grad_enabled()


def _gated(y: Tensor, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    return y if residual is None else fk.gate_residual(residual, gate, y)


class _DroppedLinear(torch.autograd.Function):
    """x Wᵀ + b + the low-rank update of (mask · x), unfused. Saves x; the mask is drawn again."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, layer: LoRALinear, indices) -> Tensor:
        weight, bias = layer.frozen(), layer.bias
        parts, scale = layer._parts(), layer.lora_scale * layer.lora_strength
        ctx.fixed = layer._frozen_update()
        # as they are now: the strength may be another by the time of the backward pass
        ctx.layer, ctx.indices, ctx.parts, ctx.scale = layer, indices, parts, scale
        ctx.save_for_backward(x, a, b)
        (y,) = linear_forward([x], weight, bias, *ctx.fixed, **layer._how())
        down = F.linear(x * layer.dropout_mask(x, indices), a.to(x.dtype))
        up = b.to(x.dtype) * scale
        y_2d, down_2d = y.view(-1, y.shape[-1]), down.view(-1, down.shape[-1])
        for y_rows, b_rows, a_rows in layer.lora_slices():
            y_2d[:, y_rows].addmm_(down_2d[:, a_rows], up[b_rows].T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        layer, dy = ctx.layer, last_stride_1(dy)
        x, a, b = ctx.saved_tensors
        mask = layer.dropout_mask(x, ctx.indices)
        masked = [x * mask]
        dx_lora, da, db = linear_backward([dy], masked, [], a, b, ctx.parts, ctx.scale, True)
        frozen = (layer.frozen(), *ctx.fixed, True)
        dxs, _, _ = linear_backward([dy], [x], *frozen, **layer._how())
        return dxs[0].addcmul_(dx_lora[0], mask), da, db, None, None
