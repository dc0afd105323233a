"""One LoRA step (forward, backward, AdamW): fluxfast beside diffusers + peft + bitsandbytes.

    PYTHONPATH=.:kernels python bench/step.py --device cpu    three full-width blocks on the CPU
    PYTHONPATH=.:kernels python bench/step.py --device cuda --pixels 512 1024 --batch 1 4

Everyone trains the same LoRA (rank 16 on attention and MLP, fp32, fused AdamW) over the same
random base weights on the same inputs. Before anything is timed, a gate compares loss and LoRA
gradients with the diffusers candidate of the same storage. On CPU all candidates live in one
process and are interleaved round by round. On CUDA two full-size models do not fit beside each
other: each candidate has a process of its own, one after the other, so a crash or an exhausted
memory costs one row. A candidate whose library is missing is a row that says so: torch, triton and
numpy are enough to run the rest.
"""

import argparse
import gc
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import timing
from bench.gate import disagreement, evidence, loss_of, saved_bytes, tolerance
from bench.peers import BaseWeights, Batch, Candidate, build_diffusers, build_fluxfast, normal
from fluxfast.model.spec import DEV, FluxSpec, rope_axes

BASELINE = "diffusers-nf4"
CANDIDATES = {  # name -> storage of the base, how to build it
    "diffusers-nf4": ("nf4", {}),
    "diffusers-nf4-checkpoint": ("nf4", {"checkpointing": True}),
    "diffusers-dense-compile": ("dense", {"compiled": True}),
    "fluxfast-nf4": ("nf4", {}),
    "fluxfast-dense": ("dense", {}),
    "fluxfast-nf4-int8": ("nf4", {"products": "int8"}),
    "fluxfast-nf4-fp8": ("nf4", {"products": "fp8"}),
    "fluxfast-int8-int8": ("int8", {"products": "int8"}),
    "fluxfast-fp8-fp8": ("fp8", {"products": "fp8"}),
}
# 8-bit storage is made of the dense weights, so that is what its results are held to
REFERENCES = {"int8": "dense", "fp8": "dense"}
DEFAULTS = {
    "cpu": ["diffusers-nf4", "diffusers-nf4-checkpoint", "fluxfast-nf4", "fluxfast-nf4-int8"],
    "cuda": [
        "diffusers-nf4",
        "diffusers-nf4-checkpoint",
        "diffusers-dense-compile",
        "fluxfast-nf4",
        "fluxfast-nf4-int8",
        "fluxfast-nf4-fp8",
        "fluxfast-int8-int8",
    ],
}
CPU_SPEC = replace(DEV, depth=1, depth_single_blocks=2)
TINY_SPEC = replace(
    CPU_SPEC,
    vec_in_dim=64,
    context_in_dim=128,
    hidden_size=128,
    num_heads=4,
    axes_dim=rope_axes(32),
)
# what the CPU step may take of a peer's median; past it the exit code is 1
LIMITS = {BASELINE: 0.65, f"{BASELINE}-checkpoint": 0.40}
GATE_FIELDS = ("loss", "tolerance", "loss_error", "worst_error", "worst", "saved_bytes")
SEED = 0

# pixels, batch, results by name, details by name
Report = Callable[[int, int, dict[str, timing.Result], dict[str, dict[str, object]]], None]


@dataclass(frozen=True)
class Settings:
    """What every candidate of a run has in common.

    shapes: (pixels, batch) pairs, one after the other. apart: a process per candidate.
    """

    spec: FluxSpec
    device: str
    compute: torch.dtype
    shapes: list[tuple[int, int]]
    text_tokens: int
    rank: int
    rounds: int
    warmup: int
    apart: bool


def image_tokens(pixels: int) -> int:
    return (pixels // 16) ** 2


def make_batch(settings: Settings, pixels: int, batch: int) -> Batch:
    """Random latents and prompts; x_t = (1 - t) latent + t noise, whose velocity is the target.

    Times are powers of two and the guidance is 1, exact in bf16: diffusers rounds 1000·t to the
    compute dtype, fluxfast does not have to, and the gate should not see that.
    """
    spec, device, compute = settings.spec, settings.device, settings.compute
    T, L, side = image_tokens(pixels), settings.text_tokens, pixels // 16
    latent, noise = (normal(SEED, n, (batch, T, 64), device) for n in ("latent", "noise"))
    t = 0.5 ** torch.arange(1, batch + 1, device=device)
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1] = torch.arange(side, device=device)[:, None]
    ids[..., 2] = torch.arange(side, device=device)[None, :]
    mixed = (1 - t[:, None, None]) * latent + t[:, None, None] * noise
    return Batch(
        img=mixed.to(compute),
        img_ids=ids.view(1, T, 3).expand(batch, T, 3),
        txt=normal(SEED, "txt", (batch, L, spec.context_in_dim), device).to(compute),
        txt_ids=torch.zeros(batch, L, 3, device=device),
        timesteps=t,
        y=normal(SEED, "y", (batch, spec.vec_in_dim), device).to(compute),
        guidance=torch.ones(batch, device=device),
        target=noise - latent,
    )


