"""Bytes on the card: what is always there, what each block keeps for backward under each policy,
and what a pass holds besides while it runs.

Counted from what the fused ops save (see the heads of their files) and what their backward passes
allocate. M rows of all samples, D hidden, F mlp width, e bytes an activation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fluxfast.memory.planner.step_spec import WIDTH, Shape, Work
from fluxfast.model.activations import group_size
from fluxfast.model.modulation import MODULATION_ROWS
from fluxfast.model.names import block_linears, linear_shape, tensor_sources
from fluxfast.model.precision import linears, multiplies_in_8_bits

ALIGNED = 256  # bytes: where a storage begins in the arena
GRADIENT_ALIGNED = 64  # values: where a parameter's view of the flat gradient begins


def blocks_of(work: Work) -> list[str]:
    """BFL names of the blocks, in model order."""
    spec = work.spec
    names = [f"double_blocks.{i}" for i in range(spec.depth)]
    return names + [f"single_blocks.{i}" for i in range(spec.depth_single_blocks)]


def modulation_names(work: Work) -> list[str]:
    """BFL names of the modulation's linears, the last layer's included."""
    inside = [name for name in block_linears(work.spec) if not multiplies_in_8_bits(name)]
    return [*inside, "final_layer.adaLN_modulation.1"]


# ---------------------------------------------------------------- what a block keeps


@dataclass(frozen=True)
class SavedBytes:
    """Bytes of one block between forward and backward: on the card, in the host's arena."""

    device: int
    host: int = 0


@dataclass(frozen=True)
class _Storage:
    """One saved activation: how often it is as many elements, and its role."""

    role: str
    count: int


def _storages(work: Work, block: str, shape: Shape) -> list[_Storage]:
    """Every activation storage that a block saves as it is."""
    spec, lora = work.spec, work.lora.modules
    D, F, B = spec.hidden_size, spec.mlp_hidden, shape.batch

    def drops(linear: str) -> bool:
        return work.dropout and f"{block}.{linear}" in lora

    def trained(modulation: str) -> bool:
        return f"{block}.{modulation}" in lora

    found: list[_Storage] = []
    if block.startswith("double"):
        for stream, tokens in (("img", shape.image_tokens), ("txt", shape.text_tokens)):
            M = B * tokens
            found += [_Storage("h", M * D)] * (2 - norm_is_free(work, block))
            found += [_Storage("qkv", 3 * M * D), _Storage("u", M * F)]
            found += [_Storage("y", M * D)] * (2 * trained(f"{stream}_mod.lin"))
            found += [_Storage("x", M * D)] * drops(f"{stream}_attn.qkv")
            found += [_Storage("x", M * D)] * drops(f"{stream}_mlp.0")
            found += [_Storage("x", M * F)] * drops(f"{stream}_mlp.2")
        return [*found, _Storage("o", B * shape.tokens * D)]
    M = B * shape.tokens
    found += [_Storage("h", M * D)] * (1 - norm_is_free(work, block)) + [_Storage("o", M * D)]
    if drops("linear1"):  # its qkv and u are two views of one storage
        found += [_Storage("x", M * D), _Storage("qkv+u", M * (3 * D + F))]
    else:
        found += [_Storage("qkv", 3 * M * D), _Storage("u", M * F)]
    found += [_Storage("y", M * D)] * trained("modulation.lin")
    found += [_Storage("x", M * (D + F))] * drops("linear2")
    return found


def _statistics(work: Work, block: str, shape: Shape) -> int:
    """Means and rstds of the norms, lse: fp32."""
    norms = (2 if block.startswith("double") else 1) - norm_is_free(work, block)
    rows = shape.batch * shape.tokens
    return 8 * norms * rows + 4 * work.spec.num_heads * rows


def saves(work: Work, block: str) -> bool:
    """Whether any gradient reaches the block: it or one before it has a LoRA."""
    names = blocks_of(work)
    before = names[: names.index(block) + 1]
    return any(name.startswith(f"{one}.") for one in before for name in work.lora.modules)


def norm_is_free(work: Work, block: str) -> bool:
    """Whether the block's first norm saves nothing: no gradient reaches what comes before it, and
    under dropout it is an op of its own."""
    names = blocks_of(work)
    index = names.index(block)
    return work.dropout and saves(work, block) and not (index and saves(work, names[index - 1]))


