"""Captions: where an image's text comes from and the variants it is trained with."""

import json
import os
import posixpath
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from fluxfast import rng
from fluxfast.data.reading import read_text, without_control
from fluxfast.errors import FluxfastError

LARGEST = 1_000_000  # bytes of a sidecar: T5 reads 512 tokens of it
LARGEST_METADATA = 2**28  # bytes
METADATA = "metadata.jsonl"
_TOLD = 5  # lines of a metadata file that name no image, each with its reason; more are counted
PLACEHOLDER = "[trigger]"


@dataclass
class Captions:
    """What was read for a folder's images, and what could not be."""

    texts: dict[Path, str | None]  # image -> caption; None where there is none
    unread: dict[Path, FluxfastError]  # image -> why its caption cannot be used
    stray: list[FluxfastError]  # about lines of metadata that name no image
    guessed: list[Path]  # text files taken for Windows-1252


def read_captions(folder: Path, images: list[Path], extension: str = ".txt") -> Captions:
    """The caption of each image, stripped; None where there is none, "" where the sidecar is empty.

    A sidecar (same stem, `extension`) wins over `metadata.jsonl`, which is looked up in the image's
    own folder, then in its parents up to `folder`. Its lines hold `file_name`, relative to it, and
    `text` or `caption`. What cannot be read is in the result, with its reason; nothing is raised.
    """
    found = Captions({}, {}, [], [])
    tables: dict[Path, dict[str, str | FluxfastError]] = {}
    for image in images:
        try:
            found.texts[image] = _caption(image, folder, extension, tables, found)
        except FluxfastError as error:
            found.unread[image] = error
    return found


def _caption(image: Path, folder: Path, extension: str, tables: dict, found: Captions):
    sidecar = image.with_suffix(extension)
    if os.path.lexists(sidecar):  # one that cannot be read is no missing one
        return _read_text(sidecar, LARGEST, found).strip()
    for parent in _parents(image, folder):
        if parent not in tables:
            tables[parent] = _read_metadata(parent / METADATA, found)
        text = tables[parent].get(_normalize(image.relative_to(parent).as_posix()))
        if isinstance(text, FluxfastError):
            raise text
        if text is not None:
            return text.strip()
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
    return {path: fallback if text is None else text for path, text in captions.items()}


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
    kept, rest = parts[:keep_tokens], parts[keep_tokens:]
    texts = []
    for variant in range(variants):
        order = rng.permutation(seed, f"shuffle/{content_hash}", variant, len(rest))
        texts.append(", ".join(kept + [rest[i] for i in order]))
    return list(dict.fromkeys(texts))


def clean_trigger(trigger: str | None) -> str | None:
    """Stripped; None if nothing is left."""
    return (trigger or "").strip() or None


def _has_word(text: str, word: str) -> bool:
    # "art" is not in "party"; only ASCII letters and digits bound a word, as in scripts without
    # spaces a trigger has letters next to it
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])", text) is not None


def _parents(image: Path, folder: Path) -> list[Path]:
    """The image's folder and its parents up to `folder`, nearest first."""
    parents = []
    for parent in image.parents:
        parents.append(parent)
        if parent == folder:
            break
    return parents


def _normalize(name: str) -> str:
    # macOS stores decomposed accents, Windows tools write backslashes
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def _read_text(path: Path, largest: int, found: Captions) -> str:
    text, guessed = read_text(path, largest)
    if guessed:
        found.guessed.append(path)
    return text


def _read_metadata(path: Path, found: Captions) -> dict[str, str | FluxfastError]:
    """File name -> caption, or what is wrong with its line; empty without such a file. A line whose
    caption is null is left out, one that names no image goes to `found.stray`.
    """
    table: dict[str, str | FluxfastError] = {}
    stray = 0
    if not os.path.lexists(path):
        return table
    # split at line feeds only: str.splitlines also cuts at U+2028, which JSON strings may hold
    for number, line in enumerate(_read_text(path, LARGEST_METADATA, found).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            name, text = _metadata_line(place, line)
        except FluxfastError as error:
            stray += 1
            if stray <= _TOLD:
                found.stray.append(error)
            continue
        if text is not None and table.setdefault(name, text) != text:
            table[name] = FluxfastError(f"{place}: a second caption for {name}")
    if stray > _TOLD:
        found.stray.append(FluxfastError(f"{path}: {stray - _TOLD} more lines name no image"))
    return table


def _metadata_line(place: str, line: str) -> tuple[str, str | FluxfastError | None]:
    """-> (the file it names, its caption or what is wrong with that). Raises FluxfastError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FluxfastError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise FluxfastError(f'{place}: needs "file_name" and "text" or "caption"')
    name = _normalize(row["file_name"])
    text = row.get("text") if row.get("text") is not None else row.get("caption")
    if text is None:
        return name, None
    if not isinstance(text, str):
        said = f"{place}: the caption must be text, got {type(text).__name__}"
        return name, FluxfastError(said)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return name, FluxfastError(f"{place}: the caption holds half a character (\\ud8..)")
    return name, without_control(text)
