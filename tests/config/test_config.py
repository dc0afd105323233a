"""The configuration: what it accepts; every mistake is one message that names the place."""

import json
import re
from pathlib import Path

import pytest
import yaml

from fluxfast.config import schema
from fluxfast.config.schema import (
    OLD_POLICIES,
    Config,
    all_keys,
    build_config,
    dump_config,
    load_config,
)
from fluxfast.config.yaml_io import dump_yaml, parse_yaml
from fluxfast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


def minimal(**changes) -> dict:
    return {"model": {"path": "m"}, "data": {"folder": "photos"}, **changes}


def refused(raw: dict, *overrides: str) -> str:
    """The message, after checking that it is one a user can read."""
    with pytest.raises(ConfigError) as caught:
        build_config(raw, list(overrides))
    error = caught.value
    assert error.exit_code == 2
    assert "\n" not in error.message
    for foreign in ("pydantic", "http", "Traceback", "Config)", "type="):
        assert foreign not in str(error)
    return error.message


def data(**changes) -> dict:
    return minimal(data={"folder": "photos", **changes})


def test_defaults():
    config = build_config(minimal())
    assert config.run_dir == Path("runs/lora")
    assert config.cache_path == Path("runs/cache")
    assert (config.model.storage, config.model.compute) == ("auto", "auto")
    assert config.model.layers == {}
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (16, None, "attn+mlp")
    assert (config.train.steps, config.train.lr, config.train.guidance) == (2000, None, 1.0)
    assert [entry.resolution for entry in config.data] == [[1024]]
    assert not config.train.ema.enabled


def test_defaults_are_not_shared():
    one, two = build_config(minimal()), build_config(minimal())
    one.lora.include.append("x")
    one.train.ema.enabled = True
    assert two.lora.include == [] and not two.train.ema.enabled


def test_only_model_and_data_are_required():
    message = refused({})
    assert "model is missing" in message and "data is missing" in message
    assert "model.path is missing" in refused({"model": {}, "data": {"folder": "f"}})
    assert "data.0.folder is missing" in refused({"model": {"path": "m"}, "data": {}})


def test_shipped_configurations_validate():
    assert EXAMPLES
    for path in EXAMPLES:
        assert all((ROOT / entry.folder).is_dir() for entry in load_config(path).data), path


def test_what_is_written_reads_back_the_same(tmp_path):
    """Words that look like numbers stay words."""
    changes = dict(
        name="1e4",
        trigger="ohwx, naïve: [dog]",
        train={"lr": 1e-5, "optimizer_args": {"betas": [0.9, 0.99]}, "max_grad_norm": None},
        data=[{"folder": "a", "mask": "folder", "mask_folder": "b"}, {"folder": "12e-3"}],
    )
    config = build_config(minimal(**changes))
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


# ---------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    "raw, key, nearest",
    [
        (minimal(trian={}), "trian", "train"),
        (minimal(train={"stesp": 5}), "train.stesp", "train.steps"),
        (minimal(train={"ema": {"enable": True}}), "train.ema.enable", "train.ema.enabled"),
        (data(resolutoin=512), "data.0.resolutoin", "data.resolution"),
        (minimal(data=[{"folder": "a"}, {"folder": "b", "flp": 1}]), "data.1.flp", "data.flip"),
        # another section has it
        (minimal(lr=1e-4), "lr", "train.lr"),
        (minimal(steps=5), "steps", "train.steps"),
        (minimal(train={"resolution": 5}), "train.resolution", "data.resolution"),
        (minimal(train={"ranks": 5}), "train.ranks", "lora.rank"),
        # other trainers' words
        (minimal(train={"learning_rate": 1}), "train.learning_rate", "train.lr"),
        (minimal(train={"lerning_rate": 1}), "train.lerning_rate", "train.lr"),
        (minimal(network={"linear": 8}), "network", "lora"),
        (minimal(lora={"network_dim": 8}), "lora.network_dim", "lora.rank"),
        (minimal(datasets=[]), "datasets", "data"),
        (minimal(data={"folder_path": "x"}), "data.0.folder_path", "data.folder"),
        (minimal(trigger_word="x"), "trigger_word", "trigger"),
    ],
)
def test_an_unknown_key_names_the_nearest(raw, key, nearest):
    assert f"unknown key {key!r}, did you mean {nearest!r}?" in refused(raw)


