"""Why a step had no finite loss and gradient: its samples go through the model once more, one at a
time and outside graphs, and the result of every op is looked at.

Draws are functions of the step, so it is the same step. What an op does inside is not seen, only
what it gives.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fluxfast.memory.runtime import is_out_of_memory
from fluxfast.model.lora import lora_layers
from fluxfast.objective import Batch, Inputs
from fluxfast.step import Training
from fluxfast.util.redact import plain


def diagnose(run: Training, step: int) -> list[str]:
    """A line for each sample of step `step` (counted from 1) that is not finite, or for what is
    wrong before any sample. Of this rank's samples.

    The gradients are zero afterwards, and graphs are dropped: their memory is needed.
    """
    run.graphs.drop()
    if broken := _broken_weights(run):
        return broken
    lines = []
    accumulation = run.config.train.gradient_accumulation
    try:
        for number in range((step - 1) * accumulation, step * accumulation):
            lines += _of_batch(run, run.loader.batch(number), step)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        lines.append("memory ran out while the step was looked at once more")
    run.gradients.zero_()
    return lines


def _broken_weights(run: Training) -> list[str]:
    tensors = [*run.model.named_parameters(), *run.model.named_buffers()]
    names = [_without_update(name) for name, tensor in tensors if not _finite(tensor)]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"weights that are not finite: {', '.join(names[:3])}{more}"]


def _of_batch(run: Training, batch: Batch, step: int) -> Iterator[str]:
    inputs = run.inputs(batch)
    for row, name in enumerate(map(plain, batch.names)):
        alone = Inputs._make(_row(tensor, row, len(batch.names)) for tensor in inputs)
        alone = alone._replace(modulation=None)  # formed here, where it is seen
        run.model.dropout_clock.indices = [batch.indices[row]]
        broken = [key for key, tensor in alone._asdict().items() if not _finite(tensor)]
        if broken:
            yield f"step {step}, {name}: the cached sample itself is not finite ({broken[0]})"
        elif found := _of_sample(run, alone):
            yield f"step {step}, {name}: {found}"


def _row(tensor: Tensor | None, row: int, count: int) -> Tensor | None:
    """What belongs to one sample: positions are shared by all."""
    return tensor[row : row + 1] if tensor is not None and len(tensor) == count else tensor


def _of_sample(run: Training, inputs: Inputs) -> str | None:
    """What is not finite of one sample's loss and gradients, and where it began."""
    run.gradients.zero_()
    watch = _Watch(run)
    with watch:
        loss = run.loss(inputs)
        watch.direction = "backward"
        loss.backward()
    found = [
        f"{name}.{kind}"
        for name, layer in lora_layers(run.model).items()
        for kind in ("lora_A", "lora_B")
        if not _finite(getattr(layer, kind).grad)
    ]
    if watch.first is None and not found and _finite(loss):
        norm = torch.linalg.vector_norm(run.gradients)
        return None if _finite(norm) else "every gradient is finite, but their norm is not"
    started = watch.first or "no op gave anything that is not finite"
    said = f"{started}; loss {loss.item():.4g}"
    if found:
        said += f"; {len(found)} gradients are not finite, that of {found[-1]} among them"
    return said


class _Watch(TorchDispatchMode):
    """Sees every op of forward and backward, and remembers the first whose result is not finite."""

    def __init__(self, run: Training):
        super().__init__()
        tensors = [*run.model.named_parameters(), *run.model.named_buffers()]
        self._owner = {
            tensor.data_ptr(): _without_update(name).rpartition(".")[0]
            for name, tensor in tensors
            if tensor.numel() and tensor.device == run.device
        }
        self._last: str | None = None  # the layer whose op ran last
        self.direction = "forward"
        self.first: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.first is not None:
            return result
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        owners = (self._owner.get(tensor.data_ptr()) for tensor in given)
        owner = next(filter(None, owners), None)
        self._last = owner or self._last
        if given and _computes(func):
            made = (value for value in tree_iter(result) if isinstance(value, Tensor))
            if not all(map(_finite, made)):
                where = f"of {owner}" if owner else f"after {self._last or 'the start'}"
                self.first = f"{func.name()} {where} ({self.direction}) is the first op whose "
                self.first += "result is not finite"
        return result


def _computes(func) -> bool:
    """Not where the result is memory that nobody has written yet, or a view: either may hold
    anything.
    """
    views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
    return not views and not func.name().partition("::")[2].startswith(("empty", "new_empty"))


def _without_update(name: str) -> str:
    """A parameter's name, the layer's own: qkv.lora_A for qkv.updates.0.lora_A."""
    return re.sub(r"\.updates\.\d+", "", name)


def _finite(tensor: Tensor | None) -> bool:
    """Codes of 8 bits are finite by nature."""
    if tensor is None or not tensor.is_floating_point() or tensor.element_size() < 2:
        return True
    return bool(tensor.isfinite().all())  # sync: nothing is trained while a step is looked at
