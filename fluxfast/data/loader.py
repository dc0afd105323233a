"""Reads batches from the cache: a step's batch is a pure function of (data set, seed, step)."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import islice
from threading import Event

import torch
from torch import Tensor

from fluxfast import rng
from fluxfast.data.store import LATENTS, TEXT, Dataset, Sample, is_complete, read_tensors
from fluxfast.objective import Batch

PREFETCH = 2  # batches read ahead
TEXT_CACHE = 32  # embeddings kept in memory; T5-XXL's take 4 MiB each in bf16


def fingerprint_of(samples: list[Sample]) -> str:
    """Returns the hash of the samples' content, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        files = [sample.latents, sample.flipped, *sample.texts]
        own = [sample.batch_size] if sample.batch_size else []
        digest.update(repr([file and file.name for file in files] + own).encode())
    return digest.hexdigest()


class Loader:
    """Reads batches of one image size each; every sample comes at least once per epoch.

    batch_size: of all processes together, of samples without one of their own; shard: batch size ->
    this process's positions. pin: `iterate` puts batches into page-locked memory, which a GPU
    copies from while it computes.

    Raises CacheDamaged while reading, for a cache file that is missing or corrupt.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        *,
        pin: bool = False,
        shard: Callable[[int], range] = range,
    ):
        self.dataset, self.seed, self.pin, self.shard = dataset, seed, pin, shard
        self._buckets: dict[tuple[tuple[int, int], int], list[int]] = {}
        for index, sample in enumerate(dataset.samples):
            own = sample.batch_size or batch_size
            self._buckets.setdefault((sample.size, own), []).append(index)
        self.batch_size = max(size for _, size in self._buckets)  # of the largest batch
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._read_text = lru_cache(TEXT_CACHE)(partial(read_tensors, required=TEXT))

    @property
    def batches_per_epoch(self) -> int:
        return sum(-(-len(members) // size) for (_, size), members in self._buckets.items())

    @property
    def buckets(self) -> list[tuple[tuple[int, int], int]]:
        """((width, height) in pixels, samples of this process) of every kind of batch."""
        return [(size, len(self.shard(count))) for size, count in sorted(self._buckets)]

    @cached_property
    def fingerprint(self) -> str:
        """The hash of every sample in order: equal for data sets that make the same batches."""
        return fingerprint_of(self.dataset.samples)

    @cached_property
    def latent_sizes(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(w, h) in pixels of every bucket -> (rows, columns) of its latents."""
        sizes = {}
        for (size, _), members in self._buckets.items():
            rows, columns = self._latents(self.dataset.samples[members[0]], 0)["mean"].shape[-2:]
            sizes[size] = rows, columns
        return sizes

    @cached_property
    def text_length(self) -> int:
        """T5 tokens of every caption."""
        return self._read_text(self.dataset.samples[0].texts[0])["t5"].shape[0]

    @cached_property
    def _bare(self) -> dict[tuple[tuple[int, int], int], int]:
        """Bucket -> how many of its samples have no mask. Reads headers alone."""
        samples = self.dataset.samples
        return {
            bucket: sum(not is_complete(samples[i].latents, ("mask",)) for i in members)
            for bucket, members in self._buckets.items()
        }

    def peek(self, step: int) -> tuple[list[int], int, Tensor]:
        """Returns the global sample indices of a step's batch, the image tokens of a sample, and
        the pooled CLIP states [B, P]. Reads no latents.
        """
        samples, indices = self._members(step)
        rows, columns = self.latent_sizes[samples[0].size]
        pooled = [self._text(*pair)["pooled"] for pair in zip(samples, indices, strict=True)]
        return indices, (rows // 2) * (columns // 2), torch.stack(pooled)

    def _members(self, step: int) -> tuple[list[Sample], list[int]]:
        epoch, place = divmod(step, self.batches_per_epoch)
        members = self._epoch_order(epoch)[place]
        places = self.shard(len(members))
        samples = [self.dataset.samples[members[position]] for position in places]
        return samples, [step * self.batch_size + position for position in places]

    def batch(self, step: int) -> Batch:
        """Returns the batch of step `step` >= 0, one per accumulation step."""
        samples, indices = self._members(step)
        pairs = list(zip(samples, indices, strict=True))
        latents = [self._latents(*pair) for pair in pairs]
        texts = [self._text(*pair) for pair in pairs]
        return Batch(
            mean=torch.stack([tensors["mean"] for tensors in latents]),
            std=torch.stack([tensors["std"] for tensors in latents]),
            mask=_stack_masks(latents),
            t5=torch.stack([tensors["t5"] for tensors in texts]),
            pooled=torch.stack([tensors["pooled"] for tensors in texts]),
            indices=indices,
            names=[sample.name for sample in samples],
        )

    def examples(self) -> Iterator[Batch]:
        """Yields the first batch of every size in the first epoch, with and without a mask where
        later batches can be either.
        """
        first: dict[tuple[tuple[int, int], int], int] = {}
        for step, places in enumerate(self._epoch_order(0)):
            first.setdefault((self.dataset.samples[places[0]].size, len(places)), step)
        for bucket, step in first.items():
            batch, members, bare = self.batch(step), self._buckets[bucket], self._bare[bucket]
            if bare < len(members):
                ones = torch.ones(len(batch.mean), *batch.mean.shape[-2:])
                yield replace(batch, mask=ones)
            if bare >= min(len(batch.mean), len(members)):
                yield replace(batch, mask=None)

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of steps start to stop - 1, read ahead by a background thread.

        Errors in the thread are raised here; it reads nothing after one. It ends with the iterator.
        """
        ended = Event()

        def read(step: int) -> Batch:
            if ended.is_set():
                raise CancelledError
            try:
                return self._read(step)
            except BaseException:
                ended.set()  # the next damaged file is deleted when it is reported, not unseen
                raise

        with ThreadPoolExecutor(1, "fluxfast-loader") as thread:
            steps = iter(range(start, stop))
            pending = deque(thread.submit(read, step) for step in islice(steps, PREFETCH))
            try:
                while pending:
                    batch = pending.popleft().result()
                    pending.extend(thread.submit(read, step) for step in islice(steps, 1))
                    yield batch
            finally:
                ended.set()

    def _read(self, step: int) -> Batch:
        batch = self.batch(step)
        if not self.pin:
            return batch
        fields = vars(batch).items()
        pinned = {name: value.pin_memory() for name, value in fields if isinstance(value, Tensor)}
        return replace(batch, **pinned)

    def _epoch_order(self, epoch: int) -> list[list[int]]:
        """Returns the sample numbers of every batch of an epoch, in order."""
        known, order = self._epoch
        if known == epoch:
            return order
        batches = []
        for ((width, height), size), members in sorted(self._buckets.items()):
            shuffled = rng.permutation(self.seed, f"order/{width}x{height}", epoch, len(members))
            for start in range(0, len(members), size):
                places = range(start, start + size)  # the last batch wraps round
                batches.append([members[shuffled[place % len(members)]] for place in places])
        mixed = rng.permutation(self.seed, "order/batches", epoch, len(batches))
        order = [batches[i] for i in mixed]
        self._epoch = (epoch, order)
        return order

    def _latents(self, sample: Sample, index: int) -> dict[str, Tensor]:
        if sample.flipped is not None and rng.integer(self.seed, "flip", index, 2) == 1:
            return read_tensors(sample.flipped, LATENTS)
        return read_tensors(sample.latents, LATENTS)

    def _text(self, sample: Sample, index: int) -> dict[str, Tensor]:
        if rng.uniform(self.seed, "caption_dropout", index).item() < sample.caption_dropout:
            return self._read_text(self.dataset.empty_text)
        variant = rng.integer(self.seed, "caption", index, len(sample.texts))
        return self._read_text(sample.texts[variant])


def _stack_masks(latents: list[dict[str, Tensor]]) -> Tensor | None:
    if not any("mask" in tensors for tensors in latents):
        return None
    ones = torch.ones(latents[0]["mean"].shape[-2:])
    return torch.stack([tensors.get("mask", ones) for tensors in latents])
