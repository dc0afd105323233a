"""A step's forward and backward replayed per bucket: the same numbers as eagerly, and when not to.

Without a GPU `replay.ReplayRecorder` stands in for CUDA's.
"""

from typing import NamedTuple

import pytest
import torch
from replay import ReplayRecorder
from small import SMALL, logged, random_flux
from torch import Tensor, nn

from fluxfast.memory.cuda_graphs import (
    ON_CPU,
    CudaRecorder,
    Graphs,
    GraphsTooLarge,
    NotCapturable,
    is_out_of_memory,
    why_not,
)
from fluxfast.model.lora import inject_lora
from fluxfast.objective import Batch, Inputs, noise_batch, sample_losses
from fluxfast.optim import FlatParameters


class Step:
    """A small FLUX with a LoRA, its flat gradients, and the pass of a training step."""

    def __init__(self, device: str = "cpu", targets: str = "attn+mlp", dropout: float = 0.0):
        self.model = random_flux(SMALL, device=device)
        self.parameters = inject_lora(self.model, rank=2, targets=targets, dropout=dropout)
        generator = torch.Generator(device).manual_seed(1)
        for parameter in self.parameters:  # B too: with zeros A would have no gradient
            parameter.data.normal_(0, 0.1, generator=generator)
        self.gradients = FlatParameters(self.parameters).gradients
        self.calls = 0

    def run_pass(self, inputs) -> Tensor:
        self.calls += 1
        self.model.dropout_clock.indices = inputs.indices
        loss = sample_losses(self.model, inputs, 1.0).mean() / 2
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def descend(self) -> None:
        for parameter in self.parameters:
            parameter.sub_(parameter.grad, alpha=0.1)


# of samples in pairs: latent rows, columns, and whether there is a mask
BUCKETS = {"small": (4, 4, False), "wide": (4, 8, True), "tall": (8, 4, False)}


