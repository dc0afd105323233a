"""Bytes on the card: what is always there, what each block keeps for backward under each policy,
and what a pass holds besides while it runs.

Counted from what the fused ops save (see the heads of their files) and what their backward passes
allocate. M rows of all samples, D hidden, F mlp width, e bytes an activation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fluxfast.memory.planner.step_spec import WIDTH, Shape, StepSpec
from fluxfast.model.activations import group_size
from fluxfast.model.modulation import MODULATION_ROWS
from fluxfast.model.names import block_linears, linear_shape, tensor_sources
from fluxfast.model.precision import linears, multiplies_in_8_bits

ALIGNED = 256  # bytes: where a storage begins in the arena
GRADIENT_ALIGNED = 64  # values: where a parameter's view of the flat gradient begins


def blocks_of(step: StepSpec) -> list[str]:
    """BFL names of the blocks, in model order."""
    spec = step.spec
    names = [f"double_blocks.{i}" for i in range(spec.depth)]
    return names + [f"single_blocks.{i}" for i in range(spec.depth_single_blocks)]


def modulation_names(step: StepSpec) -> list[str]:
    """BFL names of the modulation's linears, the last layer's included."""
    inside = [name for name in block_linears(step.spec) if not multiplies_in_8_bits(name)]
    return [*inside, "final_layer.adaLN_modulation.1"]


# ---------------------------------------------------------------- what a block keeps


@dataclass(frozen=True)
class SavedBytes:
    """Bytes of one block between forward and backward: on the card, in the host's arena."""

    device: int
    host: int = 0


@dataclass(frozen=True)
class _Storage:
    """One saved activation: its role and its elements."""

    role: str
    count: int


def _storages(step: StepSpec, block: str, shape: Shape) -> list[_Storage]:
    """Every activation storage that a block saves as it is."""
    spec, lora = step.spec, step.lora.modules
    D, F, B = spec.hidden_size, spec.mlp_hidden, shape.batch

    def drops(linear: str) -> bool:
        return step.dropout and f"{block}.{linear}" in lora

    def trained(modulation: str) -> bool:
        return f"{block}.{modulation}" in lora

    storages: list[_Storage] = []
    if block.startswith("double"):
        for stream, tokens in (("img", shape.image_tokens), ("txt", shape.text_tokens)):
            M = B * tokens
            storages += [_Storage("h", M * D)] * (2 - norm_is_free(step, block))
            storages += [_Storage("qkv", 3 * M * D), _Storage("u", M * F)]
            storages += [_Storage("y", M * D)] * (2 * trained(f"{stream}_mod.lin"))
            storages += [_Storage("x", M * D)] * drops(f"{stream}_attn.qkv")
            storages += [_Storage("x", M * D)] * drops(f"{stream}_mlp.0")
            storages += [_Storage("x", M * F)] * drops(f"{stream}_mlp.2")
        return [*storages, _Storage("o", B * shape.tokens * D)]
    M = B * shape.tokens
    storages += [_Storage("h", M * D)] * (1 - norm_is_free(step, block)) + [_Storage("o", M * D)]
    if drops("linear1"):  # its qkv and u are two views of one storage
        storages += [_Storage("x", M * D), _Storage("qkv+u", M * (3 * D + F))]
    else:
        storages += [_Storage("qkv", 3 * M * D), _Storage("u", M * F)]
    storages += [_Storage("y", M * D)] * trained("modulation.lin")
    storages += [_Storage("x", M * (D + F))] * drops("linear2")
    return storages


def _statistics(step: StepSpec, block: str, shape: Shape) -> int:
    """Means and rstds of the norms, lse: fp32."""
    norms = (2 if block.startswith("double") else 1) - norm_is_free(step, block)
    rows = shape.batch * shape.tokens
    return 8 * norms * rows + 4 * step.spec.num_heads * rows


def saves(step: StepSpec, block: str) -> bool:
    """Whether any gradient reaches the block: it or one before it has a LoRA."""
    names = blocks_of(step)
    before = names[: names.index(block) + 1]
    return any(name.startswith(f"{one}.") for one in before for name in step.lora.modules)


