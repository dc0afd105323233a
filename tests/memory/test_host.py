"""Optimizer state and frozen weights on the host: the same steps, the same products, to the bit."""

import os
from contextlib import nullcontext
from copy import deepcopy

import fluxfast_kernels as fk
import pytest
import torch
from simulated_copies import OrderedCopies, SimulatedCopies
from torch.utils._pytree import tree_leaves

from fluxfast.config.schema import TrainConfig
from fluxfast.memory.copies import CudaCopies, PinRefused
from fluxfast.memory.host import OptimizerOnHost, WeightsOnHost
from fluxfast.memory.planner.timeline import aligned
from fluxfast.model.lora_linear import LoRALinear
from fluxfast.optim import check_optimizer, set_mode
from fluxfast.util.platform import _cgroup_memory, available_memory

OPTIMIZERS = ["adamw", "adamw8bit", "prodigy", "schedulefree", "adafactor"]
LATE = 2  # the step at which the last parameter gets its first gradient, and so its state


class Run:
    """Parameters whose squares an optimizer minimizes. copies: keep its state on the host."""

    def __init__(self, name: str, copies=None, device="cpu"):
        g = torch.Generator().manual_seed(0)
        # bitsandbytes keeps the state of those above 4096 in 8 bits; adafactor factors the matrix
        shapes = [(8192,), (70,), (24, 16), (4097,)]
        values = [torch.randn(shape, generator=g).to(device) for shape in shapes]
        self.params = [torch.nn.Parameter(value) for value in values]
        config = TrainConfig(optimizer=name, lr=1.0 if name == "prodigy" else 0.01)
        self.optimizer = check_optimizer(config, values[0].device)(self.params)
        set_mode(self.optimizer, training=True)
        self.on_host = OptimizerOnHost(self.optimizer, copies) if copies else None

    def resident(self):
        return self.on_host.resident() if self.on_host else nullcontext()

    def descend(self, steps: range) -> None:
        for step in steps:
            for p in self.params if step >= LATE else self.params[:-1]:
                p.grad = 2 * p.detach() / (1 + step)
            with self.resident():
                self.optimizer.step()
            if self.on_host:
                assert self.state_on_device() == 0

    def state(self) -> dict:
        """A copy: nothing is shared with the optimizer."""
        with self.resident():
            return deepcopy(self.optimizer.state_dict())

    def load(self, state: dict) -> None:
        """Of a copy: an optimizer may take a tensor as it is, and its storage is to be emptied."""
        with self.resident():
            self.optimizer.load_state_dict(deepcopy(state))

    def set_params(self, values) -> None:
        with torch.no_grad():
            for p, value in zip(self.params, values, strict=True):
                p.copy_(value)

    def state_on_device(self) -> int:
        """Bytes of the state's storages, scalars left out."""
        tensors = [t for t in tensors_of(dict(self.optimizer.state)) if t.numel() > 1]
        assert tensors
        return sum(t.untyped_storage().nbytes() for t in tensors)


def tensors_of(state: dict) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def assert_equal(ours, others) -> None:
    for a, b in zip(ours, others, strict=True):
        assert torch.equal(a, b)


def assert_same(hosted: Run, plain: Run) -> None:
    assert_equal(hosted.params, plain.params)


