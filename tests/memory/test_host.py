"""Optimizer state and frozen weights on the host: the same steps, the same products, to the bit."""

from contextlib import nullcontext

import fluxfast_kernels as fk
import pytest
import torch
from offload_model import Ordered
from simulated_copies import SimulatedCopies, ThreadedCopies

from fluxfast.config.schema import TrainConfig
from fluxfast.memory.copies import CudaCopies
from fluxfast.memory.host import OptimizerOnHost, WeightsOnHost
from fluxfast.memory.planner.timeline import aligned
from fluxfast.model.lora_linear import LoRALinear
from fluxfast.optim import build_optimizer, set_mode

OPTIMIZERS = ["adamw", "adamw8bit", "prodigy", "schedulefree", "adafactor"]
LATE = 2  # the step at which the last parameter gets its first gradient, and so its state


def parameters(device="cpu") -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    # bitsandbytes keeps the state of those above 4096 in 8 bits; adafactor factors the matrix
    shapes = [(8192,), (70,), (24, 16), (4097,)]
    return [torch.nn.Parameter(torch.randn(s, generator=g).to(device)) for s in shapes]


def build(name: str, copies=None, device="cpu"):
    """-> (parameters, optimizer, what keeps its state on the host or None)."""
    train = TrainConfig(optimizer=name, lr=1.0 if name == "prodigy" else 0.01)
    params = parameters(device)
    optimizer = build_optimizer(train, params)
    set_mode(optimizer, training=True)
    return params, optimizer, OptimizerOnHost(optimizer, copies) if copies else None


def descend(params, optimizer, on_host, steps: range) -> None:
    """Minimize the square of every parameter."""
    for step in steps:
        for p in params if step >= LATE else params[:-1]:
            p.grad = 2 * p.detach() / (1 + step)
        if on_host is None:
            optimizer.step()
            continue
        with on_host.resident():
            optimizer.step()
        assert state_on_device(optimizer) == 0


