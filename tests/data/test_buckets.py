"""bucket_size: its promises over many sizes, its choices on known ones."""

import random

import pytest

from fluxfast.data.buckets import bucket_size, cropped
from fluxfast.errors import FluxfastError


def test_promises_hold_for_many_sizes():
    draw = random.Random(0)
    for _ in range(1500):
        width, height = (int(32 * 2 ** draw.uniform(0, 8)) for _ in range(2))
        resolution = draw.choice([64, 100, 256, 512, 768, 1000, 1024])
        w, h = bucket_size(width, height, resolution)
        assert w % 32 == 0 and h % 32 == 0 and w >= 32 and h >= 32
        assert w <= width and h <= height, "never upscaled"
        assert w * h <= resolution**2


def test_photographs_lose_little_to_the_crop_and_keep_their_area():
    draw = random.Random(1)
    for _ in range(500):
        width, height = draw.randint(1024, 6000), draw.randint(1024, 6000)
        if not 0.4 < width / height < 2.5:
            continue
        size = bucket_size(width, height, 1024)
        assert cropped((width, height), size) < 0.02
        assert size[0] * size[1] > 0.85 * 1024**2


def test_is_the_best_of_all_sizes():
    draw = random.Random(2)
    for _ in range(150):
        width, height = draw.randint(32, 900), draw.randint(32, 900)
        sizes = [
            (w, h)
            for w in range(32, width + 1, 32)
            for h in range(32, height + 1, 32)
            if w * h <= 384**2
        ]
        chosen = bucket_size(width, height, 384)
        area = chosen[0] * chosen[1]
        loss = cropped((width, height), chosen)
        # nothing both larger and less cropped exists
        assert not [s for s in sizes if s[0] * s[1] > area and cropped((width, height), s) < loss]


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
