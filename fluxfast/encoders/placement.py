"""Puts a text encoder where there is memory for it: blocks that do not fit on the GPU stay on the
host, and each is copied for the time of its own forward pass. The embeddings have the same bits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fluxfast.errors import FluxfastError

_FP8 = torch.float8_e4m3fn
FREE_HINT = "end what else uses the GPU (`nvidia-smi` lists it)"


def free_bytes(device: torch.device) -> float:
    """Returns the bytes that this process can still allocate on a GPU; of a CPU they are not
    counted.
    """
    if device.type != "cuda":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def place(
    model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, free: float, work: int
) -> int:
    """Moves a frozen model to the device, of its `blocks` as many as fit into `free` bytes beside
    the `work` bytes of a forward pass. Returns how many stay on the host.

    Where not all fit, weights that fp8 holds exactly, as those of an fp8 file, lie on the device in
    fp8 and are widened for their block's forward pass. Raises FluxfastError if not one block fits.
    """
    sizes = [_bytes(block.parameters()) for block in blocks]
    total = _bytes(model.parameters())
    work = min(work, total)  # a small model works in little
    if total + work <= free:
        model.to(device)
        return 0
    least = total - sum(sizes) + max(sizes) + work  # one block at a time
    if least > free:
        raise FluxfastError(
            f"{type(model).__name__} takes at least {least / 2**30:.2f} GiB of the GPU's memory, "
            f"and {free / 2**30:.2f} GiB are free",
            hint=FREE_HINT,
        )
    room = free - least
    inside = {parameter for block in blocks for parameter in block.parameters()}
    for parameter in set(model.parameters()) - inside:
        parameter.data = parameter.data.to(device)
    on_host = 0
    for block, size in zip(blocks, sizes, strict=True):
        parameters = list(block.parameters())
        stored = [parameter.data for parameter in parameters]
        if size <= 2 * room:
            stored = [_narrowed(tensor.to(device)) for tensor in stored]
        if _bytes(stored) <= room:
            room -= _bytes(stored)
        else:
            stored = [parameter.data for parameter in parameters]
            on_host += 1
        _stream(block, parameters, stored, device)
    return on_host


def _stream(
    block: nn.Module, parameters: list[nn.Parameter], stored: list[Tensor], device: torch.device
) -> None:
    """Makes `stored` the block's weights: on the device and in their own dtype while it runs."""
    dtypes = [parameter.dtype for parameter in parameters]

    def put_in(*_) -> None:
        for parameter, tensor, dtype in zip(parameters, stored, dtypes, strict=True):
            parameter.data = tensor.to(device, dtype)

    def take_out(*_) -> None:
        for parameter, tensor in zip(parameters, stored, strict=True):
            parameter.data = tensor

    take_out()
    block.register_forward_pre_hook(put_in)
    block.register_forward_hook(take_out, always_call=True)


def _narrowed(weight: Tensor) -> Tensor:
    """Returns the weight in fp8 if that holds it exactly."""
    narrow = weight.to(_FP8)
    return narrow if torch.equal(narrow.to(weight.dtype), weight) else weight


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
