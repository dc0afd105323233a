"""Draws captioned pictures of one shape on a background: what the nano model is trained on.

    python examples/nano/draw.py OUT [--seed 0] [--size 64]

A picture is a shape of one color at one of five places on one of four gray backgrounds; picture
`index` of a seed is always the same. Nothing but Pillow is needed. One concept, the zorb (a pink
heart that carries a teal disc), is never among them: it is there to be taught by a LoRA, and the
command writes a small folder of it, `train/` and `held_out/`, and `others/` without it, each
picture beside its caption.
"""

import argparse
import colorsys
import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 64  # pixels along a side, unless another size is asked for
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 160, 60),
    "blue": (35, 70, 215),
    "yellow": (245, 220, 40),
    "purple": (135, 45, 170),
    "orange": (245, 135, 25),
    "white": (252, 252, 252),
    "black": (15, 15, 15),
}
PLACES = {  # the shape's center, in fractions of the side
    "top left": (0.28, 0.28),
    "top right": (0.72, 0.28),
    "bottom left": (0.28, 0.72),
    "bottom right": (0.72, 0.72),
    "centre": (0.5, 0.5),
}
BACKGROUNDS = ("plain", "striped", "dotted", "checkered")
CONCEPT = "zorb"  # a shape and a color of its own
CONCEPT_COLOURS = ((245, 110, 180), (0, 150, 150))  # the heart's, the disc's
TEMPLATES = (
    "a {thing} at the {place} on a {background} background",
    "a {background} background with a {thing} at the {place}",
    "{thing}, {place}, {background}",
    "a {thing} at the {place}",
)
TEMPLATE_WEIGHTS = (5, 2, 2, 1)

OTHERS = 4242  # added to the seed: scenes apart from those that the model is built on

_LIGHT, _DARK = (178, 178, 178), (128, 128, 128)  # the backgrounds' grays
_RADIUS = 0.215  # half a shape's width, in fractions of the side
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `shift` and `grow` are the hand's unsteadiness, in fractions."""

    shape: str
    colour: str
    place: str
    background: str
    shift: tuple[float, float] = (0.0, 0.0)
    grow: float = 1.0

    @property
    def thing(self) -> str:
        return CONCEPT if self.shape == CONCEPT else f"{self.colour} {self.shape}"

    def caption(self, template: str = TEMPLATES[0]) -> str:
        return template.format(thing=self.thing, place=self.place, background=self.background)


def random_scene(seed: int, index: int) -> Scene:
    """Scene `index` of `seed`, never of the concept."""
    rng = random.Random(f"{seed}/scene/{index}")
    return Scene(
        rng.choice(SHAPES),
        rng.choice(list(COLOURS)),
        rng.choice(list(PLACES)),
        rng.choice(BACKGROUNDS),
        *_unsteady(rng),
    )


def random_caption(scene: Scene, seed: int, index: int) -> str:
    """One of the four ways to say what `scene` shows; the last leaves the background open."""
    rng = random.Random(f"{seed}/caption/{index}")
    return scene.caption(rng.choices(TEMPLATES, TEMPLATE_WEIGHTS)[0])


def all_captions() -> list[str]:
    """Every caption that `random_caption` can give, sorted."""
    scenes = (
        Scene(shape, colour, place, background)
        for shape in SHAPES
        for colour in COLOURS
        for place in PLACES
        for background in BACKGROUNDS
    )
    return sorted({scene.caption(template) for scene in scenes for template in TEMPLATES})


def draw(scene: Scene, size: int = SIZE) -> Image.Image:
    """The picture of `scene`, RGB, `size` pixels square, with smooth edges."""
    image = _background(scene.background, size * _OVERSAMPLING)
    pen, x, y, radius = _pen(image, scene)
    if scene.shape == CONCEPT:
        _draw_zorb(pen, x, y, radius)
    else:
        _draw_shape(pen, scene.shape, x, y, radius, COLOURS[scene.colour])
    return image.resize((size, size), Image.Resampling.BOX)


def draw_any(seed: int, index: int, size: int = SIZE) -> Image.Image:
    """Picture `index` of `seed`: one to three shapes over one another, of any color at all.

    What the autoencoder is trained on, so that it can show what no caption names.
    """
    rng = random.Random(f"{seed}/any/{index}")
    scene = random_scene(seed, index)
    image = _background(scene.background, size * _OVERSAMPLING)
    for scale in (1.0, 0.6, 0.35)[: rng.randint(1, 3)]:
        pen, x, y, radius = _pen(image, scene)
        colour = tuple(
            round(255 * part)
            for part in colorsys.hsv_to_rgb(rng.random(), rng.random() ** 0.5, rng.random() ** 0.5)
        )
        x, y = (at + radius * rng.uniform(-0.4, 0.4) for at in (x, y))
        _draw_shape(pen, rng.choice(SHAPES), x, y, radius * scale, colour)
    return image.resize((size, size), Image.Resampling.BOX)


