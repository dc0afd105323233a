"""FLOP, bytes and time of every op of a training step: one model for the memory planner and the
bench's floors.

It counts what the fused ops of `fluxfast_kernels` do, by the formulas at the head of their files:
a weight that is not kept as it is multiplied is decoded into a scratch first, as above the
dispatch's thresholds; the update (LoRA), bias, gate and residual are added in the product's
epilogue, as on sm_86, 89 and 120 (on sm_80 and 90 torch's matmul is followed by one or two passes
over y, which are not counted). Caches are left out: a scratch that stays in L2 is cheaper.

Least traffic: each tensor that a launch reads or writes crosses the memory once. Vectors of a batch
(modulation, biases) and lse are left out. FLOP: 2 a multiply-add.

Names: M rows of all samples, [N, K] a weight, P independent As, N' rows that an update reaches, R
its rank, e bytes an activation.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from fluxfast.errors import ConfigError
from fluxfast.memory.planner.cards import Card
from fluxfast.memory.planner.saved_bytes import modulation_names
from fluxfast.memory.planner.step_spec import WIDTH, Shape, StepSpec
from fluxfast.model.names import linear_shape

NF4 = 0.5 + 4 / 64  # bytes a weight: a nibble, and an fp32 absmax for each block of 64
_PEAK = {"element": "fp32", "attention_forward": "bf16", "attention_backward": "bf16"}

# NF4 for so few rows is decoded inside the product (the least shipped threshold), and 8-bit weights
# are multiplied as they lie towards x
FUSED_ROWS, UNTRANSPOSED_ROWS = 64, 2048
MASK_FLOP = 25.0  # of a dropout mask, an element: Philox's integer operations
# bytes a parameter: p, g and the states read, p and the states written, once each; the last two
# take several passes in their libraries and are assumed
OPTIMIZERS = {
    "adamw": 28.0,
    "adamw8bit": 12 + 4 + 16 / 256,
    "schedulefree": 28.0,
    "prodigy": 60.0,
    "adafactor": 40.0,
}
GUARD_BYTES = 44  # of a gradient: cleared, added to, its norm, clipped and guarded in three passes


@dataclass(frozen=True)
class Op:
    """kind: a key of `Card.efficiency`. bytes: through the card's memory ("copy": through PCIe).
    launches 0: a part of another op's kernel, whose time adds to it."""

    name: str
    kind: str
    flop: float
    bytes: float
    launches: int = 1


def seconds(op: Op, card: Card, launches: bool = False) -> float:
    """Returns the longer of FLOP over what the card reaches of its peak and bytes over what it
    reaches of its bandwidth. launches: each adds the card's launch_s (in a captured graph none
    does).

    Raises ConfigError for products that the card does not have.
    """
    if op.kind == "copy":
        time = op.bytes / (card.pcie * card.efficiency["copy"].value)
    else:
        peak = _PEAK.get(op.kind, op.kind)
        # element-wise FLOP are bound by bytes on every card: fp32's own share will do
        share = card.efficiency["fp32" if op.kind == "element" else op.kind].value
        if not card.peaks[peak]:
            raise ConfigError(f"{card.name} has no {peak} products", hint="compute: int8 or bf16")
        time = op.bytes / (card.bandwidth * card.efficiency["element"].value)
        time = max(time, op.flop / (card.peaks[peak] * share))
    return time + (op.launches * card.launch_s if launches else 0.0)


def total_flop(ops: Iterable[Op]) -> float:
    return sum(op.flop for op in ops)


def total_bytes(ops: Iterable[Op]) -> float:
    return sum(op.bytes for op in ops)


def total_seconds(ops: Iterable[Op], card: Card, matmul: str = "", launches: bool = False) -> float:
    """Returns the time of ops one after the other. matmul: stretched by the card's measured factor
    of that kind, where it has one; copies over PCIe are not, as no measured step had any."""
    factor = card.factors[matmul].value if matmul in card.factors else 1.0
    return sum(seconds(op, card, launches) * (1 if op.kind == "copy" else factor) for op in ops)


