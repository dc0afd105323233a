"""Aspect-ratio buckets: the size that each image is trained at.

Sizes of one area w * h have one number of tokens, and each number has a CUDA graph of its own, with
its memory and its capture. 30 free crops have 19 of them at 1024 px, so a new run merges buckets.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import islice

from fluxfast.errors import FluxfastError

STEP = 32  # pixels: 8 per latent times 2 per patch, times 2 so that token grids stay even
AREAS = 8  # that a resolution's buckets have
_FLOOR = 0.9  # of the largest area: a bucket may be so much smaller to crop less

# resolution -> the areas, w * h in pixels, that its buckets are merged to; none where they are not
Areas = dict[int, list[int]]


@cache
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
    floor = _FLOOR * max(w * h for w, h in sizes)
    return min(
        (size for size in sizes if size[0] * size[1] >= floor),
        key=lambda size: (round(cropped((width, height), size), 9), -size[0] * size[1], size),
    )


def cropped(source: tuple[int, int], size: tuple[int, int]) -> float:
    """Returns the share of the image's area lost when it is scaled to cover `size` and cropped."""
    (width, height), (w, h) = source, size
    return 1.0 - min(w * height, h * width) / max(w * height, h * width)


def fit_bucket(image: tuple[int, int], resolution: int, areas: Iterable[int]) -> tuple[int, int]:
    """Returns the (w, h) that an image is trained at where buckets are merged to these areas: its
    own bucket if that has one of them or none of them fits into the image, else what loses least.
    """
    own = bucket_size(*image, resolution)
    sizes = [size for area in areas for size in _sizes(area, image)]
    if own[0] * own[1] in areas or not sizes:
        return own
    return min(sizes, key=lambda size: (round(_loss(image, size, resolution), 9), size))


def choose_areas(images: Iterable[tuple[int, int]], resolution: int) -> list[int]:
    """Returns the AREAS of the images' own buckets to which the others are merged, none where there
    are no more: one after the other goes that which is missed least, by the squares of what the
    images lose that then move. Squares spare the few of unusual aspects.

    The same for any order of the images. More stay only where tiny images have none in common.
    """
    counts = sorted(Counter(images).items())
    own = {image: bucket_size(*image, resolution) for image, _ in counts}
    areas = {w * h for w, h in own.values()}
    if len(areas) <= AREAS:
        return []
    options = []  # (images, their [loss, area] from the least)
    for image, count in counts:
        first = _loss(image, own[image], resolution)
        losses = {own[image][0] * own[image][1]: 0.0}
        for area in areas - losses.keys():
            each = [_loss(image, size, resolution) for size in _sizes(area, image)]
            losses[area] = max(0.0, min(each, default=float("inf")) - first) ** 2
        options.append((count, sorted((loss, area) for area, loss in losses.items())))
    while len(areas) > AREAS:
        costs = dict.fromkeys(areas, 0.0)
        for count, ranked in options:
            (loss, area), (second, _) = islice((each for each in ranked if each[1] in areas), 2)
            costs[area] += count * (second - loss)
        cost, area = min((cost, area) for area, cost in costs.items())
        if cost == float("inf"):
            break
        areas.remove(area)
    return sorted(areas)


def _sizes(area: int, image: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns every (w, h) of this area that fits into the image."""
    return [(w, h) for w, h in _all_sizes(area // STEP**2) if w <= image[0] and h <= image[1]]


@cache
def _all_sizes(cells: int) -> list[tuple[int, int]]:
    return [(STEP * n, STEP * (cells // n)) for n in range(1, cells + 1) if cells % n == 0]


def _loss(image: tuple[int, int], size: tuple[int, int], resolution: int) -> float:
    """Returns the share of an image that a bucket loses: of its area, cropped, and of its sharpness
    (pixels along a side) where the bucket is smaller than it may be.
    """
    largest = min(resolution**2, (image[0] // STEP) * (image[1] // STEP) * STEP**2)
    sharpness = min(1.0, size[0] * size[1] / (_FLOOR * largest)) ** 0.5
    return 1.0 - (1.0 - cropped(image, size)) * sharpness
