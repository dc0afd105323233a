"""The kill test: a run that is killed again and again ends with the bytes of an undisturbed one.

    python -m bench.faults               50 kills
    python -m bench.faults --kills 5     a quick check

A small run on the nano model (two bucket sizes, accumulation, caption dropout, EMA, validation,
previews) is started through the command line, killed with SIGKILL and started again until it is
done; then its files are compared with the undisturbed run's, and another such run begins, until the
kills are used up. The moment of a kill is random, from the seed: any time, or as soon as a watched
file appears (one that is being cached, a checkpoint that is being filled, one that has just got its
name), and a few milliseconds later. There are no hooks for this in the trainer.

A kill is lost where the next start fails or resumes before the newest checkpoint, where the
finished run differs from the undisturbed one in a LoRA file, in validation.jsonl or in
metrics.jsonl (times and memory aside), or leaves a file in its folder or the cache that the
undisturbed run did not leave. Exit code 1 if any is.

The runs are forked from one process that has imported the libraries and computed nothing, so that a
start costs a second instead of ten. A child is otherwise like a new process: default signal
handlers, its own files and locks, no threads.
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from bench import ROOT
from bench.terminal import aligned

NAME = "faults"
TIMEOUT_S = 300  # a child that takes longer hangs, and is lost
TIMES = ("it_per_s", "s_per_it", "eta_s", "peak_memory_gib")  # of metrics.jsonl: not reproducible
CONFIG = f"""
name: {NAME}
trigger: ohwx
log_every: 3
device: cpu
model: {{path: {ROOT / "examples/nano/pretrained"}, storage: fp32, compute: fp32}}
lora: {{rank: 2}}
data: {{folder: ../pictures, resolution: [64, 96], caption_dropout: 0.3}}
train: {{steps: 24, gradient_accumulation: 2, lr: 1.0e-3, lr_schedule: cosine, ema: {{enabled: true}}}}
save: {{every: 4, keep: 2}}
sample: {{prompts: ["a [trigger]"], every: 12, width: 64, height: 64, steps: 1}}
validation: {{share: 0.2, every: 6, timesteps: 1}}
"""  # noqa: E501


class Moment(NamedTuple):
    """A kill follows at most `later_s` after a file of this pattern appears in one of the folders;
    without a folder, after the start. share: how often it is chosen."""

    name: str
    folders: tuple[str, ...]
    pattern: str
    later_s: float
    share: int


_RUN = f"runs/{NAME}"
MOMENTS = [
    Moment("while starting", (), "", 1.0, 2),
    Moment("while caching", ("runs/cache/latents", "runs/cache/text"), r"\..+\.partial", 0.01, 3),
    Moment("while training", (f"{_RUN}/tensorboard",), r"events.+", 2.0, 3),
    Moment("inside a save", (f"{_RUN}/checkpoints",), r"\.step-\d+\.\d+\.partial", 0.06, 4),
    Moment("behind a save", (f"{_RUN}/checkpoints",), r"step-\d+", 0.01, 2),
    Moment("while looking", (_RUN, f"{_RUN}/samples"), r"\.(valid|\d\d-step).+\.partial", 0.05, 2),
    Moment("at the end", (_RUN,), rf"\.({NAME}\.saf|report).+\.partial", 0.02, 1),
]


def warm_up() -> None:
    """Imports what a run imports. No tensor is computed: a fork would lack the threads."""
    import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import matplotlib.style  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from transformers import (  # noqa: F401
        CLIPTextModel,
        CLIPTokenizer,
        T5EncoderModel,
        T5TokenizerFast,
    )

    import fluxfast.train  # noqa: F401


def start(folder: Path, log: Path) -> BaseProcess:
    """`fluxfast train config.yaml` in `folder`, on one thread, its output in a new log."""
    sys.stdout.flush()
    process = multiprocessing.get_context("fork").Process(target=_train, args=(folder, log))
    process.start()
    return process


def _train(folder: Path, log: Path) -> None:
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    import torch

    from fluxfast.cli import main

    torch.set_num_threads(1)
    sys.argv = ["fluxfast", "train", "config.yaml"]
    main()


def finish(
    process: BaseProcess, done: Callable[[], bool] = lambda: False, poll_s: float = 0.01
) -> int | None:
    """Waits until `done` or the process ends. Returns its exit code, None where it still runs; one
    that hangs is aborted, and its log has the stack."""
    until = time.monotonic() + TIMEOUT_S
    while not done():
        process.join(poll_s)
        if process.exitcode is not None:
            return process.exitcode
        if time.monotonic() > until:
            os.kill(process.pid, signal.SIGABRT)
    return None


def watched(moment: Moment, folder: Path) -> set[str]:
    """The files that the moment waits for, as far as they exist."""
    return {
        f"{below}/{name}"
        for below in moment.folders
        if (folder / below).is_dir()
        for name in os.listdir(folder / below)
        if re.fullmatch(moment.pattern, name)
    }


def kill_at(moment: Moment, process: BaseProcess, folder: Path, rng: random.Random) -> int | None:
    """Kills at the moment. Returns None, or the exit code of a process that ended before."""
    later_s = rng.random() ** 3 * moment.later_s  # mostly soon: a small file is written in no time
    old = watched(moment, folder)
    if moment.folders:
        finish(process, lambda: bool(watched(moment, folder) - old), 0.0002)
    process.join(later_s)
    if process.exitcode is not None:
        return process.exitcode
    process.kill()
    process.join()
    return None


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    checkpoints = (folder / _RUN / "checkpoints").glob("step-" + 8 * "[0-9]")  # none `.damaged`
    return max((int(path.name.removeprefix("step-")) for path in checkpoints), default=0)


def partial_files(folder: Path) -> list[str]:
    """Files and folders under a temporary name in the run's folder and the cache."""
    below = (folder / "runs").rglob("*")
    return sorted(str(p.relative_to(folder)) for p in below if re.search(r"\.\d+\.part", p.name))


