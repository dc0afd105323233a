"""The cache step: encodes images and captions to latents and embeddings on disk, each once.

A file's name is the hash of all that its content depends on: a cached file is never stale, and an
interrupted step keeps what it has written. Encoders are loaded only if something is missing, and
never both at once. They encode one prompt or image at a time, so that a file's bits do not depend
on what else was left to encode.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fluxfast.config.schema import Config, DataConfig
from fluxfast.data import images
from fluxfast.data.buckets import Areas
from fluxfast.data.scan import Progress, ScannedImage, SkipReport, content_hash
from fluxfast.data.store import (
    LATENTS,
    SPACE_HINT,
    TEXT,
    Dataset,
    Sample,
    is_complete,
    write_tensors,
)
from fluxfast.data.survey import STRICT, Prompted, read_data, require_some
from fluxfast.distributed import SINGLE_PROCESS, Ranks
from fluxfast.encoders.components import component_fingerprint
from fluxfast.encoders.placement import FREE_HINT
from fluxfast.errors import FluxfastError
from fluxfast.memory.runtime import is_out_of_memory, memory_reason
from fluxfast.util.files import check_writable, keep_running

log = logging.getLogger(__name__)

CACHE_VERSION = 1  # raise it when the content of a file changes for the same settings


Bucket = tuple[tuple[int, int], int]  # ((width, height) in pixels, samples of a batch)


class Encoding(NamedTuple):
    """root: holds the VAE, the text encoders and the tokenizers (`encoders/components.py`);
    max_length: T5 tokens; device, dtype: of the encoders.
    """

    root: Path
    max_length: int
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class _LatentJob:
    """One latents file: an image in one bucket, perhaps mirrored."""

    target: Path
    data: DataConfig
    image: ScannedImage
    bucket: tuple[int, int]
    flip: bool


def prepare_dataset(
    config: Config,
    encoding: Encoding,
    progress: Progress = lambda kind, done, total: None,
    *,
    extra_prompts: Iterable[str] = (),
    check: Callable[[set[str], set[Bucket]], None] = lambda names, buckets: None,
    ranks: Ranks = SINGLE_PROCESS,
    areas: Areas | None = None,
) -> Dataset:
    """Scan the data folders, encode what the cache lacks, and return every sample with its files.

    extra_prompts: cached as well (previews) where that succeeds. check: is called with the
    pictures' names and the buckets before anything is encoded, to refuse them. ranks: all of them
    call this and share the work. areas: as in `read_data`. What is trained and what is left out is
    logged.

    Folders, image headers and captions are checked before an encoder is loaded. Raises
    FluxfastError for a missing folder, images without captions, unusable files of a strict data
    entry, no usable image at all, missing encoders, and a cache folder that cannot be written.
    """
    report = SkipReport()
    index_path = config.cache_path / "sizes.json"
    plans, areas = read_data(config, index_path, report, progress, ranks, areas)
    total = len({image.path for plan in plans for image, _ in plan})
    pairs = zip(plans, config.batch_sizes, strict=True)
    buckets = {(size, n) for plan, n in pairs for image, _ in plan for size in image.buckets}
    check({image.name for plan in plans for image, _ in plan}, buckets)
    captions = ["", *(text for plan in plans for _, variants in plan for text in variants)]
    texts = encode_prompts(
        [*captions, *extra_prompts],
        config.cache_path,
        encoding,
        progress,
        ranks=ranks,
        optional=set(extra_prompts) - set(captions),
    )

    planned = _plan_samples(config, encoding, plans, texts)
    unusable = _encode_images(
        [job for _, jobs in planned for job in jobs], encoding, progress, ranks
    )
    samples, lost = [], set()
    for sample, jobs in planned:
        errors = [unusable[job.target.name] for job in jobs if job.target.name in unusable]
        if errors:
            report.add(errors[0], jobs[0].data.strict)
            lost.add(jobs[0].image.path)
        else:
            samples += [sample] * jobs[0].data.num_repeats
    report.check()
    require_some(samples, total)
    if lost:
        log.warning(f"{len(lost)} of {total} pictures skipped; {STRICT}")
    return Dataset(samples, texts[""], areas)


def encode_prompts(
    prompts: Iterable[str],
    cache_path: Path,
    encoding: Encoding,
    progress: Progress = lambda kind, done, total: None,
    *,
    ranks: Ranks = SINGLE_PROCESS,
    optional: Container[str] = (),
) -> dict[str, Path]:
    """Returns prompt -> its file (t5 [max_length, D], pooled [P]), encoded if the cache lacks it by
    one of the ranks, which all call this.

    Loads transformers only if something is missing. optional: prompts that may fail, with a
    warning. Raises FluxfastError as `prepare_dataset` does.
    """
    files = prompt_files(prompts, cache_path, encoding)
    missing = {
        prompt: path
        for prompt, path in sorted(files.items(), key=lambda item: item[0] in optional)
        if ranks.owns(path.name) and not is_complete(path, TEXT)
    }
    try:
        if missing:
            with _memory_named("encoding captions"):
                _encode_texts(missing, encoding, progress)
    except Exception as error:
        if not all(p in optional or is_complete(path, TEXT) for p, path in missing.items()):
            raise
        with keep_running("the prompts of previews"):
            raise error
    ranks.barrier()
    return files


@contextmanager
def _memory_named(work: str) -> Iterator[None]:
    """Raises FluxfastError where memory runs out inside."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise FluxfastError(
            f"the GPU's memory is full while {work}: {memory_reason(error)}",
            hint=f"{FREE_HINT}; the same command goes on with what is left to encode",
        ) from None


