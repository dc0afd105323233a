"""Faults that were found by using fluxfast roughly, each with the way it was found."""

import io
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fluxfast import rng
from fluxfast.data.loader import Loader
from fluxfast.data.prepare import prepare
from fluxfast.errors import FluxfastError
from fluxfast.model.lora import fresh_update
from fluxfast.model.lora_linear import LoRALinear
from fluxfast.run.logger import RunLog
from fluxfast.train import train
from fluxfast.util.files import exclusive_lock
from fluxfast.util.terminal import log_to_terminal

ROOT = Path(__file__).parents[2]


@pytest.fixture
def configure(configure):
    """Shorter runs still."""
    short = {"log_every": 1, "train__steps": 2, "train__batch_size": 1, "save__every": 1}
    return partial(configure, **short)


def nf4_layer(width: int, seed: int) -> LoRALinear:
    torch.manual_seed(seed)
    layer = LoRALinear(width, width)
    layer.set_weight(torch.randn(width, width) / width**0.5, "nf4")
    return layer


def test_training_after_a_preview_in_inference_mode():
    """The decoding scratch was made there, and could not be written to outside."""
    result = []

    def work():  # a thread of its own starts without a scratch
        layer = nf4_layer(64, 0)
        layer.add_update(fresh_update(layer, 4, 4.0, [[(0, 64)]]))
        with torch.inference_mode():
            layer(torch.randn(2, 64))
        layer(torch.randn(2, 64, requires_grad=True)).sum().backward()
        result.append(layer.lora_B.grad is not None)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert result == [True]


def test_two_threads_may_use_nf4_layers_at_once():
    """They decoded into the same memory: nine results in ten were wrong."""
    x = torch.randn(8, 1024)
    layers = [nf4_layer(1024, seed) for seed in range(2)]
    expected = [layer(x) for layer in layers]
    wrong = []

    def work(layer, right):
        for _ in range(40):
            with torch.no_grad():
                if not torch.equal(layer(x), right):
                    wrong.append(layer)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(layers, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


HOLD = """
import sys
from pathlib import Path
from fluxfast.util.files import exclusive_lock
with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_two_processes_do_not_train_in_one_folder(configure):
    """They mixed their metrics and deleted each other's checkpoints."""
    config = configure()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(config.run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert holder.stdout.readline() == "held\n"
        for restart in (False, True):
            with pytest.raises(FluxfastError, match="another process"):
                train(config, restart=restart)
    finally:
        holder.kill()  # a lock ends with its process, however that ends
        holder.communicate()
    assert train(config).is_file()
    train(config, restart=True)
    assert (config.output_dir / "small.1" / "small.safetensors").is_file()


def test_a_lock_leaves_no_empty_folder(tmp_path):
    with exclusive_lock(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run").is_dir()
    assert not (tmp_path / "a" / "run").exists()
    with exclusive_lock(tmp_path / "b"):
        (tmp_path / "b" / "file").write_text("")
    assert (tmp_path / "b" / "file").exists()
    (tmp_path / "plain").write_text("")
    with (
        pytest.raises(FluxfastError, match="cannot write"),
        exclusive_lock(tmp_path / "plain" / "run"),
    ):
        pass


def test_other_optimizer_args_are_not_ignored(configure):
    """The checkpoint's own weight decay came back without a word."""
    train(configure())
    with pytest.raises(FluxfastError, match="optimizer_args"):
        train(configure(train__steps=3, train__optimizer_args={"weight_decay": 0.5}))


def test_indices_of_a_batch_are_made_on_the_device():
    """Same numbers for a range as for each index alone, on whatever path they are made."""
    for indices in ([7, 8, 9], [9, 7, 8], [5], [2**33, 2**33 + 1]):
        rows = rng.normal(3, "noise", indices, (4,))
        for index, row in zip(indices, rows, strict=True):
            assert torch.equal(row, rng.normal(3, "noise", index, (4,))[0])
    assert rng.uniform(3, "noise", [], (4,)).shape == (0, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_copy_waits_for_the_gpu(configure):
    dataset = prepare(configure(), torch.device("cpu")).dataset
    (batch,) = Loader(dataset, 2, 0, pin=True).iterate(0, 1)
    assert batch.t5.is_pinned() and batch.mean.is_pinned()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rng.normal(0, "noise", batch.indices, (4,), "cuda")
        batch.t5.to("cuda", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_bad_step_ends_no_run_that_logs_every_step(tmp_path):
    """With log_every: 1 the first step without a finite gradient was taken for a lost run."""
    one, nan = torch.tensor(1.0), torch.tensor(torch.nan)
    with RunLog(tmp_path, 0, 100, 1, torch.device("cpu"), most_bad=5) as log:
        for step in range(1, 9):
            bad = step % 4 != 0
            log.step(step, nan if bad else one, one, torch.tensor(float(bad)), 1e-4, 0)
        with pytest.raises(FluxfastError, match="no step from 9 to 13 had"):
            for step in range(9, 20):
                log.step(step, nan, nan, one, 1e-4, 0)
        assert step == 13


def test_foreign_lines_among_the_metrics_end_no_run(tmp_path):
    """As a crash of the system leaves them: zeros, halves, what another program wrote."""
    lines = [
        '{"step": 1, "loss": 1}',
        "{}",
        "[1]",
        "\0" * 40 + "}",
        '{"step": "x"}',
        "[" * 9999,
        '{"step": 1e999}',
        '{"step": 2, "loss": 1}',
        '{"step": 3}',
        '{"st',
    ]
    content = "\n".join(lines).encode() + b"\xff}\n"
    (tmp_path / "metrics.jsonl").write_bytes(content)
    RunLog(tmp_path, 2, 4, 1, torch.device("cpu"))
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert kept == [lines[0], lines[7]]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_progress_line_fits_the_terminal(tmp_path, width):
    """At 80 columns the step count was cut to `3…`."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, color_system=None)
    one, bad = torch.tensor(1.0), torch.tensor(0.0)
    cpu = torch.device("cpu")
    with log_to_terminal(console), RunLog(tmp_path, 11990, 12000, 1, cpu) as log:
        for step in range(11991, 12001):
            log.step(step, one, one, bad if step % 2 else one, 1e-4, 0)
    import re

    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert all(len(line) <= width for line in lines)
    assert "12000/12000" in lines[-1] and "loss 1.0000" in lines[-1]
    assert width < 80 or ("it/s" in lines[-1] and "ETA" in lines[-1])
