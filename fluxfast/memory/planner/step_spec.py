"""What is trained, how, and on what shapes: what the cost of a step is a function of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fluxfast.errors import ConfigError
from fluxfast.model.lora import select_targets
from fluxfast.model.names import linear_shape
from fluxfast.model.precision import Precision, layer_precisions
from fluxfast.model.spec import DEV, FluxSpec

WIDTH = {"fp32": 4, "bf16": 2}  # bytes
NF4_BLOCK = 64


@dataclass(frozen=True)
class Lora:
    """rank, and BFL linear name -> (P independent As, N' rows that are updated)."""

    rank: int
    modules: Mapping[str, tuple[int, int]]
    spec: FluxSpec = DEV

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of A [P·R, K] and B [N', R] of every layer."""
        shapes = []
        for name, (parts, rows) in self.modules.items():
            width = linear_shape(name, self.spec)[1]
            shapes += [(parts * self.rank, width), (rows, self.rank)]
        return shapes

    @property
    def parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)


def lora_of(
    spec: FluxSpec,
    rank: int,
    targets: str = "attn+mlp",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    share_a: bool = False,
) -> Lora:
    """Returns the LoRA that `inject_lora` makes of the same arguments; raises what it raises."""
    modules: dict[str, tuple[int, int]] = {}
    for target in select_targets(spec, targets, include, exclude):
        parts, rows = modules.get(target.module, (0, 0))
        first, end = target.rows
        modules[target.module] = (1 if share_a else parts + 1, rows + end - first)
    return Lora(rank, modules, spec)


@dataclass(frozen=True)
class StepSpec:
    """What is trained and how: storage, matmul and activations as `choose_precision` and
    `activation_dtype` return them, without `auto`; layers as `layer_precisions` takes them.
    """

    spec: FluxSpec
    storage: str
    matmul: str
    activations: str
    lora: Lora
    dropout: bool = False
    layers: Mapping[str, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Bytes of an activation element."""
        return WIDTH[self.activations]

    @cached_property
    def precisions(self) -> dict[str, Precision]:
        return layer_precisions(self.spec, self.storage, self.matmul, self.layers)

    @cached_property
    def blocks(self) -> list[str]:
        """BFL names of the blocks, in model order."""
        names = [f"double_blocks.{i}" for i in range(self.spec.depth)]
        return names + [f"single_blocks.{i}" for i in range(self.spec.depth_single_blocks)]

    @cached_property
    def first_trained(self) -> int:
        """Index of the first block with a LoRA: no gradient reaches what comes before it."""
        trained = {".".join(name.split(".")[:2]) for name in self.lora.modules}
        indices = (index for index, block in enumerate(self.blocks) if block in trained)
        return next(indices, len(self.blocks))

    def stored_as(self, name: str) -> str:
        """Returns the storage of a linear's weight in memory."""
        storage = self.precisions[name].storage
        odd = storage == "nf4" and linear_shape(name, self.spec)[1] % NF4_BLOCK
        return "bf16" if odd else storage

    def trains(self, name: str) -> bool:
        return name in self.lora.modules


@dataclass(frozen=True)
class Shape:
    """The pictures of one step; tokens are of one sample."""

    batch: int
    image_tokens: int
    text_tokens: int

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens


def shape_of(width_px: int, height_px: int, batch: int, text_tokens: int) -> Shape:
    """Raises ConfigError where a side is no multiple of 16 px (a token)."""
    if width_px % 16 or height_px % 16:
        raise ConfigError(f"{width_px} x {height_px} px: sides must be multiples of 16")
    return Shape(batch, (width_px // 16) * (height_px // 16), text_tokens)