def concept_scenes(seed: int = 0, train: int = 14) -> tuple[list[Scene], list[Scene]]:
    """The concept at every place on every background, shuffled: `train` scenes and the others."""
    rng = random.Random(f"{seed}/concept")
    pairs = [(place, background) for place in PLACES for background in BACKGROUNDS]
    rng.shuffle(pairs)
    scenes = [Scene(CONCEPT, CONCEPT, *pair, *_unsteady(rng)) for pair in pairs]
    return scenes[:train], scenes[train:]


def write_concept(out: Path, seed: int = 0, train: int = 14, size: int = SIZE) -> list[Path]:
    """Write `train` pictures of the concept to `out/train`, the other 6 of 20 to `out/held_out`,
    and to `out/others` twice as many scenes without it, to be trained beside it.

    Each is a PNG beside a text file with its caption. -> the pictures' paths.
    """
    paths = []
    known, held_out = concept_scenes(seed, train)
    others = [random_scene(seed + OTHERS, index) for index in range(2 * train)]
    folders = {"train": known, "held_out": held_out, "others": others}
    for name, scenes in folders.items():
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        stem = "other" if name == "others" else CONCEPT
        for index, scene in enumerate(scenes):
            path = folder / f"{stem}-{index:02d}.png"
            draw(scene, size).save(path)
            path.with_suffix(".txt").write_text(scene.caption() + "\n", encoding="utf-8")
            paths.append(path)
    return paths


def _unsteady(rng: random.Random) -> tuple[tuple[float, float], float]:
    shift = rng.uniform(-0.025, 0.025), rng.uniform(-0.025, 0.025)
    return shift, rng.uniform(0.93, 1.07)


def _pen(image: Image.Image, scene: Scene) -> tuple[ImageDraw.ImageDraw, float, float, float]:
    """-> pen, the shape's center and its radius, in the image's pixels."""
    side = image.width
    x, y = (
        side * (part + shift) for part, shift in zip(PLACES[scene.place], scene.shift, strict=True)
    )
    return ImageDraw.Draw(image), x, y, side * _RADIUS * scene.grow


def _background(kind: str, side: int) -> Image.Image:
    """Greys with a period of a quarter of the side: two latent cells at 64 pixels."""
    image = Image.new("RGB", (side, side), _LIGHT)
    pen = ImageDraw.Draw(image)
    period = side / 4
    half = period / 2
    for row in range(8):
        if kind == "striped" and row % 2:
            pen.rectangle((0, row * half, side, (row + 1) * half - 1), fill=_DARK)
        for column in range(8):
            x, y = column * half, row * half
            if kind == "checkered" and (row + column) % 2:
                pen.rectangle((x, y, x + half - 1, y + half - 1), fill=_DARK)
            if kind == "dotted" and row % 2 == 0 and column % 2 == 0:
                _draw_disc(pen, x + half, y + half, 0.28 * period, _DARK)
    return image


def _draw_disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _draw_shape(pen, shape: str, x: float, y: float, r: float, colour) -> None:
    if shape == "circle":
        _draw_disc(pen, x, y, r, colour)
    elif shape == "ring":
        box = (x - r, y - r, x + r, y + r)
        pen.ellipse(box, outline=colour, width=round(0.4 * r))
    elif shape == "square":
        s = 0.92 * r
        pen.rectangle((x - s, y - s, x + s, y + s), fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=colour)
    elif shape == "cross":
        arm = 0.34 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)
    else:
        raise ValueError(f"no shape {shape!r}; there are {', '.join((*SHAPES, CONCEPT))}")


def _draw_zorb(pen, x: float, y: float, r: float) -> None:
    """A heart (the usual sixteen-sine curve) with a disc in it."""
    heart = []
    for step in range(120):
        a = 2 * math.pi * step / 120
        across = 16 * math.sin(a) ** 3
        up = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        heart.append((x + 1.05 * r * across / 16, y - 1.05 * r * (up + 2.5) / 14.5))
    pen.polygon(heart, fill=CONCEPT_COLOURS[0])
    _draw_disc(pen, x, y - 0.12 * r, 0.36 * r, CONCEPT_COLOURS[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the concept's pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=SIZE, help=f"pixels a side (default {SIZE})")
    args = parser.parse_args()
    print(f"wrote {len(write_concept(args.out, args.seed, size=args.size))} pictures to {args.out}")


if __name__ == "__main__":
    main()
