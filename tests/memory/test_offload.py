"""The offload engine: on a virtual clock, and over CUDA streams. How long it takes is in
test_timeline.py; training through it in test_memory_run.py.
"""

import gc
import random
import weakref

import pytest
import torch
from simulated_copies import POISON, OrderedCopies, RandomModel, SimulatedCopies, storage

from fluxfast.memory import copies as copies_module
from fluxfast.memory.copies import CudaCopies, PinRefused, pinned
from fluxfast.memory.offload import ArenaOverflow, Offload


def begun(copies, sizes: dict[int, int]) -> Offload:
    """An engine of one bucket, its forward pass begun."""
    engine = Offload(copies, {"bucket": sizes})
    engine.select("bucket")
    engine.begin()
    return engine


@pytest.mark.parametrize("seed", range(20))
def test_every_access_is_ordered_by_events(seed):
    """Storages of any size come back; also where a pass was abandoned in forward or in backward,
    and where the bucket changes."""
    model, larger = RandomModel(seed), RandomModel(seed + 100)
    copies = OrderedCopies()
    engine = Offload(copies, {"bucket": model.offloaded, "larger": larger.offloaded})
    for _ in range(2):
        model.run_backward(engine, copies, model.run_forward(engine, copies))
    abandoned = model.run_forward(engine, copies)
    for i in sorted(abandoned, reverse=True)[:1]:
        model.compare([(s.get(handle), *rest) for s, handle, *rest in abandoned[i]], copies)
    del abandoned
    engine.begin()
    for i in list(model.offloaded)[:2]:
        store = engine.block(i)
        store.put(storage(*model.storages[i][0], model.rng, copies))
        del store
        engine.block_forward_done(i)
    model.run_forward(engine, copies)
    larger.run_backward(engine, copies, larger.run_forward(engine, copies, "larger"))
    model.run_backward(engine, copies, model.run_forward(engine, copies))
    assert not copies.problems
    assert len(copies.accesses) > 8 * bool(model.offloaded)


def test_a_race_is_found():
    """What the test above rests on."""
    copies = OrderedCopies()
    host, device = copies.alloc_host(100), copies.alloc_device(100)
    copies.compute_wait(copies.copy_in([(host, device)]))
    copies.touch("compute", device, write=False)
    copies.copy_in([(host, device)])
    assert not copies.problems
    copies.touch("compute", device[50:60], write=False)
    assert copies.problems == ["compute races with in"]


def test_the_simulation_shows_what_is_used_too_early():
    """No data before arrival, none after the source is gone."""
    copies = SimulatedCopies(100.0)
    host, device = copies.alloc_host(100), copies.alloc_device(100)
    host.fill_(1)
    arrived = copies.copy_in([(host, device)])
    copies.advance(0.5)
    assert (device == POISON).all() and device.view(torch.float32).isnan().all()
    copies.compute_wait(arrived)
    assert copies.now == 1.0 and (device == 1).all()
    source = storage(100, torch.uint8, random.Random(0))
    copied = copies.copy_out([(source, host)])
    copies.advance(0.5)
    del source
    copies.compute_wait(copied)
    assert (host == POISON).all()


def test_buckets_share_one_arena():
    small, large = RandomModel(8), RandomModel(3)
    copies, buckets = SimulatedCopies(1e5), {"small": small.offloaded, "large": large.offloaded}
    engine = Offload(copies, buckets)
    allocated = copies.host[:], len(copies.buffers)
    for model, bucket in ((small, "small"), (large, "large"), (small, "small")):
        model.run_backward(engine, copies, model.run_forward(engine, copies, bucket))
    assert (copies.host, len(copies.buffers)) == allocated and len(copies.buffers) == 2
    alone = [Offload(SimulatedCopies(), {key: sizes}) for key, sizes in buckets.items()]
    assert copies.host == [max(engine.arena.nbytes for engine in alone)]


def test_more_than_was_planned_is_refused():
    """Before it writes over the next block's region."""
    engine = begun(SimulatedCopies(), {0: 1000, 1: 1000})
    store = engine.block(0)
    store.put(torch.zeros(200))
    with pytest.raises(ArenaOverflow, match="block 0 saves 1200 bytes.*1000 were planned"):
        store.put(torch.zeros(100))
    store.put(torch.zeros(50))  # a refused put took nothing
    store = engine.block(1)
    with pytest.raises(ArenaOverflow, match="storages before"):
        for _ in range(200):  # the padding between tiny storages takes room too
            store.put(torch.zeros(1, dtype=torch.uint8))


