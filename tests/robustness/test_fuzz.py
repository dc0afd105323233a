"""Whatever comes: the readers of configurations, captions and tensor files give what they read, or
one clear error, and nothing else."""

import json
import os
from pathlib import Path

import pytest
import yaml
from checkpoints import write_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxfast.config.schema import (
    Config,
    DataConfig,
    all_keys,
    build_config,
    dump_config,
    load_config,
)
from fluxfast.config.yaml_io import parse_yaml
from fluxfast.data.captions import METADATA, caption_variants, read_captions
from fluxfast.data.store import CacheDamaged, is_complete, read_tensors
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.lora.read import ranks_of, read_lora
from fluxfast.util.redact import plain

# the same examples in every run; HYPOTHESIS_EXAMPLES asks for more of them
quickly = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", 150)),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def one_line(error: FluxfastError) -> str:
    assert len(plain(error.message).splitlines()) == 1 and len(error.message) < 20_000
    return error.message


# ---------------------------------------------------------------- configurations

KEYS = sorted({part for key in all_keys(Config) for part in key.split(".")})
odd = st.text(max_size=8) | st.sampled_from(
    ["\x1b[31m", "\0", "../x", "${HOME}", "[trigger]", "nan"]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | odd
    | st.binary(max_size=4)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | odd, inner, max_size=4)
    ),
    max_leaves=12,
)
yaml_words = st.sampled_from(
    [
        "a",
        "b: ",
        "- ",
        "&x ",
        "*x ",
        "<<: ",
        "{",
        "}",
        "[",
        "]",
        "? ",
        ": ",
        "!!int ",
        "!!set ",
        "!!bool ",
        "!!float ",
        "!!timestamp ",
        "|\n ",
        ">\n ",
        "\n",
        "\n  ",
        "'",
        '"',
        "#",
        "---",
        "...",
        "%YAML 1.1",
        "1e9",
        "0x",
        "1:2:3",
        "2024-01-01",
        "\\ud800",
        "\t",
        "é",
        "\ufeff",
        "@",
        "~",
        "=",
    ]
)


yaml_texts = st.lists(yaml_words, max_size=30).map("".join)


def loads_or_says(file: Path) -> None:
    try:
        config = load_config(file)
    except ConfigError as error:
        one_line(error)
    else:  # what is accepted can be saved with the run, and read again
        file.write_text(dump_config(config), encoding="utf-8")
        assert load_config(file) == config
        assert Config.model_validate_json(config.model_dump_json()) == config


@quickly
@given(raw=st.dictionaries(st.sampled_from(KEYS), values, max_size=5), ends=st.booleans())
def test_any_settings(tmp_path, raw, ends):
    """Some of our keys with values of every kind, beside what makes a configuration whole."""
    if ends:
        raw = {**raw, "model": {"path": "m", **as_mapping(raw.get("model"))}}
        raw["data"] = {"folder": "f", **as_mapping(raw.get("data"))}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    loads_or_says(tmp_path / "c.yaml")


