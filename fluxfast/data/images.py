"""Decodes images of any kind to RGB and fits them to a bucket.

Embedded color profiles are not applied: pixels are taken as sRGB.
"""

import re
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fluxfast.errors import FluxfastError
from fluxfast.util.files import open_regular

# recognized by content, whatever the name; one of Pillow's other readers runs Ghostscript
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "HEIF")
# what Pillow may lack -> what it takes
LIBRARIES = {"AVIF": "pip install pillow-avif-plugin", "HEIF": "pip install pillow-heif"}

# what else lies under a picture's name -> how it begins
_CONTENTS = {
    "HEIC": rb"....ftyp(hei[cmsx]|hev[cmsx]|mif\d|msf1)",
    "AVIF": rb"....ftypavi[fs]",
    "a video": rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ",
    "JPEG XL": rb"\xff\n|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP|\xffO\xffQ",
    "a Photoshop file": rb"8BPS",
    "a PDF": rb"%PDF",
    "a web page": rb"\s*<(?i:!doctype html|html|head)",
    "SVG or XML": rb"\s*<(\?xml|svg)",
    "a Git LFS pointer (`git lfs pull`)": rb"version https://git-lfs",
    "a ZIP archive": rb"PK\x03\x04",
    "a picture": rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*",
}

_STRIP = 64  # rows

# EXIF orientation -> what turns the stored pixels upright; 5 to 8 swap width and height
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def formats() -> tuple[str, ...]:
    """Returns those of FORMATS that are read here: AVIF as Pillow was built or with its plugin,
    HEIF with pillow-heif.
    """
    Image.init()
    with suppress(ImportError):
        import pillow_heif  # pyright: ignore[reportMissingImports]

        pillow_heif.register_heif_opener()
    with suppress(ImportError):
        if "AVIF" not in Image.SAVE:
            import pillow_avif  # pyright: ignore[reportMissingImports]  # noqa: F401
    # without libavif Pillow opens none, and yet registers for it
    lacks = {"AVIF"} - Image.SAVE.keys()
    return tuple(name for name in FORMATS if name in Image.OPEN and name not in lacks)


def content(path: Path) -> str | None:
    """Returns what a file is by how it begins, None if that is not known."""
    try:
        with open_regular(path) as file:
            head = file.read(64)
    except OSError:
        return None
    return next((kind for kind, start in _CONTENTS.items() if re.match(start, head, re.S)), None)


def image_size(path: Path, quick: bool = False) -> tuple[int, int]:
    """Returns (width, height) in pixels with EXIF orientation applied. Raises as `load_image` does.

    Reads only the header, except for a PNG, whose EXIF block may follow the pixels (quick: which is
    then not looked for), and for a TIFF, which Pillow turns upright itself.
    """
    with _open(path) as image:
        if quick and image.format == "PNG":
            return image.size
        if image.format == "TIFF":
            return _decode(path).size
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def load_image(path: Path) -> tuple[Image.Image, Image.Image | None]:
    """Returns (RGB image, alpha as an L image or None), upright, with alpha composited on white.

    16-bit, 32-bit and float gray are scaled to 8 bits by their full range.
    Raises FluxfastError naming the file if it is missing, truncated, not an image, an animation or
    several pages, or larger than Pillow's limit.
    """
    image = _decode(path)
    if image.mode == "RGB":
        return image, None
    return _composite(image, "white"), image.getchannel("A")


def load_mask(path: Path) -> Image.Image:
    """Returns a mask as an L image, upright; transparent parts are black."""
    image = _decode(path)
    return (image if image.mode == "RGB" else _composite(image, "black")).convert("L")


