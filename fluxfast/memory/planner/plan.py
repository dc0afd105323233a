"""What a run needs and how it is made to fit: one plan for all its batch shapes.

Bytes are those that torch's allocator hands out; a card also loses CONTEXT to CUDA itself, and a
share MARGIN is left free for what no model predicts: fragmentation, and its own error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fluxfast.errors import ConfigError
from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.cards import Card
from fluxfast.memory.planner.choose import Choice, Chooser
from fluxfast.memory.planner.cost import modulation_ops, optimizer_ops, outer_ops
from fluxfast.memory.planner.ops import Op, seconds, total_seconds
from fluxfast.memory.planner.step_spec import Shape, StepSpec
from fluxfast.model.activations import EXACT
from fluxfast.model.modulation import MODULATION_ROWS

GIB = 2**30
CONTEXT = GIB // 2  # assumed: CUDA context, cuBLAS workspaces
MARGIN = 1 / 16  # of the card; a prediction is held to 5 %
OTHER = 3 * GIB // 20  # assumed: batches, draws, RoPE tables, optimizer's temporaries

LOADING = 3 * 4  # bytes a weight of the largest matrix while it is quantized: assumed
# copies of the gradients that a step makes and drops; fused AdamW and bitsandbytes make none
STEP_COPIES = {"prodigy": 1, "schedulefree": 2, "adafactor": 1}  # assumed, from their source

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
    preview_pixels: of the largest preview, 0 for none. encodes: whether captions and pictures are
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
    encodes: bool = True
    accumulation: int = 1
    assistant: int = 0

    @property
    def modulation_trained(self) -> bool:
        names = saved_bytes.modulation_names(self.step)
        return any(name in self.step.lora.modules for name in names)

    def allowed(self) -> list[str]:
        """The policies that may be chosen from."""
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
    """static: name -> bytes that are always there. modulation: "in_place", "ahead" (formed for
    coming samples together) or "host" (ahead, its weights in host memory). phases: name -> bytes
    allocated at the most. step_seconds: of the optimizer and what moves once per step.
    """

    request: Request
    card: Card
    limit: int  # bytes that may be allocated
    static: Mapping[str, int]
    modulation: str
    optimizer_state: str
    buckets: Mapping[str, Bucket]
    step_seconds: float
    phases: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes allocated at the most while training."""
        return max(bucket.bytes for bucket in self.buckets.values())

    @property
    def host(self) -> int:
        """Pinned bytes on the host."""
        return self.static.get("host", 0) + max(b.choice.host for b in self.buckets.values())

    def seconds(self, label: str) -> float:
        """Of one optimizer step of that bucket."""
        return self.buckets[label].seconds * self.request.accumulation + self.step_seconds

    @property
    def mean_seconds(self) -> float:
        """Of one optimizer step, the mean over the buckets."""
        return sum(self.seconds(label) for label in self.buckets) / len(self.buckets)


def usable(vram_gib: float) -> int:
    """Bytes that a run may allocate on a card of so many GiB that nobody else uses."""
    return int(vram_gib * GIB * (1 - MARGIN)) - CONTEXT


def best_plan(request: Request, card: Card, limit: float, host: int | None) -> Plan | None:
    """The fastest plan of at most `limit` allocated bytes, and of `host` pinned ones; None where
    nothing fits. Raises ConfigError for settings that contradict each other.
    """
    if request.policy == "gelu_int8" and request.step.dropout:
        raise ConfigError(
            "memory.policy: gelu_int8 does nothing under lora.dropout, whose path forms GELU apart",
            hint="memory.policy: auto, or lora.dropout: 0",
        )
    choosers: dict[tuple[Shape, bool], Chooser] = {}
    plans = [
        _plan(request, card, limit, host, modulation, state, choosers)
        for modulation in _modulations(request)
        for state in _states(request)
    ]
    return min((p for p in plans if p), key=lambda plan: plan.mean_seconds, default=None)


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


def _states(request: Request) -> list[str]:
    state = request.optimizer_state
    return ["device", "host"] if state == "auto" else [state]


def _plan(request, card, limit, host, modulation: str, state: str, choosers) -> Plan | None:
    static = static_bytes(request, modulation, state)
    on_host = static.get("host", 0)
    room = None if host is None else host - on_host
    if room is not None and room < 0:
        return None
    always = sum(value for name, value in static.items() if name != "host")
    buckets, staging = {}, 0
    for _ in range(2):  # staging buffers are the largest bucket's, for all of them
        for label, shape in request.shapes.items():
            bucket = _bucket(
                request, card, shape, limit - always, room, modulation, staging, choosers
            )
            if bucket is None:
                return None
            buckets[label] = replace(bucket, bytes=bucket.bytes + always)
        most = max(bucket.choice.staging for bucket in buckets.values())
        if most == staging:
            break
        staging = most
    step_seconds = _step_seconds(request, card, static, state)
    phases = _phases(request, always, max(b.bytes for b in buckets.values()))
    # graphs keep their pool through it
    graphed = [bucket.bytes for bucket in buckets.values() if bucket.graphed]
    phases["optimizer step"] = max(graphed, default=always)
    phases["optimizer step"] += _state_on_host(request, state)
    phases["optimizer step"] += STEP_COPIES.get(request.optimizer, 0) * static["gradients"]
    weights = saved_bytes.weights(request.step, request.double_quant)
    phases["loading"] = sum(weights.values()) + static["LoRA"]
    phases["loading"] += LOADING * saved_bytes.largest_matrix(request.step)
    plan = Plan(request, card, limit, static, modulation, state, buckets, step_seconds, phases)
    return plan if max(phases.values()) <= limit else None


