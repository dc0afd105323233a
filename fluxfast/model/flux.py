"""The FLUX.1 transformer, with Black Forest Labs' parameter names and fused layout.

Blocks, order and forward signature are those of BFL's `flux/model.py` and `flux/modules/layers.py`.
Shape legend: B batch, T tokens (text, then image), D hidden, H heads, C head width, F mlp width.
The base is frozen (buffers); the only parameters are the linears' LoRA factors.
"""

from functools import partial
from typing import Any, cast

import fluxfast_kernels as fk
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxfast.model.activations import KEEP, BlockRunner
from fluxfast.model.lora_dropout import DropoutClock
from fluxfast.model.lora_linear import LoRALinear
from fluxfast.model.modulation import MODULATION_ROWS, padded, timestep_embedding
from fluxfast.model.spec import FluxSpec

Rope = tuple[Tensor, Tensor]


def rope_tables(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> Rope:
    """Returns cos and sin of positions ids [B, T, 3], each fp32 [B, T, 1, C/2]."""
    angles = []
    for axis, width in enumerate(axes_dim):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width
        angles.append(ids[..., axis, None].double() / theta**exponent)
    angles = torch.cat(angles, dim=-1)[:, :, None, :]
    return angles.cos().float(), angles.sin().float()


class RMSNorm(nn.Module):
    """A norm's scale; the attention op applies it."""

    scale: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", None)


class QKNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(), RMSNorm()

    def scales(self) -> list[Tensor]:
        return [self.query_norm.scale, self.key_norm.scale]


class MLPEmbedder(nn.Module):
    def __init__(self, in_width: int, hidden: int):
        super().__init__()
        self.in_layer, self.out_layer = LoRALinear(in_width, hidden), LoRALinear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """A stream's shift, scale and gate, twice in a double block: see `Flux.modulation`."""

    def __init__(self, hidden: int, count: int):
        super().__init__()
        self.lin = LoRALinear(hidden, count * hidden)


class SelfAttention(nn.Module):
    """One stream's half of a double block's attention: qkv, its norms, and the projection."""

    def __init__(self, spec: FluxSpec):
        super().__init__()
        self.qkv = LoRALinear(spec.hidden_size, 3 * spec.hidden_size)
        self.norm = QKNorm()
        self.proj = LoRALinear(spec.hidden_size, spec.hidden_size)


def mlp(spec: FluxSpec) -> Any:
    hidden, width = spec.hidden_size, spec.mlp_hidden
    gelu = nn.GELU(approximate="tanh")
    return nn.Sequential(LoRALinear(hidden, width), gelu, LoRALinear(width, hidden))


class DoubleStreamBlock(nn.Module):
    """Text and image have their own weights and one attention."""

    def __init__(self, spec: FluxSpec):
        super().__init__()
        self.heads = spec.num_heads
        self.img_mod = Modulation(spec.hidden_size, 6)
        self.img_attn, self.img_mlp = SelfAttention(spec), mlp(spec)
        self.txt_mod = Modulation(spec.hidden_size, 6)
        self.txt_attn, self.txt_mlp = SelfAttention(spec), mlp(spec)

    def forward(
        self, img: Tensor, txt: Tensor, img_mod: Tensor, txt_mod: Tensor, rope: Rope, saved=KEEP
    ) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod.chunk(6, -1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod.chunk(6, -1)

        # both streams' heads, text first
        txt_qkv = self.txt_attn.qkv.norm_linear(txt, txt_shift1, txt_scale1)
        img_qkv = self.img_attn.qkv.norm_linear(img, img_shift1, img_scale1)

        # joint attention, then each stream takes its tokens back
        scales = self.txt_attn.norm.scales() + self.img_attn.norm.scales()
        attn = fk.qk_norm_rope_attention([txt_qkv, img_qkv], scales, *rope, self.heads)
        txt_attn, img_attn = attn.split([txt.shape[1], img.shape[1]], dim=1)

        img = self.img_attn.proj.gated_linear(img_attn, img_gate1, residual=img)
        txt = self.txt_attn.proj.gated_linear(txt_attn, txt_gate1, residual=txt)

        # each stream's own MLP
        (img_in, _, img_out), (txt_in, _, txt_out) = self.img_mlp, self.txt_mlp
        img_u = saved.recompute_mlp(img_in.norm_linear, img, img_shift2, img_scale2)
        txt_u = saved.recompute_mlp(txt_in.norm_linear, txt, txt_shift2, txt_scale2)
        img = img_out.gelu_linear(img_u, img_gate2, residual=img, saved_bits=saved.gelu_bits)
        txt = txt_out.gelu_linear(txt_u, txt_gate2, residual=txt, saved_bits=saved.gelu_bits)
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP in parallel on the joined stream (arXiv 2302.05442)."""

    def __init__(self, spec: FluxSpec):
        super().__init__()
        hidden, mlp = spec.hidden_size, spec.mlp_hidden
        self.heads, self.split = spec.num_heads, 3 * hidden
        self.modulation = Modulation(hidden, 3)
        self.linear1 = LoRALinear(hidden, 3 * hidden + mlp)
        self.norm = QKNorm()
        self.linear2 = LoRALinear(hidden + mlp, hidden)

    def forward(self, x: Tensor, modulation: Tensor, rope: Rope, saved=KEEP) -> Tensor:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        norm_linear = partial(self.linear1.norm_linear, split=self.split)
        qkv, u = saved.recompute_mlp(norm_linear, x, shift, scale)
        attn = fk.qk_norm_rope_attention([qkv], self.norm.scales(), *rope, self.heads)
        return self.linear2.gelu_linear(u, gate, residual=x, head=attn, saved_bits=saved.gelu_bits)


class LastLayer(nn.Module):
    def __init__(self, spec: FluxSpec):
        super().__init__()
        self.linear = LoRALinear(spec.hidden_size, spec.in_channels)
        layers = [nn.SiLU(), LoRALinear(spec.hidden_size, 2 * spec.hidden_size)]
        self.adaLN_modulation: Any = nn.Sequential(*layers)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear.norm_linear(x, shift, scale)


class Flux(nn.Module):
    """Predicts the velocity of packed latents. compute_dtype: of the activations."""

    def __init__(self, spec: FluxSpec, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.spec, self.compute_dtype, hidden = spec, compute_dtype, spec.hidden_size
        # one per block, double blocks first: see `activations.py`
        self.policies = ["keep"] * (spec.depth + spec.depth_single_blocks)
        self.offload: Any = None  # the engine of the policy `offload`: see `memory/offload.py`
        self.dropout_clock = DropoutClock()
        self.img_in = LoRALinear(spec.in_channels, hidden)
        self.txt_in = LoRALinear(spec.context_in_dim, hidden)
        self.time_in = MLPEmbedder(256, hidden)
        self.vector_in = MLPEmbedder(spec.vec_in_dim, hidden)
        self.guidance_in = MLPEmbedder(256, hidden) if spec.guidance_embed else None
        self.double_blocks: Any = nn.ModuleList(DoubleStreamBlock(spec) for _ in range(spec.depth))
        singles = range(spec.depth_single_blocks)
        self.single_blocks: Any = nn.ModuleList(SingleStreamBlock(spec) for _ in singles)
        self.final_layer = LastLayer(spec)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """BFL's signature. Returns the velocity [B, T_img, in_channels] in the compute dtype.

        img [B, T_img, 64] packed latents; img_ids [B or 1, T_img, 3]; txt [B, T_txt, 4096] T5
        states; txt_ids [B or 1, T_txt, 3]; timesteps [B] in 0..1, 1 is pure noise; y [B, 768]
        pooled CLIP; guidance [B], which a model that embeds it needs. modulation: the result of
        `modulation(timesteps, y, guidance)`, if computed already.
        """
        dtype = self.compute_dtype
        if modulation is None:
            if self.guidance_in is not None and guidance is None:
                raise ValueError("this model embeds guidance: pass guidance [B], 1.0 when training")
            modulation = self.modulation(timesteps, y, guidance)
        layers = self.modulation_linears()
        pieces = modulation[:, None, :].split([layer.out_features for layer in layers], dim=-1)
        pairs = zip(pieces, layers, strict=True)
        mods = iter([piece if layer.trains() else piece.detach() for piece, layer in pairs])

        img, txt = self.img_in(img.to(dtype)), self.txt_in(txt.to(dtype))
        rope = rope_tables(
            torch.cat([txt_ids, img_ids], dim=1), self.spec.axes_dim, self.spec.theta
        )
        length = txt.shape[1]
        run = BlockRunner(self.policies, self.offload, (img, txt), self.spec.num_heads)

        for block in self.double_blocks:
            img, txt = run(block, (img, txt), next(mods), next(mods), rope)

        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = run(block, (x,), next(mods), rope)

        run.done()
        return self.final_layer(x[:, length:], next(mods))

    def modulation(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Returns shifts, scales and gates of all blocks and the last layer, side by side.

        timesteps, guidance [B], y [B, 768], as in `forward`; without guidance its embedding is left
        out. Computed in padded groups of MODULATION_ROWS, so that a row's bits do not depend on the
        other samples.
        """
        inputs = [timesteps, y] if guidance is None else [timesteps, y, guidance]
        if any(layer.drops() for layer in self.modulation_linears()):
            # dropout masks belong to the batch's own samples; such rows are never cached
            return self._modulation_rows(*inputs)
        groups = zip(*(padded(x).split(MODULATION_ROWS) for x in inputs), strict=True)
        pieces = [self._modulation_rows(*group) for group in groups]
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0])[: len(y)]

    def _modulation_rows(self, t: Tensor, y: Tensor, guidance: Tensor | None = None) -> Tensor:
        dtype = self.compute_dtype
        vec = self.time_in(timestep_embedding(t).to(dtype)) + self.vector_in(y.to(dtype))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(dtype))
        vec = F.silu(vec)
        return torch.cat([layer(vec) for layer in self.modulation_linears()], dim=-1)

    def linear(self, name: str) -> LoRALinear:
        """Returns the linear with that BFL name."""
        return cast(LoRALinear, self.get_submodule(name))

    def modulation_linears(self) -> list[LoRALinear]:
        """Returns the modulation's linears in the order of its columns."""
        doubles = [mod.lin for b in self.double_blocks for mod in (b.img_mod, b.txt_mod)]
        singles = [block.modulation.lin for block in self.single_blocks]
        return [*doubles, *singles, self.final_layer.adaLN_modulation[1]]
