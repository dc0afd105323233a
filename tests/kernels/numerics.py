"""Helpers of the kernel tests: how exact a kernel must be, and the set-up that its tests share.

A result may err at most a multiple of eager torch's own error in the same dtype. Both are compared
with an fp64 truth computed from the same rounded inputs. The error of a tensor is the norm of its
difference over the norm of the truth; a floor of half a unit in the last place of the dtype keeps
a lucky eager result (a single rounding, say) from being the yardstick.
"""

from collections.abc import Callable
from contextlib import contextmanager
from math import prod

import pytest
import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.quant.rows import DTYPE, TOP, QuantizedRows, quantize_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
KINDS = ("int8", "fp8")


def randn(*shape: int, seed=0, std=1.0, mean=0.0, device="cpu", dtype=torch.float32) -> Tensor:
    """Normal values, rounded to `dtype`, which do not depend on the device."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std + mean
    return values.to(dtype).to(device)


def outputs_and_gradients(
    function: Callable, leaves: list[Tensor], d_outputs: list[Tensor], dtype=None
) -> list[Tensor]:
    """The outputs of function(*leaves), then the gradient of each leaf, all computed in `dtype`
    (default: the leaves' own)."""
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    d_outputs = [d.to(y.dtype) for d, y in zip(d_outputs, outputs, strict=True)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, d_outputs))


# ---------------------------------------------------------------- error


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; infinite where `result` is not finite."""
    assert result.shape == truth.shape, (result.shape, truth.shape)
    if not torch.isfinite(result).all():
        return float("inf")
    truth = truth.double()
    return float((result.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def assert_as_exact(name: str, result: Tensor, eager: Tensor, truth: Tensor, times=2.0) -> None:
    """`result` errs at most `times` as much as `eager` does, both in `result`'s dtype."""
    allowed = times * max(relative_error(eager, truth), 0.5 * UNIT[result.dtype])
    error = relative_error(result, truth)
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def assert_all_as_exact(names: str, results, eager, truth) -> None:
    """Every tensor of `results`; names: separated by spaces."""
    for name, *tensors in zip(names.split(), results, eager, truth, strict=True):
        assert_as_exact(name, *tensors)


# ---------------------------------------------------------------- bits


def bits(tensor: Tensor) -> Tensor:
    """As whole numbers of the same size: NaN equals NaN, -0 differs from 0."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same_bits(results, expected) -> None:
    """Of two sequences of tensors, or of two dicts."""
    if isinstance(expected, dict):
        results, expected = ([d[name] for name in expected] for d in (results, expected))
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert result.dtype == wanted.dtype and torch.equal(bits(result), bits(wanted)), index


def assert_rows(name: str, rows: QuantizedRows, v: Tensor, kind: str) -> None:
    """`rows` are those of v (fp32 [..., K], after gate, channel and rotation): on a CPU bit for
    bit.

    On a GPU a producer may form v again for its values, one unit in the last place (2^-23) from
    what it stored, its largest too; v · (top / amax) rounds twice more. So the scaled value is
    known to 4 · 2^-23 < 1e-6 of itself, and a result may be its neighbor where it lies that near to
    the middle of both: within 1e-5, for good measure. Where a channel's factor goes into a
    rotation's first sums these may be fused, which is off by 2^-24 of the largest: of `top`.
    """
    expected = quantize_reference(v, v.abs().amax(-1), kind)
    finite = expected.scale.isfinite()  # elsewhere the values are unspecified
    assert torch.equal(rows.scale.isfinite(), finite), name
    if rows.values.device.type == "cpu":
        assert torch.equal(rows.scale[finite], expected.scale[finite]), f"{name}: scale"
        differ = (bits(rows.values) != bits(expected.values))[finite]
        assert not differ.any(), f"{name}: {int(differ.sum())} of {differ.numel()} values"
        return
    torch.testing.assert_close(rows.scale, expected.scale, rtol=2.0**-21, atol=0, equal_nan=True)
    scaled = (v.double() / expected.scale.double()[..., None])[finite]
    values, wanted = rows.values.double()[finite], expected.values.double()[finite]
    aside = ((values + wanted) / 2 - scaled).abs() > 1e-5 * scaled.abs() + TOP[kind] * 2**-24
    assert not (aside & (values != wanted)).any(), f"{name}: values differ away from a tie"


# ---------------------------------------------------------------- memory


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


@contextmanager
def saved_for_backward():
    """The tensors that autograd saves in the context, in a list."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        yield saved


# ---------------------------------------------------------------- calls


def assert_refused(calls: dict[str, list[Callable]], pattern: str = "^{} must be") -> None:
    """Each call raises a ValueError that names the argument, the dict's key."""
    for name, of_name in calls.items():
        for index, call in enumerate(of_name):
            with pytest.raises(ValueError, match=pattern.format(name)):
                call()
                pytest.fail(f"{name}, call {index} was not refused")


def opcheck(*calls: Callable) -> None:
    """Checks schema, fake tensors and autograd of every op, backward ops too, that the calls run on
    the plain-torch path. A call returns a sequence of outputs."""
    recorded = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "fluxfast":
                recorded.append((op, args))
            return op(*args, **(kwargs or {}))

    with backend.cpu_launches(False):
        with Recorder():
            for call in calls:
                for y in call():
                    if y.requires_grad:
                        y.sum().backward(retain_graph=True)
        for op, args in recorded:
            if "backward" in op.name():
                args = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, args)
            torch.library.opcheck(op, args)


def skip_without_fp8(kind: str, device: str) -> None:
    """e4m3 needs sm_89; on a CPU it is emulated everywhere."""
    if kind == "fp8" and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 on this GPU: it needs sm_89")
