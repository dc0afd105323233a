"""Makes photos/: eleven small captioned photographs in the file kinds that data sets really hold.

    python examples/nano/make_photos.py [OUT]

The sources are pictures inside scikit-image's wheel (nothing is downloaded); photos/LICENSES.md
names each one's author and license. Pixels are reproducible for one Pillow version; other
versions of its codecs may differ in the last bit, so the results are committed.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HERE = Path(__file__).resolve().parent
ORIENTATION = 0x0112  # EXIF tag
ROTATE_TO_VIEW = 6  # its value for "turn 90 degrees clockwise to view"

CAPTIONS = {
    "astronaut.jpg": "a photograph of a smiling astronaut in an orange space suit, "
    "a flag and a model of a space shuttle behind her",
    "camera.png": "a black and white photograph of a man in a dark coat "
    "looking through a camera on a tripod, a park behind him",
    "chelsea.png": "a close-up photograph of a ginger tabby cat with green eyes",
    "coffee.png": "a photograph of a cup of espresso on a red saucer with a spoon, "
    "on a wooden table",
    "coins.jpg": "a black and white photograph of old coins in four rows on a dark background",
    "hubble.webp": "a photograph of many small bright galaxies in deep black space",
    "retina.jpg": "a medical photograph of the back of a human eye, an orange disc with red veins",
    "rocket.jpg": "a photograph of a white rocket on its launch pad at dusk, bright lights below",
    "textures/brick.png": "a black and white photograph of a wall of long narrow bricks",
    "textures/grass.jpg": "a black and white photograph of short grass and leaves seen from above",
    "textures/gravel.png": "a black and white photograph of gravel, small stones seen from above",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=HERE / "photos", metavar="OUT")
    out = make_photos(parser.parse_args().out)
    print(f"wrote {len(CAPTIONS)} photographs to {out}")


def make_photos(out: Path) -> Path:
    """Write the eleven pictures and their captions below `out`; other files there stay."""
    (out / "textures").mkdir(parents=True, exist_ok=True)
    fit = Image.Resampling.LANCZOS

    # RGB JPEG, portrait, an odd ratio
    astronaut = _source("astronaut").crop((20, 0, 460, 512)).resize((248, 288), fit)
    astronaut.save(out / "astronaut.jpg", quality=88)

    # gray PNG (mode L), square
    _source("camera").resize((256, 256), fit).save(out / "camera.png", optimize=True)

    # palette PNG (mode P), 128 colors, 3:2
    chelsea = _source("chelsea").resize((288, 192), fit)
    chelsea.quantize(128, Image.Quantize.FASTOCTREE).save(out / "chelsea.png", optimize=True)

    # RGBA PNG: alpha is a hand-drawn mask of the cup and its saucer with a soft edge
    coffee = _source("coffee")
    coffee.putalpha(_cup_mask(coffee.size))
    coffee.resize((288, 192), fit).save(out / "coffee.png", optimize=True)

    # gray JPEG
    _source("coins").resize((304, 240), fit).save(out / "coins.jpg", quality=88)

    # WebP
    _source("hubble_deep_field").resize((320, 279), fit).save(out / "hubble.webp", quality=85)

    # CMYK JPEG with a real black plate
    retina = _source("retina").resize((240, 240), fit)
    _to_cmyk(retina).save(out / "retina.jpg", quality=88)

    # JPEG that lies on its side: 288 x 192 as stored, 192 x 288 upright as its EXIF flag says
    rocket = _source("rocket").crop((178, 0, 462, 426)).resize((192, 288), fit)
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATE_TO_VIEW
    lying = rocket.transpose(Image.Transpose.ROTATE_90)
    lying.save(out / "rocket.jpg", quality=88, exif=exif)

    # gray PNG, panorama 2:1
    brick = _source("brick").crop((0, 128, 512, 384)).resize((320, 160), fit)
    brick.save(out / "textures" / "brick.png", optimize=True)

    # small gray JPEG
    grass = _source("grass").crop((0, 0, 320, 320)).resize((160, 160), fit)
    grass.save(out / "textures" / "grass.jpg", quality=85)

    # 16-bit gray PNG (mode I;16): resized in float, so that the low byte carries picture too
    gravel = _source("gravel").convert("F").crop((0, 0, 480, 320)).resize((192, 128), fit)
    values = np.clip(np.asarray(gravel) * 257.0, 0, 65535).round().astype(np.uint16)
    Image.fromarray(values).save(out / "textures" / "gravel.png", optimize=True)

    _write_captions(out)
    return out


def _source(name: str) -> Image.Image:
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)())


def _cup_mask(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    draw = ImageDraw.Draw(mask)
    draw.ellipse((70, 92, 484, 390), fill=255)  # saucer
    draw.ellipse((168, 12, 412, 210), fill=255)  # cup
    draw.polygon(
        [(330, 60), (405, 50), (425, 70), (420, 180), (330, 180)], fill=255
    )  # spoon handle
    return mask.filter(ImageFilter.GaussianBlur(5))


def _to_cmyk(image: Image.Image) -> Image.Image:
    """RGB to CMYK with all common gray in the black plate (Pillow's own convert leaves K at 0)."""
    rgb = np.asarray(image, dtype=np.float32) / 255
    white = rgb.max(axis=-1, keepdims=True)
    cmy = 1 - rgb / np.maximum(white, 1 / 255)
    planes = np.concatenate([cmy, 1 - white], axis=-1) * 255
    size, data = image.size, planes.round().astype(np.uint8).tobytes()
    return Image.frombytes("CMYK", size, data)


def _write_captions(out: Path) -> None:
    rows = []
    for name, caption in CAPTIONS.items():
        if name.startswith("textures/"):
            rows.append({"file_name": Path(name).name, "text": caption})
        else:
            (out / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (out / "textures" / "metadata.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
