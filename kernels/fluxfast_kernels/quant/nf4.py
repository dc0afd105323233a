"""NF4: 4-bit normal-float storage of a frozen weight, byte for byte as bitsandbytes stores it.

    value[i]  = CODE[nibble[i]] * absmax[i // 64]
    absmax[j] = MAP[byte[j]] * nested_absmax[j // 256] + offset      where it is itself quantized

Rows are cut in blocks of 64 along K, so K must be a multiple of 64 and a block never crosses a row:
cutting or stacking whole rows of quantized matrices is exact. The first weight of a pair sits in
the high nibble. Memory: 0.5 byte a weight + 4/64 (fp32 absmax) or 1/64 + 4/16384 (nested).

On a CPU the library of `csrc/` does the work where it was built, else plain PyTorch; on a GPU a
Triton kernel dequantizes and PyTorch quantizes. All give the same bytes. Bytes moved by
dequantizing: those above, and the size of a value in the result; FLOP: one a weight.

Source: QLoRA (arXiv 2305.14314), whose 16 code values these are; 8-bit dynamic map: arXiv
2110.02861.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Optional, cast

import torch
from torch import Tensor

from fluxfast_kernels.dispatch.backend import (
    DTYPES,
    check,
    check_dtype,
    kernel,
    launches,
    refuse,
    tl,
    triton,
)
from fluxfast_kernels.quant import native

BLOCK = 64
NESTED_BLOCK = 256

# quantiles of N(0, 1) scaled to [-1, 1] with an exact zero (QLoRA, appendix E), as fp32 prints them
CODE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass
class NF4Tensor:
    """A quantized [N, K] matrix.

    packed: uint8 [N * K / 2, 1] or [N, K / 2]; absmax: fp32 [N * K / 64], or uint8 when nested;
    nested_absmax: fp32 [ceil(N * K / 64 / 256)], offset: fp32, one value or one per nested block
    (rows of several matrices stacked), both None unless nested.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The parts that exist, by name, packed as [N, K / 2]: how the fused linears take them."""
        names = ("absmax", "nested_absmax", "offset")
        parts = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"packed": self.packed.view(self.shape[0], -1)} | parts


@cache
def code_table(device: torch.device) -> Tensor:
    """The 16 values, fp32."""
    return torch.tensor(CODE, dtype=torch.float32, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """fp32 [256, 2]: a byte's two values, high nibble first."""
    byte = torch.arange(256, device=device)
    code = code_table(device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """fp32 [256], ascending: the signed 8-bit dynamic-exponent values that nested absmax uses.

    Decade i (10^-6 ... 10^0) holds 2^i midpoints of equal cells of [0.1, 1], both signs; then 0 and
    1.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for i in range(7):
        cells = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = 10.0 ** (i - 6) * ((cells[:-1] + cells[1:]) / 2.0)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


def nf4_quantize(weight: Tensor, nested: bool = False) -> NF4Tensor:
    """Quantize a [N, K] fp32, fp16 or bf16 matrix, K a multiple of 64, on its own device.

    Raises ValueError for another rank, dtype or K.
    """
    fits = weight.ndim == 2 and weight.shape[1] % BLOCK == 0
    check(fits, "weight", f"[N, K] with K a multiple of {BLOCK}", tuple(weight.shape))
    check(weight.dtype in DTYPES, "weight", "fp32, fp16 or bf16", weight.dtype)
    if weight.device.type == "cpu" and weight.is_contiguous() and native.isa():
        packed, absmax = native.nf4_quantize(weight)
        packed = packed[:, None]
    else:
        packed, absmax = _quantize_blocks(weight)
    shape = weight.shape[0], weight.shape[1]
    if not nested:
        return NF4Tensor(packed, absmax, shape)
    offset = absmax.mean()
    absmax, nested_absmax = _quantize_dynamic(absmax - offset)
    return NF4Tensor(packed, absmax, shape, nested_absmax, offset)


def _quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns packed uint8 [n / 2, 1] and absmax fp32 [n / 64], in plain PyTorch."""
    code = code_table(weight.device)
    bounds = (code[:-1] + code[1:]) / 2
    blocks = weight.reshape(-1, BLOCK).float()
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1).reshape(-1)
    nibble = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    return ((nibble[::2] << 4) | nibble[1::2])[:, None], absmax


