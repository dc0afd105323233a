"""The offload engine: on a virtual clock, over threads under autograd, and over CUDA streams. How
long it takes is in test_timeline.py.
"""

import gc
import random
import weakref

import pytest
import torch
from offload_model import Counting, Ordered, Plan, storage
from simulated_copies import POISON, SimulatedCopies, ThreadedCopies

from fluxfast.errors import FluxfastError
from fluxfast.memory.copies import CudaCopies, pinned
from fluxfast.memory.offload import ArenaOverflow, Offload


@pytest.mark.parametrize("seed", range(20))
def test_storages_of_any_size_come_back(seed):
    plan = Plan(seed)
    copies = Counting(*plan.bandwidths)
    engine = Offload(copies, lag=plan.lag)
    plan.prepare(engine)
    for _ in range(2):
        plan.run_backward(engine, copies, plan.run_forward(engine, copies))


@pytest.mark.parametrize("seed", range(20))
def test_every_access_is_ordered_by_events(seed):
    """Also where a pass was given up in forward or in backward, and where a bucket grows."""
    plan, larger = Plan(seed), Plan(seed + 100)
    copies = Ordered()
    engine = Offload(copies, lag=plan.lag)
    plan.prepare(engine)
    for _ in range(2):
        plan.run_backward(engine, copies, plan.run_forward(engine, copies))
    given_up = plan.run_forward(engine, copies)
    for i in sorted(given_up, reverse=True)[:1]:
        plan.compare(
            [(k.get(handle), dtype, data) for k, handle, dtype, data in given_up[i]], copies
        )
    del given_up
    offloaded = [i for i, nbytes in enumerate(plan.sizes) if nbytes]
    engine.begin("bucket")
    for i in offloaded[:2]:
        keeper = engine.block(i)
        keeper.put(storage(*plan.storages[i][0], plan.rng, copies))
        del keeper
        engine.block_forward_done(i)
    plan.run_forward(engine, copies)
    larger.prepare(engine, "larger")
    larger.run_backward(engine, copies, larger.run_forward(engine, copies, "larger"))
    plan.run_backward(engine, copies, plan.run_forward(engine, copies))
    assert not copies.problems
    assert len(copies.accesses) > 8 * (plan.sizes != [0] * plan.blocks)


def test_a_race_is_found():
    """What the test above rests on."""
    copies = Ordered()
    host, device = copies.alloc_host(100), copies.alloc_device(100)
    arrived = copies.event()
    copies.copy_in(host, device, done=arrived)
    copies.compute_wait(arrived)
    copies.touch("compute", device, write=False)
    assert not copies.problems
    copies.copy_in(host, device)
    assert copies.problems == ["in races with compute"]
    copies.touch("compute", device[50:60], write=False)
    assert copies.problems[1:] == ["compute races with in"]
    del host
    assert "host memory is gone before in" in copies.problems[2]


def plans() -> tuple[Plan, Plan]:
    """One that needs a small arena, one that needs a larger one and larger buffers."""
    small, large = Plan(8), Plan(3)
    assert 0 < max(small.sizes) < max(large.sizes) and sum(small.sizes) < sum(large.sizes)
    return small, large


def test_buckets_share_one_arena():
    small, large = plans()
    copies = Counting(1e5)
    engine = Offload(copies)
    small.prepare(engine, "small")
    large.prepare(engine, "large")
    for plan, key in ((small, "small"), (large, "large"), (small, "small")):
        plan.run_backward(engine, copies, plan.run_forward(engine, copies, key))
    assert len(copies.host) == 1 and len(copies.device_memory) == 2
    single = Offload(Counting(1e5))
    large.prepare(single)
    single.begin("bucket")
    assert engine.host_bytes == single.host_bytes


def test_the_arena_grows_only_when_prepared_and_says_so(log_lines):
    small, large = plans()
    copies = Counting(1e5)
    engine = Offload(copies)
    small.prepare(engine, "small")
    small.run_backward(engine, copies, small.run_forward(engine, copies, "small"))
    assert not log_lines
    small.prepare(engine, "small")  # known, the same sizes
    large.prepare(engine, "large")
    assert len(log_lines) == 1 and "GiB" in log_lines[0] and len(copies.host) == 2
    large.run_backward(engine, copies, large.run_forward(engine, copies, "large"))
    assert len(log_lines) == 1 and len(copies.host) == 2


