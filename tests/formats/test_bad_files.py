"""Damaged and malicious files: one clear message, exit code 2, nothing written, nothing run, little
memory, no waiting."""

import os
import pickle
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import (
    bnb_tensors,
    fp8_tensors,
    spec_of,
    tensors_of,
    write,
    write_gguf,
    write_header,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from small import SMALL

from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.quantize import quantize
from fluxfast.formats.base.reader import open_base
from fluxfast.formats.inspect import inspect
from fluxfast.model.names import tensor_sources

NAME = "double_blocks.0.img_attn.qkv.weight"
SCALE = "double_blocks.0.img_attn.qkv.scale_weight"


@pytest.fixture(scope="module")
def tensors():
    return tensors_of(SMALL)


def refused(path: Path) -> str:
    """Asserts that every reader refuses the file with one message, which it returns."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(ConfigError) as caught:
        spec_of(path)
    message = caught.value.message
    assert str(path) in message and "\n" not in message and caught.value.exit_code == 2
    with pytest.raises(ConfigError) as again:
        quantize(path, path.parent / "out.safetensors")
    assert again.value.message == message
    assert sorted(path.parent.iterdir()) == before
    return message


# ---------------------------------------------------------------- pickles


class Boom:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def pickles(tmp_path: Path) -> list[Path]:
    files = []
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        files.append(tmp_path / f"{protocol}.safetensors")
        files[-1].write_bytes(pickle.dumps({"state_dict": Boom()}, protocol=protocol))
    for name, zipped in (("new.ckpt", True), ("old.pt", False)):
        files.append(tmp_path / name)
        torch.save({"a": torch.zeros(2)}, files[-1], _use_new_zipfile_serialization=zipped)
    return files


def test_pickles_are_refused_and_never_loaded(tmp_path, monkeypatch):
    files = pickles(tmp_path)
    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **named: pytest.fail("unpickled"))
    for file in files:
        assert "it is a pickle" in refused(file), file
        with pytest.raises(ConfigError, match="it is a pickle"):
            inspect(file)


@pytest.mark.parametrize("low", [0x0280, 0x0580, 0x3C20])
def test_a_header_length_that_looks_like_another_format(tmp_path, tensors, low):
    """The file's first two bytes are pickle protocol 2's or 5's, or those of a web page."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    length = int.from_bytes(content[:8], "little")
    wanted = (length // 65536 + 1) * 65536 + low
    header = content[8 : 8 + length].ljust(wanted)
    file = tmp_path / "a"
    file.write_bytes(wanted.to_bytes(8, "little") + header + content[8 + length :])
    assert int.from_bytes(file.read_bytes()[:2], "little") == low
    assert spec_of(file).hidden_size == 64


def test_control_characters_in_a_name(tmp_path, tensors):
    message = refused(write(tmp_path / "a", tensors | {"a\nb\x1b[31m": torch.zeros(1)}))
    assert r"'a\nb\x1b[31m'" in message


# ---------------------------------------------------------------- damaged safetensors


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "it is empty"),
        (b"\0" * 7, "cannot read"),
        (b"\0" * 4096, "cannot read"),
        (b"<!doctype html><html>" * 20, "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
        (b"GGUF", "cannot read"),
        (b"\xff" * 4096, "cannot read"),
    ],
)
def test_files_that_are_no_model(tmp_path, content, part, fluxfast):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    assert part in refused(file)
    code, out, err = fluxfast("inspect", file)
    assert code == 2 and out == "" and err.startswith("error: cannot read")
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]


FORMS = {
    "bf16": lambda tensors: tensors,
    "fp8": partial(fp8_tensors, scaled=True),
    "nf4": partial(bnb_tensors, nested=True),
}


@pytest.mark.parametrize("form", [*FORMS, "gguf"])
def test_truncated(tmp_path, tensors, form):
    file = tmp_path / "a"
    write_gguf(file, tensors, "F16") if form == "gguf" else write(file, FORMS[form](tensors))
    content = file.read_bytes()
    for share in (0.0005, 0.01, 0.3, 0.9, 0.999):
        file.write_bytes(content[: int(len(content) * share)])
        assert "cannot read" in refused(file)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
