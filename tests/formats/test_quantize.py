"""`fluxfast quantize` writes what loading with that storage makes, byte for byte, in little memory,
whole or not at all."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import (
    bnb_tensors,
    fp8_tensors,
    split_tensors,
    tensors_of,
    write,
    write_gguf,
)
from safetensors.torch import load_file

from fluxfast import load_transformer
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base import quantize as module
from fluxfast.formats.base.load import choose_precision
from fluxfast.formats.base.quantize import STORAGES, quantize, verify
from fluxfast.formats.base.reader import open_base
from fluxfast.formats.container import tensor_bytes
from fluxfast.formats.opened import Files
from fluxfast.memory.planner.step_spec import shape_of
from fluxfast.model.names import linear_shape, part_rows, tensor_sources
from fluxfast.model.spec import DEV, FluxSpec
from fluxfast.run.interrupt import SIGNALS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tensors():
    return tensors_of()


@pytest.fixture(scope="module")
def source(tmp_path_factory, tensors) -> Path:
    return write(tmp_path_factory.mktemp("source") / "flux.safetensors", tensors)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    from small import noise_pictures

    return noise_pictures(tmp_path_factory.mktemp("photos"), 2, "ohwx thing")


def load(path: Path, storage: str = "auto", **options):
    return load_transformer(path, storage, "fp32", "cpu", **options)


def same_state(model, other) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and mine[name].shape == tensor.shape, name
        bits = (t.contiguous().view(torch.uint8) for t in (mine[name].flatten(), tensor.flatten()))
        assert torch.equal(*bits), name


@pytest.mark.parametrize(
    "storage, nested", [("nf4", False), ("nf4", True), ("int8", False), ("fp8", False)]
)
def test_loading_the_file_equals_quantizing_at_load(tmp_path, source, storage, nested):
    target = tmp_path / "q.safetensors"
    summary = quantize(source, target, storage, double_quant=nested)
    assert summary.startswith(f"{target.stat().st_size / 1e9:.3g} GB in {storage}")
    model = load(target)
    assert model.single_blocks[0].linear1.storage() == storage
    same_state(model, load(source, storage, double_quant=nested))


SOURCES = {
    "diffusers": lambda t: split_tensors(t),
    "fp32": lambda t: {k: v.float() for k, v in t.items()},
    "fp16": lambda t: {k: v.half() for k, v in t.items()},
    "fp64": lambda t: {k: v.double() for k, v in t.items()},
    "fp8": lambda t: fp8_tensors(t, scaled=False),
    "fp8 scaled": lambda t: fp8_tensors(t, scaled=True),
    "e5m2": lambda t: fp8_tensors(t, scaled=True, dtype=torch.float8_e5m2),
    "all in one": lambda t: checkpoints.all_in_one(fp8_tensors(t, scaled=True)),
    "nf4": lambda t: bnb_tensors(t, nested=False),
    "nf4 nested": lambda t: bnb_tensors(t, nested=True),
    "nf4 split": lambda t: bnb_tensors(split_tensors(t), nested=False),
    "nf4 nested split": lambda t: bnb_tensors(split_tensors(t), nested=True),
    "nf4 in part": lambda t: bnb_tensors(split_tensors(t), nested=True, skip=("to_k", "norm")),
    "fp4": lambda t: bnb_tensors(t, nested=True, kind="fp4"),
}


@pytest.mark.grid(5)
@pytest.mark.parametrize(
    "form, storage",
    [  # by default each form once, each storage with a third of them
        pytest.param(form, storage, marks=() if (i - j) % 3 == 0 else pytest.mark.slow)
        for i, form in enumerate(SOURCES)
        for j, storage in enumerate(STORAGES)
    ],
)
def test_any_input(tmp_path, tensors, form, storage):
    """The source and the file load as the same weights, bit for bit."""
    source = write(tmp_path / "a", SOURCES[form](tensors))
    quantize(source, tmp_path / "b", storage)
    theirs, mine = load(source, storage), load(tmp_path / "b", storage)
    for name, layer in theirs.named_modules():
        if hasattr(layer, "storage"):
            other = mine.get_submodule(name)
            assert other.storage() == layer.storage()
            dense, expected = (each.dequantize(torch.float32) for each in (other, layer))
            assert torch.equal(dense, expected) and torch.equal(other.bias, layer.bias), name
    scales = (model.single_blocks[0].norm.key_norm.scale for model in (theirs, mine))
    assert torch.equal(*scales)


def test_gguf_goes_in(tmp_path, tensors):
    write_gguf(tmp_path / "a.gguf", tensors, "Q8_0")
    quantize(tmp_path / "a.gguf", tmp_path / "b", "nf4")
    same_state(load(tmp_path / "b"), load(tmp_path / "a.gguf", "nf4"))


def test_quantized_matrices_pass_through(tmp_path, tensors):
    """Nothing is quantized twice: the bytes are the source's, nested scales too."""
    coded = bnb_tensors(tensors, nested=True)
    quantize(write(tmp_path / "a", coded), tmp_path / "b", "nf4")
    stored = load_file(tmp_path / "b")
    name = "double_blocks.0.img_mlp.0.weight"
    for key in (name, *(f"{name}.{part}" for part in ("absmax", "nested_absmax", "quant_map"))):
        assert torch.equal(stored[key], coded[key]), key
    fp8 = fp8_tensors(tensors, scaled=True)
    quantize(write(tmp_path / "c", fp8), tmp_path / "d", "fp8")
    stored = load_file(tmp_path / "d")
    assert torch.equal(stored[name].view(torch.uint8), fp8[name].view(torch.uint8))


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_reads_it(tmp_path, source, nested):
    """Its own parser dequantizes the file's tensors to the same weights."""
    import bitsandbytes.functional as bnb

    quantize(source, tmp_path / "b", "nf4", double_quant=nested)
    stored = load_file(tmp_path / "b")
    name = "single_blocks.0.linear2.weight"
    parts = {k.removeprefix(name + "."): v for k, v in stored.items() if k.startswith(name + ".")}
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    state.dtype = torch.float32
    with open_base(tmp_path / "b") as base:
        mine = base.read(name)
    theirs = bnb.dequantize_4bit(stored[name], state)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_quantizing_a_quantized_file(tmp_path, source):
    """From one storage to another; nf4 to nf4 changes only the source's name."""
    quantize(source, tmp_path / "a", "nf4")
    quantize(tmp_path / "a", tmp_path / "b", "nf4")
    assert load_file(tmp_path / "a").keys() == load_file(tmp_path / "b").keys()
    same_state(load(tmp_path / "a"), load(tmp_path / "b"))
    quantize(tmp_path / "a", tmp_path / "c", "int8")
    same_state(load(tmp_path / "c"), load(tmp_path / "a", "int8"))


