"""Every `python -m bench.NAME ...` of the pages, the Makefile and the scripts' own help is a call
that the script accepts."""

import argparse
import ast
import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "Makefile")]
PAGES += [*ROOT.glob("docs/*.md"), *(ROOT / "bench").rglob("*.py"), ROOT / "bench/LOG.md"]


def commands() -> list[str]:
    """Each up to the end of its line, a comment or a second column."""
    found = set()
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            text = ast.get_docstring(ast.parse(text)) or ""  # its help
        text = re.sub(r"\$\(if.*\)", "cpu", text).replace("bench.NAME", "")
        calls = re.findall(r"python -m (bench\.[^`\n#|;\[]+)", text)
        found |= {re.split(r"\s{2,}", call)[0].strip() for call in calls}
    return sorted(found)


class Parsed(Exception):
    """The arguments were accepted."""


@pytest.mark.parametrize("command", commands())
def test_a_documented_call_is_accepted(command, monkeypatch):
    name, *arguments = shlex.split(command)
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser, *given):
        parse_args(parser, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    package = find_spec(name).submodule_search_locations
    with pytest.raises(Parsed):
        importlib.import_module(f"{name}.cli" if package else name).main(arguments)


def test_every_script_is_documented():
    bench = ROOT / "bench"
    scripts = {
        ".".join(path.relative_to(bench).with_suffix("").parts)
        for path in bench.rglob("*.py")
        if path.name != "__main__.py" and '__name__ == "__main__"' in path.read_text()
    }
    scripts |= {
        ".".join(path.parent.relative_to(bench).parts) for path in bench.rglob("*/__main__.py")
    }
    assert scripts == {command.split()[0].removeprefix("bench.") for command in commands()}
