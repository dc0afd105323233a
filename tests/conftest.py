"""Fixtures that several test files share."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def nano_model(tmp_path_factory) -> Path:
    """A nano FLUX in diffusers' folder layout (seed 0), built once for the whole run."""
    spec = importlib.util.spec_from_file_location("make_nano", ROOT / "examples/nano/make_nano.py")
    make_nano = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_nano)
    return make_nano.make_nano(tmp_path_factory.mktemp("nano") / "model", seed=0)
