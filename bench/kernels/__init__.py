"""Every op of `fluxfast_kernels` by itself: `python -m bench.kernels`."""
