"""How each linear of the model is kept and multiplied, from the storage, the kind of matmul and the
choices made for single layers.

Inside the blocks everything is kept in `storage`; around them in bf16, or fp32 where that is the
storage. With 8-bit matmul the blocks' linears multiply in codes, but for their modulation: it runs
on one token a picture, so there is no time in it, and every token's norm hangs on it.
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
    """Of one linear. storage: fp32, bf16, nf4, int8 or fp8. matmul: "int8" or "fp8", products of
    8-bit codes; "" in the activations' dtype. rotation: columns a block of the Hadamard rotation
    that the weight is kept in; 0 for none.
    """

    storage: str
    matmul: str = ""
    rotation: int = 0


def linears(spec: FluxSpec) -> list[str]:
    """BFL names of every linear of the model, the blocks' first."""
    tensors = (name.rpartition(".") for name in tensor_sources(spec))
    return [module for module, _, kind in tensors if kind == "weight"]


def multiplies_in_8_bits(name: str) -> bool:
    """Whether a linear has 8-bit products where matmul is int8 or fp8 and nothing else is said."""
    return "_blocks." in name and "mod" not in name


def input_widths(name: str, spec: FluxSpec) -> tuple[int, ...]:
    """Widths of the inputs that a linear takes side by side: one, or attention's and the MLP's."""
    if name.endswith("linear2"):
        return spec.hidden_size, spec.mlp_hidden
    return (linear_shape(name, spec)[1],)


def rotation_of(name: str, spec: FluxSpec) -> int:
    """Columns a block of the rotation that fits a linear's inputs; 0 where their width is odd."""
    rotation = largest_rotation(*input_widths(name, spec))
    return rotation if rotation > 1 else 0


def layer_precisions(
    spec: FluxSpec, storage: str, matmul: str, choices: Mapping[str, str] | None = None
) -> dict[str, Precision]:
    """BFL name -> Precision, of every linear of the model.

    storage, matmul: without `auto`. choices: name or glob -> `8bit` (products of matmul's kind),
    `rotate` (these on the rotated weight and input) or `bf16` (dense, fp32 where the storage is);
    the last pattern that matches wins. nf4 of a layer whose K is not a multiple of 64 becomes bf16
    where the weight is set.

    Raises ConfigError for a pattern that matches nothing, for 8-bit products without 8-bit matmul,
    and for a rotation that does not fit.
    """
    kind = matmul if matmul in IN_8_BITS else ""
    dense = "fp32" if storage == "fp32" else "bf16"
    precisions = {}
    for name, choice in _chosen(linears(spec), choices or {}).items():
        kept = storage if "_blocks." in name else dense
        if choice == "bf16":
            precisions[name] = Precision(dense)
        elif choice is None:
            precisions[name] = Precision(kept, kind if multiplies_in_8_bits(name) else "")
        elif not kind:
            raise ConfigError(
                f"model.layers: {name} is to be {choice}, compute is {matmul}: there are no 8-bit "
                "products to give it",
                hint="--set model.compute=int8 (or fp8), or take it out of model.layers",
            )
        elif choice == "8bit":
            precisions[name] = Precision(kept, kind)
        elif rotation := rotation_of(name, spec):
            precisions[name] = Precision(kept, kind, rotation)
        else:
            width = linear_shape(name, spec)[1]
            raise ConfigError(
                f"model.layers: {name} cannot be rotated, its input width {width} is odd",
                hint=f"{name}: bf16 keeps it out of 8-bit products",
            )
    return precisions


def _chosen(names: list[str], choices: Mapping[str, str]) -> dict[str, str | None]:
    """name -> what was chosen for it last, None where nothing was."""
    chosen: dict[str, str | None] = dict.fromkeys(names)
    for pattern, choice in choices.items():
        if choice not in CHOICES:
            raise ConfigError(
                f"model.layers: {pattern!r} is to be {choice!r}, not one of {', '.join(CHOICES)}"
            )
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
            raise ConfigError(
                f"model.layers: {pattern!r} matches no linear of this model",
                hint=f"did you mean {(close or names)[0]!r}? a glob such as "
                "'single_blocks.*.linear2' matches several",
            )
        chosen |= dict.fromkeys(matched, choice)
    return chosen


# ---------------------------------------------------------------- the activations


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware there.

    Without it a CPU falls back to a scalar loop: 400 times slower than fp32 on an AVX2 Zen machine.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def activation_dtype(matmul: str, activations: str, device: torch.device) -> torch.dtype:
    """What norms, attention, the LoRA and all products that are not in 8 bits run in.

    activations: fp32, bf16 or `auto`: the matmul kind itself, and with 8-bit products bf16 where
    the device multiplies it. Raises ConfigError for another word or one that matmul contradicts.
    """
    if activations not in ("auto", *DTYPES):
        raise ConfigError(f"activations {activations!r} is not one of auto, {', '.join(DTYPES)}")
    if matmul not in IN_8_BITS:
        if activations not in ("auto", matmul):
            raise ConfigError(
                f"activations {activations} do not go with compute {matmul}",
                hint="they are chosen apart for 8-bit products alone: compute int8 or fp8",
            )
        return DTYPES[matmul]
    if activations == "auto":
        activations = "bf16" if multiplies_bf16(device) else "fp32"
    return DTYPES[activations]
