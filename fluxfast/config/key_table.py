"""Reading another trainer's file: a table of its keys, readers of values, notes and mistakes."""

import copy
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

OFF = (None, False, 0, "", [], {})  # values that ask for nothing

# ---------------------------------------------------------------- readers: value -> value


def typed(kind: type, words: str) -> Callable:
    """Returns a reader of values of one type."""

    def read(value):
        if not isinstance(value, kind):
            raise ValueError(f"takes {words}")
        return value

    return read


flag, text = typed(bool, "true or false"), typed(str, "text")
mapping = typed(dict, "a mapping of settings")


def number(value, kind: str = "number") -> float:
    try:  # ai-toolkit's files quote 1e-4 at times
        converted = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        converted = None
    if converted is None:
        raise ValueError(f"takes a {kind}")
    return converted if isinstance(value, str) else value


def whole(value) -> int:
    value = number(value, "whole number")
    if not math.isfinite(value) or value != int(value):
        raise ValueError("takes a whole number")
    return int(value)


def wholes(value) -> list[int]:
    return [whole(item) for item in (value if isinstance(value, list) else [value])]


def texts(value) -> list[str]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("takes a list of texts")
    return value


def mappings(value) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("takes a list of mappings")
    return value


def one_of(choices: Mapping[str, Any]) -> Callable:
    """Returns a reader that takes a word of `choices`, in any case, and returns its value."""

    def read(value):
        if not isinstance(value, str) or value.lower() not in choices:
            raise ValueError(f"takes one of {', '.join(choices)}")
        return choices[value.lower()]

    return read


# ---------------------------------------------------------------- the table


class Mapped(NamedTuple):
    """A key that becomes the native one. default: the other trainer's; None writes nothing."""

    native: str
    read: Callable
    default: Any = None


class KeyTable:
    """All keys of one trainer.

    ignored, refused: a row `reason | keys` per reason, see `rows_of`. noted: key -> what differs
    where the key is on. combined: keys that only code reads.
    """

    def __init__(
        self,
        mapped: dict[str, Mapped],
        ignored: str,
        refused: str,
        noted: dict[str, str],
        combined: str,
    ):
        self.mapped, self.noted = mapped, noted
        self.ignored, self.refused = rows_of(ignored), rows_of(refused)
        groups = (mapped, self.ignored, self.refused, combined.split())
        self.known = set().union(*groups)
        assert len(self.known) == sum(map(len, groups)), "a key stands in two rows"

    def nearest(self, key: str, cutoff: float) -> str | None:
        """Returns a key of that name in another section, or else one of a similar spelling."""
        leaf = key.rpartition(".")[2]
        known = sorted(self.known)
        close = [each for each in known if each.rpartition(".")[2] == leaf]
        close = close or difflib.get_close_matches(key, known, n=1, cutoff=cutoff)
        return close[0] if close else None


def rows_of(text: str) -> dict[str, tuple[str, tuple]]:
    """Returns key -> (reason, quiet values) of lines `reason | keys`; indented lines go on.

    A key's quiet values, which ask for nothing, are those of OFF, or in place of these those
    written behind it: `key=1|2`; `key=` has none.
    """
    rows = {}
    for row in re.split(r"\n(?! )", text.strip()):
        reason, keys = " ".join(row.split()).split(" | ")
        for word in keys.split():
            key, equals, values = word.partition("=")
            assert key not in rows, key
            own = tuple(_plain(value) for value in values.split("|") if value)
            rows[key] = reason, own if equals else OFF
    return rows


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


class Translation:
    """A file's keys, the native settings they become, and what the user is told about them."""

    def __init__(
        self,
        written: dict[str, tuple[str, Any]],
        notes: dict[str, str],
        mistakes: dict[str, str],
    ):
        self.written = written  # key -> (where it is written, value)
        self.notes, self.mistakes = notes, mistakes  # where it is written -> text
        self.native: dict = {}

    def get(self, key: str, read: Callable, default: Any = None) -> Any:
        """Returns a key's value through its reader; the default where it is absent or a mistake."""
        if key not in self.written:
            return default
        location, value = self.written[key]
        try:
            return read(value)
        except ValueError as error:
            self.mistakes[location] = f"{error}, got {value!r}"
            return default

    def note(self, key: str, text: str) -> None:
        self.notes[self._location(key)] = text

    def refuse(self, key: str, text: str) -> None:
        self.mistakes[self._location(key)] = text

    def _location(self, key: str) -> str:
        return self.written[key][0] if key in self.written else key

    def put(self, native: str, value: Any) -> None:
        node = self.native
        *sections, last = native.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value

    def apply(self, table: KeyTable) -> None:
        """Puts the mapped keys and their defaults; notes or refuses all others but the combined."""
        for key, (native, read, default) in table.mapped.items():
            value = self.get(key, read, copy.deepcopy(default))
            if value is not None:
                self.put(native, value)
        for key, (location, value) in self.written.items():
            for rows, reasons in ((table.ignored, self.notes), (table.refused, self.mistakes)):
                reason, quiet = rows.get(key, ("", (value,)))
                if value not in quiet:
                    reasons[location] = reason
            if key in table.noted and value not in OFF:
                self.notes[location] = table.noted[key]
            if key not in table.known:
                nearest = table.nearest(key, 0.75)
                hint = f"; did you mean {nearest}?" if nearest else ""
                self.notes[location] = f"unknown, ignored{hint}"
