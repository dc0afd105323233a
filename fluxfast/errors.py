"""Errors that a user can fix: one message (what, got, allowed), an optional hint, no traceback."""


class FluxfastError(ValueError):
    """An error that the user can fix. The command line prints it and ends with exit code 1.

    hint: shown on a second line: what to change, or the command to run.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class DiskError(FluxfastError):
    """The disk refuses (full, read-only, no permission). Existing files are untouched."""


class LostRank(FluxfastError):
    """Another process of this run (see `distributed.py`) has ended."""


class ConfigError(FluxfastError):
    """The call or the configuration is wrong: exit code 2."""

    exit_code = 2
