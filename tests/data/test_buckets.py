"""bucket_size: its promises for many sizes, and its choices for known ones."""

import random
import time
from itertools import product
from math import inf

import pytest

from fluxfast.data.buckets import (
    AREAS,
    _loss,
    _sizes,
    bucket_size,
    choose_areas,
    cropped,
    fit_bucket,
)
from fluxfast.errors import FluxfastError


@pytest.mark.parametrize("resolution", [64, 100, 256, 512, 768, 1000, 1024])
def test_sizes_are_multiples_of_32_within_the_image_and_the_area(resolution):
    random.seed(resolution)
    for _ in range(200):
        width, height = (int(32 * 2 ** random.uniform(0, 8)) for _ in range(2))
        w, h = bucket_size(width, height, resolution)
        assert w % 32 == h % 32 == 0 and 32 <= w <= width and 32 <= h <= height
        assert w * h <= resolution**2


def test_photographs_lose_little_to_the_crop_and_keep_their_area():
    random.seed(1)
    for _ in range(300):
        width = random.randint(1024, 6000)
        height = round(width / random.uniform(0.4, 2.5))
        w, h = bucket_size(width, max(height, 1024), 1024)
        assert cropped((width, max(height, 1024)), (w, h)) < 0.02 and w * h > 0.85 * 1024**2


def test_no_size_is_both_larger_and_less_cropped():
    random.seed(2)
    for _ in range(150):
        image = random.randint(32, 900), random.randint(32, 900)
        sides = [range(32, side + 1, 32) for side in image]
        w, h = chosen = bucket_size(*image, 384)
        larger = [size for size in product(*sides) if w * h < size[0] * size[1] <= 384**2]
        assert all(cropped(image, size) >= cropped(image, chosen) for size in larger)


@pytest.mark.parametrize(
    ("image", "resolution", "expected"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((4000, 4000), 1000, (992, 992)),
        ((512, 512), 1024, (512, 512)),
        ((3000, 2000), 1024, (1248, 832)),
        ((2000, 3000), 1024, (832, 1248)),
        ((500, 511), 512, (480, 480)),
        ((32, 32), 1024, (32, 32)),
        ((5000, 33), 64, (128, 32)),
    ],
)
def test_known_sizes(image, resolution, expected):
    assert bucket_size(*image, resolution) == expected


@pytest.mark.parametrize("image", [(31, 500), (500, 31), (1, 1)])
def test_too_small(image):
    with pytest.raises(FluxfastError, match=f"{image[0]}x{image[1]}.*32"):
        bucket_size(*image, 512)


CAMERAS = [
    (6000, 4000), (4032, 3024), (3840, 2160), (3000, 3000), (2160, 3840), (3024, 4032), (4000, 6000)
]  # fmt: skip


def crops(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Free crops of 1200 to 3000 pixels a side, aspects 0.45 to 2.2."""
    draw = random.Random(seed)
    sides = [(draw.uniform(1200, 3000), 2.2 ** draw.uniform(-0.5, 0.5)) for _ in range(count)]
    return [(int(side * root), int(side / root)) for side, root in sides]


def areas_of(images, resolution) -> set[int]:
    return {w * h for w, h in (bucket_size(*image, resolution) for image in images)}


@pytest.mark.parametrize("resolution", [512, 768, 1024])
def test_many_aspects_are_merged_into_eight_areas_at_little_crop(resolution):
    """docs/data.md names the numbers at 1024 px."""
    images = CAMERAS * 4 + crops(30)
    assert len(areas_of(images, resolution)) > AREAS
    areas = choose_areas(images, resolution)
    sizes = [fit_bucket(image, resolution, areas) for image in images]
    assert len({w * h for w, h in sizes}) <= len(areas) == AREAS
    for image, (w, h) in zip(images, sizes, strict=True):
        assert w % 32 == h % 32 == 0 and w <= image[0] and h <= image[1]
        assert 0.85 * resolution**2 < w * h <= resolution**2
    lost = [cropped(*pair) for pair in zip(images, sizes, strict=True)]
    own = [cropped(image, bucket_size(*image, resolution)) for image in images]
    assert sum(lost) / len(lost) < sum(own) / len(own) + 0.006 and max(lost) < 0.08
    assert choose_areas(reversed(images), resolution) == areas


@pytest.mark.parametrize("resolution", [512, 768, 1024])
def test_the_formats_of_cameras_stay_in_their_own_buckets(resolution):
    assert len(areas_of(CAMERAS, resolution)) <= AREAS
    assert choose_areas(CAMERAS, resolution) == []
    for image in CAMERAS:
        assert fit_bucket(image, resolution, []) == bucket_size(*image, resolution)


def chosen_plainly(images, resolution, least) -> list[int]:
    """As `choose_areas` defines it, every picture in every size of every area in each round."""
    own = {image: bucket_size(*image, resolution) for image in images}
    areas = sorted({w * h for w, h in own.values()})
    fits = {
        (i, a): [s for s in _sizes(a).T if s[0] <= i[0] and s[1] <= i[1]]
        for i in own
        for a in areas
    }

    def loss(image, size) -> float:
        return _loss(image, cropped(image, size), size[0] * size[1], resolution)

    first = {image: loss(image, size) for image, size in own.items()}
    losses = {
        (i, a): max(0, min([loss(i, s) for s in sizes], default=inf) - first[i]) ** 2
        for (i, a), sizes in fits.items()
    } | {(image, w * h): 0.0 for image, (w, h) in own.items()}

    def cost(left) -> float:
        return sum(min(losses[image, area] for area in left) for image in images)

    while len(areas) > least:
        left = min(([a for a in areas if a != gone] for gone in areas), key=cost)
        if cost(left) == inf:
            break
        areas = left
    return areas


@pytest.mark.parametrize("least", [1, 8])
def test_the_areas_are_those_of_the_plain_definition(least, monkeypatch):
    """Two stay where one is to: the last two pictures have none in common."""
    monkeypatch.setattr("fluxfast.data.buckets.AREAS", least)
    draw = random.Random(3)
    images = [(draw.randint(64, 300), draw.randint(64, 300)) for _ in range(30)]
    images += [*images[:9], (96, 32), (64, 64)]
    chosen = choose_areas(images, 320)
    assert chosen == chosen_plainly(images, 320, least) and len(chosen) == max(2, least)


def test_three_thousand_sizes_take_no_time():
    """Half a second; a loop over the pictures in Python took 33."""
    draw = random.Random(0)
    images = [(draw.randint(600, 5000), draw.randint(600, 5000)) for _ in range(3000)]
    began = time.process_time()
    assert len(choose_areas(images, 2048)) == AREAS
    assert time.process_time() - began < 5


def test_small_pictures_are_merged_as_well_and_never_enlarged():
    images = [(32 * n, 32 * (37 - n)) for n in range(8, 29)] + [(32 * 7, 32)]
    areas = choose_areas(images, 4096)
    assert len(areas) == AREAS and 7 * 32 * 32 in areas  # no other fits into the last
    for image in images:
        w, h = fit_bucket(image, 4096, areas)
        assert w <= image[0] and h <= image[1] and cropped(image, (w, h)) < 0.2
    assert fit_bucket((64, 32), 4096, areas) == (64, 32)  # of a run that goes on with it