def prompt_files(prompts: Iterable[str], cache_path: Path, encoding: Encoding) -> dict[str, Path]:
    """Returns prompt -> the file of its embeddings, which need not be there."""
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    base = {
        "encoders": [component_fingerprint(encoding.root, part) for part in parts],
        "max_length": encoding.max_length,
        "dtype": str(encoding.dtype),
    }
    return {prompt: _file(cache_path, "text", prompt=prompt, **base) for prompt in prompts}


def _encode_texts(missing: dict[str, Path], encoding: Encoding, progress: Progress) -> None:
    from fluxfast.encoders.text import TextEncoders

    first = next(iter(missing.values()))
    check_writable(first.parent, SPACE_HINT)
    encoders = TextEncoders(encoding.root, encoding.device, encoding.dtype)
    try:
        for done, (prompt, path) in enumerate(missing.items(), start=1):
            t5, pooled = encoders.encode([prompt], encoding.max_length)
            write_tensors(path, {"t5": t5[0], "pooled": pooled[0]})
            progress("text", done, len(missing))
    finally:
        encoders.close()


def _plan_samples(
    config: Config, encoding: Encoding, plans: list[list[Prompted]], texts: dict[str, Path]
) -> list[tuple[Sample, list[_LatentJob]]]:
    """Returns each sample once, with its latents' jobs: upright, then mirrored if `data.flip`."""
    base = {"vae": component_fingerprint(encoding.root, "vae"), "dtype": str(encoding.dtype)}
    planned = []
    for data, plan in zip(config.data, plans, strict=True):
        least = data.mask_min if data.mask != "none" else 0.0
        for i in range(len(data.resolution)):
            for image, variants in plan:
                bucket, mask = image.buckets[i], [data.mask, image.mask_hash, least]
                jobs = []
                for flip in (False, True) if data.flip else (False,):
                    parts = {"image": image.hash, "bucket": bucket, "flip": flip, "alpha": "white"}
                    target = _file(config.cache_path, "latents", **parts, mask=mask, **base)
                    jobs.append(_LatentJob(target, data, image, bucket, flip))
                sample = Sample(
                    name=image.name,
                    size=bucket,
                    latents=jobs[0].target,
                    flipped=jobs[1].target if data.flip else None,
                    texts=[texts[text] for text in variants],
                    caption=variants[0],
                    caption_dropout=data.caption_dropout,
                    batch_size=data.batch_size,
                )
                planned.append((sample, jobs))
    return planned


