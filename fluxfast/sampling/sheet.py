"""Contact sheets: pictures side by side, labeled."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from fluxfast.sampling.picture import read_png
from fluxfast.util.files import write_atomic

_CELL, _LEFT, _TOP, _GAP = 256, 160, 24, 4  # pixels of the contact sheet


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Path | None]]], columns: list[str], path: Path
) -> None:
    """Write a picture with a row per prompt and a column per step; a missing preview stays blank.

    rows: (prompt, a PNG file per column).
    """
    size = _LEFT + _CELL * len(columns), _TOP + (_CELL + _GAP) * len(rows)
    sheet = Image.new("RGB", size, (250, 250, 250))
    pen = ImageDraw.Draw(sheet)
    for x, title in enumerate(columns):
        pen.text((_LEFT + x * _CELL + 4, 6), title, fill=(0, 0, 0))
    for y, (prompt, files) in enumerate(rows):
        top = _TOP + y * (_CELL + _GAP)
        latin = prompt.encode("latin-1", "replace").decode("latin-1")  # all that PIL's font has
        for line, text in enumerate(textwrap.wrap(latin, 24)[:12]):
            pen.text((6, top + 14 * line + 4), text, fill=(0, 0, 0))
        for x, file in enumerate(files):
            picture = read_png(file) if file and file.is_file() else None
            if picture is not None:
                sheet.paste(_fitted(picture, _CELL - 4), (_LEFT + x * _CELL, top))
    sheet.save(buffer := io.BytesIO(), "PNG")
    write_atomic(path, buffer.getvalue())


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """Returns the picture at most `side` pixels wide and high, tiny ones in larger pixels."""
    if (factor := side // max(picture.size)) > 1:
        size = picture.width * factor, picture.height * factor
        picture = picture.resize(size, Image.Resampling.NEAREST)
    picture.thumbnail((side, side))
    return picture
