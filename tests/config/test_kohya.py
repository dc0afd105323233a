"""kohya's dataset TOML: what each key becomes, the notes about it, what is refused."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from small import logged

from fluxfast.config.key_table import check_owner
from fluxfast.config.kohya import KohyaFile, _parse
from fluxfast.config.kohya_keys import OF_SUBSETS, OUTSIDE, TABLE
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
color_aug = false
enable_bucket = true
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
skip_image_resolution = []
network_multiplier = 1.0
validation_split = 0.1
validation_seed = 7
resize_interpolation = "area"
interpolation_type = "area"

  [[datasets.subsets]]
  image_dir = "a"
  num_repeats = 10
  class_tokens = "sks girl"
  caption_prefix = "best,"
  caption_suffix = ", from the side"
  caption_dropout_rate = 0.5
  caption_dropout_every_n_epochs = 0
  caption_tag_dropout_rate = 0
  token_warmup_min = 2
  token_warmup_step = 0
  flip_aug = true
  alpha_mask = true
  random_crop = false
  face_crop_aug_range = []
  is_reg = false
"""
EVERY_NOTES = """
general.shuffle_caption general.cache_info
general.custom_attributes general.bucket_reso_steps
datasets[0].resolution datasets[0].batch_size datasets[0].bucket_no_upscale
datasets[0].min_bucket_reso datasets[0].max_bucket_reso
datasets[0].validation_split datasets[0].validation_seed
datasets[0].resize_interpolation datasets[0].interpolation_type
datasets[0].subsets[0].alpha_mask
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


@pytest.mark.parametrize("key", sorted(TABLE.refused))
def test_what_would_change_the_training_is_refused_where_it_is_on_and_not_mentioned_where_off(key):
    text = re.sub(f"^{key} = .*", "", plain(), flags=re.M)

    def with_value(value) -> str:
        line = f"{key} = {json.dumps(value)}\n"
        return text + line if key in OF_SUBSETS else text.replace("[general]", f"[general]\n{line}")

    reason, quiet = TABLE.refused[key]
    assert f"{key} {reason}" in refused(with_value(0.5)).message
    for value in quiet:
        if value not in (None, {}):
            assert config(with_value(value))[1] == []


def test_a_general_key_that_nothing_inherits_is_not_noted():
    assert config(plain("cache_info = true", subset="cache_info = false"))[1] == []
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


def test_what_lies_in_the_folder_is_noted(folder, monkeypatch):
    photos = folder / "photos"
    photos.mkdir()
    (photos / "a.txt").write_text("one line\n\n")
    (photos / "b.txt").write_text("two\nlines")
    _, notes = config(PLAIN)
    assert keys(notes) == ["datasets[0].subsets[0].image_dir"]
    assert "the first line: 1 have more" in notes[0]
    monkeypatch.setenv("HOME", str(folder))
    made, notes = config(PLAIN.replace("photos", "~/photos"))
    assert made.data[0].folder == photos and "1 have more" in notes[0]
    assert build_config({"model": {"path": "m"}, "data": "~/d.toml"}).data[0].folder == photos
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
    assert config(text, train=None)[0].train.batch_size == 4
    made, notes = config(text, train={"steps": 5})
    assert (made.train.batch_size, made.train.steps) == (4, 5)


GUIDE = """
[general]
flip_aug = true
color_aug = false
keep_tokens_separator= "|||"
shuffle_caption = false
caption_tag_dropout_rate = 0
caption_extension = ".txt"
[[datasets]]
batch_size = 2
enable_bucket = true
resolution = [1024, 1024]
  [[datasets.subsets]]
  image_dir = "a"
  num_repeats = 1
[[datasets]]
batch_size = 3
enable_bucket = true
resolution = [768, 768]
  [[datasets.subsets]]
  image_dir = "a"
  num_repeats = 1
"""


def test_data_sets_may_have_batches_of_their_own():
    """As sd-scripts' FLUX guide has it; `batch_size` of the configuration wins over all."""
    made, notes = config(GUIDE)
    assert [(e.folder.name, e.resolution, e.batch_size, e.flip) for e in made.data] == [
        ("a", [1024], 2, True),
        ("a", [768], 3, True),
    ]
    assert made.batch_sizes == [2, 3]
    assert keys(notes) == ["bucket_no_upscale", "datasets[0].batch_size", "datasets[1].batch_size"]
    assert notes[1].endswith("taken as data.batch_size: 2")
    made, notes = config(GUIDE, train={"batch_size": 4})
    assert made.batch_sizes == [4, 4] and "ignored, train.batch_size is 4" in notes[1]
    assert config(GUIDE, "data.1.batch_size=5")[0].batch_sizes == [2, 5]
    # what a data set leaves out is kohya's 1
    made, notes = config(GUIDE.replace("batch_size = 2\n", ""))
    assert made.batch_sizes == [1, 3] and "datasets[0].batch_size (not given)" in notes[1]
    made, notes = config(GUIDE.replace("batch_size = 2\n", ""), train={"batch_size": 3})
    assert made.batch_sizes == [3, 3] and keys(notes) == ["bucket_no_upscale"]