def test_rows_that_nf4_cannot_hold_stay_bf16(tmp_path):
    source = write(tmp_path / "a", tensors_of(checkpoints.ODD))
    quantize(source, tmp_path / "b", "nf4")
    same_state(load(tmp_path / "b", "nf4"), load(source, "nf4"))


@pytest.mark.parametrize(
    "storage, compute, stored, expected",
    [
        ("auto", "auto", "nf4", "nf4"),
        ("auto", "int8", "nf4", "nf4"),
        ("auto", "int8", "int8", "int8"),
        ("auto", "auto", None, "fp32"),
        ("auto", "fp8", "int8", "fp32"),
        ("auto", "int8", "fp8", "fp32"),
        ("bf16", "auto", "nf4", "bf16"),
        ("int8", "auto", "fp8", "int8"),
    ],
)
def test_auto_takes_the_files_storage(storage, compute, stored, expected):
    assert choose_precision(storage, compute, None, 0.0, True, stored)[0] == expected


def test_plans_use_the_files_storage(tmp_path, source, configure, nano_model):
    from fluxfast.data.prepare import resolve_parts
    from fluxfast.tools.plan import plan_run

    quantize(source, tmp_path / "q", "nf4")
    config = configure(
        model__path=str(tmp_path / "q"),
        model__encoders=str(nano_model),
        model__storage="auto",
        memory__limit_gib=8,
    )
    device = torch.device("cpu")
    model = resolve_parts(config.model, device).model
    plan = plan_run(config, model, {"64": shape_of(64, 64, 1, 32)}, device)
    assert plan.request.step.storage == "nf4"


