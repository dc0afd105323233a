"""The rows of `bench.kernels`, and as one short table with the kernels that cost a step most."""

from bench import timing
from bench.kernels.cases import CALLS, Case, Settings, matmul_kind, ops_of
from bench.kernels.floor import Roof, floor_ms
from bench.kernels.problem import BOTH, COMPILED, EAGER, OURS, PEERS
from fluxfast.memory.planner.cost import total_bytes, total_flop

KEY = ("op", "storage", "products", "pixels", "batch", "direction")
SLOWEST = 5


def row(
    result: timing.Result, case: Case, direction: str, settings: Settings, roof: Roof
) -> dict[str, object]:
    """Returns a row without the machine's conditions. Rates are of the case's bytes and FLOP."""
    forward, backward = ops_of(case, settings)
    ops = forward + backward if direction == BOTH else forward
    moved, flop, kind = total_bytes(ops), total_flop(ops), matmul_kind(case, settings)
    floor, median = floor_ms(roof, kind, moved, flop), result.median_ms
    compute = str(settings.compute).removeprefix("torch.")
    return timing.row(
        result,
        bench="kernels",
        op=case.op,
        direction=direction,
        storage=compute if case.storage == "dense" else case.storage or None,
        products=case.matmul or compute,
        compute=compute,
        pixels=case.pixels or None,
        batch=case.batch or None,
        tokens=settings.tokens(case) or None,
        text_tokens=settings.text_tokens,
        hidden=settings.spec.hidden_size,
        rank=settings.rank,
        bytes=round(moved),
        flop=round(flop),
        copy_gb_per_s=roof.copy_gb_per_s,
        matmul_tflop_per_s=roof.matmul_tflop_per_s.get(kind),
        floor_ms=floor,
        percent_of_floor=100 * floor / median if floor and median else None,
        gb_per_s=moved / median / 1e6 if median else None,
        tflop_per_s=flop / median / 1e9 if median else None,
        warmup=settings.warmup,
        interleaved=True,
        **dict.fromkeys(("worst", "worst_error", "tolerance")),
    )


def table(rows: list[dict[str, object]]) -> str:
    """Returns a line per case and direction of fluxfast, its median over each of the others'; then
    candidates that could not be timed, with the reason; then the slowest."""
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
            lines.append(_line(*_title(ours), _figures(group)))
    skipped = {}
    for row in rows:
        outcome = f"{row['name']} {row['status']}: {row['reason']}"
        if row["status"] == "skipped":
            skipped[outcome] = None  # once, whatever the case
        if row["status"] != "ok" and (row["name"] == OURS or row["status"] != "skipped"):
            lines.append(f"{' '.join(_title(row))}: {outcome}")
    return "\n".join([*lines, *skipped, *_slowest(rows)])


def _title(row: dict) -> tuple[str, str, str]:
    mode = "/".join(filter(None, (row["storage"], row["products"])))
    shape = f"{row['pixels']} px x {row['batch']}" if row["pixels"] else "-"
    return f"{row['op']} {mode}", shape, "+backward" if row["direction"] == BOTH else "forward"


def _figures(group: dict[str, dict]) -> tuple[str, ...]:
    ours = group[OURS]["median_ms"]

    def over(*names: str) -> str:
        """Over the fastest of them that ran."""
        times = [group[name]["median_ms"] for name in names if name in group]
        times = [time for time in times if time]
        return f"{ours / min(times):.2f}" if times else "-"

    percent = group[OURS]["percent_of_floor"]
    share = "-" if percent is None else f"{percent:.0f}"
    return f"{ours:.3f}", share, over(EAGER), over(COMPILED), over(*PEERS)


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
        lines.append(
            f"  {', '.join(_title(row))}: {row['median_ms']:.3f} ms, floor "
            f"{row['floor_ms']:.3f} ms ({row['percent_of_floor']:.0f} %), {lost(row):.1f} ms a step"
        )
    return lines
