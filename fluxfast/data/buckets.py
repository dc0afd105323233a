"""Aspect-ratio buckets: the size that each image is trained at.

Sizes of one area w * h have one number of tokens, and each number has a CUDA graph of its own, with
its memory and its capture. 30 free crops have 19 of them at 1024 px, so a new run merges buckets.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

import numpy as np

from fluxfast.errors import FluxfastError

STEP = 32  # pixels: 8 per latent times 2 per patch, times 2 so that token grids stay even
AREAS = 8  # that a resolution's buckets have
_FLOOR = 0.9  # of the largest area: a bucket may be so much smaller to crop less

# resolution -> the areas, w * h in pixels, that its buckets are merged to; none where they are not.
# A run that began without any stays so when its pictures become more: merged buckets would move
# those that it has trained on, and it would not be the run that was never stopped.
Areas = dict[int, list[int]]
Pair = tuple[Any, Any] | np.ndarray  # width and height in pixels, of one or of many


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
    w = np.arange(STEP, min(width, limit // STEP) + 1, STEP)
    below = np.maximum(STEP, w * height // width // STEP * STEP)
    most = np.minimum(height, limit // w) // STEP * STEP
    h = np.concatenate((np.minimum(below, most), np.minimum(below + STEP, most)))
    w = np.concatenate((w, w))
    large = w * h >= _FLOOR * (w * h).max()
    w, h = w[large], h[large]
    least = _least(cropped((width, height), (w, h)), w, h)
    return min(least, key=lambda row: (row[0], -row[1] * row[2], row))[1:]


def cropped(source: Pair, size: Pair) -> Any:
    """Returns the share of the image's area lost when it is scaled to cover `size` and cropped."""
    (width, height), (w, h) = source, size
    return 1.0 - np.minimum(w * height, h * width) / np.maximum(w * height, h * width)


def fit_bucket(image: tuple[int, int], resolution: int, areas: Collection[int]) -> tuple[int, int]:
    """Returns the (w, h) that an image is trained at where buckets are merged to these areas: its
    own bucket if that has one of them or none of them fits into the image, else what loses least.
    """
    own = bucket_size(*image, resolution)
    if not areas or own[0] * own[1] in areas:
        return own
    w, h = np.concatenate([_sizes(area) for area in areas], axis=1)
    fits = (w <= image[0]) & (h <= image[1])
    if not fits.any():
        return own
    w, h = w[fits], h[fits]
    losses = _loss(image, cropped(image, (w, h)), w * h, resolution)
    return min(_least(losses, w, h))[1:]


def choose_areas(images: Iterable[tuple[int, int]], resolution: int) -> list[int]:
    """Returns the AREAS of the images' own buckets to which the others are merged, none where there
    are no more: one after the other goes that which is missed least, by the squares of what the
    images lose that then move. Squares spare the few of unusual aspects.

    The same for any order of the images. More stay only where tiny images have none in common.
    """
    counts = sorted(Counter(images).items())
    own = np.array([bucket_size(*image, resolution) for image, _ in counts]).T
    areas, places = np.unique(own.prod(axis=0), return_inverse=True)
    if len(areas) <= AREAS:
        return []
    sizes, number = np.array([image for image, _ in counts]).T, np.array([n for _, n in counts])
    first = _loss(sizes, cropped(sizes, own), own.prod(axis=0), resolution)
    each = (_area_loss(sizes, area, resolution) for area in areas.tolist())
    losses = np.stack([np.maximum(0.0, loss - first) ** 2 for loss in each], axis=1)
    rows = np.arange(len(number))
    losses[rows, places] = 0.0
    stay = np.full(len(areas), True)
    two, missed = np.zeros((len(rows), 2), int), np.zeros(len(rows))
    while stay.sum() > AREAS:
        # of the images whose two best areas are others now: these, and the loss without the best
        two[rows] = np.argpartition(losses[rows], 1)[:, :2]
        least = losses[rows[:, None], two[rows]]
        missed[rows] = number[rows] * (least[:, 1] - least[:, 0])
        costs = np.where(stay, np.bincount(two[:, 0], missed, len(areas)), np.inf)
        worst = costs.argmin()
        if costs[worst] == np.inf:
            break
        stay[worst], losses[:, worst] = False, np.inf
        rows = np.flatnonzero((two == worst).any(axis=1))
    return areas[stay].tolist()


def _area_loss(images: Pair, area: int, resolution: int) -> np.ndarray:
    """Returns the least loss of each image [N] in a bucket of this area, inf where none fits."""
    (width, height), (w, h) = images, _sizes(area)
    first, last = np.searchsorted(-h, -height), np.searchsorted(w, width, "right") - 1
    place = np.searchsorted(w / h, width / height)  # the least crop is on either side of the aspect
    near = [np.clip(each, first, last) for each in (place - 1, place)]
    crop = np.minimum(*(cropped(images, (w[each], h[each])) for each in near))
    return np.where(first <= last, _loss(images, crop, area, resolution), np.inf)


@cache
def _sizes(area: int) -> np.ndarray:
    """Returns every w and h of this area, [2, N] with w ascending."""
    cells = area // STEP**2
    w = np.arange(1, cells + 1)
    w = w[cells % w == 0]
    return STEP * np.stack((w, w[::-1]))


def _least(losses: np.ndarray, *sizes: np.ndarray) -> list[tuple[float, int, int]]:
    """Returns (loss rounded to 9 digits, w, h) of those that are among the least."""
    near = losses < losses.min() + 2e-9
    rows = zip(*(each[near].tolist() for each in (losses, *sizes)), strict=True)
    return [(round(loss, 9), w, h) for loss, w, h in rows]


def _loss(image: Pair, crop: Any, area: Any, resolution: int) -> Any:
    """Returns the share of an image that a bucket loses: of its area, crop, and of its sharpness
    (pixels along a side) where the bucket is smaller than it may be.
    """
    largest = np.minimum(resolution**2, (image[0] // STEP) * (image[1] // STEP) * STEP**2)
    sharpness = np.minimum(1.0, area / (_FLOOR * largest)) ** 0.5
    return 1.0 - (1.0 - crop) * sharpness