def test_training_starts_from_the_file(tmp_path, configure, nano_model):
    """`train` learns the same from it as from the folder in that storage."""
    from fluxfast.train import train

    quantize(nano_model, tmp_path / "nano.safetensors", "int8")
    files = {}
    for storage, path in (("int8", nano_model), ("auto", tmp_path / "nano.safetensors")):
        config = configure(
            name=storage,
            model__path=str(path),
            model__storage=storage,
            model__encoders=str(nano_model),
            train__steps=2,
        )
        files[storage] = load_file(train(config))
    assert all(torch.equal(files["auto"][k], v) for k, v in files["int8"].items())
    assert any(v.abs().max() > 0 for k, v in files["auto"].items() if "lora_B" in k)


# ---------------------------------------------------------------- the file


def test_metadata_and_checksum(tmp_path, source):
    quantize(source, tmp_path / "b", "int8")
    with Files([tmp_path / "b"]) as files:
        metadata, tensors = files.metadata, files.entries
        digests = [
            hashlib.sha256(tensor_bytes(files.read(key))).digest() for key in sorted(tensors)
        ]
        assert verify(files)
    assert metadata["fluxfast.storage"] == "int8" and metadata["fluxfast.source"] == source.name
    assert metadata["fluxfast.sha256"] == hashlib.sha256(b"".join(digests)).hexdigest()
    content = bytearray((tmp_path / "b").read_bytes())
    content[-7] ^= 1
    (tmp_path / "b").write_bytes(content)
    with Files([tmp_path / "b"]) as files:
        assert not verify(files)


def test_every_tensor_is_aligned(tmp_path, source):
    quantize(source, tmp_path / "b", "nf4", double_quant=True)
    content = (tmp_path / "b").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    assert (8 + length) % 64 == 0
    for entry in header.values():
        width = {"F32": 4, "BF16": 2, "U8": 1}[entry["dtype"]]
        assert entry["data_offsets"][0] % width == 0


def test_progress_ends_at_the_last_tensor(tmp_path, source, tensors):
    seen = []
    quantize(source, tmp_path / "b", progress=lambda *pair: seen.append(pair))
    assert seen == [(i + 1, len(tensors)) for i in range(len(tensors))]


