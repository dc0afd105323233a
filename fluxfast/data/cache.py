"""The cache step: images and captions to latents and embeddings on disk, each encoded once.

A file's name is the hash of all that it depends on, so nothing is ever stale: what changed gets a
new name, what was written before an interruption is kept. Encoders are loaded only if something is
missing, and never both at once; one prompt or picture goes through them at a time, so that what is
cached depends on the one alone, to the last bit, and not on which others were left to do.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from fluxfast.config.schema import Config, DataConfig
from fluxfast.data import captions, images
from fluxfast.data.scan import ScannedImage, SkipReport, content_hash, scan_folders
from fluxfast.data.store import LATENTS, TEXT, Dataset, Sample, is_complete, write_tensors
from fluxfast.distributed import SINGLE_PROCESS, Ranks
from fluxfast.encoders.components import component_fingerprint
from fluxfast.errors import FluxfastError

log = logging.getLogger(__name__)

CACHE_VERSION = 1  # raise it when the content of a file changes for the same settings

Progress = Callable[[str, int, int], None]  # kind ("hash", "text", "latents"), done, total


class Encoding(NamedTuple):
    """root: what holds the VAE, the text encoders and the tokenizers (`encoders/components.py`);
    max_length: T5 tokens; device, dtype: where and in what the encoders run.
    """

    root: Path
    max_length: int
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class _LatentJob:
    target: Path
    image: ScannedImage
    bucket: tuple[int, int]
    flip: bool
    mask: str
    mask_min: float


@dataclass(frozen=True)
class _View:
    """An image of a data entry in one bucket. jobs: upright, then mirrored if asked."""

    data: DataConfig
    image: ScannedImage
    variants: list[str]
    jobs: list[_LatentJob]

    def sample(self, texts: dict[str, Path]) -> Sample:
        return Sample(
            name=self.image.name,
            size=self.jobs[0].bucket,
            latents=self.jobs[0].target,
            flipped=self.jobs[1].target if self.data.flip else None,
            texts=[texts[text] for text in self.variants],
            caption=self.variants[0],
            caption_dropout=self.data.caption_dropout,
        )


@dataclass
class _Outcome:
    """Of the files that were to be written: lost: why not, of those whose image or mask cannot be
    used; opaque: the images that should have had an alpha channel.
    """

    lost: dict[Path, FluxfastError] = field(default_factory=dict)
    opaque: set[Path] = field(default_factory=set)

    def of_all(self, ranks: Ranks) -> "_Outcome":
        """That of all ranks."""
        lost = {str(path): (error.message, error.hint) for path, error in self.lost.items()}
        together = _Outcome()
        for others, opaque in ranks.all_gather_json((lost, sorted(map(str, self.opaque)))):
            together.opaque |= set(map(Path, opaque))
            together.lost |= {Path(path): FluxfastError(*error) for path, error in others.items()}
        return together


def prepare_dataset(
    config: Config,
    encoding: Encoding,
    progress: Progress = lambda kind, done, total: None,
    *,
    extra_prompts: Iterable[str] = (),
    ranks: Ranks = SINGLE_PROCESS,
) -> Dataset:
    """Scan the data folders, encode what the cache lacks, and say where everything lies.

    extra_prompts: cached in the same pass (previews); get their files from `encode_prompts`
    afterwards. ranks: those that share the work, which all of them call this for. Files that cannot
    be used are logged.

    Folders, image headers and captions are checked before an encoder is loaded. Raises
    FluxfastError for a missing folder, images without captions, a data entry that is strict and has
    files that cannot be used, where nothing is left, for missing encoders, and for a cache folder
    that cannot be written.
    """
    report = SkipReport()
    with ranks.main_process_first():  # which then find every size in the index
        scanned = scan_folders(config.data, config.cache_path / "sizes.json", report, progress)
    total = len({image.path for found in scanned for image in found} | report.pictures)
    plans = [
        _read_prompts(config, data, found, report)
        for data, found in zip(config.data, scanned, strict=True)
    ]
    report.check()
    _require_some(plans, total)
    prompts = [text for plan in plans for _, variants in plan for text in variants]
    prompts = ["", *prompts, *extra_prompts]
    texts = encode_prompts(prompts, config.cache_path, encoding, progress, ranks=ranks)

    base = {"vae": component_fingerprint(encoding.root, "vae"), "dtype": str(encoding.dtype)}
    views: list[_View] = []
    for data, plan in zip(config.data, plans, strict=True):
        for i in range(len(data.resolution)):
            for image, variants in plan:
                jobs = _latent_jobs(config.cache_path, data, image, image.buckets[i], base)
                views.append(_View(data, image, variants, jobs))
    jobs = {job.target: job for view in views for job in view.jobs}
    missing = [
        job
        for job in jobs.values()
        if ranks.owns(job.target.name) and not is_complete(job.target, LATENTS)
    ]
    outcome = _encode_images(missing, encoding, progress) if missing else _Outcome()
    outcome = outcome.of_all(ranks)
    if outcome.opaque:
        log.warning(
            f"mask: alpha: {len(outcome.opaque)} images have no alpha channel, trained without a "
            "mask"
        )
    views = _without_lost(views, outcome.lost, report)
    _require_some(views, total)
    report.conclude(total)
    samples = [view.sample(texts) for view in views for _ in range(view.data.num_repeats)]
    buckets = Counter(sample.size for sample in samples)
    return Dataset(samples, texts[""], dict(sorted(buckets.items())))


def encode_prompts(
    prompts: Iterable[str],
    cache_path: Path,
    encoding: Encoding,
    progress: Progress = lambda kind, done, total: None,
    *,
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Path]:
    """Prompt -> its file (t5 [max_length, D], pooled [P]), encoded if the cache lacks it; by one of
    the ranks, which all call this.

    Loads transformers only if something is missing. Raises FluxfastError as `prepare_dataset` does.
    """
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    base = {
        "encoders": [component_fingerprint(encoding.root, part) for part in parts],
        "max_length": encoding.max_length,
        "dtype": str(encoding.dtype),
    }
    files = {}
    for prompt in dict.fromkeys(prompts):
        key = _key("text", prompt=prompt, **base)
        files[prompt] = Path(cache_path) / "text" / f"{key}.safetensors"
    missing = {
        prompt: path
        for prompt, path in files.items()
        if ranks.owns(path.name) and not is_complete(path, TEXT)
    }
    if missing:
        from fluxfast.encoders.text import TextEncoders

        encoders = TextEncoders(encoding.root, encoding.device, encoding.dtype)
        for done, (prompt, path) in enumerate(missing.items(), start=1):
            t5, pooled = encoders.encode([prompt], encoding.max_length)
            write_tensors(path, {"t5": t5[0], "pooled": pooled[0]})
            progress("text", done, len(missing))
        encoders.close()
    ranks.barrier()
    return files


def _read_prompts(
    config: Config, data: DataConfig, found: list[ScannedImage], report: SkipReport
) -> list[tuple[ScannedImage, list[str]]]:
    """The images whose captions can be used, with their prompts, in the order of `found`."""
    read = captions.read_captions(data.folder, [image.path for image in found], data.caption_ext)
    for error in read.stray:
        report.add(error, data.strict)
    for image, error in read.unread.items():
        report.add(error, data.strict, image)
    if read.guessed:
        more = ", …" if len(read.guessed) > 1 else ""
        log.warning(
            f"{len(read.guessed)} caption files are not UTF-8 and were read as Windows-1252: "
            f"{read.guessed[0]}{more}"
        )
    texts = captions.fill_missing(read.texts, data.default_caption, config.trigger)
    prompts = []
    for image in found:
        if image.path not in texts:
            continue
        try:
            variants = captions.caption_variants(
                captions.wrap_caption(texts[image.path], data.caption_prefix, data.caption_suffix),
                image.hash,
                trigger=config.trigger,
                shuffle=data.shuffle_captions,
                keep_tokens=data.keep_tokens,
                variants=data.shuffle_variants,
                seed=config.seed,
            )
        except FluxfastError as error:
            raise FluxfastError(f"{image.path}: {error.message}", hint=error.hint) from None
        prompts.append((image, variants))
    return prompts


def _require_some(found: list, total: int) -> None:
    if not any(found):
        raise FluxfastError(
            f"none of the {total} pictures can be used", hint="the lines above say why"
        )


def _without_lost(
    views: "list[_View]", lost: dict[Path, FluxfastError], report: SkipReport
) -> "list[_View]":
    """The views whose files could be made; of the others, why not."""
    usable = []
    for view in views:
        errors = [lost[job.target] for job in view.jobs if job.target in lost]
        if errors:
            report.add(errors[0], view.data.strict, view.image.path)
        else:
            usable.append(view)
    report.check()
    return usable


def _latent_jobs(
    cache_path: Path, data: DataConfig, image: ScannedImage, bucket: tuple[int, int], base: dict
) -> list[_LatentJob]:
    """The files of one image in one bucket: upright, then mirrored if asked."""
    mask_min = data.mask_min if data.mask != "none" else 0.0
    jobs = []
    for flip in (False, True) if data.flip else (False,):
        key = _key(
            "latents",
            image=image.hash,
            bucket=bucket,
            flip=flip,
            alpha="white",
            mask=[data.mask, image.mask_hash, mask_min],
            **base,
        )
        target = cache_path / "latents" / f"{key}.safetensors"
        jobs.append(_LatentJob(target, image, bucket, flip, data.mask, mask_min))
    return jobs


def _encode_images(jobs: list[_LatentJob], encoding: Encoding, progress: Progress) -> _Outcome:
    """Write the files."""
    from fluxfast.encoders.vae import Vae

    vae = Vae(encoding.root, encoding.device, encoding.dtype)
    outcome = _Outcome()
    jobs = sorted(jobs, key=lambda job: (job.bucket, job.image.path, job.flip))
    for done, job in enumerate(jobs, start=1):
        try:
            pixels, mask = _load_pixels(job, vae.factor)
        except FluxfastError as error:
            outcome.lost[job.target] = error
        else:
            mean, std = vae.encode(pixels[None])
            tensors = {"mean": mean[0], "std": std[0]}
            write_tensors(job.target, tensors if mask is None else {**tensors, "mask": mask})
            if mask is None and job.mask == "alpha":
                outcome.opaque.add(job.image.path)
        progress("latents", done, len(jobs))
    vae.close()
    return outcome


def _load_pixels(job: _LatentJob, factor: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The image fp32 [3, H, W] in -1..1, loss weights fp32 [H / factor, W / factor] or None."""
    image, alpha = images.load_image(job.image.path)
    _check_unchanged(job.image.path, job.image.hash)
    mask = None
    if job.mask == "alpha":
        mask = alpha
    elif job.mask == "folder":
        assert job.image.mask is not None and job.image.mask_hash is not None
        mask = images.load_mask(job.image.mask)
        _check_unchanged(job.image.mask, job.image.mask_hash)
        stretch = (mask.width * image.height) / (mask.height * image.width)
        if not 0.98 < stretch < 1.02:
            raise FluxfastError(
                f"the mask {job.image.mask} is {mask.width}x{mask.height}, its image "
                f"{image.width}x{image.height}: their shapes differ"
            )
    pixels = images.fit_image(image, job.bucket)
    weights = None if mask is None else images.fit_mask(mask, job.bucket, factor)
    if weights is not None:
        weights = job.mask_min + (1.0 - job.mask_min) * weights
        if not weights.any():
            raise FluxfastError(
                f"the mask of {job.image.path} is black everywhere: nothing of it would be trained",
                hint="remove the image or set `data.mask_min` above 0",
            )
    if job.flip:
        pixels = pixels.flip(-1)
        weights = None if weights is None else weights.flip(-1)
    return pixels, weights


def _check_unchanged(path: Path, content: str) -> None:
    """What was decoded must be what the cache file is named after."""
    if content_hash(path) != content:
        raise FluxfastError(
            f"the image {path} was changed while it was read", hint="start again for what it is now"
        )


def _key(kind: str, **parts) -> str:
    text = json.dumps({"version": CACHE_VERSION, "kind": kind, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
