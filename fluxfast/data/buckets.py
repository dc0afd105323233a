"""Buckets: the size each image is trained at."""

from fluxfast.errors import FluxfastError

STEP = 32  # pixels: 8 per latent times 2 per patch, times 2 so that token grids stay even


def bucket_size(width: int, height: int, resolution: int, step: int = STEP) -> tuple[int, int]:
    """The size an image of width x height pixels is trained at -> (w, h).

    Both sides are multiples of `step`, w <= width and h <= height (never upscaled), and
    w * h <= resolution^2. Of the sizes that reach 90 % of the largest area so possible, the one
    that crops least, then the largest: without that floor the exact aspect of a small bucket would
    beat a slightly cropped large one.
    Raises FluxfastError if a side is shorter than `step` (the caller adds the name).
    """
    if width < step or height < step:
        raise FluxfastError(
            f"{width}x{height} pixels is too small: {step} is the least on a side",
            hint="remove it or use a larger version",
        )
    limit = resolution * resolution
    sizes = []
    for w in range(step, min(width, limit // step) + 1, step):
        below = max(step, w * height // width // step * step)
        most = min(height, limit // w) // step * step
        sizes += [(w, min(below, most)), (w, min(below + step, most))]
    floor = 0.9 * max(w * h for w, h in sizes)
    return min(
        (size for size in sizes if size[0] * size[1] >= floor),
        key=lambda size: (round(cropped((width, height), size), 9), -size[0] * size[1], size),
    )


def cropped(source: tuple[int, int], size: tuple[int, int]) -> float:
    """Share of the image's area lost when it is scaled to cover `size` and cropped, 0..1."""
    (width, height), (w, h) = source, size
    return 1.0 - min(w * height, h * width) / max(w * height, h * width)
