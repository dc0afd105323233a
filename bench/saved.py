"""Bytes that autograd keeps per token in one block: fluxfast beside diffusers + peft, counted.

    PYTHONPATH=.:kernels python bench/saved.py

Full-width blocks (hidden 3072, bf16 products, LoRA rank 16) run at two lengths; the difference of
what saved-tensor hooks see, over the difference in tokens, is the count per token: exact, and the
same on every machine. Exits with 1 if fluxfast keeps more than LIMITS.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.gate import kept_bytes
from fluxfast.model.spec import DEV, FluxSpec

SPEC = replace(DEV, depth=1, depth_single_blocks=1, in_channels=16)
RANK = 16
LIMITS = {("double", "attn+mlp"): 62_500, ("single", "attn+mlp"): 56_500}
LENGTHS = (32, 64)  # text and image tokens, each


def per_token(module: nn.Module, tables: dict[int, tuple], run: Callable[[int], object]) -> float:
    """Bytes per token of both streams. run(n): the block over n text and n image tokens. The
    module's own tensors and the RoPE tables, which all blocks share, do not count."""
    own = [*module.parameters(), *module.buffers()]
    short, long = (kept_bytes([*own, *tables[n]], lambda n=n: run(n)) for n in LENGTHS)
    return (long - short) / (2 * (LENGTHS[1] - LENGTHS[0]))


def _inputs(spec: FluxSpec, n: int, text: int = 2) -> list[Tensor]:
    shape = (1, n, spec.hidden_size)
    return [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(text)]


def fluxfast_counts(targets: str = "attn+mlp", spec: FluxSpec = SPEC) -> dict[str, float]:
    """-> {"double": bytes, "single": bytes} per token."""
    from fluxfast.model.flux import Flux, fill, rope_tables
    from fluxfast.model.lora import inject_lora
    from fluxfast.model.names import linear_shape
    from fluxfast.model.precision import layer_precisions

    def zeros(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        if kind == "scale":
            return torch.ones(spec.head_dim)
        shape = linear_shape(module, spec)
        return torch.zeros(shape if kind == "weight" else shape[:1], dtype=torch.bfloat16)

    model = Flux(spec, torch.bfloat16)
    fill(model, zeros, layer_precisions(spec, "bf16", "bf16"))
    inject_lora(model, RANK, targets=targets)
    model.train()
    double_mod, single_mod = (
        torch.zeros(1, 1, count * spec.hidden_size, dtype=torch.bfloat16) for count in (6, 3)
    )
    for modulation in (double_mod, single_mod):
        modulation.requires_grad_(targets == "all")

    tables = {n: rope_tables(torch.zeros(1, 2 * n, 3), spec.axes_dim, spec.theta) for n in LENGTHS}
    double, single = model.double_blocks[0], model.single_blocks[0]
    return {
        "double": per_token(
            double,
            tables,
            lambda n: double(*_inputs(spec, n), double_mod, double_mod, tables[n]),
        ),
        "single": per_token(
            single, tables, lambda n: single(*_inputs(spec, 2 * n, 1), single_mod, tables[n])
        ),
    }


def diffusers_counts(spec: FluxSpec = SPEC) -> dict[str, float]:
    """The same of diffusers + peft under autocast, as it is used (LoRA on attention and MLP)."""
    from bench.peers import BaseWeights, build_diffusers

    weights = BaseWeights(spec, 0, "cpu")
    model = build_diffusers(weights, "dense", torch.bfloat16, RANK).model
    double, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    temb = torch.zeros(1, spec.hidden_size, dtype=torch.bfloat16)
    ropes = {n: model.pos_embed(torch.zeros(2 * n, 3)) for n in LENGTHS}

    def call(block, n: int):
        img, txt = _inputs(spec, n)
        with torch.autocast("cpu", torch.bfloat16):
            return block(
                hidden_states=img,
                encoder_hidden_states=txt,
                temb=temb,
                image_rotary_emb=ropes[n],
            )

    return {
        "double": per_token(double, ropes, lambda n: call(double, n)),
        "single": per_token(single, ropes, lambda n: call(single, n)),
    }


def main() -> int:
    rows = {
        ("fluxfast", "attn+mlp"): fluxfast_counts("attn+mlp"),
        ("fluxfast", "all"): fluxfast_counts("all"),
        ("diffusers + peft", "attn+mlp"): diffusers_counts(),
    }
    print(f"{'bytes saved per token':24} {'targets':10} {'double block':>13} {'single block':>13}")
    over = False
    for (who, targets), counts in rows.items():
        print(f"{who:24} {targets:10} {counts['double']:13.0f} {counts['single']:13.0f}")
        if who == "fluxfast":
            for pixels in (512, 768, 1024):
                tokens = DEV.text_length + (pixels // 16) ** 2
                kept = DEV.depth * counts["double"] + DEV.depth_single_blocks * counts["single"]
                print(f"  FLUX.1-dev, {pixels} px, batch 1: {kept * tokens / 1e9:.1f} GB")
            over |= any(v > LIMITS.get((k, targets), float("inf")) for k, v in counts.items())
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
