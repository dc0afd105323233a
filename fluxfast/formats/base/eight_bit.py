"""Reads matrices in 8 bits: ComfyUI's fp8 and int8, and what `fluxfast quantize` writes.

    X.weight           float8_e4m3fn or int8 [N, K]
    X.scale_weight     fp32, one value (ComfyUI) or one a row ([N, 1], fluxfast); plain fp8 has none
    X.weight_scale     the same in ComfyUI's newer files
    X.comfy_quant      the form by ComfyUI's word, JSON in bytes: {"format": "int8_tensorwise", …};
                       or in the header, `_quantization_metadata`: {"layers": {X: {"format": …}}}

W = quantized · scale. Where the form says convrot, that is W·H in blocks of convrot_groupsize
columns, H = A ⊗ A ⊗ … with A = 1/2 − antidiagonal (4 x 4): symmetric, its own inverse.

Storage fp8 and int8 multiply in these forms, so the values stay as they are; rotated ones and
float8_e5m2, which no product here takes, are dequantized to fp32 without loss. What is marked in
another way, or has unknown tensors beside it, is refused: it would mean something else.

Source: ComfyUI `comfy/ops.py`, `comfy/utils.py` (convert_old_quants), `comfy/quant_ops.py`;
comfy-kitchen `tensor/int8_utils.py`; ComfyUI-INT8-Fast `int8_save.py`, which names no format.
"""

import json
from typing import Any

import torch
from fluxfast_kernels.quant.rows import QuantizedRows
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.formats.base.detect import bare
from fluxfast.formats.opened import Files

READ_HINT = (
    "use a bf16, fp16, fp8, int8, bitsandbytes NF4 or GGUF checkpoint; storage: nf4 shrinks it on "
    "loading"
)
DTYPES = ("F8_E4M3", "F8_E5M2", "I8")
MARKER = "scaled_fp8"  # a tensor of ComfyUI's, beside the model's
_SCALES = ("scale_weight", "weight_scale")
SIDE = (*_SCALES, "scale_input", "input_scale", "comfy_quant")  # an input's scale is not needed
_HEADER = "_quantization_metadata"
# ComfyUI's word for a form that is read -> dtype of its matrices
_FORMATS = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fn_rowwise": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8_tensorwise": "I8",
}
_WORDS = {
    *("format", "convrot", "convrot_groupsize", "per_row"),
    *("full_precision_matrix_mult", "orig_dtype", "orig_shape"),
}
_GROUP = 256  # the default of convrot_groupsize
_LONGEST_FORM = 65536  # bytes
_ROWS = 1024  # searched for NaN at once


