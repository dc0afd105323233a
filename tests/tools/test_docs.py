"""README, docs/ and the other documents: their commands parse or run, their links and files exist,
what is generated in them is up to date.
"""

import argparse
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from fluxfast import __version__
from fluxfast.cli import app
from fluxfast.config import reference
from fluxfast.config.schema import build_config

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels" / "README.md"])
NANO = "examples/nano/pretrained"
PROGRAMS = {"make", "fluxfast", "torchrun", "python", "pytest", "pip", "pre-commit", "source"}


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def blocks(language: str, *documents: Path) -> list[str]:
    return [
        text
        for document in documents or DOCUMENTS
        for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", text_of(document), re.M | re.S)
        if name == language
    ]


def commands(*documents: Path) -> list[list[str]]:
    """Returns the words of each line of the bash blocks, with variables put in and without
    `> FILE`.
    """
    lines, variables = [], {}
    for line in "\n".join(blocks("bash", *documents)).splitlines():
        words = shlex.split(re.sub(r"\$(\w+)", lambda m: variables[m[1]], line), comments=True)
        if len(words) == 1 and re.fullmatch(r"[A-Z]+=.*", words[0]):
            name, _, variables[name] = words[0].partition("=")
        elif words:
            words[0] = Path(words[0]).name  # .venv/bin/python
            lines.append(words[: words.index(">")] if ">" in words else words)
    return lines


def arguments_of(*program: str) -> list[str]:
    """Returns what follows a program's name, or the module that it launches, each once."""
    lines = [words for words in commands() if words[0] == program[0] and program[-1] in words]
    return sorted({shlex.join(words[words.index(program[-1]) + 1 :]) for words in lines})


def test_every_command_is_of_a_known_program():
    assert {words[0] for words in commands()} <= PROGRAMS
    assert all(words[1] == "-m" for words in commands() if words[0] == "python")


@pytest.mark.parametrize("command", arguments_of("fluxfast") + arguments_of("torchrun", "fluxfast"))
def test_fluxfast_commands_parse(command):
    name, *arguments = shlex.split(command)
    parsed = typer.main.get_command(app).commands[name].make_context(name, arguments)
    target = parsed.params.get("target")
    assert target is None or (ROOT / target).exists(), target


@pytest.mark.parametrize("command", arguments_of("python", "-m"))
def test_module_commands_parse(command, monkeypatch):
    """The module is there, and its argument parser takes the arguments."""
    module, *arguments = shlex.split(command)
    assert importlib.util.find_spec(module) is not None
    if not module.startswith("bench."):
        return

    class Parsed(BaseException):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, given=None, namespace=None):
        parse(parser, given, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


def test_make_targets_and_paths_exist():
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.M))
    named = {words[1] for words in commands() if words[0] == "make"}
    named |= set(re.findall(r"`make ([a-z-]+)", "".join(map(text_of, DOCUMENTS))))
    assert {"train", "test", "test-long", "lint"} <= named <= targets
    for words in commands():
        if words[0] in ("pip", "pytest"):
            paths = [word for word in words[1:] if "/" in word]
            assert all((ROOT / path).exists() for path in paths), words


@pytest.mark.slow
def test_the_readmes_commands_run(tmp_path, monkeypatch):
    """In its order, shortened and on the nano model, in a folder that holds the examples alone."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    shortened = {
        "device": "cpu",
        "model.path": NANO,
        "data.0.resolution": 64,
        "train.steps": 2,
        "train.batch_size": 2,
        "validation.timesteps": 1,
        "sample.width": 64,
        "sample.height": 64,
        "sample.steps": 2,
    }
    runner = CliRunner()
    for program, *arguments in commands(README):
        if program != "fluxfast":
            continue
        if arguments[0] == "train":
            for key, value in shortened.items():
                arguments += ["--set", f"{key}={value}"]
        done = runner.invoke(app, arguments)
        assert done.exit_code == 0, (arguments, done.output, done.exception)
    for name in ("nano/report.html", "photos/photos.safetensors", "nano/kohya.safetensors"):
        assert (tmp_path / "runs" / name).is_file(), name


def test_configurations_validate():
    for text in blocks("yaml"):
        raw = {"model": {"path": "x"}, "data": {"folder": "."}} | yaml.safe_load(text)
        build_config(raw)


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def test_the_tree_is_as_the_architecture_says():
    """Top-level modules and folders of both packages, and the repository's folders."""
    (block,) = blocks("", ROOT / "docs" / "architecture.md")
    listed: dict[str, set[str]] = {"": set()}
    for line in block.splitlines():
        if not line.startswith(" "):
            folder = line.split()[0]
            listed[""].add(folder.split("/")[0])
            listed[folder] = set()
        elif line.split()[0].endswith("/"):
            listed[folder].add(line.split()[0].rstrip("/"))
        else:
            listed[folder] |= set(line.split())
    assert listed[""] <= set(names_in(ROOT))
    for package in ("fluxfast/", "kernels/fluxfast_kernels/"):
        assert listed[package] == set(names_in(ROOT / package)) - {"lib"}, package


def names_in(folder: Path) -> list[str]:
    """Of its folders and, in a package, its modules."""
    packaged = (folder / "__init__.py").is_file()
    return [
        path.stem
        for path in folder.iterdir()
        if not path.name.startswith((".", "__"))
        if path.is_dir() or packaged and path.suffix == ".py"
    ]


def test_the_import_rules_are_the_tests():
    (block,) = blocks("text", ROOT / "docs" / "architecture.md")
    assert f'RULES = """\n{block}"""' in text_of(ROOT / "tests/tools/test_architecture.py")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_exist(document):
    text = re.sub(r"^```.*?^```$", "", text_of(document), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(target), re.M)
            assert anchor in map(slug, headings), link
    for path in re.findall(r"`((?:tests|docs|bench|examples|fluxfast|csrc)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (bench[\w.]*|fluxfast[\w.]*)", text):
        if module != "bench.NAME":
            assert importlib.util.find_spec(module) is not None, module


def test_the_readme_is_short_and_tells_no_lies():
    text = text_of(README)
    assert len(text.splitlines()) <= 130
    assert "pip install fluxfast" not in text  # there is no such package
    assert f"## {__version__}" in text_of(ROOT / "CHANGELOG.md")


def test_make_train_announces_what_it_does():
    """Before anything is installed, and with the number of steps that it takes."""
    done = subprocess.run(["make", "-n", "train"], cwd=ROOT, capture_output=True, text=True)
    first = done.stdout.index("echo")
    steps = yaml.safe_load(text_of(ROOT / "examples/nano/zorb.yaml"))["train"]["steps"]
    assert f"{steps} steps" in done.stdout and "minute" in done.stdout
    assert "fluxfast train" in done.stdout[first:] and "pip" not in done.stdout[:first]


def test_ci_calls_the_readmes_command():
    assert "make test" in text_of(ROOT / ".ci" / "run")


@pytest.mark.slow
def test_tables_hold_what_the_rows_say():
    from bench.report import cli as report

    assert report.main(["--check"]) == 0, "python -m bench.report"


def test_settings_are_described_as_they_are():
    assert text_of(ROOT / "docs/config.md") == reference.markdown(), "make docs"


def test_python_examples_run(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    whole = [text for text in blocks("python") if re.match("import torch|from fluxfast ", text)]
    assert len(whole) == 3
    for text in whole:
        exec(compile(text, "document", "exec"), {})
