"""One optimizer step, and what it works on.

Runs with torch and triton alone: the configuration and the loader are imported for types only.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fluxfast.distributed import SINGLE_PROCESS, Ranks
from fluxfast.memory.cuda_graphs import Graphs
from fluxfast.memory.runtime import MemoryRuntime
from fluxfast.model.flux import Flux
from fluxfast.model.modulation import ModulationCache
from fluxfast.objective import Batch, Inputs, noise_batch, sample_losses
from fluxfast.optim import Ema, FlatParameters, clip_and_guard, learning_rate, step_unless

if TYPE_CHECKING:
    from fluxfast.config.schema import Config
    from fluxfast.data.loader import Loader


@dataclass
class Training:
    """What a step works on. labels: (samples of a batch, image tokens of each) -> the bucket's
    name in the plan.
    """

    config: Config
    device: torch.device
    model: Flux
    flat: FlatParameters
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    memory: MemoryRuntime
    labels: dict[tuple[int, int], str]
    loader: Loader
    modulation_cache: ModulationCache | None = None
    ranks: Ranks = SINGLE_PROCESS
    done: int = 0  # steps of the run; 0 before this process has taken one
    updating: bool = False  # whether the optimizer has begun a step and not ended it
    graphs: Graphs = field(init=False)

    def gradient_pass(self, inputs: Inputs) -> Tensor:
        """Run forward and backward of one batch into the gradients. Returns its detached loss."""
        loss = self.loss(inputs)
        loss.backward()
        return loss.detach()

    def loss(self, inputs: Inputs, count: int | None = None) -> Tensor:
        """Run the forward pass of one batch. Returns its share of the step's loss.

        count: samples of the batch whose policies are used, by default those of `inputs`.
        """
        self.memory.use(self.labels[count or len(inputs.noisy), inputs.noisy.shape[1]])
        self.model.dropout_clock.indices = inputs.indices
        train = self.config.train
        # every batch counts the same, so accumulation is one larger batch; ranks share each alike
        parts = train.gradient_accumulation * self.ranks.world_size
        return sample_losses(self.model, inputs, train.guidance).mean() / parts

    def inputs(self, batch: Batch) -> Inputs:
        """Returns a batch on the device, noised, with its target."""
        train = self.config.train
        number = batch.indices[0] // self.loader.batch_size
        modulation = self.modulation_cache(number) if self.modulation_cache else None
        settings = self.config.seed, train.timesteps, train.timestep_bias
        return noise_batch(batch, *settings, device=self.device, modulation=modulation)

    def examples(self) -> dict[Hashable, Inputs]:
        """Returns graph key -> inputs, for every shape in the data."""
        examples = {}
        for batch in self.loader.examples():
            inputs = self.inputs(batch)
            if inputs.modulation is not None:  # a view that keeps many batches' modulation alive
                inputs = inputs._replace(modulation=inputs.modulation.clone())
            examples[graph_key(inputs)] = inputs
        return examples


def graph_key(inputs: Inputs) -> Hashable:
    """Returns what a graph is captured for: shapes, and whether there is a mask."""
    return tuple(inputs.noisy.shape), inputs.t5.shape[1], inputs.mask is None


def train_step(
    run: Training, batches: list[Batch], step: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Take one optimizer step (counted from 0) on the mean loss of `batches`, each this rank's
    share. Does not synchronize with the device.

    Returns loss, gradient norm before clipping, 1.0 where the step was skipped (all fp32 scalars on
    the device), and the learning rate. Where memory runs out before the optimizer has begun, the
    gradients are computed again with cheaper policies.
    """
    total = run.memory.retry(lambda: _accumulate(run, batches))
    run.ranks.all_reduce_(run.flat.gradients, total)
    train = run.config.train
    norm, bad = clip_and_guard(run.flat.gradients, train.max_grad_norm, total)
    lr = learning_rate(step, train)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.updating = True
    with run.memory.stepping():
        step_unless(run.optimizer, bad)
    if run.ema:
        run.ema.update(bad)
    run.updating = False
    return total, norm, bad, lr


def _accumulate(run: Training, batches: list[Batch]) -> Tensor:
    """Sum the batches' gradients into `run.flat.gradients`. Returns their summed loss."""
    run.flat.gradients.zero_()
    total = torch.zeros((), device=run.device)
    for batch in batches:
        rows, columns = batch.mean.shape[-2:]
        run.memory.expect(run.labels[len(batch.mean), (rows // 2) * (columns // 2)])
        inputs = run.inputs(batch)
        total += run.graphs(graph_key(inputs), inputs)
    return total
