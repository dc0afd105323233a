"""Loader: order, coverage, randomness and prefetch, with small hand-made cache files."""

import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fluxfast.data.loader
from fluxfast.data.loader import Loader
from fluxfast.data.store import Dataset, Sample, write_tensors
from fluxfast.distributed import Ranks
from fluxfast.errors import FluxfastError
from fluxfast.objective import Batch

SIZES = [(64, 64)] * 7 + [(96, 64)] * 4 + [(64, 128)]


def text(path: Path, value: float) -> Path:
    write_tensors(path, {"t5": torch.full((4, 6), value), "pooled": torch.full((3,), value)})
    return path


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """Sample i has latents of value i (mirrored: -i), its variants v have embeddings i + v / 10."""
    samples = []
    for i, (w, h) in enumerate(SIZES):
        shape = (2, h // 8, w // 8)
        for name, value in [("plain", i), ("flipped", -i)]:
            tensors = {"mean": torch.full(shape, float(value)), "std": torch.full(shape, 0.5)}
            if i in (0, 7):
                tensors["mask"] = torch.full(shape[1:], 0.25)
            write_tensors(tmp_path / f"{name}{i}", tensors)
        texts = [text(tmp_path / f"text{i}.{v}", i + v / 10) for v in range(3)]
        samples.append(
            Sample(
                name=f"{i}.png",
                size=(w, h),
                latents=tmp_path / f"plain{i}",
                flipped=tmp_path / f"flipped{i}" if i % 2 else None,
                texts=texts,
                caption="",
                caption_dropout=0.3,
            )
        )
    return Dataset(samples, text(tmp_path / "empty", -1.0))


def same(one: Batch, other: Batch) -> bool:
    pairs = [(value, getattr(other, name)) for name, value in vars(one).items()]
    return all(torch.equal(*p) if isinstance(p[0], torch.Tensor) else p[0] == p[1] for p in pairs)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 16])
