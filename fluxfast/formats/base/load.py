"""load_transformer: a base checkpoint on disk becomes a Flux on a device."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxfast.distributed import local_rank
from fluxfast.errors import ConfigError
from fluxfast.formats.base.reader import open_base
from fluxfast.model.flux import Flux
from fluxfast.model.init import fill
from fluxfast.model.precision import (
    DTYPES,
    IN_8_BITS,
    MATMULS,
    STORAGES,
    Precision,
    activation_dtype,
    layer_precisions,
    multiplies_bf16,
)
from fluxfast.model.spec import FluxSpec

log = logging.getLogger(__name__)

# What `auto` chooses on a GPU. Assumed from data sheets and from the formats' errors on a CPU: no
# GPU has timed it yet. A100 (8.0) multiplies int8 at twice the rate of bf16, GeForce (8.6, 8.9,
# 12.x) at four times, as its bf16 with fp32 sums runs at half rate; Hopper (9.x) has fp8 as fast as
# int8, and fp8 bears outliers better. From 40 GiB on, a base in 8 bits (12 GB) leaves room enough.
_INT8_CARDS = ((8, 0), (8, 6), (8, 9))
_ROOMY_GIB = 40
_LEAST = {"int8": (8, 0), "fp8": (8, 9)}  # compute capability that has such products


def resolve_device(device: str = "auto") -> torch.device:
    """`auto` is an NVIDIA GPU where there is one: the first, or of several processes on a machine
    each its own. Raises ConfigError for another kind of device, for a GPU that is not there, and
    for one that several processes are to share.
    """
    rank, processes = local_rank()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:  # not a name that torch knows
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not one of auto, cpu, cuda, cuda:N")
    if resolved.type == "cpu":
        return resolved
    if processes > 1 and resolved.index not in (None, rank):
        raise ConfigError(
            f"device {device!r} is one GPU, and {processes} processes run on this machine",
            hint="device: cuda gives each its own",
        )
    # by its number, as tensors name it; kernels, graphs and caches go by the current device
    resolved = torch.device("cuda", rank if resolved.index is None else resolved.index)
    if resolved.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device {str(resolved)!r} is not there: torch sees {torch.cuda.device_count()} NVIDIA "
            "GPUs",
            hint="`fluxfast doctor` shows what torch sees",
        )
    torch.cuda.set_device(resolved)
    return resolved


def resolve_precision(storage: str, matmul: str, device: torch.device) -> tuple[str, str]:
    """Replace `auto` by what suits the device, see `choose_precision`."""
    bf16 = multiplies_bf16(device)
    if device.type != "cuda":
        return choose_precision(storage, matmul, None, 0.0, bf16)
    card = torch.cuda.get_device_properties(device)
    gib = card.total_memory / 2**30
    return choose_precision(storage, matmul, (card.major, card.minor), gib, bf16)


def choose_precision(
    storage: str, matmul: str, capability: tuple[int, int] | None, memory_gib: float, bf16: bool
) -> tuple[str, str]:
    """Returns (storage, matmul) without `auto`. matmul: the setting `model.compute`; capability: of
    the GPU, None for a CPU; bf16: whether its products are in hardware.

    matmul on a GPU: int8 for 8.0, 8.6, 8.9 and 12.x, fp8 for 9.x; a base asked for in 8 bits
    decides the kind where the card has it. Otherwise, and on a CPU (whose int8 is there to study
    quality): bf16 where it is fast, else fp32. storage: fp32 on a CPU; on a GPU nf4, from 40 GiB on
    the 8 bits of matmul.

    Raises ConfigError for an unknown word, products that the GPU lacks, and two kinds of 8 bits.
    """
    for what, got, known in (("storage", storage, STORAGES), ("compute", matmul, MATMULS)):
        if got not in ("auto", *known):
            raise ConfigError(f"{what} {got!r} is not one of auto, {', '.join(known)}")
    if matmul == "auto":
        matmul = _auto_kind(storage, capability) or ("bf16" if bf16 else "fp32")
    if storage == "auto":
        in_codes = matmul in IN_8_BITS and memory_gib >= _ROOMY_GIB
        storage = "fp32" if capability is None else matmul if in_codes else "nf4"
    if {storage, matmul} == set(IN_8_BITS):
        raise ConfigError(
            f"storage {storage} and compute {matmul} do not go together: the codes that are kept "
            "are the codes that are multiplied",
            hint=f"--set model.compute={storage}, or --set model.storage=nf4",
        )
    if capability and matmul in IN_8_BITS and matmul not in multiplies_8_bits(capability):
        least, has = (".".join(map(str, pair)) for pair in (_LEAST[matmul], capability))
        raise ConfigError(
            f"compute {matmul} needs a GPU of compute capability {least}, this one has {has}",
            hint="--set model.compute=auto takes what it has",
        )
    return storage, matmul


def stored_as(storage: str, matmul: str, kept: str | None) -> str:
    """What `auto` storage becomes for a file that is quantized already: kept, the storage it was
    made for (None for another file). Not where matmul asks for the other kind of 8 bits.
    """
    if storage != "auto" or kept is None or {kept, matmul} == set(IN_8_BITS):
        return storage
    return kept


def multiplies_8_bits(capability: tuple[int, int]) -> list[str]:
    """The kinds of 8-bit products that a GPU has."""
    return [kind for kind, least in _LEAST.items() if capability >= least]


def _auto_kind(storage: str, capability: tuple[int, int] | None) -> str:
    """int8 or fp8 where the GPU gains by it, else nothing."""
    if capability is None:
        return ""
    kind = "fp8" if capability[0] == 9 else ""
    if capability in _INT8_CARDS or capability[0] == 12:
        kind = "int8"
    if kind and storage in IN_8_BITS:
        return storage if storage in multiplies_8_bits(capability) else ""
    return kind


@dataclass(frozen=True)
class ResolvedModel:
    """A base checkpoint and how it is stored and multiplied on a device: nothing is `auto` here.

    storage: fp32, bf16, nf4, int8 or fp8, of the blocks' matrices. matmul: fp32, bf16, or int8 or
    fp8 for products of 8-bit codes in the blocks (the setting `model.compute`). activations: fp32
    or bf16. precisions: BFL name -> Precision, of every linear.
    """

    path: Path
    spec: FluxSpec
    storage: str
    matmul: str
    activations: str
    precisions: Mapping[str, Precision]


def resolve_model(
    path: Path | str,
    storage: str,
    matmul: str,
    device: torch.device,
    *,
    activations: str = "auto",
    layers: Mapping[str, str] | None = None,
) -> ResolvedModel:
    """Reads the checkpoint's header, and decides what `auto` means for it on the device.

    Arguments as `load_transformer` takes them, matmul its `compute`. Raises ConfigError for a
    precision that cannot be, FluxfastError for a file that is no such model.
    """
    with open_base(path) as base:
        spec, stored = base.spec, base.storage
    storage, matmul = resolve_precision(stored_as(storage, matmul, stored), matmul, device)
    dtype = activation_dtype(matmul, activations, device)
    word = next(word for word, known in DTYPES.items() if known == dtype)
    precisions = layer_precisions(spec, storage, matmul, layers)
    return ResolvedModel(Path(path), spec, storage, matmul, word, precisions)


def load_transformer(
    path: Path | str,
    storage: str = "auto",
    compute: str = "auto",
    device: str | torch.device = "auto",
    *,
    activations: str = "auto",
    layers: Mapping[str, str] | None = None,
    double_quant: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Flux:
    """Load a FLUX.1 transformer, frozen, tensor by tensor (one dense matrix in memory at a time).

    path: a diffusers pipeline folder or its `transformer/`, or one .safetensors or GGUF file.
    storage: fp32, bf16, nf4, int8 or fp8 for the blocks' matrices; compute: fp32, bf16, or int8 or
    fp8 for products of 8-bit codes in the blocks; `auto` chooses by device, and storage by the file
    where that is quantized. What a file has in codes of the storage asked for stays as it is (on a
    CPU it even stays in the file, mapped). activations: fp32 or bf16 beside 8-bit products, `auto`
    by device. layers: name or glob -> 8bit, rotate or bf16, see `model.precision`. What is done
    otherwise than asked is logged as a warning; progress gets (done, total). Raises FluxfastError
    (ConfigError for a wrong argument or a file that is no such model).
    """
    place = resolve_device(str(device))
    model = resolve_model(path, storage, compute, place, activations=activations, layers=layers)
    return load_resolved(model, place, double_quant=double_quant, progress=progress)


def load_resolved(
    model: ResolvedModel,
    device: torch.device,
    *,
    double_quant: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Flux:
    """Load the weights, see `load_transformer`."""
    flux = Flux(model.spec, DTYPES[model.activations])
    with open_base(model.path) as base:
        kept = fill(
            flux, base.read_stored, model.precisions,
            nested=double_quant, device=device, progress=progress,
        )  # fmt: skip
    if kept:
        log.warning(
            f"note: {len(kept)} matrices stay bf16 instead of nf4: their input width is not a "
            f"multiple of 64 (such as {kept[0]})"
        )
    return flux