class SideTensors:
    """The tensors beside the matrices of opened files, and the formats that they name.

    prefix: of the model's names. Raises ConfigError for a form that cannot be read.
    """

    def __init__(self, files: Files, prefix: str = ""):
        self.files = files
        self._names: dict[str, set[str]] = {}  # module -> its tensors
        for key in files.entries:
            module, _, name = key.rpartition(".")
            self._names.setdefault(module, set()).add(name)
        self._forms = _forms(files)
        scaled = (m for m, names in self._names.items() if names.intersection(_SCALES))
        self._scaled = any(module.startswith(prefix) for module in scaled)
        self._lost = prefix + MARKER in files.entries and not self._scaled

    def scale_key(self, key: str) -> str | None:
        """Returns the name of the scale of the matrix `key` (….weight), or None if it has none."""
        module = key.removesuffix(".weight")
        names = self._names[module]
        return next((f"{module}.{name}" for name in _SCALES if name in names), None)

    def check(self, key: str) -> None:
        """Raises ConfigError if the matrix is in a form that is not read, or has a scale that does
        not fit, or lacks one that it needs: in int8, and in fp8 beside a marker of scaled fp8.
        """
        module, entry = key.removesuffix(".weight"), self.files.entries[key]
        self._rotation(key)
        if unknown := self._names[module] - {"weight", "bias", *SIDE}:
            raise self._refusal(
                key, f"has {', '.join(sorted(unknown))} beside it, which is not known here"
            )
        scale = self.scale_key(key)
        if scale is None:
            if entry.dtype == "I8" or key in self._forms:
                raise self._refusal(
                    key, f"is stored as {entry.dtype} without a scale that is known here"
                )
            if entry.dtype in DTYPES and self._lost:
                raise self._refusal(key, "has no scale_weight, in a file of scaled fp8")
            return
        if entry.dtype not in DTYPES and (self.files.read(scale).float() != 1).any():
            raise self._refusal(key, f"is stored as {entry.dtype}, and has a scale beside it")
        dtype, shape = self.files.entries[scale].dtype, self.files.entries[scale].shape
        rows = entry.shape[0] if entry.shape else 1
        fits = shape in ((), (1,), (1, 1), (rows,), (rows, 1))
        if not fits or dtype not in ("F32", "F16", "BF16"):
            raise self._refusal(
                scale, f"should hold one value, or one a row of {rows}, and none a block; it is "
                f"{dtype} of shape {shape}",
            )  # fmt: skip

    def read(self, key: str) -> QuantizedRows | Tensor:
        """Returns quantized values with one fp32 scale a row; fp32 [N, K] for float8_e5m2 and for
        rotated ones.
        """
        values, scale = self.files.read(key), self.scale_key(key)
        # a plain matrix has no such weights, a scaled one has at least one
        full = scale is None and self._scaled and values.dtype.is_floating_point
        if full and values.float().abs().amax() == torch.finfo(values.dtype).max:
            raise self._refusal(
                key, f"lacks its scale, as it fills {values.dtype} in a file of scaled fp8"
            )
        scales = torch.ones(1) if scale is None else self.files.read(scale).float().flatten()
        rows = QuantizedRows(values, scales.expand(len(values)).contiguous())
        if rotation := self._rotation(key):
            return _unrotate(rows.dequantize(), rotation)
        return rows.dequantize() if values.dtype == torch.float8_e5m2 else rows

    def form(self, key: str) -> str:
        """Returns the matrix's form for `inspect`, also where `check` refuses it."""
        dtype, form = self.files.entries[key].dtype, self._forms.get(key, {})
        word = form.get("format")
        if word not in (None, *_FORMATS):
            return f"{word} (not read here)"
        if dtype not in DTYPES:
            return dtype
        kind = "int8" if dtype == "I8" else "fp8"
        rotated = ", rotated (ConvRot)" if form.get("convrot") else ""
        return f"{kind}, {'scaled' if self.scale_key(key) else 'plain'}{rotated}"

    def _rotation(self, key: str) -> int:
        """Returns the columns of a block that is rotated, 0 where none is."""
        form, entry = self._forms.get(key), self.files.entries[key]
        if form is None:
            return 0
        word = form.get("format", "int8_tensorwise" if entry.dtype == "I8" else None)
        if word not in [*_FORMATS]:
            raise self._refusal(key, f"is stored as {word!r}, which is not read here")
        if unknown := form.keys() - _WORDS:
            raise self._refusal(key, f"is marked with {min(unknown)!r}, which is not known here")
        if entry.dtype != _FORMATS[word]:
            raise self._refusal(key, f"is marked as {word} and stored as {entry.dtype}")
        rotated, size = form.get("convrot"), form.get("convrot_groupsize", _GROUP)
        if not rotated:
            return 0
        power_of_4 = type(size) is int and size >= 4 and size.bit_count() == size.bit_length() % 2
        fits = power_of_4 and len(entry.shape) == 2 and entry.shape[1] % size == 0
        if word != "int8_tensorwise" or not fits:
            raise self._refusal(
                key, f"of shape {entry.shape} is marked with convrot {rotated!r} in blocks of "
                f"{size!r} columns; read is int8 in blocks of a power of 4 that divides its width",
            )  # fmt: skip
        return size

    def _refusal(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.files.file_of(key)}: {key} {problem}", hint=READ_HINT)


def _forms(files: Files) -> dict[str, dict]:
    """Returns ComfyUI's description of each matrix's format, by its key."""
    forms: dict[str, dict] = {}
    for name, entry in files.entries.items():
        module, dot, kind = name.rpartition(".")
        if kind == "comfy_quant" and dot:
            readable = entry.dtype == "U8" and entry.bytes <= _LONGEST_FORM
            text = bytes(files.read(name).flatten().tolist()) if readable else b""
            forms[f"{module}.weight"] = _object(text, f"{files.file_of(name)}: {name}")
    keys = {bare(key): key for key in files.entries}
    for container in files.containers:
        if _HEADER not in container.metadata:
            continue
        where = f"{container.path}: the header's {_HEADER}"
        layers = _object(_object(container.metadata[_HEADER], where).get("layers"), where)
        own = {keys.get(bare(f"{layer}.weight")): form for layer, form in layers.items()}
        if layers and set(own) == {None}:
            raise ConfigError(
                f"{where} names {next(iter(layers))!r}, and no matrix of the file",
                hint=READ_HINT,
            )
        for key, form in own.items():
            form = _object({"format": form} if isinstance(form, str) else form, where)
            rotated = bool(form.get("convrot"))
            if key and bool(forms.setdefault(key, form).get("convrot")) != rotated:
                raise ConfigError(f"{where} and comfy_quant differ on {key}", hint=READ_HINT)
    return forms


def _object(content: Any, where: str) -> dict:
    """Returns a JSON object, merged with its `params` as in ComfyUI.
    content: its text, or parsed.
    """
    try:
        form = json.loads(content) if isinstance(content, str | bytes) else content
        return (form.get("params") or {}) | {k: v for k, v in form.items() if k != "params"}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{where} holds no JSON object", hint=READ_HINT) from None


def _unrotate(weight: Tensor, size: int) -> Tensor:
    """Returns weight·H, H of `size` columns."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < size:
        hadamard = torch.kron(hadamard, 0.5 - torch.eye(4).flip(0))
    return (weight.view(-1, size) @ hadamard).view(weight.shape)


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
