"""The C++ library gives the bytes that plain PyTorch gives, on every instruction set; it may be
missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fluxfast_kernels.quant import native
from fluxfast_kernels.quant.nf4 import (
    NF4Tensor,
    _quantize_blocks,
    dynamic_map,
    nf4_absmax,
    nf4_dequantize,
    nf4_dequantize_reference,
    nf4_quantize,
)

ROOT = Path(__file__).resolve().parents[2]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
built = pytest.mark.skipif(native.isa() is None, reason="csrc/ was not built: no C++ compiler")
SHAPES = [(1, 64), (3, 64), (257, 64), (130, 320)]  # blocks: 1, 3, 257, 650


def isas() -> list[str]:
    best = native.isa()
    return [] if best is None else list(native.ISAS[: native.ISAS.index(best) + 1])


def weights(shape: tuple[int, int], kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    W = torch.randn(shape, generator=generator)
    if kind == "mixed":  # zeros, denormals, huge and constant blocks among the others
        W[0] = 0.0
        W[-1] *= 1e30
        W[shape[0] // 2] = 1e-40
        W[shape[0] // 3] = -0.7
    return W


@built
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["random", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_instruction_set_gives_the_same_bytes(dtype, shape, kind, threads):
    W = weights(shape, kind).to(dtype)
    if not W.isfinite().all():
        W = W.nan_to_num(posinf=6e4, neginf=-6e4)
    packed, absmax = _quantize_blocks(W)
    plain = NF4Tensor(packed, absmax, shape)
    nested = nf4_quantize(W, nested=True)
    table, before = dynamic_map(torch.device("cpu")), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for isa in isas():
            found = native.nf4_quantize(W.contiguous(), isa)
            assert torch.equal(found[0], packed.view(-1)) and torch.equal(found[1], absmax), isa
            for quantized in (plain, nested):
                out = torch.full(shape, torch.nan, dtype=dtype)
                arguments = (quantized.absmax, quantized.nested_absmax, quantized.offset, table)
                native.nf4_dequantize(quantized.packed, *arguments, out, isa)
                expected = nf4_dequantize_reference(quantized, dtype)
                assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8)), isa
    finally:
        torch.set_num_threads(before)


@built
def test_a_nan_stays_one():
    W = weights((4, 64), "random")
    W[1, 5] = torch.nan
    for isa in isas():
        packed, absmax = native.nf4_quantize(W, isa)
        assert absmax[1].isnan() and absmax[[0, 2, 3]].isfinite().all(), isa
        out = torch.zeros(4, 64)
        native.nf4_dequantize(packed, absmax, None, None, None, out, isa)
        assert out[1].isnan().all() and out[0].isfinite().all(), isa


@built
def test_an_instruction_set_that_is_not_there():
    with pytest.raises(ValueError, match="with_isa must be"):
        lacking = "avx512" if native.isa() != "avx512" else "sse9"
        native.nf4_quantize(torch.zeros(1, 64), lacking)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(default):
    W = weights((130, 320), "random")
    expected = nf4_quantize(W, nested=True)
    torch.set_default_dtype(default)
    dynamic_map.cache_clear()
    try:
        found = nf4_quantize(W, nested=True)
        assert torch.equal(nf4_dequantize(found), nf4_dequantize(expected))
    finally:
        torch.set_default_dtype(torch.float32)
        dynamic_map.cache_clear()
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name


def test_a_transposed_weight_is_quantized_like_its_copy():
    W = weights((64, 128), "random").T
    assert torch.equal(nf4_quantize(W).packed, nf4_quantize(W.contiguous()).packed)


def test_without_the_library_the_bytes_are_the_same(monkeypatch):
    W = weights((130, 320), "mixed")
    with_it = nf4_quantize(W, nested=True)
    dense = nf4_dequantize(with_it, torch.bfloat16)
    monkeypatch.setattr(native, "_library", lambda: None)
    assert native.isa() is None
    without = nf4_quantize(W, nested=True)
    for name, tensor in with_it.tensors().items():
        assert torch.equal(tensor, without.tensors()[name]), name
    assert torch.equal(nf4_dequantize(without, torch.bfloat16), dense)
    assert torch.equal(nf4_absmax(without), nf4_absmax(with_it))


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_broken_library_is_ignored(content, tmp_path, monkeypatch):
    path = tmp_path / "native.so"
    path.write_bytes(content)
    monkeypatch.setattr(native, "LIBRARY", path)
    native._library.cache_clear()
    try:
        assert native.isa() is None
    finally:
        monkeypatch.undo()
        native._library.cache_clear()


def build(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess, Path]:
    """Build the extension of a copy of the tree -> the process, where the library would lie."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for package in ("fluxfast", "kernels/fluxfast_kernels"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("__version__ = '0'\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return done, tmp_path / "kernels" / "fluxfast_kernels" / "lib" / "native.so"


def test_an_install_without_a_compiler_goes_on(tmp_path):
    done, library = build(tmp_path, CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    assert "csrc/ was not built" in done.stderr and not library.exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
def test_an_install_with_one_builds_it(tmp_path):
    done, library = build(tmp_path)
    assert done.returncode == 0 and library.is_file(), done.stderr
