"""What differs between operating systems: signals, folder locks, flushes, memory readings."""

import os
import signal
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ask a run to stop: Ctrl-C, `kill`, and the closing of the terminal, which Windows does not have
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


def lock_folder(folder: Path, *, exclusive: bool) -> int | None:
    """Locks a folder without waiting and returns a handle that holds the lock while it is open.

    Returns None where the platform, the file system or the folder's permissions allow no lock.
    Raises BlockingIOError where another process holds it, FileNotFoundError where it was removed or
    renamed meanwhile.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            if not os.path.samestat(os.stat(folder), os.fstat(handle)):
                raise FileNotFoundError
        except OSError:
            os.close(handle)
            raise
    except (BlockingIOError, FileNotFoundError):
        raise
    except OSError:  # a folder that may not be listed, NFS without a lock server
        return None
    return handle


def flush_folder(folder: Path) -> None:
    """Writes what was created, renamed or removed in `folder` to the disk. Does nothing on Windows,
    which cannot flush a folder. Raises OSError where the disk refuses.
    """
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def peak_resident_gib() -> float | None:
    """Returns the largest resident size of this process so far; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def available_memory() -> int | None:
    """Returns the bytes of host memory that are free or can be freed; None outside Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable:")), None)
