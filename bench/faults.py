"""The kill test: a run that is killed again and again ends with the bytes of an undisturbed one.

    python -m bench.faults               50 kills
    python -m bench.faults --kills 5     that it works

A small run on the nano model (two bucket sizes, accumulation, caption dropout, an average,
validation, previews) is started through the command line, killed with SIGKILL, started again, until
it is done; then its files are compared with the undisturbed run's, and another such round begins,
until the kills are used up. Where a kill falls is drawn from the seed: at any time, or as soon as a
watched file appears (one that is being cached, a checkpoint that is being filled, one that has just
got its name), and a few milliseconds later. There are no hooks for this in the trainer.

A kill is lost where the next start fails or goes back behind the newest checkpoint that there was,
where the finished run differs from the undisturbed one in a LoRA file, in validation.jsonl or in
metrics.jsonl (times and memory aside), or where a file is left in the run's folder or the cache
that the undisturbed run did not leave. Exit code 1 if any is.

The runs are forked from one process that has imported the libraries and computed nothing, so that a
start costs a second instead of ten. A child differs from a new process in nothing that matters
here: its signal handlers are the defaults, it opens and locks its own files, it has no threads.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import ROOT

NAME = "faults"
SECONDS = 300  # that a child may take before it counts as hanging, and is lost
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


@dataclass(frozen=True)
class Place:
    """Where a kill falls: when a file of this kind appears in a folder (or at any time, without
    one), and at most `later` seconds after that.
    """

    name: str
    folders: tuple[str, ...]
    pattern: str
    later: float
    share: int  # of the draws


_RUN = f"runs/{NAME}"
PLACES = [
    Place("while starting", (), "", 1.0, 2),
    Place("while caching", ("runs/cache/latents", "runs/cache/text"), r"\..+\.partial", 0.01, 3),
    Place("while training", (f"{_RUN}/tensorboard",), r"events.+", 2.0, 3),
    Place("inside a save", (f"{_RUN}/checkpoints",), r"\.step-\d+\.\d+\.partial", 0.06, 4),
    Place("behind a save", (f"{_RUN}/checkpoints",), r"step-\d+", 0.01, 2),
    Place("while looking", (_RUN, f"{_RUN}/samples"), r"\.(valid|\d\d-step).+\.partial", 0.05, 2),
    Place("at the end", (_RUN,), rf"\.({NAME}\.saf|report).+\.partial", 0.02, 1),
]  # fmt: skip


@dataclass
class Count:
    """Of one place: kills, those that left a file or a folder half written, and those lost."""

    tried: int = 0
    inside: int = 0
    lost: int = 0


@dataclass
class Round:
    """One run from its beginning to its end. owed: the step that the next start may not go back
    behind."""

    folder: Path
    owed: int = 0
    read: int = 0  # bytes of the log that were looked at


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
    """`fluxfast train config.yaml` in `folder`, on one thread; what it says goes to log.txt.
    -> its process."""
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


def finish(process: int) -> int:
    """Wait for a process to end. -> its exit code."""
    until = time.monotonic() + SECONDS
    while (code := ended(process)) is None:
        if time.monotonic() > until:
            return kill(process, signal.SIGABRT)
        time.sleep(0.01)
    return code


def kill(process: int, number: int = signal.SIGKILL) -> int:
    """-> the exit code. SIGABRT leaves in the log where the process was."""
    os.kill(process, number)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def names(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries)
    except OSError:
        return  # it is not there yet


def watched(place: Place, folder: Path) -> set[str]:
    """The files that the place waits for, as far as they are there."""
    return {
        f"{below}/{name}"
        for below in place.folders
        for name in names(folder / below)
        if re.fullmatch(place.pattern, name)
    }


def kill_at(place: Place, process: int, folder: Path, draw: random.Random) -> int | None:
    """Kill when the place is reached. -> None, or the exit code of a process that ended before."""
    later = draw.random() ** 3 * place.later  # mostly soon: a small file is written in no time
    old = watched(place, folder)
    until = time.monotonic() + SECONDS
    while place.folders and not watched(place, folder) - old:
        if (code := ended(process)) is not None:
            return code
        if time.monotonic() > until:
            return kill(process, signal.SIGABRT)
        time.sleep(0.0002)
    time.sleep(later)
    if (code := ended(process)) is not None:
        return code
    kill(process)
    return None


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    steps = [n for n in names(folder / _RUN / "checkpoints") if re.fullmatch(r"step-\d+", n)]
    return max((int(name.removeprefix("step-")) for name in steps), default=0)


def left_over(folder: Path) -> list[str]:
    """Files and folders under a temporary name in the run's folder and the cache."""
    below = (folder / "runs").rglob("*")
    return sorted(str(p.relative_to(folder)) for p in below if re.search(r"\.\d+\.part", p.name))


