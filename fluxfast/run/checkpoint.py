"""Checkpoints: a folder per saved step with the LoRA files and the state that resuming needs.

    RUN/checkpoints/step-00000250/
        NAME.safetensors, NAME_ema.safetensors, …   the LoRA files
        state/tensors.safetensors   tensors of the state: weights, average, optimizer
        state/rest.json             step, configuration, the optimizer's numbers, the log
        manifest.json               bytes and SHA-256 of each of these

The folder is written under a temporary name, every file flushed to the disk, read back and
verified, then renamed: a checkpoint is there whole or not at all. Older ones are removed only after
that. Random numbers are functions of the step, so the position in the data is one integer.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fluxfast.data.buckets import Areas
from fluxfast.errors import DiskError, FluxfastError
from fluxfast.formats.container import write
from fluxfast.util.files import partial_of
from fluxfast.util.platform import flush_folder

log = logging.getLogger(__name__)

FORMAT = 1  # to be raised with every change that earlier versions cannot read
TENSORS, REST, MANIFEST = "state/tensors.safetensors", "state/rest.json", "manifest.json"
_HINT = "free some space; the same command goes on from the newest checkpoint"


class Damaged(FluxfastError):
    """A checkpoint differs from what was written. The message names the file and the fault."""


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Returns (step, folder) of every checkpoint, oldest first, damaged ones included."""
    folders = (run_dir / "checkpoints").glob("step-*")
    matches = [(re.fullmatch(r"step-(\d+)", folder.name), folder) for folder in folders]
    return sorted((int(match[1]), folder) for match, folder in matches if match and folder.is_dir())


def stored_areas(run_dir: Path) -> Areas | None:
    """Returns the areas that a run's buckets are merged to, None before its first checkpoint.
    Those that began before fluxfast merged any have none.
    """
    for _, folder in reversed(checkpoints(run_dir)):
        with suppress(FluxfastError):  # damaged
            return read_state(folder, tensors=False).get("areas", {})
    return None


