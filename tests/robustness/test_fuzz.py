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

MINIMAL = {"model": {"path": "m"}, "data": {"folder": "f"}}
KEYS = sorted({part for key in all_keys(Config) for part in key.split(".")})
odd = st.text(max_size=8) | st.sampled_from(
    ["\x1b[31m", "\0", "../x", "${HOME}", "[trigger]", "nan"]
)
json_scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | odd
values = st.recursive(
    json_scalars | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | odd, inner, max_size=4)
    ),
    max_leaves=12,
)
WORDS = "a { } [ ] ' \" # --- ... 1e9 0x 1:2:3 2024-01-01 \\ud800 é @ ~ = \ufeff"
TAGS = "int set bool float timestamp"
SPACED = ["b: ", "- ", "&x ", "*x ", "<<: ", "? ", ": ", "|\n ", ">\n ", "\n", "\n  ", "\t"]
yaml_words = [*WORDS.split(), *SPACED, "%YAML 1.1", *(f"!!{tag} " for tag in TAGS.split())]
yaml_texts = st.lists(st.sampled_from(yaml_words), max_size=30).map("".join)


def loads_or_says(file: Path, content: bytes | dict) -> None:
    """What is accepted can be saved with the run, and read again."""
    if isinstance(content, dict):
        content = yaml.safe_dump(content).encode()
    file.write_bytes(content)
    try:
        config = load_config(file)
    except ConfigError as error:
        one_line(error)
        return
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config
    assert Config.model_validate_json(config.model_dump_json()) == config


@quickly
@given(raw=st.dictionaries(st.sampled_from(KEYS), values, max_size=5), whole=st.booleans())
def test_any_settings(tmp_path, raw, whole):
    """Some of our keys with values of every kind, beside what makes a configuration whole."""
    for key, minimal in MINIMAL.items() if whole else ():
        raw[key] = {**minimal, **raw[key]} if isinstance(raw.get(key), dict) else minimal
    loads_or_says(tmp_path / "c.yaml", raw)


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
    raw = json.loads(build_config(MINIMAL).model_dump_json())
    sections = [raw, *(raw[key] for key in raw if isinstance(raw[key], dict)), raw["data"][0]]
    for section in data.draw(st.lists(st.sampled_from(sections), min_size=1, max_size=3)):
        key = data.draw(st.sampled_from(sorted(section)))
        if not isinstance(section[key], dict | list):
            section[key] = data.draw(of_the_kind(section[key]) | values)
    loads_or_says(tmp_path / "c.yaml", raw)


@quickly
@given(content=st.binary(max_size=200) | yaml_texts)
def test_any_text_for_a_configuration(tmp_path, content):
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    for start in (b"", b"model: {path: m}\ndata: {folder: f}\n"):
        loads_or_says(tmp_path / "c.yaml", start + data)


@quickly
@given(key=st.lists(st.sampled_from([*KEYS, "0", "", "x"]), max_size=4), value=odd)
def test_any_override(key, value):
    try:
        build_config(MINIMAL, [f"{'.'.join(key)}={value}"])
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
    captions = read_captions(tmp_path, [tmp_path / "a.png"])
    assert len(captions.texts) + len(captions.unread) == 1 and not captions.stray
    for error in captions.unread.values():
        assert str(tmp_path / "a.txt") in one_line(error)
    for text in captions.texts.values():
        assert_usable(text)


def assert_usable(text: str) -> None:
    """Stripped, without control characters, and a prompt can be made of it and hashed."""
    assert text == text.strip()
    assert all(c.isprintable() or not c.isascii() or c in "\t\n\r" for c in text)
    data = DataConfig(folder=".", shuffle_captions=True)
    for prompt in caption_variants(text, "hash", data, "ohwx", seed=0):
        json.dumps(prompt).encode()
        prompt.encode()


