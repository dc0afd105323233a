"""Several processes train what one trains: the same steps up to rounding, one of them writes, and
what one that dies leaves goes on in any number of them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from small import noise_pictures, small_run
from small_runs import CPU

from fluxfast import distributed
from fluxfast.cli import interruptible
from fluxfast.config.schema import Config, dump_config
from fluxfast.data.loader import Loader
from fluxfast.data.prepare import prepare
from fluxfast.data.store import read_tensors, write_tensors
from fluxfast.distributed import SINGLE_PROCESS, Ranks
from fluxfast.errors import ConfigError, FluxfastError, LostRank
from fluxfast.formats.base.load import resolve_device
from fluxfast.memory.planner.suggest import host_memory
from fluxfast.run.checkpoint import MANIFEST, checkpoints
from fluxfast.run.interrupt import Stopped
from fluxfast.run.saves import Saves
from fluxfast.train import train
from fluxfast.util.files import read_rows

ROOT = Path(__file__).parents[2]
STEPS, TIMEOUT = 12, 150  # the latter in seconds
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return noise_pictures(tmp_path_factory.mktemp("photos"), 7, "a picture")


@pytest.fixture(scope="module")
def made(nano_model, photos, tmp_path_factory):
    """Returns make(output_dir, train__lr=…): a run's configuration; all have one cache."""
    cache = tmp_path_factory.mktemp("cache")
    common = {
        "cache_dir": str(cache),
        "log_every": 1,
        "lora__dropout": 0.1,
        "data.0.resolution": [64, 96],
        "data.0.caption_dropout": 0.3,
        "train__steps": STEPS,
        "train__batch_size": 4,
        "train__ema": {"enabled": True},
        "save__every": 4,
        "validation": {"share": 0.2, "every": 6, "timesteps": 1},
    }
    return lambda output, **changes: small_run(
        nano_model, photos, output, cache, **{**common, **changes}
    )


class Torchrun:
    """Two processes that train; their output goes to OUTPUT_DIR/log.txt."""

    def __init__(self, config: Config, *options: str):
        self.config = config
        config.output_dir.mkdir(parents=True, exist_ok=True)
        file = config.output_dir / "config.yaml"
        file.write_text(dump_config(config), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
        with open(config.output_dir / "log.txt", "a") as log:
            self.process = subprocess.Popen(
                [*command, "--standalone", "-m", "fluxfast", "train", str(file)],
                env={**os.environ, **ENVIRONMENT},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return (self.config.output_dir / "log.txt").read_text(encoding="utf-8")

    def end(self) -> int:
        """Wait for the exit code."""
        try:
            return self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(f"still running: {self.log}")

    def signal(self, rank: int, number: int, after_step: int) -> None:
        """Signal the process of a rank when that step's line is written."""
        until = time.monotonic() + TIMEOUT
        while not any(row["step"] >= after_step for row in rows(self.config)):
            if self.process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"no step {after_step}: {self.log}")
            time.sleep(0.01)
        pid = self.process.pid
        (target,) = (
            child
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0")
        )
        os.kill(int(target), number)


def rows(config: Config, name: str = "metrics") -> list[dict]:
    return read_rows(config.run_dir / f"{name}.jsonl")


def assert_same_but_for_rounding(config: Config, other: Config) -> None:
    for name in ("metrics", "validation"):
        pair = rows(config, name), rows(other, name)
        assert [row["step"] for row in pair[0]] == [row["step"] for row in pair[1]]
        for key in ("loss", "grad_norm", "difference"):
            values = [[row[key] for row in each if key in row] for each in pair]
            assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6), key
    for name in ("small.safetensors", "small_ema.safetensors"):
        one, two = (load_file(each.run_dir / name) for each in (config, other))
        assert one.keys() == two.keys()
        far = max(((one[key] - two[key]).norm() / one[key].norm()).item() for key in one)
        assert far < 1e-3, far


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory) -> Config:
    """The run in one process, and its cache."""
    config = made(tmp_path_factory.mktemp("alone"))
    train(config)
    return config


linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(made, alone, tmp_path):
    config = made(tmp_path, cache_dir=str(tmp_path / "cache"))
    run = Torchrun(config)
    assert run.end() == 0, run.log
    assert_same_but_for_rounding(config, alone)
    assert "2 processes, each takes 2 of 4 samples" in run.log
    # only rank 0 logs and writes: no line twice, and no file that one process did not write
    lines = [line for line in run.log.splitlines() if line.startswith(("step ", "validation at"))]
    assert len(lines) == len(set(lines)) >= STEPS
    assert run.log.count(str(config.run_dir / "small.safetensors")) == 2  # logged, and the result
    ours, theirs = (
        {path.relative_to(each.run_dir) for path in each.run_dir.rglob("*")}
        for each in (config, alone)
    )
    assert {path for path in ours ^ theirs if path.parts[0] != "tensorboard"} == set()
    assert len(list((config.run_dir / "tensorboard").iterdir())) == 1
    # each encodes its share: rank 0, which logs how much, not all, and all is there
    for kind, label in (("latents", "images"), ("text", "captions")):
        cached, whole = (
            {path.name for path in (each.cache_path / kind).iterdir()} for each in (config, alone)
        )
        assert cached == whole
        own = sum(Ranks(0, 2).owns(name) for name in whole)
        assert f"encoding {label}: {own}\n" in run.log and 0 < own < len(whole)


