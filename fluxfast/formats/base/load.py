"""load_transformer: loads a base checkpoint as a Flux on a device."""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.quant.rows import quantize_rows
from torch.special import ndtri

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

# What `auto` chooses on a GPU. Assumed from data sheets and from the formats' errors on a CPU; not
# timed on a GPU yet. A100 (8.0) multiplies int8 at twice the rate of bf16, GeForce (8.6, 8.9, 12.x)
# at four times, as its bf16 with fp32 sums runs at half rate; Hopper (9.x) has fp8 as fast as int8,
# and fp8 keeps outliers better. From 40 GiB on, a base in 8 bits (12 GB) leaves room enough.
_INT8_CARDS = ((8, 0), (8, 6), (8, 9))
_ROOMY_GIB = 40
# what installs Triton: that for Windows is a distribution of its own
TRITON = f"pip install {'triton-windows' if sys.platform == 'win32' else 'triton'}"
_LEAST = {"int8": (8, 0), "fp8": (8, 9)}  # compute capability that has such products


def resolve_device(device: str = "auto") -> torch.device:
    """Returns the device. `auto` is an NVIDIA GPU if there is one: the first, or for several
    processes on a machine one each.

    Raises ConfigError for another kind of device, for a GPU that is not there, for one that several
    processes would share, and for any without Triton.
    """
    rank, processes = local_rank()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            _note_cpu()
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
    # with an index, as tensors have it; kernels, graphs and caches use the current device
    resolved = torch.device("cuda", rank if resolved.index is None else resolved.index)
    if resolved.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device {str(resolved)!r} is not there: torch sees {torch.cuda.device_count()} NVIDIA "
            "GPUs",
            hint="`fluxfast doctor` shows what torch sees",
        )
    if not backend.HAS_TRITON:
        raise ConfigError("on a GPU every kernel is Triton's, and Triton is not here", hint=TRITON)
    torch.cuda.set_device(resolved)
    return resolved


