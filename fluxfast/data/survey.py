"""The survey: reads what the data folders hold, and logs in a few lines for each what is trained,
with which captions, and what is left out.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fluxfast.config.schema import Config, DataConfig
from fluxfast.data.buckets import Areas, choose_areas, cropped, fit_bucket
from fluxfast.data.captions import (
    Captions,
    apply_trigger,
    caption_variants,
    clean_trigger,
    listed,
    read_captions,
    unread_captions,
)
from fluxfast.data.scan import Found, Progress, ScannedImage, SkipReport, scan_folders
from fluxfast.distributed import SINGLE_PROCESS, Ranks
from fluxfast.errors import FluxfastError
from fluxfast.util.terminal import spinner

log = logging.getLogger(__name__)

STRICT = "strict: true beside data.folder makes that an error"
_REPAIR = "write or remove these captions, or leave out `strict`"
_BUCKETS = 8  # that are listed

Prompted = tuple[ScannedImage, list[str]]  # an image and its prompts


def read_data(
    config: Config,
    index_path: Path | None,
    report: SkipReport,
    progress: Progress = lambda kind, done, total: None,
    ranks: Ranks = SINGLE_PROCESS,
    areas: Areas | None = None,
) -> tuple[list[list[Prompted]], Areas]:
    """Returns the images of each data folder whose captions can be used, in order, with their
    prompts; and the areas that their buckets are merged to. index_path: as in `scan_folders`;
    areas: those of a run that has begun, {} too. Its pictures may be others now, but those that it
    has trained on stay in their buckets; a new one that none of the areas fits has its own.

    Raises FluxfastError for a missing folder, images without captions, what `report` refuses, and
    where no image can be used.
    """
    outputs = config.output_dir, config.run_dir
    with ranks.main_process_first():  # the others then find every size in the index
        folders = scan_folders(config.data, index_path, report, progress, outputs=outputs)
    areas = _merge_buckets(folders, areas)
    plans = [_read_prompts(config, found, report) for found in folders]
    report.check()
    total = len({path for found in folders for path in _pictures(found)})
    require_some(plans, total)
    return plans, areas


def survey(config: Config, areas: Areas | None = None) -> None:
    """Logs what the data folders hold, where they are on this disk; writes nothing. areas: as in
    `read_data`.
    """
    try:
        with spinner("reading images"):
            read_data(config, None, SkipReport(), areas=areas)
    except FluxfastError as error:
        log.warning(f"note: the data cannot be trained on as it is: {error.message}")


def require_some(usable: Sequence, total: int) -> None:
    """Raises FluxfastError if none of `total` pictures is left."""
    if not any(usable):
        raise FluxfastError(
            f"none of the {total} pictures can be used", hint="the lines above say why"
        )


def _pictures(found: Found) -> list[Path]:
    """Returns all that were meant to be trained on, as far as anybody can tell."""
    not_read = [path for paths in found.not_read.values() for path in paths]
    return [image.path for image in found.images] + found.unusable + not_read


def _merge_buckets(folders: list[Found], earlier: Areas | None) -> Areas:
    """Moves the images of all folders into buckets of the areas that it returns."""
    areas = {}
    for side in sorted({side for found in folders for side in found.data.resolution}):
        images = [x for found in folders if side in found.data.resolution for x in found.images]
        sizes = [image.size for image in images]
        merged = choose_areas(sizes, side) if earlier is None else earlier.get(side)
        if not merged or not sizes:
            continue
        areas[side] = merged
        lost = []
        for each in (merged, ()):
            crops = [100 * cropped(size, fit_bucket(size, side, each)) for size in sizes]
            lost.append(f"{sum(crops) / len(crops):.1f} % on average, {max(crops):.1f} % at most")
        log.info(
            f"{side} px: buckets are merged to {len(merged)} token counts, which crops {lost[0]} "
            f"(without: {lost[1]})"
        )
    for found in folders:
        sides = [(side, areas.get(side, ())) for side in found.data.resolution]
        found.images = [
            replace(image, buckets=tuple(fit_bucket(image.size, *each) for each in sides))
            for image in found.images
        ]
    return areas


def _read_prompts(config: Config, found: Found, report: SkipReport) -> list[Prompted]:
    data = found.data
    read = read_captions(data.folder, [image.path for image in found.images], data.caption_ext)
    for error in (*read.stray, *read.unread.values()):
        report.add(error, data.strict)
    trigger, own = clean_trigger(config.trigger), clean_trigger(data.trigger)
    fallback = data.default_caption
    if fallback is None and (trigger or own):
        fallback = apply_trigger(own or "", trigger)
    used = [image for image in found.images if image.path in read.texts]
    _say_pictures(found, used)
    _say_kohya(data, read.texts)
    _say_captions(found, read, trigger or own, report)
    missing = [path.name for path, text in read.texts.items() if text is None]
    if missing and fallback is None:
        raise FluxfastError(
            f"{len(missing)} of {len(read.texts)} images have no caption: {listed(missing)}",
            hint="put a .txt beside each, or set `data.default_caption` or `trigger`",
        )
    prompts = []
    for image in used:
        caption = read.texts[image.path]
        caption = (fallback or "") if caption is None else caption
        try:
            variants = caption_variants(caption, image.hash, data, trigger, config.seed)
        except FluxfastError as error:
            raise FluxfastError(f"{image.path}: {error.message}", hint=error.hint) from None
        prompts.append((image, variants))
    return prompts


def _say_pictures(found: Found, used: list[ScannedImage]) -> None:
    data = found.data
    sizes = Counter(size for image in used for size in image.buckets).most_common()
    buckets = listed([f"{w}x{h} ({count})" for (w, h), count in sizes], _BUCKETS)
    times = f", {data.num_repeats} times each" if data.num_repeats > 1 else ""
    total = len(_pictures(found))
    where = f", in {len(sizes)} bucket{'s' * (len(sizes) > 1)}: {buckets}" if sizes else ""
    log.info(f"{data.folder}: {len(used)} of {total} pictures{times}{where}")
    groups = [
        f"{len(paths)} {reason}: {_names(paths, data)}"
        for reason, paths in (*found.aside.items(), *found.not_read.items())
    ]
    if cannot := total - len(used) - sum(map(len, found.not_read.values())):
        groups.append(f"{cannot} that cannot be used, named above")
    if groups:
        log.warning(f"  left out: {'; '.join(groups)}" + (f" ({STRICT})" * (total > len(used))))


def _say_kohya(data: DataConfig, texts: dict[Path, str | None]) -> None:
    """Warns that kohya's folder names mean nothing here: `10_ohwx man`, of which the pictures would
    come 10 times, those without a caption with "ohwx man".
    """
    explicit = bool({"num_repeats", "default_caption"} & data.model_fields_set)
    start = len(data.folder.absolute().parts) - (not explicit)
    names = sorted({name for path in texts for name in path.absolute().parts[start:-1]})
    least = 1 if None in texts.values() else 2  # once, with a caption each, is what is done
    matches = [match for name in names if (match := re.fullmatch(r"([1-9]\d{0,2})_(\S.*)", name))]
    matches = [match for match in matches if int(match[1]) >= least]
    if matches:
        most = max(matches, key=lambda match: int(match[1]))
        log.warning(
            f"  kohya's folder names are not read: {listed([match[0] for match in matches])}; for "
            f"their repeats and class words give each folder an entry of `data`, such as folder: "
            f"…/{most[0]}, num_repeats: {most[1]}, default_caption: {most[2]}"
        )


def _say_captions(found: Found, read: Captions, trigger: str | None, report: SkipReport) -> None:
    """Logs where captions come from, how many are missing, and which are not read."""
    data = found.data
    bare = [path for path, text in read.texts.items() if text is None]
    empty = [path.name for path, text in read.texts.items() if text == ""]
    alone = "the trigger alone" if trigger else "the empty prompt"
    if read.sources:
        sources = [f"{count} from {source}" for source, count in read.sources.items()]
        log.info(f"  captions: {', '.join(sources)}")
    if read.guessed:
        log.warning(
            f"  {len(read.guessed)} caption files are not UTF-8 and were read as Windows-1252: "
            f"{listed([str(path) for path in read.guessed], 1)}"
        )
    if bare and (trigger or data.default_caption is not None):
        default = "data.default_caption" if data.default_caption else alone
        missing = f"{len(bare)} of {len(read.texts)} pictures have no caption"
        log.warning(f"  {missing} and are trained on {default}")
    pictures = _pictures(found) + [path for paths in found.aside.values() for path in paths]
    unread, strange = unread_captions(found.texts, bare, pictures, data.caption_ext)
    faults = list(read.useless)
    if unread:
        faults.insert(0, f"captions not read: {_names(unread, data)}{_cure(unread[0], bare)}")
    if empty:
        count = f"{len(empty)} of {len(read.texts)} pictures have an empty caption"
        faults.append(f"{count} and are trained on {alone}: {listed(empty)}")
    for fault in faults:
        if data.strict:
            report.add(FluxfastError(f"{data.folder}: {fault}", hint=_REPAIR), True)
        else:
            log.warning(f"  {fault}")
    if strange:
        log.warning(f"  text files that fit no picture: {_names(strange, data)}")


def _names(paths: list[Path], data: DataConfig) -> str:
    return listed([path.relative_to(data.folder).as_posix() for path in paths])


def _cure(text: Path, bare: list[Path]) -> str:
    """Returns how a file that holds a caption of one of the images would be read."""
    for image in bare:
        if text.parent == image.parent and text.name.startswith(f"{image.stem}."):
            return f" (data.caption_ext: {text.name[len(image.stem) :]} reads them)"
    return ' (metadata.jsonl with "file_name" and "text" is read, or a .txt beside each picture)'
