"""The kill test itself: it passes, and catches the faults that it is for."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from bench import faults

ROOT = Path(__file__).resolve().parents[2]
needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="no fork")


def finished(folder: Path) -> Path:
    """A folder as a finished run leaves it."""
    run = faults.prepare(folder) / "runs" / faults.NAME
    kept = run / "checkpoints" / "step-00000024"
    for path in (run / "faults.safetensors", kept / "faults.safetensors", kept / "manifest.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
    rows = [{"step": step, "loss": 1.0, "s_per_it": step} for step in (3, 6)]
    for name in ("metrics.jsonl", "validation.jsonl"):
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


HARM = {
    "a LoRA differs": lambda run: (run / "faults.safetensors").write_bytes(b"weighty"),
    "a step is missing": lambda run: (run / "metrics.jsonl").write_text('{"step": 3}\n'),
    "a step is there twice": lambda run: append(run / "validation.jsonl", '{"step": 6}\n'),
    "a file is left": lambda run: (run / ".faults.safetensors.12.partial").touch(),
    "a file is left in the cache": lambda run: (run.parent / ".a.safetensors.7.partial").touch(),
    "a file is gone": lambda run: (run / "checkpoints/step-00000024/manifest.json").unlink(),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_noticed(tmp_path, harm):
    undisturbed, run = finished(tmp_path / "a"), finished(tmp_path / "b")
    rows = run / "runs" / faults.NAME / "metrics.jsonl"
    rows.write_text(rows.read_text().replace('"s_per_it": 3', '"s_per_it": 9'))
    assert faults.difference(run, undisturbed) is None
    HARM[harm](run / "runs" / faults.NAME)
    assert faults.difference(run, undisturbed) is not None


@pytest.mark.parametrize(
    ("resumed", "fault"),
    [(24, None), (20, "resumed at step 20, step 24 was saved"), (None, "began anew, step 24")],
)
def test_resuming_before_a_checkpoint_is_noticed(tmp_path, monkeypatch, resumed, fault):
    """After a kill that left the checkpoint of step 24, and a damaged one."""
    finished(tmp_path / "a")

    def start(folder: Path, log: Path) -> None:
        if log.name == "log-0.txt":
            shutil.copytree(tmp_path / "a" / "runs", folder / "runs")
            (folder / "runs" / faults.NAME / "checkpoints/step-00000030.damaged").mkdir()
        elif resumed:
            log.write_text(f"reading images: 5\nresuming runs/faults at step {resumed}\n")

    monkeypatch.setattr(faults, "drop_cached", lambda *_: None)
    monkeypatch.setattr(faults, "start", start)
    monkeypatch.setattr(faults, "kill_at", lambda *_: None)
    monkeypatch.setattr(faults, "finish", lambda _: 0)
    counts = defaultdict(Counter)
    rng = random.Random(0)
    killed, found = faults.play(tmp_path / "run", tmp_path / "a", 1, rng, counts)
    assert killed == 1 and (found or "").startswith(fault or "") and bool(found) == bool(fault)
    assert sum(count["lost"] for count in counts.values()) == bool(fault)


def run_bench(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own, which forks before it has computed anything."""
    program = f"{code}\nimport sys\nfrom bench import faults\nsys.exit(faults.main(sys.argv[1:]))"
    env = {"PATH": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@needs_fork
@pytest.mark.slow
def test_fifty_kills():
    done = run_bench("")
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.splitlines()[-2].split()
    assert total[:3] == ["in", "all", "50"] and total[-2:] == ["50", "0"]


KEEPS_ROWS = """
from fluxfast.run import logger
logger.write_atomic = lambda path, data: None
"""


@needs_fork
@pytest.mark.slow
def test_a_fault_is_caught():
    """A log that is not taken back to the checkpoint has steps twice."""
    done = run_bench(KEEPS_ROWS, "--kills", "12")
    assert done.returncode == 1 and "metrics.jsonl differs" in done.stdout, done.stdout
