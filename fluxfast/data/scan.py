"""The scan: which images there are, their content hashes, sizes, buckets and masks; and what of a
data set cannot be used.
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
from fluxfast.data import images
from fluxfast.data.buckets import bucket_size
from fluxfast.data.store import SPACE_HINT
from fluxfast.errors import FluxfastError
from fluxfast.util.files import open_regular, write_atomic

log = logging.getLogger(__name__)

LARGEST = 2**31  # bytes: 179 megapixels of four 16-bit numbers, uncompressed, take 1.4 GB
_LISTED = 5  # of an error that names several


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
    """Why files are left out: logged at once, a line a file, and counted at the end; or, where the
    data is to be used strictly, gathered to end the run. pictures: the images left out.
    """

    def __init__(self):
        self.pictures: set[Path] = set()
        self._messages: set[str] = set()
        self._refused: list[FluxfastError] = []

    def add(self, error: FluxfastError, strict: bool, image: Path | None = None) -> None:
        """error: names the file and the reason. image: what is not trained on for it, if it is one
        image. A file that spoils several is logged once.
        """
        if image is not None:
            self.pictures.add(image)
        if error.message in self._messages:
            return
        self._messages.add(error.message)
        if strict:
            self._refused.append(error)
        else:
            log.warning(f"skipped: {error.message}")

    def check(self) -> None:
        """Raises FluxfastError for what was refused so far, all of it at once."""
        refused = self._refused
        if len(refused) == 1:
            raise refused[0]
        if refused:
            more = "; …" if len(refused) > _LISTED else ""
            listed = "; ".join(error.message for error in refused[:_LISTED]) + more
            raise FluxfastError(
                f"{len(refused)} files cannot be used: {listed}", hint=refused[0].hint
            )

    def conclude(self, total: int) -> None:
        """Log how many of `total` pictures are left out, if anything was."""
        if self._messages:
            log.warning(
                f"{len(self.pictures)} of {total} pictures skipped; strict: true beside "
                "data.folder makes that an error"
            )


def scan_folders(
    folders: list[DataConfig],
    index_path: Path,
    report: SkipReport,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[list[ScannedImage]]:
    """The images of each data folder, in the order of their names.

    index_path: a JSON file that keeps the size of every content hash; a lost one is built again.
    report: gets what cannot be read, is too small, or lacks its mask.
    Raises FluxfastError for a missing folder, and for what is refused there.
    """
    found = [_find(data, report) for data in folders]
    total = sum(map(len, found))
    index = _SizeIndex(index_path)
    scanned: list[list[ScannedImage]] = []
    done = 0
    for data, paths in zip(folders, found, strict=True):
        scanned.append([])
        for path in paths:
            try:
                scanned[-1].append(_scan(data, path, index))
            except FluxfastError as error:
                report.add(error, data.strict, path)
            done += 1
            progress("hash", done, total)
    index.save()
    report.check()
    return scanned


def _scan(data: DataConfig, path: Path, index: "_SizeIndex") -> ScannedImage:
    content = content_hash(path)
    width, height = index.size(path, content)
    try:
        buckets = tuple(bucket_size(width, height, resolution) for resolution in data.resolution)
    except FluxfastError as error:
        raise FluxfastError(f"the image {path}: {error.message}", hint=error.hint) from None
    mask = _find_mask(data, path) if data.mask == "folder" else None
    return ScannedImage(
        path=path,
        name=path.relative_to(data.folder).as_posix(),
        hash=content,
        buckets=buckets,
        mask=mask,
        mask_hash=content_hash(mask) if mask else None,
    )


def _find(data: DataConfig, report: SkipReport) -> list[Path]:
    """Images of a data folder; a mask folder that lies inside it is left out."""
    paths = images.find_images(
        data.folder, data.recursive, lambda error: report.add(error, data.strict)
    )
    if data.mask_folder is None:
        return paths
    folder, masks = _real(data.folder), _real(data.mask_folder)
    if masks != folder and masks.is_relative_to(folder):
        paths = [path for path in paths if not _real(path).is_relative_to(masks)]
        if not paths:
            raise FluxfastError(
                f"no images in {data.folder} beside the masks in {data.mask_folder}"
            )
    return paths


def _real(path: Path) -> Path:
    """Links followed; one that leads round in a circle is left as it is (`resolve` would raise)."""
    return Path(os.path.realpath(path))


def _find_mask(data: DataConfig, image: Path) -> Path:
    assert data.mask_folder is not None  # Config requires it
    stem = data.mask_folder / image.relative_to(data.folder)
    for extension in images.EXTENSIONS:
        for spelling in (extension, extension.upper()):
            if os.path.lexists(mask := stem.with_suffix(spelling)):
                return mask
    raise FluxfastError(
        f"no mask for {image}: expected {stem.with_suffix('.png')}",
        hint="give each image a mask, or put the others in a `data` entry of their own",
    )


class _SizeIndex:
    """Width and height by content hash: a PNG must be decoded whole to learn its orientation.

    The file's first line is the checksum of its second.
    """

    def __init__(self, path: Path):
        self.path, self.changed, self.sizes = path, False, {}
        try:
            checksum, _, text = path.read_text(encoding="ascii").partition("\n")
            if checksum == _checksum(text):
                self.sizes = {key: (w, h) for key, (w, h) in json.loads(text).items()}
        except (OSError, ValueError):  # absent or damaged: measured again
            pass

    def size(self, path: Path, content: str) -> tuple[int, int]:
        if content not in self.sizes:
            self.sizes[content] = images.image_size(path)
            self.changed = True
        return self.sizes[content]

    def save(self) -> None:
        if self.changed:
            text = json.dumps(self.sizes)
            write_atomic(self.path, f"{_checksum(text)}\n{text}".encode(), hint=SPACE_HINT)


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def content_hash(path: Path) -> str:
    """sha256 of an image file. Raises FluxfastError where it cannot be read, and for one larger
    than any picture that is decoded.
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
