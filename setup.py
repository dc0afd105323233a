"""Two packages from one checkout: the trainer at the top, the kernels below kernels/.

`python setup.py build_ext --inplace` builds the C++ library alone, see csrc/build_library.py.
"""

import sys

from setuptools import find_packages, setup

sys.path.insert(0, "csrc")
from build_library import native_library  # noqa: E402

setup(
    packages=[*find_packages(include=["fluxfast", "fluxfast.*"]), *find_packages("kernels")],
    package_dir={"": ".", "fluxfast_kernels": "kernels/fluxfast_kernels"},
    package_data={
        "fluxfast": ["py.typed", "*.json", "memory/planner/*.json", "run/*.j2"],
        "fluxfast_kernels": ["py.typed", "dispatch/configs/*.json"],
    },
    **native_library("csrc"),
)
