"""Random inputs of a forward pass, and a FLUX wide enough for the kernels' tiles."""

from dataclasses import replace

import torch
from small import SMALL

from fluxfast.model.spec import FluxSpec, rope_axes
from fluxfast.objective import image_ids, text_ids

WIDE = replace(SMALL, hidden_size=256, axes_dim=rope_axes(128), depth=2, depth_single_blocks=1)


def random_inputs(
    spec: FluxSpec, batch: int, side: int, text: int, **options
) -> dict[str, torch.Tensor]:
    """side: of the latent, in pixels. options: of torch.randn."""
    device = options.get("device", "cpu")
    return {
        "img": torch.randn(batch, side * side // 4, spec.in_channels, **options),
        "img_ids": image_ids(side, side, device),
        "txt": torch.randn(batch, text, spec.context_in_dim, **options),
        "txt_ids": text_ids(text, device),
        "timesteps": torch.linspace(0.2, 0.8, batch, device=device),
        "y": torch.randn(batch, spec.vec_in_dim, **options),
        "guidance": torch.ones(batch, device=device),
    }