BOMBS = {
    "a header of 2^63 bytes": ({NAME: ENTRY}, 2**63 - 1),
    "a header of 200 MB": ({NAME: ENTRY}, 200_000_000),
    "a header longer than the file": ({NAME: ENTRY}, 5000),
    "no JSON": (b"{" * 500, None),
    "nested JSON": (b'{"a":' + b"[" * 100_000, None),
    "a list": ([], None),
    "overlapping": ({NAME: ENTRY, "b": ENTRY | {"data_offsets": [8, 24]}}, None),
    "a hole": ({NAME: ENTRY, "b": ENTRY | {"data_offsets": [100, 116]}}, None),
    "backwards": ({NAME: ENTRY | {"data_offsets": [16, 0]}}, None),
    "past the end": ({NAME: ENTRY | {"shape": [2**20], "data_offsets": [0, 2**22]}}, None),
    "absurd shapes": ({NAME: ENTRY | {"shape": [2**62, 2**62]}}, None),
    "a product that wraps to 4": ({NAME: ENTRY | {"shape": [2**32, 2**32 + 1, 4]}}, None),
    "negative shapes": ({NAME: ENTRY | {"shape": [-2, -2]}}, None),
    "an unknown dtype": ({NAME: ENTRY | {"dtype": "F128"}}, None),
    "shapes of text": ({NAME: ENTRY | {"shape": "many"}}, None),
    "metadata of numbers": ({"__metadata__": {"a": 3}, NAME: ENTRY}, None),
}


def test_too_many_blocks(tmp_path):
    """A small file whose names speak of ten thousand blocks: no table of them is built."""
    tensors = dict(tensors_of(SMALL))
    for index in range(10_000):
        tensors[f"double_blocks.{index}.x"] = torch.zeros(0)
    message = refused(write(tmp_path / "a", tensors))
    assert "10000 double" in message


@pytest.mark.parametrize("shape", [(192, 63), (64, 192), (192 * 64,), (192, 64, 1), ()])
def test_wrong_shapes_in_8_bits(tmp_path, tensors, shape):
    changed = tensors | {NAME: torch.zeros(shape).to(torch.float8_e4m3fn)}
    message = refused(write(tmp_path / "a", changed))
    assert NAME in message and str(shape) in message


@pytest.mark.parametrize(
    "key, tensor",
    [
        (SCALE, torch.zeros(3)),
        (SCALE, torch.zeros(192, 2)),
        (SCALE, torch.zeros(1, dtype=torch.int32)),
        (NAME, torch.zeros(192, 64, dtype=torch.int8)),  # int8 of other tools has no such scale
    ],
)
def test_wrong_scales(tmp_path, tensors, key, tensor):
    base = fp8_tensors(tensors, True) if key == SCALE else tensors
    assert key in refused(write(tmp_path / "a", base | {key: tensor}))


# ---------------------------------------------------------------- damaged GGUF


