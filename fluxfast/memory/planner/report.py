"""A plan in words: what a run logs before it starts, and the tables of `fluxfast plan`."""

from collections import Counter
from dataclasses import dataclass

from fluxfast.memory.planner.cards import Card
from fluxfast.memory.planner.plan import CONTEXT, GIB, Plan

_MODULATION = {
    "in_place": "formed in place",
    "ahead": "formed ahead",
    "host": "ahead, from the host",
}


def run_lines(plan: Plan, on_gpu: bool) -> list[str]:
    """Returns the plan as `train` logs it before it starts."""
    lines = [
        f"plan for the {plan.card.name}: {plan.peak / GIB:.3g} of {plan.limit / GIB:.3g} GiB "
        f"(predicted), modulation {_MODULATION[plan.modulation]}"
        + (", optimizer state on the host" if plan.optimizer_state == "host" else "")
    ]
    if not on_gpu:
        lines[0] += "; the device is a CPU, times are those of that card"
    for label, bucket in plan.buckets.items():
        host = f", {bucket.choice.host / GIB:.1f} GiB on the host" if bucket.choice.host else ""
        lines.append(
            f"  {label}: {summary(bucket.choice.policies)}; {bucket.bytes / GIB:.3g} GiB{host}, "
            f"{plan.seconds(label):.3g} s/it (predicted)"
        )
    return lines


@dataclass(frozen=True)
class Row:
    """One line of the table. reason: why there is no plan."""

    card: Card
    vram_gib: float
    label: str
    plan: Plan | None
    reason: str = ""


def table(rows: list[Row]) -> list[str]:
    """Returns aligned columns. GiB: allocated at the most, and CONTEXT for CUDA itself."""
    head = ["card", "GiB", "picture", "needs GiB", "host GiB", "s/it", "it/s", "blocks"]
    lines = [head]
    for row in rows:
        start = [row.card.name, f"{row.vram_gib:g}", row.label]
        if row.plan is None:
            lines.append([*start, "does not fit", "", "", "", row.reason])
            continue
        plan, seconds = row.plan, row.plan.mean_seconds
        host = f"{plan.host / GIB:.1f}" if plan.host else "-"
        figures = [f"{(plan.peak + CONTEXT) / GIB:.2f}", host, f"{seconds:.3f}"]
        lines.append([*start, *figures, f"{1 / seconds:.2f}", describe(plan)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    cells = zip("<<<>>>><", widths, strict=True)
    layout = "  ".join(f"{{:{side}{width}}}" for side, width in cells)
    table = [layout.format(*line).rstrip() for line in lines]
    sources = {
        f"measured steps ({row.card.name})"
        if row.card.factors
        else "data sheets and assumed shares of them"
        for row in rows
    }
    note = f"All figures are predicted; speeds from {'; '.join(sorted(sources))}."
    if any(row.plan and row.plan.host for row in rows):
        note += " Host GiB are pinned: `train` takes half of what is free at most."
    return [*table, "", note]


def breakdown(rows: list[Row]) -> list[str]:
    """Returns the last plan's GiB by part and by phase; empty for more than one card."""
    plans = [row.plan for row in rows if row.plan is not None]
    if not plans or len({row.card.name for row in rows}) > 1:
        return []
    plan = plans[-1]
    on_card = {name: size for name, size in plan.static.items() if size}
    lines = ["", f"Where it goes ({', '.join(plan.buckets)}), GiB:"]
    lines += [f"  {size / GIB:6.2f}  {name}" for name, size in on_card.items()]
    for label, bucket in plan.buckets.items():
        activations = bucket.bytes - sum(on_card.values())
        lines.append(f"  {activations / GIB:6.2f}  activations and passes, {label}")
    lines.append(f"  {CONTEXT / GIB:6.2f}  CUDA itself (assumed)")
    lines += ["At the most, by phase, without CUDA itself:"]
    lines += [f"  {size / GIB:6.2f}  {phase}" for phase, size in plan.phases.items()]
    return lines


def describe(plan: Plan) -> str:
    """Returns the plan in one line; of several sizes, the largest one's policies."""
    step = plan.request.step
    largest = max(plan.buckets, key=lambda label: plan.buckets[label].shape.tokens)
    policies = summary(plan.buckets[largest].choice.policies)
    if len(plan.buckets) > 1:
        policies = f"{largest}: {policies}"
    parts = [f"{step.storage} base, {step.matmul} matmuls", policies]
    parts += ["modulation from the host"] if plan.modulation == "host" else []
    parts += ["optimizer state on the host"] if plan.optimizer_state == "host" else []
    return "; ".join(parts)


def summary(policies: tuple[str, ...]) -> str:
    """Returns the policies by how many blocks have them: "53 blocks keep, 4 gelu_int8"."""
    counts = Counter(policies).most_common()
    first = f"{counts[0][1]} block{'s' * (counts[0][1] != 1)} {counts[0][0]}"
    return ", ".join([first, *(f"{count} {policy}" for policy, count in counts[1:])])
