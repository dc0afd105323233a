"""LoRALinear: a frozen linear layer in fp32, bf16 or NF4, with a trainable low-rank update on some
of its rows.

    y = x Wᵀ + b;   y[:, rows of part p] += scale · (x A_pᵀ) B_pᵀ

Shape legend: B batch, T tokens, K inputs, N outputs, P parts, R rank. A is [P·R, K] and B is [N',
R], N' the rows that have an update, part after part: stacked, never a block-diagonal matrix, so
that splitting the layer into its parts (q, k, v, mlp) is exact. One A for all parts (kohya's form)
is P = 1 with several row ranges.

Autograd saves x and nothing else: the dense weight and x Aᵀ are made again in backward.
"""

import math
import threading

import torch
import torch.nn.functional as F
from fluxfast_kernels import NF4Tensor, nf4_decode, nf4_quantize
from fluxfast_kernels.nf4 import BLOCK
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fluxfast import draws


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
        for name in ("weight", "bias", "packed", "absmax", "nested_absmax", "offset"):
            self.register_buffer(name, None)
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.lora_parts: list[list[tuple[int, int]]] = []  # per A: the row ranges that it feeds
        self.lora_scale = 1.0
        self.lora_strength = 1.0  # 0 switches the update off: the base model's own output
        self.dropout = 0.0
        self.dropout_stream = ""
        self.clock: DropoutClock | None = None

    def set_weight(self, weight: Tensor, storage: str = "fp32", nested: bool = False) -> bool:
        """Keep `weight` [N, K] as fp32, bf16 or nf4. -> False where nf4 had to stay bf16 (K %
        64).
        """
        assert weight.shape == (self.out_features, self.in_features), weight.shape
        if storage not in ("fp32", "bf16", "nf4"):
            raise ValueError(f"storage must be fp32, bf16 or nf4, got {storage!r}")
        if storage == "nf4" and self.in_features % BLOCK == 0:
            self.weight = None
            for name, tensor in nf4_quantize(weight, nested).tensors().items():
                setattr(self, name, tensor)
            return True
        # a copy: a slice of a file's memory map would keep the whole file's pages alive
        self.weight = weight.to(torch.float32 if storage == "fp32" else torch.bfloat16, copy=True)
        return storage != "nf4"

    def dense(self, dtype: torch.dtype, scratch: bool = False) -> Tensor:
        """The frozen weight [N, K] in `dtype`.

        scratch: decode into memory that every layer shares, good until the next such call.
        """
        if self.weight is not None:
            return self.weight.to(dtype)
        shape = (self.out_features, self.in_features)
        quantised = NF4Tensor(self.packed, self.absmax, shape, self.nested_absmax, self.offset)
        count = self.out_features * self.in_features
        memory = _scratch(count, self.packed.device) if scratch else None
        return nf4_decode(quantised, dtype, memory)

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
        device = self.packed.device if self.weight is None else self.weight.device
        rows = sum(end - start for ranges in parts for start, end in ranges)
        uniform = draws.uniform(
            seed, f"{stream}.lora_A", 0, (len(parts) * rank, self.in_features), device
        )[0]
        self.lora_A = nn.Parameter((2 * uniform - 1) / math.sqrt(self.in_features))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=device))
        self.lora_parts = [list(ranges) for ranges in parts]
        self.lora_scale = alpha / rank
        return [self.lora_A, self.lora_B]

    def lora_slices(self):
        """Yields (rows of y, rows of B, rows of A) as slices, one per part and range."""
        rank, row = self.lora_B.shape[1], 0
        for index, ranges in enumerate(self.lora_parts):
            for start, end in ranges:
                yield (
                    slice(start, end),
                    slice(row, row + end - start),
                    slice(index * rank, (index + 1) * rank),
                )
                row += end - start

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] in the compute dtype -> [..., N] in the same dtype."""
        if self.lora_A is None or self.lora_strength == 0:
            return _FrozenLinear.apply(x, self)
        drop = self.training and self.dropout > 0
        indices = tuple(self.clock.indices) if drop else None
        return _LoRALinear.apply(x, self.lora_A, self.lora_B, self, indices)

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
        kind = "nf4" if self.packed is not None else None
        if self.weight is not None:
            kind = str(self.weight.dtype).removeprefix("torch.")
        rank = f", rank={self.lora_B.shape[1]}" if self.lora_B is not None else ""
        return f"{self.in_features} -> {self.out_features}, {kind}{rank}"


class _Scratch(threading.local):
    """One per thread: CPU products run at once in several threads, on a GPU they queue up."""

    def __init__(self):
        self.known: dict[torch.device, Tensor] = {}


_CPU_SCRATCH = _Scratch()
_GPU_SCRATCH: dict[torch.device, Tensor] = {}  # backward has its own thread and the same queue


def _scratch(count: int, device: torch.device) -> Tensor:
    """fp32 [count or more] of the device's one scratch, grown to the largest layer seen.

    Its users run one after the other: a product is queued before the next decode is.
    """
    memory = _CPU_SCRATCH.known if device.type == "cpu" else _GPU_SCRATCH
    known = memory.get(device)
    if known is None or known.numel() < count:
        # one that a preview made in inference mode could not be written to in training
        with torch.inference_mode(False):
            known = memory[device] = torch.empty(count, device=device)
    return known[:count]


def _bias(layer: LoRALinear, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b. Saves nothing: the weight is frozen and made dense again in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: LoRALinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense(x.dtype, scratch=True), _bias(layer, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return dy @ ctx.layer.dense(dy.dtype, scratch=True), None


class _LoRALinear(torch.autograd.Function):
    """x Wᵀ + b + the low-rank update. Saves x."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, layer: LoRALinear, indices) -> Tensor:
        ctx.layer, ctx.indices = layer, indices
        ctx.save_for_backward(x, a, b)
        y = F.linear(x, layer.dense(x.dtype, scratch=True), _bias(layer, x.dtype))
        down = F.linear(_dropped(x, layer, indices), a.to(x.dtype))
        up = b.to(x.dtype) * (layer.lora_scale * layer.lora_strength)
        y_2d, down_2d = y.view(-1, y.shape[-1]), down.view(-1, down.shape[-1])
        for y_rows, b_rows, a_rows in layer.lora_slices():
            y_2d[:, y_rows].addmm_(down_2d[:, a_rows], up[b_rows].T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        layer, indices = ctx.layer, ctx.indices
        x, a, b = ctx.saved_tensors
        scale = layer.lora_scale * layer.lora_strength
        dy_2d = dy.reshape(-1, dy.shape[-1])
        x_lora = _dropped(x, layer, indices)
        x_2d = x_lora.reshape(-1, x.shape[-1])
        down = x_2d @ a.to(x.dtype).T
        up = b.to(x.dtype)
        d_down = torch.zeros_like(down)
        db = torch.empty_like(b)
        for y_rows, b_rows, a_rows in layer.lora_slices():
            db[b_rows] = (dy_2d[:, y_rows].T @ down[:, a_rows]).to(b.dtype)
            d_down[:, a_rows].addmm_(dy_2d[:, y_rows], up[b_rows])
        d_down *= scale
        da = (d_down.T @ x_2d).to(a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ layer.dense(dy.dtype, scratch=True)
            dx_lora = (d_down @ a.to(x.dtype)).view(x.shape)
            dx += dx_lora if indices is None else dx_lora * layer.dropout_mask(x, indices)
        return dx, da, db.mul_(scale), None, None


def _dropped(x: Tensor, layer: LoRALinear, indices) -> Tensor:
    return x if indices is None else x * layer.dropout_mask(x, indices)
