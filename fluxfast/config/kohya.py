"""The dataset TOML of kohya-ss' sd-scripts becomes entries of fluxfast's `data`.

`[general]` is inherited by each `[[datasets]]`, that by its `[[datasets.subsets]]`; each subset
becomes one entry. What means the same is mapped; every key that is ignored or read differently
becomes one note that says why; what would train something else if it were ignored is an error. A
key that the file leaves out takes kohya's default, not fluxfast's. Imports neither torch nor the
configuration.
"""

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from fluxfast.config.ai_toolkit_keys import OFF
from fluxfast.config.kohya_keys import (
    IGNORED,
    KNOWN,
    MAPPED,
    OF_DATASETS,
    OF_SUBSETS,
    OUTSIDE,
    QUIET,
    REFUSED,
    SHUFFLING,
    UNREAD,
)
from fluxfast.config.yaml_io import check_texts, read_limited
from fluxfast.errors import ConfigError

_MOST_DOTS = 300  # in a line

Given = dict[str, tuple[str, Any]]  # key -> where it is written, its value


class KohyaFiles:
    """The TOML files that one configuration names: what they say outside `data`, and all notes."""

    def __init__(self):
        self.paths: list[str] = []
        self.settings: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []

    def insert(self, raw: dict) -> None:
        """Put the entries of a file wherever `data` names a .toml. Raises ConfigError."""
        data, entries = raw.get("data"), []
        listed = data if isinstance(data, list) else [data]
        if not any(map(is_toml, listed)):
            return
        for entry in listed:
            if not is_toml(entry):
                entries.append(entry)
                continue
            read, settings, notes = read_kohya_dataset(entry)
            entries += read
            self.paths.append(entry)
            self.notes += [f"{entry}: {note}" for note in notes]
            for key, values in settings.items():
                places = {f"{entry}: {place}": value for place, value in values.items()}
                self.settings.setdefault(key, {}).update(places)
        # as a mapping, one entry is within reach of `--set data.resolution=512`
        raw["data"] = entries[0] if is_toml(data) and len(entries) == 1 else entries

    def settle(self, raw: dict) -> None:
        """Set what the configuration itself does not. Raises ConfigError where files disagree."""
        for key, values in self.settings.items():
            section, _, name = key.partition(".")
            node = raw.setdefault(section, {})
            if not isinstance(node, dict):
                continue  # refused when the configuration is validated
            written = name if name in node else "folder" if node.get("folder") else None
            if written is None and len(set(values.values())) > 1:
                listed = ", ".join(f"{place} = {value}" for place, value in values.items())
                raise ConfigError(
                    f"{listed}: one {key} serves all data",
                    hint=f"choose one: --set {key}={max(values.values())}",
                )
            for place, value in values.items():
                if written is None:
                    self.notes.append(f"{place}: taken as {key}: {value}")
                elif node[written] != value:
                    said = f"{section}.{written} is {node[written]}"
                    self.notes.append(f"{place}: ignored, {said} in the configuration")
            if written is None:
                node[name] = next(iter(values.values()))


def is_toml(entry: Any) -> TypeGuard[str]:
    return isinstance(entry, str) and entry.lower().endswith(".toml")


def read_kohya_dataset(path: str | Path) -> tuple[list[dict], dict[str, dict[str, Any]], list[str]]:
    """-> (entries of `data`, settings outside it, one note per key ignored or read differently).

    A setting is key -> {where it is written: value}, as data sets may differ in it. Paths in the
    file are relative to the folder the command runs in, as with kohya.
    Raises ConfigError, naming every mistake at once, for a file that is unreadable or no such
    TOML, an unknown key (with the nearest), a bad value, and a key that cannot be ignored.
    """
    file = _File(_parse(Path(path)))
    entries, settings = file.read()
    if not entries and not file.wrong:
        file.wrong["datasets"] = "holds no subset to train on: [[datasets]], [[datasets.subsets]]"
    if file.wrong:
        listed = "; ".join(f"{place} {what}" for place, what in file.wrong.items())
        raise ConfigError(  # a quoted key may hold a line break
            f"{path}: {' '.join(listed.split())}",
            hint="examples/kohya/dataset.toml holds the form that is read",
        )
    return entries, settings, [f"{place}: {what}" for place, what in file.notes.items()]


def _parse(path: Path) -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    content = read_limited(path, "the data set")
    # the reader takes the square of a dotted name's length: hours for one of a megabyte
    if any(line.count(b".") > _MOST_DOTS for line in content.splitlines()):
        raise ConfigError(f"{path} has more than {_MOST_DOTS} dots in a line")
    try:
        parsed = tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        hint = "a path with backslashes takes single quotes: 'C:\\pictures'"
        escape = "escape" in said or "hex value" in said
        raise ConfigError(
            f"{path} is not valid TOML: {said}", hint=hint if escape else None
        ) from None
    check_texts(parsed)  # before what is wrong with it is said
    return parsed


