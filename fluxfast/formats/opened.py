"""Files opened by their content, never by their names, one or several under one set of tensors.

Pickles (.ckpt, .pt, .bin) can run code when they are loaded: they are refused and never opened as
such. Nothing here asks what the tensors mean.
"""

from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.formats.base_gguf import Gguf
from fluxfast.formats.container import Container, Safetensors


class Files:
    """The tensors of one or several files under one set of names. A context manager.

    Raises ConfigError for a file that cannot be read, and for a name that two files have.
    """

    def __init__(self, paths: list[Path]):
        self.containers: list[Container] = []
        self._where: dict[str, Container] = {}
        try:
            for path in paths:
                self.containers.append(open_container(path))
                self._add(self.containers[-1])
        except BaseException:
            self.close()
            raise
        self.entries = {key: file.entries[key] for key, file in self._where.items()}
        self.metadata = {k: v for file in self.containers for k, v in file.metadata.items()}

    def _add(self, file: Container) -> None:
        for key in file.entries:
            if other := self._where.get(key):
                raise ConfigError(
                    f"{key} is in {other.path} and in {file.path}",
                    hint="one of them is not of this model: keep one, or the index that names "
                    "the right ones",
                )
            self._where[key] = file

    def read(self, key: str) -> Tensor:
        return self._where[key].read(key)

    def file_of(self, key: str) -> Path:
        return self._where[key].path

    def close(self) -> None:
        for container in self.containers:
            container.close()
        self.containers, self._where = [], {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def open_container(path: Path) -> Container:
    """Open one file by its content. Raises ConfigError where it is damaged or of another kind."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    container = Gguf(path) if start.startswith(b"GGUF") else _open_safetensors(path, start)
    odd = next((key for key in container.entries if not key.isprintable()), None)
    if odd is not None:  # names go into messages: no line breaks, nothing that a terminal obeys
        container.close()
        raise _unreadable(path, f"a tensor is called {odd!r}", "tensors have names of plain text")
    return container


def _open_safetensors(path: Path, start: bytes) -> Safetensors:
    if reason := _no_safetensors(start):
        raise _unreadable(path, *reason)
    try:
        return Safetensors(path)
    except (OSError, SafetensorError, ValueError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _unreadable(path, reason) from None


def _unreadable(path: Path, reason: str, hint: str | None = None) -> ConfigError:
    hint = hint or "the file is missing, truncated or not safetensors"
    return ConfigError(f"cannot read {path}: {reason}", hint=hint)


def _no_safetensors(start: bytes) -> tuple[str, str] | None:
    """-> what the file is instead and a hint, told by its first bytes; None where it may be one."""
    again = "download the file again"
    if not start:
        return "it is empty", again
    if start[8:9] == b"{":
        return None  # the first eight bytes are a header's length, which may look like anything
    if start.startswith(b"PK\x03\x04") or _is_pickle(start):
        return (
            "it is a pickle (.ckpt, .pt, .bin), which may run code when loaded and is never opened",
            "look for the model's .safetensors file",
        )
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, not the model itself", "fetch it with `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "it is a web page", again
    return None


def _is_pickle(start: bytes) -> bool:
    """Protocol 2 to 5."""
    return start[0] == 0x80 and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
