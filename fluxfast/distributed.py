"""Several processes, one run: `torchrun` starts them, and each takes its share of every batch.

The shares' gradients are summed before the optimiser's step, so a run takes the same steps in
however many processes, up to fp32 rounding; every process takes them all, on weights that are equal
to the bit. Rank 0 alone writes, but for the cache, of which each makes its share.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fluxfast.errors import ConfigError, FluxfastError, LostRank

_RUNS = count()  # of this process; all ranks begin each of them
_TO_BEGIN = timedelta(minutes=10)  # for all ranks to be there
# longer than one rank may validate, draw previews or encode pictures while the others wait
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process among `count`. With a count of 1 nothing is sent and nobody is waited for.

    Every method that waits must be called by all ranks, and raises LostRank where one has ended.
    """

    rank: int = 0
    count: int = 1
    group: torch.distributed.ProcessGroup | None = field(default=None, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all ranks, equal on all to the bit. On a GPU the
        stream waits, not the host.
        """
        if self.count > 1:
            with _lost(self):
                for tensor in tensors:
                    torch.distributed.all_reduce(tensor, group=self.group)

    def meet(self, device: torch.device) -> None:
        """What the ranks sum through takes its memory on the device, as it does at the first sum:
        to be called before what is free there is planned with.
        """
        self.sum_(torch.zeros(1, device=device))

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. Hosts wait for each other, GPUs do not."""
        if self.count == 1:
            return flag
        said = torch.tensor(int(flag))
        self.sum_(said)
        return bool(said)

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(False)

    def told(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. value: anything that JSON holds."""
        if self.count == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.count, dtype=torch.int64)
        sizes[self.rank] = len(own)
        self.sum_(sizes)
        rows = torch.zeros(self.count, int(sizes.max()), dtype=torch.uint8)
        rows[self.rank, : len(own)] = own
        self.sum_(rows)
        pairs = zip(rows, sizes.tolist(), strict=True)
        return [json.loads(bytes(row[:size].tolist())) for row, size in pairs]

    def check_same(self, what: str, value: str) -> None:
        """Raises ConfigError where the ranks' values differ."""
        values = self.told(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ConfigError(
                    f"the processes of this run differ in {what}: rank {rank} has another than "
                    "rank 0",
                    hint="give all of them the same configuration, model, pictures and output_dir",
                )

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Rank 0 goes through, then the others do."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def mine(self, key: str) -> bool:
        """Whether the work with this key (hexadecimal, 8 digits or more) is this rank's: it is some
        rank's, whatever has been done meanwhile.
        """
        return int(key[:8], 16) % self.count == self.rank

    def share(self, batch_size: int) -> range:
        """This rank's places in a batch. Raises ConfigError where they cannot be shared equally."""
        if batch_size % self.count:
            raise ConfigError(
                f"train.batch_size is {batch_size}: {self.count} processes cannot share that "
                "equally",
                hint="it counts the samples of all processes together: set a multiple of "
                f"{self.count}",
            )
        own = batch_size // self.count
        return range(self.rank * own, (self.rank + 1) * own)


ALONE = Ranks()


@contextmanager
def _lost(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's: a connection that is closed, or slow
        # without the place in gloo's source, and without its advice
        said = re.sub(r"\[[^\]]*\.cc:\d+\] *", "", str(error).splitlines()[0]).partition(". ")[0]
        raise LostRank(
            f"another process of this run has ended: {said}",
            hint="one has ended, and has said why; the same command goes on from the last "
            "checkpoint, in as many processes as you like",
        ) from None


def local_rank() -> tuple[int, int]:
    """This process among those on this machine, and their count, as torchrun says it."""
    environment = os.environ.get
    return int(environment("LOCAL_RANK", "0")), int(environment("LOCAL_WORLD_SIZE", "1"))


def processes() -> int:
    """How many of them torchrun has started for this run, on all machines; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def attempt() -> int:
    """How often torchrun has started this run anew, after a process of it had ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _begin(backend: str) -> None:
    """torchrun keeps one store for all of its restarts, in which those before have left addresses:
    each has a part of it to itself, and in each every run.
    """
    distributed = torch.distributed
    store, rank, size = next(distributed.rendezvous("env://", timeout=_TO_BEGIN))
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore(f"attempt {attempt()}, run {next(_RUNS)}", store),
        rank=rank,
        world_size=size,
        timeout=_TO_BEGIN,
    )


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun has started this process among; one alone where it was not.

    CPU tensors go by gloo, CUDA tensors by NCCL where torch has it, in a group of their own beside
    one that the caller may have made. Raises FluxfastError where the ranks do not find each other.
    """
    distributed = torch.distributed
    size = processes()
    made = distributed.is_available() and distributed.is_initialized()
    if size == 1 and not made:
        yield ALONE
        return
    # a torch for CUDA need not have NCCL: under Windows it never does, and gloo takes CUDA tensors
    nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    try:
        if not made:
            _begin(backend)
        group = distributed.new_group(timeout=_PATIENCE, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise FluxfastError(
            f"the {size} processes of this run do not find each other: "
            f"{str(error).splitlines()[0]}",
            hint="start them with `torchrun --nproc-per-node N -m fluxfast train …`",
        ) from None
    yield Ranks(distributed.get_rank(), distributed.get_world_size(), group)
    # not after an error: it might wait for a rank that has ended
    distributed.destroy_process_group(None if not made else group)
