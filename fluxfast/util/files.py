"""Files written whole or not at all, rows read back from them, and folders used by one process at a
time.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fluxfast.errors import ConfigError, DiskError, FluxfastError
from fluxfast.util.platform import lock_folder, share_lock

log = logging.getLogger(__name__)

CHECK_FILE = "check.yaml"  # in a run's folder: what `fluxfast check` found, a setting of later runs


def open_regular(path: Path) -> BinaryIO:
    """Open for reading. Raises OSError, for a pipe, a socket and a device too: these might not end.
    A link is followed to what it names.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(path, "rb")


def check_new(path: Path) -> None:
    """Raise ConfigError where there is something at `path` already, be it a link to nothing."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", hint="name the file to write")
    if os.path.lexists(path):
        raise ConfigError(f"{path} is there already", hint="remove it, or choose another name")


def check_no_links(folder: Path, *names: str) -> None:
    """Raise ConfigError where one of `names` in `folder` is a link: what is written there, and
    tidied up, would lie in a place that nobody named.
    """
    for path in (folder / name for name in names):
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link to {os.readlink(path)}: a run writes into folders of its own",
                hint="remove the link; output_dir and cache_dir say where things go",
            )


def partial_of(path: Path) -> Path:
    """What a file or folder is called while this process fills it."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def drop_partials(*folders: Path) -> None:
    """Remove what killed processes left in these folders while filling it (folders below are not
    searched). For the sole user of a folder: another's may be being filled.
    """
    for folder in folders:
        for path in folder.glob(".*.partial"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


@contextlib.contextmanager
def new_file(path: Path, hint: str | None = None) -> Iterator[BinaryIO]:
    """Yields a temporary file beside `path`. At the end it is flushed to the disk and put in place;
    if anything is raised it is removed.

    Raises DiskError naming the folder where the disk refuses (full, read-only, no permission).
    """
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise DiskError(
            f"cannot write into {path.parent}: {error.strerror or error}",
            hint=hint or "free some space, or set output_dir to a folder that you may write to",
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes, hint: str | None = None) -> None:
    """Writes a file whole or not at all, see `new_file`."""
    with new_file(path, hint) as file:
        file.write(content)


def with_step(row: Any) -> dict:
    """The row of a log, or ValueError where it is no mapping with a whole number as its step."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError("no row of a log")
    return row


def read_rows(path: Path, make: Callable[[Any], Any] = with_step) -> list:
    """What `make` makes of every line of a .jsonl file, in order; none where there is no such file.

    A line that is no JSON, or that make has a ValueError or TypeError for, is passed over: a crash
    may have cut it, somebody have changed it. How many is logged.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows, lines = [], [line for line in text.split("\n") if line]
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            rows.append(make(json.loads(line)))
    if lost := len(lines) - len(rows):
        log.warning(f"note: {lost} of {len(lines)} lines of {path} cannot be read and are left out")
    return rows


@contextlib.contextmanager
def warn_on_disk_error(path: Path | None = None) -> Iterator[None]:
    """A disk that refuses inside is logged, not raised: a run goes on without the file. path: named
    where the system does not name one.
    """
    try:
        yield
    except DiskError as error:
        log.warning(f"note: {error.message}; the run goes on")
    except OSError as error:
        name = error.filename or path
        where = f"{name}: " if name else ""
        log.warning(f"note: {where}{error.strerror or error}; the run goes on")


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Holds `folder` (made if need be, removed again if still empty) for this process alone.

    Ends with the process, however that ends. Raises FluxfastError where another holds it; a file
    system or a platform without such locks lets everyone in.
    """
    try:
        handle = _lock(folder, exclusive=True)
    except BlockingIOError:
        raise FluxfastError(
            f"another process is working in {folder}",
            hint="wait for it, stop it, or choose another name",
        ) from None
    except OSError as error:
        raise DiskError(
            f"cannot write into {folder.parent}: {error.strerror or error}",
            hint="set output_dir to a folder that you may write to",
        ) from None
    with _held(folder, handle):
        yield


@contextlib.contextmanager
def shared_lock(folder: Path, *below: str) -> Iterator[None]:
    """Holds `folder` beside others that do the same. The first removes what killed processes
    left in it and in its folders `below`; later ones leave it, as it may be being written.
    """
    handle = None
    with contextlib.suppress(OSError):  # held for nothing but to clean up: no reason not to work
        try:
            handle = _lock(folder, exclusive=True)
        except BlockingIOError:
            handle = _lock(folder, exclusive=False, wait=2.0)
        else:
            if handle is not None:
                drop_partials(folder, *(folder / name for name in below))
                share_lock(handle)
    with _held(folder, handle):
        yield


@contextlib.contextmanager
def _held(folder: Path, handle: int | None) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # fails, as it should, where there is anything in it
        if handle is not None:
            os.close(handle)


def _lock(folder: Path, *, exclusive: bool, wait: float = 0.0) -> int | None:
    """Creates `folder` and locks it as `lock_folder` does.

    Raises BlockingIOError where others hold it for longer than `wait` seconds, OSError where it
    cannot be created.
    """
    until = time.monotonic() + wait
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return lock_folder(folder, exclusive=exclusive)
        except FileNotFoundError:  # removed or renamed since
            continue
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.05)
