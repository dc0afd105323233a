"""The tables of techniques: what each changes in the result and what it gains.

The gain is read from rows on disk, or counted by the cost model; where there are no rows yet
the tables say so.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench import activations, quality, quantize, rows
from bench.report import step_chart
from bench.report.arithmetic import RANK, shape
from bench.report.catalog import step_ways
from bench.terminal import markdown
from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.cost import modulation_ops, step_ops
from fluxfast.memory.planner.step_spec import StepSpec, lora_of
from fluxfast.model.modulation import MODULATION_ROWS
from fluxfast.model.spec import DEV

BEGIN, END = "<!-- techniques: begin -->", "<!-- techniques: end -->"
SHORT_BEGIN, SHORT_END = "<!-- speed: begin -->", "<!-- speed: end -->"
CLASSES = {
    "exact": "the same bits",
    "rounding": "the same arithmetic, rounded in other places or less often",
    "lossy": "fewer bits",
}
NOTHING = "not measured"
DEFAULTS = StepSpec(DEV, "nf4", "int8", "bf16", lora_of(DEV, RANK))

# the folder of rows -> what a technique gives, in words; empty where no row says so
Figure = Callable[[Path], str]


class Technique(NamedTuple):
    """kind: of CLASSES. changes: what is different in the result. readme: whether it is one of the
    README's."""

    name: str
    kind: str
    changes: str
    gives: Figure
    readme: bool


TECHNIQUES: list[Technique] = []  # in the table's order


def technique(
    name: str, kind: str, changes: str = "nothing", readme: bool = False
) -> Callable[[Figure], Figure]:
    def add(gives: Figure) -> Figure:
        TECHNIQUES.append(Technique(name, kind, changes, gives, readme))
        return gives

    return add


def steps(results: Path) -> dict[str, dict]:
    """Candidate -> its row, of those that the chart shows."""
    return {row["name"]: row for row in step_chart.charted(step_chart.tables(results))}


def beside_eager(*ops: str) -> Figure:
    """Forward and backward of each op, linears over NF4 with matmuls in the compute dtype, over
    the same maths in eager PyTorch: at the largest picture of the smallest batch."""

    def figure(results: Path) -> str:
        timed = rows.read(results / "kernels-cuda.jsonl")
        found = [words for words in (_beside_eager(timed, op) for op in ops) if words]
        return f"measured: {', '.join(found)} of eager PyTorch's time" if found else ""

    return figure


def _beside_eager(timed: list[dict], op: str) -> str:
    """Such as "lora_linear takes 0.50 (a GPU)"; empty where one of the two was not timed."""
    times: dict[tuple, dict[str, float]] = {}
    for row in timed:
        plain = row["storage"] in ("nf4", None) and row["products"] == row["compute"]
        whole = row["direction"] == "forward+backward" and row["status"] == "ok"
        if row["op"] == op and plain and whole:
            shape = -row["batch"], row["pixels"]
            times.setdefault((shape, row["device_name"]), {})[row["name"]] = row["median_ms"]
    both = {key: found for key, found in times.items() if {"fluxfast", "eager"} <= set(found)}
    if not both:
        return ""
    (_, device), found = max(both.items(), key=lambda item: item[0])
    return f"{op} takes {found['fluxfast'] / found['eager']:.2f} ({device})"


@technique(
    "Each fused op saves its input and rebuilds the rest in backward: no checkpointing",
    "exact",
    readme=True,
)
def no_recompute(results: Path) -> str:
    found, names = steps(results), ("fluxfast-nf4", "diffusers-nf4", "diffusers-nf4-checkpoint")
    if not set(names) <= set(found):
        return ""
    ours, theirs, again = (found[name] for name in names)
    kept, more = (row["saved_bytes"] / 2**20 for row in (ours, theirs))
    slower = again["median_ms"] / theirs["median_ms"]
    return (
        f"measured: {kept:.0f} MiB kept for backward where diffusers + peft keeps {more:.0f}, and "
        f"takes {slower:.2f} times as long with checkpointing ({ours['device_name']})"
    )


technique(
    "LayerNorm + modulation, GELU, gate + residual inside the matmul's op",
    "rounding",
    "fewer roundings",
)(beside_eager("norm_modulate_lora_linear", "gelu_lora_linear"))
technique("QK-norm + RoPE + both streams' joint layout in one pass", "rounding", "fewer roundings")(
    beside_eager("qk_norm_rope_attention")
)
technique("LoRA's up-projection inside the accumulator", "rounding", "one rounding fewer")(
    beside_eager("lora_linear")
)


