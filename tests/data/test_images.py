"""Images: every mode and accident that folders of real files hold."""

import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from fluxfast.data import images
from fluxfast.data.images import fit_image, fit_mask, image_size, load_image, load_mask
from fluxfast.errors import FluxfastError

WHITE = (255, 255, 255)


def saved(folder, image, name="a.png", **options):
    image.save(folder / name, **options)
    return folder / name


def row(mode: str, *pixels) -> Image.Image:
    image = Image.new(mode, (len(pixels), 1))
    if mode == "P":
        image.putpalette([0, 128, 0, 200, 0, 0])
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def pixels(image: Image.Image | None) -> list | None:
    return image and [image.getpixel((x, 0)) for x in range(image.width)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff", "a.avif"])
def test_exif_orientation(tmp_path, orientation, name):
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste("red", (0, 0, 16, 16))  # top left
    upright.paste("blue", (32, 0, 48, 16))  # top right
    T = Image.Transpose
    stored_by = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE}
    stored_by |= {6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
    stored = upright.transpose(stored_by[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, stored, name, exif=exif)
    assert image_size(path) == (48, 32)
    image, alpha = load_image(path)
    assert image.size == (48, 32) and alpha is None
    red, blue = image.getpixel((7, 7)), image.getpixel((40, 7))
    assert red[0] > 200 and red[2] < 60 and blue[2] > 200 and blue[0] < 60


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_mangled_exif_is_ignored(tmp_path):
    unknown = Image.Exif()
    unknown[0x0112] = 99
    for exif in (b"Exif\0\0II*\0garbage", unknown):
        path = saved(tmp_path, Image.new("RGB", (40, 32), "red"), "a.jpg", exif=exif)
        assert image_size(path) == load_image(path)[0].size == (40, 32)


@pytest.mark.parametrize(
    ("image", "transparency", "colors", "alpha"),
    [
        (
            row("RGBA", (255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)),
            None,
            [(255, 0, 0), WHITE, (127, 127, 127)],
            [255, 0, 128],
        ),
        (row("LA", (10, 255), (10, 0)), None, [(10, 10, 10), WHITE], [255, 0]),
        (row("P", 0, 1), None, [(0, 128, 0), (200, 0, 0)], None),
        (row("P", 0, 1), 1, [(0, 128, 0), WHITE], [255, 0]),
        (row("P", 0, 1), b"\xff\0", [(0, 128, 0), WHITE], [255, 0]),
        (row("RGB", (1, 2, 3), (1, 2, 4)), (1, 2, 3), [WHITE, (1, 2, 4)], [0, 255]),
        (row("L", 7, 8), 7, [WHITE, (8, 8, 8)], [0, 255]),
        (row("L", 77), None, [(77, 77, 77)], None),
        (row("1", 0, 1), None, [(0, 0, 0), WHITE], None),
    ],
)
def test_modes_and_transparency(tmp_path, image, transparency, colors, alpha):
    options = {} if transparency is None else {"transparency": transparency}
    rgb, mask = load_image(saved(tmp_path, image, **options))
    assert rgb.mode == "RGB" and pixels(rgb) == colors and pixels(mask) == alpha


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = load_image(saved(tmp_path, image, "a.jpg", quality=95))[0].getpixel((8, 8))
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 32768, 65535]], dtype=np.uint16), [0, 128, 255]),
        (np.array([[0, 100, 255]], dtype=np.uint16), [0, 0, 1]),
        (np.array([[0, 32768, 65535]], dtype=np.int32), [0, 128, 255]),
        (np.array([[-5, 2**30, 2**31 - 1]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 200.0]], dtype=np.float32), [0, 100, 200]),
        (np.array([[0.0, 32768.0, 65535.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[np.nan, -1.0, 1.0]], dtype=np.float32), [0, 0, 255]),
    ],
)
def test_deep_gray_is_scaled_not_clipped(tmp_path, values, expected):
    # modes I and F exist in TIFF only: here under a .png name, as badly renamed files are
    kind = "PNG" if values.dtype == np.uint16 else "TIFF"
    path = saved(tmp_path, Image.fromarray(values), format=kind)
    image, alpha = load_image(path)
    assert pixels(image) == [(gray,) * 3 for gray in expected] and alpha is None