def as_mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def of_the_kind(value) -> st.SearchStrategy:
    """Values like a default one; None may stand for anything."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(0, 5000)
    if isinstance(value, float):
        return st.floats(0, 1)
    return odd if isinstance(value, str) else odd | st.integers(1, 64) | st.floats(0.1, 0.9)


@quickly
@given(st.data())
def test_any_value_in_any_place(tmp_path, data):
    """Everything that may be written, a few values of it exchanged for others; a quarter of these
    is accepted."""
    raw = json.loads(
        build_config({"model": {"path": "m"}, "data": {"folder": "f"}}).model_dump_json()
    )
    sections = [raw, *(raw[key] for key in raw if isinstance(raw[key], dict)), raw["data"][0]]
    for section in data.draw(st.lists(st.sampled_from(sections), min_size=1, max_size=3)):
        key = data.draw(st.sampled_from(sorted(section)))
        if not isinstance(section[key], dict | list):
            section[key] = data.draw(of_the_kind(section[key]) | values)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    loads_or_says(tmp_path / "c.yaml")


@quickly
@given(content=st.binary(max_size=200) | yaml_texts)
def test_any_text_for_a_configuration(tmp_path, content):
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    for start in (b"", b"model: {path: m}\ndata: {folder: f}\n"):
        (tmp_path / "c.yaml").write_bytes(start + data)
        loads_or_says(tmp_path / "c.yaml")


@quickly
@given(content=yaml_texts)
def test_any_yaml_is_read_or_a_value_error_in_a_line(content):
    try:
        parse_yaml(content)
    except ValueError as error:
        assert "\n" not in str(error)


@quickly
@given(key=st.lists(st.sampled_from([*KEYS, "0", "", "x"]), max_size=4), value=odd)
def test_any_override(key, value):
    try:
        build_config(
            {"model": {"path": "m"}, "data": {"folder": "f"}}, [f"{'.'.join(key)}={value}"]
        )
    except ConfigError as error:
        one_line(error)


# ---------------------------------------------------------------- captions


@quickly
@given(
    sidecar=st.binary(max_size=60) | st.text(max_size=30),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]),
)
def test_any_sidecar(tmp_path, sidecar, encoding):
    data = sidecar if isinstance(sidecar, bytes) else sidecar.encode(encoding)
    (tmp_path / "a.txt").write_bytes(data)
    found = read_captions(tmp_path, [tmp_path / "a.png"])
    assert len(found.texts) + len(found.unread) == 1 and not found.stray
    for error in found.unread.values():
        assert str(tmp_path / "a.txt") in one_line(error)
    for text in found.texts.values():
        usable(text)


def usable(text: str) -> None:
    """Stripped, without control characters, and a prompt can be made of it and hashed."""
    assert text == text.strip() and all(
        c.isprintable() or not c.isascii() or c in "\t\n\r" for c in text
    )
    data = DataConfig(folder=".", shuffle_captions=True)
    for prompt in caption_variants(text, "hash", data, "ohwx", seed=0):
        json.dumps(prompt).encode()
        prompt.encode()


rows = st.recursive(
    scalars.filter(lambda value: not isinstance(value, bytes)),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["file_name", "text", "caption", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
lines = rows.map(json.dumps) | st.text(max_size=20) | st.just('{"file_name": "a.png"')


@quickly
@given(lines=st.lists(lines, max_size=4), names=st.lists(odd, max_size=2))
def test_any_metadata(tmp_path, lines, names):
    named = [json.dumps({"file_name": name, "text": name}) for name in names]
    lines = [*lines, '{"file_name": "ok.png", "text": "sound"}', *named]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    (tmp_path / METADATA).write_bytes(content)
    images = [tmp_path / "a.png", tmp_path / "ok.png"]
    found = read_captions(tmp_path, images)
    assert {*found.texts, *found.unread} == set(images)
    for error in (*found.unread.values(), *found.stray):
        assert METADATA in one_line(error)
    for text in found.texts.values():
        if text is not None:
            usable(text)


@quickly
@given(data=st.binary(max_size=200))
def test_any_bytes_for_metadata(tmp_path, data):
    (tmp_path / METADATA).write_bytes(data)
    found = read_captions(tmp_path, [tmp_path / "a.png"])
    for error in (*found.unread.values(), *found.stray):
        one_line(error)


# ---------------------------------------------------------------- headers of safetensors

FORMS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "Q", 3]),
        "shape": st.lists(st.integers(-1, 2**64), max_size=3) | st.none() | st.just([1]),
        "data_offsets": st.lists(
            st.integers(-1, 2**64) | st.floats() | st.text(max_size=2), max_size=3
        )
        | st.sampled_from([[0, 4], [0, 0], [4, 8]]),
        "x": st.none(),
    },
)
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            "mean",
            "std",
            "t5",
            "__metadata__",
            "",
            "lora_unet_double_blocks_0_img_attn_qkv.alpha",
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        ]
    ),
    FORMS | st.none() | st.integers() | st.lists(st.integers(), max_size=2),
    max_size=4,
)
FILES = st.binary(max_size=120) | st.tuples(
    HEADERS, st.binary(max_size=12), st.none() | st.integers(0, 2**63)
)


def written(tmp_path: Path, content) -> Path:
    file = tmp_path / "a.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
        return file
    header, data, length = content
    return write_header(file, header, data, length)


@quickly
@given(content=FILES)
def test_any_cache_file(tmp_path, content):
    """Whole, or told to be encoded anew; what looks whole and is not is deleted when it is read."""
    file = written(tmp_path, content)
    whole = is_complete(file, ("mean", "std"))
    assert whole in (True, False)
    try:
        read_tensors(file, ("mean", "std"))
    except CacheDamaged as error:
        assert error.path == file and str(file) in one_line(error) and not file.exists()


@quickly
@given(content=FILES)
def test_any_lora_file(tmp_path, content):
    file = written(tmp_path, content)
    for read in (read_lora, ranks_of):
        try:
            read(file)
        except ConfigError as error:
            assert str(file) in one_line(error)


@pytest.mark.parametrize(
    "dtype, shape, size",
    [
        ("F32", [], 4),
        ("F4", [8, 1], 4),
        ("F6_E2M3", [4, 1], 3),
        ("F8_E8M0", [4, 1], 4),
        ("U64", [4, 1], 32),
        ("C64", [4, 1], 32),
        ("BOOL", [4, 1], 4),
    ],
)
def test_lora_factors_of_odd_kinds(tmp_path, dtype, shape, size):
    """A sound file: its library reads it, or says that torch has no such numbers."""
    name = "transformer.single_transformer_blocks.0.attn.to_q."
    header = {
        f"{name}{part}": {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i, part in enumerate(("lora_A.weight", "lora_B.weight", "alpha"))
    }
    file = write_header(tmp_path / "a.safetensors", header, b"\1" * 3 * size)
    with pytest.raises(ConfigError) as raised:
        read_lora(file)
    assert str(file) in one_line(raised.value) and "lora_" in raised.value.message
    assert ranks_of(file) == ({"single_blocks.0.linear1": shape[0]} if shape else {})


@pytest.mark.parametrize("depth", [10, 2000, 100_000])
def test_nested_json_in_any_header(tmp_path, depth):
    for content in ('{"a":' + "[" * depth, '{"a":' * depth, "[" * depth + "]" * depth):
        head = content.encode()
        file = tmp_path / "a.safetensors"
        file.write_bytes(len(head).to_bytes(8, "little") + head)
        with pytest.raises(ConfigError):
            read_lora(file)
        assert not is_complete(file, ())
        with pytest.raises(CacheDamaged):
            read_tensors(file, ())
