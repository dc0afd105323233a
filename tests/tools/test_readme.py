"""The README's own claims: its commands parse, its paths exist, its file map is the tree."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from fluxfast.cli import app
from fluxfast.config.schema import build_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [text for name, text in found if name == language]


def commands(program: str) -> list[list[str]]:
    lines = [
        shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()
    ]
    return [words for words in lines if words and words[0] == program]


def test_fluxfast_commands_parse():
    group = typer.main.get_command(app)
    found = commands("fluxfast")
    assert len(found) >= 4
    for _, name, *arguments in found:
        command = group.commands[name]
        context = command.make_context(name, list(arguments))
        target = context.params.get("target")
        assert target is None or (ROOT / target).exists(), target


def test_fluxfast_commands_run(tmp_path, monkeypatch):
    """Each one, in the README's order, from a folder that holds nothing but the examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    for words in commands("fluxfast"):
        done = runner.invoke(app, words[1:])
        assert done.exit_code == 0, (words, done.output, done.exception)
    for name in ("runs/nano/report.html", "runs/photos/photos.safetensors"):
        assert (tmp_path / name).is_file(), name


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {words[1] for words in commands("make")}
    assert {"train", "test"} <= named <= targets


def test_configurations_validate():
    (text,) = blocks("yaml")
    config = build_config(yaml.safe_load(text))
    assert config.train.optimizer == "adamw8bit" and config.data[0].resolution == [512, 768, 1024]


def test_links_and_test_files_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"`(tests/\w+\.py)`", README):
        assert (ROOT / path).exists(), path


def test_file_map_is_the_tree():
    (block,) = [block for block in blocks("") if "fluxfast/cli.py" in block]
    listed = {line.split()[0].rstrip("/") for line in block.splitlines() if line.strip()}
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fluxfast").iterdir()
        if path.name not in ("__pycache__", "__init__.py", "__main__.py")
    }
    others = {"kernels/fluxfast_kernels", "csrc", "bench", "examples/nano", "tests"}
    assert listed == modules | others


@pytest.mark.parametrize("phrase", ["pip install fluxfast"])
def test_never_says(phrase):
    assert phrase not in README


def test_ci_calls_the_readmes_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_tables_hold_what_the_rows_say(capsys):
    from bench.report import cli as report

    assert report.main(["--check"]) == 0, "python -m bench.report"


def test_python_examples_run():
    kernels = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```$", README + kernels, re.M | re.S)
    whole = [text for text in found if text.startswith("import torch")]
    assert len(whole) == 2
    for text in whole:
        exec(compile(text, "README", "exec"), {})