def draw(bucket: str, index: int, device: str = "cpu") -> Inputs:
    """The inputs of sample `index` and the next."""
    rows, columns, masked = BUCKETS[bucket]
    g = torch.Generator().manual_seed(index)
    mean = torch.randn(2, SMALL.in_channels // 4, rows, columns, generator=g).to(device)
    mask = torch.rand(2, rows, columns, generator=g).to(device) if masked else None
    t5 = torch.randn(2, 3, SMALL.context_in_dim, generator=g).to(device)
    pooled = torch.randn(2, SMALL.vec_in_dim, generator=g).to(device)
    encoded = mean, torch.ones_like(mean), mask, t5, pooled
    return noise_batch(Batch(*encoded, [index, index + 1]), seed=0, device=device)


ORDER = ["small", "wide", "small", "tall", "tall", "small", "wide", "wide"]


STEPS = [("attn+mlp", 0.0), ("all", 0.0), ("all", 0.3)]


def compare(device: str, recorder, tolerance: float, targets: str, dropout: float) -> None:
    """Four steps of two batches each, replayed against eager ones, from the same weights."""
    eager, graphed = (Step(device, targets, dropout) for _ in range(2))
    graphs = Graphs(graphed.run_pass, graphed.gradients, recorder=recorder)
    with logged() as lines:
        graphs.capture({bucket: draw(bucket, 90, device) for bucket in BUCKETS})
    calls = graphed.calls
    for step in range(4):
        eager.gradients.zero_()
        graphed.gradients.zero_()
        losses = []
        for index in (2 * step, 2 * step + 1):
            inputs = draw(ORDER[index], 2 * index, device)
            losses.append((graphs(ORDER[index], inputs), eager.run_pass(inputs)))
        # looked at after the next replay
        for replayed, truth in losses:
            assert torch.isfinite(truth) and (replayed - truth).abs() <= tolerance * truth.abs()
        largest = eager.gradients.abs().max()
        assert largest > 0
        assert (graphed.gradients - eager.gradients).abs().max() <= tolerance * largest
        eager.descend()
        graphed.descend()
    assert graphed.calls == calls and graphs.reason is None and not lines


@pytest.mark.parametrize("targets, dropout", STEPS)
def test_replayed_steps_are_the_eager_ones(targets, dropout):
    """Bit for bit: losses, and gradients summed over two batches of different buckets, while the
    weights move and dropout's masks change; and Python runs none of it."""
    compare("cpu", ReplayRecorder(), 0.0, targets, dropout)


def test_capture_changes_no_training_state():
    step = Step()
    step.gradients.normal_(generator=torch.Generator().manual_seed(2))
    before = [step.gradients.clone(), *(p.detach().clone() for p in step.parameters)]
    graphs = Graphs(step.run_pass, step.gradients, recorder=ReplayRecorder())
    graphs.capture({"small": draw("small", 0)})
    after = [step.gradients, *step.parameters]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert graphs.captured and all(
        p.grad.untyped_storage().data_ptr() == step.gradients.data_ptr() for p in step.parameters
    )


class X(NamedTuple):
    x: Tensor | None
    shift: Tensor | None = None


class Line:
    """loss = sum(w · x · factor), its gradient x · factor; factor is Python's."""

    def __init__(self):
        self.w = nn.Parameter(torch.ones(3))
        self.gradients = FlatParameters([self.w]).gradients
        self.factor, self.ran = 1.0, []

    def run_pass(self, inputs) -> Tensor:
        x, shift = inputs.x, inputs.shift
        self.ran.append(tuple(x.shape))
        loss = (self.w * x * self.factor).sum()
        if shift is not None:
            loss = loss + shift.sum()
        loss.backward()
        return loss.detach()


def line(*counts: int, recorder=None) -> tuple[Line, Graphs, ReplayRecorder]:
    """Captured with x [count, 3] per count."""
    step, recorder = Line(), recorder or ReplayRecorder()
    graphs = Graphs(step.run_pass, step.gradients, recorder=recorder)
    graphs.capture({count: X(torch.ones(count, 3)) for count in counts})
    return step, graphs, recorder


def test_largest_first_and_nothing_runs_eagerly_beside_a_pool():
    step, graphs, recorder = line(2, 5, 1)
    assert step.ran == [(5, 3), (5, 3), (2, 3), (2, 3), (1, 3), (1, 3), (5, 3), (2, 3), (1, 3)]
    assert recorder.log == ["release", *["warm up"] * 3, *["record"] * 3]
    step.ran.clear()
    graphs.capture({n: X(torch.ones(n, 3)) for n in (1, 2)})
    assert step.ran[-2:] == [(2, 3), (1, 3)] and 5 not in graphs._recordings


def test_a_key_is_warmed_up_once_until_its_kernels_change():
    step, graphs, recorder = line(2, 1)
    recorder.log.clear()
    graphs.capture({n: X(torch.ones(n, 3)) for n in (1, 2, 3)})
    assert recorder.log == ["release", "warm up", *["record"] * 3]  # 3 alone is new
    assert graphs(2, X(torch.ones(2, 3))) == 6.0
    graphs.cool()
    recorder.log.clear()
    graphs.capture({n: X(torch.ones(n, 3)) for n in (1, 2)})
    assert recorder.log == ["release", *["warm up"] * 2, *["record"] * 2]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError("CUDA error: out of memory"),  # cudaGraphInstantiate
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_memory_that_runs_out_while_recording_is_no_reason_against_graphs(error, log_lines):
    class Full(ReplayRecorder):
        def record(self, run, left):
            raise error

    step = Line()
    graphs = Graphs(step.run_pass, step.gradients, recorder=Full())
    with pytest.raises(RuntimeError, match=str(error)):
        graphs.capture({1: X(torch.ones(1, 3))})
    assert graphs.reason is None and not graphs.captured and not log_lines


def test_the_stand_in_goes_wrong_where_a_graph_does():
    """It freezes what Python read, and a loss of the last replay is gone after the next."""
    step, graphs, _ = line(1, 2)
    ones = X(torch.ones(1, 3))
    step.factor = 7.0
    assert graphs(1, ones) == 3.0  # not 21
    raw = graphs._recordings[1].output
    assert raw == 3.0
    graphs(2, X(torch.ones(2, 3)))
    assert torch.isnan(raw)


def test_inputs_that_the_graph_was_not_captured_with():
    step, graphs, _ = line(2)
    x = torch.ones(2, 3)
    for odd, message in (
        (X(torch.ones(4, 3)), r"x .* graph of 2 .* \[2, 3\], got .*\[4, 3\]"),
        (X(x.double()), "x .* float32 .* got float64"),
        (X(x, x), r"shift .* graph of 2 .* None, got float32 \[2, 3\]"),
        (X(None), "x .* got None"),
    ):
        with pytest.raises(ValueError, match=message):
            graphs(2, odd)
    assert (step.gradients == 0).all()
    assert graphs(2, X(x)) == 6.0


def test_what_is_not_captured_runs_eagerly():
    step, graphs, recorder = line(2)
    step.ran.clear()
    assert graphs(3, X(torch.ones(3, 3))) == 9.0 and step.ran == [(3, 3)]
    assert graphs(2, X(torch.ones(2, 3))) == 6.0 and step.ran == [(3, 3)]
    assert step.gradients[:3].tolist() == [5.0, 5.0, 5.0]
    recorder.log.clear()
    graphs.drop()
    assert not graphs.captured and recorder.log == ["release"]
    step.factor = 7.0
    assert graphs(2, X(torch.ones(2, 3))) == 42.0


def test_a_step_that_waits_is_run_eagerly_and_said_so_once(log_lines):
    """A capture that fails halfway through backward leaves neither gradients nor graphs."""
    step = Line()

    def run_pass(inputs):
        loss = step.run_pass(inputs)
        return loss * loss.item() if len(inputs.x) == 1 else loss

    recorder = ReplayRecorder()
    graphs = Graphs(run_pass, step.gradients, recorder=recorder)
    step.gradients.fill_(5.0)
    graphs.capture({n: X(torch.ones(n, 3)) for n in (1, 2)})
    assert (step.gradients == 5.0).all()
    assert graphs.reason == "operation not permitted when stream is capturing"
    assert log_lines == [f"note: CUDA graphs are off: {graphs.reason}"]
    assert not graphs.captured and not recorder.pool and recorder.log[-1] == "release"
    assert graphs(1, X(2 * torch.ones(1, 3))) == 36.0
    recorder.log.clear()
    graphs.capture({2: X(torch.ones(2, 3))})  # not tried again
    assert "record" not in recorder.log and not graphs.captured and len(log_lines) == 1


def test_what_the_warm_up_finds_out_is_a_reason_too():
    class Strict(ReplayRecorder):
        def warm_up(self, run):
            run()
            raise NotCapturable("the step waits for the GPU")

    step, graphs, recorder = line(1, recorder=Strict())
    assert graphs.reason == "the step waits for the GPU" and "record" not in recorder.log
    assert (step.gradients == 0).all()


def test_an_error_of_the_step_itself_is_raised(log_lines):
    step = Line()

    def run_pass(inputs):
        step.run_pass(inputs)
        raise torch.OutOfMemoryError("full")

    graphs = Graphs(run_pass, step.gradients, recorder=ReplayRecorder())
    with pytest.raises(torch.OutOfMemoryError):
        graphs.capture({1: X(torch.ones(1, 3))})
    assert (step.gradients == 0).all() and graphs.reason is None and not log_lines


def test_reasons_known_beforehand(monkeypatch):
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")

    def reason(device=gpu, offload=False, wanted=True):
        return why_not(device, offload=offload, wanted=wanted)

    assert reason() is None and reason(cpu, offload=True) == ON_CPU
    assert "copies" in reason(offload=True)
    assert reason(wanted=False) == "memory.graphs is false"
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert "CUDA_LAUNCH_BLOCKING" in reason()


@pytest.mark.parametrize("reason", [ON_CPU, "offloading"])
def test_a_known_reason_is_announced_except_of_a_cpu(reason, log_lines):
    step = Line()
    graphs = Graphs(step.run_pass, step.gradients, reason)
    graphs.capture({1: X(torch.ones(1, 3))})
    assert not step.ran and graphs(1, X(torch.ones(1, 3))) == 3.0
    lines = [] if reason == ON_CPU else ["note: CUDA graphs are off: offloading"]
    assert log_lines == lines


@pytest.mark.gpu
@pytest.mark.parametrize("targets, dropout", STEPS)
def test_replayed_steps_on_a_gpu(targets, dropout):
    # attention's backward may add its parts up in another order: a few roundings of fp32
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    compare("cuda", recorder, 1e-4, targets, dropout)


class Wide:
    """n activations of 16 MiB, all kept for backward."""

    def __init__(self):
        self.w = nn.Parameter(torch.ones(4 << 20, device="cuda"))
        self.gradients = FlatParameters([self.w]).gradients
        self.spoil = lambda: None

    def run_pass(self, inputs) -> Tensor:
        y = self.w
        for row in inputs.x:
            y = torch.sin(y * row)
        self.spoil()
        loss = y.sum()
        loss.backward()
        return loss.detach()

    def examples(self, *counts: int):
        return {n: X(torch.ones(n, 1, device="cuda")) for n in counts}


def _reserved() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@pytest.mark.gpu
def test_the_pool_is_the_largest_buckets():
    step = Wide()
    graphs = Graphs(step.run_pass, step.gradients)
    base = _reserved()
    graphs.capture(step.examples(12))
    largest = _reserved() - base
    graphs.capture(step.examples(6, 12, 10, 8))
    assert largest > 12 * 16 << 20 and _reserved() - base < 1.2 * largest
    step.gradients.zero_()
    for n in (6, 12, 8, 10):
        step.w.grad.zero_()
        loss, replayed = graphs(n, step.examples(n)[n]), step.w.grad.clone()
        step.w.grad.zero_()
        truth = step.run_pass(step.examples(n)[n])
        assert torch.equal(loss, truth) and torch.equal(replayed, step.w.grad)
    graphs.drop()
    del loss, replayed, truth
    assert _reserved() <= base + (2 << 20)


@pytest.mark.gpu
def test_memory_that_runs_out_while_recording_is_released_once():
    """A second release of the pool is an assertion in torch's allocator; an error that its own
    frame holds keeps all activations."""
    step = Wide()

    def spoil():
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("full")

    graphs = Graphs(step.run_pass, step.gradients)
    base = _reserved()
    step.spoil = spoil
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        graphs.capture(step.examples(8))
    assert _reserved() <= base + (2 << 20)
    step.spoil = lambda: None
    graphs.capture(step.examples(8))
    assert graphs.captured and torch.isfinite(graphs(8, step.examples(8)[8]))


@pytest.mark.gpu
def test_what_the_warm_up_leaves_cached_is_room_for_a_graph():
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    recorder._driver_bytes = free * 3 // 4
    torch.empty(free // 2, dtype=torch.uint8, device="cuda")  # cached when it is freed
    recorder.record(lambda: torch.ones(2, device="cuda"), 1)
    recorder._driver_bytes = free * 3 // 4
    with pytest.raises(GraphsTooLarge) as error:  # one of them would fit
        recorder.record(lambda: torch.ones(2, device="cuda"), 2)
    assert is_out_of_memory(error.value) and free // 2 <= error.value.nbytes < free


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [False, True])
def test_a_wait_leaves_the_gpu_usable(hidden, log_lines):
    """One that the warm-up finds, and one that shows only in the capture itself."""
    step = Wide()

    def spoil():
        if not hidden or torch.cuda.is_current_stream_capturing():
            step.w.sum().item()

    step.spoil = spoil
    graphs = Graphs(step.run_pass, step.gradients)
    base = _reserved()
    graphs.capture(step.examples(4, 8))
    assert len(log_lines) == 1 and graphs.reason and (step.gradients == 0).all()
    assert _reserved() <= base + (2 << 20)  # the failed capture's memory is released
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.isfinite(graphs(4, step.examples(4)[4]))

    step.spoil = lambda: None
    other = Graphs(step.run_pass, step.gradients)
    other.capture(step.examples(4))
    assert other.captured and len(log_lines) == 1
