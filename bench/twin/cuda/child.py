"""One run of `fluxfast train` on the twin, in a process of its own: the whole of FLUX.1-dev from
pictures to LoRA file. Its argument is JSON, such as {"settings": ["train.steps=3"], "sizes":
[[512, 512, false]], "fail": "pass"}; its last line is the row.

What is not as on a card: values are zeros; Triton's launches are counted and not compiled
(TWIN_TRITON=real compiles them); convolutions and Hopper's attention allocate their results alone,
as cuDNN's without a workspace; a truth asked of the card is True, as only finiteness is asked; the
base, a sparse file, is not searched for NaN, which would read all of it.
"""

import ctypes
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

GIB = 2**30
STATS = ("launches", "copies", "syncs", "mallocs", "frees", "used", "peak", "graphs")
runtime = ctypes.CDLL("libcudart.so.13")
runtime.fake_stat.restype = ctypes.c_long
runtime.fake_fail.argtypes = [ctypes.c_long]
runtime.fake_launch.argtypes = [ctypes.c_void_p]


def stats() -> dict[str, int]:
    return {name: runtime.fake_stat(number) for number, name in enumerate(STATS)}


def stand_in() -> None:
    """Replaces what cannot run over the twin, see the module."""
    torch.backends.cudnn.enabled = False
    to_bool, to_item = torch.Tensor.__bool__, torch.Tensor.item

    def truth(tensor):
        value = to_bool(tensor)  # with its synchronization
        return True if tensor.is_cuda else value

    def item(tensor):
        value = to_item(tensor)
        # prodigy stops where its estimate is 0
        return 1.0 if tensor.is_cuda and isinstance(value, float) and not value else value

    torch.Tensor.__bool__, torch.Tensor.item = truth, item
    convolve = torch.nn.Conv2d._conv_forward

    def convolution(self, x, weight, bias):
        if not x.is_cuda:
            return convolve(self, x, weight, bias)
        sides = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                x.shape[-2:],
                self.padding,
                self.dilation,
                self.kernel_size,
                self.stride,
                strict=True,
            )
        ]
        return x.new_empty(len(x), self.out_channels, *sides)

    torch.nn.Conv2d._conv_forward = convolution
    _replace_attention()
    from fluxfast.formats.base import reader

    reader._is_finite = lambda part: True
    if os.environ.get("TWIN_TRITON") != "real":
        from triton.runtime import jit

        jit.JITFunction.run = _launch


def _replace_attention() -> None:
    """Replaces cuDNN's attention, which builds a plan that a library of stubs cannot."""

    def forward(q, k, v, *_, **__):
        _launch()
        o = torch.empty_like(q)
        lse = q.new_empty((*q.shape[:3], 1), dtype=torch.float32)
        unused = q.new_empty((), dtype=torch.int64)
        return o, lse, unused, unused, q.shape[2], k.shape[2], unused, unused, unused

    def backward(do, q, k, v, *_, **__):
        _launch()
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    global _library  # what it replaces ends with it
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("_scaled_dot_product_cudnn_attention", forward, "CUDA")
    _library.impl("_scaled_dot_product_cudnn_attention_backward", backward, "CUDA")


def _launch(*_, **__) -> None:
    if runtime.fake_launch(torch.cuda.current_stream().cuda_stream):
        raise RuntimeError("a launch failed")