def test_masks_of_masked_loss(folder):
    from fluxfast.data.scan import SkipReport, scan_folders

    made, notes = config(plain(subset="conditioning_data_dir = 'masks'\nalpha_mask = true\n"))
    assert (made.data[0].mask, made.data[0].mask_folder) == ("folder", Path("masks"))
    assert keys(notes) == [
        f"datasets[0].subsets[0].{key}" for key in ("conditioning_data_dir", "alpha_mask")
    ]
    assert "--masked_loss" in notes[0] and "mean 1" in notes[0]
    for name in ("photos/a.png", "photos/b.jpg", "masks/a.jpg", "masks/b.PNG", "masks/extra.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("L", (64, 64), 127).save(folder / name)
    (found,) = scan_folders(made.data, folder / "sizes.json", SkipReport())
    assert [image.mask for image in found.images] == [Path("masks/a.jpg"), Path("masks/b.PNG")]


def test_a_data_set_may_be_json(folder):
    raw = {
        "general": {"enable_bucket": True, "bucket_no_upscale": True, "caption_extension": ".txt"},
        "datasets": [{"resolution": 512, "subsets": [{"image_dir": "photos"}]}],
    }
    (folder / "d.json").write_text(json.dumps(raw, indent="\t"), encoding="utf-8")
    assert KohyaFile("d.json").entries == [ENTRY]
    assert build_config({"model": {"path": "m"}, "data": "d.json"}).data[0].folder == Path("photos")
    for text, part in [
        (
            '{"datasets": [], "datasets": []}',
            "not valid JSON: written twice: the key 'datasets'",
        ),
        ("[]", "must hold a mapping"),
        ("{1: 2}", "1 unknown"),
        ('{"general": {1: 2}}', "general.1 is unknown"),
    ]:
        (folder / "d.json").write_text(text)
        with pytest.raises(ConfigError) as caught:
            KohyaFile("d.json")
        assert part in caught.value.message


def test_the_validation_split_is_taken_likewise():
    text = plain("validation_split = 0.2")
    assert config(text)[0].validation.share == 0.2
    made, notes = config(text, validation={"folder": "held_out"})
    assert made.validation.share == 0 and "validation.folder is held_out" in notes[0]
    made, notes = config(plain("validation_split = 0.0\nvalidation_seed = 5"))
    assert made.validation.share == 0 and notes == []
    # held out of one data set alone it would be another share
    other = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "b"\n'
    error = refused(plain(dataset="validation_split = 0.1") + other)
    assert "datasets[1].validation_split (not given) = 0.0: one validation.share" in error.message


def test_entries_of_both_kinds_stand_side_by_side():
    write(PLAIN.replace("photos", "theirs"), "e.TOML")
    raw = {"model": {"path": "m"}, "data": ["e.TOML", {"folder": "ours"}, write(plain())]}
    made = build_config(raw, ["data.1.flip=true", "data.2.num_repeats=7"])
    assert [entry.folder.name for entry in made.data] == ["theirs", "ours", "photos"]
    assert [entry.caption_dropout for entry in made.data] == [0.0, 0.05, 0.0]
    assert [entry.recursive for entry in made.data] == [False, True, False]
    assert made.data[1].flip and made.data[2].num_repeats == 7


def test_two_files_may_differ_in_the_batch_size_too():
    write(plain("batch_size = 2"), "e.toml")
    raw = {"model": {"path": "m"}, "data": ["e.toml", write(plain("batch_size = 4"))]}
    assert build_config(raw).batch_sizes == [2, 4]


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
        (b"a = \xff\n", "line 1 is not UTF-8"),
        ("[general]\n".encode("utf-16"), "it is UTF-16, as PowerShell"),
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


# ---------------------------------------------------------------- files of others

# as their own documents have them
OTHERS = {
    "SimpleTuner's configuration": (
        "config.json",
        """{"--data_backend_config": "config/multidatabackend.json", "--model_family": "flux",
        "--model_type": "lora", "--learning_rate": "8e-5", "--lora_rank": 16,}""",
    ),
    "SimpleTuner's list of data sets": (
        "multidatabackend.json",
        """[{"id": "dog", "instance_data_dir": "dog", "caption_strategy": "filename"},
        {"id": "text", "dataset_type": "text_embeds"}]""",
    ),
    "OneTrainer's configuration": (
        "#flux LoRA.json",
        """{"base_model_name": "black-forest-labs/FLUX.1-dev", "batch_size": 4,
        "model_type": "FLUX_DEV_1", "training_method": "LORA", "prior": {"train": false}}""",
    ),
    "OneTrainer's list of concepts": (
        "concepts.json",
        """[{"name": "x", "path": "photos", "include_subdirectories": false, "image_variations": 1,
        "text": {"prompt_source": "sample"}}]""",
    ),
    "the arguments of sd-scripts (kohya)": (
        "config_lora.toml",
        """pretrained_model_name_or_path = "flux1-dev.safetensors"
        clip_l = "c.safetensors"\nt5xxl = "t.safetensors"
        network_module = "networks.lora_flux"\nnetwork_dim = 16""",
    ),
    "the arguments of diffusers' training script": (
        "train.sh",
        """export MODEL_NAME="black-forest-labs/FLUX.1-dev"
        accelerate launch train_dreambooth_lora_flux.py \\
          --pretrained_model_name_or_path=$MODEL_NAME --instance_data_dir=dog --rank=16 \\
          --instance_prompt="a photo of sks dog" --max_train_steps=500""",
    ),
    "XLabs' x-flux configuration": (
        "test_lora.yaml",
        """model_name: "flux-dev"\ndata_config:\n  img_size: 512\n  img_dir: images/\nrank: 16""",
    ),
    "musubi-tuner's list of data sets": (
        "musubi.toml",
        """[general]\nresolution = [960, 544]\n[[datasets]]
        image_directory = "images"\ncache_directory = "cache" """,
    ),
    "diffusion-pipe's configuration": (
        "dp.toml",
        """output_dir = "out"\ndataset = "d.toml"\npipeline_stages = 1
        micro_batch_size_per_gpu = 1\n[model]\ntype = "flux" """,
    ),
    "diffusion-pipe's list of data sets": (
        "dp_data.toml",
        """resolutions = [512]\nenable_ar_bucket = true\nmin_ar = 0.5\n[[directory]]""",
    ),
    "a workflow of ComfyUI": (
        "workflow.json",
        """{"last_node_id": 9, "last_link_id": 9, "nodes": [{"widgets_values": [1]}]}""",
    ),
}


@pytest.mark.parametrize("owner", OTHERS)
def test_a_file_of_another_trainer_is_told_by_name(owner, folder, fluxfast):
    name, text = OTHERS[owner]
    (folder / name).write_text(text, encoding="utf-8")
    told = f"error: {name} is {owner}, which fluxfast does not read"
    for command in ("train", "plan"):
        result = fluxfast(command, name)
        assert (result.code, result.out) == (2, "") and told in result.err
        assert "hint: `fluxfast train FOLDER --model" in result.err
    if name.endswith((".toml", ".json")):
        with pytest.raises(ConfigError, match=r"which fluxfast does not read"):
            build_config({"model": {"path": "m"}, "data": name})


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.*aml")) + [EXAMPLE])
def test_no_file_that_is_read_is_taken_for_another(path):
    check_owner(path)


def test_settings_as_shell_variables_are_told_by_name(folder, fluxfast):
    text = "export FLUX_LORA_TARGET=all\nexport DATALOADER_CONFIG='data.json'\n"
    (folder / "config.env").write_text(text)
    assert "config.env is SimpleTuner's configuration, which" in fluxfast("plan", "config.env").err


def test_words_of_others_in_comments_and_single_mistakes_name_nobody(folder):
    text = "# sd-scripts: --network_module x --network_args y\n"
    (folder / "c.yaml").write_text(text + "model: {path: m}\ndata: {folder: f}\noutput_name: x\n")
    with pytest.raises(ConfigError, match="unknown key 'output_name'"):
        load_config(folder / "c.yaml")


# ---------------------------------------------------------------- through the command line


def test_a_mistake_in_the_file_ends_in_one_message(fluxfast, folder):
    write(plain(subset="is_reg = true"))
    (folder / "c.yaml").write_text("model: {path: m}\ndata: d.toml\n")
    for arguments in (["c.yaml"], ["d.toml", "--model", "m"]):
        result = fluxfast("train", *arguments)
        assert result.code == 2 and "\nhint: " in result.err
        assert "d.toml: datasets[0].subsets[0].is_reg is not supported" in result.error
    assert "training on d.toml needs a model" in fluxfast("train", "d.toml").error
    (folder / "d.json").write_text('{"datasets": [{"subsets": [{"image_dir": "x", "a": 1}]}]}')
    assert (
        "d.json: datasets[0].subsets[0].a is unknown"
        in fluxfast("train", "d.json", "--model", "m").error
    )


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
        "name": "theirs [v2]",
        "data": "d.toml",
        "device": "cpu",
        "lora": {"rank": 2},
        "model": {"path": str(nano_model), "storage": "fp32", "compute": "fp32"},
        "train": {"steps": 2},
        "log_every": 1,
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(raw))
    code, out, err = fluxfast("train", "c.yaml")
    assert (code, out) == (0, "runs/theirs [v2]/theirs [v2].safetensors\n"), err
    assert "note: d.toml: datasets[0].batch_size: taken as train.batch_size: 4\n" in err
    # not the one below
    assert "\nphotos: 3 of 3 pictures, 2 times each, in 1 bucket: 64x64 (3)\n" in err
    with safe_open(folder / out.strip(), "pt") as file:
        assert file.metadata()["steps"] == "2"
    written = load_config(folder / "runs" / "theirs [v2]" / "config.yaml")
    assert written.train.batch_size == 4 and written.data[0].caption_prefix == "a photograph,"
    with logged() as lines:
        (found,) = scan_folders(written.data, folder / "sizes.json", SkipReport())
    assert not lines
    assert [image.name for image in found.images] == ["a.png", "b.png", "c.png"]