rows = st.recursive(
    json_scalars,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["file_name", "text", "caption", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
lines = rows.map(json.dumps) | st.text(max_size=20) | st.just('{"file_name": "a.png"')


@quickly
@given(
    lines=st.lists(lines, max_size=4), names=st.lists(odd, max_size=2), end=st.binary(max_size=200)
)
def test_any_metadata(tmp_path, lines, names, end):
    named = [json.dumps({"file_name": name, "text": name}) for name in names]
    lines = [*lines, '{"file_name": "ok.png", "text": "sound"}', *named]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    images = [tmp_path / "a.png", tmp_path / "ok.png"]
    for data in (content, end, content + b"\n" + end):
        (tmp_path / METADATA).write_bytes(data)
        captions = read_captions(tmp_path, images)
        assert {*captions.texts, *captions.unread} == set(images)
        for error in (*captions.unread.values(), *captions.stray):
            assert METADATA in one_line(error)
        for text in filter(None, captions.texts.values()):
            assert_usable(text)


# ---------------------------------------------------------------- headers of safetensors

NAMES = [
    *("mean", "std", "t5", "__metadata__", ""),
    "lora_unet_double_blocks_0_img_attn_qkv.alpha",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
]
offsets = st.lists(st.integers(-1, 2**64) | st.floats() | st.text(max_size=2), max_size=3)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "Q", 3]),
        "shape": st.lists(st.integers(-1, 2**64), max_size=3) | st.none() | st.just([1]),
        "data_offsets": offsets | st.sampled_from([[0, 4], [0, 0], [4, 8]]),
        "x": st.none(),
    },
)
headers = st.dictionaries(
    st.sampled_from(NAMES),
    entries | st.none() | st.integers() | st.lists(st.integers(), max_size=2),
    max_size=4,
)
# bytes, or (header, data, the length that the file claims)
files = st.binary(max_size=120) | st.tuples(
    headers, st.binary(max_size=12), st.none() | st.integers(0, 2**63)
)


@quickly
@given(content=files)
def test_any_cache_file(tmp_path, content):
    """Whole, or told to be encoded anew; what looks whole and is not is deleted when it is read."""
    file = written(tmp_path, content)
    assert is_complete(file, ("mean", "std")) in (True, False)
    try:
        read_tensors(file, ("mean", "std"))
    except CacheDamaged as error:
        assert error.path == file and str(file) in one_line(error) and not file.exists()


@quickly
@given(content=files)
def test_any_lora_file(tmp_path, content):
    file = written(tmp_path, content)
    for read in (read_lora, ranks_of):
        try:
            read(file)
        except ConfigError as error:
            assert str(file) in one_line(error)


def written(tmp_path: Path, content) -> Path:
    file = tmp_path / "a.safetensors"
    if isinstance(content, tuple):
        return write_header(file, *content)
    file.write_bytes(content)
    return file


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
    name, header = "transformer.single_transformer_blocks.0.attn.to_q.", {}
    for i, part in enumerate(("lora_A.weight", "lora_B.weight", "alpha")):
        place = {"shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        header[f"{name}{part}"] = {"dtype": dtype, **place}
    file = write_header(tmp_path / "a.safetensors", header, b"\1" * 3 * size)
    with pytest.raises(ConfigError) as raised:
        read_lora(file)
    assert str(file) in one_line(raised.value) and "lora_" in raised.value.message
    assert ranks_of(file) == ({"single_blocks.0.linear1": shape[0]} if shape else {})


@pytest.mark.parametrize("depth", [10, 2000, 100_000])
def test_nested_json_in_any_header(tmp_path, depth):
    for content in ('{"a":' + "[" * depth, '{"a":' * depth, "[" * depth + "]" * depth):
        file = write_header(tmp_path / "a.safetensors", content.encode())
        with pytest.raises(ConfigError):
            read_lora(file)
        assert not is_complete(file, ())
        with pytest.raises(CacheDamaged):
            read_tensors(file, ())
