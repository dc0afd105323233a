"""What a run needs and how it is made to fit: one plan for all its batch shapes.

Bytes are those that torch's allocator hands out; a card also loses CONTEXT to CUDA itself, and a
share MARGIN is left free for what no model predicts: fragmentation, and its own error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from fluxfast.errors import ConfigError
from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.cards import VISIBLE, Card
from fluxfast.memory.planner.choose import Choice, Chooser
from fluxfast.memory.planner.cost import (
    Op,
    modulation_ops,
    optimizer_ops,
    outer_ops,
    seconds,
    total_seconds,
)
from fluxfast.memory.planner.step_spec import Shape, StepSpec
from fluxfast.memory.planner.timeline import STAGING_BUFFERS
from fluxfast.model.activations import EXACT
from fluxfast.model.modulation import MODULATION_ROWS
from fluxfast.model.names import linear_shape
from fluxfast.model.precision import linears

GIB = 2**30
CONTEXT = GIB // 2  # assumed: CUDA context, cuBLAS workspaces
MARGIN = 1 / 16  # of the card; a prediction is held to 5 %
NODES = 81  # of a CUDA graph, a block: launches counted by `bench.twin.dry_run`
NODE_BYTES = 16 << 10  # the driver's, outside torch's allocator. Assumed: 10 to 64 KB are reported
EAGER_LAUNCH_S = 80e-6  # assumed: the host's time for a launch from Python; kernels run beside it
OTHER = 3 * GIB // 20  # assumed: batches, random numbers, RoPE tables, optimizer's temporaries

LOADING = 3 * 4  # bytes a weight of the largest matrix while it is quantized: assumed
# copies of the gradients that a step makes and drops; the others make none
STEP_COPIES = {"prodigy": 1, "schedulefree": 1}

# parameters, counted from the published configurations
T5_PARAMETERS = 4_762_310_656
CLIP_PARAMETERS = 123_060_480
VAE_PARAMETERS = 83_819_683
# bytes a pixel that the VAE's widest part holds: four maps of 256 channels in bf16 (assumed)
VAE_BYTES_A_PIXEL = 4 * 256 * 2


@dataclass(frozen=True)
class Request:
    """What is to be trained, and what the user has decided.

    shapes: label -> batch shape, one per bucket. saved_8bit: "none", "u" or "all" of the
    activations may be kept in 8 bits. policy: "auto", or one of POLICIES for all blocks.
    modulation: "auto", "in_place", "ahead" or "host"; optimizer_state: "auto", "device" or "host".
    preview_pixels: of the largest preview, 0 for none; preview_loras: bytes of the factors of
    LoRAs that act in a preview alone. encodes: whether captions and pictures are
    encoded on this card first, with FLUX.1's own encoders. accumulation: batches a step. assistant:
    bytes of an assistant LoRA's factors.
    """

    step: StepSpec
    shapes: Mapping[str, Shape]
    optimizer: str = "adamw"
    ema: bool = False
    double_quant: bool = False
    saved_8bit: str = "u"
    policy: str = "auto"
    modulation: str = "auto"
    optimizer_state: str = "auto"
    graphs: bool = True
    preview_pixels: int = 0
    preview_loras: int = 0
    encodes: bool = True
    accumulation: int = 1
    assistant: int = 0

    @property
    def modulation_trained(self) -> bool:
        return any(map(self.step.trains, saved_bytes.modulation_names(self.step)))

    def allowed(self) -> list[str]:
        """Returns the policies that may be chosen from."""
        if self.policy != "auto":
            return [self.policy]
        if self.step.dropout:  # forms u and GELU apart: there is no op to save it in 8 bits
            return list(EXACT)
        in_8_bits = {"none": (), "u": ("gelu_int8",), "all": ("gelu_int8", "int8")}[self.saved_8bit]
        return [*EXACT, *in_8_bits]


@dataclass(frozen=True)
class Bucket:
    """One shape's part of a plan. seconds: of a micro-batch with its share of the modulation."""

    shape: Shape
    choice: Choice
    bytes: int  # allocated at the most while it trains
    seconds: float
    graphed: bool


