"""What `bench.step` reports: rows, a table, ratios to the peers, and what is over a limit."""

import re
from collections.abc import Callable

import torch
from torch.autograd import DeviceType

from bench import timing
from bench.step.settings import (
    BASELINE,
    CANDIDATES,
    SETTINGS,
    Cycle,
    Settings,
    image_tokens,
    step_spec,
)
from bench.terminal import aligned
from fluxfast.errors import ConfigError
from fluxfast.memory.planner.cards import card
from fluxfast.memory.planner.cost import model_flop
from fluxfast.memory.planner.step_spec import Shape

# what the CPU step may take of a peer's median; past it the exit code is 1
LIMITS = {BASELINE: 0.65, f"{BASELINE}-checkpoint": 0.40}
DETAILS = (  # fields that a candidate which did not run has as None
    *("loss", "tolerance", "loss_error", "worst_error", "worst", "reference", "saved_bytes"),
    # launches, kernels: on a GPU. The rest: of the trainer's candidates
    *("launches", "kernels", "policies", "modulation", "graphs", "planned_gib", "notes"),
)
OPTIMIZERS = {"adamw": "torch AdamW, fused", "adamw8bit": "bitsandbytes AdamW8bit"}
# the host's calls that start something on the device, by CUDA's runtime and driver names
_LAUNCH = re.compile(r"cu(da)?(Launch\w*Kernel\w*|GraphLaunch\w*)")


def row_settings(settings: Settings, name: str, cycle: Cycle) -> dict[str, object]:
    """Returns a row's fields about the step that was timed. Of a cycle of several sizes `mix` names
    them, times are per step, and `pixels` and `image_tokens` are None."""
    kind, setting, spec = CANDIDATES[name], SETTINGS[settings.setting], settings.spec
    trainer = kind.library == "trainer"
    pixels = None if cycle.mixed else cycle.pixels[0]
    return {
        "bench": "step",
        "setting": settings.setting,
        "step": "trainer" if trainer else "model",
        "storage": kind.storage if kind.storage != "dense" else settings.dtype,
        "compute": settings.dtype,
        "products": kind.matmul or settings.dtype,
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
        "autocast": kind.library == "diffusers" and settings.dtype == "bfloat16",
        "warmup": settings.warmup,
        "interleaved": not settings.apart,
    }


def rows(
    settings: Settings,
    cycle: Cycle,
    results: dict[str, timing.Result],
    conditions: dict[str, object],
) -> list[dict[str, object]]:
    """Returns a row for each result."""
    return [
        timing.row(
            result,
            **conditions,
            **row_settings(settings, name, cycle),
            **rates(settings, name, cycle, result.median_ms, str(conditions["device_name"])),
            **dict.fromkeys(DETAILS),
        )
        for name, result in results.items()
    ]


def rates(
    settings: Settings, name: str, cycle: Cycle, median_ms: float | None, device_name: str
) -> dict[str, float | None]:
    """Returns images_per_s; tflop, of the model in one step (the mean over a cycle's), nothing
    recomputed; tflop_per_s; mfu, its share of the card's dense peak for the candidate's matmul.
    None where there is no time, or no card of that name in the table.
    """
    spec = step_spec(CANDIDATES[name], settings)
    shapes = [Shape(cycle.batch, image_tokens(side), settings.text_tokens) for side in cycle.pixels]
    tflop = sum(model_flop(spec, shape) for shape in shapes) / len(shapes) / 1e12
    if median_ms is None:
        return {"images_per_s": None, "tflop_per_s": None, "mfu": None, "tflop": tflop}
    per_s = tflop * 1e3 / median_ms
    try:
        peak = card(device_name).peaks[spec.matmul] if settings.device != "cpu" else 0
    except ConfigError:
        peak = 0
    return {
        "images_per_s": cycle.batch * 1e3 / median_ms,
        "tflop_per_s": per_s,
        "mfu": per_s * 1e12 / peak if peak else None,
        "tflop": tflop,
    }


def launches(step: Callable[[], object], cycle: Cycle, result: timing.Result, device: str) -> None:
    """Profiles a cycle's steps and adds, per step, launches: calls of the host that start something
    on the GPU, a CUDA graph being one; and kernels: what ran there."""
    if device == "cpu":
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    counts, steps = count_launches(profiler.events()), len(cycle.pixels)
    result.details |= {name: round(count / steps) for name, count in counts.items()}


def count_launches(events) -> dict[str, int]:
    """events: of the profiler, the host's and the GPU's."""
    calls = [e for e in events if e.device_type == DeviceType.CPU and _LAUNCH.fullmatch(e.name)]
    kernels = [
        e
        for e in events
        if e.device_type == DeviceType.CUDA
        and not e.is_user_annotation
        and not e.name.startswith(("Memcpy", "Memset"))
    ]
    return {"launches": len(calls), "kernels": len(kernels)}


def table(results: dict[str, timing.Result]) -> str:
    """Returns a line per candidate: times, ratio to the baseline, peak and saved memory, the gate's
    error."""
    lines = [["candidate", "median ms", "p10-p90", "ratio", "peak MiB", "saved MiB", "gate"]]
    for name, r in results.items():
        if r.median_ms is None:
            continue
        error, saved = (r.details.get(key) for key in ("worst_error", "saved_bytes"))
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
    no cap on memory, the bare step. Old rows, which lack these fields, do."""
    return (
        row.get("setting", "plain") == "plain"
        and row.get("step", "model") == "model"
        and row["lora_targets"] == "attn+mlp"
        and row.get("mix") is None
        and row.get("memory_cap_gib") is None
        and row["status"] != "out of time"
    )


def verdicts(results: dict[str, timing.Result]) -> list[str]:
    """Returns a line per fluxfast candidate that ran: its median over both peers'."""

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
    """Returns a line per peer of which `fluxfast-nf4` takes more than LIMITS allow."""
    ours = results.get("fluxfast-nf4")
    if ours is None or not any(peer in results for peer in LIMITS):
        return []
    if ours.median_ms is None:
        return [f"fluxfast-nf4 {ours.status}: {ours.reason}"]
    messages = []
    for peer, most in LIMITS.items():
        theirs = results[peer].median_ms if peer in results else None
        if theirs and ours.median_ms > most * theirs:
            messages.append(f"{ours.median_ms / theirs:.2f} of {peer}, at most {most} wanted")
    return messages
