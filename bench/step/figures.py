"""What follows from a step's time and its model: images/s, TFLOP/s, share of the card's peak; and
how many kernels it launches.
"""

import re
from collections.abc import Callable

import torch
from torch.autograd import DeviceType

from bench.step.candidates import CANDIDATES, work_of
from bench.step.settings import Cycle, Settings, image_tokens
from fluxfast.errors import ConfigError
from fluxfast.memory.planner.cards import card
from fluxfast.memory.planner.cost import model_flop
from fluxfast.memory.planner.step_spec import Shape

# the host's calls that start something on the device, by CUDA's runtime and driver names
_LAUNCH = re.compile(r"cu(da)?(Launch\w*Kernel\w*|GraphLaunch\w*)")


def figures(
    settings: Settings, name: str, cycle: Cycle, median_ms: float | None, device_name: str
) -> dict[str, float | None]:
    """images_per_s; tflop, of the model in one step (the mean over a cycle's), nothing made again;
    tflop_per_s; mfu, its share of the card's dense peak for the candidate's products. None where
    there is no time, or no card of that name in the table.
    """
    work = work_of(CANDIDATES[name], settings)
    shapes = [Shape(cycle.batch, image_tokens(side), settings.text_tokens) for side in cycle.pixels]
    tflop = sum(model_flop(work, shape) for shape in shapes) / len(shapes) / 1e12
    found: dict[str, float | None] = dict.fromkeys(("images_per_s", "tflop_per_s", "mfu"))
    found["tflop"] = tflop
    if median_ms is None:
        return found
    found["images_per_s"] = cycle.batch * 1e3 / median_ms
    found["tflop_per_s"] = tflop * 1e3 / median_ms
    peak = _peak(device_name, work.matmul) if settings.device != "cpu" else 0
    if peak:
        found["mfu"] = found["tflop_per_s"] * 1e12 / peak
    return found


def _peak(device_name: str, kind: str) -> float:
    """FLOP/s; 0 for a card that is not known, or has no such products."""
    try:
        return card(device_name).peaks[kind]
    except ConfigError:
        return 0


def launches(work: Callable[[], object], device: str) -> dict[str, int | None]:
    """Run `work` once under the profiler -> launches: calls of the host that start something on
    the GPU, a CUDA graph being one; kernels: what ran there for it. Both None on a CPU.
    """
    if device == "cpu":
        return {"launches": None, "kernels": None}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return count_launches(seen.events())


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
