"""Reads matrices in 8 bits: ComfyUI's fp8, plain and scaled, and what `fluxfast quantize` writes.

    X.weight           float8_e4m3fn or int8 [N, K]
    X.scale_weight     fp32, one value (ComfyUI) or one a row ([N, 1], fluxfast); plain fp8 has none
    X.weight_scale     the same in ComfyUI's newer files

W = quantized · scale. Storage fp8 and int8 multiply in these two forms, so the values stay as they
are. float8_e5m2, which no product here takes, is dequantized to fp32 without loss.

Source: ComfyUI `comfy/ops.py` (scaled_fp8_ops) and `comfy/model_detection.py`.
"""

import torch
from fluxfast_kernels.quant.rows import QuantizedRows
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.formats.opened import Files

_SCALES = ("scale_weight", "weight_scale")
SIDE = (*_SCALES, "scale_input", "input_scale", "comfy_quant")
MARKER = "scaled_fp8"  # a tensor of ComfyUI's, beside the model's
_ROWS = 1024  # searched for NaN at once


def scale_key(files: Files, key: str) -> str | None:
    """Returns the name of the scale of the matrix `key` (….weight), or None if it has none."""
    module = key.removesuffix("weight")
    return next((module + name for name in _SCALES if module + name in files.entries), None)


def check_8bit(files: Files, key: str, prefix: str) -> None:
    """Raises ConfigError if the matrix has a scale that does not fit, or lacks one that it needs:
    in int8, and in fp8 beside ComfyUI's marker. prefix: of the model's names.
    """
    entry, scale = files.entries[key], scale_key(files, key)
    if scale is None:
        if prefix + MARKER in files.entries:
            raise ConfigError(
                f"{files.file_of(key)}: {key} has no scale_weight, in a file of scaled fp8",
                hint="download the file again, or use another copy of it",
            )
        if entry.dtype == "I8":
            raise ConfigError(
                f"{files.file_of(key)}: {key} is stored as I8 without a scale that is known here",
                hint="int8 files of other tools (quanto, LLM.int8) are not read: use a bf16 one",
            )
        return
    dtype, shape = files.entries[scale].dtype, files.entries[scale].shape
    rows = entry.shape[0] if entry.shape else 1
    fits = shape in ((), (1,), (1, 1), (rows,), (rows, 1))
    if not fits or dtype not in ("F32", "F16", "BF16"):
        raise ConfigError(
            f"{files.file_of(scale)}: {scale} should hold one value, or one a row of {rows}; "
            f"it is {dtype} of shape {shape}"
        )


def read_8bit(files: Files, key: str) -> QuantizedRows | Tensor:
    """Returns quantized values with one fp32 scale a row; fp32 [N, K] for float8_e5m2."""
    values, scale = files.read(key), scale_key(files, key)
    scales = torch.ones(1) if scale is None else files.read(scale).float().flatten()
    rows = QuantizedRows(values, scales.expand(len(values)).contiguous())
    return rows.dequantize() if values.dtype == torch.float8_e5m2 else rows


def quantized_is_finite(quantized: Tensor) -> bool:
    """Returns whether no value means NaN: in e4m3 all bits but the sign's set; int8 has none."""
    if quantized.dtype == torch.int8:
        return True
    pieces = quantized.view(torch.uint8).split(_ROWS)
    return not any((piece & 127).amax() == 127 for piece in pieces)


def join_rows(parts: list[QuantizedRows]) -> QuantizedRows:
    """Stacks the rows of several matrices of one kind, byte for byte."""
    if len(parts) == 1:
        return parts[0]
    values = torch.cat([part.values.view(torch.uint8) for part in parts])  # cat takes no fp8
    scale = torch.cat([part.scale for part in parts])
    return QuantizedRows(values.view(parts[0].values.dtype), scale)
