"""From a configuration to a cached data set: resolves the model's parts and runs the cache step
with a bar.

Needs neither transformers nor diffusers when everything is cached.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from fluxfast import rng
from fluxfast.config.schema import Config, ModelConfig
from fluxfast.data.cache import Encoding, encode_prompts, prepare_dataset
from fluxfast.data.captions import clean_trigger
from fluxfast.data.store import Dataset, Sample
from fluxfast.distributed import SINGLE_PROCESS, Ranks
from fluxfast.encoders.components import component, has_component
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.folder import tokenizer_length
from fluxfast.formats.base.load import ResolvedModel, resolve_model, resolve_precision
from fluxfast.model.spec import FluxSpec
from fluxfast.util.files import check_no_links, shared_lock
from fluxfast.util.hub import ENCODERS, TRANSFORMER, fetch_model
from fluxfast.util.terminal import progress_bars

log = logging.getLogger(__name__)

_BARS = {"hash": "reading images", "text": "encoding captions", "latents": "encoding images"}


class Parts(NamedTuple):
    """A model's parts. root: what holds the VAE and the text encoders; text_length: T5 tokens per
    prompt.
    """

    model: ResolvedModel
    root: Path
    text_length: int


@dataclass
class Prepared:
    """Everything that training reads from disk.

    held_out: what validation measures on (empty without); model: the transformer; root: what holds
    the VAE and the text encoders; prompts: preview prompt (trigger put in) -> its embeddings' file.
    """

    dataset: Dataset
    held_out: list[Sample]
    model: ResolvedModel
    root: Path
    prompts: dict[str, Path]


def prepare(
    config: Config, device: torch.device, ranks: Ranks = SINGLE_PROCESS, parts: Parts | None = None
) -> Prepared:
    """Resolve the model and encode what the cache lacks, preview prompts too; each rank its share.

    parts: the model's, where they are resolved already. Raises FluxfastError for a missing or unfit
    model, data that cannot be used, or a full disk; ConfigError for a precision that cannot be.
    """
    with ranks.main_process_first():  # one fetches what is on the Hub
        model, root, length = parts or resolve_parts(config.model, device)
    encoding = Encoding(root, length, device, encoder_dtype(device))
    prompts = preview_prompts(config)
    check_no_links(config.cache_path, "latents", "text")
    bars = progress_bars(transient=True)
    with bars, shared_lock(config.cache_path, "latents", "text"):
        tasks: dict[str, Any] = {}  # the bars' ids

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(_BARS.get(what, what), total=total)
                if bars.disable:
                    log.info(f"{_BARS.get(what, what)}: {total}")
            bars.update(tasks[what], completed=done, total=total)

        def prepared(settings: Config, prompts: list[str]) -> Dataset:
            return prepare_dataset(settings, encoding, progress, extra_prompts=prompts, ranks=ranks)

        dataset, held_out = _hold_out(config, prepared(config, prompts), prepared)
        files = encode_prompts(prompts, config.cache_path, encoding)
    log.info(
        f"{len(dataset.samples)} samples in {len(dataset.buckets)} buckets: "
        + ", ".join(f"{w}x{h} ({n})" for (w, h), n in dataset.buckets.items()),
    )
    if held_out:
        pictures = len({sample.name for sample in held_out})
        log.info(f"validation: {pictures} pictures held out")
    return Prepared(dataset, held_out, model, root, files)


def _hold_out(
    config: Config, dataset: Dataset, prepared: Callable[[Config, list[str]], Dataset]
) -> tuple[Dataset, list[Sample]]:
    """-> (the training set, held-out samples), by share or from a folder of their own."""
    validation = config.validation
    if validation.share:
        return hold_out(dataset, validation.share, config.seed)
    if validation.folder is None:
        return dataset, []
    # the first data entry's way with captions, at its resolutions, each picture once
    data = config.data[0].model_copy(
        update={"folder": validation.folder, "recursive": True, "num_repeats": 1, "flip": False}
    )
    only = config.model_copy(update={"data": [data]})
    return dataset, prepared(only, []).samples


def hold_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, list[Sample]]:
    """Take `share` of the pictures (at least one) out of the training set, at every resolution and
    repeat.

    -> (what is left, the held-out samples, one per picture and resolution). Which pictures depends
    on their content's keys and the seed alone. Raises ConfigError where nothing would be left to
    train on.
    """
    names = sorted({sample.name for sample in dataset.samples})
    count = max(1, round(share * len(names)))
    if count >= len(names):
        raise ConfigError(
            f"validation.share {share} of {len(names)} pictures leaves none to train on"
        )
    held = {names[i] for i in rng.permutation(seed, "validation", 0, len(names))[:count]}
    samples = [sample for sample in dataset.samples if sample.name not in held]
    buckets = {}
    for sample in samples:
        buckets[sample.size] = buckets.get(sample.size, 0) + 1
    out = {s.latents: s for s in dataset.samples if s.name in held}
    return Dataset(samples, dataset.empty_text, dict(sorted(buckets.items()))), list(out.values())


def encoder_dtype(device: torch.device) -> torch.dtype:
    """What the text encoders and the VAE run in."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def preview_prompts(config: Config) -> list[str]:
    """The preview prompts with [trigger] replaced. Raises FluxfastError where there is no
    trigger.
    """
    trigger = clean_trigger(config.trigger)
    prompts = []
    for prompt in config.sample.prompts:
        if "[trigger]" in prompt and trigger is None:
            raise ConfigError(
                f"sample.prompts: {prompt!r} has [trigger], but no trigger is set",
                hint='set trigger: "ohwx dog"',
            )
        prompts.append(prompt.replace("[trigger]", trigger or ""))
    return prompts


def resolve_parts(config: ModelConfig, device: torch.device) -> Parts:
    """Raises FluxfastError for a model that is missing, incomplete or unfit, ConfigError where it
    cannot be stored and multiplied as asked.
    """
    resolve_precision(config.storage, config.compute, device)  # fails before a download
    wanted = TRANSFORMER if config.encoders else (*TRANSFORMER, *ENCODERS)
    base = fetch_model(config.path, wanted)
    root = _encoders_root(config, base)
    model = resolve_model(base, config.storage, config.compute, device, layers=config.layers)
    return Parts(model, root, _text_length(config, model.spec, root))


def _encoders_root(model: ModelConfig, base: Path) -> Path:
    """What holds the VAE, the text encoders and the tokenizers."""
    if model.encoders:
        root = fetch_model(model.encoders, ENCODERS)
    else:
        root = base.parent if base.is_dir() and base.name == "transformer" else base
    missing = [name for name in ENCODERS if not has_component(root, name)]
    if missing and root.is_file() and not model.encoders:
        raise ConfigError(
            f"model.path {base} is a single file that brings no {', '.join(missing)}",
            hint="set model.encoders to a diffusers folder or a Hub id, or to a folder with "
            "CLIP-L, T5 and VAE files",
        )
    if missing:
        raise FluxfastError(
            f"{root} lacks {', '.join(missing)}",
            hint="give a complete diffusers folder or all-in-one file, or set model.encoders to "
            "one",
        )
    return root


def _text_length(model: ModelConfig, spec: FluxSpec, root: Path) -> int:
    """T5 tokens: as asked, else the model's own length, never more than its tokenizer takes."""
    asked = model.max_sequence_length
    limit = tokenizer_length(cast(Path, component(root, "tokenizer_2")))
    if asked and limit and asked > limit:
        raise ConfigError(
            f"model.max_sequence_length is {asked}, the model's T5 tokenizer takes at most {limit}"
        )
    return asked or min(spec.text_length, limit or spec.text_length)