def why_no_gpu() -> str | None:
    """Returns why torch uses no GPU on a machine with NVIDIA's driver, None where all is well."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or shutil.which("nvidia-smi") is None:
        return None
    if torch.version.cuda is None:
        return "this torch is built for CPUs alone"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # such as a driver that is too old
        return str(error).splitlines()[0]
    return None


def broken_compiler(device: torch.device) -> tuple[str, str] | None:
    """Returns (what it raises, the cure) of a compiler that a GPU needs and that does not work:
    Triton's, tried by a small kernel, or NVRTC, by the one op of torch's that timesteps need.
    """
    if device.type != "cuda":
        return None
    x = torch.full((1, 1, 128), 0.5, device=device)
    for name, cure, use in (
        ("Triton", "install a C compiler and Python's headers", lambda: quantize_rows(x, "int8")),
        ("NVRTC", "install torch anew, with the CUDA libraries it requires", lambda: ndtri(x)),
    ):
        try:
            use()
        except Exception as error:  # of Triton's a dozen kinds
            first = next(iter(str(error).splitlines()), type(error).__name__)
            return f"{name} does not work: {first}", cure
    return None


@cache
def _note_cpu() -> None:
    """Logs, once, why a machine with a GPU trains on its CPU."""
    if reason := why_no_gpu():
        log.warning(f"note: device auto is the CPU: {reason}")


def resolve_precision(
    storage: str, matmul: str, device: torch.device, stored: str | None = None
) -> tuple[str, str]:
    """Replaces `auto` by what suits the device, see `choose_precision`."""
    capability, gib = None, 0.0
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        capability, gib = (card.major, card.minor), card.total_memory / 2**30
    return choose_precision(storage, matmul, capability, gib, multiplies_bf16(device), stored)


def choose_precision(
    storage: str,
    matmul: str,
    capability: tuple[int, int] | None,
    memory_gib: float,
    bf16: bool,
    stored: str | None = None,
) -> tuple[str, str]:
    """Returns (storage, matmul) without `auto`.

    matmul: the setting `model.compute`; capability: of the GPU, None for a CPU; bf16: whether the
    device has bf16 products in hardware; stored: the storage that the file is quantized in.

    `auto` storage is `stored`, unless matmul asks for the other kind of 8 bits; else fp32 on a CPU,
    nf4 on a GPU, from 40 GiB on the 8 bits of matmul. `auto` matmul is on a GPU int8 for 8.0, 8.6,
    8.9 and 12.x and fp8 for 9.x, of the storage's kind if that is in 8 bits and the GPU has such
    products; otherwise, and on a CPU (whose int8 is for studies of quality), bf16 if it is fast,
    else fp32.

    Raises ConfigError for an unknown word, products that the GPU lacks, and two kinds of 8 bits.
    """
    for setting, value, words in (("storage", storage, STORAGES), ("compute", matmul, MATMULS)):
        if value not in ("auto", *words):
            raise ConfigError(f"{setting} {value!r} is not one of auto, {', '.join(words)}")
    if storage == "auto" and stored is not None and {stored, matmul} != set(IN_8_BITS):
        storage = stored
    if matmul == "auto":
        matmul = _auto_8_bits(storage, capability) or ("bf16" if bf16 else "fp32")
    if storage == "auto":
        roomy = matmul in IN_8_BITS and memory_gib >= _ROOMY_GIB
        storage = "fp32" if capability is None else matmul if roomy else "nf4"
    if {storage, matmul} == set(IN_8_BITS):
        raise ConfigError(
            f"storage {storage} and compute {matmul} do not go together: the stored values are the "
            "ones that are multiplied",
            hint=f"compute: {storage}, or storage: nf4",
        )
    if capability and matmul in IN_8_BITS and matmul not in multiplies_8_bits(capability):
        least, has = (".".join(map(str, pair)) for pair in (_LEAST[matmul], capability))
        raise ConfigError(
            f"compute {matmul} needs a GPU of compute capability {least}, this one has {has}",
            hint="compute: auto chooses one that it has",
        )
    return storage, matmul


def multiplies_8_bits(capability: tuple[int, int]) -> list[str]:
    """Returns the kinds of 8-bit products that a GPU has."""
    return [kind for kind, least in _LEAST.items() if capability >= least]


def _auto_8_bits(storage: str, capability: tuple[int, int] | None) -> str:
    """Returns int8 or fp8 if the GPU is faster with it, else an empty string."""
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
    """A base checkpoint and how it is stored and multiplied on a device, without `auto`.

    storage: fp32, bf16, nf4, int8 or fp8, of the blocks' matrices. matmul: fp32, bf16, or int8 or
    fp8 for 8-bit products in the blocks (the setting `model.compute`). activations: fp32 or bf16.
    precisions: BFL name -> Precision, of every linear.
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
    """Reads the checkpoint's header and decides what `auto` means for it on the device.

    The arguments are those of `load_transformer`, matmul its `compute`. Raises ConfigError for a
    precision that is impossible, FluxfastError for a file that is no such model.
    """
    with open_base(path) as base:
        spec, stored = base.spec, base.storage
    storage, matmul = resolve_precision(storage, matmul, device, stored)
    dtype = activation_dtype(matmul, activations, device)
    activations = next(word for word, known in DTYPES.items() if known == dtype)
    precisions = layer_precisions(spec, storage, matmul, layers)
    return ResolvedModel(Path(path), spec, storage, matmul, activations, precisions)


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
    """Loads a FLUX.1 transformer, frozen, tensor by tensor (one dense matrix in memory at a time).

    path: a diffusers pipeline folder or its `transformer/`, or one .safetensors or GGUF file.
    storage: fp32, bf16, nf4, int8 or fp8 for the blocks' matrices; compute: fp32, bf16, or int8 or
    fp8 for 8-bit products in the blocks; `auto` chooses by device, and storage by the file if that
    is quantized. Matrices that the file has in the storage asked for stay as they are (on a CPU
    mapped from the file). activations: fp32 or bf16 beside 8-bit products, `auto` by device.
    layers: name or glob -> 8bit, rotate or bf16, see `model.precision`. Deviations from what was
    asked are logged as warnings; progress gets (done, total). Raises FluxfastError (ConfigError for
    a wrong argument or a file that is no such model).
    """
    target = resolve_device(str(device))
    model = resolve_model(path, storage, compute, target, activations=activations, layers=layers)
    return load_resolved(model, target, double_quant=double_quant, progress=progress)


def load_resolved(
    model: ResolvedModel,
    device: torch.device,
    *,
    double_quant: bool = False,
    on_host: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Flux:
    """Loads the weights, see `load_transformer`; on_host: as for `fill`."""
    flux = Flux(model.spec, DTYPES[model.activations])
    with open_base(model.path) as base:
        dense = fill(
            flux, base.read_stored, model.precisions,
            nested=double_quant, device=device, on_host=on_host, progress=progress,
        )  # fmt: skip
    if device.type == "cuda":  # what the matrices were quantized in
        torch.cuda.empty_cache()
    if dense:
        log.warning(
            f"note: {len(dense)} matrices stay bf16 instead of nf4: their input width is not a "
            f"multiple of 64 (such as {dense[0]})"
        )
    return flux
