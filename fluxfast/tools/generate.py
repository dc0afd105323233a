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
    loras: Sequence[Path] = (),
    strengths: Sequence[float] = (1.0,),
    device: str = "auto",
) -> list[Path]:
    """Draws `pictures` and saves them as PNG in `out`, each with its prompt and settings in the
    file. Text encoders, transformer and VAE are loaded one after the other. Returns the files.

    loras: files of any format, added up, each times its strength (or one strength for all).
    Raises FluxfastError for a model or LoRA that cannot be used, and ConfigError for a size or a
    precision.
    """
    where = resolve_device(device)
    for lora in loras:
        read_lora(lora)
    resolved, root, length = resolve_parts(model, where)
    dtype = encoder_dtype(where)
    encoders = TextEncoders(root, where, dtype)
    t5, pooled = encoders.encode([picture.prompt for picture in pictures], length)
    t5, pooled = t5.cpu(), pooled.cpu()
    encoders.close()
    flux = load_resolved(resolved, where, double_quant=model.double_quant)
    more = {}
    if loras:
        load_lora(flux, loras, strengths)
        more = {"lora": ", ".join(map(str, loras)), "strength": ", ".join(map(str, strengths))}
    images = draw_pictures(flux, pictures, list(zip(t5, pooled, strict=True)), root, where, dtype)
    del flux
    if where.type == "cuda":
        torch.cuda.empty_cache()
    files = []
    for index, (picture, image) in enumerate(zip(pictures, images, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", picture.prompt.lower()).strip("-")[:40] or "picture"
        files.append(out / f"{index:02d}-seed{picture.seed}-{slug}.png")
        save_picture(files[-1], image, picture, model=model.path, **more)
    return files
