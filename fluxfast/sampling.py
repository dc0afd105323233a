"""Pictures from a model: Euler steps along the flow, PNG files with settings, a contact sheet.

Takes prompt embeddings, not prompts, so that training draws previews without a text encoder.
Source of the schedule: BFL `flux/sampling.py`, get_schedule and denoise.
"""

import io
import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fluxfast import rng
from fluxfast.config.schema import SampleConfig
from fluxfast.encoders.vae import Vae
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.model.flux import Flux
from fluxfast.objective import flux_shift, image_ids, pack, text_ids, unpack
from fluxfast.util.files import write_atomic

_CELL, _LEFT, _TOP, _GAP = 256, 160, 24, 4  # pixels of the contact sheet


@dataclass(frozen=True)
class Picture:
    """The settings of one picture, written into its file. width, height in pixels."""

    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float


def pictures_of(settings: SampleConfig, prompts: list[str]) -> list[Picture]:
    """Returns the picture of each prompt, with a seed of its own under `walk_seed`. The last ones
    are those of `samples`, with settings of their own.
    """
    shared = settings.model_dump(include={"width", "height", "steps", "guidance"})
    pictures = []
    for index, prompt in enumerate(prompts):
        seed = settings.seed + settings.walk_seed * index
        place = index - len(prompts) + len(settings.samples)
        own = settings.samples[place].model_dump(exclude_none=True) if place >= 0 else {}
        pictures.append(Picture(**{"seed": seed, **shared, **own, "prompt": prompt}))
    return pictures


def schedule(steps: int, tokens: int, shifted: bool = True) -> list[float]:
    """Returns steps + 1 values of t from 1 (noise) to 0.

    shifted: FLUX.1-dev's resolution-dependent shift towards noise, by the number of image tokens.
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if shifted:
        t[1:-1] = flux_shift(t[1:-1], tokens)
    return t.tolist()


def noise_for(
    seed: int, channels: int, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns the starting noise of a seed, fp32 [1, C, h, w], h, w in latent rows and columns."""
    return rng.normal(seed, "sample", 0, (channels, height, width), device)


@torch.no_grad()
def sample_latents(
    model: Flux, noise: Tensor, t5: Tensor, pooled: Tensor, steps: int, guidance: float
) -> Tensor:
    """Follow the flow from noise to latents, fp32 [B, C, h, w] both.

    t5 [B, L, D], pooled [B, P]: prompt embeddings. guidance goes to dev's embedding; schnell has
    none and no shift. The model's LoRA acts at its own strength; its mode is left as it was.
    """
    height, width = noise.shape[2:]
    x = pack(noise)
    times = schedule(steps, x.shape[1], shifted=model.spec.guidance_embed)
    img_ids, txt_ids = image_ids(height, width, x.device), text_ids(t5.shape[1], x.device)
    training = model.training
    model.eval()
    try:
        for now, following in zip(times, times[1:], strict=False):
            t = torch.full((len(x),), now, device=x.device)
            scale = torch.full_like(t, guidance)
            velocity = model(x, img_ids, t5, txt_ids, t, pooled, scale)
            x = x + (following - now) * velocity.float()
    finally:
        model.train(training)
    return unpack(x, height, width)


def draw_pictures(
    model: Flux,
    pictures: list[Picture],
    embeddings: list[tuple[Tensor, Tensor]],
    root: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Image.Image]:
    """Yields each picture when it is drawn, 8-bit RGB. The VAE, from `root`/vae, is loaded once
    and freed at the end.

    embeddings: (t5 [L, D], pooled [P]) per picture. Raises ConfigError for a size that is no
    multiple of two latent cells, FluxfastError for a picture that is not finite.
    """
    vae = Vae(root, device, dtype)
    try:
        for picture, embedding in zip(pictures, embeddings, strict=True):
            yield draw_picture(model, vae, picture, embedding)
    finally:
        vae.close()


def draw_picture(
    model: Flux, vae: Vae, picture: Picture, embedding: tuple[Tensor, Tensor]
) -> Image.Image:
    """As `draw_pictures`, one picture by a VAE that is loaded."""
    width, height = picture.width, picture.height
    multiple = 2 * vae.factor
    if width % multiple or height % multiple or min(width, height) < multiple:
        raise ConfigError(
            f"a picture of {width}x{height} cannot be sampled: both sides must be "
            f"multiples of {multiple}"
        )
    size = height // vae.factor, width // vae.factor
    noise = noise_for(picture.seed, vae.channels, *size, vae.device)
    t5, pooled = (tensor[None].to(vae.device) for tensor in embedding)
    latents = sample_latents(model, noise, t5, pooled, picture.steps, picture.guidance)
    pixels = vae.decode(latents)[0]
    if not torch.isfinite(pixels).all():
        raise FluxfastError(
            f"the picture of {picture.prompt[:60]!r} is not finite",
            hint="the LoRA, its strength or the precision makes numbers that are too "
            "large; --storage bf16 --compute bf16 tells which",
        )
    pixels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())


def save_picture(path: Path, image: Image.Image, picture: Picture, **more: str) -> None:
    """Write a PNG with prompt, seed and, in `fluxfast`, all settings and `more` as JSON."""
    info = PngInfo()
    info.add_itxt("prompt", picture.prompt)
    info.add_text("seed", str(picture.seed))
    info.add_itxt("fluxfast", json.dumps({**asdict(picture), **more}, ensure_ascii=False))
    image.save(buffer := io.BytesIO(), "PNG", pnginfo=info)
    write_atomic(path, buffer.getvalue())


def settings_of(file: Path) -> dict[str, Any]:
    """Returns what `save_picture` wrote into a file, nothing for any other file."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            return {**json.loads(image.info["fluxfast"])}
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def contact_sheet(
    rows: list[tuple[str, list[Path | None]]], columns: list[str], path: Path
) -> None:
    """Write a picture with a row per prompt and a column per step; a missing preview stays blank.

    rows: (prompt, a PNG file per column).
    """
    size = _LEFT + _CELL * len(columns), _TOP + (_CELL + _GAP) * len(rows)
    sheet = Image.new("RGB", size, (250, 250, 250))
    pen = ImageDraw.Draw(sheet)
    for x, title in enumerate(columns):
        pen.text((_LEFT + x * _CELL + 4, 6), title, fill=(0, 0, 0))
    for y, (prompt, files) in enumerate(rows):
        top = _TOP + y * (_CELL + _GAP)
        latin = prompt.encode("latin-1", "replace").decode("latin-1")  # all that PIL's font has
        for line, text in enumerate(textwrap.wrap(latin, 24)[:12]):
            pen.text((6, top + 14 * line + 4), text, fill=(0, 0, 0))
        for x, file in enumerate(files):
            picture = read_png(file) if file and file.is_file() else None
            if picture is not None:
                sheet.paste(_fitted(picture, _CELL - 4), (_LEFT + x * _CELL, top))
    sheet.save(buffer := io.BytesIO(), "PNG")
    write_atomic(path, buffer.getvalue())


def read_png(file: Path) -> Image.Image | None:
    """Returns a PNG file as RGB, None where it is another kind of file or damaged."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """Returns the picture at most `side` pixels wide and high, tiny ones in larger pixels."""
    if (factor := side // max(picture.size)) > 1:
        size = picture.width * factor, picture.height * factor
        picture = picture.resize(size, Image.Resampling.NEAREST)
    picture.thumbnail((side, side))
    return picture
