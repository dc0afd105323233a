"""The scan: finds images and masks, hashes them, assigns buckets, and reports files that are left
out or cannot be used.
"""

import hashlib
import json
import logging
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fluxfast.config.schema import DataConfig
from fluxfast.data.buckets import bucket_size
from fluxfast.data.captions import read_captions
from fluxfast.data.images import LIBRARIES, content, formats, image_size
from fluxfast.data.store import SPACE_HINT
from fluxfast.errors import FluxfastError
from fluxfast.util.files import open_regular, write_atomic

log = logging.getLogger(__name__)

_TAKES = {".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF"}  # of LIBRARIES
EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".apng", ".dib", ".jfif",
    ".jpe", ".mpo", *_TAKES,
)  # fmt: skip
_NOT_READ = """.jxl .psd .psb .xcf .kra .clip .ora .svg .svgz .eps .ai .jp2 .j2k .jpx .exr .hdr
    .tga .dds .ppm .pgm .pbm .pnm .pcx .qoi .avifs .heics .heifs .dng .cr2 .cr3 .nef .nrw .arw .orf
    .rw2 .raf .pef .srw .3fr .x3f"""
_VIDEOS = ".mp4 .mov .m4v .webm .mkv .avi .wmv .flv .mpg .mpeg .3gp"
_TEXTS = """.txt .caption .captions .cap .tag .tags .prompt .json .jsonl .csv .tsv .parquet .xml
    .yaml .yml .md"""

# what people call a picture's mask or control picture: `a_mask.png` beside `a.png`, `masks/a.png`
_MAP = (
    "(?:masks?|sapiens2_mask|depth|canny|pose|openpose|lines?|lineart|inpaint|seg|hed|scribble|"
    "softedge|matte|controls?|cond|conditioning)(?:[-_ ]?(?:maps?|images?|[0-9]+))?"
)
_MAP_OF = re.compile(rf"(?i)(.+?)[-_. ]{_MAP}|(?:masks?|depth|canny)[-_. ](.+)")
_MAP_FOLDER = re.compile(rf"(?i)_*{_MAP}_*")
_LABELS = re.compile(r"(?i).+-(mask|cond)label")  # OneTrainer's
# folders below a data folder whose pictures are none to train on
_FOLDERS = {
    "_controls_?": "control pictures",
    "(reg(s|ulari[sz]ation)?|class(?=[-_ ]))([-_ ]?(images?|data|pictures?))?": (
        "regularization pictures"
    ),
    r"@eadir|__macosx|[#@$]recycle(\.bin)?": "thumbnails or deleted pictures",
}
LARGEST = 2**31  # bytes: 179 megapixels of four 16-bit numbers, uncompressed, take 1.4 GB
_LISTED = 5  # files that an error names

Progress = Callable[[str, int, int], None]  # kind ("hash", "text", "latents"), done, total


@dataclass(frozen=True)
class ScannedImage:
    """name: relative to its data folder. hash, mask_hash: sha256 of the files.

    size: (width, height) in pixels; buckets: the same for each entry of `data.resolution`.
    """

    path: Path
    name: str
    hash: str
    size: tuple[int, int]
    buckets: tuple[tuple[int, int], ...]
    mask: Path | None = None
    mask_hash: str | None = None


@dataclass
class Found:
    """What a data folder holds: the images to train on, by name; those that `SkipReport` has named;
    reason -> pictures of kinds that are not read; reason -> what is no picture to train on; other
    files that may hold captions.
    """

    data: DataConfig
    images: list[ScannedImage] = field(default_factory=list)
    unusable: list[Path] = field(default_factory=list)
    not_read: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    aside: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    texts: list[Path] = field(default_factory=list)


class SkipReport:
    """Files that cannot be used: each is logged at once or, with `strict`, collected into one
    error.
    """

    def __init__(self):
        self._messages: set[str] = set()
        self._refused: list[FluxfastError] = []

    def add(self, error: FluxfastError, strict: bool) -> None:
        """error: names the file and the reason; logged once."""
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


def scan_folders(
    folders: list[DataConfig],
    index_path: Path | None,
    report: SkipReport,
    progress: Progress = lambda kind, done, total: None,
    *,
    outputs: Sequence[Path] = (),
) -> list[Found]:
    """Returns what each data folder holds, images sorted by name.

    index_path: a JSON file of image sizes by content hash, rebuilt if missing or damaged; without
    one nothing is hashed. report: collects images that cannot be read, are too small, or lack their
    mask. outputs: folders whose pictures are none to train on, where they lie in a data folder.
    Raises FluxfastError for a missing folder, and for what `report` refuses.
    """
    listed = [_list(data, report, outputs) for data in folders]
    total, done = sum(len(paths) for _, paths in listed), 0
    sizes = None if index_path is None else _read_sizes(index_path)
    known = len(sizes or ())
    for found, paths in listed:
        for path in paths:
            try:
                found.images.append(_scan(found.data, path, sizes))
            except FluxfastError as error:
                report.add(error, found.data.strict)
                found.unusable.append(path)
            done += 1
            progress("hash", done, total)
    if index_path is not None and sizes is not None and len(sizes) > known:
        text = json.dumps(sizes)
        write_atomic(index_path, f"{_checksum(text)}\n{text}".encode(), hint=SPACE_HINT)
    report.check()
    return [found for found, _ in listed]