def test_every_sample_comes_in_every_epoch_and_sizes_never_mix(dataset, batch_size):
    loader = Loader(dataset, batch_size, seed=1)
    count = loader.batches_per_epoch
    assert count == sum(-(-n // batch_size) for n in (7, 4, 1))
    for epoch in range(3):
        names = Counter()
        for step in range(epoch * count, (epoch + 1) * count):
            batch = loader.batch(step)
            assert len(batch.names) == batch_size == len(batch.mean)
            assert len({SIZES[int(name[:-4])] for name in batch.names}) == 1
            assert batch.indices == list(range(step * batch_size, (step + 1) * batch_size))
            names.update(batch.names)
        assert len(names) == len(SIZES)
        for size in set(SIZES):  # a short batch wraps round: a sample comes at most once more
            often = [names[f"{i}.png"] for i, other in enumerate(SIZES) if other == size]
            assert max(often) - min(often) <= 1


def test_processes_share_the_samples_of_one(dataset):
    """Each sample has the random numbers of its place in the batch, whichever process takes it."""
    whole = Loader(dataset, 4, seed=3)
    halves = [Loader(dataset, 4, seed=3, shard=Ranks(i, 2).shard) for i in range(2)]
    for step in range(2 * whole.batches_per_epoch):
        batch, (one, other) = whole.batch(step), (half.batch(step) for half in halves)
        assert one.indices + other.indices == batch.indices
        assert one.names + other.names == batch.names
        for name in ("mean", "pooled"):
            assert torch.equal(
                torch.cat([getattr(one, name), getattr(other, name)]), getattr(batch, name)
            )


def test_an_entry_may_have_batches_of_its_own(dataset):
    """Its samples never share a batch with others of their size, and no number is drawn twice."""
    own = [
        replace(sample, batch_size=3 if int(sample.name[:-4]) % 2 else None)
        for sample in dataset.samples
    ]
    loader = Loader(Dataset(own, dataset.empty_text), 2, seed=1)
    numbers, names = set(), Counter()
    for step in range(loader.batches_per_epoch):
        batch = loader.batch(step)
        count = 3 if int(batch.names[0][:-4]) % 2 else 2
        assert len(batch.names) == len(batch.mean) == count
        assert {int(name[:-4]) % 2 for name in batch.names} == {count % 2}
        assert batch.indices == list(range(3 * step, 3 * step + count))
        numbers.update(batch.indices)
        names.update(batch.names)
    assert loader.fingerprint != Loader(dataset, 2, seed=1).fingerprint
    assert len(names) == len(SIZES) and len(numbers) == sum(names.values())
    assert {count for _, count in loader.buckets} == {2, 3}
    assert {len(batch.mean) for batch in loader.examples()} == {2, 3}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_examples_have_every_kind_of_batch(dataset, batch_size):
    """Masked and unmasked ones by size, whatever order the first epoch has them in."""
    for seed in range(6):
        loader = Loader(dataset, batch_size, seed)
        kinds = {(b.mean.shape, b.mask is None) for b in loader.examples()}
        batches = [loader.batch(step) for step in range(8 * loader.batches_per_epoch)]
        assert kinds == {(b.mean.shape, b.mask is None) for b in batches}
        assert len(list(loader.examples())) == len(kinds)
    assert {masked for _, masked in kinds} == {True, False}


def test_examples_read_no_other_latents(dataset, monkeypatch):
    """Of a large data set they would be minutes of reading before the first step."""
    read, paths = fluxfast.data.loader.read_tensors, []

    def read_tensors(path, required):
        paths.append(path)
        return read(path, required)

    monkeypatch.setattr(fluxfast.data.loader, "read_tensors", read_tensors)
    list(Loader(dataset, 1, seed=1).examples())
    assert sum("text" not in path.name and path.name != "empty" for path in paths) == len({*SIZES})


def test_tensors_belong_to_their_samples(dataset):
    loader = Loader(dataset, 3, seed=5)
    for step in range(2 * loader.batches_per_epoch):
        batch = loader.batch(step)
        assert batch.std.shape == batch.mean.shape and batch.t5.shape == (3, 4, 6)
        for row, name in enumerate(batch.names):
            i = int(name[:-4])
            assert abs(batch.mean[row].mean()) == i and batch.mean[row].std() == 0
            value = batch.pooled[row, 0].item()
            assert value == batch.t5[row].mean() or value != -1
            assert value == -1 or any(abs(value - i - v / 10) < 1e-5 for v in range(3))
            if batch.mask is not None:
                assert (batch.mask[row] == (0.25 if i in (0, 7) else 1.0)).all()
            else:
                assert i not in (0, 7)
        assert batch.mask is None or batch.mask.shape == batch.mean[:, 0].shape


def test_a_batch_is_a_pure_function(dataset):
    loader, others = Loader(dataset, 2, seed=3), {}
    for step in (0, 11, 5, 100, 5, 0, 23):
        others[step] = Loader(dataset, 2, seed=3).batch(step)  # in another order than `loader`
    assert all(same(loader.batch(step), batch) for step, batch in sorted(others.items()))


def test_order_differs_by_epoch_and_seed_and_mixes_buckets(dataset):
    loader = Loader(dataset, 1, seed=3)
    count = loader.batches_per_epoch
    epochs = [[loader.batch(e * count + i).names[0] for i in range(count)] for e in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [Loader(dataset, 1, seed=4).batch(i).names[0] for i in range(count)]
    sizes = [SIZES[int(name[:-4])] for name in epochs[0]]
    assert sum(a != b for a, b in zip(sizes, sizes[1:], strict=False)) > 2


def test_flips_and_captions_have_their_shares(dataset):
    samples = [replace(dataset.samples[1], name=f"{i}.png") for i in range(8)]
    loader = Loader(Dataset(samples, dataset.empty_text), 8, seed=0)
    batches = [loader.batch(step) for step in range(60)]
    means = torch.cat([batch.mean[:, 0, 0, 0] for batch in batches])
    texts = torch.cat([batch.pooled[:, 0] for batch in batches])
    assert 0.4 < (means < 0).float().mean() < 0.6, "mirrored half of the time"
    assert 0.22 < (texts == -1).float().mean() < 0.38, "caption_dropout is 0.3"
    for v in range(3):
        assert 0.15 < ((texts - 1 - v / 10).abs() < 1e-5).float().mean() < 0.32
    # independently of each other
    assert 0.1 < ((means < 0) & (texts == -1)).float().mean() < 0.21


def test_no_dropout_and_full_dropout(dataset):
    for share, empty in [(0.0, 0), (1.0, 24)]:
        samples = [replace(sample, caption_dropout=share) for sample in dataset.samples]
        loader = Loader(Dataset(samples, dataset.empty_text), 1, seed=0)
        assert sum(loader.batch(i).pooled[0, 0] == -1 for i in range(24)) == empty


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "fluxfast-loader" in thread.name]


def test_iterate_equals_batch(dataset):
    loader = Loader(dataset, 2, seed=9)
    got = list(loader.iterate(5, 25))
    assert len(got) == 20
    assert all(same(batch, loader.batch(5 + i)) for i, batch in enumerate(got))
    assert list(loader.iterate(3, 3)) == [] and not loader_threads()


def test_thread_ends_when_the_consumer_stops(dataset):
    loader = Loader(dataset, 2, seed=9)
    for _ in loader.iterate(0, 10**9):
        assert len(loader_threads()) == 1
        break
    assert not loader_threads()
    iterator = loader.iterate(0, 10**9)
    next(iterator)
    time.sleep(0.2)  # the thread now waits for room
    iterator.close()
    assert not loader_threads()


def test_nothing_is_read_after_the_iterator_is_closed(dataset):
    loader, read, closing = Loader(dataset, 2, seed=9), [], threading.Event()
    batch = loader.batch

    def slow(step: int) -> Batch:
        read.append(step)
        if step:
            closing.wait(10)
        return batch(step)

    loader.batch = slow
    iterator = loader.iterate(0, 10**9)
    next(iterator)
    while len(read) < 2:
        time.sleep(0.001)
    threading.Timer(0.1, closing.set).start()
    iterator.close()
    assert read == [0, 1]


def test_errors_reach_the_consumer_in_order(dataset):
    loader = Loader(dataset, 1, seed=2)
    names = [loader.batch(step).names[0] for step in range(12)]
    lost = dataset.samples[int(names[4][:-4])]
    for path in [lost.latents, lost.flipped or lost.latents]:
        path.unlink(missing_ok=True)
    damaged = dataset.samples[int(names[5][:-4])]
    files = {damaged.latents, damaged.flipped or damaged.latents}
    for path in files:
        path.write_bytes(b"damaged")
    seen = []
    with pytest.raises(
        FluxfastError, match=rf"{lost.latents.parent}/\w+\b.*No such file"
    ) as raised:
        for batch in loader.iterate(0, 12):
            seen += batch.names
    assert seen == names[:4] and "fluxfast cache" in raised.value.hint
    assert not loader_threads()
    assert all(path.is_file() for path in files)  # deleted only with an error that says so
    with pytest.raises(FluxfastError, match="was corrupt and has been deleted"):
        next(loader.iterate(5, 12))
