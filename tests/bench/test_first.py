"""What is measured first on a GPU: each item's rows, once; what goes wrong costs its own rows; the
table and the exit code."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fluxfast_kernels.gemm import grads
from torch.autograd import DeviceType

from bench import ROOT, first, run, suite_items, timing
from bench.rows import RowFile, read
from bench.suite_table import table
from bench.suites import first_suite
from bench.tune.calls import Call, build
from bench.tune.problems import Problem
from bench.tune.space import Kernel

# modules that are on no machine with torch, Triton, numpy and pytest alone; for every process that
# starts with it as sitecustomize.py. Of the items, gemm crashes and fp8 hangs.
OTHERS = (
    *("pydantic", "typer", "click", "transformers", "diffusers", "peft", "accelerate", "yaml"),
    *("rich", "bitsandbytes", "safetensors", "PIL", "scipy", "hypothesis", "pytest_benchmark"),
    *("xdist", "huggingface_hub", "tqdm", "psutil"),
)
SITE = f"""
import os, sys, time
from importlib.machinery import PathFinder

class Lacking(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in {OTHERS}:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Lacking
item = sys.orig_argv[-1] if "--item" in sys.orig_argv else None
if item == "gemm":
    os.abort()
if item == "fp8":
    print("begun", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def no_launches(monkeypatch):
    """Launches that write the right results at once, but for the tile that is named."""
    faults = {}

    def build(problem, spec, rank, device):
        out = torch.zeros(1)

        def launch(tile) -> None:
            out.fill_(faults.get(problem.pass_name, 1.0))

        return Call(launch, [out], lambda: [torch.ones(1)])

    def timed(job, names) -> list[timing.Result]:
        return list(
            job.compare({n: torch.Tensor for n in names}, lambda _: None, 1, names[0]).values()
        )

    def at(job, M, failed):
        return timed(job, [f"fused at {M}", f"decode at {M}"])

    monkeypatch.setattr(timing, "peak_memory", lambda work, _: (work(), None, None)[1:])
    monkeypatch.setattr(first, "build", build)
    monkeypatch.setattr(first.HandOverJob, "at", at)
    monkeypatch.setattr(first.BackendJob, "time", lambda job, _: timed(job, [job.default, "cudnn"]))
    return faults


def measure(item, out) -> list[dict]:
    assert first.main(["--tiny", "--item", item, "--out", str(out)]) == 0
    return read(out)


@pytest.mark.parametrize(
    "item", [pytest.param(i, marks=[pytest.mark.slow] * (i == "step")) for i in first.ITEMS]
)
def test_an_item_measures_each_of_its_rows_once(item, tmp_path, no_launches):
    out = tmp_path / "rows.jsonl"
    rows = measure(item, out)
    assert rows and {row["status"] for row in rows} <= {"ok", "skipped"}
    assert {row["what"] for row in rows} == {item}
    assert item in table(rows) and measure(item, out) == rows


def test_wrong_results_are_not_timed(tmp_path, no_launches):
    no_launches["dx"] = 2.0
    rows = measure("gemm", tmp_path / "rows.jsonl")
    wrong = [row for row in rows if row["status"] == "gate failed"]
    assert {row["op"].split()[-1] for row in wrong} == {"dx"} and len(wrong) < len(rows)
    assert all(row["median_ms"] is None for row in wrong)


@pytest.mark.slow
def test_a_replay_that_differs_is_wrong(monkeypatch):
    gradients = iter([torch.ones(2), torch.zeros(2)])
    monkeypatch.setattr(first, "relative_errors", lambda a, b: ((next(gradients) - 1).norm(), 0.0))
    settings = {"storage": "nf4"}
    kind = first.Kind("trainer", *first.MODES[settings["storage"]])
    cycle = first.Cycle((64,), 1)
    base = (first.TINY_SPEC, "cpu", torch.float32, [cycle], 8, 4)
    same = first._step(kind, first.Settings(*base, rounds=1, warmup=1, apart=True), cycle)
    other = first._step(kind, first.Settings(*base, rounds=1, warmup=1, apart=True), cycle)
    status = [next(r.status for r in each if r.name == "gradients") for each in (same, other)]
    assert status == ["ok", "gate failed"]


def test_the_whole_flow_goes_on_after_what_fails(tmp_path, monkeypatch, capsys):
    """Items in the order of what they are worth; one crashes, one hangs; the next run takes only
    what is left."""
    out, ran = tmp_path / "rows.jsonl", []
    outcomes = {"gemm": (1, "Traceback (most recent call last):\nRuntimeError: an illegal access")}
    outcomes["skinny"] = (None, "")

    def command(words, limit_s):
        ran.append(words[-1] if "pytest" not in words else "tests")
        return outcomes.get(ran[-1], (0, "8 passed"))

    monkeypatch.setattr(suite_items, "run_python", command)
    arguments = ["--tiny", "--budget-s", "540", "--out", str(out)]
    assert first.main(arguments) == 1
    assert ran == ["tests", *first.ITEMS]
    text = capsys.readouterr().out
    assert "gemm: failed" in text and "illegal access" in text and "out of time: skinny" in text
    with out.open("a") as file:
        file.write('{"bench": "first", "wh')  # a process that was killed
    ran.clear()
    outcomes.clear()
    assert first.main(arguments) == 1 and ran == ["skinny"]  # a failed one is not tried again
    assert all(json.loads(line) for line in out.read_text().splitlines())


def test_a_budget_begins_nothing_that_it_cannot_end(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(suite_items, "run_python", lambda words, _: ran.append(words) or (0, ""))
    assert first.main(["--tiny", "--budget-s", "1", "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert ran == [] and len(first_suite()) == len(first.ITEMS) + 1
    assert set(run.BUDGET_S) == {"cpu", "gpu"}


def test_it_imports_with_torch_triton_and_numpy_alone(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    command = [sys.executable, "-c", "import bench.first, bench.run"]
    done = subprocess.run(
        command, env={"PYTHONPATH": paths(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def paths(*folders) -> str:
    return os.pathsep.join(map(str, (*folders, ROOT, ROOT / "kernels")))


@pytest.mark.slow
def test_the_whole_flow_with_torch_triton_and_numpy_alone(tmp_path, monkeypatch, capsys):
    """In real processes, of which one crashes and one hangs; no launch works on a CPU."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", paths(tmp_path))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    out, suite = tmp_path / "rows.jsonl", first_suite(True)
    suite[0].arguments = [word for word in suite[0].arguments if word not in ("-n", "8")]
    next(item for item in suite if item.name == "fp8").estimate_s = 3
    monkeypatch.setitem(run.SUITES, "first", lambda _: suite)
    assert first.main(["--tiny", "--budget-s", "540", "--out", str(out)]) == 1
    rows = read(out)
    commands = {row["name"]: row for row in rows if row["bench"] == "suite"}
    assert list(commands) == ["kernels right", *first.ITEMS]
    status = {name: row["status"] for name, row in commands.items() if row["status"] != "ok"}
    assert status == {"gemm": "failed", "fp8": "out of time"}, capsys.readouterr().out
    assert " skipped" in commands["kernels right"]["said"]  # no GPU: each was collected
    assert (tmp_path / "rows-fp8.txt").read_text() == "begun\n"
    timed = {row["what"] for row in rows if row["bench"] == "first" and row["status"] == "ok"}
    assert timed == set(first.ITEMS) - {"gemm", "fp8", "attention"}
    refused = [row["reason"] for row in rows if row["status"] == "gate failed"]
    assert refused and all("driver" in reason or "aten::" in reason for reason in refused)


@pytest.mark.parametrize(("takes", "limit"), [(0, 215), (200, 215), (450, 215)])
def test_an_item_leaves_those_after_it_their_time(takes, limit, tmp_path, monkeypatch):
    """Of 540 s: the tests may take 215, and an item after quick ones what is left over."""
    limits, now = [], [0.0]

    def command(words, limit_s):
        limits.append(limit_s)
        now[0] += min(takes, limit_s) if len(limits) == 1 else limit_s
        return 0, ""

    monkeypatch.setattr(suite_items, "run_python", command)
    file = RowFile(tmp_path / "rows.jsonl", {})
    items = first_suite()
    suite_items.run_items(items, file, 540.0, lambda: now[0], in_turn=True)
    assert limits[0] == limit and len(limits) == len(items) and now[0] <= 540
    assert all(most >= item.estimate_s for most, item in zip(limits, items, strict=True))


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("t.py::a FAILED [ 3%]", "missed"),
        ("[gw0] [ 3%] FAILED t.py::a", "missed"),
        ("", "out of time"),
    ],
)
def test_tests_that_failed_before_a_cut_count(line, status):
    found, reason = suite_items._judge(None, f"t.py::b PASSED\n{line}\nt.py::c", 9)
    assert found == status and reason.startswith("cut after 9 s: ") and reason.endswith("t.py::c")
    assert line in reason


def test_only_a_devices_own_events_keep_it_busy(monkeypatch):
    """A profile of the device has the host's calls of CUDA, which last the whole pass, too."""
    device, host = DeviceType.CUDA, DeviceType.CPU
    spans = [(host, 0, 100), (device, 10, 20), (device, 15, 30), (device, 50, 60)]
    events = [
        SimpleNamespace(device_type=kind, time_range=SimpleNamespace(start=start, end=end))
        for kind, start, end in spans
    ]
    profile = nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    assert timing.busy(lambda: None, "cuda") == 30 / 50
    assert timing.busy(lambda: None, "cpu") == 1.0


def test_skinny_products_move_what_they_read_and_write():
    """One of linear2's two inputs is quantized on the way; d_down with and without the scales."""
    M, rank, (D, F) = 16, 4, (first.TINY_SPEC.hidden_size, first.TINY_SPEC.mlp_hidden)

    def moved(linear, pass_name, op) -> int:
        problem = Problem(Kernel(op, "dense", "half"), M, rank, 0, linear, pass_name, 0.0)
        call = build(problem, first.TINY_SPEC, rank, "cpu")
        return sum(tensor.nbytes for tensor in (*call.read, *call.written))

    down = M * 2 * (D + F) + 4 * rank * (D + F) + M * 2 * rank
    assert moved(first.LINEAR2, "down", "lora_skinny") == down
    assert moved(first.LINEAR2, "down", "lora_skinny_8bit") == down + M * (D + 4)
    assert moved(first.LINEAR1, "d_down", "lora_skinny_8bit") == moved(
        first.LINEAR1, "d_down without channel", "lora_skinny_8bit"
    )


def test_the_channel_is_compared(tmp_path, no_launches, monkeypatch):
    seen = []
    monkeypatch.setattr(grads, "lora_d_down", lambda *_, **named: seen.append(named["channel"]))
    for pass_name in ("d_down", "d_down without channel"):
        kernel = Kernel("lora_skinny_8bit", "dense", "half")
        problem = Problem(kernel, 16, 4, 0, first.LINEAR1, pass_name, 0.0)
        call = build(problem, first.TINY_SPEC, 4, "cpu")
        call.run(None)
        assert len(call.reference()) == len(call.results()) == 3
    assert seen[0] is not None and seen[1] is None
    ops = [(row.get("op"), row["name"]) for row in measure("skinny", tmp_path / "rows.jsonl")]
    assert (f"{first.LINEAR1} d_down without channel", "lora_skinny_8bit") in ops


def test_the_l2_is_read_by_half(tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=8192)
    )
    monkeypatch.setattr(first, "_hand_over", lambda *_: None)
    monkeypatch.setattr(torch, "ones", lambda n, device: torch.zeros(n))
    timed = []
    monkeypatch.setattr(first.Bench, "time", lambda self, shared, *_: timed.append(shared["shape"]))
    file = RowFile(tmp_path / "rows.jsonl", {})
    first.dequant(first.Bench(file, "dequant", "cuda", False))
    assert timed == [[4096]]


TILES = """
from bench.first import TILES
from bench.tune.space import Kernel
from bench.tune.tiles import KEPT, heading_of

for arch in (89, 90):
    for (op, _, _), names in TILES.items():
        for name in names:
            assert heading_of(Kernel(op, "dense", "int8"), name, arch) == KEPT, (arch, op, name)
"""


@pytest.mark.slow
def test_the_tiles_compile_without_a_spill(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": paths(), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", TILES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


FULL_WIDTH = """
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

from bench import first, timing
from bench.rows import RowFile
from bench.tune import calls, ways
from bench.twin.driver import card

class Generator:
    def __init__(self, device):
        pass

    def manual_seed(self, seed):
        return self

def normal(self, *shape, std=1.0, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def error(self, tile, reference):
    self.run(tile)
    assert tile.num_warps != 16, "as injected"

with ExitStack() as stack:
    for holder, name, fake in (
        (torch, "Generator", Generator),
        (torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1 << 20)),
        (calls.LinearTensors, "normal", normal),
        (calls.Call, "error", error),
        (ways, "disagreement", lambda *_: None),
        (timing, "peak_memory", lambda work, _: (None, None)),
        (first, "measure_roof", lambda *_: SimpleNamespace(copy_gb_per_s=1.0)),
    ):
        stack.enter_context(patch.object(holder, name, fake))
    file = RowFile(Path(sys.argv[1]), {})
    for item in ("gemm", "skinny", "layouts", "dequant"):
        with card(90) as launches:
            first.ITEMS[item](first.Bench(file, item, "meta", False))
        assert any(launch.kernel for launch in launches), item
"""


@pytest.mark.slow
def test_full_width_items_launch_on_a_card_that_is_not_here(tmp_path):
    """Every launch is accepted and specialized for an H200; one tile of linear2's fails."""
    script, out = tmp_path / "script.py", tmp_path / "rows.jsonl"
    script.write_text(FULL_WIDTH)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), str(out)]
    environment["PYTHONPATH"] = paths()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read(out)
    failed = {row["name"]: row["reason"] for row in rows if row["status"] != "ok"}
    assert failed == {"128x128x64.16w3": "AssertionError: as injected"} and len(rows) > 90
