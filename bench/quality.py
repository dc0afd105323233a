"""What 8-bit matmuls do to training: the same runs in bf16, NF4, int8 and fp8, paired.

    python -m bench.quality            three seeds, 300 steps; 1 past a limit
    python -m bench.quality --short    one seed, few steps: that it runs

Each mode (storage/compute) teaches the pretrained nano model the zorb of `examples/nano/zorb.yaml`,
from the same images, noise, timesteps and initial LoRA for a seed, so that two modes differ by
their arithmetic alone; activations are bf16 (fp32 on a CPU without it). The held-out loss is
measured every 25 steps at fixed noise. A mode's best is compared with that of its reference, the
same storage (or bf16 for int8 storage) with bf16 matmuls, seed by seed.

Then, at the LoRA that the first seed's bf16 run trained, the gradient of every layer's LoRA with
8-bit matmuls and everything else in fp32 is compared with the same in fp32, as a cosine.

Rows go to bench/results/quality.jsonl with --save; `python -m bench.report` draws them.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
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
    """Returns one run's configuration."""
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
    """Trains once. Returns a row's fields: the validation curve [[step, loss], …] and its best."""
    train(config, restart=True)
    validations = read_validations(config.run_dir / "validation.jsonl")
    lowest = best(validations)
    say(f"{config.name}: best {lowest.loss:.4f} at step {lowest.step}")
    return {
        "seed": config.seed,
        "steps": config.train.steps,
        "base_loss": lowest.base_loss,
        "best_loss": lowest.loss,
        "best_step": lowest.step,
        "curve": [[row.step, row.loss] for row in validations],
    }


def lora_file(config: Config) -> Path:
    """Returns the LoRA that a finished run has left."""
    return config.run_dir / f"{config.name}.safetensors"


def batches_of(config: Config, seed: int, count: int) -> list:
    """Returns the first batches of the configuration's images in the order of a seed."""
    dataset = prepare(config, torch.device("cpu")).dataset
    loader = Loader(dataset, config.train.batch_size, seed)
    return [loader.batch(index) for index in range(count)]


def gradients(model, config: Config, batch) -> dict[str, torch.Tensor]:
    """Returns per layer its LoRA's gradients, A's and B's in one fp64 vector."""
    for layer in lora_layers(model).values():
        layer.lora_A.grad = layer.lora_B.grad = None
    train = config.train
    inputs = noise_batch(batch, config.seed, train.timesteps, train.timestep_bias)
    sample_losses(model, inputs, train.guidance).mean().backward()
    return {
        name: torch.cat([layer.lora_A.grad.flatten(), layer.lora_B.grad.flatten()]).double()
        for name, layer in lora_layers(model).items()
    }


def cosines(config: Config, kinds: list[str]) -> list[dict]:
    """At the LoRA that `config`'s run left: the cosine per layer of the gradients with 8-bit
    matmuls in the layers that `compute` gives them, against fp32 throughout."""
    (batch,) = batches_of(config, 7, 1)
    by_kind = {}
    for kind in ["fp32", *kinds]:
        model = load_transformer(config.model.path, "fp32", kind, "cpu", activations="fp32")
        load_lora(model, lora_file(config))
        by_kind[kind] = gradients(model, config, batch)
    truth = by_kind.pop("fp32")
    return [
        {
            "bench": "quality-cosine",
            "products": kind,
            "cosines": {
                name: torch.cosine_similarity(layer, truth[name], dim=0).item()
                for name, layer in layers.items()
            },
        }
        for kind, layers in by_kind.items()
    ]


def ratios(rows: list[dict], mode: str) -> list[float]:
    """Returns a mode's best loss over its reference's, minus one, per seed."""
    runs = [row for row in rows if row["bench"] == "quality"]
    references = {r["seed"]: r["best_loss"] for r in runs if r["mode"] == REFERENCE[mode]}
    own = [row for row in runs if row["mode"] == mode and row["seed"] in references]
    return [row["best_loss"] / references[row["seed"]] - 1 for row in own]


