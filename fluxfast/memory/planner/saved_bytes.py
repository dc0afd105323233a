"""Bytes on the card: what is always there, what each block keeps for backward under each policy,
and what a pass holds besides while it runs.

Counted from what the fused ops save (see the heads of their files) and what their backward passes
allocate. M rows of all samples, D hidden, F mlp width, e bytes an activation.
"""

from typing import NamedTuple

from fluxfast.memory.planner.step_spec import WIDTH, Shape, StepSpec
from fluxfast.memory.planner.timeline import aligned
from fluxfast.model.activations import group_size
from fluxfast.model.modulation import MODULATION_ROWS
from fluxfast.model.names import SWAPPED, block_linears, linear_shape, tensor_sources
from fluxfast.model.precision import linears, multiplies_in_8_bits

GRADIENT_ALIGNED = 64  # values: where a parameter's view of the flat gradient begins


def modulation_names(step: StepSpec) -> list[str]:
    """Returns the BFL names of the modulation's linears, the last layer's included."""
    return [name for name in block_linears(step.spec) if not multiplies_in_8_bits(name)] + [SWAPPED]


# ---------------------------------------------------------------- what a block keeps


class SavedBytes(NamedTuple):
    """Bytes of one block between forward and backward: on the card, in the host's arena."""

    device: int
    host: int = 0


def _storages(step: StepSpec, block: str, shape: Shape) -> list[tuple[str, int]]:
    """Returns (role, elements) of every activation storage that a block saves as it is.

    role: "u", the MLP's pre-activation; "qkv" where recompute_mlp computes it again; else "".
    """
    D, F, B = step.spec.hidden_size, step.spec.mlp_hidden, shape.batch
    rows = B * shape.tokens
    storages = [("", rows * D)]  # o

    def drops(linear: str) -> bool:
        return step.dropout and step.trains(f"{block}.{linear}")

    if block.startswith("double"):
        for stream, tokens in (("img", shape.image_tokens), ("txt", shape.text_tokens)):
            M = B * tokens
            storages += [("", M * D)] * (2 - norm_is_free(step, block))  # h
            storages += [("", 3 * M * D), ("u", M * F)]
            storages += [("", M * D)] * (2 * step.trains(f"{block}.{stream}_mod.lin"))  # y
            masked = {"attn.qkv": D, "mlp.0": D, "mlp.2": F}
            storages += [("", M * K) for name, K in masked.items() if drops(f"{stream}_{name}")]
        return storages
    storages += [("", rows * D)] * (1 - norm_is_free(step, block))  # h
    if drops("linear1"):  # its qkv and u are two views of one storage
        storages += [("", rows * D), ("qkv", rows * (3 * D + F))]
    else:
        storages += [("qkv", 3 * rows * D), ("u", rows * F)]
    storages += [("", rows * D)] * step.trains(f"{block}.modulation.lin")  # y
    storages += [("", rows * (D + F))] * drops("linear2")
    return storages


def saves(step: StepSpec, block: str) -> bool:
    """Returns whether any gradient reaches the block: it or one before it has a LoRA."""
    return step.blocks.index(block) >= step.first_trained


def norm_is_free(step: StepSpec, block: str) -> bool:
    """Returns whether the block's first norm saves nothing: no gradient reaches what comes before
    it nor its modulation, and under dropout it is an op of its own."""
    modulation = ("img_mod.lin", "txt_mod.lin", "modulation.lin")
    trains = any(step.trains(f"{block}.{name}") for name in modulation)
    return step.dropout and not trains and step.blocks.index(block) == step.first_trained


