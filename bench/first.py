"""The first ten minutes on a GPU: what no machine without one can tell, the most valuable first.

    python -m bench.first --budget-s 540
    python -m bench.first --budget-s 540 --out rows.jsonl    goes on where it was stopped

    kernels   does every kernel launch and agree: pytest -m gpu tests/kernels
    step      gradients of a captured step beside the eager one's, narrow and with 2 + 4 blocks of
              full width; times of both, of the host alone, how busy a replay keeps the GPU
    gemm      int8 products, TOP/s by tile
    skinny    LoRA's skinny products beside the rate of a copy
    fp8       error of fp8 products against fp64, by K
    layouts   dX of 8-bit weights as stored, or transposed first, at few rows
    attention the backends, forward and backward, against fp32
    dequant   NF4 in the product, or dequantized first, at few rows; the L2's read rate

Each item is a process of its own that is cut where those after it need the time, and each result a
row of the file at once: what stops the GPU costs the rest of its item, whose output is a file
beside the rows. Needs torch 2.11, Triton 3.6 and numpy; tests need pytest, and run in parallel with
pytest-xdist. The exit code is 1 where a result is wrong or an item failed.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.gemm.linear import linear_forward
from fluxfast_kernels.ops import attention
from fluxfast_kernels.quant.frozen import FrozenWeight, quantize_8bit
from fluxfast_kernels.quant.rows import quantize_rows
from torch import Tensor

from bench import terminal, timing
from bench.errors import relative_errors
from bench.kernels.floor import measure_roof
from bench.rows import Row, RowFile
from bench.step.settings import MODES, TINY_SPEC, Cycle, Kind, Settings
from bench.step.steps import TrainerStep
from bench.tune.calls import HALF, build
from bench.tune.problems import Problem
from bench.tune.space import Kernel, named_tile, tile_name
from bench.tune.sweep import Target, replayed
from bench.tune.ways import BackendJob, HandOverJob, answering
from fluxfast.model.names import linear_shape, part_rows
from fluxfast.model.spec import DEV, FluxSpec
from fluxfast.step import graph_key

MLP_IN = "double_blocks.0.img_mlp.0"
LINEAR1, LINEAR2 = "single_blocks.0.linear1", "single_blocks.0.linear2"
# (op, linear, pass) -> tiles beside the shipped one, all without a spill when compiled
TILES = {
    ("gemm_8bit", MLP_IN, "product"): ("128x128x64.8w3r128", "128x256x64.8w3"),
    ("gemm_8bit_pair", LINEAR2, "product"): ("128x128x64.16w3", "128x128x128.8w3"),
    ("gemm_8bit_dx_pair", LINEAR1, "dx"): ("128x64x64.8w3", "128x128x128.8w3"),
}
ROWS = (512, 1536, 4608)  # tokens of 512 px of text, then images of 512 and 1024 px with it
BLOCKS = replace(DEV, depth=2, depth_single_blocks=4)
REPEATS = 8  # launches that are timed as one: events are some microseconds off
TINY_ROWS = (16, 32)
UNITS = {"TOP/s": 1e9, "TFLOP/s": 1e9, "GB/s": 1e6}  # amount a millisecond of one

Figure = Callable[[timing.Result], tuple[float, str]]


def rate(amount: float, unit: str) -> Figure:
    """Returns what makes a figure of a time: operations or bytes, in `unit`."""
    return lambda result: (amount / result.median_ms / UNITS[unit], unit)


@dataclass
class Bench:
    """What the items share. tiny: narrow layers on a CPU, which check the bench itself."""

    file: RowFile
    item: str
    device: str
    tiny: bool

    @property
    def spec(self) -> FluxSpec:
        return TINY_SPEC if self.tiny else DEV

    @property
    def rank(self) -> int:
        return 4 if self.tiny else 16

    @property
    def arch(self) -> int:
        return dispatch.arch_of(torch.device(self.device))

    @property
    def target(self) -> Target:
        return Target(self.spec, self.rank, self.device, self.arch, rounds=1 if self.tiny else 10)

    def rows(self, counts: Iterable[int] = ROWS) -> Iterable[int]:
        return TINY_ROWS if self.tiny else counts

    def shape_of(self, linear: str, pass_name: str) -> tuple[int, int]:
        """Returns columns and contraction of a pass."""
        N, K = linear_shape(linear, self.spec)
        return (N, K) if pass_name != "dx" else (K, N)

    def todo(self, shared: Row, names: Iterable[str]) -> list[str]:
        """Returns those that the file does not have."""
        return [name for name in names if not self.file.measured(self._row(shared, name))]

    def _row(self, shared: Row, name: str) -> Row:
        row = {"bench": "first", "what": self.item, "name": name} | self.file.conditions
        return row | {"device": self.device} | shared

    def add(
        self, shared: Row, results: Iterable[timing.Result], figure: Figure | None = None
    ) -> None:
        """Appends a row for each. figure: of those that were timed."""
        rows = []
        for result in results:
            if figure and result.median_ms:
                result.details["figure"], result.details["unit"] = figure(result)
            rows.append(timing.row(result) | self._row(shared, result.name))
        self.file.append_news(rows)

    def time(
        self,
        shared: Row,
        runs: dict[str, Callable[[], object]],
        figure: Figure,
        gate: Callable[[str], str | None] | None = None,
    ) -> None:
        """Times them as CUDA graphs of REPEATS launches."""

        def repeated(work: Callable[[], object]) -> Callable[[], object]:
            return replayed(lambda: [work() for _ in range(REPEATS)], self.device)

        runs = {name: repeated(work) for name, work in runs.items()}
        results = timing.compare(runs, self.target.rounds, 2, gate, device=self.device)
        for result in results.values():
            result.divide(REPEATS)
        self.add(shared, results.values(), figure)


def step(bench: Bench) -> None:
    """Eager and captured passes of the trainer's step, narrow and with a few blocks."""
    sizes = [(TINY_SPEC, 64, 8), (BLOCKS, 512, 512)][: 1 if bench.tiny else 2]
    compute = torch.float32 if bench.device == "cpu" else HALF
    for spec, pixels, text in sizes:
        for mode in ("nf4", "nf4-int8")[: 1 if bench.tiny else 2]:
            cycle = Cycle((pixels,), 1)
            base = (spec, bench.device, compute, [cycle], text, bench.rank)
            settings = Settings(*base, rounds=1, warmup=1, apart=True)
            shared: Row = {"shape": [spec.hidden_size, pixels], "storage": mode}
            if bench.todo(shared, ("eager", "replay", "gradients", "host", "busy")):
                bench.add(shared, _step(Kind("trainer", *MODES[mode]), settings, cycle))


