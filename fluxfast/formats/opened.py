"""Opens files of tensors by their content, never by their names, one or several under one set of
names.

Pickles (.ckpt, .pt, .bin) can run code when they are loaded: they are refused and never opened as
such. Nothing here interprets the tensors.
"""

from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from fluxfast.errors import ConfigError
from fluxfast.formats.base.gguf import Gguf
from fluxfast.formats.container import Safetensors


class Files:
    """The tensors of one or several files under one set of names. A context manager.

    Raises ConfigError for a file that cannot be read, and for a name that two files have.
    """

    def __init__(self, paths: list[Path]):
        self.containers: list[Safetensors | Gguf] = []
        self._container_of: dict[str, Safetensors | Gguf] = {}
        try:
            for path in paths:
                self._add(path)
        except BaseException:
            self.close()
            raise
        self.entries = {key: file.entries[key] for key, file in self._container_of.items()}
        self.metadata = {k: v for file in self.containers for k, v in file.metadata.items()}

    def _add(self, path: Path) -> None:
        file = _open_container(path)
        self.containers.append(file)
        for key in file.entries:
            if not key.isprintable():  # names go into messages, and so to a terminal
                raise ConfigError(
                    f"cannot read {path}: a tensor is called {key!r}",
                    hint="tensors have names of plain text",
                )
            if other := self._container_of.get(key):
                raise ConfigError(
                    f"{key} is in {other.path} and in {file.path}",
                    hint="keep the file that belongs to this model, or an index that names it",
                )
            self._container_of[key] = file

    def read(self, key: str) -> Tensor:
        return self._container_of[key].read(key)

    def file_of(self, key: str) -> Path:
        return self._container_of[key].path

    def close(self) -> None:
        for container in self.containers:
            container.close()
        self.containers, self._container_of = [], {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _open_container(path: Path) -> Safetensors | Gguf:
    reason, hint = None, "the file is missing, truncated or not safetensors"
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        if start.startswith(b"GGUF"):
            return Gguf(path)
        if problem := _not_safetensors(start):
            reason, hint = problem
        else:
            return Safetensors(path)
    except OSError as error:
        reason = error.strerror or str(error)
    except ConfigError:
        raise
    except (SafetensorError, ValueError, OverflowError, MemoryError) as error:
        reason = str(error) or type(error).__name__
    raise ConfigError(f"cannot read {path}: {' '.join(reason.split())}", hint=hint)


def _not_safetensors(start: bytes) -> tuple[str, str] | None:
    """Returns what a file is by its first bytes, and a hint; None if it may be safetensors."""
    again = "download the file again"
    if not start:
        return "it is empty", again
    if start[8:9] == b"{":
        return None  # the first eight bytes are a header's length, which may look like anything
    # a zip file, as torch saves today; protocols 2 to 5
    if start.startswith((b"PK\x03\x04", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")):
        return (
            "it is a pickle (.ckpt, .pt, .bin), which may run code when loaded and is never opened",
            "look for the model's .safetensors file",
        )
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, not the model itself", "fetch it with `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "it is a web page", again
    return None