def block_saved(step: StepSpec, block: str, shape: Shape, policy: str) -> SavedBytes:
    """Returns what a block keeps for backward. policy: one of `model.activations.POLICIES`."""
    spec, e = step.spec, step.width
    if not saves(step, block):
        return SavedBytes(0)
    rows = shape.batch * shape.tokens
    if policy == "checkpoint":
        return SavedBytes(e * rows * spec.hidden_size)
    storages = _storages(step, block, shape)
    # means and rstds of the norms, lse: fp32
    norms = (2 if block.startswith("double") else 1) - norm_is_free(step, block)
    total = 8 * norms * rows + 4 * spec.num_heads * rows
    if policy == "offload":
        return SavedBytes(total, sum(aligned(e * count) for _, count in storages))
    # dropout forms u and GELU apart, where no op can save u in 8 bits
    last = ("img_mlp.2", "txt_mlp.2", "linear2")
    splits_gelu = step.dropout and any(step.trains(f"{block}.{name}") for name in last)
    for role, count in storages:
        if policy == "recompute_mlp" and role:
            continue
        if policy in ("gelu_int8", "int8") and role == "u" and not splits_gelu:
            total += count + 8 * (count // spec.mlp_hidden)
        elif policy == "int8":
            total += count + 4 * (count // group_size(count))
        else:
            total += e * count
    return SavedBytes(total)


def outer_saved(step: StepSpec, shape: Shape) -> int:
    """Returns what the last layer keeps, and the modulation of the step."""
    e, rows = step.width, -(-shape.batch // MODULATION_ROWS) * MODULATION_ROWS
    last = e * shape.batch * shape.tokens * step.spec.hidden_size
    last += 8 * shape.batch * shape.image_tokens
    modulation = modulation_names(step)
    width = sum(linear_shape(name, step.spec)[0] for name in modulation)
    # where it is trained, its one input is kept
    width += step.spec.hidden_size * any(map(step.trains, modulation))
    return last + e * rows * width


# ---------------------------------------------------------------- what a pass holds besides


def transient(step: StepSpec, block: str, shape: Shape, policy: str) -> int:
    """Returns the most that a block's backward holds beyond what is saved, with what the policy
    brings back to the card for it.

    That is in the MLP's last linear, while nothing of the block is released yet: the gradient that
    comes in, with and without the gate (2 D), gelu(u) computed again (F), the gradients towards it
    and towards attention (F + D), and half a D of what is small. Attention's own needs 10 D: q, k,
    v and their gradients, do, dqkv, the residual's, but u is gone then. 8-bit products: the codes
    of the gradient and of what an epilogue reads.
    """
    D, F = step.spec.hidden_size, step.spec.mlp_hidden
    M = shape.batch * shape.tokens
    codes = 2 * D if step.matmul in ("int8", "fp8") else 0
    most = M * (step.width * (2 * F + 3 * D + D // 2) + codes)
    if policy in ("checkpoint", "recompute_mlp"):
        full, saved = (block_saved(step, block, shape, p).device for p in ("keep", policy))
        return most + full - saved
    if policy == "int8":  # one storage at a time, qkv the largest; o and its gradient's op overlap
        return most + 4 * M * D * step.width
    return most  # offloaded blocks come into the staging buffers, which are always there


# ---------------------------------------------------------------- what is always there


def weight_bytes(step: StepSpec, name: str, double_quant: bool = False) -> int:
    """Returns the bytes of one linear's frozen weight and bias."""
    N, K = linear_shape(name, step.spec)
    storage, count = step.stored_as(name), N * K
    bias = step.width * N
    if storage in WIDTH:
        return WIDTH[storage] * count + bias
    if storage in ("int8", "fp8"):
        return count + 4 * N + bias
    blocks = count // 64
    scales = 4 * blocks if not double_quant else blocks + 4 * -(-blocks // 256) + 4
    return count // 2 + scales + bias


def weights(step: StepSpec, double_quant: bool = False) -> dict[str, int]:
    """Returns the bytes of the frozen base: "blocks", "modulation", "rest" (in and out, norms)."""
    modulation = set(modulation_names(step))
    sizes = {"blocks": 0, "modulation": 0, "rest": 0}
    for name in linears(step.spec):
        part = "modulation" if name in modulation else "blocks" if "_blocks." in name else "rest"
        sizes[part] += weight_bytes(step, name, double_quant)
    scales = sum(name.endswith(".scale") for name in tensor_sources(step.spec))
    sizes["rest"] += scales * step.spec.head_dim * step.width
    return sizes


def trained(step: StepSpec, optimizer: str, ema: bool) -> dict[str, int]:
    """Returns the bytes of the LoRA, its gradients, the optimizer's state and the average."""
    shapes, lora = step.lora.shapes, 4 * step.lora.parameters
    padded = sum(-(-n * k // GRADIENT_ALIGNED) * GRADIENT_ALIGNED for n, k in shapes)
    return {
        "LoRA": lora,
        "gradients": 4 * padded,
        "optimizer": sum(_state_bytes(optimizer, n, k) for n, k in shapes),
        "EMA": lora if ema else 0,
    }


def _state_bytes(optimizer: str, rows: int, columns: int) -> int:
    """Returns the state of one parameter, every library as the project builds it."""
    count = rows * columns
    if optimizer == "adamw8bit":  # bitsandbytes keeps small tensors in fp32
        return 8 * count if count < 4096 else 2 * count + 2 * 4 * -(-count // 256)
    if optimizer == "adafactor":  # a row's and a column's mean square
        return 4 * (rows + columns)
    return {"adamw": 8, "schedulefree": 8, "prodigy": 16}[optimizer] * count


def scratch_counts(step: StepSpec) -> dict[str, int]:
    """Returns the elements of the buffers that weights are decoded into, by what they hold: "dense"
    in the activations' dtype, "int8" or "fp8" codes. One of each, as large as its largest layer.
    """
    counts = {"dense": 0, "int8": 0, "fp8": 0}
    for name in linears(step.spec):
        N, K = linear_shape(name, step.spec)
        storage, matmul = step.stored_as(name), step.precisions[name].matmul
        if matmul:  # towards x even codes go through one, transposed
            counts[matmul] = max(counts[matmul], N * K)
        elif storage not in WIDTH:
            counts["dense"] = max(counts["dense"], N * K)
    return counts
