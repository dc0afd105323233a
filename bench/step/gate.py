"""Does a candidate take the same step? Loss and LoRA gradients against those of a reference.

The reference is the first candidate of the same storage, targets and batch shape that passed. It
leaves its gradients in a file, since candidates may run in processes of their own.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.errors import compare, relative_errors
from bench.step.peers import Candidate
from bench.step.settings import CANDIDATES, Settings
from fluxfast.model.spec import FluxSpec
from fluxfast.objective import Inputs

# 8-bit storage is made of the dense weights, so its results are held to theirs
REFERENCE_STORAGE = {"int8": "dense", "fp8": "dense"}
# relative error of one 8-bit matmul on normal values: two operands of 1.2 or 2.6 % each
MATMUL_ERROR = {"": 0.0, "int8": 0.018, "fp8": 0.038}
_AUTHOR = "candidate"  # a key beside the tensors' names, which have dots but for "loss"


def tolerance(spec: FluxSpec, compute: torch.dtype, matmul: str = "") -> float:
    """Returns the largest relative difference that rounding explains.

    About 30 roundings of a value per block, forward and backward; errors add in quadrature,
    doubled for two sides that each make them. bf16 products sum in fp32, so their sums are exact
    beside bf16's 2^-9; in fp32 a sum of K terms itself errs by sqrt(K) roundings of 2^-24, K = 15
    360 being the longest. 8-bit matmuls add their own.
    """
    blocks = spec.depth + spec.depth_single_blocks
    roundings = 30 * blocks
    # four matmuls on a value's way through a block, and as many on its gradient's way back
    quantized = 2 * MATMUL_ERROR[matmul] * (8 * blocks) ** 0.5
    if compute == torch.bfloat16:
        return math.hypot(2 * 2**-9 * roundings**0.5, quantized)
    summed = 2 * 2**-24 * (roundings * (spec.hidden_size + spec.mlp_hidden)) ** 0.5
    return math.hypot(summed, quantized)


def check(
    name: str, stepper, settings: Settings, batches: list[Inputs], references: Path
) -> tuple[str | None, dict[str, object]]:
    """Returns what is wrong or None, and what was compared, of the batch that differs most.

    references: the folder of reference files; a candidate without one leaves its own.
    """
    kind, candidate = CANDIDATES[name], stepper.candidate
    storage = REFERENCE_STORAGE.get(kind.storage, kind.storage)
    allowed = tolerance(settings.spec, settings.compute, kind.matmul)
    worst: dict[str, object] = {}
    for batch in batches:
        candidate.reset_adapters()
        gradients = loss_and_gradients(candidate, stepper.backward(batch))
        stepper.clear()
        count, tokens = batch.noisy.shape[:2]
        path = references / f"{storage}-{settings.targets}-{tokens}-{count}.npz"
        author, reference = read_reference(path)
        if author == name:
            author, reference = None, None
        wrong, compared = verdict(gradients, reference, allowed)
        compared["reference"] = author
        if wrong is not None:
            return wrong, compared
        if author is None and not kind.matmul:
            write_reference(path, name, gradients)
        if not worst or compared.get("worst_error", 0.0) > worst.get("worst_error", 0.0):
            worst = compared
    return None, worst


def loss_and_gradients(candidate: Candidate, loss: Tensor) -> dict[str, Tensor]:
    """Returns the loss and the LoRA gradients of the first and last block of both kinds, fp32 on
    the CPU, by name."""
    result = {"loss": loss.detach().to("cpu", torch.float32, copy=True)}
    blocks = {"transformer_blocks": [], "single_transformer_blocks": []}
    for module in candidate.adapters:
        kind, index, _ = module.split(".", 2)
        blocks[kind].append(int(index))
    ends = {(kind, i) for kind, seen in blocks.items() if seen for i in (min(seen), max(seen))}
    for module, pair in candidate.adapters.items():
        kind, index, _ = module.split(".", 2)
        if (kind, int(index)) in ends:
            for side, adapter in zip("AB", pair, strict=True):
                # a copy on a CPU too: the gradients may be cleared in place
                gradient = adapter.parameter.grad[adapter.rows].detach()
                result[f"{module}.lora_{side}"] = gradient.to("cpu", torch.float32, copy=True)
    return result


def verdict(
    results: dict[str, Tensor], reference: dict[str, Tensor] | None, allowed: float
) -> tuple[str | None, dict[str, object]]:
    """Returns what is wrong or None, and what was compared. Without a reference, results must be
    finite and not zero."""
    compared: dict[str, object] = {"loss": float(results["loss"]), "tolerance": allowed}
    for name, value in results.items():
        if not torch.isfinite(value).all() or not value.any():
            return f"{name} is zero or not finite", compared
    if reference is None:
        return None, compared
    if missing := results.keys() ^ reference.keys():
        return f"LoRA modules differ from the reference: {sorted(missing)[:3]}", compared
    wrong, worst = compare(results, reference, dict.fromkeys(results, (allowed, math.inf)))
    loss_error, _ = relative_errors(results["loss"], reference["loss"])
    return wrong, compared | {"loss_error": loss_error} | worst


def write_reference(path: Path, author: str, results: dict[str, Tensor]) -> None:
    """Whole or not at all: the process may be killed at any moment."""
    part = path.with_suffix(".part")
    arrays = {name: tensor.numpy() for name, tensor in results.items()}
    with part.open("wb") as file:
        np.savez(file, **{_AUTHOR: np.array(author)}, **arrays)
    os.replace(part, path)


def read_reference(path: Path) -> tuple[str | None, dict[str, Tensor] | None]:
    """Returns the candidate that wrote the file and its results, or None of both without one."""
    if not path.exists():
        return None, None
    with np.load(path) as file:
        results = {name: torch.from_numpy(file[name]) for name in file.files if name != _AUTHOR}
        return str(file[_AUTHOR]), results