def test_reserve_is_enough_for_what_comes(log_lines):
    copies, plan = Counting(1e5), plans()[1]
    engine = Offload(copies)
    engine.reserve(1_000_000)
    plan.prepare(engine)
    plan.run_backward(engine, copies, plan.run_forward(engine, copies))
    assert copies.host == [1_000_000] and not log_lines


def test_more_than_was_prepared_is_refused():
    engine = Offload(SimulatedCopies())
    engine.prepare("a", {0: 1000, 4: 500})
    with pytest.raises(ArenaOverflow, match="block 4 wants 600 bytes.*500 were prepared"):
        engine.prepare("a", {0: 1000, 4: 600})
    with pytest.raises(ArenaOverflow, match="block 4 wants 0 bytes"):
        engine.prepare("a", {0: 1000})
    with pytest.raises(ValueError, match="at least one byte"):
        engine.prepare("b", {0: 0})
    with pytest.raises(RuntimeError, match="bucket 'b' was not prepared"):
        engine.begin("b")
    engine.begin("a")
    with pytest.raises(RuntimeError, match="block 1 was not prepared"):
        engine.block(1)
    keeper = engine.block(0)
    keeper.put(torch.zeros(200))
    with pytest.raises(ArenaOverflow, match="block 0 wants 1200 bytes.*1000 were prepared"):
        keeper.put(torch.zeros(100))
    keeper.put(torch.zeros(50))  # a refused put took nothing


def test_padding_cannot_reach_the_next_block():
    """A block of very many tiny storages runs out of room before it writes over its neighbor."""
    engine = Offload(SimulatedCopies())
    engine.prepare("a", {0: 1000, 1: 1000})
    engine.begin("a")
    keeper = engine.block(0)
    with pytest.raises(ArenaOverflow, match="storages put"):
        for _ in range(200):
            keeper.put(torch.zeros(1, dtype=torch.uint8))


@pytest.mark.parametrize("stop", ["in a block", "after a block", "before backward", "in backward"])
def test_a_pass_without_backward_does_no_harm(stop):
    plan = Plan(11)
    copies = Counting(2000.0, 1500.0)
    engine = Offload(copies, lag=3)
    plan.prepare(engine)
    plan.run_backward(engine, copies, plan.run_forward(engine, copies))
    allocated = len(copies.host), len(copies.device_memory), copies.events

    first = next(i for i, nbytes in enumerate(plan.sizes) if nbytes)
    stale = None
    if stop in ("in a block", "after a block"):
        engine.begin("bucket")
        keeper = engine.block(first)
        stale = keeper, keeper.put(storage(*plan.storages[first][0], plan.rng))
        if stop == "after a block":
            engine.block_forward_done(first)
        del keeper
    else:
        expected = plan.run_forward(engine, copies)
        last = max(expected)
        if stop == "in backward":
            expected[last][0][0].get(expected[last][0][1])
        stale = expected[last][0][:2]

    for _ in range(2):  # the next passes are whole and right
        expected = plan.run_forward(engine, copies)
        plan.run_backward(engine, copies, expected)
    assert (len(copies.host), len(copies.device_memory), copies.events) == allocated
    with pytest.raises(RuntimeError, match="new pass has begun"):
        stale[0].get(stale[1])


def test_an_abandoned_pass_holds_no_memory():
    """Not even where the graph, and with it the keepers, lives on."""
    copies = SimulatedCopies(1.0)
    engine = Offload(copies)
    engine.prepare("a", {0: 40, 1: 40})
    engine.begin("a")
    keepers, alive = [engine.block(0)], [torch.zeros(10), torch.zeros(10)]
    keepers[0].put(alive[0])
    engine.block_forward_done(0)
    keepers.append(engine.block(1))
    keepers[1].put(alive[1])
    alive = [weakref.ref(flat) for flat in alive]
    assert all(flat() is not None for flat in alive)
    engine.abandon()
    assert copies.now == 40.0  # block 0's copy was waited for before its memory was let go
    assert all(flat() is None for flat in alive) and engine.in_flight_bytes == 0


def test_a_pass_that_saves_nothing():
    """Without gradients nothing is put, and nothing is copied or waited for."""
    plan = Plan(11)
    copies = SimulatedCopies(1.0)
    engine = Offload(copies)
    plan.prepare(engine)
    engine.begin("bucket")
    for i in range(plan.blocks):
        if plan.sizes[i]:
            engine.block(i)
        engine.block_forward_done(i)
    engine.forward_done()
    assert copies.now == 0.0


