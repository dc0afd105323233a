"""How exact a kernel must be: at most a multiple of eager torch's own error in the same dtype.

Both are compared with an fp64 truth computed from the same rounded inputs. The error of a tensor is
the norm of its difference over the norm of the truth; a floor of half a unit in the last place of
the dtype keeps a lucky eager result (a single rounding, say) from being the yardstick.
"""

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; infinite where `found` is not finite."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    if not torch.isfinite(found).all():
        return float("inf")
    truth = truth.double()
    return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def assert_as_exact(
    name: str, found: Tensor, eager: Tensor, truth: Tensor, times: float = 2.0
) -> None:
    """`found` errs at most `times` as much as `eager` does, both in `found`'s dtype."""
    allowed = times * max(relative_error(eager, truth), 0.5 * UNIT[found.dtype])
    error = relative_error(found, truth)
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """An output full of NaN: what a kernel forgets to write shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)
