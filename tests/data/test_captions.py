"""Captions from sidecars and metadata.jsonl; triggers; comma shuffles."""

import json
from pathlib import Path

import pytest

from fluxfast.config.schema import DataConfig
from fluxfast.data.captions import (
    METADATA,
    apply_trigger,
    caption_variants,
    clean_trigger,
    read_captions,
)
from fluxfast.errors import FluxfastError


def read(folder: Path, *names: str, extension=".txt") -> list[str | None]:
    """Returns the captions of images, all of which can be read."""
    captions = read_captions(folder, [folder / name for name in names], extension)
    assert not captions.unread and not captions.stray
    return list(captions.texts.values())


def variants(caption: str, trigger=None, seed=0, content="h", **data) -> list[str]:
    return caption_variants(caption, content, DataConfig(folder="x", **data), trigger, seed)


def test_sidecars(tmp_path):
    (tmp_path / "a.txt").write_text("  a cat \n", encoding="utf-8")
    (tmp_path / "b.v2.txt").write_bytes(b"\xef\xbb\xbfein K\xc3\xa4fer\r\n")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "d.caption").write_text("other extension")
    assert read(tmp_path, "a.png", "b.v2.JPG", "c.webp", "d.png") == [
        "a cat",
        "ein Käfer",
        "",
        None,
    ]
    assert read(tmp_path, "d.png", extension=".caption") == ["other extension"]


def test_metadata_nearest_folder_first_and_sidecar_wins(tmp_path):
    deep = tmp_path / "x" / "y"
    deep.mkdir(parents=True)
    rows = [
        {"file_name": "x/y/1.png", "text": "from the top"},
        {"file_name": "./x/y/2.png", "caption": " from the top too "},
        {"file_name": "x\\y\\3.png", "text": "a Windows path"},
        {"file_name": "x/y/4.png", "text": None},
        {"file_name": "gone.png", "text": "no such image"},
        {"file_name": "x/y/cafe\u0301.png", "text": "decomposed"},
        {"file_name": "x/y/6.png", "text": "a line\u2028separator"},
    ]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    (deep / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "from beside"}\n')
    (deep / "2.txt").write_text("from the sidecar")
    names = ["x/y/1.png", "x/y/2.png", "x/y/3.png", "x/y/4.png", "x/y/caf\u00e9.png", "x/y/6.png"]
    assert read(tmp_path, *names) == [
        "from beside",
        "from the sidecar",
        "a Windows path",
        None,
        "decomposed",
        "a line\u2028separator",
    ]
    (deep / "2.txt").unlink()
    assert read(tmp_path, "x/y/2.png") == ["from the top too"]


def test_metadata_above_the_data_folder_is_not_read(tmp_path):
    inner = tmp_path / "data"
    inner.mkdir()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "data/a.png", "text": "no"}')
    assert read(inner, "a.png") == [None]


@pytest.mark.parametrize(
    ("line", "names_an_image"),
    [
        ('{"file_name": "a.png", "text": ["x"]}', True),
        ('{"file_name": "b.png", "text": "x"}\n{"file_name": "a.png", "caption": 3}', True),
        ('{"file_name": "a.png", "text": "1"}\n{"file_name": "./a.png", "text": "2"}', True),
        ('{"file_name": "a.png", "text": "\\ud83d"}', True),
        ('{"file_name": "a.png", "text": ', False),
        ("[1, 2]", False),
        ('{"text": "no name"}', False),
        ('{"file_name": 3, "text": "x"}', False),
        ("[" * 100_000, False),
    ],
)
def test_a_bad_line_of_metadata_spoils_its_image_alone(tmp_path, line, names_an_image):
    (tmp_path / METADATA).write_text(f'{{"file_name": "ok.png", "text": "x"}}\n{line}\n')
    good, bad = tmp_path / "ok.png", tmp_path / "a.png"
    captions = read_captions(tmp_path, [good, bad])
    (error,) = captions.unread.values() if names_an_image else captions.stray
    assert f"metadata.jsonl, line {2 + line.count(chr(10))}: " in error.message
    assert captions.texts == ({good: "x"} if names_an_image else {good: "x", bad: None})
    assert len(captions.unread) + len(captions.stray) == 1


