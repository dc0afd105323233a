"""What 8-bit products do to training: the same runs in bf16, NF4, int8 and fp8, paired.

    python -m bench.quality            three seeds, 300 steps; 1 past a limit
    python -m bench.quality --short    one seed, few steps: that it runs

Each mode (storage/compute) teaches the pretrained nano model the zorb of `examples/nano/zorb.yaml`,
from the same drawings, noise, timesteps and LoRA start for a seed, so that two modes differ by
their arithmetic alone; activations are bf16 (fp32 on a CPU without it). Held-out drawings are
judged every 25 steps at fixed noise. A mode's best validation loss is compared with that of its
reference, the same storage (or bf16 for int8 storage) with bf16 products, seed by seed.

Then, at the LoRA that the first seed's bf16 run trained, the gradient of every layer's LoRA with
8-bit products and everything else in fp32 is compared with the same in fp32, as a cosine.

Rows go to bench/results/quality.jsonl with --save; `python -m bench.report` draws them.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev

import torch

from bench import RESULTS, ROOT, terminal, timing
from bench.terminal import aligned, say
from fluxfast.config.schema import Config, load_config
from fluxfast.data.loader import Loader
from fluxfast.data.prepare import prepare
from fluxfast.formats.base.load import load_transformer
from fluxfast.formats.lora.apply import load_lora
from fluxfast.model.lora import lora_layers
from fluxfast.objective import noise_batch, sample_losses
from fluxfast.run.validation import best, read_validations
from fluxfast.train import train

ROWS = RESULTS / "quality.jsonl"
ZORB = ROOT / "examples" / "nano" / "zorb.yaml"
MODES = {
    "bf16/bf16": ("bf16", "bf16"),
    "nf4/bf16": ("nf4", "bf16"),
    "int8/int8": ("int8", "int8"),
    "nf4/int8": ("nf4", "int8"),
    "nf4/fp8": ("nf4", "fp8"),
}
REFERENCE = {"int8/int8": "bf16/bf16", "nf4/int8": "nf4/bf16", "nf4/fp8": "nf4/bf16"}
LIMITS = {"int8/int8": 0.01, "nf4/int8": 0.01}  # best loss over the reference's, mean of the seeds
LEAST_COSINE = {"int8": 0.99}


def settings(mode: str, seed: int, steps: int, folder: Path) -> Config:
    """One run's configuration."""
    storage, compute = MODES[mode]
    sets = {
        "name": f"{mode.replace('/', '-')}-{seed}",
        "seed": seed,
        "output_dir": folder,
        "cache_dir": folder / "cache",
        "device": "cpu",
        "model.path": ROOT / "examples/nano/pretrained",
        "model.storage": storage,
        # auto: fp32 where a CPU does not multiply bf16
        "model.compute": "auto" if compute == "bf16" else compute,
        "data.0.folder": ROOT / "examples/nano/zorb/train",
        "data.1.folder": ROOT / "examples/nano/zorb/others",
        "validation.folder": ROOT / "examples/nano/zorb/held_out",
        "validation.every": min(25, steps),
        "train.steps": steps,
        "train.warmup_steps": min(10, steps),
        "sample.prompts": [],
        "save.every": 0,
    }
    return load_config(ZORB, [f"{key}={value}" for key, value in sets.items()])


def trained(config: Config) -> dict:
    """Train once -> what a row says of it: the validation curve [[step, loss], …] and its best."""
    train(config, restart=True)
    measured = read_validations(config.run_dir / "validation.jsonl")
    lowest = best(measured)
    return {
        "seed": config.seed,
        "steps": config.train.steps,
        "base_loss": lowest.base_loss,
        "best_loss": lowest.loss,
        "best_step": lowest.step,
        "curve": [[row.step, row.loss] for row in measured],
    }


def run(mode: str, seed: int, steps: int, folder: Path) -> dict:
    """The row of one run."""
    start = time.perf_counter()
    found = trained(settings(mode, seed, steps, folder))
    seconds = round(time.perf_counter() - start, 1)
    return {"bench": "quality", "mode": mode, "seconds": seconds, **found}


def gradients(model, config: Config, batch) -> dict[str, torch.Tensor]:
    """Per layer its LoRA's gradients, A's and B's in one vector."""
    for layer in lora_layers(model).values():
        layer.lora_A.grad = layer.lora_B.grad = None
    train = config.train
    inputs = noise_batch(batch, config.seed, train.timesteps, train.timestep_bias)
    sample_losses(model, inputs, train.guidance).mean().backward()
    return {
        name: torch.cat([layer.lora_A.grad.flatten(), layer.lora_B.grad.flatten()])
        for name, layer in lora_layers(model).items()
    }


