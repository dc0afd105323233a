"""The steps that are timed: the bare step over any model, and the step of `fluxfast train`.

The bare step is forward, backward and optimizer, the same code for fluxfast and its peers. The
trainer's has planned memory, modulation ahead, CUDA graphs, clipping and guard, over random encoded
images instead of files. What it reads of its configuration stands here under the same names, since
the configuration itself needs libraries that a bare GPU machine does not have.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from bench import timing
from bench.saved import kept_bytes
from bench.step.peers import build_model, normal
from bench.step.settings import (
    EMA_DECAY,
    LEARNING_RATE,
    SEED,
    SETTINGS,
    Cycle,
    Kind,
    Settings,
    step_spec,
)
from fluxfast.memory.planner.plan import GIB, MARGIN, Plan, Request
from fluxfast.memory.planner.suggest import DoesNotFit, plan_on
from fluxfast.memory.runtime import MemoryExhausted
from fluxfast.objective import Batch, Inputs
from fluxfast.setup import assemble, bucket_shapes
from fluxfast.step import graph_key, train_step

ENDLESS = 10**6  # steps of the run in the trainer's configuration


class ModelStep:
    """Forward, backward and the setting's optimizer over a model with a LoRA."""

    def __init__(self, kind: Kind, settings: Settings):
        self.candidate = build_model(kind, settings)
        self.setting = SETTINGS[settings.setting]
        self.parameters = self.candidate.parameters()
        if self.setting.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=True)
        else:
            from bitsandbytes.optim import AdamW8bit

            self.optimizer = AdamW8bit(self.parameters, lr=LEARNING_RATE)
        self.ema = [p.detach().clone() for p in self.parameters] if self.setting.ema else []
        self.batches: list[Inputs] = []

    def begin(self, cycle: Cycle, batches: list[Inputs]) -> None:
        """batches: one of each of the cycle's sizes."""
        self.batches = batches

    def backward(self, inputs: Inputs) -> Tensor:
        """Forward and backward alone. Returns the loss, detached; the gradients are in the
        adapters."""
        loss = self.candidate.loss(inputs)
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Takes all steps of the cycle."""
        for batch in self.batches:
            self.backward(batch)
            if self.setting.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.setting.max_grad_norm)
            self.optimizer.step()
            self.clear()
            if self.ema:
                now = [p.detach() for p in self.parameters]
                torch._foreach_lerp_(self.ema, now, 1 - EMA_DECAY)

    def count(self, result: timing.Result) -> None:
        """Adds the bytes that autograd keeps of a step, in a cycle of one size."""
        if len(self.batches) == 1:
            (batch,), model = self.batches, self.candidate.model
            tensors = [tensor for tensor in batch if tensor is not None]
            known = [*model.parameters(), *model.buffers(), *tensors]
            kept = kept_bytes(known, lambda: self.candidate.loss(batch))
            result.details["saved_bytes"] = kept

    def end(self) -> None:
        """Frees what the cycle took."""
        self.clear()
        self.batches = []


def trainer_config(settings: Settings, batch: int) -> SimpleNamespace:
    """Returns the part of `fluxfast.config.schema.Config` that a step reads, with its defaults but
    for the setting's."""
    setting = SETTINGS[settings.setting]
    train = SimpleNamespace(
        steps=ENDLESS,
        batch_size=batch,
        gradient_accumulation=1,
        lr=LEARNING_RATE,
        optimizer=setting.optimizer,
        optimizer_args={},
        lr_schedule="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        timesteps="sigmoid",
        timestep_bias="balanced",
        guidance=1.0,
        ema=SimpleNamespace(enabled=setting.ema, decay=EMA_DECAY),
    )
    memory = SimpleNamespace(
        policy="auto", modulation="auto", optimizer_state="auto", saved_8bit="u", graphs=True
    )
    lora = SimpleNamespace(dropout=0.0)
    return SimpleNamespace(seed=SEED, train=train, lora=lora, memory=memory)


