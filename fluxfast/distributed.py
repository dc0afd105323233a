"""Data-parallel training: `torchrun` starts the processes, each takes its shard of every batch.

Gradients are summed over ranks before the optimizer's step: a run takes the same steps at any world
size, up to fp32 rounding, and weights are bit-identical on all ranks. Only rank 0 writes, except
for the cache, of which each rank encodes its shard.
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
from typing import Any, cast

import torch
from torch import Tensor

from fluxfast.errors import ConfigError, FluxfastError, LostRank

_RUNS = count()  # runs of this process; all ranks begin each of them
_INIT_TIMEOUT = timedelta(minutes=10)  # for all ranks to start
# longer than one rank may validate, draw previews or encode pictures while the others wait
_TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process in a world of `world_size`. In a world of 1 nothing is sent or waited for.

    Every method that waits must be called by all ranks, and raises LostRank where one has ended.
    """

    rank: int = 0
    world_size: int = 1
    group: torch.distributed.ProcessGroup | None = field(default=None, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def all_reduce_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all ranks, bit-identical on all. On a GPU the stream
        waits, not the host.
        """
        if self.world_size == 1:
            return
        try:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor, group=self.group)
        except RuntimeError as error:  # gloo's and NCCL's: a connection that is closed, or slow
            # without the file name in gloo's source, and without its advice
            reason = re.sub(r"\[[^\]]*\.cc:\d+\] *", "", str(error).splitlines()[0])
            raise LostRank(
                f"another process of this run has ended: {reason.partition('. ')[0]}",
                hint="its own error is above; the same command goes on from the last checkpoint, "
                "with any number of processes",
            ) from None

    def any(self, flag: bool) -> bool:
        """Returns whether `flag` is true on any rank. Hosts wait for each other, GPUs do not."""
        if self.world_size == 1:
            return flag
        count = torch.tensor(int(flag))
        self.all_reduce_(count)
        return bool(count)

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.any(False)

    def all_gather_json(self, value: Any) -> list[Any]:
        """Returns every rank's JSON value, in the order of ranks. Unlike torch's all_gather_object
        it pickles nothing.
        """
        if self.world_size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        self.all_reduce_(sizes)
        rows = torch.zeros(self.world_size, int(sizes.max()), dtype=torch.uint8)
        rows[self.rank, : len(own)] = own
        self.all_reduce_(rows)
        pairs = zip(rows, sizes.tolist(), strict=True)
        return [json.loads(bytes(row[:size].tolist())) for row, size in pairs]

    def check_same(self, name: str, value: str) -> None:
        """Raises ConfigError where the ranks' values differ."""
        values = self.all_gather_json(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ConfigError(
                    f"the processes of this run differ in {name}: rank {rank}'s is not that "
                    "of rank 0",
                    hint="give all of them the same configuration, model, pictures and output_dir",
                )

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the body, then the others do."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def owns(self, key: str) -> bool:
        """Returns whether this key's work (hexadecimal, 8 digits or more) is this rank's, as it is
        exactly one's.
        """
        return int(key[:8], 16) % self.world_size == self.rank

    def shard(self, batch_size: int) -> range:
        """Returns this rank's positions in a batch. Raises ConfigError unless the world size
        divides it.
        """
        if batch_size % self.world_size:
            raise ConfigError(
                f"a batch of {batch_size} (train.batch_size, data.batch_size): {self.world_size} "
                "processes cannot share that equally",
                hint="it counts the samples of all processes together: set a multiple of "
                f"{self.world_size}",
            )
        own = batch_size // self.world_size
        return range(self.rank * own, (self.rank + 1) * own)


SINGLE_PROCESS = Ranks()


def local_rank() -> tuple[int, int]:
    """Returns this process's rank on this machine, and how many there are on it."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def world_size() -> int:
    """Returns how many processes torchrun started on all machines; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restart_count() -> int:
    """Returns how often torchrun has restarted this run after one of its processes ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _init_process_group(backend: str) -> None:
    """Torchrun keeps one store for all of its restarts, with addresses of earlier ones: a prefix
    for each restart and run keeps them apart.
    """
    distributed = torch.distributed
    store, rank, size = next(distributed.rendezvous("env://", timeout=_INIT_TIMEOUT))
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore(f"attempt {restart_count()}, run {next(_RUNS)}", store),
        rank=rank,
        world_size=size,
        timeout=_INIT_TIMEOUT,
    )


@contextmanager
def init_distributed() -> Iterator[Ranks]:
    """Join the process group that torchrun describes; a world of one without torchrun.

    CPU tensors go by gloo, CUDA tensors by NCCL where torch has it, in a group of their own beside
    the caller's, if there is one. Raises FluxfastError where the ranks do not find each other.
    """
    distributed = torch.distributed
    size = world_size()
    made = distributed.is_available() and distributed.is_initialized()
    if size == 1 and not made:
        yield SINGLE_PROCESS
        return
    # a torch for CUDA need not have NCCL: under Windows it never does, and gloo takes CUDA tensors
    nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    try:
        if not made:
            _init_process_group(backend)
        group = cast(Any, distributed.new_group(timeout=_TIMEOUT, backend=backend))
    except (RuntimeError, ValueError) as error:
        raise FluxfastError(
            f"the {size} processes of this run do not find each other: "
            f"{str(error).splitlines()[0]}",
            hint="start them with `torchrun --nproc-per-node N -m fluxfast train …`",
        ) from None
    yield Ranks(distributed.get_rank(), distributed.get_world_size(), group)
    # not after an error: it might wait for a rank that has ended
    distributed.destroy_process_group(None if not made else group)
