"""What of a data set cannot be used: logged at once, a line a file, and counted at the end."""

import logging
from pathlib import Path

from fluxfast.errors import FluxfastError

log = logging.getLogger(__name__)

_LISTED = 5  # of an error that names several


class Skips:
    """Gathers why files are left out; where the data is to be used strictly, to end the run.

    pictures: the images left out.
    """

    def __init__(self):
        self.pictures: set[Path] = set()
        self._said: set[str] = set()
        self._refused: list[FluxfastError] = []

    def add(self, error: FluxfastError, strict: bool, image: Path | None = None) -> None:
        """error: names the file and the reason. image: what is not trained on for it, if it is one
        image. A file that spoils several is told of once.
        """
        if image is not None:
            self.pictures.add(image)
        if error.message in self._said:
            return
        self._said.add(error.message)
        if strict:
            self._refused.append(error)
        else:
            log.warning(f"skipped: {error.message}")

    def check(self) -> None:
        """Raises FluxfastError for what was refused so far, all of it at once."""
        refused = self._refused
        if len(refused) > 1:
            more = "; …" if len(refused) > _LISTED else ""
            listed = "; ".join(error.message for error in refused[:_LISTED]) + more
            raise FluxfastError(
                f"{len(refused)} files cannot be used: {listed}", hint=refused[0].hint
            )
        if refused:
            raise refused[0]

    def conclude(self, total: int) -> None:
        """Log how many of `total` pictures are left out, if anything was."""
        if self._said:
            log.warning(
                f"{len(self.pictures)} of {total} pictures skipped; strict: true beside "
                "data.folder makes that an error"
            )
