"""Captions: where an image's text comes from, in whatever encoding, and the variants it is trained
with.
"""

import codecs
import json
import os
import posixpath
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from fluxfast import rng
from fluxfast.errors import FluxfastError
from fluxfast.util.files import open_regular

LARGEST = 1_000_000  # bytes of a sidecar: T5 reads 512 tokens of it
LARGEST_METADATA = 2**28  # bytes
METADATA = "metadata.jsonl"
_LISTED = 5  # lines of a metadata file that name no image, each with its reason; more are counted
PLACEHOLDER = "[trigger]"

# the longer mark first: UTF-32's begins as UTF-16's does
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# tabs and line breaks stay; the others say nothing, and a terminal would obey them
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]+")


@dataclass
class Captions:
    """What was read for a folder's images, and what could not be."""

    # image -> caption; None where there is none
    texts: dict[Path, str | None] = field(default_factory=dict)
    # image -> why its caption cannot be used
    unread: dict[Path, FluxfastError] = field(default_factory=dict)
    # about lines of metadata that name no image
    stray: list[FluxfastError] = field(default_factory=list)
    # text files taken for Windows-1252
    guessed: list[Path] = field(default_factory=list)


def read_captions(folder: Path, images: list[Path], extension: str = ".txt") -> Captions:
    """The caption of each image, stripped; None where there is none, "" where the sidecar is empty.

    A sidecar (same stem, `extension`) wins over `metadata.jsonl`, which is looked up in the image's
    own folder, then in its parents up to `folder`. Its lines hold `file_name`, relative to it, and
    `text` or `caption`. What cannot be read is in the result, with its reason; nothing is raised.
    """
    captions = Captions()
    tables: dict[Path, dict[str, str | FluxfastError]] = {}
    for image in images:
        try:
            captions.texts[image] = _caption(image, folder, extension, tables, captions)
        except FluxfastError as error:
            captions.unread[image] = error
    return captions


def _caption(image: Path, folder: Path, extension: str, tables: dict, captions: Captions):
    sidecar = image.with_suffix(extension)
    if os.path.lexists(sidecar):  # one that cannot be read is no missing one
        return _read_text(sidecar, LARGEST, captions).strip()
    for parent in image.parents:
        if parent not in tables:
            tables[parent] = _read_metadata(parent / METADATA, captions)
        text = tables[parent].get(_normalize(image.relative_to(parent).as_posix()))
        if isinstance(text, FluxfastError):
            raise text
        if text is not None:
            return text.strip()
        if parent == folder:
            break
    return None


def fill_missing(
    captions: dict[Path, str | None], default: str | None, trigger: str | None
) -> dict[Path, str]:
    """Put `default`, else the trigger alone, where a caption is missing.

    Raises FluxfastError that counts the images without captions and names the first few.
    """
    missing = [path for path, text in captions.items() if text is None]
    fallback = default if default is not None else clean_trigger(trigger)
    if missing and fallback is None:
        names = ", ".join(path.name for path in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise FluxfastError(
            f"{len(missing)} of {len(captions)} images have no caption: {names}",
            hint="put a .txt beside each, or set `data.default_caption` or `trigger`",
        )
    return {path: cast(str, fallback) if text is None else text for path, text in captions.items()}


def wrap_caption(caption: str, prefix: str | None = None, suffix: str | None = None) -> str:
    """`prefix caption suffix`, stripped; what is None or empty is left out."""
    return " ".join(part for part in (prefix, caption, suffix) if part).strip()


def apply_trigger(caption: str, trigger: str | None) -> str:
    """Replace every `[trigger]`; put the trigger in front of a caption that does not contain it as
    a word.

    An empty caption becomes the trigger alone. Raises FluxfastError for `[trigger]` without a
    trigger.
    """
    trigger = clean_trigger(trigger)
    if trigger is None:
        if PLACEHOLDER in caption:
            raise FluxfastError(
                f"a caption holds {PLACEHOLDER} but no trigger is set: {caption[:60]!r}",
                hint="set `trigger:`",
            )
        return caption
    caption = caption.replace(PLACEHOLDER, trigger)
    if _has_word(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def caption_variants(
    caption: str,
    content_hash: str,
    *,
    trigger: str | None = None,
    shuffle: bool = False,
    keep_tokens: int = 1,
    variants: int = 1,
    seed: int = 0,
) -> list[str]:
    """The prompts one image is trained with: the caption with its trigger, comma-shuffled if asked.

    Variant v keeps the first `keep_tokens` comma-separated parts and permutes the rest: a pure
    function of (seed, content_hash, v). Duplicates are removed, so there may be fewer than
    `variants`; never none.
    """
    caption = apply_trigger(caption, trigger)
    if not shuffle:
        return [caption]
    parts = [part.strip() for part in caption.split(",") if part.strip()]
    fixed, rest = parts[:keep_tokens], parts[keep_tokens:]
    texts = []
    for variant in range(variants):
        order = rng.permutation(seed, f"shuffle/{content_hash}", variant, len(rest))
        texts.append(", ".join(fixed + [rest[i] for i in order]))
    return list(dict.fromkeys(texts))


def clean_trigger(trigger: str | None) -> str | None:
    """Stripped; None if nothing is left."""
    return (trigger or "").strip() or None


def _has_word(text: str, word: str) -> bool:
    # "art" is not in "party"; only ASCII letters and digits bound a word, as in scripts without
    # spaces a trigger has letters next to it
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])", text) is not None


