"""The cache step: images and captions to latents and embeddings on disk, each encoded once.

A file's name is the hash of all that it depends on, so nothing is ever stale: what changed gets a
new name, what was written before an interruption is kept. Encoders are loaded only if something is
missing, and never both at once.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fluxfast.config.schema import Config, DataConfig
from fluxfast.data import captions, images
from fluxfast.data.scan import ScannedImage, content_hash, scan_folders
from fluxfast.data.skips import Skips
from fluxfast.data.store import (
    LATENTS,
    TEXT,
    Dataset,
    Sample,
    is_complete,
    write_tensors,
)
from fluxfast.distributed import SINGLE_PROCESS, Ranks
from fluxfast.encoders.components import component_fingerprint
from fluxfast.errors import FluxfastError

log = logging.getLogger(__name__)

__all__ = ["Dataset", "Sample", "encode_prompts", "prepare_dataset"]

CACHE_VERSION = 1  # raise it when the content of a file changes for the same settings
BATCH_PIXELS = (
    4 * 1024 * 1024
)  # per VAE call: one full-size activation of FLUX's is then 2 GiB in fp32

Progress = Callable[[str, int, int], None]  # what ("hash", "text", "latents"), done, total


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
class _Made:
    """Of the files that were to be written: lost: why not, of those whose image or mask cannot be
    used; opaque: the images that should have had an alpha channel.
    """

    lost: dict[Path, FluxfastError] = field(default_factory=dict)
    opaque: set[Path] = field(default_factory=set)

    def of_all(self, ranks: Ranks) -> "_Made":
        """What all ranks made."""
        lost = {str(path): (error.message, error.hint) for path, error in self.lost.items()}
        together = _Made()
        for others, opaque in ranks.all_gather_json((lost, sorted(map(str, self.opaque)))):
            together.opaque |= set(map(Path, opaque))
            together.lost |= {Path(path): FluxfastError(*said) for path, said in others.items()}
        return together


def prepare_dataset(
    config: Config,
    encoders_root: Path,
    max_length: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    *,
    extra_prompts: Iterable[str] = (),
    batch_size: int = 4,
    ranks: Ranks = SINGLE_PROCESS,
) -> Dataset:
    """Scan the data folders, encode what the cache lacks, and say where everything lies.

    encoders_root: what holds the VAE, the text encoders and the tokenizers
    (`encoders/components.py`). max_length: T5 tokens. device, dtype: where and in what the encoders
    run. extra_prompts: cached in the same pass (previews); get their files from `encode_prompts`
    afterwards. batch_size: prompts, or images of one size, per encoder call. ranks: those that
    share the work, which all of them call this for. Files that cannot be used are logged.

    Folders, image headers and captions are checked before an encoder is loaded. Raises
    FluxfastError for a missing folder, images without captions, a data entry that is strict and has
    files that cannot be used, where nothing is left, for missing encoders, and for a cache folder
    that cannot be written.
    """
    progress = progress or (lambda what, done, total: None)
    skips = Skips()
    with ranks.main_process_first():  # which then find every size in the index
        scanned = scan_folders(config.data, config.cache_path / "sizes.json", skips, progress)
    total = len({image.path for found in scanned for image in found} | skips.pictures)
    plans = [
        _read_prompts(config, data, found, skips)
        for data, found in zip(config.data, scanned, strict=True)
    ]
    skips.check()
    _require_some(plans, total)
    texts = encode_prompts(
        [
            "",
            *(text for plan in plans for _, variants in plan for text in variants),
            *extra_prompts,
        ],
        config.cache_path,
        encoders_root,
        max_length,
        device,
        dtype,
        progress,
        batch_size=batch_size,
        ranks=ranks,
    )

    base = {"vae": component_fingerprint(encoders_root, "vae"), "dtype": str(dtype)}
    views: list[_View] = []
    for data, plan in zip(config.data, plans, strict=True):
        for i in range(len(data.resolution)):
            for image, variants in plan:
                wanted = _latent_jobs(config.cache_path, data, image, image.buckets[i], base)
                views.append(_View(data, image, variants, wanted))
    jobs = {job.target: job for view in views for job in view.jobs}
    missing = [
        job
        for job in jobs.values()
        if ranks.owns(job.target.name) and not is_complete(job.target, LATENTS)
    ]
    made = _Made()
    if missing:
        made = _encode_images(missing, Path(encoders_root), device, dtype, progress, batch_size)
    made = made.of_all(ranks)
    if made.opaque:
        log.warning(
            f"mask: alpha: {len(made.opaque)} images have no alpha channel, trained without a mask"
        )
    views = _without_lost(views, made.lost, skips)
    _require_some(views, total)
    skips.conclude(total)
    samples: list[Sample] = []
    for view in views:
        samples += [view.sample(texts)] * view.data.num_repeats
    buckets = Counter(sample.size for sample in samples)
    return Dataset(samples, texts[""], dict(sorted(buckets.items())))


def encode_prompts(
    prompts: Iterable[str],
    cache_path: Path,
    encoders_root: Path,
    max_length: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    *,
    batch_size: int = 4,
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Path]:
    """Prompt -> its file (t5 [max_length, D], pooled [P]), encoded if the cache lacks it; by one of
    the ranks, which all call this.

    Loads transformers only if something is missing. Raises FluxfastError as `prepare_dataset` does.
    """
    root = Path(encoders_root)
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    prints = [component_fingerprint(root, part) for part in parts]
    files = {}
    for prompt in dict.fromkeys(prompts):
        key = _key("text", prompt=prompt, encoders=prints, max_length=max_length, dtype=str(dtype))
        files[prompt] = Path(cache_path) / "text" / f"{key}.safetensors"
    missing = {
        prompt: path
        for prompt, path in files.items()
        if ranks.owns(path.name) and not is_complete(path, TEXT)
    }
    if missing:
        _encode_texts(missing, root, max_length, device, dtype, progress, batch_size)
    ranks.barrier()
    return files


def _encode_texts(
    files: dict[str, Path],
    root: Path,
    max_length: int,
    device,
    dtype: torch.dtype,
    progress: Progress | None,
    batch_size: int,
) -> None:
    from fluxfast.encoders.text import TextEncoders

    encoders = TextEncoders(root, device, dtype)
    prompts = list(files)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        t5, pooled = encoders.encode(batch, max_length)
        for row, prompt in enumerate(batch):
            write_tensors(files[prompt], {"t5": t5[row], "pooled": pooled[row]})
        if progress:
            progress("text", start + len(batch), len(prompts))
    encoders.close()


def _read_prompts(
    config: Config, data: DataConfig, found: list[ScannedImage], skips: Skips
) -> list[tuple[ScannedImage, list[str]]]:
    """The images whose captions can be used, with their prompts, in the order of `found`."""
    read = captions.read_captions(data.folder, [image.path for image in found], data.caption_ext)
    for error in read.stray:
        skips.add(error, data.strict)
    for image, error in read.unread.items():
        skips.add(error, data.strict, image)
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
    views: "list[_View]", lost: dict[Path, FluxfastError], skips: Skips
) -> "list[_View]":
    """The views whose files could be made; of the others, why not."""
    kept = []
    for view in views:
        errors = [lost[job.target] for job in view.jobs if job.target in lost]
        if errors:
            skips.add(errors[0], view.data.strict, view.image.path)
        else:
            kept.append(view)
    skips.check()
    return kept


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


def _encode_images(
    jobs: list[_LatentJob],
    root: Path,
    device,
    dtype: torch.dtype,
    progress: Progress,
    batch_size: int,
) -> _Made:
    """Write the files."""
    from fluxfast.encoders.vae import Vae

    vae = Vae(root, device, dtype)
    made, done = _Made(), 0
    for batch in _batches(
        sorted(jobs, key=lambda job: (job.bucket, job.image.path, job.flip)), batch_size
    ):
        loaded = {}
        for job in batch:
            try:
                loaded[job] = _load_pixels(job, vae.factor)
            except FluxfastError as error:
                made.lost[job.target] = error
        if loaded:
            mean, std = vae.encode(torch.stack([pixels for pixels, _ in loaded.values()]))
        for row, (job, (_, mask)) in enumerate(loaded.items()):
            tensors = {"mean": mean[row], "std": std[row]}
            write_tensors(job.target, tensors if mask is None else {**tensors, "mask": mask})
            if mask is None and job.mask == "alpha":
                made.opaque.add(job.image.path)
        done += len(batch)
        progress("latents", done, len(jobs))
    vae.close()
    return made


def _batches(jobs: list[_LatentJob], batch_size: int) -> Iterator[list[_LatentJob]]:
    """Runs of equal bucket, at most `batch_size` long and BATCH_PIXELS large."""
    start = 0
    for end in range(1, len(jobs) + 1):
        width, height = jobs[start].bucket
        most = max(1, min(batch_size, BATCH_PIXELS // (width * height)))
        if end == len(jobs) or jobs[end].bucket != (width, height) or end - start == most:
            yield jobs[start:end]
            start = end


def _load_pixels(job: _LatentJob, factor: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> image fp32 [3, H, W] in -1..1, loss weights fp32 [H / factor, W / factor] or None."""
    image, alpha = images.load_image(job.image.path)
    _check_unchanged(job.image.path, job.image.hash)
    mask = None
    if job.mask == "alpha":
        mask = alpha
    elif job.mask == "folder":
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
