"""fluxfast's kernels, importable by any trainer. Needs torch; importing it needs no GPU and no
compiler.
"""

from fluxfast_kernels.nf4 import NF4Tensor, nf4_absmax, nf4_decode, nf4_quantize

__all__ = ["NF4Tensor", "nf4_absmax", "nf4_decode", "nf4_quantize"]