@cache
def _nearest(device: torch.device) -> Tensor:
    """uint8 [65536]: the nearest entry of `dynamic_map` to values spread evenly over [-1, 1]."""
    table = dynamic_map(torch.device("cpu"))
    grid = (torch.arange(65536, dtype=torch.float64) / 32767.5 - 1).float()
    return torch.bucketize(grid, (table[:-1] + table[1:]) / 2).to(torch.uint8).to(device)


def _quantize_dynamic(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes fp32 [n]: uint8 [n], indices of `dynamic_map`, and fp32 absmax per 256.

    bitsandbytes 0.50 on CPU rounds a value to 16 bits and looks its index up, instead of taking the
    nearest entry to the value itself: one in 650 differs. Its bytes are what files hold, so this
    does the same. A block of zeros gets index 0 throughout (times an absmax of 0).
    """
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = padded.abs().amax(dim=1)
    # the reciprocal of a denormal absmax is infinite: clamping then leaves the signs, as theirs
    # does
    scaled = (padded * (1.0 / absmax)[:, None]).clamp_(-1, 1).nan_to_num_(nan=-1.0)
    quantized = _nearest(values.device)[((scaled + 1) * 32767.5 + 0.5).long()]
    return (quantized * (absmax > 0)[:, None]).view(-1)[:count], absmax


def nf4_absmax(weight: NF4Tensor) -> Tensor:
    """Returns absmax fp32 [N * K / 64], un-nested."""
    if weight.nested_absmax is None:
        return weight.absmax
    if launches(weight.absmax):
        return _launch_absmax(weight)
    table = dynamic_map(weight.absmax.device)
    scale = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: weight.absmax.numel()]
    offset = cast(Tensor, weight.offset)
    if offset.numel() > 1:
        offset = offset.repeat_interleave(NESTED_BLOCK)[: weight.absmax.numel()]
    return table[weight.absmax.int()] * scale + offset


@kernel
def _absmax_kernel(
    byte_ptr,
    map_ptr,
    nested_ptr,
    offset_ptr,
    out_ptr,
    blocks,
    OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = block < blocks
    outer = block // 256
    value = tl.load(map_ptr + tl.load(byte_ptr + block, inside, other=0).to(tl.int32))
    shift = tl.load(offset_ptr + (outer if OFFSETS else outer * 0), inside, other=0.0)
    value = value * tl.load(nested_ptr + outer, inside, other=0.0) + shift
    tl.store(out_ptr + block, value, inside)


def _launch_absmax(weight: NF4Tensor) -> Tensor:
    """One launch where plain torch takes seven. Not fused into one rounding: the same bits."""
    nested, offset = cast(Tensor, weight.nested_absmax), cast(Tensor, weight.offset)
    blocks = weight.absmax.numel()
    out = torch.empty(blocks, dtype=torch.float32, device=weight.absmax.device)
    tensors = (weight.absmax, dynamic_map(out.device), nested, offset, out)
    options = {"OFFSETS": offset.numel() > 1, "BLOCK": 1024, "enable_fp_fusion": False}
    _absmax_kernel[(triton.cdiv(blocks, 1024),)](*tensors, blocks, **options)
    return out


def check_nf4(weight: NF4Tensor) -> None:
    """Raise ValueError unless the parts have the dtypes and sizes of the shape: a cast of a whole
    module (`.to(torch.bfloat16)`) would have changed them."""
    N, K = weight.shape
    blocks, nested = N * K // BLOCK, weight.nested_absmax is not None
    check(K % BLOCK == 0, "weight (NF4)", f"[N, K] with K a multiple of {BLOCK}", (N, K))
    groups = -(-blocks // NESTED_BLOCK)
    wanted: dict[str, tuple[Any, torch.dtype, tuple[int, ...]]] = {
        "packed": (weight.packed, torch.uint8, (N * K // 2,)),
        "absmax": (weight.absmax, torch.uint8 if nested else torch.float32, (blocks,)),
    }
    if nested:
        check(weight.offset is not None, "weight (offset)", "given with nested_absmax", None)
        wanted["nested_absmax"] = (weight.nested_absmax, torch.float32, (groups,))
        wanted["offset"] = (weight.offset, torch.float32, (1, groups))
    for name, (tensor, dtype, counts) in wanted.items():
        fits = tensor.dtype == dtype and tensor.numel() in counts and tensor.is_contiguous()
        if not fits:
            needed = f"contiguous {dtype} of {' or '.join(map(str, counts))} values"
            refuse(f"weight ({name})", needed, (tensor.dtype, tensor.numel()))


# ---------------------------------------------------------------- dequantize: kernel and launcher


@kernel
def _dequantize_kernel(packed_ptr, absmax_ptr, code_ptr, out_ptr, blocks, BLOCKS: tl.constexpr):
    """BLOCKS blocks of 64 weights. The 16 code values are looked up in memory, where they stay in
    the nearest cache."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    scale = tl.load(absmax_ptr + block, inside, other=0.0)[:, None]
    byte_at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    byte = tl.load(packed_ptr + byte_at, inside[:, None], other=0).to(tl.int32)
    high = tl.load(code_ptr + (byte >> 4)) * scale
    low = tl.load(code_ptr + (byte & 15)) * scale
    values = tl.interleave(high, low)
    at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), inside[:, None])


