"""`fluxfast doctor`: what this machine offers, and what is missing."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

_NEEDED = (
    "torch", "triton", "safetensors", "bitsandbytes", "transformers", "diffusers", "sentencepiece",
    "huggingface_hub", "prodigyopt", "schedulefree", "pydantic", "tensorboard",
)  # fmt: skip


def report() -> tuple[list[str], bool]:
    """-> (lines to print, whether training can run here)."""
    lines = [
        f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"
    ]
    healthy = True
    for name in _NEEDED:
        try:
            lines.append(f"{name:<16} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            optional = name == "triton" and platform.system() != "Linux"
            healthy &= optional
            lines.append(
                f"{name:<16} {'not here (Linux only)' if optional else 'MISSING: `make install`'}"
            )
    lines.append("")
    try:
        lines += _torch_lines()
    except ImportError as error:
        lines.append(f"torch does not import: {error}")
        healthy = False
    lines += _disk_lines()
    return lines, healthy


def _torch_lines() -> list[str]:
    import torch
    from fluxfast_kernels.quant import native

    from fluxfast.formats.base.load import multiplies_8_bits, resolve_precision
    from fluxfast.model.precision import activation_dtype, multiplies_bf16

    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        bf16 = "bf16" if multiplies_bf16(device) else "no bf16"
        capability = properties.major, properties.minor
        lines.append(
            f"GPU {index}            {properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
            f"sm_{properties.major}{properties.minor}, "
            + ", ".join([bf16, *multiplies_8_bits(capability)])
        )
    if not lines:
        built = torch.version.cuda or "none: a CPU build"
        lines.append(
            f"GPU              none found (torch's CUDA: {built}); training runs on the CPU"
        )
    cpu = torch.device("cpu")
    lines.append(
        f"CPU              {torch.get_num_threads()} threads, bf16 products in hardware: "
        f"{'yes' if multiplies_bf16(cpu) else 'no, fp32 is used'}"
    )
    isa = native.isa()
    lines.append(
        f"NF4, int8 (CPU)  {f'C++, {isa}' if isa else 'plain PyTorch: csrc/ was not built'}"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    storage, compute = resolve_precision("auto", "auto", device)
    dtype = str(activation_dtype(compute, "auto", device)).removeprefix("torch.")
    lines.append(
        f"auto means       device {device.type}, storage {storage}, compute {compute}, "
        f"activations {dtype}"
    )
    return lines


def _disk_lines() -> list[str]:
    lines = [f"free here        {shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB"]
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return lines
    lines.append(f"Hub cache        {constants.HF_HUB_CACHE}")
    if constants.HF_HUB_OFFLINE:
        lines.append("Hub              offline (HF_HUB_OFFLINE)")
    token = (
        "yes"
        if get_token() or os.environ.get("HF_TOKEN")
        else "no: gated models need `hf auth login`"
    )
    lines.append(f"Hub token        {token}")
    return lines
