"""load_transformer: a base checkpoint on disk becomes a Flux on a device."""

from collections.abc import Callable
from pathlib import Path

import torch

from fluxfast.errors import ConfigError
from fluxfast.formats.base import open_base
from fluxfast.model.flux import DTYPES, Flux, fill

STORAGES = ("fp32", "bf16", "nf4")


def resolve_device(device: str = "auto") -> torch.device:
    """`auto` is the first NVIDIA GPU where there is one. Raises ConfigError for another
    kind of device and for a GPU that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:  # not a name that torch knows
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not one of auto, cpu, cuda, cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device!r} is not there: torch sees {torch.cuda.device_count()} NVIDIA GPUs",
            hint="`fluxfast doctor` shows what torch sees",
        )
    return resolved


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware there.

    Without it a CPU falls back to a scalar loop: 400 times slower than fp32 on an AVX2 Zen machine.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def resolve_precision(storage: str, compute: str, device: torch.device) -> tuple[str, str]:
    """Replace `auto`: storage is nf4 on a GPU and fp32 on a CPU, compute bf16 where it is fast."""
    if compute == "auto":
        compute = "bf16" if multiplies_bf16(device) else "fp32"
    if storage == "auto":
        storage = "nf4" if device.type == "cuda" else "fp32"
    if storage not in STORAGES:
        raise ConfigError(f"storage {storage!r} is not one of {', '.join(STORAGES)}")
    if compute not in DTYPES:
        raise ConfigError(f"compute {compute!r} is not one of {', '.join(DTYPES)}")
    return storage, compute


def load_transformer(
    path: Path | str,
    storage: str = "auto",
    compute: str = "auto",
    device: str | torch.device = "auto",
    *,
    double_quant: bool = False,
    announce: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Flux:
    """Load a FLUX.1 transformer, frozen, tensor by tensor (one dense matrix in memory at a time).

    path: a diffusers pipeline folder or its `transformer/`, or one BFL .safetensors file.
    storage: fp32, bf16 or nf4 for the blocks' matrices; compute: fp32 or bf16; `auto` chooses by
    device. announce gets one line per thing that was done otherwise than asked; progress gets
    (done, total). Raises FluxfastError (ConfigError for a wrong argument).
    """
    device = resolve_device(str(device))
    storage, compute = resolve_precision(storage, compute, device)
    with open_base(path) as base:
        model = Flux(base.spec, DTYPES[compute])
        kept = fill(
            model, base.read, storage, nested=double_quant, device=device, progress=progress
        )
    if kept and announce:
        announce(
            f"{len(kept)} matrices stay bf16 instead of nf4: their input width is not a "
            f"multiple of 64 (such as {kept[0]})"
        )
    return model
