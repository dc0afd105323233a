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

# its functions and their arguments: p pointer, i int, l int64_t
_FUNCTIONS = {
    "fluxfast_nf4_decode": "ppppplplpiii",
    "fluxfast_nf4_quantize": "pilppii",
    "fluxfast_rows_int8": "pilllpppii",
    "fluxfast_nf4_int8": "ppllppii",
}
_C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64}


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
        if library.fluxfast_abi() != ABI:
            return None
    except (OSError, AttributeError):
        return None
    for name, types in _FUNCTIONS.items():
        getattr(library, name).argtypes = [_C_TYPES[letter] for letter in types]
    return library


def isa() -> str | None:
    """Returns the best instruction set of library and CPU, one of ISAS; None without a library."""
    library = _library()
    return None if library is None else ISAS[library.fluxfast_isa()]


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    table: Tensor | None,
    out: Tensor,
    with_isa: str | None = None,
) -> None:
    """Overwrites `out`, contiguous fp32, bf16 or fp16 of 64 values per absmax.

    All on the CPU and contiguous. nested, offset (one value, or one per nested block) and table
    [256], fp32, belong to an absmax in uint8. with_isa: one of ISAS, for tests.
    """
    blocks, is_nested = absmax.numel(), nested is not None
    tensors = [packed, absmax, out, *([nested, offset, table] if is_nested else [])]
    assert all(t.is_contiguous() and not t.is_cuda for t in tensors), "contiguous, on the CPU"
    assert packed.numel() == 32 * blocks and out.numel() == 64 * blocks, (packed.shape, out.shape)
    scales = (None, absmax, nested, offset) if is_nested else (absmax, None, None, None)
    per_block = int(is_nested and offset is not None and offset.numel() > 1)
    arguments = (packed, *scales, per_block, table, blocks, out, TYPES[out.dtype])
    _run("fluxfast_nf4_decode", *arguments, with_isa=with_isa)


def nf4_quantize(weight: Tensor, with_isa: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns packed uint8 [n / 2] and absmax fp32 [n / 64] of a weight in fp32, bf16 or fp16,
    contiguous, on the CPU, of whole blocks of 64."""
    assert weight.is_contiguous() and not weight.is_cuda and weight.numel() % 64 == 0
    blocks = weight.numel() // 64
    # whatever torch's default dtype and device are: the library writes to these
    packed = torch.empty(32 * blocks, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(blocks, dtype=torch.float32, device="cpu")
    arguments = (weight, TYPES[weight.dtype], blocks, packed, absmax)
    _run("fluxfast_nf4_quantize", *arguments, with_isa=with_isa)
    return packed, absmax


def rows_int8(
    x: Tensor, channel: Tensor | None = None, with_isa: str | None = None
) -> tuple[Tensor, Tensor]:
    """Returns int8 [M, K] and scale fp32 [M] of x [M, K] fp32, bf16 or fp16 of last stride 1, times
    channel fp32 [K], contiguous.

    The formula is that of `rows.py`; where a scale is NaN its row's values are 0. All on the CPU.
    with_isa: one of ISAS, for tests.
    """
    assert x.ndim == 2 and x.is_cpu and x.dtype in TYPES, (x.shape, x.device, x.dtype)
    M, K = x.shape
    assert x.stride(1) == 1 or K == 1, x.stride()
    if channel is not None:
        assert channel.shape == (K,) and channel.dtype == torch.float32, channel
        assert channel.is_cpu and channel.is_contiguous(), "channel: contiguous, on the CPU"
    values = torch.empty((M, K), dtype=torch.int8, device="cpu")
    scale = torch.empty(M, dtype=torch.float32, device="cpu")
    arguments = (x, TYPES[x.dtype], M, K, x.stride(0), channel, values, scale)
    _run("fluxfast_rows_int8", *arguments, with_isa=with_isa)
    return values, scale


def nf4_int8(
    packed: Tensor,
    absmax: Tensor,
    rows: int,
    columns: int,
    out: Tensor | None = None,
    with_isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns int8 [rows, columns] and scale fp32 [rows] of packed uint8 [rows * columns / 2] and
    absmax fp32 [rows * columns / 64].

    As dequantizing to fp32 and `rows_int8`, but with a row's largest |absmax| as its largest
    magnitude. columns is a multiple of 64. The int8 values are a view of `out` where given, int8,
    of at least as many. All contiguous and on the CPU. with_isa: one of ISAS, for tests.
    """
    count = rows * columns
    out = torch.empty(count, dtype=torch.int8, device="cpu") if out is None else out
    tensors, dtypes = (packed, absmax, out), (torch.uint8, torch.float32, torch.int8)
    assert all(t.is_contiguous() and t.is_cpu for t in tensors), "contiguous, on the CPU"
    assert all(t.dtype == dtype for t, dtype in zip(tensors, dtypes, strict=True)), dtypes
    assert columns % 64 == 0 and out.numel() >= count, (rows, columns, out.shape)
    sizes = (packed.numel() * 2, absmax.numel() * 64)
    assert sizes == (count, count), (rows, columns, packed.shape, absmax.shape)
    values = out.view(-1)[:count].view(rows, columns)
    scale = torch.empty(rows, dtype=torch.float32, device="cpu")
    arguments = (packed, absmax, rows, columns, values, scale)
    _run("fluxfast_nf4_int8", *arguments, with_isa=with_isa)
    return values, scale


def _run(name: str, *arguments: Tensor | int | None, with_isa: str | None) -> None:
    library = _library()
    wanted = isa() if with_isa is None else with_isa
    level = ISAS.index(wanted) if wanted in ISAS else -1  # -1 is refused, as a missing one is
    passed = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    failed = getattr(library, name)(*passed, level, torch.get_num_threads())
    if failed:
        raise ValueError(f"with_isa must be one that this CPU has (best: {isa()}), got {with_isa}")
