"""Draws pictures: settings and prompt embeddings to pixels, from noise or from a picture."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fluxfast import rng
from fluxfast.data.images import center_box, fit_image, load_image, load_mask
from fluxfast.data.store import TEXT, read_tensors
from fluxfast.encoders.placement import free_bytes
from fluxfast.encoders.vae import Vae
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.memory.cuda_graphs import Graphs
from fluxfast.memory.planner.plan import VAE_BYTES_A_PIXEL
from fluxfast.model.flux import Flux
from fluxfast.sampling.picture import Picture
from fluxfast.sampling.sampler import (
    Embedding,
    StepProgress,
    first_step,
    noise_for,
    sample_latents,
)

_FACTOR = 8  # pixels per latent along a side of FLUX's VAE


def read_embedding(file: Path) -> Embedding:
    """Returns the embedding of a prompt's file in the cache."""
    tensors = read_tensors(file, TEXT)
    return tensors["t5"][None], tensors["pooled"][None]


def check_picture(picture: Picture) -> None:
    """Raises ConfigError for settings that leave nothing to do, FluxfastError for a picture or mask
    that cannot be read. Before work begins.
    """
    options = picture.options
    if options.image is None:
        return
    if first_step(picture.steps, options.strength) == picture.steps:
        raise ConfigError(
            f"strength {options.strength:g} of {picture.steps} steps leaves no step to do",
            hint="any strength above 0 does one; at 1 nothing of the picture stays",
        )
    source = Source(picture, load_image(options.image)[0])
    mask = source.latent_mask(_FACTOR)
    if mask is not None and not mask.any():
        raise ConfigError(
            f"the mask {options.mask} leaves nothing to paint anew at {picture.width}x"
            f"{picture.height}",
            hint="white is painted anew: less than a latent of 8 pixels is lost",
        )


def draw_picture(
    model: Flux,
    vae: Vae,
    picture: Picture,
    embeddings: list[Embedding],
    progress: StepProgress | None = None,
    graphs: Graphs | None = None,
) -> Image.Image:
    """Returns 8-bit RGB. embeddings: of `picture.prompts`.

    Raises ConfigError for a size that is no multiple of two latent cells, FluxfastError for a
    picture that is not finite.
    """
    width, height = picture.width, picture.height
    multiple = 2 * vae.factor
    if width % multiple or height % multiple or min(width, height) < multiple:
        raise ConfigError(
            f"a picture of {width}x{height} cannot be sampled: both sides must be "
            f"multiples of {multiple}"
        )
    size = height // vae.factor, width // vae.factor
    _make_room(vae, picture, graphs)
    noise = noise_for(picture.seed, vae.channels, *size, vae.device)
    embeddings = [(t5.to(vae.device), pooled.to(vae.device)) for t5, pooled in embeddings]
    image = picture.options.image
    source = Source(picture, load_image(image)[0]) if image else None
    latents = mask = None
    if source:
        latents, mask = source.latents(vae), source.latent_mask(vae.factor)
        mask = mask if mask is None else mask.to(vae.device)
    result = sample_latents(model, noise, picture, embeddings, latents, mask, progress, graphs)
    _make_room(vae, picture, graphs)
    pixels = vae.decode(result)[0]
    if not torch.isfinite(pixels).all():
        raise FluxfastError(
            f"the picture of {picture.prompt[:60]!r} is not finite",
            hint="the LoRA, its strength or the precision makes numbers that are too "
            "large; --storage bf16 --compute bf16 tells which",
        )
    pixels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    image = Image.fromarray(pixels.cpu().numpy())
    return source.pasted(image) if source else image


def _make_room(vae: Vae, picture: Picture, graphs: Graphs | None) -> None:
    """Drops graphs whose pool takes the VAE's room."""
    needed = VAE_BYTES_A_PIXEL * picture.width * picture.height
    if graphs and free_bytes(vae.device) < needed:
        graphs.drop()


def _binary(value: int) -> int:
    return 255 * (value >= 128)


class Source:
    """The picture to start from, its mask, and the part of it that is drawn. Raises ConfigError for
    a mask of another size.
    """

    def __init__(self, picture: Picture, image: Image.Image):
        options = picture.options
        self.seed, self.size = picture.seed, (picture.width, picture.height)
        self.image = self.part = image
        self.mask = self.part_mask = None
        self.box = None
        if options.mask is None:
            return
        self.mask = self.part_mask = load_mask(options.mask).point(_binary)
        if self.mask.size != image.size:
            raise ConfigError(
                f"the mask {options.mask} has {self.mask.width}x{self.mask.height} pixels, its "
                f"picture {options.image} has {image.width}x{image.height}",
                hint="a mask is as large as its picture: white is painted anew, black stays",
            )
        if options.mask_crop is not None and self.mask.getbbox():
            region = self._processor().get_crop_region
            self.box = region(self.mask, *self.size, pad=options.mask_crop)
            # a part at the border may have another aspect: its edges are drawn out, as in diffusers
            self.part = self._filled(image)
            self.part_mask = self._filled(self.mask).convert("L")

    def _filled(self, image: Image.Image) -> Image.Image:
        width, height = self.size
        part = image.crop(self.box)
        return cast(Image.Image, self._processor().resize(part, height, width, "fill"))

    @staticmethod
    def _processor():
        from diffusers.image_processor import VaeImageProcessor

        return VaeImageProcessor()

    def latents(self, vae: Vae) -> Tensor:
        """Returns a draw of the VAE's posterior, by the seed, fp32 [1, C, h, w]."""
        mean, std = vae.encode(fit_image(self.part, self.size)[None])
        noise = rng.normal(self.seed, "sample", 1, tuple(mean.shape[1:]), mean.device)
        return mean + std * noise

    def latent_mask(self, factor: int) -> Tensor | None:
        """Returns fp32 [1, 1, h, w], 1 where it is painted anew: the pixel at each latent's top
        left, as diffusers' nearest interpolation takes it.
        """
        if self.part_mask is None:
            return None
        box = center_box(self.part_mask.size, self.size)
        fitted = self.part_mask.resize(self.size, Image.Resampling.LANCZOS, box=box).point(_binary)
        return torch.tensor(np.asarray(fitted)[::factor, ::factor] / 255).float()[None, None]

    def pasted(self, image: Image.Image) -> Image.Image:
        """Returns the whole picture where a part of it was drawn, else `image`."""
        if self.mask is None or self.box is None:
            return image
        return self._processor().apply_overlay(self.mask, self.image, image, self.box)
