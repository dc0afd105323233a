"""How exact a kernel must be: at most a multiple of eager torch's own error in the same dtype.

Both are compared with an fp64 truth computed from the same rounded inputs. The error of a tensor is
the norm of its difference over the norm of the truth; a floor of half a unit in the last place of
the dtype keeps a lucky eager result (a single rounding, say) from being the yardstick.
"""

from math import prod

import pytest
import torch
from fluxfast_kernels import FrozenWeight, LoRAUpdate
from fluxfast_kernels.quant.rows import DTYPE, TOP, QuantizedRows, quantize_reference
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


GUARD, UNSET = 80, 99


def guarded(shape, kind, device):
    """Rows to fill, and a check that nothing beyond their end was written."""
    count, rows = prod(shape), prod(shape[:-1])
    memory = torch.full((count + GUARD,), UNSET, dtype=torch.int8, device=device)
    scale = torch.full((rows + GUARD,), torch.nan, device=device)

    def check():
        assert (memory[count:] == UNSET).all() and scale[rows:].isnan().all()

    values = memory[:count].view(DTYPE[kind]).view(shape)
    return QuantizedRows(values, scale[:rows].view(shape[:-1])), check


def linear_arguments(given: dict) -> dict:
    """The frozen weight and the update among an op's arguments, as it takes them, from weight,
    bias, matmul, rotation, lora_a, lora_b, parts and scale; the rest as it is."""
    rest = dict(given)
    how = {name: rest.pop(name) for name in ("bias", "matmul", "rotation") if name in rest}
    lora = {name: rest.pop(name, None) for name in LoRAUpdate._fields}
    present = lora["lora_a"] is not None or lora["lora_b"] is not None
    update = LoRAUpdate(**lora) if present else None
    return rest | {"weight": FrozenWeight(rest["weight"], **how), "update": update}


def skip_without_fp8(kind: str, device: str) -> None:
    """e4m3 needs sm_89; on a CPU it is emulated everywhere."""
    if kind == "fp8" and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 on this GPU: it needs sm_89")


def bits(tensor: Tensor) -> Tensor:
    """As whole numbers of the same size: NaN equals NaN, -0 differs from 0."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_rows(name: str, found: QuantizedRows, v: Tensor, kind: str) -> None:
    """`found` are the rows of v (fp32 [..., K], after gate, channel and rotation): on a CPU bit for
    bit.

    On a GPU a producer may form v again for its values, one unit in the last place (2^-23) from
    what it stored, its largest too; v · (top / amax) rounds twice more. So the scaled value is
    known to 4 · 2^-23 < 1e-6 of itself, and a result may be its neighbor where it lies that near to
    the middle of both: within 1e-5, for good measure. Where a channel's factor goes into a
    rotation's first sums these may be fused, which is off by 2^-24 of the largest: of `top`.
    """
    expected = quantize_reference(v, v.abs().amax(-1), kind)
    finite = expected.scale.isfinite()  # elsewhere the values are unspecified
    assert torch.equal(found.scale.isfinite(), finite), name
    if found.values.device.type == "cpu":
        assert torch.equal(found.scale[finite], expected.scale[finite]), f"{name}: scale"
        differ = (bits(found.values) != bits(expected.values))[finite]
        assert not differ.any(), f"{name}: {int(differ.sum())} of {differ.numel()} values"
        return
    torch.testing.assert_close(found.scale, expected.scale, rtol=2.0**-21, atol=0, equal_nan=True)
    scaled = (v.double() / expected.scale.double()[..., None])[finite]
    values, wanted = found.values.double()[finite], expected.values.double()[finite]
    aside = ((values + wanted) / 2 - scaled).abs() > 1e-5 * scaled.abs() + TOP[kind] * 2**-24
    assert not (aside & (values != wanted)).any(), f"{name}: values differ away from a tie"