# ---------------------------------------------------------------- metadata.jsonl


def _normalize(name: str) -> str:
    # macOS stores decomposed accents, Windows tools write backslashes
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def _read_metadata(path: Path, captions: Captions) -> dict[str, str | FluxfastError]:
    """File name -> caption, or what is wrong with its line; empty without such a file. A line whose
    caption is null is left out, one that names no image goes to `captions.stray`.
    """
    table: dict[str, str | FluxfastError] = {}
    stray = 0
    if not os.path.lexists(path):
        return table
    # split at line feeds only: str.splitlines also cuts at U+2028, which JSON strings may hold
    lines = _read_text(path, LARGEST_METADATA, captions).split("\n")
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
        if text is not None and table.setdefault(name, text) != text:
            table[name] = FluxfastError(f"{where}: a second caption for {name}")
    if stray > _LISTED:
        message = f"{path}: {stray - _LISTED} more lines name no image"
        captions.stray.append(FluxfastError(message))
    return table


def _parse_line(where: str, line: str) -> tuple[str, str | FluxfastError | None]:
    """The file it names, and its caption or what is wrong with that. Raises FluxfastError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FluxfastError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise FluxfastError(f'{where}: needs "file_name" and "text" or "caption"')
    name = _normalize(row["file_name"])
    text = row.get("text") if row.get("text") is not None else row.get("caption")
    if text is None:
        return name, None
    if not isinstance(text, str):
        kind = type(text).__name__
        return name, FluxfastError(f"{where}: the caption must be text, got {kind}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return name, FluxfastError(f"{where}: the caption holds half a character (\\ud8..)")
    return name, _without_control(text)


# ---------------------------------------------------------------- text in whatever encoding


def _read_text(path: Path, largest: int, captions: Captions) -> str:
    text, guessed = read_text(path, largest)
    if guessed:
        captions.guessed.append(path)
    return text


def read_text(path: Path, largest: int) -> tuple[str, bool]:
    """The text without control characters, and whether its encoding was guessed.

    largest: bytes. Raises FluxfastError naming the file where it cannot be read, is larger, or is
    in an encoding that cannot be told.
    """
    try:
        with open_regular(path) as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise FluxfastError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > largest:
        raise FluxfastError(f"{path} is larger than {largest} bytes")
    try:
        text, guessed = decode(data)
    except ValueError as error:
        raise FluxfastError(f"{path} {error}", hint="save it as UTF-8") from None
    return _without_control(text), guessed


def _without_control(text: str) -> str:
    """Spaces in place of control characters, which a JSON string may have in escapes."""
    return _CONTROL.sub(" ", text)


def decode(data: bytes) -> tuple[str, bool]:
    """The text, and whether it was guessed to be Windows-1252.

    UTF-8; UTF-16 and UTF-32 with a mark, UTF-16 of mostly Latin letters without one; Windows-1252
    (Latin-1 and more) where it can be nothing else. Raises ValueError saying what the data is not.
    """
    if data and not data.strip(b"\0"):  # what a crash may leave of a file
        raise ValueError("holds nothing but zeros")
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    encoding = encoding or _utf16_without_mark(data) or "utf-8"
    try:
        return data.decode(encoding), False
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            kind = re.findall(r"utf-\d+", encoding)[0].upper()
            raise ValueError(f"is damaged {kind} text (byte {error.start})") from None
        if _is_western(data):
            return data.decode("cp1252"), True
        raise ValueError(
            f"is not UTF-8 (byte {error.start}), nor UTF-16, nor Western European text"
        ) from None


def _utf16_without_mark(data: bytes) -> str | None:
    """By zeros in every second byte, which no other text has."""
    low, high = data[::2].count(0), data[1::2].count(0)
    if not data or 4 * max(low, high) < len(data):
        return None
    return "utf-16-le" if high > low else "utf-16-be"


def _is_western(data: bytes) -> bool:
    """Whether all beyond ASCII stands alone or in pairs, as accented letters do: other scripts come
    in runs. A letter of UTF-8 among it means that it was UTF-8 before it was damaged.
    """
    runs = re.search(rb"[\x80-\xff]{3}|[\xc2-\xdf][\x80-\xbf]", data)
    undefined = re.search(rb"[\x81\x8d\x8f\x90\x9d]", data)
    return runs is None and undefined is None
