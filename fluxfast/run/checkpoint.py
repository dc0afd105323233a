"""Checkpoints: a folder per saved step with the LoRA files and everything a resumed run needs.

    RUN/checkpoints/step-00000250/
        NAME.safetensors, NAME_ema.safetensors, …   what a user takes
        state/tensors.safetensors   of the state: weights, average, optimizer
        state/rest.json             step, configuration, the optimizer's numbers, the log
        manifest.json               bytes and SHA-256 of each of these

The folder is filled under another name, every file flushed to the disk, read back, and renamed, so
a checkpoint is there whole or not at all; only then do older ones go. Draws are functions of the
step, so the position in the data is one integer.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fluxfast.errors import DiskError, FluxfastError
from fluxfast.formats.container import write
from fluxfast.util.files import partial_of
from fluxfast.util.platform import flush_folder

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when a checkpoint is no longer read as it was
TENSORS, REST, MANIFEST = "state/tensors.safetensors", "state/rest.json", "manifest.json"
_STEP = re.compile(r"step-(\d+)")
_CHUNK = 2**20  # bytes read at once
_HINT = "free some space; the same command goes on from the newest checkpoint"


class Damaged(FluxfastError):
    """A checkpoint is not what was written. The message says which file, and what is wrong."""


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first; not all need be sound."""
    found = []
    for folder in (run_dir / "checkpoints").glob("step-*"):
        match = _STEP.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), folder))
    return sorted(found)


def newest_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint that is sound, None where there is none at all. For
    the run folder's sole user: damaged ones that are newer are renamed, with a warning.

    Raises Damaged where all are damaged, FluxfastError for those of an earlier fluxfast.
    """
    damaged: list[tuple[Path, Damaged]] = []
    for step, folder in reversed(checkpoints(run_dir)):
        try:
            verify(folder)
            _check_step(folder, step)
        except Damaged as error:
            damaged.append((folder, error))
            continue
        for each, error in damaged:
            aside = each.with_name(f"{each.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(each, aside)
            log.warning(f"note: {error.message}; it is kept as {aside.name}, {folder.name} is used")
        return step, folder
    if damaged:
        raise damaged[0][1]
    return None


def verify(folder: Path) -> None:
    """Read a checkpoint whole. Raises Damaged where a file is missing or is not what was written,
    FluxfastError for a checkpoint of an earlier fluxfast.
    """
    if (folder / "state.pt").exists() and not (folder / MANIFEST).exists():
        raise FluxfastError(
            f"{folder} is of an earlier fluxfast: its state.pt is a pickle, which is not read",
            hint="start afresh with --restart; lora.init_from takes the LoRA file in it to start "
            "from its weights",
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except OSError as error:
        raise _damaged(folder, MANIFEST, error.strerror or str(error)) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _damaged(folder, MANIFEST, "it cannot be read") from None
    for name in (TENSORS, REST, *files):
        if name not in files:
            raise _damaged(folder, MANIFEST, f"it does not name {name}")
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise _damaged(folder, MANIFEST, f"it names {name!r}, which is not in the folder")
        size, digest = files[name]
        try:
            found = _measure(folder / name)
        except OSError as error:
            raise _damaged(folder, name, error.strerror or str(error)) from None
        except ValueError:  # of what is no name of a file
            raise _damaged(folder, MANIFEST, f"it names {name!r}, which is no file") from None
        if found["bytes"] != size:
            raise _damaged(folder, name, f"{found['bytes']} bytes instead of {size}")
        if found["sha256"] != digest:
            raise _damaged(folder, name, "its checksum does not match")


def _check_step(folder: Path, step: int) -> None:
    """Damaged where a checkpoint has another step's name: a copy would be gone on from there."""
    found = read_state(folder, tensors=False).get("step")
    if found != step:
        raise _damaged(folder, REST, f"it is of step {found}")