def tensors_of(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [t for v in values if isinstance(v, (dict, list, torch.Tensor)) for t in tensors_of(v)]


def copied(value):
    """Nothing shared with the optimizer that it came from."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return [copied(v) for v in value] if isinstance(value, list) else value


def state_of(optimizer, on_host) -> dict:
    """A copy of what `optimizer.state_dict` returns. on_host: None where the state stays in."""
    with on_host.resident() if on_host else nullcontext():
        return copied(optimizer.state_dict())


def load_state(optimizer, on_host, state: dict) -> None:
    """Of a copy: an optimizer may take a tensor as it is, and its storage is to be emptied."""
    with on_host.resident() if on_host else nullcontext():
        optimizer.load_state_dict(copied(state))


def state_on_device(optimizer) -> int:
    """Bytes of the state's storages, scalars left out."""
    found = [t for t in tensors_of(dict(optimizer.state)) if t.numel() > 1]
    assert found
    return sum(t.untyped_storage().nbytes() for t in found)


def assert_equal(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("copies", [Ordered, lambda: ThreadedCopies(1e9)], ids=["clock", "threads"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_the_same_bits(name, copies):
    plain, optimizer, _ = build(name)
    descend(plain, optimizer, None, range(6))
    copies = copies()
    params, hosted, on_host = build(name, copies)
    descend(params, hosted, on_host, range(3))
    allocated = on_host.host_bytes
    descend(params, hosted, on_host, range(3, 6))
    assert_equal(params, plain)
    assert on_host.host_bytes == allocated  # once the last parameter has its state
    kept = tensors_of(state_of(hosted, on_host)["state"])
    assert_equal(kept, tensors_of(optimizer.state_dict()["state"]))
    assert allocated >= sum(t.nbytes for t in kept if t.numel() > 1) / 2  # code tables are shared
    assert not getattr(copies, "problems", None)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_goes_through_a_file_and_on(name, tmp_path):
    """Into another optimizer, twice into the same one, and from one without a host."""
    plain, optimizer, _ = build(name)
    params, hosted, on_host = build(name, SimulatedCopies(1e6))
    for each in ((plain, optimizer, None), (params, hosted, on_host)):
        descend(*each, range(3))
    torch.save(state_of(hosted, on_host), tmp_path / "hosted.pt")
    torch.save(optimizer.state_dict(), tmp_path / "plain.pt")
    values = [p.detach().clone() for p in params]
    assert_equal(params, plain)
    descend(plain, optimizer, None, range(3, 6))

    other, other_optimizer, other_host = build(name, SimulatedCopies(1e6))
    allocated = set()
    for target, file in (
        ((params, hosted, on_host), "hosted.pt"),
        ((params, hosted, on_host), "plain.pt"),
        ((other, other_optimizer, other_host), "hosted.pt"),
        ((other, other_optimizer, other_host), "plain.pt"),
    ):
        with torch.no_grad():
            for p, value in zip(target[0], values, strict=True):
                p.copy_(value)
        load_state(*target[1:], torch.load(tmp_path / file, weights_only=True))
        assert state_on_device(target[1]) == 0
        descend(*target, range(3, 6))
        assert_equal(target[0], plain)
        allocated.add(on_host.host_bytes)
    assert len(allocated) == 1  # what was loaded over is used again


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_load_by_the_optimizer_itself_is_noticed(name, inside):
    plain, optimizer, _ = build(name)
    params, hosted, on_host = build(name, SimulatedCopies())
    descend(plain, optimizer, None, range(3))
    descend(params, hosted, on_host, range(1))  # its state, but for the last one's, will be gone
    with on_host.resident() if inside else nullcontext():
        hosted.load_state_dict(copied(optimizer.state_dict()))
    with torch.no_grad():
        for p, value in zip(params, plain, strict=True):
            p.copy_(value)
    descend(plain, optimizer, None, range(3, 5))
    descend(params, hosted, on_host, range(3, 5))
    assert_equal(params, plain)


def test_memory_that_a_file_owns_stays(tmp_path):
    """On a CPU AdamW takes the loaded tensors as they are, and their storages cannot be emptied."""
    plain, optimizer, _ = build("adamw")
    descend(plain, optimizer, None, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    params, hosted, on_host = build("adamw", SimulatedCopies())
    with on_host.resident():
        hosted.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        for p, value in zip(params, plain, strict=True):
            p.copy_(value)
    for _ in range(2):
        for each, held in ((plain, None), (params, on_host)):
            for p in each:
                p.grad = 2 * p.detach()
            with held.resident() if held else nullcontext():
                (hosted if held else optimizer).step()
    assert_equal(params, plain)


def test_code_tables_outlive_a_load():
    """bitsandbytes shares one table among all state and keeps it for state to come: after a load
    nobody's state holds the old table, which must not stay empty.
    """
    plain, optimizer, _ = build("adamw8bit")
    params, hosted, on_host = build("adamw8bit", SimulatedCopies())
    for each in ((plain, optimizer, None), (params, hosted, on_host)):
        descend(*each, range(LATE))
        load_state(*each[1:], state_of(*each[1:]))
        descend(*each, range(LATE, 5))  # makes new 8-bit state
    assert_equal(params, plain)


def test_schedule_free_changes_mode_by_itself():
    plain, optimizer, _ = build("schedulefree")
    params, hosted, on_host = build("schedulefree", SimulatedCopies())
    for each in ((plain, optimizer, None), (params, hosted, on_host)):
        descend(*each, range(3))
        set_mode(each[1], training=False)
    assert state_on_device(hosted) == 0
    assert_equal(params, plain)
    for each in ((plain, optimizer, None), (params, hosted, on_host)):
        set_mode(each[1], training=True)
        descend(*each, range(3, 5))
    assert_equal(params, plain)


def test_state_must_be_in_to_be_used():
    params, hosted, on_host = build("adamw", SimulatedCopies())
    descend(params, hosted, on_host, range(1))
    for use in (hosted.step, hosted.state_dict):
        with pytest.raises(
            RuntimeError, match=r"on the host: use it inside `with on_host.resident"
        ):
            use()
    with on_host.resident():
        with on_host.resident():
            pass
        before = state_on_device(hosted)
        moments = [t.clone() for t in tensors_of(hosted.state_dict()["state"])]
    assert before > 0 and state_on_device(hosted) == 0
    assert_equal(tensors_of(state_of(hosted, on_host)["state"]), moments)
    with pytest.raises(ZeroDivisionError), on_host.resident():
        raise ZeroDivisionError
    assert state_on_device(hosted) == 0


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


@pytest.mark.parametrize("nested", [False, True])
def test_products_of_fetched_weights_are_the_same_bits(nested):
    model = layers(MIXED, nested)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    expected = [product(x, layer.weight_tensors(), layer) for layer in model]
    nbytes = [sum(aligned(t.nbytes) for t in layer.weight_tensors()) for layer in model]
    copies = Ordered()
    weights = WeightsOnHost(model, copies)
    assert weights.host_bytes == sum(nbytes) and copies.host == [sum(nbytes)]
    in_turn = [*range(7)] * 2
    out_of_turn = [3, 2, 2, 0, 6, 0, 1, 5, 4, 3, 3, 6]
    for index in in_turn + out_of_turn:
        frozen = weights.fetch(model[index])
        for tensor in frozen:
            copies.touch("compute", tensor, write=False)
        assert torch.equal(product(x, frozen, model[index]), expected[index])
    assert not copies.problems
    assert copies.device_memory == [max(nbytes)] * 2 and weights.staging_bytes == 2 * max(nbytes)


def test_in_turn_a_layer_is_there_before_it_is_asked_for():
    model = layers(["fp32"] * 6)
    largest = max(layer.weight.nbytes for layer in model)
    copies = SimulatedCopies(largest / 1.0)  # at most a second a layer
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


@pytest.mark.parametrize("count", [1, 2])
def test_few_layers_stay(count):
    model = layers(["fp32"] * count)
    weights = WeightsOnHost(model, copies := SimulatedCopies(1e3))
    originals = [layer.weight.clone() for layer in model]
    for turn in range(3):
        for layer, original in zip(model, originals, strict=True):
            assert torch.equal(weights.fetch(layer)[0], original)
        if turn == 0:
            loaded = copies.now
    assert copies.now == loaded and len(originals) == count


def test_layers_keep_their_form_on_the_host():
    """dtypes, shapes and strides: also of a weight that is stored by columns."""
    model = layers(["fp32", "fp8"])
    model[0].weight = model[0].weight.t().contiguous().t()
    before = [[t.clone() for t in layer.weight_tensors()] for layer in model]
    weights = WeightsOnHost(model, SimulatedCopies())
    for layer, tensors in zip(model, before, strict=True):
        fetched = weights.fetch(layer)
        here = [t for name, t in layer.named_buffers() if name != "bias"]
        for a, b, c in zip(tensors, fetched, here, strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert (
                torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                if a.is_contiguous()
                else (torch.equal(a, b))
            )
            assert c.data_ptr() != b.data_ptr() and c.shape == b.shape


def test_layers_must_be_distinct():
    (layer,) = layers(["fp32"])
    for given in ([], [layer, layer]):
        with pytest.raises(ValueError, match="at least one, and each only once"):
            WeightsOnHost(given, SimulatedCopies())


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cuda_steps_are_the_same_bits_and_free_memory(name):
    plain, optimizer, _ = build(name, device="cuda")
    params, hosted, on_host = build(name, CudaCopies("cuda"), "cuda")
    load = torch.randn(2048, 2048, device="cuda")
    for step in range(6):
        descend(plain, optimizer, None, range(step, step + 1))
        load @ load
        descend(params, hosted, on_host, range(step, step + 1))
        for _ in range(8):  # takes what was freed, and spoils it
            torch.full((8192,), float("nan"), device="cuda")
    assert_equal(params, plain)
    kept = tensors_of(state_of(hosted, on_host)["state"])
    theirs = tensors_of(optimizer.state_dict()["state"])
    assert_equal([t.cpu() for t in kept], [t.cpu() for t in theirs])


@pytest.mark.gpu
def test_cuda_products_of_fetched_weights_are_the_same_bits():
    model = layers(MIXED, device="cuda")
    x = torch.randn(3, 128, device="cuda", dtype=torch.bfloat16)
    expected = [product(x, layer.weight_tensors(), layer) for layer in model]
    weights = WeightsOnHost(model, CudaCopies("cuda"))
    assert all(not t.is_cuda for layer in model for n, t in layer.named_buffers() if n != "bias")
    for index in [*range(7), *range(7), 3, 2, 2, 0, 6, 1]:
        y = product(x, weights.fetch(model[index]), model[index])
        assert torch.equal(y, expected[index])
