"""`fluxfast sample`: prompts to pictures, with a LoRA or without."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from fluxfast.config.schema import ModelConfig
from fluxfast.data.prepare import encoder_dtype, resolve_parts
from fluxfast.encoders.text import TextEncoders
from fluxfast.formats.base.load import load_resolved, resolve_device
from fluxfast.formats.lora.apply import load_lora, read_lora
from fluxfast.sampling import Picture, draw_pictures, save_picture


def generate(
    model: ModelConfig,
    pictures: list[Picture],
    out: Path,
    lora: Path | Sequence[Path] = (),
    strength: float | Sequence[float] = 1.0,
    device: str = "auto",
) -> list[Path]:
    """Draw `pictures` and save them as PNG in `out`, each with its prompt and settings in the file.

    lora: files of any format, added up, each times its strength (or one strength for all).

    Text encoders, transformer and VAE are loaded one after the other. -> the files.
    Raises FluxfastError for a model or LoRA that cannot be used, and ConfigError for a size or a
    precision.
    """
    place = resolve_device(device)
    for file in [lora] if isinstance(lora, Path) else lora:
        read_lora(file)
    resolved, root, length = resolve_parts(model, place)
    dtype = encoder_dtype(place)
    encoders = TextEncoders(root, place, dtype)
    t5, pooled = encoders.encode([picture.prompt for picture in pictures], length)
    t5, pooled = t5.cpu(), pooled.cpu()
    encoders.close()
    flux = load_resolved(resolved, place, double_quant=model.double_quant)
    if lora:
        load_lora(flux, lora, strength)
    images = draw_pictures(flux, pictures, list(zip(t5, pooled, strict=True)), root, place, dtype)
    del flux
    if place.type == "cuda":
        torch.cuda.empty_cache()
    files = []
    for index, (picture, image) in enumerate(zip(pictures, images, strict=True)):
        files.append(out / f"{index:02d}-seed{picture.seed}-{_slug(picture.prompt)}.png")
        more = {"lora": _words(lora), "strength": _words(strength)} if lora else {}
        save_picture(files[-1], image, picture, model=model.path, **more)
    return files


def _words(values) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list | tuple) else str(values)


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "picture"
