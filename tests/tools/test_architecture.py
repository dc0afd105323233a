"""Who may import whom, read from the source; importing does nothing; a function fits a screen."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "fluxfast": ROOT / "fluxfast",
    "fluxfast_kernels": ROOT / "kernels" / "fluxfast_kernels",
}
# From the bottom up. A room may import what stands above it and its own line; `memory.planner` is
# kept apart from the runtime, `data.loader` from the encoders, and no circle is allowed anywhere.
RULES = """
errors rng util distributed
model objective
config
formats memory data encoders optim sampling
step
run setup tools
train
cli
"""
HEIGHT = {room: line for line, rooms in enumerate(RULES.split("\n")) for room in rooms.split()}
RUNTIME = ("runtime", "cuda_graphs", "offload", "host", "copies", "spill")  # of fluxfast.memory

# these run on a bare GPU machine: torch, triton and, inside functions where it pays, numpy
ALONE = ("fluxfast_kernels", "fluxfast.model", "fluxfast.objective")
BARE = {"torch", "triton", *SOURCES, *sys.stdlib_module_names}

# slow or absent: imported inside the functions that need them, never at the top
LATE = {"transformers", "diffusers", "bitsandbytes", "huggingface_hub", "prodigyopt", "peft"}
LATE |= {"schedulefree", "tensorboard", "matplotlib", "accelerate", "gguf"}


MODULES = {
    ".".join([package, *path.relative_to(root).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for package, root in SOURCES.items()
    for path in root.rglob("*.py")
}


def _matches(module: str, pattern: str) -> bool:
    base = pattern.removesuffix(".*")
    return module == base or (pattern.endswith(".*") and module.startswith(f"{base}."))


def _room(module: str) -> str:
    """`fluxfast.memory.planner.cost` -> `memory`."""
    return module.split(".")[1]


@cache
def _imports(tree: ast.AST) -> frozenset[str]:
    """Full names of what is imported anywhere below `tree`; ours down to the module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else node.module)
    return frozenset(names)


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in SOURCES}


def _at_import(body: list[ast.stmt]):
    """Statements that run when the module is imported: all but the bodies of functions."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        for part in ("body", "orelse", "finalbody"):
            yield from _at_import(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _at_import(handler.body)


def test_the_sources_are_found():
    assert {"fluxfast", "fluxfast.model.flux", "fluxfast.data.loader"} <= set(MODULES)
    assert "fluxfast_kernels.quant.nf4" in MODULES
    assert {"fluxfast.objective", "fluxfast.model.flux"} <= _ours(_imports(_tree("fluxfast.step")))


def test_no_import_runs_upwards():
    for module in MODULES:
        ours = {name for name in _imports(_tree(module)) if name.split(".")[0] == "fluxfast"}
        if module.split(".")[0] == "fluxfast_kernels":
            assert not ours, module
        elif module not in ("fluxfast", "fluxfast.__main__"):
            ours.discard("fluxfast")
            wrong = {name for name in ours if HEIGHT[_room(name)] > HEIGHT[_room(module)]}
            assert not wrong, f"{module} may not import {', '.join(sorted(wrong))}"


def test_the_rules_name_every_room():
    rooms = {_room(name) for name in MODULES if name.startswith("fluxfast.")} - {"__main__"}
    assert rooms == set(HEIGHT)


def test_the_planner_does_not_import_the_runtime():
    for module in MODULES:
        if _matches(module, "fluxfast.memory.planner.*"):
            wrong = {f"fluxfast.memory.{name}" for name in RUNTIME} & _imports(_tree(module))
            assert not wrong, f"{module} imports {wrong}"


def test_the_configuration_does_not_need_torch():
    for module in MODULES:
        if _matches(module, "fluxfast.config.*"):
            assert "torch" not in {name.split(".")[0] for name in _reach(module)}, module


def test_nobody_imports_the_command_line():
    for module in MODULES:
        names = _imports(_tree(module))
        assert "fluxfast.cli" not in names or module == "fluxfast.__main__"
        assert "fluxfast.train" not in names or module == "fluxfast.cli"


def test_nothing_imports_in_a_circle():
    graph = {module: _ours(_imports(_tree(module))) & set(MODULES) for module in MODULES}
    graph["fluxfast"] = set()  # its one import is inside __getattr__
    graph = {module: names - {module} for module, names in graph.items()}
    while free := [module for module, names in graph.items() if not names & set(graph)]:
        for module in free:
            del graph[module]
    assert not graph, f"a circle among {sorted(graph)}"


def _reach(module: str) -> set[str]:
    """Everything that importing or calling `module` may import, through our own modules."""
    reached, waiting = set(), [module]
    while waiting:
        for name in _imports(_tree(waiting.pop())) - reached:
            reached.add(name)
            if name in MODULES and name != "fluxfast":
                waiting.append(name)
    return reached


def test_the_loader_never_reaches_an_encoder():
    reached = _reach("fluxfast.data.loader")
    assert "fluxfast.data.store" in reached
    assert not any(name.startswith("fluxfast.encoders") for name in reached)
    assert not {name.split(".")[0] for name in reached} & LATE


def _top_level_roots(module: str) -> set[str]:
    nodes = _at_import(_tree(module).body)
    return {name.split(".")[0] for node in nodes for name in _imports(node)}


@pytest.mark.parametrize("package", ALONE)
def test_what_runs_on_a_bare_machine(package):
    """Kernels, model and objective: what they import at the top, and all that they can reach."""
    for module in MODULES:
        if _matches(module, f"{package}.*"):
            assert _top_level_roots(module) <= BARE, module
            roots = {name.split(".")[0] for name in _reach(module)}
            assert roots <= BARE | {"numpy"}, module


def test_slow_libraries_are_imported_inside_functions():
    assert not {module for module in MODULES if _top_level_roots(module) & LATE}


UNPICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def _unpickling(tree: ast.AST) -> list[str]:
    """Returns what in a source reads or writes pickles: such a module, torch.load and torch.save
    under any name, numpy's allow_pickle, objects sent between processes.
    """
    unpickling, torch = [], {"torch", "torch.serialization"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            torch |= {alias.asname for alias in node.names if alias.name in torch and alias.asname}
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            roots = {name.split(".")[0] for name in modules}
            unpickling += sorted(roots & UNPICKLES)
            if isinstance(node, ast.ImportFrom) and "torch" in roots:
                unpickling += [name for name in names if name in ("load", "save")]
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
            unpickling += [ast.unparse(node)] if ast.unparse(node.value) in torch else []
        if isinstance(node, ast.Attribute | ast.alias):
            name = node.attr if isinstance(node, ast.Attribute) else node.name
            unpickling += [name] if name.endswith(("_object", "_object_list")) else []
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            unpickling.append("allow_pickle")
    return unpickling


def test_nothing_reads_or_writes_a_pickle():
    others = [*(ROOT / "bench").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    assert len(others) > 20
    for path in [*MODULES.values(), *others]:
        assert not _unpickling(ast.parse(path.read_text(encoding="utf-8"))), path
    for source in (
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "torch.serialization.save(1, 'x')",
        "import joblib.memory",
        "def f():\n  import torch as t\n  t.load(0)",
        "np.load('x', allow_pickle=True)",
        "torch.distributed.all_gather_object([], 1)",
        "from torch.distributed import broadcast_object_list",
    ):
        assert _unpickling(ast.parse(source)), source
    assert not _unpickling(ast.parse("from safetensors.torch import load, save\nimage.save('x')"))


def test_text_is_opened_in_an_encoding_of_its_own():
    """Not in that of the machine: a file of one is read on another."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            words = [word.arg for word in node.keywords]
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            binary = owner in ("os", "Image") or any("b" in str(mode) for mode in modes)
            method = isinstance(node.func, ast.Attribute) and name in ("write_text", "read_text")
            if method or (name == "open" and not binary):
                assert "encoding" in words, f"{module}:{node.lineno}"