def test_an_unknown_key_like_nothing_lists_what_there_is():
    message = refused(minimal(save={"qqqqqq": 1}))
    assert "unknown key 'save.qqqqqq'; known here: dtype, every, formats, keep" in message


def test_every_mistake_is_named_at_once():
    message = refused(minimal(train={"stesp": 5, "lr": -1}, seed="x"))
    for part in ("train.stesp", "train.lr", "seed"):
        assert part in message


# ---------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    "raw, parts",
    [
        (minimal(train={"steps": "many"}), ["train.steps", "'many'"]),
        (minimal(train={"steps": 0}), ["train.steps takes 1 or more (got 0)"]),
        (minimal(train={"steps": 1.5}), ["train.steps takes a whole number (got 1.5)"]),
        (minimal(train={"steps": True}), ["train.steps", "true or false"]),
        (minimal(train={"lr": True}), ["train.lr", "true or false"]),
        (minimal(train={"lr": float("inf")}), ["train.lr", "finite"]),
        (minimal(train={"guidance": float("nan")}), ["train.guidance", "finite"]),
        (minimal(train={"lr": 0}), ["train.lr takes a number above 0 (got 0)"]),
        (minimal(train={"optimizer": "sgd"}), ["train.optimizer", "'adamw'", "'sgd'"]),
        (minimal(train={"gradient_checkpointing": True}), ["did you mean 'memory.policy'"]),
        (minimal(memory={"policy": "perhaps"}), ["memory.policy", "'checkpoint'", "'perhaps'"]),
        (minimal(memory="all"), ["memory takes a mapping", "'all'"]),
        (minimal(memory={"limit_gib": 0}), ["memory.limit_gib takes a number above 0"]),
        (minimal(train={"ema": {"decay": 1.0}}), ["train.ema.decay takes a number below 1"]),
        (data(folder=None), ["data.0.folder has no value; it takes text"]),
        (minimal(seed=None), ["seed has no value; it takes a whole number"]),
        (minimal(train=[1]), ["train takes a mapping", "[1]"]),
        (minimal(train={"ema": True}), ["train.ema takes a mapping of settings (got True)"]),
        (minimal(validation={"share": 0.1, "folder": "x"}), ["validation takes share or folder"]),
        (minimal(lora={"rank": 0}), ["lora.rank"]),
        (minimal(lora={"dropout": 1.0}), ["lora.dropout"]),
        (minimal(lora={"include": "attn"}), ["lora.include", "list", "'attn'"]),
        (minimal(model={"path": ""}), ["model.path"]),
        (minimal(model="m"), ["model takes a mapping", "'m'"]),
        (minimal(model={"path": "m", "storage": "int3"}), ["model.storage", "'nf4'", "'int3'"]),
        (minimal(model={"path": "m", "compute": "nf4"}), ["model.compute", "'fp8'", "'nf4'"]),
        (minimal(model={"path": "m", "layers": {"a": "fp8"}}), ["model.layers.a", "'8bit'"]),
        (
            minimal(model={"path": "m", "layers": ["a"]}),
            ["model.layers takes a mapping of names to values"],
        ),
        (minimal(data=[]), ["data takes one entry or more"]),
        (minimal(data="photos"), ["data", "'photos'"]),
        (minimal(data=["photos"]), ["data.0 takes a mapping", "'photos'"]),
        (data(caption_dropout=1.1), ["data.0.caption_dropout", "1.1"]),
        (data(caption_ext=""), ["data.0.caption_ext", ".txt"]),
        (data(caption_ext="../x"), ["data.0.caption_ext", ".txt"]),
        (minimal(name="../b"), ["name", "'../b'"]),
        (minimal(name=".."), ["name"]),
        (minimal(name="cache"), ["runs/cache"]),
        (minimal(device="tpu"), ["device", "'tpu'"]),
        (minimal(seed=-2), ["seed", "-2"]),
        (minimal(trigger=12), ["trigger takes text: put it in quotes (got 12)"]),
    ],
)
def test_a_wrong_value_names_place_and_value(raw, parts):
    message = refused(raw)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "asked, drawn", [((72, 64), (64, 64)), ((1000, 8), (992, 16)), ((1024, 1024), (1024, 1024))]
)
def test_a_preview_has_whole_patches(asked, drawn, caplog):
    size = dict(zip(("width", "height"), asked, strict=True))
    sample = build_config(minimal(sample={"prompts": ["x"], **size})).sample
    assert (sample.width, sample.height) == drawn
    notes = [
        f"note: previews of {key} {size[key]} are drawn at {side}, a multiple of 16"
        for key, side in zip(size, drawn, strict=True)
        if side != size[key]
    ]
    assert caplog.messages == notes
    caplog.clear()
    build_config(minimal(sample=size))
    assert not caplog.text  # nothing is drawn
    made = build_config(minimal(sample={"samples": [{"prompt": "x", **size}] * 2})).sample.samples
    assert [(each.width, each.height) for each in made] == [drawn] * 2
    assert caplog.messages == notes


