"""Fills a Flux with a checkpoint's tensors."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
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
    aside = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
    in_bf16 = []
    for index, name in enumerate(names):
        module_name, _, kind = name.rpartition(".")
        module = cast(Any, model.get_submodule(module_name))
        if kind == "weight":
            precision = precisions[module_name]
            module.matmul, module.rotation = precision.matmul, precision.rotation
            with _memory_of(aside):
                weight = to_device(read(name), device)
                if not module.set_weight(weight, precision.storage, nested):
                    in_bf16.append(name)
                del weight
            if module_name in on_host:
                module.move_weight("cpu")
            elif aside is not None:
                module.move_weight(device)
        else:
            tensor = to_device(read(name), device)
            assert isinstance(tensor, Tensor)
            setattr(module, kind, tensor.to(model.compute_dtype, copy=True))
        if progress:
            progress(index + 1, len(names))
    return in_bf16


@contextmanager
def _memory_of(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Runs on a GPU's stream, whose memory the allocator keeps apart: what comes between dense and
    quantized splits no segment that weights lie in (int8: 1.1 GiB of holes in FLUX.1-dev's)."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
