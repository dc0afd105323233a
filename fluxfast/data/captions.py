"""Captions: reads them from sidecar files or metadata.jsonl in any common encoding, and makes the
prompt variants that an image is trained with.
"""

import codecs
import json
import os
import posixpath
import re
import unicodedata
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxfast import rng
from fluxfast.config.schema import DataConfig
from fluxfast.errors import FluxfastError
from fluxfast.util.files import open_regular

LARGEST = 1_000_000  # bytes of a sidecar: T5 reads 512 tokens of it
LARGEST_METADATA = 2**28  # bytes
METADATA = "metadata.jsonl"
_TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".json")  # a part of which may be an image's
_LISTED = 5  # bad lines of a metadata file that are reported each; more are counted
_TRIED = 50  # images that are looked for in a file that may hold captions
PLACEHOLDER = "[trigger]"

# longer marks first: UTF-32's begins like UTF-16's
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# a terminal would obey these; tabs and line breaks stay
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]+")


@dataclass
class Captions:
    """The captions of a folder's images, and what could not be read.

    texts: image -> caption, None if it has none. sources: how many come from where. unread: image
    -> why its caption cannot be used. stray: errors for lines of metadata that name no image.
    useless: what is wrong with a metadata file's lines that fit no image or hold no caption.
    guessed: files read as Windows-1252.
    """

    texts: dict[Path, str | None] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)
    unread: dict[Path, FluxfastError] = field(default_factory=dict)
    stray: list[FluxfastError] = field(default_factory=list)
    useless: list[str] = field(default_factory=list)
    guessed: list[Path] = field(default_factory=list)


_Table = dict[str, str | FluxfastError | None]  # file name -> caption, or the error in its line


def read_captions(folder: Path, images: list[Path], extension: str = ".txt") -> Captions:
    """Returns the stripped caption of each image: None without one, "" for an empty sidecar.

    A sidecar (same stem, `extension`; of .json its `caption` or `text`) wins over `metadata.jsonl`,
    which is looked up in the image's own folder, then in its parents up to `folder`. Its lines hold
    `file_name`, relative to it, and `text` or `caption`. Raises nothing: files that cannot be read
    are listed in the result.
    """
    captions = Captions()
    tables: dict[Path, _Table] = {}
    found: dict[tuple[Path, str], Path] = {}  # a table's folder and a name in it -> image
    for image in images:
        try:
            captions.texts[image] = _caption(image, folder, extension, tables, found, captions)
        except FluxfastError as error:
            captions.unread[image] = error
    for parent, table in tables.items():
        captions.useless += _useless(parent, folder, table, found, captions)
    return captions


def _caption(
    image: Path, folder: Path, extension: str, tables: dict, found: dict, captions: Captions
) -> str | None:
    sidecar = image.with_suffix(extension)
    if os.path.lexists(sidecar):  # an unreadable sidecar is an error, not a missing caption
        text = read_text(sidecar, LARGEST, captions.guessed).strip()
        text = _json_caption(sidecar, text) if extension.lower().endswith(".json") else text
        captions.sources[extension] += 1
        return text
    for parent in image.parents:
        if parent not in tables:
            tables[parent] = _read_metadata(parent / METADATA, captions)
        name = _normalize(image.relative_to(parent).as_posix())
        text = tables[parent].get(name)
        found[parent, name] = image
        if isinstance(text, FluxfastError):
            raise text
        if text is not None:
            captions.sources[METADATA] += 1
            return text.strip()
        if parent == folder:
            break
    return None


def _json_caption(path: Path, text: str) -> str:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FluxfastError(f"{path} is not valid JSON: {error}") from None
    texts = [row.get("caption"), row.get("text")] if isinstance(row, dict) else [row]
    caption = next((text for text in texts if text is not None), None)
    if caption is None:
        raise FluxfastError(f'{path} needs "caption" or "text"')
    return _checked(str(path), caption).strip()


def _checked(where: str, caption: Any) -> str:
    """Returns a caption of a JSON file, whose escapes may have control characters and halves of a
    character.
    """
    if not isinstance(caption, str):
        kind = type(caption).__name__
        raise FluxfastError(f"{where}: the caption must be text, got {kind}")
    if any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise FluxfastError(f"{where}: the caption holds half a character (\\ud8..)")
    return _CONTROL.sub(" ", caption)