def read_log(run: Round) -> list[str]:
    """What the run's processes have said since the last time."""
    with open(run.folder / "log.txt", encoding="utf-8", errors="replace") as file:
        file.seek(run.read)
        text = file.read()
        run.read = file.tell()
    return text.splitlines()


def went_back(run: Round) -> str | None:
    """What is wrong with where the starts since the last time went on, None if nothing."""
    for line in read_log(run):
        if match := re.match(r"resuming .* at step (\d+)$", line):
            if int(match[1]) < run.owed:
                return f"went on at step {match[1]}, step {run.owed} was saved"
            run.owed = 0
    return None


def difference(run: Path, undisturbed: Path) -> str | None:
    """What is wrong with a finished run, None if nothing."""
    if left := left_over(run):
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


def forget_some(folder: Path, draw: random.Random) -> None:
    """Remove some of what is cached, so that there is something to encode."""
    cached = sorted((folder / "runs/cache").glob("*/*.safetensors"))
    for path in draw.sample(cached, len(cached) // 3):
        path.unlink()


def prepare(folder: Path) -> Path:
    """A folder to run in."""
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return folder


def draw_pictures(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    noise = np.random.default_rng(0)
    for index in range(5):
        size = (64, 96 if index % 2 else 64, 3)
        Image.fromarray(noise.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")


def play(
    folder: Path, undisturbed: Path, kills: int, draw: random.Random, counts: dict[str, Count]
) -> tuple[int, str | None]:
    """One run, killed at most `kills` times, to its end. -> how often it was, and what went wrong
    or None.
    """
    run, killed = Round(prepare(folder)), []
    while True:
        place = draw.choices(PLACES, [place.share for place in PLACES])[0]
        if place.name == "while caching":
            forget_some(folder, draw)
        process = start(folder)
        over = len(killed) == kills
        code = finish(process) if over else kill_at(place, process, folder, draw)
        wrong, blamed = went_back(run), killed[-1:]
        if code is None:
            killed.append(place.name)
            counts[place.name].tried += 1
            counts[place.name].inside += bool(left_over(folder))
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


def table(counts: dict[str, Count]) -> list[str]:
    lines = [f"{'SIGKILL':16}{'tried':>8}{'half-written':>14}{'survived':>10}{'lost':>6}"]
    total = Count(
        *(sum(getattr(c, n) for c in counts.values()) for n in ("tried", "inside", "lost"))
    )
    for name, c in [*counts.items(), ("in all", total)]:
        lines.append(f"{name:16}{c.tried:8}{c.inside:14}{c.tried - c.lost:10}{c.lost:6}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="in all (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the places and times (default 0)")
    given = parser.parse_args(arguments)
    if not hasattr(os, "fork"):
        sys.exit("this needs a system that forks")
    began, draw = time.monotonic(), random.Random(given.seed)
    counts, done, runs = {place.name: Count() for place in PLACES}, 0, 0
    work = Path(tempfile.mkdtemp(prefix="fluxfast-faults-"))
    draw_pictures(work / "pictures")
    warm_up()
    undisturbed = prepare(work / "undisturbed")
    if code := finish(start(undisturbed)):
        sys.exit(f"the undisturbed run ended with exit code {code}; see {undisturbed}/log.txt")
    wrong = None
    while done < given.kills and wrong is None:
        runs += 1
        killed, wrong = play(work / f"run-{runs}", undisturbed, given.kills - done, draw, counts)
        done += killed
    print("\n".join(table(counts)))
    print(f"{runs} runs to their end, {time.monotonic() - began:.0f} s; seed {given.seed}")
    if wrong is None:
        shutil.rmtree(work)
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
