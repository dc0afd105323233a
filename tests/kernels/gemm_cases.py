"""Random linears, as the launchers of the products take them."""

from dataclasses import dataclass

import torch
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate


@dataclass(frozen=True)
class Case:
    """A linear K -> N over [B, T] tokens, its input cut at `cut`, its output at `split`."""

    K: int = 96
    N: int = 144
    B: int = 2
    T: int = 37
    rank: int = 16
    parts: tuple[int, ...] = ()
    cut: int = 0
    split: int = 0
    storage: str = "dense"
    gate: bool = False
    lora: bool = True
    bias: bool = True


class Linear:
    """A case's update, bias, gate and residual: all that goes with the product."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str):
        self.case, self.dtype, self.device = case, dtype, device
        self.generator = torch.Generator().manual_seed(0)
        B, T, K, N = case.B, case.T, case.K, case.N
        self.inputs = [case.cut, K - case.cut] if case.cut else [K]
        self.outputs = [case.split, N - case.split] if case.split else [N]
        self.update = self.bias = gate = residual = None
        if case.lora:
            parts = list(case.parts or (0, N, 0))
            a_rows, b_rows = case.rank * (1 + max(parts[2::3])), sum(parts[1::3]) - sum(parts[::3])
            a, b = self.normal(a_rows, K) / K**0.5, self.normal(b_rows, case.rank)
            self.update = LoRAUpdate(a, b, parts, 0.75)
        if case.bias:
            self.bias = self.normal(N).to(dtype)
        if case.gate:
            gate = self.normal(B, 1, 3 * N).to(dtype).chunk(3, -1)[1]
            residual = self.normal(B, T + 2, N + 3).to(dtype)[:, 2:, 3:]
        self.epilogue = Epilogue(gate, residual, case.split)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def poisoned_outputs(self, widths, dtype=None):
        """Column and token ranges of NaN, and a check that what is around them stays NaN."""
        options = {"dtype": dtype or self.dtype, "device": self.device}
        shapes = [(self.case.B, self.case.T + 2, width + 7) for width in widths]
        wide = [torch.full(shape, torch.nan, **options) for shape in shapes]
        outs = [each[:, 1:-1, 3:-4] for each in wide]

        def check():
            for each, out in zip(wide, outs, strict=True):
                out.zero_()
                assert int(each.isnan().sum()) == each.numel() - out.numel()

        return outs, check
