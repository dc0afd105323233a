"""The rows of `bench.kernels` as one short table, and the kernels that cost a step most."""

from collections.abc import Iterable

from bench.kernels.cases import CALLS
from bench.kernels.problem import BOTH, COMPILED, EAGER, OURS, PEERS

KEY = ("op", "storage", "products", "pixels", "batch", "direction")
SLOWEST = 5


def table(rows: list[dict[str, object]]) -> str:
    """A line a case and direction of fluxfast, its median over each of the others'; then who could
    not be timed and why; then the slowest."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEY), {})[row["name"]] = row
    header = ("ms", "% floor", EAGER, COMPILED, "peer")
    lines = [
        "last three: fluxfast's median over theirs, below 1 is faster",
        _line("op", "shape", "direction", header),
    ]
    for group in groups.values():
        ours = group.get(OURS)
        if ours and ours["median_ms"]:
            lines.append(_line(*_named(ours), _figures(group)))
    for row in rows:
        if row["status"] != "ok" and (row["name"] == OURS or row["status"] != "skipped"):
            lines.append(f"{' '.join(_named(row))}: {row['name']} {row['status']}: {row['reason']}")
    skipped = {
        f"{r['name']} skipped: {r['reason']}": None for r in rows if r["status"] == "skipped"
    }
    return "\n".join([*lines, *skipped, *_slowest(rows)])


def _named(row: dict) -> tuple[str, str, str]:
    how = "/".join(filter(None, (row["storage"], row["products"])))
    shape = f"{row['pixels']} px x {row['batch']}" if row["pixels"] else "-"
    return f"{row['op']} {how}", shape, "+backward" if row["direction"] == BOTH else "forward"


def _figures(group: dict[str, dict]) -> tuple[str, ...]:
    ours = group[OURS]["median_ms"]

    def over(names: Iterable[str]) -> str:
        """Of the fastest of them that ran."""
        times = [group[name]["median_ms"] for name in names if name in group]
        times = [time for time in times if time]
        return f"{ours / min(times):.2f}" if times else "-"

    percent = group[OURS]["percent_of_floor"]
    said = "-" if percent is None else f"{percent:.0f}"
    return f"{ours:.3f}", said, over([EAGER]), over([COMPILED]), over(PEERS)


def _line(op: str, shape: str, direction: str, figures: tuple[str, ...]) -> str:
    padded = " ".join(f"{f:>{w}}" for f, w in zip(figures, (10, 8, 8, 8, 8), strict=True))
    return f"{op:44} {shape:12} {direction:10} {padded}"


def _slowest(rows: list[dict]) -> list[str]:
    """By the time over the floor that a training step would spend in them."""

    def lost(row: dict) -> float:
        return CALLS[row["op"]] * (row["median_ms"] - row["floor_ms"])

    ours = [r for r in rows if r["name"] == OURS and r["median_ms"] and r["floor_ms"]]
    longest = {tuple(row[key] for key in KEY[:-1]): row for row in ours}  # backward comes last
    worst = sorted(longest.values(), key=lost, reverse=True)[:SLOWEST]
    if not worst:
        return []
    lines = ["five slowest kernels, by the ms over their floor in a step of FLUX.1-dev:"]
    for row in worst:
        op, shape, direction = _named(row)
        lines.append(
            f"  {op}, {shape}, {direction}: {row['median_ms']:.3f} ms, floor "
            f"{row['floor_ms']:.3f} ms ({row['percent_of_floor']:.0f} %), {lost(row):.1f} ms a step"
        )
    return lines
