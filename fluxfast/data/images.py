"""Images in: find them, decode any kind to RGB, fit them to a bucket.

Embedded color profiles are not applied: pixels are taken as sRGB.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fluxfast.errors import FluxfastError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
# by content, whatever the name says; of Pillow's other readers one runs Ghostscript on what it gets
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")

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


def find_images(
    folder: Path,
    recursive: bool = True,
    on_error: Callable[[FluxfastError], None] | None = None,
) -> list[Path]:
    """Every jpg, jpeg, png and webp below `folder` (any case), sorted by relative path.

    recursive: in the folders below it too, else in `folder` alone. Dot files and dot folders are
    skipped; links to folders are followed, each real folder once. on_error: gets the error of a
    folder below that cannot be read, which is raised without it.
    Raises FluxfastError if the folder is missing, unreadable or holds no image.
    """
    folder = Path(folder)
    try:
        is_folder = folder.is_dir()
    except OSError as error:  # it lies in one that may not be entered
        raise FluxfastError(f"cannot read the folder {folder}: {error.strerror}") from None
    if not is_folder:
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise FluxfastError(f"the image folder {folder} {problem}", hint="check `data.folder`")

    def unreadable(error: OSError) -> None:
        problem = FluxfastError(f"cannot read the folder {error.filename}: {error.strerror}")
        if on_error is None or Path(error.filename) == folder:
            raise problem
        on_error(problem)

    paths, visited = [], set()
    for parent, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                paths.append(Path(parent, name))
    if not paths:
        raise FluxfastError(
            f"no images in {folder}", hint="`data.folder` takes jpg, jpeg, png and webp files"
        )
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels as the image is seen, EXIF orientation applied.

    Reads the header only, save for a PNG, whose EXIF block may follow the pixels, and for a TIFF,
    which Pillow turns upright itself.
    Raises FluxfastError naming the file if it is no image or larger than Pillow's limit.
    """
    with _open(path) as image:
        if image.format == "TIFF":
            return _decode(path).size
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def load_image(path: Path) -> tuple[Image.Image, Image.Image | None]:
    """Decode to (RGB image, alpha as an L image or None), upright, alpha composited on white.

    Of an animation, the first frame. 16-bit, 32-bit and float gray are scaled to 8 bits by their
    full range.
    Raises FluxfastError naming the file if it is missing, truncated, no image or larger than
    Pillow's limit.
    """
    image = _decode(path)
    if image.mode == "RGB":
        return image, None
    return _composite(image, "white"), image.getchannel("A")


def load_mask(path: Path) -> Image.Image:
    """Decode a mask to one L image, upright; where it is transparent it counts as black."""
    image = _decode(path)
    return (image if image.mode == "RGB" else _composite(image, "black")).convert("L")


def fit_image(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Lanczos resize to cover `size` = (W, H), center crop -> fp32 [3, H, W] in -1..1."""
    box = _center_box(image.size, size)
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box))
    tensor = torch.tensor(pixels).permute(2, 0, 1).to(torch.float32)
    return tensor.div_(127.5).sub_(1.0).contiguous()


def fit_mask(mask: Image.Image, size: tuple[int, int], factor: int) -> Tensor:
    """The same crop for a mask, area-averaged -> fp32 [H / factor, W / factor] in 0..1.

    mask: L image of the image's aspect, any resolution. `factor`: pixels per latent along a side.
    """
    box = _center_box(mask.size, size)
    values = mask.convert("F").resize(size, Image.Resampling.BILINEAR, box=box)
    pixels = torch.tensor(np.asarray(values, dtype=np.float32)).div_(255.0)
    return torch.nn.functional.avg_pool2d(pixels[None], factor)[0].clamp_(0.0, 1.0)


def _center_box(
    source: tuple[int, int], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The largest centered part of `source` that has the aspect of `size`, in source pixels."""
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
            image = Image.open(path, formats=FORMATS)
        _check_tiles(image)
        return image
    except Image.DecompressionBombError as error:
        raise FluxfastError(
            f"the image {path} is too large to decode safely: {error}", hint="scale it down first"
        ) from None
    except Exception as error:  # plugins raise what they like while they read a header
        if isinstance(error, OSError) and error.errno is not None:
            raise FluxfastError(f"cannot read the image {path}: {error.strerror}") from None
        unknown = isinstance(error, UnidentifiedImageError)  # whose words are these already
        reason = "" if unknown else f": {_words(error)}"
        raise FluxfastError(
            f"{path} is not an image that can be read{reason}", hint="replace or remove it"
        ) from None


def _check_tiles(image: Image.Image) -> None:
    """A TIFF may decode a tile of any size for a picture that is small."""
    width, height = (getattr(image, "tag_v2", {}).get(tag, 0) for tag in (322, 323))
    if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"a tile is {width}x{height} pixels")


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _decode(path: Path) -> Image.Image:
    """RGB, or RGBA where the file carries transparency of any kind."""
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
    """Gray deeper than 8 bits, scaled by its range (`convert` clips all above 255 to white)."""
    values = np.asarray(image)
    # a strip at a time: in doubles the largest picture that is read would take gigabytes
    strips = [slice(row, row + _STRIP) for row in range(0, len(values), _STRIP)]

    def doubles(rows: slice) -> np.ndarray:
        return np.nan_to_num(values[rows].astype(np.float64))

    top = max(doubles(rows).max() for rows in strips)
    if image.mode == "F" and top <= 1.0:
        limit = 1.0
    elif image.mode == "F" and top <= 255.0:
        limit = 255.0
    else:
        limit = 65535.0 if top <= 65535 else float(2**31 - 1)
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