# ---------------------------------------------------------------- single launches


def linear_op(
    name: str,
    kind: str,
    M: int,
    N: int,
    K: int,
    weight: float,
    width: float,
    update: tuple[int, int, int] = (0, 0, 0),
    extra: float = 0.0,
) -> Op:
    """Returns y = x Wᵀ in one launch: x [M, K] and y [M, N] of `width` bytes an element, `weight`
    bytes a weight. update: (P As, N' rows, R rank) of a LoRA inside, A and B in fp32. extra: more
    bytes."""
    parts, rows, rank = update
    moved = width * M * (N + K) + weight * N * K + 4 * rank * (rows + parts * K) + extra
    return Op(name, kind, 2.0 * M * N * K + 2.0 * M * rank * (parts * K + rows), moved)


def attention_op(batch: int, tokens: int, hidden: int, width: int, backward: int = 0) -> Op:
    """Returns attention, which reads q, k, v and writes o; backward reads these and do and writes
    three gradients.

    backward: its products of T·T·hidden, 5 with flash (scores computed again), 4 where the scores
    were kept; 0 is the forward, which has 2. fp32 runs without tensor cores.
    """
    direction = "backward" if backward else "forward"
    kind = "fp32" if width == 4 else f"attention_{direction}"
    flop = 2.0 * (backward or 2) * batch * tokens**2 * hidden
    moved = (8 if backward else 4) * width * batch * tokens * hidden
    # backward: do · o summed, the products, dq rounded
    return Op(f"attention {direction}", kind, flop, moved, 3 if backward else 1)


def element_op(name: str, elements: float, each: float, flop: float = 1.0, launches: int = 1) -> Op:
    """Returns an element-wise pass. each, flop: bytes and FLOP an element."""
    return Op(name, "element", flop * elements, each * elements, launches)


@dataclass(frozen=True)
class BlockOps:
    """Ops of one pass forward and one backward. recompute_mlp: the MLP's first product, for where
    backward computes it again (a single block's computes qkv too)."""

    forward: list[Op]
    backward: list[Op]
    recompute_mlp: list[Op] = field(default_factory=list)

    def __add__(self, other: "BlockOps") -> "BlockOps":
        return BlockOps(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recompute_mlp + other.recompute_mlp,
        )


# ---------------------------------------------------------------- a linear and its update