@technique(
    "NF4 dequantized inside the matmul, or once into a scratch buffer that is reused",
    "exact",
    "nothing: the same bytes as bitsandbytes",
    readme=True,
)
def nf4_dequantize(results: Path) -> str:
    timed = [row for row in rows.read(results / quantize.ROWS.name) if row["what"] == "decode"]
    ours = [row for row in timed if row["name"] == quantize.OURS and row["ratio"]]
    if not ours:
        return ""
    return (
        f"measured: decoding takes {ours[-1]['ratio']:.2f} of bitsandbytes' time "
        f"({ours[-1]['device_name']})"
    )


@technique(
    "8-bit matmuls, forward and dX: int8 at four times a 4090's bf16 rate, or fp8",
    "lossy",
    "the blocks' linears round their inputs and gradients to 8 bits",
    readme=True,
)
def int8_products(results: Path) -> str:
    found, names = steps(results), ("fluxfast-nf4-int8", "fluxfast-nf4")
    if not set(names) <= set(found):
        return ""
    int8, plain = (found[name] for name in names)
    said = f"measured: int8 takes {int8['median_ms'] / plain['median_ms']:.2f} of the time of bf16 "
    said += f"matmuls ({int8['device_name']})"
    trained = rows.last_run(results / quality.ROWS.name)
    if trained:
        moved = statistics.fmean(quality.ratios(trained, "nf4/int8"))
        said += f"; the nano model's best held-out loss {moved:+.2%}"
    return said


@technique(
    "Quantization inside the kernel that makes the input; scales and LoRA in the epilogue",
    "exact",
    "nothing more",
    readme=True,
)
def fused_codes(results: Path) -> str:
    apart, fused = (moved / 1e9 for *_, moved in step_ways()[1:])
    return (
        f"counted: the linears' inputs and gradients move {fused:.1f} GB a step at 1024 px instead "
        f"of {apart:.1f}"
    )


@technique(
    "The MLP's activation saved in 8 bits, in as many blocks as the memory asks for",
    "lossy",
    "gradients, in those blocks",
)
def codes_of_u(results: Path) -> str:
    found = rows.last_run(results / activations.ROWS.name)
    if not found:
        return ""
    held = {
        p: activations.of(found, "bytes", p)[0]["flux_dev_predicted"] for p in ("keep", "gelu_int8")
    }
    (row,) = activations.of(found, "gradients", "gelu_int8")
    error = statistics.median(activations.every(row["errors"]))
    return (
        f"predicted: {held['gelu_int8'] / 1e9:.1f} GB kept at 1024 px instead of "
        f"{held['keep'] / 1e9:.1f}; measured: gradients err by {error:.2%} (median, nano model)"
    )


@technique("Frozen modulation computed ahead for coming samples", "exact", readme=True)
def modulation_ahead(results: Path) -> str:
    held = saved_bytes.weights(DEFAULTS)["modulation"] / 1e9
    return f"counted: {held:.1f} GB of weights are read once for {MODULATION_ROWS} samples"


@technique("One CUDA graph per picture size", "exact", readme=True)
def one_graph(results: Path) -> str:
    found = steps(results)
    timed = (found.get(f"fluxfast-nf4{end}", {}) for end in (step_chart.TRAINER, ""))
    with_graph, without = (row.get("launches") for row in timed)
    if with_graph and without:
        return f"measured: {with_graph} launches a step instead of {without}"
    ahead = sum(op.launches for op in modulation_ops(DEFAULTS, 1).forward)
    launches = sum(op.launches for op in step_ops(DEFAULTS, shape(1024))) - ahead
    return f"counted: {launches} launches of forward and backward started as one"


def table(techniques: list[Technique], results: Path) -> str:
    lines = [[*one[:3], one.gives(results) or NOTHING] for one in techniques]
    return markdown(["technique", "class", "effect on the result", "gain"], lines)


def block(results: Path) -> str:
    """All of them, and what the classes mean."""
    meanings = "; ".join(f"{kind}: {meaning}" for kind, meaning in CLASSES.items())
    note = f"{meanings[0].upper()}{meanings[1:]}, beside the same step without the technique."
    return "\n\n".join([BEGIN, table(TECHNIQUES, results), note, END])


def short(results: Path) -> str:
    """The README's."""
    chosen = [one for one in TECHNIQUES if one.readme]
    return "\n\n".join([SHORT_BEGIN, table(chosen, results), SHORT_END])