def png(width, height, bit_depth, color_type, data):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_color(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 65535, 32896, 0)))
    assert pixels(load_image(tmp_path / "a.png")[0]) == [(255, 128, 0)]
    (tmp_path / "b.png").write_bytes(png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 9, 9, 9, 0)))
    assert pixels(load_image(tmp_path / "b.png")[0]) == [WHITE]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_broken_files_are_named(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), name)
    whole = path.read_bytes()
    broken = [whole[: len(whole) // 2], whole[:20], b"", b"not an image", b"\0" * 500]
    if name == "a.png":
        broken.append(whole[:200] + b"\xff" * 40 + whole[240:])
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(FluxfastError, match=name) as raised:
            load_image(path)
        assert raised.value.hint
    path.unlink()
    with pytest.raises(FluxfastError, match=name):
        image_size(path)


def test_a_small_tiff_of_a_huge_tile_is_refused(tmp_path):
    """1 MB of file that would unpack to 1 GiB, of which 64x64 pixels are shown."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(2**20)) for _ in range(4)) + packer.flush()
    long, short = 4, 3
    where = 8 + 2 + 12 * 10 + 4
    for side, refused in ((32768, True), (64, False)):
        tags = [(256, long, 64), (257, long, 64), (258, short, 8), (259, short, 8)]
        tags += [(262, short, 1), (277, short, 1), (322, long, side), (323, long, side)]
        tags += [(324, long, where), (325, long, len(data))]
        entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
        head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
        (tmp_path / "a.png").write_bytes(head + data)
        for read in (load_image, image_size):
            if refused:
                with pytest.raises(FluxfastError, match=r"a\.png is too large .* 32768x32768"):
                    read(tmp_path / "a.png")
            else:
                read(tmp_path / "a.png")


def test_deep_pictures_are_scaled_without_gigabytes(tmp_path):
    """In doubles at once this one would take 400 MB beside what Pillow holds, the largest that is
    read 4 GB."""
    values = np.arange(4000 * 4000, dtype=np.uint32).astype(np.uint16).reshape(4000, 4000)
    Image.fromarray(values).save(tmp_path / "a.png", compress_level=1)
    tracemalloc.start()  # what numpy takes, not what Pillow does
    try:
        image, _ = load_image(tmp_path / "a.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * values.size, f"{peak / values.size:.1f} bytes a pixel"
    expected = np.round(values / 65535 * 255).astype(np.uint8)
    assert (np.asarray(image)[..., 0] == expected).all()


def test_a_picture_that_cannot_be_read_says_why_where_it_is_known(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (64, 64)), icc_profile=bytes(2_000_000))
    with pytest.raises(FluxfastError, match=r"not an image that can be read: .*[Tt]oo large") as no:
        image_size(path)
    assert "\n" not in no.value.message


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif", "a.tiff"])
def test_an_animation_or_several_pages_are_refused_by_name(tmp_path, name):
    """One of them is meant, perhaps; a single one is read."""
    first, second = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    path = saved(tmp_path, first, name)
    assert image_size(path) == (32, 32) and load_image(path)[0].getpixel((9, 9))[0] > 250
    saved(tmp_path, first, name, save_all=True, append_images=[second])
    for read in (image_size, load_image, load_mask):
        with pytest.raises(FluxfastError, match=rf"{name} holds several pictures"):
            read(path)


def test_further_pictures_that_belong_to_the_first_change_nothing(tmp_path):
    """A phone's JPEG with its depth, and a TIFF with its thumbnail."""
    first, small = Image.new("RGB", (48, 32), "red"), Image.new("RGB", (24, 16), "blue")
    saved(tmp_path, first, "a.jpg", format="MPO", save_all=True, append_images=[small])
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "a.tif") as file:
        first.save(file, "TIFF")
        file.newFrame()
        small.save(file, "TIFF", tiffinfo={254: 1})  # a smaller picture of another page
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "b.tif").write_bytes(data[: data.rindex(b"\xfe\0") + 4])  # cut in the second page
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(tmp_path / "b.tif") == (48, 32)
    for name in ("a.jpg", "a.tif"):
        with Image.open(tmp_path / name) as image:
            assert getattr(image, "n_frames", 1) == 2
        assert image_size(tmp_path / name) == (48, 32)
        red = load_image(tmp_path / name)[0].getpixel((9, 9))
        assert red[0] > 250 and red[2] < 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x18ftypavif" + bytes(40), "is AVIF by its content, and broken"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "is JPEG XL by its content"),
        (b"words", "is not an image that can be read\n"),
        (b"8BPS\0\1" + bytes(30), "is a Photoshop file by its content"),
        (b"\0\0\0\x18ftypisom" + bytes(40), "is a video by its content"),
        (b"\n<!DOCTYPE html><html>", "is a web page by its content"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            r"is a Git LFS pointer \(`git lfs pull`\)",
        ),
    ],
)
def test_what_lies_under_a_pictures_name_is_named(tmp_path, data, message):
    (tmp_path / "a.png").write_bytes(data)
    for read in (image_size, load_image):
        with pytest.raises(FluxfastError, match=rf"a\.png {message}"):
            read(tmp_path / "a.png")


