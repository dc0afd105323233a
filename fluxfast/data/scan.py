"""The scan: which images there are, their content hashes, sizes, buckets and masks."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fluxfast.config import DataConfig
from fluxfast.data import images
from fluxfast.data.buckets import bucket_size
from fluxfast.data.store import SPACE_HINT
from fluxfast.errors import FluxfastError
from fluxfast.files import write_atomic


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


def scan_folders(
    folders: list[DataConfig],
    index_path: Path,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[list[ScannedImage]]:
    """The images of each data folder, in the order of their names.

    index_path: a JSON file that keeps the size of every content hash; a lost one is built again.
    Raises FluxfastError for a missing folder, and once for all images that cannot be read, are too
    small, or lack their mask.
    """
    found = [_find(data) for data in folders]
    total = sum(map(len, found))
    index = _SizeIndex(index_path)
    scanned: list[list[ScannedImage]] = []
    broken: list[FluxfastError] = []
    done = 0
    for data, paths in zip(folders, found, strict=True):
        scanned.append([])
        for path in paths:
            try:
                scanned[-1].append(_scan(data, path, index))
            except FluxfastError as error:
                broken.append(error)
            done += 1
            progress("hash", done, total)
    index.save()
    if len(broken) > 1:
        listed = "; ".join(error.message for error in broken[:5]) + (
            "; …" if len(broken) > 5 else ""
        )
        raise FluxfastError(f"{len(broken)} of {total} images: {listed}", hint=broken[0].hint)
    if broken:
        raise broken[0]
    return scanned


def _scan(data: DataConfig, path: Path, index: "_SizeIndex") -> ScannedImage:
    content = _hash(path)
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
        mask_hash=_hash(mask) if mask else None,
    )


def _find(data: DataConfig) -> list[Path]:
    """Images of a data folder; a mask folder that lies inside it is left out."""
    paths = images.find_images(data.folder, data.recursive)
    if data.mask_folder is None:
        return paths
    folder, masks = data.folder.resolve(), data.mask_folder.resolve()
    if masks != folder and masks.is_relative_to(folder):
        paths = [path for path in paths if not path.resolve().is_relative_to(masks)]
        if not paths:
            raise FluxfastError(
                f"no images in {data.folder} beside the masks in {data.mask_folder}"
            )
    return paths


def _find_mask(data: DataConfig, image: Path) -> Path:
    stem = data.mask_folder / image.relative_to(data.folder)
    for extension in images.EXTENSIONS:
        for spelling in (extension, extension.upper()):
            if (mask := stem.with_suffix(spelling)).is_file():
                return mask
    raise FluxfastError(
        f"no mask for {image}: expected {stem.with_suffix('.png')}",
        hint="give each image a mask, or put the others in a `data` entry of their own",
    )


class _SizeIndex:
    """Width and height by content hash: a PNG must be decoded whole to learn its orientation."""

    def __init__(self, path: Path):
        self.path, self.changed = path, False
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            self.sizes = {str(key): (int(w), int(h)) for key, (w, h) in known.items()}
        except (
            OSError,
            ValueError,
            TypeError,
            AttributeError,
        ):  # absent or damaged: measured again
            self.sizes = {}

    def size(self, path: Path, content: str) -> tuple[int, int]:
        if content not in self.sizes:
            self.sizes[content] = images.image_size(path)
            self.changed = True
        return self.sizes[content]

    def save(self) -> None:
        if self.changed:
            write_atomic(self.path, json.dumps(self.sizes).encode(), hint=SPACE_HINT)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1024 * 1024):
                digest.update(block)
    except OSError as error:
        raise FluxfastError(f"cannot read the image {path}: {error.strerror or error}") from None
    return digest.hexdigest()