def caption_variants(
    caption: str, content_hash: str, data: DataConfig, trigger: str | None, seed: int
) -> list[str]:
    """Returns the prompts that one image is trained with: prefix, caption and suffix with the
    triggers, the run's in front of the data's, comma-shuffled if `data` says so.

    Variant v keeps the first `keep_tokens` comma-separated parts and permutes the rest: a pure
    function of (seed, content_hash, v). Duplicates are removed; at least one remains.
    """
    parts = (data.caption_prefix, caption, data.caption_suffix)
    caption = " ".join(part for part in parts if part).strip()
    if own := clean_trigger(data.trigger):
        caption = apply_trigger(caption, own)
    caption = apply_trigger(caption, trigger)
    if not data.shuffle_captions:
        return [caption]
    parts = [part.strip() for part in caption.split(",") if part.strip()]
    fixed, rest = parts[: data.keep_tokens], parts[data.keep_tokens :]
    texts = []
    for variant in range(data.shuffle_variants):
        order = rng.permutation(seed, f"shuffle/{content_hash}", variant, len(rest))
        texts.append(", ".join(fixed + [rest[i] for i in order]))
    return list(dict.fromkeys(texts))


def apply_trigger(caption: str, trigger: str | None) -> str:
    """Returns the caption with every `[trigger]` replaced, and with the trigger in front if it does
    not contain it as a word. Raises FluxfastError for `[trigger]` without a trigger.
    """
    if trigger is None:
        if PLACEHOLDER in caption:
            raise FluxfastError(
                f"a caption holds {PLACEHOLDER} but no trigger is set: {caption[:60]!r}",
                hint="set `trigger:`, or `data.trigger` for one folder",
            )
        return caption
    caption = caption.replace(PLACEHOLDER, trigger)
    # "art" is not in "party"; only ASCII letters and digits bound a word, as in scripts without
    # spaces a trigger has letters next to it
    if re.search(rf"(?<![A-Za-z0-9_]){re.escape(trigger)}(?![A-Za-z0-9_])", caption):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def clean_trigger(trigger: str | None) -> str | None:
    """Returns the stripped trigger, None if it is empty."""
    return (trigger or "").strip() or None


def unread_captions(
    texts: list[Path], bare: list[Path], images: list[Path], extension: str
) -> tuple[list[Path], list[Path]]:
    """Returns the files that by their names hold captions of images that have none (`a.caption`,
    `a.png.txt`, `captions/a.txt`, `metadata.csv`), and further ones that fit no image.

    texts: files that may hold captions; bare: images without one; images: all, used or not.
    """
    if not bare:
        return [], []
    read = {image.with_suffix(extension) for image in images}
    folders = {image.parent for image in images}
    read |= {parent / METADATA for below in folders for parent in (below, *below.parents)}
    names = {name.lower() for image in bare for name in (image.stem, image.name)}
    others = {name.lower() for image in images for name in (image.stem, image.name)} - names
    named, strange = [], []
    for text in texts:
        name = text.stem.lower()
        if text in read or name in others:
            continue
        is_named = name in names or (text.suffix.lower() in _TABLES and _names_one(text, bare))
        (named if is_named else strange).append(text)
    return named, strange


def _names_one(table: Path, images: list[Path]) -> bool:
    with suppress(OSError), open_regular(table) as file:
        data = file.read(LARGEST_METADATA)
        return any(image.stem.encode(errors="replace") in data for image in images[:_TRIED])
    return False


# ---------------------------------------------------------------- metadata.jsonl