def block_saved(work: Work, block: str, shape: Shape, policy: str) -> SavedBytes:
    """What a block keeps for backward. policy: one of `model.activations.POLICIES`."""
    if not saves(work, block):
        return SavedBytes(0)
    e, storages = work.width, _storages(work, block, shape)
    if policy == "checkpoint":
        M, D = shape.batch * shape.tokens, work.spec.hidden_size
        return SavedBytes(e * M * D)
    rest = _statistics(work, block, shape)
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
        if storage.role == "u" and not _takes_apart(work, block):
            total += storage.count + 8 * (storage.count // work.spec.mlp_hidden)
        elif policy == "int8":
            total += storage.count + 4 * (storage.count // group_size(storage.count))
        else:
            total += e * storage.count
    return SavedBytes(total)


def _takes_apart(work: Work, block: str) -> bool:
    """Whether dropout forms u and GELU apart, where no op can save u in 8 bits."""
    last = ("img_mlp.2", "txt_mlp.2", "linear2")
    return work.dropout and any(f"{block}.{name}" in work.lora.modules for name in last)


def outer_saved(work: Work, shape: Shape) -> int:
    """What the last layer keeps, and the modulation of the step."""
    e, rows = work.width, -(-shape.batch // MODULATION_ROWS) * MODULATION_ROWS
    last = e * shape.batch * shape.tokens * work.spec.hidden_size
    last += 8 * shape.batch * shape.image_tokens
    modulation = modulation_names(work)
    width = sum(linear_shape(name, work.spec)[0] for name in modulation)
    # where it is trained, its one input is kept
    width += work.spec.hidden_size * any(name in work.lora.modules for name in modulation)
    return last + e * rows * width


# ---------------------------------------------------------------- what a pass holds besides


def transient(work: Work, block: str, shape: Shape) -> int:
    """The most that a block's backward holds beyond what is saved.

    That is in the MLP's last linear, while nothing of the block is let go yet: the gradient that
    comes in, with and without the gate (2 D), gelu(u) computed again (F), the gradients towards it
    and towards attention (F + D), and half a D of what is small. Attention's own needs 10 D: q, k,
    v and their gradients, do, dqkv, the residual's, but u is gone then. 8-bit products: the codes
    of the gradient and of what an epilogue reads.
    """
    D, F = work.spec.hidden_size, work.spec.mlp_hidden
    M = shape.batch * shape.tokens
    codes = 2 * D if work.matmul in ("int8", "fp8") else 0
    return M * (work.width * (2 * F + 3 * D + D // 2) + codes)


def recomputed(work: Work, block: str, shape: Shape, policy: str) -> int:
    """What a policy brings back to the card for a block's backward, beyond what it keeps there."""
    full, kept = (block_saved(work, block, shape, p).device for p in ("keep", policy))
    if policy in ("checkpoint", "recompute_mlp"):
        return full - kept
    if policy == "int8":  # one storage at a time, qkv the largest; o and its gradient's op overlap
        M, D = shape.batch * shape.tokens, work.spec.hidden_size
        return 4 * M * D * work.width
    return 0  # offloaded blocks come into the staging buffers, which are always there


def step_peak(work: Work, shape: Shape, policies: Sequence[str]) -> int:
    """The most bytes that activations and passes take at once, staging and arena apart.

    Block i's backward runs while those before it still keep theirs.
    """
    held = outer_saved(work, shape)
    most = 0
    for block, policy in zip(blocks_of(work), policies, strict=True):
        held += block_saved(work, block, shape, policy).device
        now = held + transient(work, block, shape) + recomputed(work, block, shape, policy)
        most = max(most, now)
    return most


# ---------------------------------------------------------------- what is always there


def weight_bytes(work: Work, name: str, double_quant: bool = False) -> int:
    """One linear's frozen weight and bias."""
    N, K = linear_shape(name, work.spec)
    kept, count = work.kept(name), N * K
    bias = WIDTH[work.activations] * N
    if kept in WIDTH:
        return WIDTH[kept] * count + bias
    if kept in ("int8", "fp8"):
        return count + 4 * N + bias
    blocks = count // 64
    scales = 4 * blocks if not double_quant else blocks + 4 * -(-blocks // 256) + 4
    return count // 2 + scales + bias


def weights(work: Work, double_quant: bool = False) -> dict[str, int]:
    """Bytes of the frozen base: "blocks", "modulation", "rest" (in and out, norms)."""
    modulation = set(modulation_names(work))
    found = {"blocks": 0, "modulation": 0, "rest": 0}
    for name in linears(work.spec):
        part = "modulation" if name in modulation else "blocks" if "_blocks." in name else "rest"
        found[part] += weight_bytes(work, name, double_quant)
    scales = sum(name.endswith(".scale") for name in tensor_sources(work.spec))
    found["rest"] += scales * work.spec.head_dim * work.width
    return found


def lora_shapes(work: Work) -> list[tuple[int, int]]:
    """Shapes of A [P·R, K] and B [N', R] of every layer."""
    rank, shapes = work.lora.rank, []
    for name, (parts, rows) in work.lora.modules.items():
        shapes += [(parts * rank, linear_shape(name, work.spec)[1]), (rows, rank)]
    return shapes


def trained(work: Work, optimizer: str, ema: bool) -> dict[str, int]:
    """Bytes of the LoRA, its gradients, the optimizer's state and the average."""
    shapes = lora_shapes(work)
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


def scratch_counts(work: Work) -> dict[str, int]:
    """Elements of the buffers that weights are decoded into, by what they hold: "dense" in the
    activations' dtype, "int8" or "fp8" codes. One of each, as large as its largest layer.
    """
    found = {"dense": 0, "int8": 0, "fp8": 0}
    for name in linears(work.spec):
        N, K = linear_shape(name, work.spec)
        kept, matmul = work.kept(name), work.precisions[name].matmul
        if matmul:  # towards x even codes go through one, transposed
            found[matmul] = max(found[matmul], N * K)
        elif kept not in WIDTH:
            found["dense"] = max(found["dense"], N * K)
    return found


def scratch(work: Work) -> int:
    """Bytes of these."""
    counts = scratch_counts(work)
    return work.width * counts["dense"] + counts["int8"] + counts["fp8"]


def largest_matrix(work: Work) -> int:
    """Elements of the largest linear."""
    shapes = (linear_shape(name, work.spec) for name in linears(work.spec))
    return max(N * K for N, K in shapes)


def largest_modulation(work: Work, double_quant: bool = False) -> int:
    """Of the modulation's linears, what one takes: a staging buffer where they lie on the host."""
    return max(weight_bytes(work, name, double_quant) for name in modulation_names(work))
