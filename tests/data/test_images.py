"""Images: every mode and accident that folders of real files hold."""

import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fluxfast.data.images import find_images, fit_image, fit_mask, image_size, load_image, load_mask
from fluxfast.errors import FluxfastError


def pixel(path, xy=(0, 0)):
    return load_image(path)[0].getpixel(xy)


def saved(folder, image, name="a.png", **options):
    image.save(folder / name, **options)
    return folder / name


def test_find_images(tmp_path):
    names = ["b.PNG", "a.jpg", "x/c.JpEg", "x/y/d.webp"]
    others = [".hidden.png", "._a.jpg", ".git/e.png", "x/.thumbs/f.png", "notes.txt", "g.gif"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    os.symlink(tmp_path, tmp_path / "x" / "loop")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == sorted(names)
    assert [path.name for path in find_images(tmp_path, recursive=False)] == ["a.jpg", "b.PNG"]


def test_find_images_in_a_linked_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"x")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "data" / "link")
    assert find_images(tmp_path / "data") == [tmp_path / "data" / "link" / "a.png"]


def test_no_folder_and_no_images(tmp_path):
    with pytest.raises(FluxfastError, match="does not exist") as raised:
        find_images(tmp_path / "none")
    assert raised.value.hint
    with pytest.raises(FluxfastError, match="no images in") as raised:
        find_images(tmp_path)
    assert raised.value.hint
    (tmp_path / "file").write_text("")
    with pytest.raises(FluxfastError, match="not a folder"):
        find_images(tmp_path / "file")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
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
    path = saved(tmp_path, Image.new("RGB", (40, 32), "red"), "a.jpg", exif=b"Exif\0\0II*\0garbage")
    assert image_size(path) == (40, 32)
    assert load_image(path)[0].size == (40, 32)
    exif = Image.Exif()
    exif[0x0112] = 99
    assert load_image(saved(tmp_path, Image.new("RGB", (40, 32)), exif=exif))[0].size == (40, 32)


def test_alpha_lies_on_white(tmp_path):
    image = Image.new("RGBA", (4, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    rgb, alpha = load_image(saved(tmp_path, image))
    assert rgb.mode == "RGB" and alpha.mode == "L"
    assert [rgb.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (255,) * 3, (127,) * 3]
    assert [alpha.getpixel((x, 0)) for x in range(3)] == [255, 0, 128]


def test_gray_with_alpha(tmp_path):
    image = Image.new("LA", (2, 1), (10, 255))
    image.putpixel((1, 0), (10, 0))
    rgb, alpha = load_image(saved(tmp_path, image))
    assert rgb.getpixel((0, 0)) == (10,) * 3 and rgb.getpixel((1, 0)) == (255,) * 3
    assert alpha.getpixel((1, 0)) == 0


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 128, 0, 200, 0, 0])
    image.putpixel((1, 0), 1)
    rgb, alpha = load_image(saved(tmp_path, image, "plain.png"))
    assert rgb.getpixel((1, 0)) == (200, 0, 0) and alpha is None
    for transparency in (1, b"\xff\x00"):
        rgb, alpha = load_image(saved(tmp_path, image, "clear.png", transparency=transparency))
        assert rgb.getpixel((0, 0)) == (0, 128, 0) and rgb.getpixel((1, 0)) == (255,) * 3
        assert (alpha.getpixel((0, 0)), alpha.getpixel((1, 0))) == (255, 0)


def test_color_keys(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    assert pixel(path) == (255,) * 3
    path = saved(tmp_path, Image.new("L", (2, 2), 7), transparency=7)
    assert pixel(path) == (255,) * 3


def test_gray_one_bit_and_cmyk(tmp_path):
    assert pixel(saved(tmp_path, Image.new("L", (2, 2), 77))) == (77,) * 3
    assert pixel(saved(tmp_path, Image.new("1", (2, 2), 1))) == (255,) * 3
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = pixel(saved(tmp_path, cmyk, "a.jpg", quality=95), (8, 8))
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
    assert [image.getpixel((x, 0)) for x in range(3)] == [(gray,) * 3 for gray in expected]
    assert alpha is None


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
    assert pixel(tmp_path / "a.png") == (255, 128, 0)
    (tmp_path / "b.png").write_bytes(png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 9, 9, 9, 0)))
    assert pixel(tmp_path / "b.png") == (255,) * 3


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_broken_files_are_named(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), name)
    whole = path.read_bytes()
    for data in [whole[: len(whole) // 2], whole[:20], b"", b"not an image", b"\0" * 500]:
        path.write_bytes(data)
        with pytest.raises(FluxfastError, match=name) as raised:
            load_image(path)
        assert raised.value.hint
    path.unlink()
    with pytest.raises(FluxfastError, match=name):
        image_size(path)


def test_broken_png_data(tmp_path):
    path = saved(tmp_path, Image.effect_noise((64, 64), 50))
    data = bytearray(path.read_bytes())
    data[200:240] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(FluxfastError, match=r"a\.png"):
        load_image(path)


def test_decompression_bomb(tmp_path):
    (tmp_path / "a.png").write_bytes(png(50_000, 50_000, 8, 2, b""))
    for read in (load_image, image_size):
        with pytest.raises(FluxfastError, match=r"a\.png is too large"):
            read(tmp_path / "a.png")


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
    (tmp_path / "b.png").write_bytes(b"words")
    with pytest.raises(FluxfastError) as no:
        image_size(tmp_path / "b.png")
    assert no.value.message == f"{tmp_path / 'b.png'} is not an image that can be read"


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    path = saved(
        tmp_path, frames[0], "a.webp", save_all=True, append_images=frames[1:], lossless=True
    )
    assert pixel(path) == (255, 0, 0)


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
    image = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    image.putpixel((1, 0), (255, 255, 255, 0))
    mask = load_mask(saved(tmp_path, image))
    assert mask.mode == "L" and (mask.getpixel((0, 0)), mask.getpixel((1, 0))) == (255, 0)
