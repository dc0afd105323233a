"""A FLUX, and pictures, small enough to try everything on."""

from pathlib import Path

import numpy as np
from PIL import Image

from fluxfast.model.spec import FluxSpec, rope_axes

# hidden 64: the blocks' K are 64, 256 and 320, all of which nf4 takes
SMALL = FluxSpec(
    in_channels=16,
    vec_in_dim=20,
    context_in_dim=24,
    hidden_size=64,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=rope_axes(32),
)


def noise_pictures(folder: Path, count: int, caption: str = "", seed: int = 0) -> Path:
    """`count` pictures of noise, 0.png, 1.png, …, each with its caption where one is given.
    -> folder."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        if caption:
            (folder / f"{i}.txt").write_text(f"{caption} {i}")
    return folder
