"""The configuration: what it accepts; every mistake is one message that names the place."""

from pathlib import Path

import pytest
import yaml

from fluxfast.config.schema import OLD_POLICIES, build_config, dump_config, load_config
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
        (minimal(train={"steps": 0}), ["train.steps", "greater than or equal to 1", "0"]),
        (minimal(train={"steps": 1.5}), ["train.steps", "integer", "1.5"]),
        (minimal(train={"steps": True}), ["train.steps", "true or false"]),
        (minimal(train={"lr": True}), ["train.lr", "true or false"]),
        (minimal(train={"lr": float("inf")}), ["train.lr", "finite"]),
        (minimal(train={"guidance": float("nan")}), ["train.guidance", "finite"]),
        (minimal(train={"lr": 0}), ["train.lr", "greater than 0"]),
        (minimal(train={"optimizer": "sgd"}), ["train.optimizer", "'adamw'", "'sgd'"]),
        (minimal(train={"gradient_checkpointing": True}), ["did you mean 'memory.policy'"]),
        (minimal(memory={"policy": "perhaps"}), ["memory.policy", "'checkpoint'", "'perhaps'"]),
        (minimal(memory="all"), ["memory takes a mapping", "'all'"]),
        (minimal(memory={"limit_gib": 0}), ["memory.limit_gib", "greater than 0"]),
        (minimal(train={"ema": {"decay": 1.0}}), ["train.ema.decay", "less than 1"]),
        (minimal(train=None), ["train takes a mapping", "None"]),
        (minimal(train=[1]), ["train takes a mapping", "[1]"]),
        (minimal(lora={"rank": 0}), ["lora.rank"]),
        (minimal(lora={"dropout": 1.0}), ["lora.dropout"]),
        (minimal(lora={"include": "attn"}), ["lora.include", "list", "'attn'"]),
        (minimal(model={"path": ""}), ["model.path"]),
        (minimal(model="m"), ["model takes a mapping", "'m'"]),
        (minimal(model={"path": "m", "storage": "int3"}), ["model.storage", "'nf4'", "'int3'"]),
        (minimal(model={"path": "m", "compute": "nf4"}), ["model.compute", "'fp8'", "'nf4'"]),
        (minimal(model={"path": "m", "layers": {"a": "fp8"}}), ["model.layers.a", "'8bit'"]),
        (minimal(model={"path": "m", "layers": ["a"]}), ["model.layers", "dict"]),
        (minimal(data=[]), ["data", "at least 1"]),
        (minimal(data="photos"), ["data", "'photos'"]),
        (minimal(data=["photos"]), ["data.0 takes a mapping", "'photos'"]),
        (data(caption_dropout=1.1), ["data.0.caption_dropout", "1.1"]),
        (data(caption_ext=""), ["data.0.caption_ext", ".txt"]),
        (data(caption_ext="../x"), ["data.0.caption_ext", ".txt"]),
        (minimal(name="a/b"), ["name", "'a/b'"]),
        (minimal(name=".."), ["name"]),
        (minimal(name="cache"), ["runs/cache"]),
        (minimal(device="tpu"), ["device", "'tpu'"]),
        (minimal(seed=-1), ["seed"]),
        (minimal(trigger=12), ["trigger", "string", "12"]),
    ],
)
def test_a_wrong_value_names_place_and_value(raw, parts):
    message = refused(raw)
    for part in parts:
        assert part in message


def test_resolution_is_one_or_several():
    for given, read in ((64, [64]), ([512], [512]), ([512, 768], [512, 768])):
        assert build_config(data(resolution=given)).data[0].resolution == read


@pytest.mark.parametrize("given", [63, 0, -64, [], [512, 32], None, "big", [512, "x"], 512.5])
def test_a_bad_resolution_is_refused(given):
    assert "data.0.resolution" in refused(data(resolution=given))


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
        assert "mask: folder and mask_folder go together" in message and "data.0" in message


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


@pytest.mark.parametrize("value", ["[", "2024-13-45", "{a: b", "[" * 2000, "a: b: c"])
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
        ("layers: {img_in: int4}", "model.layers.img_in: input should be '8bit', 'rotate' or"),
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
        (b"name: 2024-13-45\n", "not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b"1: 2\n", "keys should be strings"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, part):
    assert part in file_error(tmp_path, content)


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
