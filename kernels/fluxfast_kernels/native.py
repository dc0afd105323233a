"""The C++ library in `lib/` (made of `csrc/nf4.cpp`), reached by ctypes; its absence is no error.

`setup.py` builds it where a compiler is found. Without it, or with one built for another interface,
`isa()` is None and NF4 on the CPU runs as plain PyTorch.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ABI = 1  # fluxfast_abi() of csrc/nf4.cpp
LIBRARY = Path(__file__).parent / "lib" / "native.so"  # a folder: an .so beside would be a module
ISAS = ("portable", "avx2", "avx512")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
        if library.fluxfast_abi() != ABI:
            return None
    except (OSError, AttributeError):
        return None
    library.fluxfast_nf4_decode.argtypes = [
        *[_pointer] * 5, _long, _pointer, _long, _pointer, _int, _int, _int
    ]  # fmt: skip
    library.fluxfast_nf4_quantize.argtypes = [_pointer, _int, _long, _pointer, _pointer, _int, _int]
    return library


def isa() -> str | None:
    """The best that library and CPU have together: "avx512", "avx2", "portable", or None."""
    library = _library()
    return None if library is None else ISAS[library.fluxfast_isa()]


def nf4_decode(
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    table: Tensor | None,
    out: Tensor,
    with_isa: str | None = None,
) -> None:
    """Decode into `out`, contiguous fp32, bf16 or fp16 of 64 values per absmax.

    All on the CPU and contiguous. nested, offset (one value, or one per nested block) and table
    [256], fp32, belong to an absmax in uint8. with_isa: one of ISAS, for tests.
    """
    blocks, is_nested = absmax.numel(), nested is not None
    tensors = [packed, absmax, out, *([nested, offset, table] if is_nested else [])]
    assert all(t.is_contiguous() and not t.is_cuda for t in tensors), "contiguous, on the CPU"
    assert packed.numel() == 32 * blocks and out.numel() == 64 * blocks, (packed.shape, out.shape)
    _run(
        "fluxfast_nf4_decode",
        _at(packed),
        None if is_nested else _at(absmax),
        _at(absmax) if is_nested else None,
        _at(nested),
        _at(offset),
        int(is_nested and offset.numel() > 1),
        _at(table),
        blocks,
        _at(out),
        TYPES[out.dtype],
        with_isa=with_isa,
    )


def nf4_quantize(weight: Tensor, with_isa: str | None = None) -> tuple[Tensor, Tensor]:
    """weight fp32, bf16 or fp16, contiguous, on the CPU, whole blocks of 64 -> packed uint8
    [n / 2], absmax fp32 [n / 64]."""
    assert weight.is_contiguous() and not weight.is_cuda and weight.numel() % 64 == 0
    blocks = weight.numel() // 64
    # whatever torch's default dtype and device are: the library writes to these
    packed = torch.empty(32 * blocks, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(blocks, dtype=torch.float32, device="cpu")
    _run(
        "fluxfast_nf4_quantize",
        _at(weight),
        TYPES[weight.dtype],
        blocks,
        _at(packed),
        _at(absmax),
        with_isa=with_isa,
    )
    return packed, absmax


def _run(name: str, *arguments, with_isa: str | None) -> None:
    library = _library()
    wanted = isa() if with_isa is None else with_isa
    level = ISAS.index(wanted) if wanted in ISAS else -1  # -1 is refused, as a missing one is
    failed = getattr(library, name)(*arguments, level, torch.get_num_threads())
    if failed:
        raise ValueError(f"with_isa must be one that this CPU has (best: {isa()}), got {with_isa}")


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
