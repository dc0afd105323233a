"""What a command shows: log lines, progress bars and spinners on stderr, its result on stdout.

The package logs under "fluxfast" and prints nothing. A caller from Python configures logging as
ever; the command line installs the handler below.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

from fluxfast.util.redact import plain

_LOGGER = logging.getLogger("fluxfast")


class Output:
    """A standard stream whose loss ends nothing: a reader that is gone, a full disk under a log
    file, a terminal that was closed. Letters that its encoding lacks are written as \\xe9.

    error: the first that a write raised, None so far.
    """

    def __init__(self, stream: Any):
        # a closed one: what is opened next would get its number, and the lines meant for it
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.error: OSError | None = None
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text) or 0

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            self.error = self.error or error

    def settle(self) -> OSError | None:
        """Returns the first error. What could not be written is dropped: Python would try again at
        the end of the process, and fail.
        """
        self.flush()
        if self.error:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return self.error


@contextmanager
def lasting_output() -> Iterator[tuple[Output, Output]]:
    """Inside, stdout and stderr are `Output`s."""
    out, err = Output(sys.stdout), Output(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
        try:
            yield out, err
        finally:
            out.settle()
            err.settle()


class ConsoleHandler(logging.Handler):
    """Prints a record as one plain line, above a bar if there is one: not wrapped, not colored,
    without access tokens. Ranks above 0 are muted, but for their own share of the captions.
    """

    def __init__(self, console: Console, rank: int = 0):
        super().__init__(logging.INFO)
        self.console = console
        self.muted = rank > 0
        if self.muted:
            self.addFilter(logging.Filter("fluxfast.encoders"))

    def emit(self, record: logging.LogRecord) -> None:
        line = plain(record.getMessage())
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def log_to_terminal(console: Console | None = None, rank: int = 0) -> Iterator[None]:
    """Shows what is logged inside, from INFO on, and the bars of rank 0 if there is a terminal.

    console: stderr by default.
    """
    handler, level = ConsoleHandler(console or Console(stderr=True), rank), _LOGGER.level
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)


def progress_bars(*columns: str | ProgressColumn, transient: bool = False) -> Progress:
    """Returns progress bars, disabled where no terminal shows what is logged."""
    console = _terminal()
    return Progress(*columns, console=console, transient=transient, disable=console is None)


def terminal_width() -> int:
    """Returns the columns that a bar of `progress_bars` has; 80 where there is none."""
    console = _terminal()
    return 80 if console is None else console.width


def spinner(words: str) -> AbstractContextManager:
    """Returns a spinner that turns beside `words` while something loads."""
    console = _terminal()
    return nullcontext() if console is None else console.status(words)


def _terminal() -> Console | None:
    for handler in _LOGGER.handlers:
        if isinstance(handler, ConsoleHandler) and not handler.muted:
            return handler.console if handler.console.is_terminal else None
    return None
