"""Writes the tables of kernels/README.md: formula, shapes, bytes, FLOP and floor of every op, and
what quantising costs a step.

    python -m bench.report.catalogue          rewrites the table
    python -m bench.report.catalogue --check  exits with 1 where the file does not hold it

The floor is the larger of bytes over bandwidth and FLOP over dense peak, of one launch on an RTX
4090 (1008 GB/s, bf16 165 TFLOP/s, int8 661 TOP/s: whole TFLOP/s) at one 1024 px picture:
calculated from the datasheet by the cost model (`fluxfast/memory/cost.py`), not timed.
"""

import argparse
import sys
from dataclasses import dataclass

from bench import ROOT
from fluxfast.memory.cards import card
from fluxfast.memory.cost import NF4, attention_op, linear_op

README = ROOT / "kernels" / "README.md"
BEGIN, END = "<!-- ops: begin -->", "<!-- ops: end -->"
BEGIN_STEP, END_STEP = "<!-- step: begin -->", "<!-- step: end -->"
CARD = card("RTX 4090")
BANDWIDTH = CARD.bandwidth
PEAK, INT8_PEAK = (1e12 * round(CARD.peaks[kind] / 1e12) for kind in ("bf16", "int8"))
T, D, F, H, C, R = 4608, 3072, 12288, 24, 128, 16
E = 2  # bytes of a bf16 value


@dataclass(frozen=True)
class Op:
    """One row. bytes_moved and flop are of the forward launch; saved is per token."""

    file: str
    name: str
    formula: str
    shapes: str
    saved: str
    bytes_moved: float
    flop: float
    peak: float = PEAK

    def floor_us(self) -> float:
        return 1e6 * max(self.bytes_moved / BANDWIDTH, self.flop / self.peak)


def linear(n: int, k: int, parts: int = 1, extra: float = 0.0) -> tuple[float, float]:
    """-> bytes, FLOP of one launch over NF4 weights, with an update of all n rows."""
    op = linear_op("", "bf16", T, n, k, NF4, E, (parts, n, R), extra)
    return op.bytes, op.flop


ATTENTION = attention_op(1, T, D, E)


OPS = [
    Op("quant/nf4", "nf4_decode", "CODE[nibble] · absmax", "[N, K] = [12288, 3072]", "nothing",
       (NF4 + E) * F * D, F * D),
    Op("ops/lora_linear", "lora_linear", "x Wᵀ + b + s (x Aᵀ) Bᵀ; residual + gate · that",
       "x [B, T, 3072] to [B, T, 3072]", "x", *linear(D, D, extra=2 * E * T * D)),
    Op("ops/lora_linear", "lora_linear(products=\"int8\")", "the same, x and W in codes of 8 bits",
       "x [B, T, 3072] to [B, T, 3072]", "x", *linear(D, D, extra=2 * E * T * D + 2 * T * D),
       INT8_PEAK),
    Op("quant/rows", "quantize_rows", "round(v · 127 / amax); v = gate · x · channel",
       "x [B, T, 3072]", "nothing", (E + 1) * T * D, 4.0 * T * D),
    Op("quant/hadamard", "hadamard_rotate", "x · H, blocks of 256", "x [B, T, 3072]", "nothing",
       2 * E * T * D, 9.0 * T * D),
    Op("ops/norm_modulate", "norm_modulate", "LayerNorm(h) (1 + scale) + shift", "h [B, T, 3072]",
       "h, mean, rstd", 2 * E * T * D + 8 * T, 8.0 * T * D),
    Op("ops/norm_modulate", "norm_modulate_lora_linear", "the linear of norm_modulate(h)",
       "h [B, T, 3072] to [B, T, 9216 + 12288]", "h, mean, rstd",
       *linear(3 * D + F, D, 4, 2 * E * T * D)),
    Op("ops/qk_norm_rope", "qk_norm_rope_attention", "attention of RMSNorm and RoPE of q and k",
       "qkv [B, T, 9216] to [B, T, 3072]", "qkv, o, lse", 6 * E * T * D + ATTENTION.bytes,
       ATTENTION.flop),
    Op("ops/attention", "attention", "softmax(q kᵀ / √C) v", "q, k, v [B, 24, T, 128]",
       "q, k, v, o, lse", ATTENTION.bytes, ATTENTION.flop),
    Op("ops/gelu", "gelu_lora_linear", "the linear of [head, GELU-tanh(u)]; residual + gate · that",
       "u [B, T, 12288], head [B, T, 3072]", "u (16 or 8 bits), head",
       *linear(D, F + D, extra=2 * E * T * F + 2 * E * T * D)),
    Op("ops/gate_residual", "gate_residual", "h + gate · y", "h, y [B, T, 3072]",
       "gate; y where gate is trained", 3 * E * T * D, 2.0 * T * D),
    Op("ops/flow_loss", "flow_mix", "(1 − t) x + t n; n − x; x = mean + std · ε", "[B, T, 64] fp32",
       "nothing", 6 * 4 * (T - 512) * 64, 6.0 * T * 64),
    Op("ops/flow_loss", "flow_loss", "Σ weight · mask · (v − target)² and its gradient",
       "[B, T, 64]", "the gradient", (2 * E + 4) * (T - 512) * 64, 5.0 * T * 64),
]  # fmt: skip


