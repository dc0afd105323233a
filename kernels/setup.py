"""The kernels alone, with the C++ library where ../csrc and a compiler are there.

An sdist of this folder holds no ../csrc: NF4 and int8 on the CPU then run in torch.
"""

import os
import sys

from setuptools import setup

CSRC = "../csrc"
library = {}
if os.path.isdir(CSRC):
    sys.path.insert(0, CSRC)
    from build_library import native_library

    library = native_library(CSRC)

setup(**library)
