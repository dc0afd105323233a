"""Fixtures that several test files share, and Triton's interpreter for the kernel tests."""

import gc
import importlib
import importlib.util
import os
import pkgutil
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _share_cores() -> None:
    """Beside other test processes, take a share of the cores, in child processes too."""
    import torch

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max(1, os.cpu_count() // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def _import_kernels_interpreted() -> None:
    """Import the kernels so that Triton interprets them on the CPU, with bf16 put right.

    The variable is set for the import alone: whatever else this process starts compiles as usual.
    The launchers are off until a kernel test asks for them.
    """
    import torch

    if torch.cuda.is_available():
        return  # there the kernels are compiled; a process can do only one of the two
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton_bf16

        triton_bf16.install()
        import fluxfast_kernels
        import triton.experimental.gluon  # noqa: F401  (Triton imports it at the first launch)
        from fluxfast_kernels.dispatch import backend

        for module in pkgutil.walk_packages(fluxfast_kernels.__path__, "fluxfast_kernels."):
            importlib.import_module(module.name)
    finally:
        del os.environ["TRITON_INTERPRET"]
    backend._cpu_launches = False


_share_cores()
_import_kernels_interpreted()


@pytest.fixture(scope="session")
def nano_model(tmp_path_factory) -> Path:
    """A nano FLUX in diffusers' folder layout (seed 0), built once for the whole run."""
    spec = importlib.util.spec_from_file_location("make_nano", ROOT / "examples/nano/make_nano.py")
    make_nano = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_nano)
    return make_nano.make_nano(tmp_path_factory.mktemp("nano") / "model", seed=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Four captioned images for a test file without images of its own."""
    from small import noise_pictures

    return noise_pictures(tmp_path_factory.mktemp("photos"), 4, caption="noise")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One cache folder for the runs of a test file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_thread():
    """Nano tensors are too small to share: a second thread waits longer than it works."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fluxfast(monkeypatch, capfd):
    """Returns a function that runs the command line in this process: CommandResult."""
    from small import CommandResult

    from fluxfast import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fluxfast", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return CommandResult(code, out, err)

    return run


@pytest.fixture
def log_lines():
    """A list that collects the lines fluxfast logs during the test."""
    from small import logged

    with logged() as lines:
        yield lines


@pytest.fixture
def configure(nano_model, photos, cache, tmp_path):
    """Returns `small_run` for the file's `photos`: call it with changes such as train__steps=2."""
    from small import small_run

    return partial(small_run, nano_model, photos, tmp_path / "runs", cache)


# ---------------------------------------------------------------- tiers


def pytest_collection_finish():
    """What is imported stays: without it each of the trainer's garbage collections takes 0.5 s."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """`grid(n)` on a parametrized test: n of its cases, spread evenly, are in the default tier, the
    others in the long one. Cases that need a GPU do not count.
    """
    grids: dict[str, list] = {}
    for item in items:
        if item.get_closest_marker("grid") and not item.get_closest_marker("gpu"):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in grids.values():
        count = min(len(cases), cases[0].get_closest_marker("grid").args[0])
        chosen = {round((i + 0.5) * len(cases) / count - 0.5) for i in range(count)}
        for index, item in enumerate(cases):
            if index not in chosen:
                item.add_marker(pytest.mark.slow)


# ---------------------------------------------------------------- tests/kernels

# libraries that a machine may lack where the kernels are tested
NEEDED = {
    "test_nf4": ("bitsandbytes",),
    "test_patch_diffusers": ("bitsandbytes", "diffusers", "peft"),
}
LACKING = {
    name: [library for library in libraries if importlib.util.find_spec(library) is None]
    for name, libraries in NEEDED.items()
}
collect_ignore = [f"kernels/{name}.py" for name, lacking in LACKING.items() if lacking]


def pytest_report_header() -> list[str]:
    lines = ((name, ", ".join(lacking)) for name, lacking in LACKING.items() if lacking)
    return [f"not collected: kernels/{name}.py: no {libraries}" for name, libraries in lines]


# these stay on the plain-torch and C++ paths of a CPU
WITHOUT_LAUNCHERS = {
    "test_native",
    "test_nf4",
    "test_package",
    "test_patch_diffusers",
}


def pytest_generate_tests(metafunc):
    """`device`: the CPU by the interpreter, and, with `-m gpu`, the GPU."""
    if "device" in metafunc.fixturenames and metafunc.definition.path.parent.name == "kernels":
        gpu = pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("device", ["cpu", gpu])


@pytest.fixture(autouse=True)
def launchers(request):
    """In tests/kernels the kernels are launched on CPU tensors too.

    Where there is a GPU this process compiles kernels and cannot interpret them: run `-m gpu`.
    """
    file = request.path
    if file.parent.name != "kernels" or file.stem in WITHOUT_LAUNCHERS:
        yield
        return
    import torch
    from fluxfast_kernels.dispatch import backend

    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    with backend.cpu_launches(not torch.cuda.is_available()):
        yield


@pytest.fixture(params=["reference", "launched"])
def path(request):
    """Both of what an op does: the plain-torch path of a CPU (in C++ where that was built), and the
    launchers."""
    from fluxfast_kernels.dispatch import backend

    with backend.cpu_launches(request.param == "launched"):
        yield request.param
