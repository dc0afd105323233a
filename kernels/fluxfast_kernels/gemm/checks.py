"""Argument checks of the matmul launchers: a ValueError names the argument."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxfast_kernels.dispatch.backend import Matrix, check, check_dtype, refuse
from fluxfast_kernels.gemm.epilogue import Epilogue, LoRAUpdate, Part, Update
from fluxfast_kernels.quant.nf4 import NF4Tensor, check_nf4


def check_side_by_side(name: str, tensors: list[Tensor]) -> tuple[int, int, list[int]]:
    """Returns B, T and the widths of one or two [B, T, width] tensors of one dtype and device."""
    if len(tensors) not in (1, 2):
        refuse(name, "one or two tensors", len(tensors))
    first = tensors[0]
    for tensor in tensors:
        check_dtype(name, tensor)
        if tensor.ndim != 3:
            refuse(name, "[B, T, width]", tuple(tensor.shape))
        fits = tensor.stride(2) == 1 or tensor.shape[2] == 1
        if not fits:
            refuse(name, "of last stride 1", tensor.stride())
        if tensor.shape[2] <= 0:
            refuse(name, "of a width above 0", tuple(tensor.shape))
        same = tensor.shape[:2] == first.shape[:2] and tensor.dtype == first.dtype
        if not same or tensor.device != first.device:
            got = [(tuple(t.shape), t.dtype) for t in tensors]
            refuse(name, "alike in B, T, dtype and device", got)
    return first.shape[0], first.shape[1], [tensor.shape[2] for tensor in tensors]


def check_parts(parts: Sequence[int], N: int, lora_b: Tensor) -> tuple[Part, ...]:
    """Returns the parts of flat (start, end, index of A) triples."""
    check(len(parts) % 3 == 0 and len(parts) > 0, "parts", "(start, end, index) triples", parts)
    checked, row = [], 0
    for start, end, index in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        if not (0 <= start < end <= N and index >= 0):
            refuse("parts", f"row ranges within 0..{N}", parts)
        checked.append(Part(start, end, index, row))
        row += end - start
    if not (lora_b.ndim == 2 and lora_b.shape[0] == row):
        refuse("lora_b", f"[{row}, R]", tuple(lora_b.shape))
    return tuple(checked)


def check_weight(weight: Sequence[Tensor], N: int, K: int) -> str:
    """ "dense" or "nf4". Raises ValueError unless `weight` is one of the documented forms."""
    if len(weight) not in (1, 2, 4):
        refuse("weight", "1 (dense), 2 or 4 (NF4) tensors", len(weight))
    check(N * K < 2**31, "weight", "of fewer than 2^31 values", (N, K))
    if len(weight) == 1:
        check_dtype("weight", weight[0])
        if weight[0].shape != (N, K):
            refuse("weight", f"[{N}, {K}]", tuple(weight[0].shape))
        if not (weight[0].stride(1) == 1 or K == 1):
            refuse("weight", "of last stride 1", weight[0].stride())
        return "dense"
    packed, absmax, *nested = weight
    check_nf4(NF4Tensor(packed, absmax, (N, K), *nested))
    return "nf4"


def outputs(
    out: list[Tensor] | None, like: Tensor, widths: list[int], dtype: torch.dtype
) -> list[Tensor]:
    """Returns `out`, checked, or new contiguous [B, T, width] tensors. like: [B, T, any width]."""
    if out is None:
        return [like.new_empty(*like.shape[:2], width, dtype=dtype) for width in widths]
    check_side_by_side("out", out)
    shapes = [(*like.shape[:2], width) for width in widths]
    got = [tuple(tensor.shape) for tensor in out]
    if got != shapes:
        refuse("out", str(shapes), got)
    if out[0].dtype != dtype:
        refuse("out", str(dtype), out[0].dtype)
    return out


def check_devices(device: torch.device, arguments: Sequence) -> None:
    """Raise ValueError unless all tensors among a kernel's arguments, tuples too, lie on it."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.device != device:
                refuse("every tensor", f"on {device}", argument.device)
        elif isinstance(argument, tuple):
            check_devices(device, argument)


def check_reach(matrices: Sequence[Matrix | None], T: int, rows: int) -> None:
    """Raise ValueError unless `rows` neighboring rows lie within 2^31 elements: distances within a
    kernel's tile are 32-bit."""
    for x, batch_stride, token_stride in filter(None, matrices):
        reach = (rows // T + 1) * batch_stride * (x.shape[0] > 1)
        reach += min(rows, T) * token_stride + x.shape[2]
        if reach >= 2**31:
            nearer = f"of nearer rows ({rows} a tile)"
            refuse("every [B, T, width] tensor", nearer, x.stride())


def check_gated(bias: Tensor | None, epilogue: Epilogue, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless bias, gate, residual and split fit an output [B, T, N]."""
    (B, _, N), (gate, residual, split) = shape, epilogue
    if not (0 <= split < N):
        refuse("split", f"within 0..{N}", split)
    if bias is not None and not (bias.shape == (N,) and bias.stride(0) == 1):
        refuse("bias", f"[{N}]", tuple(bias.shape))
    if gate is not None:
        if gate.shape not in ((B, 1, N), (B, N)):
            refuse("gate", f"[{B}, 1, {N}]", tuple(gate.shape))
        if gate.stride(-1) != 1:
            refuse("gate", "of last stride 1", gate.stride())
    if residual is not None:
        if residual.shape != shape:
            refuse("residual", f"{list(shape)}", tuple(residual.shape))
        if residual.stride(2) != 1:
            refuse("residual", "of last stride 1", residual.stride())


def update_of(
    down: Tensor | None, update: LoRAUpdate | None, M: int, N: int
) -> tuple[Update | None, tuple[Part, ...]]:
    """Returns the update of y as a kernel takes it, down [M, P·R] and B. Raises ValueError."""
    check((down is None) == (update is None), "down", "given with an update", down is not None)
    if down is None or update is None:
        return None, ()
    lora_b, parts = update.lora_b, check_parts(update.parts, N, update.lora_b)
    _check_down("down", down, M, update.rank * (max(part.index for part in parts) + 1))
    if not lora_b.is_contiguous():
        refuse("lora_b", "contiguous", lora_b.stride())
    row, column = lora_b.stride()
    scale, rank = float(update.scale), update.rank
    return Update(down, down.stride(0), lora_b, row, column, scale, rank), parts


def dx_update_of(
    d_down: Tensor | None, lora_a: Tensor | None, M: int, K: int
) -> tuple[Update | None, int]:
    """Returns the update of dx as a kernel takes it, d_down [M, P·R] and A [P·R, K]; its rank."""
    check((d_down is None) == (lora_a is None), "d_down", "given with lora_a", d_down is not None)
    if d_down is None or lora_a is None:
        return None, 0
    fits = lora_a.ndim == 2 and lora_a.shape[1] == K and lora_a.is_contiguous()
    if not fits:
        refuse("lora_a", f"contiguous [P·R, {K}]", tuple(lora_a.shape))
    _check_down("d_down", d_down, M, lora_a.shape[0])
    rank = lora_a.shape[0]
    return Update(d_down, d_down.stride(0), lora_a, 1, K, 1.0, rank), rank


def _check_down(name: str, down: Tensor, M: int, columns: int) -> None:
    fits = down.ndim == 2 and down.shape[0] == M and down.shape[1] >= columns
    if not (fits and down.stride(1) == 1):
        refuse(name, f"[{M}, {columns}]", tuple(down.shape))
