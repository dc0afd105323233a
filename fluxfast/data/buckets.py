"""Aspect-ratio buckets: the size that each image is trained at."""

from fluxfast.errors import FluxfastError

STEP = 32  # pixels: 8 per latent times 2 per patch, times 2 so that token grids stay even


def bucket_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Returns the (w, h) that an image of width x height pixels is trained at.

    Both sides are multiples of STEP, w <= width and h <= height (never upscaled), and
    w * h <= resolution^2. Of the sizes that reach 90 % of the largest such area, it is the one that
    crops least, then the largest: without that floor the exact aspect of a small bucket would beat
    a slightly cropped large one.
    Raises FluxfastError if a side is shorter than STEP (the caller adds the name).
    """
    if width < STEP or height < STEP:
        raise FluxfastError(
            f"{width}x{height} pixels is too small: {STEP} is the least on a side",
            hint="remove it or use a larger version",
        )
    limit = resolution * resolution
    sizes = []
    for w in range(STEP, min(width, limit // STEP) + 1, STEP):
        below = max(STEP, w * height // width // STEP * STEP)
        most = min(height, limit // w) // STEP * STEP
        sizes += [(w, min(below, most)), (w, min(below + STEP, most))]
    floor = 0.9 * max(w * h for w, h in sizes)
    return min(
        (size for size in sizes if size[0] * size[1] >= floor),
        key=lambda size: (round(cropped((width, height), size), 9), -size[0] * size[1], size),
    )


def cropped(source: tuple[int, int], size: tuple[int, int]) -> float:
    """Returns the share of the image's area lost when it is scaled to cover `size` and cropped."""
    (width, height), (w, h) = source, size
    return 1.0 - min(w * height, h * width) / max(w * height, h * width)
