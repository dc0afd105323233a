"""fluxfast's kernels, importable by any trainer: torch and triton are all they need.

Every op has a plain-torch `*_reference` beside it in its file. Importing needs no GPU, no driver
and no compiler.
"""

from fluxfast_kernels.blocks import flux_double_block, flux_single_block
from fluxfast_kernels.gemm.epilogue import LoRAUpdate
from fluxfast_kernels.integrations.diffusers import patch_diffusers, unpatch_diffusers
from fluxfast_kernels.ops.attention import attention, attention_reference
from fluxfast_kernels.ops.dropout import dropout, dropout_reference
from fluxfast_kernels.ops.flow_loss import (
    flow_loss,
    flow_loss_reference,
    flow_mix,
    flow_mix_reference,
)
from fluxfast_kernels.ops.gate_residual import gate_residual, gate_residual_reference
from fluxfast_kernels.ops.gelu import gelu_lora_linear, gelu_lora_linear_reference
from fluxfast_kernels.ops.lora_linear import lora_linear, lora_linear_reference
from fluxfast_kernels.ops.norm_modulate import (
    norm_modulate,
    norm_modulate_lora_linear,
    norm_modulate_lora_linear_reference,
    norm_modulate_reference,
)
from fluxfast_kernels.ops.qk_norm_rope import (
    qk_norm_rope_attention,
    qk_norm_rope_attention_reference,
    qk_norm_rope_reference,
)
from fluxfast_kernels.quant.frozen import FrozenWeight, quantize_8bit
from fluxfast_kernels.quant.hadamard import hadamard_reference, hadamard_rotate
from fluxfast_kernels.quant.nf4 import NF4Tensor, nf4_absmax, nf4_dequantize, nf4_quantize
from fluxfast_kernels.quant.rows import QuantizedRows, quantize_rows, quantize_rows_reference

__version__ = "0.2.0"
__all__ = [
    "FrozenWeight",
    "LoRAUpdate",
    "NF4Tensor",
    "QuantizedRows",
    "attention",
    "attention_reference",
    "dropout",
    "dropout_reference",
    "flow_loss",
    "flow_loss_reference",
    "flow_mix",
    "flow_mix_reference",
    "flux_double_block",
    "flux_single_block",
    "gate_residual",
    "gate_residual_reference",
    "gelu_lora_linear",
    "gelu_lora_linear_reference",
    "hadamard_reference",
    "hadamard_rotate",
    "lora_linear",
    "lora_linear_reference",
    "nf4_absmax",
    "nf4_dequantize",
    "nf4_quantize",
    "norm_modulate",
    "norm_modulate_lora_linear",
    "norm_modulate_lora_linear_reference",
    "norm_modulate_reference",
    "patch_diffusers",
    "qk_norm_rope_attention",
    "qk_norm_rope_attention_reference",
    "qk_norm_rope_reference",
    "quantize_8bit",
    "quantize_rows",
    "quantize_rows_reference",
    "unpatch_diffusers",
]