class _Linear:
    """One linear over M rows. quantized: input columns whose producer writes their 8-bit codes.
    modulation: the linear that computes the gate of residual + gate · y, "" where there is none."""

    def __init__(self, step: StepSpec, name: str, M: int, quantized: int = 0, modulation: str = ""):
        self.step, self.name, self.M = step, name, M
        self.gated, self.trains_gate = modulation != "", step.trains(modulation)
        self.N, self.K = linear_shape(name, step.spec)
        self.P, self.rows = step.lora.modules.get(name, (0, 0))
        self.R, self.e, self.matmul = step.lora.rank, step.width, step.precisions[name].matmul
        self.drops = step.dropout and self.P > 0  # takes a path that fuses nothing
        self.quantized = 0 if self.drops or not self.matmul else quantized
        self.apart = self.trains_gate or (self.gated and self.drops)
        # what the product multiplies, and in how many bytes
        self.kind = self.matmul or step.activations
        self.operand = 1 if self.matmul else self.e

    def forward(self) -> list[Op]:
        M, N, K, e = self.M, self.N, self.K, self.e
        ops, weight = self._weight()
        unquantized = M * (K - self.quantized) if self.matmul else 0
        if unquantized and (self.drops or not self.P):
            ops.append(self._pass("codes", unquantized, e + 1, 4.0))
            unquantized = 0
        if self.drops:
            ops.append(self._pass("masked", M * K, 2 * e, MASK_FLOP))
        if self.P:  # the codes of what is not quantized yet are written on the way
            ops.append(self._skinny("down", self.P * K, e * M * K + unquantized))
        residual = e * M * N if self.gated and not self.apart else 0
        ops.append(self._product("product", N, K, weight, residual))
        if self.P:
            added = 2 * e * M * self.rows if self.drops else 0
            ops.append(self._skinny("up", self.rows, added, int(self.drops)))
        if self.apart:
            ops.append(self._pass("gate", M * N, 3 * e, 2.0))
        return ops

    def backward(self, need_dx: bool = True) -> list[Op]:
        M, N, K, e = self.M, self.N, self.K, self.e
        ops, weight = self._weight(towards_x=True) if need_dx else ([], 0)
        codes = 1 if self.matmul and need_dx else 0  # of dy, still to be written
        if self.gated:  # dy = gate · dout; the gate's own gradient reads y as well
            each = 3 * e if self.trains_gate else 2 * e
            if not self.apart:  # dy's codes on the way
                each, codes = each + codes, 0
            ops.append(self._pass("gate backward", M * N, each, 3.0 if self.trains_gate else 1.0))
        if codes and (self.drops or not self.P):
            ops.append(self._pass("dy codes", M * N, e + 1, 4.0))
            codes = 0
        if self.drops:
            ops.append(self._pass("masked", M * K, 2 * e, MASK_FLOP))
        if self.P:
            dy = e * M * self.rows
            read = M * N * (e + 1) if codes else dy
            ops.append(self._skinny("down again", self.P * K, e * M * K))
            ops.append(self._skinny("d_down", self.rows, read))
            ops.append(self._skinny("dB", self.rows, dy))
            ops.append(self._skinny("dA", self.P * K, e * M * K))
        if need_dx:
            ops.append(self._product("dx", K, N, weight))
            if self.P:
                wide = e * M * K if self.drops else 0
                ops.append(self._skinny("dx up", self.P * K, wide, int(self.drops)))
            if self.drops:  # dx + mask · the update's
                ops.append(self._pass("dx sum", M * K, 3 * e, MASK_FLOP + 1))
            if self.step.precisions[self.name].rotation:  # through fp32
                ops.append(self._pass("rotate back", M * K, 8.0, 9.0))
        return ops

    def _product(self, name: str, N: int, K: int, weight: float, extra: float = 0.0) -> Op:
        extra += (self.e - self.operand) * self.M * N  # the result is never in codes
        name = f"{self.name} {name}"
        return linear_op(name, self.kind, self.M, N, K, weight, self.operand, extra=extra)

    def _skinny(self, name: str, span: int, wide: float, launches: int = 1) -> Op:
        """Returns a product with A (span P·K) or B (span N'): reads or writes `wide` bytes, the
        factor in fp32, and [M, P·R]."""
        moved = wide + 4 * self.R * span + self.e * self.M * self.P * self.R
        flop = 2.0 * self.M * self.R * span
        return Op(f"{self.name} {name}", self.step.activations, flop, moved, launches)

    def _pass(self, name: str, elements: float, each: float, flop: float) -> Op:
        return element_op(f"{self.name} {name}", elements, each, flop)

    def _weight(self, towards_x: bool = False) -> tuple[list[Op], float]:
        """Returns (the pass that makes the weight ready, or none; bytes a weight that the
        product reads)."""
        storage = self.step.stored_as(self.name)
        halves = self.matmul or self.step.activations == "bf16"  # fp32 products are torch's
        if storage == "nf4" and halves and self.M <= FUSED_ROWS:
            return [], NF4
        nbytes = {"nf4": NF4, "int8": 1 + 4 / self.K, "fp8": 1 + 4 / self.K}.get(storage)
        nbytes = nbytes or WIDTH[storage]
        weights = self.N * self.K
        if storage != self.kind:
            return [self._pass("decode", weights, nbytes + self.operand, 1.0)], self.operand
        if storage == self.matmul and towards_x and self.M > UNTRANSPOSED_ROWS:
            return [self._pass("transpose", weights, 2.0, 0.0)], 1
        return [], nbytes


