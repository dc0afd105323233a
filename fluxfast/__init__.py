"""fluxfast: FLUX.1 LoRA training on one GPU. Importing it loads nothing heavy."""

import logging
from typing import TYPE_CHECKING

from fluxfast.util.redact import masked

if TYPE_CHECKING:
    from fluxfast.formats.base.load import load_transformer

__version__ = "0.2.0"
__all__ = ["load_transformer"]

_LOGGER = logging.getLogger(__name__)


class _MaskTokens(logging.Handler):
    """Masks access tokens in what the package logs, before any handler that a caller adds."""

    def handle(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = masked(record.getMessage()), None
        fallback = logging.lastResort  # where there is no other handler, as without this one
        alone = not (logging.root.handlers or _LOGGER.handlers[1:])
        if fallback and alone and record.levelno >= fallback.level:
            fallback.handle(record)
        return True


_LOGGER.addHandler(_MaskTokens())


def __getattr__(name: str):
    if name == "load_transformer":  # imports torch, so only on first use
        from fluxfast.formats.base.load import load_transformer

        return load_transformer
    raise AttributeError(f"module 'fluxfast' has no attribute {name!r}")
