"""What the commands share: reading what they are given, speaking, being interrupted."""

import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import typer

from fluxfast.errors import ConfigError, LostRank


def configuration(target: Path, overrides, model, encoders, trigger, name):
    """A configuration from a YAML file, a folder of images or kohya's data set; options on top."""
    from fluxfast.config.schema import build_config, load_config

    given = {
        "model.path": model,
        "model.encoders": encoders,
        "trigger": trigger,
        "name": name,
    }
    options = [f"{key}={_quoted(value)}" for key, value in given.items() if value is not None]

    if target.is_dir() or target.suffix.lower() == ".toml":
        if model is None and not any(item.startswith("model.path=") for item in overrides):
            raise ConfigError(
                f"training on {target} needs a model",
                hint="--model black-forest-labs/FLUX.1-dev, or the path of a model on this disk",
            )
        # a folder may be called what a run may not
        called = target.resolve().name if target.is_dir() else target.stem
        called = re.sub(r"[^\w .+-]", "_", called).lstrip(" .+-") or "lora"
        data = {"folder": str(target)} if target.is_dir() else str(target)
        raw = {"name": called, "data": data, "model": {}}
        return build_config(raw, [*options, *overrides], str(target))
    if not target.exists():
        raise ConfigError(
            f"{target} does not exist", hint="give a .yaml configuration or a folder of images"
        )
    return load_config(target, [*options, *overrides])


@contextmanager
def interruptible(word: str = "the same command goes on where it stopped"):
    """Ctrl-C and SIGTERM end a command with a word about it. Done here because typer ends silently
    on the first.
    """
    from fluxfast.run.interrupt import Stopped, handled, interrupt

    try:
        with handled(interrupt):
            yield
    except Stopped as stop:
        if rank() == 0:
            print(f"{stop}; to go on: {_same_command()}", file=sys.stderr)
        raise typer.Exit(0) from None
    except KeyboardInterrupt as stop:
        # torchrun stops the others where one has ended: that it has is what is to be said
        if isinstance(stop.__context__, LostRank):
            raise stop.__context__ from None
        print(f"{speaker()}stopped; {word}", file=sys.stderr)
        raise typer.Exit(130) from None


def _same_command() -> str:
    """What was typed, but for --restart."""
    import shlex

    program = Path(sys.argv[0]).name
    start = ["python", "-m", "fluxfast"] if program == "__main__.py" else [program]
    if processes := os.environ.get("LOCAL_WORLD_SIZE"):
        start = ["torchrun", "--nproc-per-node", processes, "-m", "fluxfast"]
    return shlex.join([*start, *(word for word in sys.argv[1:] if word != "--restart")])


def rank() -> int:
    """This process among those that torchrun started, 0 without it: the first one speaks."""
    return int(os.environ.get("RANK", "0"))


def speaker() -> str:
    """What a line that every process may print begins with."""
    return f"rank {rank()}: " if rank() else ""


def _quoted(value: str) -> str:
    """A YAML scalar that stays this string."""
    import json

    # ASCII would split a letter such as an emoji into two escapes, which YAML does not join again
    return json.dumps(value, ensure_ascii=False)
