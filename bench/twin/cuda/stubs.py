"""Sets the twin up: torch's CUDA build without NVIDIA's libraries, and libraries that stand in for
them, built with gcc into build/twin.

`fakecudart.c` is the runtime, `driver.c` the driver, `nvml.c` the management library. Of the other
libraries torch and bitsandbytes only need the symbols, with their versions: each is a function that
returns 0, but for those of SPECIAL.
"""

import os
import re
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

from bench import ROOT

HERE = Path(__file__).parent
BUILD = ROOT / "build" / "twin"

# library -> its soname and how its symbols begin; the first that fits has a symbol
LIBRARIES = {
    "cudart": ("libcudart.so.13", "(cuda|__cuda)"),
    "cublasLt": ("libcublasLt.so.13", "cublasLt"),
    "cublas": ("libcublas.so.13", "cublas"),
    "cudnn": ("libcudnn.so.9", "cudnn"),
    "cufft": ("libcufft.so.12", "cufft"),
    "curand": ("libcurand.so.10", "curand"),
    "cusparseLt": ("libcusparseLt.so.0", "cusparseLt"),
    "cusparse": ("libcusparse.so.12", "cusparse"),
    "cusolver": ("libcusolver.so.12", "cusolver"),
    "nccl": ("libnccl.so.2", "p?nccl"),
    "nvshmem_host": ("libnvshmem_host.so.3", "nvshmem"),
    "nvrtc": ("libnvrtc.so.13", "nvrtc"),
    "cufile": ("libcufile.so.0", "cuFile"),
    "cuda": ("libcuda.so.1", "cu[A-Z]"),
}
# of cuBLAS, what multiplies for torch: launched on the handle's stream
_PRODUCTS = ("GemmEx", "GemmStridedBatchedEx", "Sgemm_v2", "SgemmStridedBatched")
# what has to answer or to be counted
SPECIAL = {
    "cublas": "int cublasCreate_v2(void **h) { *h = (void *)16; return 0; }"
    "int cublasGetVersion_v2(void *h, int *v) { *v = 130000; return 0; }"
    "int cublasGetMathMode(void *h, int *m) { *m = 0; return 0; }"
    "int cublasGetPointerMode_v2(void *h, int *m) { *m = 0; return 0; }"
    "int fake_launch(void *); static __thread void *stream;"
    "int cublasSetStream_v2(void *h, void *s) { stream = s; return 0; }"
    + "".join(f"int cublas{name}() {{ return fake_launch(stream); }}" for name in _PRODUCTS),
    "cublasLt": "#include <string.h>\n"
    "int cublasLtCreate(void **h) { *h = (void *)16; return 0; }"
    "int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e,"
    " void *p, int r, char *out, int *n) { memset(out, 0, 96); *n = 1; return 0; }"
    "int fake_launch(void *);"
    "int cublasLtMatmul(void *h, void *desc, void *alpha, void *a, void *al, void *b, void *bl,"
    " void *beta, void *c, void *cl, void *d, void *dl, void *algo, void *work, size_t n, void *s)"
    " { return fake_launch(s); }",
    "cudnn": "#include <stddef.h>\nsize_t cudnnGetVersion(void) { return 92000; }"
    "int cudnnCreate(void **h) { *h = (void *)16; return 0; }",
    "cusparse": "int cusparseCreate(void **h) { *h = (void *)16; return 0; }",
    "cusolver": "int cusolverDnCreate(void **h) { *h = (void *)16; return 0; }",
    "nvrtc": "#include <stddef.h>\n#include <string.h>\n"
    "int nvrtcVersion(int *a, int *b) { *a = 13; *b = 0; return 0; }"
    "int nvrtcCreateProgram(void **p, const char *s, const char *n, int c, void *h, void *i)"
    " { *p = (void *)16; return 0; }"
    "int nvrtcGetPTXSize(void *p, size_t *n) { *n = 8; return 0; }"
    "int nvrtcGetCUBINSize(void *p, size_t *n) { *n = 8; return 0; }"
    "int nvrtcGetPTX(void *p, char *o) { memset(o, 0, 8); return 0; }"
    "int nvrtcGetCUBIN(void *p, char *o) { memset(o, 0, 8); return 0; }"
    'int nvrtcGetLoweredName(void *p, const char *n, const char **o) { *o = "kernel"; return 0; }'
    "int nvrtcGetProgramLogSize(void *p, size_t *n) { *n = 1; return 0; }"
    'const char *nvrtcGetErrorString(int e) { return "twin"; }',
    "nccl": "int ncclGetVersion(int *v) { *v = 22907; return 0; }",
    "cuda": f'#include "{HERE / "driver.c"}"\n',
}


