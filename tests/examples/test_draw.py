"""The nano model's drawings match their captions, are repeatable, and never show the concept."""

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import script

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "nano" / "draw.py"


@pytest.fixture(scope="module")
def draw():
    return script(SCRIPT)


def _pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def _painted(draw, scene) -> np.ndarray:
    """Returns where the shape is: bool [64, 64]. Its colour differs from both greys."""
    bare = draw._background(scene.background, 64 * draw._OVERSAMPLING)
    bare = bare.resize((64, 64), Image.Resampling.BOX)
    return np.abs(_pixels(draw.draw(scene)) - _pixels(bare)).max(axis=2) > 20


def test_a_scene_follows_from_seed_and_index_alone(draw):
    scenes = [draw.random_scene(0, index) for index in range(50)]
    assert scenes == [draw.random_scene(0, index) for index in range(50)]
    assert scenes != [draw.random_scene(1, index) for index in range(50)]
    assert len(set(scenes)) == 50
    assert np.array_equal(_pixels(draw.draw(scenes[3])), _pixels(draw.draw(scenes[3])))


def test_every_answer_occurs_and_the_concept_never(draw):
    scenes = [draw.random_scene(0, index) for index in range(2000)]
    for answer, values in (
        ("shape", draw.SHAPES),
        ("colour", draw.COLOURS),
        ("place", draw.PLACES),
        ("background", draw.BACKGROUNDS),
    ):
        assert {getattr(scene, answer) for scene in scenes} == set(values)
    assert not any(draw.CONCEPT in caption for caption in draw.all_captions())


def test_captions_say_what_is_drawn(draw):
    known = set(draw.all_captions())
    assert len(known) == 5 * 8 * 5 * (3 * 4 + 1)  # three templates name one of 4 backgrounds
    kinds = set()
    for index in range(300):
        scene = draw.random_scene(0, index)
        caption = draw.random_caption(scene, 0, index)
        assert caption in known and f"{scene.colour} {scene.shape}" in caption
        assert scene.place in caption
        kinds.add(scene.background in caption)
    assert kinds == {True, False}
    scene = draw.Scene("circle", "red", "top left", "striped")
    assert scene.caption() == "a red circle at the top left on a striped background"


def test_the_shape_has_its_colour_and_place(draw):
    for index in range(60):
        scene = draw.random_scene(2, index)
        painted = _painted(draw, scene)
        pixels = _pixels(draw.draw(scene))[painted]
        assert np.abs(np.median(pixels, axis=0) - draw.COLOURS[scene.colour]).max() <= 2
        rows, columns = np.nonzero(painted)
        middle = np.array([(columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2])
        assert np.abs(middle / 63 - draw.PLACES[scene.place]).max() < 0.06
        assert rows.min() > 0 and rows.max() < 63 and columns.min() > 0 and columns.max() < 63


def test_no_two_shapes_or_backgrounds_look_alike(draw):
    shapes = [(shape, "plain") for shape in (*draw.SHAPES, draw.CONCEPT)]
    backgrounds = [("circle", background) for background in draw.BACKGROUNDS]
    for group in (shapes, backgrounds):
        scenes = [draw.Scene(shape, "red", "centre", background) for shape, background in group]
        for one, other in combinations([_pixels(draw.draw(scene)) for scene in scenes], 2):
            assert (np.abs(one - other).max(axis=2) > 20).mean() > 0.015


def test_any_size_and_no_unknown_shape(draw):
    scene = draw.random_scene(0, 0)
    assert draw.draw(scene, 128).size == (128, 128)
    with pytest.raises(ValueError, match="no shape 'heart'"):
        draw.draw(draw.Scene("heart", "red", "centre", "plain"))


def test_concept_is_every_place_on_every_background_once(draw):
    train, held_out = draw.concept_scenes()
    assert (len(train), len(held_out)) == (14, 6)
    pairs = {(scene.place, scene.background) for scene in train + held_out}
    assert len(pairs) == len(draw.PLACES) * len(draw.BACKGROUNDS) == 20
    scene = train[0]
    pixels = _pixels(draw.draw(scene))[_painted(draw, scene)]
    for colour in draw.CONCEPT_COLOURS:  # two parts, each in a colour that no other shape has
        assert (np.abs(pixels - colour).max(axis=1) < 8).sum() > 20
        assert min(np.abs(np.subtract(colour, c)).max() for c in draw.COLOURS.values()) > 60


def test_command_writes_captioned_pictures(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("wrote 48 pictures")
    others = sorted((tmp_path / "others").glob("*.txt"))
    assert len(others) == 28 and not any("zorb" in path.read_text() for path in others)
    for folder, count in (("train", 14), ("held_out", 6)):
        paths = sorted((tmp_path / folder).glob("*.png"))
        assert len(paths) == count
        for path in paths:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8")
            assert caption.startswith("a zorb at the ") and caption.endswith(" background\n")
            assert Image.open(path).size == (64, 64)