def test_what_a_format_takes_is_said_where_pillow_lacks_it(tmp_path, monkeypatch):
    saved(tmp_path, Image.new("RGB", (32, 32)), "a.jpg", format="AVIF")
    (tmp_path / "b.jpg").write_bytes(b"\0\0\0\x18ftypmif1" + bytes(40))
    every = images.formats()
    monkeypatch.setattr(images, "formats", lambda: ("PNG", "JPEG"))
    for name, words in (("a.jpg", "AVIF .*pillow-avif"), ("b.jpg", "HEIC .*pillow-heif")):
        with pytest.raises(FluxfastError, match=f"{name} is {words}") as raised:
            image_size(tmp_path / name)
        assert raised.value.hint.startswith("pip install pillow-")
    monkeypatch.setattr(images, "formats", lambda: (*every, "HEIF"))
    monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
    assert image_size(tmp_path / "a.jpg") == (32, 32)
    with pytest.raises(FluxfastError, match=r"b\.jpg is HEIC by its content, and broken"):
        image_size(tmp_path / "b.jpg")


def test_avif_holds_colors_alpha_and_a_bomb(tmp_path, monkeypatch):
    image = row("RGBA", (255, 0, 0, 255), (0, 0, 255, 0)).resize((64, 32), Image.Resampling.NEAREST)
    path = saved(tmp_path, image, "a.avif", quality=100)
    rgb, alpha = load_image(path)
    assert np.abs(np.subtract(rgb.getpixel((8, 8)), (255, 0, 0))).max() < 5
    assert np.abs(np.subtract(rgb.getpixel((56, 8)), WHITE)).max() < 5
    assert alpha is not None and (alpha.getpixel((8, 8)), alpha.getpixel((56, 8))) == (255, 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 32 // 2 - 1)
    with pytest.raises(FluxfastError, match=r"a\.avif is too large to decode safely"):
        image_size(path)


def test_a_12_bit_tiff_is_scaled_by_12_bits(tmp_path):
    data = b"\x80\0\0" * 128  # pairs of 2048 and 0
    tags = [(256, 16), (257, 16), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 16)]
    tags.append((279, len(data)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(head + data)
    assert pixels(load_image(tmp_path / "a.tif")[0])[:2] == [(128,) * 3, (0,) * 3]


def test_fit_image_covers_and_crops_the_center():
    image = Image.new("RGB", (100, 50), "black")
    image.paste("white", (25, 0, 75, 50))
    tensor = fit_image(image, (50, 50))
    assert tensor.shape == (3, 50, 50) and tensor.dtype == torch.float32
    assert (tensor == 1.0).all(), "the middle square alone, white is exactly 1"
    tensor = fit_image(image, (64, 32))
    assert tensor.shape == (3, 32, 64)
    assert tensor[:, :, 0].max() == -1.0 and tensor[:, :, 32].min() == 1.0
    shrunk = fit_image(Image.effect_noise((96, 64), 99).convert("RGB"), (48, 32))
    assert shrunk.is_contiguous() and shrunk.min() >= -1 and shrunk.max() <= 1


def test_mask_is_cropped_like_its_image():
    image = Image.new("RGB", (120, 70), "black")
    image.paste("white", (40, 20, 90, 60))
    picture = fit_image(image, (64, 64))
    weights = fit_mask(image.convert("L"), (64, 64), 8)
    assert weights.shape == (8, 8) and weights.dtype == torch.float32
    expected = torch.nn.functional.avg_pool2d((picture[:1] + 1) / 2, 8)[0]
    assert torch.allclose(weights, expected, atol=0.05)  # Lanczos rings at edges, a box does not
    small = image.convert("L").resize((60, 35), Image.Resampling.BOX)
    assert torch.allclose(fit_mask(small, (64, 64), 8), weights, atol=0.02)
    assert torch.equal(fit_mask(Image.new("L", (90, 50), 255), (64, 32), 8), torch.ones(4, 8))
    half = fit_mask(Image.new("L", (64, 64), 51), (32, 32), 8)
    assert torch.allclose(half, torch.full((4, 4), 0.2))


def test_transparent_parts_of_a_mask_are_black(tmp_path):
    mask = load_mask(saved(tmp_path, row("RGBA", (255, 255, 255, 255), (255, 255, 255, 0))))
    assert mask.mode == "L" and pixels(mask) == [255, 0]
