"""Captions: where an image's text comes from and the variants it is trained with."""

import json
import posixpath
import re
import unicodedata
from pathlib import Path

from fluxfast import draws
from fluxfast.errors import FluxfastError

METADATA = "metadata.jsonl"
PLACEHOLDER = "[trigger]"


def read_captions(
    folder: Path, images: list[Path], extension: str = ".txt"
) -> dict[Path, str | None]:
    """The caption of each image, stripped; None where there is none, "" where the sidecar is empty.

    A sidecar (same stem, `extension`) wins over `metadata.jsonl`, which is looked up in the image's
    own folder, then in its parents up to `folder`. Its lines hold `file_name`, relative to it, and
    `text` or `caption`.
    Raises FluxfastError for text that is not UTF-8 and for a bad metadata line (naming file and
    line).
    """
    tables: dict[Path, dict[str, str]] = {}
    captions: dict[Path, str | None] = {}
    for image in images:
        sidecar = image.with_suffix(extension)
        if sidecar.is_file():
            captions[image] = _read_text(sidecar).strip()
            continue
        captions[image] = None
        for parent in _parents(image, folder):
            if parent not in tables:
                tables[parent] = _read_metadata(parent / METADATA)
            text = tables[parent].get(_normalise(image.relative_to(parent).as_posix()))
            if text is not None:
                captions[image] = text.strip()
                break
    return captions


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
        order = draws.permutation(seed, f"shuffle/{content_hash}", variant, len(rest))
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


def _normalise(name: str) -> str:
    # macOS stores decomposed accents, Windows tools write backslashes
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FluxfastError(
            f"{path} is not UTF-8 text (byte {error.start})", hint="save it as UTF-8"
        ) from None
    except OSError as error:
        raise FluxfastError(f"cannot read {path}: {error.strerror or error}") from None


def _read_metadata(path: Path) -> dict[str, str]:
    """File name -> caption; empty without such a file. A line whose caption is null is left out."""
    if not path.is_file():
        return {}
    table: dict[str, str] = {}
    # split at line feeds only: str.splitlines also cuts at U+2028, which JSON strings may hold
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FluxfastError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise FluxfastError(f'{path}, line {number}: needs "file_name" and "text" or "caption"')
        text = row.get("text") if row.get("text") is not None else row.get("caption")
        if text is None:
            continue
        if not isinstance(text, str):
            raise FluxfastError(
                f"{path}, line {number}: the caption must be text, got {type(text).__name__}"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise FluxfastError(
                f"{path}, line {number}: the caption holds half a character (\\ud8..)"
            )
        name = _normalise(row["file_name"])
        if table.setdefault(name, text) != text:
            raise FluxfastError(f"{path}, line {number}: a second caption for {name}")
    return table