PROBE = """
import importlib, os, sys
import torch, torch.utils.checkpoint, safetensors.torch, pydantic, rich.progress, typer, PIL.Image
before = dict(os.environ), torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
for name in sys.argv[1:]:
    importlib.import_module(name)
after = dict(os.environ), torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
assert before[0] == after[0], set(before[0].items()) ^ set(after[0].items())
assert torch.equal(before[1], after[1]) and before[2:] == after[2:]
late = {name.split(".")[0] for name in sys.modules} & set(os.environ["LATE"].split())
assert not late, late
"""


def test_importing_does_nothing(tmp_path):
    """Every module, in one process: no output, no file, no environment, no slow library."""
    names = [name for name in MODULES if not name.endswith("__main__")]
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    env = {**os.environ, "HOME": str(home), "TMPDIR": str(work), "LATE": " ".join(LATE)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *names], cwd=work, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list(work.iterdir())


LONGEST_FUNCTION = 60  # lines: a screen


def test_a_function_fits_a_screen():
    for module in MODULES:
        for node in ast.walk(_tree(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{module}.{node.name} has {lines} lines"


def test_the_top_level_stays_small():
    assert len([path for path in SOURCES["fluxfast"].glob("*.py") if path.stem[:2] != "__"]) <= 12


def test_what_is_installed(monkeypatch):
    """Two packages and what is below them; never one called `kernels`, which is taken on PyPI."""
    import setuptools

    installed = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: installed.update(arguments))
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(encoding="utf-8"), "setup.py", "exec"), {})
    packages, directories = installed["packages"], installed["package_dir"]
    assert {name.split(".")[0] for name in packages} == set(SOURCES)
    for name in packages:
        top, _, below = name.partition(".")
        folder = ROOT / directories.get(top, Path(directories[""], top)) / below.replace(".", "/")
        assert (folder / "__init__.py").is_file(), name
    assert set(packages) == {name for name in MODULES if MODULES[name].name == "__init__.py"}
    assert not (ROOT / "kernels" / "__init__.py").exists()
