"""NF4: 4-bit normal-float storage of a frozen weight, byte for byte as bitsandbytes keeps it.

    value[i]  = CODE[nibble[i]] * absmax[i // 64]
    absmax[j] = MAP[byte[j]] * nested_absmax[j // 256] + offset      where it is itself quantised

Rows are cut in blocks of 64 along K, so K must be a multiple of 64 and a block never crosses a row:
cutting or stacking whole rows of quantised matrices is exact. The first weight of a pair sits in
the high nibble. Memory: 0.5 byte a weight + 4/64 (fp32 absmax) or 1/64 + 4/16384 (nested).

Source: QLoRA (arXiv 2305.14314), whose 16 code values these are; 8-bit dynamic map: arXiv
2110.02861.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 64
NESTED_BLOCK = 256

# quantiles of N(0, 1) scaled to [-1, 1] with an exact zero (QLoRA, appendix E), as fp32 prints them
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass
class NF4Tensor:
    """A quantised [N, K] matrix.

    packed: uint8 [N * K / 2, 1]; absmax: fp32 [N * K / 64], or uint8 when nested;
    nested_absmax: fp32 [ceil(N * K / 64 / 256)], offset: fp32 scalar tensor, both None unless
    nested.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The parts that exist, by name."""
        names = ("packed", "absmax", "nested_absmax", "offset")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@cache
def _code(device: torch.device) -> Tensor:
    return torch.tensor(CODE, dtype=torch.float32, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """fp32 [256, 2]: a byte's two values, high nibble first."""
    byte = torch.arange(256, device=device)
    code = _code(device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """fp32 [256], ascending: the signed 8-bit dynamic-exponent code that nested absmax uses.

    Decade i (10^-6 ... 10^0) holds 2^i midpoints of equal cells of [0.1, 1], both signs; then 0 and
    1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        cells = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = 10.0 ** (i - 6) * ((cells[:-1] + cells[1:]) / 2.0)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


def nf4_quantize(weight: Tensor, nested: bool = False) -> NF4Tensor:
    """Quantise a [N, K] fp32, fp16 or bf16 matrix, K a multiple of 64, on its own device.

    Raises ValueError for another rank, dtype or K.
    """
    if weight.ndim != 2 or weight.shape[1] % BLOCK:
        raise ValueError(
            f"weight must be [N, K] with K a multiple of {BLOCK}, got {tuple(weight.shape)}"
        )
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"weight must be fp32, fp16 or bf16, got {weight.dtype}")
    code = _code(weight.device)
    bounds = (code[:-1] + code[1:]) / 2
    blocks = weight.reshape(-1, BLOCK).float()
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1).view(-1)
    nibble = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    packed = ((nibble[::2] << 4) | nibble[1::2])[:, None]
    if not nested:
        return NF4Tensor(packed, absmax, tuple(weight.shape))
    offset = absmax.mean()
    absmax, nested_absmax = _quantize_dynamic(absmax - offset)
    return NF4Tensor(packed, absmax, tuple(weight.shape), nested_absmax, offset)


@cache
def _dynamic_codes(device: torch.device) -> Tensor:
    """uint8 [65536]: the nearest code of `dynamic_map` for 65 536 values spread evenly over [-1,
    1].
    """
    table = dynamic_map(torch.device("cpu"))
    grid = (torch.arange(65536, dtype=torch.float64) / 32767.5 - 1).float()
    return torch.bucketize(grid, (table[:-1] + table[1:]) / 2).to(torch.uint8).to(device)


def _quantize_dynamic(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] -> (uint8 codes of `dynamic_map` [n], fp32 absmax per 256).

    bitsandbytes 0.50 on CPU rounds a value to 16 bits and looks its code up, instead of taking the
    nearest code of the value itself: one code in 650 differs. Its bytes are what files hold, so
    this does the same. A block of zeros gets code 0 throughout (times an absmax of 0).
    """
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = padded.abs().amax(dim=1)
    # the reciprocal of a denormal absmax is infinite: clamping then leaves the signs, as theirs
    # does
    scaled = (padded * (1.0 / absmax)[:, None]).clamp_(-1, 1).nan_to_num_(nan=-1.0)
    codes = _dynamic_codes(values.device)[((scaled + 1) * 32767.5 + 0.5).long()]
    return (codes * (absmax > 0)[:, None]).view(-1)[:count], absmax


def nf4_absmax(weight: NF4Tensor) -> Tensor:
    """fp32 [N * K / 64], un-nested."""
    if weight.nested_absmax is None:
        return weight.absmax
    table = dynamic_map(weight.absmax.device)
    scale = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: weight.absmax.numel()]
    return table[weight.absmax.int()] * scale + weight.offset


def nf4_decode(
    weight: NF4Tensor, dtype: torch.dtype = torch.float32, scratch: Tensor | None = None
) -> Tensor:
    """-> [N, K] in `dtype`. The product is formed in fp32 and rounded once.

    scratch: fp32 [at least N * K], contiguous, on the weight's device: overwritten, and where dtype
    is fp32 the result is a view of it. Fresh memory costs a page fault every 4 KiB: a third of the
    time on a CPU. Raises ValueError for a scratch that does not fit.
    """
    packed = weight.packed.view(-1)
    count = 2 * packed.numel()
    if scratch is None:
        scratch = torch.empty(count, device=packed.device)
    elif scratch.dtype != torch.float32 or scratch.numel() < count or not scratch.is_contiguous():
        raise ValueError(f"scratch must be contiguous fp32 with room for {count} values")
    values = scratch.view(-1)[:count]
    if packed.device.type == "cpu":
        _look_up_on_cpu(packed, values)
    else:
        torch.index_select(_pairs(packed.device), 0, packed.int(), out=values.view(-1, 2))
    values.view(-1, BLOCK).mul_(nf4_absmax(weight)[:, None])
    return values.view(weight.shape).to(dtype)


@cache
def _quads():
    """complex128 numpy [65536]: the four fp32 values of two neighbouring bytes as one 16-byte
    item.
    """
    pairs = _pairs(torch.device("cpu"))
    two = torch.arange(65536)  # little-endian: the first byte is the low one
    return torch.cat([pairs[two & 255], pairs[two >> 8]], dim=1).numpy().view("complex128").ravel()


def _look_up_on_cpu(packed: Tensor, values: Tensor) -> None:
    """uint8 [n] -> fp32 [2n], unscaled, into `values`.

    numpy takes 8- and 16-bit indices as they are, torch wants them widened to 32: on two Zen cores
    this decodes 0.76 G weights/s, torch's embedding 0.30 and bitsandbytes 0.46.
    """
    import numpy as np  # torch runs without it; only this path needs it

    out = values.numpy().view("complex128")
    np.take(_quads(), packed.numpy().view(np.uint16), mode="clip", out=out)