def environment() -> dict[str, str]:
    """Returns the environment in which Python runs torch's CUDA build over the libraries; sets them
    up at the first call, with a download of 530 MB. TWIN_SITE: a folder that has the wheel already.
    """
    site = Path(os.environ.get("TWIN_SITE") or _site())
    libraries = BUILD / "lib"
    _build(site, libraries)
    path = [site, ROOT, ROOT / "kernels"]
    changes = {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "LD_LIBRARY_PATH": f"{libraries}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_LIBCUDA_PATH": str(libraries),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    return {**os.environ, **changes}


def _site() -> Path:
    """Returns the folder of torch's CUDA wheel, of the version in constraints.txt."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(r"^torch==([\d.]+)$", text, re.MULTILINE)
    assert found
    # `===`: never the CPU build, whose local version `==` would accept
    wanted, site = f"torch==={found[1]}", BUILD / f"torch-{found[1]}"
    if not (site / "torch" / "lib" / "libtorch_cuda.so").exists():
        options = ["--no-deps", "--no-compile", "--upgrade", "--target", str(site)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, wanted], check=True)
    return site


def _build(site: Path, target: Path) -> None:
    """Builds the libraries, unless they are newer than what they are made of."""
    sources = [*HERE.glob("*.c"), Path(__file__)]
    built = target / "complete"
    if built.exists() and built.stat().st_mtime > max(s.stat().st_mtime for s in sources):
        return
    target.mkdir(parents=True, exist_ok=True)
    symbols = _symbols(site)
    for library, (soname, _) in LIBRARIES.items():
        _compile(library, symbols[library], target / soname)
    subprocess.run([*_gcc("libnvidia-ml.so.1", target), str(HERE / "nvml.c")], check=True)
    built.touch()


def _symbols(site: Path) -> dict[str, list[tuple[str, str]]]:
    """Returns library -> (symbol, version) of what torch and bitsandbytes want of it."""
    users = [*(site / "torch" / "lib").glob("*.so*")]
    bitsandbytes = find_spec("bitsandbytes")
    if bitsandbytes and bitsandbytes.origin:
        users += Path(bitsandbytes.origin).parent.glob("libbitsandbytes_cuda130.so")
    wanted = set()
    for user in users:
        command = ["nm", "-D", "--undefined-only", str(user)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        wanted |= {line.split()[-1] for line in lines.splitlines()}
    symbols = defaultdict(list)
    for symbol in sorted(wanted):
        name, _, version = symbol.partition("@")
        library = next((k for k, (_, start) in LIBRARIES.items() if re.match(start, name)), None)
        if library:
            symbols[library].append((name, version))
    return symbols


def _gcc(soname: str, folder: Path) -> list[str]:
    options = ["-O1", "-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{soname}"]
    return ["gcc", *options, "-o", str(folder / soname)]


def _compile(library: str, symbols: list[tuple[str, str]], target: Path) -> None:
    special = SPECIAL.get(library, "")
    written = [special, *((HERE / f).read_text() for f in _own(library))]
    defined = set(re.findall(r"\b(\w+)\s*\([^;{]*\)\s*\{", "\n".join(written)))
    stubs = [f"long {name}() {{ return 0; }}\n" for name, _ in symbols if name not in defined]
    source = target.parent / f"{library}.c"
    source.write_text(f"{special}\n{''.join(stubs)}")
    command = [*_gcc(target.name, target.parent), str(source)]
    command += [str(HERE / file) for file in _own(library) if file != "driver.c"]
    triton = find_spec("triton")
    assert triton and triton.origin  # has CUDA's headers
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    command += ["-ldl", "-lpthread", f"-I{include}"]
    versions = sorted({version for _, version in symbols if version})
    if versions:
        script = target.parent / f"{library}.map"
        nodes = [
            f"{v} {{ global: {' '.join(f'{n};' for n, own in symbols if own == v)} }};\n"
            for v in versions
        ]
        script.write_text("".join(nodes) + f"TWIN_{library} {{ global: fake_*; }};\n")
        command.append(f"-Wl,--version-script={script}")
    subprocess.run(command, check=True)


def _own(library: str) -> list[str]:
    return {"cudart": ["fakecudart.c"], "cuda": ["driver.c"]}.get(library, [])