def deviation(values: list[float]) -> float:
    """Returns the standard deviation, 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0


def least(cosines: Iterable[tuple[str, float]]) -> tuple[str, float]:
    """Returns the least cosine and its layer; NaN is less than any."""
    return min(cosines, key=lambda pair: (pair[1] == pair[1], pair[1]))


def over_limits(rows: list[dict]) -> list[str]:
    """Returns a line for each limit that is exceeded."""
    wrong = []
    for mode, limit in LIMITS.items():
        over = ratios(rows, mode)
        if over and fmean(over) > limit:
            message = f"best loss {fmean(over):+.2%} over {REFERENCE[mode]}'s, at most {limit:+.0%}"
            wrong.append(f"{mode}: {message}")
    for row in rows:
        if row["bench"] == "quality-cosine" and row["products"] in LEAST_COSINE:
            kind, limit = row["products"], LEAST_COSINE[row["products"]]
            name, cosine = least(row["cosines"].items())
            if not cosine >= limit:
                wrong.append(f"{kind}: gradient cosine {cosine:.4f} in {name}, at least {limit}")
    return wrong


def table(rows: list[dict]) -> str:
    """Returns the results, for a terminal."""
    lines = [["mode", "best loss", "over its reference", "s a run"]]
    for mode in MODES:
        own = [row for row in rows if row.get("mode") == mode]
        if not own:
            continue
        losses = [row["best_loss"] for row in own]
        over = ratios(rows, mode) if mode in REFERENCE else []
        each = " ".join(f"{value:+.2%}" for value in over)
        lines.append(
            [
                mode,
                f"{fmean(losses):.4f} ± {deviation(losses):.4f}",
                f"{fmean(over):+.2%} ({each})" if over else "",
                f"{fmean(row['seconds'] for row in own):.1f}",
            ]
        )
    text = [aligned(lines)]
    for row in rows:
        if row["bench"] == "quality-cosine":
            layers = sorted(row["cosines"].items(), key=lambda item: item[1])
            (name, lowest), (_, middle) = layers[0], layers[len(layers) // 2]
            text.append(
                f"{row['products']} products: gradient cosine per layer, least {lowest:.5f} "
                f"({name}), median {middle:.5f}"
            )
    return "\n".join(text)


def finish(rows: list[dict], wrong: list[str], path: Path | None) -> int:
    """Prints what is over a limit and appends the rows to `path`, if any. Returns the exit code."""
    print("\n".join(wrong) if wrong else "within the limits")
    if path:
        conditions = timing.conditions("cpu")
        timing.append_rows(path, [row | conditions for row in rows])
    return 1 if wrong else 0


def parser(doc: str, seeds: int, steps: int, short: str, rows: Path) -> argparse.ArgumentParser:
    args = terminal.parser(doc)
    args.add_argument("--seeds", type=int, default=seeds, help="runs of each mode")
    args.add_argument("--steps", type=int, default=steps)
    args.add_argument("--short", action="store_true", help=short)
    args.add_argument("--save", action="store_true", help=f"append rows to {rows.name}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parser(__doc__, 3, 300, "one seed, 8 steps, no limits on loss", ROWS)
    args.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    options = args.parse_args(arguments)
    if options.short:
        options.seeds, options.steps = 1, 8
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, options.seeds + 1):
            for mode in options.modes:
                start = time.perf_counter()
                fields = trained(settings(mode, seed, options.steps, Path(folder)))
                seconds = round(time.perf_counter() - start, 1)
                rows.append({"bench": "quality", "mode": mode, "seconds": seconds, **fields})
        rows += cosines(settings(options.modes[0], 1, options.steps, Path(folder)), ["int8", "fp8"])
    print(table(rows))
    wrong = over_limits([r for r in rows if not options.short or r["bench"] != "quality"])
    return finish(rows, wrong, ROWS if options.save else None)


if __name__ == "__main__":
    sys.exit(main())
