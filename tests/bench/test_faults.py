"""The kill test itself: it passes, and what it is to catch it catches."""

import json
import subprocess
import sys
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


HARM = {
    "a LoRA differs": lambda run: (run / "faults.safetensors").write_bytes(b"weighty"),
    "a step is missing": lambda run: (run / "metrics.jsonl").write_text('{"step": 3}\n'),
    "a step is there twice": lambda run: append(run / "validation.jsonl", {"step": 6}),
    "a file is left": lambda run: (run / ".faults.safetensors.12.partial").write_text(""),
    "a file is left in the cache": lambda run: leave(run.parent / "cache" / "text"),
    "a file is gone": lambda run: (run / "checkpoints/step-00000024/manifest.json").unlink(),
}


def append(path: Path, row: dict) -> None:
    path.write_text(path.read_text() + json.dumps(row) + "\n")


def leave(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / ".a.safetensors.7.partial").write_text("")


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_noticed(tmp_path, harm):
    undisturbed, run = finished(tmp_path / "a"), finished(tmp_path / "b")
    rows = run / "runs" / faults.NAME / "metrics.jsonl"
    rows.write_text(rows.read_text().replace('"s_per_it": 3', '"s_per_it": 9'))
    assert faults.difference(run, undisturbed) is None
    HARM[harm](run / "runs" / faults.NAME)
    assert faults.difference(run, undisturbed) is not None


def test_going_back_behind_a_checkpoint_is_noticed(tmp_path):
    run = faults.Run(finished(tmp_path / "a"), owed=8)
    assert faults.newest(run.folder) == 24
    log = run.folder / "log.txt"
    log.write_text("reading images: 5\n")
    assert faults.went_back(run) is None and run.owed == 8
    log.write_text(log.read_text() + "resuming runs/faults at step 8\n")
    assert faults.went_back(run) is None and run.owed == 0
    run.owed = 12
    log.write_text(log.read_text() + "resuming runs/faults at step 8\n")
    assert "step 12 was saved" in faults.went_back(run)


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
from fluxfast.run.logger import RunLog
RunLog._drop_lines_after = lambda log, step: None
"""


@needs_fork
@pytest.mark.slow
def test_a_fault_is_caught():
    """A log that is not taken back to the checkpoint has steps twice."""
    done = run_bench(KEEPS_ROWS, "--kills", "12")
    assert done.returncode == 1 and "metrics.jsonl differs" in done.stdout, done.stdout