def _step(kind: Kind, settings: Settings, cycle: Cycle) -> list[timing.Result]:
    """Returns "eager" and "replay", timed; "gradients", gated; "host", ms to launch an eager pass;
    "busy", the share of a replay in which kernels run."""
    step = TrainerStep(kind, settings)
    # the order in which Triton's attention adds gradients is fixed: equal bits are asked for
    with patch.object(attention, "choose_backend", lambda *_: ("triton", "")):
        step.begin(cycle, [])
        run = step.run
        inputs = run.inputs(run.loader.batch(0))
        eager = partial(run.gradient_pass, inputs)
        captured = partial(run.graphs, graph_key(inputs), inputs)

        def gradients(work: Callable[[], Tensor]) -> Tensor:
            run.flat.gradients.zero_()
            work()
            return run.flat.gradients.double()

        error = relative_errors(gradients(captured), gradients(eager))[0]
        works, device = {"eager": eager, "replay": captured}, settings.device
        results = timing.compare(works, 5, 2, baseline="eager", device=device)
        timing.synchronize(device)
        start = time.perf_counter()
        eager()
        host = {"figure": 1e3 * (time.perf_counter() - start), "unit": "ms on the host"}
        busy = timing.attempt(timing.busy, captured, device)
    if device != "cpu" and not run.graphs.captured:
        results["replay"] = timing.Result("replay", "failed", run.graphs.reason)
    wrong = f"captured gradients differ by {error:.1e} from eager ones" if error else None
    gated = timing.Result("gradients", "gate failed" if wrong else "ok", wrong)
    share = timing.Result("busy")
    if isinstance(busy, Exception):  # no profiler on the machine, say
        share.status, share.reason = "skipped", f"{type(busy).__name__}: {busy}"
    else:
        share.details = {"figure": 100 * busy, "unit": "% of a replay"}
    step.end()
    return [*results.values(), gated, timing.Result("host", details=host), share]


