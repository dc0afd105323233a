"""Translates the dataset TOML of kohya-ss' sd-scripts into entries of fluxfast's `data`.

`[general]` is inherited by each `[[datasets]]`, that by its `[[datasets.subsets]]`; each subset
becomes one entry. What means the same is mapped; every key that is ignored or read differently gets
one note that says why; what would train something else if it were ignored is an error. A key that
the file leaves out takes kohya's default, not fluxfast's. Imports neither torch nor the
configuration.
"""

import contextlib
import logging
import re
import sys
from pathlib import Path
from typing import Any

from fluxfast.config.key_table import Translation, check_owner, note_lines, rows_of, whole
from fluxfast.config.kohya_keys import (
    OF_DATASETS,
    OF_SUBSETS,
    OUTSIDE,
    SHUFFLING,
    TABLE,
    share,
)
from fluxfast.config.yaml_io import (
    PATH_HINT,
    check_path,
    check_texts,
    decode,
    read_limited,
    read_mapping,
)
from fluxfast.errors import ConfigError
from fluxfast.util.files import expanded

log = logging.getLogger(__name__)

_MOST_DOTS = 300  # in a line
_ABSENT = " (not given)"  # behind the place of a key that takes kohya's default

# what follows -- in a line of sample prompts -> the key of a preview
PROMPT_FLAGS = {
    "n": "negative", "l": "cfg", "g": "guidance", "w": "width", "h": "height", "d": "seed",
    "s": "steps",
}  # fmt: skip
_FLAG = re.compile(r"\s--([a-z]\w*)(?=\s|$)", re.IGNORECASE)

Written = dict[str, tuple[str, Any]]  # key -> (where it is written, value)


class KohyaFile:
    """A dataset TOML or JSON: the entries of `data` that it becomes, settings outside `data`, and
    notes.

    Paths in the file are relative to the folder the command runs in, as with kohya. Raises
    ConfigError, naming every mistake at once, for a file that is unreadable or no such TOML, an
    unknown key (with the nearest), a bad value, and a key that cannot be ignored.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self.settings: dict[str, dict[str, Any]] = {}  # native key -> {where it is written: value}
        self.batch_sizes: list[int] = []  # of each entry
        self.notes: dict[str, str] = {}  # where it is written -> text
        self.mistakes: dict[str, str] = {}
        check_owner(Path(path))
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
        if unknown := sorted(map(str, raw.keys() - {"general", "datasets"})):
            listed = ", ".join(unknown[:4]) + (", …" if unknown[4:] else "")
            self.mistakes[listed] = "unknown; a data set has [general] and [[datasets]]"
            return []
        general = self._level(raw.get("general", {}), "general", OF_SUBSETS)
        for where, dataset in self._tables(raw.get("datasets"), "datasets"):
            subsets = dataset.pop("subsets", None) if isinstance(dataset, dict) else None
            inherited = general | self._level(dataset, where, OF_SUBSETS)
            shared = Translation(inherited, self.notes, self.mistakes)
            for key, (native, read, default) in OUTSIDE.items():
                at = inherited[key][0] if key in inherited else f"{where}.{key}{_ABSENT}"
                self.settings.setdefault(native, {})[at] = shared.get(key, read, default)
            if shared.get("validation_split", share) and "validation_seed" in inherited:
                shared.note("validation_seed", "ignored, the configuration's seed chooses pictures")
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
                    self.batch_sizes.append(shared.get("batch_size", whole, 1))
                    folders.add(entry.get("folder"))
        for native, values in list(self.settings.items()):
            given = [value for at, value in values.items() if not at.endswith(_ABSENT)]
            # 0 holds nothing out, which is how a configuration without the key does it
            if not given or (native == "validation.share" and not any(given)):
                del self.settings[native]
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
        for key, value in ((str(key), value) for key, value in table.items()):
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
        if "enable_bucket" not in written:
            self.notes["enable_bucket"] = "not given, read as true: pictures keep their aspect"
        if "bucket_no_upscale" not in written:
            reason = TABLE.ignored["bucket_no_upscale"][0]
            self.notes["bucket_no_upscale"] = f"not given, {reason}"
        if "mask_folder" in entry:
            entry["mask"] = "folder"  # of the two this is the one that kohya takes, too
        if "folder" in entry and (
            longer := _longer_captions(expanded(entry["folder"]), entry["caption_ext"])
        ):
            reason = f"captions are read whole, kohya takes the first line: {longer} have more"
            subset.note("image_dir", reason)
        return entry


def preview_of(line: str) -> dict[str, Any] | None:
    """Returns what kohya means by a line of sample prompts, `a cat --n dogs --l 3 --w 512`; None
    for a prompt without settings. Notes what is passed over, a control picture among it.
    """
    prompt, *rest = _FLAG.split(line)
    if not rest:
        return None
    written = dict(zip(map(str.lower, rest[::2]), map(str.strip, rest[1::2]), strict=True))
    preview = {PROMPT_FLAGS[key]: value for key, value in written.items() if key in PROMPT_FLAGS}
    if passed_over := [f"--{key}" for key in written if key not in PROMPT_FLAGS]:
        log.warning(f"note: previews are drawn without {', '.join(passed_over)} of {prompt!r}")
    if "negative" in preview and preview.get("cfg", "1") in ("1", "1.0"):
        log.warning(f"note: --n of {prompt!r} does nothing, as in kohya without --l above 1")
        del preview["negative"]
    return {"prompt": prompt.strip()} | preview


def _parse(path: Path) -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    if path.suffix.lower() == ".json":
        parsed = read_mapping(path, "the data set")
        check_texts(parsed)
        return parsed
    content = read_limited(path, "the data set")
    # the reader takes the square of a dotted name's length: hours for one of a megabyte
    if any(line.count(b".") > _MOST_DOTS for line in content.splitlines()):
        raise ConfigError(f"{path} has more than {_MOST_DOTS} dots in a line")
    try:
        parsed = tomllib.loads(decode(content))
    except ConfigError as error:
        raise ConfigError(f"{path} is not valid TOML: {error.message}", hint=error.hint) from None
    except (ValueError, RecursionError) as error:
        message, hint = " ".join(str(error).split()), None
        if "escape" in message or "hex value" in message:
            hint = PATH_HINT
        raise ConfigError(f"{path} is not valid TOML: {message}", hint=hint) from None
    check_texts(parsed)  # before its mistakes are quoted
    return parsed


def _longer_captions(folder: Path, extension: str) -> int:
    """Returns how many captions have several lines; 0 where the scan will report an error."""
    with contextlib.suppress(OSError, ConfigError):
        captions = [path for path in folder.iterdir() if path.is_file()]
        captions = [path for path in captions if extension and path.name.endswith(extension)]
        texts = (read_limited(path, "the caption") for path in captions)
        return sum(len(text.strip().splitlines()) > 1 for text in texts)
    return 0


def is_kohya(path: Path) -> bool:
    """Returns whether a file is a data set of kohya's: TOML, or JSON with an image_dir."""
    if path.suffix.lower() == ".json":
        with contextlib.suppress(ConfigError):
            return b'"image_dir"' in read_limited(path, "the data set")
    return path.suffix.lower() == ".toml"


