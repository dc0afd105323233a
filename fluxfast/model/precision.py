"""Decides how each linear of the model is stored and multiplied.

Inside the blocks weights are kept in `storage`; around them in bf16, or fp32 with storage fp32.
With an 8-bit matmul the blocks' linears multiply in 8 bits, except their modulation: it runs on one
token per image, so it takes no time, and every token's norm depends on it.
"""

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from fluxfast_kernels.quant.hadamard import largest_rotation

from fluxfast.errors import ConfigError
from fluxfast.model.names import linear_shape, tensor_sources
from fluxfast.model.spec import FluxSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STORAGES = ("fp32", "bf16", "nf4", "int8", "fp8")
MATMULS = ("fp32", "bf16", "int8", "fp8")
IN_8_BITS = ("int8", "fp8")
CHOICES = ("8bit", "rotate", "bf16")


@dataclass(frozen=True)
class Precision:
    """One linear's precision. storage: fp32, bf16, nf4, int8 or fp8. matmul: int8 or fp8 for 8-bit
    products, "" for the activations' dtype. rotation: columns per block of the weight's Hadamard
    rotation, 0 for none.
    """

    storage: str
    matmul: str = ""
    rotation: int = 0


def linears(spec: FluxSpec) -> list[str]:
    """Returns the BFL names of every linear of the model, the blocks' first."""
    tensors = (name.rpartition(".") for name in tensor_sources(spec))
    return [module for module, _, kind in tensors if kind == "weight"]


def multiplies_in_8_bits(name: str) -> bool:
    """Returns whether a linear has 8-bit products by default if matmul is int8 or fp8."""
    return "_blocks." in name and "mod" not in name


def input_widths(name: str, spec: FluxSpec) -> tuple[int, ...]:
    """Returns the widths of a linear's inputs side by side: one, or attention's and the MLP's."""
    if name.endswith("linear2"):
        return spec.hidden_size, spec.mlp_hidden
    return (linear_shape(name, spec)[1],)


def rotation_of(name: str, spec: FluxSpec) -> int:
    """Returns the columns per block of the rotation that fits a linear's inputs; 0 if none does."""
    rotation = largest_rotation(*input_widths(name, spec))
    return rotation if rotation > 1 else 0


def layer_precisions(
    spec: FluxSpec, storage: str, matmul: str, choices: Mapping[str, str] | None = None
) -> dict[str, Precision]:
    """Returns BFL name -> Precision of every linear of the model.

    storage, matmul: without `auto`. choices: name or glob -> `8bit` (products of matmul's kind),
    `rotate` (the same with weight and input rotated) or `bf16` (dense, fp32 if the storage is); the
    last pattern that matches wins. nf4 with K % 64 != 0 becomes bf16 when the weight is set.

    Raises ConfigError for a pattern that matches nothing, for 8-bit products without 8-bit matmul,
    and for a rotation that does not fit.
    """
    kind = matmul if matmul in IN_8_BITS else ""
    dense = "fp32" if storage == "fp32" else "bf16"
    precisions = {}
    for name, choice in _chosen(linears(spec), choices or {}).items():
        if choice == "bf16":
            precisions[name] = Precision(dense)
            continue
        if choice and not kind:
            raise ConfigError(
                f"model.layers: {name} is to be {choice}, compute is {matmul}: there are no 8-bit "
                "products to give it",
                hint="compute: int8 (or fp8), or take it out of the layers",
            )
        rotation = rotation_of(name, spec) if choice == "rotate" else 0
        if choice == "rotate" and not rotation:
            width = linear_shape(name, spec)[1]
            raise ConfigError(
                f"model.layers: {name} cannot be rotated, its input width {width} is odd",
                hint=f"{name}: bf16 keeps it out of 8-bit products",
            )
        in_8_bits = choice or multiplies_in_8_bits(name)
        kept = storage if "_blocks." in name else dense
        precisions[name] = Precision(kept, kind if in_8_bits else "", rotation)
    return precisions


def _chosen(names: list[str], choices: Mapping[str, str]) -> dict[str, str | None]:
    """Returns name -> the last choice that matches, or None."""
    chosen: dict[str, str | None] = dict.fromkeys(names)
    for pattern, choice in choices.items():
        if choice not in CHOICES:
            raise ConfigError(
                f"model.layers: {pattern!r} is to be {choice!r}, not one of {', '.join(CHOICES)}"
            )
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
            raise ConfigError(
                f"model.layers: {pattern!r} matches no linear of this model",
                hint=f"did you mean {(close or names)[0]!r}? a glob such as "
                "'single_blocks.*.linear2' matches several",
            )
        chosen |= dict.fromkeys(matching, choice)
    return chosen


def multiplies_bf16(device: torch.device) -> bool:
    """Returns whether the device multiplies bf16 matrices in hardware.

    A CPU without it falls back to a scalar loop: 400 times slower than fp32 on an AVX2 Zen machine.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def activation_dtype(matmul: str, activations: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of norms, attention, the LoRA and all products that are not in 8 bits.

    activations: fp32, bf16 or `auto`: matmul's own dtype, or with 8-bit products bf16 if the device
    multiplies it. Raises ConfigError for another word or one that contradicts matmul.
    """
    if activations not in ("auto", *DTYPES):
        raise ConfigError(f"activations {activations!r} is not one of auto, {', '.join(DTYPES)}")
    if matmul in IN_8_BITS:
        if activations == "auto":
            activations = "bf16" if multiplies_bf16(device) else "fp32"
    elif activations in ("auto", matmul):
        activations = matmul
    else:
        raise ConfigError(
            f"activations {activations} do not go with compute {matmul}",
            hint="they are chosen apart for 8-bit products alone: compute int8 or fp8",
        )
    return DTYPES[activations]
