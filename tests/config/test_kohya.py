"""kohya's dataset TOML: what each key becomes, the notes about it, what is refused."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from small import logged

from fluxfast.config.kohya import KohyaFile, _parse
from fluxfast.config.kohya_keys import OUTSIDE, TABLE
from fluxfast.config.schema import Config, all_keys, build_config, load_config
from fluxfast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "kohya" / "dataset.toml"

# a file that asks for nothing that is read differently
PLAIN = """
[general]
enable_bucket = true
bucket_no_upscale = true
caption_extension = ".txt"
[[datasets]]
resolution = 512
[[datasets.subsets]]
image_dir = "photos"
"""
ENTRY = {
    "folder": "photos",
    "recursive": False,
    "resolution": 512,
    "num_repeats": 1,
    "caption_ext": ".txt",
    "caption_dropout": 0.0,
    "shuffle_captions": False,
    "keep_tokens": 0,
    "flip": False,
    "mask": "none",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "d.toml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def plain(general: str = "", dataset: str = "", subset: str = "") -> str:
    """PLAIN with lines added to its levels."""
    text = PLAIN.replace("[general]\n", f"[general]\n{general}\n")
    return text.replace("[[datasets]]\n", f"[[datasets]]\n{dataset}\n") + subset


def config(text: str, *overrides: str, **native) -> tuple[Config, list[str]]:
    """The configuration that names the file, and the notes."""
    raw = {"model": {"path": "m"}, "data": write(text), **native}
    with logged() as lines:
        made = build_config(raw, list(overrides))
    return made, [line.removeprefix("note: ") for line in lines]


def refused(text: str, **native) -> ConfigError:
    """The error, after checking that it is one that a user can read."""
    with pytest.raises(ConfigError) as caught:
        config(text, **native)
    error = caught.value
    assert error.exit_code == 2 and "d.toml" in error.message
    assert "\n" not in error.message
    return error


def keys(notes: list[str]) -> list[str]:
    return [note.removeprefix("d.toml: ").split(": ")[0] for note in notes]


# ---------------------------------------------------------------- what is read


def test_a_plain_file_has_no_notes_and_takes_kohyas_defaults():
    file = KohyaFile(write(PLAIN))
    assert (file.entries, file.settings, file.notes) == ([ENTRY], {}, {})
    entry = config(PLAIN)[0].data[0]
    # not fluxfast's own defaults, which are 0.05, 1 and True
    assert (entry.caption_dropout, entry.keep_tokens, entry.recursive) == (0.0, 0, False)
    assert (entry.folder, entry.resolution) == (Path("photos"), [512])


def test_the_lowest_level_wins():
    text = """
    [general]
    resolution = 256
    keep_tokens = 1
    num_repeats = 2
    class_tokens = "general"
    [[datasets]]
    resolution = 512
    keep_tokens = 2
      [[datasets.subsets]]
      image_dir = "a"
      [[datasets.subsets]]
      image_dir = "b"
      keep_tokens = 3
      class_tokens = "subset"
    [[datasets]]
      [[datasets.subsets]]
      image_dir = "a"
      num_repeats = 5
    """
    entries = KohyaFile(write(text)).entries
    assert [
        tuple(entry[key] for key in ("folder", "resolution", "keep_tokens", "num_repeats"))
        for entry in entries
    ] == [("a", 512, 2, 2), ("b", 512, 3, 2), ("a", 256, 1, 5)]
    assert [entry["default_caption"] for entry in entries] == ["general", "subset", "general"]


EVERY = """
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1
color_aug = true
enable_bucket = false
cache_info = true
caption_separator = ","
keep_tokens_separator = ""
secondary_separator = ""
enable_wildcard = false
custom_attributes = {kind = "x"}
bucket_reso_steps = 64

[[datasets]]
resolution = [768, 1024]
batch_size = 4
bucket_no_upscale = false
min_bucket_reso = 256
max_bucket_reso = 1024
skip_image_resolution = 512
network_multiplier = 0.5
validation_split = 0.1
validation_seed = 7
resize_interpolation = "lanczos"

  [[datasets.subsets]]
  image_dir = "a"
  num_repeats = 10
  class_tokens = "sks girl"
  caption_prefix = "best,"
  caption_suffix = ", from the side"
  caption_dropout_rate = 0.5
  caption_dropout_every_n_epochs = 2
  caption_tag_dropout_rate = 0.1
  token_warmup_min = 2
  token_warmup_step = 0.5
  flip_aug = true
  alpha_mask = true
  random_crop = true
  face_crop_aug_range = [1.0, 3.0]
  is_reg = false
