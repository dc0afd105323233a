"""What the launchers of `dense.py` and `grads.py` refuse: ValueError, naming the argument."""

from torch import Tensor

from fluxfast_kernels.dispatch.backend import check, check_dtype
from fluxfast_kernels.quant.nf4 import NF4Tensor, check_nf4


def check_side_by_side(name: str, tensors: list[Tensor]) -> tuple[int, int, list[int]]:
    """-> (B, T, widths) of one or two [B, T, width] tensors of one dtype on one device."""
    check(len(tensors) in (1, 2), name, "one or two tensors", len(tensors))
    first = tensors[0]
    for tensor in tensors:
        check_dtype(name, tensor)
        check(tensor.ndim == 3, name, "[B, T, width]", tuple(tensor.shape))
        check(
            tensor.stride(2) == 1 or tensor.shape[2] == 1, name, "of last stride 1", tensor.stride()
        )
        check(tensor.shape[2] > 0, name, "of a width above 0", tuple(tensor.shape))
        same = tensor.shape[:2] == first.shape[:2] and tensor.dtype == first.dtype
        check(same and tensor.device == first.device, name, "alike in B, T, dtype and device",
              [(tuple(t.shape), t.dtype) for t in tensors])  # fmt: skip
    return first.shape[0], first.shape[1], [tensor.shape[2] for tensor in tensors]


def check_parts(parts: list[int], N: int, lora_b: Tensor) -> tuple[tuple[int, int, int, int], ...]:
    """Flat (start, end, index of A) triples -> (start, end, index, first row of lora_b) each."""
    check(len(parts) % 3 == 0 and len(parts) > 0, "parts", "(start, end, index) triples", parts)
    found, row = [], 0
    for start, end, index in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        check(0 <= start < end <= N and index >= 0, "parts", f"row ranges within 0..{N}", parts)
        found.append((start, end, index, row))
        row += end - start
    check(lora_b.ndim == 2 and lora_b.shape[0] == row, "lora_b", f"[{row}, R]", tuple(lora_b.shape))
    return tuple(found)


def check_weight(weight: list[Tensor], N: int, K: int) -> str:
    """-> "dense" or "nf4"; raises ValueError unless `weight` is one of the documented forms."""
    check(len(weight) in (1, 2, 4), "weight", "1 (dense), 2 or 4 (NF4) tensors", len(weight))
    check(N * K < 2**31, "weight", "of fewer than 2^31 values", (N, K))
    if len(weight) == 1:
        check_dtype("weight", weight[0])
        check(weight[0].shape == (N, K), "weight", f"[{N}, {K}]", tuple(weight[0].shape))
        check(weight[0].stride(1) == 1 or K == 1, "weight", "of last stride 1", weight[0].stride())
        return "dense"
    packed, absmax, *nested = weight
    check_nf4(NF4Tensor(packed, absmax, (N, K), *nested))
    return "nf4"


def outputs(
    name: str, out: list[Tensor] | None, B: int, T: int, widths: list[int], like: Tensor
) -> list[Tensor]:
    """`out` checked, or fresh contiguous [B, T, width] tensors of `like`'s dtype and device."""
    if out is None:
        return [like.new_empty(B, T, width) for width in widths]
    check_side_by_side(name, out)
    shapes = [(B, T, width) for width in widths]
    check([tuple(t.shape) for t in out] == shapes, name, str(shapes), [tuple(t.shape) for t in out])
    check(out[0].dtype == like.dtype, name, str(like.dtype), out[0].dtype)
    return out


def check_reach(tensor: Tensor | None, T: int, rows: int) -> None:
    """`rows` neighboring rows lie within 2^31 elements: kernels count so within a tile."""
    if tensor is not None:
        reach = (rows // T + 1) * tensor.stride(0) * (tensor.shape[0] > 1)
        reach += min(rows, T) * tensor.stride(1) + tensor.shape[2]
        check(reach < 2**31, "every [B, T, width] tensor", f"of nearer rows ({rows} a tile)",
              tensor.stride())  # fmt: skip


def check_gated(
    bias: Tensor | None, gate: Tensor | None, residual: Tensor | None, B: int, T: int, N: int
) -> None:
    """Raise ValueError unless what follows a product of N columns has its shape."""
    check(bias is None or bias.shape == (N,) and bias.stride(0) == 1, "bias", f"[{N}]",
          None if bias is None else tuple(bias.shape))  # fmt: skip
    if gate is not None:
        check(gate.shape in ((B, 1, N), (B, N)), "gate", f"[{B}, 1, {N}]", tuple(gate.shape))
        check(gate.stride(-1) == 1, "gate", "of last stride 1", gate.stride())
    if residual is not None:
        check(residual.shape == (B, T, N), "residual", f"[{B}, {T}, {N}]", tuple(residual.shape))
        check(residual.stride(2) == 1, "residual", "of last stride 1", residual.stride())


def check_down(down: Tensor, M: int, columns: int, name: str = "down") -> None:
    """Raise ValueError unless `down` is [M, at least `columns`] of last stride 1."""
    fits = down.ndim == 2 and down.shape[0] == M and down.shape[1] >= columns
    check(fits and down.stride(1) == 1, name, f"[{M}, {columns}]", tuple(down.shape))