def _scan(data: DataConfig, path: Path, sizes: dict[str, tuple[int, int]] | None) -> ScannedImage:
    if sizes is None:
        key, size = "", image_size(path, quick=True)
    else:
        key = content_hash(path)
        size = sizes[key] = sizes.get(key) or image_size(path)
    try:
        buckets = tuple(bucket_size(*size, resolution) for resolution in data.resolution)
    except FluxfastError as error:
        raise FluxfastError(f"the image {path}: {error.message}", hint=error.hint) from None
    mask = _find_mask(data, path) if data.mask == "folder" else None
    name = path.relative_to(data.folder).as_posix()
    return ScannedImage(path, name, key, size, buckets, mask, content_hash(mask) if mask else None)


def _list(
    data: DataConfig, report: SkipReport, outputs: Sequence[Path]
) -> tuple[Found, list[Path]]:
    """Returns what is left out of a folder, and the images in it, sorted by relative path.

    Raises FluxfastError if the folder is missing, unreadable or holds no image.
    """
    found, paths, excluded = Found(data), [], ""
    not_read: dict[Path, str] = {}  # file -> why
    for path in _walk(data, report):
        suffix = path.suffix.lower()
        takes = _TAKES.get(suffix)
        if takes is not None and takes not in formats():
            not_read[path] = f"{suffix} ({LIBRARIES[takes]})"
        elif suffix in EXTENSIONS:
            paths.append(path)
        elif suffix in _TEXTS.split() or path.name.endswith(data.caption_ext):
            found.texts.append(path)
        elif suffix in _NOT_READ.split():
            not_read[path] = f"{suffix} (not read)"
        elif suffix in _VIDEOS.split():
            found.aside["videos"].append(path)
        elif content(path) in ("a picture", "HEIC", "AVIF"):
            not_read[path] = "without a picture's extension"
    named = {path.with_suffix("") for path in paths}.union(paths)
    for path, reason in not_read.items():  # a camera's raw file, a backup, what it was drawn in
        if path.with_suffix("") in named:
            found.aside["other versions of pictures"].append(path)
        else:
            found.not_read[reason].append(path)
            if data.strict:
                report.add(FluxfastError(f"{path} is left out: {reason}"), True)
    if data.mask_folder is not None:
        # realpath, unlike `resolve`, takes circular links
        masks = Path(os.path.realpath(data.mask_folder))
        if Path(os.path.realpath(data.folder)) in masks.parents:
            paths = [path for path in paths if masks not in Path(os.path.realpath(path)).parents]
            excluded = f" other than the masks in {data.mask_folder}"
    paths = _set_aside(found, paths, outputs)
    if not paths:
        reasons = {**found.not_read, **found.aside}.items()
        left_out = ", ".join(f"{len(files)} {reason}" for reason, files in reasons)
        raise FluxfastError(
            f"no images in {data.folder}{excluded}"
            + ("" if data.recursive else ", apart from the folders below it (recursive: false)")
            + (f"; left out: {left_out}" if reasons else ""),
            hint="`data.folder` takes jpg, png, webp, avif, bmp, gif and tiff files, and heic with "
            "pillow-heif",
        )
    return found, sorted(paths, key=lambda path: path.relative_to(data.folder).as_posix())


def _walk(data: DataConfig, report: SkipReport) -> Iterator[Path]:
    """Yields the folder's files. Skips dot files and dot folders, and follows links to folders,
    each real folder once.
    """

    def unreadable(error: OSError) -> None:
        message = f"cannot read the folder {error.filename}: {error.strerror}"
        if Path(error.filename) == data.folder:
            raise FluxfastError(message, hint="check `data.folder`")
        report.add(FluxfastError(message), data.strict)

    visited = set()
    for parent, folders, files in os.walk(data.folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if data.recursive and name[0] != ".")
        yield from (Path(parent, name) for name in sorted(files) if name[0] != ".")


def _set_aside(found: Found, paths: list[Path], outputs: Sequence[Path]) -> list[Path]:
    """Returns the pictures to train on, without masks and control pictures of others, unless they
    have captions of their own, and without what other programs put here.
    """
    root = found.data.folder
    real = Path(os.path.realpath(root))
    drawn = [folder for each in outputs if real in (folder := Path(os.path.realpath(each))).parents]
    folders = {path: path.relative_to(root).parts[:-1] for path in paths}
    maps = {path for path in paths if any(map(_MAP_FOLDER.fullmatch, folders[path]))}
    stems = {path.stem for path in paths if path not in maps}
    beside = {path.with_suffix("") for path in paths}.union(paths)
    like_maps = []
    for path in paths:
        match = _MAP_OF.fullmatch(path.stem)
        of = path.stem if match is None else match[1] or match[2]
        if (match and path.parent / of in beside) or (path in maps and {path.stem, of} & stems):
            like_maps.append(path)
    captions = read_captions(root, like_maps, found.data.caption_ext).texts
    aside = {}
    for path in paths:
        for pattern, kind in _FOLDERS.items():
            if any(re.fullmatch(pattern, part, re.I) for part in folders[path]):
                aside[path] = kind
        if _LABELS.fullmatch(path.stem) or captions.get(path, "") is None:
            aside[path] = "masks or control pictures"
        if drawn and not set(drawn).isdisjoint(Path(os.path.realpath(path)).parents):
            aside[path] = "drawn by runs (output_dir)"
    for path, reason in aside.items():
        found.aside[reason].append(path)
    return [path for path in paths if path not in aside]


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
