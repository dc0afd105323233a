"""The scan: finds images and masks, hashes them, assigns buckets, and reports files that cannot be
used.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fluxfast.config.schema import DataConfig
from fluxfast.data.buckets import bucket_size
from fluxfast.data.images import image_size
from fluxfast.data.store import SPACE_HINT
from fluxfast.errors import FluxfastError
from fluxfast.util.files import open_regular, write_atomic

log = logging.getLogger(__name__)

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
LARGEST = 2**31  # bytes: 179 megapixels of four 16-bit numbers, uncompressed, take 1.4 GB
_LISTED = 5  # files that an error names

Progress = Callable[[str, int, int], None]  # kind ("hash", "text", "latents"), done, total


@dataclass(frozen=True)
class ScannedImage:
    """name: relative to its data folder. hash, mask_hash: sha256 of the files.

    buckets: (width, height) in pixels for each entry of `data.resolution`.
    """

    path: Path
    name: str
    hash: str
    buckets: tuple[tuple[int, int], ...]
    mask: Path | None = None
    mask_hash: str | None = None


class SkipReport:
    """Files that cannot be used: each is logged at once and counted at the end or, with `strict`,
    collected into one error. images: those that are left out.
    """

    def __init__(self):
        self.images: set[Path] = set()
        self._messages: set[str] = set()
        self._refused: list[FluxfastError] = []

    def add(self, error: FluxfastError, strict: bool, image: Path | None = None) -> None:
        """error: names the file and the reason; logged once. image: left out because of it."""
        if image is not None:
            self.images.add(image)
        if error.message in self._messages:
            return
        self._messages.add(error.message)
        if strict:
            self._refused.append(error)
        else:
            log.warning(f"skipped: {error.message}")

    def check(self) -> None:
        """Raises FluxfastError if strict data has files that cannot be used."""
        if len(self._refused) == 1:
            raise self._refused[0]
        if self._refused:
            messages = [error.message for error in self._refused]
            more = "; …" if len(messages) > _LISTED else ""
            raise FluxfastError(
                f"{len(messages)} files cannot be used: {'; '.join(messages[:_LISTED])}{more}",
                hint=self._refused[0].hint,
            )

    def conclude(self, total: int) -> None:
        """Log how many of `total` images are left out, if any file was skipped."""
        if self._messages:
            log.warning(
                f"{len(self.images)} of {total} pictures skipped; strict: true beside "
                "data.folder makes that an error"
            )


def scan_folders(
    folders: list[DataConfig],
    index_path: Path,
    report: SkipReport,
    progress: Progress = lambda kind, done, total: None,
) -> list[list[ScannedImage]]:
    """Returns the images of each data folder, sorted by name.

    index_path: a JSON file of image sizes by content hash, rebuilt if missing or damaged. report:
    collects images that cannot be read, are too small, or lack their mask.
    Raises FluxfastError for a missing folder, and for what `report` refuses.
    """
    paths = [_find_images(data, report) for data in folders]
    total, done = sum(map(len, paths)), 0
    sizes = _read_sizes(index_path)
    known = len(sizes)
    scanned = []
    for data, own in zip(folders, paths, strict=True):
        images = []
        for path in own:
            try:
                images.append(_scan(data, path, sizes))
            except FluxfastError as error:
                report.add(error, data.strict, path)
            done += 1
            progress("hash", done, total)
        scanned.append(images)
    if len(sizes) > known:
        text = json.dumps(sizes)
        write_atomic(index_path, f"{_checksum(text)}\n{text}".encode(), hint=SPACE_HINT)
    report.check()
    return scanned


def _scan(data: DataConfig, path: Path, sizes: dict[str, tuple[int, int]]) -> ScannedImage:
    content = content_hash(path)
    if content not in sizes:
        sizes[content] = image_size(path)
    try:
        buckets = tuple(bucket_size(*sizes[content], resolution) for resolution in data.resolution)
    except FluxfastError as error:
        raise FluxfastError(f"the image {path}: {error.message}", hint=error.hint) from None
    mask = _find_mask(data, path) if data.mask == "folder" else None
    name = path.relative_to(data.folder).as_posix()
    return ScannedImage(path, name, content, buckets, mask, content_hash(mask) if mask else None)


def _find_images(data: DataConfig, report: SkipReport) -> list[Path]:
    """Returns the folder's images, sorted by relative path, without those in its mask folder.

    Skips dot files and dot folders, and follows links to folders, each real folder once.
    Raises FluxfastError if the folder is missing, unreadable or holds no image.
    """
    root = data.folder

    def unreadable(error: OSError) -> None:
        message = f"cannot read the folder {error.filename}: {error.strerror}"
        if Path(error.filename) == root:
            raise FluxfastError(message, hint="check `data.folder`")
        report.add(FluxfastError(message), data.strict)

    paths, visited = [], set()
    for parent, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if data.recursive and name[0] != ".")
        for name in files:
            if name[0] != "." and Path(name).suffix.lower() in EXTENSIONS:
                paths.append(Path(parent, name))
    excluded = ""
    if data.mask_folder is not None:
        # realpath, unlike `resolve`, takes circular links
        masks = Path(os.path.realpath(data.mask_folder))
        if Path(os.path.realpath(root)) in masks.parents:
            paths = [path for path in paths if masks not in Path(os.path.realpath(path)).parents]
            excluded = f" other than the masks in {data.mask_folder}"
    if not paths:
        raise FluxfastError(
            f"no images in {root}{excluded}",
            hint="`data.folder` takes jpg, jpeg, png and webp files",
        )
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _find_mask(data: DataConfig, image: Path) -> Path:
    assert data.mask_folder is not None  # Config requires it
    stem = data.mask_folder / image.relative_to(data.folder)
    for extension in EXTENSIONS:
        for spelling in (extension, extension.upper()):
            if os.path.lexists(mask := stem.with_suffix(spelling)):
                return mask
    raise FluxfastError(
        f"no mask for {image}: expected {stem.with_suffix('.png')}",
        hint="give each image a mask, or put the others in a `data` entry of their own",
    )


def _read_sizes(path: Path) -> dict[str, tuple[int, int]]:
    """Returns (width, height) by content hash: a PNG must be decoded whole to know its orientation.

    The file's first line is the checksum of its second.
    """
    try:
        checksum, _, text = path.read_text(encoding="ascii").partition("\n")
        if checksum == _checksum(text):
            return {key: (width, height) for key, (width, height) in json.loads(text).items()}
    except (OSError, ValueError):  # missing or damaged: measured again
        pass
    return {}


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def content_hash(path: Path) -> str:
    """Returns the sha256 of an image file. Raises FluxfastError if it cannot be read, or is larger
    than any image that is decoded.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST:
                raise FluxfastError(f"the image {path} is larger than {LARGEST // 2**30} GiB")
            while block := file.read(1024 * 1024):
                digest.update(block)
    except OSError as error:
        raise FluxfastError(f"cannot read the image {path}: {error.strerror or error}") from None
    return digest.hexdigest()
