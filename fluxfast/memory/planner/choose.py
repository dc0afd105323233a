"""Which policy each block gets for one batch shape: the least predicted time within the memory.

Per block every policy is a pair (bytes on the card, extra seconds). Blocks move along the lower
convex hull of these, the cheapest second per byte first and the foremost block first: what is
computed again there is computed when everything behind it is gone. How many blocks are offloaded is
tried out, as copies hide behind computing until the link is full.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.cards import Card
from fluxfast.memory.planner.cost import BlockOps, Op, block_ops, element_op, total_seconds
from fluxfast.memory.planner.step_spec import Shape, StepSpec
from fluxfast.memory.planner.timeline import Timeline, predict
from fluxfast.model.activations import POLICIES

TRIED = 28  # numbers of offloaded blocks
RELAXED = 3  # of the fastest choices, so many are improved


@dataclass(frozen=True)
class Choice:
    """policies: per block. bytes: the most that passes take on the card at once, staging buffers
    and copies in flight among them; staging: of these what is always there; host: the arena;
    seconds: forward and backward of the blocks; offloaded: block -> bytes that it puts there.
    """

    policies: tuple[str, ...]
    bytes: int
    staging: int
    host: int
    seconds: float
    offloaded: dict[int, int]


@dataclass(frozen=True)
class _Block:
    """One block's figures, by policy. transient: what its backward holds beyond what is saved.
    extra: seconds more in (forward, backward)."""

    forward: float
    backward: float
    saved: dict[str, saved_bytes.SavedBytes]
    transient: dict[str, int]
    extra: dict[str, tuple[float, float]]

    def hull(self, allowed: Sequence[str]) -> list[tuple[int, float, str]]:
        """Returns (bytes, extra seconds, policy) of the lower convex hull, from the most bytes to
        the fewest, each step dearer per byte than the last."""
        points = [(self.saved[p].device, sum(self.extra[p]), p) for p in reversed(allowed)]
        hull: list[tuple[int, float, str]] = []
        for point in sorted(points, key=lambda point: (-point[0], point[1])):
            if hull and point[0] == hull[-1][0]:
                continue  # as many bytes and no faster
            while hull and point[1] <= hull[-1][1]:
                hull.pop()  # fewer bytes and no slower
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        return hull


def _slope(more: tuple, fewer: tuple) -> float:
    return (fewer[1] - more[1]) / (more[0] - fewer[0])


def policy_ops(
    step: StepSpec, shape: Shape, block: str, policy: str, ops: BlockOps
) -> tuple[list[Op], list[Op]]:
    """Returns what a policy adds to a block's own `ops`, copies apart: (forward, backward)."""
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
    others = saved_bytes.block_saved(step, block, shape, "keep").device // step.width - u
    each = step.width + 1 + 4 / 128  # the activation, its code, a 4-byte scale per 128
    unpack = element_op("unpack", others, each, 2.0)
    return [element_op("pack", others, each, 4.0), codes], [unpack]