def fit_image(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Resizes (Lanczos) to cover `size` = (W, H) and crops to the center.

    Returns fp32 [3, H, W] in -1..1.
    """
    box = center_box(image.size, size)
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box))
    tensor = torch.tensor(pixels).permute(2, 0, 1).to(torch.float32)
    return tensor.div_(127.5).sub_(1.0).contiguous()


def fit_mask(mask: Image.Image, size: tuple[int, int], factor: int) -> Tensor:
    """Crops a mask as `fit_image` does and averages it over areas.

    mask: L image of the image's aspect, any resolution. factor: pixels per latent along a side.
    Returns fp32 [H / factor, W / factor] in 0..1.
    """
    box = center_box(mask.size, size)
    values = mask.convert("F").resize(size, Image.Resampling.BILINEAR, box=box)
    pixels = torch.tensor(np.asarray(values, dtype=np.float32)).div_(255.0)
    return torch.nn.functional.avg_pool2d(pixels[None], factor)[0].clamp_(0.0, 1.0)


def center_box(source: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Returns the largest centered part of `source` with the aspect of `size`, in its pixels."""
    (width, height), (new_width, new_height) = source, size
    scale = max(new_width / width, new_height / height)
    left = max(0.0, (width - new_width / scale) / 2)
    top = max(0.0, (height - new_height / scale) / 2)
    return left, top, width - left, height - top


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of what it refuses
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=formats())
        # a TIFF may decode a tile of any size for an image that is small
        width, height = (getattr(image, "tag_v2", {}).get(tag, 0) for tag in (322, 323))
        if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"a tile is {width}x{height} pixels")
        several = _holds_several(image)
    except Image.DecompressionBombError as error:
        raise FluxfastError(
            f"the image {path} is too large to decode safely: {error}", hint="scale it down first"
        ) from None
    except Exception as error:  # plugins raise what they like while they read a header
        if isinstance(error, OSError) and error.errno is not None:
            raise FluxfastError(f"cannot read the image {path}: {error.strerror}") from None
        raise _unreadable(path, error) from None
    if several:
        raise FluxfastError(
            f"{path} holds several pictures, frames or pages",
            hint="save the one that is meant as a file of its own",
        )
    return image


def _holds_several(image: Image.Image) -> bool:
    """Not of MPO and HEIF, whose further pictures belong to the first."""
    if image.format != "TIFF":
        animations = ("GIF", "PNG", "WEBP", "AVIF")
        return image.format in animations and getattr(image, "is_animated", False)
    several = False
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no second page, or nothing that anybody could read
        image.seek(1)
        several = not getattr(image, "tag_v2", {}).get(254, 0) & 5  # 1: smaller, 4: its mask
    image.seek(0)
    return several


def _unreadable(path: Path, error: Exception) -> FluxfastError:
    kind, hint, detail = content(path) or "a picture", "replace or remove it", ""
    form = kind.replace("HEIC", "HEIF")
    if not isinstance(error, UnidentifiedImageError) or kind == "a picture":
        kind = "not an image that can be read"
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {_words(error)}"
    elif form in LIBRARIES and form not in formats():
        hint = LIBRARIES[form]
        detail = f" by its content: `{hint}`"
    else:
        detail = " by its content" + ", and broken" * (form in formats())
    return FluxfastError(f"{path} is {kind}{detail}", hint=hint)


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _decode(path: Path) -> Image.Image:
    """Returns an RGB image, or RGBA if the file carries transparency of any kind."""
    with _open(path) as image:
        try:
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            image = _to_8_bit(image)
        # Pillow's decoders raise anything from SyntaxError to struct.error
        except Exception as error:
            raise FluxfastError(
                f"the image {path} is broken or truncated: {_words(error)}",
                hint="replace or remove it",
            ) from None
        return image.transpose(turn) if turn is not None else image


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # a mangled EXIF block is common and says nothing about the pixels
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _scale_gray(image)
    transparent = image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def _scale_gray(image: Image.Image) -> Image.Image:
    """Scales gray of more than 8 bits by its range (`convert` clips values above 255 to white)."""
    values = np.asarray(image)
    # a strip at a time: in doubles the largest image that is read would take gigabytes
    strips = [slice(row, row + _STRIP) for row in range(0, len(values), _STRIP)]

    def doubles(rows: slice) -> np.ndarray:
        return np.nan_to_num(values[rows].astype(np.float64))

    top = max(doubles(rows).max() for rows in strips)
    if image.mode == "F" and top <= 1.0:
        limit = 1.0
    elif image.mode == "F" and top <= 255.0:
        limit = 255.0
    else:
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # 12 in some TIFFs
        limit = 2.0 ** min(bits, 16) - 1 if top <= 65535 else float(2**31 - 1)
    gray = np.empty(values.shape, np.uint8)
    for rows in strips:
        gray[rows] = np.clip(np.round(doubles(rows) / limit * 255.0), 0, 255)
    result = Image.fromarray(gray).convert("RGB")
    color_key = image.info.get("transparency")
    if isinstance(color_key, int):
        result.putalpha(Image.fromarray((values != color_key).astype(np.uint8) * np.uint8(255)))
    return result


def _composite(image: Image.Image, color: str) -> Image.Image:
    ground = Image.new("RGBA", image.size, color)
    ground.alpha_composite(image)
    return ground.convert("RGB")
