"""Fills a Flux with a checkpoint's tensors or random ones."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from fluxfast.model.flux import Flux
from fluxfast.model.frozen_linear import Weight, to_device
from fluxfast.model.names import linear_shape, tensor_sources
from fluxfast.model.precision import Precision, activation_dtype, layer_precisions
from fluxfast.model.spec import FluxSpec


def fill(
    model: Flux,
    read: Callable[[str], Weight],
    precisions: Mapping[str, Precision],
    *,
    nested: bool = False,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Fills every tensor of `model` from `read(BFL name)`, one at a time, so that only one is ever
    dense: matrices as `precisions` says (see `layer_precisions`), others in the compute dtype.

    Returns the matrices that were to be nf4 and stayed bf16, because their K is not a multiple of
    64.
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
        else:
            assert isinstance(tensor, Tensor)
            setattr(module, kind, tensor.to(model.compute_dtype, copy=True))
        if progress:
            progress(index + 1, len(names))
    return in_bf16


def random_flux(
    spec: FluxSpec,
    storage: str = "fp32",
    compute: str = "fp32",
    device: str | torch.device = "cpu",
    seed: int = 0,
    *,
    activations: str = "auto",
    layers: Mapping[str, str] | None = None,
) -> Flux:
    """Returns a Flux with random weights made on the device: for benchmarks and tests.

    Arguments as for `load_transformer`, with neither storage nor compute `auto`. Matrices are
    N(0, 1/K), biases N(0, 0.02²), norm scales 1 + N(0, 0.02²).
    """
    generator = torch.Generator(device).manual_seed(seed)

    def read(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        if kind == "scale":
            shape, mean, std = (spec.head_dim,), 1.0, 0.02
        elif kind == "bias":
            shape, mean, std = linear_shape(module, spec)[:1], 0.0, 0.02
        else:
            shape = linear_shape(module, spec)
            mean, std = 0.0, shape[1] ** -0.5
        return torch.randn(shape, generator=generator, device=device).mul_(std).add_(mean)

    model = Flux(spec, activation_dtype(compute, activations, torch.device(device)))
    fill(model, read, layer_precisions(spec, storage, compute, layers), device=device)
    return model
