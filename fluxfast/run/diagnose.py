"""Why a step had no finite loss and gradient: its samples go through the model again, one at a time
and outside graphs, and the result of every op is checked.

Random numbers are functions of the step, so it is the same step. Only results of ops are seen, not
what happens inside one.
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
    """Returns a line for each of this rank's samples of step `step` (counted from 1) that is not
    finite, or one for weights that are not.

    Leaves the gradients at zero, and drops graphs, whose memory is needed.
    """
    run.graphs.drop()
    if broken := [name for name, tensor in _weights(run) if not _finite(tensor)]:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        return [f"weights that are not finite: {', '.join(broken[:3])}{more}"]
    lines = []
    accumulation = run.config.train.gradient_accumulation
    try:
        for number in range((step - 1) * accumulation, step * accumulation):
            for name, fault in _faults(run, run.loader.batch(number)):
                lines.append(f"step {step}, {name}: {fault}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        lines.append("memory ran out while the step was repeated")
    run.flat.gradients.zero_()
    return lines


def _weights(run: Training) -> list[tuple[str, Tensor]]:
    """Returns parameters and buffers, named by their layer: qkv.lora_A for qkv.updates.0.lora_A."""
    tensors = [*run.model.named_parameters(), *run.model.named_buffers()]
    return [(re.sub(r"\.updates\.\d+", "", name), tensor) for name, tensor in tensors]


def _faults(run: Training, batch: Batch) -> Iterator[tuple[str, str]]:
    """Yields (name, what is not finite) for the samples of a batch."""
    inputs = run.inputs(batch)
    count = len(batch.names)
    for row, name in enumerate(map(plain, batch.names)):
        sample = Inputs._make(  # positions are shared by all samples
            tensor[row : row + 1] if tensor is not None and len(tensor) == count else tensor
            for tensor in inputs
        )
        sample = sample._replace(modulation=None)  # computed again, where it is checked
        broken = [key for key, tensor in sample._asdict().items() if not _finite(tensor)]
        if broken:
            yield name, f"the cached sample itself is not finite ({broken[0]})"
        elif fault := _fault(run, sample, count):
            yield name, fault


def _fault(run: Training, inputs: Inputs, count: int) -> str | None:
    """Returns what is not finite of one sample's loss and gradients, and where it began.

    count: samples of its batch.
    """
    run.flat.gradients.zero_()
    watch = _Watch(run)
    with watch:
        loss = run.loss(inputs, count)
        watch.direction = "backward"
        loss.backward()
    broken = [
        f"{name}.{kind}"
        for name, layer in lora_layers(run.model).items()
        for kind in ("lora_A", "lora_B")
        if not _finite(getattr(layer, kind).grad)
    ]
    if watch.first is None and not broken and _finite(loss):
        norm = torch.linalg.vector_norm(run.flat.gradients)
        return None if _finite(norm) else "every gradient is finite, but their norm is not"
    line = watch.first or "no op gave anything that is not finite"
    line += f"; loss {loss.item():.4g}"
    if broken:
        line += f"; {len(broken)} gradients are not finite, that of {broken[-1]} among them"
    return line


class _Watch(TorchDispatchMode):
    """Remembers the first op of forward and backward whose result is not finite."""

    def __init__(self, run: Training):
        super().__init__()
        self._layer_of = {
            tensor.data_ptr(): name.rpartition(".")[0]
            for name, tensor in _weights(run)
            if tensor.numel() and tensor.device == run.device
        }
        self._last: str | None = None  # the layer whose op ran last
        self.direction = "forward"
        self.first: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.first is not None:
            return result
        inputs, outputs = (
            [value for value in tree_iter(tree) if isinstance(value, Tensor)]
            for tree in ((args, kwargs), result)
        )
        layers = (self._layer_of.get(tensor.data_ptr()) for tensor in inputs)
        layer = next(filter(None, layers), None)
        self._last = layer or self._last
        if inputs and _computes(func) and not all(map(_finite, outputs)):
            where = f"of {layer}" if layer else f"after {self._last or 'the start'}"
            self.first = f"{func.name()} {where} ({self.direction}) is the first op whose "
            self.first += "result is not finite"
        return result


def _computes(func) -> bool:
    """Returns False where the result is a view or unwritten memory: either may hold anything."""
    views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
    return not views and not func.name().partition("::")[2].startswith(("empty", "new_empty"))


def _finite(tensor: Tensor | None) -> bool:
    """Returns whether all values are finite; 8-bit formats always are."""
    if tensor is None or not tensor.is_floating_point() or tensor.element_size() < 2:
        return True
    return bool(tensor.isfinite().all())  # sync: nothing is trained while a step is checked
