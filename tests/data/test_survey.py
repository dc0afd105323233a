"""What the data folders hold: what is trained, what is left out, and the lines that list it."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from small import logged, noise_pictures

from fluxfast.config.schema import build_config
from fluxfast.data import captions, images, scan
from fluxfast.data.scan import SkipReport
from fluxfast.data.survey import read_data, survey
from fluxfast.errors import FluxfastError


def picture(path: Path, caption: str | None = None, kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(path, kind)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def read(folder: Path, **changes) -> tuple[dict[str, list[str]], list[str]]:
    """Returns image -> prompts, and the lines that are logged."""
    outer = {k: changes.pop(k) for k in ("name", "trigger", "output_dir") if k in changes}
    data = {"folder": str(folder), "resolution": 64, "trigger": changes.pop("data_trigger", None)}
    data |= changes
    settings = {"trigger": "ohwx", **outer, "model": {"path": "unused"}, "data": data}
    with logged() as lines:
        (plan,), _ = read_data(build_config(settings), None, SkipReport())
    return {image.name: prompts for image, prompts in plan}, lines


def test_a_plain_folder_takes_two_lines(tmp_path):
    noise_pictures(tmp_path, 3, "a shape", sizes=((64, 64), (96, 64)))
    assert read(tmp_path, num_repeats=2, resolution=[64, 96])[1] == [
        f"{tmp_path}: 3 of 3 pictures, 2 times each, in 2 buckets: 64x64 (5), 96x64 (1)",
        "  captions: 3 from .txt",
    ]


# ---------------------------------------------------------------- captions


BESIDE = ' (metadata.jsonl with "file_name" and "text" is read, or a .txt beside each picture)'


def metadata(*rows: dict) -> dict[str, str]:
    return {"metadata.jsonl": "\n".join(map(json.dumps, rows))}


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {"a.caption": "x", "b.caption": "y"},
            "captions not read: a.caption, b.caption (data.caption_ext: .caption reads them)",
        ),
        ({"a.png.txt": ""}, "captions not read: a.png.txt (data.caption_ext: .png.txt reads them)"),
        ({"B.TXT": "x"}, f"captions not read: B.TXT{BESIDE}"),
        (
            {"captions/a.txt": "x", "captions/b.txt": "y", "captions.json": '{"a.png": "x"}'},
            f"captions not read: captions.json, captions/a.txt, captions/b.txt{BESIDE}",
        ),
        ({"metadata.csv": "file_name,text\na.png,x\n"}, f"captions not read: metadata.csv{BESIDE}"),
        (
            metadata(*({"file_name": f"train/{name}.png", "text": "x"} for name in "abcd")),
            "metadata.jsonl: 4 of 4 lines name no picture that is here: "
            "train/a.png, train/b.png, train/c.png, …",
        ),
        (
            metadata({"file_name": "a.png", "prompt": "x"}, {"file_name": "b.png", "text": None}),
            'metadata.jsonl: 2 of 2 lines have neither "text" nor "caption": a.png, b.png',
        ),
    ],
)
def test_captions_that_are_not_read_are_named_and_strict_refuses(tmp_path, files, line):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    prompts, lines = read(tmp_path)
    assert prompts == {"a.png": ["ohwx"], "b.png": ["ohwx"]}
    missing = "2 of 2 pictures have no caption and are trained on the trigger alone"
    assert sorted(lines[1:]) == sorted([f"  {missing}", f"  {line}"])
    with pytest.raises(FluxfastError) as refused:
        read(tmp_path, strict=True)
    assert refused.value.message == f"{tmp_path}: {line}"
    with pytest.raises(FluxfastError, match=r"2 of 2 images have no caption: a\.png, b\.png\nhint"):
        read(tmp_path, trigger=None)


def test_the_cure_for_unread_captions_reads_them(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.png.txt").write_text("a ball")
    (tmp_path / "a.json").write_text('{"caption": null, "text": "a\\u001b cube", "score": 3}')
    for extension, caption in ((".png.txt", "a ball"), (".json", "a  cube")):
        prompts, lines = read(tmp_path, caption_ext=extension, strict=True)
        assert prompts == {"a.png": [f"ohwx, {caption}"]}
        assert lines[1:] == [f"  captions: 1 from {extension}"]
    for wrong in ("[1]", '{"tags": "x"}', '{"caption": 3}', '{"text": "\\ud800"}', "a cube"):
        (tmp_path / "a.json").write_text(wrong)
        with pytest.raises(FluxfastError, match=r"a\.json(: the cap| needs .cap| is not valid J)"):
            read(tmp_path, caption_ext=".json", strict=True)


def test_the_triggers_take_the_place_of_a_caption(tmp_path):
    picture(tmp_path / "a.png")
    around = {"caption_prefix": "photo of", "caption_suffix": "at night"}
    for run, own, words in (("ohwx", None, "ohwx"), ("ohwx", "bob", "ohwx, bob"), ("", "b", "b")):
        prompts, _ = read(tmp_path, trigger=run, data_trigger=own, **around)
        assert prompts == {"a.png": [f"photo of {words} at night"]}


def test_a_table_of_other_things_is_no_captions(tmp_path):
    picture(tmp_path / "a beach.png")
    (tmp_path / "dataset_infos.json").write_text('{"license": "mit"}')
    lines = read(tmp_path, strict=True)[1]
    assert lines[-1] == "  text files that fit no picture: dataset_infos.json"


def test_tables_in_many_folders_take_linear_time(tmp_path):
    paths, calls = [tmp_path / str(index) / "a.png" for index in range(100)], Counter()
    for path in paths:
        path.parent.mkdir()
        (path.parent / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a ball"}')
    for count in (50, 100):
        sys.setprofile(lambda *_, count=count: calls.update([count]))
        assert len(captions.read_captions(tmp_path, paths[:count]).texts) == count
        sys.setprofile(None)
    assert calls[100] < 2.5 * calls[50]


def test_what_captions_are_trained_on_is_said(tmp_path):
    picture(tmp_path / "a.png", "a ball")
    picture(tmp_path / "b.png", " \n")
    picture(tmp_path / "c.png")
    (tmp_path / "notes.md").write_text("to do")
    (tmp_path / "a.caption").write_text("another of a picture that has one: nothing to say")
    prompts, lines = read(tmp_path)
    assert prompts == {"a.png": ["ohwx, a ball"], "b.png": ["ohwx"], "c.png": ["ohwx"]}
    assert lines[1:] == [
        "  captions: 2 from .txt",
        "  1 of 3 pictures have no caption and are trained on the trigger alone",
        "  1 of 3 pictures have an empty caption and are trained on the trigger alone: b.png",
        "  text files that fit no picture: notes.md",
    ]
    with pytest.raises(FluxfastError, match=r"an empty caption .*: b\.png"):
        read(tmp_path, strict=True)
    (tmp_path / "b.txt").write_text("a cube")
    assert (
        "  1 of 3 pictures have no caption and are trained on data.default_caption"
        in read(tmp_path, default_caption="a ball", strict=True)[1]
    )
    assert "are trained on the empty prompt" in read(tmp_path, default_caption="", trigger="")[1][2]
    picture(tmp_path / "c.png", "a cone")
    assert read(tmp_path, strict=True)[1][1:] == ["  captions: 3 from .txt"]


# ---------------------------------------------------------------- pictures


def test_every_kind_that_pillow_reads_is_trained_and_the_others_are_counted(tmp_path):
    kinds = {"bmp": "BMP", "gif": "GIF", "jfif": "JPEG", "JPE": "JPEG", "tif": "TIFF"}
    kinds |= {"tiff": "TIFF", "avif": "AVIF", "webp": "WEBP", "apng": "PNG"}
    for suffix, kind in kinds.items():
        picture(tmp_path / f"{suffix}.{suffix}", "a ball", kind)
    for suffix in ("CR2", "bmp.bak", "bmp_original"):  # beside bmp.bmp: no fault
        picture(tmp_path / f"bmp.{suffix}")
    (tmp_path / "folder.ico").write_bytes(b"\0\0\1\0")
    used = sorted(f"{suffix}.{suffix}" for suffix in kinds)
    prompts, lines = read(tmp_path, strict=True)
    assert list(prompts) == used and lines[0].startswith(f"{tmp_path}: 9 of 9 pictures, ")
    twins = "  left out: 3 other versions of pictures: bmp.CR2, bmp.bmp.bak, bmp.bmp_original"
    assert lines[1] == twins
    for name in ("a.psd", "b.jxl", "c.jxl", "d.CR3", "e.mp4", "nothing.bin"):
        (tmp_path / name).write_bytes(b"whatever")
    picture(tmp_path / "twitter.jpg_large", kind="JPEG")
    (tmp_path / "d.txt").write_text("the caption of a picture that is left out")
    prompts, lines = read(tmp_path)
    assert list(prompts) == used
    assert lines[0].startswith(f"{tmp_path}: 9 of 14 pictures, ")
    groups = (
        "1 videos: e.mp4",
        twins.removeprefix("  left out: "),
        "1 .psd (not read): a.psd",
        "2 .jxl (not read): b.jxl, c.jxl",
        "1 .cr3 (not read): d.CR3",
        "1 without a picture's extension: twitter.jpg_large",
    )
    strict = " (strict: true beside data.folder makes that an error)"
    assert lines[1] == f"  left out: {'; '.join(groups)}{strict}"
    with pytest.raises(FluxfastError, match=r"^5 files cannot be used: .*a\.psd is left out"):
        read(tmp_path, strict=True)


def test_heic_takes_a_library_that_may_be_missing(tmp_path, monkeypatch):
    picture(tmp_path / "phone.HEIC", "a ball")  # Pillow goes by its content
    monkeypatch.setattr(scan, "formats", lambda: ("PNG",))
    with pytest.raises(FluxfastError, match=r"no images .* 1 \.heic \(pip install pillow-heif\)"):
        read(tmp_path)
    monkeypatch.setattr(scan, "formats", lambda: ("PNG", "HEIF"))
    assert read(tmp_path)[0] == {"phone.HEIC": ["ohwx, a ball"]}


def test_formats_of_libraries_are_read_where_they_are_installed(monkeypatch):
    library = SimpleNamespace(register_heif_opener=lambda: Image.register_open("HEIF", Image.Image))
    monkeypatch.setitem(sys.modules, "pillow_heif", library)
    monkeypatch.setitem(Image.OPEN, "HEIF", None)
    assert {"AVIF", "HEIF"} < {*images.formats.__wrapped__()}
    assert Image.OPEN["HEIF"][0] is Image.Image
    monkeypatch.delitem(Image.SAVE, "AVIF")  # as where Pillow was built without libavif
    assert "AVIF" not in images.formats.__wrapped__()


# ---------------------------------------------------------------- what is no picture to train on


@pytest.mark.parametrize(
    "name",
    [
        "a-masklabel.png", "gone-condlabel.png", "a_mask.png", "a-mask.JPG", "a.mask.webp",
        "a_depth.png", "a.sapiens2_mask.webp", "a_canny.png", "_controls/a.depth.jpg",
        "_controls_/b.pose.jpg", "masks/a.png", "below/mask/a.jpg", "depth_maps/a.png",
        "reg/1_man/man.png", "regularization_images/m.png", "class_images/x.jpg",
        "@eaDir/a.png/thumb.jpg", "__MACOSX/b.png", "#recycle/b.png", "$RECYCLE.BIN/S-1/$R1.png",
        "mask_a.png", "a_mask_2.png", "a-depth-map.png", "a.png_mask.png",
    ],
)  # fmt: skip
def test_masks_controls_and_regularization_are_left_alone_and_said(tmp_path, name):
    picture(tmp_path / "a.png", "a ball")
    picture(tmp_path / name)
    prompts, lines = read(tmp_path, strict=True)
    assert prompts == {"a.png": ["ohwx, a ball"]}
    assert lines[0].startswith(f"{tmp_path}: 1 of 1 pictures")
    assert lines[1].startswith("  left out: 1 ") and lines[1].endswith(f": {name}")


def test_pictures_that_only_sound_like_masks_are_trained(tmp_path):
    names = ["gas_mask.png", "mask_..png", "pose/yoga.png", "regina/a.png", "a_class.png"]
    names.append("masks/venice.png")
    for name in names:
        picture(tmp_path / name)
    picture(tmp_path / "girl.png", "a girl")
    picture(tmp_path / "girl_pose.png", "a girl who poses")  # with a caption of its own
    picture(tmp_path / "girl-lines.png")
    row = {"file_name": "girl-lines.png", "text": "a girl who reads lines"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    prompts, _ = read(tmp_path)
    assert set(prompts) == {*names, "girl.png", "girl_pose.png", "girl-lines.png"}
    assert set(read(tmp_path / "masks")[0]) == {"venice.png"}


def test_the_masks_of_mask_folder_are_not_left_out_but_used(tmp_path):
    picture(tmp_path / "a.png", "a ball")
    picture(tmp_path / "masks" / "a.png")
    _, lines = read(tmp_path, mask="folder", mask_folder=str(tmp_path / "masks"))
    assert not any("left out" in line for line in lines)


def test_pictures_that_runs_drew_are_not_trained(tmp_path):
    picture(tmp_path / "a.png", "a ball")
    picture(tmp_path / "runs" / "lora" / "samples" / "0.png")
    prompts, lines = read(tmp_path, output_dir=str(tmp_path / "runs"))
    assert list(prompts) == ["a.png"]
    assert lines[1] == "  left out: 1 drawn by runs (output_dir): runs/lora/samples/0.png"
    with pytest.raises(FluxfastError, match="1 drawn by runs"):
        read(tmp_path / "runs", output_dir=str(tmp_path / "runs"), name="lora")
    drawn = tmp_path / "runs" / "lora" / "samples"  # asked for by name
    assert list(read(drawn, output_dir=str(tmp_path / "runs"))[0]) == ["0.png"]


def test_folders_below_that_are_not_searched_are_said_where_nothing_else_is(tmp_path):
    picture(tmp_path / "10_man" / "a.png")
    with pytest.raises(FluxfastError, match=r"no images .* below it \(recursive: false\)"):
        read(tmp_path, recursive=False)


def test_kohyas_folder_names_are_said_not_to_be_read(tmp_path):
    for name in ("10_ohwx man/a.png", "1_man/b.png", "2024_summer/c.png", "12/d.png"):
        picture(tmp_path / name, "a man")
    prompts, lines = read(tmp_path)
    assert len(prompts) == 4
    (line,) = [line for line in lines if "kohya's" in line]
    assert "not read: 10_ohwx man;" in line
    assert line.endswith("num_repeats: 10, default_caption: ohwx man")
    assert len(read(tmp_path / "1_man", trigger=None)[1]) == 2  # once, with its captions: as kohya
    (tmp_path / "1_man" / "b.txt").unlink()
    for settings in ({"num_repeats": 1}, {"default_caption": "a man"}):
        assert "kohya's" not in "".join(read(tmp_path / "1_man", **settings)[1])
    for folder, named in ((tmp_path, "10_ohwx man, 1_man;"), (tmp_path / "1_man", "1_man;")):
        assert f"kohya's folder names are not read: {named}" in "".join(read(folder)[1])


def test_the_survey_of_a_plan_writes_nothing_and_ends_nothing(tmp_path):
    picture(tmp_path / "data" / "a.png", "a ball")
    settings: dict = {"model": {"path": "unused"}, "output_dir": str(tmp_path / "runs")}
    settings["data"] = {"folder": str(tmp_path / "data")}
    with logged() as lines:
        survey(build_config(settings))
        settings["data"]["folder"] = str(tmp_path / "none")
        survey(build_config(settings))
    assert lines[0].endswith("data: 1 of 1 pictures, in 1 bucket: 64x64 (1)")
    assert lines[-1].startswith("note: the data cannot be trained on as it is: cannot read the fol")
    assert not (tmp_path / "runs").exists()


def test_merged_buckets_are_told_and_are_those_of_the_run(tmp_path, monkeypatch):
    """Of every folder together, and of a run that has begun those that it began with."""
    monkeypatch.setattr("fluxfast.data.buckets.AREAS", 2)
    for name, size in (("a/a", (96, 64)), ("a/b", (64, 64)), ("b/c", (160, 32)), ("b/d", (96, 65))):
        Image.new("RGB", size).save(picture(tmp_path / f"{name}.png", "a ball"))
    folders = [{"folder": str(tmp_path / name), "resolution": 96} for name in "ab"]
    config = build_config({"model": {"path": "unused"}, "data": folders})

    def buckets(areas) -> list:
        with logged() as lines:
            plans, chosen = read_data(config, None, SkipReport(), areas=areas)
        merged = [line for line in lines if "px: buckets" in line]
        return [chosen, merged, *(image.buckets[0] for plan in plans for image, _ in plan)]

    chosen, lines, *sizes = buckets(None)
    assert chosen == {96: [64 * 64, 96 * 64]} and sizes[:2] == [(96, 64), (64, 64)]
    assert lines == [
        "96 px: buckets are merged to 2 token counts, which crops 5.4 % on average, 20.0 % at most "
        "(without: 0.4 % on average, 1.5 % at most)"
    ]
    assert buckets(chosen)[2:] == sizes
    assert buckets({}) == [{}, [], (96, 64), (64, 64), (160, 32), (96, 64)]
    assert buckets({96: [32 * 32]})[2:] == [(32, 32)] * 4
    # nothing of this area fits into two of them
    assert buckets({96: [96 * 64]})[2:] == [(96, 64), (64, 64), (160, 32), (96, 64)]
