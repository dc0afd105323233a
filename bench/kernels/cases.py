"""Which ops `bench.kernels` times, at which shapes, in which order; what each moves and
multiplies.

Bytes and FLOP are the cost model's (`fluxfast/memory/planner/cost.py`): an op's are those of its
launches in a block of FLUX, an NF4 weight's decoding with them. They are of the work and the same
for everyone who does it: a peer that moves more shows less of the floor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from fluxfast_kernels.dispatch.dispatch import arch_of

from fluxfast.memory.planner.cards import card
from fluxfast.memory.planner.cost import NF4, Op, block_ops, element_op, outer_ops, total_seconds
from fluxfast.memory.planner.step_spec import Shape, StepSpec, lora_of, shape_of
from fluxfast.model.spec import FluxSpec

WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# how a linear's weight is kept ("dense" is in the compute dtype), and how it is multiplied ("" is
# in the compute dtype)
MODES = (
    ("nf4", ""),
    ("nf4", "int8"),
    ("nf4", "fp8"),
    ("int8", "int8"),
    ("fp8", "fp8"),
    ("dense", ""),
)
CPU_MODES = MODES[:2]  # what a CPU trains in
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
    "norm_modulate_lora_linear": 57,
    "gelu_lora_linear": 53,
    "lora_linear": 21,
    "qk_norm_rope_attention": 57,
    "attention": 57,
    "norm_modulate": 76,
    "gate_residual": 85,
    "quantize_rows": 76,
    "nf4_dequantize": 171,
    "flow_mix": 1,
    "flow_loss": 1,
    "hadamard_rotate": 0,  # unless layers are chosen for it
}
YARDSTICK = card("RTX 4090")  # whose predicted times put the cases in order


@dataclass(frozen=True)
class Case:
    """One op at one shape. storage: of a linear's weight, of MODES, "" for other ops; products: ""
    in the compute dtype, or "int8", "fp8". pixels, batch: 0 where the op sees no picture."""

    op: str
    storage: str = ""
    products: str = ""
    pixels: int = 0
    batch: int = 0

    def __str__(self) -> str:
        how = "/".join(word for word in (self.storage, self.products) if word)
        shape = f"{self.pixels}px-b{self.batch}" if self.pixels else ""
        return " ".join(word for word in (self.op, how, shape) if word)

    def in_fp8(self) -> bool:
        return "fp8" in (self.storage, self.products)


@dataclass(frozen=True)
class Settings:
    """What the cases of a run have in common. shapes: (pixels, batch); candidates: who is timed, of
    `kernel_problem.CANDIDATES`; rounds, warmup: as `timing.compare` takes them; tiny: a roof of
    sizes that only check the bench."""

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

    def shape(self, case: Case) -> Shape:
        """Tokens of the case's pictures (of one without any: none)."""
        if not case.pixels:
            return Shape(1, 0, 0)
        return shape_of(case.pixels, case.pixels, case.batch, self.text_tokens)

    def tokens(self, case: Case) -> int:
        """Rows of a sample that the op sees: the picture's alone in `lora_linear` (a projection of
        a double block), `gate_residual` and the flow ops, else the text's too."""
        shape = self.shape(case)
        alone = ("lora_linear", "gate_residual", "flow_mix", "flow_loss")
        return shape.image_tokens if case.op in alone else shape.tokens


def kind_of(case: Case, settings: Settings) -> str:
    """Of the case's products: a word of `floor.KINDS`."""
    return case.products or WORDS[settings.compute]


def cases(settings: Settings) -> list[Case]:
    """Most valuable first: small batches and large pictures before others, and of one shape what
    takes most of a training step, by the cost model on the yardstick card."""
    pixels, batch = max((p for p, _ in settings.shapes)), min(b for _, b in settings.shapes)

    def value(case: Case) -> tuple[int, int, float]:
        forward, backward = ops_of(case, settings)
        seconds = total_seconds([*forward, *backward], YARDSTICK)
        return case.batch or batch, -(case.pixels or pixels), -CALLS[case.op] * seconds

    arch = arch_of(torch.device(settings.device))
    without_fp8 = 0 < arch < 89
    found = (case for case in _cases(settings) if not (without_fp8 and case.in_fp8()))
    return sorted(found, key=value)


