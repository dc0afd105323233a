"""Checkpoints: exact to the last bit, whole or not there, verified, and never a pickle."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from on_device import OnDevice

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

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    weights = [torch.randn(8, 3, generator=generator), torch.randn(5, generator=generator)]
    return {"step": step, "parameters": weights, "optimizer": {"lr": 0.1 / (1 + step)}}


def write_lora(folder: Path) -> None:
    (folder / "x.safetensors").write_bytes(b"a LoRA")


def save(run: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        folder = save_checkpoint(run, state(step), write_lora, keep)
    return folder


def same(one, other) -> bool:
    """Bit for bit, types too."""
    if isinstance(one, torch.Tensor):
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (one, other)]
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(*bits)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return type(one) is type(other) and all(same(*pair) for pair in pairs)
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and repr(one) == repr(other)


# ---------------------------------------------------------------- what is kept


def test_every_value_comes_back_to_the_last_bit(tmp_path):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1000, dtype=torch.float64, generator=generator)
    tensors = {str(dtype): values.to(dtype)[:24].view(2, 3, 4) for dtype in DTYPES}
    whole = {
        "step": 7,
        "floats": [
            *values.tolist(),
            5e-324,
            1.7976931348623157e308,
            -0.0,
            math.inf,
            -math.inf,
            math.nan,
        ],
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
    assert json.loads((folder / REST).read_text())  # no NaN, no Infinity: JSON as others read it
    assert "NaN" not in (folder / REST).read_text()


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


def test_saving_copies_one_tensor_at_a_time_to_the_host(tmp_path):
    """And makes nothing on the device: `OnDevice` can do no more."""
    OnDevice.copies, OnDevice.held = [], []
    values = [torch.randn(64, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    moments = {i: {"exp_avg": OnDevice(v), "step": 3} for i, v in enumerate(values)}
    whole = {"step": 1, "parameters": [OnDevice(v) for v in values], "optimizer": moments}
    folder = save_checkpoint(tmp_path, whole, write_lora, 1)
    assert len(OnDevice.held) == 12 and max(OnDevice.held) <= 1
    back = read_state(folder)
    assert all(same(a, b) for a, b in zip(back["parameters"], values, strict=True))
    with pytest.raises(AssertionError, match="clone would make"):
        OnDevice(values[0]).clone()


# ---------------------------------------------------------------- in which order


class Disk:
    """Sees what is done to the disk through `os` and `verify`, by path; refuses the nth of it."""

    def __init__(self, monkeypatch, refuse: int | None = None):
        self.events: list[tuple[str, str]] = []
        self.sizes: dict[str, int] = {}  # when they were flushed
        self.refuse = refuse
        for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        checked = fluxfast.run.checkpoint.verify
        monkeypatch.setattr(fluxfast.run.checkpoint, "verify", self._watched("verify", checked))

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

    def first(self, name: str, part: str) -> int:
        return next(i for i, (n, path) in enumerate(self.events) if n == name and part in path)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")


def lora_whole(folder: Path) -> None:
    fluxfast.util.files.write_atomic(folder / "x.safetensors", b"a LoRA")


@needs_proc
def test_the_order_in_which_a_checkpoint_reaches_the_disk(tmp_path, monkeypatch):
    """Every file flushed, then its folders, read back, renamed, the parent flushed; only then does
    the oldest go."""
    save(tmp_path, 1, 2)
    disk = Disk(monkeypatch)
    folder = save_checkpoint(tmp_path, state(3), lora_whole, 2)
    partial = f".{folder.name}.{os.getpid()}.partial"
    flushed = {
        path.rpartition(f"{partial}/")[2]: i
        for i, (name, path) in enumerate(disk.events)
        if name == "fsync" and partial in path
    }
    lora = next(name for name in flushed if name.startswith(".x.safetensors"))
    renamed = disk.first("rename", f"{partial} -> {folder}")
    assert flushed[lora] < disk.first("replace", "x.safetensors") < renamed
    written = [lora, TENSORS, REST, MANIFEST]
    assert [flushed[name] for name in written] == sorted(flushed[name] for name in written)
    inner, outer = disk.first("fsync", f"{partial}/state"), disk.first("fsync", partial)
    folders = [
        i for i, event in enumerate(disk.events) if event == ("fsync", str(folder.parent / partial))
    ]
    assert inner < renamed and outer < renamed
    assert flushed[MANIFEST] < folders[0] < disk.first("verify", partial) < renamed
    assert any(event == ("fsync", f"{folder.parent}/{partial}/state") for event in disk.events)
    parent = next(i for i, e in enumerate(disk.events) if e == ("fsync", str(folder.parent)))
    gone = disk.first("rename", f"{folder.parent}/step-00000001 ->")
    unlinked = [i for i, (name, _) in enumerate(disk.events) if name in ("unlink", "rmdir")]
    assert renamed < parent < gone < min(unlinked[1:], default=gone + 1)
    assert renamed < disk.events.index(("fsync", str(tmp_path))) < gone  # a first one's parent
    for name in (TENSORS, REST, MANIFEST):
        size = disk.sizes[f"{folder.parent}/{partial}/{name}"]
        assert size == (folder / name).stat().st_size, f"{name} was flushed before it was written"
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3]
    assert not list(folder.parent.glob(".*"))


@needs_proc
def test_a_disk_that_refuses_anywhere_leaves_a_sound_checkpoint(tmp_path):
    """Whatever single call fails: the newest sound checkpoint is the old one or the whole new one,
    and the next save works."""
    with pytest.MonkeyPatch.context() as patch:
        save(tmp_path / "count", 1)
        disk = Disk(patch)
        save_checkpoint(tmp_path / "count", state(2), lora_whole, 1)
    refused = 0
    for n in range(len(disk.events)):
        run = tmp_path / str(n)
        save(run, 1)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, refuse=n)
            try:
                save_checkpoint(run, state(2), lora_whole, 1)
            except DiskError as error:
                refused += 1
                assert "partial" not in str(error) and "No space left" in error.message
        step, folder = newest_checkpoint(run)
        assert same(read_state(folder)["parameters"], state(step)["parameters"])
        save(run, 3, keep=1)
        assert [step for step, _ in checkpoints(run)] == [3]
        fluxfast.util.files.drop_partials(folder.parent)  # as every start does
        assert [path.name for path in folder.parent.iterdir()] == ["step-00000003"]
    assert refused >= 10


def test_a_disk_that_gives_back_something_else_is_no_save(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def flips(folder):
        content = bytearray((folder / TENSORS).read_bytes())
        content[-1] ^= 1
        (folder / TENSORS).write_bytes(content)
        verify(folder)

    monkeypatch.setattr(fluxfast.run.checkpoint, "verify", flips)
    with pytest.raises(DiskError, match="gives back other than was written.*checksum"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert [step for step, _ in checkpoints(tmp_path)] == [1]


def test_a_process_killed_while_saving_leaves_nothing_that_counts(tmp_path):
    folder = save(tmp_path, 1)
    shutil.copytree(folder, folder.with_name(".step-00000002.123.partial"))
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    fluxfast.util.files.drop_partials(tmp_path / "checkpoints", tmp_path / "absent")
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000001"]


# ---------------------------------------------------------------- damage

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
    "a manifest that is no JSON": lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "a manifest that leads outside": lambda f: names(f / MANIFEST, "../../../etc/passwd"),
    "a manifest of what is no name": lambda f: names(f / MANIFEST, "a\0b"),
    "a manifest of what no system can name": lambda f: names(f / MANIFEST, "\ud800"),
    "another step's": lambda f: (
        shutil.rmtree(f),
        shutil.copytree(f.with_name("step-00000002"), f),
    ),
}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


def copied(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


def names(manifest: Path, file: str) -> None:
    entries = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**entries, file: entries[REST]}))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, kind, log_lines):
    save(tmp_path, 1, 2, 3)
    folder = tmp_path / "checkpoints" / "step-00000003"
    DAMAGE[kind](folder)
    assert newest_checkpoint(tmp_path) == (2, folder.with_name("step-00000002"))
    (line,) = log_lines
    assert "step-00000003 is damaged" in line and "step-00000002" in line and "\n" not in line
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2]
    assert folder.with_name("step-00000003.damaged").is_dir()
    # nothing is said again, and what comes later does not fall to it
    assert newest_checkpoint(tmp_path)[0] == 2
    save(tmp_path, 3, keep=1)
    assert newest_checkpoint(tmp_path)[0] == 3
    assert log_lines == [line]


def test_where_all_are_damaged_the_newest_is_named_and_stays(tmp_path, log_lines):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        flip(tmp_path / "checkpoints" / f"step-{step:08d}" / TENSORS, -1)
    with pytest.raises(Damaged, match="step-00000002 is damaged.*checksum") as raised:
        newest_checkpoint(tmp_path)
    assert "--restart" in raised.value.hint and not log_lines
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2]


def test_a_checkpoint_that_is_newer_than_the_one_saved_is_not_counted(tmp_path):
    """Of `keep`, which would otherwise be used up by what the run did not go on from."""
    save(tmp_path, 9)
    save(tmp_path, 1, 2, 3, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3, 9]


def test_an_unreadable_disk_is_damage(tmp_path, monkeypatch, log_lines):
    save(tmp_path, 1, 2)

    def broken(path):
        if "step-00000002" in str(path):
            raise OSError(5, "Input/output error")
        return real(path)

    real = fluxfast.run.checkpoint._measure
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
