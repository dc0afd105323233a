"""What ai-toolkit, LyCORIS, kohya and SimpleTuner put in the place of diffusers' and peft's code,
restated as far as `patch_diffusers` sees it: where each keeps what, and what its forward computes.
"""

import inspect
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------- LoRA in the place of a forward


class ModuleInPlace(nn.Module):
    """Takes the place of a linear's forward, which it keeps as `org_forward`."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.lora_down = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, linear.out_features, bias=False)
        for factor in (self.lora_down, self.lora_up):
            random = torch.randn(factor.weight.shape, generator=generator)
            factor.weight.data = random * 0.5 * factor.weight.shape[1] ** -0.5
        self.scale, self.lora_dim = 5 / rank, rank
        self.register_buffer("alpha", torch.tensor(5.0))
        self.dropout = self.rank_dropout = self.module_dropout = None
        self.org_module = [linear]  # in a list: no child

    def apply_to(self) -> None:
        linear = self.org_module[0]
        self.org_forward, linear.forward = linear.forward, self.forward

    def down_and_up(self, x: Tensor) -> Tensor:
        down = self.lora_down(x.to(self.lora_down.weight.dtype))
        if self.dropout is not None and self.training:
            down = F.dropout(down, self.dropout)
        return self.lora_up(down)


class Network(nn.Module):
    """ai-toolkit's: its modules, and what switches and scales all of them."""

    def __init__(self, multiplier=1.0):
        super().__init__()
        self.is_active, self.is_merged_in, self.is_lorm = True, False, False
        self.multiplier = multiplier
        self.unet_loras = nn.ModuleList()

    @property
    def multiplier(self):
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value):
        self._multiplier = value
        self.torch_multiplier = torch.tensor(value if isinstance(value, list) else [value])


class LoRAModule(ModuleInPlace):
    """ai-toolkit's: the network has the multiplier, one or one a sample."""

    def __init__(self, *arguments, network: Network):
        super().__init__(*arguments)
        self.network_ref = weakref.ref(network)
        self.scalar, self.multiplier = torch.tensor(1.0), 7.0  # of which the latter is not used

    def forward(self, x: Tensor) -> Tensor:
        network, y = self.network_ref(), self.org_forward(x)
        if not network.is_active or network.is_merged_in or network._multiplier == 0:
            return y
        strength = network.torch_multiplier.view(-1, *[1] * (x.ndim - 1))
        update = self.down_and_up(x) * (self.scale * self.scalar)
        return y + (update * strength).to(y.dtype)


class DoRAModule(LoRAModule):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.magnitude = nn.Parameter(torch.tensor(1.25))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.magnitude