def _encode_images(
    jobs: list[_LatentJob], encoding: Encoding, progress: Progress, ranks: Ranks
) -> dict[str, FluxfastError]:
    """Writes the files that the cache lacks, each by one rank.

    Returns, on every rank, file name -> why it could not be made.
    """
    missing = [
        job
        for job in {job.target: job for job in jobs}.values()
        if ranks.owns(job.target.name) and not is_complete(job.target, LATENTS)
    ]
    unusable: dict[str, tuple[str, str | None]] = {}  # file name -> message and hint
    opaque: set[str] = set()  # images that should have had an alpha channel
    if missing:
        from fluxfast.encoders.vae import Vae

        check_writable(missing[0].target.parent, SPACE_HINT)
        with _memory_named("encoding images"):
            vae = Vae(encoding.root, encoding.device, encoding.dtype)
        missing.sort(key=lambda job: (job.bucket, job.image.path, job.flip))
        for done, job in enumerate(missing, start=1):
            try:
                pixels, mask = _load_pixels(job, vae.factor)
            except FluxfastError as error:
                unusable[job.target.name] = error.message, error.hint
            else:
                with _memory_named(f"encoding {job.image.path} at {job.bucket[0]}x{job.bucket[1]}"):
                    mean, std = vae.encode(pixels[None])
                tensors = {"mean": mean[0], "std": std[0]}
                write_tensors(job.target, tensors if mask is None else {**tensors, "mask": mask})
                if mask is None and job.data.mask == "alpha":
                    opaque.add(str(job.image.path))
            progress("latents", done, len(missing))
        vae.close()
    for other_unusable, other_opaque in ranks.all_gather_json((unusable, list(opaque))):
        unusable |= other_unusable
        opaque |= set(other_opaque)
    if opaque:
        log.warning(
            f"mask: alpha: {len(opaque)} images have no alpha channel, trained without a mask"
        )
    return {name: FluxfastError(*error) for name, error in unusable.items()}


def _load_pixels(job: _LatentJob, factor: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the image fp32 [3, H, W] in -1..1, and loss weights fp32 [H / factor, W / factor] or
    None.
    """
    image, alpha = images.load_image(job.image.path)
    _check_unchanged(job.image.path, job.image.hash)
    mask = alpha if job.data.mask == "alpha" else None
    if job.image.mask is not None and job.image.mask_hash is not None:
        mask = images.load_mask(job.image.mask)
        _check_unchanged(job.image.mask, job.image.mask_hash)
        stretch = (mask.width * image.height) / (mask.height * image.width)
        if not 0.98 < stretch < 1.02:
            raise FluxfastError(
                f"the mask {job.image.mask} is {mask.width}x{mask.height}, its image "
                f"{image.width}x{image.height}: their shapes differ"
            )
    pixels = images.fit_image(image, job.bucket)
    pixels = pixels.flip(-1) if job.flip else pixels
    if mask is None:
        return pixels, None
    least = job.data.mask_min
    weights = least + (1.0 - least) * images.fit_mask(mask, job.bucket, factor)
    if not weights.any():
        raise FluxfastError(
            f"the mask of {job.image.path} is black everywhere: nothing of it would be trained",
            hint="remove the image or set `data.mask_min` above 0",
        )
    return pixels, weights.flip(-1) if job.flip else weights


def _check_unchanged(path: Path, content: str) -> None:
    """Raises FluxfastError if the file that was decoded is not what its cache key names."""
    if content_hash(path) != content:
        raise FluxfastError(
            f"the image {path} was changed while it was read", hint="start again for what it is now"
        )


def _file(cache_path: Path, kind: str, **parts) -> Path:
    """Returns the cache file named after everything that its content depends on."""
    text = json.dumps({"version": CACHE_VERSION, "kind": kind, **parts}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    return cache_path / kind / f"{key}.safetensors"