def _normed(
    step: StepSpec, name: str, M: int, modulation: str, recompute: bool = False
) -> BlockOps:
    """Returns norm_modulate_lora_linear. modulation: the linear that computes shift and scale.
    recompute: it is what recompute_mlp runs again."""
    D = linear_shape(name, step.spec)[1]
    linear = _Linear(step, name, M, quantized=D)
    passes = 2 * step.width + 8 / D  # h and x; mean and rstd in fp32
    codes = 1 + 4 / D if linear.quantized else 0
    forward = [element_op(f"{name} norm", M * D, passes + codes, 8.0), *linear.forward()]
    backward = []
    if linear.P and not linear.drops:
        backward.append(element_op(f"{name} norm again", M * D, passes, 4.0))
    backward += linear.backward()
    flop = 13.0 if step.trains(modulation) else 10.0
    backward.append(element_op(f"{name} norm backward", M * D, passes + step.width, flop))
    if "_blocks." in name:  # its input goes on past it, so that autograd adds two gradients
        backward.append(element_op(f"{name} gradients added", M * D, 3 * step.width))
    return BlockOps(forward, backward, forward if recompute else [])


def _gelued(step: StepSpec, name: str, M: int, modulation: str) -> BlockOps:
    """Returns gelu_lora_linear with gate and residual; linear2 takes the attention's output beside
    u."""
    F, K, e = step.spec.mlp_hidden, linear_shape(name, step.spec)[1], step.width
    linear = _Linear(step, name, M, F, modulation)
    codes = 1 + 4 / F if linear.quantized else 0
    forward = [element_op(f"{name} gelu", M * F, 2 * e + codes, 10.0), *linear.forward()]
    backward = linear.backward()
    if linear.drops and K > F:
        forward.insert(1, element_op(f"{name} inputs joined", M * K, 2 * e, 0.0))
    elif linear.P and not linear.drops:
        backward.insert(0, element_op(f"{name} gelu again", M * F, 2 * e, 10.0))
    backward.append(element_op(f"{name} gelu backward", M * F, 3 * e, 20.0))
    return BlockOps(forward, backward)


def _attended(
    step: StepSpec, name: str, shape: Shape, streams: int, recompute_scores: bool
) -> BlockOps:
    """Returns qk_norm_rope_attention, whose backward computes q, k (and of two streams a joint v)
    again."""
    e, D, T = step.width, step.spec.hidden_size, shape.tokens
    n = shape.batch * T * D
    made = element_op(f"{name} qk norm", n, (4 if streams == 1 else 6) * e, 12.0, streams)
    forward = [made, attention_op(shape.batch, T, D, e)]
    backward = [made, attention_op(shape.batch, T, D, e, 5 if recompute_scores else 4)]
    backward.append(element_op(f"{name} qk norm backward", n, 8 * e, 30.0, streams))
    if streams == 2:  # each stream took its slice of o
        backward.insert(0, element_op(f"{name} gradients joined", n, 2 * e, 0.0))
    return BlockOps(forward, backward)


# ---------------------------------------------------------------- a step


def block_ops(step: StepSpec, block: str, shape: Shape, recompute_scores: bool = True) -> BlockOps:
    """Returns the ops of one block without its modulation linears (`modulation_ops`); every input
    has a gradient.

    block: "double_blocks.0", "single_blocks.3". recompute_scores: attention's backward computes the
    scores again, as flash does (10·B·T²·D FLOP), else 8.
    """
    if block.startswith("single"):
        M, modulation = shape.batch * shape.tokens, f"{block}.modulation.lin"
        ops = _normed(step, f"{block}.linear1", M, modulation, recompute=True)
        ops += _attended(step, block, shape, 1, recompute_scores)
        return ops + _gelued(step, f"{block}.linear2", M, modulation)
    ops = _attended(step, block, shape, 2, recompute_scores)
    for stream, tokens in (("txt", shape.text_tokens), ("img", shape.image_tokens)):
        at, M = f"{block}.{stream}", shape.batch * tokens
        modulation = f"{at}_mod.lin"
        ops += _normed(step, f"{at}_attn.qkv", M, modulation)
        proj = _Linear(step, f"{at}_attn.proj", M, modulation=modulation)
        ops += BlockOps(proj.forward(), proj.backward())
        ops += _normed(step, f"{at}_mlp.0", M, modulation, recompute=True)
        ops += _gelued(step, f"{at}_mlp.2", M, modulation)
    return ops


