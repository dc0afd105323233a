"""Files written whole or not at all, and folders used by one process at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fluxfast.errors import ConfigError, FluxfastError

CHECK_FILE = "check.yaml"  # in a run's folder: what `fluxfast check` found, a setting of later runs


def check_new(path: Path) -> None:
    """Raise ConfigError where there is something at `path` already, be it a link to nothing."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", hint="name the file to write")
    if os.path.lexists(path):
        raise ConfigError(f"{path} is there already", hint="remove it, or choose another name")


def write_atomic(path: Path, content: bytes, hint: str | None = None) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, put it in place.

    Raises FluxfastError naming the folder where the disk refuses (full, read-only, no permission).
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise FluxfastError(
            f"cannot write into {path.parent}: {error.strerror or error}",
            hint=hint or "free some space, or set output_dir to a folder that you may write to",
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if need be, removed again if still empty) for this process alone.

    Ends with the process, however that ends. Raises FluxfastError where another holds it; a file
    system or a platform without such locks lets everyone in.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FluxfastError(
            f"cannot write into {folder.parent}: {error.strerror or error}",
            hint="set output_dir to a folder that you may write to",
        ) from None
    handle = _locked(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # fails, as it should, where there is anything in it
        if handle is not None:
            os.close(handle)


def _locked(folder: Path) -> int | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise FluxfastError(
            f"another process is working in {folder}",
            hint="wait for it, stop it, or choose another name",
        ) from None
    except OSError:  # NFS without a lock server, say
        os.close(handle)
        return None
    return handle