class _File:
    """One file on its way: place -> what is said of it, or what is wrong with it."""

    def __init__(self, raw: dict):
        self.raw = raw
        self.notes: dict[str, str] = {}
        self.wrong: dict[str, str] = {}

    def read(self) -> tuple[list[dict], dict]:
        """-> (entries, settings outside `data`); mistakes are gathered in `wrong`."""
        entries, settings = [], {}
        if unknown := sorted(self.raw.keys() - {"general", "datasets"}):
            listed = ", ".join(unknown[:4]) + (", …" if unknown[4:] else "")
            self.wrong[listed] = "unknown; a data set has [general] and [[datasets]]"
            return [], {}
        general = self._level(self.raw.get("general", {}), "general", OF_SUBSETS)
        for place, dataset in self._tables(self.raw.get("datasets"), "datasets"):
            subsets = dataset.pop("subsets", None) if isinstance(dataset, dict) else None
            inherited = general | self._level(dataset, place, OF_SUBSETS)
            for key, (native, read) in OUTSIDE.items():
                if (value := self._value(inherited, key, read)) is not None:
                    settings.setdefault(native, {})[inherited[key][0]] = value
            folders = set()
            for where, subset in self._tables(subsets, f"{place}.subsets"):
                given = inherited | self._level(subset, where, OF_DATASETS)
                entry = self._entry(given, where)
                if entry.get("folder") in folders:
                    self.notes[f"{where}.image_dir"] = (
                        "this subset is left out, as kohya does: one before it has the same folder"
                    )
                elif entry["num_repeats"] is not None and entry["num_repeats"] < 1:
                    self.notes[given["num_repeats"][0]] = "below 1, left out, as kohya does"
                else:
                    entries.append(entry)
                    folders.add(entry.get("folder"))
        # 0 holds nothing out, which is how a configuration without the key does it
        if not any(settings.get("validation.share", {}).values()):
            settings.pop("validation.share", None)
        return entries, settings

    def _tables(self, value: Any, place: str) -> list[tuple[str, Any]]:
        if not isinstance(value, list) or not value:
            self.wrong[place] = "is missing" if value is None else f"takes tables: [[{place}]]"
            return []
        return [(f"{place}[{index}]", table) for index, table in enumerate(value)]

    def _level(self, table: Any, place: str, elsewhere: list[str]) -> Given:
        """The keys written at one level; an unknown key or one of another level is wrong."""
        if not isinstance(table, dict):
            self.wrong[place] = f"takes a table of settings, got {table!r}"
            return {}
        given = {}
        for key, value in table.items():
            if key not in KNOWN:
                close = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.6)
                said = f", did you mean {close[0]}?" if close else ""
                self.wrong[f"{place}.{key}"] = f"is unknown{said}"
            elif key in elsewhere:
                home = "[[datasets.subsets]]" if elsewhere is OF_SUBSETS else "[[datasets]]"
                self.wrong[f"{place}.{key}"] = f"belongs in {home}"
            else:
                given[key] = (f"{place}.{key}", value)
        return given

    def _value(self, given: Given, key: str, read: Callable, default: Any = None) -> Any:
        """A key's value through its reader; the default where it is absent, None if wrong."""
        if key not in given:
            return default
        place, value = given[key]
        try:
            return read(value)
        except ValueError as error:
            self.wrong[place] = f"{error}, got {value!r}"
            return None

    def _entry(self, given: Given, where: str) -> dict:
        """One subset with all that it inherits, as an entry of `data`."""
        entry: dict[str, Any] = {"recursive": False}
        for key, (native, read, default) in MAPPED.items():
            if (value := self._value(given, key, read, default)) is not None or key in given:
                entry[native] = value
        for key in ("image_dir", "resolution"):
            if key not in given and "metadata_file" not in given:
                self.wrong[f"{where}.{key}"] = "is missing"
        for key, (place, value) in given.items():
            if value in QUIET.get(key, OFF):
                continue
            if key in REFUSED:
                self.wrong[place] = REFUSED[key]
            elif key in SHUFFLING and entry["shuffle_captions"]:
                self.wrong[place] = SHUFFLING[key]
            elif key in IGNORED:
                self.notes[place] = IGNORED[key]
        self._differences(given, entry)
        return entry

    def _differences(self, given: Given, entry: dict) -> None:
        """Notes on what is mapped, but does not mean quite the same."""
        place, value = given.get("resolution", ("", 0))
        if isinstance(value, list) and value[1:] != value[:1]:
            self.notes[place] = f"read as {entry['resolution']}, the side of a square of that area"
        if "caption_extension" not in given:
            self.notes["caption_extension"] = "not given, read as kohya's default, .caption"
        for key, said in (
            ("enable_bucket", "read as true: pictures keep their aspect in buckets"),
            ("bucket_no_upscale", "read as true: pictures are never enlarged"),
        ):
            place, value = given.get(key, (key, None))
            if value is not True:
                self.notes[place] = said if key in given else f"not given, {said}"
        if entry["shuffle_captions"]:
            self.notes[given["shuffle_caption"][0]] = (
                "a few orders are drawn once for each picture (data.shuffle_variants), not a new "
                "one each time; a trigger put in front counts as one of keep_tokens"
            )
        if entry["mask"] == "alpha":
            self.notes[given["alpha_mask"][0]] = (
                "transparent places are painted white; kohya keeps the colors hidden there"
            )
        if isinstance(entry.get("folder"), str) and isinstance(entry["caption_ext"], str):
            said = _look_into(Path(entry["folder"]), entry["caption_ext"])
            if said:
                self.notes[given["image_dir"][0]] = "; ".join(said)


def _look_into(folder: Path, extension: str) -> list[str]:
    """What kohya would read otherwise of the files themselves; a missing folder says nothing."""
    try:
        files = [path for path in folder.iterdir() if path.is_file()]
        captions = [path for path in files if extension and path.name.endswith(extension)]
        texts = (read_limited(path, "the caption") for path in captions)
        several = sum(len(text.strip().splitlines()) > 1 for text in texts)
    except (OSError, ConfigError):  # whatever it is, the scan says it better
        return []
    unread = sum(path.suffix.lower() in UNREAD for path in files)
    said = []
    if several:
        said.append(f"captions are read whole, kohya takes the first line: {several} have more")
    if unread:
        said.append(f"{unread} {'/'.join(UNREAD)} files are left out: convert them to .png")
    return said