def table() -> str:
    lines = [
        "| op | formula | shapes (bf16 where not said) | saved | MB moved | GFLOP | floor, µs |",
        "|---|---|---|---|---|---|---|",
    ]
    for op in OPS:
        link = f"[`{op.name}`](fluxfast_kernels/{op.file}.py)"
        figures = f"{op.bytes_moved / 1e6:.0f} | {op.flop / 1e9:.1f} | {op.floor_us():.0f}"
        lines.append(f"| {link} | {op.formula} | {op.shapes} | {op.saved} | {figures} |")
    return "\n".join([BEGIN, *lines, END])


def step_ways() -> list[tuple[str, int, int, float]]:
    """(how the linears multiply, bytes an input value, bytes a gradient value, bytes that both move
    in one step of FLUX.1-dev at 1024 px).

    Per input value: its maker writes it in bf16, the update reads it; codes are one byte. Per
    gradient value: the update reads it twice (A's and B's gradients). As a pass of its own,
    quantising reads the bf16 again; fused, the maker or the update writes the codes on its way.
    """
    inputs = 19 * (3 * D + F) + 38 * (D + D + F)  # K of every linear, per token
    gradients = 19 * (5 * D + F) + 38 * (4 * D + F)  # N
    ways = [
        ("bf16 products", 2 + 2 + 2, 2 + 2 + 2),
        ("8-bit products, quantised in a pass of its own", 2 + 2 + 1 + 1 + 2, 2 + 2 + 2 + 1 + 1),
        ("8-bit products, codes from the maker or the update", 2 + 1 + 1 + 2, 2 + 2 + 1 + 1),
    ]
    return [(name, x, dy, T * (x * inputs + dy * gradients)) for name, x, dy in ways]


def step_table() -> str:
    lines = [
        "| | bytes an input value | bytes a gradient value | GB a step | ms at 1008 GB/s |",
        "|---|---|---|---|---|",
    ]
    for name, x, dy, moved in step_ways():
        lines.append(f"| {name} | {x} | {dy} | {moved / 1e9:.1f} | {1e3 * moved / BANDWIDTH:.0f} |")
    return "\n".join([BEGIN_STEP, *lines, END_STEP])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    text = README.read_text(encoding="utf-8")
    wanted = text.split(BEGIN)[0] + table() + text.split(END)[1]
    wanted = wanted.split(BEGIN_STEP)[0] + step_table() + wanted.split(END_STEP)[1]
    if not check:
        README.write_text(wanted, encoding="utf-8")
    return int(check and wanted != text)


if __name__ == "__main__":
    sys.exit(main())
