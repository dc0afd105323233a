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
from fluxfast.model.init import hollow
from fluxfast.sampling import Picture, draw_pictures, save_picture
from fluxfast.util.files import check_writable


def generate(
    model: ModelConfig,
    pictures: list[Picture],
    out: Path,
    loras: Sequence[Path] = (),
    strengths: Sequence[float] = (1.0,),
    device: str = "auto",
) -> list[Path]:
    """Draws `pictures`, each saved when it is drawn, with its prompt and settings in the file, as
    OUT/NN-seedSEED-WORDS.png: NN counts on from the highest there, so that nothing is overwritten.
    Text encoders, transformer and VAE are loaded one after the other. Returns the files.

    loras: files of any format, added up, each times its strength (or one strength for all).
    Raises FluxfastError for a model or LoRA that cannot be used, and ConfigError for a size or a
    precision.
    """
    where = resolve_device(device)
    check_writable(out)
    for lora in loras:
        read_lora(lora)
    resolved, root, length = resolve_parts(model, where)
    if loras:
        load_lora(hollow(resolved.spec), loras, strengths)  # they fit: seen before anything is read
    dtype = encoder_dtype(where)
    encoders = TextEncoders(root, where, dtype)
    embeddings = []
    for picture in pictures:  # one at a time: neither memory nor bits depend on the other prompts
        t5, pooled = encoders.encode([picture.prompt], length)
        embeddings.append((t5[0].cpu(), pooled[0].cpu()))
    encoders.close()
    flux = load_resolved(resolved, where, double_quant=model.double_quant)
    more = {}
    if loras:
        load_lora(flux, loras, strengths)
        more = {"lora": ", ".join(map(str, loras)), "strength": ", ".join(map(str, strengths))}
    files = []
    images = draw_pictures(flux, pictures, embeddings, root, where, dtype)
    for picture, image in zip(pictures, images, strict=True):
        words = re.sub(r"[^a-z0-9]+", "-", picture.prompt.lower()).strip("-")[:40] or "picture"
        files.append(_reserve(out, f"seed{picture.seed}-{words}.png"))
        save_picture(files[-1], image, picture, model=model.path, **more)
    del flux
    if where.type == "cuda":
        torch.cuda.empty_cache()
    return files


def _reserve(folder: Path, name: str) -> Path:
    """Creates the empty file NN-NAME in `folder`, for this process alone."""
    counted = (re.match(r"(\d+)-", file.name) for file in folder.glob("*.png"))
    number = max((int(match[1]) + 1 for match in counted if match), default=0)
    while True:
        try:
            (path := folder / f"{number:02d}-{name}").touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1
