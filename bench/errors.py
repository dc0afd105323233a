"""How far a result is from a truth, for the gates of all benches."""

import torch
from torch import Tensor


def relative_errors(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """Returns the difference's norm over the truth's norm, and its largest value over the truth's
    largest, which shows what few wrong elements hide in a norm. Both are infinite where `result` is
    not finite or has another shape."""
    if result.shape != truth.shape or not torch.isfinite(result).all():
        return float("inf"), float("inf")
    difference = result.to(truth.dtype) - truth

    def relative(order: float) -> float:
        size = float(torch.linalg.vector_norm(truth, order))
        return float(torch.linalg.vector_norm(difference, order)) / max(size, 1e-300)

    return relative(2), relative(torch.inf)
