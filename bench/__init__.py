"""The benchmarks: each runs from the repository's root as `python -m bench.NAME`."""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

if find_spec("fluxfast_kernels") is None:  # a checkout that is not installed
    sys.path.append(str(ROOT / "kernels"))
