"""Prepares a run: resolves the model's parts and runs the cache step with progress bars.

Needs neither transformers nor diffusers if everything is cached.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from fluxfast import rng
from fluxfast.config.schema import Config, ModelConfig
from fluxfast.data.buckets import Areas
from fluxfast.data.cache import Bucket, Encoding, prepare_dataset, prompt_files
from fluxfast.data.captions import PLACEHOLDER, clean_trigger
from fluxfast.data.store import TEXT, Dataset, Sample, is_complete
from fluxfast.distributed import SINGLE_PROCESS, Ranks
from fluxfast.encoders.components import component, has_component
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.folder import tokenizer_length
from fluxfast.formats.base.load import ResolvedModel, resolve_model, resolve_precision
from fluxfast.model.spec import FluxSpec
from fluxfast.sampling.picture import Picture, pictures_of
from fluxfast.util.files import check_no_links, shared_lock
from fluxfast.util.hub import ENCODERS, TRANSFORMER, fetch_model
from fluxfast.util.terminal import progress_bars

log = logging.getLogger(__name__)

_BARS = {"hash": "reading images", "text": "encoding captions", "latents": "encoding images"}


class Parts(NamedTuple):
    """A model's parts. root: holds the VAE and the text encoders; text_length: T5 tokens per
    prompt.
    """

    model: ResolvedModel
    root: Path
    text_length: int


@dataclass
class Prepared:
    """Everything that training reads from disk.

    held_out: the samples that validation measures on; model: the transformer; root: holds the VAE
    and the text encoders; prompts: preview prompt with its trigger -> the file of its embeddings,
    empty where they cannot be encoded.
    """

    dataset: Dataset
    held_out: list[Sample]
    model: ResolvedModel
    root: Path
    prompts: dict[str, Path]


def prepare(
    config: Config,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
    parts: Parts | None = None,
    check: Callable[[set[Bucket]], None] = lambda buckets: None,
    areas: Areas | None = None,
) -> Prepared:
    """Resolve the model and encode what the cache lacks, preview prompts too; each rank its share.

    parts: the model's, if they are resolved already. check: is called with the buckets before
    anything is encoded, to refuse them. areas: what `stored_areas` returns for the run. Raises
    FluxfastError for a missing or unfit model, data that cannot be used, or a full disk;
    ConfigError for a precision that cannot be.
    """
    with ranks.main_process_first():  # one fetches what is on the Hub
        model, root, length = parts or resolve_parts(config.model, device)
    encoding = Encoding(root, length, device, encoder_dtype(device))
    previews = preview_pictures(config)
    prompts = list(dict.fromkeys(text for each in previews for text in each.prompts))
    check_no_links(config.cache_path, "latents", "text")
    bars = progress_bars(transient=True)
    with bars, shared_lock(config.cache_path, "latents", "text"):
        tasks: dict[str, Any] = {}  # the bars' ids

        def progress(kind: str, done: int, total: int) -> None:
            if kind not in tasks:
                tasks[kind] = bars.add_task(_BARS[kind], total=total)
                if bars.disable:
                    log.info(f"{_BARS[kind]}: {total}")
            bars.update(tasks[kind], completed=done, total=total)

        share = config.validation.share

        def check_plan(names: set[str], buckets: set[Bucket]) -> None:
            if share:
                _held_out(names, share, config.seed)
            check(buckets)

        encode = partial(prepare_dataset, encoding=encoding, progress=progress, ranks=ranks)
        dataset = encode(config, extra_prompts=prompts, check=check_plan, areas=areas)
        held_out: list[Sample] = []
        if share:
            dataset, held_out = hold_out(dataset, share, config.seed)
        elif config.validation.folder is not None:
            # with the first data entry's captions and resolutions, each image once
            folder = {"folder": config.validation.folder, "recursive": True}
            data = config.data[0].model_copy(update=folder | {"num_repeats": 1, "flip": False})
            only = config.model_copy(update={"data": [data]})
            # not merged: measured without graphs, and a later picture must not move the others
            held_out = encode(only, areas={}).samples
        files = prompt_files(prompts, config.cache_path, encoding)
        if not all(is_complete(file, TEXT) for file in files.values()):
            files = {}
    if held_out:
        pictures = len({sample.name for sample in held_out})
        log.info(f"validation: {pictures} pictures held out")
    return Prepared(dataset, held_out, model, root, files)


def hold_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, list[Sample]]:
    """Takes `share` of the images (at least one) out of the training set, at every resolution and
    repeat. Which ones depends on their names and the seed alone.

    Returns the remaining data set and the held-out samples, one per image and resolution. Raises
    ConfigError if nothing would be left to train on.
    """
    held = _held_out({sample.name for sample in dataset.samples}, share, seed)
    samples = [sample for sample in dataset.samples if sample.name not in held]
    held_out = {sample.latents: sample for sample in dataset.samples if sample.name in held}
    return replace(dataset, samples=samples), list(held_out.values())


def _held_out(pictures: set[str], share: float, seed: int) -> set[str]:
    names = sorted(pictures)
    count = max(1, round(share * len(names)))
    if count >= len(names):
        raise ConfigError(
            f"validation.share {share} of {len(names)} pictures leaves none to train on"
        )
    return {names[i] for i in rng.permutation(seed, "validation", 0, len(names))[:count]}


def encoder_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of the text encoders and the VAE."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def preview_pictures(config: Config) -> list[Picture]:
    """Returns the previews' settings with [trigger] in their prompts replaced by the run's trigger,
    or by the only one of the data. Raises ConfigError where there is none, or one of several.
    """
    words = config.triggers
    trigger = clean_trigger(config.trigger) or (words[0] if len(words) == 1 else None)

    def filled(prompt: str) -> str:
        if PLACEHOLDER in prompt and trigger is None:
            raise ConfigError(
                f"sample.prompts: {prompt!r} has [trigger], but there is no one trigger",
                hint=f"write the one that is meant: {', '.join(words or ['ohwx dog'])}",
            )
        return prompt.replace(PLACEHOLDER, trigger or "")

    pictures = pictures_of(config.sample)
    for picture in pictures:
        picture.options.negative = filled(picture.options.negative)
    return [replace(picture, prompt=filled(picture.prompt)) for picture in pictures]


def resolve_parts(config: ModelConfig, device: torch.device) -> Parts:
    """Finds the model's parts on disk or the Hub and decides its precision.

    Raises FluxfastError for a model that is missing, incomplete or unfit, ConfigError if it cannot
    be stored and multiplied as configured.
    """
    resolve_precision(config.storage, config.compute, device)  # fails before a download
    wanted = TRANSFORMER if config.encoders else (*TRANSFORMER, *ENCODERS)
    base = fetch_model(config.path, wanted)
    # first, so that a LoRA or a VAE is named as such, and not as a base without encoders
    model = resolve_model(base, config.storage, config.compute, device, layers=config.layers)
    root = _encoders_root(config, base)
    return Parts(model, root, _text_length(config, model.spec, root))


def _encoders_root(model: ModelConfig, base: Path) -> Path:
    """Returns the folder or file that holds the VAE, the text encoders and the tokenizers."""
    if model.encoders:
        root = fetch_model(model.encoders, ENCODERS)
    else:
        root = base.parent if base.is_dir() and base.name == "transformer" else base
    missing = [name for name in ENCODERS if not has_component(root, name)]
    if missing:
        is_single = root.is_file() and not model.encoders
        raise (ConfigError if is_single else FluxfastError)(
            f"{root} lacks {', '.join(missing)}",
            hint="set model.encoders to a diffusers folder, a Hub id or an all-in-one file, or to "
            "a folder with CLIP-L, T5 and VAE files",
        )
    return root


def _text_length(model: ModelConfig, spec: FluxSpec, root: Path) -> int:
    """Returns the T5 tokens: as configured, or the model's own if its tokenizer takes so many."""
    length = model.max_sequence_length
    limit = tokenizer_length(cast(Path, component(root, "tokenizer_2")))
    if length and limit and length > limit:
        raise ConfigError(
            f"model.max_sequence_length is {length}, the model's T5 tokenizer takes at most {limit}"
        )
    return length or min(spec.text_length, limit or spec.text_length)