@pytest.mark.parametrize(
    "name, changed",
    [
        ("[v2] my dog (final), 50%", "[v2] my dog (final), 50%"),
        ("style/v1", "style_v1"),
        ("C:\\lora\\x", "C__lora_x"),
        ("a: b?", "a_ b_"),
        ("Bob's 犬", "Bob's 犬"),
    ],
)
def test_a_name_that_no_file_can_have_is_changed_with_a_note(name, changed, caplog):
    assert build_config(minimal(name=name)).name == changed
    assert (f"is {changed!r}" in caplog.text) == (name != changed)


def test_resolution_is_one_or_several():
    for given, read in ((64, [64]), ([512], [512]), ([512, 768], [512, 768])):
        assert build_config(data(resolution=given)).data[0].resolution == read


@pytest.mark.parametrize("given", [63, 0, -64, [], [512, 32], None, "big", [512, "x"], 512.5])
def test_a_bad_resolution_is_refused(given):
    assert "data.0.resolution" in refused(data(resolution=given))


def test_a_section_or_list_without_lines_is_one_without_settings():
    raw = minimal(train=None, sample={"prompts": None}, lora={"include": None}, memory=None)
    raw["train"], raw["model"]["layers"] = None, None
    assert build_config(raw) == build_config(minimal())
    assert "data takes one entry or more" in refused({"model": {"path": "m"}, "data": None})
    assert "model.path is missing" in refused({"model": None, "data": {"folder": "f"}})


def test_mask_and_mask_folder_go_together():
    entry = build_config(data(mask="folder", mask_folder="masks")).data[0]
    assert entry.mask_folder == Path("masks")
    assert build_config(data(mask="alpha")).data[0].mask == "alpha"
    for changes in (
        {"mask": "folder"},
        {"mask_folder": "m"},
        {"mask": "alpha", "mask_folder": "m"},
    ):
        message = refused(data(**changes))
        assert "takes mask: folder and mask_folder together" in message and "data.0" in message


def test_an_end_of_the_learning_rate_takes_a_schedule():
    end = minimal() | {"train": {"lr_end": 1e-5, "lr_schedule": "cosine"}}
    assert build_config(end).train.lr_end == 1e-5
    assert "takes lr_end with lr_schedule" in refused(end, "train.lr_schedule=constant")


def test_caption_extension_may_lack_its_dot():
    assert build_config(data(caption_ext="caption")).data[0].caption_ext == ".caption"
    assert build_config(data(caption_ext=".en.txt")).data[0].caption_ext == ".en.txt"