"""
EVERY_NOTES = """
general.shuffle_caption general.color_aug general.enable_bucket general.cache_info
general.custom_attributes general.bucket_reso_steps
datasets[0].resolution datasets[0].batch_size datasets[0].bucket_no_upscale
datasets[0].min_bucket_reso datasets[0].max_bucket_reso datasets[0].skip_image_resolution
datasets[0].network_multiplier datasets[0].validation_split datasets[0].validation_seed
datasets[0].resize_interpolation
datasets[0].subsets[0].caption_dropout_every_n_epochs
datasets[0].subsets[0].caption_tag_dropout_rate datasets[0].subsets[0].token_warmup_min
datasets[0].subsets[0].token_warmup_step datasets[0].subsets[0].alpha_mask
datasets[0].subsets[0].random_crop datasets[0].subsets[0].face_crop_aug_range
"""


def test_every_documented_key():
    """One note for each key that is ignored or read differently, none for any other."""
    read, notes = config(EVERY)
    assert sorted(keys(notes)) == sorted(EVERY_NOTES.split())
    assert all("\n" not in note and note.startswith("d.toml: ") for note in notes)
    native = """
    model: {path: m}
    data: {folder: a, recursive: false, resolution: 886, num_repeats: 10, caption_ext: .txt,
      default_caption: sks girl, caption_prefix: "best,", caption_suffix: ", from the side",
      caption_dropout: 0.5, shuffle_captions: true, keep_tokens: 1, flip: true, mask: alpha}
    train: {batch_size: 4}
    validation: {share: 0.1}
    """
    assert read == build_config(yaml.safe_load(native))
    parsed = _parse(Path("d.toml"))
    (dataset,) = parsed["datasets"]
    written = {*parsed["general"], *dataset, *dataset["subsets"][0]} - {"subsets"}
    assert written == TABLE.known - {"metadata_file", "conditioning_data_dir"}


@pytest.mark.parametrize("key", sorted(TABLE.ignored))
def test_an_ignored_key_is_noted_once_and_its_resting_values_never(key):
    text = re.sub(f"^{key} = .*", "", plain(), flags=re.M)  # PLAIN has two of them
    text += '[[datasets.subsets]]\nimage_dir = "other"\n'

    def noted(value) -> list[str]:
        line = f"{key} = {json.dumps(value)}"
        return keys(config(text.replace("[general]", f"[general]\n{line}"))[1])

    assert noted("something") == [f"general.{key}"]
    for value in TABLE.ignored[key][1]:
        if value not in (None, {}):
            assert noted(value) == []


def test_a_general_key_that_nothing_inherits_is_not_noted():
    assert config(plain("color_aug = true", subset="color_aug = false"))[1] == []


def test_every_native_key_of_the_table_is_a_setting():
    native = {f"data.{row.native}" for row in TABLE.mapped.values()}
    assert native | {row.native for row in OUTSIDE.values()} <= all_keys(Config)


@pytest.mark.parametrize(
    "given, side, noted",
    [("768", 768, []), ("[512, 512]", 512, []), ("[768, 1024]", 886, ["datasets[0].resolution"])],
)
def test_resolution_is_a_side_or_an_area(given, side, noted):
    made, notes = config(PLAIN.replace("resolution = 512", f"resolution = {given}"))
    assert made.data[0].resolution == [side] and keys(notes) == noted


def test_what_a_file_leaves_out_is_noted_where_it_matters():
    text = '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a"\n'
    made, notes = config(text)
    assert made.data[0].caption_ext == ".caption"
    assert keys(notes) == ["caption_extension", "enable_bucket", "bucket_no_upscale"]
    assert all("not given" in note for note in notes)


def test_a_subset_comes_once_and_not_without_repeats():
    twice = plain() + '[[datasets.subsets]]\nimage_dir = "photos"\nnum_repeats = 3\n'
    made, notes = config(twice + '[[datasets.subsets]]\nimage_dir = "b"\nnum_repeats = 0\n')
    assert [entry.num_repeats for entry in made.data] == [1]
    assert keys(notes) == ["datasets[0].subsets[1].image_dir", "datasets[0].subsets[2].num_repeats"]
    # in data sets of their own both count, as at two resolutions
    both = plain() + '[[datasets]]\nresolution = 768\n[[datasets.subsets]]\nimage_dir = "photos"'
    assert [entry.resolution for entry in config(both)[0].data] == [[512], [768]]


def test_what_lies_in_the_folder_is_noted(folder):
    photos = folder / "photos"
    photos.mkdir()
    (photos / "a.txt").write_text("one line\n\n")
    (photos / "b.txt").write_text("two\nlines")
    (photos / "c.BMP").write_bytes(b"")
    _, notes = config(PLAIN)
    assert keys(notes) == ["datasets[0].subsets[0].image_dir"]
    assert "the first line: 1 have more" in notes[0] and "1 .bmp" in notes[0]
    with open(photos / "c.txt", "wb") as file:  # a caption without end is left to the scan
        file.truncate(2**40)
    assert config(PLAIN)[1] == []


def test_a_windows_file_is_read():
    Path("d.toml").write_bytes(b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode())
    assert KohyaFile("d.toml").entries == [ENTRY]


def test_the_notes_on_the_example(monkeypatch, log_lines):
    monkeypatch.chdir(ROOT)
    path = str(EXAMPLE.relative_to(ROOT))
    made = build_config({"model": {"path": "m"}, "data": path})
    assert [entry.folder.is_dir() for entry in made.data] == [True, True]
    assert [line.split(": ")[2] for line in log_lines] == [
        "datasets[0].bucket_reso_steps",
        "datasets[0].batch_size",
    ]


# ---------------------------------------------------------------- beside the YAML


def test_the_batch_size_is_taken_where_the_configuration_has_none():
    text = plain("batch_size = 4")
    made, notes = config(text)
    assert made.train.batch_size == 4
    assert notes == ["d.toml: general.batch_size: taken as train.batch_size: 4"]
    made, notes = config(text, train={"batch_size": 2, "steps": 5})
    assert made.train.batch_size == 2
    assert notes == [
        "d.toml: general.batch_size: ignored, train.batch_size is 2 in the configuration"
    ]
    assert config(text, "train.batch_size=3")[0].train.batch_size == 3
    assert config(text, train={"batch_size": 4})[1] == []
    made, notes = config(text, train={"steps": 5})
    assert (made.train.batch_size, made.train.steps) == (4, 5)


def test_batch_sizes_that_differ_need_a_choice():
    text = plain(dataset="batch_size = 4") + (
        '[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "b"\n'
    )
    error = refused(text)
    assert "datasets[0].batch_size = 4" in error.message
    assert "datasets[1].batch_size = 2" in error.message
    assert error.hint == "choose one: --set train.batch_size=4"
    made, notes = config(text, train={"batch_size": 2})
    assert made.train.batch_size == 2 and keys(notes) == ["datasets[0].batch_size"]


def test_the_validation_split_is_taken_likewise():
    text = plain("validation_split = 0.2")
    assert config(text)[0].validation.share == 0.2
    made, notes = config(text, validation={"folder": "held_out"})
    assert made.validation.share == 0 and "validation.folder is held_out" in notes[0]
    made, notes = config(plain("validation_split = 0.0"))
    assert made.validation.share == 0 and notes == []


def test_entries_of_both_kinds_stand_side_by_side():
    write(PLAIN.replace("photos", "theirs"), "e.TOML")
    raw = {"model": {"path": "m"}, "data": ["e.TOML", {"folder": "ours"}, write(plain())]}
    made = build_config(raw, ["data.1.flip=true", "data.2.num_repeats=7"])
    assert [entry.folder.name for entry in made.data] == ["theirs", "ours", "photos"]
    assert [entry.caption_dropout for entry in made.data] == [0.0, 0.05, 0.0]
    assert [entry.recursive for entry in made.data] == [False, True, False]
    assert made.data[1].flip and made.data[2].num_repeats == 7


def test_two_files_may_not_differ_in_the_batch_size_either():
    write(plain("batch_size = 2"), "e.toml")
    raw = {"model": {"path": "m"}, "data": ["e.toml", write(plain("batch_size = 4"))]}
    with pytest.raises(ConfigError, match="e.toml: general.batch_size = 2, d.toml: general.batch"):
        build_config(raw)


def test_overrides_name_a_file_and_reach_into_it():
    write(plain("batch_size = 4"))
    write(plain("batch_size = 8").replace("photos", "other"), "e.toml")
    native = {"model": {"path": "m"}, "data": {"folder": "ours"}}
    made = build_config(dict(native), ["data=d.toml", "data.resolution=[64, 128]"])
    assert (made.data[0].folder, made.data[0].resolution) == (Path("photos"), [64, 128])
    made = build_config({**native, "data": "d.toml"}, ["data.0.flip=true"])
    assert made.data[0].flip and made.train.batch_size == 4
    made = build_config(dict(native), ["data=d.toml", "data.flip=true", "data=e.toml"])
    assert (made.data[0].folder, made.train.batch_size) == (Path("other"), 8)


def test_what_is_written_reads_back_the_same(folder):
    from fluxfast.config.schema import dump_config

    made, _ = config(EVERY)
    Path("d.toml").unlink()
    (folder / "c.yaml").write_text(dump_config(made), encoding="utf-8")
    assert load_config(folder / "c.yaml") == made


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "text, part",
    [
        (
            plain("capton_extension = '.txt'"),
            "general.capton_extension is unknown, did you mean caption_extension?",
        ),
        (plain(dataset="max_bucket_resolution = 5"), "did you mean max_bucket_reso?"),
        (
            plain(subset="num_repeat = 5"),
            "datasets[0].subsets[0].num_repeat is unknown, did you mean num_repeats?",
        ),
        (plain("zzz = 1"), "general.zzz is unknown"),
        (plain('"a\\nb" = 1'), "general.a b is unknown"),
        (plain() + "[model]\npath = 'x'\n", "model unknown; a data set has [general]"),
        # a level that kohya does not allow it at
        (plain("image_dir = 'x'"), "general.image_dir belongs in [[datasets.subsets]]"),
        (plain(dataset="is_reg = true"), "datasets[0].is_reg belongs in [[datasets.subsets]]"),
        (plain(subset="batch_size = 4"), "subsets[0].batch_size belongs in [[datasets]]"),
        # what cannot be ignored
        (plain(subset="is_reg = true"), "datasets[0].subsets[0].is_reg is not supported"),
        (plain(subset="metadata_file = 'm.json'"), "subsets[0].metadata_file is not supported"),
        (plain(subset="conditioning_data_dir = 'c'"), "ControlNets are not trained"),
        (plain("enable_wildcard = true"), "general.enable_wildcard is not supported"),
        (plain("secondary_separator = ';;;'"), "general.secondary_separator is not supported"),
        (
            plain("shuffle_caption = true", "keep_tokens_separator = '|||'"),
            "datasets[0].keep_tokens_separator is not supported together with shuffle_caption",
        ),
        (plain("shuffle_caption = true\ncaption_separator = ';'"), "parts end at commas"),
        # values
        (plain("keep_tokens = -1"), "general.keep_tokens takes a whole number of 0 or more"),
        (plain("shuffle_caption = 1"), "general.shuffle_caption takes true or false, got 1"),
        (plain("caption_dropout_rate = 2"), "takes a number from 0 to 1, got 2"),
        (plain("caption_dropout_rate = nan"), "takes a number from 0 to 1, got nan"),
        (plain("batch_size = 'x'"), "general.batch_size takes a whole number, got 'x'"),
        (plain("batch_size = 0"), "train.batch_size"),
        (plain("caption_prefix = 5"), "general.caption_prefix takes text, got 5"),
        (PLAIN.replace(".txt", "../x"), "data.0.caption_ext"),
        (PLAIN.replace("512", "32"), "datasets[0].resolution takes a side of 64 or more"),
        (PLAIN.replace("512", "[512, 512, 512]"), "takes a side of 64 or more"),
        (PLAIN.replace("resolution = 512", ""), "subsets[0].resolution is missing"),
        (PLAIN.replace('image_dir = "photos"', ""), "subsets[0].image_dir is missing"),
        (PLAIN.replace('"photos"', "5"), "subsets[0].image_dir takes text, got 5"),
        # the form
        ("", "datasets is missing"),
        ("general = 5\n", "general takes a table of settings, got 5"),
        ("datasets = 5\n", "datasets takes tables: [[datasets]]"),
        ("datasets = []\n", "datasets takes tables"),
        ("datasets = [5]\n", "datasets[0] takes a table of settings, got 5"),
        ("[[datasets]]\nresolution = 512\n", "datasets[0].subsets is missing"),
        ("[[datasets]]\nsubsets = 'x'\n", "datasets[0].subsets takes tables"),
        ("[[datasets]]\nsubsets = ['x']\n", "datasets[0].subsets[0] takes a table"),
        (plain("num_repeats = 0"), "datasets holds no subset to train on"),
    ],
)
def test_what_is_refused_names_key_and_place(text, part):
    assert part in refused(text).message


def test_every_mistake_is_named_at_once():
    message = refused(plain("keep_token = 1", "batch_size = []", "is_reg = true")).message
    for part in ("general.keep_token ", "datasets[0].batch_size", "subsets[0].is_reg"):
        assert part in message


def test_separators_may_stay_where_nothing_is_shuffled():
    text = plain("keep_tokens_separator = '|||'\ncaption_separator = ';'")
    assert config(text)[1] == []


@pytest.mark.parametrize(
    "content, part",
    [
        (b"[general\n", "line 1"),
        (b"[general]\nkeep_tokens = \n", "line 2"),
        (b"[general]\na = 1\na = 2\n", "line 3"),
        (b'image_dir = "C:\\hoge"\n', "line 1"),
        (b"a = \xff\n", "not valid TOML"),
        (b"a = " + b"[" * 5000, "not valid TOML"),
    ],
)
def test_a_file_that_is_no_toml(content, part):
    Path("d.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        KohyaFile("d.toml")
    assert caught.value.message.startswith("d.toml is not valid TOML: ")
    assert part in caught.value.message and "\n" not in caught.value.message
    assert ("single quotes" in str(caught.value)) == (b"C:" in content)


def test_a_file_that_cannot_be_read(folder):
    for path in ("absent.toml", folder):
        with pytest.raises(ConfigError, match="cannot read the data set"):
            KohyaFile(path)


@pytest.mark.parametrize(
    "junk", ["true", "-1", "''", "'x'", "[[]]", "{a = 1}", "1e400", "nan", "1979-05-27", "9" * 400]
)
def test_any_value_in_any_place_is_read_or_refused(junk):
    lines = EVERY.splitlines()
    for index, line in enumerate(lines):
        if " = " in line:
            changed = [*lines[:index], f"{line.split(' = ')[0]} = {junk}", *lines[index + 1 :]]
            try:
                notes = config("\n".join(changed))[1]
                assert len(set(keys(notes))) == len(notes)
            except ConfigError as error:
                assert "\n" not in error.message


# ---------------------------------------------------------------- through the command line


def test_a_mistake_in_the_file_ends_in_one_message(fluxfast, folder):
    write(plain(subset="is_reg = true"))
    (folder / "c.yaml").write_text("model: {path: m}\ndata: d.toml\n")
    for arguments in (["c.yaml"], ["d.toml", "--model", "m"]):
        result = fluxfast("train", *arguments)
        assert result.code == 2 and "\nhint: " in result.err
        assert "d.toml: datasets[0].subsets[0].is_reg is not supported" in result.error
    assert "training on d.toml needs a model" in fluxfast("train", "d.toml").error


def test_a_data_set_trains(fluxfast, folder, nano_model):
    """The shipped example's form over other pictures, named in a configuration."""
    from fluxfast.data.scan import SkipReport, scan_folders

    photos = folder / "photos"
    (photos / "below").mkdir(parents=True)
    for name, color in (("a", "red"), ("b", "teal"), ("below/c", "black")):
        Image.new("RGB", (96, 64), color).save(photos / f"{name}.png")
    (photos / "a.txt").write_text("a red picture")
    (photos / "c.png").symlink_to(photos / "a.png")
    text = EXAMPLE.read_text(encoding="utf-8").partition("  [[datasets.subsets]]")[0]
    write(
        text + '[[datasets.subsets]]\nimage_dir = "photos"\nclass_tokens = "a zorb"\n'
        'caption_prefix = "a photograph,"\nnum_repeats = 2\n'
    )
    raw = {
        "name": "theirs",
        "data": "d.toml",
        "device": "cpu",
        "lora": {"rank": 2},
        "model": {"path": str(nano_model), "storage": "fp32", "compute": "fp32"},
        "train": {"steps": 2},
        "log_every": 1,
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(raw))
    code, out, err = fluxfast("train", "c.yaml")
    assert (code, out) == (0, "runs/theirs/theirs.safetensors\n"), err
    assert "note: d.toml: datasets[0].batch_size: taken as train.batch_size: 4\n" in err
    assert "6 samples in 1 buckets" in err  # three pictures twice, not the one below
    with safe_open(folder / out.strip(), "pt") as file:
        assert file.metadata()["steps"] == "2"
    written = load_config(folder / "runs" / "theirs" / "config.yaml")
    assert written.train.batch_size == 4 and written.data[0].caption_prefix == "a photograph,"
    with logged() as lines:
        (found,) = scan_folders(written.data, folder / "sizes.json", SkipReport())
    assert not lines
    assert [image.name for image in found] == ["a.png", "b.png", "c.png"]
