"""The suites of `bench.run`: their items, the most valuable first, and how long each may take.

Estimates are guesses for an H100 and for two CPU cores: they decide what is still begun and when
something is cut, never what a row says.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch

from bench.step.settings import (
    BASELINE,
    CPU_SPEC,
    DEFAULTS,
    STOCK_TARGETS,
    TINY_SPEC,
    Cycle,
    Settings,
)
from bench.suite_items import CommandItem, Item, StepItem
from fluxfast.model.precision import multiplies_bf16
from fluxfast.model.spec import DEV

SIDES = (512, 768, 1024)
TINY_SIDES = (64, 96, 128)
CAPS_GIB = (12, 16, 24)
FIRST_TESTS = [  # of the kernels that a step runs
    f"tests/kernels/test_{name}.py"
    for name in (
        *("qk_norm_rope", "attention", "frozen", "modulated"),
        *("flow_loss", "gelu", "fused_linears"),
    )
]
CHECKPOINTED, COMPILED = f"{BASELINE}-checkpoint", "diffusers-dense-compile"
TRAINERS = [  # of fluxfast, the dense one first: 8-bit bases are held to it
    f"fluxfast-{mode}-trainer"
    for mode in ("nf4", "dense", "int8-int8", "fp8-fp8", "nf4-int8", "nf4-fp8")
]
BARE = [name.removesuffix("-trainer") for name in TRAINERS]


def gpu_suite(tiny: bool = False) -> list[Item]:
    """Its first eight minutes: are the kernels right, the step at three sizes in every mode beside
    diffusers QLoRA, the kernels beside their floor. tiny: narrow blocks on a CPU."""
    settings = Settings(DEV, "cuda", torch.bfloat16, [], 512, 16, rounds=7, warmup=3, apart=True)
    settings = _tiny() if tiny else settings
    sides = TINY_SIDES if tiny else SIDES

    def step(
        names: list[str], seconds: float, batch: int = 1, mixed: bool = False, **changes
    ) -> list[Item]:
        cycles = [Cycle((side,), batch) for side in sides]
        cycles += [Cycle(sides, batch)] * mixed
        changed = replace(settings, cycles=cycles, **changes)
        return [StepItem(changed, [name], seconds) for name in names]

    everything = {"targets": STOCK_TARGETS}
    stock = {"setting": "stock", **everything}
    capped = [BASELINE, CHECKPOINTED, "fluxfast-nf4-trainer", "fluxfast-nf4-int8-trainer"]
    return [
        _tests("kernels right", FIRST_TESTS, 60),
        *step([BASELINE, *TRAINERS], 45),
        _kernels("kernels", settings.device, 75, tiny, ["--pixels", "1024", "--batch", "1"]),
        *step([CHECKPOINTED], 60),
        *step([BASELINE, CHECKPOINTED, *TRAINERS], 60, batch=4),
        *step([BASELINE, *TRAINERS], 45, **everything),
        *step([BASELINE, CHECKPOINTED, *TRAINERS], 60, mixed=True, **stock),
        *(item for cap in CAPS_GIB for item in step(capped, 45, cap_gib=cap)),
        *step(["fluxfast-nf4-trainer"], 60, mixed=True, cap_gib=max(CAPS_GIB), **stock),
        *step([COMPILED], 180),
        *step(BARE, 45),
        _kernels("kernels, all", settings.device, 300, tiny),
        _tests("kernels right, all", ["tests/kernels", "tests/memory/test_graphs.py"], 300),
    ]


def first_suite(tiny: bool = False) -> list[Item]:
    """See `bench.first`."""
    from bench.first import ITEMS  # imports what times tiles

    seconds = {"step": 90, "gemm": 60, "skinny": 40, "fp8": 15, "layouts": 50, "dequant": 40}
    words = ["-m", "bench.first", "--out", "{out}", *(["--tiny"] if tiny else []), "--item"]
    parallel = ["-n", "8"] if find_spec("xdist") else []
    tests = _tests("kernels right", [*parallel, "tests/kernels"], 150)
    return [tests, *(CommandItem(i, [*words, i], seconds.get(i, 30)) for i in ITEMS)]


def cpu_suite(tiny: bool = False) -> list[Item]:
    """At most ten minutes on two cores. tiny: without what has one size only."""
    bf16 = multiplies_bf16(torch.device("cpu"))
    compute = torch.bfloat16 if bf16 else torch.float32
    cycles = [Cycle((256,), 1)]
    settings = Settings(CPU_SPEC, "cpu", compute, cycles, 128, 16, rounds=9, warmup=3, apart=False)
    settings = replace(_tiny(), apart=False) if tiny else settings
    full = [
        CommandItem("NF4", ["-m", "bench.quantize", "--out", "{out}"], 45),
        CommandItem("saved bytes", ["-m", "bench.saved", "--out", "{out}"], 45),
    ]
    step = StepItem(settings, DEFAULTS["cpu"], 330)
    return [step, *([] if tiny else full), _kernels("kernels", "cpu", 150, tiny)]


def _tiny() -> Settings:
    cycles = [Cycle((TINY_SIDES[0],), 1)]
    return Settings(TINY_SPEC, "cpu", torch.float32, cycles, 8, 16, rounds=1, warmup=1, apart=True)


def _tests(name: str, files: list[str], seconds: float) -> CommandItem:
    # without addopts, which have options of plugins; -v: a run that is cut names what has failed
    words = ["-o", "addopts=", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    words = ["-m", "pytest", "-m", "gpu", "-v", "--tb=short", *words, *files]
    return CommandItem(name, words, seconds)


def _kernels(
    name: str, device: str, seconds: float, tiny: bool, shapes: list[str] = ()
) -> CommandItem:
    words = ["-m", "bench.kernels", "--device", device]
    words += ["--out", "{out}", "--budget-s", "{budget_s}", *(["--tiny"] if tiny else shapes)]
    return CommandItem(name, words, seconds)
