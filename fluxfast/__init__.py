"""fluxfast: FLUX.1 LoRA training on one GPU. Importing it loads nothing heavy."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxfast.formats.base.load import load_transformer

__version__ = "0.2.0"
__all__ = ["load_transformer"]


def __getattr__(name: str):
    if name == "load_transformer":  # imports torch, so only on first use
        from fluxfast.formats.base.load import load_transformer

        return load_transformer
    raise AttributeError(f"module 'fluxfast' has no attribute {name!r}")
