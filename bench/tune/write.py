"""Turns rows of `bench.tune sweep` into rows that the kernels load, where a gain is beyond doubt.

A tile replaces the shipped one for its own op, storage, dtype, N, K and the rows nearest to the M
that it was timed at: from the geometric mean with the next smaller M that was timed (the smallest:
half of it) to that with the next larger (the largest: twice it). A hand-over is written where the
ways that it picks beat those that the shipped row picks. All rows that are for other cards, other
questions or not measured by this bench stay as they are, byte for byte.
"""

import difflib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import fluxfast_kernels
from fluxfast_kernels.dispatch import dispatch

from bench.tune.space import ATTENTION, Kernel, named_tile
from fluxfast.errors import ConfigError

CONFIGS = Path(fluxfast_kernels.__file__).parent / "dispatch" / "configs"
ATTENTION_PATH = CONFIGS / "attention.json"
LEAST_GAIN = 0.02  # of the shipped time; and more than the spread of either measurement
MEASURED = "measured: "
KEY = ("op", "storage", "dtype", "n", "k")
Rows = list[dict[str, object]]
Table = dict[str, Rows]


def table_path(arch: int) -> Path:
    return CONFIGS / f"gemm_sm_{arch}.json"


def dumped(table: Table) -> str:
    """The file's text: one row a line."""
    parts = []
    for kind, rows in table.items():
        lines = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in rows)
        parts.append(f'  "{kind}": [\n{lines}\n  ]' if rows else f'  "{kind}": []')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def of_one_device(rows: Iterable[dict], arch: int, device: str | None = None) -> Rows:
    """The rows of one card, of each question the newest. Raises ConfigError where several devices
    of that compute capability were timed and none is named."""
    rows = [row for row in rows if row.get("bench") == "tune" and row["arch"] == arch]
    names = sorted({row["device_name"] for row in rows})
    if device is None and len(names) > 1:
        hint = f"--device {names[0]!r}"
        raise ConfigError(f"rows of sm_{arch} are of {', '.join(names)}: name one", hint=hint)
    questions = defaultdict(list)
    for row in rows:
        if device in (None, row["device_name"]):
            questions[tuple(row.get(key) for key in ("kind", *KEY, "m"))].append(row)
    newest = ((same, max(row["date"] for row in same)) for same in questions.values())
    return [row for same, date in newest for row in same if row["date"] == date]


# ---------------------------------------------------------------- the best answer to a question


def _spread(row: dict) -> float:
    return (row["p90_ms"] - row["p10_ms"]) / 2 / row["median_ms"]


def source(best: dict, shipped: dict | None) -> str:
    """The `source` of a row: the measurement behind it."""
    commit = (best["commit"] or "unknown")[:7] + (" with changes" if best["dirty"] else "")
    against = f"{shipped['median_ms']:.4g} before" if shipped else "the shipped one fails"
    return (
        f"{MEASURED}commit {commit}, {best['device_name']}, M = {best['m']}: "
        f"{best['median_ms']:.4g} ms, {against}"
    )


def winner(rows: Rows) -> tuple[dict, str] | None:
    """The best row of one question and its `source`. The shipped one wins unless another is faster
    by more than LEAST_GAIN and the spread of both; None where what is merely assumed wins."""
    ran = [row for row in rows if row["median_ms"] is not None]
    if not ran:
        return None
    best = min(ran, key=lambda row: row["median_ms"])
    shipped = next((row for row in ran if row["shipped"]), None)
    if shipped is not None:
        gain = 1 - best["median_ms"] / shipped["median_ms"]
        if gain <= max(LEAST_GAIN, _spread(best), _spread(shipped)):
            return (shipped, shipped["source"]) if _is_measured(shipped) else None
    return best, source(best, shipped)


def _is_measured(row: dict) -> bool:
    return row["source"].startswith(MEASURED)


def _questions(measured: Rows, kind: str, names: tuple[str, ...]) -> dict[tuple, dict[int, Rows]]:
    """The rows of each finished question of a kind, by the values of `names` and ascending M."""
    by_key: dict[tuple, dict[int, Rows]] = defaultdict(dict)
    for row in sorted((row for row in measured if row["kind"] == kind), key=lambda row: row["m"]):
        by_key[tuple(row[name] for name in names)].setdefault(row["m"], []).append(row)
    finished = {
        key: {M: rows for M, rows in by_m.items() if any(row["shipped"] for row in rows)}
        for key, by_m in by_key.items()
    }
    return {key: by_m for key, by_m in finished.items() if by_m}


