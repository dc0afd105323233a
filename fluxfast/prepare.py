"""From a configuration to a cached data set: resolves the model's parts and runs the cache step
with a bar.

Needs neither transformers nor diffusers when everything is cached.
"""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from fluxfast.config import Config
from fluxfast.data.cache import prepare_dataset
from fluxfast.data.store import Dataset
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base import open_base, tokenizer_length
from fluxfast.hub import ENCODERS, TRANSFORMER, resolve_model
from fluxfast.metrics import say

_BARS = {"hash": "reading images", "text": "encoding captions", "latents": "encoding images"}


def prepare(config: Config, device: torch.device, console: Console) -> tuple[Dataset, Path]:
    """-> (the cached data set, the transformer's path). Encodes what the cache lacks.

    Raises FluxfastError for a missing or unfit model, data that cannot be used, or a full disk.
    """
    wanted = TRANSFORMER if config.model.encoders else (*TRANSFORMER, *ENCODERS)
    base = resolve_model(config.model.path, wanted)
    root = _encoders_root(config, base)
    length = _text_length(config, base, root)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, int] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(_BARS.get(what, what), total=total)
                if not console.is_terminal:
                    say(console, f"{_BARS.get(what, what)}: {total}")
            bars.update(tasks[what], completed=done, total=total)

        dataset = prepare_dataset(config, root, length, device, dtype, progress)
    say(
        console,
        f"{len(dataset.samples)} samples in {len(dataset.buckets)} buckets: "
        + ", ".join(f"{w}x{h} ({n})" for (w, h), n in dataset.buckets.items()),
    )
    return dataset, base


def _encoders_root(config: Config, base: Path) -> Path:
    """The folder with vae/, the text encoders and the tokenizers."""
    if config.model.encoders:
        root = resolve_model(config.model.encoders, ENCODERS)
    elif base.is_dir():
        root = base.parent if base.name == "transformer" else base
    else:
        raise ConfigError(
            f"model.path {base} is a single file: it brings no text encoders and no VAE",
            hint="set model.encoders to a diffusers folder or a Hub id that has them",
        )
    missing = [name for name in ENCODERS if not (root / name).is_dir()]
    if missing:
        raise FluxfastError(
            f"{root} lacks {', '.join(missing)}",
            hint="give a complete diffusers folder, or set model.encoders to one",
        )
    return root


def _text_length(config: Config, base: Path, root: Path) -> int:
    """T5 tokens: as asked, else the model's own length, never more than its tokenizer takes."""
    with open_base(base) as checkpoint:
        default = checkpoint.spec.text_length
    asked = config.model.max_sequence_length
    limit = tokenizer_length(root)
    if asked and limit and asked > limit:
        raise ConfigError(
            f"model.max_sequence_length is {asked}, the model's T5 tokenizer takes at most {limit}"
        )
    return asked or min(default, limit or default)