# ---------------------------------------------------------------- --set


@pytest.mark.parametrize(
    "override, read, value",
    [
        ("train.steps=500", lambda c: c.train.steps, 500),
        ("train.lr=1e-4", lambda c: c.train.lr, 1e-4),
        ("train.max_grad_norm=null", lambda c: c.train.max_grad_norm, None),
        ("train.ema.enabled=true", lambda c: c.train.ema.enabled, True),
        ("lora.include=[a, b]", lambda c: c.lora.include, ["a", "b"]),
        ("data.resolution=[64, 128]", lambda c: c.data[0].resolution, [64, 128]),
        ("data.resolution=64", lambda c: c.data[0].resolution, [64]),
        ("trigger=a=b", lambda c: c.trigger, "a=b"),
        ("trigger=", lambda c: c.trigger, None),
        ('trigger="12"', lambda c: c.trigger, "12"),
        ("train.optimizer_args.eps=1e-8", lambda c: c.train.optimizer_args, {"eps": 1e-8}),
    ],
)
def test_overrides(override, read, value):
    assert read(build_config(minimal(), [override])) == value


def test_overrides_reach_into_lists_and_the_last_wins():
    raw = minimal(data=[{"folder": "a"}, {"folder": "b"}], train={"steps": 7})
    config = build_config(raw, ["data.1.flip=true", "train.steps=8", "train.steps=9"])
    assert [entry.flip for entry in config.data] == [False, True]
    assert config.train.steps == 9


@pytest.mark.parametrize("override", ["train.steps", "=5", "train..steps=5", "train.=5", ".x=1"])
def test_an_override_without_key_or_value_is_refused(override):
    assert "--set" in refused(minimal(), override)


@pytest.mark.parametrize("value", ["[", "{a: b, a: c}", "{a: b", "[" * 2000, "a: b: c"])
def test_an_override_must_be_yaml(value):
    assert "is not a YAML value" in refused(minimal(), f"name={value}")


@pytest.mark.parametrize("index", ["2", "-1", "x", "²"])
def test_an_override_needs_an_index_that_is_there(index):
    raw = minimal(data=[{"folder": "a"}, {"folder": "b"}])
    assert "not an index of a list of 2" in refused(raw, f"data.{index}.flip=true")


def test_overrides_are_validated():
    assert "did you mean 'train.steps'" in refused(minimal(), "train.step=5")
    assert "train.steps" in refused(minimal(), "train.steps=-5")
    assert "train.steps" in refused(minimal(), "train.steps.x=5")


@pytest.mark.parametrize("old, new", OLD_POLICIES.items())
def test_a_policys_old_word_is_read_with_a_note(old, new, tmp_path, log_lines):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(minimal(memory={"policy": old})))
    config = load_config(file)
    assert config.memory.policy == new
    (line,) = log_lines
    assert line == f"note: memory.policy: {old} is called {new} now"
    file.write_text(dump_config(config))
    assert load_config(file) == config and log_lines == [line]


# ---------------------------------------------------------------- single layers


def test_layers_keep_their_order(tmp_path):
    """The last match wins, so the order is read, overridden and written as it is given."""
    layers = {"single_blocks.*": "rotate", "img_in": "8bit", "*.linear2": "bf16"}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(minimal(model={"path": "m", "layers": layers}), sort_keys=False))
    assert list(load_config(file).model.layers.items()) == list(layers.items())
    sets = ["model.layers.img_in=bf16", "model.layers.double_blocks.*.img_mlp.2=rotate"]
    config = load_config(file, sets)
    expected = {
        "single_blocks.*": "rotate",
        "*.linear2": "bf16",
        "img_in": "bf16",
        "double_blocks.*.img_mlp.2": "rotate",
    }
    assert list(config.model.layers.items()) == list(expected.items())
    file.write_text(dump_config(config))
    assert list(load_config(file).model.layers.items()) == list(expected.items())


