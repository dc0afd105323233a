"""Files that anybody made: regular ones only, of bounded size; text in whatever encoding.

A link is followed to what it names. A pipe or a device is never opened: it might not end.
"""

import codecs
import errno
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from fluxfast.errors import FluxfastError

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


def open_regular(path: Path) -> BinaryIO:
    """Open for reading. Raises OSError, for a pipe, a socket and a device too."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(path, "rb")


def read_text(path: Path, largest: int) -> tuple[str, bool]:
    """-> (the text without control characters, whether its encoding was guessed).

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
    return without_control(text), guessed


def without_control(text: str) -> str:
    """Spaces in place of control characters, which a JSON string may have in escapes."""
    return _CONTROL.sub(" ", text)


def decode(data: bytes) -> tuple[str, bool]:
    """-> (text, whether it was guessed to be Windows-1252).

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
            kind = re.match(r"utf-\d+", encoding)[0].upper()
            raise ValueError(f"is damaged {kind} text (byte {error.start})") from None
        if _is_western(data):
            return data.decode("cp1252"), True
        raise ValueError(
            f"is not UTF-8 (byte {error.start}), nor UTF-16, nor Western European text"
        ) from None


def _utf16_without_mark(data: bytes) -> str | None:
    """Told by zeros in every second byte, which no other text has."""
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