class RandomLoader:
    """Stands in for `fluxfast.data.loader.Loader`: one random batch of each size in turn, on the
    host, in pinned memory where a GPU copies from it."""

    def __init__(self, settings: Settings, cycle: Cycle):
        self.batch_size, self.text_length = cycle.batch, settings.text_tokens
        self.buckets = [((side, side), cycle.batch) for side in cycle.pixels]
        self.latent_sizes = {(side, side): (side // 8, side // 8) for side in cycle.pixels}
        self._batches = [_encoded(settings, side, cycle.batch) for side in cycle.pixels]

    def batch(self, step: int) -> Batch:
        first = step * self.batch_size
        indices = list(range(first, first + self.batch_size))
        return replace(self._batches[step % len(self._batches)], indices=indices)

    def examples(self) -> Iterator[Batch]:
        return iter(self._batches)

    def peek(self, step: int) -> tuple[list[int], int, Tensor]:
        batch = self.batch(step)
        rows, columns = batch.mean.shape[-2:]
        return batch.indices, (rows // 2) * (columns // 2), batch.pooled


def _encoded(settings: Settings, side: int, batch: int) -> Batch:
    spec, compute = settings.spec, settings.compute
    latents = (batch, spec.in_channels // 4, side // 8, side // 8)
    text = (batch, settings.text_tokens, spec.context_in_dim)
    tensors = [
        normal("mean", latents, "cpu"),
        0.01 * normal("std", latents, "cpu").abs(),
        normal("t5", text, "cpu").to(compute),
        normal("pooled", (batch, spec.vec_in_dim), "cpu").to(compute),
    ]
    if settings.device != "cpu":
        tensors = [tensor.pin_memory() for tensor in tensors]
    mean, std, t5, pooled = tensors
    return Batch(mean, std, None, t5, pooled, list(range(batch)))


class TrainerStep:
    """A cycle's steps by `fluxfast.step.train_step`, with a plan of the cycle's own; the methods
    are those of `ModelStep`."""

    def __init__(self, kind: Kind, settings: Settings):
        self.kind, self.settings = kind, settings
        self.device = torch.device(settings.device)
        if self.device.type == "cuda":  # by its number, as tensors name it
            self.device = torch.device("cuda", torch.cuda.current_device())
        # before the weights exist: a plan counts them itself
        self._plans = {cycle: self._plan(cycle) for cycle in settings.cycles}
        self.candidate = build_model(kind, settings)
        self.run = None
        self._notes: list[str] = []

    def _plan(self, cycle: Cycle) -> Plan | DoesNotFit | None:
        """Returns the plan; None on a CPU without a cap; the error where nothing fits."""
        settings = self.settings
        setting, cap = SETTINGS[settings.setting], settings.cap_gib
        request = Request(
            step_spec(self.kind, settings),
            bucket_shapes(RandomLoader(settings, cycle)),
            optimizer=setting.optimizer,
            ema=setting.ema,
            graphs=self.device.type == "cuda",
            encodes=False,
        )
        # less the margin of a card of that size, as a plan for such a card has it
        limit = None if cap is None else cap * (1 - MARGIN)
        try:
            return plan_on(self.device, request, limit)
        except DoesNotFit as error:
            return error

    def begin(self, cycle: Cycle, batches: list[Inputs]) -> None:
        """Captures and takes a first step. Raises MemoryError where no plan fits."""
        plan = self._plans[cycle]
        if isinstance(plan, DoesNotFit):
            raise MemoryError(plan.message)
        self._cycle, self._steps = cycle, 0
        self._loader = RandomLoader(self.settings, cycle)
        self._notes.clear()
        config = trainer_config(self.settings, cycle.batch)
        model, parameters = self.candidate.model, self.candidate.parameters()
        with _warnings_into(self._notes):
            self.run = assemble(config, model, parameters, self._loader, self.device, plan)
        limit_memory(self.settings)  # assembling has set the plan's own limit
        self._capture()

    def backward(self, inputs: Inputs) -> Tensor:
        """The trainer's gradient pass, as a graph where there is one."""
        run, t = self.run, inputs.timesteps
        if run.modulation_cache is not None:
            with torch.no_grad():
                modulation = run.model.modulation(t, inputs.pooled, torch.ones_like(t))
            inputs = inputs._replace(modulation=modulation)
        # positions are those of one sample in the trainer
        ids = {"img_ids": inputs.img_ids[:1], "txt_ids": inputs.txt_ids[:1]}
        indices = torch.arange(len(t), device=t.device)
        inputs = inputs._replace(noisy=inputs.noisy.float(), indices=indices, **ids)
        self.clear()
        return run.graphs(graph_key(inputs), inputs)

    def clear(self) -> None:
        self.run.flat.gradients.zero_()

    def step(self) -> None:
        for _ in self._cycle.pixels:
            batch = self._loader.batch(self._steps)
            self._within_memory(lambda batch=batch: train_step(self.run, [batch], self._steps))
            self._steps += 1

    def _within_memory(self, work) -> None:
        try:
            with _warnings_into(self._notes):
                work()
        except MemoryExhausted as error:
            raise MemoryError(error.message) from None

    def _capture(self) -> None:
        self._within_memory(self.run.memory.capture)
        self.step()

    def count(self, result: timing.Result) -> None:
        """Adds how memory is planned and used. A graph's replay allocates nothing: what counts is
        the pass that captures it, beside the optimizer's state, as after every validation of a run.
        Saved bytes are not counted: a graph keeps its own, and policies have hooks of theirs."""
        run, plan = self.run, self._plans[self._cycle]
        try:
            if run.graphs.captured:
                peak = timing.peak_memory(self._capture, self.settings.device)
                result.peak_memory_bytes, result.peak_memory_kind = peak
        finally:
            in_place = run.modulation_cache is None
            result.details |= {
                "policies": {label: dict(Counter(p)) for label, p in run.memory.policies.items()},
                "modulation": plan.modulation if plan else "in_place" if in_place else "ahead",
                "graphs": run.graphs.captured,
                "planned_gib": plan.peak / GIB if plan else None,
                "notes": list(self._notes),
            }

    def end(self) -> None:
        run, self.run = self.run, None
        if run is None:
            return
        run.graphs.drop()
        plan = self._plans[self._cycle]
        if plan is not None and plan.modulation == "host":
            # the weights have left the device for this run's buffers: build them again
            del run
            self.candidate = None
            gc.collect()
            self.candidate = build_model(self.kind, self.settings)


@contextmanager
def _warnings_into(notes: list[str]) -> Iterator[None]:
    """Collects the trainer's warnings: why there are no graphs, which policies became cheaper."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage().removeprefix("note: "))
    logger = logging.getLogger("fluxfast")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def limit_memory(settings: Settings) -> None:
    """Limits torch's allocator to `cap_gib` of the GPU, where there is a cap."""
    if settings.cap_gib is None or settings.device == "cpu":
        return
    device = torch.cuda.current_device()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, settings.cap_gib * GIB / total), device)
