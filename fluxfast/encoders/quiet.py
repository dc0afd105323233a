"""Keeps transformers and diffusers quiet while they load what has been checked already."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Silence the notes of "transformers" or "diffusers" on unused weights, and their bars."""
    noise = importlib.import_module(f"{library}.utils.logging")
    level, bars = noise.get_verbosity(), noise.is_progress_bar_enabled()
    noise.set_verbosity_error()
    noise.disable_progress_bar()
    try:
        yield
    finally:
        noise.set_verbosity(level)
        if bars:
            noise.enable_progress_bar()
