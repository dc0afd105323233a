"""FrozenLinear: a linear layer's frozen weight in fp32, bf16, NF4, int8 or fp8, and its bias.

Shape legend: K inputs, N outputs. The fused ops of `fluxfast_kernels` take a weight as one to four
tensors (`quant/frozen.py` lists the forms). A quantized weight's are buffers of their own, with
`weight` None.
"""

from collections.abc import Callable
from dataclasses import replace

import fluxfast_kernels as fk
import torch
from fluxfast_kernels.quant import frozen
from fluxfast_kernels.quant.frozen import rotate_weight, storage_of
from fluxfast_kernels.quant.nf4 import BLOCK, NF4Tensor
from fluxfast_kernels.quant.rows import QuantizedRows
from torch import Tensor, nn

from fluxfast.model.precision import STORAGES

Weight = Tensor | NF4Tensor | QuantizedRows

# the buffers of a quantized weight, in the order in which the ops take them
_QUANTIZED = ("codes", "row_scale", "packed", "absmax", "nested_absmax", "offset")


class FrozenLinear(nn.Module):
    """A frozen [N, K] weight with a bias; `set_weight` fills it."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        for name in ("weight", "bias", *_QUANTIZED):
            self.register_buffer(name, None)
        self.matmul = ""  # "int8" or "fp8" for 8-bit products, "" for x's dtype
        self.rotation = 0  # columns per block of the weight's Hadamard rotation
        # returns the weight on the device if it is stored on the host: `memory/host.py`
        self.weight_provider: Callable[[FrozenLinear], list[Tensor]] | None = None

    def set_weight(self, weight: Weight, storage: str = "fp32", nested: bool = False) -> bool:
        """Stores `weight` [N, K] as fp32, bf16, nf4, int8 or fp8, rotated if the layer is.

        A weight that is quantized in that storage already is not copied, one in another storage is
        quantized again. nested: quantize NF4's absmax too. Returns False if nf4 became bf16
        (K % 64 != 0).
        """
        shape = tuple(weight.values.shape if isinstance(weight, QuantizedRows) else weight.shape)
        assert shape == (self.out_features, self.in_features), shape
        assert storage in STORAGES, storage
        tensors = {} if self.rotation else _quantized_tensors(weight, storage)
        if not tensors:
            weight = rotate_weight(dequantize(weight), self.rotation)
            if storage in ("int8", "fp8"):
                codes, scale = fk.quantize_8bit(weight, storage)
                tensors = {"codes": codes, "row_scale": scale}
            elif storage == "nf4" and self.in_features % BLOCK == 0:
                tensors = fk.nf4_quantize(weight, nested).tensors()
        for name in ("weight", *_QUANTIZED):
            setattr(self, name, tensors.get(name))
        if tensors:
            return True
        assert isinstance(weight, Tensor)
        # a copy: a slice of a file's memory map would keep the whole file's pages alive
        self.weight = weight.to(torch.float32 if storage == "fp32" else torch.bfloat16, copy=True)
        return storage != "nf4"

    def move_weight(self, device: str | torch.device) -> None:
        """Copies the weight alone to a device: the layer computes where its bias is."""
        for name in ("weight", *_QUANTIZED):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device, copy=True))

    @property
    def device(self) -> torch.device:
        """Where the layer computes; its weight may be stored on the host."""
        return (self.stored_tensors()[0] if self.bias is None else self.bias).device

    def weight_tensors(self) -> list[Tensor]:
        """Returns the weight's one to four tensors on the compute device."""
        return self.stored_tensors() if self.weight_provider is None else self.weight_provider(self)

    def stored_tensors(self) -> list[Tensor]:
        """Returns the weight's tensors where they are stored, perhaps on the host."""
        tensors = (self.weight, *(getattr(self, name) for name in _QUANTIZED))
        return [tensor for tensor in tensors if tensor is not None]

    def storage(self) -> str:
        """Returns fp32, bf16, nf4, int8 or fp8."""
        if self.weight is None:
            return storage_of(self.stored_tensors())
        return "fp32" if self.weight.dtype == torch.float32 else "bf16"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns a copy of the weight [N, K] in `dtype`, rotated back if it is stored rotated."""
        weight = frozen.dequantize(self.weight_tensors(), self.in_features, dtype).clone()
        return rotate_weight(weight, self.rotation).to(dtype)  # its own inverse

    def frozen_weight(self) -> fk.FrozenWeight:
        """Returns weight, bias, matmul and rotation as every fused linear takes them."""
        return fk.FrozenWeight(self.weight_tensors(), self.bias, self.matmul, self.rotation)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.storage()}"


def to_device(weight: Weight, device: str | torch.device) -> Weight:
    """Returns the weight, dense or quantized, on `device`."""
    if isinstance(weight, Tensor):
        return weight.to(device)
    tensors = {name: t.to(device) for name, t in vars(weight).items() if isinstance(t, Tensor)}
    return replace(weight, **tensors)


def dequantize(weight: Weight) -> Tensor:
    """Returns a quantized weight as fp32 [N, K], a dense one as it is."""
    if isinstance(weight, NF4Tensor):
        return fk.nf4_dequantize(weight)
    return weight.dequantize() if isinstance(weight, QuantizedRows) else weight


def _quantized_tensors(weight: Weight, storage: str) -> dict[str, Tensor]:
    """Returns the buffers of a weight that is quantized in `storage` already, or none."""
    if isinstance(weight, NF4Tensor):
        return weight.tensors() if storage == "nf4" else {}
    if isinstance(weight, QuantizedRows) and weight.kind == storage:
        return {"codes": weight.values, "row_scale": weight.scale}
    return {}