# ---------------------------------------------------------------- whole or not at all


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_wrong_arguments(tmp_path, source):
    (tmp_path / "b").write_bytes(b"mine")
    for target, storage, nested, message in (
        (tmp_path / "b", "nf4", False, "is there already"),
        (tmp_path, "nf4", False, "is a folder\nhint: name the file to write"),
        (tmp_path / "c", "q8", False, "'q8' is not one of nf4, int8, fp8"),
        (tmp_path / "c", "int8", True, "double_quant goes with nf4"),
        (tmp_path / "c", "fp8", True, "double_quant goes with nf4"),
    ):
        with pytest.raises(ConfigError, match=message):
            quantize(source, target, storage, double_quant=nested)
    with pytest.raises(FluxfastError, match="cannot write into .*/b"):
        quantize(source, tmp_path / "b" / "c")
    assert (tmp_path / "b").read_bytes() == b"mine" and left(tmp_path) == ["b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(28, "disk full")])
def test_a_failure_leaves_no_file(tmp_path, source, monkeypatch, error):
    seen = []

    def stop(done: int, total: int) -> None:
        if done == total // 2:
            seen.extend(left(tmp_path))
            raise error

    with pytest.raises((KeyboardInterrupt, RuntimeError, OSError, FluxfastError)):
        quantize(source, tmp_path / "b", progress=stop)
    assert len(seen) == 1 and seen[0].endswith(".partial")  # there was something to remove
    assert left(tmp_path) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_between_two_tensors(tmp_path, source, monkeypatch, fluxfast, number):
    """Ctrl-C, `kill`, a closed terminal: no file is cut off, none is left."""

    def unheard(signum, frame):
        raise AssertionError("not handled")

    seen = []

    def asked(name, weight):
        if not seen:
            os.kill(os.getpid(), number)
        seen.append(left(tmp_path))
        return nf4_tensors(name, weight)

    nf4_tensors = module.nf4_tensors
    monkeypatch.setattr(module, "nf4_tensors", asked)
    before = signal.signal(number, unheard)
    try:
        code, out, err = fluxfast("quantize", source, tmp_path / "b")
        assert signal.getsignal(number) is unheard
    finally:
        signal.signal(number, before)
    assert (code, out) == (130, "") and "stopped; nothing was written" in err
    assert [name.endswith(".partial") for (name,) in seen] == [True]
    assert left(tmp_path) == []


def test_a_full_disk(tmp_path, source, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(FluxfastError, match="GB free"):
        quantize(source, tmp_path / "b")
    assert left(tmp_path) == []


# ---------------------------------------------------------------- memory

MEMORY = """
import sys, threading, time
import torch, gguf, fluxfast.formats.base.quantize as q
from fluxfast import load_transformer

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(li.split()[1]) for li in lines if li.startswith("RssAnon")) / 1024

peak, stop = [0.0], threading.Event()

def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

torch.set_num_threads(2)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
work, source, target, storage = sys.argv[1:]
if work == "load":
    model = load_transformer(source, "auto", "fp32", "cpu")
else:
    q.quantize(source, target, storage)
stop.set(), thread.join()
print(before, peak[0])
"""


def peak_over_start(work: str, source: Path, target: Path, storage: str) -> float:
    """Returns the MiB of RssAnon that the work adds, in a process of its own."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, work, str(source), str(target), storage],
        env={**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, peak = map(float, done.stdout.split())
    return peak - before


# hidden 1024: its largest matrix (linear1, 7168 x 1024) is 28 MiB in fp32, the whole file 220 MiB
MEDIUM = FluxSpec(
    in_channels=64,
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=1024,
    num_heads=8,
    depth=2,
    depth_single_blocks=4,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "storage, mib", [("nf4", 40), pytest.param("int8", 60, marks=pytest.mark.slow)]
)
def test_memory_stays_small(tmp_path, storage, mib):
    """It takes a few copies of one matrix, not of the file."""
    source = write(tmp_path / "a", tensors_of(MEDIUM))
    size = source.stat().st_size / 2**20
    assert size > 200
    assert peak_over_start("quantize", source, tmp_path / "b", storage) < mib
    if storage == "nf4":  # mapped: biases, the layers around the blocks and nothing of the codes
        assert peak_over_start("load", tmp_path / "b", tmp_path, storage) < 40


@pytest.mark.slow
def test_memory_of_the_12_billion(tmp_path):
    """FLUX.1-dev's sizes, written by hand one shard at a time, removed as soon as it is read."""
    if shutil.disk_usage(tmp_path).free < 45e9:
        pytest.skip("needs 45 GB of disk")
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"_class_name": "FluxTransformer2DModel", **checkpoints.config_of(DEV)}
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensor_sources(DEV))
    try:
        for start in range(0, len(names), 60):
            shard = {}
            for name in names[start : start + 60]:
                module, _, kind = name.rpartition(".")
                rows, columns = linear_shape(module, DEV) if kind != "scale" else (128, 1)
                shape = (rows, columns) if kind == "weight" else (rows,)
                values = torch.full(shape, 0.5, dtype=torch.bfloat16)
                values.view(-1)[::64].uniform_(-1, 1)  # cheap, and every block differs
                sources = tensor_sources(DEV)[name]
                parts = part_rows(module, DEV) if len(sources) > 1 else [(0, rows)]
                for source, (first, last) in zip(sources, parts, strict=True):
                    shard[source] = values[first:last].clone()
            write(folder / f"part-{start:04d}.safetensors", shard)
            del shard
        target = tmp_path / "nf4.safetensors"
        assert peak_over_start("quantize", folder, target, "nf4") < 2048
        shutil.rmtree(folder)
        assert peak_over_start("load", target, tmp_path, "nf4") < 2048
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