def test_a_bucket_without_offloaded_blocks():
    engine = Offload(copies := Counting())
    engine.prepare("a", {})
    engine.begin("a")
    engine.block_forward_done(0)
    engine.forward_done()
    engine.block_backward_done(0)
    assert copies.host == copies.device_memory == []


def test_a_block_that_is_not_declared_over_is_refused():
    engine = Offload(SimulatedCopies())
    engine.prepare("a", {2: 40, 3: 40})
    engine.begin("a")
    for i in (2, 3):
        engine.block(i).put(torch.zeros(10))
    engine.block_forward_done(2)
    with pytest.raises(RuntimeError, match=r"not called for the blocks \[3\]"):
        engine.forward_done()


def test_backward_out_of_turn_is_refused():
    copies = SimulatedCopies(1e6)
    engine = Offload(copies)
    engine.prepare("a", {i: 400 for i in range(4)})
    engine.begin("a")
    kept = []
    for i in range(4):
        keeper = engine.block(i)
        kept.append((keeper, keeper.put(torch.full((100,), float(i)))))
        engine.block_forward_done(i)
    with pytest.raises(RuntimeError, match="not in a staging buffer"):
        kept[3][0].get(kept[3][1])  # still in forward
    engine.forward_done()
    with pytest.raises(RuntimeError, match=r"block 1 is not in a staging buffer, \[2, 3\] are"):
        kept[1][0].get(kept[1][1])
    assert (kept[3][0].get(kept[3][1]) == 3).all()
    engine.block_backward_done(3)
    with pytest.raises(RuntimeError, match="declared over"):
        kept[3][0].get(kept[3][1])
    assert (kept[1][0].get(kept[1][1]) == 1).all()


def test_the_simulation_shows_what_is_used_too_early():
    """What the tests above rest on: no data before arrival, none after the source is gone."""
    copies = SimulatedCopies(100.0)
    host, device, arrived = copies.alloc_host(100), copies.alloc_device(100), copies.event()
    host.fill_(1)
    copies.copy_in(host, device, done=arrived)
    copies.advance(0.5)
    assert (device == POISON).all() and device.view(torch.float32).isnan().all()
    copies.compute_wait(arrived)
    assert copies.now == 1.0 and (device == 1).all()
    source = storage(100, torch.uint8, random.Random(0))
    copies.copy_out(source, host)
    copies.advance(0.5)
    del source
    copies.synchronize()
    assert (host == POISON).all()


class Saver:
    """Saved-tensor hooks over a keeper: whole storages, each once."""

    def __init__(self, keeper):
        self.keeper, self.known = keeper, {}

    def pack(self, tensor):
        key = tensor.untyped_storage()._cdata
        if key not in self.known:
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            flat.set_(tensor.untyped_storage())
            self.known[key] = self.keeper.put(flat), flat
        geometry = tensor.shape, tensor.stride(), tensor.storage_offset()
        return self.known[key][0], geometry

    def unpack(self, packed):
        handle, geometry = packed
        return self.keeper.get(handle).as_strided(*geometry)


def train_blocks(engine, weights, x, offloaded, *, key="bucket", load=None):
    """Blocks y = x + sin(xW)·tanh(xW), some of them offloaded. -> gradients of the weights."""
    if engine:
        engine.begin(key)
    for i, weight in enumerate(weights):
        if engine and i in offloaded:
            saver = Saver(engine.block(i))
            x.register_hook(lambda _, i=i: engine.block_backward_done(i))
            with torch.autograd.graph.saved_tensors_hooks(saver.pack, saver.unpack):
                x = block(x, weight, load)
            saver.known.clear()
        else:
            x = block(x, weight, load)
        if engine:
            engine.block_forward_done(i)
    if engine:
        engine.forward_done()
    return torch.autograd.grad(x.float().square().mean(), weights)


def block(x, weight, load):
    if load:
        x = load(x)
    h = x @ weight
    return x + torch.sin(h) * torch.tanh(h)


def saved_bytes(width: int, rows: int, itemsize: int) -> int:
    """x, the weight, h, sin and tanh: five storages."""
    return (4 * rows * width + width * width) * itemsize


