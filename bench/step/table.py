"""What bench.step writes of its results: rows, the ratios to the peers, and what is too slow."""

from dataclasses import replace

from bench import timing
from bench.step.candidates import BASELINE, CANDIDATES
from bench.step.figures import figures
from bench.step.settings import SETTINGS, Cycle, Settings, image_tokens
from bench.terminal import aligned

# what the CPU step may take of a peer's median; past it the exit code is 1
LIMITS = {BASELINE: 0.65, f"{BASELINE}-checkpoint": 0.40}
GATE_FIELDS = (
    *("loss", "tolerance", "loss_error", "worst_error", "worst", "reference", "saved_bytes"),
)
# launches, kernels: on a GPU. The rest: of the trainer's candidates
RUN_FIELDS = ("launches", "kernels", "policies", "modulation", "graphs", "planned_gib", "notes")
OPTIMIZERS = {"adamw": "torch AdamW, fused", "adamw8bit": "bitsandbytes AdamW8bit"}


def row_settings(settings: Settings, name: str, cycle: Cycle) -> dict[str, object]:
    """What a row says about the work that was timed. Of a cycle of several sizes `mix` names them,
    times are per step, and `pixels` and `image_tokens` are None."""
    kind, setting, spec = CANDIDATES[name], SETTINGS[settings.setting], settings.spec
    trainer = kind.who == "trainer"
    pixels = None if cycle.mixed else cycle.pixels[0]
    return {
        "bench": "step",
        "setting": settings.setting,
        "step": "trainer" if trainer else "model",
        "storage": kind.storage if kind.storage != "dense" else settings.dtype,
        "compute": settings.dtype,
        "products": kind.products or settings.dtype,
        "hidden": spec.hidden_size,
        "double_blocks": spec.depth,
        "single_blocks": spec.depth_single_blocks,
        "pixels": pixels,
        "mix": list(cycle.pixels) if cycle.mixed else None,
        "image_tokens": None if cycle.mixed else image_tokens(pixels),
        "text_tokens": settings.text_tokens,
        "batch": cycle.batch,
        "rank": settings.rank,
        "lora_targets": settings.targets,
        "lora_dtype": "float32",
        "optimizer": OPTIMIZERS[setting.optimizer],
        "ema": setting.ema,
        "max_grad_norm": 1.0 if trainer else setting.max_grad_norm,
        "memory_cap_gib": settings.cap_gib,
        "checkpointing": kind.checkpointing,
        "compiled": kind.compiled,
        "autocast": kind.who == "diffusers" and settings.dtype == "bfloat16",
        "warmup": settings.warmup,
        "interleaved": not settings.apart,
    }


def rows(
    settings: Settings,
    cycle: Cycle,
    results: dict[str, timing.Result],
    details: dict[str, dict[str, object]],
    conditions: dict[str, object],
) -> list[dict[str, object]]:
    """One a result. details: by name, what GATE_FIELDS and RUN_FIELDS say of it."""
    made = []
    for name, result in results.items():
        seen = dict.fromkeys((*GATE_FIELDS, *RUN_FIELDS)) | details[name]
        more = figures(settings, name, cycle, result.median_ms, str(conditions["device_name"]))
        work = row_settings(settings, name, cycle)
        made.append(timing.row(result, **conditions, **work, **more, **seen))
    return made


def table(results: dict[str, timing.Result], details: dict[str, dict[str, object]]) -> str:
    """A line a candidate: times, ratio to the baseline, peak and saved memory, the gate's error."""
    lines = [["candidate", "median ms", "p10-p90", "ratio", "peak MiB", "saved MiB", "gate"]]
    for name, r in results.items():
        if r.median_ms is None:
            continue
        error, saved = (details[name].get(key) for key in ("worst_error", "saved_bytes"))
        lines.append(
            [
                name,
                f"{r.median_ms:.1f}",
                f"{r.p10_ms:.1f}-{r.p90_ms:.1f}",
                "-" if r.ratio is None else f"{r.ratio:.2f}",
                *("-" if n is None else f"{n / 2**20:.1f}" for n in (r.peak_memory_bytes, saved)),
                "no reference" if error is None else f"error {error:.1e}",
            ]
        )
    missing = [f"{n} {r.status}: {r.reason}" for n, r in results.items() if r.median_ms is None]
    kinds = sorted({r.peak_memory_kind for r in results.values() if r.peak_memory_kind})
    return "\n".join([aligned(lines), *missing, *(f"peak memory: {kind}" for kind in kinds)])


def comparable(row: dict[str, object]) -> bool:
    """Whether a row belongs beside those of the plain setting: one size, LoRA on attention and MLP,
    no cap on memory, the bare step. Rows from before these were told apart are."""
    return (
        row.get("setting", "plain") == "plain"
        and row.get("step", "model") == "model"
        and row["lora_targets"] == "attn+mlp"
        and row.get("mix") is None
        and row.get("memory_cap_gib") is None
        and row["status"] != "out of time"
    )


def per_step(result: timing.Result, steps: int) -> timing.Result:
    """The times of a cycle of so many steps as those of one."""
    if result.median_ms is None:
        return result
    times = {name: getattr(result, name) / steps for name in ("median_ms", "p10_ms", "p90_ms")}
    return replace(result, times_ms=[t / steps for t in result.times_ms], **times)


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


def refused(results: dict[str, timing.Result]) -> list[str]:
    """Those whose results are wrong, in words."""
    return [f"{n}: {r.reason}" for n, r in results.items() if r.status == "gate failed"]


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
