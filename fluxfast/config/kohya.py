"""Translates the dataset TOML of kohya-ss' sd-scripts into entries of fluxfast's `data`.

`[general]` is inherited by each `[[datasets]]`, that by its `[[datasets.subsets]]`; each subset
becomes one entry. What means the same is mapped; every key that is ignored or read differently gets
one note that says why; what would train something else if it were ignored is an error. A key that
the file leaves out takes kohya's default, not fluxfast's. Imports neither torch nor the
configuration.
"""

import sys
from pathlib import Path
from typing import Any

from fluxfast.config.key_table import Translation, rows_of
from fluxfast.config.kohya_keys import (
    OF_DATASETS,
    OF_SUBSETS,
    OUTSIDE,
    SHUFFLING,
    TABLE,
    UNREAD,
)
from fluxfast.config.yaml_io import check_texts, read_limited
from fluxfast.errors import ConfigError

_MOST_DOTS = 300  # in a line

Written = dict[str, tuple[str, Any]]  # key -> (where it is written, value)


class KohyaFile:
    """A dataset TOML: the entries of `data` that it becomes, settings outside `data`, and notes.

    Paths in the file are relative to the folder the command runs in, as with kohya. Raises
    ConfigError, naming every mistake at once, for a file that is unreadable or no such TOML, an
    unknown key (with the nearest), a bad value, and a key that cannot be ignored.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self.settings: dict[str, dict[str, Any]] = {}  # native key -> {where it is written: value}
        self.notes: dict[str, str] = {}  # where it is written -> text
        self.mistakes: dict[str, str] = {}
        self.entries = self._read(_parse(Path(path)))
        if not self.entries and not self.mistakes:
            missing = "holds no subset to train on: [[datasets]], [[datasets.subsets]]"
            self.mistakes["datasets"] = missing
        if self.mistakes:
            listed = "; ".join(f"{where} {mistake}" for where, mistake in self.mistakes.items())
            raise ConfigError(  # a quoted key may hold a line break
                f"{path}: {' '.join(listed.split())}",
                hint="examples/kohya/dataset.toml holds the form that is read",
            )

    def _read(self, raw: dict) -> list[dict]:
        entries = []
        if unknown := sorted(raw.keys() - {"general", "datasets"}):
            listed = ", ".join(unknown[:4]) + (", …" if unknown[4:] else "")
            self.mistakes[listed] = "unknown; a data set has [general] and [[datasets]]"
            return []
        general = self._level(raw.get("general", {}), "general", OF_SUBSETS)
        for where, dataset in self._tables(raw.get("datasets"), "datasets"):
            subsets = dataset.pop("subsets", None) if isinstance(dataset, dict) else None
            inherited = general | self._level(dataset, where, OF_SUBSETS)
            shared = Translation(inherited, self.notes, self.mistakes)
            for key, (native, read, _) in OUTSIDE.items():
                if (value := shared.get(key, read)) is not None:
                    self.settings.setdefault(native, {})[inherited[key][0]] = value
            folders = set()
            for subset_where, subset in self._tables(subsets, f"{where}.subsets"):
                written = inherited | self._level(subset, subset_where, OF_DATASETS)
                entry = self._entry(written, subset_where)
                if entry.get("folder") in folders:
                    self.notes[f"{subset_where}.image_dir"] = (
                        "this subset is left out, as kohya does: one before it has the same folder"
                    )
                elif entry["num_repeats"] < 1:
                    self.notes[written["num_repeats"][0]] = "below 1, left out, as kohya does"
                else:
                    entries.append(entry)
                    folders.add(entry.get("folder"))
        # 0 holds nothing out, which is how a configuration without the key does it
        if not any(self.settings.get("validation.share", {}).values()):
            self.settings.pop("validation.share", None)
        return entries

    def _tables(self, value: Any, where: str) -> list[tuple[str, Any]]:
        if not isinstance(value, list) or not value:
            self.mistakes[where] = "is missing" if value is None else f"takes tables: [[{where}]]"
            return []
        return [(f"{where}[{index}]", table) for index, table in enumerate(value)]

    def _level(self, table: Any, where: str, elsewhere: tuple[str, ...]) -> Written:
        """Returns the keys written at one level; an unknown key or one of another level is a
        mistake.
        """
        if not isinstance(table, dict):
            self.mistakes[where] = f"takes a table of settings, got {table!r}"
            return {}
        written = {}
        for key, value in table.items():
            if key not in TABLE.known:
                nearest = TABLE.nearest(key, 0.6)
                hint = f", did you mean {nearest}?" if nearest else ""
                self.mistakes[f"{where}.{key}"] = f"is unknown{hint}"
            elif key in elsewhere:
                home = "[[datasets.subsets]]" if elsewhere is OF_SUBSETS else "[[datasets]]"
                self.mistakes[f"{where}.{key}"] = f"belongs in {home}"
            else:
                written[key] = (f"{where}.{key}", value)
        return written

    def _entry(self, written: Written, subset_where: str) -> dict:
        """Returns one subset with all that it inherits, as an entry of `data`."""
        subset = Translation(written, self.notes, self.mistakes)
        subset.put("recursive", False)
        subset.apply(TABLE)
        entry = subset.native
        for key in ("image_dir", "resolution"):
            if key not in written and "metadata_file" not in written:
                self.mistakes[f"{subset_where}.{key}"] = "is missing"
        for key, (reason, quiet) in rows_of(SHUFFLING).items():
            if entry["shuffle_captions"] and key in written and written[key][1] not in quiet:
                subset.refuse(key, reason)
        where, value = written.get("resolution", ("", 0))
        if isinstance(value, list) and value[1:] != value[:1]:
            read = entry.get("resolution")
            self.notes[where] = f"read as {read}, the side of a square of that area"
        if "caption_extension" not in written:
            self.notes["caption_extension"] = "not given, read as kohya's default, .caption"
        for key in ("enable_bucket", "bucket_no_upscale"):
            if key not in written:
                self.notes[key] = f"not given, {TABLE.ignored[key][0]}"
        if "folder" in entry and (notes := _look_into(Path(entry["folder"]), entry["caption_ext"])):
            subset.note("image_dir", "; ".join(notes))
        return entry


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
        message, hint = " ".join(str(error).split()), None
        if "escape" in message or "hex value" in message:
            hint = "a path with backslashes takes single quotes: 'C:\\pictures'"
        raise ConfigError(f"{path} is not valid TOML: {message}", hint=hint) from None
    check_texts(parsed)  # before its mistakes are quoted
    return parsed


def _look_into(folder: Path, extension: str) -> list[str]:
    """Returns notes on what kohya would read differently in the files themselves."""
    try:
        files = [path for path in folder.iterdir() if path.is_file()]
        captions = [path for path in files if extension and path.name.endswith(extension)]
        contents = (read_limited(path, "the caption") for path in captions)
        several = sum(len(content.strip().splitlines()) > 1 for content in contents)
    except (OSError, ConfigError):  # the scan reports it better
        return []
    unread = sum(path.suffix.lower() in UNREAD for path in files)
    notes = []
    if several:
        notes.append(f"captions are read whole, kohya takes the first line: {several} have more")
    if unread:
        notes.append(f"{unread} {'/'.join(UNREAD)} files are left out: convert them to .png")
    return notes


def insert_kohya(raw: dict, files: list[KohyaFile]) -> None:
    """Replaces each .toml that `data` names by the file's entries, and appends it to `files`."""
    data, entries = raw.get("data"), []
    for entry in data if isinstance(data, list) else [data]:
        if isinstance(entry, str) and entry.lower().endswith(".toml"):
            files.append(KohyaFile(entry))
            entries += files[-1].entries
        else:
            entries.append(entry)
    if isinstance(data, list):
        raw["data"] = entries
    elif isinstance(data, str):
        # as a mapping, one entry is within reach of `--set data.resolution=512`
        raw["data"] = entries[0] if len(entries) == 1 else entries


def settle_kohya(raw: dict, files: list[KohyaFile]) -> list[str]:
    """Sets what the files say outside `data` and the configuration does not. Returns all notes.

    Raises ConfigError where files disagree.
    """
    notes = [f"{file.path}: {at}: {note}" for file in files for at, note in file.notes.items()]
    for key in (row.native for row in OUTSIDE.values()):
        values = {
            f"{file.path}: {where}": value
            for file in files
            for where, value in file.settings.get(key, {}).items()
        }
        section, _, name = key.partition(".")
        node = raw.setdefault(section, {}) if values else None
        if not isinstance(node, dict):
            continue  # refused when the configuration is validated
        own = name if name in node else "folder" if node.get("folder") else None
        if own:
            reason = f"ignored, {section}.{own} is {node[own]} in the configuration"
            others = [where for where, value in values.items() if value != node[own]]
            notes += [f"{where}: {reason}" for where in others]
            continue
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{where} = {value}" for where, value in values.items())
            raise ConfigError(
                f"{listed}: one {key} serves all data",
                hint=f"choose one: --set {key}={max(values.values())}",
            )
        notes += [f"{where}: taken as {key}: {value}" for where, value in values.items()]
        node[name] = next(iter(values.values()))
    return notes
