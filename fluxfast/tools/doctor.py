"""`fluxfast doctor`: what this machine offers, and what is missing."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

from fluxfast.util.platform import available_memory

_NEEDED = (
    "torch", "safetensors", "bitsandbytes", "transformers", "diffusers", "sentencepiece",
    "huggingface_hub", "prodigyopt", "schedulefree", "pydantic", "tensorboard",
)  # fmt: skip


def report() -> tuple[list[str], bool]:
    """Returns the lines to print, and whether training can run here."""
    rows = [("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name in _NEEDED:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "MISSING: `make install`"))
    rows.append(("", ""))
    try:
        rows += _torch_rows()
    except ImportError as error:
        rows.append(("torch", f"MISSING: does not import: {error}"))
    rows += _disk_rows()
    healthy = not any(text.startswith("MISSING") for _, text in rows)
    return [f"{label:<16} {text}".rstrip() for label, text in rows], healthy


def _torch_rows() -> list[tuple[str, str]]:
    import torch
    from fluxfast_kernels.dispatch import backend
    from fluxfast_kernels.quant import native

    from fluxfast.formats.base import load
    from fluxfast.memory.planner.suggest import host_memory
    from fluxfast.model.precision import activation_dtype, multiplies_bf16

    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        card = torch.cuda.get_device_properties(device)
        kinds = ["bf16" if multiplies_bf16(device) else "no bf16"]
        kinds += load.multiplies_8_bits((card.major, card.minor))
        size = f"{card.total_memory / 2**30:.1f} GiB, sm_{card.major}{card.minor}"
        rows.append((f"GPU {index}", f"{card.name}, {size}, {', '.join(kinds)}"))
        if backend.HAS_TRITON and (fault := load.broken_compiler(device)):
            rows.append((f"GPU {index}", f"MISSING: {'; '.join(fault)}"))
    absent = f"MISSING: a GPU's kernels need it: `{load.TRITON}`" if rows else "only a GPU needs it"
    triton = backend.triton.__version__ if backend.HAS_TRITON else absent
    if not rows:
        built = torch.version.cuda or "none: a CPU build"
        reason = load.why_no_gpu() or f"none found (torch's CUDA: {built})"
        rows.append(("GPU", f"{reason}; training runs on the CPU"))
    rows.insert(0, ("triton", triton))
    bf16 = "yes" if multiplies_bf16(torch.device("cpu")) else "no, fp32 is used"
    rows.append(("CPU", f"{torch.get_num_threads()} threads, bf16 products in hardware: {bf16}"))
    isa = native.isa()
    built = f"C++, {isa}" if isa else "plain PyTorch: csrc/ was not built"
    rows.append(("NF4, int8 (CPU)", built))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    storage, compute = load.resolve_precision("auto", "auto", device)
    dtype = str(activation_dtype(compute, "auto", device)).removeprefix("torch.")
    chosen = f"device {device.type}, storage {storage}, compute {compute}, activations {dtype}"
    rows.append(("auto means", chosen))
    free, pinned = (f"{size / 2**30:.1f} GiB" for size in (available_memory(), host_memory()))
    return [*rows, ("host memory", f"{free} free, a plan may pin {pinned}")]


def _disk_rows() -> list[tuple[str, str]]:
    rows = [("free here", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB")]
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return rows
    rows.append(("Hub cache", str(constants.HF_HUB_CACHE)))
    if constants.HF_HUB_OFFLINE:
        rows.append(("Hub", "offline (HF_HUB_OFFLINE)"))
    token = get_token() or os.environ.get("HF_TOKEN")
    rows.append(("Hub token", "yes" if token else "no: gated models need `hf auth login`"))
    return rows
