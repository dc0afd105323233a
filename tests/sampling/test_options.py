"""`fluxfast sample` from the command line: image to image, masks, grids, and a PNG drawn again."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxfast.config.schema import DrawConfig, SampleConfig
from fluxfast.errors import ConfigError
from fluxfast.sampling.picture import Picture, pictures_of, settings_of


@pytest.fixture
def draw(fluxfast, nano_model, tmp_path):
    """Returns a function that runs `sample` at 64 pixels in two steps: code, files, messages."""

    def run(*options):
        own = {"--model": nano_model, "--prompt": "a cat", "--width": 64, "--height": 64}
        own |= {"--steps": 2, "--out": tmp_path / "out"}
        given = [word for word in map(str, options)]
        words = [w for pair in own.items() if pair[0] not in given for w in map(str, pair)]
        code, out, err = fluxfast("sample", *words, *given)
        return code, [Path(line) for line in out.splitlines()], err

    return run


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (96, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def mask(tmp_path) -> Path:
    white = np.zeros((96, 120), np.uint8)
    white[24:72, 40:88] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def pixels(file: Path) -> np.ndarray:
    return np.array(Image.open(file)).astype(float)


def test_a_picture_is_drawn_again_from_its_file(draw, fluxfast, photo, tmp_path):
    options = ("--image", photo, "--strength", 0.5, "--cfg", 2, "--negative", "a dog")
    code, (first,), err = draw(*options, "--threshold", "preset", "--sampler", "heun")
    assert code == 0, err
    settings = settings_of(first)
    assert settings["threshold"]["schedule"] == "comfyui" and settings["strength"] == 0.5
    code, out, err = fluxfast("sample", "--from", first, "--out", tmp_path / "again")
    assert code == 0, err
    (again,) = map(Path, out.splitlines())
    assert np.array_equal(pixels(first), pixels(again)) and settings_of(again) == settings


def test_a_grid_is_a_sheet_whose_cells_stand_alone(draw, fluxfast, photo, tmp_path):
    grid = ("--grid", "strength=0.5,1", "--grid", "cfg=1,3")
    code, files, err = draw("--image", photo, "--negative", "a dog", *grid)
    assert code == 0, err
    *cells, sheet = files
    assert [(s["strength"], s["cfg"]) for s in map(full, cells)] == [
        (0.5, 1), (1, 1), (0.5, 3), (1, 3)
    ]  # fmt: skip
    assert sheet.name == "04-grid-a-cat.png" and Image.open(sheet).width > 2 * 256
    assert not np.array_equal(pixels(cells[0]), pixels(cells[2]))
    code, out, _ = fluxfast("sample", "--from", cells[2], "--out", tmp_path / "again")
    assert np.array_equal(pixels(Path(out.strip())), pixels(cells[2]))


def test_grids_of_loras_prompts_and_words(draw, nano_model, tmp_path, monkeypatch):
    monkeypatch.setattr("fluxfast.tools.generate.generate", lambda _, asked, __: drawn(asked))
    monkeypatch.setattr("fluxfast.tools.generate.contact_sheet", lambda *_: None)
    (tmp_path / "out").mkdir()
    seen = []

    def drawn(asked):
        seen[:] = asked
        return [tmp_path / f"{index}.png" for index in range(len(asked))]

    code, _, err = draw("--grid", "lora_strength=0.5,1", "--grid", "lora=a,b", "--lora", "c")
    assert code == 0, err
    loras = [[(each.file, each.strength) for each in p.options.loras] for p in seen]
    assert loras == [[("a", 0.5)], [("a", 1)], [("b", 0.5)], [("b", 1)]]
    draw("--cfg", 2, "--grid", 'negative=,"a dog, asleep",no', "--prompt", "a cat --w 32")
    assert [p.options.negative for p in seen] == ["", "a dog, asleep", "no"]
    assert {(p.prompt, p.width) for p in seen} == {("a cat", 32)}
    draw("--grid", "seed=-1,-1")
    assert seen[0].seed != seen[1].seed and min(p.seed for p in seen) >= 0


def full(file: Path) -> dict:
    picture = Picture.from_settings(settings_of(file), str(file))
    return {**vars(picture), **picture.options.model_dump()}


def test_a_mask_keeps_what_is_black(draw, photo, mask):
    _, (whole,), err = draw("--image", photo, "--mask", mask, "--strength", 1)
    assert Image.open(whole).size == (64, 64), err
    code, (part,), err = draw("--image", photo, "--mask", mask, "--mask-crop", 8)
    assert code == 0, err
    before, after = pixels(photo), pixels(part)
    assert before.shape == after.shape
    inside = np.zeros((96, 120), bool)
    inside[24:72, 40:88] = True
    assert np.array_equal(before[~inside], after[~inside])
    assert np.abs(before - after)[inside].mean() > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--negative", "x"), "negative needs cfg"),
        (("--threshold", "preset"), "threshold needs cfg"),
        (("--strength", "0.5"), "--strength is how much of --image is drawn anew"),
        (("--image", "none.png"), "cannot read the image none.png"),
        (("--image", "PHOTO", "--strength", "1.5"), "strength takes 1 or less (got 1.5)"),
        (("--image", "PHOTO", "--strength", "0"), "strength 0 of 2 steps leaves no step to do"),
        (("--mask", "MASK"), "mask needs image"),
        (("--image", "PHOTO", "--mask-crop", "8"), "mask_crop needs mask"),
        (("--image", "PHOTO", "--mask", "SMALL"), "has 8x8 pixels, its picture"),
        (("--image", "PHOTO", "--mask", "BLACK"), "leaves nothing to paint anew at 64x64"),
        (("--cfg", "2", "--cfg-start", "0.5", "--cfg-end", "0.5"), "cfg_start must be below"),
        (("--cfg", "2", "--threshold", "{phi: 1}"), "unknown key 'threshold.phi'"),
        (("--cfg", "2", "--threshold", "{cfg_mode: linear_up}"), "need schedule: steps"),
        (("--sampler", "dpm"), "sampler takes 'euler' or 'heun' (got 'dpm')"),
        (("--grid", "cfg"), "takes KEY=A,B,…"),
        (("--grid", "size=1,2"), "takes KEY=A,B,…"),
        (("--grid", "seed=" + ",".join(map(str, range(65)))), "a grid of 1 settings (seed) and 65"),
        (("--grid", "cfg=1,2", "--grid", "cfg=3,4"), "a grid of 2 settings (cfg, cfg)"),
        (("--grid", "lora_strength=1,2"), "there is no LoRA"),
        (("--lora-strength", "0.5"), "1 strengths for 0 LoRAs"),
        (("--cfg-start", "0.2"), "cfg_start and cfg_end need cfg"),
        (("--negative", "caf\udce9", "--cfg", "2"), "holds a character that no text file can"),
        (("--image", "caf\udce9.png"), "holds a character that no text file can"),
        (("--from", "PHOTO", "--cfg", "2"), "it takes no --cfg, --height, --prompt, --steps"),
    ],
)
def test_bad_input_is_one_message(draw, photo, mask, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("fluxfast.tools.generate.load_resolved", lambda *_, **__: pytest.fail())
    Image.new("L", (8, 8), 255).save(tmp_path / "small.png")
    Image.new("L", (120, 96)).save(tmp_path / "black.png")
    files = {"PHOTO": photo, "MASK": mask, "SMALL": tmp_path / "small.png"}
    files["BLACK"] = tmp_path / "black.png"
    code, files, err = draw(*(files.get(word, word) for word in options))
    assert code in (1, 2) and not files and message in " ".join(err.split()), err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.png"))


def test_a_preview_has_what_the_section_has_and_its_own():
    settings = SampleConfig.model_validate(
        {
            "prompts": ["a", {"prompt": "b", "cfg": 2, "negative": "c", "steps": 3}],
            "samples": [{"prompt": "d", "image": "x.png", "strength": 0.4}],
            "sampler": "heun",
            "loras": [{"file": "few.safetensors", "strength": 0.5}],
        }
    )
    again = SampleConfig.model_validate(json.loads(settings.model_dump_json()))
    for each in (settings, again):
        a, b, d = pictures_of(each)
        assert [p.options.sampler for p in (a, b, d)] == ["heun"] * 3
        assert [p.options.loras[0].strength for p in (a, b, d)] == [0.5] * 3
        assert (a.prompts, b.prompts, b.steps) == (["a"], ["b", "c"], 3)
        assert d.options.strength == 0.4 and b.options.image is None
    line = SampleConfig(prompts=["x", "a cat -- asleep --n dogs --l 3.5 --g 4 --w 512 --d 7 --s 9"])
    _, cat = pictures_of(line)
    assert (cat.prompts, cat.width, cat.seed, cat.steps) == (["a cat -- asleep", "dogs"], 512, 7, 9)
    assert (cat.options.cfg, cat.guidance) == (3.5, 4) and line.samples[0].prompt == "x"
    with pytest.raises(ValueError, match="preview 1: negative needs cfg"):
        SampleConfig(prompts=["a"], samples=[{"prompt": "b", "negative": "c"}])
    beside = SampleConfig(preset="turbo", loras=[{"file": "mine"}])
    for each in (beside, SampleConfig.model_validate(beside.model_dump())):
        files = [lora.file for lora in each.loras]
        assert files == ["alimama-creative/FLUX.1-Turbo-Alpha", "mine"] and each.steps == 8
    wide = SampleConfig(samples=[{"prompt": "a", "size": [96, 64]}, {"prompt": "b", "size": 32}])
    assert [(p.width, p.height) for p in pictures_of(wide)] == [(96, 64), (32, 32)]
    few = SampleConfig(preset="turbo", guidance=2.0)
    assert (few.steps, few.guidance, few.loras[0].strength) == (8, 2.0, 1.0)
    assert SampleConfig(preset="turbo", steps=6).steps == 6


def test_lines_of_kohyas_that_do_less_than_they_say(caplog):
    settings = SampleConfig(prompts=["a --n b --ctrl_img c.png", "d --n e --l 1"])
    (empty,) = pictures_of(SampleConfig(prompts=["a --n --l 3 --W 64"]))
    assert empty.prompts == ["a", ""] and empty.width == 64
    assert [each.prompts for each in pictures_of(settings)] == [["a"], ["d"]]
    assert "drawn without --ctrl_img of 'a'" in caplog.text
    assert caplog.text.count("as in kohya without --l above 1") == 2


def test_a_picture_of_the_earlier_version_can_be_drawn_again(tmp_path):
    old = {"prompt": "a", "seed": 1, "width": 64, "height": 64, "steps": 2, "guidance": 3.5}
    picture = Picture.from_settings({**old, "lora": "x.safetensors, y", "strength": "0.5"}, "f")
    assert [(each.file, each.strength) for each in picture.options.loras] == [
        ("x.safetensors", 0.5),
        ("y", 0.5),
    ]
    assert picture.options.model_copy(update={"loras": []}) == DrawConfig()
    with pytest.raises(ConfigError, match="lacks settings"):
        Picture.from_settings({"prompt": "a"}, "f")