@pytest.mark.parametrize("stop", ["in a block", "after a block", "before backward", "in backward"])
def test_a_pass_without_backward_does_no_harm(stop):
    model = RandomModel(11)
    copies = SimulatedCopies(2000.0)
    engine = Offload(copies, {"bucket": model.offloaded})
    if stop in ("in a block", "after a block"):
        engine.select("bucket")
        engine.begin()
        first = next(iter(model.offloaded))
        store = engine.block(first)
        stale = store, store.put(storage(*model.storages[first][0], model.rng))
        if stop == "after a block":
            engine.block_forward_done(first)
    else:
        expected = model.run_forward(engine, copies)
        stale = expected[max(expected)][0][:2]
        if stop == "in backward":
            stale[0].get(stale[1])
    for _ in range(2):  # the next passes are whole and right
        expected = model.run_forward(engine, copies)
        model.run_backward(engine, copies, expected)
    with pytest.raises(RuntimeError, match="a new pass has begun"):
        stale[0].get(stale[1])


def test_an_abandoned_pass_holds_no_memory():
    """Not even where the graph, and with it the stores, lives on."""
    copies = SimulatedCopies(1.0)
    engine = begun(copies, {0: 40, 1: 40})
    stores, alive = [], []
    for i in range(2):
        flat = torch.zeros(10)
        stores.append(engine.block(i))
        stores[i].put(flat)
        alive.append(weakref.ref(flat))
        del flat
        if i == 0:
            engine.block_forward_done(0)
    assert all(flat() is not None for flat in alive)
    engine.abandon()
    assert copies.now == 40.0  # block 0's copy was waited for before its memory was released
    assert all(flat() is None for flat in alive)


def test_a_pass_that_saves_nothing():
    """Without gradients nothing is put, and nothing is copied or waited for."""
    copies = SimulatedCopies(1.0)
    engine = begun(copies, {0: 40, 2: 40})
    for i in range(3):
        if i != 1:
            engine.block(i)
        engine.block_forward_done(i)
    engine.forward_done()
    assert copies.now == 0.0


def test_backward_out_of_turn_is_refused():
    engine = begun(SimulatedCopies(1e6), dict.fromkeys(range(4), 400))
    saved = []
    for i in range(4):
        store = engine.block(i)
        saved.append((store, store.put(torch.full((100,), float(i)))))
        engine.block_forward_done(i)

    def get(i: int) -> torch.Tensor:
        store, handle = saved[i]
        return store.get(handle)

    with pytest.raises(RuntimeError, match="not in a staging buffer"):
        get(3)  # still in forward
    engine.forward_done()
    with pytest.raises(RuntimeError, match=r"block 1 is not in a staging buffer, \[2, 3\] are"):
        get(1)
    assert (get(3) == 3).all()
    engine.block_backward_done(3)
    with pytest.raises(RuntimeError, match="backward is over"):
        get(3)
    assert (get(1) == 1).all()


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
    runtime.code, cleared = 2, []
    monkeypatch.setattr(copies_module, "_clear_error", lambda: cleared.append(True))
    with pytest.raises(PinRefused, match=r"cannot pin 0.50 GiB.*CUDA error 2"):
        pinned(2**29)
    assert cleared


@pytest.mark.gpu
def test_cuda_streams_give_the_bytes_back():
    """Blocks of products between saved tensors; memory that is released is written over at once."""
    numel, offloaded = 4_000_003, [0, 1, 2, 4, 6]
    engine = Offload(CudaCopies("cuda"), {"bucket": dict.fromkeys(offloaded, 6 * numel)})
    engine.select("bucket")
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    g = torch.Generator("cuda").manual_seed(0)
    for _ in range(3):
        engine.begin()
        saved = {}
        for i in range(8):
            store = engine.block(i) if i in offloaded else None
            for _ in range(4):
                a = torch.nn.functional.normalize(a @ a, dim=0)
            if store:
                one = torch.randn(numel, device="cuda", generator=g)
                two = torch.randint(0, 99, (2 * numel,), device="cuda", dtype=torch.uint8)
                saved[i] = [(store, store.put(flat), flat.clone()) for flat in (one, two)]
                del one, two
            engine.block_forward_done(i)
            torch.full((numel,), float("nan"), device="cuda")  # takes freed memory, and spoils it
        engine.forward_done()
        for i in reversed(range(8)):
            for _ in range(2):
                a = torch.nn.functional.normalize(a @ a, dim=0)
            for store, handle, expected in saved.get(i, ()):
                assert torch.equal(store.get(handle), expected), i
            engine.block_backward_done(i)


@pytest.mark.gpu
def test_a_refused_pin_leaves_no_error_behind():
    """The next launch would raise what cudaHostRegister left in the runtime."""
    torch.zeros(1, device="cuda")
    memory = pinned(4096)
    # registered already: refused whatever the machine has
    assert int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), 4096, 0)) != 0
    copies_module._clear_error()
    torch.ones(1, device="cuda")


@pytest.mark.gpu
def test_cuda_host_memory_is_pinned_to_size():
    memory = CudaCopies("cuda").alloc_host(5_000_001)
    assert memory.numel() == 5_000_001 and memory.is_pinned() and memory[4096:].is_pinned()
