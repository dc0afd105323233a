"""The VAE: images to the normalised latents that the transformer sees, and back."""

import gc
from pathlib import Path

import torch
from torch import Tensor

from fluxfast.encoders.components import check_folder, component
from fluxfast.encoders.quiet import quiet
from fluxfast.encoders.single_file import load_part
from fluxfast.errors import FluxfastError
from fluxfast.formats.parts import Part


class Vae:
    """AutoencoderKL, loaded from disk only.

    root: a diffusers folder with vae/, or single files (`encoders/components.py`). Raises
    FluxfastError if it is missing, broken, or lacks weights. `factor`: pixels per latent along a
    side (8 for FLUX). `channels`: latent channels (16 for FLUX).
    """

    def __init__(
        self, root: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.device, self.dtype = torch.device(device), dtype
        with quiet("diffusers"):
            self._vae = _load(component(root, "vae"), dtype).to(self.device)
        config = self._vae.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels = config.latent_channels
        self._scale = config.scaling_factor
        self._shift = config.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in -1..1 -> mean and standard deviation of the latents, each fp32 [B, C, h,
        w].

        Both are normalised for the transformer, so that `mean + std * noise` is what it is trained
        on: mean = (mean - shift) * scale, std = std * scale. H and W are multiples of `factor`.
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
        """Normalised latents [B, C, h, w] -> images fp32 [B, 3, H, W], clipped to -1..1."""
        latents = latents.to(self.device, torch.float32) / self._scale + self._shift
        images = self._vae.decode(latents.to(self.dtype), return_dict=False)[0]
        return images.float().clamp(-1.0, 1.0)

    def close(self) -> None:
        """Free it, on the GPU too."""
        self._vae = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _load(folder: Path | Part, dtype: torch.dtype):
    if isinstance(folder, Part):
        return load_part(folder, dtype)
    # `import diffusers` pulls in every pipeline on first use; the model's own module is enough
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    check_folder(folder)
    try:
        vae, info = AutoencoderKL.from_pretrained(
            str(folder),
            local_files_only=True,
            torch_dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
        )
    except (
        Exception
    ) as error:  # OSError, SafetensorError, JSON and pickle errors, RuntimeError for shapes
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FluxfastError(
            f"cannot load the VAE from {folder}: {first_line}", hint="download the folder again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing or info["mismatched_keys"]:
        names = ", ".join(missing[:3]) or "of other shapes than its config.json says"
        raise FluxfastError(f"{folder} lacks weights: {names}", hint="download the folder again")
    return vae.eval().requires_grad_(False)
