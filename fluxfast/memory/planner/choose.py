"""Which policy each block gets for one batch shape: the least predicted time within the memory.

Per block every policy is a pair (bytes on the card, seconds more). Blocks move along the lower
convex hull of these, the cheapest second per byte first and the foremost block first: what is made
again there is made when everything behind it is gone. How many blocks are offloaded is tried out,
as copies hide behind computing until the link is full.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.cards import Card
from fluxfast.memory.planner.cost import BlockOps, block_ops
from fluxfast.memory.planner.ops import Op, codes_ops, element_op, total_seconds
from fluxfast.memory.planner.step_spec import Shape, StepSpec
from fluxfast.memory.planner.timeline import Timeline, predict
from fluxfast.model.activations import POLICIES
from fluxfast.model.names import linear_shape

TRIED = 28  # numbers of offloaded blocks
RELAXED = 3  # of the fastest choices, so many are looked at again


@dataclass(frozen=True)
class Choice:
    """policies: per block. bytes: the most that passes take on the card at once, staging buffers
    and copies in flight among them; staging: of these what is always there; host: the arena;
    seconds: forward and backward of the blocks.
    """

    policies: tuple[str, ...]
    bytes: int
    staging: int
    host: int
    seconds: float


@dataclass(frozen=True)
class _Block:
    """One block's figures. time: policy -> seconds more in (forward, backward)."""

    forward: float
    backward: float
    saved: dict[str, saved_bytes.SavedBytes]
    besides: dict[str, int]  # policy -> what its backward holds beyond what is saved
    time: dict[str, tuple[float, float]]

    def hull(self, allowed: Sequence[str]) -> list[str]:
        """Policies from the most bytes to the fewest, each step dearer per byte than the last."""
        points = sorted(
            ((self.saved[p].device, sum(self.time[p]), p) for p in allowed), key=lambda x: x[:2]
        )
        lower: list[tuple[int, float, str]] = []
        for point in reversed(points):  # from the most bytes on
            if lower and point[0] == lower[-1][0]:
                if point[1] < lower[-1][1]:
                    lower.pop()
                else:
                    continue
            while lower and point[1] <= lower[-1][1]:
                lower.pop()  # fewer bytes and no slower
            while len(lower) > 1 and _slope(lower[-2], lower[-1]) >= _slope(lower[-1], point):
                lower.pop()
            lower.append(point)
        return [policy for _, _, policy in lower]


def _slope(more: tuple, fewer: tuple) -> float:
    return (fewer[1] - more[1]) / (more[0] - fewer[0])


