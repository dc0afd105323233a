"""Bytes that autograd keeps per token in one block: fluxfast beside diffusers + peft, counted.

    python -m bench.saved [--out FILE]

Full-width blocks (hidden 3072, bf16 products, LoRA rank 16) run at two lengths; the difference in
saved bytes over the difference in tokens is exact, and the same on every machine. Exits with 1 if
fluxfast keeps more than LIMITS. --out appends rows.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import timing
from bench.step.gate import kept_bytes
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
    """Bytes per token of a "double" and a "single" block."""
    from fluxfast.model.flux import Flux, rope_tables
    from fluxfast.model.init import fill
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

    def run_double(n: int) -> object:
        return double(*_inputs(spec, n), double_mod, double_mod, tables[n])

    def run_single(n: int) -> object:
        return single(*_inputs(spec, 2 * n, 1), single_mod, tables[n])

    counts = per_token(double, tables, run_double), per_token(single, tables, run_single)
    return dict(zip(("double", "single"), counts, strict=True))


def diffusers_counts(spec: FluxSpec = SPEC) -> dict[str, float]:
    """The same of diffusers + peft under autocast, as it is used (LoRA on attention and MLP)."""
    from bench.step.peers import BaseWeights, build_diffusers

    weights = BaseWeights(spec, 0, "cpu")
    model = build_diffusers(weights, "dense", torch.bfloat16, RANK).model
    temb = torch.zeros(1, spec.hidden_size, dtype=torch.bfloat16)
    ropes = {n: model.pos_embed(torch.zeros(2 * n, 3)) for n in LENGTHS}

    def call(block, n: int):
        img, txt = _inputs(spec, n)
        streams = {"hidden_states": img, "encoder_hidden_states": txt}
        with torch.autocast("cpu", torch.bfloat16):
            return block(**streams, temb=temb, image_rotary_emb=ropes[n])

    blocks = {"double": model.transformer_blocks[0], "single": model.single_transformer_blocks[0]}
    return {
        kind: per_token(block, ropes, lambda n, block=block: call(block, n))
        for kind, block in blocks.items()
    }


def rows() -> list[dict[str, object]]:
    """One each; "skipped" where a library is missing."""
    counts = {
        ("fluxfast", "attn+mlp"): fluxfast_counts,
        ("fluxfast", "all"): lambda: fluxfast_counts("all"),
        ("diffusers + peft", "attn+mlp"): diffusers_counts,
    }
    found, shared = [], timing.conditions("cpu")
    for (who, targets), count in counts.items():
        result, each = timing.Result(who), {}
        try:
            each = count()
        except ImportError as error:
            timing.fail(result, error)
        settings = {"bench": "saved", "lora_targets": targets, "rank": RANK}
        settings |= {"double_bytes": each.get("double"), "single_bytes": each.get("single")}
        found.append(timing.row(result, **settings, **shared))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append rows to this file")
    out = parser.parse_args(arguments).out
    print(f"{'bytes saved per token':24} {'targets':10} {'double block':>13} {'single block':>13}")
    over, found = False, rows()
    for row in found:
        who, targets = row["name"], row["lora_targets"]
        double, single = row["double_bytes"], row["single_bytes"]
        if double is None:
            print(f"{who:24} {targets:10} {row['status']}: {row['reason']}")
            continue
        print(f"{who:24} {targets:10} {double:13.0f} {single:13.0f}")
        if who == "fluxfast":
            for pixels in (512, 768, 1024):
                tokens = DEV.text_length + (pixels // 16) ** 2
                total = DEV.depth * double + DEV.depth_single_blocks * single
                print(f"  FLUX.1-dev, {pixels} px, batch 1: {total * tokens / 1e9:.1f} GB")
            for kind, count in (("double", double), ("single", single)):
                over |= count > LIMITS.get((kind, targets), float("inf"))
    if out is not None:
        timing.append_rows(out, found)
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
