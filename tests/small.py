"""A FLUX small enough to try everything on."""

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
