"""How far results are from a truth, for the gates of all benches."""

import math
from collections.abc import Mapping

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


def compare(
    results: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    allowed: Mapping[str, tuple[float, float]],
) -> tuple[str | None, dict[str, object]]:
    """Returns what is wrong or None, and a row's fields of the tensor that errs most of what it
    may. allowed: of the norm and of the largest value."""
    wrong, worst = None, (-1.0, {})
    for name, result in results.items():
        errors = relative_errors(result, truth[name])
        measures = zip(errors, allowed[name], ("norm", "largest value"), strict=True)
        for error, most, measure in measures:
            if error > most and wrong is None:
                wrong = f"{name} errs by {error:.2e} of its {measure}, allowed {most:.2e}"
            finite = error if math.isfinite(error) else None  # JSON has no infinity
            fields = {"worst": name, "worst_error": finite, "tolerance": most}
            worst = max(worst, (error / most, fields), key=lambda pair: pair[0])
    return wrong, worst[1]
