"""Pictures from a model: Euler steps along the flow, PNG files that say how they were made, a
contact sheet.

Takes prompt embeddings, not prompts, so that training can draw previews without a text encoder.
Source of the schedule: BFL `flux/sampling.py`, get_schedule and denoise.
"""

import io
import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fluxfast import rng
from fluxfast.encoders.vae import Vae
from fluxfast.errors import ConfigError
from fluxfast.model.flux import Flux
from fluxfast.objective import flux_shift, image_ids, pack, text_ids, unpack
from fluxfast.util.files import write_atomic


@dataclass(frozen=True)
class Picture:
    """What makes one picture, written into its file. width, height in pixels."""

    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float


def schedule(steps: int, tokens: int, shifted: bool = True) -> list[float]:
    """t from 1 (noise) to 0 in `steps` steps: steps + 1 values.

    shifted: FLUX.1-dev's resolution-dependent shift towards noise, by the number of image tokens.
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if shifted:
        t[1:-1] = flux_shift(t[1:-1], tokens)
    return t.tolist()


def noise_for(
    seed: int, channels: int, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The starting noise of a seed, fp32 [1, C, h, w]; h, w in latent rows and columns."""
    return rng.normal(seed, "sample", 0, (channels, height, width), device)


@torch.no_grad()
def sample_latents(
    model: Flux, noise: Tensor, t5: Tensor, pooled: Tensor, steps: int, guidance: float
) -> Tensor:
    """Follow the flow from noise to a picture's latents. fp32 [B, C, h, w] -> the same shape.

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


def latent_size(picture: Picture, factor: int) -> tuple[int, int]:
    """(rows, columns) of the latents. Raises ConfigError unless both sides are multiples of
    2·factor.
    """
    step = 2 * factor
    if picture.width % step or picture.height % step or min(picture.width, picture.height) < step:
        raise ConfigError(
            f"a picture of {picture.width}x{picture.height} cannot be sampled: both sides must be "
            f"multiples of {step}"
        )
    return picture.height // factor, picture.width // factor


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in -1..1 -> an 8-bit picture."""
    bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(bytes_.permute(1, 2, 0).cpu().numpy())


def draw_pictures(
    model: Flux,
    pictures: list[Picture],
    embeddings: list[tuple[Tensor, Tensor]],
    root: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> list[Image.Image]:
    """One picture after the other, then the VAE once for all; nothing stays in memory.

    embeddings: (t5 [L, D], pooled [P]) per picture. root: the folder that holds vae/.
    """
    vae = Vae(root, device, dtype)
    try:
        images = []
        for picture, (t5, pooled) in zip(pictures, embeddings, strict=True):
            size = latent_size(picture, vae.factor)
            noise = noise_for(picture.seed, vae.channels, *size, device)
            latents = sample_latents(
                model,
                noise,
                t5[None].to(device),
                pooled[None].to(device),
                picture.steps,
                picture.guidance,
            )
            images.append(to_image(vae.decode(latents)[0]))
    finally:
        vae.close()
    return images


def save_picture(path: Path, image: Image.Image, picture: Picture, **more: str) -> None:
    """A PNG with the prompt, seed and settings in its text chunks (`fluxfast`: all of them as
    JSON).
    """
    info = PngInfo()
    info.add_itxt("prompt", picture.prompt)
    info.add_text("seed", str(picture.seed))
    info.add_itxt("fluxfast", json.dumps({**asdict(picture), **more}, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_atomic(path, buffer.getvalue())


def contact_sheet(
    rows: list[tuple[str, list[Path | None]]], columns: list[str], path: Path
) -> None:
    """One row per prompt, one column per step; a missing picture stays blank.

    rows: (prompt, a PNG file per column). Pictures are shown in cells of 256 px.
    """
    cell, left, top = 256, 160, 24
    sheet = Image.new(
        "RGB", (left + cell * len(columns), top + (cell + 4) * len(rows)), (250, 250, 250)
    )
    pen = ImageDraw.Draw(sheet)
    for x, title in enumerate(columns):
        pen.text((left + x * cell + 4, 6), title, fill=(0, 0, 0))
    for y, (prompt, files) in enumerate(rows):
        for line, text in enumerate(_lines(prompt, 24)[:12]):
            pen.text((6, top + y * (cell + 4) + 14 * line + 4), text, fill=(0, 0, 0))
        for x, file in enumerate(files):
            picture = _shown(file, cell - 4) if file and file.is_file() else None
            if picture is not None:
                sheet.paste(picture, (left + x * cell, top + y * (cell + 4)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _shown(file: Path, side: int) -> Image.Image | None:
    """A preview at most `side` pixels wide and high; None where it is no PNG that can be read."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            picture = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    larger = side // max(picture.size)
    if larger > 1:  # tiny ones by whole factors, so that pixels stay pixels
        picture = picture.resize(
            (picture.width * larger, picture.height * larger), Image.Resampling.NEAREST
        )
    picture.thumbnail((side, side))
    return picture


def _lines(text: str, width: int) -> list[str]:
    """Cut at spaces where there are any. PIL's own font knows Latin-1 only: the rest becomes
    `?`.
    """
    return textwrap.wrap(text.encode("latin-1", "replace").decode("latin-1"), width) or [""]