def _cases(settings: Settings) -> Iterator[Case]:
    kinds = dict.fromkeys(products for _, products in settings.modes if products)
    for op in settings.ops:
        if op == "nf4_dequantize":
            yield Case(op, "nf4")
            continue
        modes = settings.modes if op in LINEARS else (("", ""),)
        if op == "quantize_rows":
            modes = [("", kind) for kind in kinds]
        for storage, products in modes:
            for pixels, batch in settings.shapes:
                yield Case(op, storage, products, pixels, batch)


def ops_of(case: Case, settings: Settings) -> tuple[list[Op], list[Op]]:
    """-> the cost model's ops of one forward and of one backward (none where there is none)."""
    return _COSTS[case.op](case, settings)


def _work(case: Case, settings: Settings, targets: str = "attn+mlp") -> StepSpec:
    word = WORDS[settings.compute]
    storage = word if case.storage in ("", "dense") else case.storage
    lora = lora_of(settings.spec, settings.rank, targets)
    return StepSpec(settings.spec, storage, case.products or word, word, lora)


def _of_block(
    block: str, wanted: Callable[[str], bool], targets: str = "attn+mlp"
) -> Callable[[Case, Settings], tuple[list[Op], list[Op]]]:
    """The ops of a block whose names are wanted."""

    def costs(case: Case, settings: Settings) -> tuple[list[Op], list[Op]]:
        ops = block_ops(_work(case, settings, targets), block, settings.shape(case))
        forward = [op for op in ops.forward if wanted(op.name)]
        return forward, [op for op in ops.backward if wanted(op.name)]

    return costs


def _linear(name: str) -> Callable[[Case, Settings], tuple[list[Op], list[Op]]]:
    # where its input goes on past it, autograd adds two gradients: no part of the op
    return _of_block(
        ".".join(name.split(".")[:2]),
        lambda op: op.startswith(f"{name} ") and not op.endswith("gradients added"),
    )


def _elements(each: Callable[[int], float], flop: float) -> Callable:
    """A pass over [B, T, D] that is forward only. each: bytes of a value, from the dtype's."""

    def costs(case: Case, settings: Settings) -> tuple[list[Op], list[Op]]:
        values = case.batch * settings.tokens(case) * settings.spec.hidden_size
        return [element_op(case.op, values, each(settings.compute.itemsize), flop)], []

    return costs


def _nf4_dequantize(case: Case, settings: Settings) -> tuple[list[Op], list[Op]]:
    weights = settings.spec.mlp_hidden * settings.spec.hidden_size
    return [element_op(case.op, weights, NF4 + settings.compute.itemsize, 1.0)], []


def _flow(case: Case, settings: Settings) -> tuple[list[Op], list[Op]]:
    name = case.op.replace("_", " ")
    ops = outer_ops(_work(case, settings), settings.shape(case))
    forward = [op for op in ops.forward if op.name == name]
    if case.op == "flow_mix":
        return forward, []
    # the kept gradient scaled: read and written once more
    latents = case.batch * settings.tokens(case) * settings.spec.in_channels
    return forward, [element_op(name, latents, 2 * settings.compute.itemsize, 1.0)]


_NORM, _PROJ = f"{LINEARS['norm_modulate_lora_linear']} norm", f"{LINEARS['lora_linear']} gate"
_COSTS = {op: _linear(name) for op, name in LINEARS.items()} | {
    "qk_norm_rope_attention": _of_block(
        SINGLE, lambda op: op.startswith((f"{SINGLE} qk norm", "attention "))
    ),
    "attention": _of_block(SINGLE, lambda op: op.startswith("attention ")),
    "norm_modulate": _of_block(SINGLE, lambda op: op in (_NORM, f"{_NORM} backward")),
    # with the gate trained, which is what the op of its own is for
    "gate_residual": _of_block(DOUBLE, lambda op: op in (_PROJ, f"{_PROJ} backward"), "all"),
    "quantize_rows": _elements(lambda width: width + 1, 4.0),
    "hadamard_rotate": _elements(lambda width: 2 * width, 9.0),
    "nf4_dequantize": _nf4_dequantize,
    "flow_mix": _flow,
    "flow_loss": _flow,
}
OPS = tuple(_COSTS)