@pytest.mark.parametrize("copies", [SimulatedCopies(), ThreadedCopies(20e6, 10e6)], ids=type)
def test_gradients_through_the_arena_are_the_same_bits(copies):
    g = torch.Generator().manual_seed(0)
    weights = [(torch.randn(32, 32, generator=g) / 6).requires_grad_() for _ in range(6)]
    engine = Offload(copies)
    offloaded = (0, 1, 2, 4)
    for rows in (16, 48):
        engine.prepare(rows, {i: saved_bytes(32, rows, 4) for i in offloaded})
    for rows in (16, 48, 16):
        x = torch.randn(rows, 32, generator=g, requires_grad=True)
        expected = train_blocks(None, weights, x, ())
        found = train_blocks(engine, weights, x, offloaded, key=rows)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_host_memory_is_unpinned_after_its_last_view(monkeypatch):
    class Runtime:
        code, calls = 0, []

        def cudaHostRegister(self, address, nbytes, flags):
            self.calls.append((address, nbytes))
            return self.code

        def cudaHostUnregister(self, address):
            self.calls.append(address)

    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = pinned(5_000_001)
    address, view = memory.data_ptr(), memory[4096:].view(torch.int8)
    del memory
    gc.collect()
    assert runtime.calls == [(address, 5_000_001)] and address % 4096 == 0
    view.fill_(3)
    del view
    gc.collect()
    assert runtime.calls[1:] == [address]
    runtime.code = 2
    with pytest.raises(FluxfastError, match=r"cannot pin 0.50 GiB.*CUDA error 2"):
        pinned(2**29)


@pytest.mark.gpu
def test_cuda_streams_give_the_bytes_back():
    """Blocks of products between saved tensors; memory that is let go is written over at once."""
    copies = CudaCopies("cuda")
    engine = Offload(copies)
    blocks, numel = 8, 4_000_003
    offloaded = [0, 1, 2, 4, 6]
    engine.prepare("a", {i: 6 * numel for i in offloaded})
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    g = torch.Generator("cuda").manual_seed(0)
    for _ in range(3):
        engine.begin("a")
        kept, sums = {}, {}
        for i in range(blocks):
            keeper = engine.block(i) if i in offloaded else None
            for _ in range(4):
                a = torch.nn.functional.normalize(a @ a, dim=0)
            if keeper:
                one = torch.randn(numel, device="cuda", generator=g)
                two = torch.randint(0, 99, (2 * numel,), device="cuda", dtype=torch.uint8)
                kept[i] = [(keeper, keeper.put(flat)) for flat in (one, two)]
                sums[i] = [one.clone(), two.clone()]
                del one, two
            engine.block_forward_done(i)
            torch.full((numel,), float("nan"), device="cuda")  # takes freed memory, and spoils it
        engine.forward_done()
        for i in reversed(range(blocks)):
            for _ in range(2):
                a = torch.nn.functional.normalize(a @ a, dim=0)
            for (keeper, handle), expected in zip(kept.get(i, ()), sums.get(i, ()), strict=True):
                assert torch.equal(keeper.get(handle), expected), i
            engine.block_backward_done(i)


@pytest.mark.gpu
def test_cuda_gradients_are_the_same_bits_and_memory_is_steady():
    g = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(1024, 1024, generator=g, device="cuda") / 32 for _ in range(8)]
    weights = [w.bfloat16().requires_grad_() for w in weights]
    load = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def busy(x):
        load @ load
        return x

    engine = Offload(CudaCopies("cuda"))
    offloaded = range(6)
    engine.prepare("a", {i: saved_bytes(1024, 4096, 2) for i in offloaded})
    peaks = []
    for _ in range(4):
        x = torch.randn(4096, 1024, generator=g, device="cuda").bfloat16().requires_grad_()
        expected = train_blocks(None, weights, x, (), load=busy)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        found = train_blocks(engine, weights, x, offloaded, key="a", load=busy)
        peaks.append(torch.cuda.max_memory_allocated())
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    assert len(set(peaks[1:])) == 1


@pytest.mark.gpu
def test_cuda_host_memory_is_pinned_to_size():
    memory = CudaCopies("cuda").alloc_host(5_000_001)
    assert memory.numel() == 5_000_001 and memory.is_pinned() and memory[4096:].is_pinned()