def cosines(config: Config, kinds: list[str]) -> list[dict]:
    """At the LoRA that `config`'s run left: the cosine per layer of the gradients with 8-bit
    products in the layers that `compute` gives them, against fp32 throughout."""
    device = torch.device("cpu")
    batch = Loader(prepare(config, device).dataset, config.train.batch_size, 7).batch(0)
    file = config.run_dir / f"{config.name}.safetensors"
    found = {}
    for kind in ["fp32", *kinds]:
        model = load_transformer(config.model.path, "fp32", kind, device, activations="fp32")
        load_lora(model, file)
        found[kind] = gradients(model, config, batch)
    rows = []
    for kind in kinds:
        layers = {
            name: torch.cosine_similarity(found[kind][name].double(), truth.double(), dim=0).item()
            for name, truth in found["fp32"].items()
        }
        rows.append({"bench": "quality-cosine", "products": kind, "cosines": layers})
    return rows


def ratios(rows: list[dict], mode: str) -> list[float]:
    """A mode's best loss over its reference's, minus one, per seed."""
    of = {(row["mode"], row["seed"]): row["best_loss"] for row in rows if row["bench"] == "quality"}
    pairs = [(of[mode, seed], of.get((REFERENCE[mode], seed))) for m, seed in of if m == mode]
    return [loss / reference - 1 for loss, reference in pairs if reference]


def deviation(values: list[float]) -> float:
    """The standard deviation; 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0


def over_limits(rows: list[dict]) -> list[str]:
    """A line for each limit that is exceeded."""
    wrong = []
    for mode, limit in LIMITS.items():
        found = ratios(rows, mode)
        if found and fmean(found) > limit:
            over = f"{fmean(found):+.2%} over {REFERENCE[mode]}'s"
            wrong.append(f"{mode}: best loss {over}, at most {limit:+.0%}")
    for row in rows:
        if row["bench"] == "quality-cosine" and row["products"] in LEAST_COSINE:
            limit = LEAST_COSINE[row["products"]]
            name, least = min(row["cosines"].items(), key=lambda item: (item[1] >= 0, item[1]))
            if not least >= limit:
                said = f"gradient cosine {least:.4f} in {name}, at least {limit}"
                wrong.append(f"{row['products']}: {said}")
    return wrong


def table(rows: list[dict]) -> str:
    """The results, for a terminal."""
    lines = [["mode", "best loss", "over its reference", "s a run"]]
    for mode in MODES:
        own = [row for row in rows if row.get("mode") == mode]
        if not own:
            continue
        losses, values = [row["best_loss"] for row in own], []
        if mode in REFERENCE:
            values = ratios(rows, mode)
        each = " ".join(f"{value:+.2%}" for value in values)
        lines.append(
            [
                mode,
                f"{fmean(losses):.4f} ± {deviation(losses):.4f}",
                f"{fmean(values):+.2%} ({each})" if values else "",
                f"{fmean(row['seconds'] for row in own):.1f}",
            ]
        )
    cosines = []
    for row in rows:
        if row["bench"] == "quality-cosine":
            values = sorted(row["cosines"].items(), key=lambda item: item[1])
            middle = values[len(values) // 2][1]
            cosines.append(
                f"{row['products']} products: gradient cosine per layer, least {values[0][1]:.5f} "
                f"({values[0][0]}), median {middle:.5f}"
            )
    return "\n".join([aligned(lines), *cosines])


def main(arguments: list[str] | None = None) -> int:
    parser = terminal.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each mode")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--short", action="store_true", help="one seed, 8 steps, no limits on loss")
    parser.add_argument("--save", action="store_true", help=f"append rows to {ROWS.name}")
    options = parser.parse_args(arguments)
    if options.short:
        options.seeds, options.steps = 1, 8
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, options.seeds + 1):
            for mode in options.modes:
                row = run(mode, seed, options.steps, Path(folder))
                best = f"best {row['best_loss']:.4f} at step {row['best_step']}"
                say(f"{mode} seed {seed}: {best}, {row['seconds']:.0f} s")
                rows.append(row)
        rows += cosines(settings(options.modes[0], 1, options.steps, Path(folder)), ["int8", "fp8"])
    print(table(rows))
    wrong = over_limits([r for r in rows if not options.short or r["bench"] != "quality"])
    print("\n".join(wrong) if wrong else "within the limits")
    if options.save:
        noted = timing.conditions("cpu")
        timing.append_rows(ROWS, [row | noted for row in rows])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
