"""What differs between operating systems: signals, folder locks, flushes, memory readings."""

import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
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


def available_memory(root: Path = Path("/")) -> int:
    """Returns the bytes of host memory that this process can still take: what is free or can be
    freed, less where its cgroups (a container's, a pod's) allow less. Half of what the machine has
    where the system does not report what is free: outside Linux and Windows.
    """
    if sys.platform == "win32":
        import ctypes

        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX, whose first field is its size
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[2]  # ullAvailPhys
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    rows = [line.split() for line in lines]
    sizes = {row[0]: int(row[1]) * 1024 for row in rows if len(row) == 3}  # the others are counts
    free = sizes.get("MemAvailable:")
    if free is None:  # before Linux 3.14, in some sandboxes
        free = sizes.get("MemFree:", 0) + sizes.get("Cached:", 0)
    free = free or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(0, min([free, *_cgroup_memory(root)]))


def is_wsl() -> bool:
    """Returns whether this is WSL2, or Docker on it, whose kernel is the same."""
    return "microsoft" in platform.release().lower()


def _cgroup_memory(root: Path = Path("/")) -> Iterator[int]:
    """Yields what each limit on this process's cgroup and those above it leaves: the limit less
    what is used, page cache that can be dropped not counted. Version 2, and 1's memory controller.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            mount, names = "sys/fs/cgroup/memory", files
        else:
            continue
        # of a container's group only the mount may be seen, and that as the root
        folder = root / mount / group.lstrip("/")
        for each in (folder, *folder.parents):
            if not each.is_relative_to(root / mount):
                break
            with suppress(OSError, ValueError):  # no such file, or "max"
                limit, used = (int((each / name).read_text(encoding="utf-8")) for name in names[:2])
                rows = (each / "memory.stat").read_text(encoding="utf-8").splitlines()
                stat = dict(row.split() for row in rows)
                yield limit - used + int(stat.get(names[2], 0))
