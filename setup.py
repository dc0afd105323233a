"""Two roots: the trainer at the top, the kernels as a package of their own below kernels/.

csrc/ becomes the plain shared library fluxfast_kernels/lib/native.so, which quant/native.py opens
with ctypes. Without a C++ compiler the install succeeds; NF4 and int8 then run in torch.
`python setup.py build_ext --inplace` builds the library alone; CXX names another compiler.
"""

import os
import shlex
import shutil
import subprocess
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# -ffp-contract=off: a product and a sum round twice, as in torch
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]


class BuildLibrary(build_ext):
    """An `Extension` here is one call of the compiler; setuptools puts its result where it belongs,
    in a wheel or, for an editable install, in the source tree.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no tag: no Python ABI is used

    def build_extension(self, ext: Extension) -> None:
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.exists(target):
            os.remove(target)  # an earlier build's, which a failure now must not pass on
        reason = compile_library(ext.sources, target)
        if reason:
            hint = "NF4 and int8 on the CPU will run in torch"
            print(f"fluxfast: csrc/ was not built, {hint} ({reason})", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        folder = self.get_finalized_command("build_py").get_package_dir("fluxfast_kernels.lib")
        os.makedirs(folder, exist_ok=True)
        super().copy_extensions_to_source()


def compile_library(sources: list[str], target: str) -> str | None:
    """-> why there is no library, or None. With OpenMP where the compiler has it, else without."""
    named = os.environ.get("CXX")
    compiler = shlex.split(named) if named else [shutil.which("c++") or shutil.which("g++")]
    if not compiler or compiler[0] is None:
        return "no C++ compiler found"
    for extra in (["-fopenmp"], []):
        command = [*compiler, *FLAGS, *extra, *sources, "-o", target]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
        if done.returncode == 0:
            return None
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return f"{compiler[0]}: {said[0]}"


setup(
    packages=[*find_packages(include=["fluxfast", "fluxfast.*"]), *find_packages("kernels")],
    package_dir={"": ".", "fluxfast_kernels": "kernels/fluxfast_kernels"},
    package_data={
        "fluxfast": ["memory/planner/*.json", "run/*.j2"],
        "fluxfast_kernels.dispatch": ["configs/*.json"],
    },
    ext_modules=[
        Extension(
            "fluxfast_kernels.lib.native",
            sources=["csrc/nf4.cpp", "csrc/int8.cpp"],
            depends=[f"csrc/{name}.h" for name in ("cpu", "nf4", "nf4_x86", "int8", "int8_x86")],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
)
