"""Fills a Flux with a checkpoint's tensors."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from fluxfast.model.flux import Flux
from fluxfast.model.frozen_linear import Weight, to_device
from fluxfast.model.names import tensor_sources
from fluxfast.model.precision import Precision, linears
from fluxfast.model.spec import FluxSpec


def hollow(spec: FluxSpec) -> Flux:
    """Returns a Flux without weights, to try on it whether a LoRA fits. It cannot run."""
    model = Flux(spec, torch.float32)
    for name in linears(spec):
        model.linear(name).weight = torch.empty(0)
    return model


def fill(
    model: Flux,
    read: Callable[[str], Weight],
    precisions: Mapping[str, Precision],
    *,
    nested: bool = False,
    device: str | torch.device = "cpu",
    on_host: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Fills every tensor of `model` from `read(BFL name)`, one at a time, so that only one is ever
    dense: matrices as `precisions` says (see `layer_precisions`), others in the compute dtype.

    on_host: names of linears whose weight is stored on the host. Each is quantized on the device,
    for the same bits, and leaves before the next comes: one that left later would leave a hole
    between weights that stay, which a graph's memory pool cannot use. Returns the matrices that
    were to be nf4 and stayed bf16, because their K is not a multiple of 64.
    """
    names = list(tensor_sources(model.spec))
    in_bf16 = []
    for index, name in enumerate(names):
        module_name, _, kind = name.rpartition(".")
        module = cast(Any, model.get_submodule(module_name))
        tensor = to_device(read(name), device)
        if kind == "weight":
            precision = precisions[module_name]
            module.matmul, module.rotation = precision.matmul, precision.rotation
            if not module.set_weight(tensor, precision.storage, nested):
                in_bf16.append(name)
            if module_name in on_host:
                module.move_weight("cpu")
        else:
            assert isinstance(tensor, Tensor)
            setattr(module, kind, tensor.to(model.compute_dtype, copy=True))
        if progress:
            progress(index + 1, len(names))
    return in_bf16
