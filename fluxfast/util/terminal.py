"""What a command shows while it works, on stderr: log lines, progress bars and spinners.

The package logs under "fluxfast" and prints nothing. A caller from Python configures logging as
ever; the command line installs the handler below.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.progress import Progress, ProgressColumn

from fluxfast.util.redact import plain

_LOGGER = logging.getLogger("fluxfast")


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
