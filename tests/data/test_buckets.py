"""bucket_size: its promises for many sizes, and its choices for known ones."""

import random
from itertools import product

import pytest

from fluxfast.data.buckets import bucket_size, cropped
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