BLOCKS, WARPS = 64, 4  # a program: 4096 weights, 32 a thread


def launch_dequantize(packed: Tensor, absmax: Tensor, out: Tensor) -> None:
    """packed uint8 [n / 2] and absmax fp32 [n / 64] to out [n], all contiguous."""
    blocks, code = absmax.numel(), code_table(packed.device)
    grid = (triton.cdiv(blocks, BLOCKS),)
    _dequantize_kernel[grid](packed, absmax, code, out, blocks, BLOCKS, num_warps=WARPS)


# ---------------------------------------------------------------- dequantize: the op


@torch.library.custom_op("fluxfast::nf4_dequantize", mutates_args=())
def _nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Optional[Tensor],  # noqa: UP045  (custom_op reads Optional on Python 3.10)
    offset: Optional[Tensor],  # noqa: UP045
    N: int,
    K: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = NF4Tensor(packed, absmax, (N, K), nested_absmax, offset)
    return _dequantize_into(weight, packed.new_empty(N, K, dtype=dtype))


@_nf4_dequantize.register_fake
def _(packed, absmax, nested_absmax, offset, N, K, dtype):
    return packed.new_empty(N, K, dtype=dtype)


def nf4_dequantize(
    weight: NF4Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """Returns W [N, K] in `dtype` (fp32, bf16, fp16), formed in fp32 and rounded once.

    out: contiguous [at least N * K] of `dtype` on the weight's device: overwritten, the result is a
    view of it. Fresh memory costs a CPU a page fault every 4 KiB. Without it this is the op
    `fluxfast::nf4_dequantize`. Raises ValueError for another dtype or an out that does not fit.
    """
    check_nf4(weight)
    if dtype == torch.float64:  # for references: of the same fp32 values
        return nf4_dequantize_reference(weight, torch.float32).double()
    if out is None:
        check_dtype("dtype", torch.empty(0, dtype=dtype))
        parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
        return _nf4_dequantize(*parts, *weight.shape, dtype)
    count = weight.shape[0] * weight.shape[1]
    fits = out.dtype == dtype and out.numel() >= count and out.is_contiguous()
    check(fits, "out", f"contiguous {dtype} with room for {count} values", tuple(out.shape))
    check_dtype("out", out)
    return _dequantize_into(weight, out.view(-1)[:count].view(weight.shape))


def _dequantize_into(weight: NF4Tensor, out: Tensor) -> Tensor:
    packed, absmax = weight.packed.view(-1), weight.absmax
    if launches(packed):
        launch_dequantize(packed, nf4_absmax(weight), out)
    elif packed.device.type == "cpu" and native.isa():
        table = None if weight.nested_absmax is None else dynamic_map(packed.device)
        native.nf4_dequantize(packed, absmax, weight.nested_absmax, weight.offset, table, out)
    else:
        out.copy_(nf4_dequantize_reference(weight, out.dtype))
    return out


def nf4_dequantize_reference(weight: NF4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`nf4_dequantize` in plain torch."""
    values = _pairs(weight.packed.device)[weight.packed.view(-1).int()].view(-1, BLOCK)
    return (values * nf4_absmax(weight)[:, None]).view(weight.shape).to(dtype)
