"""Every `python -m bench.NAME ...` of the pages, the Makefile and the scripts' own help is a call
that the script accepts."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "Makefile")]
PAGES += [*ROOT.glob("docs/*.md"), *(ROOT / "bench").rglob("*.py"), ROOT / "bench/LOG.md"]
NAMES = {
    *("step", "kernels", "quality", "quantize", "saved", "compile", "faults", "run", "report"),
    *("activations", "roofline", "tune", "dx_layouts", "calibrate"),
}


def text_of(path: Path) -> str:
    """Of a script its help."""
    text = path.read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(text)) or "" if path.suffix == ".py" else text
    return re.sub(r"\$\(if.*\)", "cpu", text).replace("bench.NAME", "")


def commands() -> list[str]:
    """Up to the end of the line, a comment or a second column."""
    calls = (re.findall(r"python -m (bench\.[^`\n#|;\[]+)", text_of(path)) for path in PAGES)
    return sorted({re.split(r"\s{2,}", call)[0].strip() for page in calls for call in page})


def main_of(name: str):
    try:
        return importlib.import_module(f"{name}.cli").main
    except ModuleNotFoundError:
        return importlib.import_module(name).main


class Parsed(Exception):
    """The arguments were accepted."""


@pytest.mark.parametrize("command", commands())
def test_a_call_that_is_written_down_is_accepted(command, monkeypatch):
    name, *arguments = shlex.split(command)
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser, *given):
        real(parser, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        main_of(name)(arguments)


def test_every_script_is_named_somewhere():
    assert {command.split()[0].removeprefix("bench.") for command in commands()} >= NAMES
