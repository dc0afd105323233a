"""The built package: what an install puts on the disk, and what `fluxfast_kernels` alone needs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALONE = """
import sys
for name in ("fluxfast numpy safetensors bitsandbytes diffusers transformers peft einops pydantic "
             "sentencepiece yaml").split():
    sys.modules[name] = None  # as if it were not installed
import torch
import fluxfast_kernels as fk
assert fk.__file__.startswith(sys.argv[1]), fk.__file__
weight = list(fk.nf4_quantize(torch.randn(128, 128)).tensors().values())
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel of this tree, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("fluxfast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("lib", "__*__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(folder), str(source)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_everything(installed):
    held = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    for package, base in (("fluxfast", ROOT), ("fluxfast_kernels", ROOT / "kernels")):
        for path in (base / package).rglob("*"):
            if path.suffix in (".py", ".json"):
                assert str(path.relative_to(base)) in held, path


@pytest.mark.parametrize("script", [ALONE, WITHOUT_TRITON], ids=["", "no triton"])
def test_the_kernels_need_torch_and_triton_alone(installed, tmp_path, script):
    """And on a system for which there is no Triton, torch alone."""
    assert "triton" in WITHOUT_TRITON and WITHOUT_TRITON != ALONE
    done = subprocess.run(
        [sys.executable, "-c", script, str(installed)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if shutil.which("c++"):
        assert done.stdout.strip() in ("portable", "avx2", "avx512")