def both(name: str) -> tuple[Run, Run]:
    """With the state on the host, and without."""
    return Run(name, SimulatedCopies(1e6)), Run(name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_the_same_bits(name):
    copies = OrderedCopies()
    hosted, plain = Run(name, copies), Run(name)
    plain.descend(range(6))
    hosted.descend(range(3))
    allocated = hosted.on_host.host_bytes
    hosted.descend(range(3, 6))
    assert_same(hosted, plain)
    assert hosted.on_host.host_bytes == allocated  # once the last parameter has its state
    state = tensors_of(hosted.state()["state"])
    assert_equal(state, tensors_of(plain.state()["state"]))
    assert allocated >= sum(t.nbytes for t in state if t.numel() > 1) / 2  # code tables are shared
    assert not copies.problems


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_goes_through_a_file_and_on(name, tmp_path):
    """Into another optimizer, twice into the same one, and from one without a host."""
    hosted, plain = both(name)
    for run, file in ((hosted, "hosted.pt"), (plain, "plain.pt")):
        run.descend(range(3))
        torch.save(run.state(), tmp_path / file)
    values = [p.detach().clone() for p in hosted.params]
    assert_same(hosted, plain)
    plain.descend(range(3, 6))
    allocated = set()
    for target in (hosted, Run(name, SimulatedCopies(1e6))):
        for file in ("hosted.pt", "plain.pt"):
            target.set_params(values)
            target.load(torch.load(tmp_path / file, weights_only=True))
            assert target.state_on_device() == 0
            target.descend(range(3, 6))
            assert_same(target, plain)
            allocated.add(hosted.on_host.host_bytes)
    assert len(allocated) == 1  # what was loaded over is used again


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_load_by_the_optimizer_itself_is_noticed(name, inside):
    hosted, plain = both(name)
    plain.descend(range(3))
    hosted.descend(range(1))  # its state, but for the last one's, will be gone
    with hosted.resident() if inside else nullcontext():
        hosted.optimizer.load_state_dict(plain.state())
    hosted.set_params(plain.params)
    for run in (hosted, plain):
        run.descend(range(3, 5))
    assert_same(hosted, plain)


def test_memory_that_a_file_owns_stays(tmp_path):
    """On a CPU AdamW takes the loaded tensors as they are, and their storages cannot be emptied."""
    hosted, plain = both("adamw")
    plain.descend(range(3))
    torch.save(plain.state(), tmp_path / "state.pt")
    with hosted.resident():
        hosted.optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    hosted.set_params(plain.params)
    for run in (hosted, plain):
        for _ in range(2):
            for p in run.params:
                p.grad = 2 * p.detach()
            with run.resident():
                run.optimizer.step()
    assert_same(hosted, plain)


def test_code_tables_outlive_a_load():
    """bitsandbytes shares one table among all state and keeps it for state to come: after a load
    nobody's state holds the old table, which must not stay empty.
    """
    hosted, plain = both("adamw8bit")
    for run in (hosted, plain):
        run.descend(range(LATE))
        run.load(run.state())
        run.descend(range(LATE, 5))  # makes new 8-bit state
    assert_same(hosted, plain)


def test_schedule_free_changes_mode_by_itself():
    hosted, plain = both("schedulefree")
    for run in (hosted, plain):
        run.descend(range(3))
        set_mode(run.optimizer, training=False)
    assert hosted.state_on_device() == 0
    assert_same(hosted, plain)
    for run in (hosted, plain):
        set_mode(run.optimizer, training=True)
        run.descend(range(3, 5))
    assert_same(hosted, plain)


def test_state_must_be_in_to_be_used():
    run, _ = both("adamw")
    run.descend(range(1))
    for use in (run.optimizer.step, run.optimizer.state_dict):
        with pytest.raises(RuntimeError, match="on the host: use it inside `with on_host.resident"):
            use()
    with run.resident():
        with run.resident():
            pass
        assert run.state_on_device() > 0
        moments = [t.clone() for t in tensors_of(run.optimizer.state_dict()["state"])]
    assert run.state_on_device() == 0
    assert_equal(tensors_of(run.state()["state"]), moments)
    with pytest.raises(ZeroDivisionError), run.resident():
        raise ZeroDivisionError
    assert run.state_on_device() == 0


@pytest.mark.parametrize("refused", [0, 1])
def test_state_stays_where_no_host_memory_is_to_be_had(caplog, refused):
    """Refused at once, or for the state that comes last: no step is lost, and none after it."""
    copies = SimulatedCopies(1e6)
    hosted, plain = Run("adamw", copies), Run("adamw")
    plain.descend(range(5))
    state, hosted.on_host = hosted.on_host, None  # `descend` looks whether all state is gone
    alloc = copies.alloc_host

    def alloc_host(nbytes):
        if len(copies.host) == refused:
            raise PinRefused("cannot pin 1.00 GiB of host memory: CUDA error 2")
        return alloc(nbytes)

    copies.alloc_host = alloc_host
    hosted.resident = state.resident
    hosted.descend(range(5))
    assert_same(hosted, plain)
    assert_equal(*[tensors_of(run.state()["state"]) for run in (hosted, plain)])
    assert hosted.state_on_device() == plain.state_on_device()
    assert caplog.text.count("CUDA error 2; the optimizer's state stays on the GPU") == 1
    with pytest.raises(PinRefused):  # before a run has begun it can be planned otherwise
        OptimizerOnHost(plain.optimizer, copies)


def test_what_a_parameter_lies_in_stays():
    weight = torch.nn.Parameter(torch.ones(100))
    weight.grad = torch.ones(100)
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    optimizer.state[weight] = {"value": weight.detach(), "gradient": weight.grad[10:]}
    on_host = OptimizerOnHost(optimizer, SimulatedCopies())
    for _ in range(2):
        with on_host.resident():
            optimizer.step()
    assert weight[0].item() == pytest.approx(1 - 0.5 - 0.95) and (weight.grad == 1).all()
    assert optimizer.state[weight]["momentum_buffer"].untyped_storage().nbytes() == 0


# frozen weights


def layers(storages: list[str], nested: bool = False, device="cpu") -> list[LoRALinear]:
    g = torch.Generator().manual_seed(0)
    made = []
    for index, storage in enumerate(storages):
        layer = LoRALinear(128, 64 * (1 + index % 3))
        weight = torch.randn(layer.out_features, 128, generator=g).to(device)
        layer.set_weight(weight, storage, nested)
        layer.bias = torch.randn(layer.out_features, generator=g).to(device)
        made.append(layer)
    return made


def product(x, frozen, layer):
    return fk.lora_linear(x, fk.FrozenWeight(frozen, layer.bias))


MIXED = ["nf4", "fp32", "int8", "bf16", "fp8", "nf4", "int8"]
IN_TURN = [*range(7)] * 2
OUT_OF_TURN = [3, 2, 2, 0, 6, 0, 1, 5, 4, 3, 3, 6]


@pytest.mark.parametrize("nested", [False, True])
def test_products_of_fetched_weights_are_the_same_bits(nested):
    model = layers(MIXED, nested)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    expected = [product(x, layer.weight_tensors(), layer) for layer in model]
    nbytes = [sum(aligned(t.nbytes) for t in layer.weight_tensors()) for layer in model]
    copies = OrderedCopies()
    weights = WeightsOnHost(model, copies)
    for index in IN_TURN + OUT_OF_TURN:
        frozen = weights.fetch(model[index])
        for tensor in frozen:
            copies.touch("compute", tensor, write=False)
        assert torch.equal(product(x, frozen, model[index]), expected[index])
    assert not copies.problems
    assert copies.host == [sum(nbytes)]
    assert [buffer.nbytes for buffer in copies.buffers] == [max(nbytes)] * 2


def test_in_turn_a_layer_is_there_before_it_is_asked_for():
    model = layers(["fp32"] * 6)
    copies = SimulatedCopies(max(layer.weight.nbytes for layer in model))  # at most a second each
    weights = WeightsOnHost(model, copies)
    weights.fetch(model[0])
    copies.advance(2.0)
    for layer in [*model[1:], *model[:2]]:
        before = copies.now
        weights.fetch(layer)
        assert copies.now == before
        copies.advance(2.0)
    before = copies.now
    weights.fetch(model[4])  # not the next
    assert copies.now > before


def test_layers_keep_their_form_on_the_host():
    """dtypes, shapes and strides: also of a weight that is stored by columns."""
    model = layers(["fp32", "fp8"])
    model[0].weight = model[0].weight.t().contiguous().t()
    before = [[t.clone() for t in layer.weight_tensors()] for layer in model]
    weights = WeightsOnHost(model, SimulatedCopies())
    for layer, tensors in zip(model, before, strict=True):
        on_host = [t for name, t in layer.named_buffers() if name != "bias"]
        for a, b, c in zip(tensors, weights.fetch(layer), on_host, strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert torch.equal(a.float(), b.float())
            assert c.data_ptr() != b.data_ptr() and c.shape == b.shape


# what there is


GIB = 2**30
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("line", "mount", "names"),
    [("0::/pod/run", "sys/fs/cgroup", V2), ("4:cpu,memory:/pod/run", "sys/fs/cgroup/memory", V1)],
)
@pytest.mark.parametrize("inside", [True, False])
def test_cgroups_limit_what_may_be_taken(tmp_path, line, mount, names, inside):
    """A limit on the group itself or on one above it, less what is used and cannot be dropped.
    Inside a container its own group is the mount's root."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"3:pids:/pod\n{line}\n")
    assert list(_cgroup_memory(tmp_path)) == []
    limits = {"": 8 * GIB} if inside else {"": "max", "pod": 8 * GIB, "pod/run": "max"}
    for group, limit in limits.items():
        folder = tmp_path / mount / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, 5 * GIB), strict=False):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon {3 * GIB}\n{names[2]} {2 * GIB}\n")
    assert list(_cgroup_memory(tmp_path)) == [5 * GIB]


def test_the_least_limit_holds(monkeypatch):
    free = available_memory()
    monkeypatch.setattr("fluxfast.util.platform._cgroup_memory", lambda root: [GIB, free])
    assert available_memory() == GIB


def test_what_is_available_where_the_kernel_does_not_count_it(tmp_path):
    """Of an old kernel's /proc/meminfo, of one that is empty, and of none."""
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    assert available_memory(tmp_path) == half
    (tmp_path / "proc").mkdir()
    free = "MemFree: 20 kB\nBuffers: 4 kB\nCached: 30 kB\nHugePages_Total: 0\n"
    for text, size in (("", half), (free, 50 << 10), (f"{free}MemAvailable: 40 kB\n", 40 << 10)):
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99 kB\n{text}")
        assert available_memory(tmp_path) == size


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cuda_steps_are_the_same_bits_and_free_memory(name):
    hosted, plain = Run(name, CudaCopies("cuda"), "cuda"), Run(name, device="cuda")
    load = torch.randn(2048, 2048, device="cuda")
    for step in range(6):
        plain.descend(range(step, step + 1))
        load @ load
        hosted.descend(range(step, step + 1))
        for _ in range(8):  # takes what was freed, and spoils it
            torch.full((8192,), float("nan"), device="cuda")
    assert_same(hosted, plain)
    states = [tensors_of(run.state()["state"]) for run in (hosted, plain)]
    assert_equal(*[[t.cpu() for t in tensors] for tensors in states])


@pytest.mark.gpu
def test_cuda_products_of_fetched_weights_are_the_same_bits():
    model = layers(MIXED, device="cuda")
    x = torch.randn(3, 128, device="cuda", dtype=torch.bfloat16)
    expected = [product(x, layer.weight_tensors(), layer) for layer in model]
    weights = WeightsOnHost(model, CudaCopies("cuda"))
    assert all(not t.is_cuda for layer in model for n, t in layer.named_buffers() if n != "bias")
    for index in IN_TURN + OUT_OF_TURN:
        y = product(x, weights.fetch(model[index]), model[index])
        assert torch.equal(y, expected[index])
