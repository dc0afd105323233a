"""Files written whole or not at all, rows read back from them, and locks of folders."""

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
from fluxfast.util.platform import lock_folder

log = logging.getLogger(__name__)

CHECK_FILE = "check.yaml"  # in a run's folder: what `fluxfast check` found, a setting of later runs


def expanded(path: str | Path) -> Path:
    """Returns the path with the home folder for a ~ in front, as a shell has it."""
    path = Path(path)
    with contextlib.suppress(RuntimeError):  # no such user: a name that begins with ~
        path = path.expanduser()
    return path


def open_regular(path: Path) -> BinaryIO:
    """Opens a file, or what a link names, for reading. Raises OSError, also for a pipe, a socket
    and a device: these might not end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(path, "rb")


def check_new(path: Path) -> None:
    """Raises ConfigError if something is at `path` already, even a link to nothing."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", hint="name the file to write")
    if os.path.lexists(path):
        raise ConfigError(f"{path} is there already", hint="remove it, or choose another name")


def check_no_links(folder: Path, *names: str) -> None:
    """Raises ConfigError if one of `names` in `folder` is a link: a run would write and delete in
    a place that nobody named.
    """
    for path in (folder / name for name in names):
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link to {os.readlink(path)}: a run writes into folders of its own",
                hint="remove the link; output_dir and cache_dir say where things go",
            )


def partial_of(path: Path) -> Path:
    """Returns the name of a file or folder while this process fills it."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def drop_partials(*folders: Path) -> None:
    """Removes the unfinished files and folders of killed processes from these folders, not from
    those below them. Needs an exclusive lock: another process may be filling its own.
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


def check_writable(folder: Path, hint: str | None = None) -> None:
    """Creates the folder where it is missing. Raises DiskError, before any work, where no file can
    be written into it.
    """
    write_atomic(path := folder / f".{os.getpid()}.writable", b"", hint)
    path.unlink()


def check_space(folder: Path, needed: int) -> None:
    """Raises DiskError where the disk of `folder`, which exists, has fewer bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"{folder} has {free / 2**30:.1f} GiB free, and each checkpoint takes at least "
            f"{needed / 2**30:.1f} GiB",
            hint="free some space, set output_dir to another disk, or a lower lora.rank",
        )


def with_step(row: Any) -> dict:
    """Returns a row of a log; raises ValueError unless it is a mapping with an integer `step`."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError("no row of a log")
    return row


def read_rows(path: Path, make: Callable[[Any], Any] = with_step) -> list:
    """Returns `make(line)` for every line of a .jsonl file, in order; [] without a file.

    Lines that are no JSON, or for which `make` raises ValueError or TypeError, are left out, and
    their number is logged: a crash may have cut them.
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
def keep_running(
    what: object, but: type[Exception] | tuple[()] = (), silent: bool = False
) -> Iterator[None]:
    """Logs what is raised inside as one warning, whatever it is: nothing that serves only looking
    (previews, charts, the report, logs) may end a run.

    what: names what is missing then. but: errors that are raised all the same. silent: logs none.
    """
    try:
        yield
    except but:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, FluxfastError):
            reason = error.message
        elif isinstance(error, OSError):
            what, reason = error.filename or what, error.strerror or reason
        if not silent:
            log.warning(f"note: {what}: {reason}; the run goes on")
        log.debug("what was raised", exc_info=True)


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Locks `folder` for this process alone; creates it, and removes it again if it stays empty.

    The lock ends with the process, however that ends. Raises FluxfastError if another process has
    it. Where there are no such locks, see `lock_folder`, everyone gets in.
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
    """Locks `folder` together with others that do the same. Whoever comes while nobody has it
    removes what killed processes left unfinished in it and in its folders `below`.
    """
    handle = None
    with contextlib.suppress(OSError):  # locked only to clean up: no reason not to work
        with contextlib.suppress(BlockingIOError):
            if (alone := _lock(folder, exclusive=True)) is not None:
                drop_partials(folder, *(folder / name for name in below))
                os.close(alone)
        handle = _lock(folder, exclusive=False, wait=2.0)
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