def modulation_ops(step: StepSpec, rows: int) -> BlockOps:
    """Returns all modulation linears, the last layer's too, over `rows` rows: one a sample of the
    step, or more where they are computed ahead. Backward: the gradients of their LoRA alone, as
    nothing before them is trained."""
    ops = BlockOps([], [])
    for name in modulation_names(step):
        linear = _Linear(step, name, rows)
        silu = element_op(f"{name} silu", rows * linear.K, 2 * step.width, 4.0)
        ops += BlockOps([silu, *linear.forward()], linear.backward(need_dx=False))
    return ops


def outer_ops(step: StepSpec, shape: Shape) -> BlockOps:
    """Returns what is around the blocks: noise mixed in, embeddings, the last linear, the loss."""
    spec, e, B = step.spec, step.width, shape.batch
    images, texts = B * shape.image_tokens, B * shape.text_tokens
    tokens, latents = B * shape.tokens * spec.hidden_size, images * spec.in_channels
    embedders = ["time_in", "vector_in"] + ["guidance_in"] * spec.guidance_embed
    rows = {"img_in": images, "txt_in": texts}
    rows |= {f"{name}.{side}_layer": B for name in embedders for side in ("in", "out")}
    forward = [element_op("flow mix", latents, 6 * 4, 6.0)]
    for name, M in rows.items():
        forward += _Linear(step, name, M).forward()
    forward.append(element_op("streams joined", tokens, 2 * e, 0.0))
    last = _normed(step, "final_layer.linear", images, "")
    loss = element_op("flow loss", latents, 2 * e + 4, 5.0)
    # the gradient of a slice: zeros, then its rows
    sliced = e * tokens + 2 * e * images * spec.hidden_size
    backward = [*last.backward, Op("text's zeros", "element", 0.0, sliced, 2)]
    return BlockOps([*forward, *last.forward, loss], backward)


def optimizer_ops(
    step: StepSpec, optimizer: str, ema: bool = False, guard: bool = True
) -> list[Op]:
    """Returns the ops over the LoRA's fp32 parameters. optimizer: of OPTIMIZERS. guard: the
    trainer's flat gradients, clipped and guarded."""
    count, tensors = step.lora.parameters, 2 * len(step.lora.modules)
    launches = tensors if optimizer == "adafactor" else 1  # the others take one flat tensor
    ops = [element_op(optimizer, count, OPTIMIZERS[optimizer], 12.0, launches)]
    if guard:
        ops.append(element_op("gradients", count, GUARD_BYTES, 5.0, tensors + 5))
    if ema:
        ops.append(element_op("ema", count, 12, 3.0))
    return ops


def step_ops(step: StepSpec, shape: Shape, recompute_scores: bool = True) -> list[Op]:
    """Returns everything of a step once, forward and backward, nothing recomputed; without the
    optimizer. recompute_scores: as `block_ops` takes it."""
    parts = [modulation_ops(step, shape.batch), outer_ops(step, shape)]
    parts += [block_ops(step, block, shape, recompute_scores) for block in step.blocks]
    return [op for part in parts for op in part.forward + part.backward]


def model_flop(step: StepSpec, shape: Shape) -> float:
    """Returns the FLOP of the products that any implementation of a step needs: forward, backward
    and attention, none of them computed again, nothing element-wise. What model FLOP utilization
    counts.
    """
    return total_flop(
        op
        for op in step_ops(step, shape, recompute_scores=False)
        if op.kind not in ("element", "copy") and not op.name.endswith(" again")
    )
