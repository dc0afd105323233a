"""What is trained, how, and on what shapes: what the cost of a step is a function of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fluxfast.errors import ConfigError
from fluxfast.model.lora import select_targets
from fluxfast.model.names import linear_shape
from fluxfast.model.precision import (
    DTYPES,
    IN_8_BITS,
    MATMULS,
    STORAGES,
    Precision,
    layer_precisions,
    linears,
)
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
    def parameters(self) -> int:
        """Numbers in all As [P·R, K] and Bs [N', R]."""
        return self.rank * sum(
            parts * linear_shape(name, self.spec)[1] + rows
            for name, (parts, rows) in self.modules.items()
        )


def lora_of(
    spec: FluxSpec,
    rank: int,
    targets: str = "attn+mlp",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    share_a: bool = False,
) -> Lora:
    """The LoRA that `inject_lora` makes of the same arguments; raises what it raises."""
    modules: dict[str, tuple[int, int]] = {}
    for target in select_targets(spec, targets, include, exclude):
        parts, rows = modules.get(target.module, (0, 0))
        first, end = target.rows
        modules[target.module] = (1 if share_a else parts + 1, rows + end - first)
    return Lora(rank, modules, spec)


@dataclass(frozen=True)
class StepSpec:
    """What is trained and how: storage, matmul and activations without `auto`, layers as
    `layer_precisions` takes them. Raises ConfigError for other words and for what does not go
    together.
    """

    spec: FluxSpec
    storage: str
    matmul: str
    activations: str
    lora: Lora
    dropout: bool = False
    layers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        allowed = [
            ("storage", self.storage, STORAGES),
            ("compute", self.matmul, MATMULS),
            ("activations", self.activations, tuple(DTYPES)),
        ]
        for name, word, words in allowed:
            if word not in words:
                raise ConfigError(f"{name} {word!r} is not one of {', '.join(words)}")
        if self.matmul in DTYPES and self.activations != self.matmul:
            message = f"activations {self.activations} do not go with compute {self.matmul}"
            raise ConfigError(message, hint="they are chosen apart for compute int8 or fp8 alone")
        if {self.storage, self.matmul} == set(IN_8_BITS):
            message = f"compute {self.matmul} cannot multiply a base kept in {self.storage}"
            raise ConfigError(message, hint=f"compute {self.storage} or bf16")
        if unknown := set(self.lora.modules) - set(linears(self.spec)):
            raise ConfigError(f"lora: {min(unknown)!r} is no linear of this model")

    @property
    def width(self) -> int:
        """Bytes of an activation element."""
        return WIDTH[self.activations]

    @cached_property
    def precisions(self) -> dict[str, Precision]:
        return layer_precisions(self.spec, self.storage, self.matmul, self.layers)

    def stored_as(self, name: str) -> str:
        """The storage of a linear's weight in memory, one of STORAGES."""
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
    """Raises ConfigError where a side is no multiple of 16 px (a token), or nothing is left."""
    if width_px % 16 or height_px % 16 or min(width_px, height_px, batch) < 1 or text_tokens < 0:
        raise ConfigError(
            f"{width_px} x {height_px} px, batch {batch}, {text_tokens} text tokens: sides must be "
            "multiples of 16 and the batch at least 1"
        )
    return Shape(batch, (width_px // 16) * (height_px // 16), text_tokens)
