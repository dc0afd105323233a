"""Kernel tests run the Triton launchers: on a GPU compiled, elsewhere under the interpreter."""

import pytest
import torch
from fluxfast_kernels.dispatch import backend


def pytest_generate_tests(metafunc):
    """`device`: the CPU by the interpreter, and, with `-m gpu`, the GPU."""
    if "device" in metafunc.fixturenames:
        gpu = pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("device", ["cpu", gpu])


@pytest.fixture(autouse=True)
def launchers(request):
    """Launch the kernels on CPU tensors too. (`tests/conftest.py` switches that off elsewhere.)

    Where there is a GPU this process compiles kernels and cannot interpret them: run `-m gpu`.
    """
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    with backend.cpu_launches(not torch.cuda.is_available()):
        yield


@pytest.fixture(params=["reference", "launched"])
def path(request):
    """Both of what an op does: the plain-torch path of a CPU (in C++ where that was built), and the
    launchers."""
    with backend.cpu_launches(request.param == "launched"):
        yield request.param