def resumed_step(log: Path) -> int | None:
    """The step at which a start has resumed, None where it began anew."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    match = re.search(r"^resuming .* at step (\d+)$", text, re.M)
    return int(match[1]) if match else None


def difference(run: Path, undisturbed: Path) -> str | None:
    """The fault of a finished run, or None."""
    if left := partial_files(run):
        return f"{left[0]} is left"
    files = {each: whole_files(each) for each in (run, undisturbed)}
    if other := files[run] ^ files[undisturbed]:
        return f"{min(other)} is in one of the two runs alone"
    for name in sorted(files[run]):
        lora = name.endswith(".safetensors") and "/state/" not in name
        if lora and (run / name).read_bytes() != (undisturbed / name).read_bytes():
            return f"{name} differs"
    for name in ("metrics.jsonl", "validation.jsonl"):
        if rows(run / _RUN / name) != rows(undisturbed / _RUN / name):
            return f"{name} differs"
    return None


def whole_files(folder: Path) -> set[str]:
    """The run's files but for TensorBoard's, of which every start makes one."""
    files = (path for path in (folder / _RUN).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in files if "tensorboard" not in path.parts}


def rows(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def drop_cached(folder: Path, rng: random.Random) -> None:
    """Removes a third of the cache, so that there is something to encode."""
    cached = sorted((folder / "runs/cache").glob("*/*.safetensors"))
    for path in rng.sample(cached, len(cached) // 3):
        path.unlink()


def prepare(folder: Path) -> Path:
    """Makes a folder to run in."""
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return folder


def make_images(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    noise = np.random.default_rng(0)
    for index in range(5):
        size = (64, 96 if index % 2 else 64, 3)
        Image.fromarray(noise.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")


def play(
    folder: Path, undisturbed: Path, kills: int, rng: random.Random, counts: dict[str, Counter]
) -> tuple[int, str | None]:
    """One run to its end, killed at most `kills` times. Returns how often it was killed, and its
    fault or None."""
    prepare(folder)
    killed = []
    saved = 0  # the step before which the next start must not resume
    while True:
        (moment,) = rng.choices(MOMENTS, [moment.share for moment in MOMENTS])
        if moment.name == "while caching":
            drop_cached(folder, rng)
        log = folder / f"log-{len(killed)}.txt"
        process = start(folder, log)
        code = finish(process) if len(killed) == kills else kill_at(moment, process, folder, rng)
        resumed, fault, blamed = resumed_step(log), None, killed[-1:]
        if resumed is not None:
            if resumed < saved:
                fault = f"resumed at step {resumed}, step {saved} was saved"
            saved = 0
        if code is None:
            killed.append(moment.name)
            counts[moment.name]["tried"] += 1
            counts[moment.name]["half-written"] += bool(partial_files(folder))
            saved = max(saved, newest(folder))
        elif code != 0:
            fault = fault or f"a start ended with exit code {code}"
        elif fault is None and saved:
            fault = f"began anew, step {saved} was saved"
        elif fault is None:
            fault, blamed = difference(folder, undisturbed), killed
        if fault is not None:
            print(f"{fault} (killed {', '.join(killed) or 'never'}); see {folder}")
            for name in blamed:
                counts[name]["lost"] += 1
        if fault is not None or code is not None:
            return len(killed), fault


def table(counts: dict[str, Counter]) -> str:
    lines = [["SIGKILL", "tried", "half-written", "survived", "lost"]]
    for name, count in [*counts.items(), ("in all", sum(counts.values(), Counter()))]:
        tried, half, lost = (count[key] for key in ("tried", "half-written", "lost"))
        lines.append([name, f"{tried}", f"{half}", f"{tried - lost}", f"{lost}"])
    return aligned(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="in all (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args(arguments)
    if not hasattr(os, "fork"):
        sys.exit("this needs a system that forks")
    began, rng = time.monotonic(), random.Random(options.seed)
    counts, done, runs = {moment.name: Counter() for moment in MOMENTS}, 0, 0
    folder = Path(tempfile.mkdtemp(prefix="fluxfast-faults-"))
    make_images(folder / "pictures")
    warm_up()
    undisturbed = prepare(folder / "undisturbed")
    log = undisturbed / "log.txt"
    if code := finish(start(undisturbed, log)):
        sys.exit(f"the undisturbed run ended with exit code {code}; see {log}")
    fault = None
    while done < options.kills and fault is None:
        runs += 1
        killed, fault = play(folder / f"run-{runs}", undisturbed, options.kills - done, rng, counts)
        done += killed
    print(table(counts))
    print(f"{runs} runs to their end, {time.monotonic() - began:.0f} s; seed {options.seed}")
    if fault is None:
        shutil.rmtree(folder)
    return int(fault is not None)


if __name__ == "__main__":
    sys.exit(main())