def insert_kohya(raw: dict, files: list[KohyaFile]) -> None:
    """Replaces each .toml or .json that `data` names by the file's entries, and appends the file to
    `files`.
    """
    data, entries = raw.get("data"), []
    for entry in data if isinstance(data, list) else [data]:
        if isinstance(entry, str) and entry.lower().endswith((".toml", ".json")):
            check_path(entry, setting="data")
            files.append(KohyaFile(expanded(entry)))
            entries += files[-1].entries
        else:
            entries.append(entry)
    if isinstance(data, list | str):
        raw["data"] = entries


def settle_kohya(raw: dict, files: list[KohyaFile]) -> list[str]:
    """Sets what the files say outside `data` and the configuration does not. Returns all notes.

    Raises ConfigError where files disagree.
    """
    notes = [f"{file.path}: {line}" for file in files for line in note_lines(file.notes)]
    for key in (row.native for row in OUTSIDE.values()):
        values = {
            f"{file.path}: {where}": value
            for file in files
            for where, value in file.settings.get(key, {}).items()
        }
        section, _, name = key.partition(".")
        if values and raw.get(section) is None:
            raw[section] = {}
        node = raw[section] if values else None
        if not isinstance(node, dict):
            continue  # refused when the configuration is validated
        own = name if name in node else "folder" if node.get("folder") else None
        several = not own and len(set(values.values())) > 1
        if own:
            notes += [
                f"{where}: ignored, {section}.{own} is {node[own]} in the configuration"
                for where, value in values.items()
                if value != node[own] and not where.endswith(_ABSENT)
            ]
        elif several and key != "train.batch_size":
            listed = ", ".join(f"{where} = {value}" for where, value in values.items())
            raise ConfigError(
                f"{listed}: one {key} serves all data",
                hint=f"choose one: --set {key}={max(values.values())}",
            )
        else:
            taken = "data.batch_size" if several else key
            notes += [f"{where}: taken as {taken}: {value}" for where, value in values.items()]
            if several:
                for file in files:
                    for entry, size in zip(file.entries, file.batch_sizes, strict=True):
                        entry.setdefault("batch_size", size)
            else:
                node[name] = next(iter(values.values()))
    return notes
