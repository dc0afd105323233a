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
start costs a second instead of ten. A child is otherwise as a new process: default signal handlers,
its own files and locks, no threads.
"""

import argparse
import faulthandler
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
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


@dataclass
class Count:
    """Of one moment: kills, those that left a file or folder half written, and those lost."""

    tried: int = 0
    half_written: int = 0
    lost: int = 0


@dataclass
class Run:
    """One run from its beginning to its end. owed: the step from which the next start may resume
    at the earliest; log_read: bytes of the log that were looked at."""

    folder: Path
    owed: int = 0
    log_read: int = 0


def warm_up() -> None:
    """Import what a run imports. No tensor is computed: a fork would lack the threads."""
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


def start(folder: Path) -> int:
    """`fluxfast train config.yaml` in `folder`, on one thread, its output in log.txt. Returns its
    process."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        import torch

        from fluxfast.cli import main

        torch.set_num_threads(1)
        sys.argv = ["fluxfast", "train", "config.yaml"]
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(process: int) -> int | None:
    """The exit code of a process that is over (negative: the signal), None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def finish(process: int, done: Callable[[], bool] = lambda: False, poll_s: float = 0.01):
    """Wait until `done` or the process ends. Returns its exit code, None where it still runs; one
    that hangs is aborted, and the log has where it was."""
    until = time.monotonic() + TIMEOUT_S
    while not done():
        if (code := ended(process)) is not None:
            return code
        if time.monotonic() > until:
            os.kill(process, signal.SIGABRT)
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        time.sleep(poll_s)
    return None


def names(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries)
    except OSError:
        return  # it is not there yet


def watched(moment: Moment, folder: Path) -> set[str]:
    """The files that the moment waits for, as far as they are there."""
    return {
        f"{below}/{name}"
        for below in moment.folders
        for name in names(folder / below)
        if re.fullmatch(moment.pattern, name)
    }


def kill_at(moment: Moment, process: int, folder: Path, rng: random.Random) -> int | None:
    """Kill at the moment. Returns None, or the exit code of a process that ended before."""
    later_s = rng.random() ** 3 * moment.later_s  # mostly soon: a small file is written in no time
    old = watched(moment, folder)
    if moment.folders:
        code = finish(process, lambda: bool(watched(moment, folder) - old), 0.0002)
        if code is not None:
            return code
    time.sleep(later_s)
    if (code := ended(process)) is not None:
        return code
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    steps = [n for n in names(folder / _RUN / "checkpoints") if re.fullmatch(r"step-\d+", n)]
    return max((int(name.removeprefix("step-")) for name in steps), default=0)


def partial_files(folder: Path) -> list[str]:
    """Files and folders under a temporary name in the run's folder and the cache."""
    below = (folder / "runs").rglob("*")
    return sorted(str(p.relative_to(folder)) for p in below if re.search(r"\.\d+\.part", p.name))


def went_back(run: Run) -> str | None:
    """The fault of the steps at which the run has resumed since the last call, or None."""
    with open(run.folder / "log.txt", encoding="utf-8", errors="replace") as file:
        file.seek(run.log_read)
        text = file.read()
        run.log_read = file.tell()
    for line in text.splitlines():
        if match := re.match(r"resuming .* at step (\d+)$", line):
            if int(match[1]) < run.owed:
                return f"resumed at step {match[1]}, step {run.owed} was saved"
            run.owed = 0
    return None


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
    found = (path for path in (folder / _RUN).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in found if "tensorboard" not in path.parts}


def rows(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def drop_cached(folder: Path, rng: random.Random) -> None:
    """Remove a third of the cache, so that there is something to encode."""
    cached = sorted((folder / "runs/cache").glob("*/*.safetensors"))
    for path in rng.sample(cached, len(cached) // 3):
        path.unlink()


def prepare(folder: Path) -> Path:
    """A folder to run in."""
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return folder


def make_pictures(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    noise = np.random.default_rng(0)
    for index in range(5):
        size = (64, 96 if index % 2 else 64, 3)
        Image.fromarray(noise.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")


def play(
    folder: Path, undisturbed: Path, kills: int, rng: random.Random, counts: dict[str, Count]
) -> tuple[int, str | None]:
    """One run, killed at most `kills` times, to its end. Returns how often it was, and its fault or
    None."""
    run, killed = Run(prepare(folder)), []
    while True:
        (moment,) = rng.choices(MOMENTS, [moment.share for moment in MOMENTS])
        if moment.name == "while caching":
            drop_cached(folder, rng)
        process = start(folder)
        last = len(killed) == kills
        code = finish(process) if last else kill_at(moment, process, folder, rng)
        wrong, blamed = went_back(run), killed[-1:]
        if code is None:
            killed.append(moment.name)
            counts[moment.name].tried += 1
            counts[moment.name].half_written += bool(partial_files(folder))
            run.owed = max(run.owed, newest(folder))
        elif code != 0:
            wrong = wrong or f"a start ended with exit code {code}"
        elif wrong is None and run.owed:
            wrong = f"began anew, step {run.owed} was saved"
        elif wrong is None:
            wrong, blamed = difference(folder, undisturbed), killed
        if wrong is not None:
            print(f"{wrong} (killed {', '.join(killed) or 'never'}); see {folder}")
            for name in blamed:
                counts[name].lost += 1
        if wrong is not None or code is not None:
            return len(killed), wrong


def table(counts: dict[str, Count]) -> str:
    rows = [(name, *astuple(count)) for name, count in counts.items()]
    rows.append(("in all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    lines = [["SIGKILL", "tried", "half-written", "survived", "lost"]]
    lines += [[name, f"{n}", f"{half}", f"{n - lost}", f"{lost}"] for name, n, half, lost in rows]
    return aligned(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="in all (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args(arguments)
    if not hasattr(os, "fork"):
        sys.exit("this needs a system that forks")
    began, rng = time.monotonic(), random.Random(options.seed)
    counts, done, runs = {moment.name: Count() for moment in MOMENTS}, 0, 0
    work = Path(tempfile.mkdtemp(prefix="fluxfast-faults-"))
    make_pictures(work / "pictures")
    warm_up()
    undisturbed = prepare(work / "undisturbed")
    if code := finish(start(undisturbed)):
        sys.exit(f"the undisturbed run ended with exit code {code}; see {undisturbed}/log.txt")
    wrong = None
    while done < options.kills and wrong is None:
        runs += 1
        killed, wrong = play(work / f"run-{runs}", undisturbed, options.kills - done, rng, counts)
        done += killed
    print(table(counts))
    print(f"{runs} runs to their end, {time.monotonic() - began:.0f} s; seed {options.seed}")
    if wrong is None:
        shutil.rmtree(work)
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