def test_layers_from_a_file(tmp_path):
    """As `fluxfast check` writes it: read at once, and further overrides go on top."""
    file = tmp_path / "check.yaml"
    file.write_text("# measured\nlayers:\n  single_blocks.0.linear2: 8bit\n  img_in: bf16\n")
    raw = minimal(model={"path": "m", "layers": str(file)})
    expected = {"single_blocks.0.linear2": "8bit", "img_in": "bf16"}
    assert build_config(raw).model.layers == expected
    assert build_config(minimal(), [f"model.layers={file}"]).model.layers == expected
    more = [f"model.layers={file}", "model.layers.img_in=rotate"]
    assert build_config(minimal(), more).model.layers == expected | {"img_in": "rotate"}
    file.write_text("layers: {}\nother: 1\n")
    assert build_config(minimal(), [f"model.layers={file}"]).model.layers == {}


@pytest.mark.parametrize(
    "content, part",
    [
        (None, "cannot read model.layers"),
        ("", "got nothing"),
        ("a: b: c", "not valid YAML"),
        ("- img_in", "got list"),
        ("img_in: bf16", "holds no mapping `layers`"),
        ("layers: [img_in]", "holds no mapping `layers`"),
        (
            "layers: {img_in: int4}",
            "model.layers.img_in takes '8bit', 'rotate' or 'bf16' (got 'int4')",
        ),
        ("layers: {img_in: {a: 1}}", "model.layers.img_in"),
        ("layers: {1: bf16}", "model.layers.1"),
    ],
)
def test_a_file_of_layers_that_is_none(tmp_path, content, part):
    file = tmp_path / "check.yaml"
    if content is not None:
        file.write_text(content)
    assert part in refused(minimal(), f"model.layers={file}")


# ---------------------------------------------------------------- files


def file_error(tmp_path, content: bytes) -> str:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(file) in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "got nothing"),
        (b"# only a comment\n", "got nothing"),
        (b"- a\n- b\n", "got list"),
        (b"just words\n", "got str"),
        (b"\xff\xfea", "not valid YAML"),
        (b"a: \xe9\n", "not valid YAML"),
        (b"a: b: c\n", "line 1"),
        (b"train:\n\tsteps: 5\n", "line 2"),
        (b"a: [1\n", "not valid YAML"),
        (b"a\x00b", "not valid YAML"),
        ("name: d\n".encode("utf-16"), "UTF-16, as PowerShell"),
        ("name: d\n".encode("utf-16-le"), "UTF-16, as PowerShell"),
        ("name: d\ntrigger: é\n".encode("cp1252"), "line 2 is not UTF-8"),
        (b"name: d\nx: a\x07\n", "line 2 holds the character U+0007"),
        (b"a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b"a: !!int [1]\n", "not valid YAML"),
        (b"a: !!str {b: 1}\n", "not valid YAML"),
        (b"1: 2\n", "1 is no text, as keys are"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, part):
    assert part in file_error(tmp_path, content)


@pytest.mark.parametrize(
    "text, hint",
    [
        ('folder: "C:\\Users\\me"', "a path with backslashes takes single quotes"),
        ('a: "D:\\data"', "a path with backslashes takes single quotes"),
        ("a:\n\tb: 1", "indent with spaces"),
        ("a: what: now", "text with a colon takes quotes"),
        ("*.linear2: bf16", "text that begins with * or & takes quotes"),
        ("a: @b", "put the text in quotes"),
        ("a: 1\n---\na: 2", "one file holds one configuration"),
        ("a: 'b' c", "takes quotes around all"),
        ("a: 'b\nc: 1\n", "ends with the quote"),
        ("a: [x] b", "takes quotes around all"),
        ("a: [[x] b]", "takes quotes around all"),
        ("a: 1\na: 2", "remove one of the two"),
        ("a: é".encode("cp1252"), "save it as UTF-8"),
        ("a: b".encode("utf-16"), "save it as UTF-8"),
    ],
)
def test_what_is_no_yaml_says_what_to_do(tmp_path, text, hint):
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    "text, found",
    [
        ("lr: 1\nrank: 2\nlr: 3\n", "the key 'lr' in lines 1 and 3"),
        ("train:\n  a: 1\n  'a': 1\n", "the key 'a' in lines 2 and 3"),
        (
            '{"a": 1,\n"b": {"c": 1, "c": 2}, "a": 2}',
            "the key 'a' in lines 1 and 2, the key 'c' in lines 2 and 2",
        ),
        ("data:\n- {folder: a, folder: b}\n", "the key 'folder' in lines 2 and 2"),
        ("a: &a {b: 1, b: 2}\nc: *a\n", "the key 'b' in lines 1 and 1"),
        ("a: {<<: {b: 1},\n<<: {b: 2}}\n", "the key '<<' in lines 1 and 2"),
    ],
)
def test_a_key_stands_once(tmp_path, text, found):
    assert found in file_error(tmp_path, text.encode())