def norm_is_free(step: StepSpec, block: str) -> bool:
    """Whether the block's first norm saves nothing: no gradient reaches what comes before it, and
    under dropout it is an op of its own."""
    names = blocks_of(step)
    index = names.index(block)
    return step.dropout and saves(step, block) and not (index and saves(step, names[index - 1]))


def block_saved(step: StepSpec, block: str, shape: Shape, policy: str) -> SavedBytes:
    """What a block keeps for backward. policy: one of `model.activations.POLICIES`."""
    if not saves(step, block):
        return SavedBytes(0)
    e, storages = step.width, _storages(step, block, shape)
    if policy == "checkpoint":
        M, D = shape.batch * shape.tokens, step.spec.hidden_size
        return SavedBytes(e * M * D)
    rest = _statistics(step, block, shape)
    if policy == "offload":
        sizes = [e * s.count for s in storages]
        return SavedBytes(rest, sum(-(-size // ALIGNED) * ALIGNED for size in sizes))
    if policy == "recompute_mlp":
        recomputed = ("u",) if block.startswith("double") else ("u", "qkv", "qkv+u")
        return SavedBytes(rest + sum(e * s.count for s in storages if s.role not in recomputed))
    if policy == "keep":
        return SavedBytes(rest + sum(e * s.count for s in storages))
    assert policy in ("gelu_int8", "int8"), policy
    total = rest
    for storage in storages:
        if storage.role == "u" and not _splits_gelu(step, block):
            total += storage.count + 8 * (storage.count // step.spec.mlp_hidden)
        elif policy == "int8":
            total += storage.count + 4 * (storage.count // group_size(storage.count))
        else:
            total += e * storage.count
    return SavedBytes(total)


def _splits_gelu(step: StepSpec, block: str) -> bool:
    """Whether dropout forms u and GELU apart, where no op can save u in 8 bits."""
    last = ("img_mlp.2", "txt_mlp.2", "linear2")
    return step.dropout and any(f"{block}.{name}" in step.lora.modules for name in last)


def outer_saved(step: StepSpec, shape: Shape) -> int:
    """What the last layer keeps, and the modulation of the step."""
    e, rows = step.width, -(-shape.batch // MODULATION_ROWS) * MODULATION_ROWS
    last = e * shape.batch * shape.tokens * step.spec.hidden_size
    last += 8 * shape.batch * shape.image_tokens
    modulation = modulation_names(step)
    width = sum(linear_shape(name, step.spec)[0] for name in modulation)
    # where it is trained, its one input is kept
    width += step.spec.hidden_size * any(name in step.lora.modules for name in modulation)
    return last + e * rows * width


# ---------------------------------------------------------------- what a pass holds besides


def transient(step: StepSpec, block: str, shape: Shape) -> int:
    """The most that a block's backward holds beyond what is saved.

    That is in the MLP's last linear, while nothing of the block is let go yet: the gradient that
    comes in, with and without the gate (2 D), gelu(u) computed again (F), the gradients towards it
    and towards attention (F + D), and half a D of what is small. Attention's own needs 10 D: q, k,
    v and their gradients, do, dqkv, the residual's, but u is gone then. 8-bit products: the codes
    of the gradient and of what an epilogue reads.
    """
    D, F = step.spec.hidden_size, step.spec.mlp_hidden
    M = shape.batch * shape.tokens
    codes = 2 * D if step.matmul in ("int8", "fp8") else 0
    return M * (step.width * (2 * F + 3 * D + D // 2) + codes)


def recomputed(step: StepSpec, block: str, shape: Shape, policy: str) -> int:
    """What a policy brings back to the card for a block's backward, beyond what it keeps there."""
    if policy in ("checkpoint", "recompute_mlp"):
        full, saved = (block_saved(step, block, shape, p).device for p in ("keep", policy))
        return full - saved
    if policy == "int8":  # one storage at a time, qkv the largest; o and its gradient's op overlap
        M, D = shape.batch * shape.tokens, step.spec.hidden_size
        return 4 * M * D * step.width
    return 0  # offloaded blocks come into the staging buffers, which are always there


def step_peak(step: StepSpec, shape: Shape, policies: Sequence[str]) -> int:
    """The most bytes that activations and passes take at once, staging and arena apart.

    Block i's backward runs while those before it still keep theirs.
    """
    held = outer_saved(step, shape)
    most = 0
    for block, policy in zip(blocks_of(step), policies, strict=True):
        held += block_saved(step, block, shape, policy).device
        now = held + transient(step, block, shape) + recomputed(step, block, shape, policy)
        most = max(most, now)
    return most


# ---------------------------------------------------------------- what is always there


def weight_bytes(step: StepSpec, name: str, double_quant: bool = False) -> int:
    """One linear's frozen weight and bias."""
    N, K = linear_shape(name, step.spec)
    storage, count = step.stored_as(name), N * K
    bias = WIDTH[step.activations] * N
    if storage in WIDTH:
        return WIDTH[storage] * count + bias
    if storage in ("int8", "fp8"):
        return count + 4 * N + bias
    blocks = count // 64
    scales = 4 * blocks if not double_quant else blocks + 4 * -(-blocks // 256) + 4
    return count // 2 + scales + bias


def weights(step: StepSpec, double_quant: bool = False) -> dict[str, int]:
    """Bytes of the frozen base: "blocks", "modulation", "rest" (in and out, norms)."""
    modulation = set(modulation_names(step))
    sizes = {"blocks": 0, "modulation": 0, "rest": 0}
    for name in linears(step.spec):
        part = "modulation" if name in modulation else "blocks" if "_blocks." in name else "rest"
        sizes[part] += weight_bytes(step, name, double_quant)
    scales = sum(name.endswith(".scale") for name in tensor_sources(step.spec))
    sizes["rest"] += scales * step.spec.head_dim * step.width
    return sizes


def lora_shapes(step: StepSpec) -> list[tuple[int, int]]:
    """Shapes of A [P·R, K] and B [N', R] of every layer."""
    rank, shapes = step.lora.rank, []
    for name, (parts, rows) in step.lora.modules.items():
        shapes += [(parts * rank, linear_shape(name, step.spec)[1]), (rows, rank)]
    return shapes


def trained(step: StepSpec, optimizer: str, ema: bool) -> dict[str, int]:
    """Bytes of the LoRA, its gradients, the optimizer's state and the average."""
    shapes = lora_shapes(step)
    counts = [n * k for n, k in shapes]
    padded = sum(-(-c // GRADIENT_ALIGNED) * GRADIENT_ALIGNED for c in counts)
    return {
        "LoRA": 4 * sum(counts),
        "gradients": 4 * padded,
        "optimizer": sum(
            _state_bytes(optimizer, n, k, zero=bool(i % 2)) for i, (n, k) in enumerate(shapes)
        ),
        "EMA": 4 * sum(counts) if ema else 0,
    }


def _state_bytes(optimizer: str, rows: int, columns: int, zero: bool) -> int:
    """Of one parameter. Every library as the project builds it. zero: whether it starts as zeros,
    of which prodigy keeps no copy."""
    count = rows * columns
    if optimizer == "adamw8bit":  # bitsandbytes keeps small tensors in fp32
        return 8 * count if count < 4096 else 2 * count + 2 * 4 * -(-count // 256)
    if optimizer == "adafactor":  # a row's and a column's mean square
        return 4 * (rows + columns)
    return {"adamw": 8, "schedulefree": 8, "prodigy": 12 if zero else 16}[optimizer] * count


def scratch_counts(step: StepSpec) -> dict[str, int]:
    """Elements of the buffers that weights are decoded into, by what they hold: "dense" in the
    activations' dtype, "int8" or "fp8" codes. One of each, as large as its largest layer.
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


def scratch(step: StepSpec) -> int:
    """Bytes of these."""
    counts = scratch_counts(step)
    return step.width * counts["dense"] + counts["int8"] + counts["fp8"]


def largest_matrix(step: StepSpec) -> int:
    """Elements of the largest linear."""
    shapes = (linear_shape(name, step.spec) for name in linears(step.spec))
    return max(N * K for N, K in shapes)


def largest_modulation(step: StepSpec, double_quant: bool = False) -> int:
    """Of the modulation's linears, what one takes: a staging buffer where they lie on the host."""
    return max(weight_bytes(step, name, double_quant) for name in modulation_names(step))