class LokrModule(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, generator, network=None):
        super().__init__()
        self.lokr_w1 = nn.Parameter(0.1 * torch.randn(2, 2, generator=generator))
        shape = (linear.out_features // 2, linear.in_features // 2)
        self.lokr_w2 = nn.Parameter(0.1 * torch.randn(shape, generator=generator))
        self.org_module, self.multiplier = [linear], 1.0

    apply_to = ModuleInPlace.apply_to

    def forward(self, x: Tensor) -> Tensor:
        return self.org_forward(x) + F.linear(x, torch.kron(self.lokr_w1, self.lokr_w2))


class LoConModule(ModuleInPlace):
    """LyCORIS': adds to the weight; `scalar` may train, `wd` is DoRA."""

    def __init__(self, *arguments, network=None):
        super().__init__(*arguments)
        self.scalar, self.multiplier, self.wd = nn.Parameter(torch.tensor(0.8)), 1.5, False
        self.dropout, self.rank_dropout, self.module_dropout = nn.Identity(), 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        update = self.lora_up.weight @ self.lora_down.weight * (self.scalar * self.scale)
        return self.org_forward(x) + F.linear(x, update.to(x.dtype) * self.multiplier)


class KohyaModule(ModuleInPlace):
    """kohya's: a multiplier of its own and, here, no `scale` beside alpha."""

    def __init__(self, *arguments, network=None):
        super().__init__(*arguments)
        self.multiplier, self.ggpo_sigma, self.split_dims = 0.6, None, None
        del self.scale

    def forward(self, x: Tensor) -> Tensor:
        scale = self.multiplier * self.alpha / self.lora_dim
        return self.org_forward(x) + self.down_and_up(x) * scale


def apply_network(model, kind=LoRAModule, targets=None, rank=3, seed=1, multiplier=1.0) -> Network:
    """A trained module over each linear of the blocks whose path has one of `targets`."""
    network, generator = Network(multiplier), torch.Generator().manual_seed(seed)
    for path, linear in model.named_modules():
        wanted = targets is None or any(target in path for target in targets)
        if "_blocks." in path and isinstance(linear, nn.Linear) and wanted:
            module = kind(linear, rank, generator, network=network)
            module.apply_to()
            network.unet_loras.append(module)
    return network.train()


# ---------------------------------------------------------------- SimpleTuner's transformer


def rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, T, H, C] by cos and sin [T, C] or [B, T, C]."""
    cos, sin = (table.unsqueeze(-2) for table in rope)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


class FluxAttnProcessor2_0:
    """A mask [B, T] of the tokens that are seen; rotation tables of all samples or of each."""

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
    ):
        def heads(names: str, x: Tensor, norms: str) -> list[Tensor]:
            linears = (getattr(attn, names.format(n)) for n in "qkv")
            q, k, v = (linear(x).unflatten(-1, (attn.heads, -1)) for linear in linears)
            return [getattr(attn, norms.format("q"))(q), getattr(attn, norms.format("k"))(k), v]

        streams, txt = [heads("to_{}", hidden_states, "norm_{}")], encoder_hidden_states
        if txt is not None:
            streams.insert(0, heads("add_{}_proj", txt, "norm_added_{}"))
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
        q, k = rotated(q, image_rotary_emb), rotated(k, image_rotary_emb)
        mask = None if attention_mask is None else (attention_mask > 0)[:, None, None, :]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        joint = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        if txt is None:
            return joint
        txt, img = joint.tensor_split([txt.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](img)), attn.to_add_out(txt)


def per_token(x: Tensor) -> Tensor:
    """A modulation [B, D] or, one a token, [B, T, D]."""
    return x[:, None] if x.ndim == 2 else x


def finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504)


class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb,
        context_temb=None,
        image_rotary_emb=None,
        attention_mask=None,
    ):
        def modulation(norm, temb):
            return map(per_token, norm.linear(norm.silu(temb)).chunk(6, dim=-1))

        streams = [encoder_hidden_states, hidden_states]
        tembs = [temb if context_temb is None else context_temb, temb]
        norms = [(self.norm1_context, self.norm2_context), (self.norm1, self.norm2)]
        parts = [list(modulation(norm, t)) for (norm, _), t in zip(norms, tembs, strict=True)]
        normed = [
            norm.norm(x) * (1 + scale) + shift
            for (norm, _), x, (shift, scale, *_) in zip(norms, streams, parts, strict=True)
        ]
        attn = self.attn(
            hidden_states=normed[1],
            encoder_hidden_states=normed[0],
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        for i, mlp in enumerate((self.ff_context, self.ff)):
            _, _, gate1, shift, scale, gate2 = parts[i]
            x = streams[i] + gate1 * attn[1 - i]
            streams[i] = x + gate2 * mlp(norms[i][1](x) * (1 + scale) + shift)
        return finite(streams[0]), streams[1]


class OlderTransformerBlock(FluxTransformerBlock):
    """Before there was one modulation a token."""

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb,
        image_rotary_emb=None,
        attention_mask=None,
    ):
        inputs = hidden_states, encoder_hidden_states, temb, None, image_rotary_emb, attention_mask
        return super().forward(*inputs)


OlderTransformerBlock.__name__ = "FluxTransformerBlock"


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    def forward(self, hidden_states, temb, image_rotary_emb=None, attention_mask=None):
        parts = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=-1)
        shift, scale, gate = map(per_token, parts)
        x = self.norm.norm(hidden_states) * (1 + scale) + shift
        options = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
        both = [self.attn(hidden_states=x, **options), self.act_mlp(self.proj_mlp(x))]
        return finite(hidden_states + gate * self.proj_out(torch.cat(both, dim=2)))


class FluxTransformer2DModel(transformer_flux.FluxTransformer2DModel):
    """routes: tokens of the image that blocks from `first` on see alone, [B, kept]."""

    routes: Tensor | None = None
    first, older = 1, False

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        pooled_projections=None,
        timestep=None,
        img_ids=None,
        txt_ids=None,
        guidance=None,
        attention_mask=None,
        return_dict=True,
    ):
        img, txt = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        n, temb = txt.shape[1], self._temb(timestep, guidance, pooled_projections)
        txt_temb = temb if temb.ndim == 2 else temb.mean(dim=1)
        rope: Any = self.pos_embed(torch.cat([txt_ids, img_ids]))
        for block in self.transformer_blocks:
            more = () if self.older else (txt_temb,)
            inputs = img, txt, temb, *more, rope, attention_mask
            txt, img = self._call(block, *inputs)
        every = img
        if self.routes is not None:
            index = self.routes[..., None]
            img = torch.take_along_dim(img, index, dim=1)
            rope = tuple(self._routed(table, n) for table in rope)
        x = torch.cat([txt, img], dim=1)
        if temb.ndim == 3:
            temb = torch.cat([txt_temb[:, None].expand(-1, n, -1), temb], dim=1)
        for block in self.single_transformer_blocks:
            x = self._call(block, x, temb, rope, attention_mask)
        img = x[:, n:]
        if self.routes is not None:
            img = every.scatter(1, index.expand_as(img), img)
        out = self.norm_out(img, temb if temb.ndim == 2 else temb.mean(dim=1))
        return (self.proj_out(out),)

    def _temb(self, timestep, guidance, pooled) -> Tensor:
        """[B, D] or, of timesteps [B, T], [B, T, D]."""
        if timestep.ndim == 1:
            return self.time_text_embed(timestep * 1000, guidance * 1000, pooled)
        columns = [self._temb(t, guidance, pooled) for t in timestep.unbind(1)]
        return torch.stack(columns, dim=1)

    def _routed(self, table: Tensor, n: int) -> Tensor:
        batch = self.routes.shape[0]
        text = table[:n].expand(batch, -1, -1)
        return torch.cat([text, table[n:][self.routes]], dim=1)

    def _call(self, block, *inputs):
        """By position under gradient checkpointing, by name else."""
        if self.training and self.gradient_checkpointing:
            return checkpoint(block, *inputs, use_reentrant=False)
        names = inspect.signature(type(block).forward).parameters
        return block(**dict(zip([*names][1:], inputs, strict=True)))


def as_simpletuner(model, older=False):
    """diffusers' transformer as SimpleTuner's, which has the same modules."""
    model.__class__, model.older = FluxTransformer2DModel, older
    for block in model.transformer_blocks:
        block.__class__ = OlderTransformerBlock if older else FluxTransformerBlock
    for block in model.single_transformer_blocks:
        block.__class__ = FluxSingleTransformerBlock
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.attn.set_processor(FluxAttnProcessor2_0())
    return model
