"""Files written whole or not at all."""

import contextlib
import os
from pathlib import Path

from fluxfast.errors import FluxfastError


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