def _normalize(name: str) -> str:
    # macOS stores decomposed accents, Windows tools write backslashes
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def _read_metadata(path: Path, captions: Captions) -> _Table:
    """Returns the captions of one file, None in lines without; empty if there is no such file.

    Lines that name no image go to `captions.stray`.
    """
    table: _Table = {}
    if not os.path.lexists(path):
        return table
    stray = 0
    # split at line feeds only: str.splitlines also cuts at U+2028, which JSON strings may hold
    lines = read_text(path, LARGEST_METADATA, captions.guessed).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            name, text = _parse_line(where, line)
        except FluxfastError as error:
            stray += 1
            if stray <= _LISTED:
                captions.stray.append(error)
            continue
        known = table.setdefault(name, text)
        if known is None:
            table[name] = text
        elif text is not None and known != text:
            table[name] = FluxfastError(f"{where}: a second caption for {name}")
    if stray > _LISTED:
        message = f"{path}: {stray - _LISTED} more lines name no image"
        captions.stray.append(FluxfastError(message))
    return table


def _useless(
    parent: Path, folder: Path, table: _Table, found: dict, captions: Captions
) -> list[str]:
    """Returns what is wrong with lines whose caption no image gets."""
    images = {name: found.get((parent, name), parent) for name in table}
    gone = [name for name in table if images[name] is parent and not os.path.lexists(parent / name)]
    empty = [name for name, image in images.items() if captions.texts.get(image, "") is None]
    reasons = {"name no picture that is here": gone, 'have neither "text" nor "caption"': empty}
    where = (parent / METADATA).relative_to(folder)
    return [
        f"{where}: {len(names)} of {len(table)} lines {reason}: {listed(names)}"
        for reason, names in reasons.items()
        if names
    ]


def listed(names: list[str], most: int = 3) -> str:
    """Returns the first few names."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _parse_line(where: str, line: str) -> tuple[str, str | FluxfastError | None]:
    """Returns the file name, and its caption or the error in it. Raises FluxfastError without a
    file name.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FluxfastError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise FluxfastError(f'{where}: needs "file_name" and "text" or "caption"')
    name = _normalize(row["file_name"])
    text = row.get("text") if row.get("text") is not None else row.get("caption")
    try:
        return name, None if text is None else _checked(where, text)
    except FluxfastError as error:
        return name, error


# ---------------------------------------------------------------- encodings


def read_text(path: Path, largest: int, guessed: list[Path]) -> str:
    """Returns a text file's content with spaces in place of control characters.

    largest: bytes. guessed: gets the path if the encoding was guessed. Raises FluxfastError naming
    the file if it cannot be read, is larger, or is in an unknown encoding.
    """
    try:
        with open_regular(path) as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise FluxfastError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > largest:
        raise FluxfastError(f"{path} is larger than {largest} bytes")
    try:
        text, is_guess = decode(data)
    except ValueError as error:
        raise FluxfastError(f"{path} {error}", hint="save it as UTF-8") from None
    if is_guess:
        guessed.append(path)
    return _CONTROL.sub(" ", text)


def decode(data: bytes) -> tuple[str, bool]:
    """Returns the text, and whether it was guessed to be Windows-1252.

    Takes UTF-8; UTF-16 and UTF-32 with a byte order mark, UTF-16 of mostly Latin letters without
    one; Windows-1252 (Latin-1 and more) if it can be nothing else. Raises ValueError with what the
    data is not.
    """
    if data and not data.strip(b"\0"):  # a crash may leave this of a file
        raise ValueError("holds nothing but zeros")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), None)
    encoding = encoding or _utf16_without_mark(data) or "utf-8"
    try:
        return data.decode(encoding), False
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            kind = re.findall(r"utf-\d+", encoding)[0].upper()
            raise ValueError(f"is damaged {kind} text (byte {error.start})") from None
        # accented letters stand alone or in pairs, letters of other scripts in longer runs; a valid
        # UTF-8 letter means damaged UTF-8; the last group is undefined in Windows-1252
        if not re.search(rb"[\x80-\xff]{3}|[\xc2-\xdf][\x80-\xbf]|[\x81\x8d\x8f\x90\x9d]", data):
            return data.decode("cp1252"), True
        raise ValueError(
            f"is not UTF-8 (byte {error.start}), nor UTF-16, nor Western European text"
        ) from None


def _utf16_without_mark(data: bytes) -> str | None:
    """Recognized by zeros in every second byte, which no other text has."""
    low, high = data[::2].count(0), data[1::2].count(0)
    if not data or 4 * max(low, high) < len(data):
        return None
    return "utf-16-le" if high > low else "utf-16-be"