@pytest.mark.slow
@linux
def test_a_rank_that_dies_ends_the_run_and_any_number_goes_on(made, alone, tmp_path):
    config = made(tmp_path / "two")
    run = Torchrun(config)
    run.signal(1, signal.SIGKILL, after_step=5)
    assert run.end() != 0
    assert "error: another process of this run has ended" in run.log
    assert f'File "{ROOT / "fluxfast"}' not in run.log  # torchrun's own traceback alone
    assert not list(config.run_dir.rglob(".*.partial"))
    saved = checkpoints(config.run_dir)[-1][0]
    assert 5 <= saved < STEPS  # not only what was due at step 4
    shutil.copytree(config.output_dir, tmp_path / "one")
    one = made(tmp_path / "one")
    train(one)
    assert_same_but_for_rounding(one, alone)

    # torchrun may start them anew by itself; this time it is rank 0 that dies
    run = Torchrun(config, "--max-restarts", "1")
    run.signal(0, signal.SIGKILL, after_step=saved + 1)
    assert run.end() == 0, run.log
    assert run.log.count(f"resuming {config.run_dir} at step") == 2
    assert_same_but_for_rounding(config, alone)


@pytest.mark.slow
@linux
def test_asked_to_stop_all_ranks_stop_after_the_same_step(made, alone, tmp_path):
    config = made(tmp_path)
    run = Torchrun(config)
    run.signal(1, signal.SIGTERM, after_step=2)  # rank 0 learns it from the other
    assert run.end() == 0
    (step, _), *_ = checkpoints(config.run_dir)
    assert 2 <= step < STEPS
    line = f"stopped after step {step} of {STEPS}, which is saved; to go on: torchrun"
    assert run.log.count(line) == 1
    train(config)
    assert_same_but_for_rounding(config, alone)


@pytest.mark.slow
def test_the_diagnosis_is_of_every_ranks_samples(made, alone, tmp_path):
    cache = shutil.copytree(alone.cache_path, tmp_path / "cache")
    config = made(tmp_path, cache_dir=str(cache), train__max_bad_steps=3)
    dataset = prepare(config, CPU).dataset
    for sample in dataset.samples:
        tensors = read_tensors(sample.latents, ("mean", "std"))
        write_tensors(sample.latents, {**tensors, "mean": tensors["mean"] * float("nan")})
    run = Torchrun(config)
    assert run.end() != 0
    names = dict.fromkeys(Loader(dataset, 4, config.seed).batch(0).names)
    text = (config.run_dir / "diagnosis.txt").read_text(encoding="utf-8")
    assert [line.split(":")[0] for line in text.splitlines()] == [f"step 1, {n}" for n in names]
    assert "error: no step from 1 to 3 had a finite loss and gradient" in run.log


PAIR = """
import os, sys, time, torch
from fluxfast.errors import ConfigError, LostRank
from fluxfast.distributed import init_distributed

with init_distributed() as ranks:
    assert (ranks.rank, ranks.world_size) == (int(os.environ["RANK"]), 2)
    assert ranks.all_gather_json({"a": "é" * ranks.rank, "rank": ranks.rank}) == [
        {"a": "", "rank": 0}, {"a": "é", "rank": 1}
    ]
    assert [ranks.any(flag) for flag in (False, ranks.is_main, not ranks.is_main, True)] == [
        False, True, True, True
    ]
    one, two = torch.tensor([1.0, float(ranks.rank)]), torch.tensor(2 + ranks.rank)
    ranks.all_reduce_(one, two)
    assert one.tolist() == [2.0, 1.0] and two.item() == 5
    ranks.check_same("color", "red")
    try:
        ranks.check_same("their color", "red" if ranks.is_main else "blue")
        sys.exit("not noticed")
    except ConfigError as error:
        assert "differ in their color: rank 1" in error.message
    with ranks.main_process_first():
        if ranks.is_main:
            time.sleep(0.3)
            open("first", "w").close()
        assert os.path.exists("first")
    if not ranks.is_main:
        os._exit(0)
    try:
        ranks.barrier()
        sys.exit("not noticed")
    except LostRank as error:
        assert error.message.startswith("another process of this run has ended: ")
        assert "gloo/" not in error.message
        print("lost", flush=True)
        os._exit(0)
"""


