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
from functools import partial
from pathlib import Path

import fluxfast_kernels
from fluxfast_kernels.dispatch import dispatch

from bench.tune.space import ATTENTION, Kernel, named_tile
from fluxfast.errors import ConfigError

CONFIGS = Path(fluxfast_kernels.__file__).parent / "dispatch" / "configs"
ATTENTION_PATH = CONFIGS / "attention.json"
LEAST_GAIN = 0.02  # of the shipped time; and more than the spread of either measurement
MEASURED = "measured: "
QUESTION = ("kind", "op", "storage", "dtype", "m", "n", "k")
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
            questions[tuple(row.get(key) for key in QUESTION)].append(row)
    newest = ((same, max(row["date"] for row in same)) for same in questions.values())
    return [row for same, date in newest for row in same if row["date"] == date]


def _spread(row: dict) -> float:
    return (row["p90_ms"] - row["p10_ms"]) / 2 / row["median_ms"]


def winner(rows: Rows) -> tuple[dict, dict | None]:
    """Returns the best row of one question and the shipped one's, which wins unless another is
    faster by more than LEAST_GAIN and the spread of both; None where it could not run."""
    ran = [row for row in rows if row["median_ms"] is not None]
    shipped = next((row for row in ran if row["shipped"]), None)
    if not ran:
        return next(row for row in rows if row["shipped"]), None
    best = min(ran, key=lambda row: row["median_ms"])
    if shipped is None:
        return best, None
    gain = 1 - best["median_ms"] / shipped["median_ms"]
    sure = gain > max(LEAST_GAIN, _spread(best), _spread(shipped))
    return (best if sure else shipped), shipped


def source(best: dict, shipped: dict | None) -> str:
    """The `source` of a row: the measurement behind it."""
    commit = (best["commit"] or "unknown")[:7] + (" with changes" if best["dirty"] else "")
    against = f"{shipped['median_ms']:.4g} before" if shipped else "the shipped one fails"
    return (
        f"{MEASURED}commit {commit}, {best['device_name']}, M = {best['m']}: "
        f"{best['median_ms']:.4g} ms, {against}"
    )