class Watcher(logging.Handler):
    """Collects what the run logs, and figures at the first two steps and at every graph."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []
        self.steps: list[dict[str, int]] = []
        self.graphs = 0
        self.plan = self.run = None
        self.reserved = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _wrap(module, name: str, before=None, after=None) -> None:
    """Calls before(*arguments) and after(result, *arguments) around a function."""
    function = getattr(module, name)

    def wrapped(*arguments, **options):
        if before:
            before(*arguments)
        result = function(*arguments, **options)
        if after:
            after(result, *arguments)
        return result

    setattr(module, name, wrapped)


def observe(watcher: Watcher, fail: str | None) -> None:
    """Hooks the watcher, and allocations that fail, into the trainer. fail: where the card's memory
    is refused, once at capture, pass, optimizer and preview, for good at encoding and loading.
    """
    import fluxfast.run.evaluate as evaluate
    from fluxfast import step, train
    from fluxfast.encoders import text
    from fluxfast.formats.base import load
    from fluxfast.memory.cuda_graphs import Graphs

    armed = {fail} if fail else set()

    def refuse(place: str, count: int = 2):
        """torch frees what it caches after the first refusal, and asks again."""

        def now(*_):
            if place in armed:
                armed.discard(place)
                torch.cuda.empty_cache()
                runtime.fake_fail(count)

        return now

    def relent(*_):
        runtime.fake_fail(0)  # what did not allocate has nothing to be refused

    _wrap(text.TextEncoders, "__init__", refuse("encoding", 10**6))
    _wrap(load, "load_resolved", refuse("loading", 10**6))
    _wrap(Graphs, "capture", refuse("capture"), relent)
    _wrap(step, "_accumulate", refuse("pass"), relent)
    _wrap(step, "step_unless", refuse("optimizer"), relent)
    _wrap(evaluate, "draw_picture", refuse("preview"))
    _wrap(train, "plan_run", after=lambda plan, *_: setattr(watcher, "plan", plan))
    _wrap(train, "build", after=lambda run, *_: setattr(watcher, "run", run))

    def before(*_):
        watcher.start = stats()

    def after(result, run, *_):
        now, then = stats(), watcher.start
        watcher.steps.append({key: now[key] - then[key] for key in ("launches", "syncs")})
        watcher.graphs = max(watcher.graphs, len(run.graphs._recordings))

    _wrap(train, "train_step", before, after)


def pictures(folder: Path, sizes: list) -> None:
    """Writes one picture with caption per size, with an alpha channel where it has a mask."""
    from PIL import Image

    folder.mkdir()
    for number, (width, height, masked) in enumerate(sizes):
        color = (90, 90 + number, 90, 128) if masked else (90, 90 + number, 90)
        Image.new("RGBA" if masked else "RGB", (width, height), color).save(
            folder / f"{number}.png", compress_level=1
        )
        (folder / f"{number}.txt").write_text("a zorb")


def row(watcher: Watcher, error: str | None) -> dict:
    """Returns the run's figures. GiB; peak: of the card, with what others take of it; elsewhere:
    reserved on cards that are not the run's."""
    figures = stats()
    reserved = [torch.cuda.max_memory_reserved(i) for i in range(torch.cuda.device_count())]
    found = {
        "exit": 0 if error is None else 1,
        "error": error,
        "peak_gib": round(figures["peak"] / GIB, 2),
        "reserved_gib": round(reserved.pop(torch.cuda.current_device()) / GIB, 2),
        "elsewhere_gib": round(sum(reserved) / GIB, 2),
        "steps": watcher.steps,
        "graphs": watcher.graphs,
        "refused": runtime.fake_stat(10),
        "cpu_s": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 1),
        "rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2),
        "notes": [n for n in watcher.lines if n.startswith("note") or "memory" in n],
    }
    if watcher.plan is not None:
        plan = watcher.plan
        found["limit_gib"] = round(plan.limit / GIB, 2)
        found["planned_gib"] = round(plan.peak / GIB, 2)
        found["modulation"], found["state"] = plan.modulation, plan.optimizer_state
        found["planned"] = {k: _count(b.choice.policies) for k, b in plan.buckets.items()}
        found["graphed"] = all(b.graphed for b in plan.buckets.values())
    if watcher.run is not None:
        policies = watcher.run.memory.policies
        found["policies"] = {key: _count(value) for key, value in policies.items()}
        found["no_graphs"] = watcher.run.graphs.reason
    return found


def _count(policies) -> str:
    return ", ".join(f"{count} {policy}" for policy, count in Counter(policies).items())


def main() -> None:
    task = json.loads(sys.argv[1])
    stand_in()
    from bench.twin.cuda.model import make
    from bench.twin.cuda.stubs import BUILD
    from fluxfast.config.schema import build_config
    from fluxfast.errors import FluxfastError

    transformer, encoders = make(BUILD / "model")
    watcher, error = Watcher(), None
    log = logging.getLogger("fluxfast")
    log.addHandler(watcher)
    log.addHandler(logging.StreamHandler(sys.stderr))
    log.setLevel(logging.INFO)
    folder = Path(tempfile.mkdtemp(prefix="twin-"))
    try:
        pictures_in = folder / "pictures"
        pictures(pictures_in, task["sizes"])
        sides = sorted({round((w * h) ** 0.5) for w, h, _ in task["sizes"]})
        data = {"folder": str(pictures_in), "resolution": sides}
        if any(masked for *_, masked in task["sizes"]):
            data["mask"] = "alpha"
        raw = {
            "name": "twin",
            "output_dir": str(folder),
            # encoded once for all runs, but for the one that fails there
            "cache_dir": str((folder if task["fail"] == "encoding" else BUILD) / "cache"),
            "device": "cuda",
            "model": {"path": str(transformer), "encoders": str(encoders)},
            "data": data,
            "train": {"steps": 3},
            "save": {"every": 2},
            "sample": {"prompts": ["a zorb"], "every": 2, "steps": 1},
            "validation": {"folder": str(pictures_in), "every": 2, "timesteps": 1},
        }
        config = build_config(raw, task["settings"])
        observe(watcher, task.get("fail"))
        from fluxfast.train import train

        lora = train(config)
        assert lora.stat().st_size > 10**6, lora
    except FluxfastError as caught:
        error = caught.message
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}".splitlines()[0]
        import traceback

        traceback.print_exc()
    finally:
        with suppress(OSError):
            shutil.rmtree(folder)
    print(json.dumps(row(watcher, error)))