def newest_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """Returns (step, folder) of the newest undamaged checkpoint, None where there is no checkpoint.

    Renames damaged ones that are newer, with a warning, so the caller must hold the run folder.
    Raises Damaged where all are damaged, FluxfastError for a checkpoint of an earlier fluxfast.
    """
    damaged: list[tuple[Path, Damaged]] = []
    for step, folder in reversed(checkpoints(run_dir)):
        try:
            verify(folder)
            saved = read_state(folder, tensors=False).get("step")
            if saved != step:  # a copy under another step's name
                raise _damaged(folder, REST, f"it is of step {saved}")
        except Damaged as error:
            damaged.append((folder, error))
            continue
        for newer, error in damaged:
            aside = newer.with_name(f"{newer.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(newer, aside)
            log.warning(f"note: {error.message}; it is kept as {aside.name}, {folder.name} is used")
        return step, folder
    if damaged:
        raise damaged[0][1]
    return None


def verify(folder: Path) -> None:
    """Read a checkpoint whole. Raises Damaged where a file is missing or differs from its manifest,
    FluxfastError for a checkpoint of an earlier fluxfast.
    """
    if (folder / "state.pt").exists() and not (folder / MANIFEST).exists():
        raise FluxfastError(
            f"{folder} is of an earlier fluxfast: its state.pt is a pickle, which is not read",
            hint="start afresh with `fluxfast train --restart`; lora.init_from takes the LoRA file "
            "in it to start from its weights",
        )
    try:
        manifest = {**json.loads((folder / MANIFEST).read_bytes())}  # TypeError unless a mapping
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(folder, MANIFEST, f"it cannot be read: {_reason(error)}") from None
    for name in (TENSORS, REST, *manifest):
        if name not in manifest:
            raise _damaged(folder, MANIFEST, f"it does not name {name}")
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise _damaged(folder, MANIFEST, f"it names {name!r}, which is not in the folder")
        try:
            entry = _measure(folder / name)
        except (OSError, ValueError) as error:  # ValueError: no file can have such a name
            raise _damaged(folder, repr(name), _reason(error)) from None
        if entry != manifest[name]:
            raise _damaged(folder, name, "its size or checksum does not match")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def save_checkpoint(
    run_dir: Path, state: dict[str, Any], write_files: Callable[[Path], None], keep: int
) -> Path:
    """Save `state` (see `flatten_state`; its "step" names the folder) and the files that
    `write_files(folder)` writes, verify them, then remove all but the newest `keep` checkpoints up
    to this step. Returns the folder. Copies one tensor at a time to the host.

    Raises DiskError where the disk refuses or returns other bytes than were written; earlier
    checkpoints are then untouched.
    """
    folder = run_dir / "checkpoints" / f"step-{state['step']:08d}"
    partial = partial_of(folder)
    try:
        _fill(partial, state, write_files)
        verify(partial)
        _remove(folder)
        os.rename(partial, folder)
        flush_folder(folder.parent)
        flush_folder(run_dir)
    except OSError as error:
        raise DiskError(
            f"cannot write into {folder.parent}: {_reason(error)}", hint=_HINT
        ) from None
    except Damaged as error:
        fault = error.message.replace(str(partial), str(folder))
        raise DiskError(f"the disk returned other bytes than were written: {fault}") from None
    except DiskError as error:  # raised in write_files, with the temporary name
        message = error.message.replace(str(partial), str(folder.parent))
        raise DiskError(message, hint=_HINT) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    saved = [each for step, each in checkpoints(run_dir) if step <= state["step"]]
    for older in saved[:-keep]:
        with suppress(OSError):
            _remove(older)
    return folder


def _fill(folder: Path, state: dict[str, Any], write_files: Callable[[Path], None]) -> None:
    """Write everything that a checkpoint consists of; each file is flushed, then the folder."""
    rest, tensors = flatten_state({"format": FORMAT, **state})
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_files(folder)
    manifest = {path.name: _measure(path) for path in sorted(folder.iterdir())}
    (folder / TENSORS).parent.mkdir()
    manifest[TENSORS] = _write_file(
        folder / TENSORS, lambda file: write(file, tensors, {"format": "pt"})
    )
    content = json.dumps(rest, allow_nan=False).encode()
    manifest[REST] = _write_file(folder / REST, lambda file: file.write(content))
    _write_file(folder / MANIFEST, lambda f: f.write(json.dumps(manifest, indent=1).encode()))
    flush_folder((folder / TENSORS).parent)
    flush_folder(folder)


def _write_file(path: Path, fill: Callable[[Any], None]) -> dict[str, Any]:
    """Write a new file with `fill(file)` and flush it. Returns its manifest entry, of the bytes
    that went in, not of what the disk holds.
    """
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write_hashed(content: bytes | memoryview) -> None:
            file.write(content)
            digest.update(content)

        fill(SimpleNamespace(write=write_hashed))
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _measure(path: Path) -> dict[str, Any]:
    """Returns the manifest entry of a file on the disk: bytes and SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def read_state(folder: Path, tensors: bool = True) -> dict[str, Any]:
    """Returns what `save_checkpoint` saved, tensors on the CPU; without `tensors` each is None.

    Raises Damaged where it cannot be read, FluxfastError where another version wrote it.
    """
    try:
        rest = json.loads((folder / REST).read_bytes())
        if rest["format"] != FORMAT:
            raise FluxfastError(
                f"{folder} is of another fluxfast: its format is {rest['format']}, this one reads "
                f"{FORMAT}"
            )
        if not tensors:
            return unflatten_state(rest, lambda path: None)
        with safe_open(folder / TENSORS, "pt") as file:
            # copies: what is read lies in the file's own pages, which optimizers write into
            return unflatten_state(rest, lambda path: file.get_tensor(path).clone())
    except FluxfastError:
        raise
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(folder, REST, f"it cannot be read: {_reason(error)}") from None


def put_weights(parameters: list[nn.Parameter], state: dict[str, Any], folder: Path) -> None:
    """Copy a state's weights into `parameters`. Raises FluxfastError naming `folder` where their
    shapes differ.
    """
    saved = state["parameters"]
    if [p.shape for p in parameters] != [tensor.shape for tensor in saved]:
        raise FluxfastError(f"the weights of {folder} do not fit this model")
    with torch.no_grad():
        for parameter, tensor in zip(parameters, saved, strict=True):
            parameter.copy_(tensor)


def _damaged(folder: Path, name: str, fault: str) -> Damaged:
    return Damaged(
        f"the checkpoint {folder} is damaged: {name}: {fault}",
        hint="start afresh with `fluxfast train --restart`, which keeps what there is",
    )


def _remove(folder: Path) -> None:
    """Remove a checkpoint, renamed first: a process killed meanwhile leaves no half of it under its
    name.
    """
    if folder.exists():
        gone = partial_of(folder.with_name(f"{folder.name}.gone"))
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


# ---------------------------------------------------------------- nested state without pickle
#
# A tensor becomes {"$tensor": its path}. JSON holds floats exactly (the shortest decimal that reads
# back the same). What JSON lacks is tagged: {"$tuple": [...]}, {"$float": "inf"}, and {"$items":
# [[key, value], ...]} for a mapping whose keys are not all plain strings.


def flatten_state(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Returns (JSON value, path -> tensor). Raises TypeError, naming the path, for what is neither
    a tensor nor None, bool, int, float, str, dict, list or tuple.
    """
    tensors: dict[str, Tensor] = {}

    def flatten(value: Any, path: str) -> Any:
        below = f"{path}/" if path else ""
        if isinstance(value, Tensor):
            if path in tensors:
                raise TypeError(f"{path}: two keys are spelled alike")
            tensors[path] = value
            return {"$tensor": path}
        if isinstance(value, dict):
            items = [[key, flatten(item, f"{below}{key}")] for key, item in value.items()]
            plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
            return dict(items) if plain else {"$items": items}
        if isinstance(value, list | tuple):
            items = [flatten(item, f"{below}{index}") for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, float) and not math.isfinite(value):
            return {"$float": repr(float(value))}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path}: a {type(value).__name__} has no place in a checkpoint")

    return flatten(state, ""), tensors


def unflatten_state(value: Any, tensor: Callable[[str], Any]) -> Any:
    """Returns the state that `flatten_state` took. tensor: path -> tensor."""
    if isinstance(value, list):
        return [unflatten_state(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value)) if len(value) == 1 else ""
    if tag == "$tensor":
        return tensor(value[tag])
    if tag == "$float":
        return float(value[tag])
    if tag == "$tuple":
        return tuple(unflatten_state(item, tensor) for item in value[tag])
    items = value["$items"] if tag == "$items" else value.items()
    return {key: unflatten_state(item, tensor) for key, item in items}
