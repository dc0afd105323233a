"""Training runs step by step, for tests that look inside."""

import json
from dataclasses import replace

import torch

from fluxfast.config.schema import Config
from fluxfast.data.loader import Loader
from fluxfast.data.prepare import prepare
from fluxfast.formats.base.load import resolve_device
from fluxfast.memory.planner.plan import Plan
from fluxfast.memory.planner.suggest import make_plan
from fluxfast.setup import bucket_shapes, build
from fluxfast.step import Training, train_step
from fluxfast.tools.plan import plan_run

CPU = torch.device("cpu")


def start(config: Config, plan: Plan | None = None) -> tuple[Training, Loader]:
    """Returns the run and its loader as train() builds them."""
    device = resolve_device(config.device)
    prepared = prepare(config, device)
    loader = Loader(prepared.dataset, config.train.batch_size, config.seed)
    return build(config, prepared.model, loader, device, plan), loader


def losses(run: Training, loader: Loader, steps: int = 4) -> list[float]:
    """Trains `steps` steps and returns the loss and the gradient norm of each."""
    accumulation = run.config.train.gradient_accumulation
    values = []
    for step in range(steps):
        window = [loader.batch(step * accumulation + i) for i in range(accumulation)]
        loss, norm, *_ = train_step(run, window, step)
        values += [loss.item(), norm.item()]
    return values


def planned(config: Config, share: float | None = None, **changes) -> Plan:
    """Returns a memory plan for the request with `changes`, under a limit of 100 GiB; with `share`,
    under that fraction of the way from the least memory to what saving everything takes."""
    prepared = prepare(config, CPU)
    loader = Loader(prepared.dataset, config.train.batch_size, config.seed)
    at_ease = config.model_copy(
        update={"memory": config.memory.model_copy(update={"limit_gib": 100.0})}
    )
    plan = plan_run(at_ease, prepared.model, bucket_shapes(loader), CPU)
    request = replace(plan.request, **changes)
    if share is None:
        return make_plan(request, plan.card, plan.limit)
    tight = make_plan(replace(request, policy="checkpoint"), plan.card, plan.limit)
    limit = tight.peak + int(share * (plan.peak - tight.peak))
    return make_plan(request, plan.card, limit)


def metrics(config: Config) -> list[dict]:
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