def test_a_merged_key_may_be_written_over():
    text = "base: &base {a: 1, b: 1}\nmore: &more {b: 2, c: 2}\nend: {<<: [*base, *more], a: 3}\n"
    assert parse_yaml(text)["end"] == {"a": 3, "b": 1, "c": 2}


@pytest.mark.parametrize(
    "written, read",
    [
        ("1e-4", 1e-4), ("1E-4", 1e-4), ("1.5e4", 15000.0), ("1.e-4", 1e-4), (".5e-3", 5e-4),
        (".5", 0.5), ("5.", 5.0), ("-.5", -0.5), ("+1", 1), ("+1.5", 1.5), ("1_000", 1000),
        ("1_000.5", 1000.5), ("010", 10), ("-007", -7), ("08", 8), ("0x10", 16), ("0o17", 15),
        ("0b11", 3), ("yes", True), ("No", False), ("on", True), ("true", True), ("'true'", "true"),
        ("null", None), ("~", None), ("None", None), ("", None), ("'None'", "None"),
        ("1:30", "1:30"), ("16:9", "16:9"), ("1,000", "1,000"), ("2024-05-01", "2024-05-01"),
        ("1e", "1e"), ("1.2.3", "1.2.3"), ("0x", "0x"), ("5%", "5%"), ("inf", "inf"),
        (r'"\ud83d\ude00"', "\N{GRINNING FACE}"), ('"\N{GRINNING FACE}"', "\N{GRINNING FACE}"),
    ],
)  # fmt: skip
def test_values_are_what_people_mean(written, read):
    value = parse_yaml(f"a: {written}")["a"]
    assert value == read and type(value) is type(read)
    assert parse_yaml(dump_yaml({"a": read})) == {"a": read}


def test_json_is_read_with_tabs_and_escaped_emoji(tmp_path):
    file = tmp_path / "c.json"
    raw = {"model": {"path": "m"}, "data": [{"folder": "f"}], "trigger": "\N{FOX FACE} x"}
    for content in (json.dumps(raw, indent="\t"), json.dumps(raw).replace(": ", ":\t")):
        file.write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
        assert load_config(file).trigger == "\N{FOX FACE} x"
    file.write_text('{"trigger": "\\ud83e"}')  # half of one
    with pytest.raises(ConfigError, match="holds a character that no text file can"):
        load_config(file)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the configuration"):
            load_config(path)


def test_numbers_without_a_point_are_numbers(tmp_path):
    """YAML 1.1 calls 1e-2 a word; an optimizer would be handed that word."""
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: {path: m}\ndata: {folder: f}\n"
        "train: {lr: 2e-4, optimizer_args: {weight_decay: 1e-2, eps: -1E-8, mode: 1e-x}}\n"
    )
    train = load_config(file).train
    assert train.lr == 2e-4
    assert train.optimizer_args == {"weight_decay": 0.01, "eps": -1e-8, "mode": "1e-x"}