def test_two_ranks_exchange_values_and_notice_a_lost_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR],
            cwd=tmp_path,
            env={**ENVIRONMENT, **address, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [process.communicate(timeout=TIMEOUT) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    assert ends[0][0] == "lost\n"


def test_one_process_waits_for_nobody():
    with distributed.init_distributed() as ranks:
        assert ranks == SINGLE_PROCESS
    assert ranks.is_main and not ranks.any(False) and ranks.any(True)
    assert ranks.all_gather_json({"a": 1}) == [{"a": 1}]
    value = torch.ones(3)
    ranks.all_reduce_(value)
    ranks.barrier()
    ranks.check_same("color", "red")
    with ranks.main_process_first():
        assert torch.equal(value, torch.ones(3))


@pytest.mark.slow
def test_restart_is_for_the_first_start_not_for_torchruns_next(made, tmp_path, monkeypatch):
    config = made(tmp_path, train__steps=1)
    train(config)
    for count, folders in (("1", ["small"]), ("0", ["small", "small.1"])):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        train(config, restart=True)
        assert sorted(path.name for path in config.output_dir.iterdir()) == folders


def test_ranks_that_see_other_checkpoints_are_refused(made, tmp_path, monkeypatch):
    """Such as on two machines that share no output_dir, of which rank 0's alone has one."""
    config = made(tmp_path, train__steps=1)
    train(config)
    manifest = (checkpoints(config.run_dir)[-1][1] / MANIFEST).read_text()
    monkeypatch.setattr(
        Ranks, "all_gather_json", lambda self, own: [own, "" if own == manifest else own]
    )
    with pytest.raises(ConfigError, match="differ in the checkpoint they go on from: rank 1"):
        train(config)


def test_no_rank_leaves_before_the_first_has_saved_what_a_stop_leaves(made, tmp_path, monkeypatch):
    """Else its GPU might wait for theirs for ever, and exit code 0 would promise too much."""
    seen, stop = [], threading.Event()
    stop.set()
    monkeypatch.setattr("fluxfast.train.stop_on_signals", lambda: nullcontext(stop))
    save, wait = Saves.save, Ranks.barrier
    monkeypatch.setattr(Saves, "save", lambda *args: (save(*args), seen.append("saved")))
    monkeypatch.setattr(Ranks, "barrier", lambda ranks: (wait(ranks), seen.append("waited")))
    with pytest.raises(Stopped):
        train(made(tmp_path, save__every=0, validation__share=0))
    assert seen[-2:] == ["saved", "waited"]


def test_torchruns_signal_does_not_hide_that_a_rank_was_lost():
    with pytest.raises(LostRank, match="another has ended"), interruptible():
        try:
            raise LostRank("another has ended")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("rank, start", [("0", ""), ("1", "rank 1: ")])
def test_a_rank_that_is_stopped_names_itself(monkeypatch, capsys, rank, start):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(typer.Exit), interruptible("go on"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert capsys.readouterr().err == f"{start}stopped; go on\n"


def test_ranks_share_every_batch_and_every_key():
    assert [list(Ranks(rank, 3).shard(6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ConfigError, match="a batch of 4 .*: 3 processes cannot share"):
        Ranks(0, 3).shard(4)
    keys = [f"{number * 2654435761 % 2**32:08x}abc" for number in range(300)]
    owners = [[rank for rank in range(3) if Ranks(rank, 3).owns(key)] for key in keys]
    assert all(len(each) == 1 for each in owners)
    assert min(owners.count([rank]) for rank in range(3)) > 60


def test_loaders_of_the_ranks_read_the_batch_of_one(made, tmp_path):
    dataset = prepare(made(tmp_path), CPU).dataset
    whole = Loader(dataset, 4, seed=3)
    parts = [Loader(dataset, 4, seed=3, shard=Ranks(rank, 2).shard) for rank in range(2)]
    for number in (0, 1, 7):
        batch, halves = whole.batch(number), [part.batch(number) for part in parts]
        assert batch.names == halves[0].names + halves[1].names
        assert batch.indices == halves[0].indices + halves[1].indices
        for key in ("mean", "std", "t5", "pooled"):
            both = torch.cat([getattr(half, key) for half in halves])
            assert torch.equal(getattr(batch, key), both)
    assert whole.fingerprint == parts[1].fingerprint


def test_buffers_on_the_device_are_allocated_before_its_free_memory_is_planned_with(
    made, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        Ranks, "all_reduce_", lambda ranks, *tensors: seen.extend(t.device.type for t in tensors)
    )
    monkeypatch.setattr("fluxfast.train.plan_run", lambda *args: seen.append("planned"))
    train(made(tmp_path, train__steps=1))
    assert seen[:2] == ["cpu", "planned"]


@pytest.mark.parametrize("nccl, backend", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_gloo_alone_where_torch_knows_gpus_but_no_nccl(monkeypatch, nccl, backend):
    requested = []

    def new_group(timeout, backend):
        requested.append(backend)
        raise RuntimeError("enough")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    monkeypatch.setattr(distributed, "_init_process_group", requested.append)
    error = pytest.raises(FluxfastError, match="do not find each other: enough")
    with error, distributed.init_distributed():
        pytest.fail("went on")
    assert requested == [backend, backend]


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("auto", "cuda", "cuda:1"):
        assert resolve_device(name) == torch.device("cuda:1") == taken[-1]
    with pytest.raises(ConfigError, match="device 'cuda:0' is one GPU, and 2 processes"):
        resolve_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="device 'cuda:2' is not there: torch sees 2"):
        resolve_device("auto")


def test_processes_on_a_machine_share_its_memory(monkeypatch):
    whole = host_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_memory() == pytest.approx(whole / 4, rel=0.2)  # others use memory meanwhile
