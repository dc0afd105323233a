"""Finds the tiles and thresholds that the kernels load: `python -m bench.tune sweep`."""
