"""The VAE: encodes images to the normalized latents that the transformer sees, and decodes them."""

import gc
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxfast.encoders.components import load_model
from fluxfast.errors import FluxfastError
from fluxfast.memory.runtime import is_out_of_memory

log = logging.getLogger(__name__)

_TILE = 64  # latents along a side: a quarter of the memory that 1024 pixels take


class Vae:
    """AutoencoderKL, loaded from disk only.

    root: see `encoders/components.py`. factor: pixels per latent along a side (8 for FLUX);
    channels: latent channels (16 for FLUX). Raises FluxfastError if it is missing, broken, or lacks
    weights.
    """

    def __init__(
        self, root: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        # `import diffusers` pulls in every pipeline on first use; the model's own module is enough
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        self.device, self.dtype = torch.device(device), dtype
        self._vae: Any = load_model(AutoencoderKL, root, "vae", dtype).to(self.device)
        config = self._vae.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels = config.latent_channels
        self._scale = config.scaling_factor
        self._shift = config.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the latents of images [B, 3, H, W] in -1..1, each
        fp32 [B, C, h, w].

        Both are normalized for the transformer, which is trained on `mean + std * noise`:
        mean = (mean - shift) * scale, std = std * scale. H and W are multiples of `factor`.
        Raises FluxfastError if the result is not finite (fp16 overflows here).
        """
        posterior = self._vae.encode(images.to(self.device, self.dtype)).latent_dist
        mean = (posterior.mean.float() - self._shift) * self._scale
        std = torch.exp(0.5 * posterior.logvar.float()) * self._scale
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise FluxfastError(
                f"the VAE gave values that are not finite in {self.dtype}", hint="run it in float32"
            )
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns images fp32 [B, 3, H, W] in -1..1 of normalized latents [B, C, h, w]; in tiles,
        with a note, where memory runs out otherwise.
        """
        latents = latents.to(self.device, torch.float32) / self._scale + self._shift
        latents = latents.to(self.dtype)
        try:
            images = self._vae.decode(latents, return_dict=False)[0]
        except RuntimeError as error:
            if not is_out_of_memory(error) or self._vae.use_tiling:
                raise
            images = None
        if images is None:  # once the error has let go of its tensors
            side = _TILE * self.factor
            log.warning(f"note: too little memory for the VAE: decoded in tiles of {side} pixels")
            torch.cuda.empty_cache()
            self._vae.enable_tiling()
            self._vae.tile_latent_min_size, self._vae.tile_sample_min_size = _TILE, side
            images = self._vae.decode(latents, return_dict=False)[0]
        return images.float().clamp(-1.0, 1.0)

    def close(self) -> None:
        """Frees its memory, on the GPU too."""
        self._vae = None
        gc.collect()
        torch.cuda.empty_cache()