def gemm(bench: Bench) -> None:
    """int8 products by tile."""
    for (op, linear, pass_name), others in TILES.items():
        kernel = Kernel(op, "dense", "int8")
        N, K = bench.shape_of(linear, pass_name)
        for M in bench.rows():
            shipped = dispatch.choose(op, bench.arch, torch.int8, "dense", M, N, K).tile
            tiles = {f"{tile_name(shipped)} shipped": shipped}
            tiles |= {name: named_tile(kernel, name) for name in others if not bench.tiny}
            problem = Problem(kernel, M, N, K, linear, pass_name, 0.0)
            _tiles(bench, problem, tiles, rate(2 * M * N * K, "TOP/s"))


def skinny(bench: Bench) -> None:
    """down and d_down, alone and with the 8-bit rows that they write, d_down's with and without the
    weight's scales in them, beside a copy's rate."""
    if bench.todo({"shape": []}, ["copy"]):
        copy = measure_roof(bench.device, [], bench.tiny).copy_gb_per_s
        bench.add({"shape": []}, [timing.Result("copy", details={"figure": copy, "unit": "GB/s"})])
    alone, with_rows = "lora_skinny", "lora_skinny_8bit"
    for linear, pass_name, ops in (
        (LINEAR1, "down", (alone, with_rows)),
        (LINEAR1, "d_down", (alone, with_rows)),
        (LINEAR1, "d_down without channel", (with_rows,)),
        (LINEAR2, "down", (alone, with_rows)),
    ):
        (N, K), parts = linear_shape(linear, bench.spec), len(part_rows(linear, bench.spec))
        shape = (parts * bench.rank, K) if pass_name == "down" else (bench.rank, N)
        for M, op in product(bench.rows(), ops):
            choice = dispatch.choose(op, bench.arch, HALF, "dense", M, *shape)
            problem = Problem(Kernel(op, "dense", "half"), M, *shape, linear, pass_name, 0.0)
            _tiles(bench, problem, {op: choice.tile})


def _tiles(
    bench: Bench, problem: Problem, tiles: dict[str, object], figure: Figure | None = None
) -> None:
    """Times a launch with each tile, those whose results are right. figure: by default of the bytes
    that it reads and writes."""
    what = f"{problem.linear} {problem.pass_name}"
    shared: Row = {"op": what, "shape": [problem.M, problem.N, problem.K]}
    if not bench.todo(shared, tiles):
        return
    call = build(problem, bench.spec, bench.rank, bench.device)
    reference = call.reference()

    def gate(name: str) -> str | None:
        return call.error(tiles[name], reference)

    runs = {name: partial(call.run, tile) for name, tile in tiles.items()}
    moved = sum(tensor.nbytes for tensor in (*call.read, *call.written))
    bench.time(shared, runs, figure or rate(moved, "GB/s"), gate)


def fp8(bench: Bench) -> None:
    """The error of sums of K fp8 products, of the norm, rounding the result to bf16 included."""
    if 0 < bench.arch < 89:
        return
    for K in (64, 128) if bench.tiny else (3072, 12288, 21504):
        M, N = (16, 32) if bench.tiny else (512, 256)
        shared: Row = {"shape": [M, N, K]}
        if not bench.todo(shared, ("ours", "torch")):
            continue
        generator = torch.Generator(bench.device).manual_seed(0)
        x, w = (
            torch.empty(n, K, dtype=HALF, device=bench.device).normal_(generator=generator)
            for n in (M, N)
        )
        weight = FrozenWeight(list(quantize_8bit(w, "fp8")), None, "fp8")
        codes, scale = weight.tensors
        rows = quantize_rows(x[None], "fp8")[0].dequantize()[0].double()
        truth = rows @ (codes.double() * scale.double()[:, None]).T
        rounding = relative_errors(truth.to(HALF).double(), truth)[0]
        for name, kind in (("ours", "fused"), ("torch", "decode")):
            result = timing.Result(name)
            with answering("gemm_8bit", "dense", kind):
                y = timing.attempt(linear_forward, [x[None]], weight)
            if isinstance(y, Exception):
                timing.fail(result, y)
            else:
                error = relative_errors(y[0][0].double(), truth)[0]
                unit = f"of the norm, {rounding:.1e} by rounding to bf16"
                result.details = {"figure": error, "unit": unit}
            bench.add(shared, [result])


