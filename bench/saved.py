"""Bytes that autograd keeps per token in one block: fluxfast beside diffusers + peft, counted.

    python -m bench.saved [--out FILE]

Full-width blocks (hidden 3072, bf16, LoRA rank 16) run at two lengths; the difference in saved
bytes over the difference in tokens is exact, and the same on every machine. Exits with 1 if
fluxfast keeps more than LIMITS. --out appends rows.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import timing
from bench.step.peers import BaseWeights, build_diffusers, build_fluxfast
from bench.step.settings import Kind
from fluxfast.model.flux import rope_tables
from fluxfast.model.spec import DEV

SPEC = replace(DEV, depth=1, depth_single_blocks=1, in_channels=16)
RANK = 16
LIMITS = {("double", "attn+mlp"): 62_500, ("single", "attn+mlp"): 56_500}
LENGTHS = (32, 64)  # text and image tokens, each
COUNTED = (("fluxfast", "attn+mlp"), ("fluxfast", "all"), ("diffusers + peft", "attn+mlp"))


class SavedBytes:
    """Counts storages, each once, those of `known` tensors left out."""

    def __init__(self, known: list[Tensor]):
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._storages = []  # alive until the sum is taken: no address can come back

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._storages.append(storage)
        return tensor.detach()

    def hooks(self) -> AbstractContextManager:
        """Returns a context in which every tensor that autograd saves is added."""
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages)


def kept_bytes(known: list[Tensor], forward: Callable[[], object]) -> int:
    """Returns what autograd keeps of `forward`: exact, and the same on every machine. What a
    checkpointed block rebuilds does not count."""
    saved = SavedBytes(known)
    with saved.hooks():
        forward()
    return saved.total()


def per_token(module: nn.Module, tables: dict[int, tuple], run: Callable[[int], object]) -> float:
    """Returns bytes per token of both streams. run(n): the block over n text and n image tokens.
    The module's own tensors and the RoPE tables, which all blocks share, do not count."""
    own = [*module.parameters(), *module.buffers()]
    short, long = (kept_bytes([*own, *tables[n]], lambda n=n: run(n)) for n in LENGTHS)
    return (long - short) / (2 * (LENGTHS[1] - LENGTHS[0]))


def _model(library: str, targets: str) -> nn.Module:
    """In bf16 with all weights zero: bytes do not depend on values."""
    weights = BaseWeights(SPEC, "cpu", lambda name, shape, device: torch.zeros(shape))
    build = build_diffusers if library == "diffusers" else build_fluxfast
    return build(weights, Kind(library, "dense"), torch.bfloat16, RANK, targets).model


def _stream(n: int) -> Tensor:
    shape = (1, n, SPEC.hidden_size)
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


def fluxfast_counts(targets: str) -> dict[str, float]:
    """Returns bytes per token of a "double" and a "single" block."""
    model = _model("fluxfast", targets)
    double_mod, single_mod = (
        torch.zeros(1, 1, count * SPEC.hidden_size, dtype=torch.bfloat16) for count in (6, 3)
    )
    for modulation in (double_mod, single_mod):
        modulation.requires_grad_(targets == "all")
    tables = {n: rope_tables(torch.zeros(1, 2 * n, 3), SPEC.axes_dim, SPEC.theta) for n in LENGTHS}
    double, single = model.double_blocks[0], model.single_blocks[0]
    return {
        "double": per_token(
            double,
            tables,
            lambda n: double(_stream(n), _stream(n), double_mod, double_mod, tables[n]),
        ),
        "single": per_token(
            single, tables, lambda n: single(_stream(2 * n), single_mod, tables[n])
        ),
    }


def diffusers_counts() -> dict[str, float]:
    """Returns the same of diffusers + peft under autocast, as it is used (attention and MLP)."""
    model = _model("diffusers", "attn+mlp")
    temb = torch.zeros(1, SPEC.hidden_size, dtype=torch.bfloat16)
    ropes = {n: model.pos_embed(torch.zeros(2 * n, 3)) for n in LENGTHS}

    def call(block: nn.Module, n: int):
        streams = {"hidden_states": _stream(n), "encoder_hidden_states": _stream(n)}
        with torch.autocast("cpu", torch.bfloat16):
            return block(**streams, temb=temb, image_rotary_emb=ropes[n])

    blocks = {"double": model.transformer_blocks[0], "single": model.single_transformer_blocks[0]}
    return {
        kind: per_token(block, ropes, lambda n, block=block: call(block, n))
        for kind, block in blocks.items()
    }


def rows() -> list[dict[str, object]]:
    """Returns a row for each of COUNTED; "skipped" where a library is missing."""
    measured, conditions = [], timing.conditions("cpu")
    for name, targets in COUNTED:
        result, counts = timing.Result(name), {}
        try:
            counts = fluxfast_counts(targets) if name == "fluxfast" else diffusers_counts()
        except ImportError as error:
            timing.fail(result, error)
        fields = {"bench": "saved", "lora_targets": targets, "rank": RANK}
        fields |= {f"{kind}_bytes": counts.get(kind) for kind in ("double", "single")}
        measured.append(timing.row(result, **fields, **conditions))
    return measured


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append rows to this file")
    out = parser.parse_args(arguments).out
    print(f"{'bytes saved per token':24} {'targets':10} {'double block':>13} {'single block':>13}")
    over, measured = False, rows()
    for row in measured:
        name, targets = row["name"], row["lora_targets"]
        double, single = row["double_bytes"], row["single_bytes"]
        if double is None:
            print(f"{name:24} {targets:10} {row['status']}: {row['reason']}")
            continue
        print(f"{name:24} {targets:10} {double:13.0f} {single:13.0f}")
        if name == "fluxfast":
            for pixels in (512, 768, 1024):
                tokens = DEV.text_length + (pixels // 16) ** 2
                total = DEV.depth * double + DEV.depth_single_blocks * single
                print(f"  FLUX.1-dev, {pixels} px, batch 1: {total * tokens / 1e9:.1f} GB")
            for kind, count in (("double", double), ("single", single)):
                over |= count > LIMITS.get((kind, targets), float("inf"))
    if out is not None:
        timing.append_rows(out, measured)
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