class Chooser:
    """Chooses for one step and shape on one card. launches: whether kernels are launched one by
    one (no CUDA graph), which adds their launch times.
    """

    def __init__(self, step: StepSpec, shape: Shape, card: Card, launches: bool):
        self.step, self.shape, self.card, self.launches = step, shape, card, launches
        self._outer = saved_bytes.outer_saved(step, shape)
        known: dict[tuple, _Block] = {}
        self.blocks = []
        for name in step.blocks:
            key = _signature(step, name)
            if key not in known:
                known[key] = self._figures(name)
            self.blocks.append(known[key])

    def _seconds(self, ops: list[Op]) -> float:
        return total_seconds(ops, self.card, self.step.matmul, self.launches)

    def _figures(self, name: str) -> _Block:
        step, shape = self.step, self.shape
        ops = block_ops(step, name, shape)
        saved, transient, extra = {}, {}, {}
        for policy in POLICIES:
            saved[policy] = saved_bytes.block_saved(step, name, shape, policy)
            transient[policy] = saved_bytes.transient(step, name, shape, policy)
            forward, backward = policy_ops(step, shape, name, policy, ops)
            extra[policy] = self._seconds(forward), self._seconds(backward)
        seconds = self._seconds(ops.forward), self._seconds(ops.backward)
        return _Block(*seconds, saved, transient, extra)

    def peak(self, policies: Sequence[str]) -> int:
        """Returns the most bytes that activations and passes take at once, staging and arena apart.

        Block i's backward runs while those before it still keep theirs.
        """
        held = most = self._outer
        for block, policy in zip(self.blocks, policies, strict=True):
            held += block.saved[policy].device
            most = max(most, held + block.transient[policy])
        return most

    def timeline(self, policies: Sequence[str]) -> Timeline:
        pairs = list(zip(self.blocks, policies, strict=True))
        return predict(
            [block.forward + block.extra[policy][0] for block, policy in pairs],
            [block.backward + block.extra[policy][1] for block, policy in pairs],
            self._offloaded(policies),
            self.card.pcie * self.card.efficiency["copy"].value,
        )

    def _offloaded(self, policies: Sequence[str]) -> list[int]:
        """Returns the bytes that each block puts into the arena."""
        return [block.saved[p].host for block, p in zip(self.blocks, policies, strict=True)]

    def fixed(self, policies: Sequence[str]) -> Choice:
        """Returns these policies as a choice. A block that saves nothing is not offloaded."""
        policies = tuple(
            "keep" if policy == "offload" and not block.saved[policy].host else policy
            for block, policy in zip(self.blocks, policies, strict=True)
        )
        line = self.timeline(policies)
        most = self.peak(policies) + line.staging_bytes + line.in_flight_bytes
        offloaded = {i: nbytes for i, nbytes in enumerate(self._offloaded(policies)) if nbytes}
        staging, host = line.staging_bytes, line.host_bytes
        return Choice(policies, most, staging, host, line.seconds, offloaded)

    def choose(
        self, budget: float, allowed: Sequence[str], host: int | None = None
    ) -> Choice | None:
        """Returns the fastest choice of at most `budget` bytes on the card and `host` in its arena;
        None where there is none.
        """
        choices = [self._fill(budget, allowed, ())]
        recomputes = choices[0] and {"recompute_mlp", "checkpoint"} & set(choices[0].policies)
        if "offload" in allowed and (choices[0] is None or recomputes):
            able = [i for i, block in enumerate(self.blocks) if block.saved["offload"].host]
            most = len(able)
            for count in sorted({*range(1, most + 1, max(1, most // TRIED)), most} - {0}):
                # as far apart as they go: a copy has the blocks between to hide in
                spread = {able[i * most // count] for i in range(count)}
                choices.append(self._fill(budget, allowed, spread))
        fits = [choice for choice in choices if choice and (host is None or choice.host <= host)]
        fits.sort(key=lambda choice: choice.seconds)
        relaxed = [self._relaxed(choice, budget, allowed) for choice in fits[:RELAXED]]
        return min(relaxed, key=lambda choice: choice.seconds, default=None)

    def _relaxed(self, choice: Choice, budget: float, allowed: Sequence[str]) -> Choice:
        """Spends what the last move left over: the dearest blocks first get a faster policy where
        it still fits.
        """
        policies = list(choice.policies)
        room = budget - (choice.bytes - self.peak(policies))

        def cost(index: int, policy: str) -> float:
            return sum(self.blocks[index].extra[policy])

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

    def _fill(
        self, budget: float, allowed: Sequence[str], offloaded: Collection[int]
    ) -> Choice | None:
        """Returns a choice that offloads these blocks and moves the others along their hulls only
        as far as the budget requires; None where it does not fit.
        """
        resident = [policy for policy in allowed if policy != "offload"]
        start = ["offload"] * len(self.blocks)
        moves = []
        for index, block in enumerate(self.blocks):
            if index not in offloaded:
                hull = block.hull(resident)
                start[index] = hull[0][2]
                moves += [(_slope(a, b), index, b[2]) for a, b in pairwise(hull)]
        moves.sort(key=lambda move: move[:2])

        def after(count: int) -> list[str]:
            policies = list(start)
            for _, index, policy in moves[:count]:
                policies[index] = policy
            return policies

        # what copies take on the card depends on which blocks are offloaded alone
        line = self.timeline(start)
        room = budget - line.staging_bytes - line.in_flight_bytes
        if self.peak(after(len(moves))) > room:
            return None
        fewest = bisect_left(range(len(moves)), True, key=lambda n: self.peak(after(n)) <= room)
        return self.fixed(after(fewest))


def _signature(step: StepSpec, block: str) -> tuple:
    """Returns what blocks with the same figures have in common."""
    layers = [
        (name[len(block) :], precision, step.lora.modules.get(name))
        for name, precision in step.precisions.items()
        if name.startswith(f"{block}.")
    ]
    traits = saved_bytes.saves(step, block), saved_bytes.norm_is_free(step, block)
    return block.split(".")[0], tuple(layers), *traits