def layouts(bench: Bench) -> None:
    """dX of 8-bit weights, read as stored ("fused") or transposed first ("decode")."""
    for kind in ("int8", "fp8") if bench.arch >= 89 else ("int8",):
        for op, linear in (("gemm_8bit_dx", LINEAR2), ("gemm_8bit_dx_pair", LINEAR1)):
            _hand_over(bench, Kernel(op, "dense", kind), linear, "dx", (512, 1024, 1536, 2048))


def dequant(bench: Bench) -> None:
    """NF4 looked up in the product ("fused") or dequantized first ("decode"); the L2's rate."""
    for linear in (LINEAR1, LINEAR2):
        kernel = Kernel("lora_gemm", "nf4", "half")
        _hand_over(bench, kernel, linear, "product", (256, 512, 1024, 1536))
    nbytes = 1 << 20
    if bench.device != "cpu":
        nbytes = torch.cuda.get_device_properties(bench.device).L2_cache_size // 2
    source, shared = torch.ones(nbytes // 4, device=bench.device), {"shape": [nbytes]}
    if bench.todo(shared, ["sum of half the L2"]):
        bench.time(shared, {"sum of half the L2": source.sum}, rate(nbytes, "GB/s"))


def _hand_over(
    bench: Bench, kernel: Kernel, linear: str, pass_name: str, counts: tuple[int, ...]
) -> None:
    N, K = bench.shape_of(linear, pass_name)
    problem = Problem(kernel, 0, N, K, linear, pass_name, 0.0)
    job = HandOverJob(problem, bench.target, lambda: dispatch.tables(bench.arch)[0])
    for M in bench.rows(counts):
        shared: Row = {"op": f"{kernel} {linear}", "shape": [M, N, K]}
        if bench.todo(shared, [f"fused at {M}", f"decode at {M}"]):
            bench.add(shared, job.at(M, set()), rate(2 * M * N * K, "TOP/s"))


def backends(bench: Bench) -> None:
    """Attention forward and backward on each backend."""
    heads, C = bench.spec.num_heads, bench.spec.head_dim
    for T in bench.rows(ROWS[1:]):
        job, shared = BackendJob(T, bench.target), {"shape": [T, heads, C]}
        if bench.todo(shared, [job.default]):
            # 4 T^2 C forward, 10 backward
            bench.add(shared, job.time(set()), rate(14 * T * T * heads * C, "TFLOP/s"))


ITEMS: dict[str, Callable[[Bench], None]] = {
    "step": step,
    "gemm": gemm,
    "skinny": skinny,
    "fp8": fp8,
    "layouts": layouts,
    "attention": backends,
    "dequant": dequant,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = terminal.parser(__doc__)
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds in all (540)")
    parser.add_argument("--out", type=Path, help="append to this file, and go on from it")
    parser.add_argument("--item", choices=ITEMS, help="one item, in this process")
    parser.add_argument(
        "--tiny", action="store_true", help="narrow layers: checks the bench itself"
    )
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; hint: --tiny")
    if options.item and options.out is None:
        parser.error("--item: name its file with --out")
    return options


def main(arguments: list[str] | None = None) -> int:
    from bench.run import run_suite  # which imports the suites, and these name ITEMS

    started = time.monotonic()
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.item is None:
        return run_suite("first", device, options, started + options.budget_s)
    file = RowFile(options.out.resolve(), timing.conditions(device))
    ITEMS[options.item](Bench(file, options.item, device, options.tiny))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
