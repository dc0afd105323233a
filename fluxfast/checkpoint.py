"""Checkpoints: a folder per saved step with the LoRA files and everything a resumed run needs.

    RUN/checkpoints/step-00000250/NAME.safetensors  NAME_ema.safetensors  state.pt

The folder is filled under another name and renamed, so a checkpoint is there whole or not at all.
Draws are functions of the step, so the position in the data is one integer.
"""

import io
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fluxfast.config import Config
from fluxfast.errors import FluxfastError
from fluxfast.files import write_atomic
from fluxfast.optim import Ema

_STEP = re.compile(r"step-(\d+)")


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first."""
    found = []
    for folder in (run_dir / "checkpoints").glob("step-*"):
        match = _STEP.fullmatch(folder.name)
        if match and (folder / "state.pt").is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def identity_of(config: Config) -> dict:
    """What a checkpoint's weights depend on in shape and meaning. Not the base's precision: a run
    may go on in another.
    """
    return {
        "model.path": config.model.path,
        "lora": config.lora.model_dump(mode="json", exclude={"init_from"}),  # only a start
        "train.optimizer": config.train.optimizer,
        "train.optimizer_args": config.train.optimizer_args,
        "train.batch_size": config.train.batch_size,
        "train.gradient_accumulation": config.train.gradient_accumulation,
        "seed": config.seed,
    }


def drop_partials(run_dir: Path) -> None:
    """Remove what a process that was killed while saving left behind; call it as the folder's sole
    user.
    """
    for folder in (run_dir / "checkpoints").glob(".step-*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(
    run_dir: Path,
    step: int,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    identity: dict,
    write_lora: Callable[[Path], None],
    keep: int,
) -> Path:
    """Save weights, optimiser, EMA and position after `step` steps; drop all but the newest `keep`.

    identity: what must be the same for a resume to make sense. write_lora(folder) puts the LoRA
    files there. Raises FluxfastError where the disk refuses; older checkpoints are then untouched.
    """
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    state = {
        "step": step,
        "identity": identity,
        "parameters": [p.detach().cpu() for p in parameters],
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict() if ema else None,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        write_atomic(partial / "state.pt", buffer.getvalue())
        write_lora(partial)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        raise FluxfastError(
            f"cannot write into {folder.parent}: {error.strerror or error}"
        ) from None
    except FluxfastError as error:
        # the user knows the folder, not the name it is filled under
        message = error.message.replace(str(partial), str(folder.parent))
        raise FluxfastError(message, hint=error.hint) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for _, old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def load_weights(
    folder: Path,
    parameters: list[nn.Parameter],
    identity: dict,
    part: Callable[[dict], dict] = lambda identity: identity,
) -> dict:
    """Restore the LoRA's weights in place. -> everything that was saved: step, optimizer, ema, …

    part: what of an identity has to be the same.
    Raises FluxfastError for an unreadable file or a run that trains something else.
    """
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise FluxfastError(
            f"cannot read the checkpoint {folder}: {str(error).splitlines()[0]}",
            hint=f"move {folder.name} away to go on from the one before it",
        ) from None
    theirs, identity = part(state["identity"]), part(identity)
    changed = [key for key in identity if identity[key] != theirs.get(key)]
    if changed:
        raise FluxfastError(
            f"{folder.parent.parent} was trained with other settings: "
            + ", ".join(f"{k} was {theirs.get(k)!r}, is {identity[k]!r}" for k in changed),
            hint="set them back, choose another name, or start afresh with --restart",
        )
    with torch.no_grad():
        for parameter, saved in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
    return state


def load_checkpoint(
    folder: Path,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    identity: dict,
) -> int:
    """Restore everything in place. -> the number of steps done.

    An EMA that the checkpoint does not have starts from its weights. Raises FluxfastError as
    `load_weights` does.
    """
    state = load_weights(folder, parameters, identity)
    optimizer.load_state_dict(state["optimizer"])
    if ema is not None:
        if state["ema"] is not None:
            ema.load_state_dict(state["ema"])
        else:
            ema.restart(parameters)
    return state["step"]
