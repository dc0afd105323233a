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
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxfast.config import Config, DataConfig
from fluxfast.data import captions, images
from fluxfast.data.scan import ScannedImage, scan_folders
from fluxfast.data.store import (
    LATENTS,
    TEXT,
    Dataset,
    Sample,
    is_complete,
    write_tensors,
)
from fluxfast.encoders.components import component_print
from fluxfast.errors import FluxfastError

log = logging.getLogger("fluxfast")

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
) -> Dataset:
    """Scan the data folders, encode what the cache lacks, and say where everything lies.

    encoders_root: what holds the VAE, the text encoders and the tokenizers
    (`encoders/components.py`). max_length: T5 tokens. device, dtype: where and in what the encoders
    run. extra_prompts: cached in the same pass (previews); get their files from `encode_prompts`
    afterwards. batch_size: prompts, or images of one size, per encoder call.

    Folders, image headers and captions are checked before an encoder is loaded. Raises
    FluxfastError for a folder, image, mask or caption that is missing or broken, for missing
    encoders, and for a cache folder that cannot be written.
    """
    progress = progress or (lambda what, done, total: None)
    scanned = scan_folders(config.data, config.cache_path / "sizes.json", progress)
    plans = [
        _read_prompts(config, data, found) for data, found in zip(config.data, scanned, strict=True)
    ]
    texts = encode_prompts(
        ["", *(text for plan in plans for variants in plan for text in variants), *extra_prompts],
        config.cache_path,
        encoders_root,
        max_length,
        device,
        dtype,
        progress,
        batch_size=batch_size,
    )

    samples: list[Sample] = []
    jobs: dict[Path, _LatentJob] = {}
    base = {"vae": component_print(encoders_root, "vae"), "dtype": str(dtype)}
    for data, found, plan in zip(config.data, scanned, plans, strict=True):
        for i in range(len(data.resolution)):
            for image, variants in zip(found, plan, strict=True):
                wanted = _latent_jobs(config.cache_path, data, image, image.buckets[i], base)
                jobs.update((job.target, job) for job in wanted)
                sample = Sample(
                    name=image.name,
                    size=image.buckets[i],
                    latents=wanted[0].target,
                    flipped=wanted[1].target if data.flip else None,
                    texts=[texts[text] for text in variants],
                    caption=variants[0],
                    caption_dropout=data.caption_dropout,
                )
                samples += [sample] * data.num_repeats
    missing = [job for job in jobs.values() if not is_complete(job.target, LATENTS)]
    if missing:
        _encode_images(missing, Path(encoders_root), device, dtype, progress, batch_size)
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
) -> dict[str, Path]:
    """Prompt -> its file (t5 [max_length, D], pooled [P]), encoded if the cache lacks it.

    Loads transformers only if something is missing. Raises FluxfastError as `prepare_dataset` does.
    """
    root = Path(encoders_root)
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    prints = [component_print(root, part) for part in parts]
    files = {}
    for prompt in dict.fromkeys(prompts):
        key = _key("text", prompt=prompt, encoders=prints, max_length=max_length, dtype=str(dtype))
        files[prompt] = Path(cache_path) / "text" / f"{key}.safetensors"
    missing = [prompt for prompt, path in files.items() if not is_complete(path, TEXT)]
    if not missing:
        return files

    from fluxfast.encoders.text import TextEncoders

    encoders = TextEncoders(root, device, dtype)
    done = 0
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        t5, pooled = encoders.encode(batch, max_length)
        for row, prompt in enumerate(batch):
            write_tensors(files[prompt], {"t5": t5[row], "pooled": pooled[row]})
        done += len(batch)
        if progress:
            progress("text", done, len(missing))
    encoders.close()
    return files


def _read_prompts(config: Config, data: DataConfig, found: list[ScannedImage]) -> list[list[str]]:
    """The prompts of each image, in the order of `found`."""
    texts = captions.read_captions(data.folder, [image.path for image in found], data.caption_ext)
    texts = captions.fill_missing(texts, data.default_caption, config.trigger)
    prompts = []
    for image in found:
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
        prompts.append(variants)
    return prompts


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
) -> None:
    from fluxfast.encoders.vae import Vae

    vae = Vae(root, device, dtype)
    opaque: set[Path] = set()
    done = 0
    for batch in _batches(
        sorted(jobs, key=lambda job: (job.bucket, job.image.path, job.flip)), batch_size
    ):
        pixels, masks = zip(*(_load_pixels(job, vae.factor) for job in batch), strict=True)
        mean, std = vae.encode(torch.stack(pixels))
        for row, (job, mask) in enumerate(zip(batch, masks, strict=True)):
            tensors = {"mean": mean[row], "std": std[row]}
            write_tensors(job.target, tensors if mask is None else {**tensors, "mask": mask})
            if mask is None and job.mask == "alpha":
                opaque.add(job.image.path)
        done += len(batch)
        progress("latents", done, len(jobs))
    vae.close()
    if opaque:
        log.warning(
            "mask: alpha: %d images have no alpha channel, trained without a mask", len(opaque)
        )


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
    mask = None
    if job.mask == "alpha":
        mask = alpha
    elif job.mask == "folder":
        mask = images.load_mask(job.image.mask)
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


def _key(kind: str, **parts) -> str:
    text = json.dumps({"version": CACHE_VERSION, "kind": kind, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
