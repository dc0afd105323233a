"""Checkpoints: exact to the last bit, whole or not there, verified, and never a pickle."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

import fluxfast.run.checkpoint
from fluxfast.errors import DiskError, FluxfastError
from fluxfast.run.checkpoint import (
    MANIFEST,
    REST,
    TENSORS,
    Damaged,
    checkpoints,
    flatten_state,
    newest_checkpoint,
    put_weights,
    read_state,
    save_checkpoint,
    unflatten_state,
    verify,
)
from fluxfast.util.files import drop_partials, write_atomic

DTYPES = {
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
}


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    weights = [torch.randn(8, 3, generator=generator), torch.randn(5, generator=generator)]
    return {"step": step, "parameters": weights, "optimizer": {"lr": 0.1 / (1 + step)}}


def write_lora(folder: Path) -> None:
    write_atomic(folder / "x.safetensors", b"a LoRA")


def save(run: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        folder = save_checkpoint(run, state(step), write_lora, keep)
    return folder


def saved_steps(run: Path) -> list[int]:
    return [step for step, _ in checkpoints(run)]


def same(one, other) -> bool:
    """Returns whether two states are equal bit for bit, types too."""
    if isinstance(one, torch.Tensor):
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (one, other)]
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(*bits)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return type(one) is type(other) and all(same(*pair) for pair in pairs)
    return type(one) is type(other) and repr(one) == repr(other)


# ---------------------------------------------------------------- what is kept


def test_every_value_comes_back_to_the_last_bit(tmp_path):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1000, dtype=torch.float64, generator=generator)
    tensors = {str(dtype): values.to(dtype)[:24].view(2, 3, 4) for dtype in DTYPES}
    edges = [5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf, math.nan]
    whole = {
        "step": 7,
        "floats": values.tolist() + edges,
        "others": [None, True, False, 0, -(2**70), "a string, ünïcode\n"],
        "groups": [{"betas": (0.9, 0.999), "params": [0, 1], "growth_rate": math.inf}],
        "state": {0: {"step": torch.tensor(3.0), "empty": torch.zeros(0, 4)}, 10: (), 2: {}},
        "odd": {"$tensor": "a", "a/b": torch.ones(1)},
        "tensors": tensors | {"columns": values[:20].view(4, 5).t()},
    }
    folder = save_checkpoint(tmp_path, whole, write_lora, 1)
    assert same(read_state(folder), {"format": 1, **whole})
    named = read_state(folder, tensors=False)
    assert named["state"][0]["step"] is None and same(named["floats"], whole["floats"])
    assert "NaN" not in (folder / REST).read_text()  # JSON as others read it


def test_what_is_neither_a_tensor_nor_plain_is_named():
    with pytest.raises(TypeError, match=r"optimizer/0/what: a set has no place"):
        flatten_state({"optimizer": {0: {"what": {1, 2}}}})
    with pytest.raises(TypeError, match="spelled alike"):
        flatten_state({1: torch.ones(1), "1": torch.ones(1)})
    rest, tensors = flatten_state({"a": (torch.ones(2),)})
    assert list(tensors) == ["a/0"] and unflatten_state(rest, lambda path: path) == {"a": ("a/0",)}


def test_weights_of_another_model_are_refused(tmp_path):
    saved = read_state(save(tmp_path, 1))
    ours = [torch.nn.Parameter(torch.zeros(8, 3)), torch.nn.Parameter(torch.zeros(5))]
    put_weights(ours, saved, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours, state(1)["parameters"], strict=True))
    for other in (ours[:1], [ours[0], torch.nn.Parameter(torch.zeros(6))]):
        with pytest.raises(FluxfastError, match="do not fit this model"):
            put_weights(other, saved, tmp_path)


# ---------------------------------------------------------------- in which order


class Disk:
    """Records what `os` and `verify` do to the disk, by path; refuses the nth of it."""

    def __init__(self, monkeypatch, refuse: int | None = None):
        self.events: list[tuple[str, str]] = []
        self.sizes: dict[str, int] = {}  # when they were flushed
        self.refuse = refuse
        for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        monkeypatch.setattr(fluxfast.run.checkpoint, "verify", self._watched("verify", verify))

    def _watched(self, name, real):
        def call(path, *args, **kwargs):
            named = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
            if name == "fsync":
                self.sizes[named] = os.fstat(path).st_size
            target = f" -> {args[0]}" if name in ("replace", "rename") else ""
            self.events.append((name, named + target))
            if len(self.events) - 1 == self.refuse:
                raise OSError(28, "No space left on device")
            return real(path, *args, **kwargs)

        return call


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")


@needs_proc
def test_the_order_in_which_a_checkpoint_reaches_the_disk(tmp_path, monkeypatch):
    """Every file flushed, then its folders, read back, renamed, the parents flushed; only then does
    the oldest go."""
    oldest = save(tmp_path, 1)
    save(tmp_path, 2)
    disk = Disk(monkeypatch)
    folder = save(tmp_path, 3, keep=2)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    lora = partial / f".x.safetensors.{os.getpid()}.partial"
    gone = folder.with_name(f".{oldest.name}.gone.{os.getpid()}.partial")
    expected = [
        ("fsync", str(lora)),
        ("replace", f"{lora} -> {partial / 'x.safetensors'}"),
        *(("fsync", str(partial / name)) for name in (TENSORS, REST, MANIFEST, "state", ".")),
        ("verify", str(partial)),
        ("rename", f"{partial} -> {folder}"),
        ("fsync", str(folder.parent)),
        ("fsync", str(tmp_path)),
        ("rename", f"{oldest} -> {gone}"),
    ]
    assert [event for event in disk.events if event in expected] == expected
    removed = next(i for i, (name, path) in enumerate(disk.events) if path == "x.safetensors")
    assert disk.events[removed][0] == "unlink" and removed > disk.events.index(expected[-1])
    for name in (TENSORS, REST, MANIFEST):
        size = disk.sizes[str(partial / name)]
        assert size == (folder / name).stat().st_size, f"{name} was flushed before it was written"
    assert saved_steps(tmp_path) == [2, 3] and not list(folder.parent.glob(".*"))


@needs_proc
def test_a_disk_that_refuses_anywhere_leaves_a_sound_checkpoint(tmp_path):
    """Whatever single call fails: the newest sound checkpoint is the old one or the whole new one,
    and the next save works."""
    with pytest.MonkeyPatch.context() as patch:
        save(tmp_path / "count", 1)
        disk = Disk(patch)
        save(tmp_path / "count", 2, keep=1)
    refused = 0
    for n in range(len(disk.events)):
        run = tmp_path / str(n)
        save(run, 1)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, refuse=n)
            try:
                save(run, 2, keep=1)
            except DiskError as error:
                refused += 1
                assert "partial" not in str(error) and "No space left" in error.message
        step, folder = newest_checkpoint(run)
        assert same(read_state(folder)["parameters"], state(step)["parameters"])
        save(run, 3, keep=1)
        assert saved_steps(run) == [3]
        drop_partials(folder.parent)  # as every start does
        assert [path.name for path in folder.parent.iterdir()] == ["step-00000003"]
    assert refused >= 10


def test_a_disk_that_gives_back_something_else_is_no_save(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def flips(folder):
        flip(folder / TENSORS, -1)
        verify(folder)

    monkeypatch.setattr(fluxfast.run.checkpoint, "verify", flips)
    with pytest.raises(DiskError, match="returned other bytes than were written.*checksum"):
        save(tmp_path, 2, keep=1)
    assert saved_steps(tmp_path) == [1]


# ---------------------------------------------------------------- damage


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def name_in_manifest(folder: Path, file: str) -> None:
    entries = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**entries, file: entries[REST]}))


def pairs_in_manifest(folder: Path) -> None:
    entries = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps([*entries.items(), (1, entries[REST])]))


def copy_of_another(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000002"), folder)


DAMAGE = {
    "a flipped bit": lambda f: flip(f / TENSORS, -3),
    "a flipped bit in the header": lambda f: flip(f / TENSORS, 30),
    "a flipped bit in the LoRA": lambda f: flip(f / "x.safetensors", 2),
    "cut short": lambda f: os.truncate(f / TENSORS, 100),
    "empty": lambda f: os.truncate(f / REST, 0),
    "longer": lambda f: (f / REST).write_bytes((f / REST).read_bytes() + b" "),
    "a file gone": lambda f: (f / TENSORS).unlink(),
    "the LoRA gone": lambda f: (f / "x.safetensors").unlink(),
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "half a manifest": lambda f: os.truncate(f / MANIFEST, 50),
    "a manifest of nothing": lambda f: (f / MANIFEST).write_text("{}"),
    "a manifest that is a list": lambda f: (f / MANIFEST).write_text("[1]"),
    "a manifest that is a list of pairs": lambda f: pairs_in_manifest(f),
    "a manifest that is no JSON": lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "a manifest that leads outside": lambda f: name_in_manifest(f, "../../../etc/passwd"),
    "a manifest of what is no name": lambda f: name_in_manifest(f, "a\0b"),
    "a manifest of what no system can name": lambda f: name_in_manifest(f, "\ud800"),
    "another step's": copy_of_another,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, kind, log_lines):
    folder = save(tmp_path, 1, 2, 3)
    assert newest_checkpoint(tmp_path) == (3, folder) and not log_lines
    DAMAGE[kind](folder)
    assert newest_checkpoint(tmp_path) == (2, folder.with_name("step-00000002"))
    (line,) = log_lines
    assert "step-00000003 is damaged" in line and "step-00000002" in line and "\n" not in line
    assert saved_steps(tmp_path) == [1, 2]
    assert folder.with_name("step-00000003.damaged").is_dir()
    # reported once, and what is saved later does not fall to it
    assert newest_checkpoint(tmp_path)[0] == 2
    save(tmp_path, 3, keep=1)
    assert newest_checkpoint(tmp_path)[0] == 3
    assert log_lines == [line]


def test_where_all_are_damaged_the_newest_is_named_and_stays(tmp_path, log_lines):
    save(tmp_path, 1, 2)
    for _, folder in checkpoints(tmp_path):
        flip(folder / TENSORS, -1)
    with pytest.raises(Damaged, match="step-00000002 is damaged.*checksum") as raised:
        newest_checkpoint(tmp_path)
    assert "--restart" in raised.value.hint and not log_lines
    assert saved_steps(tmp_path) == [1, 2]


def test_only_checkpoints_up_to_the_saved_one_count_as_kept(tmp_path):
    """Later ones, which the run did not go on from, would otherwise use `keep` up; what a killed
    process left is none."""
    folder = save(tmp_path, 9)
    shutil.copytree(folder, folder.with_name(".step-00000012.123.partial"))
    save(tmp_path, 1, 2, 3, keep=2)
    assert saved_steps(tmp_path) == [2, 3, 9]


def test_an_unreadable_disk_is_damage(tmp_path, monkeypatch, log_lines):
    save(tmp_path, 1, 2)
    real = fluxfast.run.checkpoint._measure

    def broken(path):
        if "step-00000002" in str(path):
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(fluxfast.run.checkpoint, "_measure", broken)
    assert newest_checkpoint(tmp_path)[0] == 1 and "Input/output error" in log_lines[0]


def test_a_sound_manifest_over_nonsense_is_one_message(tmp_path):
    """Checksums are no signature: whoever writes the files writes them too."""
    folder = save(tmp_path, 1)
    wrong = ['{"$float": "x"}', '{"$tensor": "no"}', '{"$tuple": 3}', '{"$items": [1]}']
    wrong = [f'{{"format": 1, "a": {value}}}' for value in wrong]
    for content in (b"[]", b"\xff", b'{"a": 1}', *(text.encode() for text in wrong)):
        (folder / REST).write_bytes(content)
        with pytest.raises(FluxfastError, match="cannot be read"):
            read_state(folder)
    (folder / REST).write_bytes(b'{"format": 99}')
    with pytest.raises(FluxfastError, match="its format is 99"):
        read_state(folder)


def test_a_pickle_of_an_earlier_fluxfast_is_not_read(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"PK")
    with pytest.raises(FluxfastError, match="state.pt is a pickle, which is not read") as raised:
        newest_checkpoint(tmp_path)
    assert "--restart" in raised.value.hint and "lora.init_from" in raised.value.hint
    assert (folder / "state.pt").is_file()