@dataclass(frozen=True)
class Plan:
    """static: name -> bytes that are always on the card; static_host: pinned bytes that are always
    on the host. modulation: "in_place", "ahead" (computed for coming samples together) or "host"
    (ahead, its weights in host memory). phases: name -> bytes allocated at the most. step_seconds:
    of the optimizer and what moves once per step.
    """

    request: Request
    card: Card
    limit: float  # bytes that may be allocated
    static: Mapping[str, int]
    static_host: int
    modulation: str
    optimizer_state: str
    buckets: Mapping[str, Bucket]
    step_seconds: float
    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes allocated at the most while training."""
        return max(bucket.bytes for bucket in self.buckets.values())

    @property
    def weights_on_host(self) -> list[str]:
        """BFL names of the linears whose weights live on the host."""
        on_host = self.modulation == "host"
        return saved_bytes.modulation_names(self.request.step) if on_host else []

    @property
    def host(self) -> int:
        """Pinned bytes on the host."""
        return self.static_host + max(bucket.choice.host for bucket in self.buckets.values())

    def seconds(self, label: str) -> float:
        """Returns the time of one optimizer step of that bucket."""
        return self.buckets[label].seconds * self.request.accumulation + self.step_seconds

    @property
    def mean_seconds(self) -> float:
        """Time of one optimizer step, the mean over the buckets."""
        return sum(self.seconds(label) for label in self.buckets) / len(self.buckets)


def usable(vram_gib: float, visible: float = VISIBLE) -> int:
    """Returns the bytes that a run may allocate on a card of so many nominal GiB that nobody else
    uses. visible: the share of them that CUDA shows.
    """
    return int(vram_gib * visible * GIB * (1 - MARGIN)) - CONTEXT


def best_plan(request: Request, card: Card, limit: float, host: int | None) -> Plan | None:
    """Returns the fastest plan of at most `limit` allocated bytes, and of `host` pinned ones; None
    where nothing fits. Raises ConfigError for settings that contradict each other.
    """
    if request.policy == "gelu_int8" and request.step.dropout:
        raise ConfigError(
            "memory.policy: gelu_int8 does nothing under lora.dropout, whose path forms GELU apart",
            hint="memory.policy: auto, or lora.dropout: 0",
        )
    state = request.optimizer_state
    plans = [
        planner.plan(modulation, where)
        for graphs in ((True, False) if request.graphs else (False,))
        for planner in [_Planner(replace(request, graphs=graphs), card, limit, host)]
        for modulation in _modulations(request)
        for where in (("device", "host") if state == "auto" else (state,))
    ]
    return min(filter(None, plans), key=lambda plan: plan.mean_seconds, default=None)


def _modulations(request: Request) -> list[str]:
    if request.modulation_trained:
        if request.modulation in ("ahead", "host"):
            raise ConfigError(
                f"memory.modulation: {request.modulation} needs frozen modulation, and "
                "lora.targets: all trains it",
                hint="memory.modulation: auto, or lora.targets: attn+mlp",
            )
        return ["in_place"]
    return ["ahead", "host"] if request.modulation == "auto" else [request.modulation]


class _Planner:
    """Plans one request on one card, with modulation and optimizer state here or there."""

    def __init__(self, request: Request, card: Card, limit: float, host: int | None):
        self.request, self.step, self.card = request, request.step, card
        self.limit, self.host = limit, host
        self.weights = saved_bytes.weights(self.step, request.double_quant)
        self.trained = saved_bytes.trained(self.step, request.optimizer, request.ema)
        self._choosers: dict[Shape, Chooser] = {}

    def plan(self, modulation: str, state: str) -> Plan | None:
        """Returns the fastest plan with modulation and optimizer state where they are said to be;
        None where nothing fits."""
        static, static_host = self._static(modulation, state)
        always, arena = sum(static.values()), None
        if self.host is not None:
            arena = self.host - static_host
            if arena < 0:
                return None
        buckets, staging = {}, 0
        for _ in range(2):  # staging buffers are the largest bucket's, for all of them
            for label, shape in self.request.shapes.items():
                bucket = self._bucket(shape, always, arena, modulation, staging)
                if bucket is None:
                    return None
                buckets[label] = bucket
            largest = max(bucket.choice.staging for bucket in buckets.values())
            if largest == staging:
                break
            staging = largest
        moved = self.trained["optimizer"] if state == "host" else 0
        phases = self._phases(static, moved, buckets)
        if max(phases.values()) > self.limit:
            return None
        ops = optimizer_ops(self.step, self.request.optimizer, self.request.ema)
        step_seconds = total_seconds(ops, self.card, self.step.matmul, launches=True)
        step_seconds += 2 * seconds(Op("optimizer state", "copy", 0.0, moved), self.card)
        places = static, static_host, modulation, state
        return Plan(self.request, self.card, self.limit, *places, buckets, step_seconds, phases)

    def _static(self, modulation: str, state: str) -> tuple[dict[str, int], int]:
        """Returns name -> bytes that are always on the card, and the bytes on the host instead."""
        step, request, host = self.step, self.request, 0
        sizes = {f"weights: {part}": size for part, size in self.weights.items()} | self.trained
        counts = saved_bytes.scratch_counts(step)
        sizes["scratch"] = step.width * counts["dense"] + counts["int8"] + counts["fp8"]
        sizes["other"] = OTHER
        if request.graphs:
            shapes = set(request.shapes.values())  # buckets of one token count share a graph
            sizes["CUDA graphs"] = len(shapes) * len(step.blocks) * NODES * NODE_BYTES
        if request.assistant:  # a step keeps it once more, its ranks beside the trained LoRA's
            sizes["assistant LoRA"] = 2 * request.assistant + sizes["LoRA"]
        if modulation == "host":
            host += sizes.pop("weights: modulation")
            names = saved_bytes.modulation_names(step)
            each = [saved_bytes.weight_bytes(step, name, request.double_quant) for name in names]
            sizes["modulation staging"] = STAGING_BUFFERS * max(each)
        if state == "host":
            host += sizes.pop("optimizer")
        return sizes, host

    def _bucket(
        self, shape: Shape, always: int, arena: int | None, modulation: str, staging: int
    ) -> Bucket | None:
        """always: bytes on the card beside the passes. arena: the most bytes of it. staging: of
        other buckets' buffers, which this one must leave room for."""
        request, matmul, budget = self.request, self.step.matmul, self.limit - always
        graphed = request.graphs
        policies = [p for p in request.allowed() if not (graphed and p == "offload")]
        if not policies:
            return None
        if shape not in self._choosers:
            self._choosers[shape] = Chooser(self.step, shape, self.card, launches=not graphed)
        chooser = self._choosers[shape]
        if request.policy != "auto":
            choice = chooser.fixed([request.policy] * len(chooser.blocks))
        else:
            choice = chooser.choose(budget, policies, arena)
            if choice and choice.bytes + max(0, staging - choice.staging) > budget:
                choice = chooser.choose(budget - staging, policies, arena)
        if choice is None or (arena is not None and choice.host > arena):
            return None
        taken = choice.bytes + max(0, staging - choice.staging)
        if taken > budget:
            return None
        outer = outer_ops(self.step, shape)
        each = total_seconds(outer.forward + outer.backward, self.card, matmul, not graphed)
        each += choice.seconds + self._modulation_seconds(shape, modulation)
        if not graphed:
            each = max(each, EAGER_LAUNCH_S * NODES * len(chooser.blocks))
        return Bucket(shape, choice, always + taken, each, graphed)

    def _modulation_seconds(self, shape: Shape, modulation: str) -> float:
        """Returns seconds per micro-batch; ahead, a pass of MODULATION_ROWS rows serves several."""
        rows = -(-shape.batch // MODULATION_ROWS) * MODULATION_ROWS
        ops = modulation_ops(self.step, rows)
        total = total_seconds(ops.forward + ops.backward, self.card, self.step.matmul, True)
        if modulation == "in_place":
            return total
        if modulation == "host":
            weights = Op("modulation in", "copy", 0.0, self.weights["modulation"])
            total = max(total, seconds(weights, self.card))
        return total / max(1, MODULATION_ROWS // shape.batch)

    def _phases(self, static: dict, state_on_host: int, buckets: dict[str, Bucket]) -> dict:
        request, always = self.request, sum(static.values())
        phases = {"training": max(bucket.bytes for bucket in buckets.values())}
        if request.encodes:
            text = 2 * (T5_PARAMETERS + CLIP_PARAMETERS) + OTHER
            # T5's blocks that do not fit stay on the host (`encoders/placement.py`)
            phases["encoding captions"] = int(min(text, self.limit))
            pixels = max(256 * shape.image_tokens for shape in request.shapes.values())
            phases["encoding pictures"] = 2 * VAE_PARAMETERS + VAE_BYTES_A_PIXEL * pixels
        if request.preview_pixels:
            vae = 2 * VAE_PARAMETERS + VAE_BYTES_A_PIXEL * request.preview_pixels
            # a pass takes less, even two in a batch: 83 kB a token for the VAE's 524 kB
            phases["previews"] = always + request.preview_loras + vae
        # graphs keep their pool through it
        graphed = [bucket.bytes for bucket in buckets.values() if bucket.graphed]
        copies = STEP_COPIES.get(request.optimizer, 0) * self.trained["gradients"]
        phases["optimizer step"] = max(graphed, default=always) + state_on_host + copies
        largest = max(prod(linear_shape(n, self.step.spec)) for n in linears(self.step.spec))
        stay = sum(size for part, size in static.items() if part.startswith("weights: "))
        phases["loading"] = stay + static["LoRA"] + LOADING * largest
        return phases


# ---------------------------------------------------------------- a notch cheaper

NOTCH = 0.125  # of the blocks
IN_MEMORY = ("keep", "gelu_int8", "int8")


def cheaper_policies(policies: Sequence[str]) -> tuple[str, ...] | None:
    """Returns the policies with NOTCH of the blocks, the foremost that can be cheaper in memory,
    made so by exact ones: first recompute_mlp, then checkpoint. None where all are offloaded or
    checkpointed.
    """
    count = max(1, round(NOTCH * len(policies)))
    changed = list(policies)
    for word, weaker in (("recompute_mlp", IN_MEMORY), ("checkpoint", ("recompute_mlp",))):
        able = [i for i, policy in enumerate(changed) if policy in weaker]
        for index in able[:count]:
            changed[index] = word
        if able:
            return tuple(changed)
    return None
