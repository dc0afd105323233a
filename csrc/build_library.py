"""The build of csrc/ into fluxfast_kernels/lib/native.so, for both setup.py files (the root's and
kernels/'s). Not part of any package.

`quant/native.py` opens the library with ctypes. Without a C++ compiler the install succeeds; NF4
and int8 then run in torch. CXX names another compiler.
"""

import os
import shlex
import shutil
import subprocess
import sys

from setuptools import Extension
from setuptools.command.build_ext import build_ext

SOURCES = ("nf4.cpp", "int8.cpp")
HEADERS = ("cpu.h", "nf4.h", "nf4_x86.h", "int8.h", "int8_x86.h")
# -ffp-contract=off: a product and a sum round twice, as in torch
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]


def native_library(csrc: str) -> dict[str, object]:
    """Arguments of `setuptools.setup`. csrc: this folder, relative to setup.py."""
    extension = Extension(
        "fluxfast_kernels.lib.native",
        sources=[f"{csrc}/{name}" for name in SOURCES],
        depends=[f"{csrc}/{name}" for name in (*HEADERS, "build_library.py")],
        optional=True,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildLibrary}}


class BuildLibrary(build_ext):
    """An `Extension` here is one call of the compiler; setuptools puts its result where it belongs,
    in a wheel or, for an editable install, in the source tree.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no tag: no Python ABI is used

    def get_source_files(self) -> list[str]:
        """For an sdist, which holds nothing from outside its folder."""
        return [path for path in super().get_source_files() if not path.startswith("..")]

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
    """Returns why there is no library, or None. With OpenMP where the compiler has it."""
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
    errors = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return f"{compiler[0]}: {errors[0]}"
