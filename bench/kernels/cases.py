"""Which ops `bench.kernels` times, at which shapes, in which order; what each moves and multiplies.

Bytes and FLOP are the cost model's (`fluxfast/memory/planner/cost.py`): an op's are those of its
launches in a block of FLUX, an NF4 weight's dequantization with them. They are the same for every
candidate: a peer that moves more shows less of the floor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from fluxfast_kernels.dispatch.dispatch import arch_of

from bench.step.settings import MODES
from fluxfast.memory.planner.cards import card
from fluxfast.memory.planner.cost import (
    MASK_FLOP,
    NF4,
    Op,
    block_ops,
    element_op,
    outer_ops,
    total_seconds,
)
from fluxfast.memory.planner.step_spec import Shape, StepSpec, lora_of, shape_of
from fluxfast.model.spec import FluxSpec

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
CPU_MODES = {"nf4": MODES["nf4"], "nf4-int8": MODES["nf4-int8"]}  # what a CPU trains in
DOUBLE, SINGLE = "double_blocks.0", "single_blocks.0"
# op -> the linear of FLUX that it is timed as
LINEARS = {
    "lora_linear": f"{DOUBLE}.img_attn.proj",
    "norm_modulate_lora_linear": f"{SINGLE}.linear1",
    "gelu_lora_linear": f"{SINGLE}.linear2",
}
# op -> about how often a step of FLUX.1-dev does that much of its work forward, by itself or inside
# another op, other linears by their weights
CALLS = {
    "lora_linear": 21,
    "norm_modulate_lora_linear": 57,
    "gelu_lora_linear": 53,
    "qk_norm_rope_attention": 57,
    "attention": 57,
    "norm_modulate": 76,
    "gate_residual": 85,
    "quantize_rows": 76,
    "hadamard_rotate": 0,  # unless layers are chosen for it
    "dropout": 0,  # unless lora.dropout is set
    "nf4_dequantize": 171,
    "flow_mix": 1,
    "flow_loss": 1,
}
OPS = tuple(CALLS)
YARDSTICK = card("RTX 4090")  # its predicted times put the cases in order


@dataclass(frozen=True)
class Case:
    """One op at one shape. storage: of a linear's weight, "dense" is the compute dtype; matmul: ""
    is the compute dtype; both "" for other ops, as in `bench.step.settings.MODES`.
    pixels, batch: 0 where the op sees no image."""

    op: str
    storage: str = ""
    matmul: str = ""
    pixels: int = 0
    batch: int = 0

    def __str__(self) -> str:
        mode = "/".join(word for word in (self.storage, self.matmul) if word)
        shape = f"{self.pixels}px-b{self.batch}" if self.pixels else ""
        return " ".join(word for word in (self.op, mode, shape) if word)

    def in_fp8(self) -> bool:
        return "fp8" in (self.storage, self.matmul)


@dataclass(frozen=True)
class Settings:
    """What the cases of a run have in common. shapes: (pixels, batch); candidates: names of
    `problem.CANDIDATES`; rounds, warmup: of `timing.compare`; tiny: the roof's sizes only check the
    bench."""

    spec: FluxSpec
    device: str
    compute: torch.dtype
    ops: tuple[str, ...]
    modes: tuple[tuple[str, str], ...]
    shapes: tuple[tuple[int, int], ...]
    text_tokens: int
    rank: int
    candidates: tuple[str, ...]
    rounds: int
    warmup: int
    tiny: bool

    @property
    def matmul_truth(self) -> torch.dtype:
        """A wider dtype for matrix products: fp32 is enough for 2-byte activations."""
        return torch.float32 if self.compute.itemsize == 2 else torch.float64

    def shape(self, case: Case) -> Shape:
        if not case.pixels:
            return Shape(1, 0, 0)
        return shape_of(case.pixels, case.pixels, case.batch, self.text_tokens)

    def tokens(self, case: Case) -> int:
        """Rows of a sample that the op sees: the image's alone in `lora_linear` (a projection of a
        double block), `gate_residual` and the flow ops, else the text's too."""
        shape = self.shape(case)
        image_only = ("lora_linear", "gate_residual", "flow_mix", "flow_loss")
        return shape.image_tokens if case.op in image_only else shape.tokens


def matmul_kind(case: Case, settings: Settings) -> str:
    """Returns one of `floor.KINDS`."""
    return case.matmul or DTYPE_NAMES[settings.compute]


