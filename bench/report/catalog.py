"""The tables of kernels/README.md: formula, shapes, bytes, FLOP and floor of every op, and what
quantizing costs a step.

The floor is the larger of bytes over bandwidth and FLOP over dense peak, of one launch on an RTX
4090 (1008 GB/s, bf16 165 TFLOP/s, int8 661 TOP/s: whole TFLOP/s) at one 1024 px picture:
calculated from the datasheet by the cost model (`fluxfast/memory/planner/cost.py`), not timed.
"""

from bench.terminal import markdown
from fluxfast.memory.planner.cards import card
from fluxfast.memory.planner.cost import MASK_FLOP, NF4, attention_op, linear_op

CARD = card("RTX 4090")
PEAK, INT8_PEAK = (1e12 * round(CARD.peaks[kind] / 1e12) for kind in ("bf16", "int8"))
T, D, F, R = 4608, 3072, 12288, 16
E = 2  # bytes of a bf16 value
IN_INT8 = 'lora_linear(matmul="int8")'
# file, op, formula, shapes, what is saved per token
TEXTS = f"""
quant/nf4 | nf4_dequantize | CODE[nibble] · absmax | [N, K] = [12288, 3072] | nothing
ops/lora_linear | lora_linear | x Wᵀ + b + s (x Aᵀ) Bᵀ; residual + gate · that | \
x [B, T, 3072] to [B, T, 3072] | x
ops/lora_linear | {IN_INT8} | the same, x and W in 8 bits | \
x [B, T, 3072] to [B, T, 3072] | x
quant/rows | quantize_rows | round(v · 127 / amax); v = gate · x · channel | x [B, T, 3072] | \
nothing
quant/hadamard | hadamard_rotate | x · H, blocks of 256 | x [B, T, 3072] | nothing
ops/norm_modulate | norm_modulate | LayerNorm(h) (1 + scale) + shift | h [B, T, 3072] | \
h, mean, rstd
ops/norm_modulate | norm_modulate_lora_linear | the linear of norm_modulate(h) | \
h [B, T, 3072] to [B, T, 9216 + 12288] | h, mean, rstd
ops/qk_norm_rope | qk_norm_rope_attention | attention of RMSNorm and RoPE of q and k | \
qkv [B, T, 9216] to [B, T, 3072] | qkv, o, lse
ops/attention | attention | softmax(q kᵀ / √C) v | q, k, v [B, 24, T, 128] | q, k, v, o, lse
ops/gelu | gelu_lora_linear | the linear of [head, GELU-tanh(u)]; residual + gate · that | \
u [B, T, 12288], head [B, T, 3072] | u (16 or 8 bits), head
ops/gate_residual | gate_residual | h + gate · y | h, y [B, T, 3072] | gate; y where gate is trained
ops/dropout | dropout | m · x, m a function of (key, sample, position) | x [B, T, 3072] | nothing
ops/flow_loss | flow_mix | (1 − t) x + t n; n − x; x = mean + std · ε | [B, T, 64] fp32 | nothing
ops/flow_loss | flow_loss | Σ weight · mask · (v − target)² and its gradient | [B, T, 64] | \
the gradient
"""


def linear(n: int, k: int, parts: int = 1, extra: float = 0.0) -> tuple[float, float]:
    """Bytes and FLOP of one launch over NF4 weights, with an update of all n rows."""
    op = linear_op("", "bf16", T, n, k, NF4, E, (parts, n, R), extra)
    return op.bytes, op.flop


ATTENTION = attention_op(1, T, D, E)
# bytes moved and FLOP of the forward launch
COSTS = {
    "nf4_dequantize": ((NF4 + E) * F * D, F * D),
    "lora_linear": linear(D, D, extra=2 * E * T * D),
    IN_INT8: linear(D, D, extra=2 * E * T * D + 2 * T * D),
    "quantize_rows": ((E + 1) * T * D, 4.0 * T * D),
    "hadamard_rotate": (2 * E * T * D, 9.0 * T * D),
    "norm_modulate": (2 * E * T * D + 8 * T, 8.0 * T * D),
    "norm_modulate_lora_linear": linear(3 * D + F, D, 4, 2 * E * T * D),
    "qk_norm_rope_attention": (6 * E * T * D + ATTENTION.bytes, ATTENTION.flop),
    "attention": (ATTENTION.bytes, ATTENTION.flop),
    "gelu_lora_linear": linear(D, F + D, extra=2 * E * T * F + 2 * E * T * D),
    "gate_residual": (3 * E * T * D, 2.0 * T * D),
    "dropout": (2 * E * T * D, MASK_FLOP * T * D),
    "flow_mix": (6 * 4 * (T - 512) * 64, 6.0 * T * 64),
    "flow_loss": ((2 * E + 4) * (T - 512) * 64, 5.0 * T * 64),
}


def table() -> str:
    lines = []
    for text in TEXTS.strip().splitlines():
        file, op, formula, shapes, saved = text.split(" | ")
        moved, flop = COSTS[op]
        floor_us = 1e6 * max(moved / CARD.bandwidth, flop / (INT8_PEAK if op == IN_INT8 else PEAK))
        link = f"[`{op}`](fluxfast_kernels/{file}.py)"
        figures = f"{moved / 1e6:.0f}", f"{flop / 1e9:.1f}", f"{floor_us:.0f}"
        lines.append([link, formula, shapes, saved, *figures])
    head = ["op", "formula", "shapes (bf16 where not said)", "saved", "MB moved", "GFLOP"]
    return markdown([*head, "floor, µs"], lines)


def step_ways() -> list[tuple[str, int, int, float]]:
    """(how the linears multiply, bytes an input value, bytes a gradient value, bytes that both move
    in one step of FLUX.1-dev at 1024 px).

    Per input value: the op that makes it writes it in bf16, the update reads it; quantized it is
    one byte. Per gradient value: the update reads it twice (A's and B's gradients). As a pass of
    its own, quantizing reads the bf16 again; fused, that op or the update writes the 8 bits too.
    """
    inputs = 19 * (3 * D + F) + 38 * (D + D + F)  # K of every linear, per token
    gradients = 19 * (5 * D + F) + 38 * (4 * D + F)  # N
    ways = [
        ("bf16 matmul", 2 + 2 + 2, 2 + 2 + 2),
        ("8-bit matmul, quantized in a pass of its own", 2 + 2 + 1 + 1 + 2, 2 + 2 + 2 + 1 + 1),
        ("8-bit matmul, quantized by the op before or the update", 2 + 1 + 1 + 2, 2 + 2 + 1 + 1),
    ]
    return [(name, x, dy, T * (x * inputs + dy * gradients)) for name, x, dy in ways]


def step_table() -> str:
    lines = [
        [name, f"{x}", f"{dy}", f"{moved / 1e9:.1f}", f"{1e3 * moved / CARD.bandwidth:.0f}"]
        for name, x, dy, moved in step_ways()
    ]
    head = ["", "bytes an input value", "bytes a gradient value", "GB a step", "ms at 1008 GB/s"]
    return markdown(head, lines)