def _state_on_host(request: Request, where: str) -> int:
    """Bytes of the optimizer's state, 0 unless it is on the host."""
    if where != "host":
        return 0
    return saved_bytes.trained(request.step, request.optimizer, False)["optimizer"]


def _bucket(request, card, shape, budget, host, modulation, staging, choosers) -> Bucket | None:
    """staging: of other buckets, which this one must leave room for."""
    allowed = request.allowed()
    buckets = []
    for graphed in (True, False) if request.graphs else (False,):
        policies = [p for p in allowed if not (graphed and p == "offload")]
        if not policies:
            continue
        if (shape, graphed) not in choosers:
            choosers[shape, graphed] = Chooser(request.step, shape, card, launches=not graphed)
        chooser, fixed = choosers[shape, graphed], request.policy != "auto"
        room = budget - (staging if graphed else 0)
        if fixed:
            choice = chooser.fixed([request.policy] * len(chooser.blocks))
        else:
            choice = chooser.choose(room, policies, host)
        more = max(0, staging - choice.staging) if choice else 0
        if choice and not fixed and choice.bytes + more > budget:
            choice = chooser.choose(budget - staging, policies, host)
            more = max(0, staging - choice.staging) if choice else 0
        if choice is None or choice.bytes + more > budget:
            continue
        if host is not None and choice.host > host:
            continue
        outer = outer_ops(request.step, shape)
        each = total_seconds(
            [*outer.forward, *outer.backward], card, request.step.matmul, not graphed
        )
        each += choice.seconds + _modulation_seconds(request, card, shape, modulation)
        buckets.append(Bucket(shape, choice, choice.bytes + more, each, graphed))
    return min(buckets, key=lambda bucket: bucket.seconds, default=None)


def _modulation_seconds(request: Request, card: Card, shape: Shape, modulation: str) -> float:
    """Per micro-batch. Ahead: one pass of MODULATION_ROWS rows serves several."""
    rows = -(-shape.batch // MODULATION_ROWS) * MODULATION_ROWS
    ops = modulation_ops(request.step, rows)
    total = total_seconds([*ops.forward, *ops.backward], card, request.step.matmul, True)
    if modulation == "in_place":
        return total
    if modulation == "host":
        moved = saved_bytes.weights(request.step, request.double_quant)["modulation"]
        total = max(total, seconds(Op("modulation in", "copy", 0.0, moved), card))
    return total / max(1, MODULATION_ROWS // shape.batch)


def _step_seconds(request: Request, card: Card, static: Mapping[str, int], state: str) -> float:
    ops = optimizer_ops(request.step, request.optimizer, request.ema)
    total = total_seconds(ops, card, request.step.matmul, True)
    moved = _state_on_host(request, state)
    return total + 2 * seconds(Op("optimizer state", "copy", 0.0, moved), card)


def static_bytes(request: Request, modulation: str, state: str) -> dict[str, int]:
    """What is always on the card by name; "host": what lies in host memory instead."""
    step = request.step
    sizes = {f"weights: {k}": v for k, v in saved_bytes.weights(step, request.double_quant).items()}
    sizes |= saved_bytes.trained(step, request.optimizer, request.ema)
    sizes |= {"scratch": saved_bytes.scratch(step), "other": OTHER, "host": 0}
    if request.assistant:  # a step keeps it once more, its ranks beside those of the trained LoRA
        sizes["assistant LoRA"] = 2 * request.assistant + sizes["LoRA"]
    if modulation == "host":
        sizes["host"] += sizes.pop("weights: modulation")
        sizes["modulation staging"] = 2 * saved_bytes.largest_modulation(step, request.double_quant)
    if state == "host":
        sizes["host"] += sizes.pop("optimizer")
    return sizes


def _phases(request: Request, always: int, training: int) -> dict[str, int]:
    phases = {"training": training}
    if request.encodes:
        phases["encoding captions"] = 2 * (T5_PARAMETERS + CLIP_PARAMETERS) + OTHER
        pixels = max(256 * s.image_tokens for s in request.shapes.values())
        phases["encoding pictures"] = 2 * VAE_PARAMETERS + VAE_BYTES_A_PIXEL * pixels
    if request.preview_pixels:
        vae = 2 * VAE_PARAMETERS + VAE_BYTES_A_PIXEL * request.preview_pixels
        phases["previews"] = always + vae
    return phases


# ---------------------------------------------------------------- a notch cheaper


def with_policies(plan: Plan, label: str, policies: Sequence[str]) -> Plan:
    """Returns the plan with other policies for one bucket. Its other buckets stay as they are."""
    bucket = plan.buckets[label]
    chooser = Chooser(plan.request.step, bucket.shape, plan.card, launches=not bucket.graphed)
    choice = chooser.fixed(policies)
    changed = replace(
        bucket,
        choice=choice,
        bytes=bucket.bytes - bucket.choice.bytes + choice.bytes,
        seconds=bucket.seconds - bucket.choice.seconds + choice.seconds,
    )
    return replace(plan, buckets={**plan.buckets, label: changed})


NOTCH = 0.125  # of the blocks
IN_MEMORY = ("keep", "gelu_int8", "int8")


def cheaper_policies(policies: Sequence[str]) -> tuple[str, ...] | None:
    """Returns the policies with NOTCH of the blocks, the foremost that can be cheaper, made so:
    first recompute_mlp, then checkpoint. None where all are offloaded or checkpointed.
    """
    count = max(1, round(NOTCH * len(policies)))
    changed = list(policies)
    for word, weaker in (
        ("recompute_mlp", IN_MEMORY),
        ("checkpoint", (*IN_MEMORY, "recompute_mlp")),
    ):
        able = [i for i, policy in enumerate(changed) if policy in weaker]
        for index in able[:count]:
            changed[index] = word
        if able:
            return tuple(changed)
    return None