def cases(settings: Settings) -> list[Case]:
    """Most valuable first: small batches and large images before others, and of one shape what
    takes most of a training step, by the cost model on the yardstick card."""
    pixels, batch = max(p for p, _ in settings.shapes), min(b for _, b in settings.shapes)

    def value(case: Case) -> tuple[int, int, float]:
        forward, backward = ops_of(case, settings)
        seconds = total_seconds([*forward, *backward], YARDSTICK)
        return case.batch or batch, -(case.pixels or pixels), -CALLS[case.op] * seconds

    without_fp8 = 0 < arch_of(torch.device(settings.device)) < 89
    possible = (case for case in _cases(settings) if not (without_fp8 and case.in_fp8()))
    return sorted(possible, key=value)


def _cases(settings: Settings) -> Iterator[Case]:
    for op in settings.ops:
        if op == "nf4_dequantize":
            yield Case(op, "nf4")
            continue
        modes = settings.modes if op in LINEARS else (("", ""),)
        if op == "quantize_rows":
            modes = dict.fromkeys(("", matmul) for _, matmul in settings.modes if matmul)
        for mode in modes:
            for pixels, batch in settings.shapes:
                yield Case(op, *mode, pixels, batch)


def ops_of(case: Case, settings: Settings) -> tuple[list[Op], list[Op]]:
    """Returns the cost model's ops of one forward and of one backward, if there is one."""
    spec, width = settings.spec, settings.compute.itemsize
    if case.op in _IN_BLOCK:
        block, wanted = _IN_BLOCK[case.op]
        # with the gate trained, which is what `gate_residual` alone is for
        targets = "all" if case.op == "gate_residual" else "attn+mlp"
        ops = block_ops(_step_spec(case, settings, targets), block, settings.shape(case))
        forward, backward = (
            [op for op in each if wanted(op.name)] for each in (ops.forward, ops.backward)
        )
        return forward, backward
    values = case.batch * settings.tokens(case) * spec.hidden_size
    if case.op == "quantize_rows":
        return [element_op(case.op, values, width + 1, 4.0)], []
    if case.op == "hadamard_rotate":
        return [element_op(case.op, values, 2 * width, 9.0)], []
    if case.op == "dropout":
        return [element_op(case.op, values, 2 * width, MASK_FLOP)], []
    if case.op == "nf4_dequantize":
        weights = spec.mlp_hidden * spec.hidden_size
        return [element_op(case.op, weights, NF4 + width, 1.0)], []
    name = case.op.replace("_", " ")
    ops = outer_ops(_step_spec(case, settings), settings.shape(case))
    forward = [op for op in ops.forward if op.name == name]
    if case.op == "flow_mix":
        return forward, []
    # the saved gradient scaled: read and written once more
    latents = case.batch * settings.tokens(case) * spec.in_channels
    return forward, [element_op(name, latents, 2 * width, 1.0)]


def _step_spec(case: Case, settings: Settings, targets: str = "attn+mlp") -> StepSpec:
    dtype = DTYPE_NAMES[settings.compute]
    storage = dtype if case.storage in ("", "dense") else case.storage
    lora = lora_of(settings.spec, settings.rank, targets)
    return StepSpec(settings.spec, storage, case.matmul or dtype, dtype, lora)


def _of_linear(name: str) -> Callable[[str], bool]:
    # where its input goes on past it, autograd adds two gradients: no part of the op
    return lambda op: op.startswith(f"{name} ") and not op.endswith("gradients added")


_NORM, _GATE = f"{LINEARS['norm_modulate_lora_linear']} norm", f"{LINEARS['lora_linear']} gate"
# op -> a block and which of the cost model's ops there are its own
_IN_BLOCK: dict[str, tuple[str, Callable[[str], bool]]] = {
    **{op: (".".join(name.split(".")[:2]), _of_linear(name)) for op, name in LINEARS.items()},
    "qk_norm_rope_attention": (
        SINGLE,
        lambda op: op.startswith((f"{SINGLE} qk norm", "attention ")),
    ),
    "attention": (SINGLE, lambda op: op.startswith("attention ")),
    "norm_modulate": (SINGLE, lambda op: op in (_NORM, f"{_NORM} backward")),
    "gate_residual": (DOUBLE, lambda op: op in (_GATE, f"{_GATE} backward")),
}
