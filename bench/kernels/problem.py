"""A case of `cases.py` at work: its inputs, its math in plain torch, and the functions that do it.

Every function takes the inputs by name and returns its output or outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.kernels.cases import Case, Settings
from bench.step.peers import normal

OURS, EAGER, COMPILED = "fluxfast", "eager", "compile"
GEMM_4BIT, DEQUANTIZE_4BIT = "bitsandbytes-gemm", "bitsandbytes-dequantize"
SDPA, LIGER = "sdpa", "liger"
PEERS = (GEMM_4BIT, DEQUANTIZE_4BIT, SDPA, LIGER)
CANDIDATES = (OURS, EAGER, COMPILED, *PEERS)
FORWARD, BOTH = "forward", "forward+backward"

Function = Callable[..., object]


def tensors_of(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@dataclass
class Problem:
    """inputs: name -> tensor, [B, ...] but for those in `shared`; those in `trained` require a
    gradient. candidates: name -> function, or the error that kept it from being built. reference:
    the math in the dtype of its inputs, which is `wide` for the truth. dys: one gradient an output;
    empty where the op has no backward. outputs: a result -> its tensors.
    """

    inputs: dict[str, Tensor]
    candidates: dict[str, Function | Exception]
    reference: Function
    dys: list[Tensor]
    trained: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    outputs: Callable[[object], list[Tensor]] = tensors_of
    wide: torch.dtype = torch.float64

    def __post_init__(self):
        for name in self.trained:
            self.inputs[name].requires_grad_()

    @property
    def directions(self) -> tuple[str, ...]:
        return (FORWARD, BOTH) if self.dys else (FORWARD,)

    def call(self, function: Function, direction: str) -> Callable[[], object]:
        """Returns what is timed. Forward is as training runs it: it saves what backward needs."""
        if direction == FORWARD:
            return lambda: function(**self.inputs)
        leaves = [self.inputs[name] for name in self.trained]
        return lambda: torch.autograd.grad(self.outputs(function(**self.inputs)), leaves, self.dys)


class RandomInputs:
    """Random tensors, each a function of its name and the op's: in the compute dtype, or of its
    values in another."""

    def __init__(self, case: Case, settings: Settings):
        self.case, self.settings = case, settings

    def normal(
        self, name: str, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        values = normal(f"{self.case.op}.{name}", shape, self.settings.device).mul_(std)
        return values.to(self.settings.compute).to(dtype or self.settings.compute)

    def tokens(self, name: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[B, T, width]"""
        T = self.settings.tokens(self.case)
        return self.normal(name, self.case.batch, T, width, dtype=dtype)

    def modulation(self, count: int) -> tuple[Tensor, ...]:
        """[B, 1, D] each, chunks of one tensor as in a block."""
        width = count * self.settings.spec.hidden_size
        return self.normal("modulation", self.case.batch, 1, width, std=0.5).chunk(count, -1)
