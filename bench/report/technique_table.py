"""The tables of techniques: what each changes in the result, and its gain.

The gain is read from rows on disk or counted by the cost model; a technique without rows is "not
measured".
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench import activations, quality, quantize
from bench.report import step_chart
from bench.report.arithmetic import RANK
from bench.report.catalog import step_ways
from bench.rows import Row, last_run, read
from bench.terminal import markdown
from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.plan import NODES
from fluxfast.memory.planner.step_spec import StepSpec, lora_of
from fluxfast.model.modulation import MODULATION_ROWS
from fluxfast.model.spec import DEV

CLASSES = {
    "exact": "the same bits",
    "rounding": "the same arithmetic, rounded in other places or less often",
    "lossy": "fewer bits",
}
DEFAULTS = StepSpec(DEV, "nf4", "int8", "bf16", lora_of(DEV, RANK))


# ---------------------------------------------------------------- gains, empty without their rows


def steps(results: Path, *names: str) -> list[Row] | None:
    """The rows of candidates on the chart of steps; None where one is missing."""
    charted = {row["name"]: row for row in step_chart.charted(step_chart.tables(results))}
    return [charted[name] for name in names] if set(names) <= set(charted) else None


def beside_eager(results: Path, *ops: str) -> str:
    """Forward and backward of each op, linears over NF4 with matmuls in the compute dtype, over
    the same maths in eager PyTorch: at the largest image of the smallest batch."""
    ratios = []
    for op in ops:
        times: dict[tuple, dict[str, float]] = defaultdict(dict)
        for row in read(results / "kernels-cuda.jsonl"):
            plain = row["storage"] in ("nf4", None) and row["products"] == row["compute"]
            whole = row["direction"] == "forward+backward" and row["status"] == "ok"
            if row["op"] == op and plain and whole:
                key = -row["batch"], row["pixels"], row["device_name"]
                times[key][row["name"]] = row["median_ms"]
        both = [key for key, by_name in times.items() if {"fluxfast", "eager"} <= set(by_name)]
        if both:
            key = max(both)
            ratio = times[key]["fluxfast"] / times[key]["eager"]
            ratios.append(f"{op} takes {ratio:.2f} ({key[-1]})")
    return f"measured: {', '.join(ratios)} of eager PyTorch's time" if ratios else ""


def no_recompute(results: Path) -> str:
    rows = steps(results, "fluxfast-nf4", "diffusers-nf4", "diffusers-nf4-checkpoint")
    if rows is None:
        return ""
    ours, theirs, checkpointed = rows
    saved, more = (row["saved_bytes"] / 2**20 for row in (ours, theirs))
    slower = checkpointed["median_ms"] / theirs["median_ms"]
    return (
        f"measured: {saved:.0f} MiB kept for backward where diffusers + peft keeps {more:.0f}, and "
        f"takes {slower:.2f} times as long with checkpointing ({ours['device_name']})"
    )


def nf4_dequantize(results: Path) -> str:
    timed = [row for row in read(results / quantize.ROWS.name) if row["what"] == "decode"]
    ours = [row for row in timed if row["name"] == quantize.OURS and row["ratio"]]
    if not ours:
        return ""
    return (
        f"measured: decoding takes {ours[-1]['ratio']:.2f} of bitsandbytes' time "
        f"({ours[-1]['device_name']})"
    )


def int8_matmuls(results: Path) -> str:
    rows = steps(results, "fluxfast-nf4-int8", "fluxfast-nf4")
    if rows is None:
        return ""
    int8, bf16 = rows
    gain = f"measured: int8 takes {int8['median_ms'] / bf16['median_ms']:.2f} of the time of bf16 "
    gain += f"matmuls ({int8['device_name']})"
    trained = last_run(results / quality.ROWS.name)
    if trained:
        moved = statistics.fmean(quality.ratios(trained, "nf4/int8"))
        gain += f"; the nano model's best held-out loss {moved:+.2%}"
    return gain


def fused_quantization(results: Path) -> str:
    apart, fused = (moved / 1e9 for *_, moved in step_ways()[1:])
    return (
        f"counted: the linears' inputs and gradients move {fused:.1f} GB a step at 1024 px instead "
        f"of {apart:.1f}"
    )


def int8_activations(results: Path) -> str:
    rows = last_run(results / activations.ROWS.name)
    if not rows:
        return ""
    keep, int8 = (
        activations.of(rows, "bytes", policy)[0]["flux_dev_predicted"] / 1e9
        for policy in ("keep", "gelu_int8")
    )
    (row,) = activations.of(rows, "gradients", "gelu_int8")
    error = statistics.median(activations.every(row["errors"]))
    return (
        f"predicted: {int8:.1f} GB kept at 1024 px instead of {keep:.1f}; measured: gradients err "
        f"by {error:.2%} (median, nano model)"
    )


def modulation_ahead(results: Path) -> str:
    held = saved_bytes.weights(DEFAULTS)["modulation"] / 1e9
    return f"counted: {held:.1f} GB of weights are read once for {MODULATION_ROWS} samples"


def one_graph(results: Path) -> str:
    rows = steps(results, f"fluxfast-nf4{step_chart.TRAINER}", "fluxfast-nf4") or []
    launches = [row.get("launches") for row in rows]
    if launches and all(launches):
        return f"measured: {launches[0]} launches a step instead of {launches[1]}"
    blocks = DEV.depth + DEV.depth_single_blocks
    return f"counted: about {NODES * blocks} launches of forward and backward started as one"


# ---------------------------------------------------------------- the tables


class Technique(NamedTuple):
    """kind: of CLASSES. gain: from the folder of rows, in words. changes: what differs in the
    result. readme: whether the README has it."""

    name: str
    kind: str
    gain: Callable[[Path], str]
    changes: str = "nothing"
    readme: bool = False


TECHNIQUES = [
    Technique(
        "Each fused op saves its input and rebuilds the rest in backward: no checkpointing",
        "exact",
        no_recompute,
        readme=True,
    ),
    Technique(
        "LayerNorm + modulation, GELU, gate + residual inside the matmul's op",
        "rounding",
        lambda results: beside_eager(results, "norm_modulate_lora_linear", "gelu_lora_linear"),
        "fewer roundings",
    ),
    Technique(
        "QK-norm + RoPE + both streams' joint layout in one pass",
        "rounding",
        lambda results: beside_eager(results, "qk_norm_rope_attention"),
        "fewer roundings",
    ),
    Technique(
        "LoRA's up-projection inside the accumulator",
        "rounding",
        lambda results: beside_eager(results, "lora_linear"),
        "one rounding fewer",
    ),
    Technique(
        "NF4 dequantized inside the matmul, or once into a scratch buffer that is reused",
        "exact",
        nf4_dequantize,
        "nothing: the same bytes as bitsandbytes",
        readme=True,
    ),
    Technique(
        "8-bit matmuls, forward and dX: int8 at four times a 4090's bf16 rate, or fp8",
        "lossy",
        int8_matmuls,
        "the blocks' linears round their inputs and gradients to 8 bits",
        readme=True,
    ),
    Technique(
        "Quantization inside the kernel that makes the input; scales and LoRA in the epilogue",
        "exact",
        fused_quantization,
        "nothing more",
        readme=True,
    ),
    Technique(
        "The MLP's activation saved in 8 bits, in as many blocks as the memory asks for",
        "lossy",
        int8_activations,
        "gradients, in those blocks",
    ),
    Technique(
        "Frozen modulation computed ahead for coming samples",
        "exact",
        modulation_ahead,
        readme=True,
    ),
    Technique("One CUDA graph per picture size", "exact", one_graph, readme=True),
]


def table(techniques: list[Technique], results: Path) -> str:
    lines = [
        [one.name, one.kind, one.changes, one.gain(results) or "not measured"] for one in techniques
    ]
    return markdown(["technique", "class", "effect on the result", "gain"], lines)


def block(results: Path) -> str:
    """All of them, and what the classes mean."""
    meanings = "; ".join(f"{kind}: {meaning}" for kind, meaning in CLASSES.items())
    note = f"{meanings[0].upper()}{meanings[1:]}, beside the same step without the technique."
    return f"{table(TECHNIQUES, results)}\n\n{note}"


def short(results: Path) -> str:
    """The README's."""
    return table([one for one in TECHNIQUES if one.readme], results)
