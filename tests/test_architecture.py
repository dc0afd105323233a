"""Who may import whom, read from the source; importing anything does nothing; files stay short."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "fluxfast": ROOT / "fluxfast",
    "fluxfast_kernels": ROOT / "kernels" / "fluxfast_kernels",
}
LONGEST_FILE = 425  # lines

# module -> the modules of ours that it may import, anywhere in its source; `x.*` is all below x.
# From the bottom up: a module may only name what stands above it.
MAY_IMPORT = """
fluxfast_kernels.*       fluxfast_kernels.*
fluxfast.errors
fluxfast.lines
fluxfast.terminal        lines
fluxfast.draws
fluxfast.ranks           errors
fluxfast.files           errors
fluxfast.compat_table    errors
fluxfast.compat_form     lines errors
fluxfast.compat          compat_form compat_table errors
fluxfast.kohya_table     compat_table
fluxfast.settings        lines errors
fluxfast.kohya           kohya_table compat_table settings errors
fluxfast.config_errors
fluxfast.config          compat kohya settings config_errors errors
fluxfast.hub             errors
fluxfast.model.*         model.* draws errors fluxfast_kernels.*
fluxfast.objective       draws errors model.* fluxfast_kernels.*
fluxfast.memory.cards    errors
fluxfast.memory.ops      memory.cards errors
fluxfast.memory.work     model.* errors
fluxfast.memory.cost     memory.ops memory.work memory.cards model.* errors
fluxfast.memory.saved    memory.work model.*
fluxfast.memory.timeline
fluxfast.memory.copies   errors
fluxfast.memory.offload  memory.copies memory.timeline
fluxfast.memory.host     memory.copies memory.timeline
fluxfast.memory.graphs
fluxfast.memory.spill    errors
fluxfast.memory.choose   memory.* model.names model.saving
fluxfast.memory.plan     memory.* model.* errors
fluxfast.memory.fitting  memory.cards memory.plan errors ranks
fluxfast.memory.runtime  memory.* model.* errors fluxfast_kernels.dispatch.backend
fluxfast.optim           config errors
fluxfast.metrics         terminal errors files
fluxfast.interrupt
fluxfast.tree
fluxfast.resume          config errors
fluxfast.formats.*       formats.* model.* files errors fluxfast_kernels.*
fluxfast.checkpoint      formats.container tree files errors
fluxfast.load            formats.base model.* errors ranks
fluxfast.encoders.*      encoders.* formats.base_8bit formats.opened model.frozen_linear hub errors
fluxfast.data.buckets    errors
fluxfast.data.images     errors
fluxfast.data.reading    errors
fluxfast.data.skips      errors
fluxfast.data.captions   data.reading draws errors
fluxfast.data.store      formats.container files errors
fluxfast.data.scan       files data.images data.buckets data.reading data.skips data.store config errors
fluxfast.data.loader     data.store objective draws errors
fluxfast.data.cache      data.* encoders.* config draws errors ranks
fluxfast.ahead           data.loader model.flux objective config
fluxfast.planning        memory.* model.* data.buckets formats.base formats.lora_pieces formats.lora_read hub load config errors
fluxfast.step            ahead data.loader memory.graphs memory.runtime model.flux objective optim config ranks
fluxfast.diagnose        lines memory.runtime model.lora objective step
fluxfast.sample          model.* objective draws encoders.vae files errors
fluxfast.preview         sample model.* data.store config
fluxfast.validation      model.* objective draws data.store files errors
fluxfast.plots           validation files
fluxfast.report          plots validation settings files
fluxfast.prepare         data.cache data.captions data.store encoders.components formats.base_folder hub load model.spec config terminal validation files errors ranks
fluxfast.generate        sample prepare load encoders.text formats.lora config
fluxfast.watch           preview validation plots prepare model.* config files
fluxfast.setup           ahead checkpoint data.loader formats.lora formats.lora_write hub load memory.plan memory.runtime memory.work model.* optim terminal step config errors ranks
fluxfast.saves           checkpoint formats.lora model.* optim resume step config files errors
fluxfast.train           setup checkpoint config data.loader data.store diagnose errors files interrupt load memory.runtime memory.spill metrics model.* objective optim planning prepare report saves step watch ranks
fluxfast.layer_errors    model.* fluxfast_kernels.gemm.linear
fluxfast.check           config checkpoint data.loader data.store draws errors files formats.base layer_errors load terminal model.* objective prepare resume settings
fluxfast.doctor          load model.precision fluxfast_kernels.quant.native
fluxfast.cli_shared      config errors interrupt
fluxfast.cli             check config doctor errors lines terminal formats.inspect formats.lora_convert formats.quantize generate hub interrupt layer_errors load planning prepare sample settings train ranks cli_shared
fluxfast.__main__        cli
fluxfast                 load
fluxfast.data
"""  # noqa: E501

# these run on a bare GPU machine: torch, triton and, inside functions where it pays, numpy
ALONE = ("fluxfast_kernels", "fluxfast.model", "fluxfast.objective")
BARE = {"torch", "triton", *SOURCES, *sys.stdlib_module_names}

# slow or absent: imported inside the functions that need them, never at the top
LATE = {
    "transformers", "diffusers", "bitsandbytes", "huggingface_hub", "prodigyopt", "schedulefree",
    "tensorboard", "matplotlib", "peft", "accelerate", "gguf",
}  # fmt: skip


def _modules() -> dict[str, Path]:
    found = {}
    for package, root in SOURCES.items():
        for path in root.rglob("*.py"):
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _table() -> dict[str, list[str]]:
    rows = (line.split() for line in MAY_IMPORT.strip().splitlines())
    return {
        name: [word if word.startswith("fluxfast_") else f"fluxfast.{word}" for word in allowed]
        for name, *allowed in rows
    }


def _matches(module: str, pattern: str) -> bool:
    base = pattern.removesuffix(".*")
    return module == base or (pattern.endswith(".*") and module.startswith(f"{base}."))


def _allowed(module: str) -> list[str] | None:
    """The row of the most exact pattern; None where the table has none."""
    rows = [(name, allowed) for name, allowed in _table().items() if _matches(module, name)]
    return max(rows, key=lambda row: len(row[0]))[1] if rows else None


def _imports(tree: ast.AST) -> set[str]:
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
    return names


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
    assert _ours(_imports(_tree("fluxfast.load"))) == {
        "fluxfast.errors", "fluxfast.formats.base", "fluxfast.model.flux",
        "fluxfast.model.precision", "fluxfast.model.spec", "fluxfast.ranks",
    }  # fmt: skip


@pytest.mark.parametrize("module", sorted(MODULES))
def test_who_may_import_whom(module):
    allowed = _allowed(module)
    if allowed is None:
        # a package's own file, empty or nearly: it may not pull anything in
        assert MODULES[module].name == "__init__.py", f"{module} has no row in MAY_IMPORT"
        allowed = []
    wrong = {
        name
        for name in _ours(_imports(_tree(module)))
        if name != "fluxfast" and not any(_matches(name, pattern) for pattern in allowed)
    }
    assert not wrong, f"{module} may not import {', '.join(sorted(wrong))}"


def test_the_table_names_only_what_exists():
    for name, allowed in _table().items():
        for pattern in (name, *allowed):
            assert any(_matches(module, pattern) for module in MODULES), pattern


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


@pytest.mark.parametrize("module", sorted(MODULES))
def test_slow_libraries_are_imported_inside_functions(module):
    assert not _top_level_roots(module) & LATE


UNPICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def _unpickling(tree: ast.AST) -> list[str]:
    """What in a source reads or writes pickles: such a module, torch.load and torch.save under any
    name, numpy's allow_pickle, objects sent between processes.
    """
    found, torch = [], {"torch", "torch.serialization"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            torch |= {alias.asname for alias in node.names if alias.name in torch and alias.asname}
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            roots = {name.split(".")[0] for name in modules}
            found += sorted(roots & UNPICKLES)
            if isinstance(node, ast.ImportFrom) and "torch" in roots:
                found += [name for name in names if name in ("load", "save")]
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
            owner = ast.unparse(node.value)
            found += [f"{owner}.{node.attr}"] if owner in torch else []
        if isinstance(node, ast.Attribute | ast.alias):
            name = node.attr if isinstance(node, ast.Attribute) else node.name
            found += [name] if name.endswith(("_object", "_object_list")) else []
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


def test_nothing_reads_or_writes_a_pickle():
    others = [*(ROOT / "bench").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    paths = [*MODULES.values(), *others]
    assert len(others) > 20
    for path in paths:
        assert not _unpickling(ast.parse(path.read_text(encoding="utf-8"))), path
    for source in (
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')",
        "from torch import load", "torch.serialization.save(1, 'x')", "import joblib.memory",
        "def f():\n  import torch as t\n  t.load(0)", "np.load('x', allow_pickle=True)",
        "torch.distributed.all_gather_object([], 1)",
        "from torch.distributed import broadcast_object_list",
    ):  # fmt: skip
        assert _unpickling(ast.parse(source)), source
    assert not _unpickling(ast.parse("from safetensors.torch import load, save\nimage.save('x')"))


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
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "TMPDIR": str(work),
        "LATE": " ".join(LATE),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *names], cwd=work, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list(work.iterdir())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_stay_short(module):
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE


def test_what_is_installed(monkeypatch):
    """Two packages and what is below them; never one called `kernels`, which is taken on PyPI."""
    import setuptools

    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(encoding="utf-8"), "setup.py", "exec"), {})
    assert {name.split(".")[0] for name in given["packages"]} == set(SOURCES)
    directories = given["package_dir"]
    for name in given["packages"]:
        top, _, below = name.partition(".")
        folder = ROOT / directories.get(top, Path(directories[""], top)) / below.replace(".", "/")
        assert (folder / "__init__.py").is_file(), name
    assert {name for name in MODULES if MODULES[name].name == "__init__.py"} == set(
        given["packages"]
    )


def test_no_source_folder_is_called_kernels_as_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