def policy_ops(
    step: StepSpec, shape: Shape, block: str, policy: str, ops: BlockOps
) -> tuple[list[Op], list[Op]]:
    """What a policy adds to a block's own `ops`, copies apart -> (forward, backward)."""
    if policy in ("recompute_mlp", "checkpoint"):
        return [], ops.recompute_mlp if policy == "recompute_mlp" else ops.forward
    if policy not in ("gelu_int8", "int8"):
        return [], []
    # its own pass writes the codes; that backward reads fewer bytes is not counted in favor of
    # what rounds
    u = shape.batch * shape.tokens * step.spec.mlp_hidden
    codes = element_op("codes of u", u, 1, launches=0)
    if policy == "gelu_int8":
        return [codes], []
    full = saved_bytes.block_saved(step, block, shape, "keep").device
    pack, unpack = codes_ops(full // step.width - u, step.width)
    return [pack, codes], [unpack]


class Chooser:
    """Chooses for one step and shape on one card. launches: whether kernels are launched one by
    one (no CUDA graph), which adds their launch times.
    """

    def __init__(self, step: StepSpec, shape: Shape, card: Card, launches: bool):
        self.step, self.shape, self.card, self.launches = step, shape, card, launches
        known: dict[tuple, _Block] = {}
        self.blocks = []
        for name in saved_bytes.blocks_of(step):
            key = _signature(step, name)
            if key not in known:
                known[key] = self._figures(name)
            self.blocks.append(known[key])

    def _seconds(self, ops) -> float:
        return total_seconds(ops, self.card, self.step.matmul, self.launches)

    def _figures(self, name: str) -> _Block:
        step, shape = self.step, self.shape
        ops = block_ops(step, name, shape)
        more = {policy: policy_ops(step, shape, name, policy, ops) for policy in POLICIES}
        return _Block(
            self._seconds(ops.forward),
            self._seconds(ops.backward),
            {policy: saved_bytes.block_saved(step, name, shape, policy) for policy in more},
            {
                policy: saved_bytes.transient(step, name, shape)
                + saved_bytes.recomputed(step, name, shape, policy)
                for policy in more
            },
            {
                policy: (self._seconds(sides[0]), self._seconds(sides[1]))
                for policy, sides in more.items()
            },
        )

    def peak(self, policies: Sequence[str]) -> int:
        """As `saved_bytes.step_peak`, from figures that are there already."""
        held = most = self._outer
        for block, policy in zip(self.blocks, policies, strict=True):
            held += block.saved[policy].device
            most = max(most, held + block.besides[policy])
        return most

    @cached_property
    def _outer(self) -> int:
        return saved_bytes.outer_saved(self.step, self.shape)

    def timeline(self, policies: Sequence[str]) -> Timeline:
        pairs = list(zip(self.blocks, policies, strict=True))
        rate = self.card.pcie * self.card.efficiency["copy"].value
        return predict(
            [block.forward + block.time[policy][0] for block, policy in pairs],
            [block.backward + block.time[policy][1] for block, policy in pairs],
            [block.saved[policy].host for block, policy in pairs],
            rate,
        )

    def fixed(self, policies: Sequence[str]) -> Choice:
        """Returns these policies as a choice. A block that saves nothing is not offloaded."""
        pairs = zip(self.blocks, policies, strict=True)
        policies = [
            "keep" if policy == "offload" and not block.saved[policy].host else policy
            for block, policy in pairs
        ]
        line = self.timeline(policies)
        besides = line.staging_bytes + line.in_flight_bytes
        return Choice(
            tuple(policies),
            self.peak(policies) + besides,
            line.staging_bytes,
            line.host_bytes,
            line.seconds,
        )

    def choose(self, budget: int, allowed: Sequence[str], host: int | None = None) -> Choice | None:
        """The fastest choice of at most `budget` bytes on the card and `host` in its arena; None
        where there is none.
        """
        choices = [self._fill(budget, allowed, frozenset())]
        if "offload" in allowed and (choices[0] is None or self._costs(choices[0])):
            able = [i for i, block in enumerate(self.blocks) if block.saved["offload"].host]
            most = len(able)
            for count in sorted({*range(1, most + 1, max(1, most // TRIED)), most} - {0}):
                spread = frozenset(able[i] for i in _spread(count, most))
                choices.append(self._fill(budget, allowed, spread))
        fits = [choice for choice in choices if choice and (host is None or choice.host <= host)]
        fits.sort(key=lambda choice: choice.seconds)
        relaxed = [self._relaxed(choice, budget, allowed) for choice in fits[:RELAXED]]
        return min(relaxed, key=lambda choice: choice.seconds, default=None)

    def _relaxed(self, choice: Choice, budget: int, allowed: Sequence[str]) -> Choice:
        """What the last move left over, spent: the dearest blocks first get a faster policy where
        it still fits.
        """
        policies = list(choice.policies)
        room = budget - (choice.bytes - self.peak(policies))

        def cost(index: int, policy: str) -> float:
            return sum(self.blocks[index].time[policy])

        for index in sorted(range(len(policies)), key=lambda i: -cost(i, policies[i])):
            current = policies[index]
            if current == "offload":
                continue
            faster = [
                p for p in allowed if p != "offload" and cost(index, p) < cost(index, current)
            ]
            for policy in sorted(faster, key=lambda p: cost(index, p)):
                policies[index] = policy
                if self.peak(policies) <= room:
                    break
                policies[index] = current
        return self.fixed(policies)

    def _costs(self, choice: Choice) -> bool:
        return any(policy in ("recompute_mlp", "checkpoint") for policy in choice.policies)

    def _fill(self, budget: int, allowed: Sequence[str], offloaded: frozenset) -> Choice | None:
        """Policies of those blocks that are not offloaded: as few moves as the budget takes."""
        resident = [policy for policy in allowed if policy != "offload"]
        start = ["offload"] * len(self.blocks)
        moves = []
        for index, block in enumerate(self.blocks):
            if index in offloaded:
                continue
            hull = block.hull(resident)
            start[index] = hull[0]
            points = [(block.saved[p].device, sum(block.time[p])) for p in hull]
            for one, other, policy in zip(points, points[1:], hull[1:], strict=False):
                moves.append((_slope(one, other), index, policy))
        moves.sort(key=lambda move: move[:2])

        def after(count: int) -> list[str]:
            policies = list(start)
            for _, index, policy in moves[:count]:
                policies[index] = policy
            return policies

        # what copies take on the card hangs on which blocks are offloaded alone, not on the others
        line = self.timeline(start)
        room = budget - line.staging_bytes - line.in_flight_bytes
        count = _least(len(moves), lambda n: self.peak(after(n)) <= room)
        return None if count is None else self.fixed(after(count))


def _least(most: int, fits: Callable[[int], bool]) -> int | None:
    """The least of 0..most that fits, where what fits goes on fitting; None where `most` does
    not."""
    if not fits(most):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def _spread(count: int, blocks: int) -> frozenset:
    """`count` of the blocks, as far apart as they go: a copy has the blocks between to hide in."""
    return frozenset(i * blocks // count for i in range(count))


def _signature(step: StepSpec, block: str) -> tuple:
    """What makes two blocks alike."""
    own = [name for name in step.precisions if name.startswith(f"{block}.")]
    parts = tuple(
        (
            name[len(block) :],
            linear_shape(name, step.spec),
            step.precisions[name],
            step.lora.modules.get(name),
        )
        for name in own
    )
    return (
        block.split(".")[0],
        parts,
        saved_bytes.saves(step, block),
        saved_bytes.norm_is_free(step, block),
    )