def say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def build(name: str, settings: Settings) -> Candidate:
    """Build one candidate. Raises ImportError for a missing library."""
    storage, options = CANDIDATES[name]
    weights = BaseWeights(settings.spec, SEED, settings.device)
    if name.startswith("fluxfast"):
        return build_fluxfast(weights, storage, settings.compute, settings.rank, **options)
    return build_diffusers(weights, storage, settings.compute, settings.rank, **options)


def reset_adapters(candidate: Candidate) -> None:
    """Give the LoRA the values that all candidates share, none zero: then no gradient is zero."""
    for module, (a, b) in candidate.adapters.items():
        for side, adapter, std in (("A", a, a.parameter.shape[1] ** -0.5), ("B", b, 0.02)):
            values = adapter.parameter.detach()[adapter.rows]
            adapter.fill(std * normal(SEED, f"{module}.{side}", values.shape, values.device))


def train_step(candidate: Candidate, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    loss_of(candidate, batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(settings: Settings, names: list[str], references: Path, report: Report) -> None:
    """Build the named candidates in this process, then gate and time them at every shape.

    references: a folder where the first candidate of a storage leaves what the others are gated
    against. report(pixels, batch, results by name, details by name) is called after each shape.
    """
    built: dict[str, Candidate | Exception] = {}
    for name in names:
        try:
            say(f"{name}: building")
            built[name] = build(name, settings)
        except Exception as error:  # becomes the row's reason
            error.__traceback__ = None
            built[name] = error
            gc.collect()
    optimizers = {
        name: torch.optim.AdamW(c.parameters(), lr=1e-4, fused=True)
        for name, c in built.items()
        if isinstance(c, Candidate)
    }
    for pixels, batch_size in settings.shapes:
        batch = make_batch(settings, pixels, batch_size)
        details: dict[str, dict[str, object]] = {name: {} for name in names}

        def gate(name: str, batch=batch, details=details, shape=(pixels, batch_size)) -> str | None:
            say(f"{name}: gate")
            candidate = built[name]
            reset_adapters(candidate)
            found = evidence(candidate, batch)
            storage, options = CANDIDATES[name]
            kept = REFERENCES.get(storage, storage)
            path = references / f"{kept}-{shape[0]}-{shape[1]}.pt"
            reference = torch.load(path) if path.exists() else None
            allowed = tolerance(settings.spec, settings.compute, options.get("products", ""))
            wrong, compared = disagreement(found, reference, allowed)
            if reference is None and wrong is None and name.startswith("diffusers"):
                torch.save(found, path)
            details[name] |= compared | {"saved_bytes": saved_bytes(candidate, batch)}
            return wrong

        work = {
            name: c if isinstance(c, Exception) else _step(c, batch, optimizers[name])
            for name, c in built.items()
        }
        results = timing.compare(
            work, settings.rounds, settings.warmup, gate, BASELINE, settings.device, say
        )
        report(pixels, batch_size, results, details)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)


def _step(candidate: Candidate, batch: Batch, optimizer: torch.optim.Optimizer):
    return lambda: train_step(candidate, batch, optimizer)


def measure_apart(settings: Settings, name: str, references: Path, report: Report) -> None:
    """`measure` one candidate in a process of its own. If that dies, the shapes it owed failed."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(settings, name, references, sender))
    process.start()
    sender.close()
    owed = list(settings.shapes)
    try:
        while True:
            report(*receiver.recv())
            owed.pop(0)
    except EOFError:
        process.join()
    for pixels, batch in owed:
        reason = f"its process ended with code {process.exitcode}"
        report(pixels, batch, {name: timing.Result(name, "failed", reason)}, {name: {}})


def _child(settings: Settings, name: str, references: Path, sender) -> None:
    measure(settings, [name], references, lambda *found: sender.send(found))
    sender.close()


def row_settings(settings: Settings, name: str, pixels: int, batch: int) -> dict[str, object]:
    """What a row says about the work that was timed."""
    storage, options = CANDIDATES[name]
    compute = str(settings.compute).removeprefix("torch.")
    spec = settings.spec
    return {
        "bench": "step",
        "storage": storage if storage != "dense" else compute,
        "compute": compute,
        "products": options.get("products") or compute,
        "hidden": spec.hidden_size,
        "double_blocks": spec.depth,
        "single_blocks": spec.depth_single_blocks,
        "pixels": pixels,
        "image_tokens": image_tokens(pixels),
        "text_tokens": settings.text_tokens,
        "batch": batch,
        "rank": settings.rank,
        "lora_targets": "attn+mlp",
        "lora_dtype": "float32",
        "optimizer": "torch AdamW, fused",
        "checkpointing": options.get("checkpointing", False),
        "compiled": options.get("compiled", False),
        "autocast": name.startswith("diffusers") and settings.compute == torch.bfloat16,
        "warmup": settings.warmup,
        "interleaved": not settings.apart,
    }


def verdicts(results: dict[str, timing.Result]) -> list[str]:
    """For each fluxfast candidate that ran: its median over the peer's, both ways."""

    def over(peer: str, median: float) -> str:
        base = results[peer].median_ms if peer in results else None
        return f"{median / base:.2f}" if base else "-"

    return [
        f"{name.removesuffix('-nf4')} / diffusers+peft+bnb = "
        f"{over(BASELINE, r.median_ms)} (no checkpointing), "
        f"{over(BASELINE + '-checkpoint', r.median_ms)} (checkpointing)"
        for name, r in results.items()
        if name.startswith("fluxfast") and r.median_ms is not None
    ]


def over_limits(results: dict[str, timing.Result]) -> list[str]:
    """What keeps `fluxfast-nf4` from LIMITS, per peer that ran; empty where nothing does."""
    ours = results.get("fluxfast-nf4")
    if ours is None or not any(peer in results for peer in LIMITS):
        return []
    if ours.median_ms is None:
        return [f"fluxfast-nf4 {ours.status}: {ours.reason}"]
    said = []
    for peer, most in LIMITS.items():
        theirs = results[peer].median_ms if peer in results else None
        if theirs and ours.median_ms > most * theirs:
            said.append(f"{ours.median_ms / theirs:.2f} of {peer}, at most {most} wanted")
    return said


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        choices=CANDIDATES,
        metavar="NAME",
        help=f"of {', '.join(CANDIDATES)}",
    )
    parser.add_argument(
        "--pixels", nargs="+", type=int, help="image sides (cpu: 256; cuda: 512 768 1024)"
    )
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes (cpu: 1; cuda: 1 4)")
    parser.add_argument("--text-tokens", type=int, help="T5 tokens (cpu: 128; cuda: 512)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--compute",
        choices=["bf16", "fp32"],
        help="default: bf16 on cuda and on a CPU that multiplies it, else fp32",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--warmup", type=int, default=3, help="steps thrown away; the last measures memory"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="three narrow blocks: checks the bench itself"
    )
    parser.add_argument("--apart", action="store_true", help="a process per candidate on cpu too")
    parser.add_argument(
        "--save", action="store_true", help="append to bench/results/step-DEVICE.jsonl"
    )
    parser.add_argument("--out", type=Path, help="append to this file instead")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; hint: --device cpu")
    if bad := [p for p in options.pixels or [] if p < 16 or p % 16]:
        parser.error(f"--pixels: multiples of 16 only, got {bad}")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    cuda = options.device == "cuda"
    default = (DEV, [512, 768, 1024], [1, 4], 512) if cuda else (CPU_SPEC, [256], [1], 128)
    if options.tiny:
        default = (TINY_SPEC, [64], [1], 8)
    spec, pixels, batches, text = default
    bf16 = cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    compute = options.compute or ("bf16" if bf16 else "fp32")
    return Settings(
        spec=spec,
        device=options.device,
        compute={"bf16": torch.bfloat16, "fp32": torch.float32}[compute],
        shapes=[(p, b) for b in options.batch or batches for p in options.pixels or pixels],
        text_tokens=options.text_tokens or text,
        rank=options.rank,
        rounds=options.rounds,
        warmup=options.warmup,
        apart=cuda or options.apart,
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = settings_of(options)
    chosen = options.candidates or DEFAULTS[options.device]
    names = [name for name in CANDIDATES if name in chosen]  # references come first
    shared = timing.conditions(options.device)
    out = options.out
    if options.save and out is None:
        out = timing.REPOSITORY / "bench" / "results" / f"step-{options.device}.jsonl"
    found: dict[tuple[int, int], tuple[dict, dict]] = {shape: ({}, {}) for shape in settings.shapes}

    def report(pixels: int, batch: int, results: dict, details: dict) -> None:
        every, seen = found[pixels, batch]
        every |= results
        seen |= details
        timing.add_ratios(every, BASELINE)
        for name, result in results.items():
            said = result.reason or f"{result.median_ms:.1f} ms"
            say(f"{name}: {pixels} px, batch {batch}: {result.status}: {said}")
        if out is not None:
            rows = []
            for name, result in results.items():
                work = row_settings(settings, name, pixels, batch)
                compared = dict.fromkeys(GATE_FIELDS) | details[name]
                rows.append(timing.row(result, **shared, **work, **compared))
            timing.append_rows(out, rows)

    with tempfile.TemporaryDirectory() as folder:
        if settings.apart:
            for name in names:
                measure_apart(settings, name, Path(folder), report)
        else:
            measure(settings, names, Path(folder), report)
    wrong: list[str] = []
    for (pixels, batch), (results, details) in found.items():
        compute = str(settings.compute).removeprefix("torch.")
        print(
            f"\n{shared['device_name']}: {pixels} px ({image_tokens(pixels)} image + "
            f"{settings.text_tokens} text tokens), batch {batch}, rank {settings.rank}, "
            f"compute {compute}, {settings.rounds} rounds"
        )
        print(timing.table(results, details))
        print("\n".join(verdicts(results)))
        if settings.device == "cpu" and not options.tiny:
            wrong += over_limits(results)
    for line in wrong:
        print(f"too slow: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