def header(*, version=3, count=0, pairs=0, body=b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, pairs) + body


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def info(name=b"a", dims=(2, 2), kind=0, offset=0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


GGUF_BOMBS = {
    "version 1": header(version=1),
    "version of the other byte order": header(version=3 << 24),
    "tensors without end": header(count=2**64 - 1),
    "pairs without end": header(pairs=2**64 - 1),
    "an endless string": header(pairs=1, body=string(b"a", 2**63)),
    "an endless array": header(pairs=1, body=string(b"a") + struct.pack("<IIQ", 9, 0, 2**63)),
    "an endless array of strings": header(
        pairs=1, body=string(b"a") + struct.pack("<IIQ", 9, 8, 2**63)
    ),
    "an array of arrays": header(pairs=1, body=string(b"a") + struct.pack("<IIQ", 9, 9, 2)),
    "an unknown value": header(pairs=1, body=string(b"a") + struct.pack("<I", 77)),
    "a name that is no text": header(count=1, body=info(b"\xff\xfe")),
    "many dimensions": header(count=1, body=string(b"a") + struct.pack("<I", 2**31)),
    "absurd dimensions": header(count=1, body=info(dims=(2**62, 2**62))),
    "a product that wraps to 0": header(count=1, body=info(dims=(2**32, 2**32))),
    "past the end": header(count=1, body=info(offset=2**40)),
    "an unknown type": header(count=1, body=info(kind=999)),
    "rows that are no blocks": header(count=1, body=info(dims=(33, 1), kind=8)),
    "twice": header(count=2, body=info() + info()),
    "overlapping": header(count=2, body=info() + info(b"b", offset=8)),
    "alignment 0": header(pairs=1, body=string(b"general.alignment") + struct.pack("<II", 4, 0)),
    "alignment of text": header(
        pairs=1, body=string(b"general.alignment") + struct.pack("<I", 8) + string(b"x")
    ),
}


LIMITED = """
import resource, sys
import torch, gguf
from fluxfast.errors import FluxfastError
from fluxfast.formats.base.reader import open_base
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
import pathlib
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(li.split()[1]) for li in lines if li.startswith("RssAnon")) / 1024
before = anonymous()
for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        with open_base(file):
            print("opened", file)
    except FluxfastError:
        pass
print(anonymous() - before)
"""


def write_bomb(path: Path, name: str) -> Path:
    if name in BOMBS:
        header, length = BOMBS[name]
        return write_header(path, header, b"\0" * 16, length)
    path.write_bytes(GGUF_BOMBS[name] + (b"\0" * 64 if "endless" not in name else b""))
    return path


@pytest.mark.parametrize("name", [*BOMBS, *GGUF_BOMBS])
def test_malicious_headers(tmp_path, name):
    assert "cannot read" in refused(write_bomb(tmp_path / "a", name))


@pytest.mark.slow
def test_bombs_take_neither_memory_nor_time(tmp_path):
    for index, name in enumerate([*BOMBS, *GGUF_BOMBS]):
        write_bomb(tmp_path / str(index), name)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (grown,) = done.stdout.splitlines()
    assert float(grown) < 50


# ---------------------------------------------------------------- whatever comes

# the same examples in every run; HYPOTHESIS_EXAMPLES asks for more of them
quickly = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", 60)),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NAMES = sorted(tensor_sources(SMALL))
words = st.sampled_from(
    ["double_blocks", "single_blocks", "transformer_blocks", "0", "1", "img_attn", "norm", "scale"]
    + ["weight", "lora_A", "model", "diffusion_model", "", "x", "distilled_guidance_layer"]
)
keys = st.lists(words, min_size=1, max_size=6).map(".".join)


def opens_or_refuses(path: Path) -> None:
    """Asserts that every tensor of the file can be read, or that there is one clear error."""

    def read_all(path: Path) -> None:
        with open_base(path) as base:
            for name in tensor_sources(base.spec):
                base.read(name)

    for read in (read_all, inspect):
        try:
            read(path)
        except FluxfastError as error:
            assert str(path) in error.message and "\n" not in error.message


@quickly
@given(data=st.binary(max_size=400))
def test_any_bytes(tmp_path, data):
    for start in (b"", b"GGUF", b"GGUF\3\0\0\0", b"\x10\0\0\0\0\0\0\0{"):
        (tmp_path / "a").write_bytes(start + data)
        opens_or_refuses(tmp_path / "a")


@quickly
@given(
    header=st.dictionaries(
        keys,
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "Q", "I64", 3]),
                "shape": st.lists(st.integers(-1, 2**64), max_size=3) | st.just(None),
                "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3),
            }
        )
        | st.none()
        | st.integers(),
        max_size=5,
    ),
    size=st.integers(0, 64),
)
def test_any_header(tmp_path, header, size):
    opens_or_refuses(write_header(tmp_path / "a", header, b"\0" * size))


@quickly
@given(
    chosen=st.sets(st.sampled_from(NAMES)),
    more=st.sets(keys, max_size=8),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_any_set_of_keys(tmp_path, chosen, more, shape):
    """Some of the model's tensors, in odd shapes, and keys that only look like them."""
    tensors = {key: torch.zeros(shape) for key in {*chosen, *more} if key}
    if tensors:
        opens_or_refuses(write(tmp_path / "a", tensors))


@quickly
@given(gone=st.sets(st.sampled_from(NAMES), min_size=1, max_size=4))
def test_missing_tensors_are_named(tmp_path, tensors, gone):
    left = {name: tensor for name, tensor in tensors.items() if name not in gone}
    message = refused(write(tmp_path / "a", left))
    if "tensors are missing" in message:
        assert f"{len(gone)} tensors are missing" in message
        assert sum(name in message for name in gone) == min(len(gone), 3)
    else:  # one that the sizes are read from
        assert any(name in message for name in gone) or "does not hold" in message


@pytest.mark.parametrize("form", ["gguf", "nf4"])
@quickly
@given(data=st.data())
def test_any_damage_to_a_header(tmp_path, form, data):
    whole = tmp_path / "whole"
    if not whole.exists():
        tensors = tensors_of(SMALL)
        if form == "gguf":
            write_gguf(whole, tensors, "F16")
        else:
            write(whole, bnb_tensors(tensors, nested=True))
    content = bytearray(whole.read_bytes())
    start, end = (4, 5000) if form == "gguf" else (8, 8 + int.from_bytes(content[:8], "little"))
    values = st.integers(0, 255) if form == "gguf" else st.integers(32, 126)
    for at in data.draw(st.lists(st.integers(start, end), min_size=1, max_size=6)):
        content[at] = data.draw(values)
    (tmp_path / "a").write_bytes(content)
    opens_or_refuses(tmp_path / "a")