def test_only_the_first_bad_lines_of_metadata_are_reported_each(tmp_path):
    (tmp_path / METADATA).write_text("x\n" * 9 + json.dumps({"file_name": "a.png", "text": "a"}))
    captions = read_captions(tmp_path, [tmp_path / "a.png"])
    assert captions.texts == {tmp_path / "a.png": "a"}
    *first, last = [error.message for error in captions.stray]
    assert len(first) == 5
    assert all(f"line {n}: not valid JSON" in message for n, message in enumerate(first, 1))
    assert last == f"{tmp_path / METADATA}: 4 more lines name no image"


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("[trigger] and [trigger]'s dog", "ohwx", "ohwx and ohwx's dog"),
        ("a man", "ohwx", "ohwx, a man"),
        ("photo of ohwx, smiling", "ohwx", "photo of ohwx, smiling"),
        ("photo of ohwxes", "ohwx", "ohwx, photo of ohwxes"),
        ("", "ohwx", "ohwx"),
        ("a (x+) dog", "(x+)", "a (x+) dog"),
        ("小猫坐着", "猫", "小猫坐着"),
        ("as it is", None, "as it is"),
    ],
)
def test_trigger(caption, trigger, expected):
    assert apply_trigger(caption, trigger) == expected
    assert variants(caption, trigger) == [expected]


def test_the_runs_trigger_goes_in_front_of_the_datas():
    """As in ai-toolkit, where a data set has one of its own."""

    def both(caption: str, own: str | None, trigger: str | None) -> list[str]:
        return caption_variants(caption, "h", DataConfig(folder="x", trigger=own), trigger, 0)

    assert both("a cat", "alice", None) == ["alice, a cat"]
    assert both("a cat", "alice", "ohwx") == ["ohwx, alice, a cat"]
    assert both("[trigger] and ohwx", "alice", "ohwx") == ["alice and ohwx"]
    assert both("", "alice", "ohwx") == ["ohwx, alice"]
    assert both("a [trigger]", " ", "ohwx") == ["a ohwx"]


def test_placeholder_without_a_trigger():
    assert clean_trigger("  ") is clean_trigger(None) is None and clean_trigger(" tok ") == "tok"
    with pytest.raises(FluxfastError, match="no trigger is set") as raised:
        apply_trigger("a [trigger]", None)
    assert "trigger:" in raised.value.hint


def test_shuffle_keeps_the_front_and_every_part():
    caption = "tok,  a,b , c,, d, e"
    options = {"shuffle_captions": True, "keep_tokens": 2}
    texts = variants(caption, seed=3, shuffle_variants=6, **options)
    assert 2 < len(texts) <= 6 and len(set(texts)) == len(texts)
    for text in texts:
        parts = text.split(", ")
        assert parts[:2] == ["tok", "a"] and sorted(parts[2:]) == ["b", "c", "d", "e"]
    assert variants(caption, seed=3, shuffle_variants=6, **options) == texts
    assert variants(caption, seed=3, shuffle_variants=1, **options) == texts[:1]
    assert variants(caption, seed=4, shuffle_variants=6, **options) != texts
    assert variants(caption, seed=3, content="i", shuffle_variants=6, **options) != texts


@pytest.mark.parametrize(
    ("caption", "keep", "expected"),
    [
        ("", 1, [""]),
        ("one", 1, ["one"]),
        ("a, b", 9, ["a, b"]),
        ("a, b", 0, ["a, b", "b, a"]),
    ],
)
def test_shuffle_of_few_parts(caption, keep, expected):
    options = {"shuffle_captions": True, "keep_tokens": keep, "shuffle_variants": 50}
    assert sorted(variants(caption, **options)) == expected
    if keep:
        assert all(text.startswith("tok") for text in variants(caption, "tok", **options))


@pytest.mark.parametrize(
    "caption, prefix, suffix, expected",
    [
        ("a dog", None, None, "a dog"),
        ("a dog", "photo of", None, "photo of a dog"),
        ("a dog", "best, ", ", from the side", "best,  a dog , from the side"),
        ("", "photo", "", "photo"),
        ("", None, None, ""),
    ],
)
def test_prefix_and_suffix(caption, prefix, suffix, expected):
    assert variants(caption, caption_prefix=prefix, caption_suffix=suffix) == [expected]
