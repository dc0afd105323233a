"""The C++ library in `lib/` (made of `csrc/`), reached by ctypes; its absence is no error.

`setup.py` builds it where a compiler is found. Without it, or with one built for another interface,
`isa()` is None, and NF4 and int8 rows on the CPU run as plain PyTorch.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ABI = 2  # fluxfast_abi() of csrc/nf4.cpp
LIBRARY = Path(__file__).parent.parent / "lib" / "native.so"  # an .so beside would be a module
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
    library.fluxfast_rows_int8.argtypes = [
        _pointer, _int, _long, _long, _long, *[_pointer] * 3, _int, _int
    ]  # fmt: skip
    library.fluxfast_nf4_int8.argtypes = [
        _pointer, _pointer, _long, _long, _pointer, _pointer, _int, _int
    ]  # fmt: skip
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


def rows_int8(
    x: Tensor, channel: Tensor | None = None, with_isa: str | None = None
) -> tuple[Tensor, Tensor]:
    """x [M, K] fp32, bf16 or fp16 of last stride 1, times channel fp32 [K], contiguous
    -> codes int8 [M, K], scale fp32 [M].

    code = round(v * (127 / amax)), scale = amax * (1 / 127); amax is the row's largest |v|, at
    least 1e-30. NaN or infinity in a row makes its scale NaN and its codes 0. All on the CPU.
    with_isa: one of ISAS, for tests.
    """
    assert x.ndim == 2 and x.is_cpu and x.dtype in TYPES, (x.shape, x.device, x.dtype)
    M, K = x.shape
    assert x.stride(1) == 1 or K == 1, x.stride()
    if channel is not None:
        assert channel.shape == (K,) and channel.dtype == torch.float32, channel
        assert channel.is_cpu and channel.is_contiguous(), "channel: contiguous, on the CPU"
    codes = torch.empty((M, K), dtype=torch.int8, device="cpu")
    scale = torch.empty(M, dtype=torch.float32, device="cpu")
    _run(
        "fluxfast_rows_int8",
        _at(x),
        TYPES[x.dtype],
        M,
        K,
        x.stride(0),
        _at(channel),
        _at(codes),
        _at(scale),
        with_isa=with_isa,
    )
    return codes, scale


def nf4_int8(
    packed: Tensor,
    absmax: Tensor,
    rows: int,
    columns: int,
    out: Tensor | None = None,
    with_isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """packed uint8 [rows * columns / 2], absmax fp32 [rows * columns / 64]
    -> codes int8 [rows, columns], scale fp32 [rows].

    As decoding to fp32 and `rows_int8`, but with a row's largest |absmax| as its largest magnitude.
    columns is a multiple of 64. codes: a view of `out` where given, int8, of at least as many
    values. All contiguous and on the CPU. with_isa: one of ISAS, for tests.
    """
    count = rows * columns
    out = torch.empty(count, dtype=torch.int8, device="cpu") if out is None else out
    tensors, dtypes = (packed, absmax, out), (torch.uint8, torch.float32, torch.int8)
    assert all(t.is_contiguous() and t.is_cpu for t in tensors), "contiguous, on the CPU"
    assert all(t.dtype == dtype for t, dtype in zip(tensors, dtypes, strict=True)), dtypes
    assert columns % 64 == 0 and out.numel() >= count, (rows, columns, out.shape)
    sizes = (packed.numel() * 2, absmax.numel() * 64)
    assert sizes == (count, count), (rows, columns, packed.shape, absmax.shape)
    codes = out.view(-1)[:count].view(rows, columns)
    scale = torch.empty(rows, dtype=torch.float32, device="cpu")
    _run(
        "fluxfast_nf4_int8",
        _at(packed),
        _at(absmax),
        rows,
        columns,
        _at(codes),
        _at(scale),
        with_isa=with_isa,
    )
    return codes, scale


def _run(name: str, *arguments, with_isa: str | None) -> None:
    library = _library()
    wanted = isa() if with_isa is None else with_isa
    level = ISAS.index(wanted) if wanted in ISAS else -1  # -1 is refused, as a missing one is
    failed = getattr(library, name)(*arguments, level, torch.get_num_threads())
    if failed:
        raise ValueError(f"with_isa must be one that this CPU has (best: {isa()}), got {with_isa}")


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