def test_a_byte_order_mark_is_skipped(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfmodel: {path: m}\ndata: {folder: f}\n")
    assert load_config(file).model.path == "m"


# ---------------------------------------------------------------- words, paths, any value

PATHS = (
    "model.path", "model.encoders", "model.assistant_lora", "lora.init_from", "data.folder",
    "data.mask_folder", "validation.folder", "output_dir", "cache_dir",
)  # fmt: skip


def test_every_setting_of_a_path_is_listed():
    given = {key: "~/x" for key in PATHS} | {"data.mask": "folder"}
    made = build_config({}, [f"{key}={value}" for key, value in given.items()])
    dumped = yaml.safe_load(dump_config(made))
    words = ("path", "folder", "dir", "encoders", "init_from", "assistant_lora")
    dotted = {f"data.{key}" for key in dumped["data"][0]} | {
        f"{section}.{key}" if isinstance(inner, dict) else section
        for section, inner in dumped.items()
        if section != "data"
        for key in (inner if isinstance(inner, dict) else [section])
    }
    assert {key for key in dotted if key.rpartition(".")[2].endswith(words)} == set(PATHS)


@pytest.mark.parametrize("key", PATHS)
def test_a_path_knows_the_home_folder_and_no_control_characters(key, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    extra = ["data.mask=folder"] if key == "data.mask_folder" else []
    made = build_config(minimal(), [*extra, f"{key}=~/some where"])
    read = yaml.safe_load(dump_config(made))
    for part in key.split("."):
        read = read[0][part] if isinstance(read, list) else read[part]
    # what may be a Hub id is looked for where it is used
    home = "~" if key.startswith("model.") else str(tmp_path)
    assert read == f"{home}/some where"
    build_config(minimal(), [*extra, f"{key}=~nobody-of-this-name"])
    for written, letter in (
        (r'"D:\train"', "a tab"),
        (r'"data\new"', "a line break"),
        (r'"D:\bilder"', "U+0008"),
        (r'"D:\Pictures"', "U+2029"),
        (r'"D:\LoRA"', "U+2028"),
        (r'"D:\_train"', "U+00A0"),
    ):
        message = refused(minimal(), *extra, f"{key}={written}")
        assert f"{key.replace('data.', 'data.0.')} holds {letter}, which a backslash" in message
        assert "single quotes" in message
    assert "is empty" in refused(minimal(), *extra, f'{key}=""')
    if key not in ("model.path", "data.folder", "output_dir"):
        assert "null" in refused(minimal(), *extra, f"{key}=none")
    for name in (r"'D:\train\new'", "D:/train", "a  b'c", "bücher/写真", "'a\\u00a0b'", "x#y"):
        build_config(minimal(), [*extra, f"{key}={name}"])


def test_files_that_are_read_in_place_have_no_control_characters_either():
    for setting in (r'model.layers="D:\train.yaml"', r'data="D:\train.toml"'):
        message = refused(minimal(), setting)
        assert f"{setting.partition('=')[0]} holds a tab, which a backslash" in message


def test_a_file_of_layers_may_lie_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "check.yaml").write_text("layers: {img_in: bf16}\n")
    made = build_config(minimal(), ["model.layers=~/check.yaml"])
    assert made.model.layers == {"img_in": "bf16"}


@pytest.mark.parametrize("name", ["style (v2) [final]", "Ünï 写真", "1e4", "a,b&c'd", "😀", "(x)"])
def test_a_name_is_any_file_name(name):
    assert build_config(minimal(name=name)).name == name


def test_a_name_that_windows_keeps_for_itself(monkeypatch):
    pattern = schema.NOT_IN_FILES.pattern.removesuffix(schema.ON_WINDOWS) + schema.ON_WINDOWS
    monkeypatch.setattr(schema, "NOT_IN_FILES", re.compile(pattern, re.IGNORECASE))
    for name, bears in {
        "CON": "_CON", "aux.v1": "_aux.v1", "lpt1": "_lpt1", "a.. ": "a_", "a/b.": "a_b_",
        "console": "console", "a.con": "a.con", "com": "com", "v1.5": "v1.5",
    }.items():  # fmt: skip
        assert build_config(minimal(name=name)).name == bears


@pytest.mark.parametrize("name", ["/b", "\\b", "..", ".x", "-x", "~x", "", " x", "a\tb", "../x"])
def test_a_name_that_is_none(name):
    assert "name takes a printable name with no space . ~ -" in refused(minimal(name=name))


@pytest.mark.parametrize(
    "key, written, read",
    [
        ("train.steps", "1e3", 1000), ("train.steps", "1_000", 1000), ("train.steps", "010", 10),
        ("train.steps", "+5", 5), ("train.steps", "'500'", 500), ("train.steps", "5.0", 5),
        ("train.steps", "1,000", None), ("train.steps", "1:30", None), ("train.steps", "5k", None),
        ("train.steps", ".5", None), ("train.steps", "yes", None), ("train.steps", "null", None),
        ("train.steps", "2024-05-01", None), ("train.steps", ".inf", None),
        ("train.lr", "1e-4", 1e-4), ("train.lr", "'1e-4'", 1e-4), ("train.lr", "1.e-4", 1e-4),
        ("train.lr", ".5", 0.5), ("train.lr", "1", 1.0), ("train.lr", "None", "default"),
        ("train.lr", "~", "default"), ("train.lr", "none", None), ("train.lr", "1,5", None),
        ("train.lr", ".nan", None), ("train.lr", "inf", None), ("train.lr", "on", None),
        ("train.lr", "1e-4%", None), ("train.lr", "1e400", None), ("train.lr", "[1e-4]", None),
        ("data.flip", "yes", True), ("data.flip", "'true'", True), ("data.flip", "ON", True),
        ("data.flip", "off", False), ("data.flip", "'no'", False), ("data.flip", "0", False),
        ("data.flip", "y", True), ("data.flip", "1", True), ("data.flip", "2", None),
        ("data.flip", "None", None), ("data.flip", "maybe", None), ("data.flip", "0.5", None),
        ("trigger", "'no'", "no"), ("trigger", "no", None), ("trigger", "none", None),
        ("trigger", "None", "default"), ("trigger", "'None'", None), ("trigger", "007", None),
        ("trigger", "1:30", "1:30"), ("trigger", "2024-05-01", "2024-05-01"),
        ("train.optimizer", "AdamW", None), ("data.resolution", "1024x1024", None),
        ("data.resolution", "[1_024, 0x200]", [1024, 512]), ("data.resolution", "16:9", None),
    ],
)  # fmt: skip
def test_a_value_is_the_one_meant_or_refused(key, written, read):
    if read is None:
        assert key.replace("data.", "data.0.") in refused(minimal(), f"{key}={written}")
        return
    made = build_config(minimal(), [f"{key}={written}"])
    for part in key.replace("data.", "data.0.").split("."):
        made = made[int(part)] if part.isdigit() else getattr(made, part)
    assert made == (None if read == "default" else read)
    assert type(made) is not int or type(read) is int


def test_a_word_of_a_choice_is_suggested():
    assert "(got 'AdamW'), did you mean 'adamw'?" in refused(minimal(train={"optimizer": "AdamW"}))


@pytest.mark.parametrize(
    "junk",
    [None, True, 5, -1, 1e400, "", "x", "x" * 2000, [], [None], [{}], {}, {"a": 1}, {1: 2}, 2**70],
)
def test_any_value_anywhere_is_read_or_refused_in_our_own_words(junk):
    for key in sorted(all_keys(Config)):
        *sections, name = key.split(".")
        raw = minimal()
        node = raw
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = junk
        try:
            build_config(raw)
        except ConfigError as error:
            assert "\n" not in error.message
            for foreign in ("should", "nput", "valid ", "pydantic", "<class", "ascii", "Path("):
                assert foreign not in error.message, error.message
