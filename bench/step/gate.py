"""Does a candidate take the same step? Loss and LoRA gradients against a reference; bytes saved."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.step.peers import Batch, Candidate
from fluxfast.model.spec import FluxSpec


def loss_of(candidate: Candidate, batch: Batch) -> Tensor:
    return torch.nn.functional.mse_loss(candidate.predict(batch).float(), batch.target)


def saved_bytes(candidate: Candidate, batch: Batch) -> int:
    """Bytes that autograd keeps between forward and backward: exact, and the same on every machine.

    Each storage counts once; weights and inputs do not count, nor does what a checkpointed block
    rebuilds.
    """
    known = [*candidate.model.parameters(), *candidate.model.buffers(), *vars(batch).values()]
    return kept_bytes(known, lambda: loss_of(candidate, batch))


def kept_bytes(known: list[Tensor], forward: Callable[[], object]) -> int:
    """What autograd keeps of `forward`, each storage once, those of `known` tensors left out."""
    seen = {t.untyped_storage().data_ptr() for t in known}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(storage)  # alive until the sum is taken: its address cannot come back
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept)


# what one 8-bit product errs by, relative, on normal values: two operands of 1.2 or 2.6 % each
PRODUCT_ERROR = {"": 0.0, "int8": 0.018, "fp8": 0.038}


def tolerance(spec: FluxSpec, compute: torch.dtype, products: str = "") -> float:
    """Largest relative difference that rounding explains.

    About 30 roundings of a value per block, forward and backward; errors add in quadrature,
    doubled for two sides that each make them. bf16 products sum in fp32, so their sums are exact
    beside bf16's 2^-9; in fp32 a sum of K terms itself errs by sqrt(K) roundings of 2^-24, K = 15
    360 being the longest. 8-bit products add their own.
    """
    blocks = spec.depth + spec.depth_single_blocks
    roundings = 30 * blocks
    # four products on a value's way through a block, and as many on its gradient's way back
    coded = 2 * PRODUCT_ERROR[products] * (8 * blocks) ** 0.5
    if compute == torch.bfloat16:
        return math.hypot(2 * 2**-9 * roundings**0.5, coded)
    summed = 2 * 2**-24 * (roundings * (spec.hidden_size + spec.mlp_hidden)) ** 0.5
    return math.hypot(summed, coded)


def evidence(candidate: Candidate, loss: Tensor) -> dict[str, Tensor]:
    """A loss and the LoRA gradients that its backward has left in both kinds' first and last
    blocks, fp32 on the CPU."""
    found = {"loss": loss.detach().to("cpu", torch.float32, copy=True)}
    blocks = {"transformer_blocks": [], "single_transformer_blocks": []}
    for module in candidate.adapters:
        kind, index, _ = module.split(".", 2)
        blocks[kind].append(int(index))
    ends = {f"{kind}.{i}." for kind, seen in blocks.items() if seen for i in (min(seen), max(seen))}
    for module, pair in candidate.adapters.items():
        if any(module.startswith(end) for end in ends):
            for side, adapter in zip("AB", pair, strict=True):
                # a copy on a CPU too: the gradients may be cleared in place
                copied = adapter.grad.detach().to("cpu", torch.float32, copy=True)
                found[f"{module}.lora_{side}"] = copied
    return found


def disagreement(
    found: dict[str, Tensor], reference: dict[str, Tensor] | None, allowed: float
) -> tuple[str | None, dict[str, object]]:
    """-> (what is wrong or None, what was compared). No reference: finite and non-zero will do."""
    compared: dict[str, object] = {"loss": float(found["loss"]), "tolerance": allowed}
    for name, value in found.items():
        if not torch.isfinite(value).all() or not value.any():
            return f"{name} is zero or not finite", compared
    if reference is None:
        return None, compared
    if missing := found.keys() ^ reference.keys():
        return f"LoRA modules differ from the reference: {sorted(missing)[:3]}", compared
    errors = {}
    for name, value in reference.items():
        if found[name].shape != value.shape:
            return f"{name} is {list(found[name].shape)}, expected {list(value.shape)}", compared
        errors[name] = float((found[name] - value).norm() / value.norm())
    worst = max(errors, key=errors.get)
    compared |= {"loss_error": errors["loss"], "worst_error": errors[worst], "worst": worst}
    wrong = f"{worst} differs by {errors[worst]:.2e} of its norm, allowed {allowed:.2e}"
    return wrong if errors[worst] > allowed else None, compared