def ranges(Ms: list[int]) -> list[tuple[int, int]]:
    """The (m_min, m_max) that each of some ascending Ms stands for."""
    cuts = [math.isqrt(a * b) for a, b in zip(Ms, Ms[1:], strict=False)]
    lows = [Ms[0] // 2, *(cut + 1 for cut in cuts)]
    return list(zip(lows, [*cuts, 2 * Ms[-1]], strict=True))


def _ranged(
    by_m: dict[int, Rows], filters: dict, limits: tuple[str, str], fields_of: Callable[[dict], dict]
) -> Rows:
    """A row for each winner and its range of M; neighbors with the same fields are one row."""
    new: Rows = []
    for rows, (low, high) in zip(by_m.values(), ranges(list(by_m)), strict=True):
        won = winner(rows)
        if won is None:
            continue
        fields = fields_of(won[0])
        if new and new[-1][limits[1]] == low - 1 and fields.items() <= new[-1].items():
            new[-1][limits[1]] = high
        else:
            row = filters | dict(zip(limits, (low, high), strict=True)) | fields
            new.append(row | {"source": won[1]})
    return new


def _threshold(by_m: dict[int, Rows]) -> dict | None:
    """fused_up_to_m and source of the least sum of log times; None where what is shipped is as good
    or where a way failed."""
    ways = {M: {row["way"]: row for row in rows} for M, rows in by_m.items()}
    timed = [row["median_ms"] for pair in ways.values() for row in pair.values()]
    if None in timed or len(timed) < 2 * len(ways):
        return None
    Ms = list(ways)

    def picked(most: int | None, M: int) -> dict:
        return ways[M]["fused" if most is None or most >= M else "decode"]

    def cost(most: int | None) -> float:
        return sum(math.log(picked(most, M)["median_ms"]) for M in Ms)

    shipped = {M: next(row for row in pair.values() if row["shipped"]) for M, pair in ways.items()}
    last = max((M for M in Ms if shipped[M]["way"] == "fused"), default=0)
    before = None if last == Ms[-1] else last
    most = min([before, 0, *Ms[:-1], None], key=cost)
    pairs = [(picked(most, M), shipped[M]) for M in Ms if picked(most, M) is not shipped[M]]
    gain = sum(math.log(old["median_ms"] / now["median_ms"]) for now, old in pairs)
    if gain > sum(max(LEAST_GAIN, _spread(now), _spread(old)) for now, old in pairs):
        best = max(pairs, key=lambda pair: pair[1]["median_ms"] / pair[0]["median_ms"])
        return {"fused_up_to_m": most, "source": source(*best)}
    first = shipped[Ms[0]]
    return {"fused_up_to_m": before, "source": first["source"]} if _is_measured(first) else None


# ---------------------------------------------------------------- tables with the winners


def merged(table: Table, measured: Rows) -> Table:
    """A card's table with what was measured: those rows first, then all others as they were."""
    tiles, thresholds = [], []
    for key, by_m in _questions(measured, "tile", KEY).items():
        filters = dict(zip(KEY, key, strict=True))
        if filters["op"] not in ATTENTION:
            tiles.append((filters, _ranged(by_m, filters, ("m_min", "m_max"), _tile_fields)))
    for key, by_m in _questions(measured, "hand over", KEY).items():
        filters, row = dict(zip(KEY, key, strict=True)), _threshold(by_m)
        thresholds.append((filters, [filters | row] if row else []))
    return {
        "thresholds": _replaced(table["thresholds"], thresholds, measured),
        "tiles": _replaced(table["tiles"], tiles, measured),
    }


def merged_attention(table: Table, measured: Rows, arch: int) -> Table:
    """`attention.json` with what was measured on a card, for that card alone."""
    backends, tiles = [], []
    for (dtype, C), by_t in _questions(measured, "attention", ("dtype", "k")).items():
        filters = {"arch": [arch], "dtype": [dtype], "c": [C]}
        rows = _ranged(by_t, filters, ("t_min", "t_max"), lambda row: {"backend": row["way"]})
        backends.append((filters, rows))
    for (op, dtype, C), by_t in _questions(measured, "tile", ("op", "dtype", "k")).items():
        if op in ATTENTION:  # its tiles are for any T: the longest counts most
            filters = {"kernel": [op], "arch": [arch], "dtype": [dtype], "c": [C]}
            won = winner(by_t[max(by_t)])
            rows = [filters | _tile_fields(won[0]) | {"source": won[1]}] if won else []
            tiles.append((filters, rows))
    return {
        "backends": _replaced(table["backends"], backends, measured),
        "tiles": _replaced(table["tiles"], tiles, measured),
    }


def _tile_fields(row: dict) -> dict[str, int]:
    tile = named_tile(Kernel(row["op"], row["storage"], row["dtype"]), row["tile"])
    return {name: value for name, value in asdict(tile).items() if value is not None}


def _replaced(rows: Rows, new: list[tuple[dict, Rows]], measured: Rows) -> Rows:
    """new: (filters, rows in place of the measured rows with these filters), but for what another
    device was measured for."""
    device = measured[0]["device_name"] if measured else ""
    first, replaced = [], []
    for filters, made in sorted(new, key=lambda pair: str(pair[0])):
        same = [row for row in rows if _is_measured(row) and filters.items() <= row.items()]
        if all(f", {device}, " in row["source"] for row in same):
            first += made
            replaced += same
    return first + [row for row in rows if row not in replaced]


# ---------------------------------------------------------------- files


def changes(rows: Rows, device: str | None = None) -> dict[Path, str]:
    """The text of every file that the rows of a sweep change. Raises ConfigError as `of_one_device`
    does, and for a card that no file is shipped for."""
    texts: dict[Path, str] = {}
    attention = json.loads(ATTENTION_PATH.read_text(encoding="utf-8"))
    for arch in sorted({row["arch"] for row in rows if row.get("bench") == "tune"}):
        measured, path = of_one_device(rows, arch, device), table_path(arch)
        if not measured:
            continue
        if arch not in dispatch.ARCHITECTURES:
            hint = "add it, and its number to dispatch.ARCHITECTURES"
            raise ConfigError(f"sm_{arch} has no {path.name}", hint=hint)
        texts[path] = dumped(merged(json.loads(path.read_text(encoding="utf-8")), measured))
        attention = merged_attention(attention, measured, arch)
        texts[ATTENTION_PATH] = dumped(attention)
    return {path: text for path, text in texts.items() if text != path.read_text(encoding="utf-8")}


def difference(path: Path, text: str) -> str:
    """What writing `text` would change, as a unified diff without context."""
    lines = (path.read_text(encoding="utf-8").splitlines(), text.splitlines())
    return "\n".join(difflib.unified_diff(*lines, path.name, path.name, n=0, lineterm=""))