def ranges(Ms: list[int]) -> list[tuple[int, int]]:
    """Of ascending Ms the (m_min, m_max) that each stands for."""
    cuts = [math.isqrt(a * b) for a, b in zip(Ms, Ms[1:], strict=False)]
    lows = [Ms[0] // 2, *(cut + 1 for cut in cuts)]
    return list(zip(lows, [*cuts, 2 * Ms[-1]], strict=True))


def _by_key(measured: Rows, kind: str, names: tuple[str, ...]) -> dict[tuple, dict[int, Rows]]:
    """The rows of each finished question of a kind, by key and M."""
    found: dict[tuple, dict[int, Rows]] = defaultdict(dict)
    asked = sorted((row for row in measured if row["kind"] == kind), key=lambda row: row["m"])
    for row in asked:
        found[tuple(row[name] for name in names)].setdefault(row["m"], []).append(row)
    for key, by_m in list(found.items()):
        found[key] = {M: rows for M, rows in by_m.items() if any(row["shipped"] for row in rows)}
    return {key: by_m for key, by_m in found.items() if by_m}


def _ranged(
    by_m: dict[int, Rows], named: dict, limits: tuple[str, str], ship: Callable[[dict], dict]
) -> Rows:
    """A row per winner that is not merely assumed; one that is already measured and still wins
    stays. ship: the fields of a row that a winner sets."""
    new: Rows = []
    for rows, (low, high) in zip(by_m.values(), ranges(list(by_m)), strict=True):
        best, shipped = winner(rows)
        basis = best["source"] if best["shipped"] else source(best, shipped)
        if best["median_ms"] is None or not basis.startswith(MEASURED):
            continue
        shipping = ship(best)
        if new and new[-1][limits[1]] == low - 1 and shipping.items() <= new[-1].items():
            new[-1][limits[1]] = high
        else:
            row = named | dict(zip(limits, (low, high), strict=True)) | shipping
            new.append(row | {"source": basis})
    return new


def merged(table: Table, measured: Rows) -> Table:
    """A card's table with what was measured: those rows first, then all others as they were."""
    tiles, thresholds = {}, {}
    for key, by_m in _by_key(measured, "tile", KEY).items():
        if key[0] in ATTENTION:
            continue
        kernel, named = Kernel(*key[:3]), dict(zip(KEY, key, strict=True))
        ship = partial(_tile_of, kernel)
        tiles[key] = _ranged(by_m, named, ("m_min", "m_max"), ship)
    for key, by_m in _by_key(measured, "hand over", KEY).items():
        row = _threshold(by_m)
        thresholds[key] = [dict(zip(KEY, key, strict=True)) | row] if row else []
    return {
        "thresholds": _replaced(table["thresholds"], thresholds, _key_of, measured),
        "tiles": _replaced(table["tiles"], tiles, _key_of, measured),
    }


def _tile_of(kernel: Kernel, row: dict) -> dict[str, int]:
    tile = named_tile(kernel, row["tile"])
    return asdict(tile)


def _key_of(row: dict) -> tuple:
    return tuple(row.get(name) for name in KEY)


def _replaced(
    rows: Rows, new: dict[tuple, Rows], key_of: Callable[[dict], tuple], measured: Rows
) -> Rows:
    """new: replaces the measured rows of a key, unless another device was measured for it."""
    device = measured[0]["device_name"] if measured else ""
    ours = [row for row in rows if row["source"].startswith(MEASURED)]
    theirs = {key_of(row) for row in ours if f", {device}, " not in row["source"]}
    new = {key: made for key, made in new.items() if key not in theirs}
    others = [row for row in rows if row not in ours or key_of(row) not in new]
    return [row for key in sorted(new, key=str) for row in new[key]] + others


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
    before, basis = None if last == Ms[-1] else last, shipped[Ms[0]]["source"]
    most = min([before, 0, *Ms[:-1], None], key=cost)
    pairs = [(picked(most, M), shipped[M]) for M in Ms if picked(most, M) is not shipped[M]]
    gain = sum(math.log(old["median_ms"] / now["median_ms"]) for now, old in pairs)
    if gain > sum(max(LEAST_GAIN, _spread(now), _spread(old)) for now, old in pairs):
        best = max(pairs, key=lambda pair: pair[1]["median_ms"] / pair[0]["median_ms"])
        return {"fused_up_to_m": most, "source": source(*best)}
    return {"fused_up_to_m": before, "source": basis} if basis.startswith(MEASURED) else None


def merged_attention(table: Table, measured: Rows, arch: int) -> Table:
    """`attention.json` with what was measured on a card, for that card alone."""
    backends, tiles = {}, {}
    for (dtype, C), by_t in _by_key(measured, "attention", ("dtype", "k")).items():
        named = {"arch": [arch], "dtype": [dtype], "c": [C]}
        rows = _ranged(by_t, named, ("t_min", "t_max"), lambda row: {"backend": row["way"]})
        backends[_attention_key(named)] = rows
    for (op, dtype, C), by_t in _by_key(measured, "tile", ("op", "dtype", "k")).items():
        if op in ATTENTION:  # its tiles are for any T: the longest counts most
            named = {"kernel": [op], "arch": [arch], "dtype": [dtype], "c": [C]}
            longest = {max(by_t): by_t[max(by_t)]}
            ship = partial(_tile_of, Kernel(op, "dense", dtype))
            rows = _ranged(longest, {}, ("t_min", "t_max"), ship)
            rows = [named | {k: v for k, v in row.items() if k[:2] != "t_"} for row in rows]
            tiles[_attention_key(named)] = rows
    return {
        "backends": _replaced(table["backends"], backends, _attention_key, measured),
        "tiles": _replaced(table["tiles"], tiles, _attention_key, measured),
    }


def _attention_key(row: dict) -> tuple:
    return tuple(json.dumps(row.get(name)) for name in ("kernel", "arch", "dtype", "c"))


def changes(rows: Rows, device: str | None = None) -> dict[Path, str]:
    """The text of every file that the rows of a sweep change. Raises ConfigError as
    `of_one_device`, and for a card that no file is shipped for."""
    found: dict[Path, str] = {}
    attention = json.loads(ATTENTION_PATH.read_text(encoding="utf-8"))
    for arch in sorted({row["arch"] for row in rows if row.get("bench") == "tune"}):
        measured, path = of_one_device(rows, arch, device), table_path(arch)
        if not measured:
            continue
        if arch not in dispatch.ARCHITECTURES:
            hint = "add it, and its number to dispatch.ARCHITECTURES"
            raise ConfigError(f"sm_{arch} has no {path.name}", hint=hint)
        found[path] = dumped(merged(json.loads(path.read_text(encoding="utf-8")), measured))
        attention = merged_attention(attention, measured, arch)
        found[ATTENTION_PATH] = dumped(attention)
    return {path: text for path, text in found.items() if text != path.read_text(encoding="utf-8")}


def difference(path: Path, text: str) -> str:
    """What writing `text` would change, as a unified diff without context."""
    lines = (path.read_text(encoding="utf-8").splitlines(), text.splitlines())
    return "\n".join(difflib.unified_diff(*lines, path.name, path.name, n=0, lineterm=""))
