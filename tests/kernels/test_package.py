"""Both distributions: what an install puts on the disk, and what `fluxfast_kernels` alone needs."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import fluxfast_kernels
import pytest

import fluxfast

ROOT = Path(__file__).resolve().parents[2]
ALONE = """
import sys
for name in ("fluxfast numpy safetensors bitsandbytes diffusers transformers peft einops pydantic "
             "sentencepiece yaml").split():
    sys.modules[name] = None  # as if it were not installed
import torch
import fluxfast_kernels as fk
assert fk.__file__.startswith(sys.argv[1]), fk.__file__
weight = fk.FrozenWeight(list(fk.nf4_quantize(torch.randn(128, 128)).tensors().values()))
x = torch.randn(1, 8, 128, requires_grad=True)
shift = torch.zeros(1, 1, 128)
y = fk.norm_modulate_lora_linear(x, shift, shift, weight)
fk.gelu_lora_linear(y, weight).sum().backward()
assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.quant import native
assert dispatch.choose("lora_gemm", 89, torch.bfloat16, "nf4", 64, 128, 128).kind == "fused"
print(native.isa())
"""


WITHOUT_TRITON = ALONE.replace('"sentencepiece yaml"', '"sentencepiece yaml triton"')


PIP = [sys.executable, "-m", "pip", "--quiet"]
LOCAL = ["--no-deps", "--no-build-isolation"]  # nothing is fetched


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What an install reads of this tree, without what a build left in it."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("lib", "build", "*.egg-info", "__*__")
    for name in ("fluxfast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def both(source, tmp_path_factory) -> Path:
    """The root's wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", *LOCAL, "-w", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def install_kernels(kernels: Path, target: Path) -> Path:
    command = [*PIP, "install", *LOCAL, "--target", str(target), str(kernels)]
    subprocess.run(command, check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory) -> Path:
    """`pip install ./kernels` into an empty folder."""
    return install_kernels(source / "kernels", tmp_path_factory.mktemp("site"))


def files_of(package: str, base: Path) -> set[str]:
    files = (path for path in (base / package).rglob("*") if path.is_file())
    kept = (path for path in files if path.suffix not in (".pyc", ".so"))
    return {str(path.relative_to(base)) for path in kept}


@pytest.mark.slow
def test_an_install_holds_every_file(both, alone):
    kernels = files_of("fluxfast_kernels", ROOT / "kernels")
    assert "fluxfast_kernels/py.typed" in kernels
    assert files_of("fluxfast_kernels", both) == files_of("fluxfast_kernels", alone) == kernels
    assert files_of("fluxfast", both) == files_of("fluxfast", ROOT)
    assert (both / "fluxfast" / "py.typed").is_file()
    assert not (alone / "fluxfast").exists()


@pytest.mark.slow
def test_what_the_distributions_say_of_themselves(both, alone):
    (trainer,) = metadata.distributions(path=[str(both)])
    (kernels,) = metadata.distributions(path=[str(alone)])
    assert (trainer.name, kernels.name) == ("fluxfast", "fluxfast-kernels")
    versions = {trainer.version, kernels.version, fluxfast.__version__}
    assert versions == {fluxfast_kernels.__version__}
    for each in (trainer, kernels):
        assert each.metadata["License-Expression"] == "Apache-2.0"
        assert any(path.name == "LICENSE" and path.locate().is_file() for path in each.files)
    needed = [line.split(">=")[0] for line in kernels.requires]
    assert needed == ["torch", "triton", "triton-windows"]  # by platform, one of the two
    assert set(kernels.requires) <= set(trainer.requires)


@pytest.mark.slow
@pytest.mark.parametrize("script", [ALONE, WITHOUT_TRITON], ids=["", "no triton"])
def test_the_kernels_need_torch_and_triton_alone(alone, tmp_path, script):
    """And on a system for which there is no Triton, torch alone."""
    assert "triton" in WITHOUT_TRITON and WITHOUT_TRITON != ALONE
    done = subprocess.run(
        [sys.executable, "-c", script, str(alone)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(alone)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if shutil.which("c++"):
        assert done.stdout.strip() in ("portable", "avx2", "avx512")


@pytest.mark.slow
def test_the_kernels_install_without_csrc(source, alone, both, tmp_path):
    """As from an sdist of kernels/: the same files, no library."""
    without_build = shutil.ignore_patterns("build")
    shutil.copytree(source / "kernels", tmp_path / "kernels", ignore=without_build)
    site = install_kernels(tmp_path / "kernels", tmp_path / "site")
    assert files_of("fluxfast_kernels", site) == files_of("fluxfast_kernels", alone)
    assert not [*site.rglob("*.so")]
    if shutil.which("c++"):
        for installed in (alone, both):
            assert [path.name for path in installed.rglob("*.so")] == ["native.so"]


def test_an_install_without_a_compiler_goes_on(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    how = {"cwd": tmp_path / "source", "env": os.environ | {"CXX": "/bin/false"}}
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stderr
    library = tmp_path / "source/kernels/fluxfast_kernels/lib/native.so"
    assert "csrc/ was not built" in done.stderr and not library.exists()
