"""FluxSpec: the shape of a FLUX.1 transformer."""

from dataclasses import dataclass, replace

from fluxfast.errors import FluxfastError


@dataclass(frozen=True)
class FluxSpec:
    """Widths and depths under Black Forest Labs' names (`flux/model.py`, FluxParams)."""

    in_channels: int = 64  # latent channels x 2 x 2 patch
    vec_in_dim: int = 768  # CLIP-L pooled width
    context_in_dim: int = 4096  # T5-XXL width
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, int, int] = (16, 56, 56)
    theta: int = 10_000
    guidance_embed: bool = True
    text_length: int = 512  # T5 tokens

    def __post_init__(self):
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise FluxfastError(
                f"hidden size {self.hidden_size} is not a multiple of {self.num_heads} heads"
            )
        if sum(self.axes_dim) != self.head_dim or any(axis % 2 for axis in self.axes_dim):
            axes = list(self.axes_dim)
            raise FluxfastError(
                f"RoPE axes {axes} must be even and add up to the head width {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return round(self.hidden_size * self.mlp_ratio)


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Generalizes FLUX's 16/56/56 split of 128: at least an eighth for the first axis."""
    spatial = 2 * (7 * head_dim // 32)
    return head_dim - 2 * spatial, spatial, spatial


DEV = FluxSpec()
SCHNELL = replace(DEV, guidance_embed=False, text_length=256)
NANO = replace(
    DEV,
    vec_in_dim=128,
    context_in_dim=192,
    hidden_size=192,
    num_heads=6,
    depth=2,
    depth_single_blocks=4,
    axes_dim=rope_axes(32),
    text_length=32,
)
