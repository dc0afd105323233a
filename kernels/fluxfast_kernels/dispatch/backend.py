"""Where an op runs, how it refuses wrong arguments, and the scratch memory that ops share.

On a CUDA tensor an op launches its Triton kernels. On a CPU tensor it runs its plain-torch
reference, unless Triton's interpreter is on (TRITON_INTERPRET=1 when this package is imported):
then the same launchers run on the CPU, which is how kernels are tested without a GPU.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor


class _Absent:
    """Stands for Triton where there is no wheel of it (macOS): kernels are defined, never run."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *arguments, **_):
        return arguments[0] if arguments else self


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Absent()

HAS_TRITON = not isinstance(triton, _Absent)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# what changes with the number of tokens: a kernel is not compiled again for T = 1 or T % 16 == 0
# (addresses take their alignment from strides), nor for a random key
_NOT_SPECIALIZED = ["M", "T", "split_tiles", "chunks", "key", "threshold"]


def kernel(function: Any) -> Any:
    """Makes a Triton kernel that is launched on the card of its first tensor, current or not."""
    jitted: Any = triton.jit(function, do_not_specialize=_NOT_SPECIALIZED)
    run = getattr(jitted, "run", None)
    if run is None:  # no Triton
        return jitted

    def run_there(*arguments, **options):
        first = next(argument for argument in arguments if argument is not None)
        while isinstance(first, tuple):
            first = first[0]
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return run(*arguments, **options)
        with torch.cuda.device_of(first):
            return run(*arguments, **options)

    jitted.run = run_there
    return jitted


_cpu_launches = os.environ.get("TRITON_INTERPRET", "0") == "1"


def launches(tensor: Tensor) -> bool:
    """Returns whether an op on `tensor` launches Triton kernels (else it runs its reference)."""
    return tensor.is_cuda or _cpu_launches


@contextmanager
def cpu_launches(on: bool) -> Iterator[None]:
    """Switch the launchers on CPU tensors on or off. On needs TRITON_INTERPRET=1 to have been set
    before this package was imported; without it a launch fails for want of a GPU."""
    global _cpu_launches
    before, _cpu_launches = _cpu_launches, on
    try:
        yield
    finally:
        _cpu_launches = before


def layout(tensor: Tensor) -> str:
    """Returns shape and strides, for messages."""
    return f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"


def check(condition: bool, name: str, needed: str, got: object) -> None:
    """Raise ValueError, naming the argument, unless `condition`."""
    if not condition:
        refuse(name, needed, got)


def refuse(name: str, needed: str, got: object) -> NoReturn:
    """Raise ValueError. Where a launch would form words that nobody reads, `check` is spelled out
    with it: they take as long as Triton's own part of a launch."""
    raise ValueError(f"{name} must be {needed}, got {got}")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Raise ValueError unless the tensor's dtype is allowed. The plain-torch references compute in
    fp64 too where they compute in fp32."""
    if tensor.dtype == torch.float64 and torch.float32 in allowed and not launches(tensor):
        return
    if tensor.dtype not in allowed:
        words = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        refuse(name, words, tensor.dtype)


def check_alike(named: dict[str, Tensor], like: Tensor) -> None:
    """Raise ValueError unless the tensors have last stride 1 and `like`'s dtype and device."""
    for name, tensor in named.items():
        if tensor.stride(-1) != 1:
            refuse(name, "of last stride 1", tensor.stride())
        if tensor.dtype != like.dtype:
            refuse(name, f"{like.dtype} as h is", tensor.dtype)
        if tensor.device != like.device:
            refuse(name, f"on {like.device} as h is", tensor.device)


def last_stride_1(gradient: Tensor) -> Tensor:
    """Returns the gradient, copied where its last stride is not 1 (a sum's is expanded from one
    number): autograd, not the caller, chose its strides."""
    if gradient.stride(-1) == 1:
        return gradient
    # cloned: to `contiguous` a tensor of no rows is contiguous whatever its strides
    return gradient.clone(memory_format=torch.contiguous_format)


class Matrix(NamedTuple):
    """A [B, T, width] tensor of last stride 1 as a kernel takes it: pointer and two strides."""

    ptr: Tensor
    batch_stride: int
    token_stride: int


def matrix(x: Tensor | None) -> Any:
    """Returns x [B, T, width] or [B, T] as a kernel takes it; None for None."""
    return None if x is None else Matrix(x, *x.stride()[:2])


class _PerThread(threading.local):
    """CPU matmuls run at once in several threads; on a GPU they queue up, backward's too."""

    def __init__(self):
        self.scratches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}


_cpu, _gpu = _PerThread(), dict[tuple[torch.device, torch.dtype], list[Tensor]]()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def scratch(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns [count] values of the device's one scratch in `dtype`; the next such call reuses it.

    It grows to the largest layer seen. Its users run one after the other: a matmul is queued before
    the next weight is dequantized. New memory instead costs a CPU a page fault every 4 KiB, a third
    of an NF4 matmul's time; on a GPU an older, smaller scratch is kept, since a captured graph may
    hold its address. One made during a capture is not: its memory goes with the graph's pool.

    Streams share it: one that runs beside another of the same GPU overwrites the other's weight.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    on_cpu = device.type == "cpu"
    made = (_cpu.scratches if on_cpu else _gpu).setdefault((device, dtype), [])
    if not made or made[-1].numel() < count:
        if on_cpu:
            made.clear()
        elif _capturing(device):
            return torch.empty(count, dtype=dtype, device=device)
        # one that a preview made in inference mode could not be written to in training
        with torch.inference_mode(False):
            made.append(torch.empty(count, dtype=dtype, device=device))
    return made[-1][:count]