def save_checkpoint(
    run_dir: Path, state: dict[str, Any], write_files: Callable[[Path], None], keep: int
) -> Path:
    """Save `state` (what `flatten_state` takes; its "step" names the folder) with the files that
    `write_files(folder)` writes, read it back, then drop all but the newest `keep`. -> the folder.

    Tensors go to the disk one at a time. Raises DiskError where the disk refuses, or gives back
    what was not written; older checkpoints are then untouched.
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
            f"cannot write into {folder.parent}: {error.strerror or error}", hint=_HINT
        ) from None
    except Damaged as error:
        why = error.message.replace(str(partial), str(folder))
        raise DiskError(f"the disk gives back other than was written: {why}") from None
    except DiskError as error:
        # the user knows the folder, not the name it is filled under
        message = error.message.replace(str(partial), str(folder.parent))
        raise DiskError(message, hint=_HINT) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    older = [each for step, each in checkpoints(run_dir) if step <= state["step"]]
    for each in older[:-keep]:
        with suppress(OSError):
            _remove(each)
    return folder


def _fill(folder: Path, state: dict[str, Any], write_files: Callable[[Path], None]) -> None:
    """Everything that a checkpoint consists of, each file flushed, then the folder."""
    rest, tensors = flatten_state({"format": FORMAT, **state})
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_files(folder)
    sums = {path.name: _measure(path) for path in sorted(folder.iterdir())}
    (folder / TENSORS).parent.mkdir()
    with _flushed(folder / TENSORS) as file:
        write(cast(BinaryIO, file), tensors, {"format": "pt"})
        sums[TENSORS] = file.sums
    with _flushed(folder / REST) as file:
        file.write(json.dumps(rest, allow_nan=False).encode())
        sums[REST] = file.sums
    with _flushed(folder / MANIFEST) as file:
        file.write(json.dumps(sums, indent=1).encode())
    flush_folder((folder / TENSORS).parent)
    flush_folder(folder)


def read_state(folder: Path, tensors: bool = True) -> dict[str, Any]:
    """What `save_checkpoint` was given; without `tensors` None in the place of each. On the CPU.

    Raises Damaged for what cannot be read, FluxfastError for another version's.
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
        raise _damaged(folder, REST, f"it cannot be read: {error}") from None


def put_weights(parameters: list[nn.Parameter], state: dict[str, Any], folder: Path) -> None:
    """A state's weights into `parameters`. FluxfastError naming `folder` where they do not fit."""
    saved = state["parameters"]
    if [p.shape for p in parameters] != [tensor.shape for tensor in saved]:
        raise FluxfastError(f"the weights of {folder} do not fit this model")
    with torch.no_grad():
        for parameter, tensor in zip(parameters, saved, strict=True):
            parameter.copy_(tensor)


def _damaged(folder: Path, name: str, why: str) -> Damaged:
    return Damaged(
        f"the checkpoint {folder} is damaged: {name}: {why}",
        hint="start afresh with --restart, which keeps what there is",
    )


def _measure(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


class _Summed:
    """A file that is written in order; what went in is counted and hashed on the way."""

    def __init__(self, file: BinaryIO):
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._size += len(content)

    @property
    def sums(self) -> dict[str, Any]:
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


@contextmanager
def _flushed(path: Path) -> Iterator[_Summed]:
    """A new file, on the disk when this ends."""
    with open(path, "wb") as file:
        yield _Summed(file)
        file.flush()
        os.fsync(file.fileno())


def _remove(folder: Path) -> None:
    """So that a process killed meanwhile leaves no half of it under its name."""
    if folder.exists():
        gone = partial_of(folder.with_name(f"{folder.name}.gone"))
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


# ---------------------------------------------------------------- nested state without pickle
#
# A tensor becomes {"$tensor": its path}. Floats go through JSON exactly (the shortest decimal that
# reads back the same); what JSON has no word for is tagged likewise: {"$tuple": [...]}, {"$float":
# "inf"}, {"$items": [[key, value], ...]} for a mapping whose keys are not all plain strings.


def flatten_state(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Returns (JSON value, path -> tensor). Raises TypeError, naming the path, for what is neither
    a tensor nor None, bool, int, float, str, dict, list or tuple.
    """
    tensors: dict[str, Tensor] = {}
    return _apart(value, "", tensors), tensors


def _apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    below = f"{path}/" if path else ""
    if isinstance(value, Tensor):
        if path in tensors:
            raise TypeError(f"{path}: two keys are spelled alike")
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, dict):
        items = [[key, _apart(item, f"{below}{key}", tensors)] for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(items) if plain else {"$items": items}
    if isinstance(value, list | tuple):
        items = [_apart(item, f"{below}{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} has no place in a checkpoint")


def unflatten_state(value: Any, tensor: Callable[[str], Any]) -> Any:
    """The inverse of `flatten_state`. tensor: path -> tensor."""
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
